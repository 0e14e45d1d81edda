"""Every way of running Lumina2 on fewer passes, on the same prompts and seeds: share of passes, seconds, fidelity.

    python tests/benchmarks/lumina2_peers.py                              # the bundled model, 24 prompts
    python tests/benchmarks/lumina2_peers.py --model PATH --prompts FILE --steps 30

Compared with the uncached picture of the same number of steps:

    fewer steps        the pipeline, asked for fewer Euler steps
    TeaCache           the original: hold, at thresholds with v1, v2 and calibrated coefficients
    hold               the last residual again, at the steps that a speedup chooses
    cache-dit          DBCache with 1 or 8 blocks computed always, with TaylorSeer, with a mask of steps (if installed)
    ours               forecast, at the steps that a speedup chooses; and at thresholds, calibrated

Share of passes: calls of blocks, of those that the uncached run makes. Wall ratio: seconds of the uncached denoising
loop over those of the method for the same prompt, median of all, after an untimed warm-up. The picture is decoded
outside of the time. Prints for each number of steps a Markdown table, what was aimed at and found, and JSON as the last
line; draws share against mean PSNR. Needs matplotlib, and cache-dit for its rows: pip install -e ".[lumina2,benchmark]"
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import diffusers
import torch
from diffusers import Lumina2Pipeline

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from TeaCache4LuminaT2X import teacache_lumina2 as script  # noqa: E402
from TeaCache4LuminaT2X.compare_lumina2 import psnr, ssim  # noqa: E402

# --- the methods ----------------------------------------------------------------


@contextlib.contextmanager
def teacache(pipeline, steps, **settings):
    script.apply_teacache(pipeline.transformer, steps, **settings)
    try:
        yield
    finally:
        script.remove_teacache(pipeline.transformer)


@contextlib.contextmanager
def cache_dit(pipeline, steps, taylor=False, schedule=None, **settings):
    """DBCache, as its own registry knows Lumina2; schedule: the steps that are computed, instead of a threshold."""
    import cache_dit as library

    if schedule:
        settings |= {"steps_computation_mask": list(map(int, schedule)), "steps_computation_policy": "static"}
    config = library.DBCacheConfig(num_inference_steps=steps, **settings)
    calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    blocks = pipeline.transformer.layers
    library.enable_cache(pipeline, cache_config=config, calibrator_config=calibrator)
    try:
        yield
    finally:
        library.disable_cache(pipeline)
        assert pipeline.transformer.layers is blocks


def methods(model, steps, schedules):
    """(family, setting, steps of the pipeline, context manager of the pipeline); schedules: {speedup: ours}."""
    found = []

    def add(family, setting, context=None, own_steps=None):
        found.append((family, setting, own_steps or steps, context or (lambda pipeline: contextlib.nullcontext())))

    def ours(family, setting, **settings):
        add(family, setting, lambda pipeline: teacache(pipeline, steps, **settings))

    def theirs(setting, **settings):
        context = functools.partial(cache_dit, steps=steps, Bn_compute_blocks=0, **settings)
        family = "cache-dit, TaylorSeer" if settings.get("taylor") else "cache-dit"
        add(f"{family}, our steps" if settings.get("schedule") else family, setting, context)

    for speedup in (1.5, 2, 3, 4):
        add("fewer steps", f"{script.count(steps, speedup)} steps", own_steps=script.count(steps, speedup))
    for thresh in (0.3, 0.5):
        ours("TeaCache, v1", f"threshold {thresh}", rel_l1_thresh=thresh, predict="hold")
    for thresh in (5,):
        coefficients = {"coefficients": script.COEFFICIENTS_V2}
        ours("TeaCache, v2", f"threshold {thresh}", rel_l1_thresh=thresh, predict="hold", **coefficients)
    for indicator in script.INDICATORS:
        for family, predict in (("TeaCache, calibrated", "hold"), ("forecast, calibrated", "forecast")):
            coefficients, domain, _ = script.coefficients_of(model / "teacache.json", indicator, predict)
            fitted = {"coefficients": coefficients, "domain": domain, "indicator": indicator, "predict": predict}
            for thresh in (0.1, 0.2, 0.3) if domain else ():
                ours(
                    family if indicator == "modulated" else f"{family}, timestep",
                    f"threshold {thresh}",
                    rel_l1_thresh=thresh,
                    **fitted,
                )
    for speedup in (2, 3, 4):
        ours("hold, speedup", f"speedup {speedup}", speedup=speedup, predict="hold")
    if importlib.util.find_spec("cache_dit"):
        for taylor in (False, True):
            with_t = {"taylor": taylor, "Fn_compute_blocks": 1}
            theirs("F1, 0.12, warm-up 8", residual_diff_threshold=0.12, max_warmup_steps=8, **with_t)
            theirs("F1, 0.08, warm-up 4", residual_diff_threshold=0.08, max_warmup_steps=4, **with_t)
            theirs("F1, 0.12, warm-up 4", residual_diff_threshold=0.12, max_warmup_steps=4, **with_t)
            for speedup in (2, 3, 4) if taylor else (2,):
                theirs(f"F1, {script.count(steps, speedup)} steps", schedule=schedules[speedup], **with_t)
        theirs("F8, 0.12, warm-up 8", residual_diff_threshold=0.12, max_warmup_steps=8, Fn_compute_blocks=8)
    for speedup in (1.5, 2, 3, 4):
        ours("forecast, speedup", f"speedup {speedup}", speedup=speedup, predict="forecast")
    return found


# --- one picture ----------------------------------------------------------------


class Runner:
    """Draws pictures, and counts the calls of the transformer's blocks."""

    def __init__(self, pipeline, guidance):
        self.pipeline, self.guidance, self.calls = pipeline, guidance, 0
        for block in pipeline.transformer.layers:
            block.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    def draw(self, embeds, seed, steps, context):
        """PIL image, seconds of the denoising loop, calls of blocks."""
        with context(self.pipeline):
            self.calls = 0
            synchronize()
            began = time.perf_counter()
            latents = self.pipeline(
                **embeds,
                num_inference_steps=steps,
                guidance_scale=self.guidance,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            ).images
            synchronize()
            seconds, calls = time.perf_counter() - began, self.calls
        vae = self.pipeline.vae
        with torch.no_grad():
            picture = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        return self.pipeline.image_processor.postprocess(picture)[0], seconds, calls


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(runner, model, prompts, steps, seed, only):
    """{speedup: the schedule that ours chooses}, and a row for each method.

    A row: {"family", "setting", "share", "wall", "psnr", "psnr_min", "ssim"}.
    """
    from tqdm.auto import tqdm

    schedules = {}
    for speedup in (1.5, 2, 3, 4):
        with teacache(runner.pipeline, steps, speedup=speedup):
            runner.pipeline("", num_inference_steps=steps, output_type="latent")
            schedules[speedup] = runner.pipeline.transformer.teacache.schedule
    ways = [way for way in methods(model, steps, schedules) if any(word in way[0] for word in only)]
    collected = [{"calls": [], "seconds": [], "psnr": [], "ssim": []} for _ in ways]
    base_calls, base_seconds = [], []
    for i, prompt in enumerate(tqdm(prompts, desc=f"{steps} steps", unit="prompt")):
        names = "prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask".split()
        embeds = dict(zip(names, runner.pipeline.encode_prompt(prompt, True, negative_prompt="")))
        draw = functools.partial(runner.draw, embeds, seed + i)

        def plain(pipeline):
            return contextlib.nullcontext()

        for _, _, own_steps, context in ways if i == 0 else ():  # warm-up
            draw(own_steps, context)
        reference, seconds, calls = draw(steps, plain)
        base_calls.append(calls)
        base_seconds.append(seconds)
        for (_, _, own_steps, context), into in zip(ways, collected):
            image, seconds, calls = draw(own_steps, context)
            into["calls"].append(calls)
            into["seconds"].append(seconds)
            into["psnr"].append(min(psnr(image, reference), 99.0))  # 99 for equal pictures
            into["ssim"].append(ssim(image, reference))
    rows = []
    for (family, setting, _, _), c in zip(ways, collected):
        rows.append(
            {
                "family": family,
                "setting": setting,
                "share": sum(c["calls"]) / sum(base_calls),
                "wall": statistics.median(a / b for a, b in zip(base_seconds, c["seconds"])),
                "psnr": statistics.mean(c["psnr"]),
                "psnr_min": min(c["psnr"]),
                "ssim": statistics.mean(c["ssim"]),
            }
        )
    return schedules, rows


# --- what comes of it -----------------------------------------------------------


def table(rows):
    lines = ["| way | setting | share of passes | wall | PSNR, mean (least) | SSIM |", "|---|---|---|---|---|---|"]
    for r in rows:
        psnrs = f"{r['psnr']:.1f} ({r['psnr_min']:.1f}) dB"
        cost = f"{r['share']:.2f} | {r['wall']:.2f}x"
        lines.append(f"| {r['family']} | {r['setting']} | {cost} | {psnrs} | {r['ssim']:.4f} |")
    return "\n".join(lines)


def targets(rows, steps):
    """Markdown: the forecast at a speedup against the others at its number of passes; met or missed."""
    by = {(r["family"], r["setting"]): r for r in rows}
    lines = ["| at a speedup of | against | aimed at | found | |", "|---|---|---|---|---|"]
    for speedup, (mean, to_hold) in {2: (4, 5), 3: (2, None), 4: (0, None)}.items():
        ours = by["forecast, speedup", f"speedup {speedup}"]
        fewer = by["fewer steps", f"{script.count(steps, speedup)} steps"]
        hold = by["hold, speedup", f"speedup {speedup}"]
        theirs = [r["psnr"] for r in rows if r["family"].startswith("cache-dit") and r["share"] <= 1.1 * ours["share"]]
        aims = [("fewer steps, mean", mean, ours["psnr"] - fewer["psnr"], "dB")]
        aims += [("fewer steps, least", 0, ours["psnr_min"] - fewer["psnr_min"], "dB")]
        aims += [("hold at the same steps, mean", to_hold, ours["psnr"] - hold["psnr"], "dB")]
        aims += [("best of cache-dit at up to 1.1 of the share", 0, ours["psnr"] - max(theirs), "dB")] if theirs else []
        aims += [("wall, of the ratio of passes", 0.9, ours["wall"] * ours["share"], "")]
        for what, aim, found, unit in aims:
            verdict = "" if aim is None else "met" if found >= aim else "missed"
            wanted = "" if aim is None else f"{aim:+g} dB" if unit else f"{aim:g}"
            lines.append(
                f"| {speedup} | {what} | {wanted} | {f'{found:+.1f} dB' if unit else f'{found:.2f}'} | {verdict} |"
            )
    return "\n".join(lines)


def plot(results, path):
    """Share of passes against mean PSNR: a panel a number of steps, a line a family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(results), 4.6), layout="constrained")
    for axes, (steps, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        axes.set_prop_cycle(
            color=[
                "tab:blue",
                "tab:orange",
                "tab:green",
                "black",
                "tab:purple",
                "tab:cyan",
                "tab:gray",
                "tab:olive",
                "tab:brown",
            ]
        )
        for family in dict.fromkeys(r["family"] for r in rows):
            points = sorted((r["share"], r["psnr"]) for r in rows if r["family"] == family)
            ours = family == "forecast, speedup"
            style = {"color": "crimson", "linewidth": 2.5, "zorder": 5} if ours else {"linewidth": 1.2}
            axes.plot(*zip(*points), marker="o", markersize=5 if ours else 4, label=family, **style)
        axes.set(title=f"{steps} steps", xlabel="share of passes", ylabel="mean PSNR to the uncached picture (dB)")
        axes.set_xlim(0.2, 0.8)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=script.BUNDLED_MODEL, help="folder of a Lumina2Pipeline")
    parser.add_argument("--prompts", type=Path, help="a prompt a line; default: the first names of its emoji.txt")
    parser.add_argument("--count", type=int, default=24, help="how many of the prompts")
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 50])
    parser.add_argument("--guidance-scale", type=float, default=script.GUIDANCE_SCALE)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="ways whose name has one of these words"
    )
    parser.add_argument("--output", type=Path, default="lumina2_peers.png")
    args = parser.parse_args()
    if min(args.steps) < 8:
        parser.error("--steps: at least 8, of which a quarter are the first and the last")
    if not args.prompts and not (args.model / "emoji.txt").is_file():
        parser.error("give --prompts, a text file with a prompt a line")

    if args.prompts:
        prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        names = (args.model / "emoji.txt").read_text(encoding="utf-8").splitlines()
        prompts = [line.split("\t")[1] for line in names if "\t" in line]
        prompts = prompts[:: max(len(prompts) // args.count, 1)]
    prompts = prompts[: args.count]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    pipeline = Lumina2Pipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    pipeline.set_progress_bar_config(disable=True)
    runner = Runner(pipeline, args.guidance_scale)
    results = {}
    for steps in args.steps:
        schedules, rows = measure(runner, args.model, prompts, steps, args.seed, args.only)
        results[steps] = rows
        print(f"\n{steps} steps, {len(prompts)} prompts\n\n{table(rows)}\n")
        if args.only == [""]:
            print(targets(rows, steps))
        for speedup, schedule in schedules.items():
            print(f"speedup {speedup:g} computes {' '.join(str(i) for i, c in enumerate(schedule) if c)}", flush=True)
    plot(results, args.output)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    if importlib.util.find_spec("cache_dit"):
        from importlib.metadata import version

        versions["cache-dit"] = version("cache-dit")
    about = {"machine": machine, "cores": os.cpu_count(), **versions, "model": args.model.name, "seed": args.seed}
    print(json.dumps({**about, "prompts": prompts, "results": results}))


if __name__ == "__main__":
    main()
