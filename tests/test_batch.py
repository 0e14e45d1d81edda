"""batch_lumina2.py: names, resuming, settings that differ, one that fails, several processes."""

import json
import os
import re
import sys
from argparse import Namespace
from types import ModuleType

import numpy as np
import pytest
from conftest import BUNDLED, ROOT, two_processes
from PIL import Image

from TeaCache4LuminaT2X import batch_lumina2, teacache_lumina2

FAST = ["--model", str(BUNDLED), "--num-inference-steps", "3", "--computed-steps", "2"]
PROMPTS = ["red apple", "Dog, running!", "猫"]
FILES = ["0001-red-apple.png", "0002-dog-running.png", "0003-猫.png"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a file of prompts; a plain picture takes the place of drawing, unless a test asks for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\ufeff" + "\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return tmp_path


class Fake:
    """In place of the pipeline."""

    def __init__(self):
        self.freed = 0

    def set_progress_bar_config(self, **_):
        pass

    def maybe_free_model_hooks(self):
        self.freed += 1


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn with plain pictures in place of the model's: a list of (prompt, seed)."""
    drawn, fake = [], Fake()

    def generate(pipeline, args):
        assert pipeline is fake
        drawn.append((args.prompt, args.seed))
        return Image.new("RGB", (16, 16), (args.seed % 256, 0, 0)), 0.1, [True]

    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: fake)
    monkeypatch.setattr(teacache_lumina2, "generate", generate)
    return drawn


def run(*flags, prompts="prompts.txt", output="out"):
    """The exit code."""
    with pytest.raises(SystemExit) as exit:
        batch_lumina2.main([prompts, *FAST, "--output-dir", output, *flags])
    return int(exit.value.code)


def files(folder="out"):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A cat, holding a SIGN", "0007-a-cat-holding-a-sign.png"),
        ("../../etc/passwd", "0007-etc-passwd.png"),
        ("?!", "0007.png"),
        ("x" * 300, "0007-" + "x" * 48 + ".png"),
        ("été – 猫", "0007-été-猫.png"),
    ],
)
def test_names(text, expected):
    assert batch_lumina2.name(6, text) == expected


def test_one_and_two_processes_draw_what_the_script_does(here):
    """The same files; the last is what the script draws with its seed; prompt, seed and settings are in it."""
    assert run() == 0
    one = files()
    assert list(one) == FILES, "no drafts are left"
    teacache_lumina2.main([*FAST, "--prompt", "猫", "--seed", "1026", "--output", "alone.png"])
    with Image.open("alone.png") as alone, Image.open(f"out/{FILES[2]}") as ours:
        assert np.array_equal(np.asarray(alone), np.asarray(ours))
        stored = json.loads(ours.text["teacache"])
    settings = {"rel_l1_thresh": None, "computed_steps": 2, "num_inference_steps": 3, "model": str(BUNDLED)}
    assert stored.items() >= {"prompt": "猫", "seed": 1026, "dtype": "float32", "height": None, **settings}.items()
    script = ROOT / "TeaCache4LuminaT2X" / "batch_lumina2.py"
    two = two_processes(script, "prompts.txt", *FAST, "--output-dir", "two")
    assert two.returncode == 0 and two.stdout.count("3 of 3 images are in two") == 1, two.stderr
    assert files("two") == one


def test_resume(here, drawn, capsys, monkeypatch):
    """What is there is not drawn again; with nothing to do, nothing is loaded. More prompts may come later."""
    assert run() == 0 and drawn == list(zip(PROMPTS, (1024, 1025, 1026)))
    before = files()
    os.remove(f"out/{FILES[1]}")
    del drawn[:]
    assert run() == 0 and drawn == [(PROMPTS[1], 1025)] and files() == before
    with open("prompts.txt", "a", encoding="utf-8") as file:
        file.write("sun\n")
    del drawn[:]
    assert run() == 0 and drawn == [("sun", 1027)]
    assert capsys.readouterr().out.splitlines()[-1] == "4 of 4 images are in out"
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    assert run() == 0


@pytest.mark.parametrize(
    "flags, other",
    [
        (["--seed", "7"], "seed"),
        (["--guidance-scale", "2", "--height", "64"], "height, guidance_scale"),
        (["--computed-steps", "3"], "computed_steps"),
        ([], "prompt, seed, model"),
    ],
    ids=str,
)
def test_other_settings_are_an_error(here, drawn, capsys, monkeypatch, flags, other):
    """It names which; an image of somebody else's has none of them. Nothing is changed."""
    assert run() == 0
    if not flags:
        Image.new("RGB", (8, 8)).save(f"out/{FILES[0]}")
    before = files()
    capsys.readouterr()
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{FILES[0]} exists with different {other}" in error and files() == before


@pytest.mark.parametrize(
    "constant, value, other",
    [
        ("REL_L1_THRESH", 0.2, "rel_l1_thresh"),
        ("COMPUTED_STEPS", 3, "computed_steps"),
        ("COEFFICIENTS", [1.0, 0.0], "coefficients"),
        ("CORRECT", False, "correct"),
    ],
)
def test_an_edited_constant_is_another_setting(here, drawn, capsys, monkeypatch, constant, value, other):
    """Where it holds: a limit that is given goes before it."""
    limit = FAST[4:]
    monkeypatch.setitem(globals(), "FAST", FAST[:4])
    assert run(output="plain") == run(*limit) == 0
    monkeypatch.setattr(teacache_lumina2, constant, value)
    assert run(output="plain") == 2
    assert re.search(rf"exists with different .*{other}", capsys.readouterr().err)
    assert run(*limit) == (2 if constant in ("COEFFICIENTS", "CORRECT") else 0)


def test_one_that_fails_and_the_rest_goes_on(here, drawn, monkeypatch, capsys):
    """Its error is told, the GPU is freed, the exit code is 1; the next run draws it."""
    generate, save = teacache_lumina2.generate, Image.Image.save

    def fails(pipeline, args):
        if args.prompt == PROMPTS[0]:
            raise RuntimeError("midway")
        return generate(pipeline, args)

    def full(self, path, *args, **kwargs):
        if "0002" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(teacache_lumina2, "generate", fails)
        patch.setattr(Image.Image, "save", full)
        assert run() == 1
    out, err = capsys.readouterr()
    assert out == "1 of 3 images are in out\n" and list(files()) == [FILES[2]], "no half an image, no draft"
    assert f"{FILES[0]} failed: RuntimeError: midway" in err and f"{FILES[1]} failed: OSError" in err
    assert teacache_lumina2.load_pipeline(None).freed == 2
    assert run() == 0 and list(files()) == FILES


def test_flash(here, drawn, monkeypatch):
    """--attention reaches the transformer."""
    used = []
    teacache_lumina2.load_pipeline(None).transformer = "the transformer"
    monkeypatch.setattr(batch_lumina2, "find_flash_attention", lambda args: used.append)
    assert run("--attention", "flash") == 0 and used == ["the transformer"]


def test_flash_that_cannot_run(here, drawn, monkeypatch, capsys):
    """Without flash-attn, or where it cannot be used: before loading."""
    from TeaCache4LuminaT2X.attention_lumina2 import use_flash_attention

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert run("--attention", "flash") == 2 and not drawn and not os.path.exists("out")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install flash-attn" in error

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert run("--attention", "flash") == 2 and "needs a CUDA GPU" in capsys.readouterr().err
    for device, dtype, fits in (("cuda", "float32", False), ("mps", "float16", False), ("cuda:1", "float16", True)):
        args = Namespace(device=device, dtype=dtype)
        if fits:
            assert batch_lumina2.find_flash_attention(args) is use_flash_attention
        else:
            with pytest.raises(ValueError, match="bfloat16 or float16"):
                batch_lumina2.find_flash_attention(args)


def test_the_last_seed(here, drawn, capsys):
    assert run("--seed", str(2**64 - 3)) == 0 and drawn[-1][1] == 2**64 - 1
    assert run("--seed", str(2**64 - 2), output="more") == 2 and "seed" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(here, drawn, monkeypatch, capsys):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(batch_lumina2.tempfile, "TemporaryFile", refuse)
    assert run() == 2 and not drawn
    assert "--output-dir out cannot be written (Permission denied): give another folder" in capsys.readouterr().err


def test_the_working_directory_need_not_be_writable(here, drawn, monkeypatch):
    """Only --output-dir is."""
    monkeypatch.setattr(teacache_lumina2, "check_output", lambda *_: pytest.fail("looked at"))
    assert run() == 0


@pytest.mark.parametrize(
    "file, output, says",
    [
        ("none.txt", "out", "none.txt"),
        ("empty.txt", "out", "empty.txt is empty; expected one prompt per line"),
        ("latin.txt", "out", "latin.txt is not UTF-8 text"),
        ("wide.txt", "out", "wide.txt is not UTF-8 text"),
        ("prompts.txt", "empty.txt", "empty.txt"),
        ("prompts.txt", "empty.txt/below", "empty.txt"),
    ],
)
def test_bad_input(here, monkeypatch, capsys, file, output, says):
    (here / "empty.txt").write_text(" \n\n")
    (here / "latin.txt").write_bytes("café".encode("latin-1"))
    (here / "wide.txt").write_text("fox", encoding="utf-16")
    before = sorted(os.listdir())
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    assert run(prompts=file, output=output) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error and sorted(os.listdir()) == before
