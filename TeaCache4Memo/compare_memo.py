"""Compare TeaCache settings for MEMO: one video with a panel for each, a Markdown table, and a JSON file.

    python compare_memo.py --input_image face.jpg --input_audio speech.wav      # 0.09, 0.15, 0.25, half of the steps
    python compare_memo.py --rel_l1_thresh 0.15 --computed_steps 10 7
    python compare_memo.py --repeats 3                                          # of seconds, the median of three runs

Each panel is compared with the original, which is not cached. The JSON file is beside the video, under its name. All
videos are kept in memory until the end: use a short voice. Takes the flags of teacache_memo.py as well.
"""

import json
import math
import os
import platform
import statistics
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
        add, several = teacache_memo.add_flag, {"nargs": "*", "type": float, "metavar": "T"}
        add(parser, "rel_l1_thresh", dest="thresholds", default=[0.09, 0.15, 0.25], **several)
        add(parser, "tolerance", dest="tolerances", default=[], **several)
        steps = "default: half of the steps"
        add(parser, "computed_steps", dest="budgets", nargs="*", type=int, metavar="K", help=steps)
        add(parser, "repeats", type=int, default=1, help="timed runs of each panel")
        parser.set_defaults(rel_l1_thresh=None, computed_steps=None, tolerance=None, parser=parser)

    args = teacache_memo.parse_args(argv, extend)
    if args.repeats < 1:
        args.parser.error(f"--repeats must be at least 1, not {args.repeats}")
    budgets = [max(2, args.config.inference_steps // 2)] if args.budgets is None else args.budgets
    limits = [{"rel_l1_thresh": t} for t in dict.fromkeys([0.0, *args.thresholds])]
    limits += [{"computed_steps": k} for k in budgets] + [{"tolerance": t} for t in args.tolerances]
    args.settings = [{"rel_l1_thresh": None, "computed_steps": None, "tolerance": None, **limit} for limit in limits]
    args.output = args.output.with_stem(f"{args.output.stem}_compare")
    try:
        for each in args.settings:
            teacache_memo.check_settings(args.config.inference_steps, **each)
        for path in (args.output, args.output.with_suffix(".json")):
            if path.exists():
                raise ValueError(f"{path} exists: move it, or give another --output_dir")
    except ValueError as error:
        args.parser.error(str(error))
    return args


def psnr(frames, reference):
    """Peak signal-to-noise ratio of two videos, (frames, height, width, 3) in uint8, in dB; infinite if equal."""
    pairs = zip(frames, reference)  # frame by frame: a minute of video is 1.4 GB
    mse = np.mean([np.square(a.astype(np.float64) - b).mean() for a, b in pairs]) / 255**2
    return 10 * math.log10(1 / mse) if mse > 0 else math.inf


def name_setting(settings):
    """What a panel is called."""
    if settings["rel_l1_thresh"] is not None:
        return f"threshold {settings['rel_l1_thresh']:g}" if settings["rel_l1_thresh"] else "original"
    if settings["tolerance"] is not None:
        return f"tolerance {settings['tolerance']:g}"
    return f"{settings['computed_steps']} steps a clip"


def caption(entry):
    """The lines of text under a panel."""
    cost = f"{entry['seconds']:.1f} s, {entry['speedup']:.2f}x"
    quality = f"PSNR {entry['psnr']:.1f} dB" if entry["rel_l1_thresh"] != 0 else ""
    return name_setting(entry), cost, f"{entry['computed']} of {entry['steps']} steps", quality


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
    inputs = teacache_memo.prepare(args.input_image, args.input_audio, config, folder, args.emotion)
    models = {"model": config.model_name_or_path, "vae": config.vae, "dtype": config.weight_dtype}
    pipeline, audio_proj = teacache_memo.load_pipeline(**models)

    def make(bar, **settings):
        return teacache_memo.generate_all(pipeline, audio_proj, inputs, config, args.seed, bar=bar, **settings)

    make("warm-up,", rel_l1_thresh=0.0, clips=1)
    videos, entries = [], []
    for settings in args.settings:
        frames, first_seconds, schedule = make(f"{name_setting(settings)},", **settings)
        again = [make(f"{name_setting(settings)}, again,", **settings)[1] for _ in range(args.repeats - 1)]
        seconds = statistics.median([first_seconds, *again])
        videos.append(frames)
        entry = {**settings, "seconds": seconds, "computed": sum(schedule), "steps": len(schedule)}
        entries.append(entry | {"psnr": psnr(frames, videos[0])})
        entries[-1]["speedup"] = entries[0]["seconds"] / seconds
    return videos, entries, inputs.sound


def main(argv=None):
    args = parse_args(argv)
    teacache_memo.quiet()
    with tempfile.TemporaryDirectory() as folder:
        videos, entries, sound = compare(args, folder)
        pages = (page[None] for page in panels(videos, entries))
        output = teacache_memo.write_video(pages, args.output, args.config.fps, sound)
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    versions = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__}
    size, about = args.config.resolution, f"{machine}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    about = f"{Path(args.config.model_name_or_path).name}, {size} x {size}, {args.config.weight_dtype}, {about}"
    about += f", median of {args.repeats}" if args.repeats > 1 else ""
    print(f"saved {output}\n\n| setting | seconds | speedup | computed | PSNR |\n{'|---' * 5}|")
    for entry in entries:
        name, cost, computed, quality = caption(entry)
        seconds, speedup = cost.split(", ")
        print(f"| {name} | {seconds} | {speedup} | {computed} | {quality.removeprefix('PSNR ')} |")
        entry["psnr"] = entry["psnr"] if math.isfinite(entry["psnr"]) else None  # JSON has no infinity
    print(f"\n{about}")
    files = {name: str(getattr(args, name)) for name in ("input_image", "input_audio")} | {"output": str(output)}
    about = {**files, "seed": args.seed, "emotion": args.emotion, "config": dict(args.config), **versions}
    about["repeats"] = args.repeats
    output.with_suffix(".json").write_text(json.dumps({**about, "runs": entries}), encoding="utf-8")


if __name__ == "__main__":
    main()
