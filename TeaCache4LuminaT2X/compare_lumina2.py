"""`teacache_lumina2.py --compare`: the same picture at several thresholds, with what it costs and what it changes.

Draws a strip (threshold, seconds, speedup, PSNR and SSIM against threshold 0 under each picture), prints the same
as a Markdown table, and as one JSON line last. Nothing happens at import.
"""

import json
import math
import os
import platform

import diffusers
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


def pixels(image):
    """A PIL image as (3, height, width) in [0, 1], float64."""
    data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1).double() / 255


def psnr(image, reference):
    """dB between two PIL images of one size; infinite if they are equal."""
    mse = (pixels(image) - pixels(reference)).square().mean().item()
    return 10 * math.log10(1 / mse) if mse > 0 else math.inf


def ssim(image, reference):
    """Mean structural similarity of two PIL images of one size, over R, G and B.

    Gaussian window of 11 pixels and sigma 1.5, borders left out (Wang et al., IEEE TIP 13(4), 2004).
    """
    a, b = pixels(image), pixels(reference)
    g = torch.exp(-(torch.arange(-5.0, 6.0, dtype=a.dtype) ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]  # (1, 1, 11, 11)
    mu_a, mu_b, aa, bb, ab = (F.conv2d(x[:, None], window) for x in (a, b, a * a, b * b, a * b))
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    structure = (2 * (ab - mu_a * mu_b) + c2) / (aa - mu_a**2 + bb - mu_b**2 + c2)
    return (luminance * structure).mean().item()


def shorten(prompt, length):
    """A prompt as one line of text that a Markdown table can hold."""
    prompt = " ".join(prompt.split()).replace("|", "/")
    return prompt if len(prompt) <= length else prompt[: length - 3] + "..."


def lines(entry):
    """What stands under a picture of the strip."""
    return [
        f"threshold {entry['rel_l1_thresh']:g}" + (" (original)" if entry["rel_l1_thresh"] == 0 else ""),
        f"{entry['seconds']:.2f} s, {entry['speedup']:.2f}x",
        f"{entry['computed']} / {entry['steps']} steps",
        f"PSNR {entry['psnr']:.1f} dB",
        f"SSIM {entry['ssim']:.3f}",
    ]


def strip(rows):
    """One PIL image from rows of (PIL image, entry), a row for each prompt."""
    first = rows[0][0][0]
    side = max(first.width, 192)  # small pictures are enlarged, for the text to fit under them
    tall, line = round(first.height * side / first.width), max(16, side // 16)
    wide, high = side + line, tall + 9 * line
    page = Image.new("RGB", (wide * len(rows[0]), high * len(rows)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=0.85 * line)
    for r, row in enumerate(rows):
        title = shorten(row[0][1]["prompt"], 2 * page.width // line)
        pen.text((line // 2, r * high + line // 3), title, fill="black", font=font)
        for c, (image, entry) in enumerate(row):
            x, y = c * wide + line // 2, r * high + 2 * line
            page.paste(image.resize((side, tall), Image.LANCZOS), (x, y))
            text = "\n".join(lines(entry))
            pen.multiline_text((x, y + tall + line // 3), text, fill="black", font=font, spacing=line // 5)
    return page


def compare(generate, args, save):
    """generate(prompt, thresh) -> (PIL image, {"seconds", "computed", "steps"}) for all prompts and thresholds.

    `args` are the script's, `thresholds` beginning with 0; `save(image, path)` writes the strip.
    """
    generate(args.prompt[0], 0.0, steps=2)  # warm-up, not timed
    rows = []
    for prompt in args.prompt:
        rows.append([])
        for thresh in args.thresholds:
            image, figures = generate(prompt, thresh)
            reference, base = rows[-1][0] if rows[-1] else (image, figures)
            figures["speedup"] = base["seconds"] / figures["seconds"]
            figures |= {"psnr": psnr(image, reference), "ssim": ssim(image, reference)}
            rows[-1].append((image, {"prompt": prompt, "rel_l1_thresh": thresh, **figures}))
    save(strip(rows), args.output)

    entries = [entry for row in rows for _, entry in row]
    print(f"\nsaved {args.output}\n")
    print("| prompt | rel_l1_thresh | seconds | speedup | steps computed | PSNR (dB) | SSIM |")
    print("|---|---|---|---|---|---|---|")
    for e in entries:
        cost = f"{e['rel_l1_thresh']:g} | {e['seconds']:.2f} | {e['speedup']:.2f}x | {e['computed']} / {e['steps']}"
        print(f"| {shorten(e['prompt'], 60)} | {cost} | {e['psnr']:.2f} | {e['ssim']:.4f} |")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    names = "model transformer negative_prompt seed num_inference_steps height width guidance_scale cfg_trunc_ratio"
    settings = {
        name: getattr(args, name)
        for name in (*names.split(), "dtype", "coefficients", "domain", "indicator", "predict")
    }
    versions = {"machine": machine, "torch": torch.__version__, "diffusers": diffusers.__version__}
    runs = [{**e, "psnr": e["psnr"] if math.isfinite(e["psnr"]) else None} for e in entries]  # JSON knows no infinity
    print(json.dumps({**settings, **versions, "output": args.output, "runs": runs}, default=str))  # str: paths, dtype
