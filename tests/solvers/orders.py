"""Orders of convergence by regression on an exactly solvable probability-flow ODE."""

from collections.abc import Callable

from problems import QUANTILES, Mixture, slope

from solvers import Solver, UniPC, polynomial, sample

STEPS = [16, 32, 64, 128]
TOLERANCE = 0.2
VE = Mixture()


def edm(n):
    return polynomial(n + 1, 0.3, 6.0)


def warm_sample(solver: Solver, mixture: Mixture, x, sigmas, known: int):
    """Integrate with the exact states at the first `known` nodes as history, so that no step is of a lower
    order.
    """
    history: tuple = ()
    for n in range(known - 1):
        state = mixture.solve(x, sigmas[0], sigmas[n])
        _, history = solver.step(mixture.velocity, state, sigmas, n, history)
        if isinstance(solver, UniPC):
            history = (history[0], state)  # in place of the corrected state
    x = mixture.solve(x, sigmas[0], sigmas[known - 1])
    for n in range(known - 1, len(sigmas) - 1):
        x, history = solver.step(mixture.velocity, x, sigmas, n, history)
    return x


def measured_order(
    make: Callable[[int], Solver], grid: Callable, steps: list[int], mixture: Mixture = VE, warm: int = 1
) -> float:
    errors = []
    for n in steps:
        sigmas = grid(n)
        x = mixture.quantile(QUANTILES, sigmas[0])
        exact = mixture.solve(x, sigmas[0], sigmas[-1])
        result = (
            warm_sample(make(n), mixture, x, sigmas, warm)
            if warm > 1
            else sample(make(n), mixture.velocity, x, sigmas)
        )
        errors.append((result - exact).abs().max().item())
    return slope(steps, errors)
