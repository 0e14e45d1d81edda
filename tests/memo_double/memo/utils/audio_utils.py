import math
import subprocess
import wave

import imageio_ffmpeg
import torch


def resample_audio(input_audio_file, output_audio_file, sample_rate=16000):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-i", input_audio_file]
    status = subprocess.Popen([*command, "-ar", str(sample_rate), output_audio_file]).wait()
    assert status == 0, f"Resample audio failed! Input: {input_audio_file}, Output: {output_audio_file}"
    return output_audio_file


def preprocess_audio(
    wav_path,
    fps,
    wav2vec_model,
    vocal_separator_model=None,
    cache_dir="",
    device="cuda",
    sample_rate=16000,
    num_generated_frames_per_clip=-1,
):
    """(frames, window, blocks, channels), and the frames of the sound, filled up to whole clips."""
    with wave.open(resample_audio(wav_path, f"{cache_dir}/vocals-16k.wav", sample_rate)) as file:
        samples = file.getnframes()
    length = math.ceil(samples / sample_rate * fps)
    length = math.ceil(length / num_generated_frames_per_clip) * num_generated_frames_per_clip
    return torch.randn(length, 5, 2, 8, generator=torch.Generator().manual_seed(length)), length


def extract_audio_emotion_labels(model, wav_path, emotion2vec_model, audio_length, sample_rate=16000, device="cuda"):
    return torch.full((audio_length,), 3, dtype=torch.int32), 9
