"""compare_lumina2.py: columns, strip, table, JSON file."""

import io
import json
import math
import re
import sys

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

    default = [(t, None, 30) for t in (0.0, 0.3)]
    assert columns() == [*default, (None, 15, 30), (None, 15, 15), (None, 10, 30)]
    assert columns("--num-inference-steps", "11")[2:] == [(None, 10, 11)], "those that fit"
    assert columns("--num-inference-steps", "10")[2:] == []
    assert columns("--computed-steps", "15", "15/30", "8/8")[2:] == [(None, 15, 30), (None, 8, 8)], "each once"
    assert build_parser().parse_args([]).prompts == [teacache_lumina2.PROMPT, "penguin with umbrella"]
    some = columns("--rel-l1-thresh", "0.2", "0", "0.2", "--computed-steps", "15", "15/100")
    assert some == [(0.0, None, 30), (0.2, None, 30), (None, 15, 30), (None, 15, 100)]
    assert columns("--rel-l1-thresh", "--computed-steps") == [(0.0, None, 30)]


@pytest.mark.parametrize("words", ["0", "31", "15/10", "15/", "/100", "-3", "x", "15/10/5", "2.5"])
def test_no_budget(words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--model", str(BUNDLED), f"--computed-steps={words}"])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.err.count("\n") == 1


def test_psnr():
    a = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    b = a + np.uint8(1)
    images = Image.fromarray(a), Image.fromarray(b)
    assert psnr(*images) == pytest.approx(20 * math.log10(255)) and psnr(images[0], images[0]) == math.inf


def entry(**more):
    plain = {"prompt": "fox", "rel_l1_thresh": None, "computed_steps": 15, "num_inference_steps": 30, "seconds": 1.0}
    return plain | {"computed": 15, "speedup": 2.0, "psnr": 31.25} | more


def test_captions():
    assert caption(entry()) == ("15 of 30 steps", "1.00 s, 2.00x", "15 computed", "PSNR 31.2 dB")
    assert caption(entry(computed_steps=30))[0] == "30 plain steps"
    assert caption(entry(rel_l1_thresh=0.2))[0] == "threshold 0.2"
    assert caption(entry(rel_l1_thresh=0.0, psnr=math.inf))[::3] == ("original", "")
    assert caption(entry(rel_l1_thresh=0.1, psnr=math.inf))[3] == "PSNR inf dB"


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (200, 320)])
def test_strip(size):
    """Each picture, enlarged if it is small, at its place, and text above and below."""
    rows = [
        [(Image.new("RGB", size, colour), entry(prompt="fox\n" * 300)) for colour in row]
        for row in (("red", "green"), ("blue", "yellow"))
    ]
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
    """The original is the plain pipeline's picture; figures of strip, table and JSON file are the same."""
    drawn, draw_strip = [], compare_lumina2.strip
    monkeypatch.setattr(compare_lumina2, "strip", lambda rows: drawn.append(rows) or draw_strip(rows))
    flags = ["--prompt", "red apple", "fox" * 30, "--rel-l1-thresh", "1e-9", "--computed-steps", "2", "3/5"]
    main([*FAST, *flags, "--repeats", "1", "--output", str(tmp_path / "strip.png")])
    saved, *lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "strip.json").read_text())
    runs = result["runs"]
    assert saved == f"saved {tmp_path / 'strip.png'} and {tmp_path / 'strip.json'}"
    assert [r["prompt"] for r in runs] == ["red apple"] * 4 + ["fox" * 30] * 4
    assert [r["computed"] for r in runs] == [4, runs[1]["computed"], 2, 3] + [4, runs[5]["computed"], 2, 3]
    assert [r["num_inference_steps"] for r in runs] == [4, 4, 4, 5] * 2
    assert runs[0]["psnr"] is None and all(0 < r["psnr"] < 60 for r in (*runs[2:4], *runs[6:]))
    for row in (runs[:4], runs[4:]):
        assert [r["speedup"] for r in row] == pytest.approx([row[0]["seconds"] / r["seconds"] for r in row])
    assert result["seed"] == teacache_lumina2.SEED
    assert {"model", "dtype", "machine", "torch", "diffusers", "guidance_scale"} <= result.keys()

    assert max(map(len, lines)) <= 80, "a terminal"
    assert lines[-2] == "lumina2-emoji, 128 x 128, float32, median of 1"
    for name in ("machine", "torch", "diffusers"):
        assert result[name] in lines[-1] and "\n".join(lines).count(result[name]) == 1
    table = [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("| ")]
    assert table[0] == table[5] == ["setting", "seconds", "speedup", "computed", "PSNR"] and len(table) == 10
    table = table[1:5] + table[6:]
    for cells, r in zip(table, runs):
        assert cells[1:4] == [f"{r['seconds']:.2f} s", f"{r['speedup']:.2f}x", str(r["computed"])]
        assert r["rel_l1_thresh"] != 0.0 or cells[::4] == ["original", ""]
        assert r["rel_l1_thresh"] is not None or cells[4] == f"{r['psnr']:.1f} dB"
    assert [cells[0] for cells in table[:4]] == ["original", "threshold 1e-09", "2 of 4 steps", "3 of 5 steps"]
    assert "red apple" in lines and "fox" * 25 + "f" in lines
    with Image.open(tmp_path / "strip.png") as page:
        assert page.width > 4 * 192 and page.height > 2 * 192

    flags = ["--prompt", "fox" * 30, "--rel-l1-thresh", "0", "--output", str(tmp_path / "alone.png")]
    teacache_lumina2.main([*FAST, *flags])
    with Image.open(tmp_path / "alone.png") as alone:
        assert levels(alone, drawn[-1][1][0][0]) <= 1


class Fake:
    """In place of the pipeline: keeps what its progress bars are called."""

    def __init__(self):
        self.bars = []

    def set_progress_bar_config(self, desc):
        self.bars.append(desc)


@pytest.fixture
def fake(monkeypatch):
    """Each image takes the next of `fake.seconds`, and has another colour; None: interrupted."""
    fake = Fake()

    def generate(pipeline, args):
        seconds = fake.seconds.pop(0)
        if seconds is None:
            raise KeyboardInterrupt
        return Image.new("RGB", (32, 32), (int(20 * seconds), 0, 0)), seconds, [True] * args.num_inference_steps

    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: fake)
    monkeypatch.setattr(teacache_lumina2, "generate", generate)
    return fake


def test_median_and_names_of_bars(fake, tmp_path, monkeypatch):
    """The median of three runs by default, the picture of the first."""
    fake.seconds = [9, 2, 7, 1, 5, 3, 1]
    kept = []
    monkeypatch.setattr(compare_lumina2, "write", lambda args, rows: kept.append([list(row) for row in rows]))
    main([*FAST, "--prompt", "fox", "--rel-l1-thresh", "--computed-steps", "4", "--output", str(tmp_path / "x.png")])
    runs = [f"run {i} of 3" for i in (1, 2, 3)]
    assert fake.bars == ["warm-up", *[f"{name}, {run}" for name in ("original", "4 plain steps") for run in runs]]
    assert [[len(row) for row in rows] for rows in kept] == [[1], [2]], "kept after each column"
    ((original, base), (image, entry)) = kept[-1][0]
    assert (base["seconds"], entry["seconds"], entry["speedup"]) == (2, 3, 2 / 3)
    assert original.getpixel((0, 0))[0] == 40 and image.getpixel((0, 0))[0] == 100


def test_an_interruption_keeps_the_columns_before(fake, tmp_path, monkeypatch):
    """Under the next free name; nothing else is left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacache_lumina2_compare.png").write_text("mine")
    fake.seconds = [9, 2, 4, None]
    with pytest.raises(KeyboardInterrupt):
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


@pytest.mark.parametrize("folder, name", [("2026-11-28T10:30", "x.png"), (".", "x" * 245 + ".png"), ("猫", "猫.webp")])
def test_names_of_files(fake, tmp_path, folder, name):
    (tmp_path / folder).mkdir(exist_ok=True)
    fake.seconds = [9, 2, 4, 1]
    main([*FAST, *FEW, "--prompt", "fox", "--output", str(tmp_path / folder / name)])
    assert len(list((tmp_path / folder).iterdir())) == 2


def test_a_terminal_without_the_letters_of_a_prompt(fake, tmp_path, monkeypatch):
    """Both files are there, and the table is printed, with question marks."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    fake.seconds = [9, 2, 4, 1]
    main([*FAST, *FEW, "--prompt", "红苹果", "--output", str(tmp_path / "x.png")])
    terminal.flush()
    out = terminal.buffer.getvalue().decode("cp1252")
    assert "\n???\n" in out.replace("\r", "") and "| original" in out
    assert {run["prompt"] for run in json.loads((tmp_path / "x.json").read_text("utf-8"))["runs"]} == {"红苹果"}
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
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
