"""TeaCache (arXiv 2411.19108) for MEMO, the talking-head model: training-free caching, in one self-contained script.

MEMO (arXiv 2412.04448) makes video of a portrait and a voice, in clips of 16 frames. It runs one network at 20 to 50
timesteps of each clip, and little changes from one step to the next. TeaCache computes some of the steps and skips the
others. One of two settings decides which:

rel_l1_thresh, TeaCache's own rule. x are the features of the first convolution. Their relative L1 change is added up
over the steps since the last computed one, and as long as the sum is small,

    sum of mean |x[i] - x[i-1]| / mean |x[i-1]|  <  rel_l1_thresh

the blocks are skipped, and the residual of the last computed step (their output minus their input) is used again.

computed_steps, the number of steps to compute, or a list of them. A skipped step runs no part of the network. Its
velocity is extrapolated from the last computed ones, v0, v1 and v2 at sigma s0, s1 and s2 (the factor r is ours):

    v(s) = v2 + r (s - s2) d2        d1 = (v1 - v0) / (s1 - s0)        d2 = (v2 - v1) / (s2 - s1)

r = <d1, d2> / <d1, d1>, limited to 0..1, is how much of the slope d1 is left in d2: one number for each call and image.
Where the slope turns or shrinks, it is followed less far. Until three velocities are known, the last one is held.

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
import time
import warnings
import wave
import weakref
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageOps
from tqdm import tqdm

# ------------------------------------------------------------------------------
REL_L1_THRESH = 0.15  # 0: original | 0.09: 1/1.2 of the passes | 0.15: 1/1.8 | 0.25: 1/2.9 (talking emoji, 20 steps)
COMPUTED_STEPS = None  # instead of the threshold: compute exactly this many steps of each clip, say 14 of 20
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
CORRECT = True  # with a pipeline: correct the latents afterwards for what skipped steps got wrong, see Corrector
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

    Settings are attributes of the instance, else of its class, else the constants; the state is `self.teacache`, on the
    instance. With gradients, at threshold 0 or without `enable_teacache`, every step is computed, as in stock.
    """
    from memo.models.unet_3d import UNet3DConditionOutput  # here, so that this file can be imported without memo

    # ---- TeaCache: a step that is skipped by extrapolation runs no part of the network ----
    timesteps = timestep if isinstance(timestep, list) else [timestep]
    sigma = torch.stack([torch.as_tensor(t).float().mean() for t in timesteps]).mean() / 1000
    portrait = ref_features["mid"][0][0][0]
    conditioning = [encoder_hidden_states, audio_embedding, audio_emotion, class_labels, mask_cond_fea, attention_mask]
    cache = find_step(self, sigma, sample)
    if update_past_memory:
        cache.branches_before = []  # nothing to reuse: the call is computed
    branch = cache.begin_call(sample, *conditioning, uc_mask, portrait)
    if cache.plan is not None and not cache.should_calc(branch):
        sample = extrapolate(branch.outputs, cache.sigma)
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
    if cache.by_threshold and cache.calls == 1:
        cache.accumulate(branch, modulated_input=sample)
    if cache.should_calc(branch):
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
        residual = sample - original_sample if cache.by_threshold else None
    else:
        residual = branch.previous_residual
        sample = sample + residual
    # ---- end of TeaCache ----

    # post-process
    sample = self.conv_norm_out(sample)
    sample = self.conv_act(sample)
    sample = self.conv_out(sample)

    cache.keep(branch, sample, residual)  # TeaCache: for the steps that are skipped
    return UNet3DConditionOutput(sample=sample) if return_dict else (sample,)


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
        with draft.open("rb") as file:
            if b"moov" not in file.read(64):  # put there last of all, by faststart; the writer tells of no failure
                raise OSError("ffmpeg did not end it")
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

        setting = name_setting(**settings)
        if False in schedule and is_corrected(pipeline.scheduler):
            setting += ", corrected"
        steps = f"{sum(schedule)} of {len(schedule)} steps computed ({setting})"
        print(f"saved {output}: {seconds:.1f} s, {steps}, seed {args.seed}")


if __name__ == "__main__":
    main()
