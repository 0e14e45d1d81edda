"""The figures of the READMEs are those of the benchmarks' results: nobody has typed one, none has been left behind."""

import importlib.util
import json
import re
import shutil

import pytest
from conftest import ROOT


def load_render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "tests" / "benchmarks" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = load_render()


@pytest.fixture
def pages(tmp_path):
    """A folder with copies of all pages."""
    for page in render.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def test_the_pages_show_what_was_measured(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", render.PAGES)
def test_a_false_figure_is_found(page, pages, capsys):
    """In each table and each sentence of each page that shows results."""
    text = (pages / page).read_text(encoding="utf-8")
    found = [*render.BLOCK.finditer(text), *render.INLINE.finditer(text)]
    falsified = 0
    for match in found:
        start, end = match.end(1), match.start(match.lastindex)
        digits = [at for at in range(start, end) if text[at].isdecimal()]
        if not digits:  # not measured yet
            continue
        at = digits[-1]
        (pages / page).write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}", encoding="utf-8")
        falsified += 1
        assert render.main(["--check", "--root", str(pages)]) == 1, match[0]
        assert capsys.readouterr().err.startswith(page)
    assert falsified, f"{page} shows no results"
    render.main(["--root", str(pages)])
    assert (pages / page).read_text(encoding="utf-8") == text, "rendering puts it right"


@pytest.mark.parametrize("page", render.PAGES)
def test_no_line_begins_with_a_figure(page):
    """Markdown takes a comment at the beginning of a line for a block of its own: the paragraph would be torn."""
    assert not re.search(r"^[\s>]*(?:[-*+]\s+|\d+\.\s+)?<!--=", (ROOT / page).read_text(encoding="utf-8"), re.M)


def test_a_figure_in_a_sentence(tmp_path):
    """Rows are attributes; a format may follow; sums and ranges are computed."""
    rows = {
        "a": {"passes": 15.0, "uncached": [60.0, 50.0, 40.0]},
        "b": {"passes": 30.0, "uncached": [51.0, 41.0, 41.0]},
    }
    whole = {"about": {"known": ["x", "y"], "new": ["z"]}, "rows": rows}
    (tmp_path / "trial.json").write_text(json.dumps(whole), encoding="utf-8")
    results = render.load(tmp_path)
    for expression, shown in {
        "psnr(trial.a)": "50.0",
        'psnr(trial.a, of="known"):.0f': "55",
        'least(trial.a, of="new")': "40.0",
        "better(trial.a, trial.b)": "2 of 3",
        "gains((trial.a, trial.b), (trial.b, trial.b))": "0.0 to 5.7",
        "trial.a.passes / trial.b.passes:.0%": "50%",
        "len(trial.about['new'])": "1",
    }.items():
        text = f"it is <!--={expression}-->?<!----> here"
        assert render.render(text, results) == f"it is <!--={expression}-->{shown}<!----> here"
    with pytest.raises(AttributeError):
        render.render("<!--=trial.c-->?<!---->", results)
    assert render.render("<!--=other.c.passes-->1<!---->", results) == "<!--=other.c.passes-->?<!---->"


@pytest.mark.parametrize("script", ["TeaCache4LuminaT2X/teacache_lumina2.py", "TeaCache4Memo/teacache_memo.py"])
def test_the_figures_of_help(script):
    """The table at the end of --help is that of the README beside the script."""
    source = (ROOT / script).read_text(encoding="utf-8")
    shown = re.search(r'WHICH_SETTING = """.*?"""', source, re.S)[0]
    page = (ROOT / script).with_name("README.md").read_text(encoding="utf-8")
    page = re.sub(r"<!--.*?-->", "", page)
    figures = re.compile(r"([A-Z_0-9]+ = [\d.]+).*?(\d+) computed, ([\d.]+) dB")
    assert figures.findall(shown) == figures.findall(page) != []
    assert ("shift 6" in shown) == ("shift 6" in page) == ("lumina2" in script)


def test_it_shares_nothing_with_the_scripts():
    source = (ROOT / "tests" / "benchmarks" / "render.py").read_text(encoding="utf-8")
    imports = re.findall(r"^(?:import|from) (\w+)", source, re.M)
    assert set(imports) <= {"argparse", "json", "re", "statistics", "sys", "pathlib", "types"}


def test_new_prompts_are_new():
    """The prompts of the second column: words of the bundled model's vocabulary, in no caption that it was trained on."""
    source = (ROOT / "tests" / "benchmarks" / "lumina2_peers.py").read_text(encoding="utf-8")
    prompts = re.search(r'NEW_PROMPTS = """\\\n(.*?)"""', source, re.S)[1].splitlines()
    model = ROOT / "assets" / "lumina2-emoji"
    words = json.loads((model / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    names = {n.strip() for n in re.split(r"[\t\n,]", (model / "emoji.txt").read_text(encoding="utf-8").lower())}
    assert len(set(prompts)) == 16 and all(word in words for prompt in prompts for word in prompt.split())
    for prompt in prompts:
        bare = re.sub(r"^(a|an|the|cute) ", "", prompt)
        assert bare not in names and not bare.endswith((" icon", " emoji", " flag")), prompt
