"""Parallel evaluation of the points of a level: one network call, as many as memory needs, or several
devices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.distributed import Ranks
from solvers.solver import Velocity

from .base import Backend, BackendError
from .conditioning import Condition, apply_cfg


@dataclass
class ParallelEvaluator:
    """How the rows of a level are evaluated, in one call or in several; the results are the same to rounding.

    Attributes:
        ranks: processes that the points are divided among; each must hold the same state.
        branches: whether the two branches of CFG are divided among them as well.
        rows: rows of x in one call; halved whenever memory runs out, down to one.
    """

    ranks: Ranks | None = None
    branches: bool = False
    rows: int | None = None

    def velocity(self, backend: Backend, condition: Condition) -> Velocity:
        """The velocity of a backbone under a condition of B images, for levels of M points: x [M*B, ...]."""
        if self.ranks is None:
            return ChunkedVelocity(self, backend, condition)
        return DistributedVelocity(self, self.ranks, backend, condition)


class DistributedVelocity:
    """A velocity whose points, and with `branches` CFG branches, are evaluated by different ranks."""

    def __init__(self, evaluator: ParallelEvaluator, ranks: Ranks, backend: Backend, condition: Condition):
        self.ranks, self.condition = ranks, condition
        parts = condition.branches() if evaluator.branches else [condition]
        self.branches = [ChunkedVelocity(evaluator, backend, part) for part in parts]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Task b * M + m is branch b at point m; each rank takes a run of tasks, and one all-gather joins
        them.
        """
        images = len(self.condition)
        points = len(x) // images
        tasks = len(self.branches) * points
        if tasks == 1:
            return self.branches[0](x, sigma)
        share = -(-tasks // self.ranks.world)
        first, sigmas = self.ranks.rank * share, sigma.expand(len(x))
        own = x.new_zeros(share * images, *x.shape[1:])
        for b, velocity in enumerate(self.branches):
            begin, end = max(first, b * points), min(first + share, (b + 1) * points)
            if begin < end:
                rows = slice((begin - b * points) * images, (end - b * points) * images)
                own[(begin - first) * images : (end - first) * images] = velocity(x[rows], sigmas[rows])
        output = torch.cat(self.ranks.all_gather(own))[: tasks * images]
        return apply_cfg(output, self.condition) if len(self.branches) == 2 else output


class ChunkedVelocity:
    """A velocity in network calls of at most `evaluator.rows` rows: of whole points, or images of one
    point.
    """

    def __init__(self, evaluator: ParallelEvaluator, backend: Backend, condition: Condition):
        self.evaluator, self.backend, self.condition = evaluator, backend, condition
        self.whole = backend.velocity(condition)
        self.groups: dict[tuple[int, int], Velocity] = {}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        images = len(self.condition)
        while True:
            rows = len(x) if self.evaluator.rows is None else min(self.evaluator.rows, len(x))
            try:
                return self.whole(x, sigma) if rows == len(x) else self._in_chunks(x, sigma, rows)
            except torch.OutOfMemoryError as error:
                if rows == 1:
                    reason = str(error).splitlines()[0][:200]
                    raise BackendError(f"out of memory with one image in a call ({reason})") from None
            half = -(-rows // 2)
            self.evaluator.rows = half if half < images else -(-half // images) * images
            torch.cuda.empty_cache()

    def _in_chunks(self, x: Tensor, sigma: Tensor, rows: int) -> Tensor:
        images, sigmas = len(self.condition), sigma.expand(len(x))
        if rows >= images:
            size = rows // images * images
            chunks = zip(x.split(size), sigmas.split(size), strict=True)
            return torch.cat([self.whole(*chunk) for chunk in chunks])
        outputs = []
        for point, point_sigmas in zip(x.split(images), sigmas.split(images), strict=True):
            chunks = zip(point.split(rows), point_sigmas.split(rows), strict=True)
            outputs += [self._of_images(i * rows, rows)(*chunk) for i, chunk in enumerate(chunks)]
        return torch.cat(outputs)

    def _of_images(self, first: int, rows: int) -> Velocity:
        """The velocity of some of the images."""
        if (first, rows) not in self.groups:
            indices = range(first, min(first + rows, len(self.condition)))
            self.groups[first, rows] = self.backend.velocity(self.condition.select(indices))
        return self.groups[first, rows]
