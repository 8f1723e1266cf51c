"""Flow matching and variance exploding are one ODE: sigma = t / (1 - t), x_ve = x_t / (1 - t)."""

import pytest
import torch
from problems import QUANTILES, Conditioned, Mixture, epd, noise, per_row, slope

from solvers import DPM2, IPNDM, DPMpp, Euler, Heun, UniPC, polynomial, sample

EXPLODING, FLOW = Mixture(), Mixture(flow=True)
START, END = 0.95, 0.05


def times(n):
    return polynomial(n + 1, END, START)


def levels(t):
    return t / (1 - t)


def both_ways(solver, n, finish="none"):
    """x_t of the flow's nodes and of the same nodes as variance-exploding noise levels; finished, both are
    x0.
    """
    t = times(n)
    x = FLOW.quantile(QUANTILES, t[0])
    flow = sample(solver, FLOW.velocity, x, t, finish=finish)
    exploding = sample(solver, EXPLODING.velocity, x / (1 - t[0]), levels(t), finish=finish)
    return flow, exploding * (1 - t[-1]) if finish == "none" else exploding


@pytest.mark.parametrize("t", [0.9, 0.5, 0.1])
def test_the_problems_are_the_same(t):
    """The denoiser of the noise level t / (1 - t), the change of variables of the velocity, and the exact
    solution.
    """
    t = torch.tensor(t, dtype=torch.float64)
    x = FLOW.quantile(QUANTILES, t)
    denoised = EXPLODING.denoiser(x / (1 - t), levels(t))
    torch.testing.assert_close(FLOW.denoiser(x, t), denoised, rtol=0, atol=1e-12)
    # d(x_t)/dt of x_t = (1 - t) y(sigma(t)) is -y + y' / (1 - t)
    y = x / (1 - t)
    torch.testing.assert_close(
        FLOW.velocity(x, t), EXPLODING.velocity(y, levels(t)) / (1 - t) - y, rtol=0, atol=1e-12
    )
    exact = EXPLODING.solve(y, levels(t), levels(torch.tensor(END))) * (1 - END)
    torch.testing.assert_close(FLOW.solve(x, t, torch.tensor(END)), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("finish", ["none", "euler", "denoise"])
@pytest.mark.parametrize("solver", [Euler(), DPMpp(1)])
def test_euler_does_not_see_the_parametrisation(solver, finish):
    """An Euler step is x' = (s'/s) x + (a' - a s'/s) D in both: the same states on the same nodes, not only
    in the limit.
    """
    flow, exploding = both_ways(solver, 7, finish)
    torch.testing.assert_close(flow, exploding, rtol=0, atol=1e-12)


@pytest.mark.parametrize("finish", ["none", "denoise"])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("cls", [DPMpp, UniPC])
def test_exponential_solvers_told_of_the_flow_do_not_see_the_parametrisation(cls, order, lower, finish):
    """In half the log SNR of the flow, log((1 - sigma) / sigma), they take the very steps of the
    variance-exploding ones.
    """
    t = times(7)
    x = FLOW.quantile(QUANTILES, t[0])
    flow = sample(cls(order, lower, flow=True), FLOW.velocity, x, t, finish=finish)
    exploding = sample(cls(order, lower), EXPLODING.velocity, x / (1 - t[0]), levels(t), finish=finish)
    torch.testing.assert_close(
        flow, exploding * (1 - t[-1]) if finish == "none" else exploding, rtol=0, atol=1e-11
    )
    unaware = sample(cls(order, lower), FLOW.velocity, x, t, finish=finish)
    assert order == 1 or (flow - unaware).abs().max() > 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("cls", [DPMpp, UniPC])
def test_they_start_from_pure_noise(cls, order):
    """At sigma 1 half the log SNR is infinite; this is the limit of starts ever nearer to it."""
    x = FLOW.quantile(QUANTILES, times(7)[0])
    ends = [
        sample(cls(order, flow=True), FLOW.velocity, x, polynomial(8, END, start))
        for start in (1 - 1e-3, 1 - 1e-12, 1.0)
    ]
    far, near = ((end - ends[2]).abs().max() for end in ends[:2])
    assert near < 0.4 * far  # as one over half the log SNR, where the order is above 1
    assert near < (0.05 if order > 1 else 1e-9)
    with pytest.raises(
        ValueError, match=f"{cls.__name__}: noise level 1.5 of a flow-matching model, expected at most 1"
    ):
        sample(cls(order, flow=True), FLOW.velocity, x, polynomial(8, END, 1.5))


HIGHER = {
    "heun": (lambda n: Heun(), 2),
    "dpm2": (lambda n: DPM2(), 2),
    "dpmpp": (lambda n: DPMpp(2), 2),
    "unipc": (lambda n: UniPC(2), 3),
    "epd": (lambda n: epd(n, (0.2, 0.8), (0.5, 0.5)), 2),
    "plugin": (lambda n: epd(n, (0.2, 0.8), (0.5, 0.5), max_order=3), 2),
    "ipndm": (lambda n: IPNDM(3), 2),
}


@pytest.mark.parametrize(("make", "order"), HIGHER.values(), ids=HIGHER)
def test_other_methods_agree_to_their_order(make, order):
    """Their steps differ, and the difference falls as a power of the step: one limit, one code path."""
    steps = [128, 256, 512]
    differences = []
    for n in steps:
        flow, exploding = both_ways(make(n), n, "denoise")
        differences.append((flow - exploding).abs().max().item())
    assert differences[-1] < 1e-3
    assert slope(steps, differences) > order - 0.3


@pytest.mark.parametrize("solver", [Heun(), DPMpp(2), UniPC(3)])
def test_finely_solved_both_give_the_same_image(solver):
    t = times(800)
    exact = FLOW.solve(FLOW.quantile(QUANTILES, t[0]), t[0], t[-1])
    for result in both_ways(solver, 800):
        torch.testing.assert_close(result, exact, rtol=0, atol=1e-4)


def test_any_flow_velocity_is_a_variance_exploding_one():
    """Not only a mixture's: the change of variables turns a nonlinear field of one kind into the other, Euler
    step by Euler step.
    """
    field = Conditioned(noise(3, seed=1))

    def exploding(y, sigma):
        t = sigma / (1 + sigma)
        return (field(y * (1 - per_row(t, y)), t) + y) * (1 - per_row(t, y))

    x, t = noise(3, 4), times(9)
    flow = sample(Euler(), field, x, t)
    torch.testing.assert_close(
        sample(Euler(), exploding, x / (1 - START), levels(t)) * (1 - END), flow, rtol=0, atol=1e-12
    )
