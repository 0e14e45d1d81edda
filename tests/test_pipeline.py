"""The bundled pipeline: its modes with TeaCache, and that it is what it says."""

import contextlib
import gc
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import BUNDLED, ROOT
from diffusers import Lumina2Pipeline
from machines import kept
from safetensors import safe_open

from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache, remove_teacache

WAYS = [dict(rel_l1_thresh=0.3, coefficients=[1.0, 0.0]), dict(computed_steps=3)]


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(prompt="red apple", negative_prompt="green apple", cfg_trunc_ratio=0.5, cfg_normalization=False),
        dict(prompt=["red apple", "smiling face with sunglasses"], width=96),
    ],
    ids=str,
)
def test_modes(pipeline, kwargs):
    """Threshold 0 is the plain pipeline bit for bit; after another image, the same again."""
    model, steps, kwargs = pipeline.transformer, 5, {"height": 64, "width": 64, **kwargs}

    def draw(seed=0):
        generator = torch.Generator().manual_seed(seed)
        return pipeline(**kwargs, num_inference_steps=steps, generator=generator, output_type="latent").images

    stock = draw()
    apply_teacache(pipeline, rel_l1_thresh=0)
    assert torch.equal(draw(), stock)
    for way in WAYS:
        apply_teacache(pipeline, **way)
        first, schedule = draw(), model.teacache.schedule
        assert len(schedule) == steps and schedule[0] and schedule[-1] and False in schedule
        assert sum(schedule) == way.get("computed_steps", sum(schedule))
        assert not torch.equal(first, stock) and kept(model) == []
        draw(seed=1)
        assert torch.equal(draw(), first)


@pytest.fixture(autouse=True)
def given_back(request):
    """The pipeline is shared by all tests."""
    yield
    if "pipeline" in request.fixturenames:
        remove_teacache(request.getfixturevalue("pipeline"))


def draw(pipeline, **kwargs):
    settings = {"num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "latent", "height": 64, "width": 64}
    return pipeline("blue apple", generator=torch.Generator().manual_seed(0), **settings, **kwargs).images


@pytest.fixture
def applied(pipeline):
    """What the plain pipeline draws, and what it draws with TeaCache, which is on."""
    stock = draw(pipeline)
    apply_teacache(pipeline, computed_steps=3)
    return stock, draw(pipeline)


def from_components(pipeline):
    return Lumina2Pipeline(**pipeline.components)


@pytest.mark.parametrize("remake", [Lumina2Pipeline.from_pipe, from_components], ids=["from_pipe", "components"])
def test_a_pipeline_made_anew_from_itself(pipeline, applied, remake):
    """The first one is collected; network and scheduler know each other."""
    first = remake(pipeline)
    apply_teacache(first, computed_steps=3)
    second = remake(first)
    del first
    gc.collect()
    second.set_progress_bar_config(disable=True)
    assert torch.equal(draw(second), applied[1])
    assert repr(second.transformer.teacache).startswith("3 of 6 steps computed")
    remove_teacache(second)
    assert torch.equal(draw(second), applied[0])


@pytest.mark.parametrize("remake", [lambda pipeline: pipeline, from_components], ids=["applied", "components"])
def test_a_pipeline_saved_while_applied_is_a_stock_one(pipeline, applied, remake, tmp_path):
    """As the scheduler's class is not ours to name."""
    remake(pipeline).save_pretrained(tmp_path)
    index = json.loads(read(tmp_path, "model_index.json"))
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert "teacache" not in read(tmp_path, "scheduler", "scheduler_config.json").lower()
    loaded = Lumina2Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(draw(loaded), applied[0], atol=1e-4)


@pytest.mark.parametrize("way", [dict(computed_steps=3), dict(rel_l1_thresh=0.3)], ids=str)
def test_another_cache_on_an_applied_pipeline(pipeline, way):
    """Both, or one line that says what to do; and each is as before when the other has gone."""
    cache_dit = pytest.importorskip("cache_dit")

    @contextlib.contextmanager
    def another_cache():
        cache_dit.enable_cache(pipeline)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipeline)

    apply_teacache(pipeline, **way)
    expected = draw(pipeline)
    with another_cache():
        if "computed_steps" in way:
            assert draw(pipeline).isfinite().all() and sum(pipeline.transformer.teacache.schedule) == 3
        else:
            with pytest.raises(ValueError, match="use computed_steps, or remove the other cache"):
                draw(pipeline)
    assert torch.equal(draw(pipeline), expected)
    remove_teacache(pipeline)
    stock = draw(pipeline)
    with another_cache(), pytest.raises(ValueError, match="is not diffusers's: apply TeaCache before others"):
        apply_teacache(pipeline, **way)
    assert torch.equal(draw(pipeline), stock)


# --- what is shipped -----------------------------------------------------------------------


def read(*path):
    return ROOT.joinpath(*path).read_text(encoding="utf-8")


def test_the_bundled_model_is_what_it_says(pipeline):
    transformer, vae = (json.loads(read(BUNDLED / part / "config.json")) for part in ("transformer", "vae"))
    assert transformer["num_layers"] >= 12 and vae["latent_channels"] == transformer["in_channels"] == 16
    assert vae["sample_size"] == 8 * transformer["sample_size"] == 128
    assert sum(f.stat().st_size for f in BUNDLED.rglob("*.*") if f.is_file()) <= 40e6
    for file in BUNDLED.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
        assert all(t.dtype == torch.float16 and t.isfinite().all() for t in tensors)
    # transformers 4 and 5 know this class; no private keys, where libraries write the path they loaded from
    assert json.loads(read(BUNDLED / "model_index.json"))["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    for file in BUNDLED.rglob("*config*.json"):
        private = {key for key in json.loads(read(file)) if key.startswith("_")}
        assert private <= {"_class_name", "_diffusers_version"}, file
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}
    sent = f"{pipeline.system_prompt} <Prompt Start> a Red apple!"
    tokens = pipeline.tokenizer.convert_ids_to_tokens(pipeline.tokenizer(sent).input_ids)
    assert tokens == ["<bos>", "a", "red", "apple"], "the system prompt is folded"


COLOURS = {"red circle": (210, 60, 60), "green circle": (70, 190, 110), "blue circle": (60, 120, 220)}


@pytest.mark.parametrize("way", [dict(rel_l1_thresh=0), dict(computed_steps=5)], ids=str)
def test_it_draws_what_it_is_told(pipeline, way):
    """The middle of the picture has the colour of the prompt, the corners are white; with TeaCache too."""
    apply_teacache(pipeline.transformer, 8, **way)
    images = pipeline(list(COLOURS), num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images
    for prompt, image in zip(COLOURS, images):
        image = np.asarray(image).astype(float)
        middle = image[48:80, 48:80].mean(axis=(0, 1))
        distance = {name: np.abs(middle - colour).sum() for name, colour in COLOURS.items()}
        assert min(distance, key=distance.get) == prompt
        assert image[:6, :6].mean() > 240 and image[-6:, -6:].mean() > 240


def test_no_machine_in_tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(root|home|tmp|work|Users)/\w")
    for name in listed.stdout.split():
        if name.endswith((".py", ".md", ".json", ".toml", ".txt")) and (ROOT / name).is_file():
            assert name == "tests/test_pipeline.py" or not pattern.search(read(name)), name


def test_ruff():
    pytest.importorskip("ruff")
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
