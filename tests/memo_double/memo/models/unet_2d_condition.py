import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class UNet2DConditionModel(ModelMixin, ConfigMixin):
    """The reference net: (batch * pictures, channels, height, width) latents to a feature for each layer."""

    @register_to_config
    def __init__(
        self,
        sample_size=None,
        in_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        norm_num_groups=32,
        cross_attention_dim=1280,
        attention_head_dim=8,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        last = len(block_out_channels) - 1
        for i, out in enumerate(block_out_channels):
            before = block_out_channels[max(i - 1, 0)]
            sizes = [(before, out)] + [(out, out)] * (layers_per_block - 1)
            self.down_blocks.append(nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes))
        self.mid_block = nn.Conv2d(out, out, 3, padding=1)
        before = block_out_channels[-1]
        for i in range(last + 1):
            out = block_out_channels[last - i]
            sizes = [(before, out)] + [(out, out)] * layers_per_block
            self.up_blocks.append(nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes))
            before = out

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        cond_tensor=None,
        class_labels=None,
        timestep_cond=None,
        attention_mask=None,
        cross_attention_kwargs=None,
        added_cond_kwargs=None,
        down_block_additional_residuals=None,
        mid_block_additional_residual=None,
        down_intrablock_additional_residuals=None,
        encoder_attention_mask=None,
        return_dict=True,
        post_process=False,
    ):
        def feature(x, name):  # with attention: a list with one (batch, places, channels) for each transformer block
            return [x.flatten(2).mT] if name.startswith("CrossAttn") else x

        shift = encoder_hidden_states.mean()
        features, shapes, x = {"down": [], "mid": [], "up": []}, [], self.conv_in(sample)
        for i, (block, name) in enumerate(zip(self.down_blocks, self.config.down_block_types)):
            own = []
            for conv in block:
                x = torch.tanh(conv(x) + shift)
                own.append(feature(x, name))
            features["down"].append(own)
            shapes.append(x.shape[-2:])
            x = x[..., ::2, ::2] if i < len(self.down_blocks) - 1 else x
        x = torch.tanh(self.mid_block(x) + shift)
        features["mid"].append([feature(x, "CrossAttn")])
        for block, name in zip(self.up_blocks, self.config.up_block_types):
            x, own = nn.functional.interpolate(x, size=shapes.pop()), []
            for conv in block:
                x = torch.tanh(conv(x) + shift)
                own.append(feature(x, name))
            features["up"].append(own)
        return {"ref_features": features} if return_dict else features
