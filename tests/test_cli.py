"""The command lines of Lumina2: flags, errors of one line, terminals, Ctrl-C, recipes, and a script copied alone."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BUNDLED, equal, levels, two_processes
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from lumina_models import tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file

from TeaCache4LuminaT2X import batch_lumina2, compare_lumina2, teacache_lumina2
from TeaCache4LuminaT2X.teacache_lumina2 import build_parser, check_args, generate, load_pipeline, main

MODEL = ["--model", str(BUNDLED)]
FAST = [*MODEL, "--num-inference-steps", "3"]
WEIGHTS = str(BUNDLED / "transformer" / "diffusion_pytorch_model.safetensors")


class Fake:
    """In place of the pipeline; keeps what it was called with."""

    def __init__(self):
        self.transformer, self.scheduler = tiny_model(num_layers=1), FlowMatchEulerDiscreteScheduler()
        self.calls, self.while_it_draws = [], lambda: None
        self.set_progress_bar_config = lambda **_: None
        self.maybe_free_model_hooks = lambda: None

    def __call__(self, **kwargs):
        self.calls.append(kwargs)
        self.while_it_draws()
        self.transformer.teacache = SimpleNamespace(schedule=[True, False, True])
        return SimpleNamespace(images=[Image.new("RGB", (32, 16), "red")])


def parse_args(flags):
    args = build_parser().parse_args(flags)
    check_args(args)
    return args


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: setattr(fake, "args", args) or fake)
    return fake


def test_defaults(fake, tmp_path, monkeypatch, capsys):
    """Without CUDA and --model it draws with the bundled model and says so; the constants are the defaults."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacache_lumina2, "COMPUTED_STEPS", 7)
    main([])
    (call,) = fake.calls
    assert call.pop("generator").initial_seed() == 1024
    sizes = dict(num_inference_steps=30, height=None, width=None, guidance_scale=4.0, cfg_trunc_ratio=1.0)
    assert call == dict(prompt="smiling face with sunglasses", negative_prompt="", **sizes)
    assert fake.transformer.enable_teacache, "TeaCache is on"
    assert (fake.transformer.rel_l1_thresh, fake.transformer.computed_steps) == (None, 7)
    args = fake.args
    assert (args.model, args.device, args.dtype, args.offload) == (str(BUNDLED), "cpu", "float32", "none")
    note, saved = capsys.readouterr().out.splitlines()
    assert "bundled" in note and "--model Alpha-VLLM/Lumina-Image-2.0" in note
    used = r"2 of 3 steps computed \(computed_steps 7, corrected\), seed 1024"
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
    assert "(rel_l1_thresh 0.25, corrected), seed 7" in out
    fake.while_it_draws = lambda: (tmp_path / name("_4")).write_text("mine")
    main([])
    assert f"saved {name('_4_2')}" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {name(n) for n in ("", "_2", "_3", "_4", "_4_2")}
    assert [(tmp_path / name(n)).read_text() for n in ("", "_3", "_4")] == ["mine"] * 3


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
def test_what_is_half_written_has_no_name(error, fake, tmp_path, monkeypatch):
    """Interrupted or on a full disk: nothing stands under the name of the picture, and no draft is left."""
    path = tmp_path / "x.png"

    def half(self, file, **_):
        file.write_bytes(b"half")
        assert not path.exists()
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(SystemExit):
        main(["--output", str(path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag, given, value",
    [("--rel-l1-thresh", "0.4", 0.4), ("--computed-steps", "5", 5), ("--computed-steps", "0,2,7", [0, 2, 7])],
)
def test_every_flag_arrives(fake, tmp_path, flag, given, value):
    path = tmp_path / ("猫" * 80 + ".jpg")  # a name as long as the file system takes
    flags = "--negative-prompt blue --height 96 --width 160 --guidance-scale 3 --cfg-trunc-ratio 0.5 --seed 5"
    flags += f" --prompt fox --num-inference-steps 8 --dtype bfloat16 --offload model --transformer {WEIGHTS}"
    main([*MODEL, *flags.split(), flag, given, "--output", str(path)])
    (call,) = fake.calls
    generator = call.pop("generator")
    assert generator.initial_seed() == 5 and generator.device.type == "cpu"
    sizes = dict(num_inference_steps=8, height=96, width=160, guidance_scale=3.0, cfg_trunc_ratio=0.5)
    assert call == dict(prompt="fox", negative_prompt="blue", **sizes)
    used = {"--rel-l1-thresh": fake.transformer.rel_l1_thresh, "--computed-steps": fake.transformer.computed_steps}
    assert used.pop(flag) == value and list(used.values()) == [None]
    args = fake.args
    assert (args.dtype, args.offload, args.transformer) == ("bfloat16", "model", WEIGHTS)
    with Image.open(path) as image:
        assert image.size == (32, 16) and image.format == "JPEG"


# --- errors ----------------------------------------------------------------------------

LATIN_1 = os.fsdecode("é".encode("latin-1"))
SEEN = {
    "threshold": (["--rel-l1-thresh", "nan"], "rel_l1_thresh"),
    "steps": (["--num-inference-steps", "0"], "number of steps"),
    "computed steps": (["--num-inference-steps", "8", "--computed-steps", "9"], "computed_steps must be"),
    "a list for other steps": (["--computed-steps", "0,5,9"], "a list for 10 steps, not for 30"),
    "no list": (["--computed-steps", "0,5,"], "0,5,"),
    "both": (["--computed-steps", "9", "--rel-l1-thresh", "0"], "not both"),
    "height": (["--height", "100"], "must be multiples of 16, not 100"),
    "negative width": (["--width", "-16"], "must be multiples of 16, not -16"),
    "a long seed": (["--seed", "99999999999999999999"], "--seed must be a number of 64 bits"),
    "a prompt in latin-1": (["--prompt", LATIN_1], r"--prompt: invalid utf8_text value: '\udce9'"),
    "a negative one": (["--negative-prompt", LATIN_1], r"--negative-prompt: invalid utf8_text value: '\udce9'"),
    "output without a folder": (["--output", "no/picture.png"], "No such file or directory"),
    "output with a long name": (["--output", 252 * "x" + ".png"], "File name too long"),
    "output of no kind": (["--output", "picture.txt"], "must end in .png"),
    "output that exists": (["--output", "mine.webp"], "File exists: "),
    "no transformer": (["--transformer", "none.safetensors"], "none.safetensors: no such file"),
    "GGUF": (["--transformer", "model.gguf"], "is a GGUF file: give a .safetensors file"),
}
UNSEEN = {  # until the model is loaded, or runs
    "no such folder": (["--model", "./none"], "none"),
    "another pipeline": (["--model", "./flux"], "is a FluxPipeline: give a Lumina2Pipeline"),
    "a pipeline with code of its own": (["--model", "./custom"], "is a ['pipeline', 'Lumina2MyPipeline']: give a"),
    "no class at all": (["--model", "./nothing"], "_class_name"),
    "half a transformer": (["--transformer", "half.safetensors"], "half.safetensors"),
    "a pointer of git-lfs": (["--transformer", "pointer.safetensors"], "git-lfs"),
    "GGUF by another name": (["--transformer", "gguf.safetensors"], "gguf.safetensors"),
    "another network": (["--transformer", "vae.safetensors"], "vae.safetensors does not fit --model"),
    "some weights": (["--transformer", "some.safetensors"], "some.safetensors does not fit --model"),
    "an odd shape": (["--transformer", "shape.safetensors"], "shape.safetensors does not fit --model"),
    "another width": (["--transformer", "wide.safetensors"], "wide.safetensors does not fit --model"),
    "beyond the rotary tables": (["--height", "2048", "--width", "128"], "out of bounds"),
}
INDICES = {
    "flux": '{"_class_name": "FluxPipeline"}',
    "custom": '{"_class_name": ["pipeline", "Lumina2MyPipeline"]}',
    "nothing": "{}",
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder with models, checkpoints and a picture that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    for name, text in INDICES.items():
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(text)
    weights = load_file(WEIGHTS)
    (folder / "half.safetensors").write_bytes(open(WEIGHTS, "rb").read(100_000))
    for name in ("pointer.safetensors", "mine.webp"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "gguf.safetensors").write_bytes(b"GGUF\x03\x00\x00\x00")
    shutil.copy(BUNDLED / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae.safetensors")
    save_file({**weights, "x_embedder.weight": torch.zeros(192, 16)}, folder / "shape.safetensors")
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
            main(flags)
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


def raising(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize("error", [KeyError("x_embedder"), RuntimeError("Out of memory.\n  Tried\tto")], ids=repr)
def test_errors_of_any_kind(error, fake, fails):
    """Of several lines, or of a single word: one line, with the kind."""
    fake.while_it_draws = raising(error)
    says = {KeyError: "KeyError: 'x_embedder'", RuntimeError: "RuntimeError: Out of memory. Tried to"}
    fails(["--output", "x.png"], says[type(error)])


# --- terminals -------------------------------------------------------------------------

COMPARE = "--prompt 猫 --computed-steps 2 --repeats 1 --output 猫.png".split()
TOOLS = {  # its flags; the image that Ctrl-C comes in, and how many files it leaves
    "script": (teacache_lumina2, ["--output", "猫.png"], 1, 0),
    "batch": (batch_lumina2, ["prompts.txt", "--output-dir", "猫"], 3, 2),
    "compare": (compare_lumina2, COMPARE, 3, 2),
}


@pytest.fixture
def run(fake, tmp_path, monkeypatch):
    """Runs a tool on the fake pipeline, in an empty folder: exit code, and the files that it left."""
    monkeypatch.chdir(tmp_path)

    def run(tool):
        module, flags, *_ = TOOLS[tool]
        (tmp_path / "prompts.txt").write_text("\n".join("abc"), encoding="utf-8")
        code = 0
        try:
            module.main([*flags, *FAST])
        except SystemExit as exit:
            code = int(exit.code)
        except KeyboardInterrupt:
            pytest.fail("it ends with a traceback")
        (tmp_path / "prompts.txt").unlink()
        return code, [path for path in tmp_path.rglob("*") if path.is_file()]

    return run


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("stdout", ["cp1252", "of a notebook", "none"])
def test_terminals(tool, stdout, run, monkeypatch):
    """One that lacks a letter, one without `encoding` and `reconfigure`, none: the files are there, what is said too."""
    terminal = {
        "cp1252": io.TextIOWrapper(io.BytesIO(), encoding="cp1252"),
        "of a notebook": io.StringIO(),
        "none": None,
    }[stdout]
    monkeypatch.setattr(sys, "stdout", terminal)
    code, files = run(tool)
    assert code == 0 and len(files) == {"script": 1, "batch": 3, "compare": 2}[tool]
    if terminal is not None:
        terminal.seek(0)
        assert ("?" if stdout == "cp1252" else "猫") in terminal.read()


@pytest.mark.parametrize("tool", TOOLS)
def test_ctrl_c(tool, run, fake, capsys):
    """One line, no traceback; what was drawn before is kept, and no draft."""
    *_, last, kept = TOOLS[tool]
    fake.while_it_draws = lambda: len(fake.calls) == last and raising(KeyboardInterrupt)()
    code, files = run(tool)
    out, err = capsys.readouterr()
    (line,) = [line for line in (out + err).splitlines() if line and "|" not in line]  # without progress bars
    assert code and len(files) == kept
    assert ("2 of 3 images are in" if tool == "batch" else "interrupted") in line


# --- loading ---------------------------------------------------------------------------


def draw(pipeline, *flags):
    pipeline.set_progress_bar_config(disable=True)
    image, _, schedule = generate(pipeline, parse_args([*FAST, "--computed-steps", "2", *flags]))
    return np.asarray(image), schedule


@pytest.fixture
def plain(pipeline):
    """The bundled pipeline, as it was afterwards."""
    yield pipeline
    teacache_lumina2.remove_teacache(pipeline)


def test_it_draws_what_the_plain_pipeline_does(plain):
    generator = torch.Generator().manual_seed(teacache_lumina2.SEED)
    expected = np.asarray(plain("red apple", num_inference_steps=3, generator=generator).images[0])
    loaded = load_pipeline(parse_args(FAST))
    ours, schedule = draw(loaded, "--prompt", "red apple")
    uncached, every = draw(loaded, "--prompt", "red apple", "--computed-steps", "3")
    assert levels(uncached, expected) <= 1 and every == [True] * 3
    assert levels(ours, expected) > 1 and schedule == [True, False, True]


@pytest.mark.parametrize("computed, correct, says", [("2", True, ", corrected"), ("2", False, ""), ("3", True, "")])
def test_the_closing_line_tells_whether_it_was_corrected(computed, correct, says, plain, tmp_path, monkeypatch, capsys):
    """Where steps were skipped, unless it was switched off."""
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: plain)
    monkeypatch.setattr(teacache_lumina2, "CORRECT", correct)
    main([*FAST, "--computed-steps", computed, "--output", str(tmp_path / "x.png")])
    assert f"{computed} of 3 steps computed (computed_steps {computed}{says}), seed" in capsys.readouterr().out


def test_dtype_and_single_file_transformer(tmp_path):
    """The checkpoint of the file is what is loaded."""
    weights = load_file(WEIGHTS)
    weights["norm_out.linear_2.weight"] = torch.zeros_like(weights["norm_out.linear_2.weight"])
    torch.save(weights, tmp_path / "other.pth")
    flags = ["--transformer", str(tmp_path / "other.pth"), "--dtype", "bfloat16"]
    pipeline = load_pipeline(parse_args([*FAST, *flags]))
    assert not pipeline.transformer.norm_out.linear_2.weight.any()
    assert torch.equal(pipeline.transformer.x_embedder.weight, weights["x_embedder.weight"].bfloat16())
    assert {pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}


def test_a_checkpoint_for_comfyui(tmp_path):
    """It has other names, all with a prefix, weights that diffusers does not use, and other models."""
    weights = load_file(WEIGHTS)
    theirs = {name.replace("norm_out.linear_2", "final_layer.linear"): weight for name, weight in weights.items()}
    theirs = {f"model.diffusion_model.{name}": weight for name, weight in theirs.items()}
    more = "model.diffusion_model.norm_final.weight vae.decoder.conv_in.weight text_encoders.gemma2_2b.logit_scale"
    save_file(theirs | {name: torch.zeros(1) for name in more.split()}, tmp_path / "lumina_2.safetensors")
    loaded = load_pipeline(parse_args([*FAST, "--transformer", str(tmp_path / "lumina_2.safetensors")])).transformer
    assert equal(dict(loaded.state_dict()), {name: weight.float() for name, weight in weights.items()})


def sequentially(pipeline, device):
    """What enable_sequential_cpu_offload does, but for the name of the device: it would say cpu:0."""
    from accelerate import cpu_offload

    for model in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        cpu_offload(model, torch.device(device), offload_buffers=len(model._parameters) > 0)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload(plain, offload, monkeypatch):
    """For a GPU accelerate's hooks, here with the CPU in its place: the same picture. On a CPU none are needed."""
    devices, args = [], parse_args([*FAST, "--offload", offload])
    enable = {"model": Lumina2Pipeline.enable_model_cpu_offload, "sequential": sequentially}[offload]

    def enable_on_cpu(self, device):
        devices.append(device)
        enable(self, device="cpu")

    monkeypatch.setattr(Lumina2Pipeline, f"enable_{offload}_cpu_offload", enable_on_cpu)
    load_pipeline(args)
    assert devices == []
    args.device = "cuda"
    offloaded = load_pipeline(args)
    assert devices == ["cuda"]
    (expected, schedule), (image, ours) = draw(plain), draw(offloaded)
    assert levels(image, expected) <= 1 and ours == schedule


def recipes():
    """The commented lines of load_pipeline, by what they call."""
    source = Path(teacache_lumina2.__file__).read_text(encoding="utf-8")
    lines = re.findall(r"^    # ((?:pipeline|for)\b.*)$", source[source.index("def load_pipeline") :], re.M)
    return {re.search(r"lora|compile|slicing|tiling", line)[0]: line for line in lines}


def test_recipes(tmp_path, monkeypatch):
    """Uncommented, each runs, and LoRA changes the picture. Pictures of compiled blocks: test_hooks.py."""
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    lines, pipeline = recipes(), load_pipeline(parse_args(FAST))
    assert set(lines) == {"lora", "compile", "slicing", "tiling"}
    compiled = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
        exec(lines["compile"], {"pipeline": pipeline})
    assert compiled == list(pipeline.transformer.layers)

    vae, (plain, schedule) = pipeline.vae, draw(pipeline)
    assert {"tile_sample_min_size", "tile_latent_min_size"} <= vars(vae).keys(), "the names that diffusers reads"
    exec(lines["slicing"], {"pipeline": pipeline})
    exec(lines["tiling"], {"pipeline": pipeline})
    assert vae.use_slicing and vae.use_tiling and vae.tile_sample_min_size == 8 * vae.tile_latent_min_size == 512
    donor = load_pipeline(parse_args(FAST)).transformer
    donor.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(donor)
    Lumina2Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, weight_name="style.safetensors")
    exec(lines["lora"], {"pipeline": pipeline})
    image, again = draw(pipeline)
    assert levels(image, plain) > 1 and again == schedule


def test_one_and_two_processes_draw_what_the_script_does(tmp_path, monkeypatch):
    """The last is what the script draws; prompt, seed and settings are in it. Other processes may round otherwise."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("red apple\nDog, running!\n猫", encoding="utf-8")
    flags = [*FAST, "--computed-steps", "2"]
    with pytest.raises(SystemExit, match="False"):
        batch_lumina2.main(["prompts.txt", *flags, "--output-dir", "one"])
    main([*flags, "--prompt", "猫", "--output", "alone.png"])
    (last,) = Path("one").glob("猫-*.png")
    with Image.open("alone.png") as alone, Image.open(last) as ours:
        assert levels(alone, ours) <= 1
        settings = {"rel_l1_thresh": None, "computed_steps": 2, "num_inference_steps": 3, "dtype": "float32"}
        assert (
            json.loads(ours.text["teacache"]).items()
            >= {"prompt": "猫", "seed": 1024, "height": None, **settings}.items()
        )
    two = two_processes(batch_lumina2.__file__, "prompts.txt", *flags, "--output-dir", "two")
    assert two.returncode == 0 and two.stdout.count("3 of 3 images are in two") == 1, two.stderr
    assert sorted(os.listdir("two")) == sorted(os.listdir("one")) and len(os.listdir("one")) == 3
    assert "2/2" in two.stderr, "the first process draws its share"
    for name in os.listdir("one"):
        with Image.open(f"one/{name}") as one, Image.open(f"two/{name}") as other:
            assert levels(one, other) <= 1 and one.text == other.text


# --- files copied alone ------------------------------------------------------------------


@pytest.mark.parametrize("tool", TOOLS)
def test_copied_alone(tool, tmp_path, monkeypatch):
    """Into a folder of its own, or beside the script, it runs, and imports nothing else of this repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module, flags, *_ = TOOLS[tool]
    for file in (module.__file__, teacache_lumina2.__file__):
        shutil.copy(file, tmp_path)
    Path("prompts.txt").write_text("fox")
    for name in [name for name in sys.modules if name.startswith("TeaCache4LuminaT2X")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", [tool, *flags, *FAST])
    with contextlib.suppress(SystemExit):  # a batch ends so
        runpy.run_path(Path(module.__file__).name, run_name="__main__")
    sys.modules.pop("teacache_lumina2", None)
    assert list(tmp_path.rglob("*.png"))
