"""TeaCache (arXiv 2411.19108) for MEMO, the talking-head model: training-free caching, in one self-contained script.

MEMO (arXiv 2412.04448) makes video of a portrait and a voice, in clips of 16 frames. When the features of its first
convolution have barely changed since the last computed step, TeaCache skips the blocks. The last two outputs are
extrapolated (order 1), or the last residual is added again, as in the original TeaCache (order 0, threshold only).

    python teacache_memo.py --input_image face.jpg --input_audio speech.wav     # or edit the constants below
    from TeaCache4Memo.teacache_memo import apply_teacache  # no side effects
    apply_teacache(pipeline.diffusion_net, num_steps=20, rel_l1_thresh=0.15)
"""

import argparse
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

# ------------------------------------------------------------------------------
REL_L1_THRESH = 0.15  # 0: original | 0.09: 1.2x | 0.15: 1.8x | 0.25: 2.7x fewer passes (talking emoji, 20 steps)
COMPUTED_STEPS = None  # instead of the threshold: compute exactly this many steps of each clip, say 10 of 20
TOLERANCE = None  # instead: compute when the expected error of skipping, summed over time, reaches this, say 0.003
ORDER = 1  # skipped steps under a threshold. 0: add the last residual | 1: extrapolate, chosen on the talking emoji
NUM_INFERENCE_STEPS = 20  # for apply_teacache; the command line takes inference_steps from CONFIG
SEED = 42
CONFIG = "configs/inference.yaml"  # these three are looked for here, then in the folder of memo
INPUT_IMAGE = "assets/examples/dicaprio.jpg"
INPUT_AUDIO = "assets/examples/speech.wav"
BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "memo-emoji"  # a talking emoji, without a CUDA GPU
MODEL = "memoavatar/memo"  # for load_pipeline; the command line takes model_name_or_path from CONFIG
COEFFICIENTS = [1.0, 0.0]  # rescaling polynomial, highest power first: the identity, none was fitted for MEMO
DAMPING = 0.25  # of the extrapolation, see Branch.forecast
CURVATURE = 60.0  # initial estimate, see TeaCacheState.expected_error
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as CONFIG names them
# ------------------------------------------------------------------------------


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


DEFAULTS = {"enable_teacache": True, "num_steps": NUM_INFERENCE_STEPS, "rel_l1_thresh": REL_L1_THRESH}
DEFAULTS |= {"coefficients": COEFFICIENTS, "order": ORDER, "computed_steps": COMPUTED_STEPS, "tolerance": TOLERANCE}
try:
    STOCK_FORWARD = globals().get("STOCK_FORWARD") or import_memo().UNet3DConditionModel.forward  # kept if reloaded
except ImportError:  # memo is not installed
    STOCK_FORWARD = None


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
    """`UNet3DConditionModel.forward` (memo, commit a5aee30) with TeaCache: the velocity, shaped like the latents.

    Settings are read from the instance or its class, see DEFAULTS; the state is `self.teacache`, on the instance. With
    gradients, at threshold 0, if not `enable_teacache`, and in a computed step, the stock forward runs.
    """
    inputs = {**locals(), "return_dict": False}
    if torch.is_grad_enabled() or not getattr(self, "enable_teacache", True):
        vars(self).pop("teacache", None)  # the cache would be stale at the next call
        return STOCK_FORWARD(**{**inputs, "return_dict": return_dict})

    # TeaCache, before the network: a decision that needs no modulated input
    cache = vars(self).setdefault("teacache", TeaCacheState())
    times = [torch.as_tensor(t).double().mean() for t in (timestep if isinstance(timestep, list) else [timestep])]
    conditioning = [encoder_hidden_states, audio_embedding, audio_emotion, class_labels, mask_cond_fea, attention_mask]
    conditioning += [uc_mask, ref_features["mid"][0][0][0]]  # the last: one object throughout a clip
    branch = cache.advance(self, 1 - sum(times).item() / len(times) / 1000, conditioning, sample)
    compute = cache.decide(branch, force=update_past_memory)

    # pre-process
    if compute is None or cache.order == 0:
        features = self.conv_in(2 * sample - 1.0 if self.config.center_input_sample else sample)
        features = features if mask_cond_fea is None else features + mask_cond_fea  # (batch, channels, frames, ...)

    # ---- TeaCache: the departure from stock, whose down, mid and up blocks run at every step ----
    if compute is None:
        compute = cache.decide(branch, modulated_input=features, force=update_past_memory)
    if compute:
        hidden = []  # the output of the blocks is the input of conv_norm_out
        hook = self.conv_norm_out.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        try:
            sample = STOCK_FORWARD(**inputs)[0]
        finally:
            hook.remove()
        if cache.order == 0:
            branch.residual = hidden[0] - features
        elif cache.caching:
            branch.remember(cache.timestep, sample)
    elif cache.order == 0:
        sample = self.conv_out(self.conv_act(self.conv_norm_out(features + branch.residual)))  # post-process
    else:
        sample = branch.forecast(cache.timestep)
    # ---- end of the departure ----
    return STOCK_FORWARD.__globals__["UNet3DConditionOutput"](sample=sample) if return_dict else (sample,)


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


def prepare(image, audio, config, folder):
    """The inputs of `generate`, by memo's own functions for faces and voices; sound files are written into `folder`."""
    if (prepared := Path(image).with_suffix(".safetensors")).is_file():  # of the bundled example
        return SimpleNamespace(**load_file(prepared), sound=audio)
    from huggingface_hub import snapshot_download
    from memo.utils.audio_utils import extract_audio_emotion_labels, preprocess_audio, resample_audio
    from memo.utils.vision_utils import preprocess_image

    misc, device = f"{config.misc_model_dir}/misc", "cuda" if torch.cuda.is_available() else "cpu"
    separator = f"{misc}/vocal_separator/Kim_Vocal_2.onnx"
    if not Path(separator).is_file():
        snapshot_download(MODEL, allow_patterns=["misc/[fv]*"], local_dir=config.misc_model_dir)
    pixel_values, face_emb = preprocess_image(f"{misc}/face_analysis", str(image), config.resolution)
    if not face_emb.any():
        raise ValueError(f"no face found in {image}: give a frontal portrait")
    sound = resample_audio(str(audio), f"{folder}/16k.wav")
    clip = {"num_generated_frames_per_clip": config.num_generated_frames_per_clip, "device": device}
    audio_emb, length = preprocess_audio(sound, config.fps, config.wav2vec, separator, str(folder), **clip)
    emotion, classes = extract_audio_emotion_labels(MODEL, sound, config.emotion2vec, length, device=device)
    inputs = {"pixel_values": pixel_values, "face_emb": face_emb, "audio_emb": audio_emb, "audio_emotion": emotion}
    return SimpleNamespace(**inputs, num_emotion_classes=classes, sound=sound)


@torch.no_grad()
def generate(pipeline, audio_proj, inputs, config, seed=SEED, clips=None, **limits):
    """The video, clip by clip; each clip starts from the last frames of the one before.

    inputs: `pixel_values` (1, 3, height, width) in [-1, 1], `face_emb` (1, 512), `audio_emb` (frames, window, blocks,
    channels), `audio_emotion` (frames,). config: memo's configs/inference.yaml. clips: at most. limits: of TeaCache.
    Returns the frames, uint8 (frames, height, width, 3), the seconds that they took, and the schedule of all clips.
    """
    apply_teacache(pipeline.diffusion_net, config.inference_steps, **limits)
    size = config.num_generated_frames_per_clip
    settings = {"width": config.resolution, "height": config.resolution, "video_length": size}
    settings |= {"num_inference_steps": config.inference_steps, "guidance_scale": config.cfg_scale}
    settings |= {"face_emb": inputs.face_emb, "emotion_class_num": inputs.num_emotion_classes}
    settings["generator"] = torch.Generator().manual_seed(seed)  # on the CPU: equal noise on every device
    past_frames = inputs.pixel_values.repeat(config.num_init_past_frames, 1, 1, 1)
    frames, schedule, began = [], [], time.perf_counter()
    for clip in range(min(len(inputs.audio_emb) // size, clips or sys.maxsize)):
        window = slice(clip * size, (clip + 1) * size)
        audio_emb = inputs.audio_emb[window].unsqueeze(0).to(audio_proj.device, audio_proj.dtype)
        video = pipeline(
            ref_image=torch.cat([inputs.pixel_values, past_frames]).unsqueeze(0),
            audio_tensor=audio_proj(audio_emb),
            audio_emotion=inputs.audio_emotion[window],
            is_new_audio=clip == 0,
            **settings,
        ).videos[0]  # (3, frames, height, width) in [0, 1]
        past_frames = video.transpose(0, 1)[-config.num_past_frames :].to(inputs.pixel_values) * 2 - 1
        frames.append((video.permute(1, 2, 3, 0) * 255).clamp(0, 255).to(torch.uint8))
        schedule += pipeline.diffusion_net.teacache.schedule
    return torch.cat(frames).numpy(), time.perf_counter() - began, schedule


def write_video(frames, path, fps, sound):
    """An mp4 of uint8 frames (height, width, 3) with the sound of a wav file."""
    import imageio.v2 as imageio

    settings = {"codec": "libx264", "quality": 8, "macro_block_size": 2, "ffmpeg_log_level": "error"}
    with imageio.get_writer(path, fps=fps, audio_path=str(sound), audio_codec="aac", **settings) as writer:
        for frame in frames:
            writer.append_data(frame)


def parse_args(argv=None, extend=lambda parser: None):
    """The arguments, checked before anything is loaded. `extend` adds or replaces flags, for other tools."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, conflict_handler="resolve")  # an error is one line
    parser.add_argument("--config", help="memo's configs/inference.yaml, or one like it")
    parser.add_argument("--input_image", help="portrait")
    parser.add_argument("--input_audio", help="voice")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="for <image>_<audio>.mp4")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--rel_l1_thresh", type=float, help=f"default {REL_L1_THRESH}; 0 skips nothing")
    parser.add_argument("--computed_steps", type=int, help="instead of a threshold: computed steps of each clip")
    parser.add_argument("--tolerance", type=float, help="instead of a threshold: largest expected error, say 0.003")
    extend(parser)
    args = parser.parse_args(argv)
    given = args.config or args.input_image or args.input_audio or torch.cuda.is_available()
    if bundled := not given and BUNDLED.is_dir():
        print(f"No CUDA GPU: using the bundled talking emoji. For the real MEMO: --config {CONFIG}")
        files = "config.yaml", "example.png", "example.wav"
        args.config, args.input_image, args.input_audio = map(BUNDLED.joinpath, files)
    try:
        import memo.models
        from omegaconf import OmegaConf

        for name, default in (("config", CONFIG), ("input_image", INPUT_IMAGE), ("input_audio", INPUT_AUDIO)):
            path = Path(getattr(args, name) or default)
            setattr(args, name, path if path.is_file() else Path(memo.__path__[0]).parent / path)
            getattr(args, name).open("rb").close()
        args.config = OmegaConf.load(args.config)
        args.config.update({"model_name_or_path": str(BUNDLED)} if bundled else {})
        args.limits = {name: getattr(args, name) for name in ("rel_l1_thresh", "computed_steps", "tolerance")}
        check_settings(args.config.inference_steps, **args.limits)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        parser.error(f"{error}: see Installation in README.md, git clone https://github.com/memoavatar/memo")
    except Exception as error:  # of the files, the config or the settings
        parser.error(" ".join(str(error).split()))
    args.output = args.output_dir / f"{args.input_image.name.split('.')[0]}_{args.input_audio.name.split('.')[0]}.mp4"
    return args


def main(argv=None):
    args = parse_args(argv)
    config = args.config
    warnings.simplefilter("ignore", FutureWarning)  # memo is written for diffusers 0.31
    if args.output.exists():
        sys.exit(f"{args.output} exists: move it, or give another --output_dir")
    with tempfile.TemporaryDirectory() as folder:
        try:
            inputs = prepare(args.input_image, args.input_audio, config, folder)
        except (AssertionError, ImportError, OSError, ValueError) as error:
            sys.exit(f"could not prepare the portrait and the voice: {' '.join(str(error).split())}")
        pipeline, audio_proj = load_pipeline(config.model_name_or_path, config.vae, dtype=config.weight_dtype)
        frames, seconds, schedule = generate(pipeline, audio_proj, inputs, config, args.seed, **args.limits)
        write_video(frames, args.output, config.fps, inputs.sound)
    print(f"saved {args.output}: {seconds:.1f} s, {sum(schedule)} of {len(schedule)} steps computed")


if __name__ == "__main__":
    main()
