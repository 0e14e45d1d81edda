"""Tiny random Lumina2 models, the denoising loop of Lumina2Pipeline, and an oracle to compare with."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

from TeaCache4LuminaT2X.teacache_lumina2 import DAMPING

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


def is_due(times, schedule, num_steps, wanted):
    """The choice of steps for a speedup, written a second time."""
    step, left = len(times) - 1, wanted - sum(schedule)
    if step in (0, num_steps - 1) or num_steps - step <= left:
        return True
    if left <= 1:
        return False
    way = np.arange(step + 1) / num_steps / 2 + (np.array(times) - times[0]) / (1 - times[0] or 1.0) / 2
    last, pace = way[np.flatnonzero(schedule).max()], way[step] - way[step - 1]
    return bool(way[step] + pace / 2 >= last + (1 - pace - last) / left)


class Oracle:
    """TeaCache written a second time, around the stock forward, which it runs at every step: it skips nothing.

    It is told the step and the branch (`at`) instead of finding them out.
    """

    def __init__(self, model, thresh, coefficients, num_steps, predict="forecast", indicator="modulated", speedup=None):
        self.model, self.thresh, self.poly, self.num_steps = model, thresh, np.poly1d(coefficients), num_steps
        self.predict, self.indicator, self.speedup = predict, indicator, speedup
        self.accumulated, self.schedule, self.times, self.branches, self.where = 0.0, [], [], {}, None

    def at(self, step, name, count=None):
        self.where = (step, name)

    def __call__(self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask, return_dict=False):
        model, (step, name), t, seen = self.model, self.where, timestep[0].item(), {}
        modules = {"embedded": model.x_embedder, "temb": model.time_caption_embed.timestep_embedder}
        modules |= {"modulated": model.layers[0].norm1, "joint": model.layers[0], "hidden": model.norm_out}

        def catch(key):
            def hook(module, inputs, output):
                taken = {"joint": inputs[0], "hidden": inputs[0], "modulated": output[0]}
                seen.setdefault(key, taken.get(key, output))

            return modules[key].register_forward_hook(hook)

        hooks = [catch(key) for key in modules]
        output = STOCK_FORWARD(model, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask)[0]
        for hook in hooks:
            hook.remove()

        signal = seen["temb" if self.indicator == "timestep" else "modulated"]
        memory = self.branches.setdefault(name, {})
        if memory.get("step") not in (step, step - 1):
            memory.clear()
        if len(self.schedule) == step:
            self.times.append(t)
            self.schedule.append(self.decide(step, memory, signal))
        skip = not self.schedule[step] and "made" in memory
        memory |= {"step": step, "signal": signal}

        early = self.indicator == "timestep" or self.speedup is not None
        tokens = hidden_states[0, 0].numel() // model.config.patch_size**2

        def picture(joint):  # (batch, tokens, width) of the picture alone
            return torch.stack([x[n : n + tokens] for x, n in zip(joint, encoder_attention_mask.sum(1).tolist())])

        if not skip:
            if self.predict == "forecast":
                earlier = [(u, x) for u, x in memory.get("made", []) if u != t]  # two branches may be one
                made = [*earlier[-1:], (t, output)]
            elif early:
                made = picture(seen["hidden"]) - seen["embedded"]
            else:
                made = seen["hidden"] - seen["joint"]
            memory["made"] = made
            return (output,)
        if self.predict == "forecast":
            (t1, last), *earlier = memory["made"][::-1]
            if not earlier:
                return (last,)
            t0, before = earlier[0]
            reach = (t - t1) / (t1 - t0)
            return (last + (last - before) * (reach / (1 + DAMPING * reach)),)
        if early:
            return (self.project(seen["embedded"] + memory["made"], seen["temb"], hidden_states.shape),)
        return (self.project(seen["joint"] + memory["made"], seen["temb"], hidden_states.shape, picture),)

    def decide(self, step, memory, signal):
        if step in (0, self.num_steps - 1) or "made" not in memory:
            compute = True
        elif self.speedup is not None:
            compute = is_due(self.times, self.schedule, self.num_steps, round(self.num_steps / self.speedup))
        elif self.thresh == 0 or "signal" not in memory or self.indicator == "timestep" and step < self.num_steps / 5:
            compute = True
        else:
            difference, old = (signal - memory["signal"]).abs(), memory["signal"].abs()
            change = (difference.mean(dtype=torch.float32) / old.mean(dtype=torch.float32)).item()
            self.accumulated += self.poly(change)
            compute = not self.accumulated < self.thresh
        if compute:
            self.accumulated = 0.0
        return compute

    def project(self, hidden, temb, shape, picture=lambda x: x):
        """`norm_out`, and the patches put together."""
        (batch, _, height, width), p = shape, self.model.config.patch_size
        patches = picture(self.model.norm_out(hidden, temb)).view(batch, height // p, width // p, p, p, -1)
        return torch.pixel_shuffle(patches.permute(0, 5, 3, 4, 1, 2).flatten(1, 3), p)


def oracle_run(model, thresh, coefficients, num_steps, cond, uncond=None, before_call=None, way=None, **kwargs):
    """Outputs, latents and schedule that TeaCache should give in a fresh process; way: predict, indicator, speedup."""
    oracle = Oracle(model, thresh, coefficients, num_steps, **(way or {}))

    def both(step, name, count):
        switches = sum(step >= s for s in kwargs.get("switch") or {})  # a new prompt is a new branch
        oracle.at(step, f"{name}{switches}" if name == "cond" else name)
        if before_call:
            before_call(step, name, count)

    return *denoise(oracle, cond, uncond, before_call=both, **kwargs), oracle.schedule


def block_calls(model):
    """A list that grows by one at each call of the first and of the last block."""
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append("first"))
    model.layers[-1].register_forward_hook(lambda *_: calls.append("last"))
    return calls
