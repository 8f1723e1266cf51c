"""What keeps a policy near its start: bounds on its drift, levels that stay, the choice by another reward."""

from dataclasses import replace

import pytest
import torch

from digits.data import training_prompts
from solvers import Predictor, SolverTable, Spec, UserError, save_predictor
from training.ppo.anchor import Anchor, divergence
from training.ppo.gaussian import GaussianPolicy
from training.ppo.policy import PolicySettings, make_policy
from training.processes import Processes

from ..distill.conftest import ALONE
from ..runs import RDPO, RDPO_NODES, RDPO_SPEC
from .conftest import Never, Quadratic, trainer_of
from .test_gaussian import tableau_of

GAUSSIAN = ("ppo.policy=gaussian", "ppo.learning_rate=0.3", "ppo.steps=4", "evaluation.interval=4")
DIRICHLET = ("ppo.learning_rate=0.3", "ppo.steps=4", "evaluation.interval=4")


def policies():
    """A policy of each kind with parameters of its own, by name."""
    torch.manual_seed(0)
    table = SolverTable.uniform(3, 2)
    made = {
        "table": make_policy(table, PolicySettings(50.0, learned_scales=("scale_dir",))),
        "mlp": make_policy(table, PolicySettings(50.0, residual="mlp")),
        "gaussian": GaussianPolicy(tableau_of()),
    }
    with torch.no_grad():
        for policy in made.values():
            for parameter in policy.residual_parameters():
                parameter.copy_(torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("kind", ["table", "mlp", "gaussian"])
def test_projection_ends_just_inside_the_bound_and_leaves_what_is_inside(kind):
    policy = policies()[kind]
    anchor = Anchor("kl", 0.05, divergence, Processes(ALONE))
    assert divergence(policy) > 0.2
    assert 0.9 * 0.05 < anchor.hold(policy) <= 0.05
    kept = {k: v.clone() for k, v in policy.state_dict().items()}
    anchor.hold(policy)
    assert all(torch.equal(v, kept[k]) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("limit", [0.3, 0.0])
def test_a_measure_that_is_not_finite_moves_the_policy_back(limit):
    """Further out than `limit` latents overflow; where they do so at the start too, it is one line."""
    policy = policies()["gaussian"]
    anchor = Anchor(
        "latents",
        1.0,
        lambda p: p.loc.abs().max().item() if limit and p.loc.abs().max() < limit else float("inf"),
        Processes(ALONE),
    )
    if limit:
        assert 0.3 * limit < anchor.hold(policy) < limit
        return
    with pytest.raises(UserError, match=r"ppo.anchor.latents is 1.0, but .* inf: expected a bound above"):
        anchor.hold(policy)


def save_start(folder, kind):
    RDPO.write_config(folder)
    if kind == "tableau":
        spec = Spec(**{**vars(RDPO_SPEC), "solver": "tableau", "num_points": None})
        save_predictor(Predictor(tableau_of(), spec, RDPO_NODES), folder / "start.pkl")


@pytest.mark.parametrize(("kind", "settings"), [("tableau", GAUSSIAN), ("epd", DIRICHLET)])
@pytest.mark.parametrize(("key", "bound"), [("kl", 0.01), ("latents", 0.02)])
def test_a_run_stays_within_its_bound(tmp_path, kind, settings, key, bound):
    save_start(tmp_path, kind)
    free = RDPO.start(tmp_path, "free", *settings, f"ppo.anchor.{key}=1e6")
    held = RDPO.start(tmp_path, "held", *settings, f"ppo.anchor.{key}={bound}")
    values = {
        run.path: [r[f"anchor_{key}"] for r in run.records() if f"anchor_{key}" in r] for run in (free, held)
    }
    assert len(values[held.path]) == 4
    assert max(values[free.path]) > bound
    assert 0 < max(values[held.path]) <= bound


def test_the_latents_bound_is_on_the_final_latents_of_the_mean_table(tmp_path):
    """Against the same images sampled here."""
    from backends import load_backend
    from solvers import sample
    from training.ppo.probe import PROBE_SEED

    save_start(tmp_path, "tableau")
    run = RDPO.start(tmp_path, "held", *GAUSSIAN, "ppo.anchor.latents=0.02", "evaluation.images=4")
    recorded = [r["anchor_latents"] for r in run.records() if "anchor_latents" in r][-1]
    last = run.load_checkpoint()
    policy = GaussianPolicy(tableau_of())
    policy.load_state_dict(last["policy"])
    backend = load_backend(Spec(backend="gaussian"), "cpu")
    prompts = training_prompts(20)[: 20 - 4][:16]
    velocity = backend.velocity(backend.encode(prompts, 7.5))
    x = backend.initial_latents(range(PROBE_SEED, PROBE_SEED + len(prompts)), RDPO_NODES[0])
    moved, start = (sample(t, velocity, x, RDPO_NODES).double() for t in (policy.mean(), tableau_of()))
    change = ((moved - start).square().sum() / start.square().sum()).sqrt().item()
    assert recorded == pytest.approx(change, rel=1e-3)


@pytest.mark.parametrize("frozen", [(0,), (1, 2)])
def test_frozen_levels_of_a_tableau_keep_their_rows_and_noise_levels(frozen):
    start = tableau_of("heun")
    policy = GaussianPolicy(start, frozen=frozen)
    with torch.no_grad():
        policy.loc.copy_(torch.linspace(0.5, 1.5, len(policy.loc)))
    mean = policy.mean()
    rows = [s for level in frozen for s in start.levels[level]]
    free = [s for s in range(start.evaluations) if s not in rows]
    assert torch.equal(mean.stages[rows], start.stages[rows])
    assert torch.equal(mean.sigmas[rows], start.sigmas[rows])
    assert not torch.equal(mean.stages[free], start.stages[free])
    last = len(start.levels) - 1 in frozen
    assert torch.equal(mean.output, start.output) == last
    drawn = policy.learned(policy().sample(3, 1))
    assert torch.equal(drawn.stages[:, rows], start.stages[rows].expand(3, -1, -1))


@pytest.mark.parametrize("kind", ["table", "mlp"])
def test_frozen_intervals_of_a_table_are_drawn_as_the_start(kind):
    table = SolverTable.uniform(3, 2)
    settings = PolicySettings(50.0, residual=kind, learned_scales=("scale_dir",), frozen=(2,))
    policy = make_policy(table, settings)
    with torch.no_grad():
        for parameter in policy.residual_parameters():
            parameter.copy_(torch.randn_like(parameter))
    start = policy.start_mean().arrays()
    draw = policy().sample(4, 1)
    for learned in (policy.mean(), policy.learned(draw)):
        for name, value in learned.arrays().items():
            assert torch.equal(value[..., 2, :], start[name][2].expand_as(value[..., 2, :])), name
            assert not torch.equal(value[..., 0, :], start[name][0].expand_as(value[..., 0, :])), name
    gradient = torch.autograd.grad(policy().log_prob(*draw).sum(), policy.residual_parameters()[0])[0]
    if kind == "table":
        assert (gradient[2] == 0).all()
        assert (gradient[:2] != 0).any()


class Opposite(Quadratic):
    """A judge that prefers what the trained reward does not."""

    name = "opposite"

    def score(self, images, prompts):
        return -super().score(images, prompts)


@pytest.mark.parametrize("select_by", [None, "opposite"])
def test_the_best_policy_is_chosen_by_the_reward_that_is_named(tmp_path, select_by):
    trainer = trainer_of(tmp_path, steps=40)
    trainer.heldout.score = replace(trainer.train, rewards=[Quadratic(), Opposite()])
    trainer.config.evaluation.rewards, trainer.config.evaluation.select_by = ["opposite"], select_by
    trainer.intervals = replace(trainer.intervals, steps=40, evaluation=20)
    trainer.fit(40, Never(), lambda record, seconds: trainer.run.log(record))
    gains = {r["step"]: r["gain_quadratic"] for r in trainer.run.records() if "table" in r}
    assert max(gains.values()) > 0.01
    assert trainer.best.step == (max if select_by is None else min)(gains, key=gains.get)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("ppo.anchor.kl=1", "ppo.anchor.latents=0.1"), "ppo.anchor has kl and latents, expected one"),
        (("ppo.anchor.kl=-1",), "ppo.anchor.kl is -1.0, expected a number above 0"),
        (("ppo.frozen_levels=[2]",), "ppo.frozen_levels is [2], expected some but not all of 0 to 1"),
        (("ppo.frozen_levels=[0, 1]",), "expected some but not all of 0 to 1"),
        (("evaluation.select_by=judge",), "evaluation.select_by is 'judge', expected one of"),
    ],
)
def test_mistakes_are_one_line(tmp_path, settings, message):
    assert message in RDPO.error(*RDPO.arguments(tmp_path, "refused", *settings))
    assert not (tmp_path / "exps").exists()
