"""Every way to make a video with fewer passes of MEMO, against two references: the uncached video and a converged one.

    python tests/benchmarks/memo_peers.py                           # the bundled model, 8 voices of 3 clips, 20 and 50 steps
    python tests/benchmarks/memo_peers.py --voices 2 --steps 20 --workers 1

Fewer Euler steps, a second-order solver, TeaCache as published and with extrapolation, a number of computed steps, and a
tolerance. References: the uncached video of as many steps, and one of 200. For each: share of the passes, wall time over
that of the uncached video, PSNR of a clip (mean, least), of the first, second and third clip apart, and the correlation
of the mouth's opening with the voice's. Prints a Markdown table for each number of steps, the parts of a clip's time and
a JSON line. memo (github.com/memoavatar/memo, commit a5aee30) must be importable.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from omegaconf import OmegaConf
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets" / "memo-emoji"
sys.path[:0] = [str(ROOT), str(MODEL)]

from evaluate import correlation, mouth_opening, speak  # noqa: E402

from TeaCache4Memo import teacache_memo  # noqa: E402

CONVERGED = 200
PASSES = 7, 10, 14
THRESHOLDS = 0.09, 0.15, 0.25
TOLERANCES = 0.001, 0.003, 0.01
PARTS = "diffusion_net", "reference_net", "vae.encoder", "vae.decoder"


class AdamsBashforth(FlowMatchEulerDiscreteScheduler):
    """Second order: a step with the velocity extrapolated to its middle from the last two."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.seen = []

    def step(self, velocity, timestep, sample, **kwargs):
        self.seen = [*self.seen[-1:], velocity]
        i = 0 if self.step_index is None else self.step_index
        if len(self.seen) == 2:
            ratio = (self.sigmas[i + 1] - self.sigmas[i]) / (self.sigmas[i] - self.sigmas[i - 1])
            velocity = velocity + (velocity - self.seen[0]) * ratio / 2
        return super().step(velocity, timestep, sample, **kwargs)


@contextlib.contextmanager
def timed(pipeline):
    """A dict of the seconds spent in each of PARTS."""
    seconds, began, hooks = dict.fromkeys(PARTS, 0.0), {}, []

    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    for name in PARTS:
        module = pipeline.vae.get_submodule(name[4:]) if name.startswith("vae.") else getattr(pipeline, name)

        def before(module, args, name=name):
            began[name] = now()

        def after(module, args, output, name=name):
            seconds[name] += now() - began[name]

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield seconds
    for hook in hooks:
        hook.remove()


def psnr(video, reference, size):
    """dB of each clip, at most 99; of videos in [-1, 1]."""
    mse = ((video - reference) / 2).square().unflatten(0, (-1, size)).flatten(1).mean(1)
    return (-10 * torch.log10(mse.clamp_min(10**-9.9))).tolist()


def measure(i, model, all_steps):
    """All methods on one voice. Returns rows, and the seconds of the parts of an uncached video."""
    warnings.simplefilter("ignore")
    if multiprocessing.parent_process() is not None:  # one of several workers
        torch.set_num_threads(1)
    config = OmegaConf.load(model / "config.yaml")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = teacache_memo.load_pipeline(str(model), device=device, dtype=config.weight_dtype)
    parts[0].set_progress_bar_config(disable=True)
    voice = {name: rows[i] for name, rows in load_file(model / "voices.safetensors").items()}
    made, rows = {}, []

    def make(steps, scheduler=FlowMatchEulerDiscreteScheduler, **settings):
        key = (steps, scheduler, *settings.items())
        if key not in made:  # fewer steps are the same whatever they are compared with
            parts[0].scheduler = scheduler()
            config.inference_steps = steps
            made[key] = speak(*parts, config, voice, i, **settings)
        return made[key]

    config.inference_steps = 2
    speak(*parts, config, voice, i)  # warm-up
    converged = make(CONVERGED)[0]
    for steps in all_steps:
        with timed(parts[0]) as seconds:
            base, base_seconds, _ = make(steps)
        seconds["all"] = base_seconds

        def add(method, setting, made_steps, steps=steps, base=base, base_seconds=base_seconds, **settings):
            video, wall, schedule = make(made_steps, **settings)
            clips = len(schedule) // made_steps
            row = {"steps": steps, "method": method, "setting": setting, "passes": sum(schedule) / clips}
            row |= {"share": row["passes"] / steps, "wall": wall / base_seconds}
            size = config.num_generated_frames_per_clip
            row |= {"uncached": psnr(video, base, size), "converged": psnr(video, converged, size)}
            rows.append(row | {"mouth": correlation(mouth_opening(video), voice["opening"])})

        add("Euler, uncached", f"{steps} steps", steps)
        for k in PASSES:
            add("fewer Euler steps", f"{k} steps", k)
        for k in PASSES:
            add("Adams-Bashforth 2", f"{k} steps", k, scheduler=AdamsBashforth)
        for order, name in ((0, "TeaCache, published"), (1, "TeaCache, order 1")):
            for thresh in THRESHOLDS:
                add(name, f"threshold {thresh}", steps, rel_l1_thresh=thresh, order=order)
        for k in PASSES:
            add("computed_steps", f"{k} of {steps}", steps, computed_steps=k)
        for tolerance in TOLERANCES:
            add("tolerance", f"{tolerance}", steps, tolerance=tolerance)
    print(f"voice {i} is done", file=sys.stderr, flush=True)
    return rows, seconds


def summary(found):
    """One row for each setting: figures of all voices."""
    rows = []
    for same in zip(*found):
        row = {name: same[0][name] for name in ("steps", "method", "setting")}
        for name in ("passes", "share", "wall", "mouth"):
            row[name] = statistics.mean(each[name] for each in same)
        for name in ("uncached", "converged"):
            clips = [each[name] for each in same]
            row[name] = statistics.mean(sum(clips, []))
            row[f"{name} least"] = min(sum(clips, []))
            row[f"{name} drift"] = [statistics.mean(clip) for clip in zip(*clips)]
        rows.append(row)
    return rows


def table(rows):
    lines = [
        "| method | setting | passes | wall | to uncached, mean (least clip) | clip 1, 2, 3 | to 200 steps | mouth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        same = r["uncached"] > 98
        drift = "" if same else ", ".join(f"{dB:.1f}" for dB in r["uncached drift"])
        uncached = "equal" if same else f"{r['uncached']:.1f} ({r['uncached least']:.1f}) dB"
        converged = f"{r['converged']:.1f} ({r['converged least']:.1f}) dB"
        lines.append(
            f"| {r['method']} | {r['setting']} | {r['passes']:.1f}, {r['share']:.0%} | {r['wall']:.2f} | {uncached} | {drift}"
            f" | {converged} | {r['mouth']:.3f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder like assets/memo-emoji")
    parser.add_argument("--voices", type=int, default=8, help="how many of its voices.safetensors")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread; 1: this one")
    args = parser.parse_args()

    jobs = range(args.voices), [args.model] * args.voices, [args.steps] * args.voices
    if args.workers > 1 and not torch.cuda.is_available():
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(measure, *jobs))
    else:
        results = list(map(measure, *jobs))
    rows, parts = summary([rows for rows, _ in results]), [seconds for _, seconds in results]
    for steps in args.steps:
        print(f"\n### {steps} steps\n\n{table([r for r in rows if r['steps'] == steps])}")
    total = sum(p["all"] for p in parts)
    shares = {name: sum(p[name] for p in parts) / total for name in PARTS}
    shares["rest"] = 1 - sum(shares.values())
    print(f"\nParts of the time of an uncached clip, {args.steps[-1]} steps:\n")
    print("| " + " | ".join(shares) + " |\n|" + "---|" * len(shares))
    print("| " + " | ".join(f"{share:.1%}" for share in shares.values()) + " |")
    machine = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    about = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__, "voices": args.voices}
    print(json.dumps({**about, "shares": shares, "rows": rows}))


if __name__ == "__main__":
    main()
