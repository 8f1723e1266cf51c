"""What the speed benchmarks time: the network calls of each job, and the columns that their times go to."""

import pytest
import torch

from benchmarks.speed import compile, overhead, parallel, points
from benchmarks.speed.networks import Case, digits, network_of
from common.distributed import Ranks
from solvers import compile_tableau

from .rows import rows_of_calls

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case():
    """Stable Diffusion 3's twin, whose guidance doubles the rows of a call, with one image."""
    with torch.inference_mode():
        yield Case(digits("sd3", CPU), "sd3", 1)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def times(monkeypatch):
    """A module's in_turn, replaced: job i takes i + 1 seconds."""

    def replace(module) -> None:
        def in_turn(jobs, repeats, device, **_):
            for job in jobs:
                job()
            return torch.arange(1.0, len(jobs) + 1).double()[:, None].repeat(1, repeats)

        monkeypatch.setattr(module, "in_turn", in_turn)

    return replace


@pytest.mark.parametrize("name", ["euler", "unipc", "epd", "tableau"])
def test_bare_calls_are_those_of_the_trajectory(case, name):
    solver, nodes = overhead.solvers_of(case.backend, 4)[name]
    jobs = overhead.Jobs.make(case, solver, nodes)
    rows = rows_of_calls(case.network, jobs.whole)
    assert rows_of_calls(case.network, jobs.bare) == rows
    assert sum(rows) == 2 * compile_tableau(solver, nodes).evaluations
    assert len(rows) == len(jobs.calls)


def test_bare_calls_give_the_same_again(case):
    solver, nodes = overhead.solvers_of(case.backend, 2)["euler"]
    jobs, outputs = overhead.Jobs.make(case, solver, nodes), []
    hook = case.network.register_forward_hook(lambda *args: outputs.append(args[-1][0]))
    jobs.whole()
    jobs.bare()
    hook.remove()
    assert len(outputs) == 4
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_overhead_is_whole_over_bare(case, times, monkeypatch):
    times(overhead)
    solvers = {"euler": overhead.solvers_of(case.backend, 2)["euler"]}
    monkeypatch.setattr(overhead, "solvers_of", lambda backend, depth: solvers)
    (row,) = overhead.measure(case, 2, 1)
    assert (row["ratio"], row["seconds"]) == (0.5, 1.0)
    assert row["inside"]["ratio"] > 1  # of one second; the calls took less
    assert (row["depth"], row["evaluations"], row["calls"]) == (2, 2, 2)


def test_levels_and_trajectories_have_k_points(case, times):
    jobs = points.Jobs.make(case)
    for k in (1, 3):
        assert rows_of_calls(case.network, lambda k=k: jobs.level(k)) == [2 * k]
        assert rows_of_calls(case.network, lambda k=k: jobs.trajectory(k)) == [2, 2 * k] * points.INTERVALS
    times(points)
    rows = points.measure(case, 1)
    assert [r["level"]["ratio"] for r in rows] == [r["trajectory"]["ratio"] for r in rows] == [1, 2, 3, 4]
    assert [r["level_seconds"] for r in rows] == [1, 2, 3, 4]
    assert [(r["points"], r["evaluations"]) for r in rows] == [(1, 6), (2, 9), (3, 12), (4, 15)]


@pytest.mark.parametrize("mode, node_rows", [("points", 2), ("points-cfg", 1)])
def test_each_of_two_ranks_evaluates_its_share(case, monkeypatch, mode, node_rows):
    """The node's velocity is every rank's own, or one branch of CFG; then one point of two."""
    monkeypatch.setattr(Ranks, "all_gather", lambda self, rows: [rows, rows])
    second = parallel.Jobs(case, 2, mode, Ranks(1, 2, CPU))
    assert rows_of_calls(case.network, second.together) == [node_rows, 2] * parallel.INTERVALS
    assert rows_of_calls(case.network, second.crowded) == [2, 4] * parallel.INTERVALS
    assert rows_of_calls(case.network, second.alone) == []
    first = parallel.Jobs(case, 2, mode, Ranks(0, 2, CPU))
    assert rows_of_calls(case.network, first.alone) == [2, 4] * parallel.INTERVALS


def test_one_rank_alone_over_all_together(case, times, monkeypatch):
    times(parallel)
    monkeypatch.setattr(Ranks, "all_gather", lambda self, rows: [rows])
    row = parallel.measure(parallel.Jobs(case, 2, "points-cfg", Ranks(0, 1, CPU)), 1)
    assert (row["ratio"], row["crowding"], row["ideal"]) == (0.5, 3.0, 1)
    assert (
        0
        < row["gather_seconds"]
        == pytest.approx(row["gather_share"] * (row["level1_seconds"] + row["level2_seconds"]))
    )


def test_an_all_gather_is_timed_within_its_level(case, monkeypatch):
    monkeypatch.setattr(Ranks, "all_gather", lambda self, rows: [rows])
    levels = parallel.Jobs(case, 2, "points", Ranks(0, 1, CPU)).levels()
    assert [level.points for level in levels] == [1, 2] * parallel.INTERVALS
    assert all(level.gather_seconds == 0 for level in levels[::2])  # one point: nothing to gather
    assert all(0 < level.gather_seconds < level.seconds for level in levels[1::2])


@pytest.mark.parametrize(
    "k, branches, world, expected",
    [(2, 1, 2, 1.5), (4, 1, 4, 2.5), (3, 1, 2, 4 / 3), (2, 2, 4, 3), (2, 2, 2, 2)],
)
def test_the_ideal_of_points_over_processes(k, branches, world, expected):
    assert parallel.ideal(k, branches, world) == pytest.approx(expected)


def test_compiled_is_over_eager(times):
    times(compile)
    eager, compiled = (Case(digits("ldm", CPU), "ldm", 1) for _ in range(2))
    row = compile.measure(eager, compiled, 1)
    assert (row["ratio"], row["eager_seconds"]) == (0.5, 2.0)
    assert row["difference"] == row["compilations"] == row["recompilations"] == 0
    next(network_of(compiled.backend, "ldm").parameters()).mul_(1.5)
    assert compile.measure(eager, compiled, 1)["difference"] > 0.01
