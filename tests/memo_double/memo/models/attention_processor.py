import torch
from diffusers.models.attention_processor import Attention  # noqa: F401  (memo has its own copy under this name)


class MemoryLinearAttnProcessor:
    """Linear attention over frames, with a decayed sum over past frames: KV (batch, dim, dim) and Z (batch, 1, dim)."""

    def __init__(self):
        self.decay = 0.9
        self.reset_memory_state()

    def reset_memory_state(self):
        self.memory = {"KV": None, "Z": None}

    def __call__(
        self,
        attn,
        hidden_states,
        motion_frames,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
        is_new_audio=True,
        update_past_memory=False,
        *args,
        **kwargs,
    ):
        if is_new_audio:
            self.reset_memory_state()
        query = attn.head_to_batch_dim(attn.to_q(hidden_states)).softmax(-1) * attn.scale
        key = attn.head_to_batch_dim(attn.to_k(hidden_states)).softmax(-2)
        value = attn.head_to_batch_dim(attn.to_v(hidden_states))
        if is_new_audio or update_past_memory:
            with torch.no_grad():
                past_key = attn.head_to_batch_dim(attn.to_k(motion_frames)).softmax(-2)  # (batch, frames, dim)
                past_value = attn.head_to_batch_dim(attn.to_v(motion_frames))
                frames = past_key.shape[1]
                weight = self.decay ** torch.arange(frames - 1, -1, -1, dtype=past_key.dtype)[:, None]
                new = {"KV": (past_key * weight).mT @ (past_value * weight), "Z": (past_key * weight).sum(1, True)}
                for name, old in self.memory.items():
                    self.memory[name] = new[name] if old is None else old * self.decay**frames + new[name]
        kv = self.decay * self.memory["KV"] + key.mT @ value
        z = self.decay * self.memory["Z"] + key.sum(-2, keepdim=True)
        heard = (query @ kv) / (query @ z.mT).clamp(min=1e-10)
        return attn.to_out[0](attn.batch_to_head_dim(heard))
