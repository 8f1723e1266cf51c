"""One adapter for the pipeline classes that hand one velocity to scheduler.step; what differs is data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from solvers import dynamic_shift, flowmatch
from solvers.solver import Velocity

from .. import quiet  # noqa: F401  isort: skip
from diffusers import DiffusionPipeline, FluxPipeline  # isort: skip
from ..base import BackendError
from ..conditioning import Condition, apply_cfg, repeat_condition
from ..diffusers_pipeline import COMMON_OPTIONS, PipelineBackend, check_combinations, checked_size
from ..embeddings import EmbeddingCache
from ..family import Family, Size
from ..loading import PipelineClass, absent_parts, load_pipeline
from ..model_ids import MODELS

OPTIONS = COMMON_OPTIONS | {
    "negative_prompt": (str, "what guidance moves away from"),
    "max_sequence_length": (int, "tokens of the text encoder"),
}
SHIFTS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


@dataclass(frozen=True)
class FlowCall:
    """How the pipelines of a class call their network.

    Attributes:
        pipeline: the class.
        title: of the model, in messages.
        tokens: of the text encoder, max_sequence_length by default.
        positive: the places of the embeddings in what encode_prompt returns, by the network's argument.
        negative: the same of the negative prompt's.
        time_scale: of the time that the network gets, times its own timestep_scale where it has one.
        data_at_one: whether that time is 1 - sigma instead of sigma.
        sign: of the velocity dx/dsigma in the network's output.
        packed: whether latents become tokens of 2 x 2, with their places as an argument.
        renormalised: whether guidance keeps the norm of the conditional output, row by row.
    """

    pipeline: type[DiffusionPipeline]
    title: str
    tokens: int
    positive: dict[str, int]
    negative: dict[str, int]
    time_scale: float = 1.0
    data_at_one: bool = False
    sign: float = 1.0
    packed: bool = False
    renormalised: bool = False


class FlowBackend(PipelineBackend):
    """A flow-matching model dx/dsigma = sign * network(x, time); guidance is one doubled batch [negative,
    positive].

    A class of pipelines defines CALL and its default guidance.
    """

    NETWORK = "transformer"
    IMAGE_OPTIONS = ("variant", "resolution", "negative_prompt", "max_sequence_length")
    CALL: ClassVar[FlowCall]
    default_schedule = "flowmatch"

    def __init__(self, pipe: DiffusionPipeline, device: torch.device, config: dict, name: str):
        super().__init__(pipe, device, config, name)
        self._negatives = EmbeddingCache(self.embed_negative, self.device)
        factor, network = pipe.vae_scale_factor, self.network.config
        patch = 2 if self.CALL.packed else network.patch_size
        height, width = (n // factor for n in checked_size(config, self.own_pixels(), factor * patch))
        channels = network.in_channels // 4 if self.CALL.packed else network.in_channels
        self.latent_shape = (channels, height, width)
        self._patches = height // patch, width // patch
        self.check_patches(self._patches)
        self._set_shift(prod(self._patches))

    def own_pixels(self) -> int:
        """The pipeline's own pixels a side."""
        return self.network.config.sample_size * self.pipe.vae_scale_factor

    def check_patches(self, patches: tuple[int, int]) -> None:
        """Refuse an image of more patches than the network has positions for; any number by default."""

    def _set_shift(self, patches: int) -> None:
        scheduler = self.pipe.scheduler.config
        if scheduler.get("use_dynamic_shifting"):
            self.flow_mu = dynamic_shift(patches, **{k: scheduler[k] for k in SHIFTS})
        else:
            shift = scheduler.get("shift", scheduler.get("flow_shift"))
            if shift is None:
                raise BackendError(
                    f"the scheduler {type(self.pipe.scheduler).__name__} has no time shift: expected shift or"
                    " flow_shift, as flow-matching schedulers have"
                )
            self.flow_shift = float(shift)
        self.sigma_max, self.sigma_min = flowmatch(2, shift=self.flow_shift, mu=self.flow_mu).tolist()

    def prompt_options(self) -> dict[str, Any]:
        """More arguments of encode_prompt."""
        return {}

    def embed(self, prompt: str) -> dict[str, Tensor]:
        return self._encoded(self.CALL.positive, prompt, do_classifier_free_guidance=False)

    def embed_negative(self, prompt: str) -> dict[str, Tensor]:
        """The text embeddings of a negative prompt, which pipelines may encode without their instructions."""
        negative = {"negative_prompt": prompt, "do_classifier_free_guidance": True}
        return self._encoded(self.CALL.negative, "", **negative)

    def _encoded(self, places: dict[str, int], prompt: str, **options: Any) -> dict[str, Tensor]:
        length = self.config.get("max_sequence_length", self.CALL.tokens)
        options |= {"device": self.device, "max_sequence_length": length} | self.prompt_options()
        encoded = self.pipe.encode_prompt(prompt, **options)
        return {name: encoded[i] for name, i in places.items()}

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Condition:
        condition = super().encode(prompts, guidance_scale)
        return replace(condition, renormalised=self.CALL.renormalised)

    def unconditional(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return self._negatives.stacked([self.config.get("negative_prompt", "")])

    def forget_prompts(self) -> None:
        super().forget_prompts()
        self._negatives.known.clear()

    def offload_text_encoders(self) -> None:
        super().offload_text_encoders()
        self._negatives.closed = self._embeddings.closed

    def timesteps(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """The network's times of noise levels sigma [rows]."""
        scale = self.CALL.time_scale * self.network.config.get("timestep_scale", 1.0)
        return ((scale * (1 - sigma if self.CALL.data_at_one else sigma)).float(),)

    def conditioning(self, embeddings: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of the network that depend on the prompts, for the embeddings of all rows."""
        text = embeddings["encoder_hidden_states"]
        return embeddings | {"encoder_hidden_states": text.to(self.dtype)} | self.places(text)

    def places(self, text: Tensor) -> dict[str, Tensor]:
        """The positions of image and text tokens, as arguments of a network of packed latents."""
        if not self.CALL.packed:
            return {}
        image = FluxPipeline._prepare_latent_image_ids(1, *self._patches, self.device, self.dtype)
        words = torch.zeros(text.shape[1], 3, device=self.device, dtype=self.dtype)
        return {"img_ids": image, "txt_ids": words}

    def velocity(self, condition: Condition) -> Velocity:
        self.offload_text_encoders()
        batches: dict[int, dict[str, Tensor]] = {}
        arguments: dict[int, dict[str, Any]] = {}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            if len(x) not in arguments:
                arguments[len(x)] = self.conditioning(repeat_condition(condition, len(x), batches))
            inputs, (times,) = self._to_network(x.to(self.dtype)), self._timesteps(sigma, len(x))
            if condition.negative is not None:
                inputs, times = torch.cat([inputs, inputs]), torch.cat([times, times])
            with self.compiling():
                (output,) = self.network(
                    hidden_states=inputs, timestep=times, return_dict=False, **arguments[len(x)]
                )
            return self.CALL.sign * apply_cfg(self._from_network(output), condition)

        return velocity

    def _to_network(self, x: Tensor) -> Tensor:
        return FluxPipeline._pack_latents(x, len(x), *self.latent_shape) if self.CALL.packed else x

    def _from_network(self, output: Tensor) -> Tensor:
        if self.CALL.packed:
            factor = self.pipe.vae_scale_factor
            height, width = (n * factor for n in self.latent_shape[1:])
            return FluxPipeline._unpack_latents(output, height, width, factor)
        if output.shape[1] == 2 * self.latent_shape[0]:  # mean and variance
            return output.chunk(2, dim=1)[0]
        return output

    def unscaled(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae.config
        return latents / vae.scaling_factor + (vae.get("shift_factor") or 0.0)


def flow_family(cls: type[FlowBackend], name: str, size: Size | None = None) -> Family:
    """The family of a class of pipelines, in bfloat16 on CUDA.

    Args:
        cls: its backend.
        name: of the family.
        size: of its published model.
    """

    def load(config: dict, device: torch.device, dtype: torch.dtype, name: str = name) -> FlowBackend:
        config = {"model_name_or_path": MODELS[name]} | config if name in MODELS else config
        wanted = PipelineClass(cls.CALL.pipeline, cls.CALL.title)
        return cls(load_pipeline(wanted, config, dtype, absent_parts(config)), device, config, name)

    return Family(name, cls, load, OPTIONS, size, check_combinations, half=torch.bfloat16)
