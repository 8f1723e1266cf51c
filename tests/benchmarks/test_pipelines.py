"""The comparison with diffusers' pipelines on few images, and that both define the same methods on the same
nodes.
"""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from backends import initial_noise, load_backend
from benchmarks.speed import pipelines
from benchmarks.speed.diffusers_baseline import Theirs
from digits.data import ALL_LABELS, evaluation_prompts
from solvers import Spec, baseline_of, sample

SHORT = ["--batches", "2", "--repeats", "3", "--n", "4", "--intervals", "8", "--depths", "4"]


def run(folder, *arguments):
    """The rows of a run, and what it printed."""
    result = CliRunner().invoke(
        pipelines.main, [*arguments, "--out", str(folder / "out.json")], catch_exceptions=False
    )
    assert result.exit_code == 0
    return json.loads((folder / "out.json").read_text())["rows"], result.output


@pytest.mark.parametrize("family", ["ldm", "flux"])
def test_both_sides_call_the_network_equally_often(family, tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, "TUNING_IMAGES", 2)
    rows, printed = run(tmp_path, "--families", family, *SHORT)
    learned = {"epd distilled": 6, "tableau1 distilled": 4, "wide2 distilled": 8}  # evaluations
    tables = list(learned) if family == "ldm" else ["epd distilled"]
    for scheduler, name in (("DPMSolverMultistep", "dpmpp"), ("UniPCMultistep", "unipc")):
        found = {r["ours"]: r for r in rows if scheduler in r["theirs"]}
        assert list(found) == [name, *tables]
        assert all(r["their_calls"] == r["our_calls"] == r["their_evaluations"] == 4 for r in found.values())
        assert {n: r["our_evaluations"] for n, r in found.items()} == {n: learned.get(n, 4) for n in found}
    for row in rows:
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["rmse_difference"] == pytest.approx(row["our_rmse"] - row["their_rmse"])
        assert f"{row['our_rmse']:.4f} ± {row['our_rmse_halfwidth']:.4f}" in printed


@pytest.mark.slow
def test_full_size_layouts_are_timed_alone(tmp_path):
    size = ["--full", "--layers", "1", "--resolution", "64", "--device", "cpu"]
    rows, printed = run(
        tmp_path, "--families", "sd3", *size, "--batches", "1", "--repeats", "2", "--depths", "2"
    )
    assert [r["our_evaluations"] for r in rows] == [2, 3, 2, 3]
    assert all(r["their_calls"] == r["our_calls"] == 2 for r in rows)
    assert "their RMSE" not in printed


@pytest.mark.parametrize("scheduler", ["dpmpp", "unipc"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_latents_are_those_of_the_flow_matching_schedulers(family, scheduler):
    """On their nodes, told their times, which they round down."""
    backend = load_backend(Spec(backend="digits", backend_config={"family": family}), "cpu")
    prompts, theirs = evaluation_prompts(2, ALL_LABELS), Theirs(backend, scheduler, "flow", 6, 3.5)
    assert theirs.pipe.scheduler.config.flow_shift == pytest.approx(
        math.exp(backend.flow_mu) if family == "flux" else backend.flow_shift
    )
    expected = theirs.latents(prompts, [3, 5])
    nodes = theirs.pipe.scheduler.sigmas.double()
    times = dict(zip(nodes.tolist(), theirs.pipe.scheduler.timesteps.double() / 1000, strict=False))
    with torch.inference_mode():
        velocity = backend.velocity(backend.encode(prompts, 3.5))
        start = initial_noise([3, 5], backend.latent_shape)
        found = sample(
            baseline_of(scheduler, backend.flow),
            lambda x, sigma: velocity(x, times[sigma.item()]),
            start,
            nodes,
        )
    print(f"largest difference {(found - expected).abs().max():.1e}")
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("scheduler", ["dpmpp", "unipc"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_latents_are_those_of_the_schedulers_of_stable_diffusion_1(scheduler, spacing):
    """Theirs is in the variance-preserving convention, x / sqrt(1 + sigma^2), ours in the variance-exploding
    one; both end at 0.
    """
    backend = load_backend(Spec(backend="digits"), "cpu")
    prompts, theirs = evaluation_prompts(2, ALL_LABELS), Theirs(backend, scheduler, spacing, 6, 7.5)
    expected = theirs.latents(prompts, [3, 5])
    nodes = theirs.pipe.scheduler.sigmas.double()
    with torch.inference_mode():
        velocity = backend.velocity(backend.encode(prompts, 7.5))
        found = sample(
            baseline_of(scheduler, backend.flow),
            velocity,
            nodes[0] * initial_noise([3, 5], backend.latent_shape),
            nodes,
        )
    print(f"largest difference {(found - expected).abs().max():.1e}")
    assert (found - expected).abs().max() < 1e-3
