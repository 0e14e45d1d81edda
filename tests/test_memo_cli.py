"""`python teacache_memo.py`, from a portrait and a voice to an mp4, with tiny random models; and bad input.

memo's functions for faces and voices need models from the Hub: here they are the double's, also with the real memo.
"""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import MEMO_DOUBLE, ROOT
from diffusers.utils import logging
from memo_models import REAL, memo, save_parts, tiny_pipeline
from omegaconf import OmegaConf
from PIL import Image

from TeaCache4Memo import compare_memo, prepare_memo, teacache_memo

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
    for name in prepare_memo.MODELS:
        path = folder / "misc_models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(2**20)  # as large as memo wants them
    return {"model_name_or_path": model, "vae": vae, "misc_model_dir": str(folder / "misc_models")}


@pytest.fixture(autouse=True)
def verbosity():
    """main() makes diffusers quieter."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


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


ARGUMENTS = ["--config", "config.yaml", "--input_image", "face.png", "--input_audio", "speech.wav"]


def run(*more):
    """main() with the usual arguments; later ones win."""
    teacache_memo.main([*ARGUMENTS, *map(str, more)])


def refused(capfd, *more):
    """The one line of an exit with code 2, on the process's own stderr, where ffmpeg writes as well."""
    with pytest.raises(SystemExit) as exit:
        run(*more)
    out, err = capfd.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1, err
    return err


def read(path):
    """Frames (frames, height, width, 3), frames a second, and whether there is sound."""
    with imageio.get_reader(path) as reader:
        meta = reader.get_meta_data()
        return np.stack([frame for frame in reader]), meta["fps"], meta.get("audio_codec")


# --- from a portrait and a voice to a video -----------------------------------------------


def test_two_clips(here, capsys):
    run("--output_dir", "new/outputs", "--rel_l1_thresh", 9)
    frames, fps, sound = read("new/outputs/face_speech.mp4")
    assert frames.shape == (2 * FRAMES, 16, 16, 3) and fps == FPS and sound == "aac"
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"saved new/outputs/face_speech.mp4: 32 frames, [\d.]+ s a frame, 4 / 12 steps \(3.00x fewer passes\)\n", out
    )
    assert "2/2" in err and "4 / 12 steps computed" in err, "progress over clips"
    assert os.listdir("new/outputs") == ["face_speech.mp4"], "no drafts left"


def test_video_ends_with_the_sound(here):
    """The last clip is filled up by memo; what it shows beyond the sound is cut off."""
    write_sound("speech.wav", 2 * FRAMES - 5)
    run()
    assert len(read("outputs/face_speech.mp4")[0]) == 2 * FRAMES - 5


def test_every_step_at_threshold_0(here, capsys):
    run("--rel-l1-thresh", "0")
    assert "12 / 12 steps (1.00x fewer passes)" in capsys.readouterr().out


def expected_frames(models, thresh, seed):
    """memo's inference.py written a second time, without TeaCache's script: two clips, chained by their past frames."""
    pipeline, audio_proj = tiny_pipeline()
    teacache_memo.apply_teacache(pipeline.diffusion_net, STEPS, thresh)
    pixels, face = sys.modules["memo.utils.vision_utils"].preprocess_image("", "face.png", 16)
    generator, clips = torch.Generator().manual_seed(seed), []
    audio = torch.randn(32, 5, 2, 8, generator=torch.Generator().manual_seed(32))
    for k in range(2):
        past = pixels.repeat(2, 1, 1, 1) if k == 0 else clips[-1][0].permute(1, 0, 2, 3)[-16:] * 2.0 - 1.0
        with torch.no_grad():
            tokens = audio_proj(audio[16 * k : 16 * k + 16].unsqueeze(0))
        clips.append(
            pipeline(
                ref_image=torch.cat([pixels, past], dim=0).unsqueeze(0),
                audio_tensor=tokens,
                audio_emotion=torch.full((16,), 3, dtype=torch.int32),
                emotion_class_num=9,
                face_emb=face,
                width=16,
                height=16,
                video_length=16,
                num_inference_steps=STEPS,
                guidance_scale=3.5,
                generator=generator,
                is_new_audio=k == 0,
            ).videos
        )
    video = torch.cat(clips, dim=2)[0].permute(1, 2, 3, 0).numpy()
    return np.clip(video * 255, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("thresh", [0, 9])
def test_frames_are_memos(here, models, monkeypatch, thresh):
    """Clips chained as in memo's inference.py: the very frames, from the very inputs."""
    written, given, pipeline_call = [], [], memo.VideoPipeline.__call__

    def call(self, **kwargs):
        given.append({name: value for name, value in kwargs.items() if name != "generator"})
        return pipeline_call(self, **kwargs)

    monkeypatch.setattr(memo.VideoPipeline, "__call__", call)
    monkeypatch.setattr(prepare_memo, "write_video", lambda frames, *_: written.append(frames))
    run("--rel_l1_thresh", thresh, "--seed", 7)
    expected = expected_frames(models, thresh, 7)
    assert len(given) == 4 and given[1]["ref_image"].shape == (1, 1 + 16, 3, 16, 16)
    for found, wanted in zip(given[:2], given[2:]):
        assert found.keys() == wanted.keys()
        assert all(np.allclose(found[name], wanted[name], atol=1e-2) for name in found)
    assert np.abs(written[0].astype(int) - expected).max() <= 1, "saved weights are read into other memory"
    assert len({frame.tobytes() for frame in written[0]}) == 32


def test_compare(here, capsys, monkeypatch):
    run("--compare", 9, 0.0, 9, "--output_dir", "o")
    frames, fps, sound = read("o/face_speech_compare.mp4")
    out, _ = capsys.readouterr()
    assert len(frames) == 32 and fps == FPS and sound == "aac"
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0 and frames.shape[2] >= 2 * 192
    rows = re.findall(r"^\| ([\d.]+) \| [\d.]+ \| [\d.]+ \| ([\d.]+)x \| (\d+) / 12 \| (\S+) \|$", out, re.M)
    assert [(t, c) for t, _, c, _ in rows] == [("0", "12"), ("9", "4")] and rows[0][3] == "inf"
    last = json.loads(out.splitlines()[-1])
    base, quick = last["runs"]
    assert quick["speedup"] == base["seconds"] / quick["seconds"] and base["speedup"] == 1
    assert rows[1][1] == f"{quick['speedup']:.2f}"
    assert [r["rel_l1_thresh"] for r in last["runs"]] == [0, 9] and last["runs"][0]["psnr"] is None
    assert last["runs"][1]["computed"] == 4 and last["runs"][1]["frames"] == 32 and 0 < last["runs"][1]["psnr"] < 100
    assert last["config"]["inference_steps"] == STEPS and last["seed"] == teacache_memo.SEED
    assert {"machine", "torch", "diffusers"} <= last.keys()


def test_compare_warms_up(here, monkeypatch):
    """One clip of two steps, before anything is timed."""
    calls, generate = [], teacache_memo.generate

    def recorded(*args, **kwargs):
        calls.append((args[6], kwargs))
        return generate(*args, **kwargs)

    monkeypatch.setattr(teacache_memo, "generate", recorded)
    run("--compare", 9)
    also = {"cache_device": None}
    assert calls == [(0.0, {"steps": 2, "max_clips": 1, **also}), (0.0, also), (9.0, also)]


def test_what_memos_functions_are_given(here, models, monkeypatch):
    """The files, folders and models of the config; the network in its precision, xformers as it says."""
    given = {}

    def record(module, name):
        function = getattr(module, name)

        def recorded(*args, **kwargs):
            given[name] = inspect.signature(function).bind(*args, **kwargs).arguments
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)

    audio, vision = (sys.modules[f"memo.utils.{name}_utils"] for name in ("audio", "vision"))
    for module, name in (
        (vision, "preprocess_image"),
        (audio, "resample_audio"),
        (audio, "preprocess_audio"),
        (audio, "extract_audio_emotion_labels"),
        (teacache_memo, "load_pipeline"),
    ):
        record(module, name)
    config = {**CONFIG, **models, "weight_dtype": "bf16", "enable_xformers_memory_efficient_attention": False}
    OmegaConf.save(OmegaConf.create(config), "config.yaml")
    run("--output_dir", "o")
    misc = Path(models["misc_model_dir"], "misc")
    face = {"face_analysis_model": str(misc / "face_analysis"), "image_path": "face.png", "image_size": 16}
    assert given["preprocess_image"] == face
    assert given["resample_audio"]["input_audio_file"] == "speech.wav"
    sound = given["resample_audio"]["output_audio_file"]
    voice = given["preprocess_audio"]
    assert voice["wav_path"] == sound and voice["fps"] == FPS and voice["num_generated_frames_per_clip"] == FRAMES
    assert voice["wav2vec_model"] == CONFIG["wav2vec"] and not os.path.exists(voice["cache_dir"]), "removed at the end"
    assert voice["vocal_separator_model"] == str(misc / "vocal_separator" / "Kim_Vocal_2.onnx")
    emotion = given["extract_audio_emotion_labels"]
    assert (emotion["model"], emotion["wav_path"]) == ("memoavatar/memo", sound) and emotion["audio_length"] == 32
    assert emotion["emotion2vec_model"] == CONFIG["emotion2vec"]
    loaded = given["load_pipeline"]
    assert loaded == {
        "model": models["model_name_or_path"],
        "vae": models["vae"],
        "dtype": torch.bfloat16,
        "xformers": False,
    }
    (Path(models["model_name_or_path"], "misc", "audio_emotion_classifier")).mkdir(parents=True)
    try:
        run("--output_dir", "o2")
    finally:
        shutil.rmtree(Path(models["model_name_or_path"], "misc"))
    assert given["extract_audio_emotion_labels"]["model"] == models["model_name_or_path"], "a local one comes first"


def test_missing_models_for_faces_are_fetched(here, models, monkeypatch):
    """Those that are missing or cut off, into the layout that memo reads."""
    import huggingface_hub

    fetched, missing = [], Path(models["misc_model_dir"], prepare_memo.MODELS[0])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: fetched.append((args, kwargs)))
    content = missing.read_bytes()
    try:
        missing.write_bytes(b"cut off")
        run()
    finally:
        missing.write_bytes(content)
    assert fetched == [(("memoavatar/memo", prepare_memo.MODELS[0]), {"local_dir": models["misc_model_dir"]})]


def test_sound_of_six_channels(here):
    """ffmpeg writes it as another kind of wav than the standard library reads."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", "speech.wav", "-ac", "6", "six.wav"]
    subprocess.run(command, check=True)
    run("--input_audio", "six.wav")
    assert len(read("outputs/face_six.mp4")[0]) == 32


def test_panels_show_the_videos():
    videos = [np.full((2, 8, 10, 3), value, np.uint8) for value in (10, 200)]
    entry = {"rel_l1_thresh": 0.15, "seconds": 1.0, "speedup": 2.0, "computed": 2, "steps": 4, "psnr": 30.0}
    panels = compare_memo.Panels(videos, [entry, entry])
    page = panels[1]
    assert len(panels) == 2 and page.shape[0] % 2 == page.shape[1] % 2 == 0 and page.dtype == np.uint8
    for i, value in enumerate((10, 200)):  # enlarged twenty times, to 200 pixels
        left = panels.left(i)
        assert (page[8:168, left : left + 200] == value).all() and (page[:168, left - 8 : left] == 255).all()
    assert (page.min(axis=2)[-100:] < 100).any(), "a label under them"
    with pytest.raises(IndexError):
        panels[2]


def test_psnr():
    video = np.zeros((2, 4, 4, 3), np.uint8)
    assert compare_memo.psnr(video, video) == float("inf")
    assert compare_memo.psnr(video + np.uint8(51), video) == pytest.approx(20 * np.log10(5))
    half = np.concatenate([video[:1], video[1:] + np.uint8(51)])
    assert compare_memo.psnr(half, video) == pytest.approx(10 * np.log10(50))


# --- loading ---------------------------------------------------------------------------------


def test_memos_own_layout_and_a_saved_pipeline(here, models, tmp_path):
    """Both load, give the same, and need no xformers; plain from_pretrained leaves the memory without its processor."""
    pipeline, audio_proj = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    audio_proj.save_pretrained(tmp_path / "saved" / "audio_proj")
    plain = memo.VideoPipeline.from_pretrained(tmp_path / "saved")
    with pytest.raises(TypeError):
        plain(**call())
    teacache_memo.set_memory_processors(plain.diffusion_net)
    parts, _ = teacache_memo.load_pipeline(models["model_name_or_path"], models["vae"], dtype=torch.float32)
    saved, projection = teacache_memo.load_pipeline(str(tmp_path / "saved"), dtype=torch.float32)
    videos = [p(**call()).videos for p in (pipeline, plain, parts, saved)]
    for video in videos[1:]:
        assert torch.allclose(video, videos[0], atol=1e-4)
    assert not any(p.requires_grad for part in (saved.diffusion_net, projection) for p in part.parameters())
    half, projection = teacache_memo.load_pipeline(str(tmp_path / "saved"))
    assert half.diffusion_net.dtype == half.vae.dtype == torch.bfloat16 and projection.dtype == torch.float32
    assert half(**call()).videos.isfinite().all()


def call():
    """Arguments of memo's pipeline for a short clip."""
    generator = torch.Generator().manual_seed(0)
    return {
        "ref_image": torch.rand(1, 3, 3, 16, 16, generator=generator) * 2 - 1,
        "face_emb": torch.randn(1, 512, generator=generator),
        "audio_tensor": torch.randn(1, 16, 4, 16, generator=generator),
        "audio_emotion": torch.full((16,), 3, dtype=torch.int),
        "emotion_class_num": 9,
        "width": 16,
        "height": 16,
        "video_length": 16,
        "num_inference_steps": 3,
        "guidance_scale": 3.5,
        "generator": generator,
    }


def test_without_guidance_memos_pipeline_fails_and_says_why():
    pipeline, _ = tiny_pipeline()
    with pytest.raises(IndexError):
        pipeline(**{**call(), "guidance_scale": 1.0})
    teacache_memo.apply_teacache(pipeline.diffusion_net, 3, 0.15)
    with pytest.raises(ValueError, match="guidance_scale > 1"):
        pipeline(**{**call(), "guidance_scale": 1.0})


def test_xformers_leaves_no_trace():
    """A stand-in while memo is imported, and only then."""
    assert "xformers" not in sys.modules or sys.modules["xformers"].__spec__ is not None


# --- bad input: one line, exit code 2, nothing written ------------------------------------------


def no_loading(monkeypatch):
    def load_pipeline(*_, **__):
        raise AssertionError("models were loaded")

    monkeypatch.setattr(teacache_memo, "load_pipeline", load_pipeline)


@pytest.fixture
def unloaded(here, monkeypatch):
    no_loading(monkeypatch)
    return here


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--input_image", "none.png"], "none.png"),
        (["--input_image", "speech.wav"], "not an image"),
        (["--input_audio", "none.wav"], "none.wav"),
        (["--input_audio", "face.png"], "read face.png"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "face.png"], "configs/inference.yaml"),
        (["--rel_l1_thresh", "-1"], "rel_l1_thresh"),
        (["--rel_l1_thresh", "nan"], "rel_l1_thresh"),
        (["--speedup", "0.5"], "speedup must lie between 1 and"),
        (["--speedup", "99"], "speedup must lie between 1 and"),
        (["--speedup", "2", "--rel_l1_thresh", "0.1"], "not both"),
        (["--speedup", "2", "--compare", "0.1"], "not both"),
        (["--rel_l1_thresh", "much"], "rel_l1_thresh"),
        (["--compare", "0.1", "inf"], "rel_l1_thresh"),
        (["--seed", "-1"], "--seed"),
        (["--output_dir", "face.png"], "cannot write"),
        (["--prompt", "hello"], "--prompt"),
        (["--input_image", "x" * 300], "xxx"),
        (["--output_dir", "x" * 300], "cannot write"),
    ],
)
def test_bad_arguments(unloaded, capfd, arguments, says):
    assert says in refused(capfd, *arguments)
    assert not list(unloaded.rglob("*.mp4"))


def test_an_output_that_exists(here, capfd, monkeypatch):
    (here / "outputs").mkdir()
    target = here / "outputs" / "face_speech.mp4"
    target.write_bytes(b"precious")
    with monkeypatch.context() as patch:
        no_loading(patch)
        assert "--overwrite" in refused(capfd)
    assert target.read_bytes() == b"precious"
    run("--overwrite")
    assert len(read(target)[0]) == 32


def test_a_failed_write_leaves_what_was_there(here, capsys, monkeypatch):
    (here / "outputs").mkdir()
    target = here / "outputs" / "face_speech.mp4"
    target.write_bytes(b"precious")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imageio, "get_writer", full)
    with pytest.raises(SystemExit) as exit:
        run("--overwrite")
    assert exit.value.code == 2 and "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert target.read_bytes() == b"precious"
    assert os.listdir("outputs") == ["face_speech.mp4"]


def test_an_image_without_a_face(unloaded, capfd):
    Image.new("RGB", (20, 20), "white").save("wall.png")
    assert "no face in wall.png" in refused(capfd, "--input_image", "wall.png")


def test_sound_shorter_than_one_clip(unloaded, capfd):
    write_sound("short.wav", FRAMES - 2)
    assert "shorter than one clip" in refused(capfd, "--input_audio", "short.wav")


@pytest.mark.parametrize("key", prepare_memo.KEYS)
def test_a_config_that_lacks_a_key(unloaded, capfd, models, key):
    config = {**CONFIG, **models}
    del config[key]
    OmegaConf.save(OmegaConf.create(config), "lacking.yaml")
    assert f"lacks {key}" in refused(capfd, "--config", "lacking.yaml")


@pytest.mark.parametrize(
    "key, value",
    [
        ("cfg_scale", 1.0),
        ("cfg_scale", "high"),
        ("inference_steps", 0),
        ("inference_steps", 2.5),
        ("resolution", 100),
        ("fps", True),
        ("vae", 3),
        ("num_past_frames", 0),
    ],
)
def test_a_config_with_a_senseless_value(unloaded, capfd, models, key, value):
    OmegaConf.save(OmegaConf.create({**CONFIG, **models, key: value}), "odd.yaml")
    assert key in refused(capfd, "--config", "odd.yaml")


def test_an_empty_config(unloaded, capfd):
    (unloaded / "empty.yaml").touch()
    assert "lacks resolution" in refused(capfd, "--config", "empty.yaml")


def test_no_space(unloaded, capfd, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1e6))
    assert "1 MB" in refused(capfd)


def test_models_that_do_not_load(here, capfd, models):
    OmegaConf.save(OmegaConf.create({**CONFIG, **models, "model_name_or_path": str(here / "nowhere")}), "away.yaml")
    assert "nowhere" in refused(capfd, "--config", "away.yaml")
    (here / "nowhere").mkdir()
    assert "nowhere" in refused(capfd, "--config", "away.yaml")


# --- as a user calls it -----------------------------------------------------------------------------


def script(*arguments, path=None, cwd=ROOT):
    """The script in a process of its own, the Hub out of reach, with the double as memo if `path` says so."""
    env = {**os.environ, "PYTHONPATH": str(path or ""), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "TeaCache4Memo" / "teacache_memo.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)


@pytest.mark.skipif(REAL, reason="the saved models are the real memo's, and its utils need models from the Hub")
def test_run_as_a_script(here):
    done = script(*ARGUMENTS, "--rel_l1_thresh", 9, path=MEMO_DOUBLE, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "4 / 12 steps" in done.stdout and len(read("outputs/face_speech.mp4")[0]) == 32
    again = script(*ARGUMENTS, path=MEMO_DOUBLE, cwd=here)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--overwrite" in again.stderr


def test_memo_not_installed(here):
    if importlib.util.find_spec("memo").origin.startswith(sys.prefix):
        pytest.skip("memo is installed here")
    done = script(*ARGUMENTS, cwd=here)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "git clone https://github.com/memoavatar/memo" in done.stderr and "pip install -e memo" in done.stderr


def test_something_that_memo_needs_is_not_installed(here):
    """A memo whose einops is missing, say; which package has a module of that name is not guessed."""
    shutil.copytree(MEMO_DOUBLE / "memo", here / "lib" / "memo")
    file = here / "lib" / "memo" / "models" / "unet_3d.py"
    file.write_text("import some_package_of_memo\n" + file.read_text())
    done = script(*ARGUMENTS, path=here / "lib", cwd=here)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "some_package_of_memo" in done.stderr and "pip install -e memo" in done.stderr


def test_a_clone_that_hides_memo(here):
    """Beside the script lies the clone, a folder `memo` without an __init__.py, which Python then takes for memo."""
    (here / "place" / "memo" / "memo").mkdir(parents=True)
    done = script(*ARGUMENTS, path=here / "place", cwd=here)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "hides" in done.stderr


def test_no_imageio(here):
    """It is needed at the end, and missed at once."""
    (here / "lib").mkdir()
    (here / "lib" / "imageio_ffmpeg.py").write_text("raise ImportError('No module named imageio_ffmpeg')")
    done = script(*ARGUMENTS, path=f"{here / 'lib'}{os.pathsep}{MEMO_DOUBLE}", cwd=here)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "imageio_ffmpeg" in done.stderr, done.stderr


def test_import_does_nothing():
    """No memo, no patching, no global flags; in a process without memo."""
    code = """
import sys, torch, diffusers
before = set(sys.modules), torch.is_grad_enabled(), torch.get_default_dtype(), list(sys.path)
from TeaCache4Memo.teacache_memo import apply_teacache, load_pipeline, remove_teacache, teacache_forward
import TeaCache4Memo.prepare_memo, TeaCache4Memo.compare_memo
new = {m.split(".")[0] for m in set(sys.modules) - before[0]}
assert not new & {"memo", "xformers", "imageio", "omegaconf"}, new
assert before[1:] == (torch.is_grad_enabled(), torch.get_default_dtype(), list(sys.path))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0 and done.stdout == "", done.stderr


def test_help_names_memos_flags():
    done = script("--help")
    for flag in (
        "--config",
        "--input_image",
        "--input_audio",
        "--output_dir",
        "--seed",
        "--rel_l1_thresh",
        "--compare",
    ):
        assert flag in done.stdout
    assert done.returncode == 0


def test_predict_reaches_the_network(here, monkeypatch):
    given, apply = [], teacache_memo.apply_teacache
    monkeypatch.setattr(teacache_memo, "apply_teacache", lambda *a, **k: given.append(k["predict"]) or apply(*a, **k))
    run("--predict", "forecast", "--output_dir", "a")
    run("--output_dir", "b")
    assert given == ["forecast", "hold"]


def test_speedup(here, capsys):
    """Half of the steps of each clip; threshold and schedule are printed."""
    run("--speedup", 2)
    out = capsys.readouterr().out
    assert "6 / 12 steps (2.00x fewer passes)" in out
    assert "speedup 2: threshold about 0.500 of the way; computed: 0 " in out and out.count("\n") == 2
