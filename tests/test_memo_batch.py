"""Many portraits and voices: batch_memo.py; and all three scripts, each copied away from the repository."""

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
from omegaconf import OmegaConf
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


def jobs(*flags):
    args = batch_memo.teacache_memo.build_parser()
    args.add_argument("pairs")
    args = args.parse_args([*FLAGS, *flags])
    return batch_memo.list_jobs(args, teacache_memo.choose_config(args.config))


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


def test_going_on(pairs, quick, capsys, monkeypatch):  # noqa: F811
    """A pair that fails is reported and made by the next run; what is there is not made again, in any order of lines."""
    prepare, made = teacache_memo.prepare, []

    def fails_once(image, *args):
        made.append(image)
        if made.count("other, one.png") == 1 and image == "other, one.png":
            raise RuntimeError("something in memo")
        return prepare(image, *args)

    monkeypatch.setattr(teacache_memo, "prepare", fails_once)
    assert make() == 1
    out, err = capsys.readouterr()
    assert out.endswith("2 of 3 videos are in outputs\n") and "failed: RuntimeError: something in memo" in err
    assert set(videos()) == {STEMS[0], STEMS[2]} and len(os.listdir("outputs")) == 4
    lines = (pairs / "pairs.csv").read_text()
    (pairs / "pairs.csv").write_text(f"other, one.png\n{lines}".replace("other, one.png\n", "other.png,speech.wav\n"))
    shutil.copy("other, one.png", "other.png")
    assert make() == 0 and made[3:] == ["other.png", "other, one.png"], "a line on top changes nothing"
    assert set(videos()) == {*STEMS, "other_speech"}
    capsys.readouterr()
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    assert make() == 0 and capsys.readouterr().out == "4 of 4 videos are in outputs\n"


@pytest.mark.parametrize("what", ["voice", "portrait", "seed", "setting", "config", "emotion", "weights", "constant"])
def test_what_has_changed_is_made_anew(pairs, models, tmp_path, monkeypatch, what):  # noqa: F811
    """Under one name in the list; the old video stays. What has not changed keeps its name."""
    config = OmegaConf.load("config.yaml")
    config.model_name_or_path = str(shutil.copytree(config.model_name_or_path, tmp_path / "model"))
    OmegaConf.save(config, "config.yaml")
    before, flags = jobs(), []
    assert jobs() == before
    if what == "voice":
        write_sound("speech.wav", 2 * FRAMES - 1)
    elif what == "portrait":
        shutil.copy("other, one.png", "face.png")
    elif what == "weights":
        (file,) = (tmp_path / "model" / "diffusion_net").glob("*.safetensors")
        os.utime(file, ns=(0, 0))
    elif what == "config":
        (pairs / "config.yaml").write_text((pairs / "config.yaml").read_text().replace("fps: 30", "fps: 25"))
    elif what == "constant":
        monkeypatch.setattr(teacache_memo, "CORRECT", False)
    else:
        flags = {"seed": ["--seed", 1], "setting": ["--rel_l1_thresh", 0.1], "emotion": ["--emotion", "sad"]}[what]
    after = jobs(*map(str, flags))
    same = {"voice": 1, "portrait": 1}.get(what, 0)  # of three, two have this voice, and two this portrait
    assert len(after) == 3 and len(before.keys() & after.keys()) == same
    assert [path.stem.rpartition("_")[0] for path in after] == STEMS


def test_two_batches_on_one_folder(pairs, quick, monkeypatch, capsys):  # noqa: F811
    """What the other one finishes meanwhile is kept and not made again; an interruption takes nothing of it away."""
    (first, second, _), prepare = jobs(), teacache_memo.prepare

    def meanwhile(*args):
        if first.exists():
            raise KeyboardInterrupt
        for path in (first, second):
            path.write_bytes(b"of the other batch")
        return prepare(*args)

    monkeypatch.setattr(teacache_memo, "prepare", meanwhile)
    with pytest.raises(SystemExit, match="^interrupted$"):
        batch_memo.main(FLAGS)
    assert set(Path("outputs").glob("*.mp4")) == {first, second}
    assert first.read_bytes() == second.read_bytes() == b"of the other batch"
    monkeypatch.setattr(teacache_memo, "prepare", prepare)
    capsys.readouterr()
    assert make() == 0 and capsys.readouterr().out.count("saved") == 1, "the rest is not refused"


def test_what_a_kill_leaves(pairs, quick):  # noqa: F811
    """An empty video is made again. Drafts go when they are a day old: younger ones may be those of another batch."""
    first, *_ = jobs()
    first.touch()
    old, young, others = (first.with_name(name) for name in (f".{first.stem}.1", f".{first.stem}.2", ".my.1"))
    for draft in (old, young, others):
        draft.mkdir()
        (draft / "pictures.mp4").touch()
        for path in (draft / "pictures.mp4", draft):
            os.utime(path, (0, 0))
    os.utime(young / "pictures.mp4")
    assert make() == 0
    assert set(videos()) >= set(STEMS) and young.exists() and others.exists() and not old.exists()
    assert len(read(first)[0]) == 2 * FRAMES


def test_a_config_that_holds_more(pairs, quick):  # noqa: F811
    """A list and a group: in the JSON as they are."""
    text, more = Path("config.yaml").read_text(), {"tags": ["a", "b"], "group": {"of": [1]}, "again": 30}
    Path("config.yaml").write_text(text + "tags: [a, b]\ngroup: {of: [1]}\nagain: ${fps}\n")
    assert make() == 0
    compare_memo.main([*ARGUMENTS, "--rel_l1_thresh", "--computed_steps", "2"])
    records = [json.loads(path.read_text()) for path in Path("outputs").glob("*.json")]
    assert len(records) == 4 and all(more.items() <= record["config"].items() for record in records)


def test_inputs_beside_the_pairs(pairs, capsys):
    for flag in ("--input_image=face.png", "--input_audio=speech.wav"):
        assert make(flag) == 2 and "the pairs are in FILE" in capsys.readouterr().err


def test_a_portrait_without_a_face_and_a_full_disk(pairs, quick, capsys, monkeypatch):  # noqa: F811
    """Nothing stays."""

    def full(*_):
        raise OSError(28, "No space left on device")

    Image.new("RGB", (20, 20), "white").save("face.png")
    monkeypatch.setattr(teacache_memo, "write_video", full)
    assert make() == 1
    out, err = capsys.readouterr()
    assert out.startswith("0 of 3") and err.count("failed: ValueError: no face found in face.png") == 2
    assert err.count("failed: OSError: [Errno 28] No space left") == 1 and not os.listdir("outputs")


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
    with pytest.raises(SystemExit) as exit:
        batch_memo.main(FLAGS)
    assert exit.value.code.startswith("error: ") and says in exit.value.code and "\n" not in exit.value.code
    assert capsys.readouterr().out == "" and not Path("outputs").exists()


def test_empty_lines_change_nothing(pairs):
    before, text = jobs(), (pairs / "pairs.csv").read_text()
    (pairs / "pairs.csv").write_text(f"\n\n{text}".replace("face.png, long", "\n \nface.png, long"))
    assert jobs() == before and [job["audio"] for job in before.values()] == ["speech.wav", "speech.wav", "long.wav"]


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
