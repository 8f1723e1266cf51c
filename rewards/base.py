"""Scores of images against their prompts, and the protocol by which they were computed."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solvers import UserError

from .pixels import Pixels


class RewardError(UserError):
    """A reward that cannot be loaded or used as asked; the message is one line for the user."""


class Reward(ABC):
    """Image-text scores on the device, higher is better; an image's score does not depend on its batch.

    A reward is a subclass with `score`, and a line in the registry. The keyword parameters of its __init__,
    but for device, are its options. Attributes:
        name, version: which score it is.
        device: where it is computed.
        pixels: how images are prepared, where the reward leaves that to Pixels.
        options: the options that change a score, with their values.
        parts: the names of the scores that it sums; none where it is no sum.
        files: the files that its weights were read from.
    """

    name: str
    version: str = "1"
    device: torch.device
    pixels: Pixels | None = None
    options: Mapping[str, Any] = {}
    parts: Sequence[str] = ()
    files: Sequence[Path] = ()

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        """Check all options, by name, without loading weights.

        Returns:
            Notes for the user, such as what will be fetched.

        Raises:
            RewardError: options that cannot work.
        """
        return []

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1] on the device."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] float32 of images [B, 3, H, W] in [0, 1] and their B prompts."""
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(
                f"reward {self.name}: {list(images.shape)} images for {len(prompts)} prompts, expected [B, 3,"
                " H, W] for B"
            )
        with torch.inference_mode():
            return self.score(images.to(self.device, torch.float32), prompts).float()

    def with_gradient(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] as from a call, with their graph: the gradient goes to the images."""
        return self.score(images.to(self.device, torch.float32), prompts).float()

    def heads(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The scores [B] that it combines, by name."""
        return {self.name: self(images, prompts)}

    def combine(self, heads: Mapping[str, Tensor]) -> Tensor:
        """The score [B] of what heads() returned."""
        return heads[self.name]

    def protocol(self) -> dict[str, Any]:
        """What two scores must have in common to be compared, as JSON values."""
        preprocessing = "none" if self.pixels is None else str(self.pixels)
        return {
            "name": self.name,
            "version": self.version,
            "weights": self.hashes,
            "preprocessing": preprocessing,
            "options": dict(self.options),
        }

    @cached_property
    def hashes(self) -> list[str]:
        """The first 16 hexadecimal digits of the SHA-256 of each file of weights."""
        hashes = []
        for path in self.files:
            with path.open("rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
        return hashes


class CosineReward(Reward):
    """Cosine of an image's and a prompt's embeddings, in float32.

    Each prompt is encoded by itself, so that its embedding does not depend on its batch, and kept.
    """

    pixels: Pixels

    def __init__(self, device: torch.device | str, pixels: Pixels):
        super().__init__(device)
        self.pixels = pixels
        self.text = lru_cache(maxsize=4096)(self.encode_text)

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, D], not yet normalised, of prepared images [B, 3, side, side]."""

    @abstractmethod
    def encode_text(self, prompt: str) -> Tensor:
        """The embedding [1, D], not yet normalised, of a prompt."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            texts = torch.cat([self.text(prompt) for prompt in prompts])
        return (self.embed(images) * F.normalize(texts.float(), dim=-1)).sum(-1)

    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, D] of images [B, 3, H, W] in [0, 1]."""
        return F.normalize(self.encode_images(self.pixels(images)).float(), dim=-1)
