"""Many prompts: whole files, records, going on after an interruption, one that fails, several processes."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import BUNDLED, ROOT, two_processes
from PIL import Image

from TeaCache4LuminaT2X import batch_lumina2, options_lumina2, teacache_lumina2
from TeaCache4LuminaT2X.teacache_lumina2 import main

SCRIPT = ROOT / "TeaCache4LuminaT2X" / "teacache_lumina2.py"
FAST = ["--model", str(BUNDLED), "--num-inference-steps", "4", "--speedup", "2"]
PROMPTS = ["red apple", "Dog, running!", "猫", "red apple"]
FILES = ["0001-red-apple.png", "0002-dog-running.png", "0003-猫.png", "0004-red-apple.png"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\ufeff" + "\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return tmp_path


def draw(*flags, prompts="prompts.txt", output="out"):
    """The exit code."""
    with pytest.raises(SystemExit) as exit:
        main([*FAST, "--prompts", prompts, "--output", output, *flags])
    return exit.value.code


def records(folder="out"):
    with open(os.path.join(folder, "images.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def files(folder="out"):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


def no_loading(monkeypatch):
    monkeypatch.setattr(options_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))


def test_a_picture_a_line(here, capfd):
    assert draw() == 0
    assert list(files()) == [*FILES, "images.jsonl"], "no drafts are left"
    out, err = capfd.readouterr()
    assert out == "4 of 4 are in out\n" and "4/4" in err and "image" in err, "one line, and a progress bar"
    found = records()
    assert [(r["file"], r["prompt"], r["seed"]) for r in found] == list(zip(FILES, PROMPTS, range(1024, 1028)))
    for r in found:
        assert (r["rel_l1_thresh"], r["speedup"], r["computed"], r["steps"]) == (None, 2.0, 2, 4) and r["seconds"] > 0
        assert r["settings"]["num_inference_steps"] == 4 and r["settings"]["model"] == str(BUNDLED)
    # each is what a run by itself draws
    main([*FAST, "--prompt", "red apple", "--seed", "1027", "--output", "alone.png"])
    alone, ours, other = (np.asarray(Image.open(p)) for p in ("alone.png", f"out/{FILES[3]}", f"out/{FILES[0]}"))
    assert np.array_equal(alone, ours) and not np.array_equal(ours, other)


def test_threshold_in_the_record(here):
    with pytest.raises(SystemExit):
        main([*FAST[:4], "--prompts", "prompts.txt", "--output", "out"])
    assert {(r["rel_l1_thresh"], r["speedup"]) for r in records()} == {(teacache_lumina2.REL_L1_THRESH, None)}
    own, domain, _ = teacache_lumina2.coefficients_of(BUNDLED / "teacache.json", "modulated", "forecast")
    assert all((r["settings"]["coefficients"], r["settings"]["domain"]) == (own, domain) for r in records())


def test_standard_input(here, monkeypatch):
    """UTF-8 whatever the terminal's encoding is, with a mark of it or without."""
    raw = io.BytesIO(b"\xef\xbb\xbfred apple\r\n\xe7\x8c\xab\xe2\x80\xa8\xe7\x8c\xab\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="cp1252"))
    assert draw(prompts="-") == 0 and list(files()) == ["0001-red-apple.png", "0002-猫-猫.png", "images.jsonl"]
    assert [r["prompt"] for r in records()] == ["red apple", "猫\u2028猫"], "a line ends where a file's line ends"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert draw(prompts="-") == 2


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_going_on_after_an_interruption(here, monkeypatch, stop_at):
    """Stopped in the middle of a picture, then run again: the same files as without, none drawn twice."""
    assert draw(output="whole") == 0
    drawn, generate = [], teacache_lumina2.generate

    def stops(pipeline, args, prompt, *rest, **kwargs):
        if len(drawn) == stop_at and not stopped:
            stopped.append(prompt)
            raise KeyboardInterrupt
        drawn.append(prompt)
        return generate(pipeline, args, prompt, *rest, **kwargs)

    stopped = []
    monkeypatch.setattr(teacache_lumina2, "generate", stops)
    assert draw() == 130
    assert [name for name in files() if name.endswith(".png")] == FILES[:stop_at]
    assert draw() == 0 and drawn == PROMPTS
    with_figures, without = files(), files("whole")
    assert {n: b for n, b in with_figures.items() if n in FILES} == {n: b for n, b in without.items() if n in FILES}
    assert [r["file"] for r in records()] == FILES
    no_loading(monkeypatch)
    assert draw() == 0, "nothing is left to do, and nothing is loaded"


def test_a_write_that_fails_halfway_leaves_no_file(here, monkeypatch, capfd):
    save = Image.Image.save

    def full(self, path, *args, **kwargs):
        if "0002" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    assert draw() == 1
    assert list(files()) == [FILES[0], *FILES[2:], "images.jsonl"] and len(records()) == 3
    out, err = capfd.readouterr()
    assert "3 of 4 are in out; 1 failed" in out and "0002-dog-running.png failed: OSError" in err
    monkeypatch.setattr(Image.Image, "save", save)
    assert draw() == 0 and list(files()) == [*FILES, "images.jsonl"]
    assert sorted(r["file"] for r in records()) == FILES


def test_one_that_fails_is_reported_and_the_rest_goes_on(here, monkeypatch, capfd):
    import torch

    generate = teacache_lumina2.generate

    def fails(pipeline, args, prompt, *rest, **kwargs):
        if prompt == "猫":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried ...")
        return generate(pipeline, args, prompt, *rest, **kwargs)

    monkeypatch.setattr(teacache_lumina2, "generate", fails)
    assert draw() == 1
    out, err = capfd.readouterr()
    (line,) = [line for line in err.splitlines() if "failed" in line]
    assert "0003-猫.png failed: out of memory. What helps: " in line and "--vae-tiling" in line
    assert "Traceback" not in err and "1 failed" in out and list(files()) == [*FILES[:2], FILES[3], "images.jsonl"]


def test_a_record_that_was_cut_off_or_whose_file_is_gone(here):
    assert draw() == 0
    before = files()
    with open("out/images.jsonl", encoding="utf-8") as file:
        lines = file.read().splitlines()
    with open("out/images.jsonl", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + '\n{"file": "0005-half')
    os.remove("out/0002-dog-running.png")
    assert draw() == 0
    assert sorted(r["file"] for r in records()) == FILES
    assert {n: b for n, b in files().items() if n in FILES} == {n: b for n, b in before.items() if n in FILES}


def test_more_prompts_later(here):
    assert draw() == 0
    before = files()
    with open("prompts.txt", "a", encoding="utf-8") as file:
        file.write("sun\n")
    assert draw() == 0
    assert list(files()) == [*FILES, "0005-sun.png", "images.jsonl"] and len(records()) == 5
    assert all(files()[name] == before[name] for name in FILES)


@pytest.mark.parametrize(
    "flags, says",
    [(["--seed", "7"], "another seed"), (["--guidance-scale", "2"], "another settings"), ([], "not in images.jsonl")],
)
def test_what_was_made_otherwise_is_left_alone(here, monkeypatch, capsys, flags, says):
    assert draw() == 0
    if not flags:
        os.remove("out/images.jsonl")
    before = files()
    no_loading(monkeypatch)
    capsys.readouterr()
    assert draw(*flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err and "another folder" in err and files() == before


@pytest.mark.parametrize("line", ['{"path": "a.png", "caption": "a dog"}', "not JSON", "[1]"])
def test_a_journal_that_is_not_ours_is_left_alone(here, monkeypatch, capsys, line):
    os.mkdir("out")
    with open("out/images.jsonl", "w", encoding="utf-8") as file:
        file.write(line + "\n")
    before = files()
    no_loading(monkeypatch)
    assert draw() == 2 and "line 1 of out/images.jsonl is not ours" in capsys.readouterr().err and files() == before


def test_records_of_other_pictures_stay(here):
    """Of prompts that are no longer asked for, and of pictures that were moved elsewhere."""
    assert draw() == 0
    (here / "prompts.txt").write_text("sun\n" + "\n".join(PROMPTS[1:]) + "\n", encoding="utf-8")
    os.remove(f"out/{FILES[0]}")
    assert draw() == 0
    assert [r["file"] for r in records()] == [*FILES, "0001-sun.png"]


def test_after_a_failure_nothing_stays_on_the_gpu(here, monkeypatch):
    """With --offload model the pipeline clears the GPU only where it ends well."""
    freed, generate = [], teacache_lumina2.generate

    def fails(pipeline, args, prompt, *rest, **kwargs):
        pipeline.maybe_free_model_hooks = lambda: freed.append(prompt)
        if prompt == "猫":
            raise RuntimeError("midway")
        return generate(pipeline, args, prompt, *rest, **kwargs)

    monkeypatch.setattr(teacache_lumina2, "generate", fails)
    assert draw() == 1 and freed.count("猫") == 1


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompts", "empty.txt"], "nothing stands in empty.txt"),
        (["--prompts", "latin.txt"], "not UTF-8"),
        (["--prompts", "prompts.txt", "--prompt", "a"], "--prompts FILE alone"),
        (["--prompts", "prompts.txt", "--compare", "0.1"], "--prompts FILE alone"),
        (["--prompts", "prompts.txt", "--output", "empty.txt"], "must be a folder"),
        (["--prompts", "prompts.txt", "--output", "empty.txt/below"], "must be a folder"),
    ],
)
def test_bad_input(here, monkeypatch, capsys, flags, says):
    (here / "empty.txt").write_text(" \n\n")
    (here / "latin.txt").write_bytes("café".encode("latin-1"))
    before = sorted(os.listdir())
    no_loading(monkeypatch)
    with pytest.raises(SystemExit) as exit:
        main([*FAST, *flags])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and says in err and sorted(os.listdir()) == before


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A cat, holding a SIGN", "0007-a-cat-holding-a-sign"),
        ("../../etc/passwd", "0007-etc-passwd"),
        ("?!", "0007"),
        ("x" * 300, "0007-" + "x" * 48),
        ("été – 猫", "0007-été-猫"),
    ],
)
def test_names(text, expected):
    assert batch_lumina2.name(7, text) == expected


def test_two_processes_draw_what_one_draws(here):
    command = [SCRIPT, *FAST, "--prompts", "prompts.txt"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [sys.executable, *map(str, command), "--output", "one"]
    one = subprocess.run(one, capture_output=True, text=True, env=env)
    assert one.returncode == 0, one.stderr
    two = two_processes(*command, "--output", "two")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("4 of 4 are in two") == 1, "said once"
    assert {n: b for n, b in files("one").items() if n in FILES} == {
        n: b for n, b in files("two").items() if n in FILES
    }
    assert sorted(r["file"] for r in records("two")) == FILES
    assert [r["process"] for r in sorted(records("two"), key=lambda r: r["file"])] == [0, 1, 0, 1], "both had a share"
    bars = [line for line in two.stderr.replace("\r", "\n").splitlines() if "image/s" in line or "s/image" in line]
    assert "4/4" in bars[-1]
    os.remove("two/0003-猫.png")
    os.mkdir("two/.draft-0003-猫.png")  # it cannot be written
    failed = two_processes(*command, "--output", "two")
    assert failed.returncode == 1 and "3 of 4 are in two; 1 failed" in failed.stdout, failed.stderr
    assert "0003-猫.png failed: IsADirectoryError" in failed.stderr
    os.rmdir("two/.draft-0003-猫.png")
    os.remove("two/0002-dog-running.png")
    again = two_processes(*command, "--output", "two")
    assert again.returncode == 0 and files("two")["0002-dog-running.png"] == files("one")["0002-dog-running.png"]
    assert sorted(r["file"] for r in records("two")) == FILES


def test_several_processes_without_a_file(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(FAST)
    assert "give --prompts FILE" in capsys.readouterr().err
