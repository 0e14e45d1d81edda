"""What the correction of skipped steps brings, over shifts and guidance scales, and what a plan brings on top of it.

    python tests/benchmarks/lumina2_correction.py            # the bundled model through its pipeline, 6 + 6 prompts

For each (guidance, shift, cfg_trunc_ratio) and each way of skipping, the same prompts are drawn with and without the
correction, and compared with the uncached image of as many steps; 15 of 100 steps with the converged image, of 250 steps
at a shift of 3. Then `plan_lumina2.py` plans on four prompts, and its plan and the default choice of as many steps are
measured on eight others. Writes rows as they are done, and goes on where it was stopped; `render.py` makes tables of them.
"""

import argparse
import random
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import lumina2_peers
import numpy as np
import record
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from TeaCache4LuminaT2X import plan_lumina2, teacache_lumina2  # noqa: E402

STEPS, MORE_STEPS, CONVERGED = 30, 100, 250
CASES = (  # guidance, shift, cfg_trunc_ratio
    (4.0, 6.0, 1.0),
    (4.0, 2.0, 1.0),
    (4.0, 1.0, 1.0),
    (4.0, 0.33, 1.0),
    (1.5, 2.0, 1.0),
    (8.0, 2.0, 1.0),
    (8.0, 6.0, 1.0),
    (4.0, 6.0, 0.25),
)
WAYS = {
    "threshold 0.3": {"rel_l1_thresh": 0.3},
    "computed_steps 15": {"computed_steps": 15},
    "computed_steps 10": {"computed_steps": 10},
    "tolerance 0.003": {"tolerance": 0.003},
    "tolerance 0.01": {"tolerance": 0.01},
}
CONVERGING = (4.0, 6.0, 1.0), (4.0, 1.0, 1.0)  # cases in which 15 of 100 steps are compared with the converged image
PLANS = (  # case, computed steps
    ((4.0, 6.0, 1.0), 15),
    ((4.0, 6.0, 1.0), 10),
    ((4.0, 6.0, 1.0), 8),
    ((4.0, 2.0, 1.0), 10),
    ((4.0, 1.0, 1.0), 10),
    ((8.0, 2.0, 1.0), 10),
    ((4.0, 6.0, 0.25), 10),
)


def psnr(image, reference):
    """dB, at most 99; of arrays in [0, 1]."""
    mse = max(float(np.square(image - reference).mean()), 10**-9.9)
    return round(-10 * float(np.log10(mse)), 2)


def draw(pipeline, jobs, case, steps, **settings):
    """The images of (prompt, seed) jobs, as arrays in [0, 1], and the mean number of computed steps."""
    guidance, shift, cfg_trunc_ratio = case
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    settings = settings or {"rel_l1_thresh": 0.0}
    teacache_lumina2.apply_teacache(pipeline, **settings)
    images, passes = [], []
    for prompt, seed in jobs:
        output = pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            cfg_trunc_ratio=cfg_trunc_ratio,
            output_type="np",
            generator=torch.Generator().manual_seed(seed),
        )
        images.append(output.images[0])
        passes.append(sum(pipeline.transformer.teacache.schedule))
    teacache_lumina2.remove_teacache(pipeline)
    return images, float(np.mean(passes))


def measure_way(pipeline, jobs, case, steps, settings, references):
    """A row: with and without the correction, PSNR to the references."""
    row = {}
    for name, correct in (("corrected", True), ("not_corrected", False)):
        teacache_lumina2.CORRECT = correct
        images, row["passes"] = draw(pipeline, jobs, case, steps, **settings)
        row[name] = [psnr(image, reference) for image, reference in zip(images, references)]
    teacache_lumina2.CORRECT = True
    return row


def measure_plan(pipeline, planning, proving, case, computed_steps):
    """A row: the plan, made on some jobs, and PSNR of it and of the default choice on the others."""
    guidance, _, cfg_trunc_ratio = case
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=case[1])
    named = {"guidance_scale": guidance, "cfg_trunc_ratio": cfg_trunc_ratio, "num_inference_steps": STEPS}
    size = {"height": None, "width": None, "negative_prompt": ""}
    args = Namespace(planning=planning, computed_steps=computed_steps, **named, **size)
    plan = plan_lumina2.make_plan(pipeline, args, tqdm(disable=True))
    references, _ = draw(pipeline, proving, case, STEPS)
    row = {"plan": plan}
    for name, steps in (("default", computed_steps), ("planned", plan)):
        images, _ = draw(pipeline, proving, case, STEPS, computed_steps=steps)
        row[name] = [psnr(image, reference) for image, reference in zip(images, references)]
    return row


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=teacache_lumina2.BUNDLED_MODEL, help="folder with an emoji.txt")
    add("--count", type=int, default=6, help="how many known and how many new prompts")
    add("--output", type=Path, default=record.RESULTS / "correction.json")
    args = parser.parse_args()

    lines = (args.model / "emoji.txt").read_text(encoding="utf-8").splitlines()
    names = [line.split("\t")[1].strip() for line in lines if "\t" in line]
    known = random.Random(11).sample(names, args.count)
    new = lumina2_peers.NEW_PROMPTS[8 : 8 + args.count]
    jobs = [(prompt, seed) for seed, prompt in enumerate(known + new)]
    drawn = [(prompt, 100 + seed) for seed, prompt in enumerate(random.Random(5).sample(names, 12))]
    results = record.Record(args.output, ["transformers"], model=args.model.name, known=known, new=new)
    warnings.simplefilter("ignore")
    pipeline = Lumina2Pipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)

    for case, computed_steps in PLANS:
        key = record.slug("plan", *case, computed_steps)
        if key not in results.rows:
            row = measure_plan(pipeline, drawn[:4], drawn[4:], case, computed_steps)
            results.add(key, case=case, computed_steps=computed_steps, **row)
    converged = None
    for case in CASES:
        ways = {name: settings for name, settings in WAYS.items() if record.slug(*case, name) not in results.rows}
        references = draw(pipeline, jobs, case, STEPS)[0] if ways else None
        for name, settings in ways.items():
            row = measure_way(pipeline, jobs, case, STEPS, settings, references)
            results.add(record.slug(*case, name), case=case, way=name, **row)
        name = f"15 of {MORE_STEPS}, to converged"
        if case in CONVERGING and record.slug(*case, name) not in results.rows:
            if converged is None:
                converged, _ = draw(pipeline, jobs, (case[0], 3.0, 1.0), CONVERGED)
            row = measure_way(pipeline, jobs, case, MORE_STEPS, {"computed_steps": 15}, converged)
            results.add(record.slug(*case, name), case=case, way=name, **row)
        print(f"guidance, shift, cfg_trunc_ratio {case}: done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
