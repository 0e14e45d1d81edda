"""The command line of Lumina2: flags, errors of one line, recipes, and a script copied alone."""

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BUNDLED, ROOT, levels
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from lumina_models import tiny_model
from PIL import Image

from TeaCache4LuminaT2X import batch_lumina2, compare_lumina2, teacache_lumina2
from TeaCache4LuminaT2X.teacache_lumina2 import build_parser, check_args, generate, load_pipeline, main

FOLDER = ROOT / "TeaCache4LuminaT2X"
MODEL = ["--model", str(BUNDLED)]
FAST = [*MODEL, "--num-inference-steps", "3"]
WEIGHTS = str(BUNDLED / "transformer" / "diffusion_pytorch_model.safetensors")


class Fake:
    """In place of the pipeline; keeps what it was called with."""

    def __init__(self):
        self.transformer, self.scheduler = tiny_model(num_layers=1), FlowMatchEulerDiscreteScheduler()
        self.calls = []

    def __call__(self, **kwargs):
        self.calls.append(kwargs)
        self.transformer.teacache = SimpleNamespace(schedule=[True, False, True])
        return SimpleNamespace(images=[Image.new("RGB", (32, 16), "red")])


def parse_args(flags):
    args = build_parser().parse_args(flags)
    check_args(args)
    return args


@pytest.fixture
def fake(monkeypatch):
    fake, monkeypatch_load = Fake(), lambda args: setattr(fake, "args", args) or fake
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", monkeypatch_load)
    return fake


def test_defaults(fake, tmp_path, monkeypatch, capsys):
    """Without CUDA and --model it draws with the bundled model and says so; the constants are the defaults."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacache_lumina2, "COMPUTED_STEPS", 7)
    main([])
    (call,) = fake.calls
    assert call.pop("generator").initial_seed() == 1024
    assert call == dict(
        prompt="smiling face with sunglasses",
        negative_prompt="",
        num_inference_steps=30,
        height=None,
        width=None,
        guidance_scale=4.0,
        cfg_trunc_ratio=1.0,
    )
    assert "forward" in vars(fake.transformer), "TeaCache is on"
    assert (fake.transformer.rel_l1_thresh, fake.transformer.computed_steps) == (None, 7)
    args = fake.args
    assert (args.model, args.device, args.dtype, args.offload) == (str(BUNDLED), "cpu", "float32", "none")
    note, saved = capsys.readouterr().out.splitlines()
    assert "bundled" in note and "--model Alpha-VLLM/Lumina-Image-2.0" in note
    used = r"2 of 3 steps computed \(computed_steps 7\), seed 1024"
    assert re.fullmatch(rf"saved teacache_lumina2_output.png: [\d.]+ s, {used}", saved)
    assert [p.name for p in tmp_path.iterdir()] == ["teacache_lumina2_output.png"]


def test_nothing_is_overwritten(fake, tmp_path, monkeypatch, capsys):
    """The default name gets the next free number, and another one if it was taken while the image was drawn."""
    monkeypatch.chdir(tmp_path)
    name = "teacache_lumina2_output{}.png".format
    for file in (name(""), name("_3")):
        (tmp_path / file).write_text("mine")
    main(["--rel-l1-thresh", "0.25", "--seed", "7"])
    assert f"saved {name('_2')}" in (out := capsys.readouterr().out)
    assert "(rel_l1_thresh 0.25), seed 7" in out
    monkeypatch.setattr(Fake, "__call__", taking(Fake.__call__, tmp_path / name("_4")))
    main([])
    assert f"saved {name('_4_2')}" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {name(n) for n in ("", "_2", "_3", "_4", "_4_2")}
    assert [(tmp_path / name(n)).read_text() for n in ("", "_3", "_4")] == ["mine"] * 3


def taking(call, path):
    def draw(self, **kwargs):
        path.write_text("mine")
        return call(self, **kwargs)

    return draw


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
def test_what_is_half_written_has_no_name(error, fake, tmp_path, monkeypatch, capsys):
    """Interrupted or on a full disk: nothing stands under the name of the picture, and no draft is left."""
    path = tmp_path / "x.png"

    def half(self, file, **_):
        file.write_bytes(b"half")
        assert not path.exists()
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(SystemExit if isinstance(error, OSError) else KeyboardInterrupt):
        main(["--output", str(path)])
    assert not list(tmp_path.iterdir())
    assert ("No space left" in capsys.readouterr().err) == isinstance(error, OSError)


@pytest.mark.parametrize("name, kind", [("A.PNG", "PNG"), ("a.jpeg", "JPEG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP")])
def test_kinds_of_pictures(fake, tmp_path, name, kind):
    main(["--output", str(tmp_path / name)])
    with Image.open(tmp_path / name) as image:
        assert image.format == kind


@pytest.mark.parametrize(
    "setting", [("--rel-l1-thresh", 0.4, "rel_l1_thresh"), ("--computed-steps", 5, "computed_steps")]
)
def test_every_flag_arrives(fake, tmp_path, setting):
    path, (flag, value, name) = tmp_path / "out.jpg", setting
    flags = "--negative-prompt blue --height 96 --width 160 --guidance-scale 3 --cfg-trunc-ratio 0.5 --seed 5"
    flags += f" --prompt fox --num-inference-steps 8 --dtype bfloat16 --offload model --transformer {WEIGHTS}"
    main([*MODEL, *flags.split(), flag, str(value), "--output", str(path)])
    (call,) = fake.calls
    generator = call.pop("generator")
    assert generator.initial_seed() == 5 and generator.device.type == "cpu"
    sizes = dict(num_inference_steps=8, height=96, width=160, guidance_scale=3.0, cfg_trunc_ratio=0.5)
    assert call == dict(prompt="fox", negative_prompt="blue", **sizes)
    used = {"rel_l1_thresh": fake.transformer.rel_l1_thresh, "computed_steps": fake.transformer.computed_steps}
    assert used.pop(name) == value and list(used.values()) == [None]
    args = fake.args
    assert (args.dtype, args.offload, args.transformer) == ("bfloat16", "model", WEIGHTS)
    with Image.open(path) as image:
        assert image.size == (32, 16) and image.format == "JPEG"


SEEN = {
    "negative threshold": (["--rel-l1-thresh", "-0.1"], "rel_l1_thresh"),
    "NaN threshold": (["--rel-l1-thresh", "nan"], "rel_l1_thresh"),
    "no number": (["--rel-l1-thresh", "much"], "much"),
    "zero steps": (["--num-inference-steps", "0"], "number of steps"),
    "one computed step": (["--computed-steps", "1"], "computed_steps must be"),
    "more computed steps than steps": (
        ["--num-inference-steps", "8", "--computed-steps", "9"],
        "computed_steps must be",
    ),
    "both": (["--computed-steps", "9", "--rel-l1-thresh", "0"], "rel_l1_thresh"),
    "height": (["--height", "100"], "must be multiples of 16, not 100"),
    "negative width": (["--width", "-16"], "must be multiples of 16, not -16"),
    "no height": (["--height", "0"], "must be multiples of 16, not 0"),
    "output without a folder": (["--output", "{tmp}/no/picture.png"], "No such file or directory"),
    "output in a file": (["--output", "{tmp}/flux/model_index.json/picture.png"], "Not a directory"),
    "output with a long name": (["--output", "{tmp}/" + 252 * "x" + ".png"], "File name too long"),
    "output of no kind": (["--output", "{tmp}/picture.txt"], "must end in .png"),
    "output that exists": (["--output", "{tmp}/mine.webp"], "File exists: "),
    "output that is a folder": (["--output", "{tmp}/folder.png"], "File exists: "),
    "no transformer": (["--transformer", "{tmp}/none.safetensors"], "none.safetensors: no such file"),
    "GGUF": (["--transformer", "{tmp}/model.gguf"], "is a GGUF file: give a .safetensors file"),
    "unknown flag": (["--treshold", "1"], "--treshold"),
    "unknown dtype": (["--dtype", "int8"], "int8"),
    "unknown offload": (["--offload", "all"], "all"),
}
UNSEEN = {  # until the model is loaded, or runs
    "no such folder": (["--model", "{tmp}/none"], "none"),
    "an empty folder": (["--model", "{tmp}/empty"], "empty"),
    "another pipeline": (["--model", "{tmp}/flux"], "is a FluxPipeline: give a Lumina2Pipeline"),
    "a broken folder": (["--model", "{tmp}/broken"], "broken"),
    "half a transformer": (["--transformer", "{tmp}/half.safetensors"], "half.safetensors"),
    "a pointer of git-lfs": (["--transformer", "{tmp}/pointer.safetensors"], "git-lfs"),
    "no pickle": (["--transformer", "{tmp}/pointer.ckpt"], "git-lfs"),
    "GGUF by another name": (["--transformer", "{tmp}/gguf.safetensors"], "gguf.safetensors"),
    "another network": (["--transformer", "{tmp}/vae.safetensors"], "vae.safetensors does not fit --model"),
    "some weights": (["--transformer", "{tmp}/some.safetensors"], "some.safetensors does not fit --model"),
    "an odd shape": (["--transformer", "{tmp}/shape.safetensors"], "x_embedder.weight"),
    "another width": (["--transformer", "{tmp}/wide.safetensors"], "wide.safetensors does not fit --model"),
    "names of nobody": (["--transformer", "{tmp}/names.safetensors"], "names.safetensors does not fit --model"),
    "beyond the rotary tables": (["--height", "2048", "--width", "128"], "out of bounds"),
    "a seed of 20 digits": (["--seed", "99999999999999999999"], "verflow"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder with models, checkpoints and a picture that cannot be used."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder.png").mkdir()
    for name, text in {"empty": None, "flux": '{"_class_name": "FluxPipeline"}', "broken": "version https://"}.items():
        (folder / name).mkdir()
        if text:
            (folder / name / "model_index.json").write_text(text)
    weights = load_file(WEIGHTS)
    (folder / "half.safetensors").write_bytes(open(WEIGHTS, "rb").read(100_000))
    for name in ("pointer.safetensors", "pointer.ckpt", "mine.webp"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "gguf.safetensors").write_bytes(b"GGUF\x03\x00\x00\x00")
    shutil.copy(BUNDLED / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae.safetensors")
    save_file({**weights, "x_embedder.weight": torch.zeros(192, 16)}, folder / "shape.safetensors")
    save_file({f"model.{name}": weight for name, weight in weights.items()}, folder / "names.safetensors")
    weights.pop("x_embedder.bias")
    save_file(weights, folder / "some.safetensors")
    save_file({"layers.0.attention.qkv.weight": torch.zeros(320, 192)}, folder / "wide.safetensors")
    return folder


@pytest.fixture
def fails(bad_files, capsys, monkeypatch):
    """Runs the script with flags that cannot work: one line is said, with the word, and no file is written."""

    def run(flags, word):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        before = sorted(bad_files.rglob("*"))
        monkeypatch.chdir(bad_files)
        with pytest.raises(SystemExit) as exit:
            main([flag.replace("{tmp}", str(bad_files)) for flag in flags])
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert exit.value.code == 2 and len(lines) == 1 and word in lines[0]
        assert sorted(bad_files.rglob("*")) == before

    return run


@pytest.mark.parametrize("case", SEEN)
def test_bad_input_is_one_line_before_loading(case, fails, monkeypatch):
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    fails(*SEEN[case])


@pytest.mark.parametrize("case", UNSEEN)
def test_what_cannot_be_seen_before_loading_is_one_line_too(case, fails):
    flags, word = UNSEEN[case]
    fails([*FAST, *flags], word)  # the last --model holds


def test_a_single_word_of_an_error(fake, monkeypatch, capsys):
    """A KeyError says no more than its key: its kind is told."""
    monkeypatch.setattr(teacache_lumina2, "generate", lambda pipeline, args: {}["x_embedder"])
    with pytest.raises(SystemExit):
        main(["--output", "x.png"])
    assert "error: KeyError: 'x_embedder'" in capsys.readouterr().err


def test_an_error_of_several_lines_becomes_one(fake, monkeypatch, capsys):
    def out_of_memory(pipeline, args):
        raise RuntimeError("CUDA out of memory.\n  Tried\tto allocate")

    monkeypatch.setattr(teacache_lumina2, "generate", out_of_memory)
    with pytest.raises(SystemExit):
        main(["--output", "x.png"])
    assert "error: RuntimeError: CUDA out of memory. Tried to allocate\n" in capsys.readouterr().err


def test_long_names(fake, tmp_path):
    """As long as the file system takes them."""
    main(["--output", str(tmp_path / ("x" * 245 + ".png"))])
    main(["--output", str(tmp_path / ("猫" * 80 + ".png"))])
    assert len(list(tmp_path.iterdir())) == 2


def test_few_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    flags = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.M)) - {"--help"}
    assert exit.value.code == 0 and len(flags) <= 15 and {"--rel-l1-thresh", "--computed-steps"} <= flags


# --- loading ---------------------------------------------------------------------------


def draw(pipeline, *flags):
    pipeline.set_progress_bar_config(disable=True)
    image, _, schedule = generate(pipeline, parse_args([*FAST, "--computed-steps", "2", *flags]))
    return np.asarray(image), schedule


def test_it_draws_what_the_plain_pipeline_does(pipeline):
    ours, schedule = draw(load_pipeline(parse_args(FAST)), "--prompt", "red apple")
    uncached, every = draw(load_pipeline(parse_args(FAST)), "--prompt", "red apple", "--computed-steps", "3")
    teacache_lumina2.remove_teacache(pipeline.transformer)
    generator = torch.Generator().manual_seed(teacache_lumina2.SEED)
    expected = np.asarray(pipeline("red apple", num_inference_steps=3, generator=generator).images[0])
    assert levels(uncached, expected) <= 1 and every == [True] * 3
    assert levels(ours, expected) > 1 and schedule == [True, False, True]


@pytest.mark.parametrize("computed, correct, says", [("2", True, ", corrected"), ("2", False, ""), ("3", True, "")])
def test_the_closing_line_tells_whether_it_was_corrected(computed, correct, says, tmp_path, monkeypatch, capsys):
    """Where steps were skipped, unless it was switched off."""
    monkeypatch.setattr(teacache_lumina2, "CORRECT", correct)
    main([*FAST, "--computed-steps", computed, "--output", str(tmp_path / "x.png")])
    assert f"{computed} of 3 steps computed (computed_steps {computed}{says}), seed" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["other.safetensors", "other.pth"])
def test_dtype_and_single_file_transformer(tmp_path, prefix, name):
    """The checkpoint of the file is what is loaded: alone, or with a prefix beside other models, as for ComfyUI."""
    from safetensors.torch import load_file, save_file

    weights = load_file(WEIGHTS)
    weights["norm_out.linear_2.weight"] = torch.zeros_like(weights["norm_out.linear_2.weight"])
    weights = {prefix + key: weight for key, weight in weights.items()}
    weights |= {"vae.decoder.conv_in.weight": torch.zeros(1)} if prefix else {}
    (save_file if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    flags = ["--transformer", str(tmp_path / name), "--dtype", "bfloat16"]
    pipeline = load_pipeline(parse_args([*FAST, *flags]))
    assert not pipeline.transformer.norm_out.linear_2.weight.any()
    expected = load_file(WEIGHTS)["x_embedder.weight"].bfloat16()
    assert torch.equal(pipeline.transformer.x_embedder.weight, expected)
    assert {pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}


def sequentially(pipeline, device):
    """What enable_sequential_cpu_offload does, but for the name of the device: it would say cpu:0."""
    from accelerate import cpu_offload

    for model in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        cpu_offload(model, torch.device(device), offload_buffers=len(model._parameters) > 0)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload(pipeline, offload, monkeypatch):
    """accelerate's hooks, with the CPU as the device that the weights are moved to; the same picture."""
    monkeypatch.setattr(Lumina2Pipeline, "enable_sequential_cpu_offload", sequentially)
    expected, schedule = draw(pipeline)
    teacache_lumina2.remove_teacache(pipeline.transformer)
    offloaded = load_pipeline(parse_args([*FAST, "--offload", offload]))
    image, ours = draw(offloaded)
    assert levels(image, expected) <= 1 and ours == schedule
    hooked = [m for m in offloaded.transformer.modules() if hasattr(m, "_hf_hook")]
    assert len(hooked) > (20 if offload == "sequential" else 0)


def recipes():
    """The commented lines of load_pipeline, by what they call."""
    source = (FOLDER / "teacache_lumina2.py").read_text(encoding="utf-8")
    lines = re.findall(r"^    # ((?:pipeline|for)\b.*)$", source[source.index("def load_pipeline") :], re.M)
    return {re.search(r"lora|compile|slicing|tiling", line)[0]: line for line in lines}


def test_recipes(tmp_path, monkeypatch):
    """Uncommented, each runs. LoRA changes the picture; compiled blocks, slices and tiles do not."""
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    lines, pipeline = recipes(), load_pipeline(parse_args(FAST))
    assert set(lines) == {"lora", "compile", "slicing", "tiling"}
    donor = load_pipeline(parse_args(FAST)).transformer
    donor.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(donor)
    Lumina2Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, weight_name="style.safetensors")

    expected, schedule = draw(pipeline)
    with torch.no_grad():
        exec(lines["slicing"], {"pipeline": pipeline})
        assert pipeline.vae.use_slicing
        sizes, latents = [], torch.randn(2, 16, 16, 16)
        hook = pipeline.vae.decoder.register_forward_hook(lambda m, i, output: sizes.append(tuple(output.shape)))
        pipeline.vae.decode(latents)
        assert [size[0] for size in sizes] == [1, 1]
        exec(lines["tiling"], {"pipeline": pipeline})
        del sizes[:]
        large = torch.randn(1, 16, 72, 72)
        assert pipeline.vae.decode(large).sample.shape == (1, 3, 576, 576)
        assert len(sizes) == 4 and max(size[-1] for size in sizes) == 512, "tiles of 512 pixels"
        hook.remove()
    compiled, compile_ = [], torch.nn.Module.compile
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self) or compile_(self, backend="eager"))
        exec(lines["compile"], {"pipeline": pipeline})
    assert compiled == list(pipeline.transformer.layers)
    image, again = draw(pipeline)
    assert levels(image, expected) <= 1 and again == schedule
    torch._dynamo.reset()
    other = load_pipeline(parse_args(FAST))
    exec(lines["lora"], {"pipeline": other})
    image, again = draw(other)
    assert levels(image, expected) > 1 and again == schedule


# --- a file copied alone ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, arguments, says",
    [
        ("teacache", ["--computed-steps", "2", "--output", "x.png"], "saved x.png"),
        ("compare", ["--computed-steps", "2", "--rel-l1-thresh", "--output", "x.png"], "saved x.png"),
        ("batch", ["prompts.txt", "--output-dir", "out"], "1 of 1 images are in out"),
    ],
)
def test_a_file_copied_alone(name, arguments, says, tmp_path):
    """Into an empty folder; a tool with its script beside it."""
    for file in {"teacache_lumina2.py", f"{name}_lumina2.py"}:
        shutil.copy(FOLDER / file, tmp_path)
    (tmp_path / "prompts.txt").write_text("red apple\n")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"{name}_lumina2.py"]
    run = subprocess.run([*command, *FAST, *arguments], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert run.returncode == 0 and says in run.stdout, run.stderr
    if "x.png" in arguments:
        with Image.open(tmp_path / "x.png") as image:
            assert image.width >= 128


@pytest.mark.parametrize("tool", [batch_lumina2, compare_lumina2], ids=lambda tool: tool.__name__)
def test_tools_take_the_flags_of_the_script(tool, tmp_path, monkeypatch, capsys):
    """And its errors: one line, nothing written."""
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join("abcdefgh"))
    files = ["prompts.txt"] if tool is batch_lumina2 else []
    for flags, says in [
        (["--height", "100"], "multiples of 16"),
        (["--num-inference-steps", "0"], "number of steps"),
        (["--transformer", "nowhere.safetensors"], "no such file"),
        (["--rel-l1-thresh", "nan"], "rel_l1_thresh"),
        (["--cfg", "much"], "--cfg"),
    ]:
        with pytest.raises(SystemExit) as exit:
            tool.main([*files, *MODEL, *flags])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if "error: " in line]
        assert exit.value.code == 2 and len(lines) == 1 and says in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]
