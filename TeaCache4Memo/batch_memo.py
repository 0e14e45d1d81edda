"""Make one video for each line `image,audio` of a file, on one GPU or shared among several.

    python batch_memo.py pairs.csv --output_dir videos
    accelerate launch batch_memo.py pairs.csv --output_dir videos

Videos are numbered without the empty lines, and use --seed + number - 1. Rerun the command to resume: a video that
exists is skipped. A JSON file beside each video stores its files, seed and settings; other settings are an error.
Takes the flags of teacache_memo.py as well.
"""

import csv
import json
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
        parser.set_defaults(parser=parser)

    args = teacache_memo.parse_args(argv, extend, has_inputs=False)
    limits = dict(zip(args.limits, teacache_memo.limits_or_constants(**args.limits)))
    settings = {**limits, "coefficients": teacache_memo.COEFFICIENTS, "emotion": args.emotion}
    settings["config"] = dict(args.config)
    try:
        args.paths, args.jobs = [], []
        for i, (image, audio) in enumerate(read_pairs(args.pairs)):
            args.paths.append(args.output_dir / f"{i + 1:04d}-{Path(image).stem}-{Path(audio).stem}.mp4")
            job = {"image": image, "audio": audio, "seed": args.seed + i, **settings}
            if not is_done(args.paths[-1], job):
                args.jobs.append((args.paths[-1], job))
    except (OSError, ValueError) as error:
        args.parser.error(str(error))
    return args


def read_pairs(path):
    """The pairs (image, audio) of a CSV file. Raises ValueError with the line of the file if one cannot be read."""
    try:
        lines = csv.reader(Path(path).read_text(encoding="utf-8-sig").splitlines())
        numbered = [(lines.line_num, [file.strip() for file in line]) for line in lines if any(map(str.strip, line))]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: {error}; expected one image,audio per line") from None
    if not numbered:
        raise ValueError(f"{path} is empty; expected one image,audio per line")
    for number, pair in numbered:
        if len(pair) != 2:
            raise ValueError(f"{path}, line {number}: {','.join(pair)} must be image,audio with one comma between them")
        for file in pair:
            if not Path(file).is_file():
                raise ValueError(f"{path}, line {number}: there is no file {file}")
    return [pair for _, pair in numbered]


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


def make(pipeline, audio_proj, config, path, job, bar):
    """One video, and the JSON beside it, which is written first: there is no video of unknown settings."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = teacache_memo.prepare(job["image"], job["audio"], config, folder, job["emotion"])
        limits = {name: job[name] for name in ("rel_l1_thresh", "computed_steps", "tolerance")}
        clips = teacache_memo.generate(pipeline, audio_proj, inputs, config, job["seed"], bar=bar, **limits)
        beside = path.with_suffix(".json")
        beside.write_text(json.dumps(job), encoding="utf-8")
        try:
            teacache_memo.write_video(clips, path, config.fps, inputs.sound)
        except BaseException:  # also when interrupted
            beside.unlink()
            raise


def main(argv=None):
    args = parse_args(argv)
    teacache_memo.quiet()
    state, failed, config = PartialState(cpu=not torch.cuda.is_available()), [], args.config
    bar = "" if state.is_main_process else None
    state.wait_for_everyone()  # all processes have listed which videos are missing
    with state.split_between_processes(args.jobs) as jobs:
        if jobs:
            models = {"model": config.model_name_or_path, "vae": config.vae, "dtype": config.weight_dtype}
            pipeline, audio_proj = teacache_memo.load_pipeline(**models, device=state.device)
        for path, job in tqdm(jobs, unit="video", disable=not state.is_main_process):
            try:
                make(pipeline, audio_proj, config, path, job, bar)
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
