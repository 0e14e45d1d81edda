"""Which steps to compute: the constants of `choose_steps`, tried over prompts, shifts, guidance scales and numbers of steps.

    python tests/benchmarks/lumina2_steps.py            # the bundled model, 30 steps, 28 prompts
    python tests/benchmarks/lumina2_steps.py --shown    # draws nothing, prints what there is

For each image the first step is computed, q is measured, and the steps are chosen: as the script does, and with one constant
changed. Each choice is drawn in a loop of its own, in float32 with the correction, and compared with the uncached image.
Printed for each choice: the mean of each group, each image cut at 46 dB (beyond, the rounding of bfloat16 is larger), the
least gain of a group over the choice before q was measured, and the share of images below 30 dB. Rows are written as they are
done; run again to go on.
"""

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import lumina2_peers
import numpy as np
import prompts
import record
import torch
from lumina2_peers import STEPS, Lab, psnr, sigmas
from lumina2_peers import teacache_lumina2 as teacache

CELLS = (  # guidance, shift, computed steps
    *((4.0, 6.0, k) for k in (15, 10, 8, 6, 5)),
    *((4.0, 2.0, k) for k in (10, 8)),
    *((4.0, 1.0, k) for k in (12, 8, 6)),
    *((4.0, 3.0, k) for k in (8,)),
    *((8.0, 2.0, k) for k in (10, 8, 6)),
    *((1.0, 6.0, k) for k in (8,)),
)
BEFORE, USED = "three quarters sigma", "t = 3 ** (2 - 5 q), 1 to 3"
CHOICES = {
    BEFORE: {"share": 0.75},
    USED: {},
    "t = 1": {"top": 1.0},
    "t = 3": {"falls": (1.0, 2.0)},
    "t = 2 ** (2 - 5 q), 1 to 2": {"top": 2.0},
    "t = 4 ** (2 - 5 q), 1 to 4": {"top": 4.0},
    "t = 3 ** (1 - 2 q), 1 to 3": {"falls": (0.0, 0.5)},
    "t = 3 to q = 0.3, then 1": {"falls": (0.299, 0.301)},
    "the last gap counts once": {"last": 1},
    "the last gap counts four times": {"last": 4},
    "the first gap counts half": {"first": 0.5},
    "distance to the power 3/2": {"power": 1.5},
    "distance to the power 3": {"power": 3.0},
}


def choose(s, count, q, share=None, top=3.0, falls=(0.2, 0.4), last=2, first=1.0, power=2.0):
    """`choose_steps` with its constants open. falls: the q from which, and to which, t falls from `top` to 1.

    share: the distance before, so much of sigma, the rest of the number of steps.
    """
    num_steps, s = len(s), np.array(s) / s[0]
    t = top ** min(max((falls[1] - q) / (falls[1] - falls[0]), 0), 1)
    position = num_steps * (1 - s / (s + t * (1 - s)))
    if share is not None:
        position = share * num_steps * (1 - s) + (1 - share) * np.arange(num_steps)
    length = np.diff(position, append=num_steps)
    errors = np.triu(length * np.abs(position - position[:, None]) ** power)
    costs = np.cumsum(errors, axis=1) - errors
    costs[:, -1] *= last
    costs[0] *= first
    costs = np.rint(100 * costs)
    costs[np.tril_indices(num_steps)] = math.inf
    least, before = costs[0], []
    for _ in range(count - 2):
        sums = least[:, None] + costs
        least = sums.min(axis=0)
        before.append(sums.argmin(axis=0))
    chosen = [num_steps - 1]
    for previous in reversed(before):
        chosen.append(int(previous[chosen[-1]]))
    return tuple(sorted({0, *chosen}))


class Group:
    """Prompts at a guidance scale and a shift: dB of each image for each plan, drawn once."""

    def __init__(self, pipeline, prompts, guidance, shift, seed):
        self.lab, self.s, self.dB = Lab(pipeline, prompts, guidance, seed), sigmas(STEPS, shift), {}
        self.first = self.lab.outputs(self.lab.noise, 1.0)
        self.q = [teacache.measure_decided(first[:, None]) for first in self.first]
        everything = list(range(len(prompts)))
        self.reference = self.draw(everything, range(STEPS))

    def draw(self, rows, plan):
        """The computed calls of all rows at once; without guidance a step is one call."""
        part, corrector = self.lab.select(rows), teacache.Corrector()
        x, kept = part.noise, []
        for i, (s, next_s) in enumerate(zip(self.s, self.s[1:])):
            if i in plan:
                kept = [*kept[-2:], (s, part.outputs(x, s) if i else self.first[rows])]
            velocity = -part.guide(self.extrapolate(kept, s))
            x = x + (next_s - s) * velocity + corrector.correction(velocity, s, next_s, i in plan, 2)
        return part.images(x)

    @staticmethod
    def extrapolate(kept, s):
        """Each call of each image has its own r: flat, they are a batch."""
        if s == kept[-1][0]:
            return kept[-1][1]
        flat = teacache.extrapolate([(at, v.flatten(0, 1)) for at, v in kept], s)
        return flat.unflatten(0, kept[-1][1].shape[:2])

    def measure(self, count, **constants):
        """dB of each image with its own steps. Images of equal steps are drawn together."""
        plans = [choose(self.s[:-1], count, q, **constants) for q in self.q]
        for plan in dict.fromkeys(plans):
            rows = [i for i, own in enumerate(plans) if own == plan and (i, plan) not in self.dB]
            if rows:
                self.dB |= zip(((i, plan) for i in rows), psnr(self.draw(rows, plan), self.reference[rows]))
        return [round(self.dB[i, plan], 2) for i, plan in enumerate(plans)]


def show(rows):
    """A line for each choice."""
    groups = [name for name in ("known", "new", "open", "empty") if any(name in row for row in rows.values())]
    print("choice".ljust(34), *(f"{name:>6}" for name in groups), "  least gain  below 30 dB")
    means = {}
    for choice in CHOICES:
        own = [row for row in rows.values() if row["choice"] == choice]
        if len(own) < len(CELLS):
            continue
        images = {name: [dB for row in own for dB in row.get(name, ())] for name in groups}
        means[choice] = [statistics.mean(min(dB, 46.0) for dB in images[name]) for name in groups]
        gain = min(mine - before for mine, before in zip(means[choice], means[BEFORE]))
        every = [dB for name in groups for dB in images[name]]
        below = sum(dB < 30 for dB in every) / len(every)
        print(choice.ljust(34), *(f"{mean:6.2f}" for mean in means[choice]), f"{gain:+12.2f}  {below:11.1%}")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=teacache.BUNDLED_MODEL,
        help="folder with an emoji.txt, or else the bundled captions",
    )
    add("--shown", action="store_true", help="draw nothing, print what there is")
    add("--seed", type=int, default=3000)
    add("--output", type=Path, default=record.RESULTS / "steps.json")
    args = parser.parse_args()
    if args.shown:
        show(json.loads(args.output.read_text(encoding="utf-8"))["rows"])
        return
    captions = args.model if (args.model / "emoji.txt").exists() else teacache.BUNDLED_MODEL
    known = prompts.known(captions)["correction"][:4]
    groups = {"known": known, "new": prompts.MORE_NEW, "open": prompts.OPEN, "empty": prompts.EMPTY}
    results = record.Record(args.output, ["transformers"], model=args.model.name, **groups, seed=args.seed)
    warnings.simplefilter("ignore")
    pipeline, made, began = lumina2_peers.load(args.model, torch.float32), {}, time.process_time()
    for guidance, shift, count in CELLS:
        for choice, constants in CHOICES.items():
            key = record.slug("guidance", guidance, "shift", shift, "computed", count, choice)
            if key in results.rows:
                continue
            row = {"guidance": guidance, "shift": shift, "computed": count, "choice": choice}
            for name, texts in groups.items():
                own = 1.0 if name == "empty" else guidance
                if name == "empty" and guidance != 4:
                    continue  # always without guidance: drawn with the others of its shift
                if (name, own, shift) not in made:
                    made[name, own, shift] = Group(pipeline, texts, own, shift, args.seed)
                row[name] = made[name, own, shift].measure(count, **constants)
            results.add(key, **row)
        print(f"{guidance:g}, {shift:g}, {count}: {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    for q in (0.0, 0.3, 0.35, 1.0):
        assert list(choose(sigmas(STEPS, 6.0)[:-1], 8, q)) == teacache.choose_steps(sigmas(STEPS, 6.0)[:-1], 8, q)
    show(results.rows)


if __name__ == "__main__":
    main()
