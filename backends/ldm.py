"""Stable Diffusion 1.x and 2.x: any diffusers folder, hub id or single checkpoint file."""

from typing import Any

import torch
from torch import Tensor

from solvers import NoiseSchedule
from solvers.solver import Velocity

from . import quiet  # noqa: F401  isort: skip
from diffusers import StableDiffusionPipeline  # isort: skip
from .base import BackendError
from .conditioning import Condition, apply_cfg, repeat_condition
from .diffusers_pipeline import COMMON_OPTIONS, PipelineBackend, check_combinations, checked_size
from .family import Family, Size
from .loading import PipelineClass, load_pipeline
from .model_ids import MODELS

OPTIONS = COMMON_OPTIONS | {
    "config": (str, "folder or hub id with the configuration of a single file"),
    "negative_prompt": (str, "what guidance moves away from"),
}


class LDM(PipelineBackend):
    """An eps- or v-prediction latent diffusion U-Net in the variance-exploding convention x = x0 + sigma eps.

    The network sees x / sqrt(1 + sigma^2) at the continuous time T t(sigma) - 1 in float32; its eps is the
    velocity.
    """

    NETWORK = "unet"
    IMAGE_OPTIONS = ("config", "variant", "resolution", "negative_prompt")

    def __init__(self, pipe: StableDiffusionPipeline, device: torch.device, config: dict, name: str = "ldm"):
        self.prediction = pipe.scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise BackendError(
                f"prediction_type {self.prediction!r} of the scheduler: expected epsilon or v_prediction"
            )
        super().__init__(pipe, device, config, name)
        self.set_noise_levels()
        factor = pipe.vae_scale_factor
        height, width = checked_size(config, pipe.unet.config.sample_size * factor, factor)
        self.latent_shape = (pipe.unet.config.in_channels, height // factor, width // factor)

    def set_noise_levels(self) -> None:
        """The noise levels of the scheduler's training schedule."""
        self.noise_schedule = NoiseSchedule(self.pipe.scheduler.alphas_cumprod)
        self.sigma_min, self.sigma_max = self.noise_schedule.sigma_min, self.noise_schedule.sigma_max

    def embed(self, prompt: str) -> dict[str, Tensor]:
        return {"text": self.pipe.encode_prompt(prompt, self.device, 1, False)[0]}

    def timesteps(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """The scale of the input, the time and the noise level of rows [rows]."""
        assert self.noise_schedule is not None  # set_noise_levels has made it
        t = len(self.noise_schedule.times) * self.noise_schedule.t(sigma) - 1
        scale = (1 + sigma**2).rsqrt()
        return scale.float().view(-1, 1, 1, 1), t.float(), sigma.float().view(-1, 1, 1, 1)

    def conditioning(self, embeddings: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of the network that depend on the prompts, for the embeddings of all rows."""
        return {"encoder_hidden_states": embeddings["text"]}

    def velocity_of(self, output: Tensor, x: Tensor, scale: Tensor, sigma: Tensor) -> Tensor:
        """dx/dsigma of the network's output after guidance, for a scale of its input."""
        return scale * (output + sigma * scale * x) if self.prediction == "v_prediction" else output

    def velocity(self, condition: Condition) -> Velocity:
        self.offload_text_encoders()
        batches: dict[int, dict[str, Tensor]] = {}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            embeddings = repeat_condition(condition, len(x), batches)
            scale, t, sigma = self._timesteps(sigma, len(x))
            inputs = (x * scale).to(self.dtype)
            if condition.negative is not None:
                inputs, t = torch.cat([inputs, inputs]), torch.cat([t, t])
            with self.compiling():
                output = self.network(inputs, t, **self.conditioning(embeddings)).sample
            return self.velocity_of(apply_cfg(output, condition), x, scale, sigma)

        return velocity


def load(config: dict, device: torch.device, dtype: torch.dtype, name: str = "ldm") -> LDM:
    """Load a Stable Diffusion 1.x or 2.x pipeline; missing or gated weights: BackendError with the remedy."""
    config = {"model_name_or_path": MODELS["ldm"]} | config
    parts = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    wanted = PipelineClass(StableDiffusionPipeline, "a Stable Diffusion 1.x/2.x pipeline")
    pipe = load_pipeline(wanted, config, dtype, parts)
    check_parts(pipe, config["model_name_or_path"])
    return LDM(pipe, device, config, name)


def check_parts(pipe: StableDiffusionPipeline, model: str) -> None:
    """Refuse networks of inpainting and SDXL, and a tokenizer without its files, all of which load."""
    unet, tokens = pipe.unet.config, len(pipe.tokenizer)
    pairs = {
        "latent channels": (unet.in_channels, pipe.vae.config.latent_channels),
        "text width": (unet.cross_attention_dim, pipe.text_encoder.config.hidden_size),
    }
    wrong = [f"{name} {a} of the U-Net but {b} of its other part" for name, (a, b) in pairs.items() if a != b]
    if tokens < 512:  # each byte, inside and at the end of a word
        wrong.append(f"a tokenizer of {tokens} words, whose files are missing")
    if wrong:
        raise BackendError(
            f"model {model!r} is not a Stable Diffusion 1.x/2.x text-to-image pipeline: {'; '.join(wrong)}"
        )


FAMILY = Family(
    "ldm", LDM, load, OPTIONS, Size(512, 4, 0.86, 0.12, 2.5, 0.5, 0.1, 77 * 768), check_combinations
)
