"""Does the bundled MEMO talk? Measured on held-out voices, three clips each, in faces that it has not seen.

    python assets/memo-emoji/evaluate.py                          # eight voices, all numbers
    python assets/memo-emoji/evaluate.py --voices 2 --sheet assets/memo_sheet.png

own      correlation over time of the mouth's opening in the pictures (dark pixels) and what the voice asks for
other    the same with what the other voices ask for, a mean over these
seam     mean change from the last frame of a clip to the first of the next, over the mean change within clips
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from faces import NUM_EMOTIONS, mouth_opening  # noqa: E402

from TeaCache4Memo.compare_memo import generate_all  # noqa: E402
from TeaCache4Memo.teacache_memo import load_pipeline  # noqa: E402


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.float(), b.float()]))[0, 1].item()


def seam_ratio(video, clip):
    """How much more the picture changes where two clips meet; video: (frames, 3, height, width)."""
    change = (video[1:] - video[:-1]).abs().mean(dim=(1, 2, 3))
    seams = torch.arange(len(change)) % clip == clip - 1
    return (change[seams].mean() / change[~seams].mean()).item()


def speak(pipeline, audio_proj, config, voice, seed, **settings):
    """The frames of a row of voices.safetensors, (frames, 3, height, width) in [-1, 1], their seconds and schedule."""
    inputs = SimpleNamespace(
        pixel_values=voice["pixel_values"][None].float(),
        face_emb=voice["face_emb"][None].float(),
        audio_emb=voice["audio_emb"].float(),
        audio_emotion=voice["audio_emotion"],
        num_emotion_classes=NUM_EMOTIONS,
    )
    settings = settings or {"rel_l1_thresh": 0}
    frames, seconds, schedule = generate_all(pipeline, audio_proj, inputs, config, seed, progress=False, **settings)
    return torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1, seconds, schedule


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--voices", type=int, default=8, help="how many of voices.safetensors")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="also write a picture: a voice a row, every third frame")
    args = parser.parse_args()

    config = SimpleNamespace(**OmegaConf.to_container(OmegaConf.load(args.model / "config.yaml")))
    config.inference_steps, config.cfg_scale = args.steps, args.guidance
    pipeline, audio_proj = load_pipeline(str(args.model), device="cpu", dtype=torch.float32)
    table = load_file(args.model / "voices.safetensors")
    voices = [{k: v[i] for k, v in table.items()} for i in range(len(table["opening"]))]

    rows, videos = [], []
    for i, voice in enumerate(voices[: args.voices]):
        video, seconds, _ = speak(pipeline, audio_proj, config, voice, args.seed + i)
        videos.append(video)
        mouth = mouth_opening(video)
        others = [correlation(mouth, v["opening"]) for j, v in enumerate(voices) if j != i]
        rows.append(
            {
                "own": correlation(mouth, voice["opening"]),
                "other": sum(others) / len(others),
                "seam": seam_ratio(video, config.num_generated_frames_per_clip),
                "seconds": seconds * config.num_generated_frames_per_clip / len(video),
            }
        )
        print(f"voice {i}: " + ", ".join(f"{k} {v:.2f}" for k, v in rows[-1].items()) + " a clip", flush=True)
    mean = {k: round(sum(row[k] for row in rows) / len(rows), 3) for k in rows[0]}
    print(json.dumps(mean | {"least own": round(min(row["own"] for row in rows), 3), "voices": len(rows)}))
    if args.sheet:
        pictures = torch.stack([video[::3] for video in videos])  # (voices, frames, 3, height, width)
        sheet = pictures.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
        Image.fromarray(((sheet / 2 + 0.5) * 255).round().to(torch.uint8).numpy()).save(args.sheet)


if __name__ == "__main__":
    main()
