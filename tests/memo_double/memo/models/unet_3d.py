from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .resnet import InflatedConv3d, InflatedGroupNorm
from .unet_3d_blocks import CrossAttnDownBlock3D, CrossAttnUpBlock3D, DownBlock3D, UNetMidBlock3DCrossAttn, UpBlock3D


@dataclass
class UNet3DConditionOutput(BaseOutput):
    sample: torch.FloatTensor


class UNet3DConditionModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self,
        sample_size=None,
        in_channels=8,
        out_channels=8,
        flip_sin_to_cos=True,
        freq_shift=0,
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        mid_block_type="UNetMidBlock3DCrossAttn",
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        only_cross_attention=False,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        downsample_padding=1,
        mid_block_scale_factor=1,
        act_fn="silu",
        norm_num_groups=32,
        norm_eps=1e-5,
        cross_attention_dim=1280,
        attention_head_dim=8,
        dual_cross_attention=False,
        use_linear_projection=False,
        class_embed_type=None,
        num_class_embeds=None,
        upcast_attention=False,
        resnet_time_scale_shift="default",
        use_inflated_groupnorm=False,
        motion_module_resolutions=(1, 2, 4, 8),
        motion_module_kwargs=None,
        unet_use_cross_frame_attention=None,
        unet_use_temporal_attention=None,
        audio_attention_dim=768,
        emo_drop_rate=0.3,
    ):
        super().__init__()
        channels, layers = tuple(block_out_channels), layers_per_block
        dims = {"temb_channels": 4 * channels[0], "groups": norm_num_groups, "motion": motion_module_kwargs}
        dims |= {"cross_attention_dim": cross_attention_dim, "audio_attention_dim": audio_attention_dim}
        last = len(channels) - 1

        self.conv_in = InflatedConv3d(in_channels, channels[0], 3, padding=1)
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        self.class_embedding = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, 4 * channels[0])

        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]  # channels of each skip connection
        for i, name in enumerate(down_block_types):
            sizes = [(channels[max(i - 1, 0)], channels[i])] + [(channels[i], channels[i])] * (layers - 1)
            block = {"CrossAttnDownBlock3D": CrossAttnDownBlock3D, "DownBlock3D": DownBlock3D}[name]
            crossing = block is CrossAttnDownBlock3D
            self.down_blocks.append(block(sizes, add_downsample=i < last, crossing=crossing, **dims))
            skips += [channels[i]] * (layers + (i < last))
        self.mid_block = UNetMidBlock3DCrossAttn([(channels[-1], channels[-1])], **dims)

        self.up_blocks, self.num_upsamplers = nn.ModuleList(), last
        hidden = channels[-1]
        for i, name in enumerate(up_block_types):
            out, sizes = channels[last - i], []
            for _ in range(layers + 1):
                sizes.append((hidden + skips.pop(), out))
                hidden = out
            block = {"CrossAttnUpBlock3D": CrossAttnUpBlock3D, "UpBlock3D": UpBlock3D}[name]
            crossing = block is CrossAttnUpBlock3D
            self.up_blocks.append(block(sizes, add_upsample=i < last, crossing=crossing, last=i == last, **dims))

        norm = InflatedGroupNorm if use_inflated_groupnorm else nn.GroupNorm
        self.conv_norm_out = norm(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = InflatedConv3d(channels[0], out_channels, 3, padding=1)

    def forward(
        self,
        sample,
        ref_features,
        timestep,
        encoder_hidden_states,
        audio_embedding=None,
        audio_emotion=None,
        class_labels=None,
        mask_cond_fea=None,
        attention_mask=None,
        down_block_additional_residuals=None,
        mid_block_additional_residual=None,
        uc_mask=None,
        return_dict=True,
        is_new_audio=True,
        update_past_memory=False,
    ):
        factor = 2**self.num_upsamplers
        fit = sample.shape[-2] % factor or sample.shape[-1] % factor
        if attention_mask is not None:
            attention_mask = (1 - attention_mask.to(sample.dtype)) * -10000.0
            attention_mask = attention_mask.unsqueeze(1)
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

        def project(t):
            if not torch.is_tensor(t):
                t = torch.tensor([t], dtype=torch.float64 if isinstance(timestep, float) else torch.int64)
            return self.time_proj((t[None] if t.ndim == 0 else t).expand(sample.shape[0]))

        if isinstance(timestep, list):
            t_emb = torch.stack([project(t) for t in timestep], dim=1)
        else:
            t_emb = project(timestep)
        emb = self.time_embedding(t_emb.to(dtype=self.dtype))
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("class_labels should be provided")
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels)
            emb = emb + self.class_embedding(class_labels).to(dtype=self.dtype)

        sample = self.conv_in(sample)
        if mask_cond_fea is not None:
            sample = sample + mask_cond_fea

        memory = {"is_new_audio": is_new_audio, "update_past_memory": update_past_memory}
        for_all = {"temb": emb, "encoder_hidden_states": encoder_hidden_states, **memory}
        crossing = {"attention_mask": attention_mask, "emotion": audio_emotion, "uc_mask": uc_mask}
        skips = (sample,)
        for i, block in enumerate(self.down_blocks):
            features = ref_features["down"][i]
            if hasattr(block, "has_cross_attention") and block.has_cross_attention:
                sample, outputs, audio_embedding = block(
                    hidden_states=sample,
                    ref_feature_list=features,
                    audio_embedding=audio_embedding,
                    **for_all,
                    **crossing,
                )
            else:
                sample, outputs = block(hidden_states=sample, ref_feature_list=features, **for_all)
            skips += outputs
        if down_block_additional_residuals is not None:
            skips = tuple(a + b for a, b in zip(skips, down_block_additional_residuals))

        features = ref_features["mid"][0]
        sample, audio_embedding = self.mid_block(
            sample, ref_feature_list=features, audio_embedding=audio_embedding, **for_all, **crossing
        )
        if mid_block_additional_residual is not None:
            sample = sample + mid_block_additional_residual

        upsample_size = None
        for i, block in enumerate(self.up_blocks):
            features, count = ref_features["up"][i], len(block.resnets)
            own, skips = skips[-count:], skips[:-count]
            if fit and i != len(self.up_blocks) - 1:
                upsample_size = skips[-1].shape[2:]
            given = {"hidden_states": sample, "res_hidden_states_tuple": own, "upsample_size": upsample_size}
            if hasattr(block, "has_cross_attention") and block.has_cross_attention:
                sample, audio_embedding = block(
                    ref_feature_list=features, audio_embedding=audio_embedding, **given, **for_all, **crossing
                )
            else:
                sample = block(ref_feature_list=features, **given, **for_all)

        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        return UNet3DConditionOutput(sample=sample) if return_dict else (sample,)
