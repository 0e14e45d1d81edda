"""attention_lumina2.py: flash-attn's way, held to diffusers' own attention, with a function of its signature."""

import sys

import pytest
import torch
import torch.nn.functional as F
from lumina_models import conditioning, denoise, tiny_model
from machines import IDENTITY

from TeaCache4LuminaT2X.attention_lumina2 import FlashProcessor, use_flash_attention
from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache

BATCHES = {"one": [5], "equal": [6, 6], "unequal": [3, 7, 5]}


class Reference:
    """flash_attn_varlen_func, the part of its signature that is used, sequence by sequence with torch's attention."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None):
        self.calls.append((q.shape, k.shape, cu_seqlens_q.tolist()))
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


def close(ours, stock, rtol):
    return all((a.float() - b.float()).abs().max() <= rtol * b.float().abs().max() for a, b in zip(ours, stock))


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_it_is_the_stock_attention(lengths, dtype, rtol):
    """Fewer heads of keys and values as they are, and no padding."""
    model, cond, flash = grouped_model(dtype), conditioning(lengths, dtype=dtype), Reference()
    stock = denoise(model, cond, steps=2)[0]
    use_flash_attention(model, flash)
    assert all(isinstance(layer.attn.processor, FlashProcessor) for layer in model.layers)
    assert close(denoise(model, cond, steps=2)[0], stock, rtol)
    assert {(q[1], k[1]) for q, k, _ in flash.calls} == {(4, 2)} and len(flash.calls) == 2 * 4
    # context refiner: captions without padding; noise refiner: pictures of 4 patches; blocks: both, without padding
    pictures = 4 * len(lengths)
    assert {q[0] for q, *_ in flash.calls} == {sum(lengths), pictures, sum(lengths) + pictures}
    ends = [sum(lengths[:i]) + 4 * i for i in range(len(lengths) + 1)]
    assert ends in [bounds for *_, bounds in flash.calls]


@pytest.mark.parametrize("way", [dict(rel_l1_thresh=0.1), dict(computed_steps=4)], ids=str)
def test_with_teacache(way):
    """Skips and all: the same schedule, and close to what the stock attention gives."""
    model, cond, uncond = grouped_model(), conditioning([5, 3]), conditioning([2, 4], seed=1)
    apply_teacache(model, 8, coefficients=IDENTITY, **way)
    stock = denoise(model, cond, uncond)[0]
    schedule = model.teacache.schedule
    use_flash_attention(model, Reference())
    ours = denoise(model, cond, uncond)[0]
    assert model.teacache.schedule == schedule and False in schedule and close(ours, stock, 1e-3)


def test_without_flash_attn(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    before = [layer.attn.processor for layer in model.layers]
    with pytest.raises(ImportError):
        use_flash_attention(model)
    assert before == [layer.attn.processor for layer in model.layers]
