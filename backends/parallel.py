"""Where the points of a level are evaluated: in one network call, in as many as memory needs, or on several devices."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from solvers.sampling import Velocity

from .base import Backend, BackendError, Condition, guide
from .distributed import Ranks, lost_ranks_told


@dataclass
class Points:
    """How the rows of a level are evaluated, in one call or in several; the results are the same to rounding.

    With `ranks` the points are shared out over them, and with `branches` the two halves of guidance as well; each rank
    must hold the same state. `rows` is how many of x one call may have: it is halved whenever memory ends, down to one.
    """

    ranks: Ranks | None = None
    branches: bool = False
    rows: int | None = None

    def velocity(self, backend: Backend, condition: Condition) -> Velocity:
        """The velocity of a backbone under a condition of B images, for levels of M points: x [M*B, ...]."""
        if self.ranks is None:
            return _Calls(self, backend, condition)
        parts = condition.branches() if self.branches else [condition]
        velocities = [_Calls(self, backend, part) for part in parts]
        return lambda x, sigma: self._over_ranks(velocities, x, sigma, condition)

    def _over_ranks(self, velocities: list[Velocity], x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Task b * M + m is branch b at point m; each rank takes a run of them, and one all-gather brings them together."""
        images, branches = len(condition), len(velocities)
        points = len(x) // images
        tasks = branches * points
        if tasks == 1:
            return velocities[0](x, sigma)
        share = -(-tasks // self.ranks.world)
        first = self.ranks.rank * share
        mine, levels = x.new_zeros(share * images, *x.shape[1:]), sigma.expand(len(x))
        for b, velocity in enumerate(velocities):
            begin, end = max(first, b * points), min(first + share, (b + 1) * points)
            if begin < end:
                rows = slice((begin - b * points) * images, (end - b * points) * images)
                mine[(begin - first) * images : (end - first) * images] = velocity(x[rows], levels[rows])
        found = self.gather(mine)[: tasks * images]
        return guide(found, condition) if branches == 2 else found

    def gather(self, mine: Tensor) -> Tensor:
        """The rows of all ranks in their order."""
        parts = [torch.empty_like(mine) for _ in range(self.ranks.world)]
        with lost_ranks_told():
            dist.all_gather(parts, mine)
        return torch.cat(parts)


class _Calls:
    """A velocity in network calls of at most `points.rows` rows: of whole points, or of some of the images at one point."""

    def __init__(self, points: Points, backend: Backend, condition: Condition):
        self.points, self.backend, self.condition = points, backend, condition
        self.whole = backend.velocity(condition)
        self.groups: dict[tuple[int, int], Velocity] = {}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        images = len(self.condition)
        while True:
            rows = len(x) if self.points.rows is None else min(self.points.rows, len(x))
            try:
                return self._in_parts(x, sigma, rows)
            except torch.OutOfMemoryError as error:
                if rows == 1:
                    raise BackendError(f"out of memory with one image in a call ({str(error).splitlines()[0][:200]})") from None
            half = -(-rows // 2)
            self.points.rows = half if half < images else -(-half // images) * images
            torch.cuda.empty_cache()

    def _in_parts(self, x: Tensor, sigma: Tensor, rows: int) -> Tensor:
        if rows == len(x):
            return self.whole(x, sigma)
        images, levels = len(self.condition), sigma.expand(len(x))
        if rows >= images:
            size = rows // images * images
            return torch.cat([self.whole(*part) for part in zip(x.split(size), levels.split(size), strict=True)])
        found = []
        for point, there in zip(x.split(images), levels.split(images), strict=True):
            parts = zip(point.split(rows), there.split(rows), strict=True)
            found += [self._group(i * rows, rows)(*part) for i, part in enumerate(parts)]
        return torch.cat(found)

    def _group(self, first: int, rows: int) -> Velocity:
        """The velocity of some of the images."""
        if (first, rows) not in self.groups:
            mine = range(first, min(first + rows, len(self.condition)))
            self.groups[first, rows] = self.backend.velocity(self.condition.select(mine))
        return self.groups[first, rows]
