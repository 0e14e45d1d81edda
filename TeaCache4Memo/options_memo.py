"""The command line of `teacache_memo.py`: flags, checks before anything is loaded, and the loading.

Nothing happens at import. The constants that are edited stand in the script.
"""

import argparse
import functools
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path

import torch

script = importlib.import_module(f"{__package__}.teacache_memo" if __package__ else "teacache_memo")
fail, beside = script.fail, script.beside


def parse(argv=None):
    """The arguments, checked as far as they can be before anything is loaded."""
    parser = argparse.ArgumentParser(description=script.__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("--config", default=script.CONFIG, help="memo's configs/inference.yaml, or one like it")
    add("--input_image", "--input-image", help=f"portrait; default {script.INPUT_IMAGE}")
    add("--input_audio", "--input-audio", help=f"voice, best as wav; default {script.INPUT_AUDIO}")
    add(
        "--output_dir",
        "--output-dir",
        type=Path,
        default=script.OUTPUT_DIR,
        help="<image>_<audio>.mp4 is written there",
    )
    add("--pairs", metavar="FILE", help="image,audio a line: a video each, named by number and names, into output_dir")
    add("--seed", type=int, default=script.SEED)
    add("--rel_l1_thresh", "--rel-l1-thresh", type=float, help=f"default: {script.REL_L1_THRESH}")
    add("--speedup", type=float, help="instead of a threshold: 2 computes exactly half of the steps")
    add("--predict", choices=["hold", "forecast"], default=script.PREDICT, help="what stands in for a skipped step")
    add("--compare", type=float, nargs="+", metavar="T", help="one panel for each threshold, side by side")
    add("--cache_on_cpu", "--cache-on-cpu", action="store_true", help="keep what is cached off the GPU")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--verbose", action="store_true", help="the traceback of an error as well")
    return check(parser.parse_args(argv))


def check(args):
    """Fills in what was not given; one line for what cannot be."""
    if sys.version_info < (3, 10):  # noqa: UP036
        fail(f"needs Python 3.10 or newer, and this is {sys.version.split()[0]}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not args.pairs:
        fail("several processes share the pairs of a file: give --pairs FILE")
    if args.pairs and (args.compare or args.overwrite or args.input_image or args.input_audio):
        fail("give --pairs FILE alone, without --input_image, --input_audio, --compare and --overwrite")
    args.input_image, args.input_audio = args.input_image or script.INPUT_IMAGE, args.input_audio or script.INPUT_AUDIO
    args.cache_device = "cpu" if args.cache_on_cpu else None

    spec = importlib.util.find_spec("memo")
    if spec is None:
        fail(f"memo is not installed: {script.INSTALL_MEMO}")
    beside_memo = Path(next(iter(spec.submodule_search_locations or [""]))).parent
    if spec.origin is None:
        fail(
            f"the folder memo in {beside_memo} hides the installed memo: run this from, and keep it in, another folder"
        )
    args.find = functools.partial(find, beside_memo)
    for name in ("config", *(() if args.pairs else ("input_image", "input_audio"))):
        setattr(args, name, args.find(getattr(args, name), f"--{name}"))
    args.prepare_memo = beside("prepare_memo", "the command line")
    if args.compare or args.pairs:
        args.tool = beside("compare_memo", "--compare") if args.compare else beside("batch_memo", "--pairs")
    if args.speedup is not None and (args.compare or args.rel_l1_thresh is not None):
        fail("give --speedup or thresholds, not both")
    if args.rel_l1_thresh is None and not args.compare:
        args.speedup = script.SPEEDUP if args.speedup is None else args.speedup
        args.rel_l1_thresh = script.REL_L1_THRESH if args.speedup is None else None
    # threshold 0 comes first: it is what the others are measured against
    args.thresholds = list(dict.fromkeys([0.0, *args.compare])) if args.compare else [args.rel_l1_thresh]
    try:
        args.config = args.prepare_memo.read_config(args.config)
        if not args.pairs:
            args.prepare_memo.check_image(args.input_image)
        for thresh in (args.rel_l1_thresh, *args.thresholds):
            script.check_settings(args.config.inference_steps, thresh or 0, speedup=args.speedup)
    except ImportError as error:
        fail(f"memo needs a package that is missing ({error}): {script.INSTALL_MEMO}")
    except ValueError as error:  # BadInput is one
        fail(error)
    if not 0 <= args.seed < 2**63:
        fail(f"--seed must be a whole number from 0 to 2^63 - 1, not {args.seed}")
    args.output = args.output_dir
    try:
        if args.pairs:
            args.tool.read(args)
        else:
            name = f"{args.input_image.name.split('.')[0]}_{args.input_audio.name.split('.')[0]}"  # as memo names it
            args.output = args.output_dir / f"{name}{'_compare' if args.compare else ''}.mp4"
            args.prepare_memo.check_output(args.output, args.overwrite)
    except (OSError, ValueError) as error:
        fail(error if args.pairs else f"cannot write {args.output}: {error}")
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", args.config.model_name_or_path)
    if hub and not Path(args.config.model_name_or_path).is_dir() and not torch.cuda.is_available():
        note("no CUDA GPU for torch: memo's networks will take long on this machine")
    if max(t or 0 for t in args.thresholds) > 1:
        note("a threshold above 1 leaves little more than the first and the last step: 0.09 to 0.25, or --speedup 2")
    return args


def tell(message, file=None):
    """One line, from the first of several processes; the run goes on."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=file)


def note(message):
    """One line on stderr; the run goes on."""
    tell(f"{Path(script.__file__).stem}: note: {message}", sys.stderr)


def find(beside_memo, given, flag):
    """The file, here or in the folder of memo's code."""
    path = Path(given if os.path.exists(given) else beside_memo / given)
    if not os.path.isfile(path):
        fail(f"no file {given}: give {flag}")
    return path


def prepare(args, image, audio, folder):
    """What `generate` takes of a portrait and a voice; one line where that fails."""
    try:
        script.import_memo()
        return args.prepare_memo.prepare(image, audio, args.config, folder)
    except ImportError as error:
        fail(f"memo, or a package that it needs, cannot be imported ({error}): {script.INSTALL_MEMO}")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = "could not prepare the portrait and the voice"
        fail(error if isinstance(error, args.prepare_memo.BadInput) else f"{what} ({type(error).__name__}: {error})")


def import_all():
    """memo, and what its functions for faces and voices need; one line where that is missing."""
    try:
        script.import_memo()
        for name in ("imageio_ffmpeg", "memo.utils.audio_utils", "memo.utils.vision_utils"):
            importlib.import_module(name)
    except ImportError as error:
        fail(f"memo, or a package that it needs, cannot be imported ({error}): {script.INSTALL_MEMO}")


def load(args, load_pipeline):
    """memo's pipeline and audio projection; one line where that fails."""
    config = args.config
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.weight_dtype, torch.float32)  # as memo
    xformers = config.enable_xformers_memory_efficient_attention
    try:
        return load_pipeline(config.model_name_or_path, config.vae, dtype=dtype, xformers=xformers)
    except ImportError as error:
        fail(f"memo, or a package that it needs, cannot be imported ({error}): {script.INSTALL_MEMO}")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = f"could not load {config.model_name_or_path} with the VAE {config.vae}"
        first = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
        if re.search(r"gated repo|\b401 Client Error", str(error)):
            fail(f"{what}: ask for access on its page, and log in: hf auth login, or huggingface-cli login ({first})")
        fail(f"{what}: right folder, Hub in reach? ({first})")


def is_out_of_memory(error):
    """Of a GPU, or of this machine."""
    words = r"out of memory|not enough memory|can't allocate memory"  # of CUDA and MPS, Windows, Linux
    return isinstance(error, MemoryError) or bool(
        isinstance(error, RuntimeError) and re.search(words, str(error), re.I)
    )


def why(error, args):
    """One line about an error of drawing; of memory: what helps."""
    first = (str(error).strip().splitlines() or [""])[0]
    if not is_out_of_memory(error):
        return f"{type(error).__name__}: {first[:300]} (--verbose shows where)"
    helps = [] if args.cache_on_cpu else ["--cache_on_cpu"]
    helps += ["weight_dtype: bf16"] if args.config.weight_dtype not in ("bf16", "fp16") else []
    helps += ["a smaller resolution in --config"]
    return f"out of memory. What helps: {', '.join(helps)} ({first[:120]})"
