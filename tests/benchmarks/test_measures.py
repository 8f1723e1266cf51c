"""What the speed benchmarks time, and which way round their ratios are, with the clock replaced by counts of
network calls.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from backends.parallel import ParallelEvaluator
from benchmarks import report
from benchmarks.quality import matched_baselines
from benchmarks.speed import compile, overhead, parallel, pipelines, points, summary, timing
from benchmarks.speed.diffusers_baseline import Theirs
from benchmarks.speed.networks import Networks, digits, network_of
from benchmarks.speed.timing import Watched, ratio
from common.distributed import Ranks
from digits.data import ALL_LABELS, evaluation_prompts

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


class Clock:
    """In place of in_turn: does each job once, notes the rows of its network calls, and says that job i took
    times[i] seconds.
    """

    def __init__(self, network, *times: list[float]):
        self.times, self.rows, self.jobs = iter(times), [], []
        network.register_forward_pre_hook(
            lambda module, args, kwargs: self.note(args, kwargs), with_kwargs=True
        )

    def note(self, args: tuple, kwargs: dict) -> None:
        self.rows.append(len(args[0] if args else kwargs["hidden_states"]))

    def of_rows(self, work, device) -> float:
        """In place of seconds: as many as the network is called with rows, and 1 without any."""
        before = len(self.rows)
        work()
        return sum(self.rows[before:]) or 1.0

    def __call__(self, jobs, repeats, device, before=lambda: None):
        for job in jobs:
            self.rows.clear()
            job()
            self.jobs.append(list(self.rows))
        return torch.tensor(next(self.times), dtype=torch.float64)[:, None].repeat(1, repeats)


def test_times_stay_with_their_jobs(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda work, device: work())
    assert timing.in_turn([lambda: 1.0, lambda: 2.0], 3, CPU).tolist() == [[1.0] * 3, [2.0] * 3]


def test_the_ratio_is_the_median_of_paired_ratios():
    base = torch.tensor([1, 2, 4, 8, 16], dtype=torch.float64)
    assert ratio(base * torch.tensor([2, 1, 1, 1.5, 2], dtype=torch.float64), base)["ratio"] == 1.5
    assert ratio(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.ones(4).double())["ratio"] == 2.5
    found = ratio(torch.linspace(1, 3, 21, dtype=torch.float64), torch.ones(21, dtype=torch.float64))
    assert (found["low"], found["high"]) == pytest.approx(
        (1.6, 2.4), abs=0.1
    )  # of the median; the values' own is (1.05, 2.95)


def test_time_inside_calls_is_that_of_the_calls_alone(monkeypatch):
    """By a clock that a call of the network takes 3 s of, and what surrounds it 1 s."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def passing(seconds: float) -> None:
        now[0] += seconds

    network = torch.nn.Identity()
    network.forward = lambda _: passing(3.0)
    watched = Watched(lambda: [(passing(1.0), network(i)) for i in range(4)], network, CPU)
    times = timing.in_turn([watched, lambda: network(0)], 3, CPU)
    assert times[0].tolist() == [16.0] * 3
    assert watched.inside().tolist() == [12.0] * 4  # with the untimed round, and without the other job
    monkeypatch.setattr(timing, "mark", None)
    network(0)  # nobody watches any more


def test_calls_that_fail_and_are_made_again_in_parts_count_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    class Small(torch.nn.Module):
        def forward(self, rows: int) -> None:
            now[0] += 3.0
            if rows > 1:
                raise torch.OutOfMemoryError

    network = Small()

    def halved() -> None:
        with pytest.raises(torch.OutOfMemoryError):
            network(2)
        network(1)
        network(1)

    watched = Watched(halved, network, CPU)
    watched()
    assert watched.inside().tolist() == [6.0]
    assert overhead.recorded_calls(network, halved) == [((1,), {}), ((1,), {})]


def test_overhead_is_a_trajectory_over_its_own_calls(monkeypatch):
    backend = digits("sd3", CPU)
    clock = Clock(network_of(backend, "sd3"), *[[2.0, 1.0]] * 7)
    monkeypatch.setattr(overhead, "in_turn", clock)
    monkeypatch.setattr(Watched, "inside", lambda self: torch.full((3,), 0.5, dtype=torch.float64))
    with torch.inference_mode():
        rows = overhead.measure(backend, "sd3", 1, 4, 3)
    assert [r["ratio"] for r in rows] == [2.0] * 7
    assert [r["seconds"] for r in rows] == [2.0] * 7
    assert [r["inside"]["ratio"] for r in rows] == [4.0] * 7
    assert clock.jobs[::2] == clock.jobs[1::2]
    assert [sum(job) // 2 for job in clock.jobs[::2]] == [r["evaluations"] for r in rows]


def test_points_are_levels_and_trajectories_of_so_many_points(monkeypatch):
    backend = digits("sd3", CPU)
    clock = Clock(network_of(backend, "sd3"), [1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 100.0, 1000.0])
    monkeypatch.setattr(points, "in_turn", clock)
    with torch.inference_mode():
        rows = points.measure(backend, "sd3", 2, 3)
    assert clock.jobs[:4] == [[4 * k] for k in (1, 2, 3, 4)]
    assert clock.jobs[4:] == [[4, 4 * k] * 3 for k in (1, 2, 3, 4)]
    assert [r["level"]["ratio"] for r in rows] == [1, 2, 3, 4]
    assert [r["trajectory"]["ratio"] for r in rows] == [1, 10, 100, 1000]
    assert [r["level_seconds"] for r in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("mode", ["points", "points-cfg"])
def test_processes_are_timed_alone_shared_out_and_all_at_once(monkeypatch, mode):
    backend, split = digits("sd3", CPU), set()
    clock = Clock(network_of(backend, "sd3"), [6.0, 4.0, 9.0])
    monkeypatch.setattr(parallel, "in_turn", clock)
    monkeypatch.setattr(parallel, "seconds", clock.of_rows)
    monkeypatch.setattr(ParallelEvaluator, "gather", lambda self, mine: split.add(self.branches) or mine)
    with torch.inference_mode():
        row = parallel.measure(backend, "sd3", 2, mode, 1, 3, ALONE)
    assert split == {mode == "points-cfg"}
    assert (row["ratio"], row["crowding"]) == (1.5, 1.5)
    assert row["ideal"] == 1  # of one process
    assert (row["level1_seconds"], row["level2_seconds"]) == (
        2,
        4,
    )  # rows: one point, then two, under guidance
    assert row["gather_seconds"] == (
        2 if mode == "points-cfg" else 1
    )  # the node's gradient is shared out in halves of guidance alone
    assert row["gather_share"] == row["gather_seconds"] / 6
    alone, shared, crowded = clock.jobs
    assert alone == crowded == [2, 4] * 3
    assert sum(shared) == sum(alone)


def test_a_process_that_is_not_the_first_waits_while_one_runs_alone(monkeypatch):
    backend = digits("sd3", CPU)
    clock = Clock(network_of(backend, "sd3"), [1.0, 1.0, 1.0])
    monkeypatch.setattr(parallel, "in_turn", clock)
    monkeypatch.setattr(ParallelEvaluator, "gather", lambda self, mine: torch.cat([mine, mine]))
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    with torch.inference_mode():
        parallel.measure(backend, "sd3", 2, "points", 1, 3, Ranks(1, 2, CPU))
    alone, shared, crowded = clock.jobs
    assert alone == []
    assert shared == [2, 2] * 3  # the node's gradient is every rank's own, then one point of two
    assert crowded == [2, 4] * 3


def test_compiled_is_over_eager(monkeypatch):
    eager, fast = digits("ldm", CPU), digits("ldm", CPU)
    monkeypatch.setattr(compile, "in_turn", Clock(network_of(fast, "ldm"), [3.0, 4.0]))
    with torch.inference_mode():
        row = compile.measure("ldm", eager, fast, 1, 3)
    assert (row["ratio"], row["eager_seconds"]) == (0.75, 4.0)
    assert row["difference"] == row["compilations"] == row["recompilations"] == 0
    with torch.no_grad():
        next(network_of(fast, "ldm").parameters()).mul_(1.5)
        monkeypatch.setattr(compile, "in_turn", Clock(network_of(fast, "ldm"), [3.0, 4.0]))
        assert compile.measure("ldm", eager, fast, 1, 3)["difference"] > 0.01


@pytest.fixture(scope="module")
def ldm():
    return digits("ldm", CPU)


def euler(backend, schedule: str) -> pipelines.Ours:
    return pipelines.Ours(pipelines.sampler_of(backend, 7.5, "euler", 3, schedule))


def test_each_side_is_compared_where_it_ends(ldm):
    """Theirs at noise level 0, ours at the last one of training; the nearest has the least error."""
    prompts, seeds, theirs = (
        evaluation_prompts(2, ALL_LABELS),
        [3, 5],
        Theirs(ldm, "dpmpp", "linspace", 3, 7.5),
    )
    ours = euler(ldm, "discrete")
    exam = pipelines.Exam(prompts, seeds, 2, ours.latents(prompts, seeds), theirs.latents(prompts, seeds))
    assert exam.errors(ours).max() < 1e-5
    assert exam.errors(theirs).max() < 1e-5
    assert exam.nearest({"far": euler(ldm, "logsnr"), "near": ours}) == "near"


def test_a_fine_solver_is_kept_at_both_ends(ldm):
    exam = pipelines.Exam.make(ldm, 7.5, 2, 0, 2, 4)
    teacher = pipelines.teacher_sampler(ldm, 7.5, 4)
    torch.testing.assert_close(exam.at_end, teacher.latents(exam.prompts, exam.seeds))
    moved = (exam.at_zero - exam.at_end).abs().max()
    assert 0 < moved < 0.1 * exam.at_end.abs().max()


def test_both_sides_encode_their_prompts_each_time(ldm):
    calls = []
    hook = ldm.pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    for side in (euler(ldm, "discrete"), Theirs(ldm, "unipc", "leading", 3, 7.5)):
        counts = []
        for _ in range(2):
            calls.clear()
            side.images(evaluation_prompts(2, ALL_LABELS), [0, 1])
            counts.append(len(calls))
        assert counts[0] == counts[1] > 0
    hook.remove()


def test_times_are_ours_over_theirs_and_errors_those_of_the_second_exam(ldm, monkeypatch):
    """Sides in the order of the contest took 1, 2, 3 ... seconds: both of theirs, then both of ours of the
    same names, then tables.
    """

    def never(side):
        raise AssertionError("schedules are chosen there, nothing is reported")

    tuning = SimpleNamespace(nearest=lambda candidates: next(iter(candidates)), errors=never)
    exam = SimpleNamespace(
        errors=lambda side: torch.tensor([1.0, 3.0] if isinstance(side, pipelines.Ours) else [2.0, 8.0])
    )
    monkeypatch.setattr(
        pipelines,
        "seconds",
        lambda contest, *_: torch.arange(1, len(contest) + 1, dtype=torch.float64)[:, None].repeat(1, 3),
    )
    with torch.inference_mode():
        rows = pipelines.compare(ldm, "ldm", 4, [1], 3, [tuning, exam])
    found = {(r["theirs"].split(", ")[1], r["ours"]): r for r in rows}
    assert len(found) == len(rows) == 2 * 4
    assert found["DPMSolverMultistepScheduler", "dpmpp"]["ratio"] == 3
    assert found["UniPCMultistepScheduler", "unipc"]["ratio"] == 2
    assert found["UniPCMultistepScheduler", "epd distilled"]["ratio"] == 2.5
    assert {(r["their_rmse"], r["our_rmse"], r["rmse_difference"]) for r in rows} == {(5.0, 2.0, -3.0)}


def test_schedules_of_baselines_are_chosen_on_the_tuning_seeds(monkeypatch):
    monkeypatch.setattr(matched_baselines, "SCHEDULES", ["discrete", "logsnr", "polynomial"])
    monkeypatch.setattr(
        matched_baselines, "sampler_of", lambda backend, guidance, name, depth, schedule: schedule
    )
    monkeypatch.setattr(
        matched_baselines.Grid, "measured", lambda self, name, sampler, schedule: (sampler, schedule)
    )
    tuning = SimpleNamespace(error={"discrete": 2, "logsnr": 1, "polynomial": 3}.get)
    made = matched_baselines.Grid(
        SimpleNamespace(backend=None, guidance=1), tuning, None, {}, Path()
    )  # the other seeds have no errors to tell
    assert made.baselines(["euler"], 4) == [("logsnr", "logsnr")]


def test_full_size_results_have_files_of_their_own(tmp_path):
    assert report.result_path("a", Networks(full=True).kind, None).name == "a_full.json"
    assert report.result_path("a", Networks(full=True, resolution=64).kind, None).name == "a_cut.json"
    assert report.result_path("a", Networks().kind, None).name == "a.json"
    assert report.result_path("a", "_full", tmp_path / "b") == tmp_path / "b"
    shutil.copy(report.RESULTS / "overhead.json", tmp_path / "overhead_full.json")
    shown = CliRunner().invoke(summary.main, ["--results", str(tmp_path)], catch_exceptions=False).output
    assert shown.startswith("benchmarks.speed.overhead (")
