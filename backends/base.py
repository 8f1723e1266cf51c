"""The interface of a backbone: prompts to a condition, the velocity of one ODE, latents to images."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.errors import note
from common.prompts import check_seeds
from solvers import SCHEDULES, NoiseSchedule, Spec, UserError, discrete, flowmatch, schedule_nodes

from .conditioning import Condition


class BackendError(UserError):
    """A backbone that cannot be loaded or used as asked; the message is one line for the user."""


class Backend(ABC):
    """A frozen pretrained network as the ODE dx/dsigma = velocity, from noise level sigma_max to sigma_min.

    A family sets the attributes and defines `encode`, `velocity`, `decode` and `identity`. Attributes:
        name: of the backbone, in file names and messages.
        device, dtype: of the network; states x are float32 whatever its dtype.
        latent_shape: (C, H, W) of one state.
        sigma_min, sigma_max: the noise levels between which the network is accurate.
        noise_schedule: of a variance-preserving model, for discrete nodes.
        flow_shift, flow_mu: the time shift of a flow-matching model, for its nodes.
        default_schedule, default_guidance: where neither the user nor a predictor names one.
        cfg_doubles_rows: whether guidance other than 1 doubles the rows of each evaluation.
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

    @property
    def flow(self) -> bool:
        """Whether this is a flow-matching model, whose states are (1 - sigma) data + sigma noise."""
        return self.flow_shift is not None or self.flow_mu is not None

    @abstractmethod
    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Condition:
        """The condition of B prompts; guidance_scale 1 means no guidance."""

    def precompute_embeddings(self, prompts: Sequence[str], guidance_scale: float) -> None:  # noqa: B027
        """Encode all prompts of a run before its first batch, where that saves memory; nothing by default."""

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        """Those of some prompts whose ends no text encoder reads; none by default."""
        return []

    def note_truncated(self, prompts: Sequence[str]) -> None:
        """Note how many prompts of a run are longer than what the text encoders read, and the first
        of them.
        """
        if cut := self.truncated(list(dict.fromkeys(prompts))):
            note(
                f"{len(cut)} of {len(set(prompts))} prompts are longer than the text encoders read, and their"
                f" ends are left out; the first is {cut[0][:60]!r}"
            )

    @abstractmethod
    def velocity(self, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        """dx/dsigma under a condition of B images, for M points at once.

        Returns:
            velocity(x [M*B, C, H, W], sigma [] or [M*B]) -> [M*B, C, H, W] float32; row m*B + b has condition
            b (point-major).
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
        """The fingerprint of the weights of networks()."""
        return fingerprint_of(self.networks())

    def image_fingerprint(self) -> str | None:
        """The fingerprint of all weights that images depend on, the decoder's too; None without any."""
        return self.fingerprint() if self.networks() else None

    def checkpoint_blocks(self) -> None:
        """Recompute the activations of the network's blocks in a backward pass instead of keeping them."""
        raise BackendError(
            f"backend.block_checkpointing: backend {self.name!r} has no blocks to compute again; set it to"
            " false"
        )

    def image_options(self) -> dict:
        """The options, beside the weights, that change the images."""
        return {}

    def sigmas(self, spec: Spec) -> Tensor:
        """The nodes of a spec's schedule, between its noise levels or this backbone's.

        Returns:
            Noise levels [num_steps] float64, descending.

        Raises:
            BackendError: no num_steps, or a schedule that does not fit this backbone.
        """
        kind = spec.schedule_type or self.default_schedule
        if spec.num_steps is None:
            raise BackendError("num_steps is not set: give --num-steps")
        if kind == "discrete" and self.noise_schedule is not None:
            return discrete(spec.num_steps, self.noise_schedule)
        if kind == "flowmatch" and self.flow:
            return self._flow_nodes(spec, spec.num_steps)
        if kind in ("polynomial", "logsnr", "time_uniform"):
            low = self.sigma_min if spec.sigma_min is None else spec.sigma_min
            high = self.sigma_max if spec.sigma_max is None else spec.sigma_max
            return schedule_nodes(kind, spec.num_steps, low, high, spec.schedule_rho)
        unfit = "discrete" if self.noise_schedule is None else "flowmatch"
        fitting = [name for name in SCHEDULES if name != unfit]
        raise BackendError(
            f"schedule {kind!r} does not fit backend {self.name!r}: expected one of {', '.join(fitting)}"
        )

    def nodes_note(self, spec: Spec, recorded: Tensor) -> str | None:
        """A note where the nodes that a predictor recorded are not those of its schedule on this backbone.

        They are used all the same.
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

    def shift_note(self, spec: Spec) -> str | None:
        """A note where a spec's nodes have another time shift than this backbone's at its resolution."""
        if not self.flow or spec.flowmatch_mu is None:
            return None
        if self.flow_mu is not None and abs(self.flow_mu - spec.flowmatch_mu) < 1e-3:
            return None
        own = f"mu {self.flow_mu:.4g}" if self.flow_mu is not None else f"shift {self.flow_shift:g}"
        return (
            f"the nodes are those of time shift mu {spec.flowmatch_mu:.4g}, but {self.name} at this"
            f" resolution has {own}; they are used"
        )

    def _flow_nodes(self, spec: Spec, num_steps: int) -> Tensor:
        mu = self.flow_mu if spec.flowmatch_mu is None else spec.flowmatch_mu
        if mu is not None:
            return flowmatch(num_steps, mu=mu)
        shift = self.flow_shift if spec.flowmatch_shift is None else spec.flowmatch_shift
        return flowmatch(num_steps, shift=shift)

    def initial_latents(self, seeds: Sequence[int], sigma: float | Tensor) -> Tensor:
        """The state at the first node on the device: float32 noise of each seed, times sigma."""
        return float(sigma) * initial_noise(seeds, self.latent_shape).to(self.device)


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Unit float32 noise [len(seeds), *shape]; that of a seed, from its own CPU generator, depends on nothing
    else. Seeds that are not below 2^32: UserError.
    """
    check_seeds(seeds)
    return torch.stack(
        [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def fingerprint_of(networks: Mapping[str, nn.Module]) -> str:
    """A hash of weights: of names, shapes and up to 256 evenly spread values of each tensor.

    It takes milliseconds, and finds other weights of the same layout unless they differ only in values
    between.
    """
    digest = hashlib.sha256()
    for part, network in sorted(networks.items()):
        for name, value in sorted(network.state_dict().items()):
            flat = value.detach().flatten()
            few = flat[:: max(1, len(flat) // 256)][:256].double().cpu()
            digest.update(f"{part}.{name} {list(value.shape)} {value.dtype}".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]
