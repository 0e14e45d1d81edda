"""The figures of the READMEs are those that were measured; prompts that are called new are new."""

import importlib.util
import json
import re

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "tests" / "benchmarks"
MODEL = ROOT / "assets" / "lumina2-emoji"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render, prompts = load("render"), load("prompts")


def test_pages_show_what_was_measured(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def test_a_false_figure_is_found(tmp_path, capsys):
    """The last digit of a table of each page, and a figure that somebody typed into a sentence; rendering mends tables."""
    for page in render.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        *_, table = [block for block in render.BLOCK.finditer(text) if "| " in block[0]]
        at = max(at for at in range(*table.span()) if text[at].isdecimal())
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}", encoding="utf-8")
    assert render.main(["--check", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("should be") == len(render.PAGES)
    render.main(["--root", str(tmp_path)])
    assert render.main(["--check", "--root", str(tmp_path)]) == 0
    with open(tmp_path / "README.md", "a", encoding="utf-8") as page:
        page.write("It is 99.9 dB close,\nbut `98.1 dB` is code.\n")
    capsys.readouterr()
    assert render.main(["--check", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "README.md: 99.9 is in no table of this page\n"


def test_ties_and_what_is_compared(tmp_path):
    """Against the most passes of ours that are at most half a pass more; within the standard error it is a tie."""
    mine, close, far = [50.0, 48.0, 46.0], [50.2, 47.6, 46.1], [40.0, 39.0, 36.0]
    rows = {
        "a": {"method": "computed_steps", "setting": "15", "passes": 15.0, "float32": mine},
        "b": {"method": "computed_steps", "setting": "10", "passes": 10.0, "float32": far},
        "c": {"method": "rival", "setting": "about 15", "passes": 14.6, "float32": close},
        "d": {"method": "rival", "setting": "about 12", "passes": 12.0, "float32": close},
        "e": {"method": "rival", "setting": "about 8", "passes": 8.0, "float32": far},
    }
    about = {"known": ["x", "y"], "new": ["z"]}
    (tmp_path / "peers_rounding.json").write_text(json.dumps({"about": about, "rows": rows}), encoding="utf-8")
    lines = render.peers_lumina2(render.load(tmp_path), "rounding").splitlines()[2:]
    shown = [line.strip("| ").split(" | ") for line in lines]
    assert shown[0][3:6] == ["49.0 (48.0)", "46.0 (46.0)", "48.0 (46.0)"] and shown[0][:2] == ["computed_steps", "15"]
    assert shown[2][-1] == "15: tie (+0.0 ± 0.2)"
    assert shown[3][-1] == "10: -9.6 ± 0.5" and lines[4].endswith("|  |")


def test_statistics():
    assert render.rmse_mean([20.0, 20.0]) == pytest.approx(20) and 40 < render.rmse_mean([40.0, 60.0]) < 46
    assert render.worst([4.0, 3.0, 1.0, 2.0, 9.0, 9.0, 9.0, 9.0]) == 1.5


def test_other_prompts_are_others():
    groups = [*prompts.known(MODEL).values(), prompts.NEW, prompts.MORE_NEW, prompts.OPEN]
    every = [prompt for group in groups for prompt in group]
    assert len(every) == len(set(every)) and [len(group) for group in groups] == [8, 4, 8, 16, 8, 8]


def test_new_prompts_are_new():
    """Words of the bundled model's vocabulary, in no caption that it was trained on."""
    words = json.loads((MODEL / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    names = {n.strip() for n in re.split(r"[\t\n,]", (MODEL / "emoji.txt").read_text(encoding="utf-8").lower())}
    for prompt in prompts.NEW + prompts.MORE_NEW:
        bare = re.sub(r"^(a|an|the|cute) ", "", prompt)
        assert bare not in names and not bare.endswith((" icon", " emoji", " flag")), prompt
        assert all(word in words for word in prompt.split()), prompt
