"""The speed benchmarks count what they say they count; their times are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.report import write_json
from benchmarks.speed import compile, memory, networks, overhead, parallel, pipelines, points
from benchmarks.speed.networks import condition_of, digits, full_size, network_of
from benchmarks.speed.parallel import ideal
from benchmarks.speed.timing import in_turn, ratio
from solvers import Euler, Spec, UserError, sample

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def rows_of(command, path: Path, *arguments: str) -> list[dict]:
    result = CliRunner().invoke(
        command, [*arguments, "--device", "cpu", "--out", str(path)], catch_exceptions=False
    )
    assert result.exit_code == 0
    found = json.loads(path.read_text())
    assert found["machine"].keys() >= {"device", "torch", "date"}
    return found["rows"]


def test_a_result_says_what_the_allocator_is_told(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    told = {"MALLOC_MMAP_THRESHOLD_": "1", "MALLOC_TRIM_THRESHOLD_": "2"}
    for environment, expected in ({}, {}), (told | {"MALLOCATED": "3"}, told):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        write_json(tmp_path / "result.json", {}, [], CPU)
        machine = json.loads((tmp_path / "result.json").read_text())["machine"]
        assert machine.items() >= expected.items()
        assert machine.keys() == {"device", "torch", "diffusers", "date", *expected}


def test_jobs_take_turns():
    order = []
    times = in_turn([lambda: order.append("a"), lambda: order.append("b")], 3, CPU)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert times.shape == (2, 3)


def test_the_ratio_is_of_pairs():
    """A machine that is ten times as slow in every third repeat changes nothing."""
    base = torch.tensor([1.0, 10.0, 1.0] * 5, dtype=torch.float64)
    found = ratio(1.5 * base, base)
    assert found == pytest.approx({"ratio": 1.5, "low": 1.5, "high": 1.5})
    noisy = ratio(torch.linspace(1, 3, 21, dtype=torch.float64), torch.ones(21, dtype=torch.float64))
    assert 1 < noisy["low"] < noisy["ratio"] == 2 < noisy["high"] < 3


@pytest.mark.parametrize("family", ["ldm", "sd3", "flux"])
def test_bare_calls_are_those_of_the_trajectory(tmp_path, family):
    rows = rows_of(
        overhead.main,
        tmp_path / "o.json",
        "--family",
        family,
        "--batch",
        "1",
        "--depth",
        "4",
        "--repeats",
        "3",
    )
    assert {r["solver"] for r in rows} == {"euler", "ipndm", "dpmpp", "unipc", "epd", "epd-plugin", "tableau"}
    for row in rows:
        assert row["calls"] == row["depth"] == 4
        assert row["evaluations"] == {"epd": 6, "epd-plugin": 6, "tableau": 8}.get(row["solver"], 4)
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert 1 < row["inside"]["low"] <= row["inside"]["ratio"] <= row["inside"]["high"]


def test_recorded_calls_made_again_give_the_same():
    backend = digits("ldm", CPU)
    condition, network = condition_of(backend, "ldm", 2), network_of(backend, "ldm")
    nodes, start = backend.sigmas(Spec(num_steps=3)), backend.initial_latents([0, 1], backend.sigma_max)
    outputs = []
    hook = network.register_forward_hook(lambda *found: outputs.append(found[-1].sample))
    with torch.inference_mode():
        calls = overhead.recorded_calls(
            network, lambda: sample(Euler(), backend.velocity(condition), start, nodes)
        )
        for args, kwargs in calls:
            network(*args, **kwargs)
    hook.remove()
    assert len(calls) == 2
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_points_in_a_batch(tmp_path):
    rows = rows_of(points.main, tmp_path / "p.json", "--family", "sd3", "--batch", "1", "--repeats", "3")
    assert [(r["points"], r["evaluations"]) for r in rows] == [(1, 6), (2, 9), (3, 12), (4, 15)]
    assert rows[0]["level"]["ratio"] == rows[0]["trajectory"]["ratio"] == 1


@pytest.mark.parametrize(
    "k, branches, world, expected",
    [(2, 1, 2, 1.5), (4, 1, 4, 2.5), (3, 1, 2, 4 / 3), (2, 2, 4, 3), (2, 2, 2, 2)],
)
def test_the_ideal_of_points_over_processes(k, branches, world, expected):
    assert ideal(k, branches, world) == pytest.approx(expected)


def test_points_over_processes(tmp_path):
    """It starts itself under torchrun."""
    path = tmp_path / "p.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.parallel",
        "--family",
        "sd3",
        "--points",
        "2",
        "--batch",
        "1",
        "--repeats",
        "3",
    ]
    command += ["--device", "cpu", "--out", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(r["mode"], r["processes"], r["ideal"]) for r in rows] == [
        ("points", 2, 1.5),
        ("points-cfg", 2, 2.0),
    ]
    assert all(0 < r["gather_share"] < 1 for r in rows)


CUT = ("--full", "--layers", "1", "--resolution", "64", "--family", "sd3")


def test_full_size_networks_cut_short(tmp_path, monkeypatch):
    """The real widths of Stable Diffusion 3, one layer, at 64 pixels."""
    made = []
    monkeypatch.setattr(networks, "full_size", lambda *told: made.append(full_size(*told)) or made[-1])
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
    (row,) = rows_of(
        overhead.main, tmp_path / "o.json", *CUT, "--batch", "1", "--depth", "2", "--repeats", "3"
    )
    assert (row["evaluations"], row["calls"]) == (2, 2)
    assert json.loads((tmp_path / "o.json").read_text())["settings"] == {
        "full": True,
        "layers": 1,
        "resolution": 64,
        "repeats": 3,
    }
    (backend,) = made
    assert sum(p.numel() for p in backend.pipe.transformer.parameters()) / 1e6 == pytest.approx(73.8, abs=0.1)
    with torch.inference_mode():
        slope = backend.velocity(condition_of(backend, "sd3", 1))(
            backend.initial_latents([0], 1.0), torch.tensor(0.5, dtype=torch.float64)
        )
    assert slope.shape == (1, 16, 8, 8)
    assert slope.isfinite().all()


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
    """No tensors are kept that nobody asked for; calls computed again in a backward pass need a fraction of
    all activations.
    """
    arguments = ["--family", "sd3", "--part", "trajectory", "--part", "training"]
    rows = rows_of(memory.main, tmp_path / "m.json", *arguments)
    found = {r["solver"]: r["trajectory"] / r["call"] for r in rows if r["part"] == "trajectory"}
    assert len(found) == 7
    assert 1 < min(found.values()) <= max(found.values()) < 1.1
    kept, again, apart = (r["peak"] for r in rows if r["part"] == "training")
    assert kept > 2 * again > 2 * apart


def test_kept_tensors_are_seen():
    """What is held on to counts, and what is freed does not."""
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
    (row,) = rows_of(compile.main, tmp_path / "c.json", "--family", "ldm", "--batch", "1", "--repeats", "3")
    assert row["compilations"] == 2
    assert row["recompilations"] == 0
    assert row["difference"] < 1e-3
