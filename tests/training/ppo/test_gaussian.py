"""The Gaussian policy over a tableau's coordinates: its density, its gradient, and a run of it."""

import math

import pytest
import torch

from solvers import EPD, Predictor, Spec, Tableau, compile_tableau, load_predictor, sample, save_predictor
from solvers.baselines import BASELINES
from training.ppo import export_epd_predictor
from training.ppo.gaussian import GaussianDistribution, GaussianPolicy
from training.ppo.loss import ppo_loss
from training.ppo.rollout import HeldOut
from training.processes import Processes

from ..distill.conftest import ALONE, line_velocity
from ..runs import CPU, RDPO, RDPO_NODES, RDPO_SPEC, invoke, overrides
from .conftest import NODES, Quadratic, trainer_of

GAUSSIAN = ("ppo.policy=gaussian", "ppo.learning_rate=null")


def tableau_of(name="heun", nodes=RDPO_NODES) -> Tableau:
    return compile_tableau(BASELINES[name], nodes)


def moved(policy: GaussianPolicy, seed=0) -> GaussianPolicy:
    """The policy with a mean of its own."""
    with torch.no_grad():
        policy.loc.copy_(0.5 * torch.randn(len(policy.loc), generator=torch.Generator().manual_seed(seed)))
    return policy


def test_density_divergence_and_entropy_are_those_of_torch_and_of_samples():
    policy = moved(GaussianPolicy(tableau_of()))
    p, q = policy(), policy.base()
    expected = torch.distributions.Independent(torch.distributions.Normal(p.loc, 1.0), 1)
    start = torch.distributions.Independent(torch.distributions.Normal(q.loc, 1.0), 1)
    draw = p.sample(200_000, 3)
    log_prob = p.log_prob(*draw)
    torch.testing.assert_close(log_prob, expected.log_prob(draw.coordinates))
    torch.testing.assert_close(p.entropy(), expected.entropy())
    torch.testing.assert_close(p.kl(q), torch.distributions.kl_divergence(expected, start))
    assert p.kl(q).item() == pytest.approx(policy.loc.square().sum().item() / 2)
    assert -log_prob.mean().item() == pytest.approx(p.entropy().item(), abs=0.05)
    assert (log_prob - q.log_prob(*draw)).mean().item() == pytest.approx(p.kl(q).item(), abs=0.05)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp"])
def test_first_mean_is_the_start_bit_for_bit(name):
    start = tableau_of(name)
    mean = GaussianPolicy(start).mean()
    for key in ("sigmas", "stages", "output"):
        assert torch.equal(vars(mean)[key], vars(start)[key])
    assert mean.levels == start.levels


def test_drawn_tableaus_are_those_of_their_coordinates_one_by_one():
    policy = moved(GaussianPolicy(tableau_of()))
    draw = policy().sample(5, 1)
    drawn = policy.learned(draw)
    assert drawn.sigmas.shape == (5, drawn.evaluations)
    assert torch.equal(policy().sample(5, 1).coordinates, draw.coordinates)
    for i, coordinates in enumerate(draw.coordinates):
        one = policy.tableau(coordinates)
        for key in ("sigmas", "stages", "output"):
            torch.testing.assert_close(vars(drawn)[key][i], vars(one)[key], rtol=1e-12, atol=1e-12)


def test_gradient_of_the_surrogate_is_the_exact_one():
    """Against the derivative of the expected reward, by finite differences of a sum over a fine grid."""
    policy = GaussianPolicy(compile_tableau(BASELINES["euler"], NODES), std=0.2)
    levels = (torch.arange(41, dtype=torch.float64) + 0.5) / 41
    noise = torch.distributions.Normal(0.0, 1.0).icdf(levels) * NODES[0]
    assert len(policy.loc) == 2

    def rewards_of(coordinates):
        each = policy.tableau(coordinates.repeat_interleave(len(noise), 0))
        x = noise.repeat(len(coordinates)).view(-1, 1, 1, 1)
        states = sample(each, velocity, x, NODES)
        images = (states.expand(-1, 3, -1, -1) / 4 + 0.5).clamp(0, 1)
        return Quadratic().score(images, ["prompt 0"] * len(images)).view(len(coordinates), -1).mean(1)

    axis = torch.linspace(-5, 5, 61, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    rewards = rewards_of(grid)

    def expected(loc):
        density = GaussianDistribution(loc).log_prob(grid).exp()
        return (density * rewards).sum() * (axis[1] - axis[0]) ** 2

    unit = torch.eye(2, dtype=torch.float64)
    exact = torch.stack([(expected(1e-4 * e) - expected(-1e-4 * e)) / 2e-4 for e in unit])
    draw = policy().sample(40_000, 7)
    drawn = rewards_of(draw.coordinates)
    old = policy().log_prob(*draw).detach()
    loss, diagnostics = ppo_loss(policy().log_prob(*draw), old, drawn - drawn.mean(), 0.2)
    gradient = -torch.autograd.grad(loss, policy.loc)[0]
    each = (drawn - drawn.mean())[:, None] * draw.coordinates
    assert diagnostics["ratio"] == 1
    assert ((gradient - exact).abs() < 4 * each.std(0) / math.sqrt(len(each)) + 1e-4).all()


def velocity(x, sigma):
    return line_velocity(x.double(), sigma.view(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma)


def test_a_tableau_is_scored_as_the_solver_that_it_is(tmp_path):
    """The rollout's scores of an EPD table and of its compiled tableau are the same to rounding."""
    trainer = trainer_of(tmp_path)
    table = trainer.policy.mean()
    score = HeldOut(trainer.train, ["prompt 0"] * 8, list(range(8)))
    compiled = score.scores(compile_tableau(EPD(table), NODES), Processes(ALONE))
    torch.testing.assert_close(compiled, score.scores(table, Processes(ALONE)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tableau", "epd"])
def test_a_run_in_parts_ends_in_the_bytes_of_the_whole(tmp_path, kind):
    RDPO.write_config(tmp_path)
    if kind == "tableau":
        spec = Spec(**{**vars(RDPO_SPEC), "solver": "tableau", "num_points": None})
        save_predictor(Predictor(tableau_of(), spec, RDPO_NODES), tmp_path / "start.pkl")
    whole = RDPO.start(tmp_path, "whole", *GAUSSIAN)
    parts = RDPO.start(tmp_path, "parts", *GAUSSIAN, more=("--max-steps", 3))
    RDPO.resume(parts)
    assert RDPO.outcome(parts) == RDPO.outcome(whole)
    best = whole.export / "network-snapshot-export-best.pkl"
    predictor = load_predictor(best)
    assert isinstance(predictor.table, Tableau)
    assert predictor.spec.solver == "tableau"
    assert 0 < predictor.provenance["policy_std"] < 1
    invoke(export_epd_predictor.main, whole.path, "--output-dir", tmp_path / "out")
    assert next((tmp_path / "out").glob("*.pkl")).read_bytes() == best.read_bytes()
    gains = [r["gain_digits"] for r in whole.records() if "table" in r]
    assert gains[0] == 0.0


def test_other_policies_refuse_a_tableau_and_name_the_one_for_it(tmp_path):
    RDPO.write_config(tmp_path)
    spec = Spec(**{**vars(RDPO_SPEC), "solver": "tableau", "num_points": None})
    save_predictor(Predictor(tableau_of(), spec, RDPO_NODES), tmp_path / "start.pkl")
    assert "set ppo.policy=gaussian" in RDPO.error(*RDPO.arguments(tmp_path, "refused"))
    plan = invoke(RDPO.main, "--config", tmp_path / "small.yaml", "--dry-run", *CPU, *overrides(*GAUSSIAN))
    assert "evaluations each" in plan
