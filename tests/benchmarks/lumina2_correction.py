"""What the correction of skipped steps brings, over shifts and guidance scales, and what a plan brings on top of it.

    python tests/benchmarks/lumina2_correction.py            # the bundled model through its pipeline, 6 + 6 prompts

For each (guidance, shift, cfg_trunc_ratio) and each way of skipping, the same prompts are drawn with and without the
correction, and compared with the uncached image of as many steps; 15 of 100 steps with the converged image, of 250 steps
at a shift of 3. Then `plan_lumina2.py` plans on four prompts, and its plan and the default choice of as many steps are
measured on eight others. Last, very few computed steps are compared with as many plain ones. Rows are written as they are
done; run again to resume. `render.py` makes tables of them.
"""

import argparse
import random
import sys
import warnings
from argparse import Namespace
from functools import partial
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
FEW = 4, 5, 6, 8, 15  # computed of 30 steps, against as many plain steps
FEW_CASES = (4.0, 2.0, 1.0), (4.0, 6.0, 1.0)


def psnr(image, reference):
    """dB, at most 99; of arrays in [0, 1]."""
    mse = max(float(np.square(image - reference).mean()), 10**-9.9)
    return round(-10 * float(np.log10(mse)), 2)


class Trial:
    """The pipeline, and (prompt, seed) jobs to draw with it."""

    def __init__(self, pipeline, jobs):
        self.pipeline, self.jobs, self.references = pipeline, jobs, {}

    def draw(self, case, steps, **settings):
        """The images, as arrays in [0, 1], and the mean number of computed steps."""
        guidance, shift, cfg_trunc_ratio = case
        self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        teacache_lumina2.apply_teacache(self.pipeline, **settings)
        images, passes = [], []
        for prompt, seed in self.jobs:
            output = self.pipeline(
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                cfg_trunc_ratio=cfg_trunc_ratio,
                output_type="np",
                generator=torch.Generator().manual_seed(seed),
            )
            images.append(output.images[0])
            passes.append(sum(self.pipeline.transformer.teacache.schedule))
        teacache_lumina2.remove_teacache(self.pipeline)
        return images, float(np.mean(passes))

    def compare(self, images, case, steps=STEPS):
        """PSNR of each image to the uncached one."""
        if (case, steps) not in self.references:
            self.references[case, steps], _ = self.draw(case, steps, rel_l1_thresh=0.0)
        return [psnr(image, reference) for image, reference in zip(images, self.references[case, steps])]


def measure_way(trial, name, case, steps, settings, reference):
    """With and without the correction, PSNR to the image of the (case, steps) `reference`."""
    row = {"way": name}
    for column, correct in (("corrected", True), ("not_corrected", False)):
        teacache_lumina2.CORRECT = correct
        images, row[f"passes_{column}"] = trial.draw(case, steps, **settings)
        teacache_lumina2.CORRECT = True
        row[column] = trial.compare(images, *reference)
    return row


def measure_plan(trial, planning, case, computed_steps):
    """A plan that was made on the jobs `planning`, and PSNR of it and of the default choice on those of the trial."""
    guidance, shift, cfg_trunc_ratio = case
    trial.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    settings = {"guidance_scale": guidance, "cfg_trunc_ratio": cfg_trunc_ratio, "num_inference_steps": STEPS}
    settings |= {"computed_steps": computed_steps, "height": None, "width": None, "negative_prompt": ""}
    plan = plan_lumina2.make_plan(trial.pipeline, Namespace(planning=planning, **settings), tqdm(disable=True))
    row = {"plan": plan}
    for name, steps in (("default", computed_steps), ("planned", plan)):
        row[name] = trial.compare(trial.draw(case, STEPS, computed_steps=steps)[0], case)
    return row


def measure_few(trial, case, k):
    """k computed steps, and k plain ones."""
    computed, _ = trial.draw(case, STEPS, computed_steps=k)
    plain, _ = trial.draw(case, k, rel_l1_thresh=0.0)
    return {"few": k, "computed": trial.compare(computed, case), "plain": trial.compare(plain, case)}


def rows(trial, planning, proving):
    """(key, case, function that measures the row)"""
    for case, k in PLANS:
        yield record.slug("plan", *case, k), case, partial(measure_plan, proving, planning, case, k)
    for case in CASES:
        for name, settings in WAYS.items():
            measure = partial(measure_way, trial, name, case, STEPS, settings, (case, STEPS))
            yield record.slug("case", *case, name), case, measure
    for case in CONVERGING:
        name, converged = f"15 of {MORE_STEPS}, to converged", ((case[0], 3.0, 1.0), CONVERGED)
        measure = partial(measure_way, trial, name, case, MORE_STEPS, {"computed_steps": 15}, converged)
        yield record.slug("case", *case, name), case, measure
    for case in FEW_CASES:
        for k in FEW:
            yield record.slug("case", *case, "few", k), case, partial(measure_few, trial, case, k)


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
    results = record.Record(args.output, ["transformers"], model=args.model.name, known=known, new=new)
    warnings.simplefilter("ignore")
    pipeline = Lumina2Pipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    trial = Trial(pipeline, [(prompt, seed) for seed, prompt in enumerate(known + new)])
    others = [(prompt, 100 + seed) for seed, prompt in enumerate(random.Random(5).sample(names, 12))]
    for key, case, measure in rows(trial, others[:4], Trial(pipeline, others[4:])):
        if key not in results.rows:
            results.add(key, case=case, **measure())
            print(key, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
