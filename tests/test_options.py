"""Flags for small cards, compiling, LoRA; and what a user reads when something goes wrong."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import BUNDLED, ROOT, equal, tensors_in
from diffusers import Lumina2Pipeline
from lumina_models import conditioning, denoise, tiny_model
from PIL import Image

from TeaCache4LuminaT2X import options_lumina2, teacache_lumina2
from TeaCache4LuminaT2X.attention_lumina2 import GroupedAttention
from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache, main

SCRIPT = ROOT / "TeaCache4LuminaT2X" / "teacache_lumina2.py"
FAST = ["--model", str(BUNDLED), "--num-inference-steps", "6"]
PROMPT, NEGATIVE = conditioning([7]), conditioning([5], seed=1)
IDENTITY = [1.0, 0.0]


def loaded(tmp_path, *flags):
    return options_lumina2.load_pipeline(options_lumina2.parse([*FAST, "--output", str(tmp_path / "x.png"), *flags]))


def picture(pipeline, thresh=0.1, **settings):
    """A picture of six steps, and its schedule."""
    pipeline.set_progress_bar_config(disable=True)
    apply_teacache(pipeline.transformer, 6, thresh, IDENTITY, **settings)
    generator = torch.Generator().manual_seed(3)
    image = pipeline("red apple", num_inference_steps=6, generator=generator, output_type="np").images[0]
    return image, pipeline.transformer.teacache.schedule


def weights(pipeline):
    return list(pipeline.transformer.parameters())


# --- small cards ---------------------------------------------------------------------------


def offload_model(pipeline):
    pipeline.enable_model_cpu_offload(device="cpu")


def offload_sequential(pipeline):
    """What enable_sequential_cpu_offload does, but for the name of the device: it would say cpu:0."""
    from accelerate import cpu_offload

    for model in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


@pytest.mark.parametrize("offload", [offload_model, offload_sequential])
@pytest.mark.parametrize("settings", [{}, {"predict": "hold"}, {"speedup": 2.0}, {"cache_device": "cpu"}], ids=str)
def test_offloaded_pictures_are_bit_for_bit_the_same(offload, settings):
    """accelerate's hooks, with the CPU as the device that the weights are moved to when they are needed."""
    thresh = None if "speedup" in settings else 0.3
    expected, schedule = picture(Lumina2Pipeline.from_pretrained(BUNDLED), thresh, **settings)
    pipeline = Lumina2Pipeline.from_pretrained(BUNDLED)
    offload(pipeline)
    image, ours = picture(pipeline, thresh, **settings)
    assert np.array_equal(image, expected) and ours == schedule and False in schedule
    hooked = [m for m in pipeline.transformer.modules() if hasattr(m, "_hf_hook")]
    assert len(hooked) > (20 if offload is offload_sequential else 0), "the hooks were there"
    assert all(w.device.type == ("meta" if offload is offload_sequential else "cpu") for w in weights(pipeline))


@pytest.mark.parametrize("predict", ["hold", "forecast"])
@pytest.mark.parametrize("device", [None, "meta"])
def test_where_the_cache_lives(predict, device):
    """On `cache_device`, all of it; without, where the activations are."""
    model, seen = tiny_model(), []

    def watch(step, name, count):
        branches = model.teacache.branches if "teacache" in vars(model) else []
        seen.extend(t.device.type for b in branches for t in tensors_in([b.signal, b.computed]))

    apply_teacache(model, 8, 1e-9, IDENTITY, predict, cache_device=device)
    if device is None:
        denoise(model, PROMPT, NEGATIVE, before_call=watch)
    else:  # what lies there cannot come back: the first comparison says so
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            denoise(model, PROMPT, NEGATIVE, before_call=watch)
    assert set(seen) == {device or "cpu"}


@pytest.mark.parametrize("predict", ["hold", "forecast"])
@pytest.mark.parametrize("way", [{"rel_l1_thresh": 0.3, "coefficients": IDENTITY}, {"speedup": 2.0}], ids=str)
def test_a_cache_on_the_cpu_changes_nothing(predict, way):
    model = tiny_model()
    outputs = []
    for device in (None, "cpu", torch.device("cpu")):
        apply_teacache(model, 8, predict=predict, cache_device=device, **way)
        outputs.append(denoise(model, PROMPT, NEGATIVE)[0])
    assert equal(outputs[0], outputs[1]) and equal(outputs[0], outputs[2]) and False in model.teacache.schedule


def test_a_cache_nowhere():
    with pytest.raises(ValueError, match="cache_device"):
        apply_teacache(tiny_model(), cache_device="fridge")


def test_cache_on_cpu_reaches_the_transformer(tmp_path):
    main([*FAST, "--cache-on-cpu", "--output", str(tmp_path / "a.png")])
    main([*FAST, "--output", str(tmp_path / "b.png")])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    args = options_lumina2.parse([*FAST, "--cache-on-cpu"])
    pipeline = options_lumina2.load_pipeline(args)
    teacache_lumina2.generate(pipeline, args, "red apple", 0.1)
    assert pipeline.transformer.cache_device == "cpu"


def test_vae_tiling(tmp_path):
    plain, tiled = loaded(tmp_path), loaded(tmp_path, "--vae-tiling")
    assert not plain.vae.use_tiling and not plain.vae.use_slicing
    assert tiled.vae.use_tiling and tiled.vae.use_slicing


@pytest.mark.parametrize("sample_size, pixels, tiles", [(1024, 1024, 9), (1024, 512, 1), (128, 256, 9)])
def test_tiles(sample_size, pixels, tiles):
    """At most 512 pixels each, so that a picture of 1024 is decoded in several; together they are the picture."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, sample_size=sample_size, **blocks).eval()
    latents = torch.randn(1, 4, pixels // 8, pixels // 8)
    sizes = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    with torch.no_grad():
        vae.decode(latents)
        options_lumina2.tile(vae)
        del sizes[:]
        decoded = vae.decode(latents).sample
    assert decoded.shape == (1, 3, pixels, pixels)
    assert len(sizes) == tiles and max(sizes) <= min(sample_size, 512)


def test_attention(tmp_path):
    """Without repeated heads as it comes, and bit for bit what diffusers' own draws."""
    ours, stock = loaded(tmp_path), Lumina2Pipeline.from_pretrained(BUNDLED)
    processor = ours.transformer.layers[0].attn.processor
    assert isinstance(processor, GroupedAttention) and processor.flash is None
    assert not isinstance(stock.transformer.layers[0].attn.processor, GroupedAttention)
    assert np.array_equal(picture(ours, 0.3)[0], picture(stock, 0.3)[0])


def test_flash_without_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*FAST, "--attention", "flash"])
    assert "needs a CUDA GPU" in capsys.readouterr().err


# --- LoRA ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A file as Lumina2's trainers save it, for the bundled model."""
    from peft import LoraConfig, get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("lora")
    transformer = Lumina2Pipeline.from_pretrained(BUNDLED).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    torch.manual_seed(0)
    for name, weight in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    Lumina2Pipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))
    return folder / "pytorch_lora_weights.safetensors"


def test_lora(lora, tmp_path):
    """It changes the picture; at scale 0 it does not; at 0.5 it is half of it; TeaCache goes on with it."""
    plain = picture(loaded(tmp_path), 0.0)[0]
    full = picture(loaded(tmp_path, "--lora", str(lora)), 0.0)[0]
    nothing = picture(loaded(tmp_path, "--lora", str(lora), "--lora-scale", "0"), 0.0)[0]
    half = picture(loaded(tmp_path, "--lora", str(lora), "--lora-scale", "0.5"), 0.0)[0]
    assert np.abs(nothing - plain).max() < 1e-4
    assert 0 < np.abs(half - plain).mean() < np.abs(full - plain).mean()
    by_hand = Lumina2Pipeline.from_pretrained(BUNDLED)
    by_hand.load_lora_weights(str(lora))
    by_hand.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    stock = by_hand("red apple", num_inference_steps=6, generator=generator, output_type="np").images[0]
    assert np.array_equal(full, stock), "bit for bit what diffusers draws with it"
    assert False in picture(loaded(tmp_path, "--lora", str(lora)), 0.5)[1]


def test_a_lora_that_is_none(tmp_path, capsys):
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    for flags, says in [
        (["--lora", str(tmp_path / "gone.safetensors")], "no LoRA file"),
        (["--lora", str(tmp_path / "no.safetensors")], "is it a LoRA"),
        (["--lora", str(tmp_path / "no.safetensors"), "--lora-scale", "nan"], "--lora-scale"),
    ]:
        with pytest.raises(SystemExit) as exit:
            main([*FAST, *flags, "--output", str(tmp_path / "x.png")])
        error = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and says in error[-1], error


# --- compiling -------------------------------------------------------------------------------


def graphs():
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_blocks_are_not_compiled_again(dynamo):
    """Two thresholds, prompts of other lengths, skipped and computed steps: all from the graphs of the first picture."""
    pipeline = Lumina2Pipeline.from_pretrained(BUNDLED)
    pipeline.set_progress_bar_config(disable=True)
    expected = picture(pipeline, 0.0)[0], picture(pipeline, 0.3)[0]
    for block in pipeline.transformer.layers:  # as --compile; "eager" captures the same graphs, and translates nothing
        block.compile(backend="eager")
    before = graphs()
    images = [picture(pipeline, 0.0)[0]]
    first = graphs() - before
    assert 1 <= first <= 2, "one for all blocks, and one more when another length comes"
    with torch._dynamo.config.patch(error_on_recompile=True):
        images.append(picture(pipeline, 0.3)[0])
        assert False in pipeline.transformer.teacache.schedule
        apply_teacache(pipeline.transformer, 6, speedup=2.0)
        pipeline("a very long description of a small red apple", num_inference_steps=6, output_type="latent")
        apply_teacache(pipeline.transformer, 6, indicator="timestep")
        pipeline("cat", num_inference_steps=6, output_type="latent")
    assert graphs() - before == first
    assert all(np.array_equal(a, b) for a, b in zip(images, expected))


def test_what_decides_is_not_compiled(dynamo):
    """Only the blocks are: the norm that the decision asks runs as it is, and a skip runs no graph."""
    pipeline = Lumina2Pipeline.from_pretrained(BUNDLED)
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph.forward(*args)

        return run

    for block in pipeline.transformer.layers:
        block.compile(backend=backend)
    schedule = picture(pipeline, 0.3)[1]
    assert len(calls) == 2 * sum(schedule) * len(pipeline.transformer.layers), "both passes of the computed steps"


@pytest.mark.parametrize(
    "device, flags, says",
    [
        ("cpu", [], "C++ compiler"),
        ("cuda", [], "Triton"),
        ("cuda", ["--offload", "sequential"], "leave one of them out"),
    ],
)
def test_compile_where_it_cannot(device, flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(SystemExit):
        options_lumina2.parse([*FAST, "--compile", *flags])
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and says in line


@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU, torch.compile needs a C++ compiler")
def test_compile(dynamo, tmp_path):
    """The flag, with torch's own backend: the same picture up to rounding."""
    for flag in ([], ["--compile"]):
        main([*FAST, *flag, "--speedup", "2", "--output", str(tmp_path / f"out{len(flag)}.png")])
    plain, compiled = (np.asarray(Image.open(tmp_path / f"out{i}.png")).astype(int) for i in (0, 1))
    assert np.abs(plain - compiled).max() <= 2 and graphs() > 0


def test_a_compiled_model_says_what_to_do():
    model = tiny_model()
    with pytest.raises(ValueError, match="compile the blocks in the model instead"):
        apply_teacache(torch.compile(model, backend="eager"))
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compile the blocks in the model instead"):
        apply_teacache(model)


# --- what goes wrong ----------------------------------------------------------------------------


def python(*command, path=None, cwd=None, **env):
    """A process of its own, the Hub out of reach."""
    env = {**os.environ, "PYTHONPATH": str(path or ""), "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env, cwd=cwd)


def test_wrong_python(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit):
        main(FAST)
    assert "Python 3.10 or newer" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["TeaCache4LuminaT2X/teacache_lumina2.py", "TeaCache4Memo/teacache_memo.py"])
def test_an_old_python_can_read_the_script(script):
    """No syntax that it does not know, or it could not say that it is too old; nor in the file that says so."""
    for path in (ROOT / script, *(ROOT / script).parent.glob("options_*.py")):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("script", ["TeaCache4LuminaT2X/teacache_lumina2.py", "TeaCache4Memo/teacache_memo.py"])
@pytest.mark.parametrize("missing", ["torch", "diffusers"])
def test_torch_or_diffusers_missing(script, missing, tmp_path):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{missing}'\")")
    run = python(ROOT / script, path=tmp_path)
    assert run.returncode == 1 and run.stdout == "" and len(run.stderr.splitlines()) == 1, run.stderr
    assert f"No module named '{missing}'" in run.stderr and "pip install torch" in run.stderr


def test_old_diffusers(tmp_path):
    """One that has no Lumina2: the line says what to install."""
    code = (
        "import sys, types, diffusers as real\n"
        "class Old(types.ModuleType):\n"
        "    def __getattr__(self, name):\n"
        "        if 'Lumina2' in name: raise AttributeError(name)\n"
        "        return getattr(real, name)\n"
        "sys.modules['diffusers'] = Old('diffusers')\n"
        "from TeaCache4LuminaT2X.teacache_lumina2 import main; main()\n"
    )
    run = python("-c", code, *FAST, path=ROOT, cwd=tmp_path)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr
    assert "cannot import name 'Lumina2Pipeline'" in run.stderr and "pip install --upgrade" in run.stderr


@pytest.mark.parametrize(
    "error, says",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"), "out of memory. What helps"),
        (RuntimeError("MPS backend out of memory (allocated: 9 GB)"), "out of memory. What helps"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory. What helps"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory. What helps",
        ),
    ],
)
@pytest.mark.parametrize("where", ["load_pipeline", "generate"])
def test_out_of_memory(error, says, where, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise error

    if where == "generate":
        monkeypatch.setattr(teacache_lumina2, "generate", full)
    else:
        monkeypatch.setattr(Lumina2Pipeline, "to", full)
    with pytest.raises(SystemExit) as exit:
        main([*FAST, "--output", str(tmp_path / "x.png")])
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and says in last and not list(tmp_path.iterdir())
    for flag in ("--vae-tiling", "--dtype bfloat16", "--height"):
        assert flag in last


def test_out_of_memory_on_a_gpu_names_the_flags_that_are_left():
    args = options_lumina2.parse(FAST)
    args.device, args.dtype = "cuda", torch.bfloat16
    error = torch.OutOfMemoryError("CUDA out of memory.")
    line = options_lumina2.why(error, args)
    assert all(flag in line for flag in ("--offload model", "--offload sequential", "--cache-on-cpu", "--vae-tiling"))
    assert "--dtype" not in line, "it is bfloat16 already"
    args.offload, args.vae_tiling = "model", True
    line = options_lumina2.why(error, args)
    assert "--offload sequential" in line and "--offload model" not in line and "--vae-tiling" not in line


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError("Cannot access gated repo for url https://..."), "hf auth login, or huggingface-cli login"),
        (OSError("401 Client Error. Repository Not Found"), "hf auth login, or huggingface-cli login"),
        (OSError("no weights in exp401"), "the Hub in reach?"),
        (OSError("We couldn't connect to 'https://huggingface.co'"), "the Hub in reach?"),
        (RuntimeError("Failed to import transformers.models.gemma2 because of: x"), "pip install --upgrade"),
    ],
)
def test_a_hub_that_does_not_give(error, says, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(Lumina2Pipeline, "from_pretrained", refuse)
    with pytest.raises(SystemExit) as exit:
        main(["--model", "Alpha-VLLM/Lumina-Image-2.0", "--output", str(tmp_path / "x.png")])
    note, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and says in line and "no GPU" in note


def test_a_folder_of_another_pipeline(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(SystemExit) as exit:
        main(["--model", str(tmp_path / "model")])
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1 and "is a FluxPipeline: give a Lumina2Pipeline" in line


@pytest.mark.parametrize("broken", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize("text", ["version https://git-lfs", "[]", "{}"])
def test_a_folder_that_is_broken(broken, text, tmp_path, capsys):
    """Pointers in place of files, a download that was cut off."""
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    for name in ("model_index.json", "transformer/config.json"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    (folder / broken).write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["--model", str(folder)])
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1 and str(folder) in line


def test_lora_without_peft(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(SystemExit):
        options_lumina2.parse([*FAST, "--lora", "owner/name"])
    assert "pip install peft" in capsys.readouterr().err


def test_any_other_error_is_one_line(tmp_path, capsys, monkeypatch):
    def breaks(*args, **kwargs):
        raise KeyError("something\nelse")

    monkeypatch.setattr(teacache_lumina2, "generate", breaks)
    with pytest.raises(SystemExit) as exit:
        main([*FAST, "--output", str(tmp_path / "x.png")])
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and "KeyError" in line and "--verbose shows where" in line


def test_a_threshold_of_5(tmp_path, capsys):
    main([*FAST, "--rel-l1-thresh", "5", "--output", str(tmp_path / "x.png")])
    captured = capsys.readouterr()
    assert "note: a threshold above 1" in captured.err.splitlines()[0] and "--speedup 2" in captured.err
    assert "saved" in captured.out, "it is drawn"
    main([*FAST, "--rel-l1-thresh", "0.5", "--output", str(tmp_path / "x.png")])
    assert "note" not in capsys.readouterr().err


def test_verbose(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    command = [SCRIPT, *FAST, "--transformer", tmp_path / "broken.safetensors", "--output", tmp_path / "x.png"]
    quiet, verbose = python(*command), python(*command, "--verbose")
    assert quiet.returncode == verbose.returncode == 2
    assert "Traceback" not in quiet.stderr and len(quiet.stderr.splitlines()) == 1
    assert "Traceback" in verbose.stderr and verbose.stderr.splitlines()[-1] == quiet.stderr.splitlines()[-1]


# --- num_steps that is not the pipeline's --------------------------------------------------------


@pytest.mark.parametrize("steps, says", [(6, "has 6 steps, not 8"), (10, "goes on after the 8 steps")])
def test_num_steps_that_is_not_the_pipelines(steps, says):
    model = tiny_model()
    apply_teacache(model, 8, 0.1, IDENTITY)
    with pytest.warns(UserWarning, match=says) as found:
        denoise(model, PROMPT, NEGATIVE, steps=steps)
        denoise(model, PROMPT, NEGATIVE, steps=steps, seed=1)
    assert all("num_inference_steps" in str(w.message) for w in found)


@pytest.mark.filterwarnings("error")
def test_num_steps_that_is_the_pipelines():
    model = tiny_model()
    apply_teacache(model, 8, 0.1, IDENTITY)
    for seed in range(3):
        denoise(model, PROMPT, NEGATIVE, seed=seed)
