"""Portraits and voices as people have them, for the talking emoji and for MEMO; and the video clip by clip.

The talking emoji hears with its own Wav2Vec, which needs no memo: these tests run with the double as well.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import transformers
from memo_models import REAL, tiny_pipeline
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from test_memo_cli import CONFIG, FPS, FRAMES, here, models, read, write_sound  # noqa: F401, fixtures among them

from TeaCache4Memo import teacache_memo

FOLDER = teacache_memo.BUNDLED
real = pytest.mark.skipif(not REAL, reason="the real memo is not here: pytest --memo PATH")
EMOJI = OmegaConf.create({"model_name_or_path": str(FOLDER), "resolution": 96, "fps": 30})
EMOJI["num_generated_frames_per_clip"] = 16


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, arguments)], check=True)


def prepare(folder, image=FOLDER / "example.png", audio=FOLDER / "example.wav", **more):
    """For the talking emoji."""
    return teacache_memo.prepare(image, audio, EMOJI, folder, **more)


# --- the talking emoji and a voice of one's own -------------------------------------------------------


def test_it_hears_what_was_prepared():
    """The example's voice, by our own features: those of memo's functions, with any transformers."""
    example = load_file(FOLDER / "example.safetensors")["audio_emb"]
    samples = teacache_memo.read_voice(FOLDER / "example.wav")
    found = teacache_memo.hear(samples, FOLDER / "wav2vec", 30, 16)
    assert found.shape == example.shape and torch.allclose(found, example, atol=1e-5)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) > 4, reason="memo's needs transformers 4")
@real
def test_it_hears_as_memos_wav2vec():
    from memo.models.wav2vec import Wav2VecModel

    sound = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (
            cls.from_pretrained(FOLDER / "wav2vec").eval()(sound, seq_len=16, output_hidden_states=True).hidden_states
            for cls in (teacache_memo.voice_encoder(), Wav2VecModel)
        )
    assert len(found) == len(expected) == 3
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[1:], expected[1:]))


@pytest.mark.parametrize("name", ["voice.wav", "voice.mp3", "voice.ogg", "voice.mp4", "12:30 50%.m4a"])
def test_a_voice_in_any_format(tmp_path, name):
    """The same voice, in stereo and at another rate: about the same features, as many frames."""
    source, file = tmp_path / "source.wav", tmp_path / name
    ffmpeg("-i", FOLDER / "example.wav", "-af", "volume=0.5", source)
    picture = ("-f", "lavfi", "-i", "color=red:size=32x32:duration=1") if name.endswith("mp4") else ()
    ffmpeg("-i", source, *picture, "-ac", 2, "-ar", 44100, f"file:{file}")
    inputs, prepared = prepare(tmp_path, audio=file), load_file(FOLDER / "example.safetensors")["audio_emb"]
    assert 32 <= inputs.num_frames <= 34 and len(inputs.audio_emb) % 16 == 0
    difference = (inputs.audio_emb[:32] - prepared)[2:-2].abs().mean() / prepared.abs().mean()
    assert difference < 0.3, "quieter and compressed, and yet the same words"
    assert inputs.sound != file and teacache_memo.read_voice(inputs.sound).size


def test_the_example_does_not_speak_for_others(tmp_path):
    """The same portrait with another voice: its own features and length, neutral unless another emotion is given."""
    write_sound(tmp_path / "tone.wav", 20)
    example, own = prepare(tmp_path), prepare(tmp_path, audio=tmp_path / "tone.wav")
    assert torch.equal(own.face_emb, example.face_emb) and torch.equal(own.pixel_values, example.pixel_values)
    assert own.num_frames == 20 and own.audio_emb.shape == (32, 5, 2, 32)
    assert not torch.allclose(own.audio_emb, example.audio_emb, atol=0.1)
    assert set(example.audio_emotion.tolist()) == {3} and set(own.audio_emotion.tolist()) == {4}
    for voice in (tmp_path / "tone.wav", FOLDER / "example.wav"):
        assert set(prepare(tmp_path, audio=voice, emotion=6).audio_emotion.tolist()) == {6}


def test_what_lies_beside_a_portrait_does_not_matter(here):  # noqa: F811
    """Only what belongs to the talking emoji is read."""
    save_file({"face_emb": torch.zeros(1, 512), "audio_emb": torch.zeros(16, 5, 2, 8)}, "face.safetensors")
    inputs = teacache_memo.prepare("face.png", "speech.wav", OmegaConf.load("config.yaml"), str(here))
    assert inputs.face_emb.any() and len(inputs.audio_emb) == 32


def test_its_portraits(tmp_path):
    """Those in its folder, under any name and in any format; others are refused."""
    files = sorted(FOLDER.glob("*.png"))
    faces = [prepare(tmp_path, file).face_emb for file in files]
    assert len(files) == 4 and len({tuple(face[0].tolist()) for face in faces}) == 4
    for file, face in zip(files, faces):
        Image.open(file).resize((300, 300)).save(tmp_path / "copy.jpg", quality=95)
        assert torch.equal(prepare(tmp_path, tmp_path / "copy.jpg").face_emb, face)
    Image.open(files[0]).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(tmp_path / "mine.png")
    with pytest.raises(ValueError, match="mine.png takes the real MEMO, .* example.png, green-hat.png, party.png"):
        prepare(tmp_path, tmp_path / "mine.png")


def test_flags_for_the_emoji(tmp_path, monkeypatch, capsys):
    """A voice or a portrait alone are enough; its config is found from anywhere."""
    monkeypatch.chdir(tmp_path)
    write_sound("voice.wav", 20)
    args = teacache_memo.parse_args(["--input_audio", "voice.wav"])
    assert args.input_image == FOLDER / "example.png" and str(args.output) == "outputs/example_voice.mp4"
    assert capsys.readouterr().out.startswith("No CUDA GPU: using the bundled talking emoji")
    args = teacache_memo.parse_args(["--config", str(FOLDER / "config.yaml"), "--emotion", "sad"])
    assert args.config.model_name_or_path == str(FOLDER) and args.input_audio == FOLDER / "example.wav"
    assert args.emotion == 6 and capsys.readouterr().out == ""
    Image.new("RGB", (64, 64), "red").save("mine.png")
    for flags, says in [
        (["--emotion", "angry"], "the talking emoji can be happy, neutral, sad, not angry"),
        (["--input_image", "mine.png"], f"mine.png takes the real MEMO, --config {teacache_memo.CONFIG}"),
    ]:
        with pytest.raises(SystemExit):
            teacache_memo.parse_args(flags)
        out, err = capsys.readouterr()
        assert says in err and err.count("\n") == 1 and out == ""


@real
def test_it_says_something_else(tmp_path, monkeypatch, capsys):
    """From a voice to a video, as long as the voice, without a config."""
    monkeypatch.chdir(tmp_path)
    write_sound("voice.wav", 10)
    monkeypatch.setattr(teacache_memo, "read_config", quick := with_steps(2))
    teacache_memo.main(["--input-audio", "voice.wav", "--computed-steps", "2", "--emotion", "happy"])
    assert quick and "2 of 2 steps computed (computed_steps 2), seed 42" in capsys.readouterr().out
    frames, fps, sound = read("outputs/example_voice.mp4")
    assert frames.shape == (10, 96, 96, 3) and fps == 30 and sound == "aac"
    faces = {file.name: np.asarray(Image.open(file)) for file in FOLDER.glob("*.png")}
    nearest = min(faces, key=lambda name: np.abs(frames.astype(int) - faces[name]).mean())
    assert nearest == "example.png"


def with_steps(steps):
    """`read_config`, with fewer steps."""
    stock = teacache_memo.read_config

    def read_config(path):
        config = stock(path)
        config.inference_steps = steps
        return config

    return read_config


# --- memo's own functions ---------------------------------------------------------------------------------


def test_memos_voice_code_is_helped(here, monkeypatch):  # noqa: F811
    """Its Wav2Vec is replaced, and `ffmpeg` can be called; afterwards all is as before."""
    audio, path = sys.modules["memo.utils.audio_utils"], str(here)
    monkeypatch.setattr(audio, "Wav2VecModel", "memo's", raising=False)
    monkeypatch.setenv("PATH", path)
    with teacache_memo.patched_memo():
        encoder = audio.Wav2VecModel.from_pretrained(FOLDER / "wav2vec")
        found = encoder(torch.randn(1, 8000), seq_len=16, output_hidden_states=True)
        assert len(found) > 0 and [tuple(states.shape) for states in found.hidden_states] == [(1, 16, 32)] * 3
        assert "ffmpeg version" in subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True).stdout
    assert audio.Wav2VecModel == "memo's" and os.environ["PATH"] == path and shutil.which("ffmpeg") is None


@pytest.mark.parametrize("case", ["orientation", "transparent", "palette", "16 bit", "not square"])
def test_memo_is_given_a_cleaned_portrait(here, monkeypatch, capsys, case):  # noqa: F811
    """What a viewer shows, as a file that memo's preprocess_image reads; said in a line where it will be squeezed."""
    seen, vision = [], sys.modules["memo.utils.vision_utils"]
    preprocess_image = vision.preprocess_image

    def record(folder, path, size):
        with Image.open(path) as image:
            seen.append((image.mode, np.asarray(image.convert("RGB")).astype(int)))
        return preprocess_image(folder, path, size)

    monkeypatch.setattr(vision, "preprocess_image", record)
    ramp = np.linspace(0, 255, 24 * 24).reshape(24, 24).astype(np.uint8)
    expected = np.stack([ramp, ramp.T, 255 - ramp], axis=2)
    image, exif = Image.fromarray(expected), Image.Exif()
    if case == "orientation":
        exif[0x0112] = 6  # it is shown turned clockwise
        image = image.transpose(Image.Transpose.ROTATE_90)
    elif case == "transparent":
        alpha = np.where(np.arange(24) < 12, 255, 0).astype(np.uint8)[None].repeat(24, 0)
        image = Image.fromarray(np.dstack([expected, alpha]))
        expected = np.where(alpha[..., None] > 0, expected, 255)
    elif case == "palette":
        image = image.quantize(64)
        expected = np.asarray(image.convert("RGB"))
    elif case == "16 bit":
        image, expected = Image.fromarray(ramp.astype(np.uint16) * 257), ramp[..., None].repeat(3, 2)
    else:
        image, expected = image.crop((0, 0, 24, 20)), expected[:20]
    image.save("portrait.png", exif=exif)
    os.mkdir("made")
    teacache_memo.prepare("portrait.png", "speech.wav", OmegaConf.load("config.yaml"), "made")
    ((mode, found),) = seen
    assert mode == "RGB" and found.shape == expected.shape and np.abs(found - expected).max() <= 1
    said = "portrait.png is 24 x 20: MEMO squeezes it to a square, crop it to avoid that\n"
    assert capsys.readouterr().err == (said if case == "not square" else "")


def test_all_orientations(tmp_path):
    """As Pillow's own reading of the flag; all eight show the same picture."""
    turns = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    for i, turn in enumerate([None, *turns]):
        exif = Image.Exif()
        exif[0x0112] = i + 1
        stored = picture.transpose(Image.Transpose[turn]) if turn else picture
        stored.save(tmp_path / "photo.png", exif=exif)
        found = teacache_memo.read_portrait(tmp_path / "photo.png")
        assert found.size == (30, 20) and found.tobytes() == picture.tobytes(), i + 1


@pytest.mark.parametrize("mode", ["CMYK", "L", "LA", "P", "1", "I"])
def test_modes_of_pictures(tmp_path, mode):
    """All are read; gray stays gray."""
    source = Image.new("L", (8, 8), 255 if mode == "1" else 100)
    if mode == "I":
        source = Image.fromarray(np.full((8, 8), 25700, np.int32))
    source.convert("RGB" if mode == "CMYK" else mode).convert(mode).save(tmp_path / "a.tiff")
    found = np.asarray(teacache_memo.read_portrait(tmp_path / "a.tiff"))
    assert found.shape == (8, 8, 3) and np.abs(found.astype(int) - (255 if mode == "1" else 100)).max() <= 2


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


@pytest.mark.parametrize("frames", [10, 16, 31, 33])
def test_as_long_as_the_sound(frames):
    """The last clip is filled up, and its frames are cut: those that are left are the same as without."""
    video, _, schedule = teacache_memo.generate_all(*tiny_pipeline(), inputs_of(frames), config_of(), rel_l1_thresh=0)
    assert video.shape == (frames, 16, 16, 3) and video.dtype == np.uint8
    assert schedule == [True] * 2 * math.ceil(frames / 16)
    filled = inputs_of(frames, num_frames=frames)
    filled.audio_emb = torch.cat([filled.audio_emb, filled.audio_emb[-1:].repeat(-frames % 16, 1, 1, 1)])
    filled.audio_emotion = torch.full((len(filled.audio_emb),), 3, dtype=torch.int32)
    assert np.array_equal(video, teacache_memo.generate_all(*tiny_pipeline(), filled, config_of(), rel_l1_thresh=0)[0])


def test_a_clip_is_given_when_it_is_done(capsys):
    """Nothing is computed ahead; the schedule and the bar tell of the clips so far."""
    pipeline, audio_proj = tiny_pipeline()
    calls, schedule = [], []
    pipeline.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    arguments = pipeline, audio_proj, inputs_of(48, 40), config_of(3)
    clips = teacache_memo.generate(*arguments, schedule=schedule, bar="face", computed_steps=2)
    assert not calls and torch.is_grad_enabled()
    lengths = []
    for i, frames in enumerate(clips):
        lengths.append(len(frames))
        assert len(calls) == 16 * (i + 1) and len(schedule) == 3 * (i + 1) and torch.is_grad_enabled()
    assert lengths == [16, 16, 8] and schedule.count(True) == 6
    err = capsys.readouterr().err
    assert "face clip 1 of 3" in err and "face clip 3 of 3" in err and "4 of 6 steps computed" in err
    assert "it/s" not in err and "3/3" not in err, "no other bar"
    assert len(list(teacache_memo.generate(*arguments, clips=2, bar=None))) == 2 and capsys.readouterr().err == ""


def durations(path):
    """Seconds of the pictures and of the sound."""
    frames, fps, _ = read(path)
    return len(frames) / fps, len(teacache_memo.read_voice(path)) / 16000


@pytest.mark.parametrize("seconds", [0.2, 1.19, 4.9])
def test_sound_and_pictures_end_together(here, seconds):  # noqa: F811
    """Within a frame; a decoder that does not cut the last AAC packet gives up to 64 ms more."""
    write_sound("voice.wav", round(seconds * FPS * 10) / 10 + 0.1)
    frames = math.ceil(len(teacache_memo.read_voice("voice.wav")) / 16000 * FPS)
    clips = np.zeros((frames, 32, 32, 3), np.uint8)
    path = teacache_memo.write_video([clips], "a.mp4", FPS, "voice.wav")
    pictures, sound = durations(path)
    assert seconds <= pictures <= seconds + 1 / FPS and -1e-3 <= sound - seconds <= 0.07
    path = teacache_memo.write_video([clips[:5]], "b.mp4", FPS, "voice.wav")
    pictures, sound = durations(path)
    assert pictures == 5 / FPS and pictures - 1e-3 <= sound <= pictures + 0.1, "the sound is cut where the pictures end"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(here, error):  # noqa: F811
    seen = []

    def clips():
        yield np.zeros((16, 32, 32, 3), np.uint8)
        seen.extend(os.listdir("o"))
        raise error("stop")

    os.mkdir("o")
    with pytest.raises(error):
        teacache_memo.write_video(clips(), "o/a.mp4", FPS, "speech.wav")
    assert len(seen) == 1 and seen[0].startswith(".") and not os.listdir("o"), "a hidden name while it is written"


def test_an_interrupted_run_says_so(here, monkeypatch):  # noqa: F811
    def interrupted(*_, **__):
        yield np.zeros((16, 16, 16, 3), np.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(teacache_memo, "generate", interrupted)
    with pytest.raises(SystemExit, match="interrupted: outputs/face_speech.mp4 was not written"):
        teacache_memo.main(["--config", "config.yaml", "--input_image", "face.png", "--input_audio", "speech.wav"])
    assert not os.listdir("outputs")


def test_a_video_that_ffmpeg_cannot_write(here):  # noqa: F811
    """Its own words, as an error; no half of it stays."""
    os.mkdir("o")
    clip = np.zeros((16, 32, 32, 3), np.uint8)
    with pytest.raises(OSError, match="No such file"):
        teacache_memo.write_video([clip], "o/a.mp4", FPS, "nosound.wav")
    with pytest.raises(OSError):
        teacache_memo.write_video([clip[:, :31, :31]] * 40, "o/a.mp4", FPS, "speech.wav")  # odd sizes
    with pytest.raises(ValueError, match="no frames"):
        teacache_memo.write_video([], "o/a.mp4", FPS, "speech.wav")
    assert not os.listdir("o")


def test_a_video_that_came_in_between(here):  # noqa: F811
    """It is not overwritten, and no work is lost."""
    for i, name in enumerate(("a.mp4", "a-2.mp4", "a-3.mp4")):
        clip = np.full((16, 32, 32, 3), 50 * i, np.uint8)
        assert teacache_memo.write_video([clip], "a.mp4", FPS, "speech.wav") == Path(name)
    assert [read(name)[0].mean() // 40 for name in ("a.mp4", "a-2.mp4", "a-3.mp4")] == [0, 1, 2]
