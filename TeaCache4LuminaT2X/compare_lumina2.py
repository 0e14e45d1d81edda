"""Compare TeaCache settings for Lumina-Image-2.0: one strip of images, a JSON file beside it, and a Markdown table.

    python compare_lumina2.py                                   # an easy prompt and a hard one, many and few passes
    python compare_lumina2.py --rel-l1-thresh 0.1 0.2 0.3 --computed-steps 15 15/100

Each image is compared with the original, which is not cached. Seconds are the median of --repeats runs. Both files are
written anew after each image, so that an interruption loses one. Takes the flags of teacache_lumina2.py as well.
"""

import json
import math
import os
import platform
import statistics
import sys
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

OUTPUT = Path("teacache_lumina2_compare.png")
PROMPTS = [teacache_lumina2.PROMPT, "penguin with umbrella"]
THRESHOLDS = [0.3]
BUDGETS = [(15, None), (15, 15), (10, None)]  # (computed steps, all steps; None: --num-inference-steps), those that fit


def budget(text):
    """(computed steps, all steps) of "15/100", (computed steps, None) of "15"."""
    computed, _, steps = text.partition("/")
    if not computed.isdecimal() or _ and not steps.isdecimal():
        raise ArgumentTypeError(f"must be like 15 or 15/100, not {text}")
    return int(computed), int(steps) if steps else None


def build_parser():
    parser = teacache_lumina2.build_parser()
    add = parser.add_argument
    add("--prompt", nargs="+", dest="prompts", default=PROMPTS, help="one row of images each")
    add("--rel-l1-thresh", nargs="*", type=float, dest="thresholds", default=THRESHOLDS, metavar="T")
    some = {"nargs": "*", "metavar": "K", "help": "such as 15, or 15/100; 8/8: plain steps"}
    add("--computed-steps", type=budget, dest="budgets", **some)
    add("--repeats", type=int, default=3, help="timed runs of each image")
    add("--output", type=Path, help=f"a new file, and .json beside it; default {OUTPUT}, or the next free number")
    parser.set_defaults(prompt=None, rel_l1_thresh=None, computed_steps=None)  # each column has its own
    return parser


def find_columns(args):
    """The settings of each image of a row, the original first. Raises ValueError for what cannot work."""
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {args.repeats}")
    if args.budgets is None:
        args.budgets = [(k, n) for k, n in BUDGETS if k < args.num_inference_steps]
    budgets = dict.fromkeys((k, n or args.num_inference_steps) for k, n in args.budgets)
    columns = [(t, None, args.num_inference_steps) for t in dict.fromkeys([0.0, *args.thresholds])]
    columns += [(None, k, n) for k, n in budgets]
    for threshold, computed_steps, num_steps in columns:
        teacache_lumina2.check_settings(num_steps, threshold, computed_steps)
    return [dict(zip(("rel_l1_thresh", "computed_steps", "num_inference_steps"), column)) for column in columns]


def psnr(image, reference):
    """Peak signal-to-noise ratio of two PIL images of one size, in dB; infinite if they are equal."""
    a, b = (np.asarray(x.convert("RGB"), np.float64) / 255 for x in (image, reference))
    mse = np.square(a - b).mean()
    return 10 * math.log10(1 / mse) if mse > 0 else math.inf


def name(column):
    """Of a setting, in strip, table and progress bar."""
    if column["rel_l1_thresh"] is not None:
        return f"threshold {column['rel_l1_thresh']:g}" if column["rel_l1_thresh"] else "original"
    computed, steps = column["computed_steps"], column["num_inference_steps"]
    return f"{computed} plain steps" if is_plain(column) else f"{computed} of {steps} steps"


def is_plain(column):
    """Fewer steps, without a cache."""
    return column["computed_steps"] == column["num_inference_steps"]


def cells(entry):
    """A row of the table: setting, seconds, speedup, computed steps, PSNR."""
    quality = "" if entry["rel_l1_thresh"] == 0 else f"{entry['psnr']:.1f} dB"
    return name(entry), f"{entry['seconds']:.2f} s", f"{entry['speedup']:.2f}x", str(entry["computed"]), quality


def caption(entry):
    """The lines of text under an image."""
    setting, seconds, speedup, computed, quality = cells(entry)
    return setting, f"{seconds}, {speedup}", f"{computed} computed", f"PSNR {quality}" if quality else ""


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


def compare(args, keep=lambda rows: None):
    """Draw and time all columns for all prompts: rows of (PIL image, entry), which `keep` gets after each image."""
    pipeline, rows = teacache_lumina2.load_pipeline(args), []

    def draw(label, **settings):
        pipeline.set_progress_bar_config(desc=label)
        return teacache_lumina2.generate(pipeline, Namespace(**{**vars(args), **settings}))

    draw("warm-up", prompt=args.prompts[0], rel_l1_thresh=0.0, num_inference_steps=2)
    for prompt in args.prompts:
        rows.append([])
        for column in args.columns:
            labels = [f"{name(column)}, run {run + 1} of {args.repeats}" for run in range(args.repeats)]
            plain = {"computed_steps": None, "rel_l1_thresh": 0.0} if is_plain(column) else {}
            images, seconds, schedules = zip(*[draw(label, prompt=prompt, **{**column, **plain}) for label in labels])
            entry = {"prompt": prompt, **column, "seconds": statistics.median(seconds), "computed": sum(schedules[0])}
            rows[-1].append((images[0], entry))
            original, base = rows[-1][0]
            entry |= {"speedup": base["seconds"] / entry["seconds"], "psnr": psnr(images[0], original)}
            keep(rows)
    return rows


def machine(args):
    """Where the seconds were measured."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"machine": name, "torch": torch.__version__, "diffusers": diffusers.__version__}


def write(args, rows):
    """The strip, and the JSON file beside it."""
    with teacache_lumina2.complete_file(args.output) as draft:
        strip(rows).save(draft)
    names = "model transformer dtype height width guidance_scale cfg_trunc_ratio negative_prompt seed repeats".split()
    runs = [dict(entry) for row in rows for _, entry in row]
    for entry in runs:
        entry["psnr"] = entry["psnr"] if math.isfinite(entry["psnr"]) else None  # JSON has no infinity
    result = {**{name: getattr(args, name) for name in names}, **machine(args), "runs": runs}
    with teacache_lumina2.complete_file(args.output.with_suffix(".json")) as draft:
        draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(rows):
    """The lines of a Markdown table for each prompt."""
    heading = "setting", "seconds", "speedup", "computed", "PSNR"
    for row in rows:
        texts = [heading, *[cells(entry) for _, entry in row]]
        widths = [max(map(len, column)) for column in zip(*texts)]
        yield from ("", row[0][1]["prompt"][:76], "")
        for i, text in enumerate(texts):
            yield "| " + " | ".join(word.ljust(width) for word, width in zip(text, widths)) + " |"
            if i == 0:
                yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with teacache_lumina2.one_line_errors(parser):
        args.output = args.output or teacache_lumina2.free_name(OUTPUT)
        teacache_lumina2.check_output(args.output, args.output.with_suffix(".json"))
        teacache_lumina2.check_args(args)
        args.columns = find_columns(args)
        rows = compare(args, keep=lambda rows: write(args, rows))
    image, about = rows[0][0][0], machine(args)
    sys.stdout.reconfigure(errors="replace")  # where a terminal lacks letters of a prompt
    print(f"saved {args.output} and {args.output.with_suffix('.json')}", *table(rows), sep="\n")
    print(f"\n{Path(args.model).name}, {image.width} x {image.height}, {args.dtype}, median of {args.repeats}")
    print(f"{about['machine']}, torch {about['torch']}, diffusers {about['diffusers']}")


if __name__ == "__main__":
    main()
