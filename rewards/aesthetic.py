"""The LAION aesthetic predictor (Schuhmann 2022, sac+logos+ava1-l14-linearMSE): a linear head on CLIP
ViT-L/14.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Reward
from .clip_model import CLIP_L, ClipReward
from .files import build_with_weights, check_folder, find_file, read_checkpoint
from .linear_head import linear_head

FILE, REPOSITORY = "sac+logos+ava1-l14-linearMSE.pth", "camenduru/improved-aesthetic-predictor"


class AestheticReward(Reward):
    """How well people like an image, about 1 to 10, from its unit CLIP embedding (LAION aesthetic predictor
    V2); the prompt has no effect.

    `weights_path` is the file of the head, `clip_path` the CLIP model: a folder or a name on the hub.
    """

    name = "aesthetic"
    version = "V2 linearMSE"

    def __init__(self, device: torch.device | str, weights_path: str | None = None, clip_path: str = CLIP_L):
        path = find_file(self.name, weights_path, FILE, REPOSITORY)
        self.clip = ClipReward(self.name, clip_path, clip_path, device, scaled=False)
        self.device, self.pixels = self.clip.device, self.clip.pixels
        width = self.clip.model.config.projection_dim
        state = {
            name.removeprefix("layers."): tensor for name, tensor in read_checkpoint(self.name, path).items()
        }
        self.head = build_with_weights(self.name, path, lambda: linear_head(width), state).to(self.device)
        self.files = [path, *self.clip.files]

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        find_file(cls.name, options["weights_path"], FILE, REPOSITORY)
        return check_folder(cls.name, options["clip_path"])

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.clip.embed(images))[:, 0]
