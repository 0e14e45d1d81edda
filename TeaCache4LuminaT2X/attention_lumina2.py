"""flash-attn for Lumina2: without padding, and without repeating the heads of keys and values.

    from TeaCache4LuminaT2X.attention_lumina2 import use_flash_attention
    use_flash_attention(pipeline.transformer)

It needs CUDA, half precision and `pip install flash-attn --no-build-isolation`. It was tested on a CPU with a function
of the same signature in place of flash-attn, and has not been run on a GPU.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb


class FlashProcessor:
    """Attention processor in place of diffusers' `Lumina2AttnProcessor2_0`.

    flash: `flash_attn.flash_attn_varlen_func`, or a function of its signature.
    """

    def __init__(self, flash):
        self.flash = flash

    def __call__(
        self,
        attn,
        hidden_states,  # (batch, tokens, width)
        encoder_hidden_states,
        attention_mask=None,  # (batch, tokens), False for padding; None: no padding
        image_rotary_emb=None,
        base_sequence_length=None,  # for proportional attention, which Lumina2 does not use
    ):
        """Returns (batch, tokens, width); padding comes out as the projection of zeros, which nothing reads."""
        batch, tokens, _ = hidden_states.shape
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # (batch, tokens, heads, head width)
        key = attn.to_k(encoder_hidden_states).unflatten(-1, (-1, query.shape[-1]))  # fewer heads
        value = attn.to_v(encoder_hidden_states).unflatten(-1, (-1, query.shape[-1]))
        dtype = query.dtype
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, use_real=False)
            key = apply_rotary_emb(key, image_rotary_emb, use_real=False)

        # the batch as one row of tokens without padding; `starts` says where each sequence begins
        packed = [x.to(dtype).flatten(0, 1) for x in (query, key, value)]  # (batch * tokens, heads, head width)
        if attention_mask is None:
            starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
        else:
            starts = F.pad(attention_mask.bool().sum(1).cumsum(0), (1, 0)).to(torch.int32)
            index = attention_mask.bool().flatten().nonzero().squeeze(1)
            packed = [x.index_select(0, index) for x in packed]
        # `tokens` as the longest sequence: an upper bound, which need not be read back from the GPU
        out = self.flash(*packed, starts, starts, tokens, tokens, softmax_scale=attn.scale)
        if attention_mask is not None:
            out = out.new_zeros(batch * tokens, *out.shape[1:]).index_copy(0, index, out)
        return attn.to_out[1](attn.to_out[0](out.reshape(batch, tokens, -1)))


def use_flash_attention(transformer, flash=None):
    """Use flash-attn in all attention of a `Lumina2Transformer2DModel`. Raises ImportError without it."""
    if flash is None:
        from flash_attn import flash_attn_varlen_func as flash
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.set_processor(FlashProcessor(flash))
