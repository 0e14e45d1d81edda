"""Many portraits and voices: batch_memo.py; and all three scripts, each copied away from the repository."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import MEMO_DOUBLE, ROOT, two_processes
from memo_models import REAL
from PIL import Image
from test_memo_cli import ARGUMENTS, FRAMES, here, models, read, write_sound  # noqa: F401, fixtures among them

from TeaCache4Memo import batch_memo, teacache_memo

FLAGS = ["pairs.csv", *ARGUMENTS, "--rel_l1_thresh", "0.5"]
FILES = ["0001-face-speech.mp4", "0002-other, one-speech.mp4", "0003-face-long.mp4"]


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
    return {name: read(os.path.join(folder, name))[0] for name in sorted(os.listdir(folder)) if name.endswith(".mp4")}


def test_a_video_a_pair(pairs, capsys):
    assert make() == 0
    assert sorted(os.listdir("outputs")) == sorted(FILES + [name.replace(".mp4", ".json") for name in FILES])
    assert capsys.readouterr().out == "3 of 3 videos are in outputs\n"
    found = videos()
    assert [len(found[name]) for name in FILES] == [2 * FRAMES, 2 * FRAMES, 3 * FRAMES]
    records = [json.loads((pairs / "outputs" / name).with_suffix(".json").read_text()) for name in FILES]
    assert [(r["image"], r["audio"], r["seed"]) for r in records] == [
        ("face.png", "speech.wav", 42),
        ("other, one.png", "speech.wav", 43),
        ("face.png", "long.wav", 44),
    ]
    assert all(r["rel_l1_thresh"] == 0.5 and r["computed_steps"] is None and r["config"]["fps"] == 30 for r in records)
    teacache_memo.main([*FLAGS[1:], "--input_image", "other, one.png", "--seed", "43"])
    assert np.array_equal(read("outputs/other, one_speech.mp4")[0], found[FILES[1]]), "as a run by itself"


def test_going_on(pairs, capsys, monkeypatch):
    """A pair that fails is reported and made by the next run; what is there is not made again, nor with other settings."""
    generate, made = teacache_memo.generate, []

    def fails_once(*args, **kwargs):
        made.append(args[4])
        if made.count(43) == 1 and args[4] == 43:
            raise RuntimeError("something in memo")
        return generate(*args, **kwargs)

    monkeypatch.setattr(teacache_memo, "generate", fails_once)
    assert make() == 1
    out, err = capsys.readouterr()
    assert out == "2 of 3 videos are in outputs\n" and f"{FILES[1]} failed: RuntimeError: something in memo" in err
    assert sorted(videos()) == [FILES[0], FILES[2]]
    assert make() == 0 and made == [42, 43, 44, 43]
    assert sorted(videos()) == FILES
    capsys.readouterr()
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    assert make() == 0 and capsys.readouterr().out == "3 of 3 videos are in outputs\n"
    for flags, named in [
        (["--seed", "1"], "seed"),
        (["--rel_l1_thresh", "0.1"], "rel_l1_thresh"),
    ]:
        assert make(*flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"outputs/{FILES[0]} exists with different {named}: move it" in line
    (pairs / "config.yaml").write_text((pairs / "config.yaml").read_text().replace("fps: 30", "fps: 25"))
    assert make() == 2 and "different config:" in capsys.readouterr().err
    (pairs / "outputs" / FILES[0]).with_suffix(".json").unlink()
    assert make() == 2 and "exists with different image, audio, seed" in capsys.readouterr().err


def test_a_portrait_without_a_face_and_a_full_disk(pairs, capsys, monkeypatch):
    """No draft stays."""
    paths = []

    def full(clips, path, *args):
        assert path.with_suffix(".json").is_file() and next(clips).shape == (FRAMES, 16, 16, 3)
        paths.append(path)
        raise OSError(28, "No space left on device")

    Image.new("RGB", (20, 20), "white").save("face.png")
    monkeypatch.setattr(teacache_memo, "write_video", full)
    assert make() == 1
    out, err = capsys.readouterr()
    assert out.startswith("0 of 3") and f"{FILES[0]} failed: ValueError: no face found in face.png" in err
    assert f"{FILES[1]} failed: OSError: [Errno 28] No space left" in err and len(paths) == 1
    assert not os.listdir("outputs")


@pytest.mark.parametrize(
    "text, says",
    [
        ("face.png", "pairs.csv, line 1: face.png must be image,audio with one comma"),
        ("face.png;speech.wav", "pairs.csv, line 1: face.png;speech.wav must be image,audio with one comma"),
        ("\n \nface.png,speech.wav\n,\n\nface.png,speech.wav,more", "line 6: face.png,speech.wav,more must be image,"),
        ("\nnone.png,speech.wav", "pairs.csv, line 2: there is no file none.png"),
        ("face.png,none.wav", "pairs.csv, line 1: there is no file none.wav"),
        ("face.png,speech.wav".encode("utf-16"), "pairs.csv is not UTF-8"),
        ("x" * 200_000, "field limit"),
        ("", "pairs.csv is empty"),
        (None, "pairs.csv"),
    ],
)
def test_bad_pairs(pairs, capsys, monkeypatch, text, says):
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    if text is None:
        (pairs / "pairs.csv").unlink()
    else:
        (pairs / "pairs.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert make() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err and not os.listdir("outputs")


def test_empty_lines_change_nothing(pairs):
    """Neither the names nor the seeds."""
    jobs = batch_memo.parse_args(FLAGS).jobs
    text = (pairs / "pairs.csv").read_text()
    (pairs / "pairs.csv").write_text(f"\n\n{text}".replace("face.png, long", "\n \nface.png, long"))
    assert batch_memo.parse_args(FLAGS).jobs == jobs and [job["seed"] for _, job in jobs] == [42, 43, 44]


@pytest.mark.parametrize("case", ["no default files", "a video of the default files"])
def test_the_default_files_do_not_matter(pairs, case):
    flags = FLAGS[:3]
    if case == "a video of the default files":
        flags = FLAGS
        (pairs / "outputs").mkdir()
        (pairs / "outputs" / "face_speech.mp4").touch()
    assert len(batch_memo.parse_args(flags).jobs) == 3


# --- away from the repository ------------------------------------------------------------------------

ALONE = pytest.mark.skipif(REAL, reason="the saved models are the real memo's, and its utils need models from the Hub")


@pytest.fixture
def alone(pairs, monkeypatch):
    """Runs a script that lies alone in a folder, with teacache_memo.py beside it, in a process of its own."""

    def run(name, *flags):
        (pairs / "scripts").mkdir()
        for script in {"teacache_memo.py", name}:
            shutil.copy(ROOT / "TeaCache4Memo" / script, pairs / "scripts")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(MEMO_DOUBLE)}
        command = [sys.executable, f"scripts/{name}", *ARGUMENTS, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@ALONE
def test_the_script_alone(alone):
    assert "4 of 12 steps computed" in alone("teacache_memo.py", "--rel_l1_thresh", "9")
    assert len(read("outputs/face_speech.mp4")[0]) == 2 * FRAMES


@ALONE
def test_compare_alone(alone):
    alone("compare_memo.py", "--rel_l1_thresh", "--computed_steps", "2")
    with open("outputs/face_speech_compare.json") as file:
        assert [run["computed"] for run in json.load(file)["runs"]] == [12, 4]
    assert len(read("outputs/face_speech_compare.mp4")[0]) == 2 * FRAMES


@ALONE
def test_two_processes_make_what_one_makes(pairs):
    (pairs / "scripts").mkdir()
    for script in ("teacache_memo.py", "batch_memo.py"):
        shutil.copy(ROOT / "TeaCache4Memo" / script, pairs / "scripts")
    two = two_processes("scripts/batch_memo.py", *FLAGS, "--output_dir", "two", PYTHONPATH=str(MEMO_DOUBLE))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("3 of 3 videos are in two") == 1
    assert make("--output_dir", "one") == 0
    a, b = videos("one"), videos("two")
    assert list(a) == list(b) == FILES and all(np.array_equal(a[name], b[name]) for name in FILES)
