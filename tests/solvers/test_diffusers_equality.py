"""The baselines are diffusers' own schedulers, on the same network and nodes."""

import diffusers
import pytest
import torch
from problems import noise

from solvers import DPMpp, Euler, Heun, NoiseSchedule, UniPC, discrete, flowmatch, sample
from solvers.exponential import _unipc_weights

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
EXACT = 1e-12  # schedulers that compute in the type of the state and the nodes
SINGLE = 1e-6  # schedulers that cast the state to float32 in each step; relative to its largest entry


def network(x, t):
    """A small nonlinear eps-model of the variance-preserving state and the timestep 0..999."""
    return torch.tanh(0.8 * x + 0.3 * x.roll(1, -1) + t / 1000) + 0.2 * x


def knots(scheduler, noise_schedule):
    """The scheduler's nodes without their float32 rounding: it gets them as well. All are knots of the noise
    schedule.
    """
    times = (1000 * noise_schedule.t(scheduler.sigmas)).round() / 1000
    exact = torch.where(scheduler.sigmas > 0, noise_schedule.sigma(times), 0.0)
    torch.testing.assert_close(exact.float(), scheduler.sigmas, rtol=1e-5, atol=0)
    return exact


def both(make, solver, steps, **options):
    """The final states of the scheduler's loop and of ours, in the variance-exploding convention."""
    scheduler = make(**SD15, **options)
    noise_schedule = NoiseSchedule(scheduler.alphas_cumprod)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = knots(scheduler, noise_schedule)
    sigmas = scheduler.sigmas.unique_consecutive()
    exploding = make in (diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler)

    def scale(sigma):
        return (1 + sigma**2).sqrt()

    start = noise(2, 6) * scale(sigmas[0])
    x = start if exploding else start / scale(sigmas[0])
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.double()), t, x).prev_sample
    reference = x if exploding else x * scale(sigmas[-1])

    def velocity(y, sigma):
        return network(y / scale(sigma), 1000 * noise_schedule.t(sigma) - 1)

    return reference, sample(solver, velocity, start, sigmas)


def assert_equal(results, tolerance):
    reference, ours = results
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance * reference.abs().max().item())


@pytest.mark.parametrize("steps", [4, 10, 20])
def test_euler(steps):
    assert_equal(both(diffusers.EulerDiscreteScheduler, Euler(), steps), SINGLE)


@pytest.mark.parametrize("steps", [4, 10, 20])
def test_heun(steps):
    assert_equal(both(diffusers.HeunDiscreteScheduler, Heun(), steps), EXACT)


@pytest.mark.parametrize("final", ["sigma_min", "zero"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [4, 10, 20])
def test_dpmsolver_multistep(steps, order, final):
    """Without lower_order_final; a step into sigma 0 is of order 1 in both."""
    options = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": False}
    results = both(
        diffusers.DPMSolverMultistepScheduler,
        DPMpp(order),
        steps,
        solver_order=order,
        final_sigmas_type=final,
        **options,
    )
    assert_equal(results, SINGLE)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [4, 10, 20])
def test_unipc(steps, order):
    options = {"solver_type": "bh2", "lower_order_final": False, "final_sigmas_type": "sigma_min"}
    assert_equal(
        both(diffusers.UniPCMultistepScheduler, UniPC(order), steps, solver_order=order, **options), EXACT
    )


@pytest.mark.parametrize("order", [1, 2])
def test_unipc_into_sigma_0(order):
    """The scheduler's last step is of order 1 with lower_order_final, as ours always is into 0 (at order 3 it
    lowers two steps).
    """
    options = {"solver_type": "bh2", "lower_order_final": True, "final_sigmas_type": "zero"}
    assert_equal(
        both(diffusers.UniPCMultistepScheduler, UniPC(order), 10, solver_order=order, **options), EXACT
    )


@pytest.mark.parametrize("final", ["sigma_min", "zero"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [4, 10, 14])
def test_dpmsolver_multistep_of_lower_order_at_the_end(steps, order, final):
    """The scheduler lowers the order below 15 steps."""
    options = {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "final_sigmas_type": final,
    }
    solver = DPMpp(order, lower_order_final=True)
    assert_equal(
        both(diffusers.DPMSolverMultistepScheduler, solver, steps, solver_order=order, **options), SINGLE
    )


@pytest.mark.parametrize("final", ["sigma_min", "zero"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [4, 10, 20])
def test_unipc_of_lower_order_at_the_end(steps, order, final):
    options = {"solver_type": "bh2", "lower_order_final": True, "final_sigmas_type": final}
    solver = UniPC(order, lower_order_final=True)
    assert_equal(both(diffusers.UniPCMultistepScheduler, solver, steps, solver_order=order, **options), EXACT)


def flow_scheduler(steps, mu=None):
    """SD3's scheduler, or FLUX's with dynamic shifting by mu."""
    options = {"shift": 3.0} if mu is None else {"use_dynamic_shifting": True}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **options)
    scheduler.set_timesteps(steps, mu=mu)
    return scheduler


@pytest.mark.parametrize("mu", [None, 1.15])
@pytest.mark.parametrize("steps", [5, 11, 28])
def test_flow_match_euler(steps, mu):
    scheduler = flow_scheduler(steps, mu)
    x = start = noise(2, 6)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double()), t, x).prev_sample
    ours = sample(Euler(), lambda y, sigma: network(y, 1000 * sigma), start, scheduler.sigmas)
    assert_equal((x, ours), SINGLE)


@pytest.mark.parametrize("steps", [5, 11, 28])
@pytest.mark.parametrize(("shift", "mu"), [(3.0, None), (None, 1.15)])
def test_flowmatch_nodes(steps, shift, mu):
    nodes = flow_scheduler(steps, mu).sigmas
    assert nodes[-1] == 0
    torch.testing.assert_close(flowmatch(steps, shift=shift, mu=mu), nodes[:-1].double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 10, 28, 112])
def test_discrete_nodes(steps):
    """Where the timesteps are whole numbers, so that the two interpolations between knots play no part."""
    scheduler = diffusers.EulerDiscreteScheduler(**SD15 | {"timestep_spacing": "linspace"})
    scheduler.set_timesteps(steps)
    nodes = discrete(steps, NoiseSchedule(scheduler.alphas_cumprod))
    torch.testing.assert_close(nodes, scheduler.sigmas[:-1].double(), rtol=1e-5, atol=0)


def test_weights_that_are_kept_are_those_of_their_step():
    """Nodes evenly spaced in log SNR have the same ratios for any number of steps, and other weights."""
    few, many = (_unipc_weights((-1.0, 1.0), h) for h in (0.5, 0.25))
    assert max(abs(a - b) for a, b in zip(few, many, strict=True)) > 1e-3
    assert _unipc_weights((-1.0, 1.0), 0.5) == few
