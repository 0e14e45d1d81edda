"""Every way to draw with fewer passes of Lumina2, against two references: the uncached image and the converged one.

    python tests/benchmarks/lumina2_peers.py                        # the bundled model, 24 prompts, three shifts
    python tests/benchmarks/lumina2_peers.py --model PATH --prompts FILE --count 8

At each shift of the scheduler (the model's own, 1 and 6), for 8, 10, 15 and 20 passes: fewer Euler steps; second-order
solvers (Adams-Bashforth 2, DPM-Solver++ 2M and UniPC in the time of the flow) at this shift and at their best; TeaCache
as published; cache-dit, if it is installed; and ours, of 30 and of 100 steps. References: 30 uncached Euler steps, and
250 at a shift of 3. A pass is one evaluation of the guided network; passes of methods that decide by themselves are
means. Prints a Markdown table per shift and a JSON line, and plots two panels.
"""

import argparse
import importlib.util
import json
import logging
import math
import os
import platform
import statistics
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, UniPCMultistepScheduler

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from TeaCache4LuminaT2X import teacache_lumina2  # noqa: E402
from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache, remove_teacache  # noqa: E402

STEPS, MORE_STEPS, CONVERGED = 30, 100, 250
PASSES = 8, 10, 15, 20
SHIFTS = 0.33, 1.0, 2.0  # where the solvers look for their best
TOLERANCES = 0.001, 0.003, 0.01


class Lab:
    """The denoising loop of `Lumina2Pipeline` on prepared prompts, with any sigmas and any solver."""

    def __init__(self, pipeline, prompts, guidance, seed):
        self.pipeline, self.guidance, self.passes = pipeline, guidance, 0
        embeds = pipeline.encode_prompt(prompts, True, negative_prompt=[""] * len(prompts))
        longest = int(embeds[1].sum(1).max())  # padding costs time and changes nothing
        self.cond, self.uncond = [x[:, :longest] for x in embeds[:2]], [x[:, :longest] for x in embeds[2:]]
        size, channels = pipeline.default_sample_size, pipeline.transformer.config.in_channels
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        self.noise = torch.cat([torch.randn(1, channels, size, size, generator=g) for g in generators])
        self.noise = self.noise.to(pipeline.device, pipeline.transformer.dtype)

    def select(self, i):
        """The same with one prompt: for methods that decide by the activations."""
        one = object.__new__(Lab)
        one.pipeline, one.guidance, one.passes = self.pipeline, self.guidance, 0
        one.cond, one.uncond = ([x[i : i + 1] for x in pair] for pair in (self.cond, self.uncond))
        one.noise = self.noise[i : i + 1]
        return one

    def velocity(self, x, sigma):
        """Guided and normalised as in the pipeline; from noise to image."""
        timestep = torch.full((len(x),), 1 - float(sigma), device=x.device)
        cond, uncond = (
            self.pipeline.transformer(x, timestep, *c, return_dict=False)[0] for c in (self.cond, self.uncond)
        )
        velocity = uncond + self.guidance * (cond - uncond)
        self.passes += 1
        return velocity * (cond.norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True))

    def images(self, x):
        vae = self.pipeline.vae
        images = torch.cat(
            [vae.decode(z[None] / vae.config.scaling_factor + vae.config.shift_factor).sample for z in x]
        )
        return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round() / 255

    def euler(self, steps, shift, **_):
        x, s = self.noise, sigmas(steps, shift)
        for i in range(steps):
            x = x + (s[i] - s[i + 1]) * self.velocity(x, s[i])
        return self.images(x)

    def adams_bashforth(self, steps, shift):
        x, s, previous = self.noise, sigmas(steps, shift), None
        for i in range(steps):
            v, dt = self.velocity(x, s[i]), s[i] - s[i + 1]
            slope = 0 if previous is None else (v - previous) / (s[i - 1] - s[i])
            x, previous = x + dt * (v + slope * dt / 2), v
        return self.images(x)

    def dpm_solver(self, steps, shift):
        """DPM-Solver++(2M), arXiv 2211.01095, for x = (1 - sigma) data + sigma noise."""
        x, s, previous, h_before = self.noise, sigmas(steps, shift), None, None
        log_snr = [math.log((1 - q) / q) if 0 < q < 1 else -math.log(1e9) * (1 if q else -1) for q in s]
        for i in range(steps):
            data = x + s[i] * self.velocity(x, s[i])
            h, estimate = log_snr[i + 1] - log_snr[i], data
            if 1 < i < steps - 1:  # the first step begins at an infinite ratio, the last one ends there
                estimate = data + (data - previous) * (h / (2 * h_before))
            x = data if i == steps - 1 else (s[i + 1] / s[i]) * x + (1 - s[i + 1]) * -math.expm1(-h) * estimate
            previous, h_before = data, h
        return self.images(x)

    def unipc(self, steps, shift):
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        scheduler, x = UniPCMultistepScheduler(**flow), self.noise
        scheduler.set_timesteps(steps)
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            x = scheduler.step(-self.velocity(x, sigma), t, x, return_dict=False)[0]
        return self.images(x)

    def teacache(self, steps, shift, **settings):
        """TeaCache with these settings; one prompt at a time unless the schedule ignores the activations."""
        fixed = "computed_steps" in settings
        parts = [self] if fixed else [self.select(i) for i in range(len(self.noise))]
        images, computed = [], []
        for part in parts:
            apply_teacache(self.pipeline.transformer, steps, **settings)
            images.append(part.euler(steps, shift))
            computed.append(sum(self.pipeline.transformer.teacache.schedule))
        remove_teacache(self.pipeline.transformer)
        self.passes = statistics.mean(computed)
        return torch.cat(images)

    def schedule(self, steps, shift, **settings):
        """The schedule of the first prompt."""
        apply_teacache(self.pipeline.transformer, steps, **settings)
        self.select(0).euler(steps, shift)
        schedule = self.pipeline.transformer.teacache.schedule
        remove_teacache(self.pipeline.transformer)
        return schedule

    def cache_dit(self, steps, shift, taylor=False, schedule=None, **settings):
        """DBCache with 1 block always computed, by the pipeline. schedule: steps to compute, instead of a threshold."""
        import cache_dit

        if schedule is not None:
            settings |= {"steps_computation_mask": list(map(int, schedule)), "steps_computation_policy": "static"}
        calls, latents, blocks = [], [], self.pipeline.transformer.layers
        hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in blocks]
        names = "prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask".split()
        self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        blockwise = {"num_inference_steps": steps, "Fn_compute_blocks": 1, "Bn_compute_blocks": 0}
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
        for i in range(len(self.noise)):
            config = cache_dit.DBCacheConfig(**blockwise, **settings)
            cache_dit.enable_cache(self.pipeline, cache_config=config, calibrator_config=calibrator)
            try:
                embeds = {name: x[i : i + 1] for name, x in zip(names, (*self.cond, *self.uncond))}
                more = {"guidance_scale": self.guidance, "latents": self.noise[i : i + 1].clone()}
                drawn = self.pipeline(**embeds, **more, num_inference_steps=steps, output_type="latent")
                latents.append(drawn.images)
            finally:
                cache_dit.disable_cache(self.pipeline)
        for hook in hooks:
            hook.remove()
        self.passes = len(calls) / (2 * len(blocks) * len(self.noise))
        return self.images(torch.cat(latents))


def sigmas(steps, shift):
    """Of `FlowMatchEulerDiscreteScheduler` in the pipeline, and 0."""
    s = np.linspace(1.0, 1 / steps, steps)
    return [*(shift * s / (1 + (shift - 1) * s)).tolist(), 0.0]


def psnr(images, reference):
    """dB of each image, at most 99."""
    mse = (images - reference).square().flatten(1).mean(1).clamp_min(10**-9.9)
    return (10 * torch.log10(1 / mse)).tolist()


def measure(lab, shift, base, converged):
    """Rows of {"method", "setting", "passes", and mean and least PSNR to "uncached" and "converged"}."""
    rows = []

    def add(method, setting, draw, *args, **settings):
        lab.passes = 0
        images = draw(*args, **settings)
        row = {"method": method, "setting": setting, "passes": float(lab.passes)}
        for name, reference in (("uncached", base), ("converged", converged)):
            found = psnr(images, reference)
            row |= {name: statistics.mean(found), f"{name} least": min(found)}
        rows.append(row)
        figures = f"{row['passes']:.1f} passes, {row['uncached']:.1f} and {row['converged']:.1f} dB"
        print(f"shift {shift:g}: {method}, {setting}: {figures}", file=sys.stderr, flush=True)

    for n in (STEPS, 50):
        add("Euler, uncached", f"{n} steps", lab.euler, n, shift)
    for n in PASSES:
        add("fewer Euler steps", f"{n} steps", lab.euler, n, shift)
    for name, solver in {"AB2": lab.adams_bashforth, "DPM-Solver++ 2M": lab.dpm_solver, "UniPC": lab.unipc}.items():
        tried = {s: statistics.mean(psnr(solver(15, s), converged)) for s in SHIFTS}
        best = max(tried, key=tried.get)
        for n in PASSES:
            add(name, f"{n} steps", solver, n, shift)
            if best != shift:
                add(f"{name}, best shift", f"{n} steps, shift {best:g}", solver, n, best)
    for thresh in (0.1, 0.2, 0.3, 0.5):
        add("TeaCache, published", f"threshold {thresh}", lab.teacache, STEPS, shift, rel_l1_thresh=thresh)
    for steps in (STEPS, MORE_STEPS):
        for k in PASSES:
            add(f"computed_steps of {steps}", f"{k}", lab.teacache, steps, shift, computed_steps=k)
        for tolerance in TOLERANCES:
            add(f"tolerance of {steps}", f"{tolerance}", lab.teacache, steps, shift, tolerance=tolerance)
    for taylor in (False, True) if importlib.util.find_spec("cache_dit") else ():
        name = "cache-dit, TaylorSeer" if taylor else "cache-dit"
        own = {"residual_diff_threshold": 0.12, "max_warmup_steps": 4}
        add(name, "F1, 0.12, warm-up 4", lab.cache_dit, STEPS, shift, taylor, **own)
        for k in (10, 15):
            schedule = lab.schedule(STEPS, shift, computed_steps=k)
            add(f"{name}, our steps", f"{k}", lab.cache_dit, STEPS, shift, taylor, schedule)
    return rows


def table(rows):
    lines = [
        "| method | setting | passes | to uncached, mean (least) | to converged, mean (least) |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        fidelity = " | ".join(f"{r[name]:.1f} ({r[f'{name} least']:.1f}) dB" for name in ("uncached", "converged"))
        lines.append(f"| {r['method']} | {r['setting']} | {r['passes']:.1f} | {fidelity} |")
    return "\n".join(lines)


def plot(rows, shift, path):
    """Passes against mean PSNR, one panel for each reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    methods = [m for m in dict.fromkeys(r["method"] for r in rows) if "uncached" not in m]
    solvers = {"AB2": "-", "DPM-Solver++ 2M": "--", "UniPC": ":"}
    look = {"fewer Euler steps": ("black", ":", "o"), "TeaCache, published": ("black", "-", "o")}
    look |= {name: ("tab:blue", line, "o") for name, line in solvers.items()}
    look |= {f"{name}, best shift": ("tab:green", line, "o") for name, line in solvers.items()}
    look |= {m: ("tab:purple", "-", "^" if "Taylor" in m else "s") for m in methods if m.startswith("cache-dit")}
    look |= {"computed_steps of 30": ("crimson", "-", "o"), "computed_steps of 100": ("darkorange", "-", "o")}
    look |= {"tolerance of 30": ("deeppink", "-", "o"), "tolerance of 100": ("gold", "-", "o")}
    styles = {m: dict(zip(("color", "linestyle", "marker"), look[m])) for m in methods}
    for m in methods:
        styles[m] |= {"linewidth": 3, "zorder": 5} if " of " in m else {}
    for axes, name in zip(figure.subplots(1, 2), ("uncached", "converged")):
        for method in methods:
            points = sorted((r["passes"], r[name]) for r in rows if r["method"] == method)
            if name == "converged" or not method.endswith("of 100"):
                axes.plot(*zip(*points), markersize=5, label=method, **styles[method])
        for r in rows if name == "converged" else ():
            if "uncached" in r["method"]:
                axes.axhline(r[name], color="gray", linestyle=":")
                axes.annotate(f"{r['setting']}, uncached", (27.5, r[name]), fontsize=8, ha="right", va="bottom")
        title = "the uncached image of 30 steps" if name == "uncached" else "the converged image"
        axes.set(title=f"shift {shift:g}: PSNR to {title}", xlabel="passes", ylabel="mean PSNR (dB)", xlim=(7, 28))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110, format="png")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=teacache_lumina2.BUNDLED_MODEL, help="folder of a Lumina2Pipeline"
    )
    parser.add_argument(
        "--prompts", type=Path, help="one prompt per line; default: names in the emoji.txt of the model"
    )
    parser.add_argument("--count", type=int, default=24, help="how many of the prompts")
    parser.add_argument("--shifts", type=float, nargs="+", help="default: of the model, 1 and 6")
    parser.add_argument("--guidance-scale", type=float, default=teacache_lumina2.GUIDANCE_SCALE)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("lumina2_peers.png"))
    args = parser.parse_args()
    if args.prompts:
        prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        lines = (args.model / "emoji.txt").read_text(encoding="utf-8").splitlines()
        prompts = [line.split("\t")[1] for line in lines if "\t" in line]
    prompts = prompts[:: max(len(prompts) // args.count, 1)][: args.count]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    pipeline = Lumina2Pipeline.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    own_shift = pipeline.scheduler.config.shift
    lab = Lab(pipeline, prompts, args.guidance_scale, args.seed)
    converged, results = lab.euler(CONVERGED, 3.0), {}
    for shift in args.shifts or dict.fromkeys([own_shift, 1.0, 6.0]):
        results[shift] = measure(lab, shift, lab.euler(STEPS, shift), converged)
        print(f"\nShift {shift:g}, {len(prompts)} prompts, guidance {args.guidance_scale:g}\n\n{table(results[shift])}")
    plot(results[max(results)], max(results), args.output)
    machine = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    about = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__, "prompts": prompts}
    print(json.dumps({**about, "guidance": args.guidance_scale, "seed": args.seed, "results": results}))


if __name__ == "__main__":
    main()
