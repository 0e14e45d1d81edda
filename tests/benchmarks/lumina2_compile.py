"""What `--compile` costs and gains: the first picture, the second, and the median of several, with and without it.

    python tests/benchmarks/lumina2_compile.py                 # the bundled model, on a GPU where there is one

The blocks are compiled one by one, as by --compile. Both variants in one process, after a warm-up; the first picture is
timed in this process and, with torch's cache on disk, in another. Prints a Markdown table, and JSON as the last line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import diffusers
import torch
from diffusers import Lumina2Pipeline

from TeaCache4LuminaT2X import teacache_lumina2 as script
from TeaCache4LuminaT2X.attention_lumina2 import set_attention

WAYS = {"threshold 0": {"rel_l1_thresh": 0.0}, "speedup 2": {"speedup": 2.0}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(model):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    pipeline = Lumina2Pipeline.from_pretrained(model, torch_dtype=dtype).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    set_attention(pipeline.transformer, "sdpa")
    return pipeline


def draw(pipeline, steps, way):
    """Seconds of one picture."""
    script.apply_teacache(pipeline.transformer, steps, **WAYS[way])
    generator = torch.Generator().manual_seed(0)
    getattr(torch, DEVICE).synchronize()
    began = time.perf_counter()
    pipeline(script.BUNDLED_PROMPT, num_inference_steps=steps, generator=generator)
    getattr(torch, DEVICE).synchronize()
    return time.perf_counter() - began


def compile_blocks(pipeline):
    for block in pipeline.transformer.layers:
        block.compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(script.BUNDLED_MODEL), help="folder of a Lumina2Pipeline")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--first", action="store_true", help="only the seconds of the first compiled picture")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    pipeline = load(args.model)
    if args.first:
        compile_blocks(pipeline)
        print(draw(pipeline, args.steps, "threshold 0"))
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        other = load(args.model)
        draw(other, args.steps, "threshold 0")  # warm-up
        compile_blocks(pipeline)
        first, second = (draw(pipeline, args.steps, "threshold 0") for _ in range(2))
        plain, compiled = {way: [] for way in WAYS}, {way: [] for way in WAYS}
        for way in args.repeat * list(WAYS):  # in turns: what else the machine does, both suffer
            plain[way].append(draw(other, args.steps, way))
            compiled[way].append(draw(pipeline, args.steps, way))
        again = [sys.executable, __file__, "--first", "--model", args.model, "--steps", str(args.steps)]
        later = float(subprocess.run(again, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    medians = {way: (statistics.median(plain[way]), statistics.median(compiled[way])) for way in WAYS}
    print("| | as it is | compiled |\n|---|---|---|")
    print(f"| the first picture, threshold 0 | | {first:.2f} s |")
    print(f"| the first in a later process | | {later:.2f} s |")
    print(f"| the second | | {second:.2f} s |")
    for way, (without, with_it) in medians.items():
        print(f"| median of {args.repeat}, {way} | {without:.2f} s | {with_it:.2f} s |")
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
    about = {
        "machine": machine,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    print(json.dumps({**about, "first": first, "later": later, "second": second, "medians": medians}))


if __name__ == "__main__":
    main()
