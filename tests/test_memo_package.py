"""The README of MEMO: that its words are true, and its snippets run as they stand."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MEMO_DOUBLE, ROOT, two_processes
from diffusers import AutoencoderKL
from memo_models import AUDIO, REAL, memo, package, save_parts, tiny_pipeline
from PIL import Image
from test_memo_cli import here, models, verbosity  # noqa: F401, fixtures

from TeaCache4Memo import options_memo, prepare_memo, teacache_memo


def read(*path):
    return ROOT.joinpath(*path).read_text(encoding="utf-8")


README = read("TeaCache4Memo", "README.md")
SOURCE = read("TeaCache4Memo", "teacache_memo.py")


def test_the_line_of_the_threshold():
    (number,) = re.findall(r"line\s+(\d+)\s+of\s+`teacache_memo.py`", README)
    assert SOURCE.splitlines()[int(number) - 1].startswith("REL_L1_THRESH = 0.15 ")


def test_what_the_founding_readme_documents():
    """Latency on the A800, speedups, attributes, commands, paper, thanks."""
    facts = "A800|~25 min|~17 min|~12 min|~10 min|1.5x|2.0x|2.5x|0.09 to 0.25|liu2024timestep|2411.19108".split("|")
    facts += ["python teacache_memo.py", "pip install -e .", "UNet3DConditionModel.forward = teacache_forward"]
    facts += ["from memo.models.unet_3d import UNet3DConditionModel", "enable_teacache = True", "cnt = 0"]
    facts += ["from memo.pipelines.video_pipeline import VideoPipeline", "num_steps = num_inference_steps"]
    facts += ["rel_l1_thresh = 0.15", "accumulated_rel_l1_distance = 0", "previous_modulated_input = None"]
    facts += ["previous_residual = None", 'VideoPipeline.from_pretrained("path/to/memo/model")', "imageio"]
    for fact in facts:
        assert fact in README, fact


def test_steps_in_the_readme_are_those_of_the_test():
    """The table's columns, and what test_memo_state_machine.py measures."""
    rows = re.findall(r"^\| ([\d.]+) \| ~[\d.]+x \| (\d+), ([\d.]+)x fewer \| (\d+), ([\d.]+)x fewer \|$", README, re.M)
    assert [(r[0], int(r[1]), int(r[3])) for r in rows] == [("0.09", 17, 17), ("0.15", 11, 12), ("0.25", 7, 8)]
    for _, a, fewer_a, b, fewer_b in rows:
        assert float(fewer_a) == pytest.approx(20 / int(a), abs=0.051)
        assert float(fewer_b) == pytest.approx(50 / int(b), abs=0.051)
    text = read("tests", "test_memo_state_machine.py")
    assert "(20, (17, 11, 7)), (50, (17, 12, 8))" in text and "(0.15, 0.25), (15, 10, 7)" in text.replace("0.09, ", "")


def test_constants():
    """memo's defaults, the founding README's threshold, and a fence around them."""
    assert teacache_memo.REL_L1_THRESH == 0.15 and teacache_memo.NUM_INFERENCE_STEPS == 20
    assert teacache_memo.COEFFICIENTS == [1.0, 0.0] and teacache_memo.MODEL == prepare_memo.HUB
    fenced = re.findall(r"^# -{70,}\n(.*?)^# -{70,}\n", SOURCE, re.M | re.S)
    assert len(fenced) == 1 and "REL_L1_THRESH" in fenced[0].splitlines()[0]


def test_script_imports_only_torch_and_diffusers_at_the_top():
    modules = set()
    body = ast.parse(SOURCE).body
    for node in [*body, *(node for part in body if isinstance(part, ast.Try) for node in part.body)]:
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"torch", "diffusers"}


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Where we are, `memoavatar/memo` and the VAE lie under their names on the Hub: tiny, but for pictures of 512."""
    monkeypatch.chdir(tmp_path)
    pipeline, _ = tiny_pipeline()
    torch.manual_seed(0)
    shape = {"seq_len": 5, "blocks": 12, "channels": 768, "intermediate_dim": 4, "output_dim": AUDIO}
    audio_proj = memo.AudioProjModel(**shape, context_tokens=4)
    audio_proj.register_to_config(**shape, context_tokens=4)
    levels = 8  # 512 pixels are 4 latents
    pipeline.vae = AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    model, vae = save_parts(pipeline, audio_proj, tmp_path)
    for folder, name in ((model, "memoavatar/memo"), (vae, "stabilityai/sd-vae-ft-mse")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / folder).rename(tmp_path / name)
    return tmp_path


def test_the_snippet_of_the_call(released, capsys):
    """To the letter: loading, TeaCache, one clip of 16 frames with 512 x 512 pixels."""
    snippet = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    generator = torch.Generator().manual_seed(0)
    given = {
        "ref_image": torch.rand(1, 17, 3, 512, 512, generator=generator) * 2 - 1,
        "face_emb": torch.randn(1, 512, generator=generator),
        "audio_emb": torch.randn(1, 16, 5, 12, 768, generator=generator),
        "audio_emotion": torch.full((16,), 3, dtype=torch.int),
    }
    exec(snippet, given)
    assert given["output"].videos.shape == (1, 3, 16, 512, 512) and given["output"].videos.isfinite().all()
    schedule = eval(capsys.readouterr().out)
    assert len(schedule) == 20 and schedule[0] and schedule[-1] and not all(schedule)
    assert "teacache" not in vars(given["pipeline"].diffusion_net)


def test_the_snippet_of_the_docstring(released):
    snippet = re.search(r"\n( +from TeaCache4Memo.*?)\n\"\"\"", SOURCE, re.S).group(1)
    given = {}
    exec("\n".join(line.strip() for line in snippet.splitlines()), given)
    assert given["pipeline"].diffusion_net.rel_l1_thresh == 0.15


def test_the_snippet_of_the_class(tmp_path):
    """The founding README's way on a saved pipeline, then a clip, in a process that has imported nothing before."""
    tiny_pipeline()[0].save_pretrained(tmp_path / "path/to/memo/model")
    snippet = re.findall(r"```python\n(.*?)```", README, re.S)[1]
    code = f"""
num_inference_steps = 12
{snippet}
import torch
pipeline.diffusion_net.__class__.rel_l1_thresh = 9.0
pipeline.set_progress_bar_config(disable=True)
pipeline(
    ref_image=torch.rand(1, 3, 3, 16, 16) * 2 - 1,
    face_emb=torch.randn(1, 512),
    audio_tensor=torch.randn(1, 16, 4, 16),
    audio_emotion=torch.full((16,), 3, dtype=torch.int),
    emotion_class_num=9,
    width=16,
    height=16,
    video_length=16,
    num_inference_steps=12,
    guidance_scale=3.5,
)
assert pipeline.diffusion_net.teacache.schedule == [True] + [False] * 10 + [True]
"""
    path = os.pathsep.join([str(ROOT), str(Path(package.__file__).parent.parent)])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# --- the commands of the READMEs ------------------------------------------------------------------

COMMANDS = re.findall(r"^(?:python|accelerate launch) teacache_memo.py.*?(?=\s+#|$)", README + read("README.md"), re.M)


@pytest.mark.skipif(REAL, reason="the saved models are the real memo's, and its utils need models from the Hub")
@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_commands_of_the_script(command, here, capsys):  # noqa: F811
    """As they stand, on the double: its files lie where the commands look for them."""
    for folder in ("configs", "assets/examples"):
        (here / folder).mkdir(parents=True)
    shutil.copy("config.yaml", "configs/inference.yaml")
    shutil.copy("speech.wav", "assets/examples/speech.wav")
    for name in ("face.jpg", "assets/examples/dicaprio.jpg"):
        Image.open("face.png").save(name)
    (here / "pairs.csv").write_text("face.jpg,speech.wav\nface.png,speech.wav\n")
    words = shlex.split(command)
    flags = words[words.index("teacache_memo.py") + 1 :]
    if words[0] == "accelerate":
        run = two_processes(ROOT / "TeaCache4Memo" / "teacache_memo.py", *flags, PYTHONPATH=str(MEMO_DOUBLE))
        assert run.returncode == 0 and "2 of 2 are in videos" in run.stdout, run.stderr
        return
    try:
        teacache_memo.main(flags)
    except SystemExit as exit:
        assert not exit.code
    made = sorted(path.relative_to(here).as_posix() for path in here.rglob("*.mp4"))
    if "--pairs" in flags:
        assert made == ["videos/0001-face-speech.mp4", "videos/0002-face-speech.mp4"]
    else:
        name = "face" if "--input_image" in flags else "dicaprio"
        assert made == [f"outputs/{name}_speech{'_compare' if '--compare' in flags else ''}.mp4"]


def test_there_are_such_commands():
    assert len(set(COMMANDS)) >= 5


def test_flags_are_all_in_the_table(capsys):
    """Each flag of the script has a row in its README, and no row is of a flag that is gone."""
    with pytest.raises(SystemExit):
        options_memo.parse(["--help"])
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]+", capsys.readouterr().out)) - {"--help"}
    flags -= {flag for flag in flags if any(flag != other and other.startswith(f"{flag}_") for other in flags)}
    rows = re.findall(r"^\| (`--.*?) \|", README, re.M)
    assert {flag for row in rows for flag in re.findall(r"--[a-z][a-z0-9_]+", row)} == flags
