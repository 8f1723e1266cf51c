"""Positions as gaps and back: what learns positions learns these."""

import pytest
import torch

from solvers import EPD, SolverTable, polynomial, trajectory


@pytest.mark.parametrize("shape", [(3, 1), (4, 3), (2, 5, 2)])
def test_a_table_is_that_of_its_gaps(shape):
    r = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(-1).values
    table = SolverTable(r, torch.full_like(r, 1 / shape[-1]), scale_dir=1 + 0.1 * r)
    gaps = table.gaps()
    assert gaps.shape == (*shape[:-1], shape[-1] + 1)
    assert (gaps >= 0).all()
    torch.testing.assert_close(gaps.sum(-1), torch.ones(shape[:-1], dtype=torch.float64))
    again = SolverTable.from_gaps(gaps, table.w, table.scale_dir)
    torch.testing.assert_close(again.r, table.r, rtol=0, atol=1e-15)
    assert torch.equal(again.scale_dir, table.scale_dir)
    assert again.scale_time is None


def test_rounding_of_gaps_never_leaves_the_interval():
    gaps = torch.tensor([[1.0 + 1e-12, 0.0]], dtype=torch.float64)
    assert SolverTable.from_gaps(gaps, torch.ones(1, 1)).r.item() == 1.0


@pytest.mark.parametrize("max_order", [1, 3])
def test_a_detached_trajectory_has_the_same_states_and_no_gradient_across_intervals(max_order):
    table, nodes = SolverTable.uniform(3, 2), polynomial(4, 0.1, 5.0)
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    velocity = lambda x, sigma: x / (1 + sigma.view(-1, *[1] * (x.ndim - 1)))  # noqa: E731
    whole, apart = (
        list(trajectory(EPD(table, max_order=max_order), velocity, x, nodes, detach))
        for detach in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, apart, strict=True))
    assert apart[0].requires_grad
    assert not any(state.requires_grad for state in apart[1:])
