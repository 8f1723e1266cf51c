"""diffusers' own pipelines and multistep schedulers on a backbone's networks, noise and schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from backends import initial_noise, quiet  # noqa: F401  isort: skip
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FluxPipeline, UniPCMultistepScheduler  # isort: skip
from backends.diffusers_pipeline import PipelineBackend

SCHEDULERS = {"dpmpp": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
SPACINGS = {  # of an eps-model's times; "leading" is what Stable Diffusion 1.5's own configuration says
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
}


@dataclass(frozen=True)
class DiffusersBaseline:
    """diffusers' pipeline with one of its schedulers: `steps` network calls from the noise of seeds, to noise
    level 0.
    """

    backend: PipelineBackend
    scheduler: str
    spacing: str
    steps: int
    guidance: float

    @staticmethod
    def spacings(backend: PipelineBackend) -> list[str]:
        """The choices of times that a backbone has."""
        return ["flow"] if backend.noise_schedule is None else list(SPACINGS)

    @cached_property
    def name(self) -> str:
        return f"{type(self.pipe).__name__}, {type(self.pipe.scheduler).__name__}"

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """A pipeline of the backbone's networks, with order 2 and all else as the scheduler has it by
        default.
        """
        backend = self.backend
        options = SPACINGS.get(self.spacing)
        if options is None:
            shift = backend.flow_shift if backend.flow_mu is None else math.exp(backend.flow_mu)
            options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        scheduler = SCHEDULERS[self.scheduler].from_config(backend.pipe.scheduler.config, **options)
        parts = backend.pipe.components | {"scheduler": scheduler}
        if "safety_checker" in parts:
            parts["requires_safety_checker"] = False
        pipe = type(backend.pipe)(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def noise_scale(self) -> float:
        """Of the first state: that of a variance-preserving process for an eps-model, worked out once, apart
        from what is timed.
        """
        if self.backend.noise_schedule is None:
            return 1.0
        self.pipe.scheduler.set_timesteps(self.steps)
        first = self.pipe.scheduler.sigmas[0].item()
        return first / math.hypot(1, first)

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        """The backbone's own starting noise, as the pipeline wants it."""
        noise = self.noise_scale * initial_noise(seeds, self.backend.latent_shape)
        if isinstance(self.pipe, FluxPipeline):
            noise = FluxPipeline._pack_latents(noise, len(noise), *self.backend.latent_shape)
        return noise.to(self.backend.device, self.backend.dtype)

    def _run(self, prompts: Sequence[str], seeds: Sequence[int], output: str) -> Tensor:
        pixels = self.backend.latent_shape[1] * self.backend.pipe.vae_scale_factor
        options = {
            "height": pixels,
            "width": pixels,
            "guidance_scale": self.guidance,
            "output_type": output,
        }
        if "max_sequence_length" in self.backend.config:
            options["max_sequence_length"] = self.backend.config["max_sequence_length"]
        with torch.inference_mode():  # as ours are run
            return self.pipe(
                list(prompts), num_inference_steps=self.steps, latents=self._noise(seeds), **options
            ).images

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of B prompts and seeds."""
        return self._run(prompts, seeds, "pt")

    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Final latents [B, C, H, W] of B prompts and seeds."""
        latents = self._run(prompts, seeds, "latent")
        if isinstance(self.pipe, FluxPipeline):
            factor = self.pipe.vae_scale_factor
            pixels = self.backend.latent_shape[1] * factor
            latents = FluxPipeline._unpack_latents(latents, pixels, pixels, factor)
        return latents.float()
