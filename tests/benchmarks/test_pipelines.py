"""The comparison with diffusers' pipelines: both sides have the same methods on the same nodes, encode their
prompts alike and are compared where each ends.
"""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from backends import initial_noise, load_backend
from benchmarks.quality.teacher_reference import PromptSeeds, sampler_of, teacher_sampler
from benchmarks.speed import diffusers_baseline, pipeline_samplers, pipelines
from benchmarks.speed.diffusers_baseline import DiffusersBaseline
from benchmarks.speed.pipeline_samplers import Contest, FineSolution, OwnSampler
from digits.data import ALL_LABELS, evaluation_prompts
from solvers import Spec, baseline_of, sample

SHORT = ["--batches", "1", "--repeats", "2", "--n", "2", "--intervals", "4", "--depths", "4"]
LEARNED = {"epd distilled": 6, "tableau1 distilled": 4, "wide2 distilled": 8}  # evaluations


def run(folder, *arguments) -> tuple[list[dict], str]:
    """The rows of a run, and what it printed."""
    result = CliRunner().invoke(
        pipelines.main, [*arguments, "--out", str(folder / "out.json")], catch_exceptions=False
    )
    assert result.exit_code == 0
    return json.loads((folder / "out.json").read_text())["rows"], result.output


@pytest.fixture
def few_schedules(monkeypatch):
    """Few images and two schedules to choose from."""
    monkeypatch.setattr(pipelines, "TUNING_IMAGES", 2)
    monkeypatch.setattr(pipeline_samplers, "schedules_of", lambda backend: [backend.default_schedule])
    spacings = {"leading": {"timestep_spacing": "leading"}, "karras": {"use_karras_sigmas": True}}
    monkeypatch.setattr(diffusers_baseline, "SPACINGS", spacings)


@pytest.mark.parametrize("family", ["ldm", "flux"])
def test_both_sides_call_the_network_equally_often(family, tmp_path, few_schedules):
    rows, printed = run(tmp_path, "--families", family, *SHORT)
    tables = list(LEARNED) if family == "ldm" else ["epd distilled"]
    for scheduler, name in (("DPMSolverMultistep", "dpmpp"), ("UniPCMultistep", "unipc")):
        own = {r["ours"]: r for r in rows if scheduler in r["theirs"]}
        assert list(own) == [name, *tables]
        assert all(r["their_calls"] == r["our_calls"] == r["their_evaluations"] == 4 for r in own.values())
        assert {n: r["our_evaluations"] for n, r in own.items()} == {n: LEARNED.get(n, 4) for n in own}
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
    assert "RMSE of diffusers" not in printed


@pytest.fixture(scope="module")
def ldm():
    return load_backend(Spec(backend="digits"), "cpu")


def euler(backend, schedule: str) -> OwnSampler:
    return OwnSampler(sampler_of(backend, 7.5, "euler", 3, schedule))


def test_each_side_is_compared_where_it_ends(ldm):
    """diffusers' at noise level 0, ours at the last one of training; the nearest has the least error."""
    pairs = PromptSeeds(evaluation_prompts(2, ALL_LABELS), [3, 5], 2)
    diffusers, own = DiffusersBaseline(ldm, "dpmpp", "linspace", 3, 7.5), euler(ldm, "discrete")
    fine = FineSolution(
        pairs, own.latents(pairs.prompts, pairs.seeds), diffusers.latents(pairs.prompts, pairs.seeds)
    )
    assert fine.errors(own).max() < 1e-5
    assert fine.errors(diffusers).max() < 1e-5
    assert fine.nearest({"far": euler(ldm, "logsnr"), "near": own}) == "near"


def test_a_fine_solution_has_both_ends(ldm):
    fine = FineSolution.make(ldm, 7.5, PromptSeeds.evaluation(2, 0, batch=2), 4)
    teacher = teacher_sampler(ldm, 7.5, 4)
    torch.testing.assert_close(fine.at_end, teacher.latents(fine.pairs.prompts, fine.pairs.seeds))
    moved = (fine.at_zero - fine.at_end).abs().max()
    assert 0 < moved < 0.1 * fine.at_end.abs().max()


def test_both_sides_encode_their_prompts_each_time(ldm):
    calls = []
    hook = ldm.pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    for sampler in (euler(ldm, "discrete"), DiffusersBaseline(ldm, "unipc", "leading", 3, 7.5)):
        counts = []
        for _ in range(2):
            calls.clear()
            sampler.images(evaluation_prompts(2, ALL_LABELS), [0, 1])
            counts.append(len(calls))
        assert counts[0] == counts[1] > 0
    hook.remove()


class ChoosesTheFirst:
    """In place of the fine solution of the tuning seeds, whose errors are never reported."""

    def nearest(self, candidates: dict) -> str:
        return next(iter(candidates))


class KnownErrors:
    """In place of the fine solution of the held-out seeds."""

    def errors(self, sampler) -> torch.Tensor:
        return torch.tensor([1.0, 3.0] if isinstance(sampler, OwnSampler) else [2.0, 8.0])


def test_ratios_are_ours_over_diffusers_and_errors_those_of_the_held_out_seeds(ldm, monkeypatch):
    """The samplers took 1, 2, 3 ... seconds: both schedulers, both of our solvers, then the tables."""

    def seconds(samplers, *_):
        return torch.arange(1.0, len(samplers) + 1).double()[:, None].repeat(1, 3)

    monkeypatch.setattr(pipelines, "seconds", seconds)
    contest = Contest(ldm, "ldm", 7.5, ChoosesTheFirst(), KnownErrors())
    with torch.inference_mode():
        rows = pipelines.compare(contest, 4, [1], 3)
    by_pair = {(r["theirs"].split(", ")[1], r["ours"]): r for r in rows}
    assert len(by_pair) == len(rows) == 2 * 4
    assert by_pair["DPMSolverMultistepScheduler", "dpmpp"]["ratio"] == 3
    assert by_pair["UniPCMultistepScheduler", "unipc"]["ratio"] == 2
    assert by_pair["UniPCMultistepScheduler", "epd distilled"]["ratio"] == 2.5
    assert {(r["their_rmse"], r["our_rmse"], r["rmse_difference"]) for r in rows} == {(5.0, 2.0, -3.0)}


@pytest.mark.parametrize("scheduler", ["dpmpp", "unipc"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_latents_are_those_of_the_flow_matching_schedulers(family, scheduler):
    """On their nodes and their timesteps, which they round down."""
    backend = load_backend(Spec(backend="digits", backend_config={"family": family}), "cpu")
    prompts = evaluation_prompts(2, ALL_LABELS)
    diffusers = DiffusersBaseline(backend, scheduler, "flow", 6, 3.5)
    assert diffusers.pipe.scheduler.config.flow_shift == pytest.approx(
        math.exp(backend.flow_mu) if family == "flux" else backend.flow_shift
    )
    expected = diffusers.latents(prompts, [3, 5])
    nodes = diffusers.pipe.scheduler.sigmas.double()
    times = dict(zip(nodes.tolist(), diffusers.pipe.scheduler.timesteps.double() / 1000, strict=False))
    with torch.inference_mode():
        velocity = backend.velocity(backend.encode(prompts, 3.5))
        latents = sample(
            baseline_of(scheduler, backend.flow),
            lambda x, sigma: velocity(x, times[sigma.item()]),
            initial_noise([3, 5], backend.latent_shape),
            nodes,
        )
    print(f"largest difference {(latents - expected).abs().max():.1e}")
    assert (latents - expected).abs().max() < 1e-4


@pytest.mark.parametrize("scheduler", ["dpmpp", "unipc"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_latents_are_those_of_the_schedulers_of_stable_diffusion_1(ldm, scheduler, spacing):
    """diffusers' in the variance-preserving convention, x / sqrt(1 + sigma^2), ours in the variance-exploding
    one; both end at 0.
    """
    prompts = evaluation_prompts(2, ALL_LABELS)
    diffusers = DiffusersBaseline(ldm, scheduler, spacing, 6, 7.5)
    expected = diffusers.latents(prompts, [3, 5])
    nodes = diffusers.pipe.scheduler.sigmas.double()
    with torch.inference_mode():
        velocity = ldm.velocity(ldm.encode(prompts, 7.5))
        noise = nodes[0] * initial_noise([3, 5], ldm.latent_shape)
        latents = sample(baseline_of(scheduler, ldm.flow), velocity, noise, nodes)
    print(f"largest difference {(latents - expected).abs().max():.1e}")
    assert (latents - expected).abs().max() < 1e-3
