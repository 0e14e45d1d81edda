"""The READMEs: each command runs as it stands, or is checked as far as this machine goes; each figure agrees."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import BUNDLED, ROOT, two_processes
from safetensors.torch import save_file

from TeaCache4LuminaT2X import calibrate_lumina2, options_lumina2, teacache_lumina2

PAGES = ["README.md", "TeaCache4LuminaT2X/README.md", "TeaCache4Memo/README.md"]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
FRONT, LUMINA, MEMO = (TEXT[page] for page in PAGES)
NOT_HERE = ("pip install", "git clone", "cd ")  # a network, or nothing to check
QUICK = ["--num-inference-steps", "4"]


def commands():
    """All lines of all blocks of shell, without their comments."""
    for page, text in TEXT.items():
        for block in re.findall(r"```(?:bash|shell)\n(.*?)```", text, re.S):
            for line in block.splitlines():
                line = re.sub(r"\s+#.*$", "", line).strip()
                for command in line.split(" && "):
                    if command and not command.startswith("#"):
                        yield page, command


COMMANDS = list(dict.fromkeys(command for _, command in commands()))
OF_LUMINA = [c for c in COMMANDS if "teacache_lumina2.py" in c]


def test_every_command_is_accounted_for():
    """What is none of these is a new kind of command, which has to be run somewhere."""
    known = "teacache_lumina2.py", "calibrate_lumina2.py", "teacache_memo.py", "tests/benchmarks/", "pytest", "tox"
    for command in COMMANDS:
        assert command.startswith(NOT_HERE) or any(name in command for name in known), command
    assert len(OF_LUMINA) > 10


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The files that the commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red apple\nblue car\n", encoding="utf-8")
    return tmp_path


def lora(path):
    from diffusers import Lumina2Pipeline
    from peft import LoraConfig, get_peft_model_state_dict

    transformer = Lumina2Pipeline.from_pretrained(BUNDLED).transformer
    transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(transformer).items()}
    save_file({key: value.contiguous() for key, value in state.items()}, path)


@pytest.mark.parametrize("command", OF_LUMINA)
def test_commands_of_the_script(command, here, monkeypatch, capsys):
    """Run to the end on the bundled model in a few steps; those for a GPU are read by the script as if it had one."""
    words = shlex.split(command)
    words = words[words.index(next(w for w in words if w.endswith("teacache_lumina2.py"))) + 1 :]
    if "--lora" in words:
        lora(here / "style.safetensors")
    if "--offload" in words:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        args = options_lumina2.parse(words)
        assert args.device == "cuda" and args.offload == "model" and args.model == teacache_lumina2.MODEL
        return
    if "--transformer" in words:  # a single file in diffusers' names; Neta's own are diffusers' to convert
        (here / words[words.index("--transformer") + 1]).write_bytes(b"checked that it is there")
        assert options_lumina2.parse(words).transformer.name == "neta-lumina.pth"
        return
    if command.startswith("accelerate launch"):
        run = two_processes(ROOT / "TeaCache4LuminaT2X" / "teacache_lumina2.py", *words, *QUICK)
        assert run.returncode == 0 and "2 of 2 are in pictures" in run.stdout, run.stderr
        return
    if "--compile" in words and shutil.which("g++") is None:
        pytest.skip("on a CPU, torch.compile needs a C++ compiler")
    torch._dynamo.reset()
    try:
        teacache_lumina2.main([*words, *QUICK])
    except SystemExit as exit:
        assert not exit.code
    out = capsys.readouterr().out
    made = sorted(path.relative_to(here).as_posix() for path in here.rglob("*.png"))
    if "--prompts" in words:
        folder = words[words.index("--output") + 1] if "--output" in words else "teacache_lumina2_pictures"
        assert made == [f"{folder}/0001-red-apple.png", f"{folder}/0002-blue-car.png"] and "2 of 2" in out
    else:
        assert made == [f"teacache_lumina2_{'compare' if '--compare' in words else 'output'}.png"] and "saved" in out


@pytest.mark.parametrize("command", [c for c in COMMANDS if "calibrate_lumina2.py" in c])
def test_commands_of_the_calibration(command, here, capsys):
    words = [str(BUNDLED) if word == "PATH" else word for word in shlex.split(command)]
    calibrate_lumina2.main([*words[words.index("calibrate_lumina2.py") + 1 :], "--num-inference-steps", "8"])
    assert "COEFFICIENTS = [" in capsys.readouterr().out
    assert sorted(p.suffix for p in here.glob("lumina2_calibration.*")) == [".json", ".jsonl", ".png"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "tests/benchmarks/" in c])
def test_commands_of_the_benchmarks(command):
    """That the file takes such flags; what they measure takes minutes."""
    words = shlex.split(command)
    run = subprocess.run([sys.executable, ROOT / words[1], "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(word in run.stdout for word in words[2:] if word.startswith("--"))


def test_flags_are_all_in_the_table(capsys):
    """Each flag of the script has a row in its README, and no row is of a flag that is gone."""
    with pytest.raises(SystemExit):
        options_lumina2.parse(["--help"])
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", capsys.readouterr().out)) - {"--help"}
    rows = re.findall(r"^\| (`--.*?) \|", LUMINA, re.M)
    assert {flag for row in rows for flag in re.findall(r"--[a-z][a-z0-9-]+", row)} == flags


# --- figures ----------------------------------------------------------------------------------


def table(text, heading):
    """Rows of the first table after a line that begins so."""
    rows = re.search(rf"^{re.escape(heading)}.*?^\|[ :|-]+\|\n((?:\|[^\n]*\n)+)", text, re.M | re.S).group(1)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def test_speedups_are_ratios_of_their_seconds():
    seconds = [float(x) for x in re.findall(r"~([\d.]+) s", LUMINA)]
    ratios = [float(x) for x in re.findall(r"~[\d.]+ s \(([\d.]+)x\)", LUMINA)]
    assert ratios == [pytest.approx(seconds[0] / s, abs=0.006) for s in seconds[1:]] and len(ratios) == 3
    rows = table(LUMINA, "## 📈 Measured here")
    base = float(rows[0][1])
    for thresh, took, speedup, *_ in rows:  # of seconds that are rounded to two places
        low, high = (base - 0.005) / (float(took) + 0.005), (base + 0.005) / (float(took) - 0.005)
        assert low - 0.005 <= float(speedup.rstrip("x")) <= high + 0.005, thresh


def test_the_front_page_says_what_the_other_pages_say():
    rows = table(LUMINA, "## 📈 Measured here")
    caption = " ".join(FRONT.split("assets/strip.png", 1)[1].split("*", 2)[1].split())
    assert re.findall(r"([\d.]+) s\b", caption) == [row[1] for row in rows]
    assert " / ".join(row[2] for row in rows[1:]) in FRONT
    assert "1.05x / 1.15x / 1.25x" in FRONT
    fewer = [row[2].split(", ")[1].split("x")[0] for row in table(MEMO, "## Configuration")]
    assert " / ".join(f"{x}x" for x in fewer) + " fewer passes" in FRONT
    (seconds,) = set(re.findall(r"in (\d+) s on two cores", FRONT + LUMINA))
    assert seconds == "83"


def test_figures_of_the_calibration():
    fits = json.loads((BUNDLED / "teacache.json").read_text(encoding="utf-8"))["forecast"]
    said = " ".join(LUMINA.split())
    for name in ("modulated", "timestep"):
        assert f"{fits[name]['r2']:.2f} for `{name}`" in said


def compared():
    """{steps: ({(way, setting): (share, wall, mean, least)}, rows of what was aimed at)}."""
    found = {}
    for part in re.split(r"^(?=\d+ steps:$)", LUMINA.split("## Compared", 1)[1].split("\n## ")[0], flags=re.M)[1:]:
        steps = int(part.split()[0])
        ways = {}
        for way, setting, share, wall, psnr, _ in table(part, f"{steps} steps:"):
            mean, least = re.fullmatch(r"([\d.]+) \(([\d.]+)\) dB", psnr).groups()
            ways[way, setting] = float(share), float(wall.rstrip("x")), float(mean), float(least)
        found[steps] = ways, table(part, "What was aimed at")
    return found


def test_what_was_found_follows_from_the_tables():
    """Each difference, and each verdict, from the rows above it."""
    for steps, (ways, aims) in compared().items():
        for speedup, against, aimed, found, verdict in aims:
            share, wall, mean, least = ways["forecast, speedup", f"speedup {speedup}"]
            fewer = ways["fewer steps", f"{teacache_lumina2.count(steps, int(speedup))} steps"]
            value = float(found.split()[0])
            if against == "fewer steps, mean":
                assert value == pytest.approx(mean - fewer[2], abs=0.11)
            elif against == "fewer steps, least":
                assert value == pytest.approx(least - fewer[3], abs=0.11)
            elif against.startswith("hold"):
                assert value == pytest.approx(mean - ways["hold, speedup", f"speedup {speedup}"][2], abs=0.11)
            elif against.startswith("wall"):
                assert value == pytest.approx(wall * share, abs=0.02)
            else:
                theirs = [w[2] for name, w in ways.items() if name[0].startswith("cache-dit") and w[0] <= 1.1 * share]
                assert value == pytest.approx(mean - max(theirs), abs=0.11)
            if aimed:
                assert verdict == ("met" if value >= float(aimed.split()[0]) and found[0] != "-" else "missed")
    assert set(compared()) == {30, 50}


def test_what_the_front_page_says_of_others():
    """Ranges and differences, from the tables of the comparison."""
    found = compared()
    own = [
        w[:3:2]
        for ways, _ in found.values()
        for (way, _), w in ways.items()
        if way.startswith("cache-dit") and "our steps" not in way
    ]
    text = " ".join(FRONT.split())
    low, high = (int(x) for x in re.search(r"came to (\d+) to (\d+) dB", text).groups())
    assert low == int(min(mean for _, mean in own)) and high == round(max(mean for _, mean in own) + 0.49)
    shares = re.search(r"on ([\d.]+) to ([\d.]+) of the passes", text).groups()
    assert [float(x) for x in shares] == [min(s for s, _ in own), max(s for s, _ in own)]
    for speedup, pair in re.findall(r"`--speedup (\d)` to ([\d.]+ and [\d.]+) dB", text):
        means = [found[steps][0]["forecast, speedup", f"speedup {speedup}"][2] for steps in (30, 50)]
        assert [float(x) for x in pair.split(" and ")] == means
    half = found[30][0]
    gain = half["forecast, speedup", "speedup 2"][2] - half["fewer steps", "15 steps"][2]
    assert f"{gain:.1f} dB closer" in text


def test_memory_of_the_released_sizes():
    """The weights that the README names, from the configurations; the peaks of activations take minutes."""
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    try:
        import lumina2_memory
    finally:
        del sys.path[0]
    weights = lumina2_memory.weights_of(lumina2_memory.sizes(tiny=False), torch.bfloat16)
    said = " ".join(LUMINA.split())
    names = {"transformer": "for the transformer", "text_encoder": "for the text encoder", "vae": "for the VAE"}
    for name, words in names.items():
        assert re.search(rf"{weights[name][0] / 2**30:.1f} (?:of weights )?{words}", said), name


def test_tables_of_memory_are_what_the_benchmark_printed():
    """Its JSON line lies beside it."""
    printed = json.loads((ROOT / "tests" / "benchmarks" / "lumina2_memory.json").read_text(encoding="utf-8"))
    rows = [
        [size, dtype, offload, float(a), float(b)] for size, dtype, offload, a, b in table(LUMINA, "## Small cards")
    ]
    assert rows == printed["rows"] and not printed["tiny"]
    cache = printed["bytes"][0]["cache"]
    assert printed["bytes"][0]["dtype"] == "bfloat16" and printed["bytes"][0]["height"] == 1024
    said = " ".join(LUMINA.split())
    speedup, threshold, hold = (cache[name] / 2**20 for name in ("speedup", "threshold", "threshold, hold"))
    assert f"{speedup:.0f} MiB with a speedup, {threshold:.0f} MiB with a threshold" in said
    assert f"{hold:.0f} MiB with a threshold and `hold`" in said


def test_memory_benchmark_runs():
    """At a tiny size: more offloading and tiling never need more."""
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "lumina2_memory.py", "--tiny"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout.splitlines()[-1])["rows"]
    assert len(rows) == 12 and all(tiled <= plain for *_, plain, tiled in rows)
    for none, model, sequential in zip(rows[::3], rows[1::3], rows[2::3]):
        assert none[3] >= model[3] >= sequential[3] > 0


def test_table_of_compiling_is_what_the_benchmark_printed():
    printed = json.loads((ROOT / "tests" / "benchmarks" / "lumina2_compile.json").read_text(encoding="utf-8"))
    rows = [[cell.removesuffix(" s") for cell in row[1:]] for row in table(LUMINA, "## Compile")]
    medians = [[f"{x:.2f}" for x in printed["medians"][way]] for way in ("threshold 0", "speedup 2")]
    assert rows == [*(["", f"{printed[name]:.2f}"] for name in ("first", "later", "second")), *medians]
    ratios = [without / with_it for without, with_it in printed["medians"].values()]
    assert f"{ratios[0]:.2f}x at threshold 0, {ratios[1]:.2f}x at a speedup of 2" in " ".join(LUMINA.split())
