"""The commands of the speed benchmarks: their rows, networks and files; times are not judged here."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import report
from benchmarks.report import write_json
from benchmarks.speed import compile, memory, networks, overhead, parallel, pipelines, points, summary
from benchmarks.speed.networks import Networks, condition_of, full_size
from solvers import Euler, Spec, UserError

from .. import forked

CPU = torch.device("cpu")
CUT = ("--full", "--layers", "1", "--resolution", "64", "--family", "sd3")
SMALL = ("--batch", "1", "--repeats", "3")


def rows_of(command, path: Path, *arguments: str) -> list[dict]:
    """The rows that a command writes."""
    whole = [*arguments, "--device", "cpu", "--out", str(path)]
    result = CliRunner().invoke(command, whole, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(path.read_text())
    assert written["machine"].keys() >= {"device", "torch", "date"}
    return written["rows"]


def test_a_result_has_the_settings_of_the_allocator(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    settings = {"MALLOC_MMAP_THRESHOLD_": "1", "MALLOC_TRIM_THRESHOLD_": "2"}
    for environment, expected in ({}, {}), (settings | {"MALLOCATED": "3"}, settings):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        write_json(tmp_path / "result.json", {}, [], CPU)
        machine = json.loads((tmp_path / "result.json").read_text())["machine"]
        assert machine.items() >= expected.items()
        assert machine.keys() == {"device", "torch", "diffusers", "date", *expected}


def test_full_size_results_have_files_of_their_own(tmp_path):
    assert report.result_path("a", Networks(full=True).kind, None).name == "a_full.json"
    assert report.result_path("a", Networks(full=True, resolution=64).kind, None).name == "a_cut.json"
    assert report.result_path("a", Networks().kind, None).name == "a.json"
    assert report.result_path("a", "_full", tmp_path / "b") == tmp_path / "b"
    shutil.copy(report.RESULTS / "overhead.json", tmp_path / "overhead_full.json")
    shown = CliRunner().invoke(summary.main, ["--results", str(tmp_path)], catch_exceptions=False).output
    assert shown.startswith("benchmarks.speed.overhead (")


def test_overhead_has_a_row_for_each_solver(tmp_path):
    rows = rows_of(overhead.main, tmp_path / "o.json", "--family", "flux", "--depth", "4", *SMALL)
    assert [r["solver"] for r in rows] == ["euler", "ipndm", "dpmpp", "unipc", "epd", "epd-plugin", "tableau"]
    for row in rows:
        assert row["calls"] == row["depth"] == 4
        assert row["evaluations"] == {"epd": 6, "epd-plugin": 6, "tableau": 8}.get(row["solver"], 4)
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert 1 < row["inside"]["low"] <= row["inside"]["ratio"] <= row["inside"]["high"]


def test_points_have_a_row_for_each_k(tmp_path):
    rows = rows_of(points.main, tmp_path / "p.json", "--family", "flux", *SMALL)
    assert [(r["points"], r["evaluations"]) for r in rows] == [(1, 6), (2, 9), (3, 12), (4, 15)]
    assert rows[0]["level"]["ratio"] == rows[0]["trajectory"]["ratio"] == 1


def test_points_over_two_processes(tmp_path):
    path = tmp_path / "p.json"
    arguments = ("--family", "sd3", "--points", 2, *SMALL, "--device", "cpu", "--out", path)
    done = forked.start("benchmarks.speed.parallel", *arguments, ranks=2).wait()
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    expected = [("points", 2, 1.5), ("points-cfg", 2, 2.0)]
    assert [(r["mode"], r["processes"], r["ideal"]) for r in rows] == expected
    assert all(0 < r["gather_share"] < 1 for r in rows)


def test_points_over_processes_start_under_torchrun(monkeypatch):
    commands = []

    def run(command, env):
        commands.append(command)
        assert env["OMP_NUM_THREADS"] == "1"
        return forked.subprocess.CompletedProcess(command, 3)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(parallel.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["parallel", "--processes", "2"])
    result = CliRunner().invoke(parallel.main, ["--processes", "2", "--device", "cpu"])
    assert result.exit_code == 3
    assert commands[0][1:3] == ["-m", "torch.distributed.run"]
    assert commands[0][-4:] == ["-m", "benchmarks.speed.parallel", "--processes", "2"]


def test_full_size_networks_cut_short(tmp_path, monkeypatch):
    """The real widths of Stable Diffusion 3, one layer, at 64 pixels."""
    made = []
    monkeypatch.setattr(networks, "full_size", lambda *args: made.append(full_size(*args)) or made[-1])
    monkeypatch.setattr(
        overhead,
        "solvers_of",
        lambda backend, depth: {"euler": (Euler(), backend.sigmas(Spec(num_steps=depth + 1)))},
    )
    monkeypatch.setattr(
        overhead,
        "in_turn",
        lambda jobs, repeats, device: torch.tensor([[job() or 1.0] for job in jobs]).double(),
    )
    (row,) = rows_of(overhead.main, tmp_path / "o.json", *CUT, "--depth", "2", *SMALL)
    assert (row["evaluations"], row["calls"]) == (2, 2)
    settings = {"full": True, "layers": 1, "resolution": 64, "repeats": 3}
    assert json.loads((tmp_path / "o.json").read_text())["settings"] == settings
    (backend,) = made
    assert sum(p.numel() for p in backend.pipe.transformer.parameters()) / 1e6 == pytest.approx(73.8, abs=0.1)
    with torch.inference_mode():
        velocity = backend.velocity(condition_of(backend, "sd3", 1))
        output = velocity(backend.initial_latents([0], 1.0), torch.tensor(0.5, dtype=torch.float64))
    assert output.shape == (1, 16, 8, 8)
    assert output.isfinite().all()


@pytest.mark.parametrize(
    "benchmark", [overhead, points, parallel, pipelines, compile, memory], ids=lambda module: module.__name__
)
def test_the_twins_are_not_cut_short(tmp_path, benchmark):
    with pytest.raises(UserError, match="--layers and --resolution cut full-size networks short: add --full"):
        rows_of(benchmark.main, tmp_path / "b.json", "--layers", "1")


def test_a_resolution_that_no_patches_fill_is_refused(tmp_path):
    with pytest.raises(UserError, match="--resolution 100: expected a multiple of 16 pixels"):
        rows_of(points.main, tmp_path / "p.json", "--full", "--resolution", "100")


def test_a_trajectory_needs_little_more_memory_than_a_call(tmp_path):
    """A solver keeps few states, and recomputed calls need a fraction of all activations."""
    arguments = ["--family", "sd3", "--part", "trajectory", "--part", "training", "--batch", "2"]
    rows = rows_of(memory.main, tmp_path / "m.json", *arguments)
    ratios = {r["solver"]: r["trajectory"] / r["call"] for r in rows if r["part"] == "trajectory"}
    assert len(ratios) == 7
    assert 1 < min(ratios.values()) <= max(ratios.values()) < 1.1
    kept, recomputed, point_by_point = (r["peak"] for r in rows if r["part"] == "training")
    assert kept > 2 * recomputed > 2 * point_by_point


def test_the_peak_counts_what_is_kept_and_not_what_is_freed():
    states, held = torch.zeros(4, 16, 8, 8), []
    keeping = memory.peak_above(lambda: held.extend(states + 1 for _ in range(8)), CPU)
    assert keeping == pytest.approx(8 * states.nbytes, rel=0.01)
    freeing = memory.peak_above(lambda: [(states + 1).sum() for _ in range(8)], CPU)
    assert freeing < 2 * states.nbytes


@pytest.mark.slow
def test_sampling_without_text_encoders_needs_less_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROCESSES", 1)
    rows = rows_of(memory.main, tmp_path / "m.json", "--part", "offload")
    kept, freed = rows
    assert (kept["offload"], freed["offload"]) == (False, True)
    assert freed["sampling"] < kept["sampling"] - 5e8
    assert freed["peak_sampling"] < kept["peak_sampling"]


@pytest.mark.slow
def test_compiled_blocks_are_timed(tmp_path):
    (row,) = rows_of(compile.main, tmp_path / "c.json", "--family", "ldm", *SMALL)
    assert row["compilations"] == 2
    assert row["recompilations"] == 0
    assert row["difference"] < 1e-3
