"""Where the time of a run goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent in named parts since they were last read; on a GPU the work that a part started is waited
    for.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a block to a part."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[name] += time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """Seconds by part, which then start again from 0."""
        seconds = dict(self.seconds)
        self.seconds.clear()
        return seconds
