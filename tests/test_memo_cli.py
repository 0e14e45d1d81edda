"""`python teacache_memo.py`, from a portrait and a voice to an mp4, with tiny random models; loading; and compare_memo.

memo's functions for faces and voices need models from the Hub: here they are the double's, also with the real memo.
"""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import wave
from pathlib import Path
from types import ModuleType, SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import MEMO_DOUBLE, ROOT
from memo_models import memo, package, save_parts, tiny_pipeline
from omegaconf import OmegaConf
from PIL import Image

from TeaCache4Memo import compare_memo, teacache_memo

STEPS, FRAMES, FPS = 6, 16, 30
CONFIG = {
    "resolution": 16,
    "num_generated_frames_per_clip": FRAMES,
    "fps": FPS,
    "num_init_past_frames": 2,
    "num_past_frames": 16,
    "inference_steps": STEPS,
    "cfg_scale": 3.5,
    "weight_dtype": "fp32",
    "enable_xformers_memory_efficient_attention": True,
    "wav2vec": "facebook/wav2vec2-base-960h",
    "emotion2vec": "iic/emotion2vec_plus_large",
}
ARGUMENTS = ["--config", "config.yaml", "--input_image", "face.png", "--input_audio", "speech.wav"]


def write_sound(path, frames, rate=44100):
    """A tone as long as `frames` frames, or a little less: resampling may add a sample."""
    t = np.arange(round((frames - 0.1) / FPS * rate)) / rate
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((8000 * np.sin(2 * np.pi * 440 * t)).astype(np.int16).tobytes())


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model, vae = save_parts(*tiny_pipeline(), folder)
    separator = folder / "misc_models" / "misc" / "vocal_separator" / "Kim_Vocal_2.onnx"
    separator.parent.mkdir(parents=True)
    separator.touch()
    return {"model_name_or_path": model, "vae": vae, "misc_model_dir": str(folder / "misc_models")}


@pytest.fixture
def here(tmp_path, models, monkeypatch):
    """A folder with face.png, speech.wav (two clips) and config.yaml, which is where we are."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save("face.png")
    write_sound("speech.wav", 2 * FRAMES)
    OmegaConf.save(OmegaConf.create({**CONFIG, **models}), "config.yaml")
    for name in ("utils", "utils.audio_utils", "utils.vision_utils"):
        path = MEMO_DOUBLE / "memo" / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        spec = importlib.util.spec_from_file_location(f"memo.{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, f"memo.{name}", module)
    return tmp_path


def run(*more, tool=teacache_memo):
    """main() with the usual arguments; later ones win."""
    tool.main([*ARGUMENTS, *map(str, more)])


def refused(capfd, *more, tool=teacache_memo):
    """The one line of an exit with code 2, before anything is loaded."""
    with pytest.raises(SystemExit) as exit, pytest.MonkeyPatch.context() as patch:
        for name in ("prepare", "load_pipeline"):
            patch.setattr(teacache_memo, name, lambda *_, **__: pytest.fail("too late"))
        run(*more, tool=tool)
    out, err = capfd.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("(see --help)\n"), err
    return err


def read(path):
    """Frames (frames, height, width, 3), frames a second, and the codec of the sound."""
    with imageio.get_reader(path) as reader:
        meta = reader.get_meta_data()
        return np.stack([frame for frame in reader]), meta["fps"], meta.get("audio_codec")


# --- from a portrait and a voice to a video -----------------------------------------------


def test_two_clips(here, capsys):
    run("--output_dir", "new/outputs", "--rel_l1_thresh", 9)
    frames, fps, sound = read("new/outputs/face_speech.mp4")
    assert frames.shape == (2 * FRAMES, 16, 16, 3) and fps == FPS and sound == "aac"
    out, err = capsys.readouterr()
    closing = r"saved new/outputs/face_speech.mp4: [\d.]+ s, 4 of 12 steps computed \(rel_l1_thresh 9.0, corrected\), seed 42\n"
    assert re.fullmatch(closing, out) and os.listdir("new/outputs") == ["face_speech.mp4"]
    second = next(line for line in err.split("\r") if "clip 2 of 2" in line)
    assert "2 of 6 steps computed" in second and "6/6" not in err, "one bar for the video"


def test_flags_with_hyphens(here, capsys):
    """As they are written in other tools; and the setting is named in the end."""
    run("--output-dir", "o", "--computed-steps", 3, "--seed", 7)
    assert "o/face_speech.mp4" in (out := capsys.readouterr().out) and "(computed_steps 3, corrected), seed 7" in out
    run("--output_dir", "p", "--tolerance", 0.5, "--input-audio", "speech.wav", "--input-image", "face.png")
    assert "(tolerance 0.5" in capsys.readouterr().out


def test_a_dot_in_the_name(here):
    for name in ("john.smith.png", "john.doe.png"):
        Path("face.png").rename(name)
        args = teacache_memo.parse_args([*ARGUMENTS, "--input_image", name])
        assert args.output.name == f"{Path(name).stem}_speech.mp4"
        Path(name).rename("face.png")


@pytest.mark.parametrize("flags, computed", [((), 8), (("--rel_l1_thresh", 0), 12), (("--computed_steps", 3), 6)])
def test_steps_computed(here, capsys, monkeypatch, flags, computed):
    """Without flags: the constant."""
    monkeypatch.setattr(teacache_memo, "COMPUTED_STEPS", 4)
    run(*flags)
    assert f"{computed} of 12 steps computed" in capsys.readouterr().out


def call(**given):
    """Arguments of memo's pipeline for a short clip."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"ref_image": torch.rand(1, 3, 3, 16, 16, generator=generator) * 2 - 1, "generator": generator}
    arguments |= {"face_emb": torch.randn(1, 512, generator=generator), "width": 16, "height": 16, "video_length": 16}
    arguments |= {"audio_tensor": torch.randn(1, 16, 4, 16, generator=generator), "num_inference_steps": 3}
    arguments |= {"audio_emotion": torch.full((16,), 3, dtype=torch.int32), "emotion_class_num": 9}
    return {**arguments, "guidance_scale": 3.5, **given}


def memos_inference(settings, seed):
    """memo's inference.py written a second time: two clips, chained by their past frames."""
    pipeline, audio_proj = tiny_pipeline()
    teacache_memo.apply_teacache(pipeline, **settings)
    pixels, face = sys.modules["memo.utils.vision_utils"].preprocess_image("", "face.png", 16)
    clips, given = [], {"face_emb": face, "generator": torch.Generator().manual_seed(seed)}
    audio = torch.randn(32, 5, 2, 8, generator=torch.Generator().manual_seed(32))
    for k in range(2):
        past = pixels.repeat(2, 1, 1, 1) if k == 0 else clips[-1][0].permute(1, 0, 2, 3)[-16:] * 2.0 - 1.0
        with torch.no_grad():
            given["audio_tensor"] = audio_proj(audio[16 * k : 16 * k + 16].unsqueeze(0))
        given["ref_image"] = torch.cat([pixels, past], dim=0).unsqueeze(0)
        clips.append(pipeline(**call(num_inference_steps=STEPS, is_new_audio=k == 0, **given)).videos)
    video = torch.cat(clips, dim=2)[0].permute(1, 2, 3, 0).numpy()
    return np.clip(video * 255, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("settings", [{"rel_l1_thresh": 0}, {"rel_l1_thresh": 9}, {"computed_steps": 3}], ids=str)
def test_frames_are_memos(here, monkeypatch, settings):
    """Clips chained as in memo's inference.py: the very frames, from the very inputs."""
    written, given, pipeline_call = [], [], memo.VideoPipeline.__call__

    def call(self, **kwargs):
        given.append({name: value for name, value in kwargs.items() if name not in ("generator", "callback")})
        return pipeline_call(self, **kwargs)

    monkeypatch.setattr(memo.VideoPipeline, "__call__", call)
    monkeypatch.setattr(teacache_memo, "write_video", lambda clips, *_: written.extend(clips))
    ((name, value),) = settings.items()
    run(f"--{name}", value, "--seed", 7)
    expected = memos_inference(settings, 7)
    assert len(given) == 4 and given[1]["ref_image"].shape == (1, 1 + 16, 3, 16, 16)
    for found, wanted in zip(given[:2], given[2:]):
        assert found.keys() == wanted.keys()
        assert all(np.allclose(found[name], wanted[name], atol=1e-2) for name in found)
    written = np.concatenate(written)
    assert np.abs(written.astype(int) - expected).max() <= 1, "saved weights are read into other memory"
    assert len({frame.tobytes() for frame in written}) == 32


def test_what_memos_functions_are_given(here, models, monkeypatch):
    """The files, folders and models of the config; the network in its precision."""
    given = {}

    def record(module, name):
        function = getattr(module, name)

        def recorded(*args, **kwargs):
            given[name] = inspect.signature(function).bind(*args, **kwargs).arguments
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)

    audio, vision = (sys.modules[f"memo.utils.{name}_utils"] for name in ("audio", "vision"))
    record(vision, "preprocess_image")
    record(teacache_memo, "load_pipeline")
    for name in ("resample_audio", "preprocess_audio", "extract_audio_emotion_labels"):
        record(audio, name)
    config = {**CONFIG, **models, "weight_dtype": "bf16", "enable_xformers_memory_efficient_attention": False}
    OmegaConf.save(OmegaConf.create(config), "config.yaml")
    run()
    misc = Path(models["misc_model_dir"], "misc")
    portrait = given["preprocess_image"].pop("image_path")
    assert given["preprocess_image"] == {"face_analysis_model": str(misc / "face_analysis"), "image_size": 16}
    assert not os.path.exists(portrait), "a copy, removed at the end"
    assert given["resample_audio"]["input_audio_file"] == "speech.wav"
    sound, voice = given["resample_audio"]["output_audio_file"], given["preprocess_audio"]
    assert voice["wav_path"] == sound and voice["fps"] == FPS and voice["num_generated_frames_per_clip"] == FRAMES
    assert voice["wav2vec_model"] == CONFIG["wav2vec"] and not os.path.exists(voice["cache_dir"]), "removed at the end"
    assert voice["vocal_separator_model"] == str(misc / "vocal_separator" / "Kim_Vocal_2.onnx")
    emotion = given["extract_audio_emotion_labels"]
    assert (emotion["model"], emotion["wav_path"]) == ("memoavatar/memo", sound) and emotion["audio_length"] == 32
    assert emotion["emotion2vec_model"] == CONFIG["emotion2vec"] and emotion["device"] == voice["device"] == "cpu"
    loaded = {name: value for name, value in given["load_pipeline"].items() if value is not None}
    names = {"model": models["model_name_or_path"], "vae": models["vae"]}
    assert loaded == {**names, "dtype": "bf16"}


def test_missing_models_for_faces_are_fetched(here, models, monkeypatch):
    """Into the folder of the config, where memo reads them; and not where they are."""
    import huggingface_hub

    fetched, config = [], {**CONFIG, **models, "misc_model_dir": "elsewhere"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: fetched.append((args, kwargs)))
    for each in (config, {**CONFIG, **models}):
        teacache_memo.prepare("face.png", "speech.wav", OmegaConf.create(each), str(here))
        os.remove("speech-16k.wav")
    ((args, kwargs),) = fetched
    assert args == ("memoavatar/memo",) and kwargs["local_dir"] == "elsewhere"
    assert kwargs["allow_patterns"] == ["misc/[fv]*"], "misc/face_analysis and misc/vocal_separator"


def test_defaults_lie_in_memos_folder(here, monkeypatch):
    """Files that are not found here; those here come first."""
    clone = here / "clone"
    monkeypatch.setattr(package, "__path__", [str(clone / "memo")])
    monkeypatch.setattr(teacache_memo, "BUNDLED", here / "none")
    names = {"config": "configs/inference.yaml", "input_image": "assets/examples/dicaprio.jpg"}
    names["input_audio"] = "assets/examples/speech.wav"
    for name, own in zip(names.values(), ("config.yaml", "face.png", "speech.wav")):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(Path(own).read_bytes())
    args = teacache_memo.parse_args([])
    assert {name: getattr(args, name) for name in names} == {**{k: clone / v for k, v in names.items()}} | {
        "config": args.config
    }
    assert args.config.inference_steps == STEPS and str(args.output) == "outputs/dicaprio_speech.mp4"
    Path(names["input_image"]).parent.mkdir(parents=True)
    Path("face.png").rename(names["input_image"])
    assert str(teacache_memo.parse_args([]).input_image) == names["input_image"]


def test_write_video(here):
    """Frames, rate and sound, read back; an odd number of rows is allowed for no side."""
    frames = np.stack([np.full((32, 48, 3), value, np.uint8) for value in range(0, 240, 8)])
    assert teacache_memo.write_video([frames[:16], frames[16:]], "a.mp4", 25, "speech.wav") == Path("a.mp4")
    found, fps, sound = read("a.mp4")
    assert found.shape == frames.shape and fps == 25 and sound == "aac"
    assert np.abs(found.astype(int) - frames).max() <= 6


# --- loading ---------------------------------------------------------------------------------


def test_memos_own_layout_and_a_saved_pipeline(here, models, tmp_path):
    """Both load, give the same, and need no xformers; plain from_pretrained leaves the memory without its processor."""
    pipeline, audio_proj = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    audio_proj.save_pretrained(tmp_path / "saved" / "audio_proj")
    plain = memo.VideoPipeline.from_pretrained(tmp_path / "saved")
    with pytest.raises(TypeError):
        plain(**call())
    assert teacache_memo.set_memory_processors(plain.diffusion_net) is plain.diffusion_net
    parts, _ = teacache_memo.load_pipeline(models["model_name_or_path"], models["vae"], dtype=torch.float32)
    saved, _ = teacache_memo.load_pipeline(str(tmp_path / "saved"), vae="nowhere", dtype="fp32")
    videos = [p(**call()).videos for p in (pipeline, plain, parts, saved)]
    for video in videos[1:]:
        assert torch.allclose(video, videos[0], atol=1e-4)
    half, projection = teacache_memo.load_pipeline(str(tmp_path / "saved"))
    assert half.diffusion_net.dtype == half.vae.dtype == torch.bfloat16 and projection.dtype == torch.float32
    assert half.device.type == "cpu" and half(**call()).videos.isfinite().all()
    with pytest.raises(OSError):
        teacache_memo.load_pipeline(str(tmp_path / "nowhere"), models["vae"])


@pytest.mark.parametrize("xformers", ["missing", "broken", "installed"])
def test_xformers_leaves_no_trace(monkeypatch, tmp_path, xformers):
    """A stand-in while memo is imported, where it does not work, and only then."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("memo", "xformers")]:
        monkeypatch.delitem(sys.modules, name)
    if xformers == "missing":
        monkeypatch.setitem(sys.modules, "xformers", None)
    elif xformers == "broken":
        (tmp_path / "xformers").mkdir()
        (tmp_path / "xformers" / "__init__.py").write_text("raise OSError('made for another torch')")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        mine = {"xformers": ModuleType("xformers"), "xformers.ops": ModuleType("xformers.ops")}
        mine["xformers"].ops = mine["xformers.ops"]
        for name, module in mine.items():
            monkeypatch.setitem(sys.modules, name, module)
    try:
        found = teacache_memo.import_memo()
        assert found.UNet3DConditionModel is not memo.UNet3DConditionModel, "imported anew"
        motion_module = sys.modules[found.MemoryLinearAttnTemporalModule.__module__]
        if xformers == "installed":
            assert motion_module.xformers is mine["xformers"] is sys.modules["xformers"]
            assert sys.modules["xformers.ops"] is mine["xformers.ops"]
        else:
            assert not {"xformers", "xformers.ops"} & set(sys.modules) and motion_module.xformers is not None
    finally:  # monkeypatch puts the old ones back
        for name in [name for name in sys.modules if name.split(".")[0] == "memo"]:
            del sys.modules[name]


# --- bad input: one line, nothing written ------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--input_image", "none.png"], "none.png"),
        (["--input_audio", "none.wav"], "none.wav"),
        (["--input_image", "x" * 300], "xxx"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "face.png"], "decode"),
        (["--config", "zero.yaml"], "zero.yaml: inference_steps must be a whole number of at least 1, not 0"),
        (["--rel_l1_thresh", "-1"], "rel_l1_thresh"),
        (["--rel_l1_thresh", "nan"], "rel_l1_thresh"),
        (["--rel_l1_thresh", "much"], "rel_l1_thresh"),
        (["--computed_steps", "1"], "computed_steps must be 2 to 6"),
        (["--computed_steps", "7"], "computed_steps must be 2 to 6"),
        (["--computed_steps", "3", "--rel_l1_thresh", "0.1"], "only one of"),
        (["--seed", "first"], "--seed"),
        (["--output_dir", "face.png"], "face.png"),
        (["--prompt", "hello"], "--prompt"),
    ],
)
def test_bad_arguments(here, capfd, arguments, says):
    OmegaConf.save(OmegaConf.create({**OmegaConf.load("config.yaml"), "inference_steps": 0}), "zero.yaml")
    assert says in refused(capfd, *arguments)


@pytest.mark.parametrize("text", ["", "fps: 30", "a: [", "- 1", "inference_steps: many"])
def test_a_config_that_is_none(here, capfd, text):
    Path("bad.yaml").write_text(text)
    assert refused(capfd, "--config", "bad.yaml")


def test_an_output_that_exists(here):
    Path("outputs").mkdir()
    Path("outputs/face_speech.mp4").write_bytes(b"precious")
    with pytest.raises(SystemExit, match="outputs/face_speech.mp4 exists"):
        run()
    assert Path("outputs/face_speech.mp4").read_bytes() == b"precious"


def test_a_memo_that_lacks_something(here, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "memo.models", None)
    line = refused(capfd)
    assert "memo.models" in line and "see Installation" in line


def test_a_portrait_without_a_face(here, capfd, monkeypatch):
    """Found by memo's face analysis, before the network is loaded."""
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    Image.new("RGB", (20, 20), "white").save("wall.png")
    with pytest.raises(SystemExit) as exit:
        run("--input_image", "wall.png")
    line = exit.value.code
    assert line.startswith("could not prepare") and "\n" not in line and capfd.readouterr().out == ""
    assert "no face found in wall.png" in line and not os.listdir("outputs")


def test_models_that_cannot_be_loaded(here, monkeypatch):
    config = OmegaConf.load("config.yaml")
    config.model_name_or_path = str(here / "nowhere")
    OmegaConf.save(config, "config.yaml")
    with pytest.raises(SystemExit, match="could not load .*nowhere: [^\n]*$"):
        run()
    assert not os.listdir("outputs")


@pytest.mark.parametrize(
    "flag, name, content, says",
    [
        ("--input_image", "a.png", b"", "a.png is not a picture that can be read"),
        ("--input_image", "speech.wav", None, "speech.wav is not a picture that can be read"),
        ("--input_audio", "a.wav", b"", "no sound in a.wav: "),
        ("--input_audio", "a.mp3", b"not a sound", "no sound in a.mp3: "),
        ("--input_audio", "face.png", None, "no sound in face.png: "),
        ("--input_audio", "12:30.mp3", b"", "no sound in 12:30.mp3: "),
    ],
)
def test_files_that_are_something_else(here, capfd, flag, name, content, says):
    if content is not None:
        Path(name).write_bytes(content)
    assert says in refused(capfd, flag, name)


def test_a_missing_file_is_named_as_typed(here, capfd):
    """With the places that were searched: here, and memo's folder."""
    line = refused(capfd, "--input_audio", "voices/none.wav")
    memos = Path(package.__path__[0]).parent / "voices" / "none.wav"
    assert f"no file voices/none.wav, looked for as {here / 'voices' / 'none.wav'} and {memos}" in line


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("cfg_scale", 1, "cfg_scale must be above 1, not 1"),
        ("cfg_scale", "high", "cfg_scale must be above 1, not high"),
        ("weight_dtype", "float16", "weight_dtype must be fp32, fp16, bf16, not float16"),
        ("num_generated_frames_per_clip", 8, "num_generated_frames_per_clip must be 16"),
        ("resolution", 500, "resolution must be a multiple of 8, not 500"),
        ("fps", 29.97, "fps must be a whole number of at least 1, not 29.97"),
        ("fps", None, "it lacks fps"),
    ],
)
def test_a_config_that_cannot_work(here, capfd, key, value, says):
    config = OmegaConf.load("config.yaml")
    if value is None:
        del config[key]
    else:
        config[key] = value
    OmegaConf.save(config, "mine.yaml")
    line = refused(capfd, "--config", "mine.yaml")
    assert "mine.yaml" in line and says in line


@pytest.mark.parametrize(
    "module, says",
    [("imageio_ffmpeg", 'pip install "imageio[ffmpeg]"'), ("memo.utils.vision_utils", "pip install -e ../memo")],
)
def test_a_missing_package(here, capfd, monkeypatch, module, says):
    """That of the video at once, not after it was generated; those of memo's faces and voices too."""
    monkeypatch.setitem(sys.modules, module, None)
    assert says in refused(capfd)


def test_a_folder_that_cannot_be_written(here, capfd, monkeypatch):
    def read_only(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(teacache_memo.tempfile, "TemporaryFile", lambda dir=None: read_only(dir) if dir else open_())
    open_ = tempfile.SpooledTemporaryFile
    monkeypatch.setattr(teacache_memo, "read_voice", lambda path: None)
    assert "cannot write into outputs (Permission denied): give another --output_dir" in refused(capfd)


def test_emotions(here, capfd, monkeypatch):
    """By name or number, instead of the recognised one."""
    assert teacache_memo.parse_args([*ARGUMENTS, "--emotion", "sad"]).emotion == 6
    assert teacache_memo.parse_args([*ARGUMENTS, "--emotion", "0"]).emotion == 0
    assert teacache_memo.parse_args(ARGUMENTS).emotion is None
    for wrong in ("9", "-1", "glad"):
        assert "argument --emotion" in refused(capfd, f"--emotion={wrong}")
    audio = sys.modules["memo.utils.audio_utils"]
    monkeypatch.setattr(audio, "extract_audio_emotion_labels", lambda *_, **__: pytest.fail("recognised"))
    inputs = teacache_memo.prepare("face.png", "speech.wav", OmegaConf.load("config.yaml"), str(here), emotion=0)
    assert inputs.audio_emotion.tolist() == [0] * 32 and inputs.num_emotion_classes == 9


def without_memo(code, folder):
    """Python code in a process of its own, to which memo and these tests are unknown."""
    if importlib.util.find_spec("memo").origin.startswith(sys.prefix):
        pytest.skip("memo is installed here")
    code, env = f"from TeaCache4Memo import teacache_memo\n{code}", {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=folder)


def test_without_memo(tmp_path):
    """The script can be imported, and says what is missing when it runs."""
    done = without_memo("print('imported'); teacache_memo.main([])", tmp_path)
    assert done.stdout.startswith("imported\n") and done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "git clone https://github.com/memoavatar/memo" in done.stderr and "see Installation" in done.stderr


def test_memo_may_come_later_than_the_script(tmp_path):
    """The way of class attributes."""
    folders = [str(Path(package.__file__).parent.parent), str(ROOT / "tests")]
    code = f"""
import sys
assert not [name for name in sys.modules if name.split(".")[0] == "memo"]
sys.path[:0] = {folders}
from memo_models import Clip, denoise, memo, tiny_unet
network = memo.UNet3DConditionModel
network.forward = teacache_memo.teacache_forward
network.enable_teacache, network.num_steps, network.rel_l1_thresh = True, 8, 9.0
model = tiny_unet()
denoise(model, Clip())
print(model.teacache)
"""
    done = without_memo(code, tmp_path)
    assert done.stdout == "2 of 8 steps computed: X......X\n", done.stderr


def test_the_snippet_of_the_front_page(here):
    """To the letter, but for the files and the number of steps."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = (s for s in re.findall(r"```python\n(.*?)```", text, re.S) if "memo" in s)
    for old, new in {"config.yaml": "config.yaml", "example.png": "face.png", "example.wav": "speech.wav"}.items():
        assert f"assets/memo-emoji/{old}" in snippet and (ROOT / "assets" / "memo-emoji" / old).is_file()
        snippet = snippet.replace(f"assets/memo-emoji/{old}", new)
    scope = {}
    exec(snippet.replace("rel_l1_thresh=0.15", "rel_l1_thresh=9"), scope)
    assert len(read("talk.mp4")[0]) == 2 * FRAMES and sum(scope["pipeline"].diffusion_net.teacache.schedule) == 2


# --- compare_memo ------------------------------------------------------------------------------------


def test_compare(here, capsys, monkeypatch):
    """The original, a threshold and a budget, after a warm-up of one clip; beside what was already made."""
    calls, generate_all = [], teacache_memo.generate_all

    def recorded(*args, bar, **kwargs):
        calls.append(kwargs)
        return generate_all(*args, bar=bar, **kwargs)

    monkeypatch.setattr(teacache_memo, "generate_all", recorded)
    run("--rel_l1_thresh", 9, 0, 9, "--computed_steps", 3, "--output_dir", "o", tool=compare_memo)
    none = {"rel_l1_thresh": None, "computed_steps": None, "tolerance": None}
    settings = [{**none, "rel_l1_thresh": 0.0}, {**none, "rel_l1_thresh": 9.0}, {**none, "computed_steps": 3}]
    assert calls == [{"rel_l1_thresh": 0.0, "clips": 1}, *settings]
    frames, fps, sound = read("o/face_speech_compare.mp4")
    assert len(frames) == 32 and fps == FPS and sound == "aac"
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0 and frames.shape[2] >= 3 * 192
    out, err = capsys.readouterr()
    rows = re.findall(r"^\| (.+?) \| [\d.]+ s \| ([\d.]+)x \| (\d+) of 12 steps \| (.*) \|$", out, re.M)
    assert "threshold 9, clip 2 of 2" in err and "3 steps a clip, clip 1 of 2" in err, "bars are named"
    named = [("original", "12"), ("threshold 9", "4"), ("3 steps a clip", "6")]
    assert [(row[0], row[2]) for row in rows] == named and rows[0][3] == ""
    last = json.loads(Path("o/face_speech_compare.json").read_text())
    base, *others = last["runs"]
    assert base["speedup"] == 1 and base["psnr"] is None and last["config"]["inference_steps"] == STEPS
    for entry, row, setting in zip(last["runs"], rows, settings):
        assert setting.items() <= entry.items() and row[1] == f"{entry['speedup']:.2f}"
        assert entry["speedup"] == base["seconds"] / entry["seconds"]
    assert all(row[3] == f"{entry['psnr']:.1f} dB" for row, entry in zip(rows[1:], others))
    assert {"machine", "torch", "diffusers"} <= last.keys() and last["seed"] == teacache_memo.SEED
    assert all(last[name] in out.splitlines()[-1] for name in ("machine", "torch", "diffusers")), "once, below"
    assert max(map(len, out.splitlines()[:-1])) <= 80
    for name in ("face_speech_compare.mp4", "face_speech_compare.json"):
        assert f"{name} exists" in refused(capsys, "--output-dir", "o", tool=compare_memo)
        Path("o", name).unlink()
    assert compare_memo.parse_args(ARGUMENTS).settings == [
        *({**none, "rel_l1_thresh": t} for t in (0.0, 0.09, 0.15, 0.25)),
        {**none, "computed_steps": STEPS // 2},
    ]


def test_the_median_of_several_runs(here, monkeypatch):
    """And the video of the first."""
    seconds = iter([99.0, 4.0, 9.0, 5.0, 2.0, 1.0, 3.0])  # the warm-up, the original, the threshold

    def generate_all(*args, **kwargs):
        took = next(seconds)
        return np.full((2, 8, 8, 3), int(took), np.uint8), took, [True] * 4

    monkeypatch.setattr(teacache_memo, "prepare", lambda *args: SimpleNamespace(sound=None))
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda **kwargs: (None, None))
    monkeypatch.setattr(teacache_memo, "generate_all", generate_all)
    args = compare_memo.parse_args([*ARGUMENTS, "--rel_l1_thresh", "9", "--computed_steps", "--repeats", "3"])
    videos, entries, _ = compare_memo.compare(args, "folder")
    assert [entry["seconds"] for entry in entries] == [5.0, 2.0] and entries[1]["speedup"] == 2.5
    assert [video.max() for video in videos] == [4, 2] and next(seconds, None) is None


@pytest.mark.parametrize(
    "flags", [["--rel_l1_thresh", "0.1", "inf"], ["--computed_steps", "3", "1"], ["--repeats", "0"]], ids=str
)
def test_compare_checks_each_panel(here, capfd, flags):
    assert flags[0].strip("-") in refused(capfd, *flags, tool=compare_memo)


def test_compare_beside_a_video(here):
    Path("outputs").mkdir()
    Path("outputs/face_speech.mp4").touch()
    assert compare_memo.parse_args(ARGUMENTS).output.name == "face_speech_compare.mp4"


def test_panels_show_the_videos():
    videos = [np.full((2, 8, 10, 3), value, np.uint8) for value in (10, 200)]
    entry = {
        "rel_l1_thresh": 0.15,
        "computed_steps": None,
        "tolerance": None,
        "seconds": 1.0,
        "speedup": 2.0,
        "computed": 2,
        "steps": 4,
        "psnr": 30.0,
    }
    pages = list(compare_memo.panels(videos, [entry, entry]))
    assert len(pages) == 2 and pages[1].dtype == np.uint8
    for page in pages:
        assert page.shape[0] % 2 == page.shape[1] % 2 == 0
        for left, value in ((8, 10), (8 + 216, 200)):  # enlarged twenty times, to 200 pixels
            assert (page[8:168, left : left + 200] == value).all() and (page[:168, left - 8 : left] == 255).all()
            assert (page[168:, left : left + 200].min(axis=2) < 100).any(), "a label under it"


def test_psnr():
    video = np.zeros((2, 4, 4, 3), np.uint8)
    assert compare_memo.psnr(video, video) == float("inf")
    assert compare_memo.psnr(video + np.uint8(51), video) == pytest.approx(20 * np.log10(5))
    half = np.concatenate([video[:1], video[1:] + np.uint8(51)])
    assert compare_memo.psnr(half, video) == pytest.approx(10 * np.log10(50))
