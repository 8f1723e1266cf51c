"""The residual Dirichlet policy: it starts at the table, stays bounded, and its densities are right, also at
corners.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from solvers import SolverTable
from training.ppo.loss import mixed_advantages, normalize_advantages, ppo_loss, rloo_advantages
from training.ppo.policy import (
    SCALES,
    LogNormal,
    PolicySettings,
    TableDistribution,
    dirichlet_from_table,
    make_policy,
)


def table_of(seed: int, intervals: int = 3, points: int = 2, **scales) -> SolverTable:
    generator = torch.Generator().manual_seed(seed)
    r = torch.rand(intervals, points, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    return SolverTable.sorted(
        r, torch.randn(intervals, points, generator=generator, dtype=torch.float64).softmax(-1), **scales
    )


@pytest.mark.parametrize("kind", ["table", "mlp"])
@pytest.mark.parametrize("points", [1, 2, 4])
def test_the_mean_is_the_start_table_at_first(kind, points):
    start = table_of(0, 5, points)
    policy = make_policy(start, PolicySettings(20.0, residual=kind, seed=1))
    mean = policy().mean()
    torch.testing.assert_close(mean.r, start.r, rtol=0, atol=1e-6)
    torch.testing.assert_close(mean.w, start.w, rtol=0, atol=1e-9)
    assert policy().kl(policy.base()).item() == 0
    assert policy().pos.concentration.sum(-1).tolist() == pytest.approx([20.0] * 5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), concentration=st.floats(0.05, 500), points=st.integers(1, 4))
def test_what_is_drawn_is_a_valid_table_with_a_finite_density(seed, concentration, points):
    start = table_of(seed, 4, points)
    policy = make_policy(start, PolicySettings(concentration))
    draw = policy().sample(16, seed)
    draw.table()  # validates itself
    assert policy().log_prob(*draw).isfinite().all()
    assert torch.equal(policy().sample(16, seed).segments, draw.segments)
    assert not torch.equal(policy().sample(16, seed + 1).segments, draw.segments)


def test_densities_at_a_corner_of_the_simplex_are_finite():
    corner = TableDistribution(
        torch.full((2, 3), 1e-3, dtype=torch.float64), torch.full((2, 2), 1e-3, dtype=torch.float64)
    )
    draw = corner.sample(1000, 0)
    assert (draw.segments > 0.999).any(-1).double().mean() > 0.8  # at corners indeed
    assert corner.log_prob(*draw).isfinite().all()


def test_drawing_leaves_the_global_random_numbers_alone():
    policy = make_policy(table_of(0), PolicySettings(20.0, residual="mlp"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    policy().sample(4, 9)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [1e2, 1e6])
def test_concentrations_are_bounded(size):
    policy = make_policy(table_of(0), PolicySettings(10.0, learned_scales=SCALES, limit=2.0))
    with torch.no_grad():
        policy.residual.change.copy_(
            size * torch.randn(policy.residual.change.shape, generator=torch.Generator().manual_seed(0))
        )
    for moved, base in ((policy().pos, policy.base().pos), (policy().weight, policy.base().weight)):
        assert (moved.concentration / base.concentration).log().abs().max() <= 2.0 + 1e-9
    assert policy().kl(policy.base()).isfinite()


def test_log_prob_entropy_and_moments_against_scipy():
    alpha = torch.tensor([[2.0, 3.0, 1.5]], dtype=torch.float64)
    weight = torch.tensor([[4.0, 0.7]], dtype=torch.float64)
    distribution = TableDistribution(alpha, weight)
    draw = distribution.sample(4000, 0)
    reference = stats.dirichlet(alpha[0].numpy()), stats.dirichlet(weight[0].numpy())
    expected = reference[0].logpdf(draw.segments[7, 0].numpy()) + reference[1].logpdf(
        draw.weights[7, 0].numpy()
    )
    assert distribution.log_prob(*draw)[7].item() == pytest.approx(expected, rel=1e-9)
    assert distribution.entropy().item() == pytest.approx(
        reference[0].entropy() + reference[1].entropy(), rel=1e-9
    )
    standard_error = math.sqrt(reference[0].var()[0] / 4000)
    assert draw.segments[:, 0, 0].mean().item() == pytest.approx(2 / 6.5, abs=4 * standard_error)


def test_scales_are_log_normal_and_exported_as_their_median():
    start = table_of(0, scale_dir=torch.full((3, 2), 0.9, dtype=torch.float64))
    policy = make_policy(start, PolicySettings(20.0, scale_std=0.1, learned_scales=SCALES))
    torch.testing.assert_close(policy().mean().scale_dir, start.scale_dir)
    torch.testing.assert_close(policy().mean().scale_time, torch.ones(3, 2, dtype=torch.float64))
    draw = policy().sample(4000, 1)
    assert draw.scale_dir.log().std().item() == pytest.approx(0.1, rel=0.05)
    assert draw.scale_dir.median().item() == pytest.approx(0.9, rel=0.01)
    distribution = policy()
    expected = stats.lognorm(s=0.1, scale=0.9).logpdf(draw.scale_dir[3].numpy()).sum()
    log_prob = distribution.scales["scale_dir"].log_prob(draw.scale_dir[3])
    assert log_prob.item() == pytest.approx(expected, rel=1e-9)
    p, q = (
        LogNormal(torch.zeros(1, 1), torch.full((1, 1), 0.2)),
        LogNormal(torch.full((1, 1), 0.3), torch.full((1, 1), 0.1)),
    )
    assert p.kl(q).item() == pytest.approx(0.5 * ((0.04 + 0.09) / 0.01 - 1 + 2 * math.log(0.5)), rel=1e-5)


def test_fixed_scales_of_the_start_are_kept():
    start = table_of(0, scale_time=torch.full((3, 2), 0.95, dtype=torch.float64))
    policy = make_policy(start, PolicySettings(20.0))
    assert policy().mean().scale_time is None
    torch.testing.assert_close(policy.with_fixed_scales(policy().mean()).scale_time, start.scale_time)
    assert policy.with_fixed_scales(policy().sample(5, 0).table()).scale_time.shape == (5, 3, 2)


@pytest.mark.parametrize("concentration", [0.0, -1.0, float("nan"), float("inf")])
def test_concentrations_that_make_no_sense_are_refused(concentration):
    with pytest.raises(ValueError, match="dirichlet_concentration"):
        dirichlet_from_table(table_of(0), concentration)
    with pytest.raises(ValueError, match="policy"):
        TableDistribution(torch.ones(2, 3), torch.ones(2, 3))


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]])
    torch.testing.assert_close(rloo_advantages(rewards), expected)
    torch.testing.assert_close(rloo_advantages(rewards[:, :1]), rewards[:, :1])


def test_prompt_difficulty_vanishes_from_the_groups_own_baseline_only():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert (rloo_advantages(rewards) == 0).all()
    assert mixed_advantages(rewards).abs().flatten().tolist() == pytest.approx([2 / 3] * 8)


def test_whitening_is_global_and_safe():
    advantages = torch.tensor([[1.0, -1.0], [3.0, -3.0]], dtype=torch.float64)
    assert normalize_advantages(advantages, centre=False).square().mean().item() == pytest.approx(1)
    assert (normalize_advantages(torch.zeros(2, 2), centre=True) == 0).all()


@pytest.mark.parametrize(
    "advantage, ratio, moves",
    [(1.0, 1.5, False), (1.0, 0.5, True), (-1.0, 0.5, False), (-1.0, 1.5, True), (1.0, 1.1, True)],
)
def test_clipping_stops_the_gradient_where_the_paper_says(advantage, ratio, moves):
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, diagnostics = ppo_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    loss.backward()
    assert (log_prob.grad != 0).item() == moves
    assert diagnostics["ratio"] == pytest.approx(ratio)
    assert diagnostics["clipfrac"] == float(abs(ratio - 1) > 0.2)
    assert diagnostics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio))


@pytest.mark.parametrize("kind", ["table", "mlp"])
def test_gradient_of_the_loss_against_finite_differences(kind):
    policy = make_policy(
        table_of(3), PolicySettings(15.0, learned_scales=("scale_dir",), residual=kind, seed=2)
    )
    draw = policy().sample(6, 4)
    old = policy().log_prob(*draw).detach() + 0.05 * torch.arange(6)
    advantages = torch.tensor([0.5, -1.0, 2.0, 0.1, -0.4, 1.0], dtype=torch.float64)
    parameter = policy.residual.change if kind == "table" else policy.residual.head.weight

    def value():
        loss, _ = ppo_loss(policy().log_prob(*draw), old, advantages, 0.5)
        return loss + 0.1 * policy().kl(policy.base()) - 0.01 * policy().entropy()

    gradient = torch.autograd.grad(value(), parameter)[0]
    for place in [(0, 0), (1, 2), (2, 4)]:
        with torch.no_grad():
            parameter[place] += 1e-6
            above = value().item()
            parameter[place] -= 2e-6
            below = value().item()
            parameter[place] += 1e-6
        assert gradient[place].item() == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-7)
