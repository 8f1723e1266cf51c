"""Gradients where memory ends, and through float16 networks."""

from itertools import pairwise

import pytest
import torch

from backends import Condition, load_backend
from solvers import DPM2, SolverTable, Spec, UserError
from training.distill import gradients
from training.distill.bank import Bank, Pairs, Teacher, refined
from training.distill.baselines import ErrorMeasure
from training.distill.config import BankConfig, LossConfig, StudentConfig, TrainConfig
from training.distill.gradients import ChunkGradient
from training.distill.losses import Loss
from training.distill.students import Student
from training.distill.students.table import TableStudent

from .conftest import Line
from .test_bank import PROCESSES, bank_of
from .test_learning import configuration


class Backward(torch.autograd.Function):
    """The identity, whose backward pass fits `limit` rows."""

    @staticmethod
    def forward(context, x, limit):
        context.limit = limit
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        if len(gradient) > context.limit:
            raise torch.OutOfMemoryError("CUDA out of memory in the backward pass")
        return gradient, None


class Small(Line):
    """A network that fits `forward` rows, of which it fits `backward` in the backward pass; it counts the
    calls that did not fit.
    """

    def __init__(self, forward: int, backward: int):
        self.limits, self.failures, self.rows = (forward, backward), 0, []

    def velocity(self, condition):
        network = super().velocity(condition)

        def velocity(x, sigma):
            self.rows.append(len(x))
            if len(x) > self.limits[0]:
                self.failures += 1
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")
            return Backward.apply(network(x, sigma), self.limits[1])

        return velocity


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "forward, backward, pairs, apart",
    [(99, 99, 16, False), (31, 99, 8, False), (99, 5, 2, False), (1, 1, 1, True), (99, 1, 1, True)],
)
def test_chunks_are_halved_where_memory_ends(trainer_of, checkpointing, forward, backward, pairs, apart):
    config = configuration(train=TrainConfig(steps=1, batch=16, chunk=16, checkpointing=checkpointing))
    trainer = trainer_of(config, Line())
    whole = trainer.chunk_row(list(range(16)))
    trainer.train.backend = small = Small(forward, backward)
    halved = trainer.chunk_row(list(range(16)))
    torch.testing.assert_close(halved, whole, rtol=1e-9, atol=1e-12)
    assert torch.equal(halved, whole) or pairs < 16
    assert (trainer.chunk_row.pairs, trainer.chunk_row.points_apart) == (pairs, apart)
    failures = small.failures
    assert torch.equal(trainer.chunk_row(list(range(16))), halved)
    assert small.failures == failures  # it remembers


def test_one_pair_that_does_not_fit_is_one_line(trainer_of):
    trainer = trainer_of(configuration(), Line())
    trainer.train.backend = Small(0, 0)
    with pytest.raises(
        UserError, match=r"out of memory with one pair at a time.*set train.checkpointing"
    ) as caught:
        trainer.chunk_row([0, 1])
    assert "\n" not in str(caught.value)


def test_an_interval_that_broke_is_named_from_whichever_part():
    rows = [torch.tensor([1.0, 2.0, broken], dtype=torch.float64) for broken in (-1.0, 2.0, 1.0)]
    assert gradients.summed(rows).tolist() == [3.0, 6.0, 1.0]
    assert gradients.summed(rows[:1] * 2).tolist() == [2.0, 4.0, -1.0]


def test_banks_and_baselines_are_halved_where_memory_ends(tmp_path):
    whole, small = bank_of(tmp_path / "whole", Line()), bank_of(tmp_path / "small", Small(3, 99))
    values = []
    for bank in (whole, small):
        bank.build(PROCESSES, "pairs")
        errors = ErrorMeasure(PROCESSES, 5)(bank, bank.teacher.solver, bank.teacher.nodes[::2], 10)
        values.append((bank.rows(list(range(10)))[2], errors))
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert {n for n in small.backend.rows if n <= 3} <= {2, 3}
    assert small.backend.failures == 2  # one in the bank, one in the errors


def test_a_tableau_starts_where_memory_ends(trainer_of):
    student = StudentConfig(kind="tableau", start="baseline", depth=3)
    config = configuration(student=student)
    whole = trainer_of(config, Line(), "whole").student.module.axes
    small = Small(5, 99)
    torch.testing.assert_close(trainer_of(config, small, "small").student.module.axes.abs(), whole.abs())
    assert small.failures > 0


ELEMENTS = 16 * 128 * 128 / (4 * 8 * 8)  # Stable Diffusion 3's latents at 1024 pixels over the twin's
TERMS = ("gap_logits", "weight_logits", "scales.scale_time")


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """A few pairs of the Stable Diffusion 3 twin, computed in float32."""
    twin = load_backend(Spec(backend="digits", backend_config={"family": "sd3"}), "cpu", "float32")
    nodes, fine = (twin.sigmas(Spec(num_steps=n)) for n in (6, 21))
    teacher = Teacher("dpm2", DPM2(), refined(nodes, fine, 4), 4)
    captions = ["a red handwritten seven", "a thin six", "a bold blue two", "a green four"]
    settings = BankConfig(folder=str(tmp_path_factory.mktemp("banks")), shard_size=4)
    bank = Bank(settings, twin, teacher, 4.5, Pairs(captions, list(range(4))))
    bank.build(PROCESSES, "pairs")
    return bank


class Other:
    """A bank's pairs for a network of another number type."""

    def __init__(self, bank, backend):
        self.bank, self.backend = bank, backend

    def rows(self, indices):
        condition, x, states = self.bank.rows(indices)
        positive, negative = (
            {k: v.to(self.backend.dtype) for k, v in part.items()}
            for part in (condition.positive, condition.negative)
        )
        return Condition(positive, negative, condition.guidance_scale), x, states


def gradient_of(bank, dtype: str, weight: float) -> dict[str, torch.Tensor]:
    """The gradient of a table on four pairs, over the weight of the loss."""
    backend = load_backend(Spec(backend="digits", backend_config={"family": "sd3"}), "cpu", dtype)
    module = TableStudent(SolverTable.uniform(5, 2), scale_time=0.2)
    student = Student(module, Spec(), bank.teacher.kept, "equal points")
    loss = Loss(LossConfig(final=0.0, stepwise=weight), backend, torch.ones(5, dtype=torch.float64))
    row = ChunkGradient(student, loss, Other(bank, backend), list(range(5)), TrainConfig())(list(range(4)))
    names = [name for name, parameter in module.named_parameters() if parameter.numel()]
    sizes = [parameter.numel() for parameter in student.parameters()]
    return dict(zip(names, (row[: sum(sizes)] / weight).split(sizes), strict=True))


@pytest.fixture(scope="module")
def exact(bank) -> dict[str, torch.Tensor]:
    """The gradient in float32."""
    return gradient_of(bank, "float32", 1.0)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, 0).item()


def test_float16_gradients_of_a_large_latent_are_those_of_float32(bank, exact, monkeypatch):
    """An RMSE's gradient at one of n elements is 1 / n: the loss over the ratio of sizes has the per-element
    gradient of real latents.
    """
    scaled = gradient_of(bank, "float16", 1 / ELEMENTS)
    assert all(cosine(scaled[name], exact[name]) > 0.999 for name in TERMS)
    torch.testing.assert_close(
        scaled["scales.scale_time"],
        exact["scales.scale_time"],
        rtol=0.01,
        atol=0.01 * exact[TERMS[2]].abs().max(),
    )
    monkeypatch.setattr(gradients, "FLOAT16_SCALE", 1.0)
    assert (
        cosine(gradient_of(bank, "float16", 1 / ELEMENTS)["scales.scale_time"], exact["scales.scale_time"])
        < 0.95
    )


def test_a_scale_that_overflows_is_lowered(bank, exact, monkeypatch):
    tried, original = [], ChunkGradient.scaled_row
    monkeypatch.setattr(
        ChunkGradient,
        "scaled_row",
        lambda self, indices, scale: tried.append(scale) or original(self, indices, scale),
    )
    scaled = gradient_of(bank, "float16", 2.0**12)
    assert tried[0] == 4096
    assert len(tried) > 1
    assert all(a == 4 * b for a, b in pairwise(tried))
    assert all(cosine(scaled[name], exact[name]) > 0.999 for name in TERMS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_number_types_keep_their_bits(bank, exact, dtype, monkeypatch):
    once = exact if dtype == "float32" else gradient_of(bank, dtype, 1.0)
    monkeypatch.setattr(ChunkGradient, "row", lambda self, indices: self.scaled_row(indices, 1.0))
    again = gradient_of(bank, dtype, 1.0)
    assert all(torch.equal(once[name], again[name]) for name in once)
