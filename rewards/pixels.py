"""CLIP's preparation of images, on tensors of any device."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Pixels:
    """Resize the shorter side, crop the centre, normalise (Radford et al. 2021, arXiv 2103.00020).

    [B, 3, H, W] in [0, 1] to [B, 3, side, side]. Nothing is rounded to 8 bits; `clamp` takes off the
    overshoot of the bicubic filter, as resizing an 8-bit image does.
    """

    side: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    clamp: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (self.cropped(images) - mean) / std

    def cropped(self, images: Tensor) -> Tensor:
        """Images [B, 3, side, side], not yet normalised."""
        short = min(images.shape[-2:])
        if short != self.side:
            size = [int(self.side * length / short) for length in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
            images = images.clamp(0, 1) if self.clamp else images
        top, left = (round((length - self.side) / 2) for length in images.shape[-2:])
        return images[..., top : top + self.side, left : left + self.side]

    def __str__(self) -> str:
        clamped = " clamped to [0, 1]," if self.clamp else ""
        return (
            f"shorter side to {self.side} (bicubic, antialiased, float32),{clamped} centre crop, mean"
            f" {self.mean}, std {self.std}"
        )
