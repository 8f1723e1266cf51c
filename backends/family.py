"""A family of pretrained models: what a backbone module exports as FAMILY."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.resolution import is_resolution

from .base import Backend, BackendError

Options = dict[str, tuple[type | tuple[type, ...], str]]  # name: type and meaning


@dataclass(frozen=True)
class Size:
    """A published model's sizes, for estimates of memory; activations are 16-bit, from the shapes of layers.

    Attributes:
        resolution: pixels a side that the activations are those of.
        channels: of a latent.
        network, encoders: parameters in 10^9.
        kept: GB of activations of one row in a network call that keeps them for its backward pass.
        kept_blocks: the same with block checkpointing.
        passing: the same without a backward pass.
        text: values of a prompt's embedding.
    """

    resolution: int
    channels: int
    network: float
    encoders: float
    kept: float
    kept_blocks: float
    passing: float
    text: int


@dataclass(frozen=True)
class Family:
    """A family: how it is loaded, and what is known of it before any weights load.

    Attributes:
        name: of the family.
        backend: its class.
        load: load(config, device, dtype, name) makes the backbone.
        options: the keys of backend_config that it takes.
        size: of its published model, for estimates of memory.
        check: refuses options that contradict each other: BackendError.
        half: its number type on CUDA by default.
        fixed_dtype: its only number type.
    """

    name: str
    backend: type[Backend]
    load: Callable[[dict, torch.device, torch.dtype, str], Backend]
    options: Options
    size: Size | None = None
    check: Callable[[dict], None] | None = None
    half: torch.dtype = torch.float16
    fixed_dtype: torch.dtype | None = None

    @property
    def flow(self) -> bool:
        """Whether its models are flow-matching models."""
        return self.backend.default_schedule == "flowmatch"

    def check_options(self, config: dict) -> None:
        """Refuse an unknown option, a value of another type, or a contradiction between two options."""
        for name, value in config.items():
            if name not in self.options:
                names = ", ".join(self.options)
                known = f"expected one of {names}" if names else "there are no options"
                raise BackendError(f"backend_config.{name}: unknown option, {known}")
            kind, meaning = self.options[name]
            kinds = kind if isinstance(kind, tuple) else (kind,)
            if type(value) not in kinds:
                shown = "not a text" if name == "token" else repr(value)
                expected = " or ".join(k.__name__ for k in kinds)
                raise BackendError(f"backend_config.{name} is {shown}, expected {expected}: {meaning}")
            if name == "resolution" and not is_resolution(value):
                raise BackendError(
                    f"backend_config.resolution is {value!r}, expected int: pixels a side, or WIDTHxHEIGHT"
                    " such as '1024x768'"
                )
        if self.check is not None:
            self.check(config)
