"""TeaCache (arXiv 2411.19108) for Lumina-Image-2.0: training-free caching, in one self-contained script.

When the timestep-modulated input of the transformer has barely changed since the last computed step, TeaCache skips
the transformer blocks and adds their last residual again (order 0). With a number of computed steps, or a tolerance, it
extrapolates the last two outputs instead (order 1), and a skipped step runs no part of the network.

    python teacache_lumina2.py --computed-steps 15                  # or edit the constants below
    from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache  # no side effects
    apply_teacache(pipeline.transformer, num_steps=30, computed_steps=15)  # or rel_l1_thresh=0.3
    image = pipeline("a red apple", num_inference_steps=30).images[0]
"""

import argparse
import math
import time
import warnings
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

# ------------------------------------------------------------------------------
REL_L1_THRESH = 0.3  # 0: original | 0.1: 1.05x | 0.2: 1.15x | 0.3: 1.25x  (original authors, 4070 laptop, 1024x1536)
COMPUTED_STEPS = None  # instead of the threshold: compute exactly this many steps, say 15 of 30
TOLERANCE = None  # instead: compute when the expected error of skipping, summed over time, reaches this, say 0.003
# The default is TeaCache as published. The other two are better on the bundled model, and untested on the real weights.
ORDER = 0  # skipped steps under a threshold. 0: add the last residual (TeaCache) | 1: extrapolate the last two outputs
NUM_INFERENCE_STEPS = 30
GUIDANCE_SCALE = 4.0
CFG_TRUNC_RATIO = 1.0  # share of the steps with guidance
SEED = 1024
PROMPT = "smiling face with sunglasses"
NEGATIVE_PROMPT = ""
HEIGHT = WIDTH = None  # pixels, multiples of 16; None: the default of the model, 1024 for Lumina-Image-2.0
MODEL = "Alpha-VLLM/Lumina-Image-2.0"  # with a CUDA GPU; without one, the small model of this repository:
BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "assets" / "lumina2-emoji"
# Rescaling polynomials, highest power first (ali-vilab/TeaCache, pull requests 70 and 76).
# v1 was fitted on Lumina-Next; v2 was found for Lumina-Image-2.0 by a search on LPIPS.
COEFFICIENTS_V1 = [393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344]
COEFFICIENTS_V2 = [225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552]
COEFFICIENTS = COEFFICIENTS_V1  # calibrate_lumina2.py fits them to another model
DAMPING = 0.25  # of the extrapolation, see Branch.forecast
CURVATURE = 60.0  # initial estimate, see TeaCacheState.expected_error
# ------------------------------------------------------------------------------

DEFAULTS = {"enable_teacache": True, "num_steps": NUM_INFERENCE_STEPS, "rel_l1_thresh": REL_L1_THRESH}
DEFAULTS |= {"coefficients": COEFFICIENTS, "order": ORDER, "computed_steps": COMPUTED_STEPS, "tolerance": TOLERANCE}
STOCK_FORWARD = globals().get("STOCK_FORWARD", Lumina2Transformer2DModel.forward)  # kept if this module is reloaded


class Branch:
    """The cache of one conditioning: two for guidance by two calls, one for guidance by a batch of two (MEMO)."""

    def __init__(self, conditioning, layout):
        self.conditioning, self.layout, self.step = conditioning, layout, -1  # step: the last that used this branch
        self.modulated_input = None, None  # threshold only: (step, tensor)
        self.residual = None  # order 0: output minus input of the blocks at the last computed step
        self.history = []  # order 1: (timestep, output) of the last two computed steps
        self.error = None  # order 1: relative L1 error of the forecast at the last computed step

    def matches(self, conditioning, layout):
        """Equal values match: a caller may recreate its tensors at every call."""
        return self.layout == layout and all(
            a is b or torch.is_tensor(a) and torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(self.conditioning, conditioning)
        )

    def remember(self, timestep, output):
        earlier = [(t, x) for t, x in self.history if t < timestep]  # a step may be called twice
        self.error = relative_l1(self.forecast(timestep), output) if len(earlier) == 2 else self.error
        self.history = [*earlier[-1:], (timestep, output.clone())]  # the caller may write into its output

    def forecast(self, timestep):
        """Damped linear extrapolation: g times the last gap ahead, it advances g / (1 + DAMPING * g) times."""
        t1, last = self.history[-1]
        if len(self.history) == 1:
            return last.clone()
        t0, previous = self.history[0]
        g = (timestep - t1) / (t1 - t0)
        return last + (last - previous) * (g / (1 + DAMPING * g))


class TeaCacheState:
    """The running generation of a model. A new one starts when the timestep goes back or the conditioning changes."""

    def __init__(self):
        self.step, self.timestep, self.last_step = -1, -math.inf, False
        self.timesteps, self.schedule = [], []  # one entry a step; schedule: True for a computed step
        self.compute = None  # the decision for this step, shared by its branches; None: not made yet
        self.accumulated = 0.0  # rescaled relative L1 change, or expected error, since the last computed step
        self.curvature = CURVATURE  # error of the forecast over the square of the gap in time
        self.branches = []

    def advance(self, model, timestep, conditioning, latents):
        """Read the settings, move to the step of this call (timesteps rise from 0 to 1) and return its branch."""
        vars(self).update({name: getattr(model, name, default) for name, default in DEFAULTS.items()})
        ahead = self.computed_steps is not None or self.tolerance is not None  # needs no modulated input
        layout = latents.shape, latents.dtype, latents.device
        if timestep != self.timestep:
            branches = [b for b in self.branches if b.step == self.step and b.layout == layout]
            known = any(b.conditioning[-1] is conditioning[-1] or b.matches(conditioning, layout) for b in branches)
            if timestep < self.timestep or not known:
                if (timestep > self.timestep) if self.last_step else self.step >= 0:
                    ran = f"the last generation ran {self.step + 1 + self.last_step} steps"
                    warnings.warn(f"TeaCache: {ran}, num_steps is {self.num_steps} (or interrupted)", stacklevel=3)
                self.__init__()
                branches = []
            self.branches, self.step, self.timestep, self.compute = branches, self.step + 1, timestep, None
            self.timesteps.append(timestep)
        self.last_step = self.step >= self.num_steps - 1
        self.branches = [] if self.last_step else self.branches
        self.caching = not self.last_step and (ahead or self.rel_l1_thresh > 0)
        self.order = self.order if self.caching and not ahead else 1
        nearest = sorted(self.branches, key=lambda b: b.conditioning[-1] is not conditioning[-1])  # same object first
        branch = next((b for b in nearest if b.matches(conditioning, layout)), Branch(conditioning, layout))
        self.branches += [branch] if not self.last_step and branch not in self.branches else []
        branch.step = self.step
        return branch

    def decide(self, branch, modulated_input=None, force=False):
        """Whether this call runs the blocks; None: a threshold needs the `modulated_input` first."""
        needed = force or not self.caching or (not branch.history if self.order else branch.residual is None)
        if self.compute is None or self.step == 0:  # in step 0 an interrupted generation may begin again
            if self.caching and self.computed_steps is not None:
                needed = needed or is_due(self.timesteps, self.schedule, self.num_steps, self.computed_steps)
            elif self.caching:
                if self.tolerance is not None:
                    change, limit = self.expected_error(), self.tolerance
                elif modulated_input is None:
                    return None
                else:
                    (seen, previous), branch.modulated_input = branch.modulated_input, (self.step, modulated_input)
                    change = relative_l1(modulated_input, previous).item() if seen == self.step - 1 else math.nan
                    change, limit = np.polyval(self.coefficients, change), self.rel_l1_thresh
                self.accumulated += change
                needed = needed or not self.accumulated < limit  # NaN: compute
            self.compute, self.accumulated = needed, 0.0 if needed else self.accumulated
            self.schedule[self.step :] = [needed]
        return self.compute or needed

    def expected_error(self):
        """What a skip would add: it grows with the square of the time since the last computed step."""
        computed = [t for t, c in zip(self.timesteps, self.schedule) if c]
        if len(computed) < 2 or self.timestep - computed[-1] > 0.2:
            return math.inf
        if self.schedule[-1] and (errors := [b.error for b in self.branches if b.error is not None]):
            error = torch.stack(errors).max().item()  # synchronizes with the GPU
            self.curvature = max(error / (computed[-1] - computed[-2]) ** 2, 0.8 * self.curvature)
        return (self.timestep - self.timesteps[-2]) * self.curvature * (self.timestep - computed[-1]) ** 2


def relative_l1(new, old):
    """mean |new - old| / mean |old|, accumulated in float32; a tensor."""
    return (new - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)


def is_due(timesteps, schedule, num_steps, budget):
    """Whether to compute the step at timesteps[-1]: spreads the remaining budget evenly over the remaining way."""
    start = timesteps[0]  # position: 0 at the first step and 1 at the end, the mean of step index and timestep
    position = [(i / num_steps + (t - start) / ((1 - start) or 1.0)) / 2 for i, t in enumerate(timesteps)]
    step = len(timesteps) - 1
    left, steps_left = budget - sum(schedule), num_steps - step
    if step == 0 or left <= 1 or steps_left <= left:
        return step == 0 or steps_left <= max(left, 1)
    pace = position[step] - position[step - 1]
    last = position[max(i for i, computed in enumerate(schedule) if computed)]
    return position[step] + pace / 2 >= last + (1 - pace - last) / left  # 1 - pace: about where the last step is


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

    Settings are read from the instance or its class, see DEFAULTS; the state is `self.teacache`, on the instance. With
    gradients, at threshold 0 or with `enable_teacache = False`, the stock forward runs.
    """
    inputs = hidden_states, timestep, encoder_hidden_states, encoder_attention_mask
    scale = (attention_kwargs or {}).get("scale", 1.0)
    if USE_PEFT_BACKEND and scale != 1.0:
        scale_lora_layers(self, scale)
        try:
            return teacache_forward(self, *inputs, return_dict=return_dict)
        finally:
            unscale_lora_layers(self, scale)
    if torch.is_grad_enabled() or not getattr(self, "enable_teacache", True):
        vars(self).pop("teacache", None)  # the cache would be stale at the next call
        return STOCK_FORWARD(self, *inputs, return_dict=return_dict)

    # TeaCache, before the network: a decision that needs no modulated input
    cache = vars(self).setdefault("teacache", TeaCacheState())
    conditioning = encoder_hidden_states, encoder_attention_mask  # the last: one object throughout a generation
    branch = cache.advance(self, timestep.flatten()[0].item(), conditioning, hidden_states)
    compute = cache.decide(branch)
    if compute is not None and cache.order == 1:
        output = STOCK_FORWARD(self, *inputs, return_dict=False)[0] if compute else branch.forecast(cache.timestep)
        if compute and cache.caching:
            branch.remember(cache.timestep, output)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

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

    # 3. Joint Transformer blocks, over caption, image and padding
    attention_mask = hidden_states.new_zeros(batch_size, max(seq_lengths), dtype=torch.bool)
    joint_hidden_states = hidden_states.new_zeros(batch_size, max(seq_lengths), self.config.hidden_size)
    for i, (encoder_seq_len, seq_len) in enumerate(zip(encoder_seq_lengths, seq_lengths)):
        attention_mask[i, :seq_len] = True
        joint_hidden_states[i, :encoder_seq_len] = encoder_hidden_states[i, :encoder_seq_len]
        joint_hidden_states[i, encoder_seq_len:seq_len] = hidden_states[i]
    attention_mask = attention_mask if len(set(seq_lengths)) > 1 else None
    hidden_states = joint_hidden_states  # (batch, tokens, hidden_size)

    # ---- TeaCache: the departure from stock, which runs the layers at every step ----
    if compute is None:
        compute = cache.decide(branch, modulated_input=self.layers[0].norm1(hidden_states, temb)[0])
    if compute:
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, rotary_emb, temb)
        branch.residual = hidden_states - joint_hidden_states if cache.order == 0 else None
    elif cache.order == 0:
        hidden_states = hidden_states + branch.residual
    else:
        output = branch.forecast(cache.timestep)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
    # ---- end of the departure ----

    # 4. Output norm & projection
    hidden_states = self.norm_out(hidden_states, temb)  # (batch, tokens, patch_size**2 * out_channels)

    # 5. Unpatchify
    p = self.config.patch_size
    output = []
    for i, (encoder_seq_len, seq_len) in enumerate(zip(encoder_seq_lengths, seq_lengths)):
        patches = hidden_states[i, encoder_seq_len:seq_len].view(height // p, width // p, p, p, self.out_channels)
        output.append(patches.permute(4, 0, 2, 1, 3).reshape(self.out_channels, height, width))
    output = torch.stack(output)

    if cache.order == 1:
        branch.remember(cache.timestep, output)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def apply_teacache(
    model, num_steps=None, rel_l1_thresh=None, coefficients=None, order=ORDER, *, computed_steps=None, tolerance=None
):
    """Switch TeaCache on for `pipeline.transformer` or `pipeline.diffusion_net`, before or after offloading is enabled.

    num_steps: the pipeline's `num_inference_steps`. rel_l1_thresh, computed_steps, tolerance: at most one of them; the
    defaults, also of `order`, are the constants above. coefficients: of the polynomial that rescales changes for
    rel_l1_thresh, highest power first. Returns the model. Raises ValueError for invalid settings.
    """
    num_steps = NUM_INFERENCE_STEPS if num_steps is None else num_steps
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"give pipeline.transformer or pipeline.diffusion_net, not a {type(model).__name__}")
    limits = {"rel_l1_thresh": rel_l1_thresh, "computed_steps": computed_steps, "tolerance": tolerance}
    check_settings(num_steps, **limits)
    remove_teacache(model)
    limits = limits if any(limit is not None for limit in limits.values()) else {}  # none: the constants above
    slot = "_old_forward" if "_old_forward" in vars(model) else "forward"  # accelerate's offloading moves it there
    vars(model).update(limits, enable_teacache=True, num_steps=num_steps, order=order)
    model.coefficients = COEFFICIENTS if coefficients is None else coefficients
    setattr(model, slot, MethodType(teacache_forward, model))
    return model


def remove_teacache(model):
    """Restore the stock forward and free the cache. Returns the model."""
    for slot in ("forward", "_old_forward"):
        if getattr(vars(model).get(slot), "__func__", None) is teacache_forward:
            vars(model).pop(slot)
            if slot == "_old_forward":
                model._old_forward = MethodType(type(model).forward, model)
    for name in (*DEFAULTS, "teacache"):
        vars(model).pop(name, None)
    return model


def check_settings(num_steps, rel_l1_thresh=None, computed_steps=None, tolerance=None):
    if not num_steps >= 1 or num_steps % 1:
        raise ValueError(f"the number of steps must be a whole number of at least 1, not {num_steps}")
    if rel_l1_thresh is computed_steps is tolerance is None:
        rel_l1_thresh, computed_steps, tolerance = REL_L1_THRESH, COMPUTED_STEPS, TOLERANCE
    elif [rel_l1_thresh, computed_steps, tolerance].count(None) < 2:
        raise ValueError("give only one of rel_l1_thresh, computed_steps and tolerance")
    if any(limit is not None and not 0 <= limit < math.inf for limit in (rel_l1_thresh, tolerance)):
        raise ValueError("rel_l1_thresh and tolerance must be numbers of at least 0; 0 skips nothing")
    if computed_steps is not None and computed_steps not in range(min(2, num_steps), num_steps + 1):
        raise ValueError(f"computed_steps must be 2 to {num_steps}, the number of steps, not {computed_steps}")


def parse_args(argv=None, extend=lambda parser: None):
    """The arguments, checked before anything is loaded. `extend` adds or replaces flags, for other tools."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, conflict_handler="resolve")  # an error is one line
    add = parser.add_argument
    add("--model", help=f"folder or Hub name; default {MODEL} with a CUDA GPU, else the bundled emoji model")
    add("--transformer", metavar="FILE", help="single-file checkpoint of the transformer, such as Neta Lumina")
    add("--prompt", default=PROMPT)
    add("--negative-prompt", default=NEGATIVE_PROMPT)
    add("--rel-l1-thresh", type=float, help=f"default {REL_L1_THRESH}; 0 skips nothing")
    add("--computed-steps", type=int, help="instead of a threshold: number of computed steps")
    add("--tolerance", type=float, help="instead of a threshold: largest expected error, say 0.003")
    add("--num-inference-steps", type=int, default=NUM_INFERENCE_STEPS)
    add("--height", type=int, default=HEIGHT)
    add("--width", type=int, default=WIDTH)
    add("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    add("--cfg-trunc-ratio", type=float, default=CFG_TRUNC_RATIO)
    add("--seed", type=int, default=SEED)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default bfloat16 on a GPU, float32 on a CPU")
    add("--offload", choices=["none", "model", "sequential"], default="none", help="keep the weights in CPU memory")
    add("--output", type=Path, default=Path("teacache_lumina2_output.png"))
    extend(parser)
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.model is None and args.device != "cuda":
        if not BUNDLED_MODEL.is_dir():
            parser.error(f"no CUDA GPU for the real model, and no bundled one: give --model, {MODEL} or a small one")
        args.model, args.device = str(BUNDLED_MODEL), "cpu"
        print(f"No CUDA GPU: using the bundled emoji model. For the real one: --model {MODEL}")
    args.model = args.model or MODEL
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    try:
        check_settings(args.num_inference_steps, args.rel_l1_thresh, args.computed_steps, args.tolerance)
        kind = Lumina2Pipeline.load_config(args.model).get("_class_name")
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    if kind not in ("Lumina2Pipeline", "Lumina2Text2ImgPipeline"):
        parser.error(f"{args.model} is a {kind}: give a Lumina2Pipeline, such as {MODEL}")
    if any(size is not None and (size <= 0 or size % 16) for size in (args.height, args.width)):
        parser.error("--height and --width must be multiples of 16")
    if args.output.suffix not in (".png", ".jpg", ".webp") or not args.output.parent.is_dir():
        parser.error(f"--output {args.output} must end in .png, .jpg or .webp, in an existing folder")
    return args


def load_pipeline(args):
    options = {"torch_dtype": getattr(torch, args.dtype)}
    if args.transformer:
        of = {"config": args.model, "subfolder": "transformer"}
        options["transformer"] = Lumina2Transformer2DModel.from_single_file(args.transformer, **of, **options)
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
    limits = {name: getattr(args, name) for name in ("rel_l1_thresh", "computed_steps", "tolerance")}
    apply_teacache(pipeline.transformer, args.num_inference_steps, **limits)
    names = "prompt negative_prompt num_inference_steps height width guidance_scale cfg_trunc_ratio".split()
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: equal noise on every device
    began = time.perf_counter()
    image = pipeline(**{name: getattr(args, name) for name in names}, generator=generator).images[0]
    return image, time.perf_counter() - began, pipeline.transformer.teacache.schedule


def main(argv=None):
    args = parse_args(argv)
    warnings.simplefilter("ignore", FutureWarning)  # of diffusers, whose oldest version knows only torch_dtype
    image, seconds, schedule = generate(load_pipeline(args), args)
    image.save(args.output)
    print(f"saved {args.output}: {seconds:.2f} s, {sum(schedule)} of {len(schedule)} steps computed")


if __name__ == "__main__":
    main()
