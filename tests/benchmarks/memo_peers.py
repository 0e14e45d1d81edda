"""Every way to make a video with fewer passes of MEMO, against the uncached video of as many steps.

    python tests/benchmarks/memo_peers.py                           # the bundled model, 8 voices of 3 clips, 20 steps
    python tests/benchmarks/memo_peers.py --voices 2 --workers 2    # two processes of one thread

Fewer Euler steps, DeepCache, TeaCache's rule and computed_steps, each of ours with the correction and without. For each:
passes, time over that of the uncached video, PSNR of each clip and of its median frame, and the correlation of the mouth's
opening with the voice's. Writes rows as voices are done, and goes on where it was stopped; `render.py` makes tables of them.
memo (github.com/memoavatar/memo, commit a5aee30) must be importable.
"""

import argparse
import contextlib
import functools
import multiprocessing
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import record
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from omegaconf import OmegaConf
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets" / "memo-emoji"
sys.path[:0] = [str(ROOT), str(MODEL)]

from evaluate import correlation, mouth_opening, speak  # noqa: E402

from TeaCache4Memo import teacache_memo  # noqa: E402

STEPS = 20
PASSES = 14, 10, 8
THRESHOLDS = 0.09, 0.15, 0.25
MEASURED = "passes", "time", "uncached", "median_frame", "mouth"
PARTS = "diffusion_net", "reference_net", "vae.encoder", "vae.decoder"


class DeepCache:
    """DeepCache, arXiv 2312.00858, as its authors' helper does it (horseee/DeepCache; interval 3, branch 0).

    One step in three is computed. The others run the first convolution, the last layer of the last up block, and the
    output layers; all other blocks give what they gave at the last computed step. A clip begins with a computed step.
    """

    def __init__(self, unet, interval=3):
        self.unet, self.interval, self.step, self.computed, self.kept = unet, interval, 0, [], {}
        *reused, self.last = *unet.down_blocks, unet.mid_block, *unet.up_blocks
        for block in reused:
            block.forward = functools.partial(self.reuse, block.forward)
        self.last.forward = functools.partial(self.run_last, self.last.forward)
        self.hooks = [
            unet.register_forward_pre_hook(self.begin_step, with_kwargs=True),
            self.last.resnets[-1].register_forward_pre_hook(self.keep_features),
            self.last.audio_modules[-1].register_forward_pre_hook(self.keep_audio, with_kwargs=True),
        ]

    def begin_step(self, unet, args, kwargs):
        self.step = 0 if kwargs["update_past_memory"] else self.step + 1
        self.computed.append(self.step % self.interval == 0)

    def reuse(self, stock, *args, **kwargs):
        if self.computed[-1]:
            self.kept[stock] = stock(*args, **kwargs)
        return self.kept[stock]

    def keep_features(self, resnet, args):
        """The input of the last layer: features of the layer before, and those of the first convolution behind them."""
        skip = self.unet.conv_in.out_channels
        self.kept["features"] = args[0][:, :-skip]

    def keep_audio(self, module, args, kwargs):
        self.kept["audio"] = kwargs["encoder_hidden_states"]

    def run_last(self, stock, hidden_states, ref_feature_list, res_hidden_states_tuple, **kwargs):
        if self.computed[-1]:
            return stock(hidden_states, ref_feature_list, res_hidden_states_tuple, **kwargs)
        names = [name for name in ("resnets", "attentions", "audio_modules", "motion_modules")]
        layers = {name: getattr(self.last, name) for name in names}
        for name in names:
            setattr(self.last, name, layers[name][-1:])
        try:
            kwargs["audio_embedding"] = self.kept["audio"]
            return stock(self.kept["features"], ref_feature_list[-1:], res_hidden_states_tuple[:1], **kwargs)
        finally:
            for name in names:
                setattr(self.last, name, layers[name])

    def remove(self):
        for block in (*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks):
            vars(block).pop("forward", None)
        for hook in self.hooks:
            hook.remove()


def now():
    """Seconds: of the clock on a GPU, of this process on a CPU, where other processes do not count."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def timed(pipeline):
    """A dict of the seconds spent in each of PARTS."""
    seconds, began, hooks = dict.fromkeys(PARTS, 0.0), {}, []

    for name in PARTS:
        module = pipeline.vae.get_submodule(name[4:]) if name.startswith("vae.") else getattr(pipeline, name)

        def before(module, args, name=name):
            began[name] = now()

        def after(module, args, output, name=name):
            seconds[name] += now() - began[name]

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield seconds
    for hook in hooks:
        hook.remove()


def psnr(video, reference, size):
    """dB of each clip, and of the median frame of each, at most 99; of videos in [-1, 1]."""
    mse = ((video - reference) / 2).square().unflatten(0, (-1, size)).flatten(2).mean(2)  # (clips, frames)

    def decibels(mse):
        return [round(dB, 2) for dB in (-10 * torch.log10(mse.clamp_min(10**-9.9))).tolist()]

    return decibels(mse.mean(1)), decibels(mse.median(1).values)


def measure(i, model):
    """All methods on one voice: rows by key, and the seconds of the parts of an uncached video."""
    warnings.simplefilter("ignore")
    if multiprocessing.parent_process() is not None:  # one of several workers
        torch.set_num_threads(1)
    config = OmegaConf.load(model / "config.yaml")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = teacache_memo.load_pipeline(str(model), device=device, dtype=config.weight_dtype)
    parts[0].set_progress_bar_config(disable=True)
    voice = {name: rows[i] for name, rows in load_file(model / "voices.safetensors").items()}
    size, rows = config.num_generated_frames_per_clip, {}

    def make(steps=STEPS, corrected=True, **settings):
        parts[0].scheduler, teacache_memo.CORRECT = FlowMatchEulerDiscreteScheduler(), corrected
        config.inference_steps = steps
        began = now()
        video, _, schedule = speak(*parts, config, voice, i, **settings)
        return video, now() - began, schedule

    def make_deep():
        deep = DeepCache(parts[0].diffusion_net)
        try:
            video, seconds, _ = make()
        finally:
            deep.remove()
        return video, seconds, deep.computed

    make(2)  # warm-up
    with timed(parts[0]) as seconds:
        base = make()
    seconds["all"] = base[1]

    def add(method, setting, made):
        video, seconds, schedule = made
        row = {"method": method, "setting": str(setting)}
        row |= {"passes": sum(schedule) * size / len(video), "time": round(seconds / base[1], 3)}
        row["uncached"], row["median_frame"] = psnr(video, base[0], size)
        rows[record.slug(method, setting)] = row | {
            "mouth": round(correlation(mouth_opening(video), voice["opening"]), 4)
        }
        print(f"voice {i}: {method}, {setting}: {seconds:.0f} s", file=sys.stderr, flush=True)

    add("uncached", STEPS, base)
    for k in PASSES:
        add("plain steps", k, make(k))
    for corrected, mine, theirs in ((True, "", ", corrected"), (False, ", not corrected", "")):
        for k in PASSES:
            add(f"computed_steps{mine}", k, make(corrected=corrected, computed_steps=k))
        for threshold in THRESHOLDS:
            add(f"TeaCache's rule{theirs}", threshold, make(corrected=corrected, rel_l1_thresh=threshold))
    add("DeepCache", "interval 3, branch 0", make_deep())
    return rows, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder like assets/memo-emoji")
    parser.add_argument("--voices", type=int, default=8, help="how many of its voices.safetensors")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread; 1: this one")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "memo_peers.json")
    args = parser.parse_args()

    results = record.Record(args.output, model=args.model.name, steps=STEPS)
    done = len(results.rows.get("parts", {}).get("all", ()))  # voices
    jobs = [(i, args.model) for i in range(done, args.voices)]
    with contextlib.ExitStack() as stack:
        each = map(measure, *zip(*jobs)) if jobs else ()
        if args.workers > 1 and jobs and not torch.cuda.is_available():
            context = multiprocessing.get_context("spawn")
            each = stack.enter_context(ProcessPoolExecutor(args.workers, context)).map(measure, *zip(*jobs))
        for rows, seconds in each:
            for key, row in rows.items():
                old = results.rows.setdefault(key, {name: row[name] for name in ("method", "setting")})
                for name in MEASURED:  # one entry for each voice
                    old[name] = [*old.get(name, []), row[name]]
            old = results.rows.get("parts", {})
            results.add("parts", **{name: [*old.get(name, []), round(s, 2)] for name, s in seconds.items()})


if __name__ == "__main__":
    main()
