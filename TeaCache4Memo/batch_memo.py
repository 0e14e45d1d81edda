"""Make one video for each line `image,audio` of a file, on one GPU or shared among several.

    python TeaCache4Memo/batch_memo.py pairs.csv --output_dir videos
    accelerate launch TeaCache4Memo/batch_memo.py pairs.csv --output_dir videos

A video is called <image>_<audio>_<code>.mp4. The code stands for all that it is made of: the content of both files, seed,
settings, config and weights. So a video that exists is complete and the same, and is skipped: rerun the command to resume,
or with more lines. What has changed gets another name. A JSON file beside each video tells what it was made of. Takes the
flags of teacache_memo.py as well, but for those of the inputs.
"""

import contextlib
import csv
import glob
import hashlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

if __package__:
    from . import teacache_memo
else:
    import teacache_memo


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


def content(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def weights_of(config):
    """Names, sizes and times of the files of the model, if they are in a folder. A name on the Hub stands for itself."""
    folders = [Path(name) for name in (config.model_name_or_path, config.vae, config.wav2vec)]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin")]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]


def list_jobs(args, config):
    """{path of a video: what it is made of}."""
    constants = {name: getattr(teacache_memo, name) for name in ("COEFFICIENTS", "CORRECT")}
    setting = teacache_memo.name_setting(args.rel_l1_thresh, args.computed_steps)
    common = {"seed": args.seed, "setting": setting, "emotion": args.emotion, "config": vars(config), **constants}
    common["weights"] = weights_of(config)
    jobs = {}
    for image, audio in read_pairs(args.pairs):
        job = {"image_sha256": content(image), "audio_sha256": content(audio), **common}
        code = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:8]
        path = teacache_memo.output_path(args.output_dir, image, audio)
        jobs[path.with_stem(f"{path.stem}_{code}")] = {"image": image, "audio": audio, **job}
    return jobs


def is_done(path):
    return path.exists() and path.stat().st_size > 0


def remove_leftovers(path):
    """An empty file after a crash, and hidden folders of this video in which nothing was written for a day."""
    if path.exists() and not is_done(path):
        path.unlink()
    for draft in path.parent.glob(f".{glob.escape(path.stem)}.*/*.mp4"):
        with contextlib.suppress(FileNotFoundError):  # another batch has just finished it
            if time.time() - draft.stat().st_mtime > 24 * 3600:
                shutil.rmtree(draft.parent)


def make(pipeline, audio_proj, args, config, path, job, progress):
    """One video, and the JSON beside it."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = teacache_memo.prepare(job["image"], job["audio"], config, folder, args.emotion)
        settings = {"rel_l1_thresh": args.rel_l1_thresh, "computed_steps": args.computed_steps}
        clips = teacache_memo.generate(pipeline, audio_proj, inputs, config, args.seed, progress=progress, **settings)
        made = teacache_memo.write_video(clips, path, config.fps, inputs.sound)
    if made != path:  # another run has made the same video meanwhile
        made.unlink()
    path.with_suffix(".json").write_text(json.dumps(job), encoding="utf-8")


def main(argv=None):
    parser = teacache_memo.build_parser()
    parser.add_argument(
        "pairs", metavar="FILE", help="CSV, one image,audio per line; paths count from the working folder"
    )
    args = parser.parse_args(argv)
    if args.input_image or args.input_audio:
        parser.error("--input_image and --input_audio: the pairs are in FILE")
    with teacache_memo.one_line_errors():
        teacache_memo.quiet()
        config = teacache_memo.choose_config(args.config)
        teacache_memo.check_settings(config.inference_steps, args.rel_l1_thresh, args.computed_steps)
        jobs, failed = list_jobs(args, config), []
        state = PartialState(cpu=not torch.cuda.is_available())
        is_main = state.is_main_process
        missing = [path for path in jobs if not is_done(path)]
        state.wait_for_everyone()  # all processes have listed which videos are missing
        with state.split_between_processes(missing) as paths:
            if paths:
                models = {"model": config.model_name_or_path, "vae": config.vae, "dtype": config.weight_dtype}
                pipeline, audio_proj = teacache_memo.load_pipeline(**models, device=state.device)
            for path in tqdm(paths, unit="video", disable=None if is_main else True):
                if is_done(path):  # by another run
                    continue
                try:
                    remove_leftovers(path)
                    make(pipeline, audio_proj, args, config, path, jobs[path], is_main)
                    print(f"saved {path}", flush=True)
                except Exception as error:
                    failed.append(str(path))
                    print(f"{path} failed: {type(error).__name__}: {error}", file=sys.stderr)
        failed = set(gather_object(failed))
        if is_main:
            print(f"{len(jobs) - len(failed)} of {len(jobs)} videos are in {args.output_dir}", flush=True)
        state.wait_for_everyone()
        state.destroy_process_group()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
