"""Unconstrained parameters: they start exactly where they should, stay valid, and reach every solver of their
levels.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import EPD, DPMpp, Euler, Heun, SolverTable, Tableau, compile_tableau, polynomial, sample
from training.distill.students.table import TableStudent
from training.distill.students.tableau import TableauStudent, second_moments
from training.distill.students.widen import denoised_weights, widen

NODES = polynomial(4, 0.1, 10.0)


def random_table(seed: int, intervals: int, points: int) -> SolverTable:
    generator = torch.Generator().manual_seed(seed)
    r = torch.rand(intervals, points, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    return SolverTable.sorted(
        r, torch.randn(intervals, points, generator=generator, dtype=torch.float64).softmax(-1)
    )


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), intervals=st.integers(1, 5), points=st.integers(1, 4))
def test_a_student_starts_at_its_table(seed, intervals, points):
    start = random_table(seed, intervals, points)
    table = TableStudent(start, scale_dir=0.3).learned()
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
    table = student.learned()  # validates itself
    assert (table.r.diff(dim=-1) >= 0).all()
    assert (table.scale_dir - 1).abs().max() <= 0.2
    assert (table.scale_time - 1).abs().max() <= 0.1


def test_scales_start_where_the_table_has_them():
    scales = torch.tensor([[0.9, 1.05], [1.0, 1.15]], dtype=torch.float64)
    start = SolverTable(**SolverTable.uniform(2, 2).arrays(), scale_dir=scales)
    torch.testing.assert_close(
        TableStudent(start, scale_dir=0.2).learned().scale_dir, scales, rtol=0, atol=1e-9
    )
    with pytest.raises(ValueError, match=r"0\.1"):
        TableStudent(start, scale_dir=0.1)
    with pytest.raises(ValueError, match="half-range 1"):
        TableStudent(start, scale_dir=1.0)


def test_every_parameter_gets_a_gradient():
    student = TableStudent(SolverTable.uniform(3, 2), scale_dir=0.2, scale_time=0.2)
    x = sample(
        EPD(student.learned()),
        lambda x, sigma: torch.sin(x) + 1 / sigma.view(-1, *[1] * (x.ndim > 1 and sigma.ndim)),
        start_state(),
        NODES,
    )
    x.square().sum().backward()
    assert all((p.grad != 0).all() for p in student.parameters())


def start_state() -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def velocity(x, sigma):
    return torch.sin(x) / (1 + sigma.view(-1, 1))


@pytest.mark.parametrize(
    "solver", [Heun(), DPMpp(2), EPD(SolverTable.uniform(3, 3))], ids=["heun", "dpmpp", "epd"]
)
def test_a_tableau_student_starts_at_its_solver(solver):
    student = TableauStudent(compile_tableau(solver, NODES), learn_sigmas=True)
    expected = sample(solver, velocity, start_state(), NODES)
    torch.testing.assert_close(
        sample(student.learned(), velocity, start_state(), NODES), expected, rtol=0, atol=1e-12
    )
    assert student.distance() == 0


def test_a_step_of_learning_keeps_the_levels():
    start = compile_tableau(EPD(SolverTable.uniform(3, 2)), NODES)
    student = TableauStudent(start, True, second_moments(start, velocity, start_state()))
    optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        sample(student.learned(), velocity, start_state(), NODES).square().sum().backward()
        optimiser.step()
    learned = student.learned()  # refuses a stage that uses its own or a later level
    assert (learned.depth, learned.evaluations) == (start.depth, start.evaluations)
    assert learned.sigmas[0] == start.sigmas[0]
    assert (learned.sigmas[1:] != start.sigmas[1:]).all()
    assert student.distance() > 0


def test_noise_levels_stay_unless_asked_for():
    student = TableauStudent(compile_tableau(Heun(), NODES))
    sample(student.learned(), velocity, start_state(), NODES).sum().backward()
    assert student.log_sigma_change.grad is None
    assert student.row_change.grad is not None


def test_every_solver_of_the_same_levels_is_in_reach():
    """The changes that lead from Heun's tableau to that of EPD with one point at 0.3: both have single-stage
    levels.
    """
    heun = compile_tableau(Heun(), NODES)
    epd = compile_tableau(EPD(SolverTable(torch.full((3, 1), 0.3), torch.ones(3, 1))), NODES)
    student = TableauStudent(heun, True, second_moments(heun, velocity, start_state()))
    factor = epd.sigmas / heun.sigmas
    target = denoised_weights(epd)
    target[:-1, 0] /= factor
    with torch.no_grad():
        student.log_sigma_change[1:] = factor.log()[1:] / student.sigma_units[1:]
        for row, change in enumerate(target - student.weights):
            student.row_change[row] = torch.linalg.lstsq(
                student.axes[row], change[:, None], driver="gelsd"
            ).solution[:, 0]
    reached: Tableau = student.learned()
    torch.testing.assert_close(reached.stages, epd.stages, rtol=0, atol=1e-9)
    torch.testing.assert_close(reached.output, epd.output, rtol=0, atol=1e-9)
    torch.testing.assert_close(reached.sigmas, epd.sigmas, rtol=1e-12, atol=0)


def test_a_unit_of_a_row_moves_its_result_by_one_rms():
    start = compile_tableau(DPMpp(2), NODES)
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student = TableauStudent(start, gram=second_moments(start, velocity, x))
    before = sample(start, velocity, x, NODES)
    for axis in range(1, start.evaluations + 1):
        with torch.no_grad():
            student.row_change.zero_()
            student.row_change[-1, axis] = 0.5
        moved = (sample(student.learned(), velocity, x, NODES) - before).square().mean().sqrt()
        assert 0.3 < moved <= 0.5 + 1e-9


def test_weights_of_denoised_states_follow_from_the_definition():
    """Euler: x_s = (sigma_s / sigma_(s-1)) x_(s-1) + (1 - sigma_s / sigma_(s-1)) D_(s-1)."""
    weights = denoised_weights(compile_tableau(Euler(), NODES))
    ratio = (NODES[1:] / NODES[:-1]).tolist()
    assert weights[0].tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(weights[1], torch.tensor([ratio[0], 1 - ratio[0], 0, 0], dtype=torch.float64))
    torch.testing.assert_close(
        weights[2],
        torch.tensor([ratio[0] * ratio[1], (1 - ratio[0]) * ratio[1], 1 - ratio[1], 0], dtype=torch.float64),
    )
    with pytest.raises(ValueError, match="noise level 0"):
        denoised_weights(Tableau(torch.zeros(1), torch.eye(1, 2), torch.ones(2), ((0,),)))


@pytest.mark.parametrize(
    "solver", [Heun(), DPMpp(2), EPD(SolverTable.uniform(3, 2))], ids=["heun", "dpmpp", "epd"]
)
@pytest.mark.parametrize("points, stride", [(1, 1), (2, 1), (4, 2)])
def test_a_widened_tableau_is_the_same_sampler_with_idle_stages(solver, points, stride):
    start = compile_tableau(solver, NODES)
    wide = widen(start, points, stride)
    torch.testing.assert_close(
        sample(wide, velocity, start_state(), NODES),
        sample(start, velocity, start_state(), NODES),
        rtol=0,
        atol=1e-11,
    )
    assert wide.depth == start.depth
    expected = [
        max(len(level), points) if n and n % stride == 0 else len(level)
        for n, level in enumerate(start.levels)
    ]
    assert [len(level) for level in wide.levels] == expected
    assert (wide.sigmas > 0).all()
    student = TableauStudent(wide, learn_sigmas=True)
    sample(student.learned(), velocity, start_state(), NODES).square().sum().backward()
    if points > 1:
        assert (student.row_change.grad[-1].abs() > 0).all()  # idle stages would be used


@pytest.mark.parametrize("first", [1, 3])
def test_the_first_level_sees_the_start_at_several_noise_levels(first):
    """Its stages see x_0 scaled to their noise level, and learn where that lies; the one at the start's own
    level does not.
    """
    start = compile_tableau(DPMpp(2), NODES)
    wide = widen(start, 2, first=first)
    assert [len(level) for level in wide.levels] == [first, 2, 2]
    level = list(wide.levels[0])
    torch.testing.assert_close(wide.stages[level, 0], wide.sigmas[level] / NODES[0], rtol=1e-12, atol=0)
    assert not wide.stages[level, 1:].any()
    assert (wide.sigmas[level].diff() < 0).all()
    assert wide.sigmas[level[-1]] > NODES[1]
    torch.testing.assert_close(
        sample(wide, velocity, start_state(), NODES),
        sample(start, velocity, start_state(), NODES),
        rtol=0,
        atol=1e-11,
    )
    student = TableauStudent(wide, learn_sigmas=True)
    assert (student.sigma_units[level] > 0).tolist() == [False, *[True] * (first - 1)]
    with torch.no_grad():
        student.row_change.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        student.log_sigma_change.fill_(0.1)
    moved = student.learned()
    torch.testing.assert_close(moved.stages[level, 0], moved.sigmas[level] / NODES[0], rtol=1e-12, atol=0)
    assert moved.sigmas[0] == NODES[0]
    assert (moved.sigmas[level[1:]] != wide.sigmas[level[1:]]).all()


def test_learned_nodes_start_at_the_nodes_and_stay_in_order():
    student = TableStudent(SolverTable.uniform(3, 2), nodes=NODES)
    torch.testing.assert_close(student.nodes(), NODES, rtol=0, atol=1e-12)
    sample(EPD(student.learned()), velocity, start_state(), student.nodes()).square().sum().backward()
    assert (student.node_logits.grad != 0).all()
    with torch.no_grad():
        student.node_logits.copy_(torch.tensor([5.0, -5.0, 0.0]))
    assert (student.nodes().diff() < 0).all()
    assert student.nodes()[[0, -1]].tolist() == NODES[[0, -1]].tolist()
    assert TableStudent(SolverTable.uniform(3, 2)).nodes() is None
