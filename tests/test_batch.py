"""Both batch tools: resuming, what counts as another one, one that fails, two batches at once, bad input.

Nothing is computed here. What is drawn: test_cli.py; the videos: test_memo_batch.py.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import LUMINA2, ROOT
from PIL import Image


class Batch:
    """A tool, in a folder with a file of three lines. It keeps what was made, and does something meanwhile if asked to."""

    def __init__(self, tool, script):
        self.tool, self.script, self.made, self.meanwhile = tool, script, [], lambda line: None
        self.write(self.lines)

    def write(self, lines):
        Path("lines.txt").write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")

    def make(self, line):
        self.meanwhile(line)
        self.made.append(line)

    def load_nothing(self, *_, **__):
        pytest.fail("loading began")

    def run(self, *flags):
        """The exit code."""
        with pytest.raises(SystemExit) as exit:
            self.tool.main(["lines.txt", *self.flags, "--output-dir", "out", *flags])
        return exit.value.code

    def files(self):
        """{name: content}, hidden files too."""
        return {path.name: path.read_bytes() for path in sorted(Path("out").iterdir())}

    def found(self):
        """The images or videos, without their digests."""
        return [name[: -len("-01234567.png")] for name in sorted(self.files()) if name.endswith(self.kind)]

    def path(self, line):
        (path,) = Path("out").glob(f"{self.names[line]}[-_]*{self.kind}")
        return path


class Lumina2(Batch):
    what, kind, flags = "images", ".png", ["--model", "model", "--num-inference-steps", "20"]
    lines, names, other = ["Dog, running!", "red apple", "猫"], ["dog-running", "red-apple", "猫"], "sun"
    others = "--guidance-scale 2", "--height 64", "--negative-prompt a"

    def __init__(self, patch):
        from TeaCache4LuminaT2X import batch_lumina2, teacache_lumina2

        self.freed = 0
        nothing = {"set_progress_bar_config": lambda **_: None, "transformer": "the transformer"}
        pipeline = SimpleNamespace(**nothing, maybe_free_model_hooks=lambda: vars(self).update(freed=self.freed + 1))
        patch.setattr(teacache_lumina2, "load_pipeline", lambda args: pipeline)
        patch.setattr(teacache_lumina2, "generate", self.generate)
        super().__init__(batch_lumina2, teacache_lumina2)

    def generate(self, pipeline, args):
        self.make(args.prompt)
        return Image.new("RGB", (16, 16), (args.seed % 256, 0, 0)), 0.1, [True]


class Memo(Batch):
    what, kind, flags = "videos", ".mp4", ["--config", "config.yaml"]
    lines, other = ["face.png,long.wav", "face.png,speech.wav", "other.png,speech.wav"], "new.png,speech.wav"
    names = ["face_long", "face_speech", "other_speech"]
    others = ("--emotion sad",)

    def __init__(self, patch):
        from TeaCache4Memo import batch_memo, teacache_memo

        config = (ROOT / "assets" / "memo-emoji" / "config.yaml").read_text().replace("assets/memo-emoji", "model")
        Path("config.yaml").write_text(config)
        for file in "face.png other.png new.png speech.wav long.wav".split():
            Path(file).write_text(file)
        patch.setattr(teacache_memo, "load_pipeline", lambda **_: (None, None))
        patch.setattr(teacache_memo, "prepare", self.prepare)
        patch.setattr(teacache_memo, "write_video", self.write_video)
        super().__init__(batch_memo, teacache_memo)

    def prepare(self, image, audio, *_):
        self.make(f"{image},{audio}")
        return SimpleNamespace(sound=None)

    def write_video(self, clips, path, *_):
        path = self.script.take_name(path)
        path.write_text("a video")
        return path


@pytest.fixture(params=["lumina2", "memo"])
def batch(request, tmp_path, monkeypatch):
    if request.param == "lumina2" and not LUMINA2:
        pytest.skip("this diffusers has no Lumina2")
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/weights.safetensors").touch()
    return {"lumina2": Lumina2, "memo": Memo}[request.param](monkeypatch)


def full(*_):
    raise OSError(28, "No space left on device\nnone")


OF_LUMINA2 = pytest.mark.parametrize("batch", ["lumina2"], indirect=True)
OF_MEMO = pytest.mark.parametrize("batch", ["memo"], indirect=True)


def test_resume(batch, capsys, monkeypatch):
    """What is there is not made again, but what is missing or empty; with nothing to do, nothing is loaded."""
    assert batch.run() == 0 and batch.made == batch.lines and batch.found() == batch.names
    before = batch.files()
    batch.path(0).unlink()
    batch.path(1).write_bytes(b"")
    assert batch.run() == 0 and batch.made[3:] == batch.lines[:2] and batch.files() == before
    assert capsys.readouterr().out.splitlines()[-1] == f"3 of 3 {batch.what} are in out"
    monkeypatch.setattr(batch.script, "load_pipeline", batch.load_nothing)
    assert batch.run() == 0


def test_lines_may_be_added_moved_and_removed(batch):
    """Only new lines are made."""
    assert batch.run() == 0
    before = batch.files()
    batch.write([batch.other, *reversed(batch.lines[:2])])
    assert batch.run() == 0 and batch.made[3:] == [batch.other]
    assert len(batch.found()) == 4 and before.items() <= batch.files().items()


def test_other_settings_make_others(batch):
    """Beside the first ones, which stay."""
    assert batch.run() == 0
    for n, flags in enumerate(["--seed 7", "--computed-steps 3", "--computed-steps 0,19", *batch.others], 2):
        before = batch.files()
        assert batch.run(*flags.split()) == batch.run(*flags.split()) == 0
        assert len(batch.made) == len(batch.found()) == 3 * n and before.items() <= batch.files().items()


@pytest.mark.parametrize(
    "constant, value",
    [("REL_L1_THRESH", 0.2), ("COMPUTED_STEPS", 3), ("COEFFICIENTS", [2.0, 0.0]), ("CORRECT", False)],
)
def test_an_edited_constant_is_another_setting(batch, monkeypatch, constant, value):
    """Where it holds: a setting that is given goes before it."""
    limit = "--computed-steps", "2"
    assert batch.run() == batch.run(*limit) == 0 and len(batch.made) == 6
    monkeypatch.setattr(batch.script, constant, value)
    assert batch.run() == 0 and len(batch.made) == 9
    assert batch.run(*limit) == 0 and len(batch.made) == (12 if constant in ("COEFFICIENTS", "CORRECT") else 9)


def test_changed_weights_are_another_model(batch):
    """Under the same path."""
    assert batch.run() == batch.run() == 0 and len(batch.made) == 3
    os.utime("model/weights.safetensors", (1, 1))
    assert batch.run() == batch.run() == 0 and len(batch.made) == len(batch.found()) == 6


def test_one_that_fails_and_the_rest_goes_on(batch, capsys):
    """It is told, the exit code is 1; the next run makes it."""

    def fails(line):
        if line == batch.lines[0]:
            raise RuntimeError("midway")

    batch.meanwhile = fails
    assert batch.run() == 1 and batch.made == batch.lines[1:] and batch.found() == batch.names[1:]
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"2 of 3 {batch.what} are in out"
    assert re.search(rf"{batch.names[0]}.\w+\{batch.kind} failed: RuntimeError: midway\n", err)
    batch.meanwhile = lambda line: None
    assert batch.run() == 0 and batch.made[2:] == batch.lines[:1] and batch.found() == batch.names


@pytest.mark.parametrize("interrupted", [True, False])
def test_two_batches_in_one_folder(batch, interrupted, monkeypatch):
    """One begins and ends while the other makes its first: nothing is refused, there twice, or taken away."""

    def the_other(line):
        batch.meanwhile = lambda line: None
        assert batch.run() == 0
        if interrupted:
            raise KeyboardInterrupt

    batch.meanwhile = the_other
    assert batch.run() == ("interrupted" if interrupted and batch.what == "videos" else 0)
    assert batch.found() == batch.names and not [name for name in batch.files() if name[0] == "."]
    if batch.what == "videos":
        assert batch.made[3:] == batch.lines[: 1 - interrupted], "before each, it looks whether it is there"
    monkeypatch.setattr(batch.script, "load_pipeline", batch.load_nothing)
    assert batch.run() == 0


def test_a_folder_that_cannot_be_written(batch, monkeypatch, capsys):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert "Permission denied" in f"{batch.run()} {capsys.readouterr().err}" and not batch.made


LINES = {  # of the file, or its bytes, or None: it is not there; and flags
    "lumina2": [
        (None, "", "lines.txt"),
        (" \n\n", "", "lines.txt is empty; expected one prompt per line"),
        ("é".encode("latin-1"), "", "is not UTF-8 text"),
        *[("fox\n".encode(encoding), "", "is not UTF-8 text") for encoding in ("utf-16", "utf-16-le")],
        ("fox", "--output-dir lines.txt", "lines.txt"),
        ("fox", "--output-dir lines.txt/below", "lines.txt"),
        ("fox", "--prompt fox", "--prompt is not for a batch"),
        ("fox", "--height 100", "must be multiples of 16"),
        ("fox\nfox\n", f"--seed {2**64 - 1}", "--seed must be a number of 64 bits"),  # of the second line
    ],
    "memo": [
        (None, "", "lines.txt"),
        ("", "", "lines.txt is empty"),
        ("face.png,speech.wav".encode("utf-16"), "", "lines.txt is not UTF-8"),
        ("face.png;speech.wav", "", "lines.txt, line 1: face.png;speech.wav must be image,audio with one comma"),
        ("\n \nface.png,speech.wav\n,\n\na,b,c", "", "line 6: a,b,c must be image,audio with one comma"),
        ("\nnone.png,speech.wav", "", "lines.txt, line 2: there is no file none.png"),
        ("x" * 200_000, "", "field limit"),
        ("face.png,speech.wav", "--input_image face.png", "the pairs are in FILE"),
        ("face.png,speech.wav", "--input_audio speech.wav", "the pairs are in FILE"),
    ],
}


@pytest.mark.parametrize(
    "batch, lines, flags, says", [(tool, *case) for tool in LINES for case in LINES[tool]], indirect=["batch"]
)
def test_bad_input(batch, monkeypatch, capsys, lines, flags, says):
    """One line, before anything is loaded or written."""
    monkeypatch.setattr(batch.script, "load_pipeline", batch.load_nothing)
    Path("lines.txt").unlink()
    if lines is not None:
        Path("lines.txt").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    before, code = sorted(os.listdir()), batch.run(*flags.split())
    out, err = capsys.readouterr()
    error = f"{code}\n" if isinstance(code, str) else err
    assert code and out == "" and error.count("\n") == 1 and says in error and sorted(os.listdir()) == before


# --- only batch_memo.py ---------------------------------------------------------------------------


@OF_MEMO
@pytest.mark.parametrize("file, anew", [("speech.wav", 2), ("face.png", 2), ("config.yaml", 3)])
def test_a_changed_file_makes_others(batch, file, anew):
    """Of one name in the list, beside those that were there. What has not changed is not made again."""
    assert batch.run() == 0
    before = batch.files()
    Path(file).write_text(Path(file).read_text().replace("fps: 30", "fps: 25") + "\n")
    assert batch.run() == 0 and len(batch.made) == len(batch.found()) == 3 + anew
    assert set(batch.found()) == set(batch.names) and before.items() <= batch.files().items()


@OF_MEMO
def test_a_full_disk_leaves_nothing(batch, monkeypatch, capsys):
    monkeypatch.setattr(batch.script, "write_video", full)
    assert batch.run() == 1 and capsys.readouterr().err.count("failed: OSError: [Errno 28] No space left") == 3
    assert not batch.files()


@OF_MEMO
def test_videos_of_a_killed_batch(batch):
    """Drafts go when they are a day old: younger ones may be those of another batch."""
    assert batch.run() == 0
    first = batch.path(0)
    first.unlink()
    old, young, others = (first.with_name(name) for name in (f".{first.stem}.1", f".{first.stem}.2", ".my.1"))
    for draft in (old, young, others):
        draft.mkdir()
        (draft / "pictures.mp4").touch()
        for path in (draft / "pictures.mp4", draft):
            os.utime(path, (0, 0))
    os.utime(young / "pictures.mp4")
    assert batch.run() == 0 and young.exists() and others.exists() and not old.exists()


# --- only batch_lumina2.py ------------------------------------------------------------------------


@OF_LUMINA2
def test_names(batch):
    """The first words, without what a file system would read in them, and a digest."""
    texts = {"A cat, holding a SIGN": "a-cat-holding-a-sign-", "../../etc/passwd": "etc-passwd-", "?!": ""}
    for text, words in (texts | {"x" * 300: "x" * 48 + "-", "été – 猫": "été-猫-"}).items():
        name = batch.tool.file_name({"prompt": text})
        assert name.startswith(words) and len(name) == len(words) + len("01234567.png")


@OF_LUMINA2
def test_a_line_that_stands_twice(batch):
    """It has two images, of two seeds."""
    batch.write(["sun", "fox", "sun"])
    assert batch.run() == 0 and batch.made == ["sun", "fox", "sun"]
    jobs = [json.loads(Image.open(path).text["teacache"]) for path in Path("out").iterdir()]
    assert sorted((job["prompt"], job["seed"]) for job in jobs) == [("fox", 1024), ("sun", 1024), ("sun", 1025)]


@OF_LUMINA2
def test_only_a_line_feed_ends_a_line(batch):
    """Not the separators that a text from elsewhere may have within a line."""
    lines = ["a\u2028b", "c\u2029d\x85e\x0bf\x0cg", "h"]
    Path("lines.txt").write_bytes("\r\n".join(lines).encode())
    assert batch.run() == 0 and batch.made == lines


@OF_LUMINA2
def test_every_cut_is_noticed(batch):
    """To the last chunk, which has no content; or zeros in place of what was not written."""
    path, pixels = Path("x.png"), np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    assert batch.tool.is_done(path)
    for size in range(whole.index(b"IEND")):
        for rest in (b"", bytes(len(whole) - size)):
            path.write_bytes(whole[:size] + rest)
            assert not batch.tool.is_done(path), f"{size} bytes, then {rest}"


@OF_LUMINA2
def test_images_of_a_killed_batch(batch):
    """Drafts go; those of a batch that runs stay, and so do other hidden files."""
    Path("out").mkdir()
    old, young, other = (Path("out") / name for name in (".a.1.draft.png", ".b.2.draft.png", "._c.png"))
    for path in (old, young, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - 100,) * 2)
    assert batch.run() == 0 and (old.exists(), young.exists(), other.exists()) == (False, True, True)


@OF_LUMINA2
def test_the_same_model_elsewhere(batch):
    """Copied with its times; another page beside it does not matter, another transformer does."""
    assert batch.run() == 0
    shutil.copytree("model", "elsewhere/model")
    Path("elsewhere/model/README.md").write_text("It is another page.")
    assert batch.run("--model", "elsewhere/model") == 0 and len(batch.made) == 3
    shutil.copy2("model/weights.safetensors", "mine.safetensors")
    flags = "--transformer", "mine.safetensors"
    assert batch.run(*flags) == batch.run(*flags) == 0 and len(batch.made) == 6
    os.utime("mine.safetensors", (1, 1))
    assert batch.run(*flags) == 0 and len(batch.made) == 9
    assert batch.tool.identity("a/b") == "a/b"


def half(self, path, **_):
    path.write_bytes(b"half")
    full()


def gone(self, path, **_):
    shutil.rmtree(path.parent, ignore_errors=True)
    raise FileNotFoundError(2, "No such file or directory\nnone")


@OF_LUMINA2
@pytest.mark.parametrize("save, kept", [(half, 1), (gone, 0)])
def test_where_nothing_can_be_kept_it_ends(batch, monkeypatch, capsys, save, kept):
    """A full disk, a folder that somebody removes: no further image is drawn, the GPU is freed, what is there counts."""
    saved = Image.Image.save
    calls = iter([saved, save])
    monkeypatch.setattr(Image.Image, "save", lambda *args, **kwargs: next(calls)(*args, **kwargs))
    assert batch.run() == 1 and len(batch.made) == 2 and batch.freed == 1
    out, err = capsys.readouterr()
    assert out == f"{kept} of 3 images are in out\n"
    assert re.search(r"failed: \w+: .* none$", err, re.M), "its error, in one line"
    assert not kept or len(batch.files()) == 1, "no half an image, no draft"


@OF_LUMINA2
def test_flash(batch, monkeypatch):
    """--attention reaches the transformer."""
    used = []
    monkeypatch.setattr(batch.tool, "find_flash_attention", lambda args: used.append)
    assert batch.run("--attention", "flash") == 0 and used == ["the transformer"]


@OF_LUMINA2
def test_flash_that_cannot_run(batch, monkeypatch, capsys):
    """Without flash-attn, or where it cannot be used: one line before loading."""
    from TeaCache4LuminaT2X.attention_lumina2 import use_flash_attention

    for installed, says in ((None, "pip install flash-attn"), (ModuleType("flash_attn"), "needs a CUDA GPU")):
        monkeypatch.setitem(sys.modules, "flash_attn", installed)
        assert batch.run("--attention", "flash") == 2 and not batch.made and not os.path.exists("out")
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error
    for device, dtype in (("cuda", "float32"), ("mps", "float16")):
        with pytest.raises(ValueError, match="bfloat16 or float16"):
            batch.tool.find_flash_attention(Namespace(device=device, dtype=dtype))
    assert batch.tool.find_flash_attention(Namespace(device="cuda:1", dtype="float16")) is use_flash_attention
