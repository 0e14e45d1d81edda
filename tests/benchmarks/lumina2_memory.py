"""What Lumina-Image-2.0 needs in memory, by --offload, --dtype and --vae-tiling: counted, without weights or a GPU.

The networks are built in the released sizes with random weights. Counted are the bytes of the tensors that live at
the same time: all weights that an offloading leaves on the device, and the peak of a pass (with one block of each
kind, since a block's tensors are gone before the next begins), of the VAE and of the text encoder. What a GPU needs
besides, its context, its allocator's gaps, the workspace of its kernels, is not in it.

    python tests/benchmarks/lumina2_memory.py              # minutes: one pass at full width on the CPU
    python tests/benchmarks/lumina2_memory.py --tiny       # tries it
"""

import argparse
import json
import platform
import weakref

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, Lumina2Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2Model

from TeaCache4LuminaT2X.options_lumina2 import tile
from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache

TOKENS = 256  # of a caption, as Lumina2Pipeline pads it
LAYERS, REFINERS = 26, 2


def sizes(tiny):
    """Configurations of transformer, VAE and text encoder, all as released but for the number of layers."""
    transformer = dict(sample_size=128, in_channels=16, hidden_size=2304, num_attention_heads=24, num_kv_heads=8)
    transformer |= dict(multiple_of=256, axes_dim_rope=(32, 32, 32), axes_lens=(300, 512, 512), cap_feat_dim=2304)
    vae = dict(in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(128, 256, 512, 512))
    vae |= dict(
        layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4
    )
    vae |= dict(use_quant_conv=False, use_post_quant_conv=False, sample_size=1024)
    text = dict(hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4, head_dim=256)
    text |= dict(vocab_size=256000, num_hidden_layers=26)
    if tiny:
        transformer |= dict(hidden_size=96, num_attention_heads=1, num_kv_heads=1, cap_feat_dim=96)
        vae |= dict(block_out_channels=(32, 32, 32, 32))
        text |= dict(hidden_size=96, intermediate_size=128, vocab_size=1000, num_hidden_layers=2)
    return transformer, vae, text


def parameters(model):
    """All, and the most that a single module holds by itself: what `sequential` moves at once."""
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return sum(p.numel() for p in model.parameters()), max(own)


class Living(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live: `now`, and at most, `peak`."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.known:
                    self.known.add(id(storage))
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, name, size):
        self.known.discard(name)
        self.now -= size


def peak(model, run):
    """The most bytes that tensors other than the model's take while `run()` runs."""
    living = Living()
    living.known = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    kept = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]  # so that no other gets its name
    with torch.no_grad(), living:
        run()
    del kept
    return living.peak


def weights_of(config, dtype):
    """{part: (bytes of all its weights, most of a single module)}."""
    transformer, vae, text = config
    with torch.device("meta"):
        whole = Lumina2Transformer2DModel(**transformer, num_layers=LAYERS, num_refiner_layers=REFINERS)
        models = {"transformer": whole, "vae": AutoencoderKL(**vae), "text_encoder": Gemma2Model(Gemma2Config(**text))}
    size = torch.finfo(dtype).bits // 8
    return {name: tuple(n * size for n in parameters(model)) for name, model in models.items()}


def count(config, dtype, height, width):
    """Bytes of activations by part, the cache of a guided generation, and bytes of weights by part."""
    transformer, vae, text = config
    size, weights = torch.finfo(dtype).bits // 8, weights_of(config, dtype)

    latents = torch.randn(1, 16, height // 8, width // 8, dtype=dtype)
    caption = torch.randn(1, TOKENS, transformer["cap_feat_dim"], dtype=dtype), torch.ones(1, TOKENS, dtype=torch.long)
    torch.set_default_dtype(dtype)
    model = Lumina2Transformer2DModel(**transformer, num_layers=1, num_refiner_layers=1).eval()
    activations = {"transformer": peak(model, lambda: model(latents, torch.tensor([0.5], dtype=dtype), *caption))}
    cache = {}
    for name, settings in {
        "speedup": {"speedup": 2.0},
        "threshold": {"rel_l1_thresh": 0.1},
        "threshold, hold": {"rel_l1_thresh": 0.1, "predict": "hold"},
    }.items():
        apply_teacache(model, 30, **settings)
        with torch.no_grad():
            for time in (0.1, 0.2):
                model(latents, torch.tensor([time], dtype=dtype), *caption)
        (branch,) = model.teacache.branches
        kept = [tensor for _, tensor in branch.computed] + ([] if branch.signal is None else [branch.signal])
        cached = sum(t.numel() * t.element_size() for t in kept)
        missing = settings.get("predict") != "hold" and len(branch.computed) == 1  # a second output, later
        cache[name] = 2 * (cached + missing * latents.numel() * size)  # two passes a step
    with FakeTensorMode():
        latents = torch.randn(1, 16, height // 8, width // 8, dtype=dtype)
        for name, tiling in (("vae", False), ("vae, tiled", True)):
            model = AutoencoderKL(**vae).eval()
            if tiling:
                tile(model)
            activations[name] = peak(model, lambda model=model: model.decode(latents))
        model = Gemma2Model(Gemma2Config(**text)).eval()
        ids = torch.ones(1, TOKENS, dtype=torch.long)
        activations["text_encoder"] = peak(model, lambda: model(ids, output_hidden_states=True, use_cache=False))
    torch.set_default_dtype(torch.float32)
    return activations, cache, weights


def needed(activations, weights, offload, tiled):
    """Bytes on the device at the worst moment: of weights, by the offloading, and of activations."""
    worst = 0
    for name, (own, largest) in weights.items():
        on_device = {"none": sum(w for w, _ in weights.values()), "model": own, "sequential": largest}[offload]
        worst = max(worst, on_device + activations["vae, tiled" if tiled and name == "vae" else name])
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    config, rows, details = sizes(args.tiny), [], []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for height, width in ((1024, 1024), (1024, 1536)):
            activations, cache, weights = count(config, dtype, height, width)
            for offload in ("none", "model", "sequential"):
                both = [needed(activations, weights, offload, tiled) / 2**30 for tiled in (False, True)]
                rows.append((f"{height} x {width}", name, offload, *(round(gib, 1) for gib in both)))
            parts = {"weights": {part: own for part, (own, _) in weights.items()}, "activations": activations}
            details.append({"dtype": name, "height": height, "width": width, **parts, "cache": cache})
    print("| size | --dtype | --offload | GiB | with --vae-tiling |\n|---|---|---|---|---|")
    for size, dtype, offload, plain, tiled in rows:
        print(f"| {size} | {dtype} | {offload} | {plain:.1f} | {tiled:.1f} |")
    print("\n| size | --dtype | cache: --speedup | threshold | threshold, hold |\n|---|---|---|---|---|")
    for d in details:
        mib = " | ".join(f"{d['cache'][k] / 2**20:.1f} MiB" for k in ("speedup", "threshold", "threshold, hold"))
        print(f"| {d['height']} x {d['width']} | {d['dtype']} | {mib} |")
    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({"machine": platform.machine(), **versions, "tiny": args.tiny, "rows": rows, "bytes": details}))


if __name__ == "__main__":
    main()
