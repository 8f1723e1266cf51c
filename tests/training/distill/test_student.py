"""Unconstrained parameters: they start exactly where they should, stay valid, and reach every solver of their levels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import EPD, DPMpp, Heun, SolverTable, Tableau, compile_tableau, polynomial, sample
from training.distill.student import TableauStudent, TableStudent

NODES = polynomial(4, 0.1, 10.0)


def random_table(seed: int, intervals: int, points: int) -> SolverTable:
    generator = torch.Generator().manual_seed(seed)
    r = torch.rand(intervals, points, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    return SolverTable.sorted(r, torch.randn(intervals, points, generator=generator, dtype=torch.float64).softmax(-1))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), intervals=st.integers(1, 5), points=st.integers(1, 4))
def test_a_student_starts_at_its_table(seed, intervals, points):
    start = random_table(seed, intervals, points)
    table = TableStudent(start, scale_dir=0.3).table()
    torch.testing.assert_close(table.r, start.r, rtol=0, atol=1e-9)
    torch.testing.assert_close(table.w, start.w, rtol=0, atol=1e-9)
    torch.testing.assert_close(table.scale_dir, torch.ones_like(start.r), rtol=0, atol=1e-12)
    assert table.scale_time is None


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), size=st.floats(0.1, 30))
def test_any_parameters_give_a_valid_sorted_table(seed, size):
    student = TableStudent(SolverTable.uniform(3, 3), scale_dir=0.2, scale_time=0.1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    table = student.table()  # validates itself
    assert (table.r.diff(dim=-1) >= 0).all()
    assert (table.scale_dir - 1).abs().max() <= 0.2
    assert (table.scale_time - 1).abs().max() <= 0.1


def test_scales_start_where_the_table_has_them():
    scales = torch.tensor([[0.9, 1.05], [1.0, 1.15]], dtype=torch.float64)
    start = SolverTable(**SolverTable.uniform(2, 2).arrays(), scale_dir=scales)
    torch.testing.assert_close(TableStudent(start, scale_dir=0.2).table().scale_dir, scales, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"0\.1"):
        TableStudent(start, scale_dir=0.1)
    with pytest.raises(ValueError, match="half-range 1"):
        TableStudent(start, scale_dir=1.0)


def test_every_parameter_gets_a_gradient():
    student = TableStudent(SolverTable.uniform(3, 2), scale_dir=0.2, scale_time=0.2)
    x = sample(
        EPD(student.table()), lambda x, sigma: torch.sin(x) + 1 / sigma.view(-1, *[1] * (x.ndim > 1 and sigma.ndim)), start_state(), NODES
    )
    x.square().sum().backward()
    assert all((p.grad != 0).all() for p in student.parameters())


def start_state() -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def velocity(x, sigma):
    return torch.sin(x) / (1 + sigma.view(-1, 1))


@pytest.mark.parametrize("solver", [Heun(), DPMpp(2), EPD(SolverTable.uniform(3, 3))], ids=["heun", "dpmpp", "epd"])
def test_a_tableau_student_starts_at_its_solver(solver):
    student = TableauStudent(compile_tableau(solver, NODES), learn_sigmas=True)
    expected = sample(solver, velocity, start_state(), NODES)
    torch.testing.assert_close(sample(student.tableau(), velocity, start_state(), NODES), expected, rtol=0, atol=1e-12)
    assert student.distance() == 0


def test_a_step_of_learning_keeps_the_levels():
    start = compile_tableau(EPD(SolverTable.uniform(3, 2)), NODES)
    student = TableauStudent(start, learn_sigmas=True)
    optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        sample(student.tableau(), velocity, start_state(), NODES).square().sum().backward()
        optimiser.step()
    learned = student.tableau()  # refuses a stage that uses its own or a later level
    assert (learned.depth, learned.evaluations) == (start.depth, start.evaluations)
    assert torch.equal(learned.stages[:, 0], start.stages[:, 0])
    assert learned.sigmas[0] == start.sigmas[0]
    assert (learned.sigmas[1:] != start.sigmas[1:]).all()
    assert student.distance() > 0


def test_noise_levels_stay_unless_asked_for():
    student = TableauStudent(compile_tableau(Heun(), NODES))
    sample(student.tableau(), velocity, start_state(), NODES).sum().backward()
    assert student.log_sigma_change.grad is None
    assert student.stage_change.grad is not None


def test_every_solver_of_the_same_levels_is_in_reach():
    """The changes that lead from Heun's tableau to that of EPD with one point at 0.3: both have single-stage levels."""
    heun = compile_tableau(Heun(), NODES)
    epd = compile_tableau(EPD(SolverTable(torch.full((3, 1), 0.3), torch.ones(3, 1))), NODES)
    student = TableauStudent(heun, learn_sigmas=True)
    with torch.no_grad():
        student.stage_change.copy_(student.allowed * (epd.stages - heun.stages)[:, 1:] / student.units[:-1, None])
        student.output_change.copy_((epd.output - heun.output)[1:] / student.units[-1])
        student.log_sigma_change.copy_((epd.sigmas / heun.sigmas).log())
    reached: Tableau = student.tableau()
    torch.testing.assert_close(reached.stages, epd.stages, rtol=0, atol=1e-12)
    torch.testing.assert_close(reached.output, epd.output, rtol=0, atol=1e-12)
    torch.testing.assert_close(reached.sigmas, epd.sigmas, rtol=1e-12, atol=0)
