"""Train the bundled emoji model: a complete Lumina2Pipeline that fits in a repository.

Four stages. The two that train save checkpoints in --work: stop them whenever you like, run the same command again.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python assets/lumina2-emoji/train.py --emoji package/assets --work runs/emoji

vae          AutoencoderKL, 128 px -> (16, 16, 16) latents, L1 + gradient L1 + KL
transformer  Lumina2Transformer2DModel and its Gemma2 text encoder, jointly, by flow matching
export       diffusers' folder layout beside this file, fp16 safetensors
sheet        assets/emoji_sheet.png: 48 prompts drawn by the exported weights, fixed seeds

Sources: rectified flow with logit-normal timesteps (Esser et al., arXiv 2403.03206), classifier-free
guidance by caption dropout (Ho and Salimans, arXiv 2207.12598), Lumina-Image-2.0 (arXiv 2503.21758).
"""

import argparse
import copy
import json
import math
import random
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

# ------------------------------------------------------------------------------
HERE = Path(__file__).resolve().parent
SIZE = 128  # pixels; latents are SIZE / 8
SEED = 0

VAE_STEPS = 1700
VAE_BATCH = 8
VAE_LR = 4e-3
KL_WEIGHT = 3e-3  # on the mean over latent elements: smooth latents are easier to draw

WIDTH = 192  # of the transformer and of the text encoder
STEPS = 3000
BATCH = 64
LR = 2e-3
WARMUP = 100
EMA = 0.999
CAPTION_DROPOUT = 0.1  # the pipeline's empty negative prompt, so that guidance has something to leave
SPELL = 0.05  # share of words spelled out letter by letter, so that the letters' embeddings are trained too
MAX_TOKENS = 16  # to which captions are padded here; longer ones are not spelled
SHIFT = 2.0  # of the sampling schedule; training timesteps are logit-normal
# ------------------------------------------------------------------------------

SHEET = [  # 48 prompts, 8 a row
    "red apple", "banana", "watermelon", "strawberry", "pineapple", "avocado", "carrot", "hamburger",
    "pizza", "french fries", "doughnut", "birthday cake", "hot beverage", "cupcake", "dog face", "cat face",
    "panda", "fox", "frog", "penguin", "unicorn", "honeybee", "butterfly", "turtle",
    "whale", "elephant", "flamingo", "cactus", "Christmas tree", "sunflower", "rose", "rainbow",
    "smiling face with sunglasses", "face with tears of joy", "smiling face with heart-eyes", "skull", "ghost",
    "robot", "red heart", "thumbs up",
    "soccer ball", "guitar", "rocket", "police car", "house", "castle", "gem stone", "flag of Japan",
]  # fmt: skip


def load_emoji():
    """emoji.txt as a list of (file name, [CLDR name, further captions])."""
    rows = [line.rstrip("\n").split("\t") for line in open(HERE / "emoji.txt", encoding="utf-8")]
    return [(row[0] + ".webp", [row[1], *(row[2].split(", ") if len(row) > 2 else [])]) for row in rows]


def load_images(folder):
    """(n, 3, SIZE, SIZE) in [-1, 1], on white."""
    images = []
    for name, _ in load_emoji():
        rgba = Image.open(Path(folder) / name).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        images.append(np.asarray(white.convert("RGB").resize((SIZE, SIZE), Image.LANCZOS)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- the four parts of the pipeline --------------------------------------------


def build_vae():
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(24, 48, 96, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_tokenizer():
    """Word pieces whose vocabulary is the words of emoji.txt, then letters for all that is not there.

    Lumina2Pipeline sends a system prompt and "<Prompt Start>" before each prompt: the normalizer drops it,
    so "red apple" is <bos> red apple, and the empty negative prompt is <bos>.
    """
    normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"(?m)\A.*<Prompt Start>"), ""),  # (?m): the dot takes line ends too
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^a-z0-9]+"), " "),
        ]
    )
    words = sorted({w for _, names in load_emoji() for n in names for w in normalizer.normalize_str(n).split()})
    extra = "a an the of on with and in emoji picture image photo icon flag cute 3d white background".split()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*letters, *("##" + c for c in letters)]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", *pieces, *extra, *words]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", vocab["<bos>"])])
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=256,
    )


def build_text_encoder(vocab_size):
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,  # the pipeline reads hidden_states[-2]: the last layer is never used
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            query_pre_attn_scalar=48,
            max_position_embeddings=512,
            attn_logit_softcapping=None,  # so that eager and SDPA attention agree
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def build_transformer():
    model = Lumina2Transformer2DModel(
        sample_size=SIZE // 8,
        in_channels=16,
        hidden_size=WIDTH,
        num_layers=12,
        num_refiner_layers=2,
        num_attention_heads=6,
        num_kv_heads=2,
        multiple_of=64,
        ffn_dim_multiplier=2 / 3,
        axes_dim_rope=(8, 12, 12),
        axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH,
    )
    for block in [*model.layers, *model.noise_refiner]:  # adaLN-zero: each block begins as the identity
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.norm_out.linear_2.weight)
    torch.nn.init.zeros_(model.norm_out.linear_2.bias)
    return model


# --- training -------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton-Schulz (K. Jordan, kellerjordan.github.io/posts/muon).

    torch.optim.Muon takes matrices only; this one flattens convolutions to (out, in * height * width). On this
    VAE it reaches in 180 steps what AdamW reaches in 1000.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"]).flatten(1).bfloat16()
                wide = x if x.shape[0] <= x.shape[1] else x.T
                wide = wide / (wide.norm() + 1e-7)
                for _ in range(5):
                    gram = wide @ wide.T
                    wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
                x = wide if x.shape[0] <= x.shape[1] else wide.T
                size = 0.2 * max(x.shape) ** 0.5  # the update's RMS is then AdamW's (Liu et al., arXiv 2502.16982)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.view_as(p).to(p.dtype), alpha=-group["lr"] * size)


class Run:
    """A loop of `steps` that saves what it needs and goes on where it stopped."""

    def __init__(self, path, steps, every=100, **objects):
        self.path, self.steps, self.every, self.objects, self.log, self.start = path, steps, every, objects, [], 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.start, self.log = state["step"], state["log"]
            for name, obj in objects.items():
                obj.load_state_dict(state[name])
            torch.set_rng_state(state["rng"])
            print(f"{path.name}: going on from step {self.start}")

    def save(self, step):
        state = {name: obj.state_dict() for name, obj in self.objects.items()}
        state |= {"step": step, "log": self.log, "rng": torch.get_rng_state()}
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def __iter__(self):
        bar = tqdm(range(self.start, self.steps), initial=self.start, total=self.steps, desc=self.path.stem)
        for step in bar:
            random.seed(SEED * 1_000_003 + step)
            yield step
            if (step + 1) % self.every == 0:
                bar.set_postfix_str(str(self.log[-1][1:]))
            if (step + 1) % (5 * self.every) == 0 or step + 1 == self.steps:
                self.save(step + 1)


def build_optimizers(model, matrices, lr, lr_rest, steps):
    """Muon for `matrices`, AdamW for the rest; each with linear warm-up and cosine decay."""
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon, adamw = Muon(matrices, lr), torch.optim.AdamW(rest, lr_rest, betas=(0.9, 0.95), weight_decay=0.0)

    def factor(step):
        return min(1, (step + 1) / WARMUP) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in (muon, adamw)]
    return {"muon": muon, "adamw": adamw, "muon_lr": schedules[0], "adamw_lr": schedules[1]}


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


def psnr(a, b):
    """dB between images in [-1, 1], a mean over the batch."""
    return (10 * torch.log10(4 / (a - b).square().mean(dim=(1, 2, 3)))).mean().item()


def train_vae(images, work, device):
    torch.manual_seed(SEED)
    vae = build_vae().to(device)
    optimizers = build_optimizers(vae, [p for p in vae.parameters() if p.ndim > 1], VAE_LR, VAE_LR / 2, VAE_STEPS)
    run = Run(work / "vae.pt", VAE_STEPS, vae=vae, **optimizers)
    for step in run:
        x = images[torch.randint(len(images), (VAE_BATCH,))].to(device)
        with autocast(device), sdpa_kernel(SDPBackend.MATH):  # MATH: bf16 flash backward is slow on CPUs
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        l1 = (y - x).abs().mean()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (-1, -2))
        loss = l1 + edges + KL_WEIGHT * kl
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        vae.zero_grad()
        if (step + 1) % run.every == 0:
            run.log.append((step + 1, round(l1.item(), 4), round(kl.item(), 3), round(psnr(y, x), 2)))
    return vae.eval(), run.log


@torch.no_grad()
def encode(vae, images, device):
    """All posterior means (n, 16, SIZE/8, SIZE/8), their mean and 1/std, the reconstruction's PSNR in dB."""
    means, db = [], 0.0
    for x in images.split(16):
        mean = vae.encode(x.to(device)).latent_dist.mean
        db += psnr(vae.decode(mean).sample.clamp(-1, 1).cpu(), x) * len(x)
        means.append(mean.cpu())
    latents = torch.cat(means)
    return latents, latents.mean().item(), 1 / latents.std().item(), db / len(images)


def caption(names):
    """What a user may type for it."""
    name = random.choice([names[0], random.choice(names)])
    if name.startswith("flag of ") and random.random() < 0.5:
        name = name[8:] + " flag"
    article = "an" if name[0].lower() in "aeiou" else "a"
    forms = [name] * 6 + [f"{article} {name}", f"the {name}", f"{name} emoji", f"an emoji of {article} {name}"]
    forms += [f"a picture of {article} {name}", f"a photo of {article} {name}", f"cute {name}", f"{name} icon"]
    words = random.choice(forms).split()
    spelled = [w if random.random() > SPELL else "\0".join(w) for w in words]
    fits = len(spelled) + sum(w.count("\0") for w in spelled) < MAX_TOKENS
    return " ".join(spelled if fits else words)


class Tokens:
    """Captions to padded ids, through the pipeline's own tokenizer; a word with NULs is spelled by letters."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}

    def word(self, word):
        if word not in self.known:
            if "\0" in word:
                letters = [c for part in word.split("\0") for c in self.tokenizer.tokenize(part)]
                ids = self.tokenizer.convert_tokens_to_ids([letters[0], *("##" + c for c in letters[1:])])
            else:
                ids = self.tokenizer(word, add_special_tokens=False).input_ids
            self.known[word] = ids
        return self.known[word]

    def __call__(self, captions):
        rows = [[self.tokenizer.bos_token_id, *(i for w in c.split() for i in self.word(w))] for c in captions]
        longest = max(MAX_TOKENS, *map(len, rows))
        ids = torch.tensor([r + [self.tokenizer.pad_token_id] * (longest - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
        return ids, mask


def train_transformer(latents, work, device):
    """Rectified flow: x_t = t data + (1 - t) noise, the model's output is data - noise (t = 1 is the picture)."""
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    tokens, names = Tokens(tokenizer), [n for _, n in load_emoji()]
    model = torch.nn.ModuleDict({"encoder": build_text_encoder(len(tokenizer)), "dit": build_transformer()}).to(device)
    # complex64 instead of complex128: faster, and as good for training
    rope = model.dit.rope_embedder
    rope.freqs_cis = [f.to(device, torch.complex64) for f in rope.freqs_cis]
    ema = copy.deepcopy(model).requires_grad_(False)
    torch._dynamo.config.cache_size_limit = 64
    for block in [*model.dit.layers, *model.dit.noise_refiner, *model.dit.context_refiner]:
        block.compile(dynamic=True)  # 1.8 times as fast on a CPU
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and ("layers." in n or "refiner." in n)]
    optimizers = build_optimizers(model, blocks, LR, LR / 2, STEPS)
    run = Run(work / "transformer.pt", STEPS, model=model, ema=ema, **optimizers)
    losses = []
    for step in run:
        index = torch.randint(len(latents), (BATCH,))
        x1 = latents[index].to(device)
        captions = ["" if random.random() < CAPTION_DROPOUT else caption(names[i]) for i in index]
        ids, mask = (t.to(device) for t in tokens(captions))
        noise = torch.randn_like(x1)
        t = torch.sigmoid(torch.randn(BATCH, device=device))
        xt = torch.lerp(noise, x1, t[:, None, None, None])
        with autocast(device), sdpa_kernel(SDPBackend.MATH):
            text = model.encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
            v = model.dit(xt, t, text, mask, return_dict=False)[0]
        loss = F.mse_loss(v.float(), x1 - noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        model.zero_grad()
        decay = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % run.every == 0:
            run.log.append((step + 1, round(sum(losses) / len(losses), 4)))
            losses = []
    return ema.eval(), tokenizer, run.log


# --- what comes out -------------------------------------------------------------


def tidy(folder):
    """Configs without the paths of this machine, and with the names that transformers 4 and 5 both know."""
    for file in folder.rglob("*.json"):
        if file.name == "tokenizer.json":
            continue
        config = json.loads(file.read_text())
        config = {k: v for k, v in config.items() if k[0] != "_" or k in ("_class_name", "_diffusers_version")}
        if file.name == "model_index.json":
            config["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
        if file.name == "tokenizer_config.json":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if file.parent.name == "text_encoder" and file.name == "config.json":
            # else transformers 5 loads the text encoder in fp16 while diffusers loads the rest in float32
            config["dtype"] = config["torch_dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def export(vae, model, tokenizer, shift, scale, target):
    vae = copy.deepcopy(vae).cpu()
    vae.register_to_config(shift_factor=round(shift, 6), scaling_factor=round(scale, 6))
    pipeline = Lumina2Pipeline(
        transformer=copy.deepcopy(model["dit"]).cpu(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=copy.deepcopy(model["encoder"]).cpu(),
        tokenizer=tokenizer,
    )
    pipeline.to(torch.float16).save_pretrained(target)
    tidy(target)


def draw_sheet(folder, path):
    pipeline = Lumina2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    sheet = Image.new("RGB", (8 * (SIZE + 12), 6 * (SIZE + 34)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, prompt in enumerate(tqdm(SHEET, desc="sheet")):
        picture = pipeline(prompt, generator=torch.Generator().manual_seed(i)).images[0]
        x, y = i % 8 * (SIZE + 12) + 6, i // 8 * (SIZE + 34) + 4
        sheet.paste(picture, (x, y))
        words = textwrap.fill(prompt, 20)
        pen.multiline_text((x + SIZE // 2, y + SIZE + 14), words, fill="black", anchor="mm", align="center", spacing=1)
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder of the 256 px webp files")
    parser.add_argument("--work", type=Path, default=Path("runs/emoji"), help="checkpoints go here")
    parser.add_argument("--output", type=Path, default=HERE, help="where the pipeline's folders are written")
    parser.add_argument("--sheet", type=Path, default=HERE.parent / "emoji_sheet.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device, began = torch.device(args.device), time.perf_counter()

    images = load_images(args.emoji)
    vae, vae_log = train_vae(images, args.work, device)
    latents, shift, scale, db = encode(vae, images, device)
    print(f"VAE: {db:.2f} dB on {len(images)} emoji, latents of mean {shift:.3f} and std {1 / scale:.3f}")
    model, tokenizer, log = train_transformer((latents - shift) * scale, args.work, device)
    print(f"transformer: loss {log[0][1]} -> {log[-1][1]}")
    export(vae, model, tokenizer, shift, scale, args.output)
    losses = {"vae_psnr_db": round(db, 2), "vae (step, L1, KL, PSNR)": vae_log, "transformer (step, loss)": log}
    (args.output / "training.json").write_text(json.dumps(losses) + "\n")
    draw_sheet(args.output, args.sheet)
    print(f"{time.perf_counter() - began:.0f} s on {device}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
