"""Residuals of the Dirichlet policy: what changes its log concentrations, zero at first."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Residual(nn.Module, ABC):
    """A change [N, outputs] of the log concentrations of each interval, zero at first."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The change."""

    @abstractmethod
    def outputs(self) -> list[nn.Parameter]:
        """The parameters in which the change is linear."""


class TableResidual(Residual):
    """A residual that is one free number a concentration: [N, outputs], zero at first."""

    def __init__(self, intervals: int, outputs: int):
        super().__init__()
        self.change = nn.Parameter(torch.zeros(intervals, outputs, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.change

    def outputs(self) -> list[nn.Parameter]:
        return [self.change]


class MLPResidual(Residual):
    """The published residual: an embedding of the interval, residual blocks x + W SiLU(LayerNorm(x)), and a
    head that is zero at first.
    """

    def __init__(self, intervals: int, outputs: int, hidden: int = 128, blocks: int = 2):
        super().__init__()
        self.embed = nn.Embedding(intervals, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, hidden)) for _ in range(blocks)
        )
        self.head = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.double()

    def forward(self) -> Tensor:
        x = self.embed.weight
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def outputs(self) -> list[nn.Parameter]:
        return list(self.head.parameters())
