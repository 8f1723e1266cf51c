"""A compiled tableau is its solver: the same result, the same cost, consistent rows."""

import pytest
import torch
from problems import Recorded, epd, noise, nonlinear, random_table

from solvers import (
    DPM,
    DPM2,
    EPD,
    FINISHES,
    IPNDM,
    DPMpp,
    Euler,
    Heun,
    SolverTable,
    Tableau,
    UniPC,
    compile_tableau,
    denoiser_from_velocity,
    polynomial,
    sample,
)

N = 5
SIGMAS = polynomial(N + 1, 0.05, 8.0)
INTO_ZERO = torch.cat([SIGMAS, SIGMAS.new_zeros(1)])

# solver, depth, evaluations on N intervals
COSTS = {
    "euler": (Euler(), N, N),
    "euler afs": (Euler(afs=True), N - 1, N - 1),
    "heun": (Heun(), 2 * N, 2 * N),
    "heun afs": (Heun(afs=True), 2 * N - 1, 2 * N - 1),
    "dpm2": (DPM2(), 2 * N, 2 * N),
    "dpm2 r=0.3 afs": (DPM2(0.3, afs=True), 2 * N - 1, 2 * N - 1),
    "dpm 2": (DPM(2), 2 * N, 2 * N),
    "dpm 3": (DPM(3), 4 * N, 4 * N),
    "dpm 4 afs": (DPM(4, afs=True), 6 * N - 1, 6 * N - 1),
    **{f"ipndm {p}": (IPNDM(p), N, N) for p in (1, 2, 3, 4)},
    "ipndm 4 afs": (IPNDM(4, afs=True), N - 1, N - 1),
    **{f"dpmpp {p}": (DPMpp(p), N, N) for p in (1, 2, 3)},
    **{f"unipc {p}": (UniPC(p), N, N) for p in (1, 2, 3)},
    "dpmpp lower order at the end": (DPMpp(3, lower_order_final=True), N, N),
    "unipc lower order at the end": (UniPC(3, lower_order_final=True), N, N),
    **{f"epd {k}": (EPD(random_table(N, k)), 2 * N, N * (1 + k)) for k in (1, 2, 3, 4)},
    "epd sequential": (EPD(random_table(N, 3), parallel=False), 2 * N, 4 * N),
    "epd chunked": (EPD(random_table(N, 3), max_batch=2), 2 * N, 4 * N),
    "epd afs": (EPD(random_table(N, 2), afs=True), 2 * N - 1, 3 * N - 1),
    "epd scales": (EPD(random_table(N, 2, scales=True)), 2 * N, 3 * N),
    "plugin": (EPD(random_table(N, 2), max_order=3), 2 * N, 3 * N),
    "plugin scales afs": (EPD(random_table(N, 2, scales=True), max_order=4, afs=True), 2 * N - 1, 3 * N - 1),
}

# intervals, depth and evaluations when the last step leads to 0: that step is Euler's
COSTS_INTO_ZERO = {
    "euler": (Euler(), N + 1),
    "heun": (Heun(), 2 * N + 1),
    "dpm2": (DPM2(), 2 * N + 1),
    "dpm 3": (DPM(3), 4 * N + 1),
    "ipndm": (IPNDM(3), N + 1),
    "dpmpp": (DPMpp(3), N + 1),
    "unipc": (UniPC(3), N + 1),
}


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize(("solver", "depth", "evaluations"), COSTS.values(), ids=COSTS)
def test_result_and_cost(solver, depth, evaluations, finish):
    tableau = compile_tableau(solver, SIGMAS, finish=finish)
    x = 8 * noise(3, 4)
    field = Recorded()
    result = sample(tableau, field, x, SIGMAS)
    torch.testing.assert_close(
        result, sample(solver, nonlinear, x, SIGMAS, finish=finish), rtol=1e-10, atol=1e-10
    )
    extra = 0 if finish == "none" else 1
    assert (tableau.depth, tableau.evaluations) == (depth + extra, evaluations + extra)
    assert len(field.rows) == tableau.depth
    assert sum(field.rows) == tableau.evaluations * len(x)


@pytest.mark.parametrize(("solver", "cost"), COSTS_INTO_ZERO.values(), ids=COSTS_INTO_ZERO)
def test_result_and_cost_into_sigma_0(solver, cost):
    tableau = compile_tableau(solver, INTO_ZERO, finish="denoise")
    assert (tableau.depth, tableau.evaluations) == (cost, cost)
    assert (tableau.sigmas > 0).all()
    x = 8 * noise(3, 4)
    torch.testing.assert_close(
        sample(tableau, nonlinear, x, INTO_ZERO),
        sample(solver, nonlinear, x, INTO_ZERO),
        rtol=1e-10,
        atol=1e-10,
    )


def test_a_tableau_can_be_finished_later():
    """Compiled without a finish and sampled with one: the denoiser's output at the last node."""
    x, tableau = 8 * noise(3, 4), compile_tableau(DPMpp(2), SIGMAS)
    last = sample(tableau, nonlinear, x, SIGMAS)
    expected = denoiser_from_velocity(nonlinear)(last, SIGMAS[-1])
    torch.testing.assert_close(
        sample(tableau, nonlinear, x, SIGMAS, finish="denoise"), expected, rtol=1e-12, atol=1e-12
    )


CONSISTENT = {name: case[0] for name, case in COSTS.items() if "afs" not in name and "scales" not in name}


@pytest.mark.parametrize("solver", CONSISTENT.values(), ids=CONSISTENT)
def test_rows_are_consistent(solver):
    """For a constant velocity c each stage and the result are x0 + (sigma - sigma0) c."""
    for finish, end in (("none", SIGMAS[-1]), ("euler", 0.0)):
        tableau = compile_tableau(solver, SIGMAS, finish=finish)
        torch.testing.assert_close(tableau.stages[:, 0], torch.ones_like(tableau.sigmas), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            tableau.stages[:, 1:].sum(1), tableau.sigmas - SIGMAS[0], rtol=0, atol=1e-12
        )
        expected = torch.as_tensor(end - SIGMAS[0])
        assert tableau.output[0].item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(tableau.output[1:].sum(), expected, rtol=0, atol=1e-12)


def test_heun_step_is_the_textbook_tableau():
    tableau = compile_tableau(Heun(), torch.tensor([3.0, 1.0]))
    assert tableau.sigmas.tolist() == [3.0, 1.0]
    assert tableau.stages.tolist() == [[1.0, 0.0, 0.0], [1.0, -2.0, 0.0]]
    assert tableau.output.tolist() == [1.0, -1.0, -1.0]
    assert tableau.levels == ((0,), (1,))


def test_points_of_a_step_share_a_level():
    assert compile_tableau(epd(2, (0.3, 0.6, 0.9), (0.2, 0.3, 0.5)), SIGMAS[:3]).levels == (
        (0,),
        (1, 2, 3),
        (4,),
        (5, 6, 7),
    )


def test_intermediate_nodes_are_the_noise_levels_of_the_stages():
    table = random_table(N, 2, scales=True)
    tableau = compile_tableau(EPD(table), SIGMAS)
    assert torch.equal(tableau.sigmas[::3], SIGMAS[:-1])
    points = SIGMAS[1:, None] ** table.r * SIGMAS[:-1, None] ** (1 - table.r) * table.scale_time
    torch.testing.assert_close(tableau.sigmas.view(N, 3)[:, 1:], points, rtol=1e-12, atol=0)


def test_tables_per_image_have_no_tableau():
    table = random_table(2, N, 2)
    with pytest.raises(ValueError, match=r"\[2\] images, but there are 1"):
        compile_tableau(EPD(SolverTable(table.r, table.w)), SIGMAS)


def test_malformed_tableaux():
    sigmas, output = torch.tensor([2.0, 1.0]), torch.tensor([1.0, -0.5, -0.5])
    stages = torch.tensor([[1.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
    assert Tableau(sigmas, stages, output, ((0,), (1,))).depth == 2
    with pytest.raises(ValueError, match=r"stages \[2, 2\] and output \[3\] do not fit sigmas \[2\]"):
        Tableau(sigmas, stages[:, :2], output, ((0,), (1,)))
    with pytest.raises(ValueError, match=r"output \[2\] do not fit sigmas \[2\]"):
        Tableau(sigmas, stages, output[:2], ((0,), (1,)))
    with pytest.raises(ValueError, match="of its own or a later level"):
        Tableau(sigmas, stages, output, ((0, 1),))
    with pytest.raises(ValueError, match="of its own or a later level"):
        Tableau(sigmas, stages, output, ((1,), (0,)))
    for levels in (((0,),), ((0,), (1,), (1,)), ((0,), (0, 1))):
        with pytest.raises(ValueError, match="do not hold each stage once"):
            Tableau(sigmas, stages, output, levels)


def test_a_tableau_runs_on_its_own_nodes_only():
    tableau = compile_tableau(Heun(), torch.tensor([2.0, 1.0, 0.5]))
    with pytest.raises(ValueError, match=r"9\.0"):
        sample(tableau, lambda x, sigma: x, torch.ones(1, 1), torch.tensor([9.0, 1.0, 0.1]))


def test_a_solver_without_evaluations_has_an_empty_tableau():
    tableau = compile_tableau(Euler(afs=True), torch.tensor([2.0, 1.0]))
    assert (tableau.depth, tableau.evaluations) == (0, 0)
    assert tableau.output.item() == pytest.approx(1 - 1 / 5**0.5)


def test_a_row_without_any_weight_is_0():
    """A stage at the origin: x1 = (velocity at 0) = 3."""
    tableau = Tableau(
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.float64),
        torch.tensor([0.0, 1.0]).double(),
        ((0,),),
    )
    state = sample(tableau, lambda x, sigma: x + 3, torch.full((1, 2), 5.0), torch.tensor([1.0, 0.5]))
    assert state.tolist() == [[3.0, 3.0]]
