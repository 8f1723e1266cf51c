"""Distillation where the answer is known: a one-interval optimum by quadrature, gradients, and error that
falls.
"""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from backends import load_backend
from digits.judge import Judge
from solvers import EPD, IPNDM, SolverTable, Spec, Tableau, load_predictor, sample, trajectory
from training.distill.config import (
    BankConfig,
    DistillConfig,
    EvaluationConfig,
    LossConfig,
    NodesConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from training.distill.losses import Loss, first_broken
from training.distill.students.table import TableStudent

from .conftest import Line, line_velocity


def configuration(**sections) -> DistillConfig:
    defaults = {
        "guidance_scale": 1.0,
        "nodes": NodesConfig(num_steps=4, schedule="polynomial"),
        "student": StudentConfig(num_points=2),
        "teacher": TeacherConfig(inner=15, check=0),
        "bank": BankConfig(pairs=64, heldout_pairs=64),
        "train": TrainConfig(steps=40, batch=32, chunk=32),
        "evaluation": EvaluationConfig(
            interval=20, baselines=["euler", "ipndm2"], schedules=["polynomial", "logsnr"], tuning_pairs=32
        ),
    }
    config = DistillConfig(**{**defaults, **sections})
    config.backend.name = "gaussian"
    return config


class Never:
    def any_rank(self):
        return False


def fit(trainer):
    records = []
    trainer.fit(trainer.config.train.steps, Never(), lambda record, seconds: records.append(record))
    return records


def test_the_optimum_of_one_interval_is_reached():
    """K = 1, one interval: the position whose expected absolute error, by Gauss-Hermite quadrature,
    is least.
    """
    start, end = 2.0, 0.5
    points, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(61))
    weights = weights / weights.sum()
    x = (start * points).view(-1, 1)
    fine = torch.linspace(np.log(start), np.log(end), 400, dtype=torch.float64).exp()
    target = sample(IPNDM(4), line_velocity, x, fine)

    def error(r):
        table = SolverTable(torch.tensor([[r]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
        result = sample(EPD(table), line_velocity, x, torch.tensor([start, end]))
        return (weights * (result - target)[:, 0].square()).sum().sqrt().item()

    best = minimize_scalar(error, bounds=(0.05, 0.95), method="bounded", options={"xatol": 1e-6})
    student = TableStudent(SolverTable.uniform(1, 1))
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)
    for step in range(300):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimiser.zero_grad()
        result = sample(
            EPD(student.learned()), line_velocity, x, torch.tensor([start, end], dtype=torch.float64)
        )
        (weights * (result - target)[:, 0].square()).sum().sqrt().backward()
        optimiser.step()
    assert error(0.5) > 1.05 * best.fun  # equal points are not the answer already
    assert abs(student.learned().r.item() - best.x) < 1e-3


@pytest.mark.parametrize("loss", ["stepwise", "trajectory", "final"])
def test_error_falls_from_equal_points(trainer_of, loss):
    config = configuration(loss=LossConfig(**{"final": 0.0, loss: 1.0}))
    trainer = trainer_of(config, Line())
    records = [r for r in fit(trainer) if "heldout" in r]
    assert [r["step"] for r in records] == [0, 20, 40]
    assert trainer.best.value < 0.6 * records[0]["heldout"]


def test_a_mixture_is_distilled_from_equal_points(trainer_of):
    config = configuration(
        guidance_scale=4.0, student=StudentConfig(num_points=2, learn_sigmas=True, scale_dir=0.3)
    )
    config.bank.pairs, config.train.steps = 128, 60
    trainer = trainer_of(config, load_backend(Spec(backend="gaussian"), "cpu"))
    records = [r for r in fit(trainer) if "heldout" in r]
    assert trainer.best.value < 0.5 * records[0]["heldout"]


def test_a_tableau_ends_better_than_the_best_baseline_it_starts_from(trainer_of):
    student = StudentConfig(kind="tableau", start="baseline", depth=4, num_points=2, learn_sigmas=True)
    config = configuration(
        guidance_scale=4.0, student=student, train=TrainConfig(steps=60, batch=32, chunk=32, lr=0.1)
    )
    trainer = trainer_of(config, load_backend(Spec(backend="gaussian"), "cpu"))
    records = [r for r in fit(trainer) if "heldout" in r]
    first, last = records[0], records[-1]
    assert first["ratio"] == pytest.approx(1, abs=1e-5)
    assert trainer.best.value < 0.5 * first["heldout"]
    assert last["difference"] + 2 * last["difference_se"] < 0
    trainer.export()
    predictor = load_predictor(trainer.run.export / "network-snapshot-export-best.pkl")
    assert isinstance(predictor.table, Tableau)
    assert (predictor.cost().depth, predictor.cost().evaluations) == (4, 7)
    assert predictor.provenance["heldout_rmse"] == trainer.best.value
    assert predictor.provenance["parent"].endswith("nodes")
    assert predictor.provenance["bank"] == [trainer.train.key, trainer.heldout.key]


def test_what_is_exported_has_the_error_that_is_recorded(trainer_of):
    trainer = trainer_of(configuration(), Line())
    fit(trainer)
    trainer.export(last=True)
    predictor = load_predictor(trainer.run.export / "network-snapshot-export-best.pkl")
    condition, x, states = trainer.heldout.rows(list(range(64)))
    result = sample(predictor.solver(), trainer.heldout.backend.velocity(condition), x, predictor.sigmas)
    assert (result - states[-1]).abs().mean().item() == pytest.approx(
        predictor.provenance["heldout_rmse"], rel=1e-6
    )


@pytest.mark.parametrize(
    "weights",
    [{"trajectory": 1.0}, {"final": 1.0}, {"decoded": 1.0, "final": 0.0}, {"feature": 1.0, "final": 0.5}],
)
def test_gradients_of_the_loss_against_finite_differences(weights):
    backend = load_backend(Spec(backend="gaussian"), "cpu")
    config = LossConfig(**{"final": 0.0, **weights})
    features = (lambda images: images.double().flatten(1)[:, ::7] ** 2) if config.feature else None
    nodes = backend.sigmas(Spec(num_steps=4, schedule_type="polynomial"))
    loss = Loss(config, backend, torch.ones(3, dtype=torch.float64), features)
    velocity, x = (
        backend.velocity(backend.encode(["a", "b"], 2.0)),
        backend.initial_latents([1, 2], nodes[0]).double(),
    )
    targets = torch.stack(list(trajectory(IPNDM(3), velocity, x, nodes)))
    student = TableStudent(SolverTable.uniform(3, 2), scale_dir=0.2)

    def value():
        return loss(EPD(student.learned()), nodes, velocity, x, targets)[0].sum()

    gradient = torch.autograd.grad(value(), student.gap_logits)[0]
    step = 1e-3  # guided velocities and images are float32
    for n, k in [(0, 0), (1, 2), (2, 1)]:
        with torch.no_grad():
            student.gap_logits[n, k] += step
            above = value().item()
            student.gap_logits[n, k] -= 2 * step
            below = value().item()
            student.gap_logits[n, k] += step
        assert gradient[n, k].item() == pytest.approx((above - below) / (2 * step), rel=0.02, abs=1e-6)


def test_stepwise_gradients_stop_at_each_interval():
    nodes = Line().sigmas(Spec(num_steps=4, schedule_type="polynomial"))
    x = torch.linspace(-5, 5, 16, dtype=torch.float64).view(-1, 1, 1, 1)
    student = TableStudent(SolverTable.uniform(3, 2))
    velocity = lambda x, sigma: line_velocity(x, sigma.view(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma)  # noqa: E731
    for detach in (True, False):
        states = list(trajectory(EPD(student.learned(), max_order=3), velocity, x, nodes, detach))
        last = torch.autograd.grad(states[-1].square().sum(), student.gap_logits)[0].abs().sum(-1)
        assert last[2] > 0
        assert (last[:2] == 0).all() == detach


def test_the_first_broken_interval_is_named():
    good, bad = torch.zeros(2, 1), torch.tensor([[0.0], [float("nan")]])
    assert first_broken([good, good]) == -1
    assert first_broken([good, bad, bad]) == 1


def test_features_of_the_judge_are_differentiable():
    from training.distill.losses import load_features

    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    features = load_features("judge", torch.device("cpu"))
    features(images).square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert features(images.detach()).shape == Judge().net.features(images.detach()).shape


def test_checkpointing_changes_no_gradient(trainer_of):
    rows = []
    for checkpointing in (False, True):
        config = configuration(train=TrainConfig(steps=1, batch=16, chunk=16, checkpointing=checkpointing))
        rows.append(trainer_of(config, Line(), f"run {checkpointing}").chunk_row(list(range(16))))
    assert torch.equal(*rows)


def test_points_one_after_the_other_change_nothing(trainer_of):
    rows = []
    for parallel in (False, True):
        config = configuration(train=TrainConfig(steps=1, batch=16, chunk=16, parallel_points=parallel))
        rows.append(trainer_of(config, Line(), f"run {parallel}").chunk_row(list(range(16))))
    torch.testing.assert_close(*rows, rtol=1e-9, atol=1e-12)


def test_every_pair_is_seen_once_an_epoch(trainer_of):
    trainer = trainer_of(configuration(train=TrainConfig(steps=8, batch=24, chunk=8)), Line())
    seen = [i for step in range(8) for i in trainer.batch(step)]
    assert all(sorted(seen[e * 64 : (e + 1) * 64]) == list(range(64)) for e in range(3))
    assert seen[:64] != seen[64:128]


def test_patience_ends_a_run_early(trainer_of):
    config = configuration(
        train=TrainConfig(steps=40, batch=8, chunk=8, lr=0.0, patience=2),
        evaluation=EvaluationConfig(interval=5, baselines=[], tuning_pairs=8),
    )
    trainer = trainer_of(config, Line())
    fit(trainer)
    assert (trainer.step, trainer.best.step) == (10, 0)


def test_features_of_a_clip_folder():
    """The network that transformers loads, on the pixels that its own processor makes."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil, CLIPModel

    from digits import REWARD_FOLDER
    from training.distill.losses import load_features

    images = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    pictures = [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in images]
    pixels = CLIPImageProcessorPil.from_pretrained(REWARD_FOLDER)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = (
            CLIPModel.from_pretrained(REWARD_FOLDER, dtype=torch.float32)
            .eval()
            .get_image_features(pixel_values=pixels)
            .pooler_output
        )
        features = load_features(str(REWARD_FOLDER), torch.device("cpu"))(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
