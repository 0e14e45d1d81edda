"""Plan which steps TeaCache computes, for one Lumina2 checkpoint and its settings.

    python plan_lumina2.py prompts.txt --computed-steps 10      # one prompt per line, eight or more

Four of the prompts are drawn without a cache. That shows what each gap between computed steps would do to the latents:
from the last computed steps j and i (before j), with sigmas s and velocities v,

    cost of the gap = norm of the sum of (s[m+1] - s[m]) (extrapolated(s[m]) - v[m]) over its skipped steps m

Dynamic programming finds the schedule of the least total cost. Four other prompts then prove it: they are drawn without
a cache, with the steps that the script chooses by default, and with the plan. The line to paste into
teacache_lumina2.py is printed only if the plan comes closer to the original there. A plan is for one number of steps,
scheduler and guidance: plan again if they change. Takes the flags of teacache_lumina2.py as well, but draws other
images than --prompt.
"""

import functools
import math
import random
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

if __package__:
    from . import teacache_lumina2
else:
    import teacache_lumina2

PLANNING = PROVING = 4  # prompts


def build_parser():
    parser = teacache_lumina2.build_parser()
    parser.add_argument("prompts", metavar="FILE", help="UTF-8 text, one prompt per line, eight or more")
    return parser


def choose_jobs(args):
    """Eight (prompt, seed), the prompts different ones of the file, at random. Raises ValueError if there are fewer."""
    if args.computed_steps is None:
        raise ValueError("give --computed-steps, such as 10: the number of steps to plan")
    lines = Path(args.prompts).read_text(encoding="utf-8-sig").split("\n")
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(prompts) < PLANNING + PROVING:
        need = f"{PLANNING} to plan and {PROVING} others to prove the plan"
        raise ValueError(f"{args.prompts} has {len(prompts)} different prompts; {need} are needed")
    chosen = random.Random(args.seed).sample(prompts, PLANNING + PROVING)
    return [(prompt, args.seed + i) for i, prompt in enumerate(chosen)]


def draw(pipeline, args, job, computed_steps=None):
    """A PIL image, with these steps computed; without a cache if there are none."""
    prompt, seed = job
    threshold = 0.0 if computed_steps is None else None
    limits = {"rel_l1_thresh": threshold, "computed_steps": computed_steps}
    settings = {**vars(args), **limits, "prompt": prompt, "seed": seed}
    return teacache_lumina2.generate(pipeline, Namespace(**settings))[0]


class Step(NamedTuple):
    """One step of a trajectory that was drawn without a cache."""

    sigma: float  # 1 is noise, 0 the image
    guided: torch.Tensor  # (values,): the velocity that moves the latents
    conditional: torch.Tensor  # (values,): the velocity before guidance
    calls: int  # of the network: 1 without guidance


@contextmanager
def recording(pipeline):
    """The steps that are drawn within, as a list that grows."""
    teacache_lumina2.remove_teacache(pipeline)  # it wraps the scheduler as well
    network, scheduler, steps, outputs = pipeline.transformer, pipeline.scheduler, [], []
    stock, is_wrapped = scheduler.step, "step" in vars(scheduler)

    def keep(module, inputs, output):
        outputs.append(output[0])

    def step(velocity, timestep, *args, **kwargs):
        sigma = float(timestep) / scheduler.config.num_train_timesteps
        guided, conditional = (v.flatten().cpu().double() for v in (velocity, -outputs[0]))  # the pipeline turns signs
        steps.append(Step(sigma, guided, conditional, len(outputs)))
        outputs.clear()
        return stock(velocity, timestep, *args, **kwargs)

    hook = network.register_forward_hook(keep)
    scheduler.step = functools.update_wrapper(step, stock)
    try:
        yield steps
    finally:
        hook.remove()
        teacache_lumina2.remove_teacache(pipeline)
        del scheduler.step
        if is_wrapped:  # by somebody else
            scheduler.step = stock


def coordinates(steps):
    """Guided and conditional velocities, each (steps, 2 * steps), in few coordinates that keep all products of them.

    Scaled to a mean square of 1, so that all prompts count alike.
    """
    velocities = torch.stack([step.guided for step in steps] + [step.conditional for step in steps])
    gram = velocities @ velocities.T
    values, vectors = torch.linalg.eigh(gram / gram.diagonal().mean())
    return (vectors * values.clamp(min=0).sqrt()).split(len(steps))


def gap_costs(trajectories):
    """{(i, j, k): cost} of computing step k after j, after i (None: j is the first one); the mean over trajectories."""
    steps = trajectories[0]
    sigmas, calls = [step.sigma for step in steps], [step.calls for step in steps]
    guided, conditional = (torch.stack(v, dim=1) for v in zip(*map(coordinates, trajectories)))
    costs = {}  # guided, conditional: (steps, trajectories, coordinates)
    for j in range(len(steps)):
        for i in range(j) if j else [None]:
            error = torch.zeros_like(guided[0])
            for k in range(j + 1, len(steps)):
                costs[i, j, k] = error.norm(dim=-1).mean().item()
                if k < len(steps) - 1:  # of a gap that goes on, in which k is skipped
                    velocities = conditional if calls[k] == 1 else guided
                    points = [(sigmas[n], velocities[n]) for n in (i, j) if n is not None]
                    used = teacache_lumina2.extrapolate(points, sigmas[k])
                    error = error + (sigmas[k + 1] - sigmas[k]) * (used - guided[k])
    return costs


def best_plan(costs, num_steps, computed_steps):
    """The list of that many computed steps, from the first to the last one, of the least sum of costs.

    Exact: after each computed step, the best way to each (previous, current) pair is known.
    """
    ways = {(None, 0): (0.0, [0])}
    for left in reversed(range(computed_steps - 1)):  # computed steps that remain after this one
        longer = {}
        for (i, j), (total, plan) in ways.items():
            for k in range(j + 1, num_steps - left) if left else [num_steps - 1]:
                way = total + costs[i, j, k], [*plan, k]
                longer[j, k] = min(way, longer.get((j, k), way))
        ways = longer
    return min(ways.values())[1]


def psnr(image, reference):
    """Peak signal-to-noise ratio of two PIL images of one size, in dB; infinite if they are equal."""
    a, b = (np.asarray(x.convert("RGB"), np.float64) / 255 for x in (image, reference))
    mse = np.square(a - b).mean()
    return 10 * math.log10(1 / mse) if mse > 0 else math.inf


def make_plan(pipeline, args, bar):
    """The planned list of computed steps."""
    trajectories = []
    for job in args.planning:
        with recording(pipeline) as steps:
            draw(pipeline, args, job)
        trajectories.append(steps)
        bar.update()
    return best_plan(gap_costs(trajectories), len(steps), args.computed_steps)


def measure(pipeline, args, plan, bar):
    """PSNR of the default choice and of the plan, each a list over the proving prompts, and the default schedule."""
    default, planned = [], []
    for job in args.proving:
        original = draw(pipeline, args, job)
        default.append(psnr(draw(pipeline, args, job, args.computed_steps), original))
        schedule = pipeline.transformer.teacache.schedule
        planned.append(psnr(draw(pipeline, args, job, plan), original))
        bar.update()
    return default, planned, schedule


def report(default, planned, schedule, plan, about):
    """The lines to print."""

    def row(name, computed, values):
        marks = "".join("X" if step in computed else "." for step in range(len(schedule)))
        return f"{name:7} {marks} {np.mean(values):.1f} dB (least {min(values):.1f})"

    yield row("default", [step for step, computed in enumerate(schedule) if computed], default)
    yield row("planned", plan, planned)
    if np.mean(planned) > np.mean(default):
        yield f"COMPUTED_STEPS = {plan}  # {about}: {np.mean(planned):.1f} dB, default {np.mean(default):.1f}"
    else:
        yield "The plan is not closer to the original than the default choice: nothing to paste."


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with teacache_lumina2.one_line_errors(parser):
        jobs = choose_jobs(args)
        args.planning, args.proving = jobs[:PLANNING], jobs[PLANNING:]
        teacache_lumina2.check_args(args)
        pipeline = teacache_lumina2.load_pipeline(args)
        pipeline.set_progress_bar_config(disable=True)
        with tqdm(total=PLANNING + PROVING, unit="prompt") as bar:
            plan = make_plan(pipeline, args, bar)
            default, planned, schedule = measure(pipeline, args, plan, bar)
    shift = pipeline.scheduler.config.get("shift")
    about = f"{args.num_inference_steps} steps"
    about = about if shift is None else f"shift {shift:g}, {about}"
    print(*report(default, planned, schedule, plan, about), sep="\n")


if __name__ == "__main__":
    main()
