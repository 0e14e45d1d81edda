"""What a denoising step of MEMO costs at its released size, stock, computed and skipped; and the parts of a clip.

memo's own classes with the widths of the released model (320, 640, 1280, 1280), 16 frames, guidance, bfloat16 and random
weights, on which the time does not depend. The motion module's settings are not in memo's code; they are those of its
relatives. The VAE is that of Stable Diffusion, a frame at a time, as in memo. `render.py` makes tables of what it writes.

    python tests/benchmarks/memo_real_size.py --memo PATH_TO_MEMO                  # 512 pixels, on a GPU
    python tests/benchmarks/memo_real_size.py --memo PATH_TO_MEMO --pixels 256     # also on a CPU
    python tests/benchmarks/memo_real_size.py --memo PATH_TO_MEMO --tiny           # a small network, to try it out
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import diffusers
import record
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
DOWN = ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D")
UP = ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D")
MOTION = {
    "num_attention_heads": 8,
    "num_transformer_block": 1,
    "attention_block_types": ("Temporal_Self", "Temporal_Self"),
    "temporal_position_encoding": True,
    "temporal_position_encoding_max_len": 32,
    "temporal_attention_dim_div": 1,
    "zero_initialize": False,
}
WAYS = {  # thresholds that everything and nothing reaches: all steps computed, all but first and last skipped
    "stock": None,
    "computed, threshold": {"rel_l1_thresh": 1e-12, "coefficients": [1.0]},
    "skipped, threshold": {"rel_l1_thresh": 1e12},
    "skipped, computed_steps": {"computed_steps": 2},
    "half of the steps": {"computed_steps": None},
}


def build(tiny, device):
    """memo's UNet, its reference net and the VAE, with random weights."""
    from TeaCache4Memo.teacache_memo import import_memo, set_memory_processors

    memo = import_memo()
    channels, groups, levels = ((32, 32), 8, 2) if tiny else ((320, 640, 1280, 1280), 32, 4)
    shape = {"sample_size": 64, "in_channels": 4, "block_out_channels": channels, "norm_num_groups": groups}
    shape |= {"layers_per_block": 1 if tiny else 2, "cross_attention_dim": 768, "attention_head_dim": 8}
    down, up = DOWN[4 - levels :], UP[:levels]
    kinds = {"down_block_types": down, "up_block_types": up}
    flat = {name: tuple(block.replace("3D", "2D") for block in blocks) for name, blocks in kinds.items()}
    motion = {"use_inflated_groupnorm": True, "motion_module_kwargs": MOTION, "audio_attention_dim": 768}
    motion |= {"unet_use_cross_frame_attention": False, "unet_use_temporal_attention": False, "out_channels": 4}
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    with torch.device(device):
        unet, reference = (
            memo.UNet3DConditionModel(**shape, **kinds, **motion),
            memo.UNet2DConditionModel(**shape, **flat),
        )
        widths, blocks = (32,) * 4 if tiny else (128, 256, 512, 512), ["DownEncoderBlock2D"] * 4
        ups = [block.replace("DownEncoder", "UpDecoder") for block in blocks]
        sizes = {"block_out_channels": widths, "layers_per_block": 2, "latent_channels": 4}
        vae = diffusers.AutoencoderKL(down_block_types=blocks, up_block_types=ups, **sizes).eval()
    torch.set_default_dtype(torch.float32)
    for model in (unet, reference):
        model.eval().register_to_config(center_input_sample=False)
    return set_memory_processors(unet), reference, vae


def seconds_of(call):
    """Of the second of two calls."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(2):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
    return time.perf_counter() - began


def loop(unet, given, latents, steps):
    """Seconds of each step of a guided clip, as `VideoPipeline` runs it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, seconds = FlowMatchEulerDiscreteScheduler(), []
    scheduler.set_timesteps(steps, device=latents.device)
    synchronize = torch.cuda.synchronize if latents.is_cuda else lambda: None
    for i, t in enumerate(scheduler.timesteps):
        synchronize()
        began = time.perf_counter()
        memory = {"is_new_audio": False, "update_past_memory": i == 0}
        uncond, cond = unet(torch.cat([latents] * 2), timestep=t, **given, **memory).sample.chunk(2)
        velocity = uncond + 3.5 * (cond - uncond)
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0].to(unet.dtype)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memo", help="clone of memoavatar/memo, if memo is not installed")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try this script")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="steps of each loop")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "memo_real_size.json")
    args = parser.parse_args()
    if args.memo:
        sys.path.insert(0, args.memo)
    from TeaCache4Memo.teacache_memo import apply_teacache, remove_teacache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet, reference, vae = build(args.tiny, device)
    generator, side = torch.Generator().manual_seed(0), args.pixels // 8

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, unet.dtype)

    given = {"encoder_hidden_states": randn(2, 4, 768), "audio_embedding": randn(2, 16, 32, 768)}
    pictures = randn(17, 4, side, side).repeat(2, 1, 1, 1)
    zero, face = torch.tensor(0, device=device), given["encoder_hidden_states"]

    def see():
        return reference(pictures, zero, encoder_hidden_states=face, return_dict=False)

    given["ref_features"] = see()
    given["audio_emotion"] = torch.tensor([9, 3], dtype=torch.int, device=device)
    given["uc_mask"] = torch.tensor([1] * 16 + [0] * 16, device=device).bool()
    latents = randn(1, 4, 16, side, side)
    about = {"pixels": args.pixels, "steps": args.steps, "dtype": str(unet.dtype), "weights": "random"}
    about["parameters"] = sum(p.numel() for p in unet.parameters())
    results = record.Record(args.output, **about)
    loop(unet, given, latents, 2)  # warm-up
    for name, settings in WAYS.items():
        remove_teacache(unet)
        schedule = [True] * args.steps
        if settings is not None:
            half = {"computed_steps": args.steps // 2} if name.startswith("half") else {}
            apply_teacache(unet, args.steps, **{**settings, **half})
        seconds = loop(unet, given, latents, args.steps)
        if settings is not None:
            schedule = unet.teacache.schedule
        chosen = [s for s, computed in zip(seconds, schedule) if computed != name.startswith("skipped")]
        row = {"name": name, "step": statistics.median(chosen), "loop": sum(seconds), "computed": sum(schedule)}
        results.add(record.slug(name), **row)
        print(f"{name}: {' '.join(f'{s:.3f}' for s in seconds)}", file=sys.stderr, flush=True)

    latent, frame = randn(1, 4, side, side), randn(1, 3, args.pixels, args.pixels)
    parts = {
        "UNet, 20 steps": 20 * results.rows["stock"]["step"],
        "reference net": seconds_of(see),
        "VAE, 17 frames encoded": 17 * seconds_of(lambda: vae.encode(frame)),
        "VAE, 16 frames decoded": 16 * seconds_of(lambda: vae.decode(latent)),
    }
    results.add("parts", **parts)


if __name__ == "__main__":
    main()
