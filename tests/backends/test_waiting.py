"""Nothing in a step waits for the device: no value is read back from it, and it is told each noise level
once.
"""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from backends import Condition, load_backend
from backends.flux import Flux
from backends.ldm import LDM
from backends.sd3 import SD3
from solvers import BASELINES, EPD, Solver, SolverTable, Spec, compile_tableau, load_predictor, sample

EXPS = Path(__file__).parents[2] / "exps"
TABLES = {
    "ldm": "digits/distilled.pkl",
    "sd3": "digits-sd3/distilled.pkl",
    "flux": "digits-flux/distilled.pkl",
}
CLASSES = {"ldm": LDM, "sd3": SD3, "flux": Flux}
FAMILIES = sorted(TABLES)
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


def digits(family: str):
    return load_backend(Spec(backend="digits", backend_config={"family": family}), "cpu")


def shipped(family: str):
    predictor = load_predictor(EXPS / TABLES[family])
    return predictor.solver(), predictor.sigmas


def solvers_like(learned: EPD, nodes) -> list[Solver]:
    """A learned table, the same for each of two images by itself and as a tableau, and all baselines."""
    per_image = EPD(SolverTable(*(t.expand(2, -1, -1) for t in learned.table.rows())), max_order=2)
    return [learned, per_image, compile_tableau(learned, nodes), *BASELINES.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_trajectory_runs_without_any_values(family):
    """On the meta device tensors have no values: whatever waited to read one would fail."""
    backend = digits(family)
    condition = backend.encode(["a red handwritten seven"] * 2, backend.default_guidance)
    meta = CLASSES[family](backend.pipe, torch.device("meta"), backend.config)
    condition = Condition(
        {k: v.to("meta") for k, v in condition.positive.items()},
        condition.negative and {k: v.to("meta") for k, v in condition.negative.items()},
        condition.guidance_scale,
    )
    x = torch.empty(2, *meta.latent_shape, device="meta")
    learned, nodes = shipped(family)
    with torch.inference_mode():
        for solver in solvers_like(learned, nodes):
            assert sample(solver, meta.velocity(condition), x, nodes, finish="euler").shape == x.shape
        with pytest.raises(RuntimeError, match="meta"):
            sample(ReadsBack(), meta.velocity(condition), x, nodes)


class ReadsBack(Solver):
    """An Euler step that looks at its state, as no solver should."""

    def step(self, velocity, x, sigmas, n, history):
        return x + float(x.mean() > 0) * velocity(x, sigmas[n]), ()


def reads(solver: Solver, velocity, x, nodes) -> int:
    """How many times a trajectory reads a tensor's value, as the profiler sees it."""
    with profile(activities=[ProfilerActivity.CPU]) as found, torch.inference_mode():
        sample(solver, velocity, x, nodes)
    return sum(event.name in READS for event in found.events())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_reads_does_not_grow_with_the_steps(family):
    """Those that there are check the nodes on the host, once for a trajectory."""
    backend = digits(family)
    velocity = backend.velocity(backend.encode(["a red handwritten seven"], backend.default_guidance))
    x, counts = backend.initial_latents([0], backend.sigma_max), []
    for intervals in (2, 5):
        nodes = backend.sigmas(Spec(num_steps=intervals + 1))
        counts.append(reads(EPD(SolverTable.uniform(intervals, 2)), velocity, x, nodes))
    assert counts[0] == counts[1]
    assert reads(ReadsBack(), velocity, x, nodes) > counts[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_is_told_of_each_level_once(family, monkeypatch):
    """The second trajectory works out no times at all."""
    backend, told = digits(family), []
    tell = backend._timesteps.tell
    monkeypatch.setattr(backend._timesteps, "tell", lambda sigma: told.append(sigma) or tell(sigma))
    solver, nodes = shipped(family)
    for _ in range(2):
        condition = backend.encode(["a red handwritten seven"], backend.default_guidance)
        sample(solver, backend.velocity(condition), backend.initial_latents([0], nodes[0]), nodes)
    tableau = compile_tableau(solver, nodes)
    assert len(told) == tableau.depth
    assert torch.cat(told).tolist() == tableau.sigmas.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_told_while_sampling_serves_a_backward_pass(family):
    """A level is kept from inference mode on; gradients of the same level and rows must not stumble
    over it.
    """
    backend = digits(family)
    velocity = backend.velocity(backend.encode(["a red handwritten seven"], backend.default_guidance))
    x, sigma = backend.initial_latents([0], 0.5), torch.tensor(0.5, dtype=torch.float64)
    with torch.inference_mode():
        expected = velocity(x, sigma).clone()
    state = x.requires_grad_()
    slope = velocity(state, sigma)
    torch.testing.assert_close(slope.detach(), expected, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(slope.square().sum(), state)
    assert gradient.abs().sum() > 0


def test_levels_that_are_learned_are_told_anew():
    backend = digits("ldm")
    sigma = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        (slope,) = torch.autograd.grad(backend._timesteps(sigma, 1)[1].sum(), sigma)
        assert slope.item() > 0
    assert not backend._timesteps.known


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_is_never_waited_for(family):
    """Not even to tell it of levels that it was never told of."""
    backend = load_backend(Spec(backend="digits", backend_config={"family": family}), "cuda")
    solver, nodes = shipped(family)
    condition = backend.encode(["a red handwritten seven"] * 2, backend.default_guidance)
    x = backend.initial_latents([0, 1], nodes[0])
    with torch.inference_mode():
        for each in solvers_like(solver, nodes):
            velocity = backend.velocity(condition)
            sample(
                each, velocity, x, nodes, finish="euler"
            )  # conditions are repeated once for each number of rows
            backend._timesteps.known.clear()
            torch.cuda.set_sync_debug_mode("error")
            try:
                sample(each, velocity, x, nodes, finish="euler")
            finally:
                torch.cuda.set_sync_debug_mode("default")
