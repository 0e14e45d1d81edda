import torch
from diffusers import ConfigMixin, ModelMixin


class ImageProjModel(ModelMixin, ConfigMixin):
    """Face embedding (batch, clip_embeddings_dim) to tokens. Like memo's, it does not register its arguments."""

    def __init__(self, cross_attention_dim=768, clip_embeddings_dim=512, clip_extra_context_tokens=4):
        super().__init__()
        self.tokens = clip_extra_context_tokens
        self.proj = torch.nn.Linear(clip_embeddings_dim, clip_extra_context_tokens * cross_attention_dim)

    def forward(self, image_embeds):
        return self.proj(image_embeds).unflatten(-1, (self.tokens, -1))
