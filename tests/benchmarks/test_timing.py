"""Times of jobs in turn, the time inside network calls, and ratios of paired repeats."""

import pytest
import torch

from benchmarks.speed import overhead, timing
from benchmarks.speed.timing import CallTimer, in_turn, ratio

CPU = torch.device("cpu")


class Clock:
    """A clock that only passes when it is moved."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    return clock


class Network(torch.nn.Module):
    """A network of 3 seconds a call, with memory for one row."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def forward(self, rows: int) -> None:
        self.clock.wait(3.0)
        if rows > 1:
            raise torch.OutOfMemoryError


def test_jobs_take_turns_and_keep_their_times(clock):
    order = []
    jobs = [lambda: (order.append("a"), clock.wait(1.0)), lambda: (order.append("b"), clock.wait(2.0))]
    times = in_turn(jobs, 3, CPU, before=lambda: clock.wait(10.0))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # the first round is not timed
    assert times.tolist() == [[1.0] * 3, [2.0] * 3]


def test_the_time_inside_calls_leaves_out_what_surrounds_them(clock):
    network = Network(clock)
    timer = CallTimer(lambda: [(clock.wait(1.0), network(1)) for _ in range(4)], network, CPU)
    times = in_turn([timer, lambda: network(1)], 3, CPU)
    assert times[0].tolist() == [16.0] * 3
    assert timer.inside().tolist() == [12.0] * 4  # with the untimed round, without the other job


def test_a_call_out_of_memory_does_not_count(clock):
    network = Network(clock)

    def halved() -> None:
        with pytest.raises(torch.OutOfMemoryError):
            network(2)
        network(1)
        network(1)

    timer = CallTimer(halved, network, CPU)
    timer()
    assert timer.inside().tolist() == [6.0]
    assert overhead.recorded_calls(network, halved) == [((1,), {}), ((1,), {})]


def test_the_ratio_is_the_median_over_pairs_of_repeats():
    base = torch.tensor([1.0, 10.0, 1.0] * 5, dtype=torch.float64)  # every third repeat on a slow machine
    assert ratio(1.5 * base, base) == pytest.approx({"ratio": 1.5, "low": 1.5, "high": 1.5})
    ones = torch.ones(4, dtype=torch.float64)
    assert ratio(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), ones)["ratio"] == 2.5


def test_the_interval_of_a_ratio_is_that_of_its_median():
    values = torch.linspace(1, 3, 21, dtype=torch.float64)
    interval = ratio(values, torch.ones_like(values))
    assert (interval["low"], interval["high"]) == pytest.approx((1.6, 2.4), abs=0.1)  # of values: 1.05, 2.95
