"""FLUX.1: any diffusers folder or hub id of FluxPipeline."""

import os

import torch
from torch import Tensor

from solvers import flowmatch

from . import quiet  # noqa: F401  isort: skip
from diffusers import FluxPipeline  # isort: skip
from .base import BackendError
from .conditioning import Condition, repeat_condition
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
from .model_ids import MODELS, flux_model
from .timesteps import TimestepCache, flow_timesteps

OPTIONS = COMMON_OPTIONS | {
    "negative_prompt": (str, "empty: FLUX has no negative prompt"),
    "max_sequence_length": (int, "tokens of the T5 encoder"),
}


class Flux(PipelineBackend):
    """A guidance-distilled rectified flow: the network is told the guidance scale and evaluated once.

    Latents are packed 2x2 into tokens around each call; times are shifted by mu, which depends on the number
    of tokens, and reach the network in float32 whatever its number type.
    """

    default_schedule, default_guidance, cfg_doubles_rows = "flowmatch", 3.5, False
    IMAGE_OPTIONS = ("variant", "resolution", "max_sequence_length")

    def __init__(self, pipe: FluxPipeline, device: torch.device, config: dict, name: str = "flux"):
        self.name, self.device, self.config, self.pipe = name, torch.device(device), config, pipe
        self.dtype = pipe.transformer.dtype
        place(pipe, pipe.transformer, self.device, config)
        factor, own = pipe.vae_scale_factor, pipe.vae.config.sample_size
        pixels = checked_resolution(config, own, 2 * factor, (own,))
        self.latent_shape = (pipe.transformer.config.in_channels // 4, *[pixels // factor] * 2)
        shifts = pipe.scheduler.config
        if not shifts.use_dynamic_shifting:
            raise BackendError(
                "the scheduler does not shift times dynamically, as FLUX.1-dev does; expected"
                " use_dynamic_shifting true"
            )
        tokens = (pixels // factor // 2) ** 2
        slope = (shifts.max_shift - shifts.base_shift) / (
            shifts.max_image_seq_len - shifts.base_image_seq_len
        )
        self.flow_mu = shifts.base_shift + slope * (tokens - shifts.base_image_seq_len)
        self.sigma_max, self.sigma_min = flowmatch(2, mu=self.flow_mu).tolist()
        self._timesteps = TimestepCache(flow_timesteps, self.device)
        self._embeddings = EmbeddingCache(self._embed, self.device)
        self._times: Tensor | None = None
        self._places = FluxPipeline._prepare_latent_image_ids(
            1, *[pixels // factor // 2] * 2, self.device, self.dtype
        )
        pipe.transformer.time_text_embed.register_forward_pre_hook(self._exact_times)

    def networks(self):
        parts = self.pipe.components
        return {k: parts[k] for k in ("transformer", "text_encoder", "text_encoder_2")}

    def checkpoint_blocks(self):
        self.pipe.transformer.enable_gradient_checkpointing()

    def _exact_times(self, embedding, inputs: tuple) -> tuple:
        """The inputs of the time embedding with times in float32: the network rounds its own to its number
        type, bfloat16's 8 bits.

        Calls that are not velocity's, as those of diffusers' pipeline on the same network, keep their own.
        """
        return inputs if self._times is None else (self._times, *inputs[1:])

    def _embed(self, prompt: str) -> dict[str, Tensor]:
        length = self.config.get("max_sequence_length", 512)
        text, pooled, _ = self.pipe.encode_prompt(
            prompt, None, device=self.device, max_sequence_length=length
        )
        return {"text": text, "pooled": pooled}

    def encode(self, prompts, guidance_scale):
        if guidance_scale != 1 and not self.pipe.transformer.config.guidance_embeds:
            raise BackendError(
                f"guidance {guidance_scale}: this FLUX was not distilled for guidance; expected 1"
            )
        return Condition(self._embeddings.stacked(prompts), None, guidance_scale)

    def velocity(self, condition):
        self.offload_text_encoders()
        batches: dict[int, dict[str, Tensor]] = {}
        channels, height, width = self.latent_shape
        words = torch.zeros(condition.positive["text"].shape[1], 3, device=self.device, dtype=self.dtype)
        guidance = None
        if self.pipe.transformer.config.guidance_embeds:
            guidance = torch.full((1,), condition.guidance_scale, device=self.device, dtype=torch.float32)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            told = repeat_condition(condition, len(x), batches)
            (times,) = self._timesteps(sigma, len(x))
            self._times = times
            try:
                with self.compiling():
                    packed = self.pipe.transformer(
                        hidden_states=FluxPipeline._pack_latents(
                            x.to(self.dtype), len(x), channels, height, width
                        ),
                        timestep=times / 1000,
                        guidance=None if guidance is None else guidance.expand(len(x)),
                        encoder_hidden_states=told["text"],
                        pooled_projections=told["pooled"],
                        txt_ids=words,
                        img_ids=self._places,
                        return_dict=False,
                    )[0]
            finally:
                self._times = None
            factor = self.pipe.vae_scale_factor
            return FluxPipeline._unpack_latents(packed, height * factor, width * factor, factor).float()

        return velocity


def check(config: dict) -> None:
    """Refuse a negative prompt, and what check_combinations refuses: BackendError."""
    check_combinations(config)
    if config.get("negative_prompt"):
        raise BackendError(
            f"negative_prompt {config['negative_prompt']!r}: FLUX has no negative prompt; leave it empty"
        )


def load(config: dict, device: torch.device, dtype: torch.dtype, name: str = "flux") -> Flux:
    """Load a FLUX pipeline from a folder or the local cache; from the hub only with FLUX_ALLOW_REMOTE=1."""
    told = config.get("model_name_or_path", MODELS["flux"])
    config = config | {"model_name_or_path": flux_model() if told == MODELS["flux"] else told}
    local_only = os.environ.get("FLUX_ALLOW_REMOTE") != "1"
    pipe = load_pipeline(FluxPipeline, config, dtype, "a FLUX.1 pipeline", local_only, **absent_parts(config))
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
