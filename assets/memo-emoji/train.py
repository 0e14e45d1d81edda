"""Train the bundled MEMO: a complete talking-head pipeline of memo's own classes that fits in a repository.

Stages, each with its file in --work; those that train save checkpoints there: stop them whenever you like, and run the
same command again. memo (github.com/memoavatar/memo, commit a5aee30) must be importable, espeak-ng installed.

    torchrun --nproc_per_node 2 assets/memo-emoji/train.py --work runs/memo     # a process a core

vae      AutoencoderKL, 96 px -> (4, 12, 12) latents, L1 + gradient L1 + KL, then whitened; it begins with the layers of
         the emoji model beside this one, which has 16 channels
voices   espeak-ng says sentences in many voices; memo's Wav2VecModel learns to hear how wide a mouth is open
videos   faces of faces.py say them; only their latents are kept
nets     reference net, diffusion net and projections, jointly, by flow matching, in chains of clips as memo's loop
export   memo's folders beside this file, fp16 safetensors; the example; the held-out voices for evaluate.py

Sources: MEMO (arXiv 2412.04448) and its finetune.py, rectified flow with logit-normal timesteps (arXiv 2403.03206),
classifier-free guidance by dropping the conditioning (arXiv 2207.12598), Muon (kellerjordan.github.io/posts/muon).
"""

import argparse
import copy
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
import wave
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from faces import EMOTIONS, NUM_EMOTIONS, SIZE, draw, face_embedding, random_face  # noqa: E402

from TeaCache4Memo.teacache_memo import import_memo, set_memory_processors  # noqa: E402

memo = import_memo()
from memo.models.wav2vec import Wav2VecModel  # noqa: E402

# ------------------------------------------------------------------------------
SEED = 0
RANK, WORKERS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
SCALING = 0.18215  # of the latents, written into memo's pipeline

VAE_STEPS, VAE_MINUTES = 1500, 8
VAE_PICTURES = 4000
VAE_BATCH = 4  # in each process
VAE_LR = 2e-3
KL_WEIGHT = 2e-4  # on the mean over latent elements
WARMUP = 100

RATE, FPS, CLIP = 16000, 30, 16
WINDOW = 1024  # samples in which loudness is measured
LOUD = 1.6  # times the mean loudness of a sentence: the mouth is wide open
SENTENCES, HELD_OUT = 400, 24
VOICE_STEPS = 150
AUDIO_BLOCKS, AUDIO_CHANNELS = 2, 32
VOICES = [f"{accent}+{kind}" for kind in "m1 m3 m5 m7 f1 f3 f5 klatt klatt3 Alex linda steph".split()
          for accent in ("en-us", "en-gb", "en-029")]  # fmt: skip
HELD_OUT_VOICES = [f"{accent}+{kind}" for kind in ("m2", "f2", "Andrea", "klatt2")
                   for accent in ("en-gb-scotland", "en-gb-x-rp")]  # fmt: skip

VIDEOS, VIDEO = 1000, 48  # how many, of how many frames
JOY = {"happy": 1.0, "neutral": 0.0, "sad": -1.0}

WIDTHS = (64, 96)  # of the reference net and of the diffusion net
FACE_CHANNELS = 64  # of a token of the face embedding
AUDIO_DIM = 64  # of a token of the sound
MINUTES = 108  # of training; the learning rate falls to nothing in that time
STEPS = 100_000  # at most
BATCH = 1  # chains of clips, in each process
LR = 2e-3
EMA = 0.995
DROP_ALL = 0.12  # chains without any conditioning, as memo's pipeline calls it for guidance
DROP_ONE = 0.05  # face, sound or emotion alone
PAST_NOISE = 0.15  # added to past frames, since those of the network itself are not perfect
MOUTH_WEIGHT = 3.0  # in the loss, about the mouth
FIRST_WEIGHT = 4.0, 2.0  # of the first frames of a clip, which go on from the past ones

EXAMPLE_FACE, EXAMPLE_SOUND = 10_003, 0  # seed of the face, not that of a training video; which of the held-out sounds
# ------------------------------------------------------------------------------

WHO = """the little robot|my old neighbour|a very sleepy cat|our new teacher|the captain of the ship|everybody
a friendly giant|the woman in the red coat|nobody I know|the boy next door|a famous painter|the night train
your younger sister|the loudest parrot|a team of doctors|the moon""".replace("\n", "|").split("|")
WHAT = """wants to buy seven green apples|has never seen so much snow|is singing about the sea|forgot to close the window
will tell you a long story|found a golden key|asked me for a cup of tea|cannot stop laughing|plays the piano quite badly
is looking for a better idea|ate all of the chocolate|has painted the door yellow|knows how to repair a bicycle
said goodbye, and went away|dreams of flying over mountains|drank too much coffee""".replace("\n", "|").split("|")
WHERE = """this morning|behind the old station|before the music begins|on a rainy afternoon|in the middle of the night
at the end of the street|whenever it is cold outside|as far as I remember|under a wide blue sky|after a good dinner
without saying a word|next to the river""".replace("\n", "|").split("|")


# --- training loops -------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton-Schulz; convolutions are flattened to (out, in * height * width).

    The iteration runs on the matrix times its transpose, which is small, and is applied to the matrix once.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for same in shapes.values():  # all matrices of a shape at once
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in same]
                grads = [p.grad for p in same]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])).flatten(2)
                wide = x if x.shape[1] <= x.shape[2] else x.mT
                wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
                gram = wide @ wide.mT
                one = total = torch.eye(gram.shape[1])
                for _ in range(5):
                    factor = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
                    total, gram = factor @ total, factor @ gram @ factor
                wide = total @ wide
                x = wide if x.shape[1] <= x.shape[2] else wide.mT
                size = 0.2 * max(x.shape[1:]) ** 0.5  # the update's RMS is then AdamW's (arXiv 2502.16982)
                updates = [u.view_as(p) for u, p in zip(x.contiguous(), same)]
                torch._foreach_add_(same, updates, alpha=-group["lr"] * size)


class Run:
    """A loop of `steps`, or of `minutes` where these are over earlier; it goes on where it stopped."""

    def __init__(self, path, steps, minutes=math.inf, every=100, **objects):
        self.path, self.steps, self.minutes, self.every, self.objects = path, steps, minutes, every, objects
        self.log, self.start, self.seconds = [], 0, 0.0  # seconds: of training, over all runs
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.start, self.log, self.seconds = state["step"], state["log"], state["seconds"]
            for name, obj in objects.items():
                obj.load_state_dict(state[name])
            print(f"{path.name}: going on from step {self.start}", flush=True)

    def save(self, step):
        state = {name: obj.state_dict() for name, obj in self.objects.items()}
        state |= {"step": step, "log": self.log, "seconds": self.seconds}
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def progress(self, step):
        """0 to 1."""
        return min(1.0, max(step / self.steps, self.seconds / 60 / self.minutes))

    def __iter__(self):
        for step in tqdm(range(self.start, self.steps), initial=self.start, total=self.steps, desc=self.path.stem):
            if self.progress(step) == 1:
                break
            began = time.perf_counter()
            yield step
            self.seconds = agreed(self.seconds + time.perf_counter() - began)
            if RANK > 0:
                continue
            if (step + 1) % self.every == 0 or self.progress(step + 1) == 1:
                print(f"\n{self.path.stem} {self.log[-1:]} {self.seconds:.0f} s", flush=True)
                self.save(step + 1)

    def update(self, model, optimizers, step):
        """A step of each optimizer with the mean gradient of all processes; linear warm-up and cosine decay."""
        if WORKERS > 1:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            torch._foreach_copy_(grads, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in grads]), grads)])
            torch._foreach_div_(grads, WORKERS)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1, (step + 1) / WARMUP) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * self.progress(step))))
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("full_lr", group["lr"]) * factor
            optimizer.step()


def agreed(number):
    """The same number in all processes: the first one's."""
    if WORKERS == 1:
        return number
    number = torch.tensor(number, dtype=torch.float64)
    dist.broadcast(number, 0)
    return number.item()


def build_optimizers(model, matrices, lr, lr_rest):
    """Muon for `matrices`, AdamW for the rest."""
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr_rest, betas=(0.9, 0.95), weight_decay=0.0)
    return {"muon": Muon(matrices, lr), "adamw": adamw}


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def psnr(a, b):
    """dB between images in [-1, 1], a mean over the batch."""
    return (10 * torch.log10(4 / (a - b).square().mean(dim=(1, 2, 3)))).mean().item()


# --- VAE --------------------------------------------------------------------------


def build_vae():
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(24, 48, 96, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=SCALING,
    )


@torch.no_grad()
def begin_vae(pictures):
    """The VAE with the weights of lumina2-emoji's; of its 16 channels, the 4 principal ones for these pictures."""
    old = AutoencoderKL.from_pretrained(HERE.parent / "lumina2-emoji" / "vae", torch_dtype=torch.float32)
    vae = build_vae()
    means = torch.cat([old.encode(x).latent_dist.mean for x in pictures.split(16)]).transpose(0, 1).flatten(1)
    centre, basis = means.mean(dim=1), torch.linalg.eigh(torch.cov(means))[1][:, -4:]  # (16,), (16, 4)
    state = {k: v for k, v in old.state_dict().items() if k in vae.state_dict()}
    weight, bias = state["encoder.conv_out.weight"], state["encoder.conv_out.bias"]
    down = torch.block_diag(basis.T, torch.eye(4, 16))  # means by the basis; any 4 of the log-variances
    state["encoder.conv_out.weight"] = torch.einsum("ij,jkhw->ikhw", down, weight)
    state["encoder.conv_out.bias"] = down @ (bias - torch.cat([centre, torch.zeros(16)]))
    state["decoder.conv_in.weight"] = torch.einsum("ijhw,jk->ikhw", state["decoder.conv_in.weight"], basis)
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"] + torch.einsum(
        "ijhw,j->i", old.decoder.conv_in.weight, centre
    )
    vae.load_state_dict(state, strict=False)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None])
        conv.bias.zero_()
    return vae


def random_pictures(count, rng):
    """(count, 3, SIZE, SIZE), each of another face in another pose."""
    pictures = []
    for _ in range(count):
        pose = {"x": rng.gauss(0, 0.03), "y": rng.gauss(0, 0.03), "roll": rng.gauss(0, 0.06)}
        pose |= {"opening": max(0, rng.uniform(-0.3, 1)), "spread": rng.uniform(-1, 1)}
        pose |= {"blink": max(0, rng.uniform(-3, 1)), "joy": rng.choice([-1, 0, 1]) * min(1, rng.uniform(0, 2))}
        pictures.append(draw(random_face(rng), {k: torch.tensor([v]) for k, v in pose.items()}))
    return torch.cat(pictures)


def train_vae(work):
    torch.manual_seed(SEED)
    pictures = random_pictures(VAE_PICTURES, random.Random(SEED))
    vae = begin_vae(pictures[:256])
    optimizers = build_optimizers(vae, [p for p in vae.parameters() if p.ndim > 1], VAE_LR, VAE_LR / 2)
    run = Run(work / "vae.pt", VAE_STEPS, VAE_MINUTES, vae=vae, **optimizers)
    for step in run:
        x = pictures[torch.randint(len(pictures), (VAE_BATCH,))]
        with autocast(), sdpa_kernel(SDPBackend.MATH):  # MATH: bf16 flash backward is slow on CPUs
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        l1 = (y - x).abs().mean()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (-1, -2))
        (l1 + edges + KL_WEIGHT * kl).backward()
        run.update(vae, optimizers, step)
        vae.zero_grad()
        if (step + 1) % run.every == 0:
            run.log.append((step + 1, round(l1.item(), 4), round(kl.item(), 3), round(psnr(y, x), 2)))
    whiten(vae.eval(), random_pictures(512, random.Random(SEED + 1)))
    return vae, run


@torch.no_grad()
def whiten(vae, pictures):
    """Make the latents of mean 0 and, times SCALING, of covariance 1, by the 1x1 convolutions around them."""
    means = torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(32)])
    flat = means.transpose(0, 1).flatten(1)  # (4, latents)
    mean, (values, vectors) = flat.mean(dim=1), torch.linalg.eigh(torch.cov(flat))
    forth = vectors @ torch.diag(values**-0.5) @ vectors.T / SCALING
    back = torch.linalg.inv(forth)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] = torch.einsum("ij,jkhw->ikhw", forth, quant.weight[:4])
    quant.bias[:4] = forth @ (quant.bias[:4] - mean)
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight.copy_(torch.einsum("ijhw,jk->ikhw", post.weight, back))


# --- voices -----------------------------------------------------------------------


def speak(text, voice, speed, pitch):
    """espeak-ng's sound at 16 kHz, (samples,) in [-1, 1]."""
    with tempfile.TemporaryDirectory() as folder:
        raw, sound = f"{folder}/raw.wav", f"{folder}/16k.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", raw, text], check=True)
        subprocess.run(["ffmpeg", "-y", "-v", "error", "-i", raw, "-ar", str(RATE), "-ac", "1", sound], check=True)
        return read_wave(sound)


def read_wave(path):
    with wave.open(str(path)) as file:
        assert file.getframerate() == RATE and file.getsampwidth() == 2 and file.getnchannels() == 1
        return torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16) / 32768


def write_wave(path, sound):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((sound * 32768).clamp(-32768, 32767).to(torch.int16).numpy().tobytes())


def make_sentence(rng):
    who, what, where = rng.choice(WHO), rng.choice(WHAT), rng.choice(WHERE)
    return rng.choice([f"{who} {what} {where}.", f"{where}, {who} {what}.", f"Well, {who} {what}, {where}!"])


def normalized(sound):
    """As Wav2Vec2FeatureExtractor does: mean 0, variance 1."""
    return (sound - sound.mean()) / (sound.var(unbiased=False) + 1e-7).sqrt()


def mouth_of(sound):
    """What the mouth does: opening (0 to 1) by loudness, spread (-1 to 1) by the share of high frequencies; (frames,)."""
    frames = math.ceil(len(sound) / RATE * FPS)
    padded = F.pad(normalized(sound), (WINDOW // 2, WINDOW // 2 + RATE))
    starts = ((torch.arange(frames) + 0.5) * RATE / FPS).long()
    pieces = padded[starts[:, None] + torch.arange(WINDOW)] * torch.hann_window(WINDOW)
    power = torch.fft.rfft(pieces).abs().square() / WINDOW**2 * 8 / 1.5  # (frames, frequencies): of unit mean square
    hertz = torch.arange(power.shape[1]) * RATE / WINDOW
    voiced, high = power[:, (hertz > 80) & (hertz < 3500)].sum(dim=1), power[:, (hertz > 1500) & (hertz < 3500)].sum(1)
    opening = (voiced.sqrt() / LOUD).clamp(0, 1) ** 0.8
    spread = (3 * high / (voiced + 0.02) - 0.8).clamp(-1, 1)
    smooth = torch.tensor([0.25, 0.5, 0.25])[None, None]
    return [F.conv1d(F.pad(x[None, None], (1, 1), "replicate"), smooth)[0, 0] for x in (opening, spread)]


def build_wav2vec():
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=AUDIO_CHANNELS,
        num_hidden_layers=AUDIO_BLOCKS,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        attn_implementation="eager",
    )
    return Wav2VecModel(config)


def hear(wav2vec, sound):
    """Hidden states (frames, blocks, channels), as memo's preprocess_audio: the last clip is filled up with silence."""
    sound, frames = normalized(sound), math.ceil(len(sound) / RATE * FPS)
    missing = -frames % CLIP
    sound = F.pad(sound, (0, missing * (RATE // FPS)))
    states = wav2vec(sound[None], seq_len=frames + missing, output_hidden_states=True).hidden_states[1:]
    return torch.stack(states, dim=1)[0].transpose(0, 1)


def with_neighbours(states):
    """(frames, 5, blocks, channels): each frame with two before and two after."""
    frames = torch.arange(len(states))[:, None] + torch.arange(-2, 3)
    return states[frames.clamp(0, len(states) - 1)]


def make_voices(work):
    """The trained Wav2VecModel and all sounds: dicts of sound, states, opening, spread, text, voice; held out apart."""
    path = work / "voices.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    rng = random.Random(SEED)
    texts = list(dict.fromkeys(make_sentence(rng) for _ in range(SENTENCES + HELD_OUT)))
    sounds = {"train": [], "held out": []}
    for i, text in enumerate(tqdm(texts, desc="espeak-ng")):
        part, voices = ("train", VOICES) if i < len(texts) - HELD_OUT else ("held out", HELD_OUT_VOICES)
        voice, speed, pitch = voices[i % len(voices)], rng.randrange(120, 185), rng.randrange(30, 70)
        sound = speak(text, voice, speed, pitch)
        opening, spread = mouth_of(sound)
        sounds[part].append({"sound": sound, "opening": opening, "spread": spread, "text": text, "voice": voice})

    torch.manual_seed(SEED)
    wav2vec = build_wav2vec()
    head = torch.nn.Linear(AUDIO_BLOCKS * AUDIO_CHANNELS, 2)
    parameters = [*wav2vec.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, VOICE_STEPS)

    def error(item):
        guess = head(hear(wav2vec, item["sound"])[: len(item["opening"])].flatten(1))
        return (guess - torch.stack([item["opening"], item["spread"]], dim=1)).square().mean(dim=0)

    bar = tqdm(range(VOICE_STEPS), desc="wav2vec")
    for _ in bar:
        loss = sum(error(rng.choice(sounds["train"])).sum() for _ in range(3))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for part in sounds:
            errors = torch.stack([error(item) for item in sounds[part]]).mean(dim=0)
            variance = torch.stack([torch.cat([i[k] for i in sounds[part]]).var() for k in ("opening", "spread")])
            print(
                f"{part}: {len(sounds[part])} sounds, share of the mouth heard (R2) {(1 - errors / variance).tolist()}"
            )
            for item in sounds[part]:
                item["states"] = hear(wav2vec, item["sound"])
    state = {"wav2vec": wav2vec.state_dict(), **sounds}
    torch.save(state, path)
    return state


# --- videos -----------------------------------------------------------------------


def make_pose(item, start, joy, rng):
    """VIDEO frames of a face that says item's sound from frame `start` on: the head at rest first, then swaying.

    memo's memory of the past frames is their average with weights 0.81 ** age, and the sound reaches two frames back and
    ahead. So that a clip can go on where the last one ended, the head sways slowly, nods with the loudness of five frames,
    and blinks within a clip.
    """
    time = torch.arange(VIDEO) / FPS

    def sway(size, slowest=8.0, fastest=4.0):
        turn = 2 * math.pi * time / rng.uniform(fastest, slowest) + (phase := rng.uniform(0, 2 * math.pi))
        return size * rng.uniform(0.3, 1) * (turn.sin() - math.sin(phase))

    opening, spread = (item[k][start : start + VIDEO] for k in ("opening", "spread"))
    loudness = F.avg_pool1d(F.pad(opening[None, None], (2, 2), "replicate"), 5, stride=1)[0, 0]
    blink = torch.zeros(VIDEO)
    closing = torch.tensor([0.5, 1.0, 1.0, 0.7, 0.3])
    at = rng.randrange(5, 90)
    while at < VIDEO:
        at -= max(0, at % CLIP + len(closing) - CLIP)
        blink[at : at + len(closing)] = closing
        at += rng.randrange(30, 90)
    pose = {"x": sway(0.03), "y": sway(0.012) - 0.05 * loudness, "roll": sway(0.06)}
    ramp = 1 - torch.exp(-torch.arange(VIDEO) / 4)
    return pose | {"opening": opening, "spread": spread, "blink": blink, "joy": joy * ramp}


@torch.no_grad()
def encode(vae, pictures):
    with autocast():
        means = [vae.encode(x).latent_dist.mean.float() for x in pictures.split(16)]
    return torch.cat(means) * SCALING


def make_videos(vae, sounds, work):
    """Training videos, stacked: latents (videos, VIDEO, 4, 12, 12), portrait (4, 12, 12), face, audio and emotion."""
    path = work / "videos.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    videos = []
    for i in tqdm(range(RANK, VIDEOS, WORKERS), desc="videos"):
        rng = random.Random(SEED * 1_000_003 + i)
        face, item, emotion = random_face(rng), rng.choice(sounds), rng.choice(list(EMOTIONS))
        start = rng.randrange(len(item["opening"]) - VIDEO + 1)
        pose = make_pose(item, start, JOY[emotion], rng)
        latents = encode(vae, torch.cat([draw(face, {}), draw(face, pose)]))
        audio = with_neighbours(item["states"])[start : start + VIDEO]
        row = {"portrait": latents[0], "latents": latents[1:], "audio": audio, "face": face_embedding(face)[0]}
        videos.append({k: v.half() for k, v in row.items()} | {"emotion": torch.tensor(EMOTIONS[emotion])})
    videos = {k: torch.stack([v[k] for v in videos]) for k in videos[0]}
    if WORKERS > 1:
        parts = [None] * WORKERS
        dist.all_gather_object(parts, videos)
        videos = {k: torch.cat([part[k] for part in parts]) for k in videos}
    if RANK == 0:
        torch.save(videos, path)
    return videos


# --- networks ---------------------------------------------------------------------


def build_nets():
    """memo's four networks: released ones in small. Its projections do not register their sizes by themselves."""
    shape = {
        "sample_size": SIZE // 8,
        "in_channels": 4,
        "block_out_channels": WIDTHS,
        "layers_per_block": 1,
        "cross_attention_dim": FACE_CHANNELS,
        "attention_head_dim": 4,  # the number of heads, in fact
    }
    reference_net = memo.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **shape,
    )
    diffusion_net = memo.UNet3DConditionModel(
        out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        audio_attention_dim=AUDIO_DIM,
        emo_drop_rate=0.1,  # memo has an embedding for "no emotion" only where this is above 0
        use_inflated_groupnorm=True,
        unet_use_cross_frame_attention=False,
        unet_use_temporal_attention=False,
        motion_module_kwargs={
            "num_attention_heads": 4,
            "num_transformer_block": 1,
            "attention_block_types": ("Temporal_Self", "Temporal_Self"),
            "temporal_position_encoding": True,
            "temporal_position_encoding_max_len": 32,
            "temporal_attention_dim_div": 1,
        },
        **shape,
    )
    for net in (reference_net, diffusion_net):
        net.register_to_config(center_input_sample=False)
    set_memory_processors(diffusion_net)
    torch.nn.init.zeros_(diffusion_net.conv_out.weight)
    torch.nn.init.zeros_(diffusion_net.conv_out.bias)
    image = {"cross_attention_dim": FACE_CHANNELS, "clip_embeddings_dim": 512, "clip_extra_context_tokens": 4}
    audio = {"seq_len": 5, "blocks": AUDIO_BLOCKS, "channels": AUDIO_CHANNELS}
    audio |= {"intermediate_dim": 128, "output_dim": AUDIO_DIM, "context_tokens": 4}
    image_proj, audio_proj = memo.ImageProjModel(**image), memo.AudioProjModel(**audio)
    image_proj.register_to_config(**image)
    audio_proj.register_to_config(**audio)
    nets = {"reference_net": reference_net, "diffusion_net": diffusion_net}
    return torch.nn.ModuleDict(nets | {"image_proj": image_proj, "audio_proj": audio_proj})


def interleave(portrait, past, batch):
    """memo's features of portraits ((batch), ...) and of past frames ((batch frames), ...) as one, portrait first."""
    if isinstance(portrait, dict):
        return {k: interleave(portrait[k], past[k], batch) for k in portrait}
    if isinstance(portrait, (list, tuple)):
        return [interleave(a, b, batch) for a, b in zip(portrait, past)]
    if portrait is None:
        return None
    both = torch.cat([portrait.unflatten(0, (batch, -1)), past.unflatten(0, (batch, -1))], dim=1)
    return both.flatten(0, 1)


def predict(nets, noisy, timestep, portrait, past, face, audio, emotion, dropped, first):
    """The velocity (batch, 4, frames, 12, 12) of one clip, called as memo's pipeline calls its networks.

    Args:
        portrait, past: latents (batch, 4, 12, 12) and (batch, past frames, 4, 12, 12).
        face, audio, emotion: (batch, 512), (batch, frames, 5, blocks, channels), (batch,).
        dropped: {"face", "audio", "emotion", "portrait"}: (batch,) True where it is withheld, as without guidance.
        first: of a chain, so that memory begins anew.
    """
    batch, frames = noisy.shape[0], noisy.shape[2]
    # the pipeline repeats (without, with) the face along (portrait, past frames), so every other one of these has none
    with_face = nets.image_proj(face * ~dropped["face"][:, None])
    without = nets.image_proj(torch.zeros_like(face))
    other = torch.where(dropped["face"][:, None, None], nets.image_proj(face), without)
    past_face = torch.stack([other, with_face] * (past.shape[1] // 2), dim=1).flatten(0, 1)
    zero = torch.tensor(0)
    features = nets.reference_net(portrait, zero, encoder_hidden_states=with_face, return_dict=False)
    with torch.no_grad():  # memo's motion modules learn nothing from past frames
        past = nets.reference_net(past.flatten(0, 1), zero, encoder_hidden_states=past_face, return_dict=False)
    tokens = nets.audio_proj(audio) * ~dropped["audio"][:, None, None, None]
    return nets.diffusion_net(
        noisy,
        interleave(features, past, batch),
        timestep,
        encoder_hidden_states=with_face,
        audio_embedding=tokens,
        audio_emotion=torch.where(dropped["emotion"], NUM_EMOTIONS, emotion),
        uc_mask=dropped["portrait"].repeat_interleave(frames) if dropped["portrait"].any() else None,
        is_new_audio=first,
        update_past_memory=True,
        return_dict=False,
    )[0]


def train_nets(videos, work):
    """Rectified flow: noisy = (1 - s) data + s noise, the network gives noise - data. A step is a clip of a chain."""
    torch.manual_seed(SEED)
    nets = build_nets().eval()  # eval: in training mode, memo drops the emotion in each layer by itself
    ema = copy.deepcopy(nets).requires_grad_(False)
    matrices = [p for n, p in nets.named_parameters() if p.ndim > 1 and not any(s in n for s in ("embed", "conv_out"))]
    optimizers = build_optimizers(nets, matrices, LR, LR / 2)
    run = Run(work / "nets.pt", STEPS, minutes=MINUTES, nets=nets, ema=ema, **optimizers)
    weight = torch.ones(CLIP, SIZE // 8, SIZE // 8)
    weight[:, 7:11, 3:9] = MOUTH_WEIGHT
    weight[: len(FIRST_WEIGHT)] *= torch.tensor(FIRST_WEIGHT)[:, None, None]
    chain, losses = VIDEO // CLIP, []
    for step in run:
        k = step % chain
        first = k == 0 or step == run.start
        if first:
            index = torch.randint(len(videos["face"]), (BATCH,))
            nothing = torch.rand(BATCH) < DROP_ALL
        clip, before = (slice(i * CLIP, (i + 1) * CLIP) for i in (k, k - 1))
        video = {name: values[index].float() if name != "emotion" else values[index] for name, values in videos.items()}
        portrait = video["portrait"]
        past = video["latents"][:, before] if k else portrait[:, None].repeat(1, CLIP, 1, 1, 1)
        if k:
            past = past + torch.rand(BATCH, 1, 1, 1, 1) * PAST_NOISE * torch.randn_like(past)
        data = video["latents"][:, clip].transpose(1, 2)
        dropped = {name: nothing | (torch.rand(BATCH) < DROP_ONE) for name in ("face", "audio", "emotion")}
        dropped["portrait"] = nothing
        noise, s = torch.randn_like(data), torch.rand(BATCH)
        s = torch.where(torch.rand(BATCH) < 0.7, torch.sigmoid(torch.randn(BATCH)), s)
        noisy = torch.lerp(data, noise, s[:, None, None, None, None])
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            velocity = predict(
                nets, noisy, s * 1000, portrait, past, video["face"], video["audio"][:, clip], video["emotion"],
                dropped, first,
            )  # fmt: skip
        error = (velocity.float() - (noise - data)).square()
        (error * weight).mean().backward()
        run.update(nets, optimizers, step)
        nets.zero_grad()
        decay = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(nets.parameters()), 1 - decay)
        losses.append(error.mean().item())
        if (step + 1) % run.every == 0:
            run.log.append((step + 1, round(sum(losses) / len(losses), 4)))
            losses = []
    return ema.eval(), run


# --- what comes out ---------------------------------------------------------------


def tidy(folder):
    """Configs without the paths of this machine."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text())
        config = {k: v for k, v in config.items() if k[0] != "_" or k in ("_class_name", "_diffusers_version")}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def export(vae, nets, wav2vec, target):
    """memo's layout, which is that of a pipeline saved by diffusers too, with audio_proj and wav2vec beside its parts."""
    parts = {name: copy.deepcopy(nets[name]) for name in ("reference_net", "diffusion_net", "image_proj")}
    pipeline = memo.VideoPipeline(vae=copy.deepcopy(vae), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipeline.to(torch.float16).save_pretrained(target)
    copy.deepcopy(nets["audio_proj"]).half().save_pretrained(target / "audio_proj")
    wav2vec.save_pretrained(target / "wav2vec")
    Wav2Vec2FeatureExtractor().save_pretrained(target / "wav2vec")
    tidy(target)


def save_picture(face, path):
    """The face at rest, as a PNG; and as memo reads that: (1, 3, SIZE, SIZE) in [-1, 1]."""
    picture = ((draw(face, {})[0] / 2 + 0.5) * 255).round()
    Image.fromarray(picture.permute(1, 2, 0).to(torch.uint8).numpy()).save(path)
    return picture[None] / 255 * 2 - 1


@torch.no_grad()
def export_voices(wav2vec, sounds, target):
    """The example of two clips, and a held-out voice a row for evaluate.py: what face and sound analysis give."""
    face, item, rng = random_face(random.Random(EXAMPLE_FACE)), sounds[EXAMPLE_SOUND], random.Random(20_000)
    sound = item["sound"][: 2 * CLIP * RATE // FPS]
    write_wave(target / "example.wav", sound)
    example = {
        "pixel_values": save_picture(face, target / "example.png"),
        "face_emb": face_embedding(face),
        "audio_emb": with_neighbours(hear(wav2vec, read_wave(target / "example.wav"))),
        "audio_emotion": torch.full((2 * CLIP,), EMOTIONS["happy"], dtype=torch.int32),
        "num_emotion_classes": torch.tensor(NUM_EMOTIONS, dtype=torch.int32),
    }
    save_file({k: v.contiguous() for k, v in example.items()}, target / "example.safetensors")

    rows = []
    for i, voice in enumerate(HELD_OUT_VOICES):
        item, face = next(s for s in sounds if s["voice"] == voice), random_face(rng)
        window = slice(start := rng.randrange(len(item["opening"]) - VIDEO - 12), start + VIDEO)
        row = {
            "pixel_values": draw(face, {})[0],
            "face_emb": face_embedding(face)[0],
            "audio_emb": with_neighbours(item["states"])[window],
            "opening": item["opening"][window],
        }
        emotion = list(EMOTIONS.values())[i % len(EMOTIONS)]
        rows.append({k: v.half() for k, v in row.items()} | {"audio_emotion": torch.full((VIDEO,), emotion).int()})
    save_file({k: torch.stack([row[k] for row in rows]).contiguous() for k in rows[0]}, target / "voices.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/memo"), help="checkpoints go here")
    parser.add_argument("--output", type=Path, default=HERE, help="where the folders are written")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", FutureWarning)  # memo is written for diffusers 0.31

    if WORKERS > 1:
        dist.init_process_group("gloo")
    vae, vae_run = train_vae(args.work)
    voices = make_voices(args.work) if RANK == 0 else None
    if WORKERS > 1:
        dist.barrier()
    voices = voices or make_voices(args.work)
    wav2vec = build_wav2vec().eval()
    wav2vec.load_state_dict(voices["wav2vec"])
    nets, run = train_nets(make_videos(vae, voices["train"], args.work), args.work)
    if RANK > 0:
        return
    export(vae, nets, wav2vec, args.output)
    export_voices(wav2vec, voices["held out"], args.output)
    pictures = random_pictures(200, random.Random(SEED + 3))
    with torch.no_grad():
        drawn = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in pictures.split(20)])
    log = {"vae_psnr_db": round(psnr(drawn.clamp(-1, 1), pictures), 2)}
    log |= {f"{name}_minutes": round(r.seconds / 60, 1) for name, r in (("vae", vae_run), ("nets", run))}
    log |= {"vae (step, L1, KL, PSNR)": vae_run.log, "nets (step, loss)": run.log}
    (args.output / "training.json").write_text(json.dumps(log) + "\n")
    print({k: v for k, v in log.items() if "(" not in k})


if __name__ == "__main__":
    torch.set_num_threads(1 if WORKERS > 1 else os.cpu_count())
    main()
