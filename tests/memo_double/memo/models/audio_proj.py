import torch
from diffusers import ConfigMixin, ModelMixin


class AudioProjModel(ModelMixin, ConfigMixin):
    """(batch, frames, window, blocks, channels) to (batch, frames, context_tokens, output_dim)."""

    def __init__(self, seq_len=5, blocks=12, channels=768, intermediate_dim=512, output_dim=768, context_tokens=32):
        super().__init__()
        self.tokens = context_tokens
        self.proj = torch.nn.Linear(seq_len * blocks * channels, context_tokens * output_dim)

    def forward(self, audio_embeds):
        return self.proj(audio_embeds.flatten(2)).unflatten(-1, (self.tokens, -1))
