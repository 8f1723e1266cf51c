"""Stable Diffusion 3: any diffusers folder or hub id of StableDiffusion3Pipeline, with or without its T5
encoder.
"""

import torch
from torch import Tensor

from solvers import flowmatch

from . import quiet  # noqa: F401  isort: skip
from diffusers import StableDiffusion3Pipeline  # isort: skip
from .base import BackendError
from .conditioning import Condition, apply_cfg, repeat_condition
from .diffusers_pipeline import (
    COMMON_OPTIONS,
    EmbeddingCache,
    PipelineBackend,
    absent_parts,
    check_combinations,
    checked_resolution,
    load_pipeline,
    place,
)
from .family import Family, Size
from .model_ids import MODELS
from .timesteps import TimestepCache, flow_timesteps

OPTIONS = COMMON_OPTIONS | {
    "negative_prompt": (str, "what guidance moves away from"),
    "max_sequence_length": (int, "tokens of the T5 encoder"),
    "text_encoder_3": (bool, "false: without the T5 encoder, which is most of the weights"),
}


class SD3(PipelineBackend):
    """Rectified flow (Esser et al. 2024, arXiv 2403.03206): the network's output is the velocity dx/dsigma
    itself.

    It sees x and the time 1000 sigma in float32; guidance is one doubled batch [negative, positive].
    """

    default_schedule, default_guidance = "flowmatch", 4.5
    IMAGE_OPTIONS = ("variant", "resolution", "negative_prompt", "max_sequence_length", "text_encoder_3")

    def __init__(self, pipe: StableDiffusion3Pipeline, device: torch.device, config: dict, name: str = "sd3"):
        self.name, self.device, self.config, self.pipe = name, torch.device(device), config, pipe
        self.dtype = pipe.transformer.dtype
        place(pipe, pipe.transformer, self.device, config)
        network = pipe.transformer.config
        factor, own = pipe.vae_scale_factor, network.sample_size * pipe.vae_scale_factor
        pixels = checked_resolution(
            config, own, factor * network.patch_size, (512, 1024) if own >= 1024 else (own,)
        )
        self.latent_shape = (network.in_channels, *[pixels // factor] * 2)
        if pipe.scheduler.config.use_dynamic_shifting:
            raise BackendError(
                "the scheduler shifts times dynamically, which Stable Diffusion 3 does not; expected"
                " use_dynamic_shifting false"
            )
        self.flow_shift = float(pipe.scheduler.config.shift)
        self.sigma_max, self.sigma_min = flowmatch(2, shift=self.flow_shift).tolist()
        self._timesteps = TimestepCache(flow_timesteps, self.device)
        self._embeddings = EmbeddingCache(self._embed, self.device)

    def networks(self):
        parts = {"transformer": self.pipe.transformer}
        return parts | {
            k: v for k, v in self.pipe.components.items() if k.startswith("text_encoder") and v is not None
        }

    def checkpoint_blocks(self):
        self.pipe.transformer.enable_gradient_checkpointing()

    def _embed(self, prompt: str) -> dict[str, Tensor]:
        length = self.config.get("max_sequence_length", 256)
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompt,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        return {"text": text, "pooled": pooled}

    def encode(self, prompts, guidance_scale):
        negative = (
            None
            if guidance_scale == 1
            else self._embeddings.stacked([self.config.get("negative_prompt", "")])
        )
        return Condition(self._embeddings.stacked(prompts), negative, guidance_scale)

    def velocity(self, condition):
        self.offload_text_encoders()
        batches: dict[int, dict[str, Tensor]] = {}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            told = repeat_condition(condition, len(x), batches)
            inputs, (times,) = x.to(self.dtype), self._timesteps(sigma, len(x))
            if condition.negative is not None:
                inputs, times = torch.cat([inputs, inputs]), torch.cat([times, times])
            with self.compiling():
                found = self.pipe.transformer(
                    hidden_states=inputs,
                    timestep=times,
                    encoder_hidden_states=told["text"],
                    pooled_projections=told["pooled"],
                    return_dict=False,
                )
            return apply_cfg(found[0], condition)

        return velocity


def load(config: dict, device: torch.device, dtype: torch.dtype, name: str = "sd3") -> SD3:
    """Load a Stable Diffusion 3 pipeline; a third text encoder may be absent."""
    config = {"model_name_or_path": MODELS["sd3"]} | config
    absent = absent_parts(config)
    if not config.get("text_encoder_3", True):
        absent |= {"text_encoder_3": None, "tokenizer_3": None}
    pipe = load_pipeline(StableDiffusion3Pipeline, config, dtype, "a Stable Diffusion 3 pipeline", **absent)
    return SD3(pipe, device, config, name)


FAMILY = Family(
    "sd3",
    SD3,
    load,
    OPTIONS,
    Size(1024, 16, 2.03, 0.82 + 4.7, 5.3, 0.6, 0.25, (77 + 256) * 4096 + 2048),
    check_combinations,
)
