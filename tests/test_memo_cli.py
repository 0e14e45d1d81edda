"""`python teacache_memo.py`, from a portrait and a voice to an mp4, with tiny random models; and loading.

memo's functions for faces and voices need models from the Hub: here they are the double's, also with the real memo.
"""

import importlib.util
import inspect
import io
import os
import re
import subprocess
import sys
import wave
from pathlib import Path
from types import ModuleType, SimpleNamespace

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import MEMO_DOUBLE, ROOT
from memo_models import Clip, denoise, memo, package, save_parts, tiny_pipeline, tiny_unet
from omegaconf import OmegaConf
from PIL import Image

from TeaCache4Memo import teacache_memo

STEPS, FRAMES, FPS = 6, 16, 30
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
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
BATCH = ["pairs.csv", "--config", "config.yaml"]


def save_sound(path, channels, rate=16000):
    """A wav of (samples, channels)."""
    with wave.open(str(path), "wb") as file:
        file.setparams((channels.shape[1], 2, rate, 0, "NONE", ""))
        file.writeframes(channels.astype(np.int16).tobytes())
    return path


def write_sound(path, frames, rate=44100):
    """A tone as long as `frames` frames, or a little less: resampling may add a sample."""
    t = np.arange(round((frames - 0.1) / FPS * rate))[:, None] / rate
    save_sound(path, 8000 * np.sin(2 * np.pi * 440 * t), rate)


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


@pytest.fixture
def quick(monkeypatch):
    """Videos of two gray clips, for which nothing is loaded."""
    network = SimpleNamespace(teacache=SimpleNamespace(schedule=[True] * STEPS))
    pipeline = SimpleNamespace(diffusion_net=network, scheduler=None)
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *_, **__: (pipeline, None))
    clip = np.full((FRAMES, 16, 16, 3), 99, np.uint8)
    monkeypatch.setattr(teacache_memo, "generate", lambda *_, clips=2, **__: iter([clip] * clips))


@pytest.fixture
def ffmpeg_is(tmp_path, monkeypatch):
    """Puts a script, Python with the name of the real one in `ffmpeg`, in place of ffmpeg."""

    def replace(code):
        script = tmp_path / "ffmpeg.py"
        script.write_text(
            f"#!{sys.executable}\nimport os, sys\nffmpeg = {FFMPEG!r}\n{code}\nos.execv(ffmpeg, sys.argv)"
        )
        script.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
        teacache_memo.find_ffmpeg.cache_clear()

    yield replace
    teacache_memo.find_ffmpeg.cache_clear()


def run(*more, tool=teacache_memo):
    """main() with the usual arguments; later ones win."""
    tool.main([*ARGUMENTS, *map(str, more)])


def refused(capfd, *more, tool=teacache_memo):
    """The one line of an exit, before anything is loaded."""
    with pytest.raises(SystemExit) as exit, pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacache_memo, "load_pipeline", lambda *_, **__: pytest.fail("too late"))
        run(*more, tool=tool)
    out, err = capfd.readouterr()
    if isinstance(exit.value.code, str):  # what the interpreter would print
        err += exit.value.code + "\n"
    assert exit.value.code not in (0, None) and out == "" and err.count("\n") == 1, err
    return err


def read(path):
    """Frames (frames, height, width, 3), frames a second, and the codec of the sound."""
    with imageio.get_reader(path) as reader:
        meta = reader.get_meta_data()
        return np.stack([frame for frame in reader]), meta["fps"], meta.get("audio_codec")


# --- from a portrait and a voice to a video -----------------------------------------------


@pytest.mark.parametrize(
    "flags, computed, says",
    [
        ("", 4, "(computed_steps 4, corrected), seed 42"),  # the constant
        ("--rel_l1_thresh 9", 2, "(rel_l1_thresh 9.0, corrected), seed 42"),
        ("--rel_l1_thresh 0", 6, "(rel_l1_thresh 0.0), seed 42"),
        ("--computed_steps 0,2,5 --seed 7", 3, "(computed_steps 0,2,5, corrected), seed 7"),
    ],
)
def test_two_clips(here, capsys, monkeypatch, flags, computed, says):
    """The video of two clips. What is said was computed."""
    load, calls = teacache_memo.load_pipeline, []

    def load_pipeline(*args, **more):
        pipeline, audio_proj = load(*args, **more)
        pipeline.diffusion_net.mid_block.register_forward_hook(lambda *_: calls.append(1))
        return pipeline, audio_proj

    monkeypatch.setattr(teacache_memo, "load_pipeline", load_pipeline)
    monkeypatch.setattr(teacache_memo, "COMPUTED_STEPS", 4)
    run("--output_dir", "new/outputs", *flags.split())
    frames, fps, sound = read("new/outputs/face_speech.mp4")
    assert frames.shape == (2 * FRAMES, 16, 16, 3) and fps == FPS and sound == "aac"
    assert os.listdir("new/outputs") == ["face_speech.mp4"] and len(calls) == 2 * computed
    out, err = capsys.readouterr()
    closing = rf"saved new/outputs/face_speech.mp4: [\d.]+ s, {2 * computed} of 12 steps computed {re.escape(says)}\n"
    assert re.fullmatch(closing, out)
    lines = [f"clip {clip} of 2: {computed} of 6 steps computed" for clip in (1, 2)]
    assert err.splitlines() == lines, "on no terminal, a line a clip"


def test_flags():
    """As they are written in other tools, too; a list of steps has commas."""
    parse = teacache_memo.build_parser().parse_args
    args = parse(["--output-dir", "o", "--rel-l1-thresh", "0.5", "--computed-steps", "0,3,5", "--input-image", "a.png"])
    assert (str(args.output_dir), args.rel_l1_thresh, args.input_image) == ("o", 0.5, "a.png")
    assert args.computed_steps == [0, 3, 5] and parse(["--computed_steps", "10"]).computed_steps == 10


@pytest.mark.parametrize("name, stem", [("john.smith", "john.smith"), ("x" * 245, "x" * 100), ("你" * 80, "你" * 33)])
def test_names_of_videos(tmp_path, name, stem):
    """As those of the files; so long ones that they could not be joined are cut."""
    assert teacache_memo.output_path(tmp_path, f"{name}.png", f"{name}.wav").name == f"{stem}_{stem}.mp4"


def call(**given):
    """Arguments of memo's pipeline for a short clip."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"ref_image": torch.rand(1, 3, 3, 16, 16, generator=generator) * 2 - 1, "generator": generator}
    arguments |= {"face_emb": torch.randn(1, 512, generator=generator), "width": 16, "height": 16, "video_length": 16}
    arguments |= {"audio_tensor": torch.randn(1, 16, 4, 16, generator=generator), "num_inference_steps": 3}
    arguments |= {"audio_emotion": torch.full((16,), 3, dtype=torch.int32), "emotion_class_num": 9}
    return {**arguments, "guidance_scale": 3.5, **given}


def memos_inference(settings, seed):
    """memo's inference.py written a second time: two clips, chained by their past frames. Stock at threshold 0."""
    pipeline, audio_proj = tiny_pipeline()
    if settings != {"rel_l1_thresh": 0}:
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


@pytest.mark.parametrize("settings", [{"rel_l1_thresh": 0}, {"computed_steps": 3}], ids=str)
def test_frames_are_memos(here, monkeypatch, settings):
    """Clips chained as in memo's inference.py: the very frames."""
    written = []
    monkeypatch.setattr(teacache_memo, "write_video", lambda clips, *_: written.extend(clips))
    ((name, value),) = settings.items()
    run(f"--{name}", value, "--seed", 7)
    written = np.concatenate(written).astype(int)
    assert np.abs(written - memos_inference(settings, 7)).max() <= 1, "saved weights are read into other memory"
    assert len({frame.tobytes() for frame in written}) == 32


def test_what_memos_functions_are_given(here, models, monkeypatch):
    """The files, folders and models of the config; the network in its precision."""
    given = {}

    def record(module, name):
        function = getattr(module, name)

        def recorded(*args, **kwargs):
            given.update(inspect.signature(function).bind(*args, **kwargs).arguments)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)

    record(sys.modules["memo.utils.vision_utils"], "preprocess_image")
    record(sys.modules["memo.utils.audio_utils"], "preprocess_audio")
    record(sys.modules["memo.utils.audio_utils"], "extract_audio_emotion_labels")
    config = {**CONFIG, **models, "weight_dtype": "bf16", "enable_xformers_memory_efficient_attention": False}
    OmegaConf.save(OmegaConf.create(config), "config.yaml")
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *args, **more: given.update(args=args, **more) or (0, 0))
    monkeypatch.setattr(teacache_memo, "write_video", lambda *_: None)
    run()
    files = [given.pop(name) for name in ("image_path", "wav_path", "cache_dir")]
    assert all(os.path.isabs(file) and not os.path.exists(file) for file in files), "copies, removed at the end"
    misc = Path(models["misc_model_dir"], "misc")
    assert given == {
        "face_analysis_model": str(misc / "face_analysis"),
        "vocal_separator_model": str(misc / "vocal_separator" / "Kim_Vocal_2.onnx"),
        "wav2vec_model": CONFIG["wav2vec"],
        "emotion2vec_model": CONFIG["emotion2vec"],
        "model": "memoavatar/memo",
        **{"image_size": 16, "fps": FPS, "num_generated_frames_per_clip": FRAMES, "audio_length": 32, "device": "cpu"},
        **{"args": (models["model_name_or_path"], models["vae"]), "dtype": "bf16"},
    }


def test_missing_models_for_faces_are_fetched(here, models, monkeypatch):
    """Into the folder of the config, where memo reads them; and not where they are."""
    import huggingface_hub

    fetched, config = [], {**CONFIG, **models, "misc_model_dir": "elsewhere"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: fetched.append((args, kwargs)))
    for each in (config, {**CONFIG, **models}):
        teacache_memo.prepare("face.png", "speech.wav", OmegaConf.create(each), str(here))
    ((args, kwargs),) = fetched
    assert args == ("memoavatar/memo",) and str(kwargs["local_dir"]) == "elsewhere"
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
    config = teacache_memo.choose_config()
    assert config.inference_steps == STEPS
    assert teacache_memo.find_inputs(config) == (clone / names["input_image"], clone / names["input_audio"])
    Path(names["input_image"]).parent.mkdir(parents=True)
    Path("face.png").rename(names["input_image"])
    assert teacache_memo.find_inputs(config)[0] == Path(names["input_image"])


def test_write_video(here):
    """Frames, rate and sound, read back; where players look for them, with the colours that they are told."""
    frames = np.stack([np.full((32, 48, 3), value, np.uint8) for value in range(0, 240, 8)])
    assert teacache_memo.write_video([frames[:16], frames[16:]], "a.mp4", 25, "speech.wav") == Path("a.mp4")
    found, fps, sound = read("a.mp4")
    assert found.shape == frames.shape and fps == 25 and sound == "aac"
    assert np.abs(found.astype(int) - frames).max() <= 6
    data = Path("a.mp4").read_bytes()
    assert data.find(b"moov") < data.find(b"mdat"), "it plays while it is loaded"
    ffmpeg = subprocess.run([FFMPEG, "-i", "a.mp4"], capture_output=True, text=True)
    assert "yuv420p(tv, bt709" in ffmpeg.stderr
    blue = np.full((16, 32, 32, 3), (30, 90, 200), np.uint8)
    for name in ("b.mp4", "2026-11-28T10:30/b.mp4", "pipe:/50%d.mp4"):  # ffmpeg would take these for something else
        Path(name).parent.mkdir(exist_ok=True)
        found = read(teacache_memo.write_video([blue], name, 25, "speech.wav"))[0]
        assert np.abs(found.astype(int) - blue).max() <= 4, "the pixels are what is said of them"
        assert os.stat(name).st_mode == os.stat("face.png").st_mode, "others may read it"


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


@pytest.mark.parametrize("xformers", ["missing", "broken", "loaded"])
def test_xformers_leaves_no_trace(monkeypatch, tmp_path, capfd, xformers):
    """A stand-in while memo is imported, where it is not loaded, and only then; one for another torch says nothing."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("memo", "xformers")]:
        monkeypatch.delitem(sys.modules, name)
    names = ("xformers", "xformers.ops") if xformers == "loaded" else ()
    mine = {name: ModuleType(name) for name in names}
    for name, module in mine.items():
        monkeypatch.setitem(sys.modules, name, module)
    if xformers == "broken":
        (tmp_path / "xformers").mkdir()
        (tmp_path / "xformers" / "__init__.py").write_text("print('Traceback', file=__import__('sys').stderr)")
        monkeypatch.syspath_prepend(tmp_path)
    try:
        found = teacache_memo.import_memo()
        assert found.UNet3DConditionModel is not memo.UNet3DConditionModel, "imported anew"
        used = sys.modules[found.MemoryLinearAttnTemporalModule.__module__].xformers
        assert used is mine.get("xformers", used) and capfd.readouterr().err == ""
        assert {name: module for name, module in sys.modules.items() if name.startswith("xformers")} == mine
    finally:  # monkeypatch puts the old ones back
        for name in [name for name in sys.modules if name.split(".")[0] == "memo"]:
            del sys.modules[name]


# --- bad input: one line, nothing written ------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--input_image", "x" * 300], "xxx"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "face.png"], "face.png is no config for MEMO"),
        (["--rel_l1_thresh", "nan"], "rel_l1_thresh"),
        (["--computed_steps", "7"], "computed_steps must be a whole number from 2 to 6"),
        (["--computed_steps", "0,3"], "computed_steps is a list for 4 steps, not for 6"),
        (["--computed_steps", "0,x"], "--computed_steps"),
        (["--computed_steps", "3", "--rel_l1_thresh", "0.1"], "not both"),
        (["--output_dir", "face.png"], "face.png"),
        (["--output_dir", "/proc"], "/proc"),
        (["--emotion", "glad"], "argument --emotion: invalid choice: 'glad'"),
    ],
)
def test_bad_arguments(here, capfd, arguments, says):
    assert says in refused(capfd, *arguments)


@pytest.mark.parametrize("text", ["", "a: [", "- 1"])
def test_a_config_that_is_none(here, capfd, text):
    Path("bad.yaml").write_text(text)
    assert refused(capfd, "--config", "bad.yaml")


@pytest.mark.parametrize("tool", ["teacache_memo", "batch_memo", "compare_memo"])
@pytest.mark.parametrize("kind", ["missing", "closed", "of a notebook", "without these letters"])
def test_any_stdout(here, quick, monkeypatch, tool, kind):
    """The video is made, whatever can be said of it, and the stdout is left as it was."""
    Path("speech.wav").rename("你好.wav")
    Path("pairs.csv").write_text("face.png,你好.wav", encoding="utf-8")
    stdout = None if kind == "missing" else io.StringIO()
    if kind == "closed":
        stdout.close()
    if kind == "without these letters":
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stdout)
    arguments = BATCH if tool == "batch_memo" else [*ARGUMENTS, "--input_audio", "你好.wav"]
    try:
        importlib.import_module(f"TeaCache4Memo.{tool}").main(arguments)
    except SystemExit as ended:  # a batch does
        assert not ended.code
    assert sys.stdout is stdout and len(list(Path("outputs").glob("face_你好*.mp4"))) == 1
    if kind == "without these letters":
        stdout.seek(0)
        assert "saved outputs/face_??" in stdout.read().replace(os.sep, "/")


@pytest.mark.parametrize("module", ["memo", "omegaconf", "imageio_ffmpeg", "memo.utils.vision_utils"])
def test_a_missing_package(here, capfd, monkeypatch, module):
    """All before anything is loaded."""
    monkeypatch.setitem(sys.modules, module, None)
    if module == "memo.utils.vision_utils":
        monkeypatch.delattr(sys.modules["memo.utils"], "vision_utils", raising=False)
    teacache_memo.find_ffmpeg.cache_clear()
    line = refused(capfd)
    assert module.split(".")[-1] in line and "see Installation" in line


def test_a_portrait_without_a_face(here, capfd):
    """Found by memo's face analysis, before the network is loaded."""
    Image.new("RGB", (20, 20), "white").save("wall.png")
    assert "no face found in wall.png" in refused(capfd, "--input_image", "wall.png") and not os.listdir("outputs")


def test_models_that_cannot_be_loaded(here):
    config = OmegaConf.load("config.yaml")
    config.model_name_or_path = str(here / "nowhere")
    OmegaConf.save(config, "config.yaml")
    with pytest.raises(SystemExit, match="error: [^\n]*nowhere[^\n]*$"):
        run()
    assert not os.listdir("outputs")


@pytest.mark.parametrize("name", ["a.jpg", "12:30.mp3", "mute.mp4"])
def test_files_that_are_something_else(here, capfd, name):
    """Empty ones, and a film without sound."""
    Path(name).touch()
    if name == "mute.mp4":
        film = "-v error -y -f lavfi -i color=red:size=32x32:duration=1 mute.mp4"
        subprocess.run([FFMPEG, *film.split()], check=True)
    assert f"{name} is not a picture that can be read" in refused(capfd, "--input_image", name)
    assert f"no sound in {name}: " in refused(capfd, "--input_audio", name)


def test_a_missing_file_is_named_as_typed(here, capfd):
    """With the places that were searched: here, and memo's folder."""
    line = refused(capfd, "--input_audio", "voices/none.wav")
    memos = Path(package.__path__[0]).parent / "voices" / "none.wav"
    assert f"no file voices/none.wav, looked for as {here / 'voices' / 'none.wav'} and {memos}" in line


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("cfg_scale", 1, "cfg_scale must be above 1, as memo needs guidance, not 1"),
        ("weight_dtype", "float16", "weight_dtype must be fp32, fp16 or bf16, not float16"),
        ("num_generated_frames_per_clip", 8, "num_generated_frames_per_clip must be 16"),
        ("resolution", 500, "resolution must be a multiple of 8, not 500"),
        ("resolution", 0, "resolution must be a multiple of 8, not 0"),
        ("fps", 29.97, "fps"),
        ("inference_steps", 0, "inference_steps must be at least 1, not 0"),
        ("wav2vec", "???", "wav2vec"),
    ],
)
def test_a_config_that_cannot_work(here, capfd, key, value, says):
    OmegaConf.save(OmegaConf.create({**OmegaConf.load("config.yaml"), key: value}), "mine.yaml")
    assert says in (line := refused(capfd, "--config", "mine.yaml")) and "mine.yaml" in line


def test_an_ffmpeg_that_cannot_write_the_video(here, capfd, ffmpeg_is):
    """Said before anything is computed."""
    ffmpeg_is("if 'libx264' in sys.argv: sys.exit('Unknown encoder libx264')")
    assert "has no libx264: unset IMAGEIO_FFMPEG_EXE" in refused(capfd) and not os.path.exists("outputs")


def test_emotions(here, capfd, monkeypatch):
    """By name, instead of the recognised one."""
    audio, config = sys.modules["memo.utils.audio_utils"], OmegaConf.load("config.yaml")
    monkeypatch.setattr(audio, "extract_audio_emotion_labels", lambda *_, **__: pytest.fail("recognised"))
    inputs = teacache_memo.prepare("face.png", "speech.wav", config, str(here), emotion="sad")
    assert inputs.audio_emotion.tolist() == [6] * 32 and inputs.num_emotion_classes == 9
    with pytest.raises(ValueError, match="knows the emotions angry, .*, not glad"):
        teacache_memo.prepare("face.png", "speech.wav", config, str(here), emotion="glad")


def test_memo_may_be_missing_or_come_later(monkeypatch):
    """The script is imported without it. Later its class takes the forward, and attributes of the class the settings."""
    spec = importlib.util.spec_from_file_location("alone", ROOT / "TeaCache4Memo" / "teacache_memo.py")
    alone = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "alone", alone)
        for name in [name for name in sys.modules if name.split(".")[0] == "memo"]:
            patch.setitem(sys.modules, name, None)
        spec.loader.exec_module(alone)
    network = memo.UNet3DConditionModel
    monkeypatch.setattr(network, "forward", alone.teacache_forward)
    for name, value in {"enable_teacache": True, "num_steps": 8, "rel_l1_thresh": 9.0}.items():
        monkeypatch.setattr(network, name, value, raising=False)
    model = tiny_unet()
    denoise(model, Clip())
    assert str(model.teacache) == "2 of 8 steps computed: X......X"
