"""What scores an image against its prompt, and says by which protocol."""

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

    The keyword parameters of a class, but for device, are the options of its reward.
    """

    name: str
    version: str
    device: torch.device
    pixels: Pixels | None = None
    """What is done to the images first."""
    options: Mapping[str, Any] = {}
    """Options that change a score, with their values."""
    parts: Sequence[str] = ()
    """The names of the scores that it sums; none where it is no sum."""
    files: Sequence[Path] = ()
    """Files the weights were read from."""

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        """Refuse options (all of them, by name) that cannot work, loading nothing: RewardError; what will be
        fetched, in words.
        """
        return []

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1] on the device."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] float32 of images [B, 3, H, W] in [0, 1]; a number of prompts other than B:
        ValueError.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(
                f"reward {self.name}: {list(images.shape)} images for {len(prompts)} prompts, expected [B, 3,"
                " H, W] for B"
            )
        with torch.inference_mode():
            return self.score(images.to(self.device, torch.float32), prompts).float()

    def heads(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The scores [B] that it combines, as they are."""
        return {self.name: self(images, prompts)}

    def combine(self, heads: Mapping[str, Tensor]) -> Tensor:
        """The score [B] that heads() make."""
        return heads[self.name]

    def protocol(self) -> dict[str, Any]:
        """What two scores must share to be compared, as JSON values: name, version, hashes of the weights,
        preprocessing, options.
        """
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
        found = []
        for path in self.files:
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
        return found


class CosineReward(Reward):
    """Cosine of an image's and a prompt's embeddings, in float32.

    Each prompt is encoded by itself, so that its embedding does not depend on its batch, and kept.
    """

    pixels: Pixels

    def __init__(self, device: torch.device | str, pixels: Pixels):
        self.device, self.pixels = torch.device(device), pixels
        self.text = lru_cache(maxsize=4096)(self.encode_text)

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, D] of prepared images [B, 3, side, side], of any length."""

    @abstractmethod
    def encode_text(self, prompt: str) -> Tensor:
        """The embedding [1, D] of a prompt, of any length."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = torch.cat([self.text(prompt) for prompt in prompts])
        return (self.embed(images) * F.normalize(texts.float(), dim=-1)).sum(-1)

    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, D] of images [B, 3, H, W] in [0, 1]."""
        return F.normalize(self.encode_images(self.pixels(images)).float(), dim=-1)
