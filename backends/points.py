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
    """How the rows of a level are evaluated, point by point or several at once; the results are the same to rounding.

    With `ranks` the points are shared out over them, and with `branches` the two halves of guidance as well; each rank
    must hold the same state. `rows` is what one network call may have at most: it is halved whenever memory ends.
    """

    ranks: Ranks | None = None
    branches: bool = False
    rows: int | None = None

    def velocity(self, backend: Backend, condition: Condition) -> Velocity:
        """The velocity of a backbone under a condition of B images, for levels of M points: x [M*B, ...]."""
        if self.ranks is None:
            whole = backend.velocity(condition)
            return lambda x, sigma: self._in_calls(whole, x, sigma, len(condition))
        parts = condition.branches() if self.branches else [condition]
        velocities = [backend.velocity(part) for part in parts]
        return lambda x, sigma: self._over_ranks(velocities, x, sigma, condition)

    def _in_calls(self, velocity: Velocity, x: Tensor, sigma: Tensor, images: int) -> Tensor:
        """One call, or calls of at most `rows` rows in whole points."""
        while True:
            size = len(x) if self.rows is None else max(1, self.rows // images) * images
            try:
                if size >= len(x):
                    return velocity(x, sigma)
                levels = sigma.expand(len(x))
                return torch.cat([velocity(x[i : i + size], levels[i : i + size]) for i in range(0, len(x), size)])
            except torch.OutOfMemoryError as error:
                if min(size, len(x)) == images:
                    reason = str(error).splitlines()[0][:200]
                    raise BackendError(f"out of memory with {images} images in a call: use smaller batches ({reason})") from None
            self.rows = -(-min(size, len(x)) // images // 2) * images
            torch.cuda.empty_cache()

    def _over_ranks(self, velocities: list[Velocity], x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Task b * M + m is branch b at point m; each rank takes a run of them, and one all-gather brings them together."""
        images, branches = len(condition), len(velocities)
        points = len(x) // images
        tasks = branches * points
        if tasks == 1:
            return self._in_calls(velocities[0], x, sigma, images)
        share = -(-tasks // self.ranks.world)
        first = self.ranks.rank * share
        mine, levels = x.new_zeros(share * images, *x.shape[1:]), sigma.expand(len(x))
        for b, velocity in enumerate(velocities):
            begin, end = max(first, b * points), min(first + share, (b + 1) * points)
            if begin < end:
                rows = slice((begin - b * points) * images, (end - b * points) * images)
                mine[(begin - first) * images : (end - first) * images] = self._in_calls(velocity, x[rows], levels[rows], images)
        found = self.gather(mine)[: tasks * images]
        return guide(found, condition) if branches == 2 else found

    def gather(self, mine: Tensor) -> Tensor:
        """The rows of all ranks in their order."""
        parts = [torch.empty_like(mine) for _ in range(self.ranks.world)]
        with lost_ranks_told():
            dist.all_gather(parts, mine)
        return torch.cat(parts)
