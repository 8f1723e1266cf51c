"""The backbones that benchmarks are run on: the digits families, or the full-size networks with random
weights.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import click
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import nn

from backends import Backend, Condition, load_backend
from backends.flux import Flux
from backends.ldm import LDM
from backends.sd3 import SD3
from common.distributed import check_device
from solvers import Spec, UserError

from .full_size import parts_of, randomised, scheduler_of

FAMILIES = ("ldm", "sd3", "flux")
PIXELS = {"ldm": 512, "sd3": 1024, "flux": 1024}
EMBEDDINGS = {  # what the text encoders give for one prompt
    "ldm": {"text": (77, 768)},
    "sd3": {"text": (77 + 256, 4096), "pooled": (2048,)},
    "flux": {"text": (512, 4096), "pooled": (768,)},
}
NETWORKS = {"ldm": "unet", "sd3": "transformer", "flux": "transformer"}


@dataclass(frozen=True)
class Case:
    """A backbone of a family, and how many images are sampled together."""

    backend: Backend
    family: str
    batch: int

    @property
    def network(self) -> nn.Module:
        """The network that a solver's evaluations call."""
        return network_of(self.backend, self.family)


def digits(family: str, device: torch.device) -> Backend:
    """The embedded backbone of a family."""
    return load_backend(Spec(backend="digits", backend_config={"family": family}), device)


def full_size(
    family: str, device: torch.device, layers: int | None = None, pixels: int | None = None
) -> Backend:
    """The real network and decoder of a family with random weights, in half precision on a GPU; without text
    encoders.
    """
    pixels = pixels or PIXELS[family]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16 if family == "flux" else torch.float16
    made = parts_of(family, layers, pixels)
    with torch.device(device):
        vae, network = (randomised(made[name], dtype) for name in ("vae", NETWORKS[family]))
    scheduler = scheduler_of(family)
    if family == "ldm":
        return LDM(
            StableDiffusionPipeline(
                vae, None, None, network, scheduler, None, None, requires_safety_checker=False
            ),
            device,
            {},
            family,
        )
    if family == "sd3":
        return SD3(StableDiffusion3Pipeline(network, scheduler, vae, *[None] * 6), device, {}, family)
    return Flux(FluxPipeline(scheduler, vae, None, None, None, None, network), device, {}, family)


@dataclass(frozen=True)
class Networks:
    """What a benchmark is run on: the digits families, or the real networks with random weights, whole or cut
    to what there is time for.
    """

    full: bool = False
    family: str | None = None
    layers: int | None = None
    resolution: int | None = None

    def check(self) -> None:
        """Refuse to cut the digits families short."""
        if not self.full and (self.layers or self.resolution):
            raise UserError("--layers and --resolution cut full-size networks short: add --full")

    @property
    def kind(self) -> str:
        """What the names of its results end with."""
        return "" if not self.full else "_cut" if self.layers or self.resolution else "_full"

    @property
    def families(self) -> tuple[str, ...]:
        """All of them, or the only one that was asked for."""
        return FAMILIES if self.family is None else (self.family,)

    def each(self, work: Callable[[str, Backend], list[dict]], device: torch.device) -> Iterator[list[dict]]:
        """The rows that some work gives on each family's backbone in turn; each is freed before the next one
        is made.
        """
        for family in self.families:
            yield work(family, self.make(family, device))
            free(device)

    def make(self, family: str, device: torch.device) -> Backend:
        """The backbone of a family."""
        return (
            full_size(family, device, self.layers, self.resolution) if self.full else digits(family, device)
        )

    def settings(self) -> dict:
        """What results say of it."""
        return {"full": self.full, "layers": self.layers, "resolution": self.resolution}


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def condition_of(backend: Backend, family: str, batch: int) -> Condition:
    """A condition of some images at the family's own guidance: of captions, or of random embeddings without
    text encoders.
    """
    scale = backend.default_guidance
    if backend.name == "digits":
        return backend.encode(
            [f"a bold {colour} handwritten seven" for colour in ("red", "blue", "green", "black")[:batch]],
            scale,
        )
    generator = torch.Generator().manual_seed(0)
    numbers = {
        k: torch.randn(batch + 1, *shape, generator=generator) for k, shape in EMBEDDINGS[family].items()
    }
    parts = {k: v.to(backend.device, backend.dtype) for k, v in numbers.items()}
    negative = {k: v[:1] for k, v in parts.items()} if backend.cfg_doubles_rows else None
    return Condition({k: v[1:] for k, v in parts.items()}, negative, scale)


def network_of(backend: Backend, family: str) -> nn.Module:
    """The network that a solver's evaluations call."""
    return backend.pipe.components[NETWORKS[family]]


def existing(context, parameter, name: str) -> torch.device:
    """A device that this machine has."""
    check_device(name)
    return torch.device(name)


device_option = click.option(
    "--device",
    default="cuda" if torch.cuda.is_available() else "cpu",
    show_default=True,
    callback=existing,
    help="cpu, cuda or cuda:N.",
)


def whole_patches(context, parameter, pixels: int | None) -> int | None:
    """A resolution that is a whole number of every family's patches."""
    if pixels is not None and pixels % 16:
        raise UserError(f"--resolution {pixels}: expected a multiple of 16 pixels")
    return pixels


resolution_option = click.option(
    "--resolution",
    type=click.IntRange(64, 1024),
    callback=whole_patches,
    help="With --full: pixels a side; by default 512 for ldm, else 1024.",
)
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="JSON file; by default benchmarks/results/NAME.json, or NAME_full.json, or NAME_cut.json.",
)


def on_networks(command: Callable) -> Callable:
    """The options that say which networks a benchmark is run on, as its argument `networks`."""

    @wraps(command)
    def with_networks(
        full: bool, family: str | None, layers: int | None, resolution: int | None, **others
    ) -> None:
        command(networks=Networks(full, family, layers, resolution), **others)

    for option in (
        resolution_option,
        click.option(
            "--layers",
            type=click.IntRange(1),
            help="With --full: of the transformers, not of the U-Net; all by default.",
        ),
        click.option("--family", type=click.Choice(FAMILIES), help="Only this one."),
        click.option(
            "--full", is_flag=True, help="The full-size networks with random weights; uncut, they need a GPU."
        ),
    ):
        with_networks = option(with_networks)
    return with_networks


def measured_on(command: Callable) -> Callable:
    """The options of a benchmark of times: which networks, at which batches, how often and where."""
    for option in (
        device_option,
        click.option("--repeats", type=click.IntRange(3), default=15, show_default=True),
        click.option("--batch", type=click.IntRange(1, 4), multiple=True, default=[1, 4], show_default=True),
        on_networks,
        out_option,
    ):
        command = option(command)
    return command
