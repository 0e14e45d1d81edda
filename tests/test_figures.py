"""The figures of the READMEs: tables are those of the benchmarks' results, and sentences quote tables."""

import importlib.util
import json
import re
import shutil
import sys

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

# Figures in sentences that are in no table of their page: page, phrase, and what the figure in it is, from the results.
EXPLAINED = [
    ("TeaCache4Memo/README.md", "0.33 GB a minute", lambda results: 5 * 12 * 768 * 4 * 30 * 60 / 1e9),
]
FIGURE = re.compile(r"(?<![\w.])(\d+\.\d+)(?=\s?(?:dB|x|s|ms|minutes?|hours?|[KMG]i?B|%)(?!\w)| times| seconds)")


def without(text, *patterns):
    for pattern in patterns:
        text = re.sub(pattern, " ", text, flags=re.S | re.M)
    return text


def prose(text):
    """A page without code, tables, comments, and the addresses of links."""
    return without(text, r"^```.*?^```", r"<!--.*?-->", r"^\|[^\n]*$", r"`[^`\n]*`", r"\]\([^)]*\)")


def unexplained(page, text, results):
    """Decimals with a unit, in sentences, that are neither in a table of the page nor explained."""
    tables = set(re.findall(r"\d+\.\d+", "\n".join(re.findall(r"^\|.*$", text, re.M))))
    sentences = " ".join(prose(text).split())
    for _, phrase, value in (entry for entry in EXPLAINED if entry[0] == page):
        figure = FIGURE.search(phrase)[1]
        if figure == f"{value(results):.{len(figure.split('.')[1])}f}":
            sentences = sentences.replace(phrase, "")
    return [figure for figure in FIGURE.findall(sentences) if figure not in tables]


@pytest.fixture
def pages(tmp_path):
    """A folder with copies of all pages."""
    for page in render.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def test_the_tables_show_what_was_measured(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", render.PAGES)
def test_figures_in_sentences_are_in_a_table(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not unexplained(page, text, render.load())
    flowing = " ".join(text.split())
    assert not [phrase for where, phrase, _ in EXPLAINED if where == page and phrase not in flowing]


def test_a_false_figure_in_a_sentence_is_found(monkeypatch):
    text = "It has 46.2 dB, 1.9x,\nand 3.5 GB.\n\n| a | 46.2 (41.0) |\n|---|---|\n| b | 1.91x |\n\n```\n7.7 dB\n```\n"
    assert unexplained("page", text, {}) == ["1.9", "3.5"]
    monkeypatch.setitem(globals(), "EXPLAINED", [("page", "and 3.5 GB", lambda results: 3.52)])
    assert unexplained("page", text, {}) == ["1.9"]
    assert unexplained("other", text, {}) == ["1.9", "3.5"]
    monkeypatch.setitem(globals(), "EXPLAINED", [("page", "and 3.5 GB", lambda results: 3.6)])
    assert unexplained("page", text, {}) == ["1.9", "3.5"]


@pytest.mark.parametrize("page", render.PAGES)
def test_a_false_figure_in_a_table_is_found(page, pages, capsys):
    """In each table of each page that shows results."""
    text = (pages / page).read_text(encoding="utf-8")
    falsified = 0
    for match in render.BLOCK.finditer(text):
        digits = [at for at in range(match.end(1), match.start(3)) if text[at].isdecimal()]
        if not digits or "Not measured yet" in match[0]:
            continue
        at = digits[-1]
        (pages / page).write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}", encoding="utf-8")
        falsified += 1
        assert render.main(["--check", "--root", str(pages)]) == 1, match[0]
        assert page in capsys.readouterr().err
    assert falsified, f"{page} shows no results"
    render.main(["--root", str(pages)])
    assert (pages / page).read_text(encoding="utf-8") == text, "rendering puts it right"


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


def test_it_shares_nothing_with_the_scripts():
    source = (BENCHMARKS / "render.py").read_text(encoding="utf-8")
    imports = re.findall(r"^(?:import|from) (\w+)", source, re.M)
    assert set(imports) <= set(sys.stdlib_module_names)


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
