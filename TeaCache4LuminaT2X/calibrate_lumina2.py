"""Fit TeaCache's rescaling polynomial to your own Lumina2 checkpoint.

For each prompt of a file, one a line, the picture is drawn without a cache. From step to step are recorded: the
relative L1 change of what the indicators watch (x), and of what a skip would replace (y): the output of the network
for `forecast`, what the blocks add for `hold`. A polynomial of degree 4 through all steps of all prompts,
`numpy.polyfit(x, y, 4)`, turns one into the other, as the authors of TeaCache do it (arXiv 2411.19108). With guidance,
the pass that decides gives x, and the pass that changes more gives y: both are skipped together.

    python calibrate_lumina2.py prompts.txt --model PATH        # the flags of teacache_lumina2.py

It prints the lines to paste into teacache_lumina2.py and writes, under the name of `--output`:

    .jsonl    what was recorded, a line a prompt: run again after an interruption it goes on where it stopped
    .json     the coefficients: copied to teacache.json in the folder of the model, or beside a checkpoint NAME.pth to
              NAME.teacache.json, teacache_lumina2.py finds it
    .png      the recorded changes, and the curve through them

Needs teacache_lumina2.py and options_lumina2.py beside it, and matplotlib. Nothing happens at import.
"""

import argparse
import importlib
import json
import os
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch

script = importlib.import_module(f"{__package__}.teacache_lumina2" if __package__ else "teacache_lumina2")
options = importlib.import_module(f"{__package__}.options_lumina2" if __package__ else "options_lumina2")

FLAGS = "model transformer lora lora-scale negative-prompt num-inference-steps height width guidance-scale"
FLAGS += " cfg-trunc-ratio seed dtype"
DEGREE = 4


# --- what is recorded -----------------------------------------------------------


class Recorder:
    """Hooks on the parts of a transformer that note the relative changes from each step to the next.

    `rows` has one for each step but the first: {"step", "modulated", "timestep" (x), "forecast", "hold" (y)}. A context
    manager: outside of it the model is as it was.
    """

    def __init__(self, model):
        self.model, self.rows, self.state = model, [], script.TeaCacheState()

    def __enter__(self):
        model, seen = self.model, {}

        def watch(part, name, take):
            def hook(module, inputs, output):
                seen[name] = take(inputs, output)

            return part.register_forward_hook(hook)

        def note(module, args, kwargs, output):
            tensors = kwargs["encoder_hidden_states"], kwargs["encoder_attention_mask"]
            latents, time = kwargs["hidden_states"], kwargs["timestep"].flatten()[0].item()
            branch = self.state.enter(time, tensors, (latents.shape,), num_steps=sys.maxsize)
            new = {name: seen[name] for name in ("modulated", "timestep")}
            new |= {"forecast": output[0], "hold": seen["end"] - seen["begin"]}
            if branch.signal is not None:
                changes = {name: script.relative_l1(new[name], branch.signal[name]) for name in new}
                if self.rows and self.rows[-1]["step"] == self.state.step:  # the other pass of a guided step
                    row = self.rows[-1]
                    row |= {name: max(row[name], changes[name]) for name in ("forecast", "hold")}
                else:
                    self.rows.append({"step": self.state.step, **changes})
            branch.signal = new

        self.hooks = [
            watch(model.time_caption_embed.timestep_embedder, "timestep", lambda inputs, output: output),
            watch(model.layers[0].norm1, "modulated", lambda inputs, output: output[0]),
            watch(model.layers[0], "begin", lambda inputs, output: inputs[0]),
            watch(model.layers[-1], "end", lambda inputs, output: output),
            model.register_forward_hook(note, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
        self.state.reset()


# --- the fit --------------------------------------------------------------------


def fit(x, y):
    """Coefficients, domain and R2 of the polynomial through pairs of relative changes.

    Args: x, y: (pairs,), of the indicator and of what a skip would replace.
    Returns: {"coefficients": five, highest power first, "domain": (lowest, highest x), "r2", "pairs", "degree"}. The
        polynomial is finite and nowhere negative in its domain; where degree 4 is not, a lower one is taken.
    Raises ValueError where fewer than two pairs are finite.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 2:
        raise ValueError(f"{len(x)} pairs of finite changes are too few for a curve: more steps or more prompts")
    grid = np.linspace(x.min(), x.max(), 1001)
    for degree in range(min(DEGREE, len(np.unique(x)) - 1), -1, -1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", np.exceptions.RankWarning)
            try:
                coefficients = np.polyfit(x, y, degree)
            except np.linalg.LinAlgError:  # changes too close together for this degree
                continue
        turns = np.roots(np.polyder(coefficients))  # where it may be lowest, beside the ends
        turns = turns[np.isreal(turns)].real
        where = np.concatenate([grid, turns[(turns > x.min()) & (turns < x.max())]])
        if np.isfinite(coefficients).all() and np.polyval(coefficients, where).min() >= 0:
            break
    error, spread = np.square(y - np.polyval(coefficients, x)).sum(), np.square(y - y.mean()).sum()
    return {
        "coefficients": [0.0] * (DEGREE - degree) + coefficients.tolist(),
        "domain": [x.min().item(), x.max().item()],
        "r2": 1 - error / spread if spread > 0 else 1.0,
        "pairs": len(x),
        "degree": degree,
    }


def draw(rows, fits, predict, path):
    """The pairs of each indicator, coloured by step, with the curve, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (indicator, found) in zip(figure.subplots(1, len(fits)), fits.items()):
        values = np.array([[row[key] for key in (indicator, predict, "step")] for row in rows])
        x, y, step = values[np.isfinite(values).all(axis=1)].T
        points = axes.scatter(x, y, c=step, s=9, cmap="viridis", alpha=0.6, linewidths=0)
        curve = np.linspace(*found["domain"], 400)
        axes.plot(curve, np.polyval(found["coefficients"], curve), color="crimson")
        axes.set(xlabel=f"relative L1 change, {indicator}", ylim=(0, 1.05 * y.max()))
        axes.xaxis.get_major_locator().set_params(nbins=6)
        axes.set_title(f"{found['pairs']} pairs, degree {found['degree']}, R² = {found['r2']:.3f}")
        axes.set_ylabel(f"relative L1 change of {'the output' if predict == 'forecast' else 'what the blocks add'}")
    figure.colorbar(points, label="step")
    figure.savefig(path, dpi=110, format="png")


# --- the command line -----------------------------------------------------------


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"{Path(__file__).stem}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def parse(argv=None):
    """The arguments; those of the model are checked by teacache_lumina2.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = fail
    parser.add_argument("prompts", type=Path, help="text file, one prompt a line")
    parser.add_argument("--output", type=Path, default="lumina2_calibration", help="name of the files, without ending")
    parser.add_argument("--predict", choices=["hold", "forecast"], default=script.PREDICT, help="printed and drawn")
    for flag in (*FLAGS.split(), "offload"):
        parser.add_argument(f"--{flag}", help="as of teacache_lumina2.py")
    given = parser.parse_args(argv)
    given_flags = {f: getattr(given, f.replace("-", "_")) for f in (*FLAGS.split(), "offload")}
    passed = [f"--{flag}={value}" for flag, value in given_flags.items() if value is not None]
    try:
        given.lines = given.prompts.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {given.prompts}, a UTF-8 text file with one prompt a line: {error}")
    given.lines = list(dict.fromkeys(line.strip() for line in given.lines if line.strip()))
    if not given.lines:
        fail(f"{given.prompts} holds no prompt: one a line")
    if importlib.util.find_spec("matplotlib") is None:
        fail("the picture of the fit needs matplotlib: pip install matplotlib")
    if given.output.is_dir() or not os.access(given.output.parent, os.W_OK | os.X_OK):
        fail(f"cannot write {given.output}.json: its folder must exist and be writable")
    # at threshold 0 no coefficients are looked for; its own picture would lie beside ours
    args = options.parse([*passed, "--rel-l1-thresh=0", f"--output={given.output.parent / 'unused.png'}"])
    if args.num_inference_steps < 2:
        fail("there is no change from step to step in one step: give --num-inference-steps 2 or more")
    args.prompt, args.predict = given.lines, given.predict
    args.files = {kind: given.output.with_name(f"{given.output.name}.{kind}") for kind in ("jsonl", "json", "png")}
    args.settings = {name: str(getattr(args, name)) for name in FLAGS.replace("-", "_").split()}
    args.done = read_records(args)
    return args


def read_records(args):
    """{prompt: rows} of an earlier run with the same settings; a line that was cut off is dropped, and drawn again."""
    path = args.files["jsonl"]
    if not path.exists():
        for other in (args.files["json"], args.files["png"]):
            if other.exists():
                fail(f"{other} exists and is not overwritten: give another --output")
        return {}
    lines = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            lines.append(dict(json.loads(line)))
    except (OSError, ValueError, TypeError):  # the line that was cut off
        pass
    if not lines or lines[0].get("settings") != args.settings:
        fail(f"{path} was recorded with other settings: give another --output, or delete it")
    return {line["prompt"]: line["rows"] for line in lines[1:]}


def record(args):
    """{prompt: rows} of all prompts; each is written as soon as it is there."""
    from tqdm.auto import tqdm

    done = args.done
    missing = [prompt for prompt in args.prompt if prompt not in done]
    if not missing:
        return done
    pipeline = options.load_pipeline(args)
    pipeline.set_progress_bar_config(disable=True)
    write_records(args, done)  # without the line that was cut off
    for prompt in tqdm(missing, initial=len(args.prompt) - len(missing), total=len(args.prompt), unit="prompt"):
        with Recorder(pipeline.transformer) as recorder:
            pipeline(
                prompt,
                negative_prompt=args.negative_prompt,
                height=args.height,
                width=args.width,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                cfg_trunc_ratio=args.cfg_trunc_ratio,
                generator=torch.Generator().manual_seed(args.seed + zlib.crc32(prompt.encode())),  # wherever it stands
                output_type="latent",
            )
        done[prompt] = recorder.rows
        with args.files["jsonl"].open("a", encoding="utf-8") as file:
            file.write(json.dumps({"prompt": prompt, "rows": recorder.rows}) + "\n")
    return done


def write_records(args, done):
    """The settings and what is done so far."""
    lines = [{"settings": args.settings}, *({"prompt": prompt, "rows": rows} for prompt, rows in done.items())]
    write(args.files["jsonl"], "".join(json.dumps(line) + "\n" for line in lines))


def write(path, text):
    """Through a temporary file: a failure leaves what was there."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def main(argv=None):
    args = parse(argv)
    try:
        done = record(args)
        rows = [row for prompt in args.prompt for row in done[prompt]]
        fits = {
            predict: {
                name: fit([r[name] for r in rows], [r[predict] for r in rows]) for name in ("modulated", "timestep")
            }
            for predict in ("forecast", "hold")
        }
        about = {"prompts": args.prompt, **args.settings, "model": Path(args.model).name}
        write(args.files["json"], json.dumps({**fits, "recorded": about}, indent=1) + "\n")
        for name, found in fits[args.predict].items():
            low, high = found["domain"]
            end = "" if name == "modulated" else "_TIMESTEP"
            about = f"R2 {found['r2']:.3f}, {found['pairs']} pairs, degree {found['degree']}"
            print(f"# {name}, {args.predict}: {about}, changes of {low:.4g} to {high:.4g}")
            print(f"COEFFICIENTS{end} = {found['coefficients']}\nDOMAIN{end} = {found['domain']}")
        draw(rows, fits[args.predict], args.predict, args.files["png"])
    except (OSError, ValueError) as error:
        fail(error)
    except RuntimeError as error:
        if not options.is_out_of_memory(error):
            raise
        fail(options.why(error, args))
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(f"saved {', '.join(str(path) for path in args.files.values())}")


if __name__ == "__main__":
    main()
