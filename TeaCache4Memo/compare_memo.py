"""Compare TeaCache settings for MEMO: one video with a panel for each, a Markdown table, and a JSON file.

    python TeaCache4Memo/compare_memo.py --input_image face.jpg --input_audio speech.wav  # 0.09, 0.15, 0.25, half of the steps
    python TeaCache4Memo/compare_memo.py --rel_l1_thresh 0.15 --computed_steps 10 0,3,7,12,19  # a list has commas
    python TeaCache4Memo/compare_memo.py --repeats 3                          # seconds: the median of three runs, in turn

Each panel is compared with the original, which is not cached. The JSON file is beside the video, under its name. All
videos are kept in memory until the end: use a short voice. Ctrl-C ends it with the panels that were made. Takes the flags
of teacache_memo.py as well.
"""

import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

if __package__:
    from . import teacache_memo
else:
    import teacache_memo


def list_settings(thresholds, budgets, steps):
    """Those of each panel, the original first. ValueError for one that cannot work."""
    thresholds = [0.09, 0.15, 0.25] if thresholds is None else thresholds
    budgets = [max(2, steps // 2)] if budgets is None else budgets
    settings = [{"rel_l1_thresh": threshold} for threshold in [0.0, *thresholds]]
    settings += [{"computed_steps": budget} for budget in budgets]
    settings = [each for i, each in enumerate(settings) if each not in settings[:i]]
    for each in settings:
        teacache_memo.check_settings(steps, **each)
    return settings


def psnr(frames, reference):
    """Peak signal-to-noise ratio of two videos, (frames, height, width, 3) in uint8, in dB; infinite if equal."""
    pairs = zip(frames, reference)  # frame by frame: a minute of video is 1.4 GB
    mse = np.mean([np.square(a.astype(np.float64) - b).mean() for a, b in pairs]) / 255**2
    return 10 * math.log10(1 / mse) if mse > 0 else math.inf


def name_panel(entry):
    steps = entry.get("computed_steps")
    if steps is not None:
        return f"{len(steps)} chosen steps" if isinstance(steps, list) else f"{steps} steps a clip"
    return f"threshold {entry['rel_l1_thresh']:g}" if entry["rel_l1_thresh"] else "original"


def caption(entry):
    """The lines of text under a panel."""
    cost = f"{entry['seconds']:.1f} s, {entry['speedup']:.2f}x"
    quality = "" if entry.get("rel_l1_thresh") == 0 else f"PSNR {entry['psnr']:.1f} dB"
    return name_panel(entry), cost, f"{entry['computed']} of {entry['steps']} steps", quality


def panels(videos, entries):
    """The frames of the comparison, one after the other: (height, width, 3), uint8, both sides even."""
    _, height, width, _ = videos[0].shape
    scale = max(1, -(-192 // width))  # small videos are enlarged, for the text to fit
    high, wide = height * scale, width * scale
    line = max(16, wide // 16)
    size = 2 * math.ceil(len(videos) * (wide + line) / 2), 2 * math.ceil(high / 2 + 3.5 * line)
    page, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=0.85 * line)
    pen = ImageDraw.Draw(page)
    left = [i * (wide + line) + line // 2 for i in range(len(videos))]
    for x, entry in zip(left, entries):
        pen.multiline_text((x, high + line), "\n".join(caption(entry)), "black", font, spacing=line // 5)
    for frames in zip(*videos):
        canvas = np.asarray(page).copy()
        for x, frame in zip(left, frames):
            canvas[line // 2 : line // 2 + high, x : x + wide] = frame.repeat(scale, axis=0).repeat(scale, axis=1)
        yield canvas


def generate_all(pipeline, *args, **options):
    """The whole video of `generate`: frames, the seconds that they took, and the schedule of all clips."""
    frames, schedule, began = [], [], time.perf_counter()
    for clip in teacache_memo.generate(pipeline, *args, **options):
        frames.append(clip)
        schedule += pipeline.diffusion_net.teacache.schedule
    return np.concatenate(frames), time.perf_counter() - began, schedule


def compare(parts, settings, repeats=1):
    """Make and time all panels; parts: the first arguments of `generate`. Returns the videos and their entries."""
    *_, config, _ = parts
    generate_all(*parts, rel_l1_thresh=0.0, clips=1, progress=False)  # warm-up
    videos, entries, seconds = [], [], [[] for _ in settings]
    try:
        for run in range(repeats):  # one of each in turn: a machine that slows down slows all of them down
            for panel, setting in enumerate(settings):
                print(f"{name_panel(setting)}:", file=sys.stderr)
                frames, took, schedule = generate_all(*parts, **setting)
                seconds[panel].append(took)
                if run == 0:
                    first_clip = [step for step, computed in enumerate(schedule[: config.inference_steps]) if computed]
                    entry = {**setting, "computed": sum(schedule), "steps": len(schedule)}
                    entry |= {"computed_in_first_clip": first_clip, "psnr": psnr(frames, (videos or [frames])[0])}
                    videos.append(frames)
                    entries.append(entry)
    except KeyboardInterrupt:
        if not entries:
            raise
        print("interrupted: what was made is kept", file=sys.stderr)
    for entry, times in zip(entries, seconds):
        entry["runs"], entry["seconds"] = len(times), statistics.median(times)
        entry["speedup"] = entries[0]["seconds"] / entry["seconds"]
    return videos, entries


def show(entries):
    """The table in Markdown."""
    print(f"| setting | seconds | speedup | computed | PSNR |\n{'|---' * 5}|")
    for entry in entries:
        name, cost, computed, quality = caption(entry)
        seconds, speedup = cost.split(", ")
        print(f"| {name} | {seconds} | {speedup} | {computed} | {quality.removeprefix('PSNR ')} |")
    print("\nComputed in the first clip:\n")
    for entry in entries:
        print(f"- {name_panel(entry)}: {','.join(map(str, entry['computed_in_first_clip']))}")


def main(argv=None):
    parser = teacache_memo.build_parser(nargs="*")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of each panel")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {args.repeats}")
    with teacache_memo.one_line_errors(), tempfile.TemporaryDirectory() as folder:
        teacache_memo.quiet()
        config = teacache_memo.choose_config(args.config)
        settings = list_settings(args.rel_l1_thresh, args.computed_steps, config.inference_steps)
        image, audio = teacache_memo.find_inputs(config, args.input_image, args.input_audio)
        output = teacache_memo.output_path(args.output_dir, image, audio)
        inputs = teacache_memo.prepare(image, audio, config, folder, args.emotion)
        models = {"model": config.model_name_or_path, "vae": config.vae, "dtype": config.weight_dtype}
        pipeline, audio_proj = teacache_memo.load_pipeline(**models)
        videos, entries = compare((pipeline, audio_proj, inputs, config, args.seed), settings, args.repeats)

        gpu = torch.cuda.is_available()
        machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {os.cpu_count()} cores"
        versions = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__}
        files = {"input_image": str(image), "input_audio": str(audio)}
        about = {**files, "seed": args.seed, "emotion": args.emotion, "config": vars(config), **versions}
        runs = [{**entry, "psnr": entry["psnr"] if math.isfinite(entry["psnr"]) else None} for entry in entries]
        text = json.dumps({**about, "runs": runs})
        record = teacache_memo.take_name(output.with_name(f"{output.stem}_compare.json"))
        record.write_text(text, encoding="utf-8")  # before what may still fail
        pages = (page[None] for page in panels(videos, entries))
        output = teacache_memo.write_video(pages, record.with_suffix(".mp4"), config.fps, inputs.sound)

        print(f"saved {output}\n")
        show(entries)
        size = f"{config.resolution} x {config.resolution}, {config.weight_dtype}"
        model, repeats = Path(config.model_name_or_path).name, entries[-1]["runs"]
        median = f", median of {repeats}" if repeats > 1 else ""
        print(f"\n{model}, {size}, {machine}, torch {torch.__version__}, diffusers {diffusers.__version__}{median}")


if __name__ == "__main__":
    main()
