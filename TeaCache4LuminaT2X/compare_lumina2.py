"""Compare TeaCache settings for Lumina-Image-2.0: one strip of images, a JSON file beside it, and a Markdown table.

    python compare_lumina2.py                                   # the default columns for three prompts
    python compare_lumina2.py --rel-l1-thresh 0.1 0.2 0.3 --computed-steps 15 15/100 0,10,17,21,24,26,28,29

PSNR is against the original, the uncached image of the same model, dtype and seed. The columns take turns, --repeats
times, so that a machine that becomes slower does so for all: seconds and speedup are the medians of the turns. Both
files are written anew after each new image, so that an interruption loses one. Takes the flags of teacache_lumina2.py
as well.
"""

import itertools
import json
import math
import os
import platform
import statistics
from argparse import Namespace
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
PROMPTS = [teacache_lumina2.PROMPT, "green car", "flag"]  # easy; new to the bundled model; open
THRESHOLDS = [teacache_lumina2.REL_L1_THRESH]
BUDGETS = [(15, None), (15, 15), (10, None), (8, None)]  # those that fit
UNCACHED = {"rel_l1_thresh": 0.0, "computed_steps": None}


def budget(text):
    """(computed steps, all steps) of "15/100"; of "15" and "0,4,9" too, None for all steps: --num-inference-steps."""
    computed, slash, steps = text.partition("/")
    return teacache_lumina2.number_or_list(computed), int(steps) if slash else None


def build_parser():
    parser = teacache_lumina2.build_parser()
    add = parser.add_argument
    text = teacache_lumina2.utf8_text
    add("--prompt", nargs="+", type=text, dest="prompts", default=PROMPTS, help="one row of images each")
    add("--rel-l1-thresh", nargs="*", type=float, dest="thresholds", default=THRESHOLDS, metavar="T")
    some = {"nargs": "*", "metavar": "K", "help": "such as 15, 15/100 or 0,4,9,15,20,25,29; 8/8: without a cache"}
    add("--computed-steps", type=budget, dest="budgets", **some)
    add("--repeats", type=int, default=3, help="timed runs of each image")
    add("--output", type=Path, help=f"a new file, and .json beside it; default {OUTPUT}, or the next free number")
    parser.set_defaults(prompt=None, rel_l1_thresh=None, computed_steps=None)  # each column has its own
    return parser


def find_columns(args):
    """The settings of each image of a row, the original first. Raises ValueError for what cannot work."""
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {args.repeats}")
    steps = args.num_inference_steps
    if args.budgets is None:
        args.budgets = [(k, n) for k, n in BUDGETS if k < steps]
    columns = [(threshold, None, steps) for threshold in (0.0, *args.thresholds)]
    columns += [(None, k, n or steps) for k, n in args.budgets]
    columns = [column for i, column in enumerate(columns) if column not in columns[:i]]
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
    computed, steps = column["computed_steps"], column["num_inference_steps"]
    if column["rel_l1_thresh"] is not None:
        return f"threshold {column['rel_l1_thresh']:g}" if column["rel_l1_thresh"] else "original"
    if isinstance(computed, list):
        return f"{len(computed)} of {steps}: {','.join(map(str, computed[:3]))},.."
    return f"{steps} steps, no cache" if is_uncached(column) else f"{computed} of {steps} steps"


def is_uncached(column):
    """Fewer steps, without a cache."""
    return column["computed_steps"] == column["num_inference_steps"]


def cells(entry):
    """A row of the table: setting, seconds, speedup, computed steps, PSNR."""
    quality = "" if entry["rel_l1_thresh"] == 0 else f"{entry['psnr']:.1f} dB"
    return name(entry), f"{entry['seconds']:.2f} s", f"{entry['speedup']:.2f}x", str(entry["computed"]), quality


def caption(entry):
    """The lines of text under an image. No seconds: the table has them, with the machine."""
    setting, _, _, computed, quality = cells(entry)
    return setting, f"{computed} computed", f"PSNR {quality}" if quality else "PSNR is against this"


def layout(width, height):
    """Width and height of an image in the strip, the height of a line of text, width and height of a cell."""
    side = max(width, 192)  # small images are enlarged, for the text to fit
    tall, line = round(height * side / width), max(16, side // 16)
    return side, tall, line, side + line, tall + 7 * line


def strip(rows):
    """One PIL image from rows of (PIL image, entry), one row for each prompt."""
    side, tall, line, wide, high = layout(*rows[0][0][0].size)
    page = Image.new("RGB", (wide * len(rows[0]), high * len(rows)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=0.85 * line)
    for r, row in enumerate(rows):
        pen.text((line // 2, r * high + line // 3), row[0][1]["prompt"][: 2 * page.width // line], "black", font)
        for c, (image, entry) in enumerate(row):
            x, y = c * wide + line // 2, r * high + 2 * line
            page.paste(image.resize((side, tall), Image.LANCZOS), (x, y))
            pen.multiline_text((x, y + tall + line // 3), "\n".join(caption(entry)), "black", font, spacing=line // 5)
    return page


def check_size(args, image):
    """Raise ValueError if a strip of images of this size is too large for its format."""
    *_, wide, high = layout(*image.size)
    size = wide * len(args.columns), high * len(args.prompts)
    most = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}.get(args.output.suffix.lower(), math.inf)
    if max(size) > most:
        raise ValueError(f"--output {args.output}: the strip has {size[0]} x {size[1]} pixels, so it must be a .png")


def describe(prompt, column, schedule, cache):
    """What is known of an image without looking at it."""
    steps = ",".join(str(i) for i, computed in enumerate(schedule) if computed)  # as --computed-steps takes them
    decided = getattr(cache, "decided", None)  # what the first step measured, to choose the others by
    return {"prompt": prompt, **column, "computed": sum(schedule), "steps": steps, "decided": decided}


def compare(args, keep=lambda rows: None):
    """Draw and time all columns for all prompts: rows of (PIL image, entry), which `keep` gets after each image."""
    pipeline, rows = teacache_lumina2.load_pipeline(args), []

    def draw(label, **settings):
        pipeline.set_progress_bar_config(desc=label)
        return teacache_lumina2.generate(pipeline, Namespace(**{**vars(args), **settings}))

    image, _, _ = draw("warm-up", prompt=args.prompts[0], **UNCACHED, num_inference_steps=2)
    check_size(args, image)
    for prompt in args.prompts:
        row, seconds = [], [[] for _ in args.columns]
        rows.append(row)
        for run, (c, column) in itertools.product(range(args.repeats), enumerate(args.columns)):
            label = f"{name(column)}, run {run + 1} of {args.repeats}"
            settings = column | UNCACHED if is_uncached(column) else column
            image, took, schedule = draw(label, prompt=prompt, **settings)
            seconds[c].append(took)
            if run == 0:
                entry = describe(prompt, column, schedule, pipeline.transformer.teacache)
                row.append((image, entry))
                entry["psnr"] = psnr(image, row[0][0])
            for (_, entry), times in zip(row, seconds):
                entry["seconds"] = statistics.median(times)
                entry["speedup"] = statistics.median(base / took for base, took in zip(seconds[0], times))
            if run == 0 or c == len(seconds) - 1:
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
    """For each prompt the lines of a Markdown table, and the steps that were computed."""
    heading = "setting", "seconds", "speedup", "computed", "PSNR against original"
    for row in rows:
        texts = [heading, *[cells(entry) for _, entry in row]]
        widths = [max(map(len, column)) for column in zip(*texts)]
        yield from ("", row[0][1]["prompt"][:76], "")
        for i, text in enumerate(texts):
            yield "| " + " | ".join(word.ljust(width) for word, width in zip(text, widths)) + " |"
            if i == 0:
                yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        yield ""
        for _, entry in row:
            if entry["computed"] < entry["num_inference_steps"]:
                decided = "" if entry["decided"] is None else f"  (measured at the first step: {entry['decided']:.2f})"
                yield f"- {name(entry)}: {entry['steps']}{decided}"


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
    saved = f"saved {args.output} and {args.output.with_suffix('.json')}"
    where = f"{Path(args.model).name}, {image.width} x {image.height}, {args.dtype}, median of {args.repeats}"
    versions = f"{about['machine']}, torch {about['torch']}, diffusers {about['diffusers']}"
    teacache_lumina2.say("\n".join([saved, *table(rows), "", where, versions]))


if __name__ == "__main__":
    main()
