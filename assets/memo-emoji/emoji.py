"""How the talking emoji sees and hears: in place of memo's functions for faces and voices, with their names and arguments.

It has no face recognition, so it knows its own portraits only. Its Wav2Vec is run without memo's class, which stops with
transformers 5. `prepare` in TeaCache4Memo/teacache_memo.py loads this file when the model is the one in this folder.
"""

import math
import wave
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import Wav2Vec2Model

HERE = Path(__file__).resolve().parent
EMOTIONS = {"happy": 3, "neutral": 4, "sad": 6}  # those that it has learnt, with their labels in emotion2vec
NUM_EMOTIONS = 9  # of emotion2vec
SIZE, FPS = 96, 30  # of its portraits, and of the features of its example
WINDOW = 60  # seconds that are heard at once: memory does not grow with the voice


def preprocess_image(face_analysis_model, image_path, image_size):
    """Pixels (1, 3, size, size) in [-1, 1] and face embedding (1, 512) of one of its portraits, whatever the file is called."""
    if image_size != SIZE:
        raise ValueError(f"the talking emoji has a resolution of {SIZE}, not {image_size}")
    picture = np.array(Image.open(image_path).convert("RGB").resize((image_size, image_size)))
    picture = torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1
    for name in ("example", "voices"):
        table = load_file(HERE / f"{name}.safetensors")
        for pixel_values, face_emb in zip(table["pixel_values"].float(), table["face_emb"].float()):
            if (pixel_values - picture).abs().mean() < 0.02:
                return pixel_values[None], face_emb[None]
    own = f"{', '.join(sorted(file.name for file in HERE.glob('*.png')))} in {HERE}"
    raise ValueError(f"the talking emoji animates its own portraits only, {own}: another face takes the real MEMO")


def preprocess_audio(
    wav_path,
    fps,
    wav2vec_model=None,
    vocal_separator_model=None,
    cache_dir="",
    num_generated_frames_per_clip=16,
    **ignored,
):
    """Features (frames, 5, blocks, channels) of a 16 kHz wav and the number of frames, filled up to whole clips."""
    if is_example(wav_path) and fps == FPS:  # the features that it was prepared with, by any transformers
        audio_emb = load_file(HERE / "example.safetensors")["audio_emb"]
    else:
        audio_emb = hear(wav_path, fps, num_generated_frames_per_clip)
    return audio_emb, len(audio_emb)


def extract_audio_emotion_labels(model, wav_path, emotion2vec_model, audio_length, **ignored):
    """Its example is happy, other voices are neutral: it has no emotion recognition."""
    label = EMOTIONS["happy" if is_example(wav_path) else "neutral"]
    return torch.full((audio_length,), label, dtype=torch.int32), NUM_EMOTIONS


def is_example(wav_path):
    return Path(wav_path).read_bytes() == (HERE / "example.wav").read_bytes()


@torch.no_grad()
def hear(wav_path, fps, clip):
    """As memo's `preprocess_audio` without its vocal separation; a long voice in windows that see a second to both sides."""
    with wave.open(str(wav_path)) as file:
        rate, samples = file.getframerate(), file.readframes(file.getnframes())
    sound = torch.from_numpy(np.frombuffer(samples, np.int16) / np.float32(2**15))
    frames = math.ceil(len(sound) / rate * fps)
    missing = -frames % clip
    sound = F.layer_norm(sound, sound.shape, eps=1e-7)  # what Wav2Vec2FeatureExtractor does
    sound = F.pad(sound, (0, missing * (rate // fps)))
    encoder, states = Wav2Vec2Model.from_pretrained(HERE / "wav2vec").eval(), []
    for start in range(0, frames + missing, WINDOW * fps):
        first, last = max(0, start - fps), min(frames + missing, start + (WINDOW + 1) * fps)
        end = None if last == frames + missing else last * rate // fps
        heard = hidden_states(encoder, sound[None, first * rate // fps : end], last - first)
        states.append(heard[start - first :][: WINDOW * fps])
    states = torch.cat(states)  # (frames, blocks, channels)
    window = torch.arange(len(states))[:, None] + torch.arange(-2, 3)  # two frames before, two after
    return states[window.clamp(0, len(states) - 1)]


def hidden_states(encoder, sound, frames):
    """Of each layer, (frames, blocks, channels), by hooks: transformers 5 does not return them."""
    states = []

    def keep(layer, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    features = F.interpolate(encoder.feature_extractor(sound), size=frames, mode="linear", align_corners=True)
    hidden, _ = encoder.feature_projection(features.transpose(1, 2))
    hooks = [layer.register_forward_hook(keep) for layer in encoder.encoder.layers]
    try:
        last = encoder.encoder(hidden).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([*states[:-1], last], dim=2)[0]
