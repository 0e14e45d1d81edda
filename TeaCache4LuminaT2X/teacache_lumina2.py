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

The first and the last step are always computed. With a pipeline, the latents are corrected afterwards for what skipped
steps got wrong, as soon as the next computed step shows it: see Corrector.

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
import time
import warnings
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

# ------------------------------------------------------------------------------
REL_L1_THRESH = 0.3  # 0: original | 0.1: 1.05x | 0.2: 1.15x | 0.3: 1.25x  (original authors, 4070 laptop, 1024x1536)
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

# Rescaling polynomials, highest power first (ali-vilab/TeaCache, pull requests 70 and 76).
# v1 was fitted on Lumina-Next; v2 was found for Lumina-Image-2.0 by a search on LPIPS.
# They hold for small changes only: v1 falls below zero at a change of 0.279, v2 at 1.207. Larger changes are computed.
COEFFICIENTS_V1 = [393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344]
COEFFICIENTS_V2 = [225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552]
COEFFICIENTS = COEFFICIENTS_V1

CORRECT = True  # with a pipeline: correct the latents afterwards for what skipped steps got wrong, see Corrector
# ------------------------------------------------------------------------------


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
    instance. With gradients, at threshold 0 or without `enable_teacache`, every step is computed, as in stock.
    """
    lora_scale = (attention_kwargs or {}).get("scale", 1.0)
    if USE_PEFT_BACKEND and lora_scale != 1.0:  # this function again, with scaled LoRA layers
        scale_lora_layers(self, lora_scale)
        try:
            inputs = hidden_states, timestep, encoder_hidden_states, encoder_attention_mask
            return teacache_forward(self, *inputs, return_dict=return_dict)
        finally:
            unscale_lora_layers(self, lora_scale)

    # ---- TeaCache: a step that is skipped by extrapolation runs no part of the network ----
    sigma = 1 - timestep.flatten()[0].float()  # one for the whole batch
    cache = find_step(self, sigma, hidden_states)
    branch = cache.begin_call(hidden_states, encoder_hidden_states, encoder_attention_mask)
    if cache.plan is not None and not cache.should_calc(branch):
        output = extrapolate(branch.outputs, cache.sigma)
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
    if cache.by_threshold and cache.calls == 1:
        cache.accumulate(branch, modulated_input(self.layers[0], hidden_states, temb))
    if cache.should_calc(branch):
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
        residual = branch.previous_residual
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

    cache.keep(branch, output, residual)  # TeaCache: for the steps that are skipped
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def modulated_input(block, hidden_states, temb):
    """`norm1` of a block, which gives the input of its attention.

    It takes the place of the block's forward for one call: with offloading, the hooks around it load the weights.
    """
    slot = find_forward(block, is_stock)
    if slot is None or not hasattr(block, "norm1"):
        raise ValueError(f"the first block is a {type(block).__name__}: use computed_steps, or remove the other cache")
    stock = getattr(*slot)
    setattr(*slot, lambda hidden_states, temb: block.norm1(hidden_states, temb)[0])
    try:
        return block(hidden_states, temb)
    finally:
        setattr(*slot, stock)


# ---- which step a call belongs to --------------------------------------------


def find_step(model, sigma, latents):
    """The state of the running generation, at the step of this call. sigma: a tensor, 1 is noise, 0 the image."""
    cache, scheduler = vars(model).get("teacache") or TeaCacheState(), vars(model).get("teacache_scheduler")
    if torch.is_grad_enabled():  # nothing is reused
        cache = TeaCacheState()
        cache.begin_step(0, -math.inf)
    elif scheduler is None:
        cache = count_step(model, cache, sigma.item())
    else:
        cache = follow(model, cache, scheduler, sigma, latents) or compute_all(cache, scheduler.timesteps, sigma.item())
    is_on = getattr(model, "enable_teacache", False) and (cache.plan is not None or cache.rel_l1_thresh > 0)
    cache.is_on = is_on and not cache.is_last_step
    model.teacache = cache
    return cache


def count_step(model, cache, sigma):
    """A network alone: a generation begins where sigma rises or a call has not finished, and a step where it falls."""
    if sigma > cache.sigma or cache.was_interrupted or len(cache.sigmas) == 1:
        if getattr(model, "enable_teacache", False) and cache.sigmas and len(cache.schedule) != len(cache.sigmas):
            ran = f"the last generation ran {len(cache.schedule)} of {len(cache.sigmas)} steps (or was stopped)"
            warnings.warn(f"TeaCache: {ran}: set num_steps to num_inference_steps", stacklevel=4)
        num_steps = int(getattr(model, "num_steps", None) or NUM_INFERENCE_STEPS)
        cache = new_generation(model, [1 - step / num_steps for step in range(num_steps)])  # as if evenly spaced
    if sigma != cache.sigma:
        cache.begin_step(cache.step + 1, sigma)
    return cache


def follow(model, cache, scheduler, sigma, latents):
    """With a scheduler: a generation begins where the timesteps are set, and a step where step_index has risen by one.

    Whatever else happens begins a generation too, and its first step is computed: strange loops become slow, never
    wrong. Returns None if the scheduler does not drive this loop.
    """
    timesteps, index = scheduler.timesteps, scheduler.step_index  # set_timesteps makes a new tensor; None: no step yet
    is_known = cache.timesteps is timesteps
    has_ended = index is not None and index >= len(timesteps)
    if has_ended or (is_known and not cache.sigmas):
        return None
    if is_known and index == cache.step + 1 and cache.sigmas[index] <= cache.sigma:
        cache.begin_step(index, cache.sigmas[index], index)
    elif not is_known or index != cache.index:
        sigmas = (timesteps.cpu().double() / scheduler.config.num_train_timesteps).tolist()
        step = np.abs(np.array(sigmas) - sigma.item()).argmin().item() if index is None else index
        cache = new_generation(model, sigmas, step, timesteps)
        cache.begin_step(step, sigmas[step], index)
        watch(scheduler, cache)
    # else another call of the running step
    is_driven = latents is cache.latents or abs(sigma.item() - cache.sigma) < 0.002  # item() waits for the GPU
    return cache if is_driven else None


def compute_all(cache, timesteps, sigma):
    """A loop that the scheduler does not drive, until its timesteps are set again: a warning for each image."""
    if cache.timesteps is not timesteps or cache.sigmas or sigma > cache.sigma:
        why = "the scheduler that it was applied with does not drive this loop"
        warnings.warn(f"TeaCache: {why}: all steps are computed; apply it to the pipeline again", stacklevel=4)
        cache = TeaCacheState(timesteps=timesteps)
    if sigma != cache.sigma:
        cache.begin_step(cache.step + 1, sigma)
    return cache


def new_generation(model, sigmas, first=0, timesteps=None):
    """With the settings of the model, else of its class, else the constants. first: the step that it begins with."""
    rel_l1_thresh, plan = getattr(model, "rel_l1_thresh", None), getattr(model, "computed_steps", None)
    if rel_l1_thresh is None and plan is None:
        rel_l1_thresh, plan = REL_L1_THRESH, COMPUTED_STEPS
    if plan is not None and np.ndim(plan) == 0:
        cache = TeaCacheState(sigmas, [*range(first + 1), len(sigmas) - 1], 0.0, None, timesteps)
        cache.first, cache.count = first, int(plan)
        return cache
    elif plan is not None:
        check_plan(plan, len(sigmas))
    coefficients = getattr(model, "coefficients", None)
    coefficients = COEFFICIENTS if coefficients is None else coefficients
    return TeaCacheState(sigmas, plan, rel_l1_thresh or 0.0, coefficients, timesteps)


# ---- what is kept ------------------------------------------------------------


class Branch:
    """The cache of one call in a step. Guidance, say, makes two calls: with the prompt, and without."""

    def __init__(self, layout, conditioning):
        self.layout, self.conditioning = layout, conditioning
        self.previous_modulated_input = None  # with a threshold: of the last step
        self.previous_residual = None  # with a threshold: output minus input of the blocks at the last computed step
        self.outputs = []  # with computed_steps: (sigma, output) of the last three computed steps

    @property
    def is_empty(self):
        return self.previous_residual is None and not self.outputs

    def fits(self, layout, conditioning):
        """Whether a call is the same as in the last step. Tensors that were made anew are compared by value."""
        return self.layout == layout and all(map(is_same, self.conditioning, conditioning))


def is_same(a, b):
    if a is b or not (torch.is_tensor(a) and torch.is_tensor(b)):
        return a is b
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


class TeaCacheState:
    """One generation of a network: `print(model.teacache)` shows which steps were computed."""

    def __init__(self, sigmas=(), plan=None, rel_l1_thresh=0.0, coefficients=None, timesteps=None):
        self.sigmas = sigmas  # of all steps: 1 is noise, 0 the image
        self.plan = plan  # with computed_steps: which they are
        self.rel_l1_thresh = rel_l1_thresh
        self.coefficients = coefficients
        self.timesteps = timesteps  # the scheduler's own tensor; None: a network alone
        self.is_on = False  # whether this call may be skipped, and keeps what later ones reuse
        self.step, self.sigma = -1, -math.inf  # the running step: none yet
        self.index = None  # the scheduler's step_index when it was last seen
        self.latents = None  # that the scheduler has returned
        self.schedule = []  # one entry a step: whether it is computed
        self.calls = 0  # of the network in the running step
        self.branches, self.branches_before = [], []  # of the calls in the running step, and in the step before
        self.accumulated_rel_l1_distance = 0.0  # since the last computed step
        self.corrector = Corrector()

    def __repr__(self):
        marks = "".join("X" if computed else "." for computed in self.schedule)
        return f"{self.schedule.count(True)} of {len(self.schedule)} steps computed: {marks}"

    @property
    def is_last_step(self):
        return self.step >= len(self.sigmas) - 1

    @property
    def next_sigma(self):
        return 0.0 if self.is_last_step else self.sigmas[self.step + 1]

    @property
    def by_threshold(self):
        return self.is_on and self.plan is None

    @property
    def was_interrupted(self):
        """Whether a call of the running step has not finished: it has left nothing to reuse."""
        return any(branch.is_empty for branch in self.branches)

    def begin_step(self, step, sigma, index=None):
        self.step, self.sigma, self.index = step, sigma, index
        self.branches_before, self.branches, self.calls = self.branches, [], 0
        if (
            getattr(self, "count", None)
            and step == self.first + 1
            and self.branches_before
            and not any(branch.is_empty for branch in self.branches_before)
        ):
            q = decided([branch.outputs[-1][1] for branch in self.branches_before])
            self.plan = [self.first + k for k in choose_steps(self.sigmas[self.first :], self.count, q)]
        if self.is_last_step:
            self.branches_before = []  # nothing is reused any more
        self.schedule.append(self.plan is None or step in self.plan)  # unless begin_call or accumulate change it

    def begin_call(self, latents, *conditioning):
        """The branch of this call: that of the same place in the step before, or an empty one if it is another call."""
        layout = latents.shape, latents.dtype, latents.device
        branch = self.branches_before[self.calls] if self.is_on and self.calls < len(self.branches_before) else None
        if branch is None or not branch.fits(layout, conditioning):
            branch = Branch(layout, conditioning)
        self.calls += 1
        if self.calls == 1 and branch.is_empty:
            self.schedule[-1] = True
        if self.is_on:
            self.branches.append(branch)
        return branch

    def should_calc(self, branch):
        """Whether this call runs the blocks: its step is computed, or it has nothing to reuse."""
        return branch.is_empty or self.schedule[-1]

    def accumulate(self, branch, modulated_input):
        """TeaCache's rule, in the first call of a step: compute when the accumulated change reaches the threshold."""
        if branch.previous_modulated_input is not None:
            change = relative_l1(modulated_input, branch.previous_modulated_input)
            self.accumulated_rel_l1_distance += rescale(change, self.coefficients)
            self.schedule[-1] = not self.accumulated_rel_l1_distance < self.rel_l1_thresh  # NaN: compute
        if self.schedule[-1]:
            self.accumulated_rel_l1_distance = 0.0
        branch.previous_modulated_input = modulated_input

    def keep(self, branch, output, residual):
        """What skipped steps will use. At the end of a call, so that one that fails leaves nothing new."""
        if self.by_threshold:
            branch.previous_residual = residual
        elif self.is_on:
            earlier = [(s, v) for s, v in branch.outputs if s > self.sigma]  # Heun's scheduler, say, repeats a sigma
            branch.outputs = [*earlier[-2:], (self.sigma, output.clone())]  # the caller may write into its output


# ---- which steps are computed, and what the others use -----------------------


def relative_l1(new, old):
    """mean |new - old| / mean |old|, accumulated in float32."""
    return ((new - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)).item()


def rescale(change, coefficients):
    """The polynomial of a change. Where it is negative above a change of 0.1, it was not fitted: infinity.

    Small negative values are the fit's own, and are subtracted as published.
    """
    rescaled = np.polyval(coefficients, change)
    return rescaled if rescaled >= 0 or change < 0.1 else math.inf


def decided(outputs):
    """q, the share of the image that the first step knows already, 0 to 1. outputs: of its calls, each (batch, ...).

    A velocity is image minus noise. Of the image, the network predicts what the prompt (or a reference) decides, and the
    noise has variance 1: q is the mean square of the output, minus 1. It is 1 where all is decided, as latents have
    variance 1 too. The call that knows most counts (with the prompt), and of a batch the image that is most open.
    """
    squares = torch.stack([output.float().square().flatten(1).mean(1).min() for output in outputs])
    return min(max(squares.max().item() - 1, 0.0), 1.0)


def choose_steps(sigmas, count, q=1.0):
    """`count` of the steps with these sigmas, the first and the last among them, with the least expected error.

    The error expected of a skipped step is its length times the square of its distance from the last computed one.
    Both are measured along 1 - s / (s + t (1 - s)), evenly spaced steps of a scheduler with shift t. Where the first step
    knows the image, t is 1, which is sigma. Where much is open, the first steps decide it, and t is 3:

        t = 3 ** (2 - 5 q), kept between 1 and 3        q: see `decided`

    Dynamic programming finds the least sum.
    """
    num_steps = len(sigmas)
    s = np.array(sigmas) / (sigmas[0] or 1)  # 1 at the first step, 0 at the image
    t = 3 ** min(max(2 - 5 * q, 0), 1)
    position = num_steps * (1 - s / (s + t * (1 - s)))  # in mean steps
    length = np.diff(position, append=num_steps)
    errors = np.triu(length * (position - position[:, None]) ** 2)  # [j, m]: of skipping m, if j was computed last
    costs = np.cumsum(errors, axis=1) - errors  # [j, k]: of skipping all steps between j and k
    costs[:, -1] *= 2  # Corrector undoes only half of what is skipped just before the last step
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
    """v(s) of the formula at the top, at most two gaps far. outputs: (s, v) of the last computed steps, at most three."""
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


# ---- what is corrected -------------------------------------------------------


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

    The idea is that of the corrector of a multistep method, as in UniPC (arXiv 2302.04867), and for caches in PrediT
    (arXiv 2602.18093). Here it acts on the latents, after guidance, however the steps were skipped.
    """

    def __init__(self):
        self.computed = []  # (sigma, velocity) of the last two computed steps
        self.skipped = []  # (sigma, next sigma, velocity) of the steps skipped since then
        self.kind = None  # number of calls and shape: where it changes, guidance has ended, say

    def correction(self, velocity, sigma, next_sigma, is_computed, calls):
        """What to add to the latents after this step: the formula above, 0 after a skipped step."""
        if self.kind != (calls, velocity.shape):
            self.computed, self.skipped, self.kind = [], [], (calls, velocity.shape)
        if not is_computed:
            self.skipped.append((sigma, next_sigma, velocity))
            return 0.0
        self.computed = [(s, v) for s, v in self.computed if s > sigma]  # a scheduler may repeat a sigma
        total = 0.0
        if self.computed and sigma > 0:
            *earlier, last = self.computed
            far = 0.45 * (last[0] - sigma)  # what is nearer to the last one says little about the curve across the gap
            points = [*(point for point in earlier if point[0] - last[0] >= far), last, (sigma, velocity)]
            for s, next_s, used in self.skipped:
                total = total + (next_s - s) * (interpolate(points, s) - used)
            total = total * (sigma / (2 * sigma - min(sigma, next_sigma)))
        self.computed, self.skipped = [*self.computed[-1:], (sigma, velocity)], []
        return total


def interpolate(points, s):
    """The polynomial through points (sigma, velocity) at s, in Lagrange's form."""
    total = 0.0
    for i, (a, velocity) in enumerate(points):
        total = total + velocity * math.prod((s - b) / (a - b) for j, (b, _) in enumerate(points) if j != i)
    return total


class CorrectedEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """The class of a pipeline's scheduler while TeaCache is applied: after a step, the latents are corrected.

    It goes by the stock name, and what is copied, pickled or saved is a stock scheduler.
    """

    @functools.wraps(FlowMatchEulerDiscreteScheduler.step)  # pipelines inspect its parameters
    def step(self, model_output, *args, **kwargs):
        # super() fails after removal
        result = FlowMatchEulerDiscreteScheduler.step(self, model_output, *args, **kwargs)
        cache = vars(self).get("teacache")
        is_running = cache is not None and cache.timesteps is self.timesteps and cache.step + 1 == self.step_index
        if not is_running or cache.index == self.step_index:
            return result  # the network was not called for it, or it is repeated
        cache.index, latents = self.step_index, result[0]
        if is_corrected(self):
            velocity, is_computed = model_output.to(torch.float32, copy=True), cache.schedule[-1]
            correction = cache.corrector.correction(velocity, cache.sigma, cache.next_sigma, is_computed, cache.calls)
            latents = (latents + correction).to(latents.dtype)
        cache.latents = latents
        if cache.is_last_step:
            cache.corrector, cache.latents = Corrector(), None  # frees the tensors
        return (latents, *result[1:]) if isinstance(result, tuple) else type(result)(prev_sample=latents)

    def __reduce_ex__(self, protocol):
        state = {name: value for name, value in vars(self).items() if name != "teacache"}
        return object.__new__, (FlowMatchEulerDiscreteScheduler,), state


CorrectedEulerScheduler.__name__ = FlowMatchEulerDiscreteScheduler.__name__  # save_pretrained writes these two
CorrectedEulerScheduler.__module__ = FlowMatchEulerDiscreteScheduler.__module__


def is_corrected(scheduler):
    is_euler = type(scheduler) is CorrectedEulerScheduler and not scheduler.config.get("stochastic_sampling")
    return CORRECT and is_euler


def watch(scheduler, cache):
    """Have Euler's scheduler correct the latents of this generation. Others stay as they are."""
    if type(scheduler).__name__ == FlowMatchEulerDiscreteScheduler.__name__:
        scheduler.__class__ = CorrectedEulerScheduler
        scheduler.teacache = cache


# ---- switching on and off ----------------------------------------------------

ATTRIBUTES = "enable_teacache num_steps rel_l1_thresh computed_steps coefficients teacache teacache_scheduler".split()


def apply_teacache(
    model, num_steps=None, rel_l1_thresh=None, coefficients=None, *, computed_steps=None, scheduler=None, tolerance=None
):
    """Switch TeaCache on for a pipeline, or for its network alone, before or after offloading is enabled.

    model: with a pipeline, its scheduler tells where a generation begins and which step is running, and skipped steps
        are corrected, see Corrector. When another scheduler is put in, apply TeaCache again.
    num_steps: of a generation of a network alone, which begins where the timestep starts over.
    rel_l1_thresh, computed_steps: at most one; the default is the constants. computed_steps is a number, or a list of
        steps, numbered as the scheduler's timesteps. Changed attributes hold from the next generation on.
    coefficients: of the polynomial for rel_l1_thresh, highest power first.
    scheduler: for a network alone, in a loop of your own that calls its set_timesteps and step.
    tolerance: is gone.

    A network draws one image (or batch) at a time; threads need a network each. The calls of a step are known by their
    order: it does not notice calls in changing order, calls on other latents (by a callback, or to warm up within the
    first step), and prompts that are changed in place. Where a prompt is replaced, the step is computed. After
    `del pipeline`, `gc.collect()` frees the memory.
    Returns `model`. Raises ValueError for settings or networks that cannot work.
    """
    if tolerance is not None:
        raise ValueError("there is no tolerance any more: give computed_steps, say half of the steps")
    network, scheduler = find_network(model), scheduler or getattr(model, "scheduler", None)
    is_alone = network is model and scheduler is None
    if not is_alone and not hasattr(scheduler, "step_index"):
        name = type(model if scheduler is None else scheduler).__name__
        raise ValueError(f"this {name} does not count steps: give the {NETWORK} alone, with num_steps")
    steps = NUM_INFERENCE_STEPS if is_alone and num_steps is None else num_steps
    check_settings(steps, rel_l1_thresh, computed_steps, coefficients)
    remove_teacache(model)
    slot = find_forward(network, is_stock)
    if slot is not None:
        setattr(*slot, BoundForward(teacache_forward, network))
    elif "enable_teacache" not in vars(network):  # ours is not inside of somebody's wrapper
        raise ValueError(f"the forward of this {type(network).__name__} was replaced: apply TeaCache before that")
    network.enable_teacache = True
    network.num_steps = num_steps
    network.rel_l1_thresh = rel_l1_thresh
    network.computed_steps = computed_steps
    network.coefficients = coefficients
    network.teacache = TeaCacheState()
    network.teacache_scheduler = scheduler
    return model


def remove_teacache(model):
    """Restore the stock forward and the scheduler, and free the cache. Returns `model`."""
    network = find_network(model)
    slot = find_forward(network, is_teacache)
    if slot == (network, "forward"):
        del network.forward  # the class has it
    elif slot is not None:
        setattr(*slot, MethodType(type(network).forward, network))
    is_wrapped = slot is None and {"enable_teacache", "forward"} <= set(vars(network))  # somebody's wrapper has ours
    scheduler = vars(network).get("teacache_scheduler")
    if scheduler is not None and vars(scheduler).pop("teacache", None) is not None:
        scheduler.__class__ = FlowMatchEulerDiscreteScheduler
    for name in ATTRIBUTES:
        vars(network).pop(name, None)
    if is_wrapped or getattr(network, "enable_teacache", False):  # or its class has it on
        network.enable_teacache = False
    return model


class BoundForward(functools.partial):
    """`teacache_forward` of one network. Unlike a bound method it can be pickled."""

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
    """Whether it is the forward of its module's class, bound to the module."""
    module = getattr(forward, "__self__", None)
    return module is not None and forward.__func__ in [vars(cls).get("forward") for cls in type(module).__mro__]


def is_teacache(forward):
    """By name: this module may have been reloaded, or imported under two names."""
    return getattr(getattr(forward, "func", None), "__name__", None) == teacache_forward.__name__


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


def build_parser():
    """The flags. Other tools take them from here, and add or replace some."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, conflict_handler="resolve")
    add = parser.add_argument
    add("--model", help=f"folder or Hub name; default {MODEL} with a CUDA GPU, else the bundled emoji model")
    add("--transformer", metavar="FILE", help="single-file checkpoint of the transformer, such as Neta Lumina")
    add("--prompt", default=PROMPT)
    add("--negative-prompt", default=NEGATIVE_PROMPT)
    add("--rel-l1-thresh", type=float, help=f"default {REL_L1_THRESH}; 0 skips nothing")
    add("--computed-steps", type=int, help="instead of a threshold: number of computed steps")
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


@contextlib.contextmanager
def one_line_errors(parser):
    """What goes wrong within ends the program with one line, whether it was seen in advance or not."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        parser.error(" ".join(f"{type(error).__name__}: {error}".split()))


def check_args(args):
    """Fill in setting, model, device and dtype. Raise ValueError for what is seen to be wrong without loading."""
    if args.rel_l1_thresh is None and args.computed_steps is None:
        args.computed_steps = COMPUTED_STEPS
        args.rel_l1_thresh = REL_L1_THRESH if COMPUTED_STEPS is None else None
    check_settings(args.num_inference_steps, args.rel_l1_thresh, args.computed_steps)
    for size in (args.height, args.width):
        if size is not None and (size < 16 or size % 16):
            raise ValueError(f"--height and --width must be multiples of 16, not {size}")
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
    draft = path.with_name(f".{path.stem[-40:]}.{os.getpid()}.draft{path.suffix}")
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
    if not kind.startswith("Lumina2"):  # others may load for minutes, as they have parts of the same names
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
    if args.offload == "none":
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
    print(f"saved {output}: {seconds:.1f} s, {steps}, seed {args.seed}")


if __name__ == "__main__":
    main()
