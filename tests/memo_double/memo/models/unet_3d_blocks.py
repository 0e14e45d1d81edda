import torch
import torch.nn.functional as F
from torch import nn

from .motion_module import MemoryLinearAttnTemporalModule
from .resnet import InflatedConv3d, ResnetBlock3D


def flat(x):
    """(batch, channels, frames, height, width) -> (batch * frames, places, channels)."""
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)


class Transformer3DModel(nn.Module):
    """Attention to the portrait, (batch, places, channels), and to the face embedding, on each frame."""

    def __init__(self, channels, cross_attention_dim):
        super().__init__()
        self.norm, self.face = nn.LayerNorm(channels), nn.Linear(cross_attention_dim, channels)

    def forward(self, hidden_states, ref_img_feature, encoder_hidden_states, uc_mask, return_dict):
        batch, channels, frames, height, width = hidden_states.shape
        x = self.norm(flat(hidden_states))
        portrait = torch.cat([x, ref_img_feature.repeat(frames, 1, 1)], dim=1)
        seen = F.scaled_dot_product_attention(x, portrait, portrait)
        if uc_mask is not None:
            seen = torch.where(uc_mask[:, None, None], F.scaled_dot_product_attention(x, x, x), seen)
        face = self.face(encoder_hidden_states).repeat_interleave(frames, dim=0)
        seen = seen + F.scaled_dot_product_attention(x, face, face)
        return hidden_states + seen.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


class AudioModule(nn.Module):
    """Features hear the audio tokens, (batch, frames, tokens, channels), and these see the features."""

    def __init__(self, channels, audio_attention_dim, last):
        super().__init__()
        self.emotion = nn.Embedding(10, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))
        self.hear, self.see = nn.Linear(audio_attention_dim, channels), nn.Linear(channels, audio_attention_dim)
        self.last = last

    def forward(self, hidden_states, ref_img_feature, encoder_hidden_states, attention_mask, return_dict, emotion):
        batch, channels, frames, height, width = hidden_states.shape
        shift, scale = self.adaLN_modulation(self.emotion(emotion)).chunk(2, dim=1)  # (batch, channels) each
        shift, scale = (m.expand(batch, -1).repeat_interleave(frames, dim=0)[:, None] for m in (shift, scale))
        if encoder_hidden_states.dim() == 4:
            encoder_hidden_states = encoder_hidden_states.flatten(0, 1)
        x, audio = flat(hidden_states) * (1 + scale) + shift, self.hear(encoder_hidden_states)
        heard = F.scaled_dot_product_attention(x, audio, audio)
        if attention_mask is not None:
            heard = heard + F.scaled_dot_product_attention(x, x, x, attention_mask)
        seen = self.see(F.scaled_dot_product_attention(audio, x, x))
        hidden_states = hidden_states + heard.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
        return hidden_states, None if self.last else encoder_hidden_states + seen


class Layer(nn.Module):
    """What all blocks are made of; `crossing` blocks have attention to portrait and audio."""

    def build(self, sizes, temb_channels, groups, crossing, motion, cross_attention_dim, audio_attention_dim, last):
        self.resnets = nn.ModuleList(ResnetBlock3D(a, b, temb_channels, groups) for a, b in sizes)
        outs = [b for _, b in sizes]
        self.motion_modules = nn.ModuleList(MemoryLinearAttnTemporalModule(b, **motion) for b in outs)
        if crossing:
            self.has_cross_attention = True
            self.attentions = nn.ModuleList(Transformer3DModel(b, cross_attention_dim) for b in outs)
            lasts = [last and i == len(outs) - 1 for i in range(len(outs))]
            self.audio_modules = nn.ModuleList(AudioModule(b, audio_attention_dim, x) for b, x in zip(outs, lasts))

    def layer(self, i, hidden, feature, audio, resnet_last=False, **given):
        crossing = hasattr(self, "attentions")
        if crossing:  # (batch * pictures, places, channels), one for each transformer block
            height, width = hidden.shape[-2:]
            feature = feature[0].unflatten(1, (height, width)).permute(0, 3, 1, 2)
        feature = feature.unflatten(0, (len(hidden), -1)).transpose(1, 2)  # (batch, channels, portrait + past, ...)
        portrait, past = feature[:, :, :1], feature[:, :, 1:]
        if not resnet_last:
            hidden = self.resnets[i](hidden, given["temb"])
        if crossing:
            face, uc_mask = given["encoder_hidden_states"], given["uc_mask"]
            mask, emotion = given["attention_mask"], given["emotion"]
            hidden = self.attentions[i](hidden, flat(portrait), face, uc_mask, False)
            hidden, audio = self.audio_modules[i](hidden, None, audio, mask, False, emotion)
        news = {name: given[name] for name in ("is_new_audio", "update_past_memory")}
        hidden = self.motion_modules[i](hidden, past.to(hidden), given["encoder_hidden_states"], **news)
        if resnet_last:
            hidden = self.resnets[i + 1](hidden, given["temb"])
        return hidden, audio


class DownBlock3D(Layer):
    def __init__(self, sizes, add_downsample, crossing=False, **kwargs):
        super().__init__()
        self.build(sizes, crossing=crossing, last=False, **kwargs)
        out = sizes[-1][1]
        self.downsamplers = nn.ModuleList([InflatedConv3d(out, out, 3, 2, 1)]) if add_downsample else None

    def down(self, hidden_states, ref_feature_list, audio, **given):
        outputs = ()
        for i in range(len(self.resnets)):
            hidden_states, audio = self.layer(i, hidden_states, ref_feature_list[i], audio, **given)
            outputs += (hidden_states,)
        for downsampler in self.downsamplers or ():
            hidden_states = downsampler(hidden_states)
            outputs += (hidden_states,)
        return hidden_states, outputs, audio

    def forward(
        self,
        hidden_states,
        ref_feature_list,
        temb=None,
        encoder_hidden_states=None,
        is_new_audio=True,
        update_past_memory=False,
    ):
        given = {"temb": temb, "encoder_hidden_states": encoder_hidden_states}
        news = {"is_new_audio": is_new_audio, "update_past_memory": update_past_memory}
        return self.down(hidden_states, ref_feature_list, None, **given, **news)[:2]


class CrossAttnDownBlock3D(DownBlock3D):
    def forward(
        self,
        hidden_states,
        ref_feature_list,
        temb=None,
        encoder_hidden_states=None,
        attention_mask=None,
        audio_embedding=None,
        emotion=None,
        uc_mask=None,
        is_new_audio=True,
        update_past_memory=False,
    ):
        given = {"temb": temb, "encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        news = {"is_new_audio": is_new_audio, "update_past_memory": update_past_memory}
        given |= {"emotion": emotion, "uc_mask": uc_mask, **news}
        return self.down(hidden_states, ref_feature_list, audio_embedding, **given)


class UNetMidBlock3DCrossAttn(Layer):
    def __init__(self, sizes, **kwargs):
        super().__init__()
        self.build(sizes, crossing=True, last=False, **kwargs)
        self.resnets.append(ResnetBlock3D(*sizes[-1], kwargs["temb_channels"], kwargs["groups"]))

    def forward(
        self,
        hidden_states,
        ref_feature_list,
        temb=None,
        encoder_hidden_states=None,
        attention_mask=None,
        audio_embedding=None,
        emotion=None,
        uc_mask=None,
        is_new_audio=True,
        update_past_memory=False,
    ):
        given = {"temb": temb, "encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        news = {"is_new_audio": is_new_audio, "update_past_memory": update_past_memory}
        given |= {"emotion": emotion, "uc_mask": uc_mask, **news}
        hidden_states = self.resnets[0](hidden_states, temb)
        return self.layer(0, hidden_states, ref_feature_list[0], audio_embedding, resnet_last=True, **given)


class UpBlock3D(Layer):
    def __init__(self, sizes, add_upsample, crossing=False, last=False, **kwargs):
        super().__init__()
        self.build(sizes, crossing=crossing, last=last, **kwargs)
        out = sizes[-1][1]
        self.upsamplers = nn.ModuleList([InflatedConv3d(out, out, 3, padding=1)]) if add_upsample else None

    def up(self, hidden_states, ref_feature_list, res_hidden_states_tuple, upsample_size, audio, **given):
        for i, skip in enumerate(reversed(res_hidden_states_tuple)):
            hidden_states = torch.cat([hidden_states, skip], dim=1)
            hidden_states, audio = self.layer(i, hidden_states, ref_feature_list[i], audio, **given)
        for upsampler in self.upsamplers or ():
            size = {"scale_factor": (1.0, 2.0, 2.0)} if upsample_size is None else {"size": upsample_size}
            hidden_states = upsampler(F.interpolate(hidden_states.float(), **size).to(hidden_states.dtype))
        return hidden_states, audio

    def forward(
        self,
        hidden_states,
        ref_feature_list,
        res_hidden_states_tuple,
        temb=None,
        upsample_size=None,
        encoder_hidden_states=None,
        is_new_audio=True,
        update_past_memory=False,
    ):
        given = {"temb": temb, "encoder_hidden_states": encoder_hidden_states}
        news = {"is_new_audio": is_new_audio, "update_past_memory": update_past_memory}
        skips = res_hidden_states_tuple
        return self.up(hidden_states, ref_feature_list, skips, upsample_size, None, **given, **news)[0]


class CrossAttnUpBlock3D(UpBlock3D):
    def forward(
        self,
        hidden_states,
        ref_feature_list,
        res_hidden_states_tuple,
        temb=None,
        encoder_hidden_states=None,
        upsample_size=None,
        attention_mask=None,
        audio_embedding=None,
        emotion=None,
        uc_mask=None,
        is_new_audio=True,
        update_past_memory=False,
    ):
        given = {"temb": temb, "encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        news = {"is_new_audio": is_new_audio, "update_past_memory": update_past_memory}
        given |= {"emotion": emotion, "uc_mask": uc_mask, **news}
        skips = res_hidden_states_tuple
        return self.up(hidden_states, ref_feature_list, skips, upsample_size, audio_embedding, **given)
