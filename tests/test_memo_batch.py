"""The videos of batch_memo.py; and all three scripts, each copied away from the repository. Resuming: test_batch.py."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import MEMO_DOUBLE, ROOT, two_processes
from memo_models import REAL
from PIL import Image
from test_memo_cli import ARGUMENTS, BATCH, FRAMES, here, models, read, write_sound  # noqa: F401, fixtures among them

from TeaCache4Memo import batch_memo, teacache_memo

FLAGS = [*BATCH, "--rel_l1_thresh", "0.5"]
STEMS = ["face_speech", "other, one_speech", "face_long"]


@pytest.fixture
def pairs(here):  # noqa: F811
    noise = np.random.default_rng(1).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save("other, one.png")
    write_sound("long.wav", 3 * FRAMES)
    (here / "pairs.csv").write_text('face.png,speech.wav\n\n"other, one.png",speech.wav\nface.png, long.wav\n')
    return here


def videos(folder):
    """{stem without code: frames}; those of one stem must be one."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".mp4"))
    found = {name.rpartition("_")[0]: read(os.path.join(folder, name))[0] for name in names}
    assert len(found) == len(names) and len(os.listdir(folder)) == 2 * len(names), "and a JSON file for each"
    return found


def copy_scripts(*names):
    Path("scripts").mkdir()
    for name in names:
        shutil.copy(ROOT / "TeaCache4Memo" / name, "scripts")


def test_a_video_a_pair(pairs, capsys):
    """By one process and by two, as by a run for itself. What else the config holds is in the JSON files, as it is."""
    with open("config.yaml", "a") as config:
        config.write("tags: [a, b]\ngroup: {of: [1]}\nagain: ${fps}\n")
    with pytest.raises(SystemExit, match="False"):
        batch_memo.main([*FLAGS, "--output_dir", "one"])
    out, found = capsys.readouterr().out, videos("one")
    assert out.count("saved one/") == 3 and out.endswith("3 of 3 videos are in one\n")
    assert {stem: len(frames) for stem, frames in found.items()} == dict(zip(STEMS, (32, 32, 48)))
    records = [json.loads(path.read_text()) for path in Path("one").glob("*.json")]
    inputs = {("face.png", "speech.wav"), ("other, one.png", "speech.wav"), ("face.png", "long.wav")}
    assert {(record["image"], record["audio"]) for record in records} == inputs
    more = {"tags": ["a", "b"], "group": {"of": [1]}, "again": 30, "fps": 30}
    for record in records:
        assert record["setting"] == "rel_l1_thresh 0.5" and record["seed"] == 42
        assert more.items() <= record["config"].items()
    teacache_memo.main([*ARGUMENTS, *FLAGS[-2:], "--input_image", "other, one.png"])
    assert np.array_equal(read("outputs/other, one_speech.mp4")[0], found[STEMS[1]])

    if REAL:  # its utils need models from the Hub
        return
    copy_scripts("teacache_memo.py", "batch_memo.py")
    two = two_processes("scripts/batch_memo.py", *FLAGS, "--output_dir", "two", PYTHONPATH=str(MEMO_DOUBLE))
    assert two.returncode == 0 and two.stdout.count("3 of 3 videos are in two") == 1, two.stderr
    by_two = videos("two")
    assert set(by_two) == set(STEMS) and two.stdout.count("saved two/") == 3, "each makes its share"
    assert all(np.abs(found[stem].astype(int) - by_two[stem]).max() <= 4 for stem in STEMS), "other rounding, then h264"


def test_the_scripts_alone(here, monkeypatch):  # noqa: F811
    """`python scripts/compare_memo.py` beside teacache_memo.py, and that one by itself, where this repository is unknown."""
    copy_scripts("teacache_memo.py", "compare_memo.py")
    for name in [name for name in sys.modules if name.split(".")[0] == "TeaCache4Memo"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.syspath_prepend("scripts")
    for name, flags in [
        ("teacache_memo.py", ["--rel_l1_thresh", "9"]),
        ("compare_memo.py", ["--rel_l1_thresh", "--computed_steps", "2"]),
    ]:
        monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS, *flags])
        runpy.run_path(f"scripts/{name}", run_name="__main__")
    monkeypatch.delitem(sys.modules, "teacache_memo")
    runs = json.loads(Path("outputs/face_speech_compare.json").read_text())["runs"]
    assert len(read("outputs/face_speech.mp4")[0]) == 2 * FRAMES and runs[1]["computed"] == 4
