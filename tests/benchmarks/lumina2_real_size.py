"""What a pass of Lumina-Image-2.0 costs at real size: stock, computed under TeaCache, skipped, decided; then 30 steps.

The transformer as released (width 2304, 26 layers, 2 + 2 refiners, 24 heads, 8 of them for keys and values, patches of
2, 16 channels), bfloat16, captions of 256 and 8 tokens padded to 256, with random weights: the time of a pass does not
depend on them. Medians of runs in turn in one process, after a warm-up; the last line is JSON.

    python tests/benchmarks/lumina2_real_size.py              # on a GPU with 16 GB or more
    python tests/benchmarks/lumina2_real_size.py --tiny       # to try it out, on any machine
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache, embed_time, relative_l1, remove_teacache

RELEASED = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "hidden_size": 2304,
    "num_layers": 26,
    "num_refiner_layers": 2,
    "num_attention_heads": 24,
    "num_kv_heads": 8,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "scaling_factor": 1.0,
    "axes_dim_rope": (32, 32, 32),
    "axes_lens": (300, 512, 512),
    "cap_feat_dim": 2304,
}
TINY = RELEASED | {
    "hidden_size": 192,
    "num_layers": 26,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
    "cap_feat_dim": 64,
}
TINY |= {"axes_dim_rope": (16, 8, 8)}
STEPS, TOKENS = 30, 256
# (settings, computed): a threshold that nothing reaches skips the second pass, one that all reach computes it
ALWAYS, NEVER = {"rel_l1_thresh": 1e-12, "coefficients": [1.0]}, {"rel_l1_thresh": 1e12, "coefficients": [1.0]}
PASSES = {
    "stock": None,
    "computed, modulated": (ALWAYS, True),
    "computed, timestep": (ALWAYS | {"indicator": "timestep"}, True),
    "skipped, modulated, hold": (NEVER | {"predict": "hold"}, False),
    "skipped, modulated, forecast": (NEVER | {"predict": "forecast"}, False),
    "skipped, timestep, hold": (NEVER | {"predict": "hold", "indicator": "timestep"}, False),
    "skipped, timestep, forecast": (NEVER | {"predict": "forecast", "indicator": "timestep"}, False),
    "skipped, speedup, forecast": ({"predict": "forecast", "speedup": 1000.0}, False),
}


def clock(function, device):
    """Milliseconds, and peak memory in MiB where there is a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return 1000 * (time.perf_counter() - began), peak


def conditioning(model, height, width):
    """Latents, and (features, mask) of a prompt and of a short negative one."""
    generator = torch.Generator().manual_seed(0)
    place = {"device": model.device, "dtype": model.dtype}
    latents = torch.randn(1, model.config.in_channels, height // 8, width // 8, generator=generator).to(**place)
    captions = []
    for tokens in (TOKENS, 8):
        features = torch.randn(1, TOKENS, model.config.cap_feat_dim, generator=generator).to(**place)
        captions.append((features, (torch.arange(TOKENS) < tokens).long()[None].to(model.device)))
    return latents, captions


@torch.no_grad()
def passes(model, height, width, repeats, device):
    """Median milliseconds of each kind of pass, measured in turn; peak memory; MiB held by the cache of both branches.

    After the calls of the first two steps, where a line through two outputs can be drawn, the third is measured; with
    the timestep indicator the number of steps is such that it may be skipped.
    """
    latents, captions = conditioning(model, height, width)

    def call(t, which=0):
        embeds, mask = captions[which]
        time = torch.full((1,), t, device=model.device, dtype=model.dtype)
        model(latents, time, embeds, mask, return_dict=False)

    found = {name: [] for name in PASSES}
    cached = {}
    for _ in range(repeats + 1):
        for name, kind in PASSES.items():
            remove_teacache(model)
            if kind:
                settings, computed = kind
                num_steps = 10 if "timestep" in name else 2000
                apply_teacache(model, num_steps, **settings)
            for t in (0.125, 0.25):
                for which in (0, 1):
                    call(t, which)
            found[name].append(clock(lambda: call(0.5), device))
            if kind:
                assert model.teacache.schedule[-1] == computed, (name, model.teacache.schedule)
                branches = model.teacache.branches
                held = [x for b in branches for _, x in b.computed] + [
                    b.signal for b in branches if b.signal is not None
                ]
                cached[name] = sum(x.numel() * x.element_size() for x in held) / 2**20
    remove_teacache(model)

    joint = torch.randn(1, TOKENS + height * width // 256, model.config.hidden_size).to(model.device, model.dtype)
    temb = embed_time(model, torch.full((1,), 0.5, device=model.device), latents)
    modulated = model.layers[0].norm1(joint, temb)[0]

    def decide_modulated():
        relative_l1(model.layers[0].norm1(joint, temb)[0], modulated)

    def decide_timestep():
        relative_l1(embed_time(model, torch.full((1,), 0.5, device=model.device), latents), temb)

    for name, function in {"decision, modulated": decide_modulated, "decision, timestep": decide_timestep}.items():
        found[name] = [clock(function, device) for _ in range(repeats + 1)]
    return {
        name: {
            "ms": statistics.median(ms for ms, _ in values[1:]),  # the first is a warm-up
            "peak_mib": max(peak for _, peak in values[1:]) if device == "cuda" else None,
            "cached_mib": cached.get(name, 0.0),
        }
        for name, values in found.items()
    }


@torch.no_grad()
def generation(model, height, width, repeats, device):
    """Median seconds of 30 guided steps, all of them computed and at a speedup of 2, as Lumina2Pipeline runs them."""
    noise, captions = conditioning(model, height, width)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)

    def draw():
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), device=model.device)
        latents = noise
        for t in scheduler.timesteps:
            time = (1 - t / 1000).expand(1)
            cond, uncond = (model(latents, time, *caption, return_dict=False)[0] for caption in captions)
            velocity = uncond + 4.0 * (cond - uncond)
            velocity *= cond.norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True)
            latents = scheduler.step(-velocity, t, latents, return_dict=False)[0].to(noise.dtype)

    found = {"stock": [], "speedup 2": []}
    for _ in range(repeats + 1):
        remove_teacache(model)
        found["stock"].append(clock(draw, device))
        apply_teacache(model, STEPS, speedup=2.0, predict="forecast")
        found["speedup 2"].append(clock(draw, device))
        assert sum(model.teacache.schedule) == STEPS // 2
    remove_teacache(model)
    return {
        kind: {
            "seconds": statistics.median(ms for ms, _ in values[1:]) / 1000,
            "peak_mib": max(peak for _, peak in values[1:]) if device == "cuda" else None,
        }
        for kind, values in found.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small network and small pictures, to try this script")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if args.tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = Lumina2Transformer2DModel(**(TINY if args.tiny else RELEASED)).to(dtype).requires_grad_(False).eval()
    results = {}
    for height, width in ((128, 128), (128, 192)) if args.tiny else ((1024, 1024), (1024, 1536)):
        found = passes(model, height, width, args.repeats, device)
        whole = generation(model, height, width, max(1, args.repeats // 2), device)
        stock = found["stock"]["ms"]
        print(f"\n{height} x {width}\n\n| pass | ms | of stock | cached MiB | peak MiB |\n|---|---|---|---|---|")
        for name, e in found.items():
            peak = "" if e["peak_mib"] is None else f"{e['peak_mib']:.0f}"
            print(f"| {name} | {e['ms']:.3f} | {100 * e['ms'] / stock:.2f} % | {e['cached_mib']:.1f} | {peak} |")
        seconds = [whole[kind]["seconds"] for kind in ("stock", "speedup 2")]
        ratio = seconds[0] / seconds[1]
        print(f"\n{STEPS} guided steps: {seconds[0]:.2f} s; computing 15: {seconds[1]:.2f} s, {ratio:.2f}x")
        results[f"{height}x{width}"] = {"passes": found, "generation": whole, "ratio": ratio}
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    about = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__, "dtype": str(dtype)}
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({**about, "parameters": parameters, "tiny": args.tiny, "weights": "random", "results": results}))


if __name__ == "__main__":
    main()
