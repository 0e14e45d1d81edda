"""What a denoising step of Lumina-Image-2.0 costs at its released size: stock, computed and skipped under TeaCache.

The released configuration with random weights, on which the time does not depend: width 2304, 26 layers, bfloat16,
captions of 256 and 8 tokens padded to 256. Each step is that of `Lumina2Pipeline`: two passes, guidance, scheduler.
Writes medians and the seconds of whole loops; `render.py` makes a table of them.

    python tests/benchmarks/lumina2_real_size.py                   # 1024 pixels, on a GPU with 16 GB or more
    python tests/benchmarks/lumina2_real_size.py --pixels 512      # also on a CPU, with 32 GB and ten minutes
    python tests/benchmarks/lumina2_real_size.py --tiny            # a small network, to try it out
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import record
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache, remove_teacache

RELEASED = {
    "hidden_size": 2304,
    "num_layers": 26,
    "num_attention_heads": 24,
    "num_kv_heads": 8,
    "multiple_of": 256,
    "axes_dim_rope": (32, 32, 32),
    "axes_lens": (300, 512, 512),
    "cap_feat_dim": 2304,
}
TINY = RELEASED | {"hidden_size": 192, "num_attention_heads": 6, "num_kv_heads": 2, "axes_dim_rope": (16, 8, 8)}
WAYS = {  # thresholds that everything and nothing reaches: all steps computed, all but first and last skipped
    "stock": None,
    "computed, threshold": {"rel_l1_thresh": 1e-12, "coefficients": [1.0]},
    "skipped, threshold": {"rel_l1_thresh": 1e12},
    "skipped, computed_steps": {"computed_steps": 2},
    "half of the steps": {"computed_steps": None},
}


@torch.no_grad()
def loop(model, pixels, steps, device):
    """Seconds of each step of a guided generation, as `Lumina2Pipeline` runs it."""
    generator = torch.Generator().manual_seed(0)
    place = {"device": device, "dtype": model.dtype}
    latents = torch.randn(1, 16, pixels // 8, pixels // 8, generator=generator).to(**place)
    captions = []
    for tokens in (256, 8):
        features = torch.randn(1, 256, model.config.cap_feat_dim, generator=generator).to(**place)
        captions.append((features, (torch.arange(256) < tokens).long()[None].to(device)))
    scheduler, seconds = FlowMatchEulerDiscreteScheduler(shift=6.0), []
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for t in scheduler.timesteps:
        synchronize()
        began = time.perf_counter()
        timestep = (1 - t / 1000).expand(1)
        cond, uncond = (model(latents, timestep, *caption, return_dict=False)[0] for caption in captions)
        velocity = uncond + 4.0 * (cond - uncond)
        velocity *= cond.norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True)
        latents = scheduler.step(-velocity, t, latents, return_dict=False)[0].to(model.dtype)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small network, to try this script")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=6, help="steps of each loop")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "lumina2_real_size.json")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if args.tiny else torch.bfloat16)
    with torch.device(device):
        model = Lumina2Transformer2DModel(in_channels=16, **(TINY if args.tiny else RELEASED)).eval()
    torch.set_default_dtype(torch.float32)
    about = {"pixels": args.pixels, "steps": args.steps, "dtype": str(model.dtype), "weights": "random"}
    about["parameters"] = sum(p.numel() for p in model.parameters())
    results = record.Record(args.output, **about)
    loop(model, args.pixels, 2, device)  # warm-up
    for name, settings in WAYS.items():
        remove_teacache(model)
        schedule = [True] * args.steps
        if settings is not None:
            half = {"computed_steps": args.steps // 2} if name.startswith("half") else {}
            apply_teacache(model, args.steps, **{**settings, **half})
        seconds = loop(model, args.pixels, args.steps, device)
        if settings is not None:
            schedule = model.teacache.schedule
        chosen = [s for s, computed in zip(seconds, schedule) if computed != name.startswith("skipped")]
        row = {"name": name, "step": statistics.median(chosen), "loop": sum(seconds), "computed": sum(schedule)}
        results.add(record.slug(name), **row)
        print(f"{name}: {' '.join(f'{s:.3f}' for s in seconds)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
