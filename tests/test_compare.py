"""compare_lumina2.py: columns, strip, table, JSON file."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import BUNDLED, levels
from PIL import Image

from TeaCache4LuminaT2X import compare_lumina2, teacache_lumina2
from TeaCache4LuminaT2X.compare_lumina2 import build_parser, caption, find_columns, main, psnr, strip

FAST = ["--model", str(BUNDLED), "--num-inference-steps", "4"]
FEW = ["--repeats", "1", "--rel-l1-thresh", "--computed-steps", "3"]


def test_columns():
    """The original first, once; then thresholds, budgets (of more steps where that is asked for)."""

    def columns(*flags):
        found = find_columns(build_parser().parse_args(flags))
        return [(c["rel_l1_thresh"], c["computed_steps"], c["num_inference_steps"]) for c in found]

    default = [(t, None, 30) for t in (0.0, teacache_lumina2.REL_L1_THRESH)]
    assert columns() == [*default, (None, 15, 30), (None, 15, 15), (None, 10, 30), (None, 8, 30)]
    assert columns("--num-inference-steps", "10")[2:] == [(None, 8, 10)], "those that fit"
    assert columns("--computed-steps", "15", "15/30", "8/8")[2:] == [(None, 15, 30), (None, 8, 8)], "each once"
    lists = columns("--computed-steps", "0,9,29", "0,9,29/30", "0,3/4")[2:]
    assert lists == [(None, [0, 9, 29], 30), (None, [0, 3], 4)]
    some = columns("--rel-l1-thresh", "0.2", "0", "0.2", "--computed-steps", "15", "15/100")
    assert some == [(0.0, None, 30), (0.2, None, 30), (None, 15, 30), (None, 15, 100)]
    assert columns("--rel-l1-thresh", "--computed-steps") == [(0.0, None, 30)]


def test_psnr():
    a = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    b = a + np.uint8(1)
    images = Image.fromarray(a), Image.fromarray(b)
    assert psnr(*images) == pytest.approx(20 * math.log10(255)) and psnr(images[0], images[0]) == math.inf


def entry(**more):
    plain = {"prompt": "fox", "rel_l1_thresh": None, "computed_steps": 15, "num_inference_steps": 30, "seconds": 1.0}
    return plain | {"computed": 15, "speedup": 2.0, "psnr": 31.25} | more


def test_captions():
    """No seconds: they depend on the machine. Of a list the first steps."""
    assert caption(entry()) == ("15 of 30 steps", "15 computed", "PSNR 31.2 dB")
    assert caption(entry(computed_steps=30))[0] == "30 steps, no cache"
    assert caption(entry(computed_steps=[0, 9, 15, 29]))[0] == "4 of 30: 0,9,15,.."
    original = entry(rel_l1_thresh=0.0, computed_steps=None, psnr=math.inf)
    assert caption(original)[::2] == ("original", "PSNR is against this")
    assert caption(original | {"rel_l1_thresh": 0.1})[::2] == ("threshold 0.1", "PSNR inf dB")


@pytest.mark.parametrize("size", [(96, 64), (200, 320)])
def test_strip(size):
    """Each picture, enlarged if it is small, at its place, and text above and below."""
    colours, about = (("red", "green"), ("blue", "yellow")), entry(prompt="fox\n" * 300)
    rows = [[(Image.new("RGB", size, colour), about) for colour in row] for row in colours]
    page = strip(rows)
    pixels, wide, high = np.asarray(page).astype(int), page.width // 2, page.height // 2
    for r, row in enumerate(rows):
        for c, (image, _) in enumerate(row):
            cell, colour = pixels[r * high : (r + 1) * high, c * wide : (c + 1) * wide], image.getpixel((0, 0))
            ys, xs = np.nonzero((cell == colour).all(-1))
            assert np.ptp(xs) + 1 == max(size[0], 192)
            assert np.ptp(ys) + 1 == round(size[1] * max(size[0], 192) / size[0])
            assert (cell[ys.max() + 1 :] < 100).all(-1).any(), "text below"


def test_command(tmp_path, capsys, monkeypatch):
    """The original is the plain pipeline's picture; figures of table and JSON file are the same, lists can be pasted."""
    drawn, draw_strip = [], compare_lumina2.strip
    monkeypatch.setattr(compare_lumina2, "strip", lambda rows: drawn.append(rows) or draw_strip(rows))
    monkeypatch.setattr(teacache_lumina2.TeaCacheState, "decided", 0.534, raising=False)
    flags = ["--prompt", "red apple", "fox" * 30, "--rel-l1-thresh", "1e-9", "--computed-steps", "2", "3/5", "0,2,3"]
    main([*FAST, *flags, "--repeats", "1", "--output", str(tmp_path / "strip.png")])
    saved, *lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "strip.json").read_text())
    runs = result["runs"]
    assert saved == f"saved {tmp_path / 'strip.png'} and {tmp_path / 'strip.json'}"
    assert [r["prompt"] for r in runs] == ["red apple"] * 5 + ["fox" * 30] * 5
    assert [r["computed"] for r in runs] == [4, runs[1]["computed"], 2, 3, 3] + [4, runs[6]["computed"], 2, 3, 3]
    assert [r["num_inference_steps"] for r in runs] == [4, 4, 4, 5, 4] * 2
    assert runs[0]["psnr"] is None and all(0 < r["psnr"] < 60 for r in runs if r["computed_steps"])
    assert [r["steps"] for r in runs[2:5]] == ["0,3", runs[3]["steps"], "0,2,3"]
    for row in (runs[:5], runs[5:]):
        assert [r["speedup"] for r in row] == pytest.approx([row[0]["seconds"] / r["seconds"] for r in row])
    assert {"seed", "model", "dtype", "machine", "torch", "diffusers", "guidance_scale"} <= result.keys()

    assert max(map(len, lines)) <= 80, "a terminal"
    assert lines[-2] == "lumina2-emoji, 128 x 128, float32, median of 1"
    for name in ("machine", "torch", "diffusers"):
        assert result[name] in lines[-1] and "\n".join(lines).count(result[name]) == 1
    table = [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("| ")]
    assert table[0] == table[6] == ["setting", "seconds", "speedup", "computed", "PSNR against original"]
    table = table[1:6] + table[7:]
    for cells, r in zip(table, runs):
        quality = "" if r["rel_l1_thresh"] == 0 else "inf dB" if r["psnr"] is None else f"{r['psnr']:.1f} dB"
        assert cells[1:] == [f"{r['seconds']:.2f} s", f"{r['speedup']:.2f}x", str(r["computed"]), quality]
    names = ["original", "threshold 1e-09", "2 of 4 steps", "3 of 5 steps", "3 of 4: 0,2,3,.."]
    assert [cells[0] for cells in table[:5]] == names
    measured = [line for line in lines if line.startswith("- 2 of 4 steps: 0,3  (measured at the first step: 0.")]
    assert len(set(measured)) == 2, "for each prompt"
    assert "red apple" in lines and "fox" * 25 + "f" in lines

    flags = ["--prompt", "fox" * 30, "--rel-l1-thresh", "0", "--output", str(tmp_path / "alone.png")]
    teacache_lumina2.main([*FAST, *flags])
    with Image.open(tmp_path / "alone.png") as alone:
        assert levels(alone, drawn[-1][1][0][0]) <= 1


@pytest.fixture
def fake(monkeypatch):
    """In place of the pipeline. Each image takes the next of `seconds`, and has another colour; None: interrupted."""
    fake = SimpleNamespace(bars=[], limits=[], transformer=SimpleNamespace(teacache=None))
    fake.set_progress_bar_config = lambda desc: fake.bars.append(desc)

    def generate(pipeline, args):
        seconds = fake.seconds.pop(0)
        if seconds is None:
            raise KeyboardInterrupt
        fake.limits.append((args.rel_l1_thresh, args.computed_steps))
        return Image.new("RGB", (32, 32), (int(20 * seconds), 0, 0)), seconds, [True] * args.num_inference_steps

    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: fake)
    monkeypatch.setattr(teacache_lumina2, "generate", generate)
    return fake


def test_columns_take_turns(fake, tmp_path, monkeypatch):
    """Three times by default; seconds and speedup are the medians, the picture is the first. Kept after each picture and each turn."""
    fake.seconds = [9, 2, 1, 7, 5, 1, 3]
    kept = []
    keep = lambda args, rows: kept.append([[dict(entry) for _, entry in row] for row in rows])  # noqa: E731
    monkeypatch.setattr(compare_lumina2, "write", keep)
    monkeypatch.setattr(teacache_lumina2, "COMPUTED_STEPS", 3)  # not for the original
    main([*FAST, "--prompt", "fox", "--rel-l1-thresh", "--computed-steps", "4", "--output", str(tmp_path / "x.png")])
    turns = [f"{name}, run {i} of 3" for i in (1, 2, 3) for name in ("original", "4 steps, no cache")]
    assert fake.bars == ["warm-up", *turns]
    assert [[len(row) for row in rows] for rows in kept] == [[1], [2], [2], [2]]
    ((base, entry),) = kept[-1]
    assert (base["seconds"], entry["seconds"], entry["speedup"]) == (2, 3, 7 / 5)
    assert fake.limits == [(0.0, None)] * 7


def test_an_interruption_keeps_the_columns_before(fake, tmp_path, monkeypatch):
    """Under the next free name; nothing else is left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacache_lumina2_compare.png").write_text("mine")
    fake.seconds = [9, 2, 4, None]
    with pytest.raises(SystemExit):
        main([*FAST, "--repeats", "1", "--rel-l1-thresh", "--computed-steps", "4", "3"])
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"teacache_lumina2_compare{end}" for end in (".png", "_2.json", "_2.png")]
    assert (tmp_path / left[0]).read_text() == "mine"
    assert [run["seconds"] for run in json.loads((tmp_path / left[1]).read_text())["runs"]] == [2, 4]
    with Image.open(tmp_path / left[2]) as page:
        assert page.width > 2 * 192


def test_a_full_disk_keeps_the_columns_before(fake, tmp_path, monkeypatch, capsys):
    """One line; what was written before is there as it was."""
    save, saved = Image.Image.save, []

    def full(self, path, **_):
        saved.append(path)
        save(self, path) if len(saved) == 1 else path.write_bytes(b"half")
        if len(saved) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    fake.seconds = [9, 2, 4]
    with pytest.raises(SystemExit):
        main([*FAST, *FEW, "--prompt", "fox", "--output", str(tmp_path / "x.png")])
    assert "error: OSError: [Errno 28] No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png"]
    assert [run["seconds"] for run in json.loads((tmp_path / "x.json").read_text())["runs"]] == [2]
    with Image.open(tmp_path / "x.png") as page:
        page.load()


@pytest.mark.parametrize("name, prompts", [("x.webp", 54), ("x.JPG", 216)])
def test_a_strip_that_its_format_does_not_hold(fake, tmp_path, capsys, name, prompts):
    """Said before the first row is drawn; a .png takes it."""
    fake.seconds = [9, 1]
    flags = [*FAST, "--repeats", "1", "--rel-l1-thresh", "--computed-steps", "--prompt", *"x" * prompts]
    with pytest.raises(SystemExit):
        main([*flags, "--output", str(tmp_path / name)])
    assert "so it must be a .png" in capsys.readouterr().err and fake.seconds == [1]
    assert not list(tmp_path.iterdir())
    args = SimpleNamespace(columns=[1], prompts="x" * (prompts - 1), output=tmp_path / name)
    compare_lumina2.check_size(args, Image.new("RGB", (32, 32)))


NO_BUDGETS = "31 15/10 15/ /100 -3 x 15/10/5 2.5 0,9 0,9,29/31 0,,29".split()


@pytest.mark.parametrize(
    "flags, says",
    [
        *(([f"--computed-steps={words}"], "computed") for words in NO_BUDGETS),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--rel-l1-thresh", "0.1", "nan"], "rel_l1_thresh must be"),
        (["--height", "100"], "must be multiples of 16"),
        (["--output", "x.png"], "File exists: 'x.json'"),
        (["--output", "none/y.png"], "No such file or directory: 'none/y.png'"),
        (["--output", "x" * 251 + ".png"], "File name too long"),  # of .json
        (["--output", "y.json"], "must end in .png"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    (tmp_path / "x.json").write_text("mine")
    with pytest.raises(SystemExit) as exit:
        main([*FAST, *flags])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and says in error
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
