"""`teacache_lumina2.py --attention`: Lumina2's attention without repeated heads and without padding.

Lumina2 has fewer heads for keys and values than for queries (8 for 24 in the released model), and diffusers repeats
them up to the queries' number before each attention. Here they stay as they are:

    sdpa   the default: torch's scaled_dot_product_attention with `enable_gqa`, where a fast kernel takes that; where
           none does, they are repeated, as in diffusers
    flash  flash_attn_varlen_func of flash-attn: in a batch of unequal prompts, padding is not attended at all

`flash` needs CUDA and half precision; it is tested on a CPU through a function of the same signature, and a test that
runs the real one is skipped where flash-attn is missing. It has not been run on a GPU here.

    from TeaCache4LuminaT2X.attention_lumina2 import set_attention
    set_attention(pipeline.transformer, "sdpa")
"""

import importlib

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb


class GroupedAttention:
    """Processor for the `Attention` modules of diffusers' Lumina2, in place of `Lumina2AttnProcessor2_0`.

    flash: None for torch's own attention, or `flash_attn.flash_attn_varlen_func`, or a function of its signature.
    """

    def __init__(self, flash=None):
        self.flash = flash

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states,
        attention_mask=None,
        image_rotary_emb=None,
        base_sequence_length=None,
    ):
        """(batch, tokens, width) to the same. attention_mask: (batch, tokens), False for padding; None: there is none.

        With `flash`, padded tokens come out as the output projection of zeros: nothing reads them.
        """
        if base_sequence_length is not None:
            raise NotImplementedError("proportional attention: Lumina2 does not use it")
        # (batch, tokens, heads, width of a head), with fewer heads for keys and values
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        key = attn.to_k(encoder_hidden_states).unflatten(-1, (-1, query.shape[-1]))
        value = attn.to_v(encoder_hidden_states).unflatten(-1, (-1, query.shape[-1]))
        dtype = query.dtype
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, use_real=False)
            key = apply_rotary_emb(key, image_rotary_emb, use_real=False)
        attend = grouped_sdpa if self.flash is None else self.varlen
        hidden = attend(query.to(dtype), key.to(dtype), value, attention_mask, attn.scale)
        return attn.to_out[1](attn.to_out[0](hidden.flatten(2)))

    def varlen(self, query, key, value, mask, scale):
        """The batch as one row of tokens, padding left out; `cumulative` says where each sequence begins and ends."""
        batch, tokens = query.shape[:2]
        packed = [x.flatten(0, 1) for x in (query, key, value)]  # (tokens of all, heads, width of a head)
        if mask is None:
            cumulative = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
        else:
            mask = mask.bool()
            cumulative = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
            index = mask.flatten().nonzero().squeeze(1)  # the one thing that waits for the GPU
            packed = [x.index_select(0, index) for x in packed]
        # the longest sequence may be said too long: `tokens` need not be read back
        out = self.flash(*packed, cumulative, cumulative, tokens, tokens, softmax_scale=scale)
        if mask is not None:
            out = out.new_zeros(batch * tokens, *out.shape[1:]).index_copy(0, index, out)
        return out.unflatten(0, (batch, tokens))


def grouped_sdpa(query, key, value, mask, scale):
    """torch's attention, (batch, tokens, heads, width of a head) in and out; bit for bit that of repeated heads."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if mask is None else mask.bool()[:, None, None]
    grouped = is_served(query, key, value, mask)
    if not grouped:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    hidden = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return hidden.transpose(1, 2)


def is_served(query, key, value, mask):
    """Whether a fast kernel takes fewer heads for keys and values; another would give way to one that is slow."""
    if query.is_cuda:
        given = torch.backends.cuda.SDPAParams(query, key, value, mask, 0.0, False, True)
        return torch.backends.cuda.can_use_flash_attention(given)
    return query.device.type == "cpu"


def check_attention(kind, device, dtype):
    """ValueError with what to do where this kind of attention cannot run."""
    if kind != "flash":
        return
    if device != "cuda" or not torch.cuda.is_available():
        raise ValueError("--attention flash needs a CUDA GPU, and torch sees none: leave it out")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError("--attention flash needs half precision: --dtype bfloat16")
    if torch.cuda.get_device_capability() < (8, 0):
        raise ValueError("--attention flash needs a GPU of NVIDIA's Ampere generation or newer: leave it out")
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:  # missing, or built for another torch
        raise ValueError(
            f"--attention flash needs flash-attn ({error}): pip install flash-attn --no-build-isolation"
        ) from None


def set_attention(transformer, kind):
    """Give all attention of a `Lumina2Transformer2DModel` this kind, "sdpa" or "flash"; None leaves it as it is.

    Raises ImportError where flash-attn cannot be imported. Returns the model.
    """
    if kind is not None:
        flash = importlib.import_module("flash_attn").flash_attn_varlen_func if kind == "flash" else None
        for module in transformer.modules():
            if isinstance(module, Attention):
                module.set_processor(GroupedAttention(flash))
    return transformer
