"""The digits classifier as a score: its log probability of what the prompt names."""

from collections.abc import Sequence

import torch
from torch import Tensor

from digits.data import SIZE, parse
from digits.judge import FOLDER, Judge

from .base import Reward, RewardError


class JudgeReward(Reward):
    """The judge's log probability of the digit and the colour that a prompt names, mean over the two; for
    measuring only.
    """

    name = "judge"
    version = "1"

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.net = Judge(device=self.device).net
        self.files = [FOLDER / "judge.safetensors"]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        labels = [parse(p) for p in prompts]
        if None in labels:
            raise RewardError(f"reward judge: prompt {prompts[labels.index(None)]!r} names no digit")
        if images.shape[-2:] != (SIZE, SIZE):
            raise RewardError(
                f"reward judge: images of {images.shape[-1]} x {images.shape[-2]} pixels, expected {SIZE} x"
                f" {SIZE} digits"
            )
        heads = self.net(images)
        total = torch.zeros(len(images), device=self.device)
        for name in ("digit", "colour"):
            asked = torch.tensor([vars(label)[name] for label in labels], device=self.device)
            log_prob = heads[name].log_softmax(-1).gather(1, asked.clamp(min=0)[:, None])[:, 0]
            total += torch.where(asked < 0, torch.zeros_like(log_prob), log_prob)
        return total / 2
