"""What the multistep methods integrate without error: polynomials up to their order."""

import pytest
import torch
from problems import noise, per_row, random_table

from solvers import EPD, IPNDM, DPMpp, UniPC, polynomial, sample

SIGMAS = polynomial(6, 0.1, 5.0)
CUBIC = torch.tensor([0.7, -0.4, 0.3, 0.15], dtype=torch.float64)
DEGREES = {degree: CUBIC * (torch.arange(4) <= degree) for degree in range(4)}


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def value(coefficients, t, derivative=0):
    """A polynomial sum_i c_i t^i, or a derivative of it."""
    for _ in range(derivative):
        coefficients = coefficients[1:] * torch.arange(1, len(coefficients), dtype=torch.float64)
    return sum((c * t**i for i, c in enumerate(coefficients)), torch.zeros_like(t))


class PolynomialData:
    """D(x, sigma) = P(lambda), lambda = -log sigma, whatever x. The ODE dx/dlambda = P - x has a closed
    solution.
    """

    def __init__(self, degree):
        self.coefficients = DEGREES[degree]

    def velocity(self, x, sigma):
        return (x - value(self.coefficients, -per_row(sigma, x).log())) / per_row(sigma, x)

    def state(self, sigma):
        """P - P' + P'' - P''' + 2 exp(-lambda), [1, 1]."""
        particular = sum((-1) ** i * value(self.coefficients, -sigma.log(), i) for i in range(4))
        return (particular + 2 * sigma).reshape(1, 1)

    def history(self, solver, n):
        """The history of a solver at node n when all states before were exact."""
        history: tuple = ()
        for i in range(n):
            _, history = solver.step(self.velocity, self.state(SIGMAS[i]), SIGMAS, i, history)
            if isinstance(solver, UniPC):
                history = (history[0], self.state(SIGMAS[i]))  # in place of the corrected state
        return history

    def step(self, solver, n=3):
        return solver.step(self.velocity, self.state(SIGMAS[n]), SIGMAS, n, self.history(solver, n))


def phi_functions(n=3):
    """h of the step from node n, and phi2 and phi3, the integrals over [0, h] of exp(u - h) (u / h)^k / k!
    for k = 1, 2.
    """
    h = (SIGMAS[n] / SIGMAS[n + 1]).log()
    decay = torch.expm1(-h)
    return h, (h + decay) / h, (h**2 / 2 - h - decay) / h**2


@pytest.mark.parametrize(("order", "degree"), [(1, 0), (2, 0), (3, 0), (3, 1)])
def test_dpmpp_integrates_exactly(order, degree):
    problem = PolynomialData(degree)
    assert_same(problem.step(DPMpp(order))[0], problem.state(SIGMAS[4]))


def test_dpmpp_2_takes_half_of_phi1_for_phi2():
    """On a linear D the published weight (1 - exp(-h)) / 2 of h D' misses the exact phi2 by O(h^2)."""
    problem = PolynomialData(1)
    h, phi2, _ = phi_functions()
    error = (-torch.expm1(-h) / 2 - phi2) * h * DEGREES[1][1]
    assert_same(problem.step(DPMpp(2))[0] - problem.state(SIGMAS[4]), error.reshape(1, 1))
    assert error.abs() > 1e-3


def test_dpmpp_3_takes_half_of_the_second_derivative():
    """On a quadratic D the published 3M adds half of the exact term phi3 h^2 D'': its order is 2."""
    problem = PolynomialData(2)
    h, _, phi3 = phi_functions()
    error = -0.5 * phi3 * h**2 * 2 * DEGREES[2][2]
    assert_same(problem.step(DPMpp(3))[0] - problem.state(SIGMAS[4]), error.reshape(1, 1))
    assert error.abs() > 1e-3


@pytest.mark.parametrize(
    ("order", "degree"), [(1, 0), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (3, 3)]
)
def test_unipc_corrects_exactly(order, degree):
    """The corrector of order p uses p + 1 denoised images: exact up to degree p (p = 1: up to 0, its weight
    is the limit 1/2).
    """
    problem = PolynomialData(degree)
    _, (_, corrected) = problem.step(UniPC(order))
    assert_same(corrected, problem.state(SIGMAS[3]))


@pytest.mark.parametrize(("order", "degree"), [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)])
def test_unipc_predicts_exactly(order, degree):
    """The predictor of order 3 solves for its weights; those of order 1 and 2 have none, or the limit 1/2."""
    problem = PolynomialData(degree)
    assert_same(problem.step(UniPC(order))[0], problem.state(SIGMAS[4]))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_unipc_2_predicts_as_dpmpp_2(degree):
    problem = PolynomialData(degree)
    predicted, (_, corrected) = problem.step(UniPC(2))
    expected, _ = DPMpp(2).step(problem.velocity, corrected, SIGMAS, 3, problem.history(DPMpp(2), 3))
    assert_same(predicted, expected)


@pytest.mark.parametrize(("order", "degree"), [(2, 1), (3, 2), (1, 0)])
def test_a_higher_degree_is_not_exact(order, degree):
    """The tests above are sharp: beyond its degree a predictor errs by far more than rounding."""
    problem = PolynomialData(degree + 1)
    assert (problem.step(UniPC(order))[0] - problem.state(SIGMAS[4])).abs() > 1e-4


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
def test_ipndm_integrates_exactly_on_equal_steps(max_order):
    """Adams-Bashforth of order p is exact for slopes of degree below p in sigma."""
    coefficients = DEGREES[max_order - 1]
    antiderivative = torch.cat([torch.zeros(1, dtype=torch.float64), coefficients / torch.arange(1, 5)])
    sigmas = torch.linspace(4.0, 1.0, 7, dtype=torch.float64)

    def velocity(x, sigma):
        return value(coefficients, per_row(sigma, x)).expand_as(x)

    x, history, n = noise(2, 3), (), 4
    for i in range(n):
        _, history = IPNDM(max_order).step(velocity, x, sigmas, i, history)
    result, _ = IPNDM(max_order).step(velocity, x, sigmas, n, history)
    assert_same(
        result - x, (value(antiderivative, sigmas[n + 1]) - value(antiderivative, sigmas[n])).expand_as(x)
    )


def test_epd_adds_its_slopes_with_all_three_factors():
    """For dx/dsigma = sigma a step is h sum_k w_k o_k a_k (a_k s_k)."""
    table = random_table(5, 3, scales=True)
    points = table.scale_time * SIGMAS[1:, None] ** table.r * SIGMAS[:-1, None] ** (1 - table.r)
    steps = SIGMAS.diff()[:, None] * table.w * table.scale_dir * table.scale_time * points
    x = noise(2, 3)
    assert_same(sample(EPD(table), lambda y, s: per_row(s, y).expand_as(y), x, SIGMAS), x + steps.sum())
