"""Draw one image for each line of a file, on one GPU or shared among several.

    python batch_lumina2.py prompts.txt --computed-steps 15
    accelerate launch batch_lumina2.py prompts.txt --computed-steps 15

Images are named by line number and prompt, and use --seed + line number - 1. Rerun the command to resume: an image
that exists is skipped. Each image stores its prompt, seed and settings; an image with other settings is an error.
Takes the flags of teacache_lumina2.py as well.
"""

import json
import os
import re
import sys
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
        parser.set_defaults(output=Path("unused.png"), parser=parser)

    args = teacache_lumina2.parse_args(argv, extend)
    try:
        text = Path(args.prompts).read_text(encoding="utf-8-sig")
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{args.prompts} is empty; expected one prompt per line")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(args, name) for name in SETTINGS}
        limits = teacache_lumina2.limits_or_constants(args.rel_l1_thresh, args.computed_steps, args.tolerance)
        settings |= zip(("rel_l1_thresh", "computed_steps", "tolerance"), limits)
        settings["coefficients"] = teacache_lumina2.COEFFICIENTS
        jobs = [{"prompt": prompt, "seed": args.seed + i, **settings} for i, prompt in enumerate(prompts)]
        args.paths = [args.output_dir / name(i, prompt) for i, prompt in enumerate(prompts)]
        args.jobs = [(path, job) for path, job in zip(args.paths, jobs) if not is_done(path, job)]
    except (OSError, ValueError) as error:
        args.parser.error(str(error))
    return args


def name(index, prompt):
    """0001-the-first-words.png"""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:48]
    return f"{index + 1:04d}-{words}".rstrip("-") + ".png"


def is_done(path, job):
    """Whether the image exists. Raises ValueError if it has other settings, or was written by another program."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        stored = json.loads(image.info.get("teacache", "null"))
    other = [key for key in job if stored is None or stored.get(key) != job[key]]
    if other:
        raise ValueError(f"{path} exists with different {', '.join(other)}: move it, or give another --output-dir")
    return True


def draw(pipeline, args, path, job):
    """One image, through a temporary file: written completely or not at all."""
    image, _, _ = teacache_lumina2.generate(pipeline, Namespace(**{**vars(args), **job}))
    info, draft = PngInfo(), path.with_name(f".{path.stem}.{os.getpid()}.png")
    info.add_text("teacache", json.dumps(job))
    try:
        image.save(draft, pnginfo=info)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def main(argv=None):
    args = parse_args(argv)
    state, failed = PartialState(cpu=not torch.cuda.is_available()), []
    args.device = str(state.device) if args.device == "cuda" else args.device
    state.wait_for_everyone()  # all processes have listed which images are missing
    pipeline = teacache_lumina2.load_pipeline(args) if args.jobs else None
    if pipeline and args.attention:
        if __package__:
            from .attention_lumina2 import use_flash_attention
        else:
            from attention_lumina2 import use_flash_attention
        use_flash_attention(pipeline.transformer)
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
