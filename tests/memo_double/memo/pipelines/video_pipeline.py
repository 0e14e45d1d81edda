from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class VideoPipelineOutput(BaseOutput):
    videos: torch.Tensor


class VideoPipeline(DiffusionPipeline):
    def __init__(self, vae, reference_net, diffusion_net, image_proj, scheduler):
        super().__init__()
        parts = {"vae": vae, "reference_net": reference_net, "diffusion_net": diffusion_net}
        self.register_modules(**parts, scheduler=scheduler, image_proj=image_proj)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.ref_image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_convert_rgb=True)

    @torch.no_grad()
    def __call__(
        self,
        ref_image,
        face_emb,
        audio_tensor,
        width,
        height,
        video_length,
        num_inference_steps,
        guidance_scale,
        num_images_per_prompt=1,
        eta=0.0,
        audio_emotion=None,
        emotion_class_num=None,
        generator=None,
        output_type="tensor",
        return_dict=True,
        is_new_audio=True,
        callback=None,
        callback_steps=1,
    ):
        guided = guidance_scale > 1.0
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        face_emb = face_emb.to(self.image_proj.device, self.image_proj.dtype)
        face, no_face = self.image_proj(face_emb), self.image_proj(torch.zeros_like(face_emb))
        face = torch.cat([no_face, face]) if guided else face
        if guided:
            audio_tensor = torch.cat([torch.zeros_like(audio_tensor), audio_tensor])
            audio_tensor = audio_tensor.to(dtype=self.diffusion_net.dtype, device=self.diffusion_net.device)

        channels, factor = self.diffusion_net.config.in_channels, self.vae_scale_factor
        shape = (1, channels, video_length, height // factor, width // factor)
        latents = randn_tensor(shape, generator=generator, device=self.device, dtype=face_emb.dtype)
        pictures = self.ref_image_processor.preprocess(ref_image.flatten(0, 1), height=height, width=width)
        pictures = pictures.to(dtype=self.vae.dtype, device=self.vae.device)
        pictures = torch.cat([self.vae.encode(p[None]).latent_dist.mean for p in pictures]) * 0.18215

        ref_features = None
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if i == 0:
                ref_features = self.reference_net(
                    pictures.repeat(1 + guided, 1, 1, 1),
                    torch.zeros_like(t),
                    encoder_hidden_states=face,
                    return_dict=False,
                )
            audio_emotion = torch.tensor(torch.mode(audio_emotion).values.item()).to(torch.int)
            uc_mask = None
            if guided:
                none = torch.full_like(audio_emotion, emotion_class_num)
                audio_emotion = torch.stack([none, audio_emotion])
                uc_mask = torch.tensor([1] * 16 + [0] * 16).bool()  # memo writes 16, whatever video_length
            velocity = self.diffusion_net(
                torch.cat([latents] * (1 + guided)),
                ref_features,
                t,
                encoder_hidden_states=face,
                audio_embedding=audio_tensor,
                audio_emotion=audio_emotion,
                uc_mask=uc_mask,
                is_new_audio=is_new_audio,
                update_past_memory=i == 0,
            ).sample
            if guided:
                without, with_face = velocity.chunk(2)
                velocity = without + guidance_scale * (with_face - without)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
            if callback is not None and i % callback_steps == 0:
                callback(i, t, latents)

        frames = (latents / 0.18215).transpose(1, 2).flatten(0, 1)
        video = torch.cat([self.vae.decode(frame[None]).sample for frame in frames])
        video = (video / 2 + 0.5).clamp(0, 1).unflatten(0, (1, -1)).transpose(1, 2).float()
        return VideoPipelineOutput(videos=video) if return_dict else video
