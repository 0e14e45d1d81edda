"""Tiny random Lumina2 models, and the denoising loop of Lumina2Pipeline."""

import numpy as np
import torch
from conftest import on_device
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

STOCK_FORWARD = Lumina2Transformer2DModel.forward  # before anything patches the class
CHANNELS, FEATURES = 4, 12


def tiny_model(seed=0, **config):
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "in_channels": CHANNELS,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (64, 16, 16),
        "cap_feat_dim": FEATURES,
    } | config
    return on_device(Lumina2Transformer2DModel(**config).eval())


def conditioning(lengths, seed=0, dtype=torch.float32, padded=None):
    """Caption features (batch, tokens, features) and mask (batch, tokens) for a batch with these lengths."""
    generator = torch.Generator().manual_seed(seed)
    padded = padded or max(lengths)
    embeds = torch.randn(len(lengths), padded, FEATURES, generator=generator).to(dtype)
    mask = torch.tensor([[1] * n + [0] * (padded - n) for n in lengths])
    return on_device((embeds, mask))


def denoise(
    model, cond, uncond=None, steps=8, size=(4, 4), seed=0, trunc=1.0, before=None, cast=False, start=1.0, switch=None
):
    """The loop of Lumina2Pipeline over (embeds, mask) pairs: same calls, same order, same values.

    before(step, branch, count) runs before each call and may raise; `cast` passes a new copy of the embeddings ("all":
    and of the mask) at each call; `start` is the share of noise; `switch` is {step: another cond}.
    Returns all outputs, then the latents.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=start * np.linspace(1.0, 1 / steps, steps), device=cond[0].device)
    dtype = cond[0].dtype
    latents = torch.randn(len(cond[0]), CHANNELS, *size, generator=torch.Generator().manual_seed(seed))
    latents, outputs = latents.to(cond[0]), []
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            cond = (switch or {}).get(i, cond)
            guided = uncond is not None and not (i + 1) / steps > trunc
            branch = f"prompt {sum(i >= at for at in switch or {})}"  # a replaced prompt is a new branch
            velocity = []
            for name, (embeds, mask) in {branch: cond, **({"negative": uncond} if guided else {})}.items():
                if before:
                    before(i, name, len(outputs))
                embeds, mask = embeds.clone() if cast else embeds, mask.clone() if cast == "all" else mask
                time = (1 - t / 1000).expand(len(latents))
                inputs = {"hidden_states": latents, "timestep": time, "encoder_hidden_states": embeds}
                velocity.append(model(**inputs, encoder_attention_mask=mask, return_dict=False)[0])
                outputs.append(velocity[-1])
            v = velocity[1] + 4.0 * (velocity[0] - velocity[1]) if guided else velocity[0]
            latents = scheduler.step(-v, t, latents, return_dict=False)[0].to(dtype)
    return outputs, latents
