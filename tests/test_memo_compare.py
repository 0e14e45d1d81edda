"""compare_memo.py: settings, timing, panels, what is kept; with tiny random models."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_memo_cli import ARGUMENTS, FPS, FRAMES, STEPS, here, models, quick, read, refused  # noqa: F401, fixtures among them

from TeaCache4Memo import compare_memo, teacache_memo


def run(*more):
    compare_memo.main([*ARGUMENTS, *map(str, more)])


def test_compare(here, capsys, monkeypatch):  # noqa: F811
    """The original, a threshold and a budget, after a warm-up of one clip."""
    calls, generate_all = [], compare_memo.generate_all

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return generate_all(*args, **kwargs)

    monkeypatch.setattr(compare_memo, "generate_all", recorded)
    run("--rel_l1_thresh", 9, 0, 9, "--computed_steps", "0,1,5", 3, 3, "--output_dir", "o")
    settings = [{"rel_l1_thresh": 0.0}, {"rel_l1_thresh": 9.0}, {"computed_steps": [0, 1, 5]}, {"computed_steps": 3}]
    assert calls == [{"rel_l1_thresh": 0.0, "clips": 1, "progress": False}, *settings]
    frames, fps, sound = read("o/face_speech_compare.mp4")
    assert len(frames) == 32 and fps == FPS and sound == "aac"
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0 and frames.shape[2] >= 3 * 192
    out, err = capsys.readouterr()
    rows = re.findall(r"^\| (.+?) \| [\d.]+ s \| ([\d.]+)x \| (\d+) of 12 steps \| (.*) \|$", out, re.M)
    assert "threshold 9:\nclip 1 of 2" in err and "3 steps a clip:\nclip 1 of 2" in err, "they are named"
    named = [("original", "12"), ("threshold 9", "4"), ("3 chosen steps", "6"), ("3 steps a clip", "6")]
    assert [(row[0], row[2]) for row in rows] == named and rows[0][3] == ""
    last = json.loads(Path("o/face_speech_compare.json").read_text())
    base, *others = last["runs"]
    assert base["speedup"] == 1 and base["psnr"] is None and last["config"]["inference_steps"] == STEPS
    for entry, row, setting in zip(last["runs"], rows, settings):
        assert setting.items() <= entry.items() and row[1] == f"{entry['speedup']:.2f}"
        assert entry["speedup"] == base["seconds"] / entry["seconds"]
    assert all(row[3] == f"{entry['psnr']:.1f} dB" for row, entry in zip(rows[1:], others))
    assert "- original: 0,1,2,3,4,5\n- threshold 9: 0,5\n- 3 chosen steps: 0,1,5\n- 3 steps a clip: 0," in out
    assert last["runs"][2]["computed_in_first_clip"] == [0, 1, 5]
    assert {"machine", "torch", "diffusers"} <= last.keys() and last["seed"] == teacache_memo.SEED
    assert all(last[name] in out.splitlines()[-1] for name in ("machine", "torch", "diffusers")), "once, below"
    assert max(map(len, out.splitlines()[:-1])) <= 80


def test_the_settings_of_the_panels():
    *thresholds, half = compare_memo.list_settings(None, None, STEPS)
    assert thresholds == [{"rel_l1_thresh": threshold} for threshold in (0.0, 0.09, 0.15, 0.25)]
    assert half == {"computed_steps": STEPS // 2}
    original, *budgets = compare_memo.list_settings([], [4, 2], STEPS)
    assert original == {"rel_l1_thresh": 0.0} and budgets == [{"computed_steps": 4}, {"computed_steps": 2}]


QUICK = "--rel_l1_thresh", "--computed_steps", 2  # no threshold: the original and two steps


def test_compare_twice(here, quick):  # noqa: F811
    """Both files take the next free number, beside a video of the same inputs; in a folder that looks like a protocol."""
    Path("10:30").mkdir()
    Path("10:30/face_speech.mp4").touch()
    run(*QUICK, "--output_dir", "10:30")
    run(*QUICK, "--output_dir", "10:30")
    names = {f"face_speech_compare{number}.{kind}" for number in ("", "_2") for kind in ("json", "mp4")}
    assert set(os.listdir("10:30")) == names | {"face_speech.mp4"}


def test_what_was_measured_is_kept(here, quick, capsys, monkeypatch):  # noqa: F811
    """Where the disk is full when the video is written; and where Ctrl-C ends it after the original."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="error: .*No space left"):
        patch.setattr(teacache_memo, "write_video", full)
        run(*QUICK, "--output_dir", "o")
    assert len(json.loads(Path("o/face_speech_compare.json").read_text())["runs"]) == 2
    generate_all, calls = compare_memo.generate_all, []

    def interrupted(*args, **more):
        calls.append(more)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return generate_all(*args, **more)

    monkeypatch.setattr(compare_memo, "generate_all", interrupted)
    run(*QUICK)
    assert capsys.readouterr().err.endswith("interrupted: what was made is kept\n")
    assert len(json.loads(Path("outputs/face_speech_compare.json").read_text())["runs"]) == 1
    assert len(read("outputs/face_speech_compare.mp4")[0]) == 2 * FRAMES
    calls[:] = [0] * 3
    with pytest.raises(SystemExit, match="^interrupted$"):
        run(*QUICK)


def test_the_median_of_several_runs(monkeypatch):
    """One of each in turn; and the video of the first."""
    seconds = iter([99.0, 4.0, 2.0, 9.0, 1.0, 5.0, 3.0])  # the warm-up, then the original and the threshold in turn

    def generate_all(*args, **kwargs):
        took = next(seconds)
        return np.full((2, 8, 8, 3), int(took), np.uint8), took, [True] * 4

    monkeypatch.setattr(compare_memo, "generate_all", generate_all)
    parts = None, None, None, SimpleNamespace(inference_steps=2), 0
    videos, entries = compare_memo.compare(parts, compare_memo.list_settings([9.0], [], 4), repeats=3)
    assert [entry["seconds"] for entry in entries] == [5.0, 2.0] and entries[1]["speedup"] == 2.5
    assert [video.max() for video in videos] == [4, 2] and next(seconds, None) is None
    assert [entry["computed_in_first_clip"] for entry in entries] == [[0, 1]] * 2


@pytest.mark.parametrize(
    "flags", [["--rel_l1_thresh", "0.1", "inf"], ["--computed_steps", "3", "1"], ["--repeats", "0"]], ids=str
)
def test_each_panel_is_checked(here, capfd, flags):  # noqa: F811
    assert flags[0].strip("-") in refused(capfd, *flags, tool=compare_memo)


def test_panels_show_the_videos():
    videos = [np.full((2, 8, 10, 3), value, np.uint8) for value in (10, 200)]
    entry = {"rel_l1_thresh": 0.15, "seconds": 1.0, "speedup": 2.0, "computed": 2, "steps": 4, "psnr": 30.0}
    pages = list(compare_memo.panels(videos, [entry, entry]))
    assert len(pages) == 2 and pages[1].dtype == np.uint8
    for page in pages:
        assert page.shape[0] % 2 == page.shape[1] % 2 == 0
        for left, value in ((8, 10), (8 + 216, 200)):  # enlarged twenty times, to 200 pixels
            assert (page[8:168, left : left + 200] == value).all() and (page[:168, left - 8 : left] == 255).all()
            assert (page[168:, left : left + 200].min(axis=2) < 100).any(), "a label under it"


def test_psnr():
    video = np.zeros((2, 4, 4, 3), np.uint8)
    assert compare_memo.psnr(video, video) == float("inf")
    assert compare_memo.psnr(video + np.uint8(51), video) == pytest.approx(20 * np.log10(5))
    half = np.concatenate([video[:1], video[1:] + np.uint8(51)])
    assert compare_memo.psnr(half, video) == pytest.approx(10 * np.log10(50))
