"""What `teacache_memo.py` gives to the network and what it makes of its output: config, portrait, voice; mp4.

The portrait and the voice go through memo's own functions, in the order of memo's inference.py. Nothing happens at
import.
"""

import contextlib
import logging
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch

KEYS = {  # of memo's configs/inference.yaml
    "resolution": int,
    "num_generated_frames_per_clip": int,
    "fps": int,
    "num_init_past_frames": int,
    "num_past_frames": int,
    "inference_steps": int,
    "cfg_scale": float,
    "weight_dtype": str,
    "enable_xformers_memory_efficient_attention": bool,
    "model_name_or_path": str,
    "vae": str,
    "wav2vec": str,
    "emotion2vec": str,
    "misc_model_dir": str,
}
HUB = "memoavatar/memo"
FACES = "misc/face_analysis"
MODELS = [  # that memo's functions need, in misc_model_dir
    *(f"{FACES}/models/{name}.onnx" for name in "1k3d68 2d106det genderage glintr100 scrfd_10g_bnkps".split()),
    f"{FACES}/models/face_landmarker_v2_with_blendshapes.task",
    "misc/vocal_separator/Kim_Vocal_2.onnx",
]


class BadInput(ValueError):
    """One line that says what is wrong, and what to do."""


def read_config(path):
    """memo's configs/inference.yaml as a namespace, checked. Raises BadInput; ImportError without omegaconf."""
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        missing = [key for key in KEYS if key not in content]
    except Exception as error:
        raise BadInput(f"cannot read {path}, it should be like memo's configs/inference.yaml: {error}") from error
    if missing:
        raise BadInput(f"{path} lacks {', '.join(missing)}: compare memo's configs/inference.yaml")
    for key, kind in KEYS.items():
        value = content[key]
        if not isinstance(value, (int, float) if kind is float else kind) or kind is not bool and value is True:
            raise BadInput(f"{path}: {key} must be of type {kind.__name__}, not {value!r}")
        if kind is int and value < 1:
            raise BadInput(f"{path}: {key} must be at least 1, not {value}")
    config = SimpleNamespace(**{key: content[key] for key in KEYS})
    if config.resolution % 8:
        raise BadInput(f"{path}: resolution must be a multiple of 8, not {config.resolution}")
    if not 1 < config.cfg_scale < math.inf:
        raise BadInput(f"{path}: cfg_scale must be above 1, memo's pipeline needs guidance; not {config.cfg_scale}")
    return config


def check_image(path):
    """Raises BadInput for a file that is no image."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:
        raise BadInput(f"{path} is not an image that can be read: {error}") from error


def check_output(path, overwrite):
    """Makes the folder of an output. Raises BadInput or OSError where it cannot or must not be written."""
    if path.is_dir() or path.exists() and not overwrite:
        raise BadInput("it exists and is left alone, give --overwrite or another --output_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise BadInput("its folder is not writable")
    free = shutil.disk_usage(path.parent).free
    if free < 200e6:
        raise BadInput(f"only {free / 1e6:.0f} MB are free, and 200 needed")


@contextlib.contextmanager
def silenced():
    """Nothing on stderr, not even from the ffmpeg that memo starts."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def wav_seconds(path):
    """Length of a wav file of any format; the standard library's `wave` knows but one."""
    data = Path(path).read_bytes()
    form, sound = data.index(b"fmt "), data.index(b"data")
    each_second = int.from_bytes(data[form + 16 : form + 20], "little")  # bytes
    return (len(data) - sound - 8) / each_second


def prepare(image, audio, config, folder):
    """What `generate` takes of a portrait and a voice, and for the video: `sound`, a wav file, and `length`, frames.

    Writes sounds into `folder`. Raises BadInput; ImportError where memo's functions, or imageio, cannot be imported.
    """
    import imageio_ffmpeg
    from memo.utils.audio_utils import extract_audio_emotion_labels, preprocess_audio, resample_audio
    from memo.utils.vision_utils import preprocess_image

    imageio_ffmpeg.get_ffmpeg_exe()  # needed at the end: fail now
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logger = logging.getLogger("memo")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that there is no face is said here
    doing = f"read {audio}: is it a sound file, and ffmpeg installed, which memo calls?"
    try:
        with silenced():
            sound = resample_audio(str(audio), str(folder / f"{audio.name.split('.')[0]}-16k.wav"))
        seconds, clip = wav_seconds(sound), config.num_generated_frames_per_clip / config.fps
        if seconds < clip:
            raise BadInput(f"{audio} lasts {seconds:.2f} s, shorter than one clip of {clip:.2f} s: give a longer one")

        doing = f"get memo's models for faces and voices into {config.misc_model_dir}: is the Hub in reach?"
        for name in MODELS:
            path = Path(config.misc_model_dir, name)
            if not path.is_file() or path.stat().st_size < 2**20:  # memo's measure of a broken download
                from huggingface_hub import hf_hub_download

                hf_hub_download(HUB, name, local_dir=config.misc_model_dir)

        doing = f"analyse {image}"
        faces = str(Path(config.misc_model_dir, FACES))
        pixel_values, face_emb = preprocess_image(faces, str(image), config.resolution)
        if not face_emb.any():  # memo warns, and goes on with zeros
            raise BadInput(f"memo finds no face in {image}: give a portrait, seen from the front")

        doing = f"analyse {audio}"
        audio_emb, length = preprocess_audio(
            wav_path=sound,
            fps=config.fps,
            wav2vec_model=config.wav2vec,
            vocal_separator_model=str(Path(config.misc_model_dir, MODELS[-1])),
            cache_dir=str(folder),
            device=device,
            num_generated_frames_per_clip=config.num_generated_frames_per_clip,
        )
        local = Path(config.model_name_or_path, "misc", "audio_emotion_classifier").is_dir()
        audio_emotion, num_emotion_classes = extract_audio_emotion_labels(
            model=config.model_name_or_path if local else HUB,
            wav_path=sound,
            emotion2vec_model=config.emotion2vec,
            audio_length=length,
            device=device,
        )
    except (BadInput, ImportError):
        raise
    except Exception as error:
        raise BadInput(f"could not {doing} ({type(error).__name__}: {error})") from error
    finally:
        logger.setLevel(level)
    return SimpleNamespace(
        pixel_values=pixel_values,
        face_emb=face_emb,
        audio_emb=audio_emb,
        audio_emotion=audio_emotion,
        num_emotion_classes=num_emotion_classes,
        sound=sound,
        length=min(length, math.ceil(seconds * config.fps)),  # memo fills up the last clip: end with the sound
    )


def write_video(frames, path, fps, sound):
    """An mp4 of (height, width, 3) uint8 frames, through a temporary file: a failure, OSError, leaves what was there.

    By imageio and not by memo's `tensor_to_video`, which needs moviepy 1 and writes in place.
    """
    import imageio.v2 as imageio

    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    options = {"fps": fps, "codec": "libx264", "quality": 8, "macro_block_size": 2}
    options |= {"audio_path": str(sound), "audio_codec": "aac", "ffmpeg_log_level": "error"}
    try:
        with imageio.get_writer(draft, **options) as writer:
            for frame in frames:
                writer.append_data(frame)
        draft.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
