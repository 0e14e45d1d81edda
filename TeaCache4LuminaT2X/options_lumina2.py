"""The command line of `teacache_lumina2.py`: flags, checks before anything is loaded, and the loading.

Nothing happens at import. The constants that are edited stand in the script.
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
from diffusers.utils import logging

script = importlib.import_module(f"{__package__}.teacache_lumina2" if __package__ else "teacache_lumina2")
fail, beside = script.fail, script.beside


def parse(argv=None):
    """The arguments, checked as far as they can be before anything is loaded."""
    parser = argparse.ArgumentParser(description=script.__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("--model", help=f"folder or Hub name; default {script.MODEL} on a CUDA GPU, else the bundled emoji model")
    add("--transformer", type=Path, metavar="FILE", help="single-file checkpoint of the transformer, e.g. Neta Lumina")
    add("--lora", metavar="FILE_OR_REPO", help="LoRA weights for the transformer: a .safetensors file, or a Hub name")
    add("--lora-scale", type=float, default=1.0)
    add("--prompt", action="append", help="may be repeated: one picture each")
    add("--prompts", metavar="FILE", help="a prompt a line, - for standard input: a picture each, into a folder")
    add("--negative-prompt", default=script.NEGATIVE_PROMPT)
    add("--rel-l1-thresh", type=float, help="default: the indicator's, in INDICATORS")
    add("--speedup", type=float, help="instead of a threshold: 2 computes exactly half of the steps")
    add(
        "--indicator",
        choices=list(script.INDICATORS),
        default=script.INDICATOR,
        help="what the threshold is held against",
    )
    add("--predict", choices=["hold", "forecast"], default=script.PREDICT, help="what stands in for a skipped step")
    add("--num-inference-steps", type=int, default=script.NUM_INFERENCE_STEPS)
    add("--height", type=int, default=script.HEIGHT)
    add("--width", type=int, default=script.WIDTH)
    add("--guidance-scale", type=float, default=script.GUIDANCE_SCALE)
    add("--cfg-trunc-ratio", type=float, default=script.CFG_TRUNC_RATIO)
    add("--seed", type=int, default=script.SEED)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--attention", choices=["sdpa", "flash"], default="sdpa", help="flash: by flash-attn, without padding")
    add("--compile", action="store_true", help="torch.compile the blocks: a slow first picture, faster ones after it")
    add("--offload", choices=["none", "model", "sequential"], default="none", help="keep weights off the GPU")
    add("--vae-tiling", action="store_true", help="decode in tiles: less memory for large pictures")
    add("--cache-on-cpu", action="store_true", help="keep what is cached off the GPU")
    add(
        "--output",
        type=Path,
        help="default: teacache_lumina2_output.png, ..._compare.png, or ..._pictures for --prompts",
    )
    add("--compare", type=float, nargs="+", metavar="T", help="one picture for each threshold, side by side")
    add("--verbose", action="store_true", help="the traceback of an error as well")
    return check(parser.parse_args(argv))


def check(args):
    """Fills in what was not given; one line for what cannot be."""
    if sys.version_info < (3, 10):  # noqa: UP036
        fail(f"needs Python 3.10 or newer, and this is {sys.version.split()[0]}")
    if args.prompts and (args.prompt or args.compare):
        fail("give --prompts FILE alone, without --prompt and --compare")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not args.prompts:
        fail("several processes share the prompts of a file: give --prompts FILE")
    args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    by_hardware = args.model is None
    if by_hardware:
        cuda = args.device == "cuda"
        args.model, args.device = (script.MODEL, "cuda") if cuda else (str(script.BUNDLED_MODEL), "cpu")
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    bundled = Path(args.model).resolve() == script.BUNDLED_MODEL
    args.prompt = args.prompt or [script.BUNDLED_PROMPT if bundled else script.PROMPT]
    if args.speedup is not None and (args.compare or args.rel_l1_thresh is not None):
        fail("give --speedup or thresholds, not both")
    if args.rel_l1_thresh is None and not args.compare:
        args.speedup = script.SPEEDUP if args.speedup is None else args.speedup
        args.rel_l1_thresh = script.INDICATORS[args.indicator][0] if args.speedup is None else None
    # threshold 0 comes first: it is what the others are measured against
    args.thresholds = list(dict.fromkeys([0.0, *args.compare])) if args.compare else [args.rel_l1_thresh]
    folder = Path(args.model)
    args.coefficients = args.domain = args.fitted = None
    args.cache_device = "cpu" if args.cache_on_cpu else None
    try:
        if args.speedup is None and args.thresholds != [0.0]:
            path = args.transformer.with_suffix(".teacache.json") if args.transformer else folder / "teacache.json"
            args.coefficients, args.domain, args.fitted = script.coefficients_of(path, args.indicator, args.predict)
        for thresh in (args.rel_l1_thresh, *args.thresholds):
            script.check_settings(args.num_inference_steps, thresh or 0, speedup=args.speedup)
        args.attention_tool = beside("attention_lumina2", "the command line")
        args.attention_tool.check_attention(args.attention, args.device, args.dtype)
    except ValueError as error:
        fail(error)
    for name in ("height", "width"):
        size = getattr(args, name)
        if size is not None and (size <= 0 or size % 16):
            fail(f"--{name} must be a multiple of 16, not {size}")
    for name in ("guidance_scale", "lora_scale"):
        if not math.isfinite(getattr(args, name)):
            fail(f"--{name.replace('_', '-')} must be a number, not {getattr(args, name)}")
    if not 0 <= args.cfg_trunc_ratio <= 1:
        fail(f"--cfg-trunc-ratio must lie between 0 and 1, not {args.cfg_trunc_ratio}")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed must be a whole number from 0 to 2^63 - 1, not {args.seed}")
    if args.offload != "none" and args.device == "cpu":
        fail(f"--offload {args.offload} moves weights to a GPU when they are needed, and there is none: leave it out")
    if args.compile:
        check_compiler(args)
    on_hub, longest = args.model == script.MODEL or is_hub_name(args.model), [math.inf]
    if not folder.is_dir() and not on_hub:
        fail(f"no model folder {args.model}: give a folder saved by diffusers, or a Hub name such as {script.MODEL}")
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            fail(f"{args.model} has no model_index.json: give a pipeline folder saved by diffusers")
        try:
            kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
            config = folder / "transformer" / "config.json"
            if config.is_file():
                longest = json.loads(config.read_text(encoding="utf-8"))["axes_lens"][1:]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{args.model} is broken, download it anew: {index} or the transformer's config.json ({error!r})")
        if kind not in ("Lumina2Pipeline", "Lumina2Text2ImgPipeline"):
            fail(f"{args.model} is a {kind}: give a Lumina2Pipeline, such as {script.MODEL}")
    limit = 16 * min(longest)
    if max(args.height or 0, args.width or 0) > limit:
        fail(f"{args.model} draws at most {limit} pixels in height and width, the length of its rotary embedding")
    if args.transformer and not args.transformer.is_file():
        fail(f"no checkpoint file {args.transformer}")
    if args.lora and not Path(args.lora).is_file() and not is_hub_name(args.lora):
        fail(f"no LoRA file {args.lora}: give a .safetensors file, or a Hub name")
    if args.lora and importlib.util.find_spec("peft") is None:
        fail("--lora needs peft: pip install peft")
    if args.compare:
        args.tool = beside("compare_lumina2", "--compare")
    if args.prompts:
        args.tool = beside("batch_lumina2", "--prompts")
        try:
            args.tool.read(args)
        except (OSError, ValueError) as error:
            fail(error)
    else:
        args.outputs = outputs(args)
    if by_hardware and args.device != "cuda":
        tell(f"No CUDA GPU for torch: drawing with the bundled emoji model. For the real one: --model {script.MODEL}")
    elif args.device == "cpu" and not folder.is_dir():
        note(f"no GPU for torch: {args.model} will take long on this machine; without --model, a small one draws")
    if max(t or 0 for t in args.thresholds) > 1 and args.coefficients != script.COEFFICIENTS_V2:
        note("a threshold above 1 leaves little more than the first and the last step: 0.1 to 0.5, or --speedup 2")
    return args


def check_compiler(args):
    """One line where torch.compile would find no compiler, or is of no use."""
    if args.offload == "sequential":
        fail("--compile and --offload sequential: layers that move one by one are not compiled, leave one of them out")
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name]
    if args.device == "cpu" and not any(map(shutil.which, names)):
        fail("--compile needs a C++ compiler on a CPU, such as g++: install one, or leave it out")
    if args.device == "cuda" and importlib.util.find_spec("triton") is None:
        fail("--compile needs Triton on a GPU: pip install triton (on Windows triton-windows), or leave it out")


def tell(message, file=None):
    """One line, from the first of several processes; the run goes on."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=file)


def note(message):
    """One line on stderr; the run goes on."""
    tell(f"{Path(script.__file__).stem}: note: {message}", sys.stderr)


def is_hub_name(text):
    """owner/name, and nothing of the kind lies here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not Path(text).parent.is_dir()


def outputs(args):
    """The files to write, in order; each can be written, or it is one line."""
    args.output = args.output or Path(f"teacache_lumina2_{'compare' if args.compare else 'output'}.png")
    if args.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        fail(f"--output {args.output} must end in .png, .jpg or .webp")
    several = len(args.prompt) > 1 and not args.compare
    stem, n = args.output.stem, len(args.prompt)
    paths = [args.output.with_stem(f"{stem}_{i + 1}") for i in range(n)] if several else [args.output]
    for path in paths:
        if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
            fail(f"cannot write {path}: its folder must exist and be writable")
    return paths


def load_pipeline(args):
    """The pipeline on its device."""
    what, options, verbosity = args.model, {"torch_dtype": args.dtype}, logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers 0.42 calls it dtype, 0.33 knows only torch_dtype
            if args.transformer:
                what, where = args.transformer, {"config": args.model, "subfolder": "transformer"}
                options["transformer"] = Lumina2Transformer2DModel.from_single_file(str(what), **where, **options)
                what = args.model
            pipeline = Lumina2Pipeline.from_pretrained(args.model, **options)
            if args.lora:
                what = args.lora
                pipeline.load_lora_weights(args.lora, adapter_name="lora")
                pipeline.set_adapters("lora", args.lora_scale)
                what = args.model
        args.attention_tool.set_attention(pipeline.transformer, args.attention)
        if args.vae_tiling:
            tile(pipeline.vae)
        device = f"cuda:{torch.cuda.current_device()}" if args.device == "cuda" else args.device
        if args.offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif args.offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            pipeline.to(device)
        if args.compile:  # the blocks, each by itself: what decides on skipping stays outside
            for block in pipeline.transformer.layers:
                block.compile()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        fail(f"could not load {what}: {hint(error, what, args)}")
    finally:
        logging.set_verbosity(verbosity)
    return pipeline


def tile(vae):
    """Decode in tiles of at most 512 pixels, and one picture at a time.

    The tiles of Lumina-Image-2.0's VAE are of 1024 pixels as they come: a picture of that size is one of them.
    """
    vae.enable_tiling()
    vae.enable_slicing()
    vae.tile_sample_min_size = min(vae.tile_sample_min_size, 512)
    vae.tile_latent_min_size = vae.tile_sample_min_size // 2 ** (len(vae.config.block_out_channels) - 1)


def hint(error, what, args):
    """What to do about an error of loading, and its first line."""
    text = str(error).strip()
    if isinstance(error, ImportError) or "Failed to import" in text:
        todo = f"a package is missing or too old, pip install --upgrade -r {script.REQUIREMENTS}"
    elif re.search(r"gated repo|\b401 Client Error", text):
        todo = "ask for access on its page, and log in: hf auth login, or huggingface-cli login where that is older"
    elif what == args.lora:
        todo = "is it a LoRA for Lumina2's transformer, the Hub in reach?"
    elif what != args.model:
        todo = f"is it a transformer of this kind, and {args.model} in reach?"
    elif Path(args.model).is_dir():
        todo = "is it a whole Lumina2Pipeline?"
    else:
        todo = "is the name right, the Hub in reach?"
    return f"{todo} ({type(error).__name__}: {(text.splitlines() or [''])[0][:160]})"


def is_out_of_memory(error):
    """Of a GPU, or of this machine."""
    words = r"out of memory|not enough memory|can't allocate memory"  # of CUDA and MPS, Windows, Linux
    return isinstance(error, MemoryError) or bool(
        isinstance(error, RuntimeError) and re.search(words, str(error), re.I)
    )


def why(error, args):
    """One line about an error of drawing; of memory: the flags that help, those first that cost least."""
    first = (str(error).strip().splitlines() or [""])[0]
    if not is_out_of_memory(error):
        return f"{type(error).__name__}: {first[:300]} (--verbose shows where)"
    flags = [] if args.vae_tiling else ["--vae-tiling"]
    flags += ["--dtype bfloat16"] if args.dtype == torch.float32 else []
    if args.device != "cpu":
        offload = {"none": ["--offload model", "--offload sequential"], "model": ["--offload sequential"]}
        flags += [*offload.get(args.offload, []), *([] if args.cache_on_cpu else ["--cache-on-cpu"])]
    return f"out of memory. What helps: {', '.join([*flags, 'a smaller --height and --width'])} ({first[:120]})"
