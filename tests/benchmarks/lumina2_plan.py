"""What plan_lumina2.py gains over the default choice of as many steps, on prompts that it was not planned on.

python tests/benchmarks/lumina2_plan.py                  # the bundled model, planned on 4 prompts, proven on 8 others
"""

import argparse
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path

import lumina2_peers
import prompts
import record
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from lumina2_peers import STEPS, Lab, psnr, teacache_lumina2
from tqdm import tqdm

from TeaCache4LuminaT2X import plan_lumina2

CASES = (  # guidance, shift, cfg_trunc_ratio, computed steps
    (4.0, 6.0, 1.0, 15),
    (4.0, 6.0, 1.0, 10),
    (4.0, 6.0, 1.0, 8),
    (4.0, 2.0, 1.0, 10),
    (4.0, 1.0, 1.0, 10),
    (8.0, 2.0, 1.0, 10),
    (4.0, 6.0, 0.25, 10),
)


def make_plan(pipeline, planning, guidance, shift, cfg_trunc_ratio, computed_steps):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    settings = {"guidance_scale": guidance, "cfg_trunc_ratio": cfg_trunc_ratio, "num_inference_steps": STEPS}
    settings |= {"computed_steps": computed_steps, "height": None, "width": None, "negative_prompt": ""}
    return plan_lumina2.make_plan(pipeline, Namespace(planning=planning, **settings), tqdm(disable=True))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=teacache_lumina2.BUNDLED_MODEL, help="folder with an emoji.txt")
    parser.add_argument("--count", type=int, default=8, help="how many prompts to prove a plan on")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "plan.json")
    args = parser.parse_args()
    groups = prompts.known(args.model)
    proving = groups["proving"][: args.count]
    about = {"model": args.model.name, "known": proving, "new": [], "planning": groups["planning"]}
    results = record.Record(args.output, ["transformers"], **about)
    warnings.simplefilter("ignore")
    pipeline = lumina2_peers.load(args.model, torch.float32)
    for case in CASES:
        guidance, shift, cfg_trunc_ratio, k = case
        key, began = record.slug("plan", *case), time.process_time()
        if key in results.rows:
            continue
        plan = make_plan(pipeline, [(p, 100 + i) for i, p in enumerate(groups["planning"])], *case)
        lab = Lab(pipeline, proving, guidance, 3000, cfg_trunc_ratio)
        reference, row = lab.euler(STEPS, shift), {"case": case, "plan": plan}
        for name, computed_steps in (("default", k), ("planned", plan)):
            images = lab.teacache(STEPS, shift, True, computed_steps=computed_steps)
            row[name] = [round(dB, 2) for dB in psnr(images, reference)]
        results.add(key, **row)
        means = [sum(row[name]) / len(proving) for name in ("default", "planned")]
        seconds = time.process_time() - began
        print(f"{key}: {means[0]:.1f} to {means[1]:.1f} dB, {seconds:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
