"""What a threshold means with the coefficients v1 and v2: computed steps, and how close the image comes, over shifts.

    python tests/benchmarks/lumina2_thresholds.py            # the bundled model in float32, 6 training captions

Corrected, as by default. Rows are written as they are done; run again to go on.
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import lumina2_peers
import prompts
import record
import torch
from lumina2_peers import Lab, psnr, teacache_lumina2

CASES = (30, 6.0), (30, 2.0), (30, 1.0), (50, 6.0)  # steps, shift
THRESHOLDS = 0.1, 0.2, 0.3


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=teacache_lumina2.BUNDLED_MODEL, help="folder with an emoji.txt")
    add("--count", type=int, default=6, help="how many prompts")
    add("--seed", type=int, default=3000)
    add("--output", type=Path, default=record.RESULTS / "thresholds.json")
    args = parser.parse_args()

    captions = prompts.known(args.model)["correction"][: args.count]
    about = {"model": args.model.name, "prompts": captions, "guidance": 4.0, "seed": args.seed}
    results = record.Record(args.output, ["transformers"], **about)
    warnings.simplefilter("ignore")
    lab = Lab(lumina2_peers.load(args.model, torch.float32), captions, 4.0, args.seed)
    for steps, shift in CASES:
        reference = None
        for name in ("v1", "v2"):
            coefficients = getattr(teacache_lumina2, f"COEFFICIENTS_{name.upper()}")
            for threshold in THRESHOLDS:
                key = record.slug(steps, "steps shift", shift, name, threshold)
                if key in results.rows:
                    continue
                began = time.process_time()
                reference = lab.euler(steps, shift) if reference is None else reference
                images = lab.teacache(steps, shift, True, rel_l1_thresh=threshold, coefficients=coefficients)
                row = {"steps": steps, "shift": shift, "coefficients": name, "threshold": threshold}
                row |= {"passes": round(lab.passes, 2), "float32": [round(dB, 2) for dB in psnr(images, reference)]}
                results.add(key, **row)
                shown = f"{lab.passes:.1f} passes, {statistics.mean(row['float32']):.1f} dB"
                print(f"{key}: {shown}, {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
