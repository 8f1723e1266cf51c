"""Drawings of the scans in random colours and weights: training batches, held-out images, VAE latents."""

import torch
from diffusers import AutoencoderKL

from .data import (
    ALL_LABELS,
    COLOURS,
    HELD_OUT_LABELS,
    WEIGHTS,
    Label,
    augment,
    enlarge,
    load_scans,
    paint,
)

VIEWS = 3  # augmented views of each training scan whose latents the denoiser is trained on


def drawings(
    grey: torch.Tensor, digits: torch.Tensor, generator: torch.Generator, held_out: bool = False
) -> tuple[torch.Tensor, list[Label]]:
    """Random drawings [n, 3, 32, 32] of grey scans [n, 32, 32], and their labels; held-out combinations only
    with `held_out`.
    """
    pools = [
        [c for c in ALL_LABELS if c.digit == d and (held_out or c not in HELD_OUT_LABELS)] for d in range(10)
    ]
    u = torch.rand(len(grey), generator=generator).tolist()
    labels = [pools[d][int(u[i] * len(pools[d]))] for i, d in enumerate(digits.tolist())]
    colour, weight = (torch.tensor([vars(c)[k] for c in labels]) for k in ("colour", "weight"))
    return paint(grey, colour, weight), labels


def draw_batch(
    grey: torch.Tensor, digits: torch.Tensor, size: int, generator: torch.Generator, held_out: bool = False
) -> tuple[torch.Tensor, list[Label]]:
    """A training batch of augmented drawings and their labels."""
    pick = torch.randint(len(grey), (size,), generator=generator)
    return drawings(augment(grey[pick], generator), digits[pick], generator, held_out)


def held_out_drawings() -> tuple[torch.Tensor, list[Label]]:
    """Each held-out scan in all 18 combinations of colour and weight."""
    scans, digits = load_scans("test")
    grey = enlarge(scans)
    images: list[torch.Tensor] = []
    labels: list[Label] = []
    for colour in range(len(COLOURS)):
        for weight in range(len(WEIGHTS)):
            n = len(grey)
            images.append(paint(grey, torch.full((n,), colour), torch.full((n,), weight)))
            labels += [Label(d, colour, weight) for d in digits.tolist()]
    return torch.cat(images), labels


def latents_of_training_set(
    vae: AutoencoderKL, generator: torch.Generator
) -> tuple[torch.Tensor, list[Label]]:
    """Scaled latents of VIEWS views of each training scan, each in 6 combinations, and their labels."""
    scans, digits = load_scans("train")
    grey = enlarge(scans).repeat(VIEWS, 1, 1)
    grey[len(scans) :] = augment(grey[len(scans) :], generator)
    latents: list[torch.Tensor] = []
    labels: list[Label] = []
    for _ in range(6):
        images, drawn = drawings(grey, digits.repeat(VIEWS), generator)
        for chunk in images.split(256):
            latents.append(vae.encode(chunk * 2 - 1).latent_dist.mean * vae.config.scaling_factor)
        labels += drawn
    return torch.cat(latents), labels
