"""What scores an image against its prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from solvers import UserError


class RewardError(UserError):
    """A reward that cannot be loaded or used as asked; the message is one line for the user."""


class Reward(ABC):
    """Image-text scores on the device, higher is better; an image's score does not depend on its batch."""

    name: str
    device: torch.device

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1] on the device."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] float32 of images [B, 3, H, W] in [0, 1]; a number of prompts other than B: ValueError."""
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(f"reward {self.name}: {list(images.shape)} images for {len(prompts)} prompts, expected [B, 3, H, W] for B")
        with torch.inference_mode():
            return self.score(images.to(self.device), prompts).float()
