"""Tiny random MEMO models, real or double, and the denoising loop of memo's VideoPipeline.

Everything here runs on whichever `memo` can be imported: see conftest.py.
"""

import copy
from pathlib import Path

import pytest
import torch
from conftest import on_device
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from TeaCache4Memo.teacache_memo import import_memo, set_memory_processors

memo = import_memo()
import memo as package  # noqa: E402

REAL = Path(package.__file__).parent.parent.name != "memo_double"
real = pytest.mark.skipif(not REAL, reason="the real memo is not here: pytest --memo PATH")
STOCK_FORWARD = memo.UNet3DConditionModel.forward  # before anything patches the class
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
    return on_device(set_memory_processors(model))


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
        inputs = {
            "ref_features": features,
            "encoder_hidden_states": face,
            "audio_embedding": randn(batch, frames, 4, AUDIO),
            "audio_emotion": torch.tensor([9, 3][:batch], dtype=torch.int),
            "uc_mask": torch.tensor([1] * frames + [0] * frames).bool() if guided else None,
            **more,
        }
        self.inputs, self.noise = on_device(inputs), on_device(randn(*self.shape))


def denoise(model, clip, steps=8, first=True, before_step=None, cast=False, timesteps=None):
    """The loop of VideoPipeline over one clip. Returns the outputs, then the latents.

    model: called like the UNet; first: is_new_audio; before_step(i) may raise; cast: new tensors each step.
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


def memory(model):
    """A copy of the memory of past frames of all processors: [{"KV": ..., "Z": ...}, ...]."""
    modules = [m for m in model.modules() if isinstance(m, memo.MemoryLinearAttention)]
    return [copy.deepcopy(m.processor.memory) for m in modules]


def set_memory(model, memories):
    modules = [m for m in model.modules() if isinstance(m, memo.MemoryLinearAttention)]
    for module, content in zip(modules, memories, strict=True):
        module.processor.memory = copy.deepcopy(content)
