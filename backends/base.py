"""From prompts to conditions, the velocity of one ODE, and latents to images: what every backbone becomes."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from solvers import SCHEDULES, NoiseSchedule, Spec, UserError, discrete, flowmatch, schedule_nodes

from .conditioning import Condition


class BackendError(UserError):
    """A backbone that cannot be loaded or used as asked; the message is one line for the user."""


class Backend(ABC):
    """A frozen pretrained family as an ODE dx/dsigma = velocity, from latents of noise level sigma_max to
    sigma_min.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    latent_shape: tuple[int, int, int]
    sigma_min: float
    sigma_max: float
    noise_schedule: NoiseSchedule | None = None
    flow_shift: float | None = None
    flow_mu: float | None = None
    default_schedule: str = "discrete"
    default_guidance: float = 7.5
    cfg_doubles_rows: bool = True
    """Whether guidance other than 1 doubles the rows of each evaluation."""

    @property
    def flow(self) -> bool:
        """Whether this is a flow-matching model, whose states are (1 - sigma) data + sigma noise."""
        return self.flow_shift is not None or self.flow_mu is not None

    @abstractmethod
    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Condition:
        """The condition of B prompts; guidance_scale 1 means no guidance."""

    def precompute_embeddings(self, prompts: Sequence[str], guidance_scale: float) -> None:  # noqa: B027  nothing, unless a backbone overrides it
        """Told all prompts of a run before its first one is encoded; a backbone may make use of it."""

    @abstractmethod
    def velocity(self, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        """velocity(x [M*B, C, H, W], sigma [] or [M*B]) -> [M*B, C, H, W] float32; row m * B + b has
        condition b.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 3, H', W'] float32 in [0, 1]."""

    @abstractmethod
    def identity(self) -> str:
        """Which weights these are: a path or hub id with its revision."""

    def networks(self) -> dict[str, nn.Module]:
        """The networks on the way from prompts to the velocity, by name."""
        return {}

    def fingerprint(self) -> str:
        """A hash of the weights of networks(): of names, shapes and up to 256 evenly spread values of each
        tensor.
        """
        digest = hashlib.sha256()
        for part, network in sorted(self.networks().items()):
            for name, value in sorted(network.state_dict().items()):
                flat = value.detach().flatten()
                few = flat[:: max(1, len(flat) // 256)][:256].double().cpu()
                digest.update(
                    f"{part}.{name} {list(value.shape)} {value.dtype}".encode() + few.numpy().tobytes()
                )
        return digest.hexdigest()[:16]

    def checkpoint_blocks(self) -> None:
        """Make the network compute its blocks' activations again in a backward pass instead of
        keeping them.
        """
        raise BackendError(
            f"backend.block_checkpointing: backend {self.name!r} has no blocks to compute again; set it to"
            " false"
        )

    def image_options(self) -> dict:
        """The options, beside the weights, that decide what the images look like."""
        return {}

    def sigmas(self, spec: Spec) -> Tensor:
        """The nodes [num_steps] of a spec's schedule, between its noise levels or this backbone's."""
        kind = spec.schedule_type or self.default_schedule
        if spec.num_steps is None:
            raise BackendError("num_steps is not set: give --num-steps")
        if kind == "discrete" and self.noise_schedule is not None:
            return discrete(spec.num_steps, self.noise_schedule)
        if kind == "flowmatch" and (self.flow_shift is not None or self.flow_mu is not None):
            return self._flow_nodes(spec)
        if kind in ("polynomial", "logsnr", "time_uniform"):
            low = self.sigma_min if spec.sigma_min is None else spec.sigma_min
            high = self.sigma_max if spec.sigma_max is None else spec.sigma_max
            return schedule_nodes(kind, spec.num_steps, low, high, spec.schedule_rho)
        fitting = [
            name for name in SCHEDULES if name != ("discrete" if self.noise_schedule is None else "flowmatch")
        ]
        raise BackendError(
            f"schedule {kind!r} does not fit backend {self.name!r}: expected one of {', '.join(fitting)}"
        )

    def nodes_note(self, spec: Spec, recorded: Tensor) -> str | None:
        """What to say where nodes that a predictor recorded are not those of its schedule on this backbone;
        they are used all the same.
        """
        if spec.schedule_type is None:
            return None
        own = self.sigmas(replace(spec, num_steps=len(recorded)))
        furthest = ((own - recorded).abs() / own).max().item()
        if furthest < 1e-4:
            return None
        return (
            f"the recorded nodes differ from {spec.schedule_type} nodes of {self.name} by up to"
            f" {100 * furthest:.2g} %; they are used"
        )

    def _flow_nodes(self, spec: Spec) -> Tensor:
        mu = self.flow_mu if spec.flowmatch_mu is None else spec.flowmatch_mu
        if mu is not None:
            return flowmatch(spec.num_steps, mu=mu)
        return flowmatch(
            spec.num_steps, shift=self.flow_shift if spec.flowmatch_shift is None else spec.flowmatch_shift
        )

    def initial_latents(self, seeds: Sequence[int], sigma: float | Tensor) -> Tensor:
        """The state at the first node on the device: float32 noise of each seed, times sigma."""
        return float(sigma) * initial_noise(seeds, self.latent_shape).to(self.device)


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Unit float32 noise [len(seeds), *shape], each seed's from its own CPU generator: it depends on nothing
    else.
    """
    return torch.stack(
        [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
