"""The READMEs: every command runs or is accounted for, snippets run, links, flags and line numbers are right."""

import re
import shlex

import pytest
from conftest import BUNDLED, ROOT

from TeaCache4LuminaT2X import batch_lumina2, compare_lumina2, teacache_lumina2
from TeaCache4Memo import compare_memo

PAGES = ["README.md", "TeaCache4LuminaT2X/README.md", "TeaCache4Memo/README.md", "CONTRIBUTING.md"]
PAGES += ["tests/benchmarks/README.md"]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
FRONT, LUMINA, MEMO, *_ = TEXT.values()
TEMPLATE = (ROOT / ".github" / "ISSUE_TEMPLATE" / "figures.yml").read_text(encoding="utf-8")
TOOLS = {f"{tool.__name__.rpartition('.')[2]}.py": tool for tool in (teacache_lumina2, batch_lumina2, compare_lumina2)}


def commands():
    """All shell lines of the READMEs, without comments."""
    for block in re.findall(r"```(?:bash|shell)\n(.*?)```", "\n".join(TEXT.values()), re.S):
        for line in block.splitlines():
            yield from re.sub(r"\s+#.*$", "", line).strip().split(" && ")


COMMANDS = [command for command in dict.fromkeys(commands()) if command]


def flags_of(command):
    """The tool of Lumina2 that a command runs, and its words; or None."""
    words = shlex.split(command)
    at = next((i for i, word in enumerate(words) if word.rpartition("/")[2] in TOOLS), None)
    return None if at is None else (TOOLS[words[at].rpartition("/")[2]], words[at + 1 :])


def test_every_command_is_accounted_for():
    """Those of Lumina2 are parsed; MEMO's run in test_memo_cli.py and test_memo_batch.py."""
    known = "teacache_memo.py", "compare_memo.py", "batch_memo.py", "tests/benchmarks/", "tox", "pytest", "ruff", "venv"
    for command in [*COMMANDS, *re.findall(r"^ +(python .*compare_lumina2.*)$", TEMPLATE, re.M)]:
        if found := flags_of(command):
            found[0].build_parser().parse_args(found[1])
        else:
            others = command.startswith(("pip install", "git clone", "cd ", ". ", "source "))
            assert others or any(name in command for name in known), command
    assert {tool for tool, _ in filter(None, map(flags_of, COMMANDS))} == set(TOOLS.values())


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_a_command_of_each_tool(tool, tmp_path, monkeypatch):
    """The one with the most flags runs to the end on the bundled model; fewer steps, and smaller budgets with them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red apple\nfox\n", encoding="utf-8")
    flags = max((flags for found, flags in filter(None, map(flags_of, COMMANDS)) if found is tool), key=len)
    flags = [{"15": "3", "10": "2", "8": "2", "15/100": "2/9"}.get(flag, flag) for flag in flags]
    more = ["--repeats", "1", "--prompt", "fox"] if tool is compare_lumina2 else []
    try:
        tool.main([*flags, *more, "--model", str(BUNDLED), "--num-inference-steps", "4"])
    except SystemExit as exit:
        assert not exit.code
    assert list(tmp_path.rglob("*.png"))


def test_the_command_for_memo_in_the_issue_template(capsys, tmp_path, monkeypatch):
    """Its flags are taken: nothing but the portrait is missing."""
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^ +python .*compare_memo.py (.*)$", TEMPLATE, re.M)
    with pytest.raises(SystemExit) as exit:
        compare_memo.main([*shlex.split(command), "--config", str(ROOT / "assets" / "memo-emoji" / "config.yaml")])
    assert "face.jpg" in f"{exit.value.code} {capsys.readouterr().err}"


def test_python_snippets_of_the_front_page(monkeypatch, tmp_path):
    """To the letter, but for the number of steps, and with the line that the page has for machines without a GPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (snippet,) = re.findall(r"```python\n(.*?)```", FRONT, re.S)
    (bundled,) = re.findall(r"Without a GPU: `(pipeline = .*?)`", FRONT)
    snippet = re.sub(r"^pipeline = .*$", bundled, snippet, flags=re.M)
    exec(snippet.replace("=30", "=4").replace("=15", "=2"), {})
    assert (tmp_path / "apple.png").is_file()


def test_python_snippets_of_lumina(pipeline, monkeypatch, capsys):
    """Applying and removing, then the class-attribute way."""
    from diffusers import Lumina2Transformer2DModel

    recipes, instance, of_class = re.findall(r"```python\n(.*?)```", LUMINA, re.S)
    source = (ROOT / "TeaCache4LuminaT2X" / "teacache_lumina2.py").read_text(encoding="utf-8")
    for line in recipes.splitlines():
        assert f"    # {line}" in source, line
    scope = {"pipeline": pipeline}
    exec(instance.replace("=30", "=4").replace("=15", "=2"), scope)
    assert capsys.readouterr().out == "2 of 4 steps computed: X..X\n" and "teacache" not in vars(pipeline.transformer)
    scope |= {"transformer": pipeline.transformer, "scheduler": pipeline.scheduler, **scope}
    for way in re.findall(r"^\|[^|`]*\| `(apply_teacache\(.*?\))` \|$", LUMINA, re.M):
        exec(way.replace("=30", "=4").replace("=15", "=2"), scope)
        pipeline("red apple", num_inference_steps=4, output_type="latent")
        assert repr(pipeline.transformer.teacache) == "2 of 4 steps computed: X..X", way
        scope["remove_teacache"](pipeline)
    for name in ("forward", "enable_teacache", "cnt", "num_steps", "rel_l1_thresh"):
        stock = getattr(Lumina2Transformer2DModel, name, None)
        monkeypatch.setattr(Lumina2Transformer2DModel, name, stock, raising=False)
    scope = {"pipeline": pipeline, "num_inference_steps": 4, "Lumina2Transformer2DModel": Lumina2Transformer2DModel}
    exec(of_class, scope)
    pipeline("red apple", num_inference_steps=4, output_type="latent")
    assert len(pipeline.transformer.teacache.schedule) == 4
    del pipeline.transformer.teacache


@pytest.mark.parametrize("page, script", [(LUMINA, "teacache_lumina2.py"), (MEMO, "teacache_memo.py")])
def test_the_line_of_the_threshold(page, script):
    (number,) = re.findall(rf"line (\d+) of `{script}`", " ".join(page.split()))
    path = next(ROOT.glob(f"TeaCache4*/{script}"))
    assert path.read_text(encoding="utf-8").splitlines()[int(number) - 1].startswith("REL_L1_THRESH = ")


def test_flags_are_all_in_the_table(capsys):
    with pytest.raises(SystemExit):
        teacache_lumina2.main(["--help"])
    flags = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out)) - {"--help"}
    rows = "\n".join(re.findall(r"^\| `--.*$", LUMINA, re.M))
    assert flags == set(re.findall(r"`(--[\w-]+)", rows)) and len(flags) <= 16


def anchors(text):
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Links and pictures lead to files, and to headings in them."""
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT[page]) + re.findall(r'src="([^"]+)"', TEXT[page])
    for link in links:
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), link
