"""No step waits for the device: no value is read back, and each noise level's timesteps are sent once."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backends import Condition, load_backend
from backends.flux import Flux
from backends.ldm import LDM
from backends.sd3 import SD3
from backends.timesteps import TimestepCache, flow_timesteps
from solvers import BASELINES, EPD, Solver, SolverTable, Spec, compile_tableau, load_predictor, sample

EXPS = Path(__file__).parents[2] / "exps"
TABLES = {
    "ldm": "digits-distilled/epd-g7.5-d4",
    "sd3": "digits-sd3-distilled/epd-g4.5-d4",
    "flux": "digits-flux-distilled/epd-g3.5-d4",
}
CLASSES = {"ldm": LDM, "sd3": SD3, "flux": Flux}
FAMILIES = sorted(TABLES)
META = torch.device("meta")


def load_digits(family: str, device: str = "cpu"):
    return load_backend(Spec(backend="digits", backend_config={"family": family}), device)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request):
    return load_digits(request.param), *shipped(request.param)


@pytest.fixture
def digits(loaded):
    """The digits of a family, without kept timesteps, and a learned solver with its nodes."""
    loaded[0]._timesteps.known.clear()
    return loaded


def shipped(family: str):
    predictor = load_predictor(EXPS / TABLES[family] / "network-snapshot-export-best.pkl")
    return predictor.solver(), predictor.sigmas


def solvers_like(learned: EPD, nodes) -> list[Solver]:
    """A learned table, the same for each of two images by itself and as a tableau, and all baselines."""
    per_image = EPD(SolverTable(*(t.expand(2, -1, -1) for t in learned.table.rows())), max_order=2)
    return [learned, per_image, compile_tableau(learned, nodes), *BASELINES.values()]


def on_meta(condition: Condition) -> Condition:
    return Condition(
        {k: v.to(META) for k, v in condition.positive.items()},
        condition.negative and {k: v.to(META) for k, v in condition.negative.items()},
        condition.guidance_scale,
    )


class ReadsBack(Solver):
    """An Euler step that looks at its state, as no solver should."""

    def step(self, velocity, x, sigmas, n, history):
        return x + float(x.mean() > 0) * velocity(x, sigmas[n]), ()


class Reads(TorchDispatchMode):
    """Counts the operations that read a tensor's value."""

    NAMES = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal")
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.overloadpacket.__name__ in self.NAMES
        return operation(*args, **(kwargs or {}))


def reads(solver: Solver, velocity, x, nodes) -> int:
    """How many times a trajectory reads a tensor's value."""
    with torch.inference_mode(), Reads() as mode:
        sample(solver, velocity, x, nodes)
    return mode.count


@pytest.mark.parametrize("family", FAMILIES)
def test_no_velocity_needs_the_value_of_a_tensor(family):
    """On the meta device tensors have no values: whatever waited to read one would fail."""
    backend, (learned, nodes) = load_digits(family), shipped(family)
    condition = on_meta(backend.encode(["a red handwritten seven"] * 2, backend.default_guidance))
    meta = CLASSES[family](backend.pipe, META, backend.config)
    velocity, x = meta.velocity(condition), torch.empty(2, *meta.latent_shape, device=META)
    with torch.inference_mode():
        assert sample(learned, velocity, x, nodes, finish="euler").shape == x.shape
        with pytest.raises(RuntimeError, match="meta"):
            sample(ReadsBack(), velocity, x, nodes[:2])


def test_no_solver_needs_the_value_of_a_tensor():
    """All solvers on the meta device, with the timesteps of a backbone."""
    timesteps, (learned, nodes) = TimestepCache(flow_timesteps, META), shipped("ldm")

    def velocity(x, sigma):
        (times,) = timesteps(sigma, len(x))
        return x * times.view(-1, 1)

    x = torch.empty(2, 3, device=META)
    with torch.inference_mode():
        for solver in solvers_like(learned, nodes):
            assert sample(solver, velocity, x, nodes, finish="euler").shape == x.shape


def test_the_number_of_reads_does_not_grow_with_the_steps(digits):
    """Those that there are check the nodes on the host, once for a trajectory."""
    backend, _, _ = digits
    velocity = backend.velocity(backend.encode(["a red handwritten seven"], backend.default_guidance))
    x, counts = backend.initial_latents([0], backend.sigma_max), []
    for intervals in (1, 3):
        nodes = backend.sigmas(Spec(num_steps=intervals + 1))
        counts.append(reads(EPD(SolverTable.uniform(intervals, 2)), velocity, x, nodes))
    assert counts[0] == counts[1]
    assert reads(ReadsBack(), velocity, x, nodes) > counts[1]


def test_the_timesteps_of_each_noise_level_are_computed_once(digits, monkeypatch):
    """The second trajectory computes none at all."""
    backend, solver, nodes = digits
    levels, compute = [], backend._timesteps.compute
    monkeypatch.setattr(backend._timesteps, "compute", lambda sigma: levels.append(sigma) or compute(sigma))
    with torch.inference_mode():
        for _ in range(2):
            condition = backend.encode(["a red handwritten seven"], backend.default_guidance)
            sample(solver, backend.velocity(condition), backend.initial_latents([0], nodes[0]), nodes)
    tableau = compile_tableau(solver, nodes)
    assert len(levels) == tableau.depth
    assert torch.cat(levels).tolist() == tableau.sigmas.tolist()


def test_timesteps_kept_while_sampling_serve_a_backward_pass(digits):
    """They are kept from inference mode on; gradients at the same noise level must not stumble over them."""
    backend, _, _ = digits
    velocity = backend.velocity(backend.encode(["a red handwritten seven"], backend.default_guidance))
    x, sigma = backend.initial_latents([0], 0.5), torch.tensor(0.5, dtype=torch.float64)
    with torch.inference_mode():
        expected = velocity(x, sigma).clone()
    state = x.requires_grad_()
    output = velocity(state, sigma)
    torch.testing.assert_close(output.detach(), expected, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(output.square().sum(), state)
    assert gradient.abs().sum() > 0


def test_timesteps_of_learned_noise_levels_are_computed_anew():
    cache = TimestepCache(flow_timesteps, torch.device("cpu"))
    sigma = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(cache(sigma, 1)[0].sum(), sigma)
        assert gradient.item() == 1000
    assert not cache.known


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_never_waits_for_a_gpu(family):
    """Not even to send timesteps for the first time."""
    backend, (solver, nodes) = load_digits(family, "cuda"), shipped(family)
    condition = backend.encode(["a red handwritten seven"] * 2, backend.default_guidance)
    x = backend.initial_latents([0, 1], nodes[0])
    with torch.inference_mode():
        for each in solvers_like(solver, nodes):
            velocity = backend.velocity(condition)
            sample(each, velocity, x, nodes, finish="euler")  # repeats the condition for each number of rows
            backend._timesteps.known.clear()
            torch.cuda.set_sync_debug_mode("error")
            try:
                sample(each, velocity, x, nodes, finish="euler")
            finally:
                torch.cuda.set_sync_debug_mode("default")
