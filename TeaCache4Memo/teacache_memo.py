"""TeaCache for MEMO: the same talking head from fewer passes through the network, without training.

MEMO (arXiv 2412.04448) turns a portrait and a voice into video, in clips of 16 frames, each denoised in 20 steps by a
UNet. Between two steps the features of its input convolution change a little, and the output of its blocks, so TeaCache
takes it, in proportion. It adds up their relative L1 change; while the sum stays below `REL_L1_THRESH`, the blocks are
skipped, and what they added at the last computed step is added again. Computed always: the first and the last step of a
clip, and every step that writes MEMO's memory of past frames.

Paper: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv 2411.19108.

    python teacache_memo.py                                  # memo's own example; edit the constants below
    python teacache_memo.py --input_image face.jpg --input_audio speech.wav --output_dir outputs
    python teacache_memo.py --compare 0 0.09 0.15 0.25       # side by side
    python teacache_memo.py --pairs FILE                     # a video a line

The command line needs options_memo.py and prepare_memo.py beside this file. In your own code it needs nothing else;
nothing happens at import, and memo need not be installed for it:

    from TeaCache4Memo.teacache_memo import apply_teacache, load_pipeline
    pipeline, audio_proj = load_pipeline("memoavatar/memo")
    apply_teacache(pipeline.diffusion_net, num_steps=20, rel_l1_thresh=0.15)
"""

import functools
import importlib
import math
import numbers
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace

try:
    import torch
    from diffusers.utils import logging
except ImportError as error:
    if __name__ != "__main__":
        raise
    what = "teacache_memo: needs Python 3.10 or newer, torch, and diffusers"
    sys.exit(f"{what} ({error}): pip install torch diffusers, and memo after it")

# ------------------------------------------------------------------------------
REL_L1_THRESH = 0.15  # 0: original | 0.09: 1.2x | 0.15: 1.8x | 0.25: 2.9x fewer passes (20 steps, see README)
NUM_INFERENCE_STEPS = 20  # for apply_teacache; the script takes inference_steps from CONFIG
SEED = 42
INPUT_IMAGE = "assets/examples/dicaprio.jpg"  # these three are looked for here, then in the folder of memo's code
INPUT_AUDIO = "assets/examples/speech.wav"
CONFIG = "configs/inference.yaml"
OUTPUT_DIR = "outputs"
MODEL = "memoavatar/memo"  # for load_pipeline; the script takes model_name_or_path and vae from CONFIG
VAE = "stabilityai/sd-vae-ft-mse"
COEFFICIENTS = [1.0, 0.0]  # rescaling polynomial, highest power first: identity, none was fitted for MEMO
INDICATOR = "features"  # of the input convolution
INDICATORS = {"features": (REL_L1_THRESH, COEFFICIENTS, None)}  # threshold, coefficients, domain
SPEEDUP = None  # a number, 2.0 say, instead of the threshold: half of the steps are computed, no more and no fewer
PREDICT = "hold"  # a skipped step: "hold" adds the last residual again (original), "forecast" extrapolates the output
DAMPING = 0.5  # of the forecast, see Branch.predict
INSTALL_MEMO = "git clone https://github.com/memoavatar/memo && pip install -e memo"
# ------------------------------------------------------------------------------


# --- the state of a generation ------------------------------------------------


class Branch:
    """What is remembered for one conditioning of a running generation; guidance in two passes has two of them."""

    def __init__(self, tensors, layout, device=None):
        self.tensors, self.layout = tensors, layout  # what it is known by
        self.device = device  # keeps what is cached; None: wherever that was made
        self.step = -1  # the last step that called it
        self.signal = None  # what the indicator saw at that step
        self.computed = []  # (time, tensor) of the last computed step, or two: what predict() continues

    def has(self, tensors):
        """These very tensors, or (where a caller casts anew at each call) equal ones."""
        return all(
            a is b or ((a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b))
            for a, b in zip(self.tensors, tensors)
        )

    def remember(self, time, tensor, predict):
        """Keep the output (forecast: and the one before it) or residual (hold) of a computed step."""
        before = [(t, x) for t, x in self.computed if t < time and predict == "forecast"]  # a step may be called again
        self.computed = [*before[-1:], (time, tensor.to(self.device or tensor.device))]

    def predict(self, time, device):
        """The last computed tensor, carried on along the line through the last two where two are kept.

        The further it is carried, in units of the gap between the two, the less the line is trusted.
        """
        last_time, last = self.computed[-1]
        last = last.to(device)
        if len(self.computed) == 1:
            return last
        time_before, before = self.computed[0]
        before = before.to(device)
        gap = (time - last_time) / (last_time - time_before)
        return last + (last - before) * (gap / (1 + DAMPING * gap))


class TeaCacheState:
    """Where a model stands in a generation: the step, the decision for it, and its branches.

    It sees only the calls. All calls of one step share their `time`, and it rises from step to step. A time that
    falls, or a conditioning that has nothing of the last step's, begins a new generation: so an interrupted one, or
    one with another prompt, size or batch, leaves nothing to the next. A branch that misses a step is forgotten.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.step, self.time, self.last = -1, -math.inf, False
        self.times = []  # of all steps so far
        self.compute = None  # the decision for this step, for all its branches; None: not yet made
        self.accumulated = 0.0  # rescaled relative L1 change since the last computed step
        self.schedule = []  # the decisions of this generation: True for a step that is computed
        self.branches = []

    def enter(self, time, tensors, layout, num_steps, device=None):
        """The branch of this call, after moving to its step. When the last step begins, all branches are let go.

        tensors: the conditioning; the last is the very same object throughout a generation, even where another is
        replaced midway (as callback_on_step_end may). layout: plain values that a generation keeps: the latents' shape.
        device: keeps what is cached.
        """
        if time != self.time:
            self.branches = [b for b in self.branches if b.step == self.step and b.layout == layout]
            goes_on = any(b.tensors[-1] is tensors[-1] or b.has(tensors) for b in self.branches)
            if self.last and time > self.time:
                warn_of_steps(f"a generation goes on after the {num_steps} steps of num_steps")
            elif not self.last and self.step >= 0 and (time < self.time or not goes_on):
                warn_of_steps(
                    f"a generation was interrupted, or has {self.step + 1} steps, not {num_steps} as num_steps"
                )
            if time < self.time or not goes_on:
                self.reset()
            self.step, self.time, self.compute = self.step + 1, time, None
            self.times.append(time)
        self.last = self.step >= num_steps - 1
        if self.last:
            self.branches = []
        branch = next((b for b in self.branches if b.layout == layout and b.has(tensors)), None)
        if branch is None:
            branch = Branch(tensors, layout, device)
            if not self.last:
                self.branches.append(branch)
        branch.step = self.step
        return branch

    def skips(self, branch, signal, thresh, coefficients, domain, force=False, due=None):
        """Whether this call is skipped. The first call of a step decides for all of its branches.

        signal: what the indicator sees, compared with the last step's. force: this step is computed, whatever it sees.
        due: the decision, where it was made without looking (see `due`).
        """
        if self.compute is None:
            compute = force or not branch.computed or due
            if compute is None:
                compute = signal is None or branch.signal is None
                if not compute:
                    change = relative_l1(signal, branch.signal.to(signal.device))
                    self.accumulated += rescale(coefficients, change, domain)
                    compute = not self.accumulated < thresh  # a NaN computes
            self.decide(compute)
        branch.signal = signal if signal is None else signal.to(branch.device or signal.device)
        return not (self.compute or force) and bool(branch.computed)

    def decide(self, compute):
        self.compute = compute
        self.schedule.append(compute)
        if compute:
            self.accumulated = 0.0


def warn_of_steps(what):
    """Where num_steps is not the pipeline's, another step than the last is taken for it."""
    warnings.warn(f"TeaCache: {what}: num_steps must be the pipeline's num_inference_steps", stacklevel=3)


def relative_l1(new, old):
    """mean |new - old| / mean |old|, accumulated in float32."""
    return ((new - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)).item()


def rescale(coefficients, x, domain=None):
    """The polynomial at x, highest power first, in float64 (as numpy.polyval); beyond its domain, at the nearer end."""
    x = min(max(x, domain[0]), domain[1]) if domain else x
    y = 0.0
    for c in coefficients:
        y = y * x + c
    return y


def count(num_steps, speedup):
    """How many of `num_steps` are computed at this speedup: at least the first and the last."""
    return max(round(num_steps / speedup), min(num_steps, 2))


def due(times, schedule, num_steps, wanted, end):
    """Whether the step at times[-1] is computed, so that `wanted` of `num_steps` are, first and last among them.

    times: of the steps so far, this one included; schedule: the decisions before it; end: the time of the picture.
    What is left of the way from noise to picture, measured half in steps and half in time, is divided by the steps
    that may still be computed: even in steps alone is too sparse where the scheduler takes large steps in time, even
    in time alone skips too many in a row where it takes small ones. Needs no knowledge of the steps to come.
    """

    def place(step):  # 0 at the first step, 1 at the picture
        return (step / num_steps + (times[step] - times[0]) / ((end - times[0]) or 1.0)) / 2

    step = len(times) - 1
    to_compute, to_come = wanted - sum(schedule), num_steps - step  # of those to come, this one among them
    if step == 0 or to_compute <= 1 or to_come <= to_compute:
        return step == 0 or to_come <= max(to_compute, 1)
    pace = place(step) - place(step - 1)
    since = place(max(i for i, computed in enumerate(schedule) if computed))
    next_one = since + (1 - pace - since) / to_compute  # 1 - pace: about where the last step will be
    return place(step) + pace / 2 >= next_one


# --- the forward ----------------------------------------------------------------


def teacache_forward(
    self,
    sample,
    ref_features,
    timestep,
    encoder_hidden_states,
    audio_embedding=None,
    audio_emotion=None,
    class_labels=None,
    mask_cond_fea=None,
    attention_mask=None,
    down_block_additional_residuals=None,
    mid_block_additional_residual=None,
    uc_mask=None,
    return_dict=True,
    is_new_audio=True,
    update_past_memory=False,
):
    """`UNet3DConditionModel.forward` (memo, commit a5aee30) with TeaCache around the down, mid and up blocks.

    Settings are read from the instance or, the original TeaCache way, from its class: `enable_teacache` (True),
    `num_steps` (20), `rel_l1_thresh` (0.15), `coefficients` (identity), and those of `apply_teacache`: `domain` (None),
    `predict` ("hold"), `speedup` (None). State is on the instance, in `self.teacache`.

    Args:
        sample: (batch, channels, frames, height, width), the noisy latents; batch 2 with guidance, unconditional first.
        ref_features: memo's reference net's, {"down": [...], "mid": [...], "up": [...]}, portrait and past frames.
        timestep: number, tensor of 0 or 1 dimensions, or a list of them, one for each frame; falling in a clip.
        encoder_hidden_states: (batch, tokens, cross_attention_dim), face embedding.
        audio_embedding: (batch, frames, tokens, audio_attention_dim).
        audio_emotion: (batch,), labels.
        class_labels: (batch,), for models with a class embedding.
        mask_cond_fea: added to the features of `conv_in`.
        attention_mask: (batch * frames, tokens), 1 for a token and 0 for padding.
        down_block_additional_residuals, mid_block_additional_residual: added to the features, as by a ControlNet.
        uc_mask: (batch * frames,), True where the portrait is not attended to.
        return_dict: memo's `UNet3DConditionOutput` if True, else a tuple of one.
        is_new_audio: the memory of past frames is begun anew.
        update_past_memory: the memory takes in the past frames; such a call is always computed.

    Returns: the predicted velocity, (batch, channels, frames, height, width). With gradients enabled, at threshold 0,
    or with `enable_teacache = False` it is bit for bit the stock forward's. Raises ValueError for one emotion without
    a batch, which memo's pipeline passes when guidance is off.
    """
    from memo.models.unet_3d import UNet3DConditionOutput

    if torch.is_tensor(audio_emotion) and audio_emotion.ndim == 0:
        raise ValueError("audio_emotion needs a label a sample; memo's pipeline gives that with guidance_scale > 1")
    timesteps = timestep if isinstance(timestep, list) else [timestep]

    # 1. Input features
    latents = 2 * sample - 1.0 if self.config.get("center_input_sample", False) else sample
    features = self.conv_in(latents)  # (batch, block_out_channels[0], frames, height, width)
    if mask_cond_fea is not None:
        features = features + mask_cond_fea

    # TeaCache, the one departure from stock: skip the blocks, or run them and remember what they added
    branch, skip, predict = None, False, getattr(self, "predict", PREDICT)
    if getattr(self, "enable_teacache", True) and not torch.is_grad_enabled():
        state = vars(self).setdefault("teacache", TeaCacheState())
        thresh, speedup = getattr(self, "rel_l1_thresh", REL_L1_THRESH), getattr(self, "speedup", SPEEDUP)
        rescaling = getattr(self, "coefficients", COEFFICIENTS), getattr(self, "domain", None)  # highest power first
        num_steps = getattr(self, "num_steps", NUM_INFERENCE_STEPS)
        progress = -sum(torch.as_tensor(t, dtype=torch.float32).mean().item() for t in timesteps)  # memo's t falls
        conditioning = [encoder_hidden_states, audio_embedding, audio_emotion, class_labels, mask_cond_fea]
        conditioning += [attention_mask, uc_mask, ref_features["mid"][0][0][0]]  # the last: one object for the clip
        given = [tensor is not None for tensor in conditioning]
        tensors = [tensor for tensor in conditioning if tensor is not None]
        layout = (sample.shape, sample.dtype, sample.device, given, predict)
        branch = state.enter(progress, tensors, layout, num_steps, getattr(self, "cache_device", None))
        caching, decision = (thresh > 0 or speedup is not None) and not state.last, None
        if speedup is not None:
            decision = due(state.times, state.schedule[: state.step], num_steps, count(num_steps, speedup), end=0.0)
        signal = features if caching and speedup is None else None
        skip = state.skips(branch, signal, thresh, *rescaling, force=update_past_memory, due=decision)
    else:
        vars(self).pop("teacache", None)  # what was cached would be too old for a later call

    if skip and predict == "hold":
        hidden = features + branch.predict(progress, sample.device)
    elif not skip:
        # 2. Timestep and class embedding, (batch, channels) or, for a list of timesteps, (batch, frames, channels)
        embedded = []
        for t in timesteps:
            if not torch.is_tensor(t):  # in a list, stock cuts off the fraction
                t = torch.tensor(t if isinstance(timestep, float) else int(t))
            embedded.append(self.time_proj(t.to(sample.device).flatten().expand(len(sample))).to(self.dtype))
        temb = self.time_embedding(torch.stack(embedded, dim=1) if isinstance(timestep, list) else embedded[0])
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("this model has a class embedding: give class_labels")
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels)
            temb = temb + self.class_embedding(class_labels).to(self.dtype)

        # 3. Blocks; those with cross-attention hear the audio, and pass it on
        if attention_mask is not None:
            attention_mask = ((1 - attention_mask.to(sample.dtype)) * -10000.0).unsqueeze(1)
        hears = {"attention_mask": attention_mask, "emotion": audio_emotion, "uc_mask": uc_mask}
        common = {"temb": temb, "encoder_hidden_states": encoder_hidden_states}
        common |= {"is_new_audio": is_new_audio, "update_past_memory": update_past_memory}

        def inputs(block, ref_feature_list):
            crosses = getattr(block, "has_cross_attention", False)
            audio = {"audio_embedding": audio_embedding, **hears} if crosses else {}
            return {"ref_feature_list": ref_feature_list, **common, **audio}

        hidden, skips = features, (features,)
        for i, block in enumerate(self.down_blocks):
            hidden, outputs, *audio = block(hidden_states=hidden, **inputs(block, ref_features["down"][i]))
            audio_embedding = audio[0] if audio else audio_embedding
            skips += outputs
        if down_block_additional_residuals is not None:
            skips = tuple(a + b for a, b in zip(skips, down_block_additional_residuals))

        hidden, audio_embedding = self.mid_block(hidden, **inputs(self.mid_block, ref_features["mid"][0]))
        if mid_block_additional_residual is not None:
            hidden = hidden + mid_block_additional_residual

        divisible = all(side % 2**self.num_upsamplers == 0 for side in sample.shape[-2:])
        size = None  # (frames, height, width) to upsample to, where doubling would not meet the skip connection
        for i, block in enumerate(self.up_blocks):
            skips, taken = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            if not divisible and i < len(self.up_blocks) - 1:
                size = skips[-1].shape[2:]
            up = {"res_hidden_states_tuple": taken, "upsample_size": size, **inputs(block, ref_features["up"][i])}
            output = block(hidden_states=hidden, **up)
            hidden, audio_embedding = output if isinstance(output, tuple) else (output, audio_embedding)

    # 4. Output convolution
    if skip and predict == "forecast":
        output = branch.predict(progress, sample.device).clone()  # the caller may write into it
    else:
        output = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        if branch is not None and caching and not skip:
            branch.remember(progress, output.clone() if predict == "forecast" else hidden - features, predict)
    return UNet3DConditionOutput(sample=output) if return_dict else (output,)


SETTINGS = (
    "enable_teacache",
    "num_steps",
    "rel_l1_thresh",
    "coefficients",
    "domain",
    "predict",
    "indicator",
    "speedup",
    "cache_device",
)


def check_settings(
    num_steps,
    rel_l1_thresh,
    coefficients=(1.0, 0.0),
    domain=None,
    predict=PREDICT,
    indicator=INDICATOR,
    speedup=None,
    cache_device=None,
):
    """ValueError with what to do, for settings that make no sense."""
    if not isinstance(num_steps, numbers.Integral) or num_steps < 1:
        raise ValueError(f"the number of steps must be a whole number of at least 1, not {num_steps}")
    if not (math.isfinite(rel_l1_thresh) and rel_l1_thresh >= 0):
        raise ValueError(f"rel_l1_thresh must be a number of at least 0 (0: nothing is skipped), not {rel_l1_thresh}")
    if len(coefficients) == 0 or not all(map(math.isfinite, coefficients)):
        raise ValueError(f"coefficients must be finite numbers, highest power first, not {coefficients}")
    if domain is not None and not (len(domain) == 2 and -math.inf < domain[0] <= domain[1] < math.inf):
        raise ValueError(f"domain must be None or two numbers, the lower first, not {domain}")
    if predict not in ("hold", "forecast"):
        raise ValueError(f"predict must be hold or forecast, not {predict}")
    if indicator not in INDICATORS:
        raise ValueError(f"indicator must be {' or '.join(INDICATORS)}, not {indicator}")
    most = max(num_steps / 2, 1)
    if speedup is not None and not 1 <= speedup <= most:
        raise ValueError(
            f"speedup must lie between 1 and {most:g} for {num_steps} steps, as the first and the last "
            f"are always computed, not {speedup:g}"
        )
    try:
        torch.device(cache_device or "cpu")
    except RuntimeError:
        raise ValueError(f'cache_device must be None or a device of torch, such as "cpu", not {cache_device}') from None


def apply_teacache(
    model,
    num_steps=NUM_INFERENCE_STEPS,
    rel_l1_thresh=None,
    coefficients=None,
    predict=PREDICT,
    *,
    indicator=INDICATOR,
    domain=None,
    speedup=None,
    cache_device=None,
):
    """Give this one model TeaCache; others are untouched. Applying it again changes the settings, and starts afresh.

    Args:
        model: the pipeline's model, before or after accelerate's offloading was enabled.
        num_steps: the pipeline's `num_inference_steps`, so that the last step is known.
        rel_l1_thresh: 0 skips nothing; more skips more. None: the indicator's, in `INDICATORS`.
        coefficients: of the rescaling polynomial, highest power first; None: the indicator's, in `INDICATORS`.
        predict: "hold" adds the last residual again, as the original; "forecast" extrapolates the last two outputs.
        indicator: what is watched from step to step, a name in `INDICATORS`.
        domain: (lowest, highest) relative change that `coefficients` were fitted to; None: they hold everywhere.
        speedup: instead of a threshold: `num_steps / speedup` steps are computed, rounded. It watches nothing.
            None: `SPEEDUP`, where no threshold is given either.
        cache_device: keeps what is cached, "cpu" say; None: the device that it was made on.

    Raises ValueError for settings that make no sense, and for a model whose forward something else has replaced.
    Returns the model.
    """
    if not isinstance(model, torch.nn.Module):
        what = "pipeline.transformer or pipeline.diffusion_net"
        raise ValueError(f"give the model itself, such as {what}, not a {type(model).__name__}")
    if speedup is not None and rel_l1_thresh is not None:
        raise ValueError("give rel_l1_thresh or speedup, not both")
    speedup = SPEEDUP if speedup is None and rel_l1_thresh is None else speedup
    default_thresh, default_coefficients, default_domain = INDICATORS.get(indicator, (0, [0], None))
    rel_l1_thresh = default_thresh if rel_l1_thresh is None else rel_l1_thresh
    domain = default_domain if coefficients is None and domain is None else domain
    coefficients = list(default_coefficients if coefficients is None else coefficients)
    check_settings(num_steps, rel_l1_thresh, coefficients, domain, predict, indicator, speedup, cache_device)
    setattr(model, forward_slot(model), MethodType(teacache_forward, model))
    vars(model).pop("teacache", None)
    rescaling = float(rel_l1_thresh), coefficients, domain
    settings = True, int(num_steps), *rescaling, predict, indicator, speedup, cache_device
    for name, value in zip(SETTINGS, settings):
        setattr(model, name, value)
    return model


def remove_teacache(model):
    """The stock forward again; no attribute and no tensor is left behind. Returns the model."""
    if "coefficients" in vars(model):  # apply_teacache was here
        slot = forward_slot(model)
        vars(model).pop(slot, None)
        if slot == "_old_forward":
            model._old_forward = MethodType(type(model).forward, model)
    for name in (*SETTINGS, "teacache"):
        vars(model).pop(name, None)
    return model


def forward_slot(model):
    """The attribute that holds the model's own forward: accelerate's offloading hooks keep it in `_old_forward`."""
    slot = "_old_forward" if "_old_forward" in vars(model) else "forward"
    own = getattr(getattr(model, slot), "__func__", None) in (teacache_forward, type(model).forward)
    if not own or getattr(model, "_compiled_call_impl", None) is not None:
        what = "this model's forward was replaced by something else (a hook, torch.compile)"
        raise ValueError(f"{what}: undo that first, and compile the blocks in the model instead of the model")
    return slot


# --- memo -----------------------------------------------------------------------


def import_memo():
    """memo's classes. xformers, which memo imports whether or not it can be used, need not be there."""
    stand_ins = {}
    try:
        if not torch.cuda.is_available():
            raise ImportError("xformers is of no use without CUDA")
        importlib.import_module("xformers.ops")
    except Exception:  # not installed, or built for another torch
        stand_ins = {name: ModuleType(name) for name in ("xformers", "xformers.ops") if name not in sys.modules}
        sys.modules.update(stand_ins)
    try:
        from memo.models.attention_processor import MemoryLinearAttnProcessor
        from memo.models.audio_proj import AudioProjModel
        from memo.models.image_proj import ImageProjModel
        from memo.models.motion_module import MemoryLinearAttention
        from memo.models.unet_2d_condition import UNet2DConditionModel
        from memo.models.unet_3d import UNet3DConditionModel
        from memo.pipelines.video_pipeline import VideoPipeline
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
    networks = AudioProjModel, ImageProjModel, UNet2DConditionModel, UNet3DConditionModel
    classes = *networks, MemoryLinearAttention, MemoryLinearAttnProcessor, VideoPipeline
    return SimpleNamespace(**{c.__name__: c for c in classes})


def set_memory_processors(diffusion_net):
    """Give MEMO's memory attention its processor, with an empty memory. Returns the model.

    `from_pretrained` leaves diffusers' default there, with which the first call is a TypeError, unless xformers is
    enabled afterwards.
    """
    memo = import_memo()
    for module in diffusion_net.modules():
        if isinstance(module, memo.MemoryLinearAttention):
            module.set_processor(memo.MemoryLinearAttnProcessor())
    return diffusion_net


def load_pipeline(model=MODEL, vae=VAE, device=None, dtype=torch.bfloat16, xformers=True):
    """memo's `VideoPipeline` and `AudioProjModel`, ready to run.

    Args:
        model: Hub name, or folder: memo's own layout (diffusion_net, reference_net, image_proj, audio_proj), or a
            pipeline saved by diffusers (model_index.json) with audio_proj beside its parts.
        vae: Hub name or folder of the VAE, for memo's own layout; a saved pipeline brings its own.
        device: default CUDA where there is one, else the CPU.
        dtype: of all but the audio projection, which stays in float32 on the CPU, as in memo.
        xformers: use its attention where it works; it needs CUDA.

    Raises ImportError where memo or what it needs is not installed, OSError where a part of the model is missing.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    memo = import_memo()
    if (Path(model) / "model_index.json").is_file():
        pipeline = memo.VideoPipeline.from_pretrained(model)
    else:
        parts = {
            "reference_net": memo.UNet2DConditionModel,
            "diffusion_net": memo.UNet3DConditionModel,
            "image_proj": memo.ImageProjModel,
        }
        load = {"use_safetensors": True}
        pipeline = memo.VideoPipeline(
            vae=AutoencoderKL.from_pretrained(vae),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            **{name: part.from_pretrained(model, subfolder=name, **load) for name, part in parts.items()},
        )
    audio_proj = memo.AudioProjModel.from_pretrained(model, subfolder="audio_proj", use_safetensors=True)
    for part in (pipeline.vae, pipeline.reference_net, pipeline.diffusion_net, pipeline.image_proj, audio_proj):
        part.requires_grad_(False).eval()

    set_memory_processors(pipeline.diffusion_net)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if xformers and device.type == "cuda":
        try:  # each raises before it has changed anything where xformers is missing or does not run
            pipeline.reference_net.enable_xformers_memory_efficient_attention()
            pipeline.diffusion_net.enable_xformers_memory_efficient_attention()
        except Exception as error:
            logging.get_logger(__name__).info(f"xformers is not used: {error}")
    return pipeline.to(device=device, dtype=dtype), audio_proj


def generate(
    pipeline,
    audio_proj,
    inputs,
    config,
    seed,
    predict,
    thresh,
    steps=None,
    max_clips=None,
    speedup=None,
    cache_device=None,
    quiet=False,
):
    """The video, clip by clip, each beginning with the last frames of the one before.

    Args:
        inputs: `pixel_values` (1, 3, height, width) in [-1, 1] and `face_emb` (1, 512) of the portrait; `audio_emb`
            (frames, window, blocks, channels), `audio_emotion` (frames,) and `num_emotion_classes` of the voice.
        config: memo's configs/inference.yaml as a namespace.
        seed: of the noise, drawn on the CPU.
        predict, thresh, speedup, cache_device: of TeaCache, a threshold or a speedup.
        steps, max_clips: fewer than `config` and the voice ask for.
        quiet: no progress bar.

    Returns: frames (frames, height, width, 3), uint8; figures: seconds, steps computed, all steps, and "schedule", the
        numbers of the steps that the last clip computed.
    """
    from tqdm import tqdm

    steps = steps or config.inference_steps
    settings = {"predict": predict, "speedup": speedup, "cache_device": cache_device}
    apply_teacache(pipeline.diffusion_net, steps, thresh, **settings)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    size = config.num_generated_frames_per_clip
    clips = min(len(inputs.audio_emb) // size, max_clips or math.inf)
    past = inputs.pixel_values.repeat(config.num_init_past_frames, 1, 1, 1)  # (past frames, 3, height, width)
    frames, computed, total = [], 0, 0
    began = time.perf_counter()
    what = f"speedup {speedup:g}" if speedup else f"threshold {thresh:g}"
    bar = tqdm(total=clips, unit="clip", desc=what, disable=quiet)
    with bar, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # memo is written for diffusers 0.31
        for clip in range(clips):
            window = slice(clip * size, (clip + 1) * size)
            audio = inputs.audio_emb[window].unsqueeze(0).to(audio_proj.device, audio_proj.dtype)
            video = pipeline(
                ref_image=torch.cat([inputs.pixel_values, past]).unsqueeze(0),
                face_emb=inputs.face_emb,
                audio_tensor=audio_proj(audio),
                audio_emotion=inputs.audio_emotion[window],
                emotion_class_num=inputs.num_emotion_classes,
                width=config.resolution,
                height=config.resolution,
                video_length=size,
                num_inference_steps=steps,
                guidance_scale=config.cfg_scale,
                generator=generator,
                is_new_audio=clip == 0,
            ).videos[0]  # (3, frames, height, width) in [0, 1]
            past = video.transpose(0, 1)[-config.num_past_frames :].to(inputs.pixel_values) * 2 - 1
            frames.append((video.permute(1, 2, 3, 0) * 255).clamp(0, 255).to(torch.uint8))
            schedule = pipeline.diffusion_net.teacache.schedule
            computed, total = computed + sum(schedule), total + len(schedule)
            bar.set_postfix_str(f"{computed} / {total} steps computed", refresh=False)
            bar.update()
    seconds = time.perf_counter() - began
    figures = {"seconds": seconds, "computed": computed, "steps": total}
    return torch.cat(frames).numpy(), figures | {"schedule": [i for i, computed in enumerate(schedule) if computed]}


# --- the command line -----------------------------------------------------------


def fail(message):
    """One line on stderr, exit code 2; with --verbose the traceback of what led to it goes before."""
    if "--verbose" in sys.argv and sys.exc_info()[0]:
        traceback.print_exc()
    print(f"{Path(__file__).stem}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def beside(name, flag):
    """A module that lies beside this script, for the flag that needs it."""
    try:
        return importlib.import_module(f"{__package__}.{name}" if __package__ else name)
    except ImportError as error:
        fail(f"{flag} needs {name}.py beside this script, and what that imports: {error}")


def explain(speedup, computed):
    """What a speedup chose: how much of the way may pass without a computed step, and the steps that were computed."""
    threshold, computed = 1 / max(len(computed) - 1, 1), " ".join(map(str, computed))
    return f"speedup {speedup:g}: threshold about {threshold:.3f} of the way; computed: {computed}"


def main(argv=None):
    options = beside("options_memo", "the command line")
    args = options.parse(argv)
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said here, in one line
    try:
        run(args, options)
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        print("\nstopped" + ": the same command goes on from here" * bool(args.pairs), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        fail(options.why(error, args))


def run(args, options):
    if args.pairs:
        sys.exit(args.tool.draw(args, options, load_pipeline, generate))
    with tempfile.TemporaryDirectory(prefix="teacache_memo_") as folder:
        inputs = options.prepare(args, args.input_image, args.input_audio, Path(folder))
        pipeline, audio_proj = options.load(args, load_pipeline)
        made = functools.partial(generate, pipeline, audio_proj, inputs, args.config, args.seed, args.predict)
        made = functools.partial(made, cache_device=args.cache_device)
        write_video = args.prepare_memo.write_video
        if args.compare:
            args.tool.compare(made, inputs, args, write_video)
            return
        frames, figures = made(args.rel_l1_thresh, speedup=args.speedup)
        frames = frames[: inputs.length]
        write_video(frames, args.output, args.config.fps, inputs.sound)
    computed, steps, each = figures["computed"], figures["steps"], figures["seconds"] / len(frames)
    if args.speedup is not None:
        print(explain(args.speedup, figures["schedule"]))
    print(f"saved {args.output}: {len(frames)} frames, {each:.2f} s a frame", end=", ")
    print(f"{computed} / {steps} steps ({steps / computed:.2f}x fewer passes)")


if __name__ == "__main__":
    main()
