"""The loop: nodes, callback, finish, and the denoiser convention."""

import math

import pytest
import torch
from problems import Recorded, epd, noise, nonlinear

from solvers import (
    DPM,
    DPM2,
    FINISHES,
    IPNDM,
    DPMpp,
    Euler,
    Heun,
    Solver,
    UniPC,
    compile_tableau,
    denoiser_from_velocity,
    polynomial,
    sample,
    trajectory,
    velocity_from_denoiser,
)

SIGMAS = polynomial(5, 0.1, 6.0)
SOLVERS = [
    Euler(),
    Heun(),
    DPM2(),
    DPM(3),
    IPNDM(3),
    DPMpp(3),
    UniPC(3),
    epd(4, (0.3, 0.6), (0.5, 0.5)),
    epd(4, (0.4,), (1.0,), max_order=2),
]
each_solver = pytest.mark.parametrize(
    "solver", SOLVERS, ids=[f"{type(s).__name__}-{i}" for i, s in enumerate(SOLVERS)]
)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_solver
def test_callback_and_trajectory_see_each_state(solver):
    x, seen = 6 * noise(2, 3), []
    result = sample(solver, nonlinear, x, SIGMAS, callback=lambda n, state: seen.append((n, state)))
    states = list(trajectory(solver, nonlinear, x, SIGMAS))
    assert [n for n, _ in seen] == [0, 1, 2, 3]
    assert len(states) == 4
    for (_, a), b in zip(seen, states, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(result, states[-1])
    assert (states[0] - states[1]).abs().max() > 1e-3


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_gets_the_state_and_a_float64_noise_level(solver, dtype):
    field = Recorded(
        lambda x, sigma: nonlinear(x, sigma) if x.dtype == dtype else pytest.fail(f"state in {x.dtype}")
    )
    x = (6 * noise(2, 3, 4, 4)).to(dtype)
    result = sample(solver, field, x, SIGMAS.float(), finish="denoise")
    assert (result.dtype, result.shape) == (dtype, x.shape)
    for rows, sigma in zip(field.rows, field.sigmas, strict=True):
        assert sigma.dtype == torch.float64
        assert sigma.shape in ((), (rows,))
    precise = sample(solver, nonlinear, x.double(), SIGMAS.float(), finish="denoise")
    torch.testing.assert_close(result.double(), precise, rtol=1e-4, atol=1e-4)


@each_solver
def test_batch_and_entries_are_independent(solver):
    x = 6 * noise(3, 4)
    together = sample(solver, nonlinear, x, SIGMAS)
    for b in range(3):
        assert_same(together[b : b + 1], sample(solver, nonlinear, x[b : b + 1], SIGMAS))


@each_solver
def test_the_input_is_left_as_it_was(solver):
    x, sigmas = 6 * noise(2, 3), SIGMAS.clone()
    before = x.clone()
    sample(solver, nonlinear, x, sigmas, finish="euler")
    assert torch.equal(x, before)
    assert torch.equal(sigmas, SIGMAS)


@each_solver
def test_both_finishes_are_the_denoiser_at_the_last_node(solver):
    x = 6 * noise(2, 3)
    last = sample(solver, nonlinear, x, SIGMAS)
    expected = denoiser_from_velocity(nonlinear)(last, SIGMAS[-1])
    assert_same(sample(solver, nonlinear, x, SIGMAS, finish="euler"), expected)
    assert_same(sample(solver, nonlinear, x, SIGMAS, finish="denoise"), expected)
    assert torch.equal(sample(solver, nonlinear, x, SIGMAS, finish="none"), last)
    assert (expected - last).abs().max() > 1e-3


def test_a_finish_comes_after_the_callbacks_and_costs_one_evaluation():
    seen: list = []
    field = Recorded()
    result = sample(Euler(), field, noise(2, 3), SIGMAS, callback=lambda n, x: seen.append(x), finish="euler")
    assert len(seen) == 4
    assert not torch.equal(result, seen[-1])
    assert field.rows == [2] * 5
    assert field.sigmas[-1] == SIGMAS[-1]


@pytest.mark.parametrize("finish", FINISHES)
def test_at_sigma_0_there_is_nothing_to_finish(finish):
    sigmas, field = torch.tensor([3.0, 1.0, 0.0]), Recorded()
    x = noise(2, 3)
    assert torch.equal(
        sample(Euler(), field, x, sigmas, finish=finish), sample(Euler(), nonlinear, x, sigmas)
    )
    assert field.rows == [2, 2]


def test_unknown_finish():
    field = Recorded()
    with pytest.raises(ValueError, match="finish 'heun': expected one of none, euler, denoise"):
        sample(Euler(), field, noise(2, 3), SIGMAS, finish="heun")
    assert not field.rows


BAD_NODES = {
    "ascending": [0.1, 1.0, 2.0],
    "one ascent": [3.0, 1.0, 2.0],
    "a repeated node": [3.0, 1.0, 1.0],
    "below zero": [3.0, 1.0, -0.1],
    "not a number": [3.0, math.nan, 0.1],
    "infinite": [math.inf, 1.0, 0.1],
    "one node": [3.0],
    "no node": [],
    "two rows": [[3.0, 1.0], [3.0, 1.0]],
}


@pytest.mark.parametrize("nodes", BAD_NODES.values(), ids=BAD_NODES)
def test_bad_nodes(nodes):
    field, expected = Recorded(), "at least 2 finite noise levels, strictly descending"
    for solver in (Euler(), epd(2, (0.5,), (1.0,))):
        with pytest.raises(ValueError, match=expected):
            sample(solver, field, noise(2, 3), torch.tensor(nodes))
        with pytest.raises(ValueError, match=expected):
            next(trajectory(solver, field, noise(2, 3), torch.tensor(nodes)))
    with pytest.raises(ValueError, match=expected):
        compile_tableau(Euler(), torch.tensor(nodes))
    assert not field.rows


def test_bad_solvers():
    for make, text in (
        (lambda: DPM2(0.0), "r is 0.0"),
        (lambda: DPM2(1.5), "r is 1.5"),
        (lambda: DPM(1), "inner_steps is 1"),
        (lambda: IPNDM(0), "order 0, expected 1 to 4"),
        (lambda: IPNDM(5), "order 5, expected 1 to 4"),
        (lambda: DPMpp(4), "DPMpp: order 4, expected 1 to 3"),
        (lambda: UniPC(4), "UniPC: order 4, expected 1 to 3"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    with pytest.raises(TypeError, match="Solver has no step"):
        sample(Solver(), nonlinear, noise(2, 3), SIGMAS)


LEVELS = {
    "one level": torch.tensor(0.7, dtype=torch.float64),
    "a level a row": torch.tensor([0.7, 3.0, 0.2, 1.1, 9.0, 0.05], dtype=torch.float64),
}


@pytest.mark.parametrize("sigma", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("shape", [(6, 3), (6, 2, 3, 3)])
def test_velocity_and_denoiser(sigma, shape):
    """D = x - sigma v row by row, and the round trip in both directions."""
    x = noise(*shape)
    denoiser = denoiser_from_velocity(nonlinear)
    rows = sigma.expand(6)
    for b in range(6):
        assert_same(denoiser(x, sigma)[b], x[b] - rows[b] * nonlinear(x[b : b + 1], rows[b])[0])
    assert_same(velocity_from_denoiser(denoiser)(x, sigma), nonlinear(x, sigma))
    assert_same(denoiser_from_velocity(velocity_from_denoiser(nonlinear))(x, sigma), nonlinear(x, sigma))


def test_a_perfect_denoiser_of_one_image_gives_that_image():
    image = noise(1, 3, seed=3)
    velocity = velocity_from_denoiser(lambda x, sigma: image.expand_as(x))
    for solver in SOLVERS:
        assert_same(sample(solver, velocity, 6 * noise(2, 3), SIGMAS, finish="euler"), image.expand(2, 3))
