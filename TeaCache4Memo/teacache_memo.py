"""TeaCache (arXiv 2411.19108) for MEMO, the talking-head model: training-free caching, in one self-contained script.

MEMO (arXiv 2412.04448) makes video of a portrait and a voice, in clips of 16 frames. It runs one network at 20 to 50
timesteps of each clip, and little changes from one step to the next. TeaCache computes some of the steps and skips the
others. One of three settings decides which:

rel_l1_thresh, as published. x are the features of the first convolution. Their relative L1 change is added up over the
steps since the last computed one, and as long as the sum is small,

    sum of mean |x[i] - x[i-1]| / mean |x[i-1]|  <  rel_l1_thresh

the blocks are skipped, and the residual of the last computed step (their output minus their input) is used again.

computed_steps, a number of steps, or tolerance, an expected error. A skipped step runs no part of the network. The
velocity is extrapolated from the last two computed ones, v0 at time t0 and v1 at time t1 (the damping is ours):

    v(t) = v1 + a(g) (v1 - v0)        g = (t - t1) / (t1 - t0)        a(g) = g / (1 + DAMPING g)

The first and the last step are always computed. With a pipeline, the latents are corrected afterwards for what skipped
steps got wrong, as soon as the next computed step shows it: see Corrector.

    python teacache_memo.py --input_image face.jpg --input_audio speech.wav  # or edit the constants below

    from TeaCache4Memo.teacache_memo import apply_teacache                   # importing changes nothing
    apply_teacache(pipeline, rel_l1_thresh=0.15)
    video = pipeline(...)                                                    # memo's VideoPipeline: one clip
    print(pipeline.diffusion_net.teacache)                                   # 11 of 20 steps computed: X.X.X.X.X.X.X...
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import itertools
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import wave
import weakref
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageOps
from tqdm import tqdm

# ------------------------------------------------------------------------------
REL_L1_THRESH = 0.15  # 0: original | 0.09: 1.2x | 0.15: 1.8x | 0.25: 2.7x fewer passes (talking emoji, 20 steps)
COMPUTED_STEPS = None  # instead of the threshold: compute exactly this many steps of each clip, say 10 of 20
TOLERANCE = None  # instead: compute when the expected error of skipping, summed over time, reaches this, say 0.003
NUM_INFERENCE_STEPS = 20  # for a network alone; the command line takes inference_steps from CONFIG
SEED = 42
CONFIG = "configs/inference.yaml"  # these three are looked for here, then in the folder of memo
INPUT_IMAGE = "assets/examples/dicaprio.jpg"
INPUT_AUDIO = "assets/examples/speech.wav"
BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "memo-emoji"  # a talking emoji, without a CUDA GPU
MODEL = "memoavatar/memo"  # for load_pipeline; the command line takes model_name_or_path from CONFIG
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as CONFIG names them
EMOTIONS = "angry disgusted fearful happy neutral other sad surprised unknown".split()  # labels 0 to 8 of emotion2vec
NETWORK = "diffusion_net"  # attribute of the pipeline that TeaCache is applied to

COEFFICIENTS = [1.0, 0.0]  # rescaling polynomial, highest power first: the identity, none was fitted for MEMO
DAMPING = 0.25  # of the extrapolation, see extrapolate
CURVATURE = 60.0  # under a tolerance: error of the extrapolation over the square of its gap, before it is measured
LONGEST_GAP = 0.2  # under a tolerance: time without a computed step, of 1 from noise to image
CORRECT = True  # with a pipeline: correct the latents afterwards for what skipped steps got wrong, see Corrector
CAUTION = 4.0  # of the correction: the larger, the less is corrected where the extrapolation errs
# ------------------------------------------------------------------------------


def teacache_forward(
    self,
    sample,  # (batch, channels, frames, height, width): latents; with guidance a batch of 2, unconditional first
    ref_features,  # of memo's reference net, {"down": [...], "mid": [...], "up": [...]}: portrait and past frames
    timestep,  # number, tensor or list of one for each frame: 1000 is noise, 0 the video
    encoder_hidden_states,  # (batch, tokens, cross_attention_dim): face embedding
    audio_embedding=None,  # (batch, frames, tokens, audio_attention_dim)
    audio_emotion=None,  # (batch,): labels
    class_labels=None,  # (batch,)
    mask_cond_fea=None,  # added to the features of conv_in
    attention_mask=None,  # (batch * frames, tokens): 1 for a token, 0 for padding
    down_block_additional_residuals=None,
    mid_block_additional_residual=None,
    uc_mask=None,  # (batch * frames,): True where the portrait is not attended to
    return_dict=True,
    is_new_audio=True,  # the memory of past frames starts afresh
    update_past_memory=False,  # the memory takes in the past frames; such a call is always computed
):
    """`UNet3DConditionModel.forward` (memo, commit a5aee30) with TeaCache: the velocity, shaped as the latents.

    Settings are read from the instance, its class or the constants, see `read_settings`; the state is `self.teacache`,
    on the instance. With gradients, at threshold 0 or without `enable_teacache`, every step is computed, as in stock.
    """
    from memo.models.unet_3d import UNet3DConditionOutput  # here, so that this file can be imported without memo

    # ---- TeaCache: a step that is skipped by extrapolation runs no part of the network ----
    timesteps = timestep if isinstance(timestep, list) else [timestep]
    time = 1 - sum(torch.as_tensor(t).cpu().double().mean().item() for t in timesteps) / len(timesteps) / 1000
    portrait = ref_features["mid"][0][0][0]  # a tensor that is one object throughout a clip
    conditioning = [encoder_hidden_states, audio_embedding, audio_emotion, class_labels, mask_cond_fea, attention_mask]
    cache, branch = begin_call(self, time, [*conditioning, uc_mask, portrait], portrait, sample)
    if cache.extrapolates and not should_calc(cache, branch, force=update_past_memory):
        sample = branch.forecast(time)
        return UNet3DConditionOutput(sample=sample) if return_dict else (sample,)
    # ---- end of TeaCache ----

    # sizes that cannot be halved at every level: the up blocks are told theirs
    forward_upsample_size = any(size % 2**self.num_upsamplers for size in sample.shape[-2:])
    upsample_size = None

    # prepare attention_mask
    if attention_mask is not None:
        attention_mask = (1 - attention_mask.to(sample.dtype)) * -10000.0
        attention_mask = attention_mask.unsqueeze(1)  # (batch * frames, 1, tokens)

    # center input if necessary
    if self.config.center_input_sample:
        sample = 2 * sample - 1.0

    # time
    t_emb_list = []
    for t in timesteps:
        if not torch.is_tensor(t):
            kind = "float" if isinstance(timestep, float) else "int"  # in a list, stock drops the fraction: kept
            bits = 32 if sample.device.type == "mps" else 64
            t = torch.tensor([t], dtype=getattr(torch, f"{kind}{bits}"), device=sample.device)
        elif t.ndim == 0:
            t = t[None].to(sample.device)
        t_emb_list.append(self.time_proj(t.expand(sample.shape[0])))
    t_emb = torch.stack(t_emb_list, dim=1) if isinstance(timestep, list) else t_emb_list[0]
    emb = self.time_embedding(t_emb.to(dtype=self.dtype))

    if self.class_embedding is not None:
        if class_labels is None:
            raise ValueError("class_labels should be provided when num_class_embeds > 0")
        if self.config.class_embed_type == "timestep":
            class_labels = self.time_proj(class_labels)
        emb = emb + self.class_embedding(class_labels).to(dtype=self.dtype)

    # pre-process
    sample = self.conv_in(sample)  # (batch, channels, frames, height, width)
    if mask_cond_fea is not None:
        sample = sample + mask_cond_fea

    # ---- TeaCache: stock runs the blocks at every step ----
    if cache.needs_modulated_input:
        cache.accumulate(branch, modulated_input=sample)
    if should_calc(cache, branch, force=update_past_memory):  # with extrapolation always, as it was asked above
        original_sample = sample
        memory = {"is_new_audio": is_new_audio, "update_past_memory": update_past_memory}
        for_all = {"temb": emb, "encoder_hidden_states": encoder_hidden_states, **memory}
        for_attention = {"attention_mask": attention_mask, "emotion": audio_emotion, "uc_mask": uc_mask}

        # down
        down_block_res_samples = (sample,)
        for i, downsample_block in enumerate(self.down_blocks):
            inputs = {"hidden_states": sample, "ref_feature_list": ref_features["down"][i], **for_all}
            if getattr(downsample_block, "has_cross_attention", False):
                sample, res_samples, audio_embedding = downsample_block(
                    audio_embedding=audio_embedding, **inputs, **for_attention
                )
            else:
                sample, res_samples = downsample_block(**inputs)
            down_block_res_samples += res_samples

        if down_block_additional_residuals is not None:
            pairs = zip(down_block_res_samples, down_block_additional_residuals)
            down_block_res_samples = tuple(res_sample + additional for res_sample, additional in pairs)

        # mid
        sample, audio_embedding = self.mid_block(
            sample, ref_feature_list=ref_features["mid"][0], audio_embedding=audio_embedding, **for_all, **for_attention
        )
        if mid_block_additional_residual is not None:
            sample = sample + mid_block_additional_residual

        # up
        for i, upsample_block in enumerate(self.up_blocks):
            is_final_block = i == len(self.up_blocks) - 1
            res_samples = down_block_res_samples[-len(upsample_block.resnets) :]
            down_block_res_samples = down_block_res_samples[: -len(upsample_block.resnets)]
            if not is_final_block and forward_upsample_size:
                upsample_size = down_block_res_samples[-1].shape[2:]

            inputs = {"hidden_states": sample, "ref_feature_list": ref_features["up"][i], **for_all}
            inputs |= {"res_hidden_states_tuple": res_samples, "upsample_size": upsample_size}
            if getattr(upsample_block, "has_cross_attention", False):
                sample, audio_embedding = upsample_block(audio_embedding=audio_embedding, **inputs, **for_attention)
            else:
                sample = upsample_block(**inputs)
        residual = sample - original_sample if cache.rule is by_threshold else None
    else:
        residual = branch.previous_residual
        sample = sample + residual
    # ---- end of TeaCache ----

    # post-process
    sample = self.conv_norm_out(sample)
    sample = self.conv_act(sample)
    sample = self.conv_out(sample)

    cache.end_call(branch, residual, sample)  # TeaCache: keep what a skipped step will use
    return UNet3DConditionOutput(sample=sample) if return_dict else (sample,)


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
# Running MEMO: loading, preparing, generating, the command line
# ------------------------------------------------------------------------------

A_COUNT = "a whole number of at least 1", lambda value: isinstance(value, int) and value > 0
A_NAME = "a name or folder", lambda value: isinstance(value, str)
CONFIG_RULES = {
    "resolution": ("a multiple of 8", lambda value: isinstance(value, int) and value > 0 and value % 8 == 0),
    "num_generated_frames_per_clip": ("16, as it is written into memo's pipeline", lambda value: value == 16),
    "cfg_scale": ("above 1, as memo needs guidance", lambda value: isinstance(value, (int, float)) and value > 1),
    "weight_dtype": ("fp32, fp16 or bf16", lambda value: value in DTYPES),
    **dict.fromkeys(["fps", "num_init_past_frames", "num_past_frames", "inference_steps"], A_COUNT),
    **dict.fromkeys(["model_name_or_path", "vae", "wav2vec", "emotion2vec", "misc_model_dir"], A_NAME),
}
VOCAL_SEPARATOR = "misc/vocal_separator/Kim_Vocal_2.onnx"  # in the folder misc_model_dir of CONFIG
BT709 = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-bsf:v"]  # the colours that players expect, and say so:
BT709 += ["h264_metadata=colour_primaries=1:transfer_characteristics=1:matrix_coefficients=1:video_full_range_flag=0"]
GENERATING = weakref.WeakSet()  # networks that are making a video

CorrectedEulerScheduler = FlowMatchEulerDiscreteScheduler  # TEMPORARY, until the core has this class: delete this line


def import_memo():
    """Namespace of memo's modules. memo imports xformers, used or not: if it is missing, a stub replaces it."""
    stand_ins = {}
    try:
        import xformers.ops  # noqa: F401
    except Exception:  # not installed, or not for this torch
        stand_ins = {name: ModuleType(name) for name in ("xformers", "xformers.ops")}
    sys.modules.update(stand_ins)
    try:
        from memo.models import attention_processor, audio_proj, image_proj, motion_module, unet_2d_condition, unet_3d
        from memo.pipelines import video_pipeline
    finally:
        for name in stand_ins:
            sys.modules.pop(name)
    modules = attention_processor, audio_proj, image_proj, motion_module, unet_2d_condition, unet_3d, video_pipeline
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


def set_memory_processors(diffusion_net):
    """Give MEMO's memory attention its processor: after `from_pretrained` it has diffusers', which fails."""
    memo = import_memo()
    for module in diffusion_net.modules():
        if isinstance(module, memo.MemoryLinearAttention):
            module.set_processor(memo.MemoryLinearAttnProcessor())
    return diffusion_net


def load_pipeline(model=MODEL, vae="stabilityai/sd-vae-ft-mse", device=None, dtype=torch.bfloat16):
    """memo's `VideoPipeline` and `AudioProjModel`, in memo's own layout or as `save_pretrained` writes them.

    vae: where `model` has none. dtype: of all but the audio projection, which stays in float32 on the CPU, as in memo.
    """
    memo = import_memo()
    pipeline = memo.VideoPipeline(
        vae=AutoencoderKL.from_pretrained(f"{model}/vae" if Path(model, "vae").is_dir() else vae),
        reference_net=memo.UNet2DConditionModel.from_pretrained(model, subfolder="reference_net"),
        diffusion_net=memo.UNet3DConditionModel.from_pretrained(model, subfolder="diffusion_net"),
        image_proj=memo.ImageProjModel.from_pretrained(model, subfolder="image_proj"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    audio_proj = memo.AudioProjModel.from_pretrained(model, subfolder="audio_proj")
    set_memory_processors(pipeline.diffusion_net)
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), DTYPES.get(dtype, dtype)), audio_proj


# ---- portrait and voice ------------------------------------------------------


def clean_portrait(image, path):
    """Write the picture as a viewer shows it: upright, on white where it is transparent."""
    try:
        with Image.open(image) as picture:
            picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except Exception as error:  # Pillow raises many kinds for broken files
        raise ValueError(f"{image} is not a picture that can be read ({error}): give a JPEG or PNG") from None
    Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB").save(path)


def clean_voice(audio, path):
    """Write the sound of any file that ffmpeg reads as a wav, 16 kHz, mono. Returns its seconds."""
    from imageio_ffmpeg import get_ffmpeg_exe

    source = Path(audio).absolute()  # ffmpeg takes "12:30.wav" for a protocol
    form = "-af aformat=channel_layouts=mono|stereo -ar 16000 -c:a pcm_s16le".split()
    command = [get_ffmpeg_exe(), *"-nostdin -v error -i".split(), source, *form, path]
    ffmpeg = subprocess.run(command, stderr=subprocess.PIPE)
    if ffmpeg.returncode != 0:
        reason = ffmpeg.stderr.decode(errors="replace").partition("\n")[0].removeprefix(f"{source}: ")
        raise ValueError(f"no sound in {audio}: {reason}")
    with wave.open(str(path)) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, file.getnchannels())
    if not sound.size:
        raise ValueError(f"no sound in {audio}: it is empty")
    mono = sound.mean(axis=1, dtype=np.float32).astype(np.int16)
    loudness = np.abs(sound).mean(axis=0)
    if np.abs(mono).mean() < 0.6 * loudness.max():  # one channel is silent, or they cancel each other
        print(f"{audio}: only the louder channel is used, as both together are quieter", file=sys.stderr)
        mono = sound[:, loudness.argmax()]
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(mono.tobytes())
    return len(mono) / 16000


def is_emoji(config):
    """Whether the model is the bundled talking emoji."""
    return Path(config.model_name_or_path).resolve() == BUNDLED


def load_emoji():
    """The module with what the talking emoji has in place of memo's functions for faces and voices."""
    spec = importlib.util.spec_from_file_location("memo_emoji", BUNDLED / "emoji.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def without_stdin():
    """The ffmpeg that memo calls reads the terminal, which would stop a job in the background."""
    terminal = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    try:
        yield
    finally:
        os.dup2(terminal, 0)
        os.close(terminal)


def prepare(image, audio, config, folder, emotion=None):
    """The inputs of `generate`, from any picture and any sound. A portrait and a voice are written into `folder`.

    emotion: one of EMOTIONS for the whole voice; else it is recognised, or neutral for the talking emoji.
    """
    portrait, voice = (free_name(Path(folder, name).absolute()) for name in ("portrait.png", "voice.wav"))
    clean_portrait(image, portrait)
    seconds = clean_voice(audio, voice)
    if is_emoji(config):
        hearing = seeing = load_emoji()
    else:
        from memo.utils import audio_utils as hearing
        from memo.utils import vision_utils as seeing

    emotions, misc = getattr(hearing, "EMOTIONS", EMOTIONS), Path(config.misc_model_dir)
    if emotion not in (None, *emotions):
        raise ValueError(f"this model knows the emotions {', '.join(emotions)}, not {emotion}")
    if not is_emoji(config) and not (misc / VOCAL_SEPARATOR).is_file():
        from huggingface_hub import snapshot_download

        snapshot_download(MODEL, allow_patterns=["misc/[fv]*"], local_dir=misc)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip = {"num_generated_frames_per_clip": config.num_generated_frames_per_clip, "device": device}
    with without_stdin():
        pixels, face = seeing.preprocess_image(str(misc / "misc/face_analysis"), str(portrait), config.resolution)
        if not face.any():
            raise ValueError(f"no face found in {image}: give a frontal portrait")
        of_voice = str(voice), config.fps, config.wav2vec, str(misc / VOCAL_SEPARATOR), str(folder)
        audio_emb, length = hearing.preprocess_audio(*of_voice, **clip)
        if emotion is None:
            of_voice = MODEL, str(voice), config.emotion2vec, length
            audio_emotion, num_classes = hearing.extract_audio_emotion_labels(*of_voice, device=device)
        else:
            audio_emotion, num_classes = torch.full((length,), EMOTIONS.index(emotion)).int(), len(EMOTIONS)
    inputs = {"pixel_values": pixels, "face_emb": face, "audio_emb": audio_emb, "audio_emotion": audio_emotion}
    inputs |= {"num_emotion_classes": num_classes, "num_frames": math.ceil(seconds * config.fps), "sound": voice}
    return SimpleNamespace(**inputs)


# ---- the video ---------------------------------------------------------------


def fill_up(rows, size):
    """As many rows as a clip has frames: the last one is repeated."""
    return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])


@contextlib.contextmanager
def alone(network):
    """RuntimeError while the network makes another video, whose settings and memory of past frames it has."""
    if network in GENERATING:
        raise RuntimeError("this pipeline is making another video: finish that one, or close() its generator, first")
    GENERATING.add(network)
    try:
        yield
    finally:
        GENERATING.discard(network)


@torch.no_grad()
def generate(pipeline, audio_proj, inputs, config, seed=SEED, clips=None, schedule=None, bar="", **settings):
    """Yield the video clip by clip, uint8 (frames, height, width, 3); each starts from the last frames of the one before.

    inputs: `pixel_values` (1, 3, height, width) in [-1, 1], `face_emb` (1, 512), `audio_emb` (frames, window, blocks,
    channels), `audio_emotion` (frames,), `num_emotion_classes`, and `num_frames` if the video shall be shorter.
    config: memo's configs/inference.yaml. clips: at most. schedule: a list, to which those of the clips are added.
    bar: what the progress is called, None for none. settings: of TeaCache. One video at a time on a pipeline.
    """
    size, steps = config.num_generated_frames_per_clip, config.inference_steps
    num_frames = min(len(inputs.audio_emb), getattr(inputs, "num_frames", sys.maxsize))
    count = min(math.ceil(num_frames / size), clips or sys.maxsize)
    schedule = [] if schedule is None else schedule
    given = {"width": config.resolution, "height": config.resolution, "video_length": size}
    given |= {"num_inference_steps": steps, "guidance_scale": config.cfg_scale}
    given |= {"face_emb": inputs.face_emb, "emotion_class_num": inputs.num_emotion_classes}
    given["generator"] = torch.Generator().manual_seed(seed)  # on the CPU: equal noise on every device
    past_frames = inputs.pixel_values.repeat(config.num_init_past_frames, 1, 1, 1)
    form = "{desc} |{bar}| {elapsed}, {remaining} left"
    off = True if bar is None else None  # None: on no terminal
    progress = tqdm(total=count * steps, bar_format=form, delay=1e-9, disable=off, leave=False)  # no bar of no steps
    with alone(pipeline.diffusion_net), progress:
        apply_teacache(pipeline, **settings)
        pipeline.set_progress_bar_config(disable=True)  # one bar for the video, instead of memo's for each clip
        for clip in range(count):
            name = f"{bar} clip {clip + 1} of {count}".strip()
            progress.set_description_str(name, refresh=False)
            window = slice(clip * size, (clip + 1) * size)
            audio_emb = fill_up(inputs.audio_emb[window], size).unsqueeze(0)
            video = pipeline(
                ref_image=torch.cat([inputs.pixel_values, past_frames]).unsqueeze(0),
                audio_tensor=audio_proj(audio_emb.to(audio_proj.device, audio_proj.dtype)),
                audio_emotion=fill_up(inputs.audio_emotion[window], size),
                is_new_audio=clip == 0,
                callback=lambda *_: progress.update(),
                **given,
            ).videos[0]  # (3, frames, height, width) in [0, 1]
            past_frames = video.transpose(0, 1)[-config.num_past_frames :].to(inputs.pixel_values) * 2 - 1
            computed = pipeline.diffusion_net.teacache.schedule
            schedule += computed
            if bar is not None and progress.disable:
                print(f"{name}: {sum(computed)} of {len(computed)} steps computed", file=sys.stderr)
            frames = (video.permute(1, 2, 3, 0) * 255).clamp(0, 255).to(torch.uint8)
            yield frames[: num_frames - clip * size].numpy()


def free_name(path):
    """output.png, or output_2.png where that exists, and so on."""
    names = itertools.chain([path], (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def write_video(clips, path, fps, sound):
    """An mp4 of clips, uint8 (frames, height, width, 3), as they come, and of the sound of a file.

    The file has a hidden name until it is complete, then `path` or the next free number. Returns that.
    """
    import imageio_ffmpeg

    path, clips = Path(path), iter(clips)
    first = next(clips)
    height, width = first.shape[1:3]
    draft = path.with_name(f".{path.stem}.{os.getpid()}.mp4").absolute()  # ffmpeg takes "10:30/a.mp4" for a protocol
    options = {"fps": fps, "codec": "libx264", "quality": None, "macro_block_size": 1, "ffmpeg_log_level": "error"}
    options |= {"audio_path": str(Path(sound).absolute()), "audio_codec": "aac"}
    options["output_params"] = ["-crf", "10", "-movflags", "+faststart", *BT709]
    writer = imageio_ffmpeg.write_frames(str(draft), (width, height), **options)
    try:
        writer.send(None)
        for clip in itertools.chain([first], clips):
            writer.send(clip.tobytes())
        writer.close()
        with contextlib.closing(imageio_ffmpeg.read_frames(str(draft))) as reader:
            next(reader)  # OSError if ffmpeg could not end the file: the writer does not tell
        path = free_name(path)
        draft.rename(path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}): what ffmpeg says is above") from error
    finally:
        writer.close()
        draft.unlink(missing_ok=True)
    return path


# ---- the command line --------------------------------------------------------


def build_parser(**several):
    """The flags, as in memo. several: of the two settings, for tools that take more than one value."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)

    def add(name, **options):
        hyphens = name.replace("_", "-")  # taken as well
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{hyphens}"]), **options)

    add("config", help="memo's configs/inference.yaml, or one like it")
    add("input_image", help="portrait; the talking emoji has its own, see assets/memo-emoji")
    add("input_audio", help="voice, in any format")
    add("output_dir", type=Path, default=Path("outputs"), help="for <image>_<audio>.mp4, or the next free number")
    add("emotion", choices=EMOTIONS, help="instead of the recognised one")
    add("seed", type=int, default=SEED)
    add("rel_l1_thresh", type=float, help=f"default {REL_L1_THRESH}; 0 skips nothing", **several)
    add("computed_steps", type=int, help="instead of a threshold: computed steps of each clip", **several)
    return parser


@contextlib.contextmanager
def one_line_errors():
    """For `main`: what can go wrong is said in a line, on a terminal that lacks a letter of a name too."""
    sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except ImportError as error:
        sys.exit(f"error: {error}, see Installation in README.md: git clone https://github.com/memoavatar/memo")
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def quiet():
    """Turn off the warnings that memo, written for diffusers 0.31, causes, and the progress bars of loading."""
    import diffusers.utils
    import transformers.utils

    warnings.simplefilter("ignore", FutureWarning)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def find_file(name):
    """A file as it was typed, else in the folder of memo. ValueError with both places if it is in neither."""
    import memo

    places = list(dict.fromkeys([Path(name), Path(memo.__path__[0]).parent / name]))
    for path in places:
        if path.is_file():
            return path
    raise ValueError(f"no file {name}, looked for as {' and '.join(str(path.absolute()) for path in places)}")


def read_config(path):
    """memo's configs/inference.yaml, or one like it. ValueError for what is missing or cannot work."""
    from omegaconf import OmegaConf

    try:
        config = OmegaConf.load(path)
        values = {name: config.get(name) for name in CONFIG_RULES}
    except Exception as error:  # not YAML, or a list
        raise ValueError(f"{path} is no config for MEMO ({error})") from None
    for name, (what, is_right) in CONFIG_RULES.items():
        if not is_right(values[name]):
            raise ValueError(f"{path}: {name} must be {what}, not {values[name]}")
    return config


def choose_config(name=None):
    """The config of this name; without one the talking emoji's where there is no CUDA GPU, else memo's."""
    if not name and not torch.cuda.is_available() and BUNDLED.is_dir():
        print(f"No CUDA GPU: using the bundled talking emoji. For the real MEMO: --config {CONFIG}")
        name = BUNDLED / "config.yaml"
    path = find_file(name or CONFIG)
    config = read_config(path)
    if path.resolve().parent == BUNDLED:
        config.model_name_or_path = str(BUNDLED)  # from any folder
    return config


def find_inputs(config, image=None, audio=None):
    """The files of the portrait and the voice, by default those of the model's example."""
    example = (BUNDLED / "example.png", BUNDLED / "example.wav") if is_emoji(config) else (INPUT_IMAGE, INPUT_AUDIO)
    return find_file(image or example[0]), find_file(audio or example[1])


def output_path(folder, image, audio):
    """face_speech.mp4 in this folder, which is made. OSError if nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    stems = (os.fsencode(Path(file).stem)[:100].decode(errors="ignore") for file in (image, audio))
    return folder / f"{'_'.join(stems)}.mp4"  # a name can have 255 bytes


def name_setting(rel_l1_thresh=None, computed_steps=None):
    """The setting that decides, by default that of the constants: "computed_steps 10"."""
    if rel_l1_thresh is None and computed_steps is None:
        rel_l1_thresh, computed_steps = REL_L1_THRESH, COMPUTED_STEPS
    return f"rel_l1_thresh {rel_l1_thresh}" if computed_steps is None else f"computed_steps {computed_steps}"


def main(argv=None):
    args = build_parser().parse_args(argv)
    settings = {"rel_l1_thresh": args.rel_l1_thresh, "computed_steps": args.computed_steps}
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        quiet()
        config = choose_config(args.config)
        check_settings(config.inference_steps, **settings)
        image, audio = find_inputs(config, args.input_image, args.input_audio)
        output = output_path(args.output_dir, image, audio)
        inputs = prepare(image, audio, config, folder, args.emotion)
        pipeline, audio_proj = load_pipeline(config.model_name_or_path, config.vae, dtype=config.weight_dtype)

        schedule, began = [], time.perf_counter()
        clips = generate(pipeline, audio_proj, inputs, config, args.seed, schedule=schedule, **settings)
        output = write_video(clips, output, config.fps, inputs.sound)
        seconds = time.perf_counter() - began

        is_corrected = False in schedule and type(pipeline.scheduler) is CorrectedEulerScheduler
        setting = name_setting(**settings) + (", corrected" if is_corrected else "")
        steps = f"{sum(schedule)} of {len(schedule)} steps computed ({setting})"
        print(f"saved {output}: {seconds:.1f} s, {steps}, seed {args.seed}")


if __name__ == "__main__":
    main()
