"""Stable Diffusion 3: any diffusers folder or hub id of StableDiffusion3Pipeline, with or without its T5 encoder."""

import torch
from torch import Tensor

from solvers import flowmatch

from . import quiet  # noqa: F401  isort: skip
from diffusers import StableDiffusion3Pipeline  # isort: skip
from .base import Backend, BackendError, Condition, guide, per_points
from .pipelines import COMMON_OPTIONS, EmbeddingCache, check_options, checked_resolution, load_pipeline, place

DEFAULT_MODEL = "stabilityai/stable-diffusion-3-medium-diffusers"
OPTIONS = COMMON_OPTIONS | {
    "negative_prompt": (str, "what guidance moves away from"),
    "max_sequence_length": (int, "tokens of the T5 encoder"),
}
IMAGE_OPTIONS = ("variant", "resolution", "negative_prompt", "max_sequence_length")


class SD3(Backend):
    """Rectified flow (Esser et al. 2024, arXiv 2403.03206): the network's output is the velocity dx/dsigma itself.

    It sees x and the time 1000 sigma in float32; guidance is one doubled batch [negative, positive].
    """

    default_schedule, default_guidance = "flowmatch", 4.5

    def __init__(self, pipe: StableDiffusion3Pipeline, device: torch.device, config: dict, name: str = "sd3"):
        self.name, self.device, self.config, self.pipe = name, torch.device(device), config, pipe
        self.dtype = pipe.transformer.dtype
        place(pipe, self.device, config)
        network = pipe.transformer.config
        factor, own = pipe.vae_scale_factor, network.sample_size * pipe.vae_scale_factor
        pixels = checked_resolution(config, own, factor * network.patch_size, (512, 1024) if own >= 1024 else (own,))
        self.latent_shape = (network.in_channels, *[pixels // factor] * 2)
        if pipe.scheduler.config.use_dynamic_shifting:
            raise BackendError(
                "the scheduler shifts times dynamically, which Stable Diffusion 3 does not; expected use_dynamic_shifting false"
            )
        self.flow_shift = float(pipe.scheduler.config.shift)
        self.sigma_max, self.sigma_min = flowmatch(2, shift=self.flow_shift).tolist()
        self._embeddings = EmbeddingCache(self._embed)

    def identity(self):
        return "embedded" if self.name == "digits" else self.config["model_name_or_path"] + revision(self.config)

    def image_options(self):
        return {k: self.config[k] for k in IMAGE_OPTIONS if k in self.config}

    def networks(self):
        parts = {"transformer": self.pipe.transformer}
        return parts | {k: v for k, v in self.pipe.components.items() if k.startswith("text_encoder") and v is not None}

    def checkpoint_blocks(self):
        self.pipe.transformer.enable_gradient_checkpointing()

    def _embed(self, prompt: str) -> dict[str, Tensor]:
        length = self.config.get("max_sequence_length", 256)
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"text": text, "pooled": pooled}

    def encode(self, prompts, guidance_scale):
        negative = None if guidance_scale == 1 else self._embeddings(self.config.get("negative_prompt", ""))
        return Condition(self._embeddings.stacked(prompts), negative, guidance_scale)

    def velocity(self, condition):
        batches: dict[int, dict[str, Tensor]] = {}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            told = per_points(condition, len(x), batches)
            inputs, times = x.to(self.dtype), (1000 * sigma).float().to(x.device).expand(len(x))
            if condition.negative is not None:
                inputs, times = torch.cat([inputs, inputs]), torch.cat([times, times])
            found = self.pipe.transformer(
                hidden_states=inputs,
                timestep=times,
                encoder_hidden_states=told["text"],
                pooled_projections=told["pooled"],
                return_dict=False,
            )
            return guide(found[0], condition)

        return velocity

    def decode(self, latents, chunk: int = 8):
        return decode_shifted(self.pipe.vae, latents, chunk)


def decode_shifted(vae, latents: Tensor, chunk: int) -> Tensor:
    """Images in [0, 1] of latents that were shifted and scaled, as those of SD3 and FLUX are; a few at a time."""
    images = []
    for part in latents.split(chunk):
        scaled = part / vae.config.scaling_factor + vae.config.shift_factor
        images.append(vae.decode(scaled.to(vae.dtype)).sample.float())
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def revision(config: dict) -> str:
    """The revision of a hub id, as the end of its name."""
    return f"@{config['revision']}" if config.get("revision") else ""


def load(config: dict, device: torch.device, dtype: torch.dtype, name: str = "sd3") -> SD3:
    """Load a Stable Diffusion 3 pipeline; a third text encoder may be absent."""
    check_options(config, OPTIONS)
    config = {"model_name_or_path": DEFAULT_MODEL} | config
    pipe = load_pipeline(StableDiffusion3Pipeline, config, dtype, "a Stable Diffusion 3 pipeline", **absent_parts(config))
    return SD3(pipe, device, config, name)


def absent_parts(config: dict) -> dict:
    """Parts that the folder's index says are absent, which from_pretrained wants to be told."""
    import json
    from pathlib import Path

    index = Path(config["model_name_or_path"]).expanduser() / "model_index.json"
    try:
        parts = json.loads(index.read_text()) if index.is_file() else {}
    except ValueError:
        return {}  # from_pretrained says what is wrong with it
    return {k: None for k, v in parts.items() if v == [None, None]} if isinstance(parts, dict) else {}
