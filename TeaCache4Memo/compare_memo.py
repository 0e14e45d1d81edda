"""`teacache_memo.py --compare`: the same video at several thresholds, with what it costs and what it changes.

Writes one video, the panels side by side (threshold, seconds, speedup and PSNR against threshold 0 under each), prints
the same as a Markdown table, and as one JSON line last. Nothing happens at import.
"""

import json
import math
import os
import platform

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def psnr(frames, reference):
    """dB between two videos of one size, (frames, height, width, 3) in uint8; infinite if they are equal."""
    pairs = zip(frames, reference)  # frame by frame: a minute of video is 1.4 GB
    mse = np.mean([np.square(a.astype(np.float64) - b).mean() for a, b in pairs]) / 255**2
    return 10 * math.log10(1 / mse) if mse > 0 else math.inf


def lines(entry):
    """What stands under a panel."""
    return [
        f"threshold {entry['rel_l1_thresh']:g}" + (" (original)" if entry["rel_l1_thresh"] == 0 else ""),
        f"{entry['seconds']:.2f} s, {entry['speedup']:.2f}x",
        f"{entry['computed']} / {entry['steps']} steps",
        f"PSNR {entry['psnr']:.1f} dB",
    ]


class Panels:
    """The frames of the comparison, drawn as they are asked for: (height, width, 3), uint8, both even."""

    def __init__(self, videos, entries):
        _, height, width, _ = videos[0].shape
        self.videos, self.scale = videos, max(1, -(-192 // width))  # small videos are enlarged, for the text to fit
        self.high, self.wide = height * self.scale, width * self.scale
        self.line = max(16, self.wide // 16)
        page = (
            2 * math.ceil(len(videos) * (self.wide + self.line) / 2),
            2 * math.ceil(self.high / 2 + 3.5 * self.line),
        )
        empty = Image.new("RGB", page, "white")
        pen, font = ImageDraw.Draw(empty), ImageFont.load_default(size=0.85 * self.line)
        for i, entry in enumerate(entries):
            where = (self.left(i), self.high + self.line)
            pen.multiline_text(where, "\n".join(lines(entry)), fill="black", font=font, spacing=self.line // 5)
        self.empty = np.asarray(empty)

    def left(self, i):
        return i * (self.wide + self.line) + self.line // 2

    def __len__(self):
        return len(self.videos[0])

    def __getitem__(self, number):
        page = self.empty.copy()
        for i, video in enumerate(self.videos):
            panel = video[number].repeat(self.scale, axis=0).repeat(self.scale, axis=1)
            page[self.line // 2 : self.line // 2 + self.high, self.left(i) : self.left(i) + self.wide] = panel
        return page


def compare(generate, inputs, args, write_video):
    """generate(thresh) -> (frames, {"seconds", "computed", "steps"}) for all thresholds, which begin with 0.

    `args` are the script's; `write_video(frames, path, fps, sound)`.
    """
    generate(0.0, steps=2, max_clips=1)  # warm-up, not timed
    videos, entries = [], []
    for thresh in args.thresholds:
        frames, figures = generate(thresh)
        videos.append(frames[: inputs.length])
        base = entries[0] if entries else figures
        figures |= {"speedup": base["seconds"] / figures["seconds"], "psnr": psnr(videos[-1], videos[0])}
        entries.append({"rel_l1_thresh": thresh, "frames": len(videos[-1]), **figures})
    write_video(Panels(videos, entries), args.output, args.config.fps, inputs.sound)

    print(f"\nsaved {args.output}\n")
    print("| rel_l1_thresh | seconds | s a frame | speedup | steps computed | PSNR (dB) |")
    print("|---|---|---|---|---|---|")
    for e in entries:
        cost = f"{e['seconds']:.2f} | {e['seconds'] / e['frames']:.3f} | {e['speedup']:.2f}x"
        print(f"| {e['rel_l1_thresh']:g} | {cost} | {e['computed']} / {e['steps']} | {e['psnr']:.2f} |")
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    settings = {name: getattr(args, name) for name in ("input_image", "input_audio", "seed", "predict", "output")}
    versions = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__}
    runs = [{**e, "psnr": e["psnr"] if math.isfinite(e["psnr"]) else None} for e in entries]  # JSON knows no infinity
    print(json.dumps({**settings, "config": vars(args.config), **versions, "runs": runs}, default=str))  # str: paths
