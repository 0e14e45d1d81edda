"""Portraits and voices as people have them, for the talking emoji and for MEMO; and the video clip by clip.

The talking emoji hears with its own Wav2Vec, which needs no memo: these tests run with the double as well.
"""

import io
import math
import os
import re
import subprocess
import sys
import threading
import time
import warnings
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from memo_models import real, tiny_pipeline
from omegaconf import OmegaConf
from PIL import Image, ImageCms
from safetensors.torch import load_file
from test_memo_cli import CONFIG, FFMPEG, FPS, FRAMES, ffmpeg_is, here, models, read, write_sound  # noqa: F401, fixtures among them
from test_memo_cli import save_sound as save

from TeaCache4Memo import teacache_memo
from TeaCache4Memo.compare_memo import generate_all

FOLDER = teacache_memo.BUNDLED
EMOJI = teacache_memo.read_config(FOLDER / "config.yaml")
EMOJI.model_name_or_path = str(FOLDER)


def ffmpeg(*arguments):
    subprocess.run([FFMPEG, "-v", "error", *map(str, arguments)], check=True)


def prepare(folder, image=FOLDER / "example.png", audio=FOLDER / "example.wav", config=EMOJI, **more):
    """For the talking emoji."""
    return teacache_memo.prepare(image, audio, config, folder, **more)


def samples(path):
    """Of a wav, (samples, channels)."""
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, file.getnchannels())


VOICE = samples(FOLDER / "example.wav")[:, 0].astype(float)

# --- the talking emoji and a voice of one's own -------------------------------------------------------


def test_it_hears_what_was_prepared():
    """The example's voice, by our own features: those of memo's functions, with any transformers."""
    example = load_file(FOLDER / "example.safetensors")["audio_emb"]
    found = teacache_memo.load_front_end(EMOJI).hear(FOLDER / "example.wav", 30, 16)
    assert found.shape == example.shape and torch.allclose(found, example, atol=1e-5)


def test_a_long_voice_is_heard_in_windows(tmp_path, monkeypatch):
    """Nearly as at once: what is far away hardly matters."""
    voice, emoji = save(tmp_path / "voice.wav", np.tile(VOICE, 3)[:, None]), teacache_memo.load_front_end(EMOJI)
    assert emoji.WINDOW == 60
    whole = emoji.hear(voice, 30, 16)
    for window in (1, 2, 3):
        monkeypatch.setattr(emoji, "WINDOW", window)
        parts = emoji.hear(voice, 30, 16)
        assert parts.shape == whole.shape == (96, 5, 2, 32)
        assert (parts - whole).abs().mean() < 0.1 * whole.abs().mean()


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) > 4, reason="memo's needs transformers 4")
@real
def test_it_hears_as_memos_wav2vec():
    from memo.models.wav2vec import Wav2VecModel

    sound = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoder = transformers.Wav2Vec2Model.from_pretrained(FOLDER / "wav2vec").eval()
        found = teacache_memo.load_front_end(EMOJI).hidden_states(encoder, sound, 16)
        memos = Wav2VecModel.from_pretrained(FOLDER / "wav2vec").eval()
        expected = memos(sound, seq_len=16, output_hidden_states=True).hidden_states[1:]
    assert torch.allclose(found, torch.stack(expected, dim=2)[0], atol=1e-5)


def test_a_voice_in_any_format(tmp_path, monkeypatch):
    """The same voice in a film, in stereo and at another rate: about the same features, as many frames."""
    monkeypatch.chdir(tmp_path)
    file, picture = Path("12:30 50%.mp4"), ("-f", "lavfi", "-i", "color=red:size=32x32:duration=1")
    ffmpeg("-i", FOLDER / "example.wav", *picture, "-af", "volume=0.5", "-ac", 2, "-ar", 44100, f"file:{file}")
    inputs, prepared = prepare(tmp_path, audio=file), load_file(FOLDER / "example.safetensors")["audio_emb"]
    assert 32 <= inputs.num_frames <= 34 and len(inputs.audio_emb) % 16 == 0
    difference = (inputs.audio_emb[:32] - prepared)[2:-2].abs().mean() / prepared.abs().mean()
    assert difference < 0.3, "quieter and compressed, and yet the same words"
    assert inputs.sound != file and samples(inputs.sound).shape[1] == 1


def heard(path, voice):
    """How loud a voice is in the prepared sound of a file, 1 as it was, and how alike."""
    teacache_memo.clean_voice(path, path.with_suffix(".clean.wav"))
    found = samples(path.with_suffix(".clean.wav"))[:, 0].astype(float)
    assert len(found) == len(voice)
    return found @ voice / (voice @ voice), np.corrcoef(found, voice)[0, 1]


@pytest.mark.parametrize(
    "levels", [[1], [1, 1], [0.6, 0.4], [1, 0], [0, 1], [1, -1], [0, 0, 0.7], [0] * 23 + [1]], ids=str
)
def test_a_voice_on_any_channel(tmp_path, levels):
    """On one of many, on all, on opposite ones: as loud as on the loudest, and nothing but the voice."""
    level, alike = heard(save(tmp_path / "a.wav", VOICE[:, None] * levels), VOICE)
    assert abs(level) == pytest.approx(max(levels), abs=0.01) and abs(alike) > 0.999


def test_a_voice_on_the_subwoofer(tmp_path):
    ffmpeg("-i", FOLDER / "example.wav", "-af", "pan=5.1|LFE=c0", tmp_path / "a.flac")
    assert heard(tmp_path / "a.flac", VOICE) == pytest.approx((1, 1), abs=0.01)


@pytest.mark.parametrize("echo", [0, -1], ids=["a side each", "the second one on opposite channels"])
def test_both_sides_of_a_call(tmp_path, echo):
    """Also of one who is softer and hardly speaks."""
    first, second = np.tile(VOICE, 6), np.zeros(6 * len(VOICE))
    second[3 * len(VOICE) :][: len(VOICE)] = 0.5 * VOICE[::-1]
    first[3 * len(VOICE) :][: len(VOICE)] *= 0.1
    sides = np.stack([first + echo * second, second], axis=1)
    teacache_memo.clean_voice(save(tmp_path / "call.wav", sides), tmp_path / "clean.wav")
    turn = samples(tmp_path / "clean.wav")[:, 0][3 * len(VOICE) : 4 * len(VOICE)].astype(float)
    assert abs(np.corrcoef(turn, VOICE[::-1])[0, 1]) > 0.9, "she is heard"
    assert abs(np.corrcoef(samples(tmp_path / "clean.wav")[: len(VOICE), 0], VOICE)[0, 1]) > 0.99, "and he"


def test_a_film_with_two_sound_tracks(tmp_path, capfd):
    """ffmpeg takes the one with more channels, the music: it is said."""
    save(tmp_path / "music.wav", np.zeros((16000, 2)))
    tracks = ("-i", tmp_path / "music.wav", "-i", FOLDER / "example.wav", "-map", 0, "-map", 1)
    ffmpeg("-f", "lavfi", "-i", "color=red:size=32x32:duration=1", *tracks, "-map", 2, tmp_path / "film.mkv")
    teacache_memo.clean_voice(tmp_path / "film.mkv", tmp_path / "clean.wav")
    assert capfd.readouterr().err == f"{tmp_path / 'film.mkv'}: sound track 1 of 2 is used\n"
    teacache_memo.clean_voice(FOLDER / "example.wav", tmp_path / "clean.wav")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("fps", [25, 60])
def test_its_own_voice_at_another_rate(tmp_path, fps):
    """In time: heard as another voice that differs in nothing that can be heard."""
    config = SimpleNamespace(**{**vars(EMOJI), "fps": fps})
    nearly = VOICE[:, None].copy()
    nearly[0] += 1
    save(tmp_path / "nearly.wav", nearly)
    voices = FOLDER / "example.wav", tmp_path / "nearly.wav"
    own, other = (prepare(tmp_path, audio=voice, config=config) for voice in voices)
    assert own.num_frames == other.num_frames == math.ceil(len(VOICE) / 16000 * fps)
    assert len(own.audio_emb) == -(-own.num_frames // 16) * 16
    assert torch.allclose(own.audio_emb, other.audio_emb, atol=1e-2)


def test_two_at_once_in_one_folder(tmp_path, monkeypatch):
    """Nothing of one's own there, or of the other one, is overwritten. Models are loaded one after the other: transformers
    and diffusers patch torch meanwhile, and of two threads the last one would leave it patched.
    """
    hearing, loading = transformers.Wav2Vec2Model, threading.Lock()
    load = hearing.from_pretrained

    def alone(*args, **kwargs):
        assert loading.acquire(blocking=False)
        time.sleep(0.2)
        model = load(*args, **kwargs)
        loading.release()
        return model

    monkeypatch.setattr(hearing, "from_pretrained", alone)
    for name in ("voice.wav", "portrait.png"):
        (tmp_path / name).write_bytes(b"mine")
    voices = [save(tmp_path / f"{n}.wav", np.full((n, 1), n)) for n in (3200, 6400)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda voice: prepare(tmp_path, audio=voice).sound, voices))
    assert [len(samples(sound)) for sound in found] == [3200, 6400]
    assert all((tmp_path / name).read_bytes() == b"mine" for name in ("voice.wav", "portrait.png"))


def test_the_example_does_not_speak_for_others(tmp_path):
    """The same portrait with another voice: its own features and length, neutral unless another emotion is given."""
    write_sound(tmp_path / "tone.wav", 20)
    example, own = prepare(tmp_path), prepare(tmp_path, audio=tmp_path / "tone.wav")
    assert torch.equal(own.face_emb, example.face_emb) and torch.equal(own.pixel_values, example.pixel_values)
    assert own.num_frames == 20 and own.audio_emb.shape == (32, 5, 2, 32)
    assert not torch.allclose(own.audio_emb, example.audio_emb, atol=0.1)
    assert set(example.audio_emotion.tolist()) == {3} and set(own.audio_emotion.tolist()) == {4}
    for voice in (tmp_path / "tone.wav", FOLDER / "example.wav"):
        assert set(prepare(tmp_path, audio=voice, emotion="sad").audio_emotion.tolist()) == {6}


def test_its_portraits(tmp_path):
    """Those in its folder, under any name and in any format; others are refused."""
    files = sorted(FOLDER.glob("*.png"))
    faces = [prepare(tmp_path, file).face_emb for file in files]
    assert len(files) == 4 and len({tuple(face[0].tolist()) for face in faces}) == 4
    for file, face in zip(files, faces):
        Image.open(file).resize((300, 300)).save(tmp_path / "copy.jpg", quality=95)
        assert torch.equal(prepare(tmp_path, tmp_path / "copy.jpg").face_emb, face)
    Image.open(files[0]).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(tmp_path / "mine.png")
    with pytest.raises(ValueError, match="its own portraits only, example.png, green-hat.png, party.png"):
        prepare(tmp_path, tmp_path / "mine.png")


def test_flags_for_the_emoji(tmp_path, monkeypatch, capsys):
    """Its config is found from anywhere; what it cannot do is said before it is loaded."""
    monkeypatch.chdir(tmp_path)
    config = teacache_memo.choose_config()
    assert capsys.readouterr().out.startswith("No CUDA GPU: using the bundled talking emoji")
    assert teacache_memo.find_inputs(config) == (FOLDER / "example.png", FOLDER / "example.wav")
    config = teacache_memo.choose_config(FOLDER / "config.yaml")
    assert config.model_name_or_path == str(FOLDER) and capsys.readouterr().out == ""
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(SystemExit, match="^error: this model knows the emotions happy, neutral, sad, not angry$"):
        teacache_memo.main(["--emotion", "angry"])


@real
def test_it_says_something_else(tmp_path, monkeypatch, capsys):
    """From a voice to a video, as long as the voice, without a config."""
    monkeypatch.chdir(tmp_path)
    write_sound("voice.wav", 10)
    read_config = teacache_memo.read_config
    short = {"inference_steps": 2}
    monkeypatch.setattr(teacache_memo, "read_config", lambda path: SimpleNamespace(**vars(read_config(path)) | short))
    teacache_memo.main(["--input-audio", "voice.wav", "--computed-steps", "2", "--emotion", "happy"])
    assert "2 of 2 steps computed (computed_steps 2), seed 42" in capsys.readouterr().out
    frames, fps, sound = read("outputs/example_voice.mp4")
    assert frames.shape == (10, 96, 96, 3) and fps == 30 and sound == "aac"
    faces = {file.name: np.asarray(Image.open(file)) for file in FOLDER.glob("*.png")}
    nearest = min(faces, key=lambda name: np.abs(frames.astype(int) - faces[name]).mean())
    assert nearest == "example.png"


# --- memo's own functions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stdin", ["a pipe", "closed"])
def test_ones_own_stdin_stays(here, monkeypatch, ffmpeg_is, stdin):  # noqa: F811
    """No ffmpeg reads it, memo's neither: a job in the background would stop, and a program lose its commands."""
    ffmpeg_is("if 'libx264' not in sys.argv: open('said', 'a').write(sys.stdin.read() + '.')")
    before, (reading, writing) = os.dup(0), os.pipe()
    try:
        os.write(writing, b"typed")
        os.close(writing)
        os.dup2(reading, 0)
        if stdin == "closed":
            os.close(0)
        inputs = teacache_memo.prepare("face.png", "speech.wav", OmegaConf.load("config.yaml"), str(here))
        assert Path("said").read_text() == ".." and inputs.num_frames == 32
        if stdin == "a pipe":
            assert os.read(0, 9) == b"typed"
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reading)


def shown(image, folder, **options):
    """The portrait that is made of a picture, (height, width, 3)."""
    image.save(folder / "a.png", **options)
    teacache_memo.clean_portrait(folder / "a.png", folder / "clean.png")
    with Image.open(folder / "clean.png") as clean:
        assert clean.mode == "RGB"
        return np.asarray(clean).astype(int)


RAMP = np.linspace(0, 255, 24 * 20).reshape(24, 20).astype(np.uint8)
COLOURS = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=2)
IS_CLEAR = RAMP[..., None] >= 99
CLEAR = Image.fromarray(np.dstack([COLOURS, np.where(IS_CLEAR, 0, 255).astype(np.uint8)]))


def test_a_portrait_as_a_viewer_shows_it(tmp_path, capfd):
    """Upright, on white, and with the colours of a palette; that it is squeezed is said."""
    exif, lying = Image.Exif(), Image.fromarray(COLOURS).transpose(Image.Transpose.ROTATE_90)
    exif[0x0112] = 6  # it is shown turned clockwise
    assert np.array_equal(shown(lying, tmp_path, exif=exif), COLOURS)
    assert capfd.readouterr().err == f"{tmp_path / 'a.png'} is 20 x 24, and is squeezed to a square: crop it\n"
    assert np.array_equal(shown(CLEAR, tmp_path), np.where(IS_CLEAR, 255, COLOURS))
    palette = Image.fromarray(COLOURS).quantize(64)
    assert np.array_equal(shown(palette, tmp_path), np.asarray(palette.convert("RGB")))
    shown(Image.new("RGB", (8, 8)), tmp_path)
    assert capfd.readouterr().err.count("squeezed") == 2


@pytest.mark.parametrize("white, kind", [(65535, np.uint16), (65535, np.int32), (1, np.float32), (255, np.float32)])
def test_gray_of_many_bits(tmp_path, white, kind):
    """The same tones."""
    Image.fromarray((RAMP / 255 * white).round(4).astype(kind)).save(tmp_path / "a.tiff")
    teacache_memo.clean_portrait(tmp_path / "a.tiff", tmp_path / "clean.png")
    found = np.asarray(Image.open(tmp_path / "clean.png")).astype(int)
    assert np.abs(found - RAMP[..., None]).max() <= 1


def test_a_colour_profile(tmp_path):
    """It is followed, also under transparency; one that is broken or of other pictures is not."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp ").replace(b"gXYZ", b"rXYZ").replace(b"tmp ", b"gXYZ")  # red is green
    picture, turned = Image.fromarray(COLOURS), COLOURS[..., [1, 0, 2]]
    assert np.abs(shown(picture, tmp_path, icc_profile=srgb) - COLOURS).max() <= 1
    assert np.abs(shown(picture, tmp_path, icc_profile=swapped) - turned).max() <= 2
    assert np.abs(shown(CLEAR, tmp_path, icc_profile=swapped) - np.where(IS_CLEAR, 255, turned)).max() <= 2
    palette = Image.new("RGB", (8, 8), (200, 40, 90)).quantize(4)
    assert np.abs(shown(palette, tmp_path, icc_profile=swapped) - (40, 200, 90)).max() <= 2
    assert np.array_equal(shown(picture, tmp_path, icc_profile=swapped[:200]), COLOURS)
    gray = Image.fromarray(RAMP)
    assert np.array_equal(shown(gray, tmp_path, icc_profile=swapped), shown(gray, tmp_path))


def test_a_portrait_of_too_many_pixels(tmp_path, monkeypatch):
    """Plain words; and none for the largest that are read."""
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ValueError, match="a.png has too many pixels: make it smaller"):
        teacache_memo.clean_portrait(tmp_path / "a.png", tmp_path / "clean.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    with warnings.catch_warnings(record=True) as said:
        teacache_memo.quiet()
        teacache_memo.clean_portrait(tmp_path / "a.png", tmp_path / "clean.png")
    assert not said


# --- clip by clip --------------------------------------------------------------------------------------------


def inputs_of(frames, num_frames=None):
    """Of a tiny pipeline."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"pixel_values": torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1}
    inputs |= {"face_emb": torch.randn(1, 512, generator=generator), "num_emotion_classes": 9}
    inputs |= {"audio_emb": torch.randn(48, 5, 2, 8, generator=generator)[:frames]}
    inputs |= {"audio_emotion": torch.full((frames,), 3, dtype=torch.int32)}
    return SimpleNamespace(**inputs, **({} if num_frames is None else {"num_frames": num_frames}))


def config_of(steps=2):
    return OmegaConf.create({**CONFIG, "inference_steps": steps})


@pytest.mark.parametrize("size", [8, 24])
def test_other_sizes(size):
    """Multiples of 8, larger and smaller ones, also those that cannot be halved at every level."""
    inputs, config = inputs_of(16), config_of()
    inputs.pixel_values, config.resolution = torch.zeros(1, 3, size, size), size
    frames, _, _ = generate_all(*tiny_pipeline(), inputs, config, computed_steps=2)
    assert frames.shape == (16, size, size, 3)


def test_the_emoji_has_one_size(tmp_path):
    with pytest.raises(ValueError, match="the talking emoji has a resolution of 96, not 128"):
        prepare(tmp_path, config=SimpleNamespace(**{**vars(EMOJI), "resolution": 128}))


def test_a_clip_is_given_when_it_is_done(capsys):
    """Nothing is computed ahead; the state and the lines tell of the clip. The last one is as long as the sound."""
    pipeline, audio_proj = tiny_pipeline()
    calls, given = [], []
    pipeline.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    clips = teacache_memo.generate(pipeline, audio_proj, inputs_of(48, 40), config_of(3), computed_steps=2)
    assert not calls and torch.is_grad_enabled()
    for i, frames in enumerate(clips):
        given.append(frames)
        assert len(calls) == 16 * (i + 1) and torch.is_grad_enabled()
        assert str(pipeline.diffusion_net.teacache) == "2 of 3 steps computed: X.X"
        assert capsys.readouterr().err == f"clip {i + 1} of 3: 2 of 3 steps computed\n", "no other bar"
    settings = {"computed_steps": 2, "progress": False}
    whole, _, schedule = generate_all(pipeline, audio_proj, inputs_of(48), config_of(3), **settings)
    assert whole.shape == (48, 16, 16, 3) and whole.dtype == np.uint8 and schedule == [True, False, True] * 3
    assert [len(frames) for frames in given] == [16, 16, 8] and np.array_equal(np.concatenate(given), whole[:40])
    few = teacache_memo.generate(pipeline, audio_proj, inputs_of(48), config_of(3), clips=2, **settings)
    assert len(list(few)) == 2 and capsys.readouterr().err == ""


def test_progress_on_a_terminal(monkeypatch):
    """One bar, which begins with the first step and names its clip."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    list(teacache_memo.generate(*tiny_pipeline(), inputs_of(32), config_of(3), rel_l1_thresh=0))
    shown = [text for text in terminal.getvalue().split("\r") if text.strip()]
    assert shown and all(re.match(r"clip [12] of 2 \|", text) for text in shown), shown
    assert not any("?" in text or "3/3" in text for text in shown) and "\n" not in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    assert len(list(teacache_memo.generate(*tiny_pipeline(), inputs_of(16), config_of(2)))) == 1


def test_a_video_that_was_left(here):  # noqa: F811
    """Whatever kept it, the next one on this pipeline is made as by itself. The old one cannot go on, which is said."""
    pipeline, audio_proj = tiny_pipeline()
    arguments = pipeline, audio_proj, inputs_of(32), config_of(2)
    alone = np.concatenate(list(teacache_memo.generate(*tiny_pipeline(), *arguments[2:], progress=False)))
    kept = []
    try:
        for clip in (left := teacache_memo.generate(*arguments, progress=False, rel_l1_thresh=0)):
            raise ZeroDivisionError(str(clip.shape))
    except ZeroDivisionError as error:
        kept.append(error)
    second = teacache_memo.generate(*arguments, progress=False)
    assert np.array_equal(next(second), alone[:16])
    with pytest.raises(RuntimeError, match="this pipeline has begun another video"):
        next(left)
    assert np.array_equal(next(second), alone[16:]), "not disturbed"


@pytest.mark.parametrize(
    "path, sound, size, says",
    [
        ("none/a.mp4", "speech.wav", 32, "No such file or directory"),
        ("a.mp4", "none.wav", 32, "No such file or directory: 'none.wav'"),
        ("a.mp4", "speech.wav", 31, "width not divisible by 2"),
    ],
)
def test_a_video_that_cannot_be_written(here, path, sound, size, says):  # noqa: F811
    """Said at once. No half of it stays; what makes the clips is closed, also where the error is kept."""
    made = []
    clips = (made.append(1) or np.zeros((16, size, size, 3), np.uint8) for _ in range(40))
    with pytest.raises(OSError, match=f"{path} could not be written: .*{says}") as kept:
        teacache_memo.write_video(clips, path, FPS, sound)
    assert kept and clips.gi_frame is None and len(made) < (10 if size == 31 else 1)
    assert sorted(os.listdir()) == ["config.yaml", "face.png", "speech.wav"]


def durations(path):
    """Seconds of the pictures and of the sound."""
    frames, fps, _ = read(path)
    ffmpeg("-y", "-i", path, "-vn", f"{path}.wav")
    with wave.open(f"{path}.wav") as file:
        return len(frames) / fps, file.getnframes() / file.getframerate()


@pytest.mark.parametrize("frames, seconds", [(6, 0.2), (36, 1.19), (16, 5), (40, 1)])
def test_sound_and_pictures_end_together(here, frames, seconds):  # noqa: F811
    """Also where only some clips are made, or more; a decoder that does not cut the last AAC packet gives 64 ms more."""
    save(here / "voice.wav", np.ones((round(seconds * 16000), 1)))
    path = teacache_memo.write_video([np.zeros((frames, 32, 32, 3), np.uint8)], "a.mp4", FPS, "voice.wav")
    pictures, sound = durations(path)
    assert pictures == frames / FPS and -1e-3 <= sound - pictures <= 0.064


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(here, error):  # noqa: F811
    seen = []

    def clips():
        yield np.zeros((16, 32, 32, 3), np.uint8)
        for _ in range(200):  # until ffmpeg has begun
            time.sleep(0.05 * (not seen))
            seen[:] = [path for path in Path("o").rglob("*") if path.is_file()]
        raise error("stop")

    os.mkdir("o")
    with pytest.raises(error):
        teacache_memo.write_video(clips(), "o/a.mp4", FPS, "speech.wav")
    assert len(seen) == 1 and seen[0].parent.name[0] == "." and not os.listdir("o"), "hidden while it is written"


@pytest.mark.parametrize("missing", [1, 20_000])
def test_a_full_disk(here, ffmpeg_is, missing):  # noqa: F811
    """When all but the last byte is written, too."""
    os.mkdir("o")
    clips = [np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)]
    limit = teacache_memo.write_video(clips, "a.mp4", FPS, "speech.wav").stat().st_size - missing
    # Python ignores SIGXFSZ
    ffmpeg_is(f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))")
    with pytest.raises(OSError, match="o/a.mp4 could not be written"):
        teacache_memo.write_video(clips, "o/a.mp4", FPS, "speech.wav")
    assert not os.listdir("o")


def test_the_name_of_a_video_that_fails_at_last(here, monkeypatch):  # noqa: F811
    """It is free again: no empty file is left under it."""
    os.mkdir("o")
    monkeypatch.setattr(Path, "replace", lambda *_: os.rename("nothing", "there"))
    clips = [np.zeros((16, 32, 32, 3), np.uint8)]
    with pytest.raises(OSError, match="o/a.mp4 could not be written"):
        teacache_memo.write_video(clips, "o/a.mp4", FPS, "speech.wav")
    assert not os.listdir("o")


def test_videos_of_one_name_at_once(here):  # noqa: F811
    """As of two containers, whose processes have one number: all are whole, and none is overwritten."""
    begun = threading.Barrier(3)

    def clips(value):
        for _ in range(2):
            yield np.full((16, 32, 32, 3), value, np.uint8)
            begun.wait(60)

    def write(value):
        path = teacache_memo.write_video(clips(value), "a.mp4", FPS, "speech.wav")
        frames, *_ = read(path)
        assert len(frames) == 32 and abs(frames.mean() - value) < 3
        return path.name

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(write, (20, 120, 220))) == {"a.mp4", "a_2.mp4", "a_3.mp4"}
