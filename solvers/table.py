"""The learned part of an EPD solver: a table of positions, weights and scales, one row an interval."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

GAP = 1e-6  # coincident positions are put this far apart


def first(values: Tensor, wrong: Tensor) -> float | list[float]:
    """The first value, or row, for an error message."""
    return values.detach()[wrong][0].tolist()


@dataclass(frozen=True)
class SolverTable:
    """Positions r, simplex weights w and optional scales of K parallel points (EPD-Solver, arXiv 2512.22796).

    Each tensor is [..., N, K] in float64: N intervals, K points; leading dimensions hold one table per image.
    r in [0, 1]; the weights of a row are >= 0 and sum to 1; scales are > 0, None means 1. Else ValueError.
    """

    r: Tensor
    w: Tensor
    scale_dir: Tensor | None = None
    scale_time: Tensor | None = None

    def __post_init__(self):
        for name, value in self.arrays().items():
            value = torch.as_tensor(value).to(torch.float64)
            object.__setattr__(self, name, value)
            if value.ndim < 2 or value.shape != self.r.shape or not value.numel():
                raise ValueError(
                    f"table: {name} has shape {list(value.shape)}, expected [..., intervals, points] as r"
                    f" {list(self.r.shape)}"
                )
            if not value.detach().isfinite().all():
                raise ValueError(
                    f"table: {name} holds {first(value, ~value.isfinite())}, which is not a finite number"
                )
        r, w = self.r.detach(), self.w.detach()
        if (r < 0).any() or (r > 1).any():
            raise ValueError(f"table: a position r lies outside [0, 1]: {first(r, (r < 0) | (r > 1))}")
        if (w < 0).any() or ((w.sum(-1) - 1).abs() > 1e-4).any():
            wrong = (w < 0).any(-1) | ((w.sum(-1) - 1).abs() > 1e-4)
            raise ValueError(f"table: the weights w of a row are not >= 0 with sum 1: {first(w, wrong)}")
        for name in ("scale_dir", "scale_time"):
            if name in self.arrays() and (self.arrays()[name].detach() <= 0).any():
                value = self.arrays()[name].detach()
                raise ValueError(f"table: a {name} is not positive: {first(value, value <= 0)}")

    def arrays(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {k: v for k, v in vars(self).items() if v is not None}

    @property
    def num_intervals(self) -> int:
        return self.r.shape[-2]

    @property
    def num_points(self) -> int:
        return self.r.shape[-1]

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """r, w, scale_dir, scale_time, each [..., N, K]; scales that are absent are ones."""
        ones = torch.ones_like(self.r)
        return (
            self.r,
            self.w,
            ones if self.scale_dir is None else self.scale_dir,
            ones if self.scale_time is None else self.scale_time,
        )

    def gaps(self) -> Tensor:
        """The gaps [..., N, K + 1] between 0, the ascending positions and 1; they sum to 1."""
        before, after = pad(self.r, (1, 0)), pad(self.r, (0, 1), value=1.0)
        return after - before

    @classmethod
    def from_gaps(
        cls, gaps: Tensor, w: Tensor, scale_dir: Tensor | None = None, scale_time: Tensor | None = None
    ) -> "SolverTable":
        """The table of positions r_k = gap_0 + ... + gap_(k-1), the inverse of `gaps`.

        Args:
            gaps: [..., N, K + 1], >= 0 with sum 1 in each row.
            w: [..., N, K], weights.
            scale_dir: [..., N, K], direction scales; None for 1.
            scale_time: [..., N, K], time scales; None for 1.
        """
        positions = gaps.cumsum(-1)[..., :-1].clamp(max=1.0)  # rounding may exceed 1
        return cls(positions, w, scale_dir, scale_time)

    @classmethod
    def uniform(cls, num_intervals: int, num_points: int) -> "SolverTable":
        """Equally spaced points k/(K+1) with equal weights: where learning starts."""
        r = torch.arange(1, num_points + 1, dtype=torch.float64) / (num_points + 1)
        return cls(
            r.expand(num_intervals, -1).clone(),
            torch.full((num_intervals, num_points), 1 / num_points, dtype=torch.float64),
        )

    @classmethod
    def sorted(
        cls, r: Tensor, w: Tensor, scale_dir: Tensor | None = None, scale_time: Tensor | None = None
    ) -> "SolverTable":
        """The same solver with ascending positions, strictly inside (0, 1) and at least 1e-6 apart.

        Weights and scales move with their positions. A position that is NaN or outside [0, 1]: ValueError.
        """
        table = cls(r, w, scale_dir, scale_time)
        order = table.r.argsort(dim=-1, stable=True)
        arrays = {k: v.gather(-1, order) for k, v in table.arrays().items()}
        points, previous = [], torch.zeros_like(arrays["r"][..., 0])
        for k in range(table.num_points):
            highest = 1 - GAP * (table.num_points - k)
            previous = torch.maximum(arrays["r"][..., k], previous + GAP).clamp(max=highest)
            points.append(previous)
        return cls(**arrays | {"r": torch.stack(points, -1)})
