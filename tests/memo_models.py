"""Tiny random MEMO models, real or double, the denoising loop of memo's VideoPipeline, and an oracle.

Everything here runs on whichever `memo` can be imported: see conftest.py.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from TeaCache4Memo.teacache_memo import DAMPING, import_memo, set_memory_processors

memo = import_memo()
import memo as package  # noqa: E402

REAL = Path(package.__file__).parent.parent.name != "memo_double"
STOCK_FORWARD = memo.UNet3DConditionModel.forward
LATENTS, FACE, AUDIO = 4, 16, 16  # channels
FACE_EMBEDDING = 512
MOTION = {
    "num_attention_heads": 2,
    "num_transformer_block": 1,
    "attention_block_types": ("Temporal_Self", "Temporal_Self"),
    "temporal_position_encoding": True,
    "temporal_position_encoding_max_len": 32,
    "temporal_attention_dim_div": 1,
    "zero_initialize": False,
}
SHAPE = {
    "sample_size": 8,
    "in_channels": LATENTS,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": FACE,
    "attention_head_dim": 2,
}
UNET = {  # two levels; what the released config.json has
    **SHAPE,
    "out_channels": LATENTS,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "audio_attention_dim": AUDIO,
    "use_inflated_groupnorm": True,
    "unet_use_cross_frame_attention": False,
    "unet_use_temporal_attention": False,
    "motion_module_kwargs": MOTION,
}
REFERENCE = {
    **SHAPE,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
NAMES = ("down_block_types", "up_block_types")
ONE_LEVEL = dict(zip(NAMES, [("CrossAttnDownBlock3D",), ("CrossAttnUpBlock3D",)]), block_out_channels=(32,))
ONE_LEVEL_REFERENCE = dict(zip(NAMES, [("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)]), block_out_channels=(32,))


def tiny_unet(seed=0, **config):
    torch.manual_seed(seed)
    model = memo.UNet3DConditionModel(**UNET | config).eval()
    model.register_to_config(center_input_sample=False)
    return set_memory_processors(model)


def tiny_reference(seed=0, **config):
    torch.manual_seed(seed)
    model = memo.UNet2DConditionModel(**REFERENCE | config).eval()
    model.register_to_config(center_input_sample=False)
    return model


def tiny_projections(seed=0):
    """Image and audio projection; memo's classes do not register their arguments, so that they would not be saved."""
    torch.manual_seed(seed)
    image = {"cross_attention_dim": FACE, "clip_embeddings_dim": FACE_EMBEDDING, "clip_extra_context_tokens": 4}
    audio = {"seq_len": 5, "blocks": 2, "channels": 8, "intermediate_dim": 8, "output_dim": AUDIO, "context_tokens": 4}
    image_proj, audio_proj = memo.ImageProjModel(**image).eval(), memo.AudioProjModel(**audio).eval()
    image_proj.register_to_config(**image)
    audio_proj.register_to_config(**audio)
    return image_proj, audio_proj


def tiny_pipeline(seed=0):
    """memo's VideoPipeline (VAE with a factor of 2), and the audio projection beside it."""
    image_proj, audio_proj = tiny_projections(seed)
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENTS,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    pipeline = memo.VideoPipeline(
        vae=vae,
        reference_net=tiny_reference(seed),
        diffusion_net=tiny_unet(seed),
        image_proj=image_proj,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, audio_proj


def save_parts(pipeline, audio_proj, folder):
    """The layout of the released memoavatar/memo, and the VAE. Returns the two folders, as text."""
    for name in ("reference_net", "diffusion_net", "image_proj"):
        getattr(pipeline, name).save_pretrained(folder / "model" / name)
    audio_proj.save_pretrained(folder / "model" / "audio_proj")
    pipeline.vae.save_pretrained(folder / "vae")
    return str(folder / "model"), str(folder / "vae")


class Clip:
    """The inputs of one clip: what VideoPipeline makes before its denoising loop."""

    def __init__(self, seed=0, guided=True, frames=2, past=2, size=(4, 4), dtype=torch.float32, reference=None, **more):
        generator = torch.Generator().manual_seed(seed)
        self.guided, self.shape, self.generator = guided, (1, LATENTS, frames, *size), generator
        batch, self.dtype = 1 + guided, dtype

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        face = randn(batch, 4, FACE)
        pictures = randn(1 + past, LATENTS, *size).repeat(batch, 1, 1, 1)  # portrait and past frames
        with torch.no_grad():
            reference = (reference or tiny_reference()).to(dtype)
            features = reference(pictures, torch.tensor(0), encoder_hidden_states=face, return_dict=False)
        self.inputs = {
            "ref_features": features,
            "encoder_hidden_states": face,
            "audio_embedding": randn(batch, frames, 4, AUDIO),
            "audio_emotion": torch.tensor([9, 3][:batch], dtype=torch.int),
            "uc_mask": torch.tensor([1] * frames + [0] * frames).bool() if guided else None,
            **more,
        }
        self.noise = randn(*self.shape)


class Interrupted(Exception):
    pass


def denoise(model, clip, steps=8, first=True, before_step=None, cast=False, timesteps=None):
    """The loop of VideoPipeline over one clip. Returns the outputs, then the latents.

    model: called like the UNet; first: is_new_audio; before_step(i) may raise Interrupted; cast: new tensors each step.
    """
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    latents, outputs = clip.noise, []
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            if before_step:
                before_step(i)
            inputs = copy.deepcopy(clip.inputs) if cast else clip.inputs
            velocity = model(
                torch.cat([latents] * (1 + clip.guided)),
                timestep=t if timesteps is None else timesteps(i, t),
                is_new_audio=first,
                update_past_memory=i == 0,
                return_dict=False,
                **inputs,
            )[0]
            outputs.append(velocity)
            if clip.guided:
                without, guided = velocity.chunk(2)
                velocity = without + 3.5 * (guided - without)
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0].to(clip.dtype)
    return outputs, latents


class Oracle:
    """TeaCache for MEMO written a second time, around the stock forward, for one clip from its first step."""

    def __init__(self, model, thresh, num_steps, coefficients=(1.0, 0.0), *, order, computed_steps=None):
        self.model, self.thresh, self.num_steps, self.budget = model, thresh, num_steps, computed_steps
        self.order = order if computed_steps is None else 1
        self.poly, self.accumulated = np.poly1d(coefficients), 0.0
        self.schedule, self.times, self.outputs = [], [], []

    def is_due(self):
        """The budget: what is left of it, spread evenly over the rest of the way."""
        step, left = len(self.schedule), self.budget - sum(self.schedule)
        if left <= 1 or self.num_steps - step <= left:
            return left > 1
        start = self.times[0]
        way = [i / self.num_steps / 2 + (t - start) / (1 - start) / 2 for i, t in enumerate(self.times)]
        pace, last = way[-1] - way[-2], way[np.flatnonzero(self.schedule)[-1]]
        return way[-1] + pace / 2 >= last + (1 - pace - last) / left

    def is_enough(self, features):
        """The threshold: the accumulated relative change has reached it."""
        change = (features - self.before).abs().mean(dtype=torch.float32)
        self.accumulated += self.poly((change / self.before.abs().mean(dtype=torch.float32)).item())
        return not self.accumulated < self.thresh

    def __call__(self, sample, *args, **kwargs):
        model, step, timestep = self.model, len(self.schedule), kwargs["timestep"]
        timesteps = timestep if isinstance(timestep, list) else [timestep]
        time = 1 - sum(torch.as_tensor(t).double().mean().item() for t in timesteps) / len(timesteps) / 1000
        self.times.append(time)
        x = model.conv_in(2 * sample - 1.0 if model.config.center_input_sample else sample)
        if kwargs.get("mask_cond_fea") is not None:
            x = x + kwargs["mask_cond_fea"]
        compute = step in (0, self.num_steps - 1) or kwargs.get("update_past_memory")
        if not compute:
            compute = self.is_due() if self.budget is not None else self.thresh == 0 or self.is_enough(x)
        self.before = x
        self.schedule.append(bool(compute))
        if not compute and self.order == 0:
            return (model.conv_out(model.conv_act(model.conv_norm_out(x + self.residual))),)
        if not compute:
            (t0, before), (t1, last) = (self.outputs * 2)[-2:]
            if len(self.outputs) == 1:
                return (last,)
            gaps = (time - t1) / (t1 - t0)
            return (last + (last - before) * (gaps / (1 + DAMPING * gaps)),)
        self.accumulated, caught = 0.0, []
        hook = model.conv_norm_out.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        try:
            output = STOCK_FORWARD(model, sample, *args, **kwargs)
        finally:
            hook.remove()
        self.residual = caught[0] - x
        self.outputs.append((time, output[0]))
        return output


def stock(model):
    """The model's stock forward, whatever has been done to the model or its class."""
    return lambda *args, **kwargs: STOCK_FORWARD(model, *args, **kwargs)


def oracle_run(model, clip, thresh=0.0, num_steps=8, coefficients=(1.0, 0.0), *, order, computed_steps=None, **kwargs):
    """Outputs, latents and schedule that TeaCache should give in a fresh process."""
    oracle = Oracle(model, thresh, num_steps, coefficients, order=order, computed_steps=computed_steps)
    return *denoise(oracle, clip, **kwargs), oracle.schedule


def path_length(model, clip, **kwargs):
    """Sum of the indicator's relative changes over an uncached clip: thresholds below it skip some steps."""
    before, features = memory(model), []
    mask = clip.inputs.get("mask_cond_fea", 0.0)
    hook = model.conv_in.register_forward_hook(lambda module, inputs, output: features.append(output + mask))
    try:
        denoise(stock(model), clip, **kwargs)
    finally:
        hook.remove()
        set_memory(model, before)
    return sum(((b - a).abs().mean() / a.abs().mean()).item() for a, b in zip(features, features[1:]))


def memory(model):
    """A copy of the memory of past frames of all processors: [{"KV": ..., "Z": ...}, ...]."""
    modules = [m for m in model.modules() if isinstance(m, memo.MemoryLinearAttention)]
    return [copy.deepcopy(m.processor.memory) for m in modules]


def set_memory(model, memories):
    modules = [m for m in model.modules() if isinstance(m, memo.MemoryLinearAttention)]
    for module, content in zip(modules, memories, strict=True):
        module.processor.memory = copy.deepcopy(content)
