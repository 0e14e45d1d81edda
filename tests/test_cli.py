"""The command line, end to end on the bundled model, and each way to get it wrong."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import BUNDLED, ROOT, tensors_in
from lumina_models import tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file

from TeaCache4LuminaT2X import compare_lumina2, options_lumina2, teacache_lumina2
from TeaCache4LuminaT2X.teacache_lumina2 import main

SCRIPT = ROOT / "TeaCache4LuminaT2X" / "teacache_lumina2.py"
MODEL = ["--model", str(BUNDLED)]
FAST = [*MODEL, "--num-inference-steps", "8"]


@pytest.fixture
def identity(monkeypatch):
    """Thresholds that mean something on any model: the sum of the plain relative changes. As edited in the script."""
    monkeypatch.setattr(teacache_lumina2, "INDICATORS", {"modulated": (0.3, [1.0, 0.0], None)})


def load(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_run_as_a_script_from_anywhere(tmp_path):
    """`python teacache_lumina2.py`, nothing else: on a machine without CUDA the bundled model, and it says so."""
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert "bundled" in lines[0] and "--model Alpha-VLLM/Lumina-Image-2.0" in lines[0]
    assert "saved teacache_lumina2_output.png" in lines[-1] and " / 30 steps (" in lines[-1]
    assert "30/30" in run.stderr, "the pipeline's progress bar stays on"
    assert [p.name for p in tmp_path.iterdir()] == ["teacache_lumina2_output.png"]
    assert load(tmp_path / "teacache_lumina2_output.png").shape == (128, 128, 3)


def test_compare(tmp_path, capsys, identity, monkeypatch):
    """The strip; threshold 0 is the plain pipeline's picture; PSNR and steps computed fall as the threshold rises."""
    drawn = []
    strip = compare_lumina2.strip
    monkeypatch.setattr(compare_lumina2, "strip", lambda rows: drawn.extend(rows) or strip(rows))
    main([*MODEL, "--prompt", "red apple", "--compare", "0.1", "0.2", "0.4", "--output", str(tmp_path / "strip.png")])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    runs = result["runs"]
    assert [r["rel_l1_thresh"] for r in runs] == [0, 0.1, 0.2, 0.4], "0 is added: the others are measured against it"
    computed, psnr = [r["computed"] for r in runs], [r["psnr"] for r in runs]
    assert computed[0] == 30 and computed == sorted(computed, reverse=True) and len(set(computed)) == 4
    assert psnr[0] is None and psnr[1:] == sorted(psnr[1:], reverse=True) and len(set(psnr)) == 4
    assert all(r["steps"] == 30 and 0 < r["ssim"] <= 1 for r in runs)
    assert all(r["speedup"] == pytest.approx(runs[0]["seconds"] / r["seconds"]) for r in runs)

    table = [line for line in out.splitlines() if line.startswith("| red apple |")]
    assert len(table) == 4
    for line, r in zip(table, runs):
        words = [f"| {r['rel_l1_thresh']:g} |", f"| {r['computed']} / 30 |", f"| {r['seconds']:.2f} |"]
        assert all(word in line for word in [*words, f"| {r['speedup']:.2f}x |"])
    assert result["seed"] == teacache_lumina2.SEED and result["coefficients"] == [1.0, 0.0]

    page = load(tmp_path / "strip.png").astype(int)
    (row,) = drawn
    wide, line, side = page.shape[1] // 4, 16, 192
    for c, (image, entry) in enumerate(row):  # the pictures, and text under each
        x, y = c * wide + line // 2, 2 * line
        shown = np.asarray(image.resize((side, side), Image.LANCZOS))
        assert np.array_equal(page[y : y + side, x : x + side], shown)
        assert (page[y + side :, x : x + side] < 128).any()
        text = "\n".join(compare_lumina2.lines(entry))
        figures = [f"threshold {entry['rel_l1_thresh']:g}", f"{entry['seconds']:.2f} s", f"{entry['speedup']:.2f}x"]
        figures += [f"{entry['computed']} / 30 steps", f"SSIM {entry['ssim']:.3f}"]
        figures += [f"PSNR {entry['psnr']:.1f} dB"]
        assert all(figure in text for figure in figures)

    from diffusers import Lumina2Pipeline

    plain = Lumina2Pipeline.from_pretrained(BUNDLED)
    plain.set_progress_bar_config(disable=True)
    expected = plain("red apple", generator=torch.Generator().manual_seed(teacache_lumina2.SEED)).images[0]
    assert np.array_equal(np.asarray(row[0][0]), np.asarray(expected))


def test_flags_reach_the_pipeline(tmp_path, capsys, identity, monkeypatch):
    from diffusers import Lumina2Pipeline

    calls, models, call = [], [], Lumina2Pipeline.__call__

    def record(self, *args, **kwargs):
        calls.append((args, kwargs))
        model = self.transformer
        models.append((model.rel_l1_thresh, model.num_steps, model.dtype, self.vae.dtype))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Lumina2Pipeline, "__call__", record)
    flags = "--negative-prompt blue --height 96 --width 160 --guidance-scale 3 --cfg-trunc-ratio 0.5 --seed 5"
    path = tmp_path / "out.jpg"
    more = ["--prompt", "fox", "--prompt", "red apple", "--rel-l1-thresh", "0.4", "--dtype", "bfloat16"]
    main([*FAST, *flags.split(), *more, "--output", str(path)])
    (first, kwargs), (second, _) = calls
    assert (first, second) == (("fox",), ("red apple",))
    assert models == [(0.4, 8, torch.bfloat16, torch.bfloat16)] * 2
    generator = kwargs.pop("generator")
    assert generator.initial_seed() == 5
    expected = dict(negative_prompt="blue", height=96, width=160, guidance_scale=3.0, cfg_trunc_ratio=0.5)
    assert kwargs == expected | {"num_inference_steps": 8}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out_1.jpg", "out_2.jpg"]
    assert load(tmp_path / "out_1.jpg").shape == (96, 160, 3)
    *_, last = capsys.readouterr().out.splitlines()
    assert f"saved {tmp_path / 'out_2.jpg'}" in last and " / 8 steps (" in last and " s, " in last


def test_single_file_transformer(tmp_path):
    """The checkpoint of the file is what draws: the bundled one unchanged, then with one tensor changed."""
    weights = load_file(BUNDLED / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(weights, tmp_path / "same.safetensors")
    weights["norm_out.linear_2.weight"] = weights["norm_out.linear_2.weight"] * 0.5
    save_file(weights, tmp_path / "other.safetensors")
    original = ["--rel-l1-thresh", "0"]
    main([*FAST, *original, "--output", str(tmp_path / "folder.png")])
    for name in ("same", "other"):
        flags = [
            *original,
            "--output",
            str(tmp_path / f"{name}.png"),
            "--transformer",
            str(tmp_path / f"{name}.safetensors"),
        ]
        main([*FAST, *flags])
        same = np.array_equal(load(tmp_path / "folder.png"), load(tmp_path / f"{name}.png"))
        assert same == (name == "same")


BAD = {
    "negative threshold": (["--rel-l1-thresh", "-0.1"], "rel_l1_thresh"),
    "NaN threshold": (["--rel-l1-thresh", "nan"], "rel_l1_thresh"),
    "NaN among those compared": (["--compare", "0", "nan"], "rel_l1_thresh"),
    "no number": (["--rel-l1-thresh", "much"], "much"),
    "zero steps": (["--num-inference-steps", "0"], "steps"),
    "size": (["--height", "100"], "multiple of 16"),
    "negative size": (["--width", "-16"], "multiple of 16"),
    "larger than the model draws": (["--height", "1040"], "1024"),
    "guidance": (["--guidance-scale", "nan"], "guidance"),
    "truncation": (["--cfg-trunc-ratio", "1.5"], "between 0 and 1"),
    "seed": (["--seed", "-1"], "seed"),
    "no such folder": (["--model", "./no/such/folder"], "no model folder"),
    "no such folder beside others": (["--model", "tests/none"], "no model folder"),
    "an empty folder": (["--model", "{tmp}"], "model_index.json"),
    "no checkpoint": (["--transformer", "none.safetensors"], "no checkpoint file"),
    "output without a folder": (["--output", "{tmp}/no/picture.png"], "cannot write"),
    "output below a file": (["--output", "{tmp}/file/picture.png"], "cannot write"),
    "output is a folder": (["--output", "{tmp}/folder.png"], "cannot write"),
    "one of two outputs is a folder": (["--prompt", "a", "--prompt", "b", "--output", "{tmp}/two.png"], "two_2.png"),
    "speedup of nothing": (["--speedup", "0.9"], "between 1 and 15"),
    "speedup beyond first and last": (["--speedup", "3.5", "--num-inference-steps", "6"], "between 1 and 3"),
    "NaN speedup": (["--speedup", "nan"], "between 1 and 15"),
    "speedup and threshold": (["--speedup", "2", "--rel-l1-thresh", "0.1"], "not both"),
    "speedup and thresholds": (["--speedup", "2", "--compare", "0.1"], "not both"),
    "unknown indicator": (["--indicator", "noise"], "noise"),
    "coefficients that cannot be read": (["--model", "{tmp}/model"], "calibrate anew"),
    "NaN threshold beside others": (["--rel-l1-thresh", "nan", "--compare", "0.1"], "rel_l1_thresh"),
    "output of no kind": (["--output", "{tmp}/picture.txt"], ".png"),
    "unknown flag": (["--treshold", "1"], "--treshold"),
    "unknown dtype": (["--dtype", "int8"], "int8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_loading(case, tmp_path, capsys, monkeypatch):
    def no_loading(args):
        raise AssertionError("loading began")

    monkeypatch.setattr(options_lumina2, "load_pipeline", no_loading)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "two_2.png").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "model" / "teacache.json").write_text('{"modulated": {"coefficients": [1, 2]}}')
    monkeypatch.chdir(ROOT)
    flags, word = BAD[case]
    flags = [f.replace("{tmp}", str(tmp_path)) for f in flags]
    with pytest.raises(SystemExit) as exit:
        main([*([] if "--model" in flags else MODEL), *flags])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert len(captured.err.splitlines()) == 1 and word in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png", "model", "two_2.png"]


def test_offload_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        main([*MODEL, "--offload", "model"])
    assert "GPU" in capsys.readouterr().err


def test_broken_checkpoint_and_unreachable_hub_are_one_line(tmp_path):
    """In processes of their own, with the Hub at an address where nothing listens; libraries add no line either."""
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    (tmp_path / "before.png").write_bytes(b"precious")
    cases = [
        (["--model", "somebody/no-such-model"], "somebody/no-such-model"),
        ([*MODEL, "--transformer", str(tmp_path / "broken.safetensors")], "broken.safetensors"),
    ]
    for flags, word in cases:
        command = [sys.executable, str(SCRIPT), *flags, "--output", str(tmp_path / "before.png")]
        env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "PATH": ""}
        run = subprocess.run(command, capture_output=True, text=True, env=env)
        assert run.returncode == 2 and run.stdout == ""
        note, error = ["", *run.stderr.splitlines()][-2:]
        assert len(run.stderr.splitlines()) <= 2 and word in error, run.stderr
        assert ("note: no GPU" in note) == (flags[1] == "somebody/no-such-model")
        assert (tmp_path / "before.png").read_bytes() == b"precious"


def test_a_failed_save_keeps_what_was_there(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.png"
    path.write_bytes(b"precious")

    def fail_halfway(self, where):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail_halfway)
    with pytest.raises(OSError, match=f"cannot write {path}: disk full"):
        teacache_lumina2.save(Image.new("RGB", (8, 8)), path)
    with pytest.raises(SystemExit) as exit:
        main([*FAST, "--output", str(path)])
    assert exit.value.code == 2 and "disk full" in capsys.readouterr().err.splitlines()[-1]
    assert path.read_bytes() == b"precious" and [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_psnr_and_ssim_are_those_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    images = Image.fromarray(a), Image.fromarray(b)
    assert compare_lumina2.psnr(*images) == pytest.approx(metrics.peak_signal_noise_ratio(a, b), abs=1e-9)
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    _, full = metrics.structural_similarity(a, b, channel_axis=2, full=True, **options)
    assert compare_lumina2.ssim(*images) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)
    assert compare_lumina2.psnr(images[0], images[0]) == np.inf and compare_lumina2.ssim(images[0], images[0]) == 1


def test_awkward_prompts_fit_the_table_and_the_strip():
    assert compare_lumina2.shorten("a|b\nc   d", 60) == "a/b c d"
    assert compare_lumina2.shorten("x" * 99, 60) == "x" * 57 + "..."
    entry = {"prompt": "a\n" * 500, "rel_l1_thresh": 0, "seconds": 1, "speedup": 1, "computed": 1, "steps": 1}
    page = compare_lumina2.strip([[(Image.new("RGB", (64, 64), "red"), entry | {"psnr": np.inf, "ssim": 1.0})]])
    assert page.getpixel((100, 40)) == (255, 0, 0)


def test_generate_leaves_no_tensor(pipeline):
    args = options_lumina2.parse([*FAST, "--rel-l1-thresh", "0.5"])
    _, figures = teacache_lumina2.generate(pipeline, args, "fox", 0.5)
    assert tensors_in(pipeline.transformer.teacache) == []
    assert figures["steps"] == 8 and 2 <= figures["computed"] <= 8
    teacache_lumina2.remove_teacache(pipeline.transformer)


def test_predict_reaches_the_pipeline(tmp_path, monkeypatch):
    """As many steps, another picture; the forecast by default."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for predict in ("forecast", "hold"):
        given = [*MODEL, "--num-inference-steps", "6", "--rel-l1-thresh", "0.9", "--predict", predict]
        main([*given, "--output", f"{predict}.png"])
        found[predict] = (tmp_path / f"{predict}.png").read_bytes()
    main([*given[:-2], "--output", "default.png"])
    assert found["hold"] != found["forecast"] and (tmp_path / "default.png").read_bytes() == found["forecast"]


@pytest.mark.parametrize("speedup, computed", [("1.5", 20), ("2", 15), ("3", 10)])
def test_speedup(tmp_path, capsys, speedup, computed):
    """As many steps as wished for; threshold and schedule are printed, and are those of the run."""
    main([*MODEL, "--speedup", speedup, "--output", str(tmp_path / "out.png")])
    *_, chosen, saved = capsys.readouterr().out.splitlines()
    assert f"{computed} / 30 steps" in saved
    steps = [int(word) for word in chosen.split("computed: ")[1].split()]
    assert len(steps) == computed and (steps[0], steps[-1]) == (0, 29) and steps == sorted(set(steps))
    assert chosen.startswith(f"speedup {speedup}: threshold about {1 / (computed - 1):.3f} of the way")


def test_speedup_as_a_constant(tmp_path, capsys, monkeypatch):
    """Edited in the script; a threshold on the command line goes before it."""
    monkeypatch.setattr(teacache_lumina2, "SPEEDUP", 2.0)
    main([*FAST, "--output", str(tmp_path / "out.png")])
    assert "4 / 8 steps" in capsys.readouterr().out
    main([*FAST, "--rel-l1-thresh", "0", "--output", str(tmp_path / "out.png")])
    assert "8 / 8 steps" in capsys.readouterr().out


EDITS = {
    "as shipped": ("", "", "fitted to it"),
    "v2": ("COEFFICIENTS, DOMAIN = COEFFICIENTS_V1, None", "COEFFICIENTS, DOMAIN = COEFFICIENTS_V2, None", "as edited"),
    "pasted": (
        "COEFFICIENTS, DOMAIN = COEFFICIENTS_V1, None",
        "COEFFICIENTS = [1.0, 0.0]\nDOMAIN = [0.1, 0.2]",
        "as edited",
    ),
    "timestep": (
        "COEFFICIENTS_TIMESTEP, DOMAIN_TIMESTEP = COEFFICIENTS_COMFYUI, None",
        "COEFFICIENTS_TIMESTEP = [1.0, 0.0]\nDOMAIN_TIMESTEP = [0.1, 0.2]",
        "as edited",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_coefficients_edited_in_the_script_go_before_the_models_own(edit):
    """The lines that calibrate_lumina2.py prints, pasted into a copy of the script; their domain is used."""
    old, new, says = EDITS[edit]
    source = SCRIPT.read_text(encoding="utf-8")
    assert not old or source.count(old) == 1
    module = {"__name__": "copy", "__file__": str(SCRIPT), "__package__": None}
    exec(compile(source.replace(old, new) if old else source, "copy", "exec"), module)
    indicator = "timestep" if edit == "timestep" else "modulated"
    coefficients, domain, where = module["coefficients_of"](BUNDLED / "teacache.json", indicator, "forecast")
    assert says in where
    if edit in ("pasted", "timestep"):
        assert coefficients == [1.0, 0.0] and domain == [0.1, 0.2]
        model = module["apply_teacache"](tiny_model(), indicator=indicator)
        assert model.coefficients == [1.0, 0.0] and model.domain == [0.1, 0.2]
    if edit == "v2":
        assert coefficients == teacache_lumina2.COEFFICIENTS_V2


def test_which_coefficients_is_said(tmp_path, capsys):
    """The model folder's own; without them the published ones; a single-file transformer's lie beside it."""
    model = tmp_path / "model"
    shutil.copytree(BUNDLED, model)
    given = ["--model", str(model), "--num-inference-steps", "8", "--output", str(tmp_path / "out.png")]
    for flags, says in (([], "teacache.json, fitted to it"), (["--indicator", "timestep"], "teacache.json")):
        main([*given, *flags])
        assert says in capsys.readouterr().out
    weights = shutil.copy(BUNDLED / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "w.safetensors")
    main([*given, "--transformer", str(weights)])
    assert "v1, not fitted to it" in capsys.readouterr().out
    shutil.copy(model / "teacache.json", tmp_path / "w.teacache.json")
    main([*given, "--transformer", str(weights)])
    assert "w.teacache.json, fitted to it" in capsys.readouterr().out
    (model / "teacache.json").unlink()
    for flags, says in (([], "v1, not fitted"), (["--indicator", "timestep"], "ComfyUI-TeaCache, not fitted")):
        main([*given, *flags])
        assert says in capsys.readouterr().out


def test_the_bundled_models_coefficients_reach_the_transformer(tmp_path, monkeypatch):
    given, apply = [], teacache_lumina2.apply_teacache
    monkeypatch.setattr(teacache_lumina2, "apply_teacache", lambda *a, **k: given.append(k) or apply(*a, **k))
    main([*FAST, "--output", str(tmp_path / "out.png")])
    fit = json.loads((BUNDLED / "teacache.json").read_text())["forecast"]["modulated"]
    assert (given[0]["coefficients"], given[0]["domain"]) == (fit["coefficients"], fit["domain"])
