"""The processes of a training run: work shared over them, messages of the first, requests to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
from torch import Tensor

from common.distributed import Ranks, distributed_map, never


@dataclass(frozen=True)
class Processes:
    """The ranks of a run, and what they ask before each chunk of work: whether the run should stop."""

    ranks: Ranks
    stop_requested: Callable[[], bool] = never
    """A collective, with the same answer on all ranks."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.ranks.rank == 0

    def map(self, measure: Callable[[slice], Tensor], count: int, chunk: int) -> Tensor:
        """measure(rows i to j) -> [j - i, ...] over `count` rows, the ranks taking chunks in turn: [count,
        ...] float64. StopRequested once a stop was requested.
        """
        return distributed_map(measure, count, chunk, self.ranks, self.stop_requested)

    def echo(self, text: str) -> None:
        """Print a message once."""
        if self.first:
            click.echo(text)


class StopRequest:
    """Whether this process, and so the run, was asked to stop."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.pending = ranks, False

    def any_rank(self) -> bool:
        """Whether any rank was asked to; all ranks get the same answer."""
        return self.ranks.any_rank(self.pending)


@contextmanager
def stop_requests(ranks: Ranks) -> Iterator[StopRequest]:
    """Turn SIGTERM and the first Ctrl-C into a request to stop after the chunk in hand; a second Ctrl-C ends
    at once.
    """
    request = StopRequest(ranks)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def handle(number, frame):
        if request.pending and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.pending = True

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
