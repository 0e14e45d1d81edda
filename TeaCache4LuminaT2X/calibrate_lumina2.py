"""Fit the rescaling polynomial of TeaCache to a Lumina2 checkpoint.

    python calibrate_lumina2.py prompts.txt --model PATH      # one prompt per line; prints the line to paste

Each prompt is drawn without a cache. From step to step it records the relative L1 change of the modulated input (x) and
of the output of the network (y), and fits y = p(x) with a polynomial of degree 4, as the authors of TeaCache do. The
polynomial must be non-negative and non-decreasing over the recorded range; if it is not, the degree is lowered. With
guidance, x is of the first pass, which decides, and y is the larger change of the two. Takes the flags of
teacache_lumina2.py as well.
"""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

if __package__:
    from . import teacache_lumina2
else:
    import teacache_lumina2


class Recorder:
    """Context manager: `rows` gets (step, x, y) for each step of a generation but the first."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __enter__(self):
        state, seen, last = teacache_lumina2.TeaCacheState(), {}, {}
        endless = SimpleNamespace(num_steps=10**9)  # the last step would free the branches

        def keep(module, inputs, output):
            seen["x"] = output[0]

        def note(module, args, kwargs, output):
            timestep, conditioning = kwargs["timestep"][0].item(), (kwargs["encoder_hidden_states"],)
            branch = state.advance(endless, timestep, conditioning, kwargs["hidden_states"])
            new = seen["x"], output[0]
            if branch in last:
                x, y = (teacache_lumina2.relative_l1(a, b).item() for a, b in zip(new, last[branch]))
                if self.rows and self.rows[-1][0] == state.step:  # the second pass of a guided step
                    _, x, first = self.rows.pop()
                    y = max(first, y)
                self.rows.append((state.step, x, y))
            last[branch] = new

        self.hooks = [self.model.layers[0].norm1.register_forward_hook(keep)]
        self.hooks.append(self.model.register_forward_hook(note, with_kwargs=True))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def fit(x, y, degree=4):
    """Coefficients, highest power first, and R2. Raises ValueError for fewer than two finite pairs."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 2:
        raise ValueError("fewer than two finite changes: more steps or more prompts are needed")
    grid = np.linspace(x.min(), x.max(), 1001)
    for d in range(min(degree, len(np.unique(x)) - 1), -1, -1):
        coefficients = np.polyfit(x, y, d)
        curve = np.polyval(coefficients, grid)
        if np.isfinite(curve).all() and curve.min() >= 0 and np.diff(curve).min() >= 0:
            break
    error, spread = np.square(y - np.polyval(coefficients, x)).sum(), np.square(y - y.mean()).sum()
    return coefficients.tolist(), 1 - error / spread if spread else 1.0


def main(argv=None):
    def extend(parser):
        parser.add_argument("prompts", metavar="FILE", help="UTF-8 text, one prompt per line, 20 or more")
        parser.set_defaults(parser=parser)

    args = teacache_lumina2.parse_args(argv, extend)
    try:
        text = Path(args.prompts).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        args.parser.error(str(error))
    prompts, rows = [line.strip() for line in text.splitlines() if line.strip()], []
    if not prompts or args.num_inference_steps < 3:
        args.parser.error("at least one prompt and three steps are needed")
    pipeline = teacache_lumina2.load_pipeline(args)
    pipeline.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(tqdm(prompts, unit="prompt")):
        with Recorder(pipeline.transformer) as recorder:
            settings = {
                "prompt": prompt,
                "seed": args.seed + i,
                "rel_l1_thresh": 0.0,
                "computed_steps": None,
                "tolerance": None,
            }
            teacache_lumina2.generate(pipeline, Namespace(**{**vars(args), **settings}))
        rows += recorder.rows
    _, x, y = zip(*rows)
    coefficients, r2 = fit(x, y)
    print(f"# {len(rows)} changes of {min(x):.4g} to {max(x):.4g}, {len(prompts)} prompts, R2 {r2:.3f}")
    print(f"COEFFICIENTS = {coefficients}")


if __name__ == "__main__":
    main()
