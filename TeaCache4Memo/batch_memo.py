"""`teacache_memo.py --pairs FILE`: a video for each portrait and voice, by one process or by several.

    python teacache_memo.py --pairs pairs.csv --output_dir videos
    accelerate launch teacache_memo.py --pairs pairs.csv --output_dir videos     # shared among all GPUs

A line of the file is `image,audio`, quoted as in CSV where a name has a comma. A video is named by the number of the
line and the names of its files, and drawn with --seed + number - 1. `videos.jsonl` has a line for each: what it was
made with, the steps computed, the seconds. Run again, it goes on where it stopped.
"""

import contextlib
import csv
import datetime
import importlib
import json
import os
import re
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

JOURNAL = "videos.jsonl"


def read(args):
    """The lines of --pairs FILE as args.jobs. Raises OSError and ValueError for what cannot be used."""
    pairs = [[cell.strip() for cell in row] for row in csv.reader(read_lines(args.pairs))]
    given = {"rel_l1_thresh": args.rel_l1_thresh, "speedup": args.speedup, "predict": args.predict}
    args.jobs = []
    for i, pair in enumerate(pairs):
        if len(pair) != 2:
            raise ValueError(f"{args.pairs}, number {i + 1}: {','.join(pair)} is not image,audio")
        image, audio = (str(args.find(path, f"files that are there in {args.pairs}")) for path in pair)
        args.prepare_memo.check_image(image)
        file = f"{name(i + 1, f'{Path(image).stem} {Path(audio).stem}')}.mp4"
        args.jobs.append({"file": file, "image": image, "audio": audio, "seed": (args.seed + i) % 2**63, **given})
        args.jobs[-1]["config"] = vars(args.config)
    finished(args.jobs, args.output_dir, JOURNAL)


def draw(args, options, load_pipeline, generate):
    """The videos of args.jobs that are not there yet. Returns the exit code."""
    tool, config = args.prepare_memo, args.config

    def start():
        options.import_all()
        pipeline, audio_proj = options.load(args, load_pipeline)

        def make(job, path):
            with tempfile.TemporaryDirectory(prefix="teacache_memo_") as folder:
                inputs = tool.prepare(Path(job["image"]), Path(job["audio"]), config, Path(folder))
                settings = {"speedup": args.speedup, "cache_device": args.cache_device, "quiet": True}
                seed, thresh = job["seed"], args.rel_l1_thresh
                frames, figures = generate(pipeline, audio_proj, inputs, config, seed, args.predict, thresh, **settings)
                frames = frames[: inputs.length]
                tool.write_video(frames, path, config.fps, inputs.sound)
            return {"frames": len(frames), **{key: figures[key] for key in ("computed", "steps", "seconds")}}

        return make

    return work(args.jobs, args.output_dir, JOURNAL, start, lambda error: options.why(error, args), "video")


# --- files of many, among processes: the same text for both models ---------------


def read_lines(path):
    """The lines of a UTF-8 file that are not empty; "-" is standard input."""
    if path == "-" and processes() > 1:
        raise ValueError("several processes cannot share standard input: give a file instead of -")
    try:
        text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: save it as that ({error})") from None
    lines = [line.strip() for line in re.split(r"\r?\n|\r", text) if line.strip()]
    if not lines:
        raise ValueError(f"nothing stands in {path}: it takes one a line")
    return lines


def processes():
    """How many accelerate launch has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def name(number, text):
    """0001-what-it-says."""
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:48].strip("-")
    return f"{number:04d}-{words}".strip("-")


def finished(jobs, folder, journal):
    """Which of `jobs` are done, by name, and the lines of the journal that stay.

    A line that was cut off does not stay, nor one of a job whose file is gone; all others do. Raises OSError where
    nothing can be written, and ValueError where a file was made with other settings, or not by us: nothing is lost.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"cannot write into {folder}: the output must be a folder, and writable")
    text = (folder / journal).read_text(encoding="utf-8") if (folder / journal).exists() else ""
    lines, records = text.split("\n")[:-1], {}  # what follows the last end of a line was cut off
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            records[record["file"]] = number, record
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"line {number + 1} of {folder / journal} is not ours: give another folder") from None
    done = set()
    for job in jobs:
        file = folder / job["file"]
        number, record = records.get(job["file"], (None, None))
        if number is None and file.exists():
            raise ValueError(f"{file} is there, and not in {journal}: move it, or give another folder for the output")
        if number is None:
            continue
        if not file.is_file():
            lines[number] = None
            continue
        other = next((key for key in job if record.get(key) != job[key]), None)
        if other:
            values = f"{str(record.get(other))[:80]}, now {str(job[other])[:80]}"
            raise ValueError(f"{file} was made with another {other}: give another folder for the output ({values})")
        done.add(job["file"])
    return done, [line for line in lines if line is not None]


def work(jobs, folder, journal, start, why, unit):
    """Makes what is missing of `jobs`, shared among the processes of `accelerate launch`; the exit code.

    jobs: dicts, alike in all processes, of "file" and of all that decides what will be in it.
    journal: name of the file that gets a JSON line for each: the job, and what `make` returns.
    start: called where there is work, and gives make(job, path), which writes the file and returns its figures.
    why: (error) -> one line about it; unit: of the progress bar.
    A file appears whole or not at all; one that fails is reported, the rest goes on, and the exit code is 1.
    """
    gpus = torch.cuda.is_available()
    state = PartialState(cpu=not gpus, timeout=datetime.timedelta(hours=12))  # for the last to end
    if state.num_processes != processes():
        raise OSError(f"accelerate started {processes()} processes, and they do not find each other")
    done, lines = finished(jobs, folder, journal)
    todo = [job for job in jobs if job["file"] not in done]
    if not state.is_main_process:  # one progress bar is enough
        for library in ("diffusers", "transformers"):
            importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    state.wait_for_everyone()  # all have read it
    path, failed = folder / journal, []
    if state.is_main_process and todo:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".draft-{journal}"
        draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        draft.replace(path)
    state.wait_for_everyone()
    mine = todo[state.process_index :: state.num_processes]
    make = start() if mine else None
    bar = tqdm(total=len(jobs), initial=len(done), unit=unit, disable=not (todo and state.is_main_process))
    with bar, watched(bar, path, len(done) - len(lines)):
        for job in mine:
            draft = folder / f".draft-{job['file']}"
            try:
                line = json.dumps({**job, **make(job, draft), "process": state.process_index}) + "\n"
                with path.open("ab", buffering=0) as file:  # one write: lines of several processes do not mix
                    file.write(line.encode())
                draft.replace(folder / job["file"])
            except Exception as error:
                failed.append(job["file"])
                bar.write(f"{job['file']} failed: {why(error)}", file=sys.stderr)
                if "--verbose" in sys.argv:
                    traceback.print_exc()
            finally:
                with contextlib.suppress(OSError):
                    draft.unlink(missing_ok=True)
        failed = gather_object(failed)
    if state.is_main_process:
        print(f"{len(jobs) - len(failed)} of {len(jobs)} are in {folder}", end="")
        print(f"; {len(failed)} failed, the same command tries them again" if failed else "", flush=True)
    state.wait_for_everyone()  # the first to leave with an error ends the others
    if state.num_processes > 1:
        state.destroy_process_group()
    return 1 if failed else 0


@contextlib.contextmanager
def watched(bar, path, offset):
    """The bar follows the lines of the file `path`, whichever process writes them."""
    done = threading.Event()

    def follow():
        while not done.wait(0.5):
            show()

    def show():
        bar.n = max(bar.n, offset + path.read_bytes().count(b"\n"))
        bar.refresh()

    if bar.disable:
        yield
        return
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show()
