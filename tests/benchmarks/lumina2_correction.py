"""What the correction of skipped steps brings, over shifts and guidance scales.

    python tests/benchmarks/lumina2_correction.py                   # the bundled model, 30 steps, 8 + 8 prompts
    python tests/benchmarks/lumina2_correction.py --group open      # other prompts: open, or empty

For each (guidance, shift) and each way of skipping, the same prompts are drawn with and without the correction, and compared
with the uncached image. The prompts are others than those of `lumina2_peers.py`, or other seeds. Each group is a file. Rows are written as they are done; run
again to go on.
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
from lumina2_peers import GROUPS, STEPS, Lab, psnr

CASES = (4.0, 6.0), (4.0, 2.0), (4.0, 1.0), (8.0, 2.0)  # guidance, shift
WAYS = [*({"computed_steps": k} for k in (15, 10, 8, 6)), {"rel_l1_thresh": 0.3}]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=lumina2_peers.teacache_lumina2.BUNDLED_MODEL, help="folder with an emoji.txt")
    add("--count", type=int, default=8, help="how many known and how many new prompts")
    add("--seed", type=int, default=2000)
    add("--group", choices=GROUPS, default="clear", help="of prompts")
    add("--output", type=Path, help="default: a file in results")
    args = parser.parse_args()

    known, new = prompts.known(args.model)["correction"][: args.count], prompts.MORE_NEW[: args.count]
    groups = {"clear": {"known": known, "new": new}, "open": {"open": prompts.OPEN}, "empty": {"empty": prompts.EMPTY}}
    drawn, file = groups[args.group], record.RESULTS / f"correction{GROUPS[args.group]}.json"
    about = {"model": args.model.name, **drawn, "seed": args.seed}
    results = record.Record(args.output or file, ["transformers"], **about)
    warnings.simplefilter("ignore")
    pipeline = lumina2_peers.load(args.model, torch.float32)
    for guidance, shift in CASES:
        own = 1.0 if args.group == "empty" else guidance  # its rows at guidance 8 are those at 4
        lab, reference = Lab(pipeline, sum(drawn.values(), []), own, args.seed), None
        for way in WAYS:
            ((name, value),) = way.items()
            key = record.slug("guidance", guidance, "shift", shift, name, value)
            if key in results.rows:
                continue
            began = time.process_time()
            reference = lab.euler(STEPS, shift) if reference is None else reference
            row = {"guidance": guidance, "shift": shift, "way": f"{name} {value}"}
            for column, corrected in (("corrected", True), ("not_corrected", False)):
                images = lab.teacache(STEPS, shift, corrected, **way)
                row[f"passes_{column}"] = round(lab.passes, 2)
                row[column] = [round(dB, 2) for dB in psnr(images, reference)]
            results.add(key, **row)
            means = [statistics.mean(row[column]) for column in ("not_corrected", "corrected")]
            seconds = time.process_time() - began
            print(f"{key}: {means[0]:.1f} to {means[1]:.1f} dB, {seconds:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
