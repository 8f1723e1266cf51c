"""Times within one run: jobs in turn, ratios of paired repeats and their intervals."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

RESAMPLES = 2000


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of some work, to the end of what it started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def in_turn(
    jobs: list[Callable[[], object]],
    repeats: int,
    device: torch.device,
    before: Callable[[], object] = lambda: None,
) -> Tensor:
    """Seconds [jobs, repeats] of jobs that take turns, in reverse order every other time, after one untimed
    round; `before` runs ahead of each job, untimed.
    """
    times = torch.zeros(len(jobs), repeats, dtype=torch.float64)
    for job in jobs:
        job()
    for i in range(repeats):
        order = list(range(len(jobs)))[:: 1 if i % 2 == 0 else -1]
        for j in order:
            before()
            times[j, i] = seconds(jobs[j], device)
    return times


def mark(device: torch.device) -> float | torch.cuda.Event:
    """Now: on a GPU an event on its stream, for which nobody waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds from one mark to another, both of them past."""
    return end - begin if isinstance(begin, float) else 1e-3 * begin.elapsed_time(end)


class CallTimer:
    """Some work that notes, each time it is done, when the network calls within it begin and end."""

    def __init__(self, work: Callable[[], object], network: nn.Module, device: torch.device) -> None:
        self.work, self.network, self.device = work, network, device
        self.runs: list[list[tuple]] = []

    def __call__(self) -> None:
        """Do the work."""
        begun, calls = [], []  # a call that fails, for want of memory, has begun and has no end
        before = self.network.register_forward_pre_hook(lambda *_: begun.append(mark(self.device)))
        after = self.network.register_forward_hook(lambda *_: calls.append((begun[-1], mark(self.device))))
        self.work()
        before.remove()
        after.remove()
        self.runs.append(calls)

    def inside(self) -> Tensor:
        """Seconds [runs] spent inside the calls, once the device has done all of them."""
        return torch.tensor(
            [sum(between(*call) for call in calls) for calls in self.runs], dtype=torch.float64
        )


def ratio(times: Tensor, base: Tensor) -> dict[str, float]:
    """The median of the ratios of paired repeats and its 95 % interval, from resampled repeats."""
    ratios = times / base
    generator = torch.Generator().manual_seed(0)
    drawn = ratios[torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=generator)].quantile(0.5, 1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"ratio": ratios.quantile(0.5).item(), "low": low, "high": high}


def shown(row: dict) -> str:
    """A ratio and its interval."""
    return f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def spread(values: list[float]) -> str:
    """The least and the largest."""
    return f"{min(values):.2f} to {max(values):.2f}"
