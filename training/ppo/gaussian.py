"""The residual Gaussian policy over the coordinates of a learned tableau, in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from solvers import Tableau

from ..distill.students.tableau import TableauStudent, usable_terms, velocity_rows
from .base import Policy

MOMENT_DAMPING = 0.02  # RMS below which an axis of the denoised states is moved by less
FIRST_STD = 0.04


class TableauSample(NamedTuple):
    """Sampled coordinates [B, dim], in units of the policy's standard deviation."""

    coordinates: Tensor

    def select(self, rows: slice | list[int]) -> "TableauSample":
        """The coordinates of some images."""
        return TableauSample(self.coordinates[rows])


@dataclass(frozen=True)
class GaussianDistribution:
    """N(loc, I) over coordinates [dim]."""

    loc: Tensor

    def sample(self, batch: int, seed: int) -> TableauSample:
        """`batch` draws, which depend on the distribution and the seed alone."""
        noise = torch.randn(
            batch, len(self.loc), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return TableauSample(self.loc.detach() + noise.to(self.loc.device))

    def log_prob(self, coordinates: Tensor) -> Tensor:
        """Log density [...] of coordinates [..., dim]."""
        constant = 0.5 * len(self.loc) * math.log(2 * math.pi)
        return -0.5 * (coordinates - self.loc).square().sum(-1) - constant

    def entropy(self) -> Tensor:
        """Differential entropy, which is constant."""
        return self.loc.new_tensor(0.5 * len(self.loc) * (1 + math.log(2 * math.pi)))

    def kl(self, other: "GaussianDistribution") -> Tensor:
        """KL(self || other)."""
        return 0.5 * (self.loc - other.loc).square().sum()


class GaussianPolicy(Policy):
    """Tableaus whose rows and noise levels are normal around a start's: z = std * u, u ~ N(loc, I).

    The coordinates are those of TableauStudent: each row on the principal axes of the denoised states, and
    log sigmas. `loc` is 0 at first, where the tableau is the start's, bit for bit. Stages of the levels
    `frozen` keep their rows and noise levels, and so does the output row where the last level is frozen.
    """

    narrower = "lower ppo.policy_std"  # what makes its draws more alike
    weights: Tensor
    axes: Tensor
    sigma_units: Tensor
    std: Tensor

    def __init__(
        self,
        start: Tableau,
        std: float = FIRST_STD,
        gram: Tensor | None = None,
        frozen: Sequence[int] = (),
    ):
        super().__init__()
        student = TableauStudent(start, True, gram, MOMENT_DAMPING)
        self.start = start
        for name in ("weights", "axes", "sigma_units"):
            self.register_buffer(name, student.get_buffer(name).clone())
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64))
        self.terms = [usable_terms(start, row) for row in range(start.evaluations + 1)]
        kept = frozen_rows(start, frozen)
        places = [
            (row, axis)
            for row, terms in enumerate(self.terms)
            for axis in range(len(terms))
            if row not in kept
        ]
        self.rows, self.columns = [row for row, _ in places], [axis for _, axis in places]
        self.free_sigmas = [s for s in self.sigma_units.nonzero()[:, 0].tolist() if s not in kept]
        count = len(places) + len(self.free_sigmas)
        self.loc = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self) -> GaussianDistribution:
        """The distribution of the present parameters."""
        return GaussianDistribution(self.loc)

    def base(self) -> GaussianDistribution:
        """The distribution around the start."""
        return GaussianDistribution(torch.zeros_like(self.loc))

    def learned(self, draw: TableauSample) -> Tableau:
        """The tableaus of a draw, one an image."""
        return self.tableau(draw.coordinates)

    def mean(self) -> Tableau:
        """The tableau at the mean: what is exported."""
        return self.tableau(self.loc)

    def start_mean(self) -> Tableau:
        """The start."""
        return self.start

    def tableau(self, coordinates: Tensor) -> Tableau:
        """The tableau at coordinates [..., dim]: the start's numbers and what the coordinates change."""
        z, start = (self.std * coordinates).cpu(), self.start
        sigmas, rows = self._numbers(z)
        change = rows - self._numbers(torch.zeros_like(self.loc, device="cpu"))[1]
        return Tableau(
            sigmas, start.stages + change[..., :-1, :], start.output + change[..., -1, :], start.levels,
            start.nodes,
        )  # fmt: skip

    def _numbers(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Sigmas [..., S] and rows [..., S + 1, S + 1] in velocities at the changes z [..., dim]."""
        count, images = self.start.evaluations, z.shape[:-1]
        changes = z.new_zeros(*images, count + 1, count + 1)
        changes[..., self.rows, self.columns] = z[..., : len(self.rows)]
        log_factor = z.new_zeros(*images, count)
        log_factor[..., self.free_sigmas] = (
            self.sigma_units.cpu()[self.free_sigmas] * z[..., len(self.rows) :]
        )
        weights = self.weights.cpu() + (self.axes.cpu() @ changes[..., None])[..., 0]
        return velocity_rows(self.start, weights, log_factor.exp())

    def drift(self) -> dict[str, float]:
        """How far the mean is from the start: RMS of the output row and of log sigmas."""
        with torch.no_grad():
            now = self.mean()
        return {
            "policy_std": self.std.item(),
            "drift_output": (now.output - self.start.output).square().mean().sqrt().item(),
            "drift_sigmas": (now.sigmas / self.start.sigmas).log().square().mean().sqrt().item(),
        }

    def describe(self, learned: Any) -> dict[str, list]:
        """A tableau's numbers for an evaluation record."""
        return {"sigmas": learned.sigmas.tolist(), "output": learned.output.tolist()}

    def drawn_numbers(self, draw: Any, image: int) -> dict[str, list]:
        """What was drawn for an image, for the record of a skipped step."""
        return {"coordinates": draw.coordinates[image].tolist()}

    def residual_parameters(self) -> list[nn.Parameter]:
        return [self.loc]

    def provenance(self) -> dict:
        """What was measured for the policy."""
        return {"policy_std": self.std.item()}


def frozen_rows(start: Tableau, levels: Sequence[int]) -> set[int]:
    """The stages of some levels; with the last level also the output row, S."""
    rows = {stage for level in levels for stage in start.levels[level]}
    return rows | {start.evaluations} if len(start.levels) - 1 in levels else rows
