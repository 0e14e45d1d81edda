"""What is shipped: the bundled model, the READMEs, and that their words are true."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import BUNDLED, ROOT
from PIL import Image
from safetensors import safe_open

from TeaCache4LuminaT2X import teacache_lumina2


def read(*path):
    return ROOT.joinpath(*path).read_text(encoding="utf-8")


def config(part):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return json.loads(read("assets", "lumina2-emoji", part, name))


# --- the bundled model ----------------------------------------------------------------


def test_bundled_model_is_what_it_says():
    transformer, vae, text = config("transformer"), config("vae"), config("text_encoder")
    assert transformer["num_layers"] >= 12 and transformer["num_refiner_layers"] == 2
    assert vae["latent_channels"] == transformer["in_channels"] == 16 and len(vae["block_out_channels"]) == 4
    assert vae["sample_size"] == 8 * transformer["sample_size"] >= 128
    assert text["model_type"] == "gemma2" and text["hidden_size"] == transformer["cap_feat_dim"]
    assert config("scheduler")["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    size = sum(f.stat().st_size for f in BUNDLED.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    assert size <= 40e6
    for readme in (read("README.md"), read("assets", "lumina2-emoji", "README.md")):
        assert f"{size / 1e6:.0f} MB" in readme
    assert json.loads(read("assets", "lumina2-emoji", "training.json"))["vae_psnr_db"] >= 28
    for file in BUNDLED.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
        assert all(t.dtype == torch.float16 and t.isfinite().all() for t in tensors)


def test_bundled_model_loads_in_old_and_new_libraries(pipeline):
    """transformers 4 and 5 know this tokenizer class; nothing is loaded in half precision unasked."""
    fast = "PreTrainedTokenizerFast"
    assert json.loads(read("assets", "lumina2-emoji", "tokenizer", "tokenizer_config.json"))["tokenizer_class"] == fast
    assert json.loads(read("assets", "lumina2-emoji", "model_index.json"))["tokenizer"] == ["transformers", fast]
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}
    assert {p.dtype for p in pipeline.text_encoder.parameters()} == {torch.float32}
    for file in BUNDLED.rglob("*config*.json"):  # no private keys, where libraries write the path they loaded from
        private = {key for key in json.loads(file.read_text(encoding="utf-8")) if key.startswith("_")}
        assert private <= {"_class_name", "_diffusers_version"}, file


def test_tokenizer_folds_the_system_prompt(pipeline):
    sent = f"{pipeline.system_prompt} <Prompt Start> a Red apple!"
    tokens = pipeline.tokenizer.convert_ids_to_tokens(pipeline.tokenizer(sent).input_ids)
    assert tokens == ["<bos>", "a", "red", "apple"]
    assert pipeline.tokenizer("").input_ids == [pipeline.tokenizer.bos_token_id]
    unknown = pipeline.tokenizer("apples and xylophones").input_ids
    assert pipeline.tokenizer.unk_token_id not in unknown, "unknown words are spelled"


NAMED_COLOURS = {"red circle": (210, 60, 60), "green circle": (70, 190, 110), "blue circle": (60, 120, 220)}


@pytest.mark.parametrize("prompt", NAMED_COLOURS)
def test_bundled_model_draws_what_it_is_told(pipeline, prompt):
    """The middle of the picture has the colour of the prompt, the corners are white."""
    image = np.asarray(pipeline(prompt, generator=torch.Generator().manual_seed(0)).images[0]).astype(float)
    middle = image[48:80, 48:80].mean(axis=(0, 1))
    distance = {name: np.abs(middle - colour).sum() for name, colour in NAMED_COLOURS.items()}
    assert min(distance, key=distance.get) == prompt
    assert image[:6, :6].mean() > 240 and image[-6:, -6:].mean() > 240


def test_sheet_is_there():
    with Image.open(ROOT / "assets" / "emoji_sheet.png") as sheet:
        assert sheet.width >= 8 * 128 and sheet.height >= 6 * 128


# --- the READMEs -------------------------------------------------------------------------


def test_the_line_of_the_threshold():
    """The README of the model names the line to edit."""
    (number,) = re.findall(r"line\s+(\d+)\s+of\s+`teacache_lumina2.py`", read("TeaCache4LuminaT2X", "README.md"))
    line = read("TeaCache4LuminaT2X", "teacache_lumina2.py").splitlines()[int(number) - 1]
    assert line.startswith("REL_L1_THRESH = ")


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"^pip install .* && .*$", read("README.md"), re.M)
    assert len(commands) == 2, "one sets up and runs the main job, one the tests"
    assert read(".ci", "run").splitlines()[-1] == commands[1]
    assert commands[0].endswith("python TeaCache4LuminaT2X/teacache_lumina2.py --compare 0 0.1 0.2 0.3")


def test_the_table_of_the_bundled_model(pipeline):
    """Steps computed with the model's own coefficients, as in the README; one may round differently elsewhere."""
    text = read("TeaCache4LuminaT2X", "README.md").split("Measured here", 1)[1]
    rows = re.findall(r"^\| ([\d.]+) \| [\d.]+ \| [\d.]+x \| (\d+) / 30 \|", text, re.M)
    assert [thresh for thresh, _ in rows] == ["0", "0.1", "0.2", "0.3"]
    try:
        for thresh, computed in rows:
            found = teacache_lumina2.coefficients_of(BUNDLED / "teacache.json", "modulated", "forecast")
            given = {"coefficients": found[0], "domain": found[1]}
            teacache_lumina2.apply_teacache(pipeline.transformer, 30, float(thresh), **given)
            generator = torch.Generator().manual_seed(teacache_lumina2.SEED)
            pipeline(teacache_lumina2.BUNDLED_PROMPT, generator=generator, output_type="latent")
            assert abs(sum(pipeline.transformer.teacache.schedule) - int(computed)) <= 1
    finally:
        teacache_lumina2.remove_teacache(pipeline.transformer)


def test_what_the_founding_readme_documents():
    """Latency table of the 4070 laptop, coefficients, paper, thanks."""
    text = read("TeaCache4LuminaT2X", "README.md")
    latency = "97.74 93.19 84.72 78.43 4070 flash-attn 2411.19108 liu2024timestep".split()
    for fact in (*latency, "1024 x 1536"):
        assert fact in text, fact
    assert "python teacache_lumina2.py" in text and "Alpha-VLLM/Lumina-Image-2.0" in text
    assert str(teacache_lumina2.COEFFICIENTS) in text and str(teacache_lumina2.COEFFICIENTS_V2) in text


def test_links_in_readmes_lead_somewhere():
    for folder in (".", "TeaCache4LuminaT2X", "TeaCache4Memo", "assets/lumina2-emoji"):
        for link in re.findall(r"\]\((?!http|#)([^)]+)\)|src=\"(?!http)([^\"]+)\"", read(folder, "README.md")):
            target = (ROOT / folder / (link[0] or link[1]).split("#")[0]).resolve()
            assert target.exists(), f"{folder}/README.md: {target}"


# --- the source ----------------------------------------------------------------------------


def test_script_imports_only_torch_and_diffusers():
    source = read("TeaCache4LuminaT2X", "teacache_lumina2.py")
    found = re.findall(r"^ *(?:from|import) ([a-z_]+)", source.split('"""', 2)[2], re.M)
    assert set(found) - set(sys.stdlib_module_names) == {"torch", "diffusers"}


def test_coefficients_are_the_published_ones():
    v1 = [393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344]
    v2 = [225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552]
    assert teacache_lumina2.COEFFICIENTS == teacache_lumina2.COEFFICIENTS_V1 == v1
    assert teacache_lumina2.COEFFICIENTS_V2 == v2
    assert teacache_lumina2.REL_L1_THRESH == 0.3 and teacache_lumina2.NUM_INFERENCE_STEPS == 30


def test_the_snippets_run(tmp_path, monkeypatch):
    """Those of the root README and of the model card, as they stand."""
    for number, readme in enumerate([read("README.md"), read("assets", "lumina2-emoji", "README.md")]):
        (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.S)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "assets").is_symlink() or (tmp_path / "assets").symlink_to(ROOT / "assets")
        exec(snippet, {})
        (tmp_path / "apple.png").rename(tmp_path / f"{number}.png")
    with Image.open(tmp_path / "0.png") as image:
        assert image.size == (128, 128)


def test_no_machine_in_tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(root|home|tmp|Users)/\w")
    for name in listed.stdout.split():
        if name.endswith((".py", ".md", ".json", ".toml", ".txt")) and not name.startswith("tests/"):
            assert not pattern.search(read(name)), name


def test_ruff():
    pytest.importorskip("ruff")
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
