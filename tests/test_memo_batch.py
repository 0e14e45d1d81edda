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
from test_memo_cli import ARGUMENTS, BATCH, FRAMES, here, models, quick, read, write_sound  # noqa: F401, fixtures among them

from TeaCache4Memo import batch_memo, compare_memo, teacache_memo

FLAGS = [*BATCH, "--rel_l1_thresh", "0.5"]
STEMS = ["face_speech", "other, one_speech", "face_long"]


@pytest.fixture
def pairs(here):  # noqa: F811
    noise = np.random.default_rng(1).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save("other, one.png")
    write_sound("long.wav", 3 * FRAMES)
    (here / "pairs.csv").write_text('face.png,speech.wav\n\n"other, one.png",speech.wav\nface.png, long.wav\n')
    return here


def make(*flags):
    """The exit code."""
    with pytest.raises(SystemExit) as exit:
        batch_memo.main([*FLAGS, *flags])
    return int(exit.value.code)


def videos(folder="outputs"):
    """{stem without code: frames}; those of one stem must be one."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".mp4") and name[0] != ".")
    found = {name.rpartition("_")[0]: read(os.path.join(folder, name))[0] for name in names}
    assert len(found) == len(names)
    return found


def test_a_video_a_pair(pairs, capsys):
    assert make() == 0
    out = capsys.readouterr().out
    assert out.count("saved outputs/") == 3 and out.endswith("3 of 3 videos are in outputs\n")
    found = videos()
    assert {stem: len(frames) for stem, frames in found.items()} == dict(zip(STEMS, (32, 32, 48)))
    assert len(os.listdir("outputs")) == 6
    records = [json.loads(path.read_text()) for path in (pairs / "outputs").glob("*.json")]
    assert {(r["image"], r["audio"]) for r in records} == {
        ("face.png", "speech.wav"),
        ("other, one.png", "speech.wav"),
        ("face.png", "long.wav"),
    }
    assert all(r["setting"] == "rel_l1_thresh 0.5" and r["seed"] == 42 and r["config"]["fps"] == 30 for r in records)
    teacache_memo.main([*ARGUMENTS, *FLAGS[-2:], "--input_image", "other, one.png"])
    assert np.array_equal(read("outputs/other, one_speech.mp4")[0], found[STEMS[1]]), "as a run by itself"


def test_a_config_that_holds_more(pairs, quick):  # noqa: F811
    """A list and a group: in the JSON as they are."""
    text, more = Path("config.yaml").read_text(), {"tags": ["a", "b"], "group": {"of": [1]}, "again": 30}
    Path("config.yaml").write_text(text + "tags: [a, b]\ngroup: {of: [1]}\nagain: ${fps}\n")
    assert make() == 0
    compare_memo.main([*ARGUMENTS, "--rel_l1_thresh", "--computed_steps", "2"])
    records = [json.loads(path.read_text()) for path in Path("outputs").glob("*.json")]
    assert len(records) == 4 and all(more.items() <= record["config"].items() for record in records)


# --- away from the repository ------------------------------------------------------------------------

ALONE = pytest.mark.skipif(REAL, reason="the saved models are the real memo's, and its utils need models from the Hub")


def copy_scripts(*names):
    Path("scripts").mkdir()
    for name in names:
        shutil.copy(ROOT / "TeaCache4Memo" / name, "scripts")


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


@ALONE
def test_two_processes_make_what_one_makes(pairs):
    copy_scripts("teacache_memo.py", "batch_memo.py")
    two = two_processes("scripts/batch_memo.py", *FLAGS, "--output_dir", "two", PYTHONPATH=str(MEMO_DOUBLE))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("3 of 3 videos are in two") == 1
    assert make("--output_dir", "one") == 0
    a, b = videos("one"), videos("two")
    assert set(a) == set(b) == set(STEMS)
    assert all(np.abs(a[name].astype(int) - b[name]).max() <= 4 for name in STEMS), "other rounding, then h264"
