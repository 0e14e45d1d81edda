"""Every way to draw with fewer passes of Lumina2, against two references: the uncached image and the converged one.

    python tests/benchmarks/lumina2_peers.py                        # the bundled model, 8 + 16 prompts, two shifts
    python tests/benchmarks/lumina2_peers.py --count 8 --prompts FILE --model PATH
    python tests/benchmarks/lumina2_peers.py --plot-only            # from the rows that there are

For about 10 and 15 passes of 30: fewer Euler steps; second-order solvers (Adams-Bashforth 2, DPM-Solver++ 2M and UniPC in
the time of the flow) at this shift and at shift 1; TeaCache as published, the rules of `skipping.py`, and cache-dit if it is
installed, each at its published setting too; and ours, of 30 and of 100 steps, with the correction and without.
References: 30 uncached Euler steps, and 250 at a shift of 3. A third table measures all in bfloat16 against the uncached
float32 image: the yardstick is the uncached bfloat16 image. A pass is one evaluation of the guided network; passes of
methods that decide by themselves are means. Two groups of prompts: captions of the training set, and new ones.
Writes rows as they are done, and goes on where it was stopped; `render.py` makes tables of them.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import logging
import math
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import record
import skipping
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, UniPCMultistepScheduler

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from TeaCache4LuminaT2X import teacache_lumina2  # noqa: E402
from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache, remove_teacache  # noqa: E402

STEPS, MORE_STEPS, CONVERGED = 30, 100, 250
NEW_PROMPTS = """\
cat with top hat
a dog and a cat
panda on a rocket
purple apple
penguin with umbrella
white horse in the rain
green heart with eyes
robot face with tears
blue rose in a teapot
orange fish in a bowl
tiger with glasses
a red house on the moon
yellow butterfly on a tulip
ghost with a balloon
lion with crown
pizza with mushroom and tomato
""".splitlines()


class Lab:
    """The denoising loop of `Lumina2Pipeline` on prepared prompts, with any sigmas and any solver."""

    def __init__(self, pipeline, prompts, guidance, seed):
        self.pipeline, self.guidance, self.passes = pipeline, guidance, 0.0
        embeds = pipeline.encode_prompt(prompts, True, negative_prompt=[""] * len(prompts))
        longest = int(embeds[1].sum(1).max())  # padding costs time and changes nothing
        self.embeds = [x[:, :longest] for x in embeds]  # with the prompt, its mask, without, its mask
        size, channels = pipeline.default_sample_size, pipeline.transformer.config.in_channels
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        self.noise = torch.cat([torch.randn(1, channels, size, size, generator=g) for g in generators])
        self.noise = self.noise.to(pipeline.device, pipeline.transformer.dtype)

    def select(self, rows):
        """The same with some of the prompts."""
        part = object.__new__(Lab)
        part.pipeline, part.guidance, part.passes = self.pipeline, self.guidance, 0.0
        part.embeds, part.noise = [x[rows] for x in self.embeds], self.noise[rows]
        return part

    def each(self):
        return [self.select([i]) for i in range(len(self.noise))]

    def outputs(self, x, sigma, rows=slice(None)):
        """(prompts, 2, channels, height, width): of the network with the prompt, and without."""
        timestep = torch.full((len(x),), 1 - float(sigma), device=x.device)
        embeds = [e[rows] for e in self.embeds]
        calls = (self.pipeline.transformer(x, timestep, *pair, return_dict=False) for pair in (embeds[:2], embeds[2:]))
        return torch.stack([output for (output,) in calls], 1)

    def guide(self, outputs):
        """Guided and normalised as in the pipeline; from noise to image."""
        cond, uncond = outputs.unbind(1)
        velocity = uncond + self.guidance * (cond - uncond)
        return velocity * (cond.norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True))

    def velocity(self, x, sigma):
        self.passes += 1
        return self.guide(self.outputs(x, sigma))

    @torch.no_grad()
    def images(self, x):
        vae = self.pipeline.vae
        z = x.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images = torch.cat([vae.decode(each[None]).sample for each in z])
        return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round() / 255

    def draw(self, steps, shift):
        """Latents, by the pipeline."""
        self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        return self.run_pipeline(steps)

    def run_pipeline(self, steps):
        names = "prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask".split()
        latents, self.passes = self.noise.clone(), steps
        given = {**dict(zip(names, self.embeds)), "guidance_scale": self.guidance, "latents": latents}
        return self.pipeline(**given, num_inference_steps=steps, output_type="latent").images

    def euler(self, steps, shift):
        return self.images(self.draw(steps, shift))

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

    def teacache(self, steps, shift, corrected=True, **settings):
        """Ours, by the pipeline; one prompt at a time unless the schedule ignores the activations."""
        parts = [self] if "computed_steps" in settings else self.each()
        latents, computed = [], []
        with correction(corrected):
            for part in parts:
                self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
                apply_teacache(self.pipeline, **settings)
                latents.append(part.run_pipeline(steps))
                computed.append(sum(self.pipeline.transformer.teacache.schedule))
                remove_teacache(self.pipeline)
        self.passes = statistics.mean(computed)
        return self.images(torch.cat(latents))

    def schedule(self, steps, shift, **settings):
        """The schedule of the first prompt."""
        first = self.select([0])
        self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        apply_teacache(self.pipeline, **settings)
        first.run_pipeline(steps)
        schedule = self.pipeline.transformer.teacache.schedule
        remove_teacache(self.pipeline)
        return schedule

    def skipping(self, steps, shift, rule, *settings):
        """Euler's method with a rule of `skipping.py` for each image."""
        x, s, rules, computed = self.noise, sigmas(steps, shift), [rule(steps, *settings) for _ in self.noise], 0
        for i in range(steps):
            outputs = [rule.skip(i, 1 - s[i], z) for rule, z in zip(rules, x)]
            rows = [j for j, output in enumerate(outputs) if output is None]
            for j, output in zip(rows, self.outputs(x[rows], s[i], rows) if rows else ()):
                rules[j].see(i, 1 - s[i], x[j], output)
                outputs[j] = output
            computed += len(rows)
            x = (x.float() + (s[i] - s[i + 1]) * self.guide(torch.stack(outputs))).to(x.dtype)  # as the scheduler
        self.passes = computed / len(x)
        return self.images(x)

    def skipping_blocks(self, steps, shift, schedule):
        """By the pipeline: the layers run in the steps of the schedule only. See `skipping.Blocks`."""
        transformer = self.pipeline.transformer
        layers, blocks = transformer.layers, skipping.Blocks(transformer.layers, schedule)
        transformer.layers = torch.nn.ModuleList([blocks])
        try:
            latents = self.draw(steps, shift)
        finally:
            transformer.layers = layers
        self.passes, self.ratios = sum(schedule), blocks.ratios
        return self.images(latents)

    def comfyui_schedule(self, steps, shift, threshold):
        embed = self.pipeline.transformer.time_caption_embed
        times = torch.tensor([1 - s for s in sigmas(steps, shift)[:-1]], device=self.noise.device)
        embeddings = embed.timestep_embedder(embed.time_proj(times).to(self.noise.dtype))
        return skipping.comfyui_schedule(embeddings, threshold)

    def cache_dit(self, steps, shift, calibrator=None, schedule=None, **settings):
        """DBCache with 1 block always computed, by the pipeline. schedule: steps to compute, instead of a threshold."""
        import cache_dit

        if schedule is not None:
            settings |= {"steps_computation_mask": list(map(int, schedule)), "steps_computation_policy": "static"}
        calls, latents, blocks = [], [], self.pipeline.transformer.layers
        hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in blocks]
        self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        blockwise = {"num_inference_steps": steps, "Fn_compute_blocks": 1, "Bn_compute_blocks": 0}
        parts = self.each() if schedule is None else [self]
        for part in parts:
            config = cache_dit.DBCacheConfig(**blockwise, **settings)
            kind = getattr(cache_dit, f"{calibrator}CalibratorConfig") if calibrator else lambda: None
            options = {"taylorseer_order": 1} if calibrator == "TaylorSeer" else {}
            cache_dit.enable_cache(self.pipeline, cache_config=config, calibrator_config=kind(**options))
            try:
                latents.append(part.run_pipeline(steps))
            finally:
                cache_dit.disable_cache(self.pipeline)
        for hook in hooks:
            hook.remove()
        self.passes = len(calls) / (2 * len(blocks) * len(parts))
        return self.images(torch.cat(latents))


@contextlib.contextmanager
def correction(wanted):
    """Only while the pipeline runs: the scripts read the constant."""
    before, teacache_lumina2.CORRECT = teacache_lumina2.CORRECT, wanted
    yield
    teacache_lumina2.CORRECT = before


def sigmas(steps, shift):
    """Of `FlowMatchEulerDiscreteScheduler` in the pipeline, and 0."""
    s = np.linspace(1.0, 1 / steps, steps)
    return [*(shift * s / (1 + (shift - 1) * s)).tolist(), 0.0]


def psnr(images, reference):
    """dB of each image, at most 99."""
    mse = (images - reference).square().flatten(1).mean(1).clamp_min(10**-9.9)
    return (10 * torch.log10(1 / mse)).tolist()


def tune(passes_of, target, tries=8):
    """The threshold whose passes are nearest to the target, by bisection: the higher, the fewer."""
    low, high, found = 1e-3, 30.0, {}
    for _ in range(tries):
        threshold = float(f"{math.sqrt(low * high):.3g}")
        found[threshold] = passes_of(threshold)
        low, high = (threshold, high) if found[threshold] > target else (low, threshold)
    return min(found, key=lambda threshold: abs(found[threshold] - target))


class Measurement:
    """Rows of one table, against references that are given by name."""

    def __init__(self, table, lab, shift, references, results, targets=(15, 10)):
        self.table, self.lab, self.shift, self.references, self.results = table, lab, shift, references, results
        self.targets, self.found = targets, {}
        self.few = lab.select([len(lab.noise) // 2])  # for tuning

    def key(self, method, setting):
        return record.slug(self.table, method, setting)

    def add(self, method, setting, draw, *args, shift=None, **settings):
        """Draws with `draw(steps, shift, *args)`, a method of the lab; a setting is what a row is called."""
        steps, note = settings.pop("steps", STEPS), settings.pop("note", None)
        key = self.key(method, setting)
        if key in self.results.rows:
            return
        self.lab.passes = 0.0
        images = draw(steps, self.shift if shift is None else shift, *args, **settings)
        row = {"table": self.table, "method": method, "setting": str(setting), "passes": round(self.lab.passes, 2)}
        if note is not None:
            row["threshold"] = note
        for name, reference in self.references.items():
            row[name] = [round(dB, 2) for dB in psnr(images, reference)]
        self.results.add(key, **row)
        figures = ", ".join(f"{statistics.mean(row[name]):.1f} dB" for name in self.references)
        print(f"{self.table}: {method}, {setting}: {row['passes']:.1f} passes, {figures}", file=sys.stderr, flush=True)

    def tuned(self, method, passes_of, draw_with, published=None):
        """A published threshold, and those that give about 15 and 10 passes. draw_with(threshold): for `add`."""
        name = method.removesuffix(", corrected")
        if published is not None:
            self.add(method, published, *draw_with(published))
        for target in self.targets:
            if self.key(method, f"about {target}") not in self.results.rows:
                if (name, target) not in self.found:
                    self.found[name, target] = tune(passes_of, target)
                threshold = self.found[name, target]
                self.add(method, f"about {target}", *draw_with(threshold), note=f"{threshold:g}")

    def published_teacache(self):
        for name in ("v1", "v2"):
            coefficients = getattr(teacache_lumina2, f"COEFFICIENTS_{name.upper()}")

            def passes_of(threshold, coefficients=coefficients):
                self.few.teacache(STEPS, self.shift, rel_l1_thresh=threshold, coefficients=coefficients)
                return self.few.passes

            for corrected, suffix in ((False, ""), (True, ", corrected")):
                draw = functools.partial(self.lab.teacache, corrected=corrected, coefficients=coefficients)
                draw_with = lambda t, draw=draw: (functools.partial(draw, rel_l1_thresh=t),)  # noqa: E731
                self.tuned(f"TeaCache {name}{suffix}", passes_of, draw_with, published=0.3)

    def ours(self, steps=STEPS, computed=(8, 10, 15, 20), tolerances=(0.003, 0.01), both=True):
        name = "" if steps == STEPS else f" of {steps}"
        for corrected, suffix in ((True, ""), (False, ", not corrected")) if both else ((True, ""),):
            given = {"steps": steps, "corrected": corrected}
            for k in computed:
                self.add(f"computed_steps{name}{suffix}", k, self.lab.teacache, computed_steps=k, **given)
            for tolerance in tolerances:
                self.add(f"tolerance{name}{suffix}", tolerance, self.lab.teacache, tolerance=tolerance, **given)

    def peers(self):
        lab, few, shift = self.lab, self.few, self.shift

        def passes_with(rule):
            def passes_of(threshold):
                few.skipping(STEPS, shift, rule, threshold)
                return few.passes

            return passes_of

        for name, rule, published in (
            ("EasyCache", skipping.EasyCache, 0.05),
            ("linear forecast, measured error", skipping.LinearForecast, None),
            ("PrediT", skipping.PrediT, None),
        ):
            self.tuned(name, passes_with(rule), lambda t, rule=rule: (lab.skipping, rule, t), published)
        few.skipping_blocks(STEPS, shift, [True] * STEPS)
        ratios = [1.0, *few.ratios]
        for name, published, plan in (
            ("ComfyUI-TeaCache", 0.38, lambda threshold: lab.comfyui_schedule(STEPS, shift, threshold)),
            ("MagCache", 0.24, lambda threshold: skipping.magcache_schedule(ratios, threshold)),
        ):
            draw_with = lambda t, plan=plan: (lab.skipping_blocks, plan(t))  # noqa: E731
            self.tuned(name, lambda t, plan=plan: sum(plan(t)), draw_with, published)

    def cache_dit(self, own=True):
        if not importlib.util.find_spec("cache_dit"):
            return
        for calibrator in (None, "TaylorSeer", "FoCa", "DMD"):
            name = f"cache-dit, {calibrator}" if calibrator else "cache-dit"
            for k in self.targets:
                schedule = self.lab.schedule(STEPS, self.shift, computed_steps=k)
                self.add(name, f"steps of computed_steps {k}", self.lab.cache_dit, calibrator, schedule)
            if own and calibrator in (None, "TaylorSeer"):
                limits = {"residual_diff_threshold": 0.12, "max_warmup_steps": 4}
                self.add(name, "F1, 0.12, warm-up 4", self.lab.cache_dit, calibrator, **limits)

    def solvers(self):
        lab = self.lab
        for name, solver in {"AB2": lab.adams_bashforth, "UniPC": lab.unipc, "DPM-Solver++ 2M": lab.dpm_solver}.items():
            for n in (10, 15):
                self.add(name, f"{n} steps", solver, steps=n)
                if self.shift != 1:
                    self.add(f"{name} at shift 1", f"{n} steps", solver, steps=n, shift=1.0)


def measure_shift(lab, shift, converged, results, targets):
    """A table in float32."""
    base = lab.euler(STEPS, shift)
    references = {"uncached": base, "converged": converged}
    m = Measurement(f"shift {shift:g}", lab, shift, references, results, targets)
    for n in (STEPS, 50):
        m.add("Euler, uncached", f"{n} steps", lab.euler, steps=n)
    m.ours()
    for n in (15, 10):
        m.add("fewer Euler steps", f"{n} steps", lab.euler, steps=n)
    m.published_teacache()
    m.peers()
    m.ours(MORE_STEPS, (10, 15), (0.003,), both=False)
    m.cache_dit()
    m.solvers()
    return base


def measure_rounding(lab, shift, float32, results):
    """A table in bfloat16: all against the uncached float32 image."""
    m = Measurement("rounding", lab, shift, {"float32": float32}, results)
    m.add("Euler, uncached", f"{STEPS} steps", lab.euler)
    m.ours(computed=(8, 10, 12, 15, 20))
    for n in (15, 10):
        m.add("fewer Euler steps", f"{n} steps", lab.euler, steps=n)
    m.published_teacache()
    m.peers()
    m.cache_dit(own=False)


def plot(rows, path):
    """Passes against mean PSNR to the uncached image at shift 6: float32, and bfloat16 with the line of rounding."""
    from matplotlib.figure import Figure

    looks = {  # readable in grey: one marker for each, ours black
        "computed_steps": ("black", "-", "o", "ours, corrected"),
        "computed_steps, not corrected": ("black", "--", "o", "ours, not corrected"),
        "fewer Euler steps": ("0.45", ":", "x", "plain steps"),
        "TeaCache v1": ("0.45", "-", "s", "TeaCache, v1"),
        "TeaCache v2": ("0.45", "--", "*", "TeaCache, v2"),
        "EasyCache": ("tab:blue", "-", "v", "EasyCache"),
        "MagCache": ("tab:green", "-", "^", "MagCache"),
        "PrediT": ("tab:orange", "-", "D", "PrediT"),
        "cache-dit, TaylorSeer": ("tab:purple", "-", "P", "cache-dit, TaylorSeer"),
    }
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = zip(figure.subplots(1, 2), (("shift 6", "uncached"), ("rounding", "float32")))
    for axes, (table, name) in panels:
        mine = [row for row in rows if row["table"] == table]
        for method, (color, line, marker, label) in looks.items():
            same = [r for r in mine if r["method"] == method and not r["setting"].startswith("F1")]
            points = sorted((r["passes"], statistics.mean(r[name])) for r in same if r["passes"] < 25)
            wide = 2.2 if "computed" in method else 1.3
            look = {"color": color, "linestyle": line, "marker": marker, "label": label, "linewidth": wide}
            axes.plot(*(zip(*points) if points else ([], [])), **look)
        axes.set(xlabel="passes", ylabel="mean PSNR (dB)", xlim=(7, 25))
        axes.grid(alpha=0.3)
        if table == "rounding":
            line = statistics.mean(next(r for r in mine if r["method"] == "Euler, uncached")[name])
            axes.axhline(line, color="black", linestyle="-.", linewidth=1)
            axes.annotate("rounding: uncached bfloat16", (7.2, line), va="bottom", fontsize=9)
            axes.set_title("shift 6, bfloat16, to uncached float32")
        else:
            axes.set_title("shift 6, float32, to uncached")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=9, handlelength=3.5)
    figure.savefig(path, dpi=110, format="png")


def load(model, dtype):
    pipeline = Lumina2Pipeline.from_pretrained(model, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def read_prompts(args):
    """Two lists: known to the model, and new to it."""
    if args.prompts:
        lines = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        return lines[: args.count], []
    lines = (args.model / "emoji.txt").read_text(encoding="utf-8").splitlines()
    names = [line.split("\t")[1] for line in lines if "\t" in line]
    return names[:: max(len(names) // args.count, 1)][: args.count], NEW_PROMPTS[: args.new]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=teacache_lumina2.BUNDLED_MODEL, help="folder of a Lumina2Pipeline")
    add("--prompts", type=Path, help="one prompt per line; default: names in the emoji.txt of the model, and new ones")
    add("--count", type=int, default=8, help="how many of the prompts")
    add("--new", type=int, default=len(NEW_PROMPTS), help="how many of the new ones")
    add("--shifts", type=float, nargs="+", default=[6.0, 1.0], help="the first one is measured in bfloat16 too")
    add("--guidance-scale", type=float, default=teacache_lumina2.GUIDANCE_SCALE)
    add("--seed", type=int, default=7)
    add("--output", type=Path, default=record.RESULTS / "peers.json")
    add("--plot", type=Path, default=ROOT / "assets" / "peers.png")
    add("--plot-only", action="store_true")
    args = parser.parse_args()
    if args.plot_only:
        plot(list(json.loads(args.output.read_text(encoding="utf-8"))["rows"].values()), args.plot)
        return
    known, new = read_prompts(args)
    packages = ["transformers", *["cache-dit"] * bool(importlib.util.find_spec("cache_dit"))]
    about = {"model": args.model.name, "known": known, "new": new, "guidance": args.guidance_scale, "seed": args.seed}
    results = record.Record(args.output, packages, **about)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    pipeline = load(args.model, torch.float32)
    lab = Lab(pipeline, known + new, args.guidance_scale, args.seed)
    converged = lab.euler(CONVERGED, 3.0)
    print("the converged images are drawn", file=sys.stderr, flush=True)
    for shift in args.shifts:
        base = measure_shift(lab, shift, converged, results, (15, 10) if shift == args.shifts[0] else (15,))
        if shift == args.shifts[0]:
            half = Lab(load(args.model, torch.bfloat16), known + new, args.guidance_scale, args.seed)
            measure_rounding(half, shift, base, results)
    plot(list(results.rows.values()), args.plot)


if __name__ == "__main__":
    main()
