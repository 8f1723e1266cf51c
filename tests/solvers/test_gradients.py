"""Gradients reach the table and the start, and equal finite differences."""

import pytest
import torch
from problems import Conditioned, noise, nonlinear, random_table

from solvers import EPD, SolverTable, polynomial, sample

N, K, B = 3, 2, 2
SIGMAS = polynomial(N + 1, 0.2, 5.0)


def inputs(*leading, scales=True):
    table = random_table(*leading, N, K, seed=5, scales=scales)
    return [value.requires_grad_() for value in table.arrays().values()]


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("leading", [(), (B,)], ids=["one table", "one table an image"])
@pytest.mark.parametrize(
    "options",
    [{}, {"parallel": False}, {"max_batch": 2, "afs": True}, {"max_order": 3}],
    ids=["parallel", "sequential", "chunked afs", "plugin"],
)
def test_gradient_of_the_table(leading, scales, options):
    field, start = Conditioned(noise(B, seed=2)), 5 * noise(B, 3)

    def result(*arrays):
        return sample(EPD(SolverTable(*arrays), **options), field, start, SIGMAS)

    arrays = inputs(*leading, scales=scales)
    assert torch.autograd.gradcheck(result, arrays, eps=1e-6, atol=1e-6, rtol=1e-5)
    for gradient in torch.autograd.grad(result(*arrays).sum(), arrays):
        assert (gradient.abs() > 1e-8).all()


def test_gradient_of_the_start():
    table = random_table(N, K, scales=True)
    start = (5 * noise(B, 3)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: sample(EPD(table), nonlinear, x, SIGMAS, finish="euler"), start, eps=1e-6, atol=1e-6
    )


def test_an_image_only_moves_its_own_table():
    arrays = inputs(B)
    result = sample(EPD(SolverTable(*arrays)), Conditioned(noise(B, seed=2)), 5 * noise(B, 3), SIGMAS)
    for gradient in torch.autograd.grad(result[0].sum(), arrays):
        assert (gradient[0] != 0).all()
        assert (gradient[1] == 0).all()


def test_gradient_goes_through_sorting():
    r = torch.tensor([[0.8, 0.3]] * N, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[0.4, 0.6]] * N, dtype=torch.float64, requires_grad=True)
    start = 5 * noise(B, 3)
    direct = torch.autograd.grad(sample(EPD(SolverTable(r, w)), nonlinear, start, SIGMAS).sum(), (r, w))
    through = torch.autograd.grad(
        sample(EPD(SolverTable.sorted(r, w)), nonlinear, start, SIGMAS).sum(), (r, w)
    )
    for a, b in zip(direct, through, strict=True):
        assert (a.abs() > 1e-6).all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_float32_state_carries_the_gradient_to_the_float64_table():
    r, w = inputs(B, scales=False)
    field, start = Conditioned(noise(B, seed=2)), 5 * noise(B, 3)
    precise = torch.autograd.grad(sample(EPD(SolverTable(r, w)), field, start, SIGMAS).sum(), (r, w))
    single = torch.autograd.grad(sample(EPD(SolverTable(r, w)), field, start.float(), SIGMAS).sum(), (r, w))
    for a, b in zip(precise, single, strict=True):
        assert b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
