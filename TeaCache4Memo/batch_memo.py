"""Make one video for each line `image,audio` of a file, on one GPU or shared among several.

    python batch_memo.py pairs.csv --output_dir videos
    accelerate launch batch_memo.py pairs.csv --output_dir videos

Videos are named by line number and files, and use --seed + line number - 1. Rerun the command to resume: a video that
exists is skipped. A JSON file beside each video stores its files, seed and settings; other settings are an error.
Takes the flags of teacache_memo.py as well.
"""

import csv
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

if __package__:
    from . import teacache_memo
else:
    import teacache_memo


def parse_args(argv=None):
    """The arguments; `jobs` has one dictionary for each video that is missing."""

    def extend(parser):
        parser.add_argument("pairs", metavar="FILE", help="CSV, one image,audio per line")
        parser.set_defaults(parser=parser, input_image=__file__, input_audio=__file__)  # placeholders, not used

    args = teacache_memo.parse_args(argv, extend)
    limits = dict(zip(args.limits, teacache_memo.limits_or_constants(**args.limits)))
    settings = {**limits, "coefficients": teacache_memo.COEFFICIENTS, "config": dict(args.config)}
    try:
        pairs = [line for line in csv.reader(Path(args.pairs).read_text(encoding="utf-8-sig").splitlines()) if line]
        args.paths, args.jobs = [], []
        for i, pair in enumerate(pairs):
            if len(pair) != 2 or not all(Path(file.strip()).is_file() for file in pair):
                raise ValueError(f"{args.pairs}, line {i + 1}: {','.join(pair)} must be image,audio, two files")
            image, audio = (file.strip() for file in pair)
            args.paths.append(args.output_dir / f"{i + 1:04d}-{Path(image).stem}-{Path(audio).stem}.mp4")
            job = {"image": image, "audio": audio, "seed": args.seed + i, **settings}
            if not is_done(args.paths[-1], job):
                args.jobs.append((args.paths[-1], job))
        if not pairs:
            raise ValueError(f"{args.pairs} is empty; expected one image,audio per line")
    except (OSError, ValueError, csv.Error) as error:
        args.parser.error(str(error))
    return args


def is_done(path, job):
    """Whether the video exists. Raises ValueError if it has other settings, or was written by another program."""
    if not path.exists():
        return False
    beside = path.with_suffix(".json")
    stored = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
    other = [key for key in job if stored is None or stored.get(key) != job[key]]
    if other:
        raise ValueError(f"{path} exists with different {', '.join(other)}: move it, or give another --output_dir")
    return True


def make(pipeline, audio_proj, config, path, job):
    """One video, through a temporary file: written completely or not at all."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    with tempfile.TemporaryDirectory() as folder:
        inputs = teacache_memo.prepare(job["image"], job["audio"], config, folder)
        limits = {name: job[name] for name in ("rel_l1_thresh", "computed_steps", "tolerance")}
        frames, _, _ = teacache_memo.generate(pipeline, audio_proj, inputs, config, job["seed"], **limits)
        try:
            teacache_memo.write_video(frames, draft, config.fps, inputs.sound)
            path.with_suffix(".json").write_text(json.dumps(job), encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def main(argv=None):
    args = parse_args(argv)
    state, failed, config = PartialState(cpu=not torch.cuda.is_available()), [], args.config
    state.wait_for_everyone()  # all processes have listed which videos are missing
    with state.split_between_processes(args.jobs) as jobs:
        if jobs:
            models = {"model": config.model_name_or_path, "vae": config.vae, "dtype": config.weight_dtype}
            pipeline, audio_proj = teacache_memo.load_pipeline(**models, device=state.device)
        for path, job in tqdm(jobs, unit="video", disable=not state.is_main_process):
            try:
                make(pipeline, audio_proj, config, path, job)
            except Exception as error:
                failed.append(str(path))
                print(f"{path} failed: {type(error).__name__}: {error}", file=sys.stderr)
    failed = set(gather_object(failed))
    if state.is_main_process:
        print(f"{len(args.paths) - len(failed)} of {len(args.paths)} videos are in {args.output_dir}", flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
