"""Stable Diffusion XL: any diffusers folder, hub id or single checkpoint file of StableDiffusionXLPipeline.

SSD-1B and Playground v2.5 are of the same class; Playground has EDM's preconditioning instead of betas.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import quiet  # noqa: F401  isort: skip
from diffusers import (  # isort: skip
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    StableDiffusionXLPipeline,
)
from .base import BackendError
from .diffusers_pipeline import check_combinations
from .family import Family, Size
from .ldm import LDM
from .ldm import OPTIONS as LDM_OPTIONS
from .loading import PipelineClass, absent_parts, load_pipeline
from .model_ids import MODELS

OPTIONS = LDM_OPTIONS | {
    "negative_prompt": (str, "what guidance moves away from; by default zeros where the pipeline has those")
}
EDM = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)


class SDXL(LDM):
    """An eps- or v-prediction U-Net with two text encoders, pooled embeddings and sizes as inputs (Podell et
    al. 2023, arXiv 2307.01952).

    In EDM's preconditioning (Karras et al. 2022) with the data's standard deviation d, the input is
    x / sqrt(sigma^2 + d^2), the time log(sigma) / 4, and D = c_skip x + c_out F(input).
    """

    default_guidance = 5.0

    def __init__(
        self, pipe: StableDiffusionXLPipeline, device: torch.device, config: dict, name: str = "sdxl"
    ):
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)  # its activations are above the largest float16
        super().__init__(pipe, device, config, name)
        height, width = (n * pipe.vae_scale_factor for n in self.latent_shape[1:])
        size = (height, width)  # of the original image, after cropping at (0, 0), and of the target
        self._sizes = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device)

    def set_noise_levels(self) -> None:
        """Those of the scheduler's training schedule, or of EDM's."""
        scheduler = self.pipe.scheduler
        self.sigma_data = float(scheduler.config.sigma_data) if isinstance(scheduler, EDM) else None
        if self.sigma_data is None:
            super().set_noise_levels()
            return
        self.noise_schedule, self.default_schedule = None, "polynomial"
        self.sigma_min, self.sigma_max = scheduler.config.sigma_min, scheduler.config.sigma_max

    def embed(self, prompt: str) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def unconditional(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        if "negative_prompt" in self.config or not self.pipe.config.force_zeros_for_empty_prompt:
            return super().unconditional(prompts)
        return {k: torch.zeros_like(v) for k, v in self._embeddings.stacked(prompts[:1]).items()}

    def timesteps(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """The scale of the input, the time and the noise level of rows [rows]."""
        if self.sigma_data is None:
            return super().timesteps(sigma)
        scale, t = (self.sigma_data**2 + sigma**2).rsqrt(), sigma.log() / 4
        return scale.float().view(-1, 1, 1, 1), t.float(), sigma.float().view(-1, 1, 1, 1)

    def conditioning(self, embeddings: dict[str, Tensor]) -> dict[str, Any]:
        sizes = self._sizes.expand(len(embeddings["text"]), -1)
        added = {"text_embeds": embeddings["pooled"], "time_ids": sizes}
        return super().conditioning(embeddings) | {"added_cond_kwargs": added}

    def velocity_of(self, output: Tensor, x: Tensor, scale: Tensor, sigma: Tensor) -> Tensor:
        if self.sigma_data is None:
            return super().velocity_of(output, x, scale, sigma)
        sign = 1 if self.prediction == "v_prediction" else -1
        return scale * (sigma * scale * x + sign * self.sigma_data * output)  # (x - D) / sigma

    def unscaled(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae.config
        if vae.latents_mean is None or vae.latents_std is None:
            return super().unscaled(latents)
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (vae.latents_mean, vae.latents_std))
        return latents * std / vae.scaling_factor + mean


def load(config: dict, device: torch.device, dtype: torch.dtype, name: str = "sdxl") -> SDXL:
    """Load a Stable Diffusion XL pipeline; missing or gated weights: BackendError with the remedy."""
    config = {"model_name_or_path": MODELS["sdxl"]} | config
    wanted = PipelineClass(StableDiffusionXLPipeline, "a Stable Diffusion XL pipeline")
    pipe = load_pipeline(wanted, config, dtype, absent_parts(config))
    check_parts(pipe, config["model_name_or_path"])
    return SDXL(pipe, device, config, name)


def check_parts(pipe: StableDiffusionXLPipeline, model: str) -> None:
    """Refuse the refiner, networks of inpainting, and those that take the guidance scale as an input."""
    unet, wrong = pipe.unet.config, None
    if pipe.text_encoder is None or pipe.text_encoder_2 is None:
        wrong = "it has one text encoder instead of two, as Stable Diffusion 1 and the refiner have"
    elif unet.in_channels != pipe.vae.config.latent_channels:
        channels = unet.in_channels, pipe.vae.config.latent_channels
        wrong = "latent channels {} of the U-Net but {} of the VAE".format(*channels)
    elif unet.time_cond_proj_dim is not None:
        wrong = "its U-Net takes the guidance scale as an input, as those of latent consistency models do"
    elif not isinstance(pipe.scheduler, EDM) and "beta_start" not in pipe.scheduler.config:
        wrong = f"its scheduler {type(pipe.scheduler).__name__} has neither betas nor EDM's preconditioning"
    if wrong:
        raise BackendError(f"model {model!r} is not a Stable Diffusion XL text-to-image pipeline: {wrong}")


FAMILY = Family(
    "sdxl",
    SDXL,
    load,
    OPTIONS,
    Size(1024, 4, 2.57, 0.12 + 0.69, 12.0, 2.0, 0.4, 77 * 2048 + 1280),
    check_combinations,
)
