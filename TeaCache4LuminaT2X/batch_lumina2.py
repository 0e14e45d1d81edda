"""Draw one image for each line of a file, on one GPU or shared among several.

    python batch_lumina2.py prompts.txt --computed-steps 15
    accelerate launch batch_lumina2.py prompts.txt --computed-steps 15

Blank lines do not count. Each line is drawn as teacache_lumina2.py draws it, with --seed; a line that was there before
gets --seed + 1, and so on. The name of an image ends in a digest of its prompt, seed, settings and model, which the PNG
stores as well. So lines can be added and moved, and other settings make other images beside the first ones.

Rerun the command to resume: an image that is complete is skipped. One that fails is reported, and the next one is
drawn; where an image cannot be saved (a full disk, a folder that is gone), the batch ends. A local model counts as
another one when the size or the time of a file in it has changed; a model of the Hub is known by its name only. Takes
the flags of teacache_lumina2.py as well.
"""

import argparse
import contextlib
import hashlib
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

if __package__:
    from . import teacache_lumina2
else:
    import teacache_lumina2

SETTINGS = "dtype attention negative_prompt rel_l1_thresh computed_steps num_inference_steps height width".split()
SETTINGS += ["guidance_scale", "cfg_trunc_ratio"]


def build_parser():
    parser = teacache_lumina2.build_parser()
    add = parser.add_argument
    add("prompts", metavar="FILE", help="UTF-8 text, one prompt per line")
    add("--prompt", help=argparse.SUPPRESS)  # refused
    add("--output-dir", "--output", dest="output_dir", type=Path, default=Path("teacache_lumina2_images"))
    add("--attention", choices=["flash"], help="flash: flash-attn, without padding; see attention_lumina2.py")
    return parser


def read_prompts(file):
    """The lines that are not blank. Only a line feed ends a line: some texts have other separators within."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 may decode, but not without these
        raise ValueError(f"{file} is not UTF-8 text: save it as UTF-8, one prompt per line")
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{file} is empty; expected one prompt per line")
    return prompts


def find_jobs(args):
    """{path: job} of all images. A job is all that decides what the image looks like."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"coefficients": teacache_lumina2.COEFFICIENTS, "correct": teacache_lumina2.CORRECT}
    settings |= {name: identity(getattr(args, name)) for name in ("model", "transformer")}
    jobs, earlier = {}, Counter()
    for prompt in read_prompts(args.prompts):
        job = {"prompt": prompt, "seed": args.seed + earlier[prompt], **settings}
        teacache_lumina2.check_seed(job["seed"])
        jobs[args.output_dir / file_name(job)] = job
        earlier[prompt] += 1
    return jobs


def identity(source):
    """Of a local model or file its name, and a digest of sizes and times; else the name alone, or None."""
    if source is None or not Path(source).exists():
        return source
    files = [file for file in Path(source).rglob("*") if file.suffix in (".json", ".safetensors", ".bin")]
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files or [Path(source)]]
    return f"{Path(source).resolve().name} {digest(sorted(stamps))}"


def digest(thing):
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:8]


def file_name(job):
    """the-first-words-0123abcd.png"""
    words = re.sub(r"[\W_]+", "-", job["prompt"].lower()).strip("-")[:48].rstrip("-")
    return f"{words}-{digest(job)}.png".lstrip("-")


def make_folder(folder):
    """Raise OSError if files cannot be written there. Removes the drafts of a batch that was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    for draft in folder.glob(".*.draft.png"):
        with contextlib.suppress(FileNotFoundError):  # it became an image
            if time.time() - draft.stat().st_mtime > 60:  # else another batch may be saving it
                draft.unlink()


def is_done(path):
    """Whether the image is there and complete."""
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of a PNG, to its end
    except Exception:  # what Pillow raises depends on where the file was cut
        return False
    return True


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


def draw(pipeline, args, path, job):
    """One image, with its prompt, seed and settings in it."""
    settings = {**vars(args), "prompt": job["prompt"], "seed": job["seed"]}
    image, _, _ = teacache_lumina2.generate(pipeline, argparse.Namespace(**settings))
    info = PngInfo()
    info.add_text("teacache", json.dumps(job))
    with teacache_lumina2.complete_file(path) as draft:
        image.save(draft, pnginfo=info)


def load_pipeline(args, state):
    args.device = str(state.device) if args.device == "cuda" else args.device
    pipeline = teacache_lumina2.load_pipeline(args)
    if args.attention:
        find_flash_attention(args)(pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_all(pipeline, args, jobs, state):
    """Those of this process. Returns early where images cannot be kept: the next one would be lost as well."""
    with state.split_between_processes(jobs) as mine:
        for path, job in tqdm(mine, unit="image", disable=not state.is_main_process):
            try:
                draw(pipeline, args, path, job)
            except Exception as error:
                print(f"{path} failed: {teacache_lumina2.one_line(error)}", file=sys.stderr)
                pipeline.maybe_free_model_hooks()
                if isinstance(error, OSError):
                    return


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with teacache_lumina2.one_line_errors(parser):
        if args.prompt is not None:
            raise ValueError("--prompt is not for a batch: its prompts are the lines of FILE")
        teacache_lumina2.check_args(args)
        jobs = find_jobs(args)
        if args.attention:
            find_flash_attention(args)
        make_folder(args.output_dir)
        missing = [(path, job) for path, job in jobs.items() if not is_done(path)]
        state = PartialState(cpu=not torch.cuda.is_available())
        state.wait_for_everyone()  # all processes have listed which images are missing
        pipeline = load_pipeline(args, state) if missing else None
    with contextlib.suppress(KeyboardInterrupt):  # what was drawn is kept, and counted
        draw_all(pipeline, args, missing, state)
    state.wait_for_everyone()
    done = sum(map(is_done, jobs))
    if state.is_main_process:
        teacache_lumina2.say(f"{done} of {len(jobs)} images are in {args.output_dir}")
    state.destroy_process_group()
    sys.exit(done < len(jobs))


if __name__ == "__main__":
    main()
