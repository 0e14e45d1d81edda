"""The READMEs: every command runs as it stands or is accounted for, snippets run, links and line numbers are right."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import BUNDLED, ROOT

from TeaCache4LuminaT2X import batch_lumina2, compare_lumina2, teacache_lumina2

PAGES = ["README.md", "TeaCache4LuminaT2X/README.md", "TeaCache4Memo/README.md", "CONTRIBUTING.md"]
PAGES += ["tests/benchmarks/README.md"]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
FRONT, LUMINA, MEMO, *_ = TEXT.values()
TOOLS = {
    "teacache_lumina2.py": teacache_lumina2,
    "compare_lumina2.py": compare_lumina2,
    "batch_lumina2.py": batch_lumina2,
}


def commands():
    """All shell lines of the READMEs, without comments."""
    for text in TEXT.values():
        for block in re.findall(r"```(?:bash|shell)\n(.*?)```", text, re.S):
            for line in block.splitlines():
                line = re.sub(r"\s+#.*$", "", line).strip()
                yield from (command for command in line.split(" && ") if command)


COMMANDS = list(dict.fromkeys(commands()))
LUMINA_COMMANDS = [c for c in COMMANDS if any(tool in c for tool in TOOLS)]


def test_every_command_is_accounted_for():
    """MEMO's commands run in test_memo_cli.py and test_memo_batch.py, `accelerate launch` in the tests of the tools."""
    known = *TOOLS, "teacache_memo.py", "compare_memo.py", "batch_memo.py", "tests/benchmarks/", "tox", "pytest", "ruff"
    for command in COMMANDS:
        assert command.startswith(("pip install", "git clone", "cd ")) or any(name in command for name in known), (
            command
        )
    assert len(LUMINA_COMMANDS) >= 6


@pytest.mark.parametrize("command", [c for c in LUMINA_COMMANDS if not c.startswith("accelerate")])
def test_lumina_commands(command, tmp_path, monkeypatch, capsys):
    """Run to the end on the bundled model, in few steps; budgets of the command become smaller with them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red apple\nfox\n", encoding="utf-8")
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.rpartition("/")[2] in TOOLS)
    tool, flags = words[at].rpartition("/")[2], words[at + 1 :]
    quick = {"15": "3", "10": "2", "15/100": "2/9", "100": "9"}
    flags = [quick.get(flag, flag) for flag in flags]
    if tool == "compare_lumina2.py" and "--computed-steps" not in flags:
        flags += ["--computed-steps", "3"]
    try:
        TOOLS[tool].main([*flags, "--model", str(BUNDLED), "--num-inference-steps", "4"])
    except SystemExit as exit:
        assert not exit.code
    out = capsys.readouterr().out
    assert out and list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "tests/benchmarks/" in c])
def test_benchmark_commands(command):
    """The file takes these flags; what it measures takes minutes."""
    words = shlex.split(command)
    run = subprocess.run([sys.executable, ROOT / words[1], "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(word in run.stdout for word in words[2:] if word.startswith("--"))


def test_commands_of_the_issue_template():
    """Their flags are those of the tools."""
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "figures.yml").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^ +python (.*)$", text, re.M)]
    assert len(commands) == 2
    for tool, *words in commands:
        flags = {word for word in words if word.startswith("--")}
        run = subprocess.run([sys.executable, ROOT / tool, "--help"], capture_output=True, text=True)
        assert flags <= set(re.findall(r"--[\w-]+", run.stdout)), run.stdout + run.stderr


def test_python_snippets_of_the_front_page(monkeypatch, tmp_path):
    """To the letter, but for the number of steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (snippet,) = re.findall(r"```python\n(.*?)```", FRONT, re.S)
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
        monkeypatch.setattr(
            Lumina2Transformer2DModel, name, getattr(Lumina2Transformer2DModel, name, None), raising=False
        )
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


def test_what_the_founding_readmes_document():
    """Latency tables, speedups, attributes, commands, paper."""
    facts = "~97.74 s|~93.19 s|~84.72 s|~78.43 s|1.05x|1.15x|1.25x|1024 x 1536|liu2024timestep|cnt = 0|num_steps|"
    facts += "flash-attn --no-build-isolation|python teacache_lumina2.py|enable_teacache = True|rel_l1_thresh = 0.3"
    for fact in facts.split("|"):
        assert fact in LUMINA, fact
    facts = "~25 min|~17 min|~12 min|~10 min|1.5x|2.0x|2.5x|0.09 to 0.25|liu2024timestep|python teacache_memo.py|"
    facts += (
        "pip install --no-deps -e .|UNet3DConditionModel.forward = teacache_forward|enable_teacache = True|cnt = 0|"
    )
    facts += (
        "from memo.models.unet_3d import UNet3DConditionModel|num_steps = num_inference_steps|rel_l1_thresh = 0.15|"
    )
    facts += "from memo.pipelines.video_pipeline import VideoPipeline|accumulated_rel_l1_distance = 0|"
    facts += (
        'previous_modulated_input = None|previous_residual = None|VideoPipeline.from_pretrained("path/to/memo/model")'
    )
    for fact in facts.split("|"):
        assert fact in MEMO, fact


@pytest.mark.parametrize("page, tool", [(LUMINA, teacache_lumina2)])
def test_flags_are_all_in_the_table(page, tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    flags = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out)) - {"--help"}
    rows = {flag for line in page.splitlines() if line.startswith("| `--") for flag in re.findall(r"`(--[\w-]+)", line)}
    assert flags == rows and len(flags) <= 16


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


def test_cpu_only():
    assert not torch.cuda.is_available(), "figures that are bit for bit are those of a CPU"
