"""TeaCache (arXiv 2411.19108) for Lumina-Image-2.0: training-free caching, in one self-contained script.

A diffusion model draws an image by running one network at 20 to 50 timesteps, and little changes from one step to the
next. TeaCache computes some of the steps and skips the others. One of two settings decides which:

rel_l1_thresh, TeaCache's own rule. x is the timestep-modulated input of the first block. Its relative L1 change,
rescaled by a polynomial p, is added up over the steps since the last computed one, and as long as the sum is small,

    sum of p(mean |x[i] - x[i-1]| / mean |x[i-1]|)  <  rel_l1_thresh

the blocks are skipped, and the residual of the last computed step (their output minus their input) is used again.

computed_steps, the number of steps to compute, or a list of them. A skipped step runs no part of the network. Its
velocity is extrapolated from the last computed ones, v0, v1 and v2 at sigma s0, s1 and s2 (the factor r is ours):

    v(s) = v2 + r (s - s2) d2        d1 = (v1 - v0) / (s1 - s0)        d2 = (v2 - v1) / (s2 - s1)

r = <d1, d2> / <d1, d1>, limited to 0..1, is how much of the slope d1 is left in d2: one number for each call and image.
Where the slope turns or shrinks, it is followed less far. Until three velocities are known, the last one is held.

The first and the last step are always computed. With a number, the first step measures how much of the image is decided:
the more is open, the more early steps are chosen (see choose_steps). With a pipeline, the latents are corrected
afterwards for what skipped steps got wrong, as soon as the next computed step shows it (see Corrector).

    python teacache_lumina2.py --computed-steps 15                  # or edit the constants below

    from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache  # importing changes nothing
    apply_teacache(pipeline, computed_steps=15)
    image = pipeline("a red apple", num_inference_steps=30).images[0]
    print(pipeline.transformer.teacache)                            # 15 of 30 steps computed: X...X...X..X..X...
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import math
import os
import secrets
import sys
import time
import warnings
import weakref
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import USE_PEFT_BACKEND, logging, scale_lora_layers, unscale_lora_layers

# ------------------------------------------------------------------------------
# speedups: by the original authors, 4070 laptop, 1024x1536; computed steps: of the bundled model, which has the same shift
REL_L1_THRESH = 0.3  # 0: original | 0.1: 1.05x, 28 of 30 | 0.2: 1.15x, 26 | 0.3: 1.25x, 24
COMPUTED_STEPS = None  # instead of the threshold: compute exactly this many steps, say 15 of 30
NUM_INFERENCE_STEPS = 30
GUIDANCE_SCALE = 4.0
CFG_TRUNC_RATIO = 1.0  # share of the steps with guidance
SEED = 1024
PROMPT = "smiling face with sunglasses"
NEGATIVE_PROMPT = ""
HEIGHT = WIDTH = None  # pixels, multiples of 16; None: the default of the model, 1024 for Lumina-Image-2.0
MODEL = "Alpha-VLLM/Lumina-Image-2.0"  # with a CUDA GPU; without one, the small model of this repository:
BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "assets" / "lumina2-emoji"
NETWORK = "transformer"  # attribute of the pipeline that TeaCache is applied to
PACKAGE = "diffusers"  # that the network's forward must be from: others are not replaced

# Rescaling polynomials, highest power first (ali-vilab/TeaCache, pull requests 70 and 76).
# v1 was fitted on Lumina-Next; v2 was found for Lumina-Image-2.0 by a search on LPIPS.
# They hold for small changes only: v1 falls below zero at a change of 0.279, v2 at 1.207. Larger changes are computed.
COEFFICIENTS_V1 = [393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344]
COEFFICIENTS_V2 = [225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552]
COEFFICIENTS = COEFFICIENTS_V1

CORRECT = True  # with a pipeline: correct the latents afterwards for what skipped steps got wrong, see Corrector
# ------------------------------------------------------------------------------

logger = logging.get_logger(f"diffusers.{Path(__file__).stem}")


def teacache_forward(
    self,
    hidden_states,  # (batch, channels, height, width): latents
    timestep,  # (batch,): 0 is noise, 1 the image
    encoder_hidden_states,  # (batch, tokens, cap_feat_dim): caption features
    encoder_attention_mask,  # (batch, tokens): 1 for a token, 0 for padding
    attention_kwargs=None,  # {"scale": s} scales the LoRA layers
    return_dict=True,
):
    """`Lumina2Transformer2DModel.forward` (diffusers 0.33 to 0.42) with TeaCache: the velocity, shaped as the latents.

    Settings are attributes of the instance, else of its class, else the constants; the state is `self.teacache`, on the
    instance. With gradients, at threshold 0 or without `enable_teacache`, every step is computed, as in stock. Where the
    prompt or the scale of a LoRA adapter changes, the step is computed.
    """
    attention_kwargs = attention_kwargs or {}
    lora_scale = attention_kwargs.get("scale", 1.0)
    if USE_PEFT_BACKEND and lora_scale != 1.0:  # this function again, with scaled LoRA layers
        scale_lora_layers(self, lora_scale)
        try:
            inputs = hidden_states, timestep, encoder_hidden_states, encoder_attention_mask
            return teacache_forward(self, *inputs, return_dict=return_dict)
        finally:
            unscale_lora_layers(self, lora_scale)

    # ---- TeaCache: a step that is skipped by extrapolation runs no part of the network ----
    sigma = 1 - timestep.flatten()[0].float()  # of the first sample
    is_shared = timestep.numel() == 1 or timestep.stride(0) == 0  # one timestep, which pipelines expand
    offsets = None if is_shared else timestep - timestep[0]  # samples must keep their distance
    conditioning = encoder_hidden_states, encoder_attention_mask, lora_scales(self), offsets
    cache = begin_call(self, sigma, hidden_states, *conditioning)
    should_calc = cache.should_calc()
    if should_calc is False and cache.plan is not None:
        output = extrapolate(cache.call.outputs, cache.step.sigma)
        cache.close_call(output)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
    # ---- end of TeaCache ----

    # 1. Condition, positional & patch embedding
    batch_size, _, height, width = hidden_states.shape
    temb, encoder_hidden_states = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    hidden_states, context_rotary_emb, noise_rotary_emb, rotary_emb, encoder_seq_lengths, seq_lengths = (
        self.rope_embedder(hidden_states, encoder_attention_mask)
    )
    hidden_states = self.x_embedder(hidden_states)  # (batch, patches, hidden_size)

    # 2. Context & noise refinement
    for layer in self.context_refiner:
        encoder_hidden_states = layer(encoder_hidden_states, encoder_attention_mask, context_rotary_emb)
    for layer in self.noise_refiner:
        hidden_states = layer(hidden_states, None, noise_rotary_emb, temb)

    # 3. Joint Transformer blocks
    max_seq_len = max(seq_lengths)
    use_mask = len(set(seq_lengths)) > 1  # padding
    attention_mask = hidden_states.new_zeros(batch_size, max_seq_len, dtype=torch.bool)
    joint_hidden_states = hidden_states.new_zeros(batch_size, max_seq_len, self.config.hidden_size)
    for i, (encoder_seq_len, seq_len) in enumerate(zip(encoder_seq_lengths, seq_lengths)):
        attention_mask[i, :seq_len] = True
        joint_hidden_states[i, :encoder_seq_len] = encoder_hidden_states[i, :encoder_seq_len]
        joint_hidden_states[i, encoder_seq_len:seq_len] = hidden_states[i]
    attention_mask = attention_mask if use_mask else None
    hidden_states = joint_hidden_states  # (batch, tokens, hidden_size): caption, image, padding

    # ---- TeaCache: stock runs the layers at every step ----
    if should_calc is None:
        should_calc = cache.should_calc(modulated_input(self.layers[0], hidden_states, temb))
    if should_calc:
        original_hidden_states = hidden_states
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    layer, hidden_states, attention_mask, rotary_emb, temb
                )
            else:
                hidden_states = layer(hidden_states, attention_mask, rotary_emb, temb)
        residual = hidden_states - original_hidden_states if cache.by_threshold else None
    else:
        residual = cache.call.previous_residual
        hidden_states = hidden_states + residual
    # ---- end of TeaCache ----

    # 4. Output norm & projection
    hidden_states = self.norm_out(hidden_states, temb)  # (batch, tokens, patch_size**2 * out_channels)

    # 5. Unpatchify
    p = self.config.patch_size
    output = []
    for i, (encoder_seq_len, seq_len) in enumerate(zip(encoder_seq_lengths, seq_lengths)):
        patches = hidden_states[i, encoder_seq_len:seq_len].view(height // p, width // p, p, p, self.out_channels)
        output.append(patches.permute(4, 0, 2, 1, 3).reshape(self.out_channels, height, width))
    output = torch.stack(output)

    cache.close_call(output, residual)  # TeaCache: for the steps that are skipped
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def lora_scales(model):
    """Of each LoRA layer that is switched on: its adapters and their scales."""
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")] if hasattr(model, "peft_config") else []
    names = [(layer, name) for layer in layers if not layer.disable_adapters for name in layer.active_adapters]
    # rounded, as scaling and scaling back may change the last digit
    return [(name, round(layer.scaling.get(name, 0.0), 6)) for layer, name in names]


def modulated_input(block, hidden_states, temb):
    """`norm1` of a block, which gives the input of its attention, (batch, tokens, hidden_size)."""
    if not hasattr(block, "norm1"):
        raise ValueError(f"the first block is a {type(block).__name__}: use computed_steps, or remove the other cache")
    hooks = getattr(getattr(block, "_diffusers_hook", None), "hooks", ())
    if "group_offloading" in hooks:  # norm1 is not called by the block, whose hook would load its weights
        raise ValueError("offloading of whole blocks hides the first one: use computed_steps, or leaf_level offloading")
    return block.norm1(hidden_states, temb)[0]


# ---- the method: which steps are computed, what the others use, what is corrected ------


def relative_l1(new, old):
    """mean |new - old| / mean |old|, accumulated in float32."""
    return ((new - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)).item()


def rescale(change, coefficients):
    """The polynomial of a change. Where it is negative above a change of 0.1, it was not fitted: infinity.

    Small negative values are the fit's own, and are subtracted as published.
    """
    rescaled = np.polyval(coefficients, change)
    return rescaled if rescaled >= 0 or change < 0.1 else math.inf


def measure_decided(outputs):
    """How much of the image is decided in the first step, 0 to 1. outputs: of its calls, each (batch, ...).

    At noise, the velocity is the noise minus the image that the network expects. The noise has variance 1, and latents have
    about 1 as well: of a decided image the mean square of the output is 2, if the network expects only the mean it is 1.
    Of the calls of a guided step the largest value counts (usually that with the prompt), in a batch the smallest.
    """
    squares = [output.float().square().flatten(1).mean(dim=1).min() for output in outputs]
    return min(max(torch.stack(squares).max().item() - 1, 0.0), 1.0)


def choose_steps(sigmas, count, decided=1.0):
    """`count` of the steps with these sigmas, the first and the last among them, with the least expected error.

    The error expected of a skipped step is its length times the square of its distance from the last computed one.
    Both are measured along 1 - s / (s + t (1 - s)), where a scheduler of shift t has evenly spaced steps. If the image is
    decided, t is 1, and this is sigma; if it is open, the first steps decide it, and t is 3:

        t = 3 ** (2 - 5 decided), kept between 1 and 3

    Dynamic programming finds the least sum.
    """
    num_steps = len(sigmas)
    s = np.array(sigmas) / (sigmas[0] or 1)  # 1 at the first step, 0 at the image
    t = 3 ** min(max(2 - 5 * decided, 0), 1)
    position = num_steps * (1 - s / (s + t * (1 - s)))  # in mean steps
    length = np.diff(position, append=num_steps)
    errors = np.triu(length * (position - position[:, None]) ** 2)  # [j, m]: of skipping m, if j was computed last
    costs = np.cumsum(errors, axis=1) - errors  # [j, k]: of skipping all steps between j and k
    costs[:, -1] *= 2  # Corrector, where it acts, undoes only half of what is skipped just before the last step
    costs = np.rint(100 * costs)  # whole numbers: rounding must not decide between equal sums
    costs[np.tril_indices(num_steps)] = math.inf  # k comes after j
    least, before = costs[0], []  # [k]: least sum if k is computed; the computed step before k
    for _ in range(min(count, num_steps) - 2):
        sums = least[:, None] + costs
        least = sums.min(axis=0)
        before.append(sums.argmin(axis=0))
    chosen = [num_steps - 1]
    for previous in reversed(before):
        chosen.append(int(previous[chosen[-1]]))
    return sorted({0, *chosen})


def extrapolate(outputs, sigma):
    """v(s) of the docstring of this file, with s at most twice as far from s2 as s1 is.

    outputs: (sigma, velocity) of the last computed steps, at most three.
    """
    s2, v2 = outputs[-1]
    if len(outputs) < 3:
        return v2.clone()
    (s0, v0), (s1, v1) = outputs[:2]
    before, change = (v1 - v0).float(), (v2 - v1).float()
    each = tuple(range(1, v2.ndim))  # each sample of a batch has its own r
    lasted = (before * change).sum(each, keepdim=True) / before.square().sum(each, keepdim=True).clamp(min=1e-30)
    r = (lasted * ((s1 - s0) / (s2 - s1))).clamp(0, 1)
    reach = min((sigma - s2) / (s2 - s1), 2.0)  # in gaps: in a list of steps, a long one may follow a short one
    return v2 + (r * reach * change).to(v2.dtype)


class Corrector:
    """Moves the latents to where they would be, had the skipped steps known what the next computed step knows.

    A skipped step j uses a guess, used[j]. The next computed step shows the velocity v at its sigma s. A parabola p
    through v and the two computed velocities before it (a line, if there is only one, or if the two are too close
    together) then gives those that were skipped, p(s[j]). With n, the sigma of the next step, the latents are moved by

        s / (2 s - n)  times the sum of  (s[j+1] - s[j]) (p(s[j]) - used[j])

    Why the factor: v is measured at latents that have drifted by d. If the network predicts the same image x - s v
    there, v is too large by d / s, and the step that follows undoes the share (s - n) / s of the drift by itself: n / s
    is left to correct. As the prediction follows the latents in part, s / (2 s - n) is used. It is n / s to first order,
    nearly 1 in the short steps at the beginning, and 1/2 instead of 0 in the last one.

    It acts after guidance, since pipelines may rescale the guided velocity: what is right for each call is then not
    right for both (measured: 60 dB with the correction inside the network's output, 66 dB here).

    The idea is that of the corrector of a multistep method, as in UniPC (arXiv 2302.04867), and for caches in PrediT
    (arXiv 2602.18093). Here it acts on the latents, however the steps were skipped.
    """

    CLOSE = 0.45  # a parabola needs velocities at least this share of the current gap apart; otherwise a line is used

    def __init__(self):
        self.computed = []  # (sigma, velocity, number of the step) of the last two computed steps
        self.skipped = []  # (sigma, next sigma, velocity) of the steps skipped since then
        self.calls = None  # of the step before
        self.number = 0  # of this step
        self.first_same = 0  # of the first step whose velocity was made as this one, (batch,)

    def correction(self, velocity, sigma, next_sigma, is_computed, calls, is_same=True):
        """What to add to the latents after this step: the formula above, 0 after a skipped step.

        calls: identities of the calls behind this velocity. If they are others (guidance ends, say), this begins anew.
        is_same: whether the velocity is made of their outputs as in the step before, (batch,). If it is not, nothing is
        corrected until all points of the curve are from after the change.
        """
        if self.calls != calls:
            self.computed, self.skipped, self.calls, self.first_same = [], [], calls, 0
        self.number += 1
        self.first_same = torch.where(torch.as_tensor(is_same, device=velocity.device), self.first_same, self.number)
        if not is_computed:
            self.skipped.append((sigma, next_sigma, velocity))
            return 0.0
        self.computed = [point for point in self.computed if point[0] > sigma]  # a scheduler may repeat a sigma
        total = 0.0
        if self.computed and sigma > 0:
            *earlier, last = self.computed
            far = self.CLOSE * (last[0] - sigma)
            points = [*(point for point in earlier if point[0] - last[0] >= far), last, (sigma, velocity, self.number)]
            for s, next_s, used in self.skipped:
                total = total + (next_s - s) * (interpolate(points, s) - used)
            total = total * (sigma / (2 * sigma - min(sigma, next_sigma)))  # a scheduler may let sigma rise
            are_same = (self.first_same <= points[0][2]).view(-1, *[1] * (velocity.ndim - 1))
            total = torch.where(are_same, total, 0.0)
        self.computed, self.skipped = [*self.computed[-1:], (sigma, velocity, self.number)], []
        return total


class Guidance:
    """How a velocity is made of the outputs of the calls of its step: as a sum, with weights of its own for each row of pixels.

    Pipelines may rescale the rows, so that only the ratio of the weights has to last.
    """

    OTHER = 0.03  # share of the velocity that the weights may leave over; rounding to bfloat16 leaves 0.003

    def __init__(self):
        self.weights = None  # of the step before, see least_squares; NaN if it was no such sum

    def is_same(self, velocity, calls):
        """Whether each velocity of a batch is made as in the step before, (batch,).

        Not if it is no sum of these outputs, then or now, as another network took part. A scale of guidance that drifts,
        by less than 3 % of the velocity in a step, is not noticed.
        """
        shapes = [call.output.shape for call in calls]
        if not calls or any(shape[1:] != velocity.shape[1:] or shape[0] % len(velocity) for shape in shapes):
            return True  # not known: of tiles, say
        outputs = torch.cat([call.output for call in calls]).to(velocity)
        outputs = outputs.unflatten(0, (-1, len(velocity))).movedim(0, -2)  # (batch, channels, ..., calls, width)
        rows, weights, before = velocity.unsqueeze(-2), least_squares(outputs, velocity), self.weights
        is_sum = self.is_little(rows - (weights * outputs).sum(-2, keepdim=True), velocity)
        self.weights = torch.where(is_sum.view(-1, *[1] * velocity.ndim), weights, math.nan)
        if before is None or before.shape != weights.shape:
            return torch.zeros_like(is_sum)
        expected = (before * outputs).sum(-2, keepdim=True)
        scale = (rows * expected).sum(-1, keepdim=True) / expected.square().sum(-1, keepdim=True).clamp(min=1e-30)
        return self.is_little(rows - scale * expected, velocity)

    def is_little(self, rest, velocity):
        return size_of(rest) < self.OTHER * size_of(velocity)


def least_squares(outputs, velocity):
    """The weights (..., calls, 1) with which the outputs (..., calls, width) add up to the velocity (..., width).

    By Gauss and Jordan's elimination: it neither waits for the GPU nor takes a library that some devices lack.
    """
    columns = torch.cat([outputs, velocity.unsqueeze(-2)], dim=-2)
    products = (outputs.unsqueeze(-2) * columns.unsqueeze(-3)).sum(-1)  # (..., calls, calls + 1)
    diagonal = products.diagonal(dim1=-2, dim2=-1)  # a view
    diagonal += 1e-6 * diagonal.mean(-1, keepdim=True) + 1e-30  # outputs may be equal
    for i in range(outputs.shape[-2]):
        pivot = products[..., i : i + 1, :] / products[..., i : i + 1, i : i + 1]
        products = products - products[..., i : i + 1] * pivot
        products[..., i : i + 1, :] = pivot
    return products[..., -1:]


def interpolate(points, s):
    """The polynomial through points (sigma, velocity, ...) at s, in Lagrange's form."""
    total = 0.0
    for i, (a, velocity, *_) in enumerate(points):
        total = total + velocity * math.prod((s - b) / (a - b) for j, (b, *_) in enumerate(points) if j != i)
    return total


# ---- the state: an image, its steps, their calls ------------------------------


class TeaCacheState:
    """One generation of a network: `print(model.teacache)` shows which steps were computed.

    An image is its latents. A call on the latents of the running step is one more call of it. A call on what the
    scheduler has made of them, or on something near that, begins the next step. Any other call begins a new image,
    whose first step is computed. What goes unnoticed is listed in the docstring of apply_teacache.

    In a step, `begin_call` finds or begins it (`begin_step`), and for each of its calls come `open_call`, `should_calc` and
    `close_call`. Then the scheduler's step comes with `end_calls`, the correction, and `end_step`.
    """

    def __init__(self, sigmas=(), plan=None, rel_l1_thresh=0.0, coefficients=None, timesteps=None, count=None):
        self.sigmas = sigmas  # of all steps: 1 is noise, 0 the image
        self.plan = plan  # with computed_steps: which they are
        self.count = count  # with a number of them, which are chosen at the end of the first step
        self.decided = None  # what that step has measured, see measure_decided
        self.rel_l1_thresh = rel_l1_thresh
        self.coefficients = coefficients
        self.timesteps = timesteps  # the scheduler's own tensor; None: without a scheduler
        self.halted = None  # why nothing is skipped any more
        self.schedule = []  # one entry a step: whether it was computed
        self.step, self.before = Step(), Step()  # the running step, and the one before it
        self.call = None  # the running call
        self.is_on = False  # whether it may be skipped, and leaves what later ones reuse
        self.rivals = []  # latents of other images that are not ready
        self.previous_modulated_input = None  # with a threshold: of the first call of the step before
        self.accumulated_rel_l1_distance = 0.0  # since the last computed step
        self.corrector, self.guidance = Corrector(), Guidance()

    def __repr__(self):
        marks = "".join("X" if computed else "." for computed in self.schedule)
        return f"{self.schedule.count(True)} of {len(self.schedule)} steps computed: {marks}"

    @property
    def is_last_step(self):
        return self.step.index >= len(self.sigmas) - 1

    @property
    def next_sigma(self):
        return 0.0 if self.is_last_step else self.sigmas[self.step.index + 1]

    @property
    def may_skip(self):
        return self.plan is not None or self.rel_l1_thresh > 0

    @property
    def by_threshold(self):
        return self.is_on and self.plan is None

    # ---- steps ----

    def begin_step(self, index, sigma, sigma_given=None, latents=None):
        self.choose_plan()
        self.before, self.step = self.step, Step(index, sigma, sigma_given, latents)
        self.before.latents = None  # needed no more
        self.schedule.append(False)
        if self.is_last_step:  # nothing is reused any more
            self.previous_modulated_input = None
            for call in self.before.calls:
                call.empty()
            if self.timesteps is None:
                self.free()
        return self

    def leads_to(self, latents, sigma):
        """With a scheduler: whether a call is of the next step, on what the scheduler has returned, or near that.

        Latents that were put in its place, by a callback say, are compared by value, and sigma must be nearest to that of the
        next step (timesteps may be rounded, to thousandths). Not if other images are not ready: it may be one of them.
        """
        if self.step.returned is None:
            return False  # the scheduler has not made its step
        if self.step.is_returned(latents):
            return True
        is_due = (sigma - self.next_sigma).abs() <= max(0.5 * (self.step.sigma - self.next_sigma), 0.001)
        return not self.rivals and bool(self.step.is_near_returned(latents) & is_due)

    def goes_on(self, latents, sigma):
        """Without a scheduler: whether this is the next step. The latents are clearly nearer to this image than to another."""
        if not self.step.calls:  # after the last step, which keeps nothing, or after a failed call
            return True
        last = self.step.calls[0]
        if len(self.rivals) > 1 or not last.can_lead_to(latents, sigma):
            return False
        distances = [size_of(latents.float() - x.float()).sum() for x in (last.latents, *self.rivals)]
        return len(distances) == 1 or (distances[0] < 0.5 * distances[1]).item()

    def end_calls(self, latents):
        """The scheduler's step is made on these latents: calls on others, of one tensor, were of other images."""
        for call in self.step.calls:
            call.locate(latents)
        self.rivals = [*self.rivals, *(call.latents for call in self.step.calls if call.place is None)]
        self.step.calls = [call for call in self.step.calls if call.place is not None]

    def end_step(self, latents, returned):
        """The scheduler's step has made `returned` of the latents."""
        self.step.end(latents, returned)
        for call in self.step.calls:
            call.output = None
        if self.is_last_step:
            self.free()

    def choose_plan(self):
        """With a number of computed_steps, once, when the first step has ended."""
        outputs = [call.outputs[-1][1] for call in self.step.calls if call.outputs]
        if self.count is None or not outputs:
            return
        first, self.decided = self.step.index, measure_decided(outputs)
        chosen = choose_steps(self.sigmas[first:], self.count, self.decided)
        self.plan, self.count = [first + step for step in chosen], None

    def halt(self, why, is_said=True):
        """Skip nothing any more, and say why. From here on, the steps are only counted."""
        if is_said:
            logger.warning(f"TeaCache: {why}: all steps are computed")
        self.halted, self.sigmas = why, ()  # so that every step is as the last one, which is computed
        if self.step.sigma_given is not None:
            self.step.sigma = self.step.sigma_given.item()
        self.free()

    def free(self):
        """Drop all tensors."""
        self.step, self.before = Step(self.step.index, self.step.sigma), Step()
        self.rivals, self.previous_modulated_input = [], None
        self.corrector, self.guidance = Corrector(), Guidance()

    # ---- calls ----

    def note_failure(self, latents, conditioning):
        """After a call that has failed, and was left open: its step neither reuses nor leaves anything.

        Unless this is the same call once more, which takes its place, and cannot be another one of the step.
        """
        if self.call is None:
            return
        is_again = is_same(self.call.conditioning, conditioning) and is_near(latents, self.call.latents)
        if not is_again or any(is_same(call.conditioning, conditioning) for call in self.step.calls):
            self.step.has_failed = True

    def open_call(self, latents, conditioning, is_new):
        """Takes what the call of the same place in the step before has left, if it was the same call."""
        self.call, place = Call(self.step.sigma, latents, conditioning), len(self.step.calls)
        is_new = is_new or self.step.has_failed or self.before.has_failed
        if place < len(self.before.calls) and not is_new:
            before = self.before.calls[place]
            if before.fits(self.call, self.before.returned):
                self.call.inherit(before)

    def should_calc(self, modulated_input=None):
        """Whether this call runs the blocks. None: its modulated input decides that, and is not known yet."""
        step = self.step
        if step.is_computed is None and self.by_threshold and modulated_input is None:
            return None
        if step.is_computed is None:
            step.is_computed = self.decide(modulated_input)
        has_nothing = self.call.is_empty or not self.is_on  # to reuse, whatever was decided
        should_calc = self.call.is_computed = step.is_computed or has_nothing
        self.schedule[-1] |= should_calc
        return should_calc

    def decide(self, modulated_input):
        """Whether the running step is computed: once, in its first call."""
        if not self.is_on or self.call.is_empty:
            is_computed = True
        elif self.plan is not None:
            is_computed = self.step.index in self.plan
        else:  # TeaCache's rule
            change = relative_l1(modulated_input, self.previous_modulated_input)
            self.accumulated_rel_l1_distance += rescale(change, self.coefficients)
            is_computed = not self.accumulated_rel_l1_distance < self.rel_l1_thresh  # NaN: compute
        if is_computed:
            self.accumulated_rel_l1_distance = 0.0
        self.previous_modulated_input = modulated_input
        return is_computed

    def close_call(self, output, residual=None):
        """What the call leaves. At the end, so that one that fails leaves nothing."""
        call, self.call = self.call, None
        is_alone = self.timesteps is None
        if self.halted is not None or (is_alone and self.is_last_step):
            return
        output = output.clone()  # the caller may write into it
        if is_alone:
            call.latents = call.latents.clone()  # and into them
        else:
            call.output = output
        if not self.is_on:
            call.empty()
        elif self.plan is None:
            call.previous_residual = residual
        elif call.is_computed:
            earlier = [(s, v) for s, v in call.outputs if s > call.sigma]  # Heun's scheduler, say, repeats a sigma
            call.outputs = [*earlier[-2:], (call.sigma, output)]
        self.step.calls.append(call)


class Step:
    """One step of an image: the calls on its latents, and what the scheduler has made of them."""

    def __init__(self, index=-1, sigma=-math.inf, sigma_given=None, latents=None):
        self.index, self.sigma = index, sigma  # -1 before the first step
        self.sigma_given, self.latents = sigma_given, latents  # by its first call
        self.version = None if latents is None else version_of(latents)
        self.calls = []  # that have ended
        self.is_computed = None  # what was decided in its first call
        self.has_failed = False  # whether a call has, and what came after it may be another one
        self.returned, self.returned_version = None, None  # by the scheduler, when it has ended the step
        self.value, self.length = None, None  # a copy of what it returned, and how far the step has moved each sample

    def is_another_call(self, latents):
        """Whether a call is one more of the running step: on its latents, on a part of the same tensor, or on a copy."""
        if self.latents is None or self.returned is not None:
            return False
        if share_memory(latents, self.latents):
            return version_of(latents) == self.version
        return is_near(latents, self.latents)

    def end(self, latents, returned):
        self.returned, self.returned_version = returned, version_of(returned)
        self.value = returned.clone()  # somebody may write into it
        self.length = size_of(returned.float() - latents.float())

    def is_returned(self, latents):
        """Whether these are the very latents that the scheduler returned, or a part of them, with nothing written into them."""
        is_untouched = self.returned_version is not None and version_of(latents) == self.returned_version
        return is_untouched and share_memory(latents, self.returned) and place_in(self.returned, latents) is not None

    def is_near_returned(self, latents):
        """Whether they are at most twice as far from that as the step has moved them, or half of their size.

        A callback that blends, as in inpainting, puts them where another velocity would have, which is not farther. Other
        images, and moved or mirrored ones, are 0.7 to 1.4 times their own size away.
        """
        return near(latents, self.value, torch.minimum(2 * self.length, 0.5 * size_of(self.value)))


class Call:
    """One call of a step, and the cache that it leaves. Guidance, say, makes two: with the prompt, and without."""

    def __init__(self, sigma, latents, conditioning):
        self.sigma, self.latents, self.conditioning = sigma, latents, conditioning
        self.place, self.is_own = None, True  # in the latents of the step, see locate
        self.lineage = object()  # identity of this call across steps
        self.is_computed = None  # whether it runs the blocks
        self.output = None  # from its end to that of the step
        self.empty()

    def empty(self):
        self.previous_residual = None  # with a threshold: output minus input of the blocks at the last computed step
        self.outputs = []  # with computed_steps: (sigma, output) of the last three computed steps

    @property
    def is_empty(self):
        return self.previous_residual is None and not self.outputs

    def inherit(self, before):
        self.lineage, self.previous_residual, self.outputs = before.lineage, before.previous_residual, before.outputs

    def locate(self, latents):
        """Finds the place of this call in the latents of the scheduler's step: None if it was on others. Copies are compared."""
        self.place = place_in(latents, self.latents)
        if not share_memory(self.latents, latents):
            rounding = torch.finfo(torch.bfloat16).eps * size_of(latents)  # the copy may be of another type
            self.is_own = near(self.latents, latents, rounding)

    def fits(self, call, returned):
        """Whether a call is this one, a step later: with the same conditioning, on what has become of its latents."""
        if (self.latents.shape, self.latents.dtype) != (call.latents.shape, call.latents.dtype):
            return False
        if returned is None:  # without a scheduler
            return self.can_lead_to(call.latents, call.sigma) and is_same(self.conditioning, call.conditioning)
        if self.place != place_in(returned, call.latents):
            return False
        return is_same(self.conditioning, call.conditioning, self.is_own)

    def can_lead_to(self, latents, sigma):
        """Without a scheduler, nothing tells what becomes of the latents: whether one step can lead so far.

        On the bundled model a step moves them by 1.4 to 2.1 times its length in sigma, relative to their size, or by 7
        where guidance is not normalised. Other latents are 0.7 to 1.4 away, those of the same prompt at least 0.25.
        """
        return is_near(latents, self.latents, min(10 * (self.sigma - sigma), 0.5) * size_of(self.latents))


def is_same(conditioning, other, also=True):
    """Whether all of it is equal, and `also` holds. Tensors that were made anew are compared by value.

    That waits for the GPU once, with `also`, which may be a tensor.
    """
    if len(conditioning) != len(other) or also is False:
        return False
    differences = [~also] if torch.is_tensor(also) else []
    for a, b in zip(conditioning, other):
        if torch.is_tensor(a) and torch.is_tensor(b) and a is not b:
            if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
                return False
            differences.append((a != b).any())
        elif a is not b and (torch.is_tensor(a) or torch.is_tensor(b) or a != b):
            return False
    return not differences or not torch.stack([each.to(differences[0].device) for each in differences]).any().item()


def is_near(latents, expected, distance=0.0):
    return bool(near(latents, expected, distance))  # waits for the GPU


def near(latents, expected, distance=0.0):
    """Whether each sample is at most so far from what is expected, but for rounding. Guidance may double the batch."""
    if latents.shape[1:] != expected.shape[1:] or len(latents) % len(expected) or latents.device != expected.device:
        return False
    apart = size_of(latents.float().unflatten(0, (-1, len(expected))) - expected.float(), first=2)
    rounding = max(torch.finfo(latents.dtype).eps, torch.finfo(expected.dtype).eps) * size_of(expected)
    return (apart <= distance + rounding).all()


def size_of(latents, first=1):
    """The norm of each sample."""
    return latents.float().flatten(first).norm(dim=first)


def share_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def version_of(tensor):
    """Rises where somebody writes into the tensor. In inference mode nobody counts that: None."""
    return None if tensor.is_inference() else tensor._version


def place_in(whole, part):
    """Where a view lies in a tensor, of tiles say: (offset, stride, shape), or "whole", as are copies. None: beside it."""
    offset = part.storage_offset() - whole.storage_offset()
    is_all = offset == 0 and (part.shape, part.stride()) == (whole.shape, whole.stride())
    if is_all or not share_memory(part, whole):
        return "whole"
    extent = sum((length - 1) * stride for length, stride in zip(whole.shape, whole.stride()))
    return (offset, part.stride(), part.shape) if 0 <= offset <= extent else None


# ---- which step a call belongs to --------------------------------------------

NOT_SEEN = "no step of its scheduler is seen before this call (was it replaced, copied, or wrapped before? then apply TeaCache again)"


def begin_call(model, sigma, latents, *conditioning, is_new=False):
    """The state of the running generation, at the step of this call. sigma: a tensor, 1 is noise, 0 the image.

    conditioning: all else that the output depends on. is_new: whatever it is, the call reuses nothing.
    """
    cache, scheduler = vars(model).get("teacache") or TeaCacheState(), vars(model).get("teacache_scheduler")
    cache.note_failure(latents, conditioning)
    if torch.is_grad_enabled():
        cache = count_only(cache, sigma, "gradients are on (use torch.no_grad())", is_said=not model.training)
    elif scheduler is None:
        cache = count_steps(model, cache, sigma, latents)
    else:
        cache = follow(model, cache, scheduler, sigma, latents)
    cache.is_on = getattr(model, "enable_teacache", False) and cache.may_skip and not cache.is_last_step
    cache.open_call(latents, conditioning, is_new)
    model.teacache = cache
    return cache


def follow(model, cache, scheduler, sigma, latents):
    """With a scheduler: an image begins where the timesteps are set, and goes on as TeaCacheState says."""
    timesteps, index = scheduler.timesteps, scheduler.step_index
    if index is None:  # before the first step
        index = getattr(scheduler, "begin_index", None)
    if cache.timesteps is not timesteps:  # set_timesteps makes a new tensor
        cache = TeaCacheState()
    step = cache.step
    if cache.halted is None:
        if step.is_another_call(latents):
            return cache
        if index == step.index + 1 and cache.leads_to(latents, sigma):
            return cache.begin_step(index, cache.sigmas[index], sigma, latents)
        if step.returned is None and step.sigma_given is not None and sigma < step.sigma_given:
            cache.halt(NOT_SEEN)
    is_unset = index is None and len(timesteps) == scheduler.config.num_train_timesteps
    if cache.halted is not None or is_unset or (index is not None and index >= len(timesteps)):
        return count_only(cache, sigma, cache.halted or NOT_SEEN, timesteps)
    watch(scheduler, model)
    return begin_image(model, cache, scheduler, index, sigma, latents)


def begin_image(model, cache, scheduler, index, sigma, latents):
    """With a scheduler: the state of another image than that of `cache`, or of the same one with other latents."""
    step, timesteps = cache.step, scheduler.timesteps
    sigmas = (timesteps.cpu().double() / scheduler.config.num_train_timesteps).tolist()
    nearest = np.abs(np.array(sigmas) - sigma.item()).argmin().item()
    index = nearest if index is None else index
    anew = new_generation(model, sigmas, timesteps)
    anew.rivals = cache.rivals
    if index == step.index + 1 > 0 and sigmas[index] == sigmas[nearest]:  # the loop goes on, with other latents
        anew.schedule = cache.schedule
    elif step.latents is not None:
        anew.rivals = [step.latents]
    return anew.begin_step(index, sigmas[index], sigma, latents)


def count_steps(model, cache, sigma, latents):
    """Without a scheduler: a step begins where sigma falls, and an image where it rises, or the latents are others."""
    step, now = cache.step, sigma.item()
    if now == step.sigma and len(cache.sigmas) > 1:  # with one step, each call is an image
        if cache.is_last_step or step.is_another_call(latents):
            return cache
    is_next = now < step.sigma and cache.halted is None and cache.goes_on(latents, now)
    if not is_next:
        num_steps = int(getattr(model, "num_steps", None) or NUM_INFERENCE_STEPS)
        ran, expected = len(cache.schedule), len(cache.sigmas)
        if getattr(model, "enable_teacache", False) and expected and ran not in (1, expected):
            last = f"the last generation ran {ran} of {expected} steps (or was stopped)"
            logger.warning(f"TeaCache: {last}: set num_steps to num_inference_steps")
        anew = new_generation(model, [1 - step / num_steps for step in range(num_steps)])  # as if evenly spaced
        if now == step.sigma:  # images in turns, or one that was stopped in this step
            anew.rivals = [x for x in (*cache.rivals, step.latents) if x is not None and x.shape == latents.shape][-2:]
        cache = anew
    return cache.begin_step(cache.step.index + 1, now, sigma, latents.clone())


def count_only(cache, sigma, why, timesteps=None, is_said=True):
    """The state of an image in which nothing is skipped: its steps are counted, and why is said once."""
    now = sigma.item()
    if cache.halted != why or cache.timesteps is not timesteps or now > cache.step.sigma:
        cache = TeaCacheState(timesteps=timesteps)
        cache.halt(why, is_said)
    return cache if now == cache.step.sigma else cache.begin_step(cache.step.index + 1, now)


def new_generation(model, sigmas, timesteps=None):
    """With the settings of the model, else of its class, else the constants."""
    rel_l1_thresh, plan = getattr(model, "rel_l1_thresh", None), getattr(model, "computed_steps", None)
    if rel_l1_thresh == 0:
        plan = None  # nothing is skipped
    elif rel_l1_thresh is None and plan is None:
        rel_l1_thresh, plan = REL_L1_THRESH, COMPUTED_STEPS
    count = None
    if plan is not None and np.ndim(plan) == 0:
        count, plan = int(plan), range(len(sigmas))  # until they are chosen
    elif plan is not None:
        check_plan(plan, len(sigmas))
        plan = list(plan)  # the caller may change its own
    coefficients = getattr(model, "coefficients", None)
    coefficients = COEFFICIENTS if coefficients is None else coefficients
    return TeaCacheState(sigmas, plan, rel_l1_thresh or 0.0, coefficients, timesteps, count)


# ---- the scheduler: what it makes of the latents, and their correction --------


class StandIn(type):
    """The kind of classes with a method of our own. They equal the stock class, which pipelines look for."""

    def __eq__(cls, other):
        return other is cls or other is cls.stock_class

    def __hash__(cls):
        return hash(cls.stock_class)


@functools.cache
def watched(stock):
    """A scheduler's class, with a step that TeaCache sees. It has the stock name, and copies and files are stock."""

    @functools.wraps(stock.step)  # pipelines inspect its parameters
    def step(self, model_output, timestep, sample, *args, **kwargs):
        given = *args, *kwargs.values()
        random_state = state_of_random(self, sample.device, given)
        result = stock.step(self, model_output, timestep, sample, *args, **kwargs)
        network = vars(self).get("teacache", lambda: None)()
        cache = network and vars(network).get("teacache")
        is_running = cache and cache.timesteps is self.timesteps and cache.step.index + 1 == self.step_index
        if not is_running or cache.step.latents is None or cache.step.returned is not None:
            return result  # the network was not called for it
        if cache.may_skip and state_of_random(self, sample.device, given) != random_state:
            cache.halt(f"{stock.__name__} adds noise in its steps")
            return result
        if cache.may_skip and any(map(torch.is_tensor, given)):
            cache.halt(f"{stock.__name__} is given a tensor in its steps")
            return result
        return finish_step(self, cache, model_output, sample, result)

    def reduce(self, protocol):
        state = {name: value for name, value in vars(self).items() if name != "teacache"}
        return object.__new__, (stock,), state

    return stand_in(stock, step=step, __reduce_ex__=reduce)


def stand_in(stock, **methods):
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "stock_class": stock}
    kind = StandIn if type(stock) is type else type("StandIn", (StandIn, type(stock)), {})  # abstract classes, say
    return kind(stock.__name__, (stock,), {**names, **methods})


def state_of_random(scheduler, device, given):
    """Of all generators that a step can draw noise from: those that it is given or has, and torch's own."""
    if is_euler(scheduler) and not scheduler.config.get("stochastic_sampling"):
        return []  # it draws none, but other threads may
    candidates = [*given, *vars(scheduler).values()]
    candidates += [x for each in candidates if isinstance(each, list) for x in each]
    states = [x.get_state() for x in candidates if isinstance(x, torch.Generator)]
    states += [torch.get_rng_state()]
    if device.type == "cuda":
        states += torch.cuda.get_rng_state_all()
    elif device.type == "mps":
        states += [torch.mps.get_rng_state()]
    return [state.numpy().tobytes() for state in states]


def finish_step(scheduler, cache, model_output, latents, result):
    """Returns the result of the scheduler's step, corrected."""
    step, returned = cache.step, result[0]
    cache.end_calls(latents)
    if cache.may_skip and is_corrected(scheduler):
        velocity, calls = model_output.to(torch.float32, copy=True), [call.lineage for call in step.calls]
        is_same = cache.guidance.is_same(velocity, step.calls)
        correction = cache.corrector.correction(
            velocity, step.sigma, cache.next_sigma, step.is_computed, calls, is_same
        )
        returned = (returned + correction).to(returned.dtype)
        result = (returned, *result[1:]) if isinstance(result, tuple) else type(result)(prev_sample=returned)
    cache.end_step(latents, returned)
    return result


def is_corrected(scheduler):
    """Whether the latents are: with Euler's method, as diffusers has it."""
    return CORRECT and is_euler(scheduler) and type(scheduler) is not stock_class(scheduler)


def is_euler(scheduler):
    step = stock_class(scheduler).step
    return step is FlowMatchEulerDiscreteScheduler.step and is_from(step, "diffusers")


def watch(scheduler, network):
    scheduler.__class__ = watched(stock_class(scheduler))
    scheduler.teacache = weakref.ref(network)


def unwatch(scheduler):
    vars(scheduler).pop("teacache", None)
    scheduler.__class__ = stock_class(scheduler)


def stock_class(instance):
    """The class that it has without TeaCache."""
    return vars(type(instance)).get("stock_class", type(instance))


# ---- switching on and off ----------------------------------------------------

ATTRIBUTES = "enable_teacache num_steps rel_l1_thresh computed_steps coefficients teacache teacache_scheduler".split()


def apply_teacache(
    model, num_steps=None, rel_l1_thresh=None, coefficients=None, *, computed_steps=None, scheduler=None
):
    """Switch TeaCache on for a pipeline, or for its network alone, before or after offloading is enabled.

    model: with a pipeline, its scheduler tells where an image begins and which step is running, and skipped steps are
        corrected, see Corrector. When another scheduler is put in, or a copy of the network, apply TeaCache again.
    num_steps: of an image by a network alone, which begins where the timestep starts over.
    rel_l1_thresh, computed_steps: at most one; the default is the constants. computed_steps is a number, or a list of
        steps, numbered as the scheduler's timesteps. Changed attributes hold from the next image on.
    coefficients: of the polynomial for rel_l1_thresh, highest power first.
    scheduler: for a network alone, in a loop of your own that calls its set_timesteps and step.

    A network draws one image (or batch) at a time; threads need a network each. Where another input of the call changes, or
    the latents are replaced, the step is computed. Not noticed: weights or prompts that change in place, and calls of the
    same prompt on the same latents that change their order; README.md has the full list. After `del pipeline`,
    `gc.collect()` frees the memory.
    Returns `model`. Raises ValueError for settings or networks that cannot work.
    """
    network, scheduler = find_network(model), scheduler or getattr(model, "scheduler", None)
    is_alone = network is model and scheduler is None
    if not is_alone and not (hasattr(scheduler, "step_index") and hasattr(scheduler, "config")):
        name = type(model if scheduler is None else scheduler).__name__
        raise ValueError(f"this {name} does not count steps: give the {NETWORK} alone, with num_steps")
    steps = NUM_INFERENCE_STEPS if is_alone and num_steps is None else num_steps
    check_settings(steps, rel_l1_thresh, computed_steps, coefficients)
    remove_teacache(model)
    slot = find_forward(network, is_stock)
    if slot == (network, "forward"):
        vars(network).pop("forward", None)  # the class has it; hooks may have left it here
        network.__class__ = cached(type(network))
    elif slot is not None:
        setattr(*slot, BoundForward(teacache_forward, network))
    elif "enable_teacache" not in vars(network):  # ours is not inside of somebody's wrapper
        raise ValueError(
            f"the forward of this {type(network).__name__} is not {PACKAGE}'s: apply TeaCache before others"
        )
    network.enable_teacache = True
    network.num_steps = num_steps
    network.rel_l1_thresh = rel_l1_thresh
    network.computed_steps = computed_steps
    network.coefficients = coefficients
    network.teacache = TeaCacheState()
    network.teacache_scheduler = scheduler
    if scheduler is not None:
        watch(scheduler, network)
    return model


def remove_teacache(model):
    """Restore the stock forward and the scheduler, and free the cache. Returns `model`."""
    network = find_network(model)
    for scheduler in (vars(network).get("teacache_scheduler"), getattr(model, "scheduler", None)):
        if scheduler is not None:
            unwatch(scheduler)
    slot = find_forward(network, is_teacache)
    network.__class__ = stock_class(network)
    if slot == (network, "forward"):
        vars(network).pop("forward", None)
    elif slot is not None:
        setattr(*slot, MethodType(type(network).forward, network))
    is_wrapped = slot is None and {"enable_teacache", "forward"} <= set(vars(network))  # somebody's wrapper has ours
    for name in ATTRIBUTES:
        vars(network).pop(name, None)
    if is_wrapped or getattr(network, "enable_teacache", False):  # or its class has it on
        network.enable_teacache = False
    return model


@functools.cache
def cached(stock):
    """A network's class, with `teacache_forward`. It has the stock name, and copies and pickles keep it."""
    return stand_in(stock, forward=teacache_forward, __reduce_ex__=reduce_network)


def reduce_network(network, protocol):
    return new_network, (stock_class(network),), vars(network)


def new_network(stock):
    return object.__new__(cached(stock))


class BoundForward(functools.partial):
    """`teacache_forward` of one network, within hooks. Unlike a bound method it can be pickled."""

    def __get__(self, instance, owner=None):
        return self  # others, who take it for a bound method, bind it again


def find_network(model):
    """The network of a pipeline, or the network itself. Its forward has the parameters of ours."""
    network = model if isinstance(model, torch.nn.Module) else getattr(model, NETWORK, None)
    is_module = isinstance(network, torch.nn.Module)
    theirs = inspect.signature(type(network).forward).parameters if is_module else ()
    if not set(inspect.signature(teacache_forward).parameters) <= set(theirs):
        name = type(model if network is None else network).__name__
        raise ValueError(
            f"TeaCache is for a pipeline or its {NETWORK}, as it was loaded, not for {name} "
            "(compile the blocks one by one, and apply TeaCache before the network is wrapped)"
        )
    return network


def find_forward(module, is_wanted):
    """Where a forward is, as (object, attribute): hooks of accelerate and diffusers put theirs around it. Or None."""
    references = getattr(vars(module).get("_diffusers_hook"), "_fn_refs", [])
    slots = [(module, "_old_forward"), *itertools.product(references, ("original_forward", "forward"))]
    slots.append((module, "forward"))
    return next((slot for slot in slots if is_wanted(getattr(*slot, None))), None)


def is_stock(forward):
    """Whether it is a forward that ours replaces: of the stock package, or ours on the class."""
    function = getattr(forward, "__func__", None)  # bound to its module
    return function is not None and (is_from(function, PACKAGE) or is_teacache(forward))


def is_teacache(forward):
    """By name: this module may have been reloaded, or imported under two names."""
    function = getattr(forward, "func", None) or getattr(forward, "__func__", None)
    return getattr(function, "__name__", None) == teacache_forward.__name__


def is_from(function, package):
    """Whether a package defines a function. `functools.wraps` copies its names, but not its globals."""
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] == package


def check_plan(plan, num_steps=None):
    """Raise ValueError unless a list of computed steps goes from the first to the last step."""
    if not len(plan) or list(plan) != sorted(set(plan)) or plan[0] != 0 or any(step % 1 for step in plan):
        raise ValueError(f"a list of computed_steps must be rising whole numbers from 0, not {plan}")
    if num_steps is not None and plan[-1] != num_steps - 1:
        raise ValueError(f"computed_steps is a list for {plan[-1] + 1} steps, not for {num_steps}")


def check_settings(num_steps=None, rel_l1_thresh=None, computed_steps=None, coefficients=None):
    """Raise ValueError for settings that cannot work. Those that are not given are the constants."""
    if rel_l1_thresh is not None and computed_steps is not None:
        raise ValueError("give rel_l1_thresh or computed_steps, not both")
    if rel_l1_thresh is None and computed_steps is None:
        rel_l1_thresh, computed_steps = REL_L1_THRESH, COMPUTED_STEPS
    if num_steps is not None and (not 1 <= num_steps < math.inf or num_steps % 1):
        raise ValueError(f"the number of steps must be a whole number of at least 1, not {num_steps}")
    if rel_l1_thresh is not None and not 0 <= rel_l1_thresh < math.inf:
        raise ValueError(f"rel_l1_thresh must be a number of at least 0, not {rel_l1_thresh}; 0 skips nothing")
    if np.ndim(computed_steps) == 1:
        check_plan(computed_steps, num_steps)
    elif computed_steps is not None:
        least, most = min(2, num_steps or 2), num_steps or math.inf
        if not least <= computed_steps <= most or computed_steps % 1:
            raise ValueError(f"computed_steps must be a whole number from {least} to {most}, not {computed_steps}")
    if coefficients is not None and not (len(coefficients) and np.isfinite(coefficients).all()):
        raise ValueError(f"coefficients must be finite numbers, not {coefficients}")


# ------------------------------------------------------------------------------
# Running Lumina-Image-2.0: arguments, loading, one image
# ------------------------------------------------------------------------------

OUTPUT = Path("teacache_lumina2_output.png")
COMFYUI_PREFIX = "model.diffusion_model."  # of the names of weights in single files for ComfyUI


def utf8_text(text):
    """The type of a prompt. Raises ValueError for what a terminal of another encoding passes."""
    text.encode()
    return text


def number_or_list(text):
    """The type of the option for computed steps: 15, or [0, 4, 9] of "0,4,9"."""
    numbers = [int(number) for number in text.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


def build_parser():
    """The flags. Other tools take them from here, and add or replace some."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, conflict_handler="resolve")
    add = parser.add_argument
    add("--model", help=f"folder or Hub name; default {MODEL} with a CUDA GPU, else the bundled emoji model")
    add("--transformer", metavar="FILE", help="single-file checkpoint of the transformer, such as Neta Lumina")
    add("--prompt", type=utf8_text, default=PROMPT)
    add("--negative-prompt", type=utf8_text, default=NEGATIVE_PROMPT)
    add("--rel-l1-thresh", type=float, help=f"default {REL_L1_THRESH}; 0 skips nothing")
    number = "instead of a threshold: number of computed steps, or a list such as 0,4,9,15,20,25,29"
    add("--computed-steps", type=number_or_list, help=number)
    add("--num-inference-steps", type=int, default=NUM_INFERENCE_STEPS)
    add("--height", type=int, default=HEIGHT)
    add("--width", type=int, default=WIDTH)
    add("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    add("--cfg-trunc-ratio", type=float, default=CFG_TRUNC_RATIO)
    add("--seed", type=int, default=SEED)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default bfloat16 on a GPU, float32 on a CPU")
    add("--offload", choices=["none", "model", "sequential"], default="none", help="keep the weights in CPU memory")
    add("--output", type=Path, help=f"a new file; default {OUTPUT}, or the next free number")
    return parser


def say(text):
    """Print it, with question marks for letters that the terminal lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a notebook's stdout may have none, or be None
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def one_line(error):
    """The kind of an error, and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextlib.contextmanager
def one_line_errors(parser):
    """What goes wrong within, or Ctrl-C, ends the program with one line, whether it was seen in advance or not."""
    try:
        yield
    except Exception as error:
        parser.error(one_line(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def check_args(args):
    """Fill in setting, model, device and dtype. Raise ValueError for what is seen to be wrong without loading."""
    if args.rel_l1_thresh is None and args.computed_steps is None:
        args.computed_steps = COMPUTED_STEPS
        args.rel_l1_thresh = REL_L1_THRESH if COMPUTED_STEPS is None else None
    check_settings(args.num_inference_steps, args.rel_l1_thresh, args.computed_steps)
    for size in (args.height, args.width):
        if size is not None and (size < 16 or size % 16):
            raise ValueError(f"--height and --width must be multiples of 16, not {size}")
    check_seed(args.seed)
    file = args.transformer or ""
    if file.endswith(".gguf"):
        own_code = "load it in your own code with diffusers' GGUFQuantizationConfig, then apply_teacache(pipeline)"
        raise ValueError(f"--transformer {file} is a GGUF file: give a .safetensors file, or {own_code}")
    if file and "://" not in file and not Path(file).is_file():
        raise ValueError(f"--transformer {file}: no such file")
    args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.model is None and args.device == "cuda":
        args.model = MODEL
    elif args.model is None:
        if not BUNDLED_MODEL.is_dir():
            raise ValueError(f"no CUDA GPU for the real model, no bundled one: give --model, {MODEL} or a small one")
        print(f"No CUDA GPU: using the bundled emoji model. For the real one: --model {MODEL}")
        args.model, args.device = str(BUNDLED_MODEL), "cpu"
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")


def check_seed(seed):
    """Raise ValueError for what torch does not take."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"--seed must be a number of 64 bits, not {seed}")


def check_output(picture, *beside):
    """Raise ValueError or OSError if the picture, or a file beside it, exists or cannot be written."""
    if picture.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--output {picture} must end in .png, .jpg, .jpeg or .webp")
    for path in (picture, *beside):
        path.open("x").close()
        path.unlink()


def free_name(path):
    """output.png, or output_2.png where that exists, and so on."""
    names = itertools.chain([path], (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


@contextlib.contextmanager
def complete_file(path):
    """`with complete_file(path) as draft`: what is written to `draft` becomes `path`, or is removed after an error."""
    draft = path.with_name(f".{path.stem[-40:]}.{secrets.token_hex(8)}.draft{path.suffix}")  # nobody else's
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load_transformer(file, model, **options):
    """The transformer of a single file. One for ComfyUI may hold other models too, and has a prefix to its names."""
    weights = load_single_file_checkpoint(file)
    prefixed = {name.removeprefix(COMFYUI_PREFIX): weights[name] for name in weights if name.startswith(COMFYUI_PREFIX)}
    of = {"config": model, "subfolder": "transformer"}
    try:
        return Lumina2Transformer2DModel.from_single_file(prefixed or weights, **of, **options)
    except (ValueError, RuntimeError, KeyError) as error:  # such as "no data" of a weight that the file lacks
        raise ValueError(f"--transformer {file} does not fit --model {model}: {error}") from error


def load_pipeline(args):
    warnings.simplefilter("ignore", FutureWarning)  # of diffusers, whose oldest version knows only torch_dtype
    kind = Lumina2Pipeline.load_config(args.model)["_class_name"]
    # others may load for minutes, as they have parts of the same names; a list names code of the model's own
    if not str(kind).startswith("Lumina2"):
        raise ValueError(f"{args.model} is a {kind}: give a Lumina2Pipeline, such as {MODEL}")
    options = {"torch_dtype": getattr(torch, args.dtype)}
    if args.transformer:
        options["transformer"] = load_transformer(args.transformer, args.model, **options)
    pipeline = Lumina2Pipeline.from_pretrained(args.model, **options)
    # Recipes:
    # pipeline.load_lora_weights("style.safetensors")
    # for block in pipeline.transformer.layers: block.compile()
    # pipeline.vae.enable_slicing()  # decodes a batch image by image
    # pipeline.vae.enable_tiling(); pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 512, 64
    if args.offload == "none" or args.device == "cpu":  # there the weights are in CPU memory
        return pipeline.to(args.device)
    getattr(pipeline, f"enable_{args.offload}_cpu_offload")(device=args.device)
    return pipeline


def generate(pipeline, args):
    """Returns a PIL image, the seconds that it took, and the schedule: True for each computed step."""
    apply_teacache(pipeline, rel_l1_thresh=args.rel_l1_thresh, computed_steps=args.computed_steps)
    names = "prompt negative_prompt num_inference_steps height width guidance_scale cfg_trunc_ratio".split()
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: equal noise on every device
    began = time.perf_counter()
    image = pipeline(**{name: getattr(args, name) for name in names}, generator=generator).images[0]
    return image, time.perf_counter() - began, pipeline.transformer.teacache.schedule


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        args.output = args.output or free_name(OUTPUT)
        check_output(args.output)
        check_args(args)
        pipeline = load_pipeline(args)
        image, seconds, schedule = generate(pipeline, args)
        output = free_name(args.output)  # another run may have taken the name
        with complete_file(output) as draft:
            image.save(draft)
    name = "rel_l1_thresh" if args.computed_steps is None else "computed_steps"
    setting = f"{name} {getattr(args, name)}"
    if False in schedule and is_corrected(pipeline.scheduler):
        setting += ", corrected"
    steps = f"{sum(schedule)} of {len(schedule)} steps computed ({setting})"
    say(f"saved {output}: {seconds:.1f} s, {steps}, seed {args.seed}")


if __name__ == "__main__":
    main()
