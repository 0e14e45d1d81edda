"""Every way to draw with fewer passes of Lumina2, at about 15, 10 and 8 passes of 30, against the uncached image.

    python tests/benchmarks/lumina2_peers.py --table shift6         # float32, against the uncached float32 image
    python tests/benchmarks/lumina2_peers.py --table rounding       # bfloat16, against the same
    python tests/benchmarks/lumina2_peers.py --group open           # other prompts, of either table: open, or empty
    python tests/benchmarks/lumina2_peers.py --plot                 # of both, into assets/peers.png
    python tests/benchmarks/lumina2_peers.py --model PATH --prompts FILE

Each table and group of prompts is a file in `results`, and may be measured by a process of its own. Each method draws the
same prompts: captions of the training set and new ones (clear), open ones, and the empty prompt without guidance. What is
set or fitted for the clear prompts, which come first, holds for all: a threshold is the published one, or one that computes about 15, 10 or 8 steps of
one of the prompts; what has to be fitted is fitted on four other captions. A pass is one evaluation of the guided network;
passes of methods that decide by themselves are means. Rows are written as they are done, and a run that was stopped goes on;
`render.py` makes tables of them, and the paired differences.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import logging
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import prompts
import record
import skipping
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, UniPCMultistepScheduler

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from TeaCache4LuminaT2X import teacache_lumina2  # noqa: E402
from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache, remove_teacache  # noqa: E402

STEPS, SHIFT = 30, 6.0  # of the real model
OURS = 15, 12, 10, 8, 6  # computed of 30 steps
ABOUT = 15, 10, 8  # passes of the others
TABLES = {"shift6": ("peers", torch.float32), "rounding": ("peers_rounding", torch.bfloat16)}
GROUPS = {"clear": "", "open": "_open", "empty": "_empty"}  # and what their files add to the name of the table's


class Lab:
    """The denoising loop of `Lumina2Pipeline` on prepared prompts, with any sigmas and any solver."""

    def __init__(self, pipeline, prompts, guidance, seed):
        self.pipeline, self.guidance, self.passes = pipeline, guidance, 0.0
        self.calls_per_step = 2 if guidance > 1 else 1
        embeds = pipeline.encode_prompt(prompts, True, negative_prompt=[""] * len(prompts))
        longest = int(embeds[1].sum(1).max())  # padding costs time and changes nothing
        self.embeds = [x[:, :longest] for x in embeds]  # with the prompt, its mask, without, its mask
        size, channels = pipeline.default_sample_size, pipeline.transformer.config.in_channels
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        self.noise = torch.cat([torch.randn(1, channels, size, size, generator=g) for g in generators])
        self.noise = self.noise.to(pipeline.device, pipeline.transformer.dtype)

    def select(self, rows):
        """The same with some of the prompts."""
        part = copy.copy(self)
        part.embeds, part.noise = [x[rows] for x in self.embeds], self.noise[rows]
        return part

    def each(self):
        return [self.select([i]) for i in range(len(self.noise))]

    def outputs(self, x, sigma, rows=slice(None)):
        """(prompts, 2, channels, height, width): of the network with the prompt, and without."""
        timestep = torch.full((len(x),), 1 - float(sigma), device=x.device)
        embeds = [e[rows] for e in self.embeds]
        pairs = (embeds[:2], embeds[2:])[: self.calls_per_step]
        calls = [self.pipeline.transformer(x, timestep, *pair, return_dict=False)[0] for pair in pairs]
        return torch.stack([calls[0], calls[-1]], 1)  # without guidance, the same twice

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
        given = {**dict(zip(names, self.embeds)), "guidance_scale": self.guidance}
        given |= {"latents": latents, "output_type": "latent"}
        return self.pipeline(**given, num_inference_steps=steps).images

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

    def teacache(self, steps, shift, corrected, **settings):
        """Ours, by the pipeline; one prompt at a time, as each has steps of its own."""
        latents, computed = [], []
        with correction(corrected):
            for part in self.each():
                self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
                apply_teacache(self.pipeline, **settings)
                latents.append(part.run_pipeline(steps))
                computed.append(sum(self.pipeline.transformer.teacache.schedule))
                remove_teacache(self.pipeline)
        self.passes = statistics.mean(computed)
        return self.images(torch.cat(latents))

    def skipping(self, steps, shift, rule, *settings, corrected=False):
        """Euler's method with a rule of `skipping.py` for each image; corrected: by the corrector of the script.

        rule: a class, or a list of one for each image.
        """
        rules = rule if isinstance(rule, list) else [rule] * len(self.noise)
        x, s, rules, computed = self.noise, sigmas(steps, shift), [rule(steps, *settings) for rule in rules], 0
        correctors = [teacache_lumina2.Corrector() for _ in rules] if corrected else []
        for i in range(steps):
            outputs = [rule.skip(i, 1 - s[i], z) for rule, z in zip(rules, x)]
            rows = [j for j, output in enumerate(outputs) if output is None]
            for j, output in zip(rows, self.outputs(x[rows], s[i], rows) if rows else ()):
                rules[j].see(i, 1 - s[i], x[j], output)
                outputs[j] = output
            computed += len(rows)
            velocity = -self.guide(torch.stack(outputs)).float()  # from image to noise, as the scheduler has it
            x = (x.float() + (s[i + 1] - s[i]) * velocity).to(x.dtype)
            for j, corrector in enumerate(correctors):
                correction = corrector.correction(velocity[j].clone(), s[i], s[i + 1], j in rows, 2)
                x[j] = (x[j] + correction).to(x.dtype)
        self.passes = computed / len(x)
        return self.images(x)

    def trajectory(self, steps, shift):
        """The outputs of all steps."""
        x, s, outputs = self.noise, sigmas(steps, shift), []
        for i in range(steps):
            outputs.append(self.outputs(x, s[i]))
            x = (x.float() + (s[i] - s[i + 1]) * self.guide(outputs[-1])).to(x.dtype)
        return outputs

    def skipping_blocks(self, steps, shift, schedule):
        """By the pipeline: the layers run in the steps of the schedule only. See `skipping.Blocks`."""
        transformer = self.pipeline.transformer
        layers, blocks = transformer.layers, skipping.Blocks(transformer.layers, schedule, self.calls_per_step)
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

    def cache_dit(self, steps, shift, calibrator=None, schedules=None, **settings):
        """DBCache with 1 block always computed, by the pipeline. schedules: steps to compute, instead of a threshold."""
        import cache_dit

        calls, latents, blocks = [], [], self.pipeline.transformer.layers
        hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in blocks]
        self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        blockwise = {"num_inference_steps": steps, "Fn_compute_blocks": 1, "Bn_compute_blocks": 0}
        blockwise["enable_separate_cfg"] = self.calls_per_step == 2
        parts = self.each()
        for part, schedule in zip(parts, schedules or parts):
            if schedules:
                settings |= {"steps_computation_mask": list(map(int, schedule)), "steps_computation_policy": "static"}
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
        self.passes = len(calls) / (self.calls_per_step * len(blocks) * len(parts))
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
    """The rows of one table."""

    def __init__(self, lab, few, fitting, reference, results, thresholds):
        self.lab, self.few, self.fitting, self.reference, self.results = lab, few, fitting, reference, results
        self.found = thresholds  # {key of a row: threshold}

    def add(self, method, setting, draw, *args, steps=STEPS, threshold=None, **settings):
        """Draws with `draw(steps, shift, *args)`, a method of the lab; a setting is what a row is called."""
        key = record.slug(method, setting)
        if key in self.results.rows:
            return
        began, self.lab.passes = time.process_time(), 0.0
        images = draw(steps, SHIFT, *args, **settings)
        row = {"method": method, "setting": str(setting), "passes": round(self.lab.passes, 2)}
        if threshold is not None:
            row["threshold"] = threshold
        row["float32"] = [round(dB, 2) for dB in psnr(images, self.reference)]
        self.results.add(key, **row)
        figures = f"{row['passes']:.1f} passes, {statistics.mean(row['float32']):.1f} dB"
        seconds = time.process_time() - began
        print(f"{method}, {setting}: {figures}, {seconds:.0f} s", file=sys.stderr, flush=True)

    def tuned(self, method, passes_of, draw_with, published=None, about=ABOUT):
        """A published threshold, and those that give about so many passes. draw_with(threshold): for `add`."""
        if published is not None:
            self.add(method, published, *draw_with(published))
        for target in about:
            key = record.slug(method, f"about {target}")
            if key not in self.results.rows:
                tuned = self.found.get(key) or self.found.get((passes_of, target)) or tune(passes_of, target)
                threshold = self.found[passes_of, target] = float(tuned)
                self.add(method, f"about {target}", *draw_with(threshold), threshold=f"{threshold:g}")

    def ours(self):
        for corrected, suffix in ((True, ""), (False, ", not corrected")):
            for k in OURS:
                self.add(f"computed_steps{suffix}", k, self.lab.teacache, computed_steps=k, corrected=corrected)

    def plain(self, solver=None, name="plain steps"):
        for n in ABOUT:
            self.add(name, n, solver or self.lab.euler, steps=n)

    def solvers(self):
        self.plain(self.lab.adams_bashforth, "Adams-Bashforth 2")
        self.plain(self.lab.unipc, "UniPC")
        self.plain(self.lab.dpm_solver, "DPM-Solver++ 2M")

    def teacache(self):
        """TeaCache's rule, by the script."""
        for name in ("v1", "v2"):
            coefficients = getattr(teacache_lumina2, f"COEFFICIENTS_{name.upper()}")

            def passes_of(threshold, coefficients=coefficients):
                self.few.teacache(STEPS, SHIFT, corrected=False, rel_l1_thresh=threshold, coefficients=coefficients)
                return self.few.passes

            for corrected, suffix, about in ((False, "", ABOUT), (True, ", corrected", ABOUT[:1])):
                draw = functools.partial(self.lab.teacache, corrected=corrected, coefficients=coefficients)
                draw_with = lambda t, draw=draw: (functools.partial(draw, rel_l1_thresh=t),)  # noqa: E731
                self.tuned(f"TeaCache's rule, {name}{suffix}", passes_of, draw_with, 0.3, about)

    def block_caches(self):
        self.few.skipping_blocks(STEPS, SHIFT, [True] * STEPS)
        ratios = [1.0, *self.few.ratios]
        for name, published, plan in (
            ("MagCache", 0.24, lambda threshold: skipping.magcache_schedule(ratios, threshold)),
            ("ComfyUI-TeaCache", 0.38, lambda threshold: self.lab.comfyui_schedule(STEPS, SHIFT, threshold)),
        ):
            draw_with = lambda t, plan=plan: (self.lab.skipping_blocks, plan(t))  # noqa: E731
            self.tuned(name, lambda t, plan=plan: sum(plan(t)), draw_with, published)

    def rules(self):
        for name, rule, published in (("EasyCache", skipping.EasyCache, 0.05), ("PrediT", skipping.PrediT, None)):

            def passes_of(threshold, rule=rule):
                self.few.skipping(STEPS, SHIFT, rule, threshold)
                return self.few.passes

            self.tuned(name, passes_of, lambda t, rule=rule: (self.lab.skipping, rule, t), published)

    def cache_dit(self):
        if not importlib.util.find_spec("cache_dit"):
            return

        def passes_of(threshold):
            self.few.cache_dit(STEPS, SHIFT, **own_rule(threshold))
            return self.few.passes

        def own_rule(threshold):
            return {"residual_diff_threshold": threshold, "max_warmup_steps": 4}

        draw_with = lambda t: (functools.partial(self.lab.cache_dit, **own_rule(t)),)  # noqa: E731
        self.tuned("cache-dit", passes_of, draw_with, 0.12)
        blocks = len(self.lab.pipeline.transformer.layers)
        for target in ABOUT:  # it runs one of its blocks in a skipped step too
            k = round((target * blocks - STEPS) / (blocks - 1))
            draw = functools.partial(self.lab.cache_dit, calibrator="TaylorSeer", schedules=self.schedules(k))
            self.add("cache-dit, TaylorSeer, our steps", target, draw)

    def schedules(self, k):
        """For each image, the steps that ours computes."""
        lab, s = self.lab, sigmas(STEPS, SHIFT)
        firsts = lab.outputs(lab.noise, s[0])
        plans = [
            teacache_lumina2.choose_steps(s[:-1], k, teacache_lumina2.measure_decided(first[:, None]))
            for first in firsts
        ]
        return [[step in plan for step in range(STEPS)] for plan in plans]

    def forecasts(self):
        """On the steps that ours computes."""
        lab, trajectory = self.lab, self.fitting.trajectory(STEPS, SHIFT)
        for corrected, suffix in ((False, ""), (True, ", our correction")):
            for k in (*ABOUT, 6):
                draw = functools.partial(lab.skipping, corrected=corrected)
                fitted = functools.cache(lambda schedule: skipping.L2P.fit(trajectory, schedule))
                rules = [
                    functools.partial(skipping.L2P, schedule=schedule, weights=fitted(tuple(schedule)))
                    for schedule in self.schedules(k)
                ]
                self.add(f"L2P, our steps{suffix}", k, draw, rules)
        for k in (*ABOUT, 6):
            rules = [functools.partial(skipping.FoCa, schedule=schedule) for schedule in self.schedules(k)]
            self.add("FoCa, our steps", k, lab.skipping, rules)

    def all(self):
        self.add("uncached", STEPS, self.lab.euler)
        self.ours()
        self.plain()
        self.teacache()
        self.block_caches()
        self.forecasts()
        self.rules()
        self.cache_dit()


def plot(path):
    """Passes against mean PSNR: float32, and bfloat16 with the line of rounding."""
    from matplotlib.figure import Figure

    looks = {  # readable in grey: one marker for each, ours black
        "computed_steps": ("black", "-", "o", "ours"),
        "computed_steps, not corrected": ("black", "--", "o", "ours, not corrected"),
        "plain steps": ("0.45", ":", "x", "fewer steps, no cache"),
        "TeaCache's rule, v1": ("0.45", "-", "s", "TeaCache's rule, v1"),
        "TeaCache's rule, v2": ("0.45", "--", "*", "TeaCache's rule, v2"),
        "EasyCache": ("tab:blue", "-", "v", "EasyCache"),
        "MagCache": ("tab:green", "-", "^", "MagCache"),
        "PrediT": ("tab:orange", "-", "D", "PrediT"),
        "cache-dit, TaylorSeer, our steps": ("tab:purple", "-", "P", "cache-dit, TaylorSeer"),
        "L2P, our steps": ("tab:red", "-", "h", "L2P, fitted"),
    }
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    titles = {"shift6": "float32, to uncached float32", "rounding": "bfloat16, to uncached float32"}
    for axes, (table, title) in zip(figure.subplots(1, 2), titles.items()):
        rows = read_rows(TABLES[table][0]).values()
        for method, (color, line, marker, label) in looks.items():
            same = [r for r in rows if r["method"] == method and r["passes"] < 17]
            points = sorted((r["passes"], statistics.mean(r["float32"])) for r in same)
            wide = 2.2 if "computed" in method else 1.3
            look = {"color": color, "linestyle": line, "marker": marker, "label": label, "linewidth": wide}
            axes.plot(*(zip(*points) if points else ([], [])), **look)
        axes.set(xlabel="computed steps", ylabel="mean PSNR (dB)", xlim=(5.5, 17), title=title)
        axes.grid(alpha=0.3)
        if table == "rounding":
            line = statistics.mean(next(r for r in rows if r["method"] == "uncached")["float32"])
            axes.axhline(line, color="black", linestyle="-.", linewidth=1)
            axes.annotate("rounding: uncached bfloat16", (5.7, line), va="bottom", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=9, handlelength=3.5)
    figure.savefig(path, dpi=110, format="png")


def read_rows(name):
    """What was measured of a table and group of prompts."""
    path = record.RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}


def load(model, dtype):
    pipeline = Lumina2Pipeline.from_pretrained(model, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def read_prompts(args):
    """{group: prompts}: known to the model, new to it, those for fitting, open ones and empty ones."""
    if args.prompts:
        lines = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        groups = {"known": lines[4 : 4 + args.count], "new": [], "fitting": lines[:4]}
    else:
        known = prompts.known(args.model)
        groups = {"known": known["peers"][: args.count], "new": prompts.NEW[: args.new], "fitting": known["fitting"]}
    return {**groups, "open": prompts.OPEN, "empty": prompts.EMPTY}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--table", choices=TABLES, default="shift6")
    add("--group", choices=GROUPS, default="clear", help="of prompts; start with clear, which sets the thresholds")
    add("--plot", action="store_true", help="draw nothing, plot what there is")
    add("--model", type=Path, default=teacache_lumina2.BUNDLED_MODEL, help="folder of a Lumina2Pipeline")
    add("--prompts", type=Path, help="one per line, the first four for fitting; default: those of prompts.py")
    add("--count", type=int, default=8, help="how many of the known prompts")
    add("--new", type=int, default=16, help="how many of the new ones")
    add("--guidance-scale", type=float, default=teacache_lumina2.GUIDANCE_SCALE)
    add("--seed", type=int, default=7)
    add("--output", type=Path, help="default: a file in results")
    args = parser.parse_args()
    if args.plot:
        plot(ROOT / "assets" / "peers.png")
        return
    name, dtype = TABLES[args.table]
    groups = read_prompts(args)
    clear = groups["known"] + groups["new"]
    packages = ["transformers", *["cache-dit"] * bool(importlib.util.find_spec("cache_dit"))]
    shown = ("known", "new") if args.group == "clear" else (args.group,)
    guidance = 1.0 if args.group == "empty" else args.guidance_scale
    about = {"model": args.model.name, "table": args.table, **{g: groups[g] for g in (*shown, "fitting")}}
    about |= {"guidance": guidance, "shift": SHIFT, "seed": args.seed}
    results = record.Record(args.output or record.RESULTS / f"{name}{GROUPS[args.group]}.json", packages, **about)
    thresholds = {key: row["threshold"] for key, row in read_rows(name).items() if "threshold" in row}
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    pipeline = load(args.model, torch.float32)
    drawn = sum((groups[g] for g in shown), [])
    reference = Lab(pipeline, drawn, guidance, args.seed).euler(STEPS, SHIFT)
    if dtype != torch.float32:
        pipeline = load(args.model, dtype)
    lab, few = Lab(pipeline, drawn, guidance, args.seed), Lab(pipeline, clear, args.guidance_scale, args.seed)
    fitting = Lab(pipeline, groups["fitting"], args.guidance_scale, 1000)
    measurement = Measurement(lab, few.select([len(clear) // 2]), fitting, reference, results, thresholds)
    measurement.all()
    if dtype == torch.float32:
        measurement.solvers()


if __name__ == "__main__":
    main()
