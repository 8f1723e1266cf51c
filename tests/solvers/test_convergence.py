"""Orders of convergence, measured by regression on an exactly solvable probability-flow ODE."""

import pytest
import torch
from orders import STEPS, TOLERANCE, edm, measured_order
from problems import QUANTILES, Mixture, epd
from scipy.integrate import solve_ivp

from solvers import (
    DPM,
    DPM2,
    EPD,
    IPNDM,
    DPMpp,
    Euler,
    Heun,
    SolverTable,
    UniPC,
    logsnr,
    polynomial,
    sample,
)

FINE = [32, 64, 128, 256]


def log_uniform(n):
    return logsnr(n + 1, 0.3, 1.0)


def uniform(n):
    return torch.linspace(1.5, 0.3, n + 1, dtype=torch.float64)


ONE_STEP = [
    ("euler", lambda n: Euler(), 1),
    ("heun", lambda n: Heun(), 2),
    ("dpm2", lambda n: DPM2(), 2),
    ("dpm2 r=0.3", lambda n: DPM2(0.3), 2),
    ("dpm 2", lambda n: DPM(2), 2),
    ("dpm 3", lambda n: DPM(3), 2),
    ("epd geometric midpoint", lambda n: epd(n, (0.5,), (1.0,)), 2),
    ("epd symmetric", lambda n: epd(n, (0.1, 0.5, 0.9), (0.25, 0.5, 0.25)), 2),
    ("epd mean position 1/2", lambda n: epd(n, (0.2, 0.6), (0.25, 0.75)), 2),
    ("epd general", lambda n: epd(n, (0.2, 0.7), (0.6, 0.4)), 1),
    ("epd uniform table", lambda n: EPD(SolverTable.uniform(n, 3)), 2),
]


@pytest.mark.parametrize(
    ("make", "order"), [case[1:] for case in ONE_STEP], ids=[case[0] for case in ONE_STEP]
)
def test_one_step_methods(make, order):
    assert measured_order(make, edm, STEPS) == pytest.approx(order, abs=TOLERANCE)


@pytest.mark.parametrize("max_order", [2, 3, 4])
@pytest.mark.parametrize(
    ("r", "w", "order"), [((0.5,), (1.0,), 2), ((0.2, 0.8), (0.5, 0.5), 2), ((0.2, 0.7), (0.6, 0.4), 1)]
)
def test_plugin_keeps_the_order_of_its_table(r, w, order, max_order):
    """The extrapolation only places the points: a second-order table stays one, and a first-order
    table too.
    """
    assert measured_order(lambda n: epd(n, r, w, max_order=max_order), edm, FINE) == pytest.approx(
        order, abs=TOLERANCE
    )


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
def test_ipndm_on_equal_steps(max_order):
    """Adams-Bashforth weights for equal steps, from an exact history: order max_order."""
    assert measured_order(lambda n: IPNDM(max_order), uniform, FINE, warm=4) == pytest.approx(
        max_order, abs=TOLERANCE
    )


@pytest.mark.parametrize("grid", [uniform, edm])
@pytest.mark.parametrize("max_order", [2, 3, 4])
def test_ipndm_is_of_order_2_from_its_own_start_or_on_unequal_steps(max_order, grid):
    """The first step is Euler's, with an error of h^2; on unequal steps each step has an error of h^3."""
    assert measured_order(lambda n: IPNDM(max_order), grid, FINE) == pytest.approx(2, abs=TOLERANCE)


@pytest.mark.parametrize(("order", "expected"), [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("warm", [1, 4])
def test_dpmpp(order, expected, warm):
    """3M as published (and in diffusers) takes half of the second derivative's term: order 2, with a small
    constant.
    """
    assert measured_order(lambda n: DPMpp(order), log_uniform, FINE, warm=warm) == pytest.approx(
        expected, abs=TOLERANCE
    )


@pytest.mark.parametrize(
    ("order", "warm", "expected"), [(1, 1, 2), (2, 1, 3), (3, 1, 3), (2, 4, 3), (3, 4, 4)]
)
def test_unipc(order, warm, expected):
    """The corrector adds one order; the first step has an error of h^3 when corrected, so that UniPC(3) needs
    a warm start.
    """
    assert measured_order(lambda n: UniPC(order), log_uniform, FINE, warm=warm) == pytest.approx(
        expected, abs=TOLERANCE
    )


FLOW = [
    ("euler", lambda n: Euler(), 1),
    ("heun", lambda n: Heun(), 2),
    ("dpmpp 2", lambda n: DPMpp(2), 2),
    ("unipc 2", lambda n: UniPC(2), 3),
    ("epd midpoint", lambda n: epd(n, (0.5,), (1.0,)), 2),
    ("plugin", lambda n: epd(n, (0.2, 0.8), (0.5, 0.5), max_order=2), 2),
]


@pytest.mark.parametrize(("make", "order"), [case[1:] for case in FLOW], ids=[case[0] for case in FLOW])
def test_flow_matching(make, order):
    """The same code and the same orders on dx/dt = v, from pure noise at t = 1."""
    assert measured_order(
        make, lambda n: polynomial(n + 1, 0.15, 1.0), FINE, Mixture(flow=True)
    ) == pytest.approx(order, abs=TOLERANCE)


def test_single_gaussian_has_the_closed_form():
    """x(s) = mu + (x(S) - mu) sqrt((std^2 + s^2) / (std^2 + S^2))."""
    mean, std, start, end = 0.7, 0.4, 5.0, 0.05
    gaussian = Mixture((1.0,), (mean,), (std,))
    x = torch.tensor([[-4.0], [0.3], [6.0]], dtype=torch.float64)
    exact = mean + (x - mean) * ((std**2 + end**2) / (std**2 + start**2)) ** 0.5
    torch.testing.assert_close(gaussian.solve(x, start, end), exact, rtol=0, atol=1e-12)
    solved = sample(UniPC(2), gaussian.velocity, x, logsnr(400, end, start))
    torch.testing.assert_close(solved, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("flow", "start", "end"), [(False, 6.0, 0.05), (True, 1.0, 0.05)])
def test_quantiles_are_the_flow(flow, start, end):
    """The exact solution of the other tests solves the ODE, by an adaptive method of order 8."""
    mixture = Mixture(flow=flow)
    x = mixture.quantile(QUANTILES, start)

    def field(sigma, state):
        return mixture.velocity(torch.from_numpy(state)[:, None], torch.tensor(sigma))[:, 0].numpy()

    solution = solve_ivp(field, (start, end), x[:, 0].numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.from_numpy(solution.y[:, -1]), mixture.solve(x, start, end)[:, 0], rtol=0, atol=1e-9
    )
