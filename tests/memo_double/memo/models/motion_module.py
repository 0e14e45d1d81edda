import torch
import xformers  # noqa: F401  (memo imports it whether or not it is used)
import xformers.ops  # noqa: F401
from diffusers.models.attention_processor import Attention
from torch import nn

from .attention_processor import MemoryLinearAttnProcessor  # noqa: F401


class MemoryLinearAttention(Attention):
    """Its processor is diffusers' default, with which a call is a TypeError, until MemoryLinearAttnProcessor is set."""

    def forward(
        self,
        hidden_states,
        motion_frames,
        encoder_hidden_states=None,
        attention_mask=None,
        video_length=None,
        n_motion_frames=None,
        is_new_audio=True,
        update_past_memory=False,
        **cross_attention_kwargs,
    ):
        def by_place(x, frames):  # (batch * frames, places, channels) -> (batch * places, frames, channels)
            return x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)

        places = hidden_states.shape[1]
        output = self.processor(
            self,
            by_place(hidden_states, video_length),
            by_place(motion_frames, n_motion_frames),
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            n_motion_frames=n_motion_frames,
            is_new_audio=is_new_audio,
            update_past_memory=update_past_memory,
        )
        return by_place(output, places)


class MemoryLinearAttnTemporalModule(nn.Module):
    """(batch, channels, frames, height, width) features in and out."""

    def __init__(self, in_channels, num_attention_heads=8, **kwargs):
        super().__init__()
        heads = {"heads": num_attention_heads, "dim_head": in_channels // num_attention_heads}
        self.temporal_transformer = nn.Module()
        self.temporal_transformer.norm = nn.LayerNorm(in_channels)
        self.temporal_transformer.attention = MemoryLinearAttention(in_channels, **heads)

    def forward(self, hidden_states, motion_frames, encoder_hidden_states, is_new_audio=True, update_past_memory=False):
        def flat(x):  # (batch * frames, places, channels)
            return x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)

        batch, channels, frames, height, width = hidden_states.shape
        norm, attention = self.temporal_transformer.norm, self.temporal_transformer.attention
        with torch.no_grad():
            past = norm(flat(motion_frames))
        output = attention(
            norm(flat(hidden_states)),
            past,
            video_length=frames,
            n_motion_frames=motion_frames.shape[2],
            is_new_audio=is_new_audio,
            update_past_memory=update_past_memory,
        )
        return hidden_states + output.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
