"""calibrate_lumina2.py: what it records, what it fits, and what is left of an interrupted run."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import BUNDLED, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from lumina_models import conditioning, denoise, tiny_model
from PIL import Image

from TeaCache4LuminaT2X import calibrate_lumina2, options_lumina2, teacache_lumina2
from TeaCache4LuminaT2X.calibrate_lumina2 import Recorder, fit

pytest.importorskip("matplotlib")
MODEL = ["--model", str(BUNDLED), "--num-inference-steps", "6"]
PROMPT, NEGATIVE = conditioning([5], seed=1), conditioning([3], seed=2)


# --- what is recorded -------------------------------------------------------------


@pytest.mark.parametrize("uncond", [NEGATIVE, None], ids=["guided", "unguided"])
def test_changes_are_those_of_the_uncached_run(uncond):
    """Against the outputs of the run, and signals that are computed once more from the inputs."""
    model = tiny_model()
    stock, latents = denoise(model, PROMPT, uncond, steps=5)
    with Recorder(model) as recorder:
        outputs, again = denoise(model, PROMPT, uncond, steps=5)
    assert torch.equal(latents, again), "recording changes nothing"
    assert [row["step"] for row in recorder.rows] == [1, 2, 3, 4]
    n = 2 if uncond else 1
    changes = [((b - a).abs().mean() / a.abs().mean()).item() for a, b in zip(outputs, outputs[n:])]
    expected = [
        max(changes[i : i + n]) for i in range(0, len(changes), n)
    ]  # of both passes, which are skipped together
    assert [row["forecast"] for row in recorder.rows] == pytest.approx(expected)
    assert all(row[key] > 0 for row in recorder.rows for key in ("modulated", "timestep", "hold"))
    assert not any(module._forward_hooks for module in model.modules()), "no hook is left"


def test_the_modulated_change_is_what_teacache_sees(monkeypatch):
    """The very numbers that the forward adds up."""
    model, seen = tiny_model(), []
    with Recorder(model) as recorder:
        denoise(model, PROMPT, NEGATIVE, steps=6)
    change = teacache_lumina2.relative_l1
    monkeypatch.setattr(teacache_lumina2, "relative_l1", lambda a, b: seen.append(change(a, b)) or 0.0)
    teacache_lumina2.apply_teacache(model, 6, 1e-9, [1e9, 1.0], predict="hold")  # looks at each step, computes each
    denoise(model, PROMPT, NEGATIVE, steps=6)
    assert seen == [row["modulated"] for row in recorder.rows][:-1] and len(seen) == 4  # the last is not looked at


# --- the fit ----------------------------------------------------------------------


def test_a_polynomial_is_found_again():
    true = [30.0, -2.0, 1.5, 0.3, 0.02]
    x = np.linspace(0.05, 0.4, 60)
    found = fit(x, np.polyval(true, x))
    assert found["coefficients"] == pytest.approx(true, rel=1e-5) and found["degree"] == 4
    assert found["r2"] == pytest.approx(1) and found["domain"] == [0.05, 0.4] and found["pairs"] == 60


def test_it_is_numpys_polyfit():
    generator = np.random.default_rng(0)
    x = generator.uniform(0.02, 0.1, 300)
    y = 0.2 + x + generator.normal(0, 0.02, 300)
    assert fit(x, y)["coefficients"] == np.polyfit(x, y, 4).tolist()


changes = st.floats(0, 10).map(lambda x: round(x, 6))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(changes, changes), min_size=2, max_size=30))
def test_never_negative_and_always_finite_in_the_domain(pairs):
    found = fit(*zip(*pairs))
    low, high = found["domain"]
    values = [
        teacache_lumina2.rescale(found["coefficients"], x, (low, high)) for x in np.linspace(low - 1, high + 1, 301)
    ]
    assert np.isfinite(values).all() and len(found["coefficients"]) == 5
    assert min(values) >= -1e-9 * max(1.0, *(y for _, y in pairs))


def test_where_degree_4_goes_below_zero_a_lower_one_is_taken():
    x = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    y = np.array([3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0])
    assert np.polyval(np.polyfit(x, y, 4), np.linspace(0, 6, 100)).min() < 0
    assert fit(x, y)["degree"] < 4


def test_what_is_not_finite_is_left_out():
    x, y = [0.1, 0.2, np.nan, 0.4, 0.5], [1.0, 2.0, 3.0, np.inf, 4.0]
    assert fit(x, y)["pairs"] == 3
    with pytest.raises(ValueError, match="too few"):
        fit([0.1, np.nan], [1.0, 1.0])


# --- the command ------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red apple\n\ngreen apple\nfox\n", encoding="utf-8")

    def call(*more):
        calibrate_lumina2.main(["prompts.txt", *MODEL, *more])
        return capsys.readouterr().out

    return call


def test_command(run, tmp_path):
    """Lines to paste, files, and a model folder in which the script finds them."""
    out = run()
    fits = json.loads((tmp_path / "lumina2_calibration.json").read_text())
    assert all(found["pairs"] == 3 * 5 for predict in ("hold", "forecast") for found in fits[predict].values())
    pasted = {}
    exec(out[: out.index("saved")], pasted)
    for name, end in (("modulated", ""), ("timestep", "_TIMESTEP")):
        found = fits["forecast"][name]
        assert pasted[f"COEFFICIENTS{end}"] == found["coefficients"] and pasted[f"DOMAIN{end}"] == found["domain"]
        assert f"# {name}, forecast: R2 {found['r2']:.3f}, 15 pairs" in out
    with Image.open(tmp_path / "lumina2_calibration.png") as image:
        assert image.width > 800
    model = tmp_path / "model"
    shutil.copytree(BUNDLED, model)
    shutil.copy("lumina2_calibration.json", model / "teacache.json")
    for predict in ("hold", "forecast"):
        args = options_lumina2.parse(["--model", str(model), "--predict", predict])
        found = fits[predict]["modulated"]
        assert args.coefficients == found["coefficients"] and args.domain == found["domain"]


def test_a_broken_file_in_the_model_folder_does_not_keep_from_calibrating(run, tmp_path):
    """Nor from asking for a speedup, which needs no coefficients."""
    model = tmp_path / "model"
    shutil.copytree(BUNDLED, model)
    (model / "teacache.json").write_text("{")
    with pytest.raises(SystemExit):
        options_lumina2.parse(["--model", str(model)])
    assert options_lumina2.parse(["--model", str(model), "--speedup", "2"]).coefficients is None
    assert "COEFFICIENTS = " in run("--model", str(model))


def test_a_failed_load_leaves_nothing_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(options_lumina2, "load_pipeline", lambda args: teacache_lumina2.fail("out of memory"))
    with pytest.raises(SystemExit):
        run()
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]


def test_changes_that_are_not_finite_are_neither_fitted_nor_drawn(tmp_path):
    rows = [{"step": i, "modulated": i / 9, "timestep": i / 9, "forecast": i / 5, "hold": 1.0} for i in range(1, 9)]
    rows[0]["forecast"], rows[3]["timestep"], rows[5]["forecast"] = float("nan"), float("inf"), float("inf")
    fits = {name: fit([r[name] for r in rows], [r["forecast"] for r in rows]) for name in ("modulated", "timestep")}
    assert [found["pairs"] for found in fits.values()] == [6, 5]
    calibrate_lumina2.draw(rows, fits, "forecast", tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 1000


def test_interrupted_it_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    run("--output", "whole")
    drawn, load = [], options_lumina2.load_pipeline

    def load_and_stop_at(stop):
        def loaded(args):
            pipeline = load(args)
            call = type(pipeline).__call__

            def counted(prompt, **kwargs):
                if len(drawn) == stop:
                    raise KeyboardInterrupt
                drawn.append(prompt)
                return call(pipeline, prompt, **kwargs)

            class Counted:
                transformer = pipeline.transformer
                set_progress_bar_config = pipeline.set_progress_bar_config
                __call__ = staticmethod(counted)

            return Counted()

        return loaded

    monkeypatch.setattr(options_lumina2, "load_pipeline", load_and_stop_at(2))
    with pytest.raises(SystemExit) as stopped:
        run("--output", "parts")
    assert stopped.value.code == 130
    with (tmp_path / "parts.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "fox", "rows": [{"st')  # as a kill in the middle of writing leaves it
    monkeypatch.setattr(options_lumina2, "load_pipeline", load_and_stop_at(99))
    run("--output", "parts")
    assert drawn == ["red apple", "green apple", "fox"]
    assert (tmp_path / "parts.json").read_text() == (tmp_path / "whole.json").read_text()
    monkeypatch.setattr(options_lumina2, "load_pipeline", lambda args: pytest.fail("nothing is left to draw"))
    run("--output", "parts")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["none.txt"], "cannot read none.txt"),
        (["empty.txt"], "holds no prompt"),
        (["prompts.txt", "--num-inference-steps", "1"], "2 or more"),
        (["prompts.txt", "--num-inference-steps", "x"], "invalid int value"),
        (["prompts.txt", "--height", "100"], "multiple of 16"),
        (["prompts.txt", "--model", "nowhere/at/all"], "no model folder"),
        (["prompts.txt", "--output", "nowhere/x"], "must exist"),
        (["prompts.txt", "--output", "taken"], "is not overwritten"),
        (["prompts.txt", "--output", "other"], "other settings"),
        (["prompts.txt", "--output", "odd"], "other settings"),
        ([], "required"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_before_anything_is_loaded(run, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.setattr(options_lumina2, "load_pipeline", lambda args: pytest.fail("loaded"))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "taken.json").write_text("mine")
    (tmp_path / "other.jsonl").write_text('{"settings": {"seed": "1"}}\n')
    (tmp_path / "odd.jsonl").write_text("5\n")
    with pytest.raises(SystemExit) as stopped:
        calibrate_lumina2.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and says in error and error.count("\n") == 1
    assert (tmp_path / "taken.json").read_text() == "mine"


def test_import_and_help_do_nothing():
    path = ROOT / "TeaCache4LuminaT2X" / "calibrate_lumina2.py"
    helped = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--guidance-scale" in helped.stdout


# --- the bundled model's own --------------------------------------------------------


def test_the_bundled_model_brings_its_own(pipeline):
    """Each is safe in its domain, and thresholds rise in speed."""
    for indicator in ("modulated", "timestep"):
        found = teacache_lumina2.coefficients_of(BUNDLED / "teacache.json", indicator, "forecast")
        coefficients, domain, where = found
        assert "teacache.json" in where
        values = [teacache_lumina2.rescale(coefficients, x, domain) for x in np.linspace(*domain, 2001)]
        assert min(values) >= 0 and max(values) < 1
        counts = []
        for thresh in (0.1, 0.2, 0.3, 0.4, 0.5):
            model = pipeline.transformer
            teacache_lumina2.apply_teacache(model, 30, thresh, coefficients, domain=domain, indicator=indicator)
            pipeline("red apple", generator=torch.Generator().manual_seed(0), output_type="latent")
            counts.append(sum(model.teacache.schedule))
            teacache_lumina2.remove_teacache(model)
        assert counts == sorted(counts, reverse=True) and len(set(counts)) >= 3, counts
