"""Stable Diffusion 3: any diffusers folder or hub id of StableDiffusion3Pipeline, with or without its T5
encoder.
"""

import torch
from torch import Tensor

from solvers import flowmatch
from solvers.solver import Velocity

from . import quiet  # noqa: F401  isort: skip
from diffusers import StableDiffusion3Pipeline  # isort: skip
from .base import BackendError
from .conditioning import Condition, apply_cfg, repeat_condition
from .diffusers_pipeline import COMMON_OPTIONS, PipelineBackend, check_combinations, checked_size
from .family import Family, Size
from .loading import PipelineClass, absent_parts, load_pipeline
from .model_ids import MODELS

OPTIONS = COMMON_OPTIONS | {
    "negative_prompt": (str, "what guidance moves away from"),
    "max_sequence_length": (int, "tokens of the T5 encoder"),
    "text_encoder_3": (bool, "false: without the T5 encoder, which is most of the weights"),
}

TOKENS = 256  # of the T5 encoder


class SD3(PipelineBackend):
    """Rectified flow (Esser et al. 2024, arXiv 2403.03206): the network's output is the velocity dx/dsigma
    itself.

    It sees x and the time 1000 sigma in float32; guidance is one doubled batch [negative, positive].
    """

    NETWORK = "transformer"
    IMAGE_OPTIONS = ("variant", "resolution", "negative_prompt", "max_sequence_length", "text_encoder_3")
    default_schedule, default_guidance = "flowmatch", 4.5

    def __init__(self, pipe: StableDiffusion3Pipeline, device: torch.device, config: dict, name: str = "sd3"):
        super().__init__(pipe, device, config, name)
        network = pipe.transformer.config
        factor, own = pipe.vae_scale_factor, network.sample_size * pipe.vae_scale_factor
        height, width = checked_size(
            config, own, factor * network.patch_size, (512, 1024) if own >= 1024 else (own,)
        )
        largest = factor * network.patch_size * network.pos_embed_max_size
        if max(height, width) > largest:
            raise BackendError(
                f"resolution {width}x{height}: expected at most {largest} pixels a side, for which this model"
                " has positions"
            )
        self.latent_shape = (network.in_channels, height // factor, width // factor)
        if pipe.scheduler.config.use_dynamic_shifting:
            raise BackendError(
                "the scheduler shifts times dynamically, which Stable Diffusion 3 does not; expected"
                " use_dynamic_shifting false"
            )
        self.flow_shift = float(pipe.scheduler.config.shift)
        self.sigma_max, self.sigma_min = flowmatch(2, shift=self.flow_shift).tolist()

    def embed(self, prompt: str) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompt,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.get("max_sequence_length", TOKENS),
        )
        return {"text": text, "pooled": pooled}

    def token_limits(self) -> dict[str, int]:
        limits = {name: self.pipe.components[name].model_max_length for name in ("tokenizer", "tokenizer_2")}
        if self.pipe.tokenizer_3 is None:
            return limits
        return {**limits, "tokenizer_3": self.config.get("max_sequence_length", TOKENS)}

    def velocity(self, condition: Condition) -> Velocity:
        self.offload_text_encoders()
        batches: dict[int, dict[str, Tensor]] = {}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            embeddings = repeat_condition(condition, len(x), batches)
            inputs, (times,) = x.to(self.dtype), self._timesteps(sigma, len(x))
            if condition.negative is not None:
                inputs, times = torch.cat([inputs, inputs]), torch.cat([times, times])
            with self.compiling():
                (output,) = self.network(
                    hidden_states=inputs,
                    timestep=times,
                    encoder_hidden_states=embeddings["text"],
                    pooled_projections=embeddings["pooled"],
                    return_dict=False,
                )
            return apply_cfg(output, condition)

        return velocity


def load(config: dict, device: torch.device, dtype: torch.dtype, name: str = "sd3") -> SD3:
    """Load a Stable Diffusion 3 pipeline; a third text encoder may be absent."""
    config = {"model_name_or_path": MODELS["sd3"]} | config
    absent = absent_parts(config)
    if not config.get("text_encoder_3", True):
        absent |= {"text_encoder_3": None, "tokenizer_3": None}
    wanted = PipelineClass(StableDiffusion3Pipeline, "a Stable Diffusion 3 pipeline")
    pipe = load_pipeline(wanted, config, dtype, absent)
    return SD3(pipe, device, config, name)


FAMILY = Family(
    "sd3",
    SD3,
    load,
    OPTIONS,
    Size(1024, 16, 2.03, 0.82 + 4.7, 5.3, 0.6, 0.25, (77 + 256) * 4096 + 2048),
    check_combinations,
)
