"""Attention without repeated heads and without padding, held to diffusers' own."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import GPUS, ROOT
from lumina_models import conditioning, denoise, tiny_model

from TeaCache4LuminaT2X import attention_lumina2
from TeaCache4LuminaT2X.attention_lumina2 import GroupedAttention, check_attention, set_attention
from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache

BATCHES = {"one": [5], "equal": [6, 6], "unequal": [3, 7, 5]}


class Reference:
    """flash_attn_varlen_func, the part of its signature that is used, sequence by sequence with torch's attention."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None):
        self.calls.append((q.shape, k.shape, cu_seqlens_q.tolist(), max_seqlen_q))
        assert q.dtype == k.dtype == v.dtype and k.shape == v.shape
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        bounds = cu_seqlens_q.tolist()
        assert bounds[0] == 0 and bounds[-1] == len(q) == len(k), "all tokens, each in one sequence"
        out = torch.full_like(q, torch.nan)
        for start, end in zip(bounds, bounds[1:]):
            assert 0 < end - start <= max_seqlen_q
            query, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))
            key, value = (x.repeat_interleave(len(query) // len(key), dim=0) for x in (key, value))
            attended = F.scaled_dot_product_attention(query, key, value, scale=softmax_scale)
            out[start:end] = attended.transpose(0, 1)
        return out


def grouped_model(dtype=torch.float32):
    """Two groups of two heads, and a scale that is not the one by which functions go without it."""
    model = tiny_model(hidden_size=32, num_attention_heads=4, num_kv_heads=2).to(dtype)
    for layer in model.layers:
        layer.attn.scale = 0.5
    return model


def use(model, flash):
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(GroupedAttention(flash))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("grouped", [True, False])
def test_sdpa_is_bit_for_bit_the_stock_attention(lengths, dtype, grouped, monkeypatch):
    model, cond = grouped_model(dtype), conditioning(lengths, dtype=dtype)
    stock = denoise(model, cond, steps=2)[0]
    heads, attend = set(), F.scaled_dot_product_attention

    def watch(query, key, value, **kwargs):
        heads.add((query.shape[1], key.shape[1], value.shape[1]))
        return attend(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(attention_lumina2, "is_served", lambda *_: grouped)
    assert set_attention(model, "sdpa") is model
    ours = denoise(model, cond, steps=2)[0]
    assert all(torch.equal(a, b) for a, b in zip(stock, ours))
    assert heads == {(4, 2, 2) if grouped else (4, 4, 4)}, "keys and values stay two heads where that is served"


def test_on_a_cpu_grouped_heads_are_served():
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    assert attention_lumina2.is_served(query, key, key, None)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_flash_is_the_stock_attention(lengths):
    model, cond, flash = grouped_model(), conditioning(lengths), Reference()
    stock = denoise(model, cond, steps=2)[0]
    use(model, flash)
    ours = denoise(model, cond, steps=2)[0]
    for a, b in zip(stock, ours):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    patches = 4
    assert {(q[1], k[1]) for q, k, *_ in flash.calls} == {(4, 2)}, "heads as they are"
    tokens = {q[0] for q, *_ in flash.calls}
    # context refiner: captions without padding; noise refiner: pictures; blocks: both, without padding
    assert tokens == {sum(lengths), len(lengths) * patches, sum(lengths) + len(lengths) * patches}
    bounds = {tuple(bounds) for *_, bounds, _ in flash.calls}
    ends = [sum(lengths[:i]) + i * patches for i in range(len(lengths) + 1)]
    assert tuple(ends) in bounds


def test_flash_in_a_generation_with_teacache():
    """Skips and all: same schedule, and close to what the stock attention gives."""
    model, cond, uncond = grouped_model(), conditioning([5, 3]), conditioning([2, 4], seed=1)
    apply_teacache(model, 8, 0.1, [1.0, 0.0])
    stock = denoise(model, cond, uncond)[0]
    schedule = model.teacache.schedule
    use(model, Reference())
    ours = denoise(model, cond, uncond)[0]
    assert model.teacache.schedule == schedule and False in schedule
    for a, b in zip(stock, ours):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_proportional_attention_is_refused():
    model = tiny_model()
    x = torch.randn(1, 3, 24)
    with pytest.raises(NotImplementedError):
        GroupedAttention()(model.layers[0].attn, x, x, base_sequence_length=3)


@pytest.mark.parametrize(
    "device, dtype, capability, there, says",
    [
        ("cpu", torch.bfloat16, (9, 0), True, "CUDA GPU"),
        ("mps", torch.bfloat16, (9, 0), True, "CUDA GPU"),
        ("cuda", torch.float32, (9, 0), True, "--dtype bfloat16"),
        ("cuda", torch.float16, (7, 5), True, "Ampere"),
        ("cuda", torch.bfloat16, (8, 0), False, "undefined symbol.*pip install flash-attn"),
        ("cuda", torch.float16, (8, 0), True, None),
    ],
)
def test_flash_where_it_cannot_run(device, dtype, capability, there, says, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    (tmp_path / "flash_attn.py").write_text("" if there else "raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    check_attention("sdpa", device, dtype)
    if says is None:
        check_attention("flash", device, dtype)
        del sys.modules["flash_attn"]
        return
    with pytest.raises(ValueError, match=says):
        check_attention("flash", device, dtype)
    sys.modules.pop("flash_attn", None)


def test_none_leaves_the_models_own():
    model = tiny_model()
    before = [m.processor for m in model.modules() if hasattr(m, "processor")]
    set_attention(model, None)
    assert before == [m.processor for m in model.modules() if hasattr(m, "processor")] and before


ON_A_GPU = """
import torch
from flash_attn import flash_attn_varlen_func
from lumina_models import conditioning, denoise, tiny_model
from TeaCache4LuminaT2X.attention_lumina2 import set_attention
import lumina_models
model = tiny_model(hidden_size=256, num_attention_heads=4, num_kv_heads=2, axes_dim_rope=(32, 16, 16)).to("cuda", torch.bfloat16)
latents = torch.randn(2, 4, 8, 8, device="cuda", dtype=torch.bfloat16)
embeds, mask = (x.to("cuda") for x in conditioning([3, 7], dtype=torch.bfloat16))
call = lambda: model(latents, torch.tensor([0.3, 0.3], device="cuda").bfloat16(), embeds, mask).sample.float()
with torch.no_grad():
    stock = call()
    grouped = set_attention(model, "sdpa") and call()
    flash = set_attention(model, "flash") and call()
for ours in (grouped, flash):
    assert (ours - stock).abs().mean() < 0.02 * stock.abs().mean(), (ours - stock).abs().mean()
"""


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_flash_on_a_gpu():
    """In a process of its own, which sees the GPUs that this one hides."""
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | GPUS
    ask = [sys.executable, "-c", "import torch; exit(not torch.cuda.is_available())"]
    if subprocess.run(ask, env=env).returncode:
        pytest.skip("no CUDA GPU")
    run = subprocess.run([sys.executable, "-c", ON_A_GPU], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
