"""Portraits and voices as people have them, for the talking emoji and for MEMO; and the video clip by clip.

The talking emoji hears with its own Wav2Vec, which needs no memo: these tests run with the double as well.
"""

import io
import math
import os
import re
import subprocess
import sys
import time
import wave
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
from TeaCache4Memo.compare_memo import generate_all

FOLDER = teacache_memo.BUNDLED
real = pytest.mark.skipif(not REAL, reason="the real memo is not here: pytest --memo PATH")
EMOJI = teacache_memo.read_config(FOLDER / "config.yaml")
EMOJI.model_name_or_path = str(FOLDER)


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, arguments)], check=True)


def prepare(folder, image=FOLDER / "example.png", audio=FOLDER / "example.wav", **more):
    """For the talking emoji."""
    return teacache_memo.prepare(image, audio, EMOJI, folder, **more)


def samples(path):
    """Of a wav, (samples, channels)."""
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, file.getnchannels())


# --- the talking emoji and a voice of one's own -------------------------------------------------------


def test_it_hears_what_was_prepared():
    """The example's voice, by our own features: those of memo's functions, with any transformers."""
    example = load_file(FOLDER / "example.safetensors")["audio_emb"]
    found = teacache_memo.load_emoji().hear(FOLDER / "example.wav", 30, 16)
    assert found.shape == example.shape and torch.allclose(found, example, atol=1e-5)


def test_a_long_voice_is_heard_in_windows(tmp_path, monkeypatch):
    """Nearly as at once: what is far away hardly matters."""
    voice = np.tile(samples(FOLDER / "example.wav")[:, 0], 3)
    with wave.open(str(tmp_path / "voice.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(voice.tobytes())
    emoji = teacache_memo.load_emoji()
    assert emoji.WINDOW == 60
    whole = emoji.hear(tmp_path / "voice.wav", 30, 16)
    for window in (1, 2, 3):
        monkeypatch.setattr(emoji, "WINDOW", window)
        parts = emoji.hear(tmp_path / "voice.wav", 30, 16)
        assert parts.shape == whole.shape == (96, 5, 2, 32)
        assert (parts - whole).abs().mean() < 0.1 * whole.abs().mean()


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) > 4, reason="memo's needs transformers 4")
@real
def test_it_hears_as_memos_wav2vec():
    from memo.models.wav2vec import Wav2VecModel

    sound = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoder = transformers.Wav2Vec2Model.from_pretrained(FOLDER / "wav2vec").eval()
        found = teacache_memo.load_emoji().hidden_states(encoder, sound, 16)
        memos = Wav2VecModel.from_pretrained(FOLDER / "wav2vec").eval()
        expected = memos(sound, seq_len=16, output_hidden_states=True).hidden_states[1:]
    assert torch.allclose(found, torch.stack(expected, dim=2)[0], atol=1e-5)


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
    assert inputs.sound != file and samples(inputs.sound).shape[1] == 1


@pytest.mark.parametrize(
    "left, right, says", [(1, -1, True), (1, 0, True), (0, 1, True), (1, 1, False), (0.6, 0.4, False)]
)
def test_two_channels(tmp_path, capfd, left, right, says):
    """Opposite ones are not silence, and one alone is not quieter: then the louder one is taken, which is said."""
    file = tmp_path / "voice.wav"
    ffmpeg("-i", FOLDER / "example.wav", "-af", f"pan=stereo|c0={left}*c0|c1={right}*c0", file)
    found, voice = samples(prepare(tmp_path, audio=file).sound)[:, 0], samples(FOLDER / "example.wav")[:, 0]
    level = np.abs(found).mean() / np.abs(voice).mean()
    assert len(found) == len(voice) and level == pytest.approx(0.5 if left == 0.6 else 1, abs=0.01)
    assert capfd.readouterr().err.count("voice.wav: only the louder channel is used") == says


def test_nothing_is_overwritten_beside_it(tmp_path):
    """In a folder of one's own, with files of these names."""
    for name in ("voice.wav", "portrait.png"):
        (tmp_path / name).write_bytes(b"mine")
    inputs = prepare(tmp_path)
    assert inputs.sound == tmp_path / "voice_2.wav"
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
    with pytest.raises(ValueError, match="its own portraits only, example.png, green-hat.png, party.png"):
        prepare(tmp_path, tmp_path / "mine.png")


def test_flags_for_the_emoji(tmp_path, monkeypatch, capsys):
    """Its config is found from anywhere; what it cannot do is said before it is loaded."""
    monkeypatch.chdir(tmp_path)
    write_sound("voice.wav", 20)
    config = teacache_memo.choose_config()
    assert capsys.readouterr().out.startswith("No CUDA GPU: using the bundled talking emoji")
    assert teacache_memo.find_inputs(config, audio="voice.wav") == (FOLDER / "example.png", Path("voice.wav"))
    config = teacache_memo.choose_config(FOLDER / "config.yaml")
    assert config.model_name_or_path == str(FOLDER) and capsys.readouterr().out == ""
    Image.new("RGB", (64, 64), "red").save("mine.png")
    monkeypatch.setattr(teacache_memo, "load_pipeline", lambda *_, **__: pytest.fail("too late"))
    for flags, says in [
        (["--emotion", "angry"], "knows the emotions happy, neutral, sad, not angry"),
        (["--input_image", "mine.png"], "its own portraits only, example.png"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: [^\\n]*{says}[^\\n]*$"):
            teacache_memo.main(flags)


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


READS = "import sys; sys.stdout.write(repr(sys.stdin.read()))"


def test_memo_does_not_read_the_terminal(here, monkeypatch):  # noqa: F811
    """Its ffmpeg would, and a job in the background would stop. Afterwards the input is as before, after an error too."""
    vision, said = sys.modules["memo.utils.vision_utils"], []
    stock = vision.preprocess_image

    def preprocess_image(*args):
        said.append(subprocess.run([sys.executable, "-c", READS], capture_output=True, text=True).stdout)
        return stock(*args)

    monkeypatch.setattr(vision, "preprocess_image", preprocess_image)
    before, (reading, writing) = os.dup(0), os.pipe()
    try:
        os.dup2(reading, 0)
        os.write(writing, b"typed")
        teacache_memo.prepare("face.png", "speech.wav", OmegaConf.load("config.yaml"), str(here))
        Image.new("RGB", (20, 20), "white").save("face.png")
        with pytest.raises(ValueError, match="no face"):
            teacache_memo.prepare("face.png", "speech.wav", OmegaConf.load("config.yaml"), str(here))
        assert said == ["''", "''"] and os.read(0, 9) == b"typed"
    finally:
        os.dup2(before, 0)
        for end in (before, reading, writing):
            os.close(end)


def test_memo_is_given_a_voice_that_it_can_read(here, monkeypatch):  # noqa: F811
    """One channel, by an absolute path, whatever the file is called."""
    audio, given = sys.modules["memo.utils.audio_utils"], []
    stock = audio.preprocess_audio
    monkeypatch.setattr(
        audio, "preprocess_audio", lambda path, *args, **more: given.append(path) or stock(path, *args, **more)
    )
    ffmpeg("-i", "speech.wav", "-ac", 2, "file:12:30.wav")
    os.mkdir("made")
    teacache_memo.prepare("face.png", "12:30.wav", OmegaConf.load("config.yaml"), "made")
    assert given == [str(here / "made" / "voice.wav")] and samples(given[0]).shape[1] == 1


@pytest.mark.parametrize("case", ["orientation", "transparent", "palette", "not square"])
def test_memo_is_given_a_cleaned_portrait(here, monkeypatch, capsys, case):  # noqa: F811
    """What a viewer shows, as a file that memo's preprocess_image reads."""
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
    else:
        image, expected = image.crop((0, 0, 24, 20)), expected[:20]
    image.save("portrait.png", exif=exif)
    os.mkdir("made")
    teacache_memo.prepare("portrait.png", "speech.wav", OmegaConf.load("config.yaml"), "made")
    ((mode, found),) = seen
    assert mode == "RGB" and found.shape == expected.shape and np.abs(found - expected).max() <= 1


def test_all_orientations(tmp_path):
    """As Pillow's own reading of the flag; all eight show the same picture."""
    turns = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    for i, turn in enumerate([None, *turns]):
        exif = Image.Exif()
        exif[0x0112] = i + 1
        stored = picture.transpose(Image.Transpose[turn]) if turn else picture
        stored.save(tmp_path / "photo.png", exif=exif)
        teacache_memo.clean_portrait(tmp_path / "photo.png", tmp_path / "clean.png")
        found = Image.open(tmp_path / "clean.png")
        assert found.size == (30, 20) and found.tobytes() == picture.tobytes(), i + 1


@pytest.mark.parametrize("mode", ["CMYK", "L", "LA", "P", "1"])
def test_modes_of_pictures(tmp_path, mode):
    """All are read; gray stays gray."""
    source = Image.new("L", (8, 8), 255 if mode == "1" else 100)
    source.convert("RGB" if mode == "CMYK" else mode).convert(mode).save(tmp_path / "a.tiff")
    teacache_memo.clean_portrait(tmp_path / "a.tiff", tmp_path / "clean.png")
    found = np.asarray(Image.open(tmp_path / "clean.png"))
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
    video, _, schedule = generate_all(*tiny_pipeline(), inputs_of(frames), config_of(), rel_l1_thresh=0)
    assert video.shape == (frames, 16, 16, 3) and video.dtype == np.uint8
    assert schedule == [True] * 2 * math.ceil(frames / 16)
    filled = inputs_of(frames, num_frames=frames)
    filled.audio_emb = torch.cat([filled.audio_emb, filled.audio_emb[-1:].repeat(-frames % 16, 1, 1, 1)])
    filled.audio_emotion = torch.full((len(filled.audio_emb),), 3, dtype=torch.int32)
    assert np.array_equal(video, generate_all(*tiny_pipeline(), filled, config_of(), rel_l1_thresh=0)[0])


def test_a_clip_is_given_when_it_is_done(capsys):
    """Nothing is computed ahead; the schedule and the lines tell of the clips so far."""
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
        assert capsys.readouterr().err == f"face clip {i + 1} of 3: 2 of 3 steps computed\n", "no other bar"
    assert lengths == [16, 16, 8] and schedule.count(True) == 6
    assert len(list(teacache_memo.generate(*arguments, clips=2, bar=None))) == 2 and capsys.readouterr().err == ""


def test_progress_on_a_terminal(monkeypatch):
    """One bar, which begins with the first step and names its clip."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    list(teacache_memo.generate(*tiny_pipeline(), inputs_of(32), config_of(3), rel_l1_thresh=0))
    shown = [text for text in terminal.getvalue().split("\r") if text.strip()]
    assert shown and all(re.match(r"clip [12] of 2 \|", text) for text in shown), shown
    assert not any("?" in text or "3/3" in text for text in shown) and "\n" not in terminal.getvalue()


def test_one_video_at_a_time():
    """A second one on the same network would take its settings and its memory; it may begin when the first has ended."""
    pipeline, audio_proj = tiny_pipeline()
    same = type(pipeline)(**pipeline.components)
    arguments = audio_proj, inputs_of(32), config_of(2)
    first = teacache_memo.generate(pipeline, *arguments, bar=None, rel_l1_thresh=0)
    next(first)
    for other in (pipeline, same):
        with pytest.raises(RuntimeError, match="this pipeline is making another video"):
            next(teacache_memo.generate(other, *arguments, bar=None, computed_steps=2))
    next(teacache_memo.generate(*tiny_pipeline(), inputs_of(32), config_of(2), bar=None))
    alone = np.concatenate(list(teacache_memo.generate(*tiny_pipeline(), *arguments[1:], bar=None, rel_l1_thresh=0)))
    assert np.array_equal(next(first), alone[16:]), "not disturbed"
    assert next(first, None) is None
    second = teacache_memo.generate(same, *arguments, bar=None)
    next(second)
    second.close()
    assert len(list(teacache_memo.generate(pipeline, *arguments, bar=None))) == 2


def durations(path):
    """Seconds of the pictures and of the sound."""
    frames, fps, _ = read(path)
    ffmpeg("-y", "-i", path, "-vn", f"{path}.wav")
    with wave.open(f"{path}.wav") as file:
        return len(frames) / fps, file.getnframes() / file.getframerate()


@pytest.mark.parametrize("seconds", [0.2, 1.19, 4.9])
def test_sound_and_pictures_end_together(here, seconds):  # noqa: F811
    """Within a frame; a decoder that does not cut the last AAC packet gives up to 64 ms more."""
    write_sound("voice.wav", round(seconds * FPS * 10) / 10 + 0.1)
    frames = math.ceil(teacache_memo.clean_voice("voice.wav", here / "clean.wav") * FPS)
    clips = np.zeros((frames, 32, 32, 3), np.uint8)
    path = teacache_memo.write_video([clips], "a.mp4", FPS, "clean.wav")
    pictures, sound = durations(path)
    assert seconds <= pictures <= seconds + 1 / FPS and -1e-3 <= sound - seconds <= 0.07


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(here, error):  # noqa: F811
    seen = []

    def clips():
        yield np.zeros((16, 32, 32, 3), np.uint8)
        for _ in range(200):  # until ffmpeg has begun
            time.sleep(0.05 * (not seen))
            seen[:] = os.listdir("o")
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
    with pytest.raises(SystemExit, match="^interrupted$"):
        teacache_memo.main(["--config", "config.yaml", "--input_image", "face.png", "--input_audio", "speech.wav"])
    assert not os.listdir("outputs")


def test_a_video_that_ffmpeg_cannot_write(here, capfd):  # noqa: F811
    """It says why, then we that the video could not be written; no half of it stays."""
    os.mkdir("o")
    clip = np.zeros((16, 32, 32, 3), np.uint8)
    for clips, sound in [([clip] * 40, "nosound.wav"), ([clip[:, :31, :31]] * 40, "speech.wav")]:  # odd sizes
        with pytest.raises(OSError, match="o/a.mp4 could not be written"):
            teacache_memo.write_video(clips, "o/a.mp4", FPS, sound)
        assert capfd.readouterr().err and not os.listdir("o")


def test_a_disk_that_is_full_at_the_end(here, monkeypatch):  # noqa: F811
    """ffmpeg has ended, and the writer does not tell that the last part of the file is not there."""
    write_frames = imageio_ffmpeg.write_frames

    def cut_short(path, *args, **options):
        writer = write_frames(path, *args, **options)
        writer.send(None)
        try:
            while True:
                writer.send((yield))
        finally:
            writer.close()
            data = Path(path).read_bytes()
            Path(path).write_bytes(data[: data.index(b"moov") - 4])

    os.mkdir("o")
    monkeypatch.setattr(imageio_ffmpeg, "write_frames", cut_short)
    with pytest.raises(OSError, match="o/a.mp4 could not be written"):
        teacache_memo.write_video([np.zeros((16, 32, 32, 3), np.uint8)], "o/a.mp4", FPS, "speech.wav")
    assert not os.listdir("o")


def test_a_video_that_came_in_between(here):  # noqa: F811
    """It is not overwritten, and no work is lost."""
    for i, name in enumerate(("a.mp4", "a_2.mp4", "a_3.mp4")):
        clip = np.full((16, 32, 32, 3), 50 * i, np.uint8)
        assert teacache_memo.write_video([clip], "a.mp4", FPS, "speech.wav") == Path(name)
    assert [read(name)[0].mean() // 40 for name in ("a.mp4", "a_2.mp4", "a_3.mp4")] == [0, 1, 2]
