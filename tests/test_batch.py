"""batch_lumina2.py: names, resuming, what counts as another image, one that fails, several processes."""

import json
import os
import re
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import BUNDLED, ROOT, levels, two_processes
from PIL import Image

from TeaCache4LuminaT2X import batch_lumina2, teacache_lumina2

FAST = ["--model", str(BUNDLED), "--num-inference-steps", "3", "--computed-steps", "2"]
PROMPTS = ["red apple", "Dog, running!", "猫"]
WORDS = ["red-apple", "dog-running", "猫"]


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
    """{name: content}, hidden files too."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def words(folder="out"):
    """What the names of the files begin with."""
    return {name.rpartition("-")[0] for name in os.listdir(folder)}


def picture(words, folder="out"):
    (path,) = Path(folder).glob(f"{words}-*.png")
    return path


def stored(path):
    with Image.open(path) as image:
        return json.loads(image.text["teacache"])


def test_names():
    """The first words, without what a file system would read in them, and a digest."""
    texts = {"A cat, holding a SIGN": "a-cat-holding-a-sign-", "../../etc/passwd": "etc-passwd-", "?!": ""}
    for text, words in (texts | {"x" * 300: "x" * 48 + "-", "été – 猫": "été-猫-"}).items():
        name = batch_lumina2.file_name({"prompt": text})
        assert name.startswith(words) and len(name) == len(words) + len("01234567.png")


def test_one_and_two_processes_draw_what_the_script_does(here):
    """The last is what the script draws; prompt, seed and settings are in it. Other processes may round otherwise."""
    assert run() == 0
    assert words() == set(WORDS), "no drafts are left"
    teacache_lumina2.main([*FAST, "--prompt", "猫", "--output", "alone.png"])
    with Image.open("alone.png") as alone, Image.open(picture("猫")) as ours:
        assert levels(alone, ours) <= 1
    settings = {"rel_l1_thresh": None, "computed_steps": 2, "num_inference_steps": 3, "dtype": "float32"}
    assert stored(picture("猫")).items() >= {"prompt": "猫", "seed": 1024, "height": None, **settings}.items()
    script = ROOT / "TeaCache4LuminaT2X" / "batch_lumina2.py"
    two = two_processes(script, "prompts.txt", *FAST, "--output-dir", "two")
    assert two.returncode == 0 and two.stdout.count("3 of 3 images are in two") == 1, two.stderr
    assert sorted(os.listdir("two")) == sorted(os.listdir("out"))
    for name in os.listdir("out"):
        with Image.open(f"out/{name}") as one, Image.open(f"two/{name}") as other:
            assert levels(one, other) <= 1 and one.text == other.text


def test_resume(here, drawn, capsys, monkeypatch):
    """What is there is not drawn again, but what was cut short; with nothing to do, nothing is loaded."""
    assert run() == 0 and drawn == [(prompt, 1024) for prompt in PROMPTS]
    before = files()
    picture(WORDS[0]).unlink()
    picture(WORDS[1]).write_bytes(picture(WORDS[1]).read_bytes()[:-20])
    del drawn[:]
    assert run() == 0 and drawn == [(prompt, 1024) for prompt in PROMPTS[:2]] and files() == before
    assert capsys.readouterr().out.splitlines()[-1] == "3 of 3 images are in out"
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    assert run() == 0
    monkeypatch.chdir("out")  # the same prompts, model and folder, by other paths
    monkeypatch.setitem(globals(), "FAST", ["--model", os.path.relpath(BUNDLED), *FAST[2:]])
    assert run(prompts="../prompts.txt", output="../out") == 0


def test_lines_may_be_added_moved_and_removed(here, drawn):
    """Only new lines are drawn. A line that stands twice has two images, of two seeds."""
    assert run() == 0
    before = files()
    del drawn[:]
    lines = ["sun", *reversed(PROMPTS[:2]), "sun", PROMPTS[0]]
    (here / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    assert run() == 0 and drawn == [("sun", 1024), ("sun", 1025), (PROMPTS[0], 1025)]
    assert len(files()) == 6 and before.items() <= files().items()


def test_only_a_line_feed_ends_a_line(here, drawn):
    """Not the separators that a text from elsewhere may have within a line."""
    lines = ["a\u2028b", "c\u2029d\x85e\x0bf\x0cg", "h"]
    (here / "prompts.txt").write_bytes("\r\n".join(lines).encode())
    assert run() == 0 and [prompt for prompt, _ in drawn] == lines


def test_every_cut_is_noticed(tmp_path):
    """To the last chunk, which has no content; or zeros in place of what was not written."""
    path, pixels = tmp_path / "x.png", np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    assert batch_lumina2.is_done(path) and not batch_lumina2.is_done(tmp_path / "none.png")
    for size in range(whole.index(b"IEND")):
        path.write_bytes(whole[:size])
        assert not batch_lumina2.is_done(path), size
        path.write_bytes(whole[:size] + bytes(len(whole) - size))
        assert not batch_lumina2.is_done(path), f"zeros from {size}"


def test_drafts_that_a_killed_batch_left(here, drawn):
    """Go; those of a batch that runs stay, and so do other hidden files."""
    (here / "out").mkdir()
    old, young, other = (here / "out" / name for name in (".a.1.draft.png", ".b.2.draft.png", "._c.png"))
    for path in (old, young, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - 100,) * 2)
    assert run() == 0 and (old.exists(), young.exists(), other.exists()) == (False, True, True)


def test_two_batches_in_one_folder(here, drawn, monkeypatch):
    """The second is interrupted; the first has finished meanwhile. Nothing of the first is touched or refused."""
    generate = teacache_lumina2.generate

    def interrupted(pipeline, args):
        monkeypatch.setattr(teacache_lumina2, "generate", generate)
        assert run() == 0
        raise KeyboardInterrupt

    monkeypatch.setattr(teacache_lumina2, "generate", interrupted)
    assert run() == 0
    before = files()
    assert words() == set(WORDS)
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    assert run() == 0 and files() == before


def test_other_settings_make_other_images(here, drawn):
    """Beside the first ones, which stay."""
    assert run() == 0
    others = [
        "--seed 7",
        "--guidance-scale 2 --height 64",
        "--computed-steps 3",
        "--computed-steps 0,2",
        "--negative-prompt a",
    ]
    for number, flags in enumerate(others, 2):
        before = files()
        assert run(*flags.split()) == run(*flags.split()) == 0 and len(drawn) == len(files()) == 3 * number
        assert before.items() <= files().items()


@pytest.mark.parametrize(
    "constant, value",
    [("REL_L1_THRESH", 0.2), ("COMPUTED_STEPS", 3), ("COEFFICIENTS", [1.0, 0.0]), ("CORRECT", False)],
)
def test_an_edited_constant_is_another_setting(here, drawn, monkeypatch, constant, value):
    """Where it holds: a setting that is given goes before it."""
    limit = FAST[4:]
    monkeypatch.setitem(globals(), "FAST", FAST[:4])
    assert run(output="plain") == run(*limit) == 0 and len(drawn) == 6
    monkeypatch.setattr(teacache_lumina2, constant, value)
    assert run(output="plain") == 0 and len(drawn) == 9
    assert run(*limit) == 0 and len(drawn) == (12 if constant in ("COEFFICIENTS", "CORRECT") else 9)


def test_changed_weights_are_another_model(here, drawn, monkeypatch):
    """Under the same path: a local model, or the file of a transformer. Copied with its times, it is the same one."""
    shutil.copytree(BUNDLED, "model")
    weights = Path("model/transformer/diffusion_pytorch_model.safetensors")
    shutil.copy2(weights, "mine.safetensors")
    for flags, file in ([], weights), (["--transformer", "mine.safetensors"], Path("mine.safetensors")):
        monkeypatch.setitem(globals(), "FAST", ["--model", "model", *flags, *FAST[-4:]])
        del drawn[:]
        assert run() == run() == 0 and len(drawn) == 3
        os.utime(file, (1, 1))
        assert run() == run() == 0 and len(drawn) == 6
        shutil.rmtree("out")
    shutil.copytree("model", "elsewhere/model")
    args = Namespace(model="model", elsewhere="elsewhere/model")
    assert batch_lumina2.identity(args.model) == batch_lumina2.identity(args.elsewhere)
    Path("model/README.md").write_text("It is another page.")
    assert batch_lumina2.identity(args.model) == batch_lumina2.identity(args.elsewhere)
    assert [batch_lumina2.identity(name) for name in ("a/b", None)] == ["a/b", None]


def test_one_that_fails_and_the_rest_goes_on(here, drawn, monkeypatch, capsys):
    """Its error is told in one line, the GPU is freed, the exit code is 1; the next run draws it."""
    generate = teacache_lumina2.generate

    def fails(pipeline, args):
        if args.prompt == PROMPTS[0]:
            raise RuntimeError("midway\nTried to")
        return generate(pipeline, args)

    with monkeypatch.context() as patch:
        patch.setattr(teacache_lumina2, "generate", fails)
        assert run() == 1
    out, err = capsys.readouterr()
    assert out == "2 of 3 images are in out\n" and words() == set(WORDS[1:])
    assert re.search(rf"{WORDS[0]}-\w+\.png failed: RuntimeError: midway Tried to\n", err)
    assert teacache_lumina2.load_pipeline(None).freed == 1
    assert run() == 0 and words() == set(WORDS)


def full(self, path, **_):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def gone(self, path, **_):
    shutil.rmtree(path.parent, ignore_errors=True)
    raise FileNotFoundError(2, "No such file or directory")


@pytest.mark.parametrize("save, kept", [(full, 1), (gone, 0)])
def test_where_nothing_can_be_kept_it_ends(here, drawn, monkeypatch, capsys, save, kept):
    """A full disk, a folder that somebody removes: no further image is drawn, and what is there is counted."""
    saved = Image.Image.save
    calls = iter([saved, save])
    monkeypatch.setattr(Image.Image, "save", lambda *args, **kwargs: next(calls)(*args, **kwargs))
    assert run() == 1 and len(drawn) == 2
    out, err = capsys.readouterr()
    assert out == f"{kept} of 3 images are in out\n" and err.count("failed: ") == 1
    assert not kept or words() == {WORDS[0]}, "no half an image, no draft"


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


def test_a_folder_that_cannot_be_written(here, drawn, monkeypatch, capsys):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(batch_lumina2.tempfile, "TemporaryFile", refuse)
    assert run() == 2 and not drawn
    assert "error: PermissionError: [Errno 13] Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file, output, flags, says",
    [
        ("none.txt", "out", "", "none.txt"),
        ("empty.txt", "out", "", "empty.txt is empty; expected one prompt per line"),
        ("latin.txt", "out", "", "latin.txt is not UTF-8 text"),
        ("utf-16", "out", "", "utf-16 is not UTF-8 text"),
        ("utf-16-le", "out", "", "utf-16-le is not UTF-8 text"),
        ("utf-32-be", "out", "", "utf-32-be is not UTF-8 text"),
        ("prompts.txt", "empty.txt", "", "empty.txt"),
        ("prompts.txt", "empty.txt/below", "", "empty.txt"),
        ("prompts.txt", "out", "--prompt fox", "--prompt is not for a batch"),
        ("twice.txt", "out", f"--seed {2**64 - 1}", "--seed must be a number of 64 bits"),  # of the second line
    ],
)
def test_bad_input(here, monkeypatch, capsys, file, output, flags, says):
    (here / "empty.txt").write_text(" \n\n")
    (here / "twice.txt").write_text("fox\nfox\n")
    (here / "latin.txt").write_bytes("café".encode("latin-1"))
    for encoding in ("utf-16", "utf-16-le", "utf-32-be"):
        (here / encoding).write_text("fox\n", encoding=encoding)
    before = sorted(os.listdir())
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    assert run(*flags.split(), prompts=file, output=output) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error and sorted(os.listdir()) == before
