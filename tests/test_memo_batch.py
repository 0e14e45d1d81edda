"""Many portraits and voices: what batch_memo.py adds to the text that both models' batches share."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import MEMO_DOUBLE, ROOT, two_processes
from PIL import Image
from test_memo_cli import FRAMES, REAL, here, models, read, verbosity, write_sound  # noqa: F401, fixtures among them

from TeaCache4Memo import teacache_memo

SCRIPT = ROOT / "TeaCache4Memo" / "teacache_memo.py"
FLAGS = ["--config", "config.yaml", "--pairs", "pairs.csv", "--rel_l1_thresh", "0.5"]
FILES = ["0001-face-speech.mp4", "0002-other-one-speech.mp4", "0003-face-long.mp4"]


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
        teacache_memo.main([*FLAGS, *flags])
    return exit.value.code


def records(folder="outputs"):
    with open(os.path.join(folder, "videos.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def videos(folder="outputs"):
    return {name: read(os.path.join(folder, name))[0] for name in sorted(os.listdir(folder)) if name.endswith(".mp4")}


def test_a_video_a_pair(pairs, capsys):
    assert make() == 0
    assert sorted(os.listdir("outputs")) == [*FILES, "videos.jsonl"]
    out, err = capsys.readouterr()
    assert out == "3 of 3 are in outputs\n" and "3/3" in err and "video" in err
    assert [(r["file"], r["seed"], r["frames"]) for r in records()] == list(
        zip(FILES, range(42, 45), (2 * FRAMES, 2 * FRAMES, 3 * FRAMES))
    )
    assert all(0 < r["computed"] <= r["steps"] and r["rel_l1_thresh"] == 0.5 for r in records())
    teacache_memo.main(
        [*FLAGS[:2], *FLAGS[4:], "--input_image", "other, one.png", "--input_audio", "speech.wav", "--seed", "43"]
    )
    alone = read("outputs/other, one_speech.mp4")[0]
    assert np.array_equal(alone, videos()[FILES[1]]), "as a run by itself"


def test_going_on(pairs, capsys, monkeypatch):
    generate, made = teacache_memo.generate, []

    def fails_once(*args, **kwargs):
        made.append(args[4])
        if made.count(43) == 1 and args[4] == 43:
            raise RuntimeError("something\nin memo")
        return generate(*args, **kwargs)

    monkeypatch.setattr(teacache_memo, "generate", fails_once)
    assert make() == 1
    out, err = capsys.readouterr()
    assert "2 of 3 are in outputs; 1 failed" in out
    assert [line for line in err.splitlines() if f"{FILES[1]} failed: RuntimeError: something" in line]
    assert make() == 0 and made == [42, 43, 44, 43], "what is there is not made again"
    assert list(videos()) == FILES and sorted(r["file"] for r in records()) == FILES
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    assert make() == 0
    assert make("--seed", "1") == 2 and "another seed" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "line, says",
    [
        ("face.png", "is not image,audio"),
        ("face.png,speech.wav,more", "is not image,audio"),
        ("none.png,speech.wav", "no file none.png"),
        ("speech.wav,speech.wav", "not an image"),
        ("", "nothing stands in pairs.csv"),
    ],
)
def test_bad_pairs(pairs, capsys, monkeypatch, line, says):
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    (pairs / "pairs.csv").write_text(line)
    assert make() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err and not os.path.exists("outputs")


def test_pairs_and_compare(pairs, capsys):
    for flags in (["--compare", "0.1"], ["--overwrite"], ["--input_image", "face.png"]):
        assert make(*flags) == 2 and "give --pairs FILE alone" in capsys.readouterr().err


def test_a_portrait_without_a_face_does_not_stop_the_rest(pairs, capsys):
    Image.new("RGB", (20, 20), "white").save("other, one.png")
    assert make() == 1
    err = capsys.readouterr().err
    assert f"{FILES[1]} failed: BadInput: memo finds no face" in err and list(videos()) == [FILES[0], FILES[2]]


@pytest.mark.skipif(REAL, reason="the saved models are the real memo's, and its utils need models from the Hub")
def test_two_processes_make_what_one_makes(pairs):
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(MEMO_DOUBLE)}
    one = [sys.executable, SCRIPT, *FLAGS, "--output_dir", "one"]
    one = subprocess.run(list(map(str, one)), capture_output=True, text=True, env={**os.environ, **env})
    two = two_processes(SCRIPT, *FLAGS, "--output_dir", "two", **env)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    a, b = videos("one"), videos("two")
    assert list(a) == list(b) == FILES and all(np.array_equal(a[name], b[name]) for name in FILES)
    assert {r["file"]: r["process"] for r in records("two")} == dict(zip(FILES, (0, 1, 0))), "both had a share"


def test_what_memo_needs_is_missed_before_loading(pairs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "memo.utils.vision_utils", None)
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    assert make() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be imported" in line and "pip install -e memo" in line


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError("Cannot access gated repo for url https://..."), "log in: hf auth login"),
        (OSError("We couldn't connect to 'https://huggingface.co'\nand more"), "Hub in reach?"),
    ],
)
def test_a_hub_that_does_not_give(here, monkeypatch, capsys, error, says):  # noqa: F811
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(teacache_memo, "load_pipeline", refuse)
    with pytest.raises(SystemExit) as exit:
        teacache_memo.main(["--config", "config.yaml", "--input_image", "face.png", "--input_audio", "speech.wav"])
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1 and says in line and "and more" not in line


def test_several_processes_without_pairs(here, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        teacache_memo.main(["--config", "config.yaml"])
    assert "give --pairs FILE" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["generate", "load_pipeline"])
def test_out_of_memory(here, monkeypatch, capsys, where):  # noqa: F811
    import torch

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(teacache_memo, where, full)
    with pytest.raises(SystemExit) as exit:
        teacache_memo.main(["--config", "config.yaml", "--input_image", "face.png", "--input_audio", "speech.wav"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and "out of memory. What helps" in line and "--cache_on_cpu" in line


def test_a_threshold_of_5_and_cache_on_cpu(here, capsys):  # noqa: F811
    files = ["--config", "config.yaml", "--input_image", "face.png", "--input_audio", "speech.wav"]
    teacache_memo.main([*files, "--rel_l1_thresh", "5", "--cache_on_cpu", "--output_dir", "a"])
    assert "note: a threshold above 1" in capsys.readouterr().err
    teacache_memo.main([*files, "--rel_l1_thresh", "5", "--output_dir", "b"])
    a, b = read("a/face_speech.mp4")[0], read("b/face_speech.mp4")[0]
    assert np.array_equal(a, b)
