"""TeaCache (arXiv 2411.19108) for Lumina-Image-2.0: training-free caching, in one self-contained script.

A diffusion model draws an image by running one network at 20 to 50 timesteps, and little changes from one step to the
next. TeaCache computes some of the steps and skips the others. One of three settings decides which:

rel_l1_thresh, as published. x is the timestep-modulated input of the first block. Its relative L1 change, rescaled by
a polynomial p, is added up over the steps since the last computed one, and as long as the sum is small,

    sum of p(mean |x[i] - x[i-1]| / mean |x[i-1]|)  <  rel_l1_thresh

the blocks are skipped, and the residual of the last computed step (their output minus their input) is used again.

computed_steps, a number of steps, or tolerance, an expected error. A skipped step runs no part of the network. The
velocity is extrapolated from the last two computed ones, v0 at time t0 and v1 at time t1 (the damping is ours):

    v(t) = v1 + a(g) (v1 - v0)        g = (t - t1) / (t1 - t0)        a(g) = g / (1 + DAMPING g)

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
import threading
import time
import warnings
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

# ------------------------------------------------------------------------------
# The threshold decides as published. The other two are better on the bundled model, and untested on the real weights.
REL_L1_THRESH = 0.3  # 0: original | 0.1: 1.05x | 0.2: 1.15x | 0.3: 1.25x  (original authors, 4070 laptop, 1024x1536)
COMPUTED_STEPS = None  # instead of the threshold: compute exactly this many steps, say 15 of 30
TOLERANCE = None  # instead: compute when the expected error of skipping, summed over time, reaches this, say 0.003
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

DAMPING = 0.25  # of the extrapolation, see extrapolate
CURVATURE = 60.0  # under a tolerance: error of the extrapolation over the square of its gap, before it is measured
LONGEST_GAP = 0.2  # under a tolerance: time without a computed step, of 1 from noise to image
CORRECT = True  # with a pipeline: correct the latents afterwards for what skipped steps got wrong, see Corrector
CAUTION = 4.0  # of the correction: the larger, the less is corrected where the extrapolation errs
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

    Settings are read from the instance, its class or the constants, see `read_settings`; the state is `self.teacache`,
    on the instance. With gradients, at threshold 0 or without `enable_teacache`, every step is computed, as in stock.
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
    conditioning = encoder_hidden_states, encoder_attention_mask
    time = timestep.flatten()[0].item()  # one for the whole batch
    mark = encoder_attention_mask  # one object throughout a generation
    cache, branch = begin_call(self, time, conditioning, mark, hidden_states)
    if cache.extrapolates and not should_calc(cache, branch):
        output = branch.forecast(time)
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
    if cache.needs_modulated_input:
        cache.accumulate(branch, modulated_input(self.layers[0], hidden_states, temb))
    if should_calc(cache, branch):  # with extrapolation always, as it was asked above
        original_hidden_states = hidden_states
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    layer, hidden_states, attention_mask, rotary_emb, temb
                )
            else:
                hidden_states = layer(hidden_states, attention_mask, rotary_emb, temb)
        residual = hidden_states - original_hidden_states if cache.rule is by_threshold else None
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

    cache.end_call(branch, residual, output)  # TeaCache: keep what a skipped step will use
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def modulated_input(block, hidden_states, temb):
    """`norm1` of a block, which gives the input of its attention.

    If the block has hooks, its forward is `norm1` for one call: group offloading, say, loads the weights in its hook.
    """

    def norm1(hidden_states, temb):
        return block.norm1(hidden_states, temb)[0]

    slots = [(holder, name) for holder, name in forward_slots(block) if is_stock(vars(holder).get(name), block)]
    if not slots:
        return norm1(hidden_states, temb)
    holder, name = slots[0]
    stock = getattr(holder, name)
    setattr(holder, name, norm1)
    try:
        return block(hidden_states, temb)
    finally:
        setattr(holder, name, stock)


# ---- which steps are computed ------------------------------------------------


def should_calc(cache, branch, force=False):
    """Whether this call runs the blocks. The first call of a step decides for the whole step.

    A call that has nothing to reuse, or that must not be skipped (`force`), is computed whatever was decided.
    """
    if cache.rule is None:  # every step is computed
        return True
    needed = force or branch.is_empty
    if cache.schedule[-1] is None:  # not decided yet
        cache.schedule[-1] = needed or cache.rule(cache)
        if cache.schedule[-1]:
            cache.accumulated_rel_l1_distance = 0.0
    return needed or cache.schedule[-1]


def by_threshold(cache):
    """TeaCache as published: compute when the accumulated change has reached the threshold."""
    return not cache.accumulated_rel_l1_distance < cache.settings.rel_l1_thresh  # NaN: compute


def by_budget(cache):
    """Compute exactly `computed_steps` steps. They are chosen at the second step, and anew if something has changed."""
    computed = [step for step, was_computed in enumerate(cache.schedule) if was_computed]
    if not computed:  # the first step
        return True
    wanted = int(cache.settings.computed_steps), cache.num_steps
    past = [step for step in cache.plan if step < cache.step]
    if cache.planned_for != wanted or past != computed:  # not chosen yet, other settings, or a step had to be computed
        left = wanted[0] - len(computed)
        cache.plan = computed + spread(cache.all_timesteps(), computed[-1], cache.step, left)
        cache.planned_for = wanted
    return cache.step in cache.plan


def by_plan(cache):
    """Compute the steps of a list."""
    return cache.step in cache.settings.computed_steps


def by_tolerance(cache):
    """Compute when the errors expected of the steps since the last computed one add up to the tolerance.

    The error of the extrapolation is taken as `cache.curvature` times the square of the time since then.
    """
    computed = [t for t, was_computed in zip(cache.timesteps, cache.schedule) if was_computed]
    if len(computed) < 2 or cache.timesteps[-1] - computed[-1] > LONGEST_GAP:
        return True
    expected_error = 0.0
    for previous, t in zip(cache.timesteps, cache.timesteps[1:]):
        if t > computed[-1]:
            expected_error += (t - previous) * cache.curvature * (t - computed[-1]) ** 2
    return not expected_error < cache.settings.tolerance


def spread(timesteps, last_computed, step, count):
    """The `count` steps to compute from `step` on, the last one among them, with the least expected error.

    The error expected of a skipped step is its length times the square of its distance from the last computed step, as
    in by_tolerance. Distance is three quarters time and one quarter number of steps: a scheduler takes short steps where
    its model needs them. Dynamic programming finds the least sum.
    """
    num_steps = len(timesteps)
    count = min(count, num_steps - step)
    if count < 1:
        return []
    times = np.clip(np.nan_to_num(timesteps), 0, 1)
    times = (times - times[0]) / ((1 - times[0]) or 1)
    position = 0.75 * num_steps * times + 0.25 * np.arange(num_steps)  # in mean steps
    position = position[last_computed:]  # from here on, index 0 is the last computed step
    length = np.diff(position, append=num_steps)
    distance = np.triu(position - position[:, None])  # [j, m]: of step m from step j
    errors = length * distance**2  # [j, m]: of skipping m, if j was the last computed step
    costs = np.cumsum(errors, axis=1) - errors  # [j, k]: of skipping all steps between j and k
    costs = np.rint(100 * costs)  # whole numbers: rounding must not decide between equal sums
    costs[np.tril_indices(len(position))] = math.inf  # k comes after j
    costs[0, : step - last_computed] = math.inf  # a past step cannot be computed any more
    least, previous = costs[0], []  # [k]: least cost if k is computed; the computed step before k
    for _ in range(count - 1):
        totals = least[:, None] + costs
        least = totals.min(axis=0)
        previous.append(totals.argmin(axis=0))
    chosen = [len(position) - 1]
    for before in reversed(previous):
        chosen.append(before[chosen[-1]])
    return [last_computed + int(k) for k in reversed(chosen)]


def shifted_timesteps(timesteps, num_steps):
    """All timesteps of a generation, estimated from those so far as a flow-matching scheduler spaces them.

    Where the share g of the steps is left, sigma is shift g / (1 + (shift - 1) g), times the first sigma. The current
    timestep tells the shift. Other spacings (Karras, beta) are estimated badly.
    """
    done = len(timesteps) - 1
    left = 1 - done / num_steps
    if left <= 0:  # none are to come
        return list(timesteps)
    first_sigma = (1 - timesteps[0]) or 1.0
    sigma = (1 - timesteps[-1]) / first_sigma
    shift = sigma * (1 - left) / (left * (1 - sigma)) if 0 < sigma < 1 else 1.0
    g = 1 - np.arange(done + 1, num_steps) / num_steps
    sigmas = first_sigma * shift * g / (1 + (shift - 1) * g)
    return [*timesteps, *(1 - sigmas)]


def extrapolate(points, t):
    """v(t) = v1 + a(g) (v1 - v0), see the top of the file, from [(t0, v0), (t1, v1)]; v1 of [(t1, v1)] alone."""
    t1, v1 = points[-1]
    if len(points) == 1:
        return v1.clone()
    t0, v0 = points[0]
    g = (t - t1) / (t1 - t0)
    return v1 + (v1 - v0) * (g / (1 + DAMPING * g))


def relative_l1(new, old):
    """mean |new - old| / mean |old|, accumulated in float32; a tensor."""
    return (new - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)


def rescale(change, coefficients):
    """The published polynomial of a change, up to where it falls below zero.

    Beyond, it was not fitted: the more changed, the more would be skipped. Infinity has the step computed.
    """
    roots = [root.real for root in np.roots(coefficients) if root.imag == 0 and root.real > 0]
    falls = [root for root in roots if np.polyval(np.polyder(coefficients), root) < 0]
    if change > min(falls, default=math.inf) or change == math.inf:
        return math.inf
    return np.polyval(coefficients, change)


# ---- what is kept ------------------------------------------------------------


class Branch:
    """The cache of one of the calls in a step. Guidance by two calls, with the prompt and without, has two."""

    def __init__(self, conditioning, mark, layout, step):
        self.conditioning = conditioning  # tensors, by which its call is found in the next step
        self.mark = mark  # one of them
        self.layout = layout  # shape, dtype and device of the latents
        self.step = step  # the last one in which it was called
        self.previous_residual = None  # with a threshold: output minus input of the blocks, last computed step
        self.outputs = []  # with extrapolation: (timestep, output) of the last two computed steps
        self.error = None  # with extrapolation: its relative L1 error at the last computed step, a tensor

    @property
    def is_empty(self):
        return self.previous_residual is None and not self.outputs

    def matches(self, conditioning):
        """Equal values match: a caller may create its tensors anew at every call."""
        return all(
            a is b or torch.is_tensor(a) and torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(self.conditioning, conditioning)
        )

    def remember(self, timestep, output):
        """Keep the output of a computed step, and how far the extrapolation would have been from it."""
        earlier = [(t, v) for t, v in self.outputs if t < timestep]  # Heun's scheduler, say, repeats timesteps
        self.error = relative_l1(self.forecast(timestep), output) if len(earlier) == 2 else None
        self.outputs = [*earlier[-1:], (timestep, output.clone())]  # the caller may write into its output

    def forecast(self, timestep):
        return extrapolate(self.outputs, timestep)


class Settings(NamedTuple):
    """What holds for a step, see `read_settings`."""

    num_steps: int
    coefficients: list
    rel_l1_thresh: float | None
    computed_steps: int | list | None
    tolerance: float | None

    @property
    def rule(self):
        """What decides which steps are computed; None: all are."""
        if isinstance(self.computed_steps, (list, tuple)):
            return by_plan
        if self.computed_steps is not None:
            return by_budget
        if self.tolerance is not None:
            return by_tolerance
        return by_threshold if self.rel_l1_thresh > 0 else None


def read_settings(model):
    """The attributes of the model, else of its class, else the constants: each of them may be edited at any time."""
    num_steps = getattr(model, "num_steps", None)
    coefficients = getattr(model, "coefficients", None)
    limits = [getattr(model, name, None) for name in ("rel_l1_thresh", "computed_steps", "tolerance")]
    return Settings(
        NUM_INFERENCE_STEPS if num_steps is None else num_steps,
        COEFFICIENTS if coefficients is None else coefficients,
        *limits_or_constants(*limits),
    )


def limits_or_constants(rel_l1_thresh=None, computed_steps=None, tolerance=None):
    """The three settings of which one limits what is skipped: as given, or else the constant that is set."""
    if rel_l1_thresh is not None or computed_steps is not None or tolerance is not None:
        return rel_l1_thresh, computed_steps, tolerance
    if COMPUTED_STEPS is not None:
        return None, COMPUTED_STEPS, None
    if TOLERANCE is not None:
        return None, None, TOLERANCE
    return REL_L1_THRESH, None, None


class TeaCacheState:
    """One generation of a network: `print(model.teacache)` shows which steps were computed."""

    def __init__(self):
        self.timesteps = []  # of the steps so far: 0 is noise, 1 the image
        self.schedule = []  # one entry a step: True if computed, False if skipped, None while not decided
        self.upcoming = None  # timesteps of the steps to come; None: a network alone does not know them
        self.num_steps = None  # of the whole generation
        self.plan = []  # under a number of computed steps: which they are
        self.planned_for = None  # (computed steps, all steps) of the plan
        self.settings = None  # those of the running step
        self.rule = None  # by_threshold, by_budget, by_plan or by_tolerance; None: every step is computed
        self.accumulated_rel_l1_distance = 0.0  # since the last computed step
        self.previous_modulated_input = None  # of the first call of the last step
        self.observed_branch = None  # the branch of that call
        self.curvature = CURVATURE  # under a tolerance, see by_tolerance
        self.branches = []
        self.calls = 0  # of the network in the running step
        self.step_id = None  # the clock's number of the running step; None: not in a pipeline
        self.thread = threading.get_ident()

    def __repr__(self):
        marks = "".join({True: "X", False: ".", None: "?"}[computed] for computed in self.schedule)
        return f"{self.schedule.count(True)} of {len(self.schedule)} steps computed: {marks}"

    @property
    def step(self):
        return len(self.timesteps) - 1

    @property
    def is_last_step(self):
        return self.num_steps is not None and self.step >= self.num_steps - 1

    @property
    def extrapolates(self):
        return self.rule in (by_budget, by_plan, by_tolerance)

    @property
    def needs_modulated_input(self):
        """In the first call of a step, with a threshold."""
        return self.rule is by_threshold and self.schedule[-1] is None

    def all_timesteps(self):
        """Of all steps. Those to come are known from the scheduler of a pipeline; a network alone estimates them."""
        if self.upcoming is None:
            return shifted_timesteps(self.timesteps, self.num_steps)
        return self.timesteps + self.upcoming

    def is_over(self, timestep, conditioning, mark, layout):
        """Whether this call begins another generation, as far as calls alone can tell."""
        if timestep < self.timesteps[-1] or self.was_interrupted:
            return True
        if self.step == 0 and self.is_last_step:  # of one step: the next may begin at the same timestep
            return True
        return timestep > self.timesteps[-1] and not self.knows(conditioning, mark, layout)

    @property
    def was_interrupted(self):
        """Whether a call did not finish: a finished one has left a residual or an output."""
        return self.rule is not None and any(branch.is_empty for branch in self.branches)

    def knows(self, conditioning, mark, layout):
        """Whether the last step had a call like this one. The mark is enough: a callback may replace the prompt."""
        last = [branch for branch in self.branches if branch.step == self.step and branch.layout == layout]
        return any(branch.mark is mark or branch.matches(conditioning) for branch in last)

    def begin_step(self, timestep, num_steps, settings, step_id=None, upcoming=None):
        if settings.rule is by_plan:
            check_plan(settings.computed_steps, num_steps)
        self.branches = [branch for branch in self.branches if branch.step == self.step]  # the others have ended
        if self.rule is by_tolerance:
            self.measure_curvature()
        self.timesteps.append(timestep)
        self.upcoming = upcoming
        self.num_steps = num_steps
        self.settings = settings
        self.step_id = step_id
        self.calls = 0
        rule = None if self.is_last_step else settings.rule  # the last step is always computed
        if rule is not self.rule or self.is_last_step:
            self.free()
        self.rule = rule
        is_decided = rule is None
        self.schedule.append(True if is_decided else None)

    def free(self):
        """Let go of all tensors: the last step uses none, and another rule uses others."""
        self.branches = []
        self.previous_modulated_input = self.observed_branch = None

    def find_branch(self, conditioning, mark, layout):
        """The branch of this call, or a new one. Equal calls of a step (tiles, say) are told apart by their order."""
        unused = [branch for branch in self.branches if branch.step != self.step and branch.layout == layout]
        same_mark = [branch for branch in unused if branch.mark is mark]
        others = [branch for branch in unused if branch.mark is not mark]
        for branch in same_mark + others:  # in this order, as comparing values waits for the GPU
            if branch.matches(conditioning):
                branch.step = self.step
                return branch
        branch = Branch(conditioning, mark, layout, self.step)
        if not self.is_last_step:
            self.branches.append(branch)
        return branch

    def accumulate(self, branch, modulated_input):
        """Add the rescaled change of the modulated input since the last step."""
        change = math.inf  # unknown, if the first call of the last step was another: the step is computed
        if self.observed_branch is branch:
            change = relative_l1(modulated_input, self.previous_modulated_input).item()
        self.accumulated_rel_l1_distance += rescale(change, self.settings.coefficients)
        self.previous_modulated_input, self.observed_branch = modulated_input, branch

    def measure_curvature(self):
        """After a computed step: the largest error over the square of the gap. It falls by a fifth at most."""
        errors = [branch.error for branch in self.branches if branch.error is not None]
        if self.schedule[-1] and errors:
            t1, t2 = [t for t, computed in zip(self.timesteps, self.schedule) if computed][-2:]
            error = torch.stack(errors).max().item()  # waits for the GPU
            self.curvature = max(error / (t2 - t1) ** 2, 0.8 * self.curvature)

    def end_call(self, branch, residual, output):
        """Keep what a skipped step will use. At the end of a call, so that an interrupted one leaves nothing."""
        if self.rule is by_threshold:
            branch.previous_residual = residual
        elif self.extrapolates:
            branch.remember(self.timesteps[-1], output)


# ---- what is corrected -------------------------------------------------------


class Corrector:
    """Moves the latents to where they would be, had the skipped steps known what the next computed step knows.

    A skipped step uses a guessed velocity. At the next computed step the true one is known, so those of the skipped
    steps can be interpolated, and the difference is made up for. With sigmas s, and the skipped steps j,

        latents += sum of (s[j+1] - s[j]) (interpolated(s[j]) - used[j]) / (1 + CAUTION e)

    e is the relative error of the extrapolation at the computed step: where it is large, the latents have drifted, and
    the velocity computed there says less about the skipped steps. The idea is that of the corrector of a multistep
    method, as in UniPC (arXiv 2302.04867), and for caches in PrediT (arXiv 2602.18093). Here it acts on the latents,
    after guidance, however the steps were skipped.

    Only with a pipeline whose scheduler is FlowMatchEulerDiscreteScheduler, without stochastic_sampling: with any
    other, or on a network alone, nothing is corrected. CORRECT = False switches it off.
    """

    def __init__(self):
        self.computed = []  # (sigma, velocity) of the last two computed steps
        self.skipped = []  # (sigma, next sigma, velocity) of the steps skipped since then
        self.latents = None  # that the last step returned
        self.writes = None  # into these latents, at that time
        self.calls = None  # of the network in the last step

    def correct(self, latents, velocity, sigma, next_sigma, is_computed, calls):
        """The latents after a step that was computed, or skipped, by this number of calls of the network."""
        velocity = velocity.to(torch.float32, copy=True)
        if is_computed:
            latents = (latents + self.correction(sigma, velocity)).to(latents.dtype)
            earlier = [(s, v) for s, v in self.computed if s > sigma]
            self.computed = [*earlier[-1:], (sigma, velocity)]
            self.skipped = []
        else:
            self.skipped.append((sigma, next_sigma, velocity))
        self.latents, self.writes, self.calls = latents, count_writes(latents), calls
        return latents

    def correction(self, sigma, velocity):
        """The formula above; 0 if nothing was skipped, or if a scheduler repeats its sigma."""
        if not self.skipped or not self.computed or sigma >= self.computed[-1][0]:
            return 0.0
        s0, v0 = self.computed[-1]
        total = 0.0
        for s, next_s, used in self.skipped:
            interpolated = v0 + (velocity - v0) * ((s - s0) / (sigma - s0))
            total = total + (next_s - s) * (interpolated - used)
        error = norm(extrapolate(self.computed, sigma) - velocity) / norm(velocity)
        return total / (1 + CAUTION * error)

    def continues(self, latents, calls):
        """Whether a step goes on from the last one: with as many calls, and with latents that nobody has replaced."""
        if self.latents is None or calls != self.calls or count_writes(self.latents) != self.writes:
            return False
        return latents is self.latents or torch.equal(latents, self.latents)


def norm(x):
    """Euclidean norm of each image, in the shape (batch, 1, ...)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


def count_writes(tensor):
    """How often somebody wrote into a tensor. Those of torch.inference_mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


# ---- which image and which step a call belongs to ----------------------------


class Clock:
    """What the scheduler of a pipeline knows: the running step, and the steps to come."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.step_id = 0  # another number for each step of each generation
        self.remaining = []  # timesteps of the running step and of those to come: 0 is noise, 1 the image
        self.sigmas = []  # of all steps
        self.has_restarted = False  # the timesteps were set, and the network has not been called since
        self.cache = None  # the state of the network, when it was last called
        self.corrector = Corrector()

    def restart(self):
        """The timesteps were set."""
        length = getattr(self.scheduler.config, "num_train_timesteps", 1000)
        self.remaining = [1 - t / length for t in self.scheduler.timesteps.tolist()]
        self.sigmas = self.scheduler.sigmas.tolist() if self.can_correct else []
        self.corrector = Corrector()
        self.has_restarted = True
        self.step_id += 1

    def start_at(self, timestep):
        """The network is called for the first time. Image to image leaves out the steps before."""
        distances = [abs(t - timestep) for t in self.remaining]
        self.remaining = self.remaining[distances.index(min(distances)) :]
        self.has_restarted = False

    def is_at(self, timestep):
        """Whether this is the timestep of the running step, and not that of a loop with another scheduler."""
        if not self.remaining:
            return False
        distances = [abs(t - timestep) for t in self.remaining]
        return distances[0] == min(distances) and distances[0] < 0.002  # more than rounding

    def end_step(self):
        """The scheduler has stepped."""
        self.remaining = self.remaining[1:]
        self.step_id += 1
        if not self.remaining:
            self.corrector = Corrector()  # frees its tensors

    @property
    def can_correct(self):
        """Only Euler steps: they move the latents by the velocity times the difference of two sigmas."""
        is_euler = isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)
        return CORRECT and is_euler and not self.scheduler.config.get("stochastic_sampling")

    def corrected(self, result, model_output, timestep, sample, *args, **kwargs):
        """What `scheduler.step` returned for these arguments, with the latents corrected."""
        cache = self.cache
        was_seen = cache is not None and cache.step_id == self.step_id
        if not was_seen or kwargs.get("per_token_timesteps") is not None:
            self.corrector = Corrector()
            return result
        if not self.corrector.continues(sample, cache.calls):
            self.corrector = Corrector()
        i = self.scheduler.step_index - 1  # it has stepped already
        latents = self.corrector.correct(
            latents=result[0],
            velocity=model_output,
            sigma=self.sigmas[i],
            next_sigma=self.sigmas[i + 1],
            is_computed=cache.schedule[-1],
            calls=cache.calls,
        )
        return (latents, *result[1:]) if isinstance(result, tuple) else type(result)(prev_sample=latents)


def set_timesteps(clock, stock, *args, **kwargs):
    result = stock(*args, **kwargs)
    clock.restart()
    return result


def step(clock, stock, *args, **kwargs):
    result = stock(*args, **kwargs)
    if clock.can_correct and clock.sigmas:
        result = clock.corrected(result, *args, **kwargs)
    clock.end_step()
    return result


def follow(scheduler):
    """Wrap `set_timesteps` and `step` of this scheduler object, and return the clock that they move.

    They keep their signatures, which pipelines inspect.
    """
    clock = Clock(scheduler)
    for wrapper in (set_timesteps, step):
        stock = getattr(scheduler, wrapper.__name__)
        wrapped = functools.update_wrapper(functools.partial(wrapper, clock, stock), stock)
        setattr(scheduler, wrapper.__name__, wrapped)
    return clock


def unfollow(clock):
    """Restore the two methods. If somebody has wrapped them since, ours stay inside, and do nothing but count."""
    clock.cache, clock.sigmas = None, []
    for name in ("set_timesteps", "step"):
        wrapper = vars(clock.scheduler).get(name)
        if isinstance(wrapper, functools.partial) and wrapper.args[0] is clock:
            stock = wrapper.args[1]
            vars(clock.scheduler).pop(name)
            if stock != getattr(clock.scheduler, name):
                setattr(clock.scheduler, name, stock)  # wrapped by somebody before


def begin_call(model, timestep, conditioning, mark, latents):
    """The generation and the branch that this call of the network belongs to.

    timestep: 0 (noise) to 1 (image). conditioning: tensors, or None, that tell the calls of a step apart. mark: one of
    them that is the same object throughout a generation.
    """
    layout = latents.shape, latents.dtype, latents.device
    if torch.is_grad_enabled() or not getattr(model, "enable_teacache", False):
        cache = model.teacache = TeaCacheState()  # what was cached before this step would be too old after it
        return cache, Branch(conditioning, mark, layout, step=None)
    if "teacache" not in vars(model):
        model.teacache = TeaCacheState()
    clock = vars(model).get("teacache_clock")
    cache = find_generation(model, clock, timestep, conditioning, mark, layout)
    find_step(cache, clock, timestep, read_settings(model))
    cache.calls += 1
    if clock is not None:
        clock.cache = cache
    return cache, cache.find_branch(conditioning, mark, layout)


def find_generation(model, clock, timestep, conditioning, mark, layout):
    """The running generation, or a new one: the timesteps were set, or the call is like none of the last step."""
    cache = model.teacache
    if clock is not None and clock.has_restarted:
        clock.start_at(timestep)
    elif clock is not None and clock.is_at(timestep):
        watch_threads(cache)
        return cache
    elif cache.timesteps and not cache.is_over(timestep, conditioning, mark, layout):
        watch_threads(cache)
        return cache
    elif cache.timesteps:
        warn_of_steps(cache, timestep)
    if clock is not None and not clock.is_at(timestep) and model.num_steps is None:
        ran = f"the scheduler that it was applied with is not used; {NUM_INFERENCE_STEPS} steps are assumed"
        warnings.warn(f"TeaCache: {ran}: apply it to the pipeline again", stacklevel=4)
    model.teacache = TeaCacheState()
    return model.teacache


def find_step(cache, clock, timestep, settings):
    """Begin another step: the scheduler has stepped or, on a network alone, the timestep is another one."""
    if clock is not None and clock.is_at(timestep):
        if cache.step_id != clock.step_id:
            num_steps = len(cache.timesteps) + len(clock.remaining)
            cache.begin_step(timestep, num_steps, settings, clock.step_id, upcoming=clock.remaining[1:])
    elif not cache.timesteps or timestep != cache.timesteps[-1]:
        cache.begin_step(timestep, settings.num_steps, settings)


def warn_of_steps(cache, timestep):
    """Without a pipeline, only `num_steps` tells which step is the last."""
    if not cache.is_last_step:
        ran = f"the last generation ran {len(cache.timesteps)} of {cache.num_steps} steps (or was interrupted)"
    elif timestep > cache.timesteps[-1]:
        ran = f"there are more steps than num_steps, {cache.num_steps}"
    else:
        return
    warnings.warn(f"TeaCache: {ran}: set num_steps to num_inference_steps", stacklevel=4)


def watch_threads(cache):
    """Warn if the running generation was begun by another thread."""
    if cache.thread != threading.get_ident():
        warnings.warn("TeaCache: two threads use one network at a time; give each its own", stacklevel=4)
    cache.thread = threading.get_ident()


# ---- switching on and off ----------------------------------------------------


def apply_teacache(
    model, num_steps=None, rel_l1_thresh=None, coefficients=None, *, computed_steps=None, tolerance=None
):
    """Switch TeaCache on for a pipeline, or for its network alone, before or after offloading is enabled.

    model: with a pipeline, its scheduler tells where a generation begins and how many steps it has, from the next time
    that its timesteps are set (a scheduler that is put in later is not followed), and skipped steps are corrected, see
    Corrector. With the network alone, a generation begins where the timestep starts over: `num_steps` must be the
    number of steps, and after a generation that was stopped in its first step TeaCache must be applied again.
    num_steps: for the network alone.
    rel_l1_thresh, computed_steps (a number, or a list of steps), tolerance: at most one; the default is the constants.
    coefficients: of the polynomial for rel_l1_thresh, highest power first.

    A network draws one image (or batch) at a time, unless several take turns in each step: threads need one each.
    Returns `model`. Raises ValueError for settings or networks that cannot work.
    """
    network = find_network(model)
    if network is model and num_steps is None:
        num_steps = NUM_INFERENCE_STEPS
    check_settings(num_steps, rel_l1_thresh, computed_steps, tolerance, coefficients)
    if network is not model and not hasattr(getattr(model, "scheduler", None), "set_timesteps"):
        raise ValueError(f"this {type(model).__name__} has no scheduler: give its {NETWORK} alone, with num_steps")
    remove_teacache(model)
    put_forward(network)
    network.enable_teacache = True
    network.num_steps = num_steps
    network.rel_l1_thresh = rel_l1_thresh
    network.coefficients = coefficients
    network.computed_steps = computed_steps
    network.tolerance = tolerance
    network.teacache = TeaCacheState()
    if network is not model:
        network.teacache_clock = follow(model.scheduler)
    return model


def remove_teacache(model):
    """Restore the stock forward and the scheduler, and free the cache. Returns `model`."""
    network = find_network(model)
    if "teacache_clock" in vars(network):
        unfollow(network.teacache_clock)
    slots = [(holder, name) for holder, name in forward_slots(network) if is_teacache(vars(holder).get(name))]
    for holder, name in slots:
        setattr(holder, name, MethodType(type(network).forward, network))
    if (network, "forward") in slots:
        del network.forward  # the class has it
    was_applied = "enable_teacache" in vars(network) or "teacache_is_wrapped" in vars(network)
    was_on = was_applied and vars(network).get("enable_teacache", True)
    for name in (*Settings._fields, "enable_teacache", "teacache", "teacache_clock", "teacache_is_wrapped"):
        vars(network).pop(name, None)
    if was_applied and not slots and "forward" in vars(network):
        network.teacache_is_wrapped = True  # in a wrapper of somebody else's: it computes every step from now on
    if not was_on and getattr(type(network), "enable_teacache", False):
        network.enable_teacache = False  # the class has it on
    return model


def find_network(model):
    """The network of a pipeline, or the network itself. Its forward has the parameters of ours."""
    network = model if isinstance(model, torch.nn.Module) else getattr(model, NETWORK, None)
    is_module = isinstance(network, torch.nn.Module)
    ours = inspect.signature(teacache_forward).parameters
    theirs = inspect.signature(type(network).forward).parameters if is_module else ()
    if not set(ours) <= set(theirs):
        name = type(model if network is None else network).__name__
        raise ValueError(
            f"TeaCache is for a pipeline or its {NETWORK}, as it was loaded, not for {name} "
            "(compile the blocks one by one, and apply TeaCache before the network is wrapped)"
        )
    return network


def forward_slots(network):
    """Where a forward of this network can be, as (object, attribute): hooks put theirs around it."""
    yield network, "forward"
    yield network, "_old_forward"  # accelerate
    for hook in getattr(vars(network).get("_diffusers_hook"), "_fn_refs", []):
        yield hook, "original_forward"
        yield hook, "forward"


def put_forward(network):
    """Put `teacache_forward` in the place of the stock forward, inside of all hooks."""
    slots = [(holder, name) for holder, name in forward_slots(network) if is_stock(vars(holder).get(name), network)]
    if not slots and "forward" not in vars(network):
        slots = [(network, "forward")]
    for holder, name in slots:
        setattr(holder, name, functools.partial(teacache_forward, network))  # unlike a bound method, it can be pickled
    if not slots and "teacache_is_wrapped" not in vars(network):
        raise ValueError(f"the forward of this {type(network).__name__} was replaced: apply TeaCache before that")


def is_teacache(forward):
    """By name: this module may have been reloaded, or imported under two names."""
    function = getattr(forward, "func", None) or getattr(forward, "__func__", None)
    return getattr(function, "__name__", None) == teacache_forward.__name__


def is_stock(forward, network):
    stock = [vars(cls).get("forward") for cls in type(network).__mro__]
    return getattr(forward, "__self__", None) is network and forward.__func__ in stock


def check_plan(plan, num_steps):
    """A list of computed steps, from the first to the last one."""
    if not plan or any(not isinstance(step, int) for step in plan) or list(plan) != sorted(set(plan)) or plan[0] != 0:
        raise ValueError(f"a list of computed_steps must be rising whole numbers from 0, not {plan}")
    if num_steps is not None and plan[-1] != num_steps - 1:
        raise ValueError(f"computed_steps is a list for {plan[-1] + 1} steps, not for {num_steps}")


def check_settings(num_steps=None, rel_l1_thresh=None, computed_steps=None, tolerance=None, coefficients=None):
    """Raise ValueError for settings that cannot work; num_steps is None if the scheduler will tell."""
    if num_steps is not None and (not num_steps >= 1 or num_steps % 1):
        raise ValueError(f"the number of steps must be a whole number of at least 1, not {num_steps}")
    if [rel_l1_thresh, computed_steps, tolerance].count(None) < 2:
        raise ValueError("give only one of rel_l1_thresh, computed_steps and tolerance")
    rel_l1_thresh, computed_steps, tolerance = limits_or_constants(rel_l1_thresh, computed_steps, tolerance)
    if any(limit is not None and not 0 <= limit < math.inf for limit in (rel_l1_thresh, tolerance)):
        raise ValueError("rel_l1_thresh and tolerance must be numbers of at least 0; 0 skips nothing")
    if isinstance(computed_steps, (list, tuple)):
        check_plan(computed_steps, num_steps)
    elif computed_steps is not None and num_steps is None and (not computed_steps >= 2 or computed_steps % 1):
        raise ValueError(f"computed_steps must be a whole number of at least 2, not {computed_steps}")
    elif computed_steps is not None and num_steps is not None:
        if computed_steps not in range(min(2, num_steps), num_steps + 1):
            raise ValueError(f"computed_steps must be 2 to {num_steps}, the number of steps, not {computed_steps}")
    if coefficients is not None and not (len(coefficients) and all(math.isfinite(c) for c in coefficients)):
        raise ValueError(f"coefficients must be finite numbers, not {coefficients}")


# ------------------------------------------------------------------------------
# Running Lumina-Image-2.0: arguments, loading, one image
# ------------------------------------------------------------------------------

CorrectedEulerScheduler = FlowMatchEulerDiscreteScheduler  # TEMPORARY, until the core has the class
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
    if False in schedule and type(pipeline.scheduler) is CorrectedEulerScheduler:
        setting += ", corrected"
    steps = f"{sum(schedule)} of {len(schedule)} steps computed ({setting})"
    print(f"saved {output}: {seconds:.1f} s, {steps}, seed {args.seed}")


if __name__ == "__main__":
    main()
