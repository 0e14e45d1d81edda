"""TeaCache for Lumina-Image-2.0: the same picture from fewer passes through the network, without training.

Between two denoising steps the input of the transformer's blocks, modulated by the timestep, changes a little,
and their output changes in proportion. TeaCache adds up the relative L1 change of that input, rescaled by a
polynomial; while the sum stays below `REL_L1_THRESH`, the blocks are skipped. First and last step are always
computed. The original then adds the residual of the last computed step again; here, the output goes on along the
line through the last two computed ones (`PREDICT`), which costs nothing and comes closer to the original picture.

Paper: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv 2411.19108.

    python teacache_lumina2.py                              # one picture; edit the constants below
    python teacache_lumina2.py --speedup 2                  # half of the steps, whatever the model
    python teacache_lumina2.py --compare 0 0.1 0.2 0.3      # a strip of them
    python teacache_lumina2.py --prompts FILE               # a picture a line

The command line needs options_lumina2.py and attention_lumina2.py beside this file. In your own code it needs nothing
else, and nothing happens at import:

    from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache, remove_teacache
    apply_teacache(pipeline.transformer, num_steps=30, speedup=2.0)  # or rel_l1_thresh=0.3
    image = pipeline("a red apple", num_inference_steps=30).images[0]
"""

import functools
import importlib
import inspect
import json
import math
import numbers
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import MethodType

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
try:
    import torch
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
except ImportError as error:
    if __name__ != "__main__":
        raise
    what = "teacache_lumina2: needs Python 3.10 or newer, torch, and diffusers"
    sys.exit(f"{what} ({error}): pip install torch -r {REQUIREMENTS}")

# ------------------------------------------------------------------------------
REL_L1_THRESH = 0.3  # 0: original | 0.1: 1.05x | 0.2: 1.15x | 0.3: 1.25x  (original authors, 4070 laptop, 1024x1536)
NUM_INFERENCE_STEPS = 30
GUIDANCE_SCALE = 4.0
CFG_TRUNC_RATIO = 1.0  # share of the steps that are guided
SEED = 1024
PROMPT = "a cat holding a sign that says hello"
NEGATIVE_PROMPT = ""
HEIGHT = WIDTH = None  # pixels, multiples of 16; None: the model's own, 1024 for Lumina-Image-2.0
MODEL = "Alpha-VLLM/Lumina-Image-2.0"  # the default where a CUDA GPU is there, otherwise:
BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "assets" / "lumina2-emoji"
BUNDLED_PROMPT = "smiling face with sunglasses"
# Rescaling polynomials, highest power first (ali-vilab/TeaCache, pull requests 70 and 76).
# v1 was fitted for Lumina-Next, v2 found for Lumina-Image-2.0 by a search on LPIPS.
COEFFICIENTS_V1 = [393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344]
COEFFICIENTS_V2 = [225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552]
COEFFICIENTS, DOMAIN = COEFFICIENTS_V1, None  # domain: lowest and highest change that they hold for; None: all
# For the timestep embedding, fitted for Lumina-Image-2.0 (welltop-cn/ComfyUI-TeaCache), to be used from 20 % on.
COEFFICIENTS_COMFYUI = [-874.643948, 466.059906, -75.1559762, 5.32836175, -0.0327258296]
COEFFICIENTS_TIMESTEP, DOMAIN_TIMESTEP = COEFFICIENTS_COMFYUI, None
RETAINED = 0.2  # share of the steps, from the first, that the timestep indicator computes always
INDICATOR = "modulated"  # what is watched: input of the blocks as modulated by the timestep (original), or "timestep"
INDICATORS = {
    "modulated": (REL_L1_THRESH, COEFFICIENTS, DOMAIN),
    "timestep": (0.38, COEFFICIENTS_TIMESTEP, DOMAIN_TIMESTEP),
}
SPEEDUP = None  # a number, 2.0 say, instead of the threshold: half of the steps are computed, no more and no fewer
PREDICT = "forecast"  # a skipped step: extrapolates the last two outputs; "hold": adds the last residual (original)
DAMPING = 0.5  # of the forecast, see Branch.predict
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


def lora_scaled(forward):
    """attention_kwargs={"scale": s} scales the LoRA layers (peft) during the call, also during one that fails."""
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        attention_kwargs = signature.bind(self, *args, **kwargs).arguments.get("attention_kwargs")
        scale = (attention_kwargs or {}).get("scale", 1.0)
        if USE_PEFT_BACKEND:
            scale_lora_layers(self, scale)
        try:
            return forward(self, *args, **kwargs)
        finally:
            if USE_PEFT_BACKEND:
                unscale_lora_layers(self, scale)

    return wrapper


def embed_time(model, timestep, latents):
    """The timestep embedding alone, (batch, width of it): stock computes it together with the caption's."""
    embedder = model.time_caption_embed
    return embedder.timestep_embedder(embedder.time_proj(timestep).type_as(latents))


def patchify(latents, p):
    """(batch, channels, height, width) to (batch, patches, p * p * channels): stock does it with the frequencies."""
    batch, channels, height, width = latents.shape
    grid = latents.view(batch, channels, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


@lora_scaled
def teacache_forward(
    self,
    hidden_states,
    timestep,
    encoder_hidden_states,
    encoder_attention_mask,
    attention_kwargs=None,
    return_dict=True,
):
    """`Lumina2Transformer2DModel.forward` (diffusers 0.33 to 0.42) with TeaCache.

    Settings are read from the instance or, the original TeaCache way, from its class: `enable_teacache` (True),
    `num_steps` (30), `rel_l1_thresh` and `coefficients` (the indicator's: 0.3 and v1), and those of `apply_teacache`:
    `domain` (None), `predict` ("forecast"), `indicator` ("modulated"), `speedup` (None). State is on the instance, in
    `self.teacache`.

    A skipped step runs what the decision needs and what stands in for the blocks: with "modulated" all up to the
    blocks; with "timestep" the timestep embedding; with a speedup nothing. With "hold", it also runs `x_embedder` (or
    all up to the blocks, with "modulated"), the timestep embedding and `norm_out`.

    Args:
        hidden_states: (batch, channels, height, width), the noisy latents; both sides multiples of the patch size.
        timestep: (batch,), 0 is noise and 1 the picture, as `Lumina2Pipeline` passes it; rising in a generation.
        encoder_hidden_states: (batch, tokens, cap_feat_dim), caption features.
        encoder_attention_mask: (batch, tokens), 1 for a token and 0 for padding.
        attention_kwargs: only "scale" is used, the LoRA scale.
        return_dict: a `Transformer2DModelOutput` if True, else a tuple of one.

    Returns: the predicted velocity, (batch, channels, height, width). With gradients enabled, at threshold 0, or
    with `enable_teacache = False` it is bit for bit the stock forward's.
    """
    batch_size, _, height, width = hidden_states.shape
    latents, caption, caption_mask = hidden_states, encoder_hidden_states, encoder_attention_mask

    # TeaCache, the one departure from stock: skip the blocks, or run them and remember what came of it.
    # Where the time alone decides, that is known here, and neither refiners nor caption are needed.
    branch, skip, early, predict = None, False, False, getattr(self, "predict", PREDICT)
    if getattr(self, "enable_teacache", True) and not torch.is_grad_enabled():
        state = vars(self).setdefault("teacache", TeaCacheState())
        indicator, speedup = getattr(self, "indicator", INDICATOR), getattr(self, "speedup", SPEEDUP)
        early = indicator == "timestep" or speedup is not None
        default_thresh, *default_rescaling = INDICATORS[indicator]
        thresh, rescaling = getattr(self, "rel_l1_thresh", default_thresh), default_rescaling
        if hasattr(self, "coefficients"):
            rescaling = self.coefficients, getattr(self, "domain", None)
        num_steps = getattr(self, "num_steps", NUM_INFERENCE_STEPS)
        tensors = (encoder_hidden_states, caption_mask)
        layout = (latents.shape, latents.dtype, latents.device, predict, early)
        progress = timestep.flatten()[0].item()
        branch = state.enter(progress, tensors, layout, num_steps, getattr(self, "cache_device", None))
        caching = (thresh > 0 or speedup is not None) and not state.last
        if speedup is not None:
            decision = due(state.times, state.schedule[: state.step], num_steps, count(num_steps, speedup), end=1.0)
            skip = state.skips(branch, None, thresh, *rescaling, due=decision)
        elif early:
            signal = embed_time(self, timestep, latents) if caching else None
            skip = state.skips(branch, signal, thresh, *rescaling, force=state.step < RETAINED * num_steps)
    else:
        vars(self).pop("teacache", None)  # what was cached would be too old for a later call

    if skip and predict == "hold":
        patches = self.x_embedder(patchify(latents, self.config.patch_size))
        temb, hidden = embed_time(self, timestep, latents), patches + branch.predict(progress, latents.device)
        spans = [(0, hidden.shape[1])] * batch_size
    elif not skip:
        # 1. Timestep and caption embedding, rotary frequencies, patches
        temb, caption = self.time_caption_embed(latents, timestep, caption)
        patches, caption_rotary, patch_rotary, rotary, caption_lens, seq_lens = self.rope_embedder(
            latents, caption_mask
        )
        patches = embedded = self.x_embedder(patches)  # (batch, patches, width of the model)

        # 2. Refiners
        for layer in self.context_refiner:
            caption = layer(caption, caption_mask, caption_rotary)
        for layer in self.noise_refiner:
            patches = layer(patches, None, patch_rotary, temb)

        # 3. Joint sequence: caption, picture, padding up to the longest of the batch
        joint = patches.new_zeros(batch_size, max(seq_lens), self.config.hidden_size)
        mask = patches.new_zeros(batch_size, max(seq_lens), dtype=torch.bool)
        spans = list(zip(caption_lens, seq_lens))  # where the pictures lie
        for i, (start, end) in enumerate(spans):
            joint[i, :start] = caption[i, :start]
            joint[i, start:end] = patches[i]
            mask[i, :end] = True
        mask = mask if len(set(seq_lens)) > 1 else None  # without padding none is needed

        # 4. Blocks
        if branch is not None and not early:
            modulated = self.layers[0].norm1(joint, temb)[0] if caching else None
            skip = state.skips(branch, modulated, thresh, *rescaling)
        hidden = joint + branch.predict(progress, latents.device) if skip and predict == "hold" else joint
        for layer in () if skip else self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(layer, hidden, mask, rotary, temb)
            else:
                hidden = layer(hidden, mask, rotary, temb)

    if skip and predict == "forecast":
        output = branch.predict(progress, latents.device).clone()  # the caller may write into it
    else:
        # 5. Output projection, patches to latents
        p, projected = self.config.patch_size, self.norm_out(hidden, temb)
        output = torch.stack(
            [
                projected[i, start:end]
                .view(height // p, width // p, p, p, self.out_channels)
                .permute(4, 0, 2, 1, 3)  # (channels, rows, p, columns, p)
                .reshape(self.out_channels, height, width)
                for i, (start, end) in enumerate(spans)
            ]
        )
        if branch is not None and caching and not skip:
            if predict == "forecast":
                made = output.clone()
            elif early:
                made = torch.stack([hidden[i, start:end] for i, (start, end) in enumerate(spans)]) - embedded
            else:
                made = hidden - joint
            branch.remember(progress, made, predict)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


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


# --- the command line -----------------------------------------------------------


def save(image, path):
    """Through a temporary file: a failure, which is an OSError, leaves what was there."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        image.save(draft)
        draft.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


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


def coefficients_of(path, indicator, predict):
    """Coefficients, domain and where they are from: a file that calibrate_lumina2.py wrote, else this script's.

    Coefficients that were edited in this script go before it. ValueError for a file that cannot be used.
    """
    _, coefficients, domain = INDICATORS[indicator]
    if coefficients not in (COEFFICIENTS_V1, COEFFICIENTS_COMFYUI):
        return coefficients, domain, "as edited in this script"
    if not path.is_file():
        whose = "v1" if coefficients == COEFFICIENTS_V1 else "of ComfyUI-TeaCache"
        return coefficients, domain, f"{whose}, not fitted to it"
    try:
        fit = json.loads(path.read_text(encoding="utf-8"))[predict][indicator]
        coefficients, domain = [[float(x) for x in fit[key]] for key in ("coefficients", "domain")]
        check_settings(1, 0, coefficients, domain)
        return coefficients, domain, f"{path}, fitted to it"
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{path} holds no coefficients for {indicator} and {predict}"
        raise ValueError(f"{what}: calibrate anew, or move it away ({error!r})") from None


def generate(pipeline, args, prompt, thresh, steps=None, seed=None):
    """A PIL image and its figures: seconds, computed and all steps. Settings that are not given are those of args."""
    steps = steps or args.num_inference_steps
    names = "coefficients", "predict", "indicator", "domain", "speedup", "cache_device"
    apply_teacache(pipeline.transformer, steps, thresh, **{name: getattr(args, name) for name in names})
    generator = torch.Generator().manual_seed(args.seed if seed is None else seed)  # CPU: equal noise on every device
    synchronize = getattr(torch, args.device).synchronize
    synchronize()
    began = time.perf_counter()
    image = pipeline(
        prompt,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=steps,
        guidance_scale=args.guidance_scale,
        cfg_trunc_ratio=args.cfg_trunc_ratio,
        generator=generator,
    ).images[0]
    synchronize()
    schedule = pipeline.transformer.teacache.schedule
    figures = {"seconds": time.perf_counter() - began, "computed": sum(schedule), "steps": len(schedule)}
    return image, figures | {"schedule": [i for i, computed in enumerate(schedule) if computed]}


def explain(speedup, computed):
    """What a speedup chose: how much of the way may pass without a computed step, and the steps that were computed."""
    threshold, computed = 1 / max(len(computed) - 1, 1), " ".join(map(str, computed))
    return f"speedup {speedup:g}: threshold about {threshold:.3f} of the way; computed: {computed}"


def main(argv=None):
    options = beside("options_lumina2", "the command line")
    args = options.parse(argv)
    try:
        run(args, options)
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        print("\nstopped" + ": the same command goes on from here" * bool(args.prompts), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        fail(options.why(error, args))


def run(args, options):
    pipeline = None if args.prompts else options.load_pipeline(args)  # for a file, once it is known what is missing
    if args.fitted:
        options.tell(f"Coefficients for {args.indicator}: {args.fitted}")
    if args.prompts:
        sys.exit(args.tool.draw(args, options.load_pipeline, generate, options.why))
    if args.compare:
        args.tool.compare(functools.partial(generate, pipeline, args), args, save)
        return
    for prompt, path in zip(args.prompt, args.outputs):
        image, figures = generate(pipeline, args, prompt, args.rel_l1_thresh)
        save(image, path)
        computed, steps = figures["computed"], figures["steps"]
        if args.speedup is not None:
            print(explain(args.speedup, figures["schedule"]))
        print(f"saved {path}: {figures['seconds']:.2f} s, {computed} / {steps} steps ({steps / computed:.2f}x fewer)")


if __name__ == "__main__":
    main()
