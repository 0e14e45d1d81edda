"""calibrate_lumina2.py: what it records, what it fits, what it prints."""

import numpy as np
import pytest
import torch
from conftest import BUNDLED
from hypothesis import given, settings
from hypothesis import strategies as st
from lumina_models import conditioning, denoise, tiny_model

from TeaCache4LuminaT2X import calibrate_lumina2, teacache_lumina2
from TeaCache4LuminaT2X.calibrate_lumina2 import Recorder, fit

PROMPT, NEGATIVE = conditioning([5], seed=1), conditioning([3], seed=2)


@pytest.mark.parametrize("uncond", [NEGATIVE, None], ids=["guided", "unguided"])
@pytest.mark.parametrize("trunc", [1.0, 0.5])
def test_rows(uncond, trunc):
    """Against the signals and outputs of the run, put together a second time. Recording changes nothing."""
    model, signals = tiny_model(), []
    hook = model.layers[0].norm1.register_forward_hook(lambda module, inputs, output: signals.append(output[0]))
    outputs, latents = denoise(model, PROMPT, uncond, steps=6, trunc=trunc)
    hook.remove()
    with Recorder(model) as recorder:
        assert torch.equal(denoise(model, PROMPT, uncond, steps=6, trunc=trunc)[1], latents)
    assert not any(module._forward_hooks for module in model.modules()), "no hook is left"
    passes = [2 if uncond and (i + 1) / 6 <= trunc else 1 for i in range(6)]
    starts = np.cumsum([0, *passes])

    def change(x, i, branch):
        new, old = x[starts[i] + branch], x[starts[i - 1] + branch]
        return ((new - old).abs().mean() / old.abs().mean()).item()

    expected = [(i, change(signals, i, 0), max(change(outputs, i, b) for b in range(passes[i]))) for i in range(1, 6)]
    assert [row[0] for row in recorder.rows] == [1, 2, 3, 4, 5]
    assert np.allclose(recorder.rows, expected, rtol=1e-5)


def test_x_is_what_teacache_sees(monkeypatch):
    """The very numbers that the forward adds up."""
    model, seen = tiny_model(), []
    with Recorder(model) as recorder:
        denoise(model, PROMPT, NEGATIVE, steps=6)
    change = teacache_lumina2.relative_l1
    monkeypatch.setattr(
        teacache_lumina2, "relative_l1", lambda a, b: seen.append(change(a, b).item()) or torch.tensor(0.0)
    )
    teacache_lumina2.apply_teacache(model, 6, 1e-9, [1e9, 1.0])  # looks at each step, computes each
    denoise(model, PROMPT, NEGATIVE, steps=6)
    assert seen == [x for _, x, _ in recorder.rows][:-1] and len(seen) == 4, "the last is not looked at"


def test_a_polynomial_is_found_again():
    true, x = [30.0, 2.0, 1.5, 0.3, 0.02], np.linspace(0.05, 0.4, 60)
    coefficients, r2 = fit(x, np.polyval(true, x))
    assert coefficients == pytest.approx(true, rel=1e-4) and r2 == pytest.approx(1)


changes = st.floats(0, 10).map(lambda x: round(x, 6))


@settings(max_examples=200)
@given(st.lists(st.tuples(changes, changes), min_size=2, max_size=30))
def test_never_negative_never_falling_always_finite(pairs):
    """Over the range that was recorded."""
    x, y = zip(*pairs)
    coefficients, r2 = fit(x, y)
    values, scale = np.polyval(coefficients, np.linspace(min(x), max(x), 317)), 1e-6 * (1 + max(y))
    assert np.isfinite(values).all() and values.min() >= -scale and np.diff(values).min() >= -scale
    assert 1 <= len(coefficients) <= 5 and r2 <= 1 + 1e-9


@pytest.mark.parametrize(
    "y", [[3, 0, 0, 0, 0, 0, 3], [6, 5, 4, 3, 2, 1, 0], [0, 9, 0, 9, 0, 9, 0], [0, 0, 0, 0, 0, 0, 9]], ids=str
)
def test_a_lower_degree_where_the_fourth_would_mislead(y):
    x = np.arange(7.0)
    free = np.polyval(np.polyfit(x, y, 4), np.linspace(0, 6, 301))
    assert free.min() < 0 or np.diff(free).min() < 0
    values = np.polyval(fit(x, y)[0], np.linspace(0, 6, 301))
    assert len(fit(x, y)[0]) < 5 and values.min() >= 0 and np.diff(values).min() >= -1e-12


def test_what_is_not_finite_is_left_out():
    x, y = [0.1, 0.2, np.nan, 0.4, 0.5], [1.0, 2.0, 3.0, np.inf, 4.0]
    assert fit(x, y) == fit([0.1, 0.2, 0.5], [1.0, 2.0, 4.0])
    for few in ([0.1, np.nan], [0.1], []):
        with pytest.raises(ValueError, match="fewer than two"):
            fit(few, [1.0] * len(few))


def test_command(tmp_path, capsys, monkeypatch):
    """Two lines to paste into the script, and they are Python; each prompt is drawn once, without a cache."""
    path, schedules, generate = tmp_path / "prompts.txt", [], teacache_lumina2.generate

    def watched(pipeline, args):
        drawn = generate(pipeline, args)
        schedules.append((args.prompt, args.seed, drawn[2]))
        return drawn

    monkeypatch.setattr(teacache_lumina2, "generate", watched)
    path.write_text("\ufeffred apple\n\n fox\n", encoding="utf-8")
    calibrate_lumina2.main([str(path), "--model", str(BUNDLED), "--num-inference-steps", "4", "--tolerance", "0.003"])
    assert schedules == [("red apple", 1024, [True] * 4), ("fox", 1025, [True] * 4)]
    comment, line = capsys.readouterr().out.splitlines()
    assert comment.startswith("# 6 changes of ") and ", 2 prompts, R2 " in comment
    pasted = {}
    exec(f"{comment}\n{line}", pasted)
    assert 1 <= len(pasted["COEFFICIENTS"]) <= 5 and np.isfinite(pasted["COEFFICIENTS"]).all()


@pytest.mark.parametrize(
    "text, flags, says",
    [
        (None, [], "No such file"),
        (b" \n\n", [], "at least one prompt"),
        (b"fox\n", ["--num-inference-steps", "2"], "three steps"),
        ("café".encode("latin-1"), [], "utf-8"),
    ],
)
def test_bad_input(text, flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    if text is not None:
        (tmp_path / "prompts.txt").write_bytes(text)
    with pytest.raises(SystemExit) as exit:
        calibrate_lumina2.main([str(tmp_path / "prompts.txt"), "--model", str(BUNDLED), *flags])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and says in error and error.count("\n") == 1
