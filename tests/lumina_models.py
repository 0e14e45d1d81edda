"""Tiny random Lumina2 models, the denoising loop of Lumina2Pipeline, and an oracle to compare with."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

STOCK_FORWARD = Lumina2Transformer2DModel.forward
CHANNELS, FEATURES = 4, 12


def tiny_model(seed=0, **config):
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "in_channels": CHANNELS,
        "hidden_size": 24,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (64, 16, 16),
        "cap_feat_dim": FEATURES,
    } | config
    return Lumina2Transformer2DModel(**config).eval()


def conditioning(lengths, seed=0, dtype=torch.float32, padded=None):
    """Caption features (batch, tokens, features) and mask (batch, tokens) for a batch with these lengths."""
    generator = torch.Generator().manual_seed(seed)
    padded = padded or max(lengths)
    embeds = torch.randn(len(lengths), padded, FEATURES, generator=generator).to(dtype)
    mask = torch.tensor([[1] * n + [0] * (padded - n) for n in lengths])
    return embeds, mask


class Interrupted(Exception):
    pass


def denoise(
    model,
    cond,
    uncond=None,
    steps=8,
    size=(4, 4),
    seed=0,
    trunc=1.0,
    before_call=None,
    cast=False,
    sigmas=None,
    switch=None,
):
    """The loop of Lumina2Pipeline over (embeds, mask) pairs: same calls, same order, same values.

    before_call(step, name, count) runs before each call to the model and may raise Interrupted; `cast` passes a new
    copy of the embeddings ("all": and of the mask) at each call; `switch` is {step: another cond}.
    Returns all outputs, then the latents.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas)
    dtype = cond[0].dtype
    latents = torch.randn(len(cond[0]), CHANNELS, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    outputs, count = [], 0
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            cond = (switch or {}).get(i, cond)
            time = (1 - t / 1000).expand(len(latents))
            guided = uncond is not None and not (i + 1) / steps > trunc
            velocity = {}
            for name, (embeds, mask) in {"cond": cond, **({"uncond": uncond} if guided else {})}.items():
                if before_call:
                    before_call(i, name, count)
                embeds, mask = embeds.clone() if cast else embeds, mask.clone() if cast == "all" else mask
                velocity[name] = model(
                    hidden_states=latents,
                    timestep=time,
                    encoder_hidden_states=embeds,
                    encoder_attention_mask=mask,
                    return_dict=False,
                )[0]
                outputs.append(velocity[name])
                count += 1
            v = velocity["cond"]
            if guided:
                v = velocity["uncond"] + 4.0 * (v - velocity["uncond"])
            latents = scheduler.step(-v, t, latents, return_dict=False)[0].to(dtype)
    return outputs, latents


class Oracle(torch.nn.Module):
    """TeaCache written a second time, around the stock forward: it stands in `model.layers` as the only layer.

    It is told the step and the branch (`at`) instead of finding them out.
    """

    def __init__(self, blocks, thresh, coefficients, num_steps):
        super().__init__()
        self.blocks, self.thresh, self.poly, self.num_steps = blocks, thresh, np.poly1d(coefficients), num_steps
        self.accumulated, self.schedule, self.memory, self.where = 0.0, [], {}, None

    def at(self, step, name, count=None):
        self.where = (step, name)

    def forward(self, hidden, mask, rotary, temb):
        step, name = self.where
        modulated = self.blocks[0].norm1(hidden, temb)[0]
        memory = self.memory.setdefault(name, {})
        if len(self.schedule) == step:
            if step in (0, self.num_steps - 1) or self.thresh == 0 or memory.get("step") != step - 1:
                compute = True
            else:
                difference, old = (modulated - memory["modulated"]).abs(), memory["modulated"].abs()
                change = (difference.mean(dtype=torch.float32) / old.mean(dtype=torch.float32)).item()
                self.accumulated += self.poly(change)
                compute = not self.accumulated < self.thresh
            if compute:
                self.accumulated = 0.0
            self.schedule.append(compute)
        seen = memory.get("step") in (step, step - 1)
        memory |= {"modulated": modulated, "step": step}
        if not self.schedule[step] and seen:
            return hidden + memory["residual"]
        output = hidden
        for block in self.blocks:
            output = block(output, mask, rotary, temb)
        memory["residual"] = output - hidden
        return output


def oracle_run(model, thresh, coefficients, num_steps, cond, uncond=None, before_call=None, **kwargs):
    """Outputs, latents and schedule that TeaCache should give in a fresh process."""
    blocks, forward = model.layers, vars(model).pop("forward", None)
    oracle = Oracle(blocks, thresh, coefficients, num_steps)
    model.layers = torch.nn.ModuleList([oracle])
    patched, type(model).forward = type(model).forward, STOCK_FORWARD

    def both(step, name, count):
        switches = sum(step >= s for s in kwargs.get("switch") or {})  # a new prompt is a new branch
        oracle.at(step, f"{name}{switches}" if name == "cond" else name)
        if before_call:
            before_call(step, name, count)

    try:
        return *denoise(model, cond, uncond, before_call=both, **kwargs), oracle.schedule
    finally:
        model.layers = blocks
        type(model).forward = patched
        if forward is not None:
            model.forward = forward


def block_calls(model):
    """A list that grows by one at each call of the first and of the last block."""
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append("first"))
    model.layers[-1].register_forward_hook(lambda *_: calls.append("last"))
    return calls
