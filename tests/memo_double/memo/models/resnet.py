import torch.nn.functional as F
from torch import nn


def each_frame(layer, x):
    """A layer for (batch, channels, height, width) on each frame of (batch, channels, frames, height, width)."""
    frames = x.shape[2]
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)


class InflatedConv3d(nn.Conv2d):
    def forward(self, x):
        return each_frame(super().forward, x)


class InflatedGroupNorm(nn.GroupNorm):
    def forward(self, x):
        return each_frame(super().forward, x)


class ResnetBlock3D(nn.Module):
    def __init__(self, in_channels, out_channels, temb_channels, groups):
        super().__init__()
        self.norm = InflatedGroupNorm(groups, in_channels)
        self.conv = InflatedConv3d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.shortcut = InflatedConv3d(in_channels, out_channels, 1)

    def forward(self, input_tensor, temb):
        temb = self.time_emb_proj(F.silu(temb))  # (batch, channels), or (batch, frames, channels)
        temb = temb.transpose(1, 2) if temb.ndim == 3 else temb[:, :, None]
        return self.shortcut(input_tensor) + F.silu(self.conv(self.norm(input_tensor)) + temb[..., None, None])
