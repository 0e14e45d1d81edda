"""What a step of MEMO costs at real size: stock, computed under TeaCache, skipped; then one clip of 20 steps.

The UNet with the widths of the released model (320, 640, 1280, 1280), 16 frames of 512 x 512, guidance, bfloat16, with
random weights: the time of a step does not depend on them. The motion module's settings are not in memo's code and
are taken from its relatives (8 heads, 1 block of 2 attentions). Medians of paired runs in one process, after a warm-up;
the last line is JSON.

    python tests/benchmarks/memo_real_size.py --memo PATH_TO_MEMO            # on a GPU
    python tests/benchmarks/memo_real_size.py --memo PATH_TO_MEMO --tiny     # to try it out, on any machine
    python tests/benchmarks/memo_real_size.py --memo PATH_TO_MEMO --steps-only --repeats 1     # a patient CPU
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
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from TeaCache4Memo import teacache_memo
from TeaCache4Memo.teacache_memo import TeaCacheState, apply_teacache, remove_teacache

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
STEPS = 20


class Forced(TeaCacheState):
    """Computes the first and the last step and those of a given schedule, whatever the indicator says."""

    def __init__(self, computed):
        self.computed = computed
        super().__init__()

    def decide(self, compute):
        super().decide(self.step == 0 or self.last or self.step in self.computed)


def build(tiny, device, dtype):
    """memo's pipeline with random weights."""
    memo = teacache_memo.import_memo()
    channels, groups, levels = ((32, 32), 8, 2) if tiny else ((320, 640, 1280, 1280), 32, 4)
    shape = {"sample_size": 64, "in_channels": 4, "block_out_channels": channels, "norm_num_groups": groups}
    shape |= {"layers_per_block": 1 if tiny else 2, "cross_attention_dim": 768, "attention_head_dim": 8}
    down, up = DOWN[4 - levels :], UP[:levels]
    torch.manual_seed(0)
    with torch.device(device):
        unet = memo.UNet3DConditionModel(
            **shape,
            out_channels=4,
            down_block_types=down,
            up_block_types=up,
            audio_attention_dim=768,
            use_inflated_groupnorm=True,
            unet_use_cross_frame_attention=False,
            unet_use_temporal_attention=False,
            motion_module_kwargs=MOTION,
        )
        flat = {
            "down_block_types": [b.replace("3D", "2D") for b in down],
            "up_block_types": [b.replace("3D", "2D") for b in up],
        }
        reference = memo.UNet2DConditionModel(**shape, **flat)
        widths = (8, 8, 8, 8) if tiny else (128, 256, 512, 512)
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1 if tiny else 2,
            latent_channels=4,
            norm_num_groups=8 if tiny else 32,
        )
        image_proj = memo.ImageProjModel()
    for model in (unet, reference):
        model.register_to_config(center_input_sample=False)
    parts = {"vae": vae, "reference_net": reference, "diffusion_net": unet, "image_proj": image_proj}
    for part in parts.values():
        part.requires_grad_(False).eval()
    pipeline = memo.VideoPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler())
    teacache_memo.set_memory_processors(unet)
    xformers = device == "cuda"
    try:
        if xformers:
            reference.enable_xformers_memory_efficient_attention()
            unet.enable_xformers_memory_efficient_attention()
    except Exception:  # not installed, or built for another torch
        xformers = False
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device=device, dtype=dtype), xformers


def inputs(pipeline, side, frames):
    """Arguments of one step of the UNet, after its reference net; `side` of the latents."""
    unet, generator = pipeline.diffusion_net, torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)

    face = randn(2, 4, 768)
    pictures = randn(1 + frames, 4, side, side).repeat(2, 1, 1, 1)
    with torch.no_grad():
        t = torch.tensor(0, device=unet.device)
        features = pipeline.reference_net(pictures, t, encoder_hidden_states=face, return_dict=False)
    return randn(2, 4, frames, side, side), {
        "ref_features": features,
        "encoder_hidden_states": face,
        "audio_embedding": randn(2, frames, 32, 768),
        "audio_emotion": torch.tensor([9, 3], dtype=torch.int, device=unet.device),
        "uc_mask": torch.tensor([1] * frames + [0] * frames, device=unet.device).bool(),
        "is_new_audio": False,
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


@torch.no_grad()
def steps(pipeline, side, frames, repeats, device):
    """Median milliseconds of a stock, a computed and a skipped step, measured in turn; peak memory of each."""
    unet = pipeline.diffusion_net
    sample, given = inputs(pipeline, side, frames)

    def step(t, writes=False):
        unet(sample, timestep=torch.tensor(t, device=unet.device), update_past_memory=writes, **given)

    found = {"stock": [], "computed": [], "skipped": []}
    for _ in range(repeats + 1):
        remove_teacache(unet)
        step(1000.0, writes=True)  # the memory of past frames is there
        found["stock"].append(clock(lambda: step(900.0), device))
        for kind, computed in (("computed", range(10**6)), ("skipped", ())):
            apply_teacache(unet, num_steps=10**6, rel_l1_thresh=0.15)
            unet.teacache = Forced(computed)
            step(1000.0, writes=True)
            found[kind].append(clock(lambda: step(900.0), device))
            assert unet.teacache.schedule == [True, kind == "computed"]
    remove_teacache(unet)
    runs = {kind: values[1:] for kind, values in found.items()}  # the first is a warm-up
    return {
        kind: {
            "ms": statistics.median(ms for ms, _ in values),
            "fastest_ms": min(ms for ms, _ in values),
            "peak_mib": max(peak for _, peak in values) if device == "cuda" else None,
        }
        for kind, values in runs.items()
    }


def clips(pipeline, size, frames, repeats, device):
    """Median seconds of memo's whole pipeline for one clip: all steps, and every other one."""
    unet, generator = pipeline.diffusion_net, torch.Generator().manual_seed(0)
    half = set(range(0, STEPS - 1, 2)) - {STEPS - 2}  # nine, and the last one: 10 of 20
    arguments = {
        "ref_image": torch.rand(1, 1 + frames, 3, size, size, generator=generator) * 2 - 1,
        "face_emb": torch.randn(1, 512, generator=generator),
        "audio_tensor": torch.randn(1, frames, 32, 768, generator=generator),
        "audio_emotion": torch.full((frames,), 3, dtype=torch.int),
        "emotion_class_num": 9,
        "width": size,
        "height": size,
        "video_length": frames,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.5,
    }
    found = {"stock": [], "half": []}
    for _ in range(repeats + 1):
        remove_teacache(unet)
        found["stock"].append(clock(lambda: pipeline(**arguments), device))
        apply_teacache(unet, num_steps=STEPS, rel_l1_thresh=0.15)
        unet.teacache = Forced(half)
        found["half"].append(clock(lambda: pipeline(**arguments), device))
        assert sum(unet.teacache.schedule) == STEPS // 2 and len(unet.teacache.schedule) == STEPS
    remove_teacache(unet)
    return {
        kind: {
            "seconds": statistics.median(ms for ms, _ in values[1:]) / 1000,
            "peak_mib": max(peak for _, peak in values[1:]) if device == "cuda" else None,
        }
        for kind, values in found.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memo", help="clone of memoavatar/memo, if memo is not installed")
    parser.add_argument("--tiny", action="store_true", help="a small network and a small picture, to try this script")
    parser.add_argument("--steps-only", action="store_true", help="leave out the whole clip")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.memo:
        sys.path.insert(0, args.memo)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if args.tiny else torch.bfloat16
    size, frames = (64, 4) if args.tiny else (512, 16)
    pipeline, xformers = build(args.tiny, device, dtype)
    parameters = sum(p.numel() for p in pipeline.diffusion_net.parameters())
    step = steps(pipeline, size // 8, frames, args.repeats, device)
    clip = None if args.steps_only else clips(pipeline, size, frames, max(1, args.repeats // 2), device)

    stock = step["stock"]["ms"]
    print("| step | ms | of stock | peak MiB |\n|---|---|---|---|")
    for kind, e in step.items():
        peak = "" if e["peak_mib"] is None else f"{e['peak_mib']:.0f}"
        print(f"| {kind} | {e['ms']:.2f} | {100 * e['ms'] / stock:.2f} % | {peak} |")
    if clip:
        whole, half = clip["stock"]["seconds"], clip["half"]["seconds"]
        clip["ratio"] = whole / half
        print(f"\none clip of {STEPS} steps: {whole:.2f} s; computing 10 of them: {half:.2f} s, {whole / half:.2f}x")
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    about = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__, "xformers": xformers}
    about |= {"size": size, "frames": frames, "dtype": str(dtype), "parameters": parameters, "tiny": args.tiny}
    print(json.dumps({**about, "weights": "random", "step": step, "clip": clip}))


if __name__ == "__main__":
    main()
