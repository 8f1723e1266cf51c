"""Work that the ranks share, with results that do not depend on how many they are."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from backends.distributed import Ranks

Part = TypeVar("Part")


class StopRequested(Exception):
    """Work that was abandoned because the run was asked to stop; all ranks raise it at the same chunk."""


def never() -> bool:
    """No stop is ever requested."""
    return False


def settle_threads(ranks: Ranks) -> None:
    """One thread a process on a CPU: sums then have one order, and a run the same bits, whatever the machine; use more processes."""
    if ranks.device.type == "cpu":
        torch.set_num_threads(1)


def broadcast(value, ranks: Ranks):
    """Rank 0's value on all ranks."""
    if ranks.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=ranks.device if ranks.device.type == "cuda" else None)
    return box[0]


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """Rows [n, d] that the ranks hold in turn (rank r has row r, r + world, ...) in their common order, on all ranks.

    n may differ by one between ranks; summing the result gives the same bits whatever the number of ranks.
    """
    if ranks.world == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=ranks.device) for _ in range(ranks.world)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=ranks.device))
    longest = max(int(c) for c in counts)
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype, device=ranks.device)
    padded[: len(rows)] = rows.to(ranks.device)
    parts = [torch.empty_like(padded) for _ in range(ranks.world)]
    dist.all_gather(parts, padded)
    total = sum(int(c) for c in counts)
    return torch.stack(parts, 1).flatten(0, 1).cpu()[:total]


def taken_in_turn(parts: Sequence[Part], ranks: Ranks, stop_requested: Callable[[], bool] = never) -> Iterator[Part]:
    """This rank's parts, of which rank r has r, r + world, ...; StopRequested once a stop was requested.

    `stop_requested` is a collective: every rank calls it before each round of parts, with or without a part in that round.
    """
    for first in range(0, len(parts), ranks.world):
        if stop_requested():
            raise StopRequested
        yield from parts[first : first + ranks.world][ranks.rank : ranks.rank + 1]


def shared_out(
    measure: Callable[[slice], Tensor], count: int, chunk: int, ranks: Ranks, stop_requested: Callable[[], bool] = never
) -> Tensor:
    """measure(rows i to j) -> [j - i, ...] of `count` rows, `chunk` at a time, the ranks taking chunks in turn: [count, ...] float64.

    A row's chunk, and so its rounding, does not depend on the number of ranks. A stop ends it between chunks: StopRequested.
    """
    parts = [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]
    mine = [measure(part).cpu().double() for part in taken_in_turn(parts, ranks, stop_requested)]
    width = broadcast(list(mine[0].shape[1:]) if mine else None, ranks)
    padded = torch.zeros(len(mine), chunk, *width, dtype=torch.float64)
    for row, found in zip(padded, mine, strict=True):
        row[: len(found)] = found
    return gather_rows(padded, ranks).flatten(0, 1)[:count].clone()
