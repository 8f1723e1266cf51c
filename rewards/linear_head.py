"""The head of the aesthetic predictor and of ImageReward: five linear layers, only dropout between them."""

from itertools import pairwise

from torch import nn

WIDTHS = (1024, 128, 64, 16, 1)
POSITIONS = (0, 2, 4, 6, 7)  # dropout after the first three


def linear_head(width: int) -> nn.Module:
    """Features [B, width] to scores [B, 1]; tensors are named {position}.weight and {position}.bias."""
    layers = nn.Sequential()
    for position, (inputs, outputs) in zip(POSITIONS, pairwise((width, *WIDTHS)), strict=True):
        layers.add_module(str(position), nn.Linear(inputs, outputs))
    return layers
