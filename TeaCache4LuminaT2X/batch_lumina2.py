"""Draw one image for each line of a file, on one GPU or shared among several.

    python batch_lumina2.py prompts.txt --computed-steps 15
    accelerate launch batch_lumina2.py prompts.txt --computed-steps 15

Blank lines do not count. The first image uses --seed, the next --seed + 1, and so on. Rerun the command to resume: an
image that exists is skipped. Each image stores its prompt, seed and settings; an image with other settings is an error.
Takes the flags of teacache_lumina2.py as well.
"""

import json
import re
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

if __package__:
    from . import teacache_lumina2
else:
    import teacache_lumina2

SETTINGS = "model transformer dtype attention negative_prompt rel_l1_thresh computed_steps tolerance".split()
SETTINGS += "num_inference_steps height width guidance_scale cfg_trunc_ratio".split()


def parse_args(argv=None):
    """The arguments; `jobs` has one dictionary for each image that is missing."""

    def extend(parser):
        add = parser.add_argument
        add("prompts", metavar="FILE", help="UTF-8 text, one prompt per line")
        add("--output-dir", "--output", dest="output_dir", type=Path, default=Path("teacache_lumina2_images"))
        add("--attention", choices=["flash"], help="flash: flash-attn, without padding; see attention_lumina2.py")
        parser.set_defaults(default_output=None, parser=parser)

    args = teacache_lumina2.parse_args(argv, extend)
    try:
        prompts = read_prompts(args.prompts)
        teacache_lumina2.check_seed(args.seed + len(prompts) - 1)
        if args.attention:
            find_flash_attention(args)
        make_folder(args.output_dir)
        settings = {name: getattr(args, name) for name in SETTINGS}
        limits = teacache_lumina2.limits_or_constants(args.rel_l1_thresh, args.computed_steps, args.tolerance)
        settings |= zip(teacache_lumina2.LIMITS, limits)
        settings |= {"coefficients": teacache_lumina2.COEFFICIENTS, "correct": teacache_lumina2.CORRECT}
        jobs = [{"prompt": prompt, "seed": args.seed + i, **settings} for i, prompt in enumerate(prompts)]
        args.paths = [args.output_dir / name(i, prompt) for i, prompt in enumerate(prompts)]
        args.jobs = [(path, job) for path, job in zip(args.paths, jobs) if not is_done(path, job)]
    except (OSError, ValueError) as error:
        args.parser.error(error)
    return args


def read_prompts(file):
    """The lines that are not blank."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text: save it as UTF-8, one prompt per line") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file} is empty; expected one prompt per line")
    return prompts


def make_folder(path):
    """Raise ValueError if files cannot be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"--output-dir {path} cannot be written ({error.strerror}): give another folder") from None


def find_flash_attention(args):
    """`use_flash_attention`. Raises ValueError if it cannot run."""
    try:
        import flash_attn  # noqa: F401

        if __package__:
            from .attention_lumina2 import use_flash_attention
        else:
            from attention_lumina2 import use_flash_attention
    except ImportError as error:
        install = "pip install flash-attn --no-build-isolation, and keep attention_lumina2.py beside this file"
        raise ValueError(f"--attention flash: {error}: {install}") from None
    if not args.device.startswith("cuda") or args.dtype == "float32":
        raise ValueError("--attention flash needs a CUDA GPU, and --dtype bfloat16 or float16")
    return use_flash_attention


def name(index, prompt):
    """0001-the-first-words.png"""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:48]
    return f"{index + 1:04d}-{words}".rstrip("-") + ".png"


def is_done(path, job):
    """Whether the image exists. Raises ValueError if it has other settings, or was written by another program."""
    if not path.exists():
        return False
    job = json.loads(json.dumps(job))  # as it was stored: a tuple is a list
    with Image.open(path) as image:
        stored = json.loads(image.info.get("teacache", "null"))
    other = [key for key in job if stored is None or stored.get(key) != job[key]]
    if other:
        raise ValueError(f"{path} exists with different {', '.join(other)}: move it, or give another --output-dir")
    return True


def draw(pipeline, args, path, job):
    """One image, with its prompt, seed and settings in it."""
    image, _, _ = teacache_lumina2.generate(pipeline, Namespace(**{**vars(args), **job}))
    info = PngInfo()
    info.add_text("teacache", json.dumps(job))
    with teacache_lumina2.complete_file(path) as draft:
        image.save(draft, pnginfo=info)


def main(argv=None):
    args = parse_args(argv)
    state, failed = PartialState(cpu=not torch.cuda.is_available()), []
    args.device = str(state.device) if args.device == "cuda" else args.device
    state.wait_for_everyone()  # all processes have listed which images are missing
    if state.is_main_process and args.jobs:
        teacache_lumina2.warn_of_few_steps(args.num_inference_steps, **teacache_lumina2.limits_of(args))
    pipeline = teacache_lumina2.load_pipeline(args) if args.jobs else None
    if pipeline and args.attention:
        find_flash_attention(args)(pipeline.transformer)
    if pipeline:
        pipeline.set_progress_bar_config(disable=True)
    with state.split_between_processes(args.jobs) as jobs:
        for path, job in tqdm(jobs, unit="image", disable=not state.is_main_process):
            try:
                draw(pipeline, args, path, job)
            except Exception as error:
                failed.append(str(path))
                pipeline.maybe_free_model_hooks()
                print(f"{path} failed: {type(error).__name__}: {error}", file=sys.stderr)
    failed = set(gather_object(failed))
    if state.is_main_process:
        print(f"{len(args.paths) - len(failed)} of {len(args.paths)} images are in {args.output_dir}", flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
