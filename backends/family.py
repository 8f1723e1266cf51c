"""A family of pretrained models: what a backbone module exports as FAMILY."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .base import Backend, BackendError

Options = Mapping[str, tuple[type, str]]  # name: type and meaning


@dataclass(frozen=True)
class Size:
    """A published model's sizes, for estimates: parameters in 10^9, and GB of 16-bit activations of a row.

    Activations are those at `resolution`, from layer shapes: `kept` with all of a network call kept for its
    backward pass, `kept_blocks` with block checkpointing, `passing` without a backward pass. `text` is the
    number of values of a prompt's embedding.
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

    `load(config, device, dtype, name)` makes the backbone, `options` are those it knows, `check` refuses
    combinations of them. `half` is its number type on CUDA by default, `fixed_dtype` its only one.
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
        """Refuse an option that does not exist, has a value of another type, or does not go with
        another one.
        """
        for name, value in config.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise BackendError(f"backend_config.{name}: unknown option, expected one of {known}")
            kind, meaning = self.options[name]
            if type(value) is not kind:
                shown = "not a text" if name == "token" else repr(value)
                raise BackendError(f"backend_config.{name} is {shown}, expected {kind.__name__}: {meaning}")
        if self.check is not None:
            self.check(config)
