"""FLUX.1: any diffusers folder or hub id of FluxPipeline."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from solvers import dynamic_shift, flowmatch
from solvers.solver import Velocity

from . import quiet  # noqa: F401  isort: skip
from diffusers import FluxPipeline  # isort: skip
from .base import BackendError
from .conditioning import Condition, repeat_condition
from .diffusers_pipeline import COMMON_OPTIONS, PipelineBackend, check_combinations, checked_size
from .family import Family, Size
from .loading import PipelineClass, absent_parts, load_pipeline
from .model_ids import MODELS, flux_model

OPTIONS = COMMON_OPTIONS | {
    "negative_prompt": (str, "empty: FLUX has no negative prompt"),
    "max_sequence_length": (int, "tokens of the T5 encoder"),
}

TOKENS = 512  # of the T5 encoder


class Flux(PipelineBackend):
    """A guidance-distilled rectified flow: the guidance scale is an input of the network, evaluated once.

    Latents are packed 2x2 into tokens around each call; times are shifted by mu, which depends on the number
    of tokens, and reach the network in float32 whatever its number type.
    """

    NETWORK = "transformer"
    IMAGE_OPTIONS = ("variant", "resolution", "max_sequence_length")
    default_schedule, default_guidance, cfg_doubles_rows = "flowmatch", 3.5, False

    def __init__(self, pipe: FluxPipeline, device: torch.device, config: dict, name: str = "flux"):
        super().__init__(pipe, device, config, name)
        factor, own = pipe.vae_scale_factor, pipe.vae.config.sample_size
        height, width = (n // factor for n in checked_size(config, own, 2 * factor, (own,)))
        self.latent_shape = (pipe.transformer.config.in_channels // 4, height, width)
        tokens = height // 2, width // 2
        if pipe.scheduler.config.use_dynamic_shifting:
            self.flow_mu = shift_of(pipe.scheduler.config, tokens[0] * tokens[1])
        else:
            self.flow_shift = float(pipe.scheduler.config.shift)
        self.sigma_max, self.sigma_min = flowmatch(2, shift=self.flow_shift, mu=self.flow_mu).tolist()
        if not pipe.transformer.config.guidance_embeds:
            self.default_guidance = 1.0
        self._times: Tensor | None = None
        self._places = FluxPipeline._prepare_latent_image_ids(1, *tokens, self.device, self.dtype)
        self.network.time_text_embed.register_forward_pre_hook(self._exact_times)

    def _exact_times(self, embedding, inputs: tuple) -> tuple:
        """The inputs of the time embedding with times in float32, which the network would round to bfloat16.

        Calls that are not velocity's, as those of diffusers' pipeline on the same network, keep their own.
        """
        return inputs if self._times is None else (self._times, *inputs[1:])

    def embed(self, prompt: str) -> dict[str, Tensor]:
        length = self.config.get("max_sequence_length", TOKENS)
        text, pooled, _ = self.pipe.encode_prompt(
            prompt, None, device=self.device, max_sequence_length=length
        )
        return {"text": text, "pooled": pooled}

    def token_limits(self) -> dict[str, int]:
        return {
            "tokenizer": self.pipe.tokenizer.model_max_length,
            "tokenizer_2": self.config.get("max_sequence_length", TOKENS),
        }

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Condition:
        if guidance_scale != 1 and not self.network.config.guidance_embeds:
            raise BackendError(
                f"guidance {guidance_scale}: this FLUX was not distilled for guidance; expected 1"
            )
        return Condition(self._embeddings.stacked(prompts), None, guidance_scale)

    def velocity(self, condition: Condition) -> Velocity:
        self.offload_text_encoders()
        batches: dict[int, dict[str, Tensor]] = {}
        channels, height, width = self.latent_shape
        factor = self.pipe.vae_scale_factor
        words = torch.zeros(condition.positive["text"].shape[1], 3, device=self.device, dtype=self.dtype)
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((1,), condition.guidance_scale, device=self.device, dtype=torch.float32)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            embeddings = repeat_condition(condition, len(x), batches)
            (times,) = self._timesteps(sigma, len(x))
            tokens = FluxPipeline._pack_latents(x.to(self.dtype), len(x), channels, height, width)
            with self.compiling(), self._times_set(times):
                (output,) = self.network(
                    hidden_states=tokens,
                    timestep=times / 1000,
                    guidance=None if guidance is None else guidance.expand(len(x)),
                    encoder_hidden_states=embeddings["text"],
                    pooled_projections=embeddings["pooled"],
                    txt_ids=words,
                    img_ids=self._places,
                    return_dict=False,
                )
            return FluxPipeline._unpack_latents(output, height * factor, width * factor, factor).float()

        return velocity

    @contextmanager
    def _times_set(self, times: Tensor) -> Iterator[None]:
        """Within it the time embedding gets these times [rows]."""
        self._times = times
        try:
            yield
        finally:
            self._times = None


def shift_of(scheduler: Any, tokens: int) -> float:
    """mu of an image of so many tokens, by a scheduler's configuration."""
    ends = scheduler.base_shift, scheduler.max_shift
    return dynamic_shift(tokens, *ends, scheduler.base_image_seq_len, scheduler.max_image_seq_len)


def check(config: dict) -> None:
    """Refuse a negative prompt, and what check_combinations refuses: BackendError."""
    check_combinations(config)
    if config.get("negative_prompt"):
        raise BackendError(
            f"negative_prompt {config['negative_prompt']!r}: FLUX has no negative prompt; leave it empty"
        )


def load(config: dict, device: torch.device, dtype: torch.dtype, name: str = "flux") -> Flux:
    """Load a FLUX pipeline from a folder or the local cache; from the hub only with FLUX_ALLOW_REMOTE=1."""
    model = config.get("model_name_or_path", MODELS["flux"])
    config = config | {"model_name_or_path": flux_model() if model == MODELS["flux"] else model}
    wanted = PipelineClass(
        FluxPipeline, "a FLUX.1 pipeline", local_only=os.environ.get("FLUX_ALLOW_REMOTE") != "1"
    )
    pipe = load_pipeline(wanted, config, dtype, absent_parts(config))
    return Flux(pipe, device, config, name)


FAMILY = Family(
    "flux",
    Flux,
    load,
    OPTIONS,
    Size(1024, 16, 11.9, 0.12 + 4.7, 26.0, 2.1, 0.5, 512 * 4096 + 768),
    check,
    half=torch.bfloat16,
)
