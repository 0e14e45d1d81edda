"""Compare TeaCache settings for MEMO: one video with a panel for each, a Markdown table and a JSON line.

    python compare_memo.py --input_image face.jpg --input_audio speech.wav      # 0.09, 0.15, 0.25, half of the steps
    python compare_memo.py --rel_l1_thresh 0.15 --computed_steps 10 7

Each panel is compared with the original, which is not cached. Takes the flags of teacache_memo.py as well.
"""

import json
import math
import os
import platform
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

if __package__:
    from . import teacache_memo
else:
    import teacache_memo


def parse_args(argv=None):
    """The arguments; `settings` has those of each panel, the original first."""

    def extend(parser):
        add = parser.add_argument
        add("--rel_l1_thresh", nargs="*", type=float, dest="thresholds", default=[0.09, 0.15, 0.25], metavar="T")
        add("--tolerance", nargs="*", type=float, dest="tolerances", default=[], metavar="T")
        add("--computed_steps", nargs="*", type=int, dest="budgets", metavar="K", help="default: half of the steps")
        parser.set_defaults(rel_l1_thresh=None, computed_steps=None, tolerance=None, parser=parser)

    args = teacache_memo.parse_args(argv, extend)
    budgets = [max(2, args.config.inference_steps // 2)] if args.budgets is None else args.budgets
    limits = [{"rel_l1_thresh": t} for t in dict.fromkeys([0.0, *args.thresholds])]
    limits += [{"computed_steps": k} for k in budgets] + [{"tolerance": t} for t in args.tolerances]
    args.settings = [{"rel_l1_thresh": None, "computed_steps": None, "tolerance": None, **limit} for limit in limits]
    args.output = args.output.with_stem(f"{args.output.stem}_compare")
    try:
        for each in args.settings:
            teacache_memo.check_settings(args.config.inference_steps, **each)
        if args.output.exists():
            raise ValueError(f"{args.output} exists: move it, or give another --output_dir")
    except ValueError as error:
        args.parser.error(str(error))
    return args


def psnr(frames, reference):
    """Peak signal-to-noise ratio of two videos, (frames, height, width, 3) in uint8, in dB; infinite if equal."""
    pairs = zip(frames, reference)  # frame by frame: a minute of video is 1.4 GB
    mse = np.mean([np.square(a.astype(np.float64) - b).mean() for a, b in pairs]) / 255**2
    return 10 * math.log10(1 / mse) if mse > 0 else math.inf


def caption(entry):
    """The lines of text under a panel."""
    thresh, computed = entry["rel_l1_thresh"], f"{entry['computed']} of {entry['steps']} steps"
    tolerance = entry["tolerance"]
    name = f"{entry['computed_steps']} steps a clip" if tolerance is None else f"tolerance {tolerance:g}"
    name = name if thresh is None else f"threshold {thresh:g}" if thresh else "original"
    cost = f"{entry['seconds']:.1f} s, {entry['speedup']:.2f}x"
    return name, cost, computed, f"PSNR {entry['psnr']:.1f} dB" if thresh != 0 else ""


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


def compare(args, folder):
    """Make and time all panels. Returns the videos, their entries and the path of the sound."""
    config = args.config
    inputs = teacache_memo.prepare(args.input_image, args.input_audio, config, folder)
    models = {"model": config.model_name_or_path, "vae": config.vae, "dtype": config.weight_dtype}
    pipeline, audio_proj = teacache_memo.load_pipeline(**models)

    def make(**settings):
        return teacache_memo.generate(pipeline, audio_proj, inputs, config, args.seed, **settings)

    make(rel_l1_thresh=0.0, clips=1)  # warm-up
    videos, entries = [], []
    for settings in args.settings:
        frames, seconds, schedule = make(**settings)
        videos.append(frames)
        entry = {**settings, "seconds": seconds, "computed": sum(schedule), "steps": len(schedule)}
        entries.append(entry | {"psnr": psnr(frames, videos[0])})
        entries[-1]["speedup"] = entries[0]["seconds"] / seconds
    return videos, entries, inputs.sound


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        videos, entries, sound = compare(args, folder)
        teacache_memo.write_video(panels(videos, entries), args.output, args.config.fps, sound)
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    versions = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__}
    size, about = args.config.resolution, f"{machine}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    about = f"{Path(args.config.model_name_or_path).name}, {size} x {size}, {args.config.weight_dtype}, {about}"
    print(f"saved {args.output}\n\n| setting | seconds | speedup | computed | PSNR | on |\n{'|---' * 6}|")
    for entry in entries:
        name, cost, computed, quality = caption(entry)
        seconds, speedup = cost.split(", ")
        print(f"| {name} | {seconds} | {speedup} | {computed} | {quality.removeprefix('PSNR ')} | {about} |")
        entry["psnr"] = entry["psnr"] if math.isfinite(entry["psnr"]) else None  # JSON has no infinity
    files = {name: str(getattr(args, name)) for name in ("input_image", "input_audio", "output")}
    print(json.dumps({**files, "seed": args.seed, "config": dict(args.config), **versions, "runs": entries}))


if __name__ == "__main__":
    main()
