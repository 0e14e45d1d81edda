"""Compare TeaCache settings for Lumina-Image-2.0: one strip of images, a Markdown table and a JSON line.

    python compare_lumina2.py                                   # 0.3, 15 and 10 of 30 steps, 15 of 100
    python compare_lumina2.py --rel-l1-thresh 0.1 0.2 0.3 --computed-steps 15 --tolerance 0.003

Each image is compared with the original, which is not cached. Takes the flags of teacache_lumina2.py as well.
"""

import json
import math
import os
import platform
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

if __package__:
    from . import teacache_lumina2
else:
    import teacache_lumina2

BUDGETS = [(15, None), (10, None), (15, 100)]  # (computed steps, all steps; None: --num-inference-steps)


def budget(text):
    """(computed steps, all steps) of "15/100", (computed steps, None) of "15"."""
    computed, _, steps = text.partition("/")
    if not computed.isdecimal() or _ and not steps.isdecimal():
        raise ArgumentTypeError(f"must be like 15 or 15/100, not {text}")
    return int(computed), int(steps) if steps else None


def parse_args(argv=None):
    """The arguments; `columns` has the settings of each image of a row, the original first."""

    def extend(parser):
        add = parser.add_argument
        add("--prompt", nargs="+", dest="prompts", default=[teacache_lumina2.PROMPT], help="one row of images each")
        add("--rel-l1-thresh", nargs="*", type=float, dest="thresholds", default=[0.3], metavar="T")
        add("--tolerance", nargs="*", type=float, dest="tolerances", default=[], metavar="T")
        some = {"nargs": "*", "metavar": "K", "help": "such as 15, or 15/100"}
        add("--computed-steps", type=budget, dest="budgets", default=BUDGETS, **some)
        add("--output", type=Path, default=Path("teacache_lumina2_compare.png"))
        parser.set_defaults(prompt=None, rel_l1_thresh=None, computed_steps=None, tolerance=None, parser=parser)

    args = teacache_lumina2.parse_args(argv, extend)
    limits = [{"rel_l1_thresh": t} for t in dict.fromkeys([0.0, *args.thresholds])]
    limits += [{"computed_steps": k, "steps": n} for k, n in args.budgets] + [{"tolerance": t} for t in args.tolerances]
    args.columns, none = [], dict.fromkeys(("rel_l1_thresh", "computed_steps", "tolerance"))
    for limit in limits:
        steps = limit.pop("steps", None) or args.num_inference_steps
        try:
            teacache_lumina2.check_settings(steps, **limit)
        except ValueError as error:
            args.parser.error(str(error))
        args.columns.append({**none, **limit, "num_inference_steps": steps})
    return args


def psnr(image, reference):
    """Peak signal-to-noise ratio of two PIL images of one size, in dB; infinite if they are equal."""
    a, b = (np.asarray(x.convert("RGB"), np.float64) / 255 for x in (image, reference))
    mse = np.square(a - b).mean()
    return 10 * math.log10(1 / mse) if mse > 0 else math.inf


def caption(entry):
    """The lines of text under an image."""
    thresh, tolerance, steps = entry["rel_l1_thresh"], entry["tolerance"], entry["num_inference_steps"]
    name = f"{entry['computed']} of {steps} steps" if tolerance is None else f"tolerance {tolerance:g}"
    name = name if thresh is None else f"threshold {thresh:g}" if thresh else "original"
    cost = f"{entry['seconds']:.2f} s, {entry['speedup']:.2f}x"
    return name, cost, f"{entry['computed']} computed", f"PSNR {entry['psnr']:.1f} dB" if thresh != 0 else ""


def strip(rows):
    """One PIL image from rows of (PIL image, entry), one row for each prompt."""
    first = rows[0][0][0]
    side = max(first.width, 192)  # small images are enlarged, for the text to fit
    tall, line = round(first.height * side / first.width), max(16, side // 16)
    wide, high = side + line, tall + 8 * line
    page = Image.new("RGB", (wide * len(rows[0]), high * len(rows)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=0.85 * line)
    for r, row in enumerate(rows):
        pen.text((line // 2, r * high + line // 3), row[0][1]["prompt"][: 2 * page.width // line], "black", font)
        for c, (image, entry) in enumerate(row):
            x, y = c * wide + line // 2, r * high + 2 * line
            page.paste(image.resize((side, tall), Image.LANCZOS), (x, y))
            pen.multiline_text((x, y + tall + line // 3), "\n".join(caption(entry)), "black", font, spacing=line // 5)
    return page


def compare(args):
    """Draw and time all columns for all prompts. Returns rows of (PIL image, entry)."""
    pipeline, rows = teacache_lumina2.load_pipeline(args), []

    def draw(**settings):
        return teacache_lumina2.generate(pipeline, Namespace(**{**vars(args), **settings}))

    draw(prompt=args.prompts[0], rel_l1_thresh=0.0, num_inference_steps=2)  # warm-up
    for prompt in args.prompts:
        rows.append([])
        for column in args.columns:
            image, seconds, schedule = draw(prompt=prompt, **column)
            entry = {"prompt": prompt, **column, "seconds": seconds, "computed": sum(schedule)}
            rows[-1].append((image, entry))
            original, base = rows[-1][0]
            entry |= {"speedup": base["seconds"] / seconds, "psnr": psnr(image, original)}
    return rows


def main(argv=None):
    args = parse_args(argv)
    rows = compare(args)
    strip(rows).save(args.output)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    versions = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__}
    image, about = rows[0][0][0], f"{machine}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    about = f"{Path(args.model).name}, {image.width} x {image.height}, {args.dtype}, {about}"
    print(f"saved {args.output}\n\n| prompt | setting | seconds | speedup | computed | PSNR | on |\n{'|---' * 7}|")
    for entry in (entry for row in rows for _, entry in row):
        name, cost, computed, quality = caption(entry)
        seconds, speedup = cost.split(", ")
        quality = quality.removeprefix("PSNR ")
        print(f"| {entry['prompt'][:40]} | {name} | {seconds} | {speedup} | {computed} | {quality} | {about} |")
        entry["psnr"] = entry["psnr"] if math.isfinite(entry["psnr"]) else None  # JSON has no infinity
    names = "model transformer dtype height width guidance_scale cfg_trunc_ratio negative_prompt seed".split()
    settings = {name: getattr(args, name) for name in names}
    print(json.dumps({**settings, **versions, "runs": [entry for row in rows for _, entry in row]}))


if __name__ == "__main__":
    main()
