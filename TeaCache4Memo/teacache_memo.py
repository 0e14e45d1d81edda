"""TeaCache for MEMO: training-free caching of the talking-head model, in one self-contained script.

MEMO (arXiv 2412.04448) makes video of a portrait and a voice, in clips of 16 frames. When the features of its first
convolution have barely changed since the last computed step, TeaCache skips the blocks and adds their last residual
again (order 0). With a fixed number of computed steps, it extrapolates the last two outputs instead (order 1).
Paper: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv 2411.19108.

    python teacache_memo.py --input_image face.jpg --input_audio speech.wav     # or edit the constants below

In your own code (importing this file changes nothing):

    from TeaCache4Memo.teacache_memo import apply_teacache, load_pipeline
    pipeline, audio_proj = load_pipeline("memoavatar/memo")
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
from diffusers.utils import is_xformers_available
from tqdm import tqdm

# ------------------------------------------------------------------------------
REL_L1_THRESH = 0.15  # 0: original | 0.09: 1.2x | 0.15: 1.8x | 0.25: 2.9x fewer passes (20 steps, see README)
COMPUTED_STEPS = None  # instead of the threshold: compute exactly so many steps of each clip, say 10 of 20
ORDER = 0  # skipped steps under a threshold. 0: add the last residual (TeaCache) | 1: extrapolate the last two outputs
NUM_INFERENCE_STEPS = 20  # for apply_teacache; the command line takes inference_steps from CONFIG
SEED = 42
CONFIG = "configs/inference.yaml"  # these three are looked for here, then in the folder of memo
INPUT_IMAGE = "assets/examples/dicaprio.jpg"
INPUT_AUDIO = "assets/examples/speech.wav"
MODEL = "memoavatar/memo"  # for load_pipeline; the command line takes model_name_or_path from CONFIG
COEFFICIENTS = [1.0, 0.0]  # rescaling polynomial, highest power first: the identity, none was fitted for MEMO
DAMPING = 0.5  # of the extrapolation, see Branch.forecast
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as CONFIG names them
# ------------------------------------------------------------------------------


def import_memo():
    """What memo's modules define, by name. memo imports xformers, used or not; a stand-in takes its place."""
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


SETTINGS = "enable_teacache", "num_steps", "rel_l1_thresh", "coefficients", "order", "computed_steps"
try:
    STOCK_FORWARD = globals().get("STOCK_FORWARD") or import_memo().UNet3DConditionModel.forward  # kept if reloaded
except ImportError:  # memo is not installed
    STOCK_FORWARD = None


class Branch:
    """The cache of one conditioning. Classifier-free guidance has two branches: prompt and negative prompt."""

    def __init__(self, conditioning, layout):
        self.conditioning, self.layout, self.step = conditioning, layout, -1  # step: the last that used this branch
        self.residual = None  # order 0: output minus input of the blocks at the last computed step
        self.history = []  # order 1: (timestep, output) of the last two computed steps

    def matches(self, conditioning, layout):
        """Equal values count: a caller may cast its tensors anew at every call."""
        return self.layout == layout and all(
            a is b or torch.is_tensor(a) and torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(self.conditioning, conditioning)
        )

    def remember(self, timestep, output):
        earlier = [(t, x) for t, x in self.history if t < timestep]  # a step may be called twice
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
    """The running generation of one model: its steps, their schedule, and the cache of each branch.

    A new generation starts when the timestep goes backwards or the conditioning changes; nothing of the last one stays.
    """

    def __init__(self):
        self.step, self.timestep, self.last_step = -1, -math.inf, False
        self.timesteps, self.schedule = [], []  # one entry a step; schedule: True for a computed step
        self.compute = None  # the decision for this step, shared by its branches; None: not made yet
        self.modulated_input = None, None  # of the last step: the branch that decided, and what it saw
        self.accumulated = 0.0  # rescaled relative L1 change since the last computed step
        self.branches = []

    def advance(self, model, timestep, conditioning, latents):
        """Read the settings, move to the step of this call and return its branch. The last step begins with freeing it.

        timestep: 0 is noise and 1 the end; calls of one step share it. conditioning: tensors or None, of which the last
        stays the same object throughout a generation.
        """
        self.num_steps = getattr(model, "num_steps", NUM_INFERENCE_STEPS)
        self.rel_l1_thresh = getattr(model, "rel_l1_thresh", REL_L1_THRESH)
        self.coefficients = getattr(model, "coefficients", COEFFICIENTS)
        self.budget = getattr(model, "computed_steps", None if hasattr(model, "rel_l1_thresh") else COMPUTED_STEPS)
        layout = latents.shape, latents.dtype, latents.device
        if timestep != self.timestep:
            branches = [b for b in self.branches if b.step == self.step and b.layout == layout]
            known = any(b.conditioning[-1] is conditioning[-1] or b.matches(conditioning, layout) for b in branches)
            if timestep < self.timestep or not known:
                if timestep > self.timestep if self.last_step else self.step >= 0:
                    took = f"a generation took {self.step + 1 + self.last_step} steps or was interrupted"
                    warnings.warn(f"TeaCache: {took}, and num_steps is {self.num_steps}", stacklevel=3)
                self.__init__()
                branches = []
            self.branches, self.step, self.timestep, self.compute = branches, self.step + 1, timestep, None
            self.timesteps.append(timestep)
        self.last_step = self.step >= self.num_steps - 1
        if self.last_step:
            self.branches, self.modulated_input = [], (None, None)
        self.caching = not self.last_step and (self.budget is not None or self.rel_l1_thresh > 0)
        self.order = getattr(model, "order", ORDER) if self.caching and self.budget is None else 1
        branch = next((b for b in self.branches if b.matches(conditioning, layout)), Branch(conditioning, layout))
        self.branches += [branch] if not self.last_step and branch not in self.branches else []
        branch.step = self.step
        return branch

    def decide(self, branch, modulated_input=None, force=False):
        """Whether this call runs the blocks; None: a threshold needs the `modulated_input` first.

        The first call of a step decides for all its branches; one with nothing cached, or with `force`, is computed.
        """
        needed = force or not self.caching or (not branch.history if self.order else branch.residual is None)
        if self.compute is None:
            if self.caching and self.budget is not None:
                needed = needed or is_due(self.timesteps, self.schedule, self.num_steps, self.budget)
            elif self.caching:
                if modulated_input is None:
                    return None
                (decided_by, previous), self.modulated_input = self.modulated_input, (branch, modulated_input)
                change = relative_l1(modulated_input, previous) if decided_by is branch else math.nan
                self.accumulated += np.polyval(self.coefficients, change)
                needed = needed or not self.accumulated < self.rel_l1_thresh  # a NaN computes
            self.compute, self.accumulated = needed, 0.0 if needed else self.accumulated
            self.schedule.append(needed)
        return self.compute or needed


def relative_l1(new, old):
    """mean |new - old| / mean |old|, accumulated in float32."""
    return ((new - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)).item()


def is_due(timesteps, schedule, num_steps, budget):
    """Whether the step at timesteps[-1] is computed, so that exactly `budget` of `num_steps` are.

    It ignores the activations: what is left of the budget is spread evenly over the rest of the trajectory, measured as
    the mean of step index and timestep.
    """
    start = timesteps[0]
    position = [(i / num_steps + (t - start) / ((1 - start) or 1.0)) / 2 for i, t in enumerate(timesteps)]  # 0 to 1
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

    Settings are read from the instance or its class: `enable_teacache`, `num_steps`, `rel_l1_thresh`, `coefficients`,
    `order`, `computed_steps`; their defaults are the constants above. The state is `self.teacache`, on the instance.
    With gradients, at threshold 0, with `enable_teacache = False` and in a computed step, the stock forward runs.
    """
    inputs = {**locals(), "return_dict": False}
    if torch.is_tensor(audio_emotion) and audio_emotion.ndim == 0:  # memo's pipeline without guidance
        raise ValueError("audio_emotion needs one label a sample: give guidance_scale > 1 to memo's pipeline")
    if torch.is_grad_enabled() or not getattr(self, "enable_teacache", True):
        vars(self).pop("teacache", None)  # the cache would be stale at the next call
        return STOCK_FORWARD(**{**inputs, "return_dict": return_dict})

    # TeaCache, before the network: a decision that needs no modulated input
    cache = vars(self).setdefault("teacache", TeaCacheState())
    times = [torch.as_tensor(t).double().mean() for t in (timestep if isinstance(timestep, list) else [timestep])]
    conditioning = [encoder_hidden_states, audio_embedding, audio_emotion, class_labels, mask_cond_fea, attention_mask]
    conditioning += [uc_mask, ref_features["mid"][0][0][0]]
    branch = cache.advance(self, 1 - sum(times).item() / len(times) / 1000, conditioning, sample)
    compute = cache.decide(branch, force=update_past_memory)

    # pre-process
    if compute is None or cache.order == 0:
        features = self.conv_in(2 * sample - 1.0 if self.config.center_input_sample else sample)
        if mask_cond_fea is not None:
            features = features + mask_cond_fea  # (batch, block_out_channels[0], frames, height, width)

    # ---- TeaCache: the one departure from stock, whose down, mid and up blocks run at every step ----
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
    return sys.modules[type(self).__module__].UNet3DConditionOutput(sample=sample) if return_dict else (sample,)


def apply_teacache(
    model, num_steps=NUM_INFERENCE_STEPS, rel_l1_thresh=None, coefficients=None, order=ORDER, *, computed_steps=None
):
    """Switch TeaCache on for `pipeline.transformer` or `pipeline.diffusion_net`, before or after offloading is enabled.

    num_steps: the pipeline's `num_inference_steps`. rel_l1_thresh: compute a step when the accumulated, rescaled relative
    L1 change reaches this; 0 skips nothing. coefficients: of the rescaling polynomial, highest power first. order: of
    the steps that a threshold skips, see ORDER. computed_steps: instead of a threshold, compute exactly so many steps.
    Defaults are the constants above. Returns the model. Raises ValueError for settings that cannot work.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"give pipeline.transformer or pipeline.diffusion_net, not a {type(model).__name__}")
    if rel_l1_thresh is None and computed_steps is None:
        rel_l1_thresh, computed_steps = (REL_L1_THRESH, None) if COMPUTED_STEPS is None else (None, COMPUTED_STEPS)
    check_settings(num_steps, rel_l1_thresh, computed_steps)
    remove_teacache(model)
    slot = "_old_forward" if "_old_forward" in vars(model) else "forward"  # accelerate's offloading moves it there
    coefficients = COEFFICIENTS if coefficients is None else coefficients
    values = True, num_steps, rel_l1_thresh or 0.0, coefficients, order, computed_steps
    vars(model).update(zip(SETTINGS, values), **{slot: MethodType(teacache_forward, model)})
    return model


def remove_teacache(model):
    """Restore the stock forward and free the cache. Returns the model."""
    for slot in ("forward", "_old_forward"):
        if getattr(vars(model).get(slot), "__func__", None) is teacache_forward:
            vars(model).pop(slot)
            if slot == "_old_forward":
                model._old_forward = MethodType(type(model).forward, model)
    for name in (*SETTINGS, "teacache"):
        vars(model).pop(name, None)
    return model


def check_settings(num_steps, rel_l1_thresh, computed_steps):
    if num_steps is None or not num_steps >= 1 or num_steps % 1:
        raise ValueError(f"the number of steps must be a whole number of at least 1, not {num_steps}")
    if rel_l1_thresh is not None and computed_steps is not None:
        raise ValueError("give rel_l1_thresh or computed_steps, not both")
    if rel_l1_thresh is not None and not 0 <= rel_l1_thresh < math.inf:
        raise ValueError(f"rel_l1_thresh must be a number of at least 0 (0 skips nothing), not {rel_l1_thresh}")
    if computed_steps is not None and computed_steps not in range(min(2, num_steps), num_steps + 1):
        raise ValueError(f"computed_steps must be 2 to {num_steps}, the number of steps, not {computed_steps}")


def set_memory_processors(diffusion_net):
    """Give MEMO's memory attention its processor: after `from_pretrained` it has diffusers', which fails."""
    memo = import_memo()
    for module in diffusion_net.modules():
        if isinstance(module, memo.MemoryLinearAttention):
            module.set_processor(memo.MemoryLinearAttnProcessor())
    return diffusion_net


def load_pipeline(model=MODEL, vae="stabilityai/sd-vae-ft-mse", device=None, dtype=torch.bfloat16, xformers=True):
    """memo's `VideoPipeline` and `AudioProjModel`, ready to run.

    model: Hub name or folder, in memo's own layout or as `save_pretrained` writes it, with audio_proj beside the parts.
    vae: where `model` has none. device: default CUDA, else the CPU. dtype: of all but the audio projection, which stays
    in float32 on the CPU, as in memo. Raises ImportError without memo, OSError if a part of the model is missing.
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
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if xformers and device.type == "cuda" and is_xformers_available():
        pipeline.reference_net.enable_xformers_memory_efficient_attention()
        pipeline.diffusion_net.enable_xformers_memory_efficient_attention()
    return pipeline.to(device=device, dtype=DTYPES.get(dtype, dtype)), audio_proj


def prepare(image, audio, config, folder):
    """The inputs of `generate`, by memo's functions for faces and voices; sound files are written into `folder`."""
    from huggingface_hub import snapshot_download
    from memo.utils.audio_utils import extract_audio_emotion_labels, preprocess_audio, resample_audio
    from memo.utils.vision_utils import preprocess_image

    misc, device = f"{config.misc_model_dir}/misc", "cuda" if torch.cuda.is_available() else "cpu"
    separator = f"{misc}/vocal_separator/Kim_Vocal_2.onnx"
    if not Path(separator).is_file():
        snapshot_download(MODEL, allow_patterns=["misc/[fv]*"], local_dir=config.misc_model_dir)
    pixel_values, face_emb = preprocess_image(f"{misc}/face_analysis", str(image), config.resolution)
    if not face_emb.any():
        raise ValueError(f"memo finds no face in {image}: give a portrait, seen from the front")
    sound = resample_audio(str(audio), f"{folder}/16k.wav")
    clip = {"num_generated_frames_per_clip": config.num_generated_frames_per_clip, "device": device}
    audio_emb, length = preprocess_audio(sound, config.fps, config.wav2vec, separator, str(folder), **clip)
    emotion, classes = extract_audio_emotion_labels(MODEL, sound, config.emotion2vec, length, device=device)
    inputs = {"pixel_values": pixel_values, "face_emb": face_emb, "audio_emb": audio_emb, "audio_emotion": emotion}
    return SimpleNamespace(**inputs, num_emotion_classes=classes, sound=sound)


@torch.no_grad()
def generate(pipeline, audio_proj, inputs, config, seed=SEED, rel_l1_thresh=None, computed_steps=None, clips=None):
    """The video, clip by clip; each clip starts from the last frames of the one before.

    inputs: as `prepare` gives them: `pixel_values` (1, 3, height, width) in [-1, 1], `face_emb` (1, 512), `audio_emb`
    (frames, window, blocks, channels), `audio_emotion` (frames,). config: memo's configs/inference.yaml. clips: limit.
    Returns the frames, uint8 (frames, height, width, 3), the seconds that they took, and the schedule of all clips.
    """
    apply_teacache(pipeline.diffusion_net, config.inference_steps, rel_l1_thresh, computed_steps=computed_steps)
    pipeline.set_progress_bar_config(disable=True)
    size = config.num_generated_frames_per_clip
    settings = {"width": config.resolution, "height": config.resolution, "video_length": size}
    settings |= {"num_inference_steps": config.inference_steps, "guidance_scale": config.cfg_scale}
    settings["generator"] = torch.Generator().manual_seed(seed)  # on the CPU: equal noise on every device
    past_frames = inputs.pixel_values.repeat(config.num_init_past_frames, 1, 1, 1)
    frames, schedule, began = [], [], time.perf_counter()
    for clip in tqdm(range(min(len(inputs.audio_emb) // size, clips or sys.maxsize)), unit="clip"):
        window = slice(clip * size, (clip + 1) * size)
        audio_emb = inputs.audio_emb[window].unsqueeze(0).to(audio_proj.device, audio_proj.dtype)
        video = pipeline(
            ref_image=torch.cat([inputs.pixel_values, past_frames]).unsqueeze(0),
            face_emb=inputs.face_emb,
            audio_tensor=audio_proj(audio_emb),
            audio_emotion=inputs.audio_emotion[window],
            emotion_class_num=inputs.num_emotion_classes,
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
    imageio.mimwrite(path, frames, fps=fps, audio_path=str(sound), audio_codec="aac", **settings)


def parse_args(argv=None, extend=lambda parser: None):
    """The arguments, checked before anything is loaded. `extend` adds or replaces flags, for other tools."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, conflict_handler="resolve")  # an error is one line
    add = parser.add_argument
    add("--config", default=CONFIG, help="memo's configs/inference.yaml, or one like it")
    add("--input_image", default=INPUT_IMAGE, help="portrait")
    add("--input_audio", default=INPUT_AUDIO, help="voice")
    add("--output_dir", type=Path, default=Path("outputs"), help="<image>_<audio>.mp4 is written there")
    add("--seed", type=int, default=SEED)
    add("--rel_l1_thresh", type=float, help=f"default {REL_L1_THRESH}; 0 skips nothing")
    add("--computed_steps", type=int, help="instead of a threshold: compute exactly so many steps of each clip")
    extend(parser)
    args = parser.parse_args(argv)
    try:
        import_memo()
        import memo
        from omegaconf import OmegaConf

        for name in ("config", "input_image", "input_audio"):
            here, there = Path(getattr(args, name)), Path(memo.__path__[0]).parent / getattr(args, name)
            setattr(args, name, here if here.is_file() or not there.is_file() else there)
            getattr(args, name).open("rb").close()
        args.config = OmegaConf.load(args.config)
        check_settings(args.config.inference_steps, args.rel_l1_thresh, args.computed_steps)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        parser.error(f"memo is missing ({error}): git clone https://github.com/memoavatar/memo && pip install -e memo")
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    args.output = args.output_dir / f"{args.input_image.name.split('.')[0]}_{args.input_audio.name.split('.')[0]}.mp4"
    if args.output.exists():
        parser.error(f"{args.output} exists: move it, or give another --output_dir")
    return args


def main(argv=None):
    args = parse_args(argv)
    config, settings = args.config, {"rel_l1_thresh": args.rel_l1_thresh, "computed_steps": args.computed_steps}
    with tempfile.TemporaryDirectory() as folder:
        try:
            inputs = prepare(args.input_image, args.input_audio, config, folder)
        except (AssertionError, ImportError, OSError, ValueError) as error:
            sys.exit(f"could not prepare the portrait and the voice: {' '.join(str(error).split())}")
        models = config.model_name_or_path, config.vae, None, config.weight_dtype
        pipeline, audio_proj = load_pipeline(*models, xformers=config.enable_xformers_memory_efficient_attention)
        frames, seconds, schedule = generate(pipeline, audio_proj, inputs, config, args.seed, **settings)
        write_video(frames, args.output, config.fps, inputs.sound)
    print(f"saved {args.output}: {seconds:.1f} s, {sum(schedule)} of {len(schedule)} steps computed")


if __name__ == "__main__":
    main()
