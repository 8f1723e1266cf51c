"""The bank: right states, built once, resumed, and never mistaken for another."""

import pytest
import torch

from backends import load_backend
from solvers import DPM2, Spec, flowmatch, sample
from solvers.schedules import logsnr, polynomial, time_uniform
from training.distill.bank import Bank, BankError, Pairs, Teacher, refined, twice_as_fine
from training.distill.baselines import ErrorMeasure
from training.distill.config import BankConfig
from training.processes import Processes

from .conftest import ALONE, Line

PROCESSES = Processes(ALONE)
PAIRS = Pairs([f"prompt {i % 3}" for i in range(10)], list(range(100, 110)))


def teacher_of(nodes, every=4):
    fine = polynomial((len(nodes) - 1) * every + 1, nodes[-1].item(), nodes[0].item())
    return Teacher("dpm2", DPM2(), refined(nodes, fine, every), every)


def bank_of(folder, backend, guidance=1.0, pairs=PAIRS, dtype="float32", every=4):
    nodes = polynomial(4, backend.sigma_min, backend.sigma_max)
    settings = BankConfig(folder=str(folder), shard_size=4, dtype=dtype)
    return Bank(settings, backend, teacher_of(nodes, every), guidance, pairs)


def test_rows_are_the_teachers_states(tmp_path):
    backend = load_backend(Spec(backend="gaussian"), "cpu")
    bank = bank_of(tmp_path, backend, 3.0)
    bank.build(PROCESSES, "pairs")
    condition, x, states = bank.rows([9, 0, 5])
    assert torch.equal(x, backend.initial_latents([109, 100, 105], bank.teacher.nodes[0]))
    assert states.shape == (3, 3, 4, 8, 8)
    velocity = backend.velocity(backend.encode(["prompt 0", "prompt 0", "prompt 2"], 3.0))
    expected = sample(DPM2(), velocity, x, bank.teacher.nodes)
    torch.testing.assert_close(states[-1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        backend.velocity(condition)(x, bank.teacher.nodes[0]), velocity(x, bank.teacher.nodes[0])
    )


def test_a_bank_is_built_once_and_an_interrupted_one_goes_on(tmp_path):
    backend = Line()
    bank_of(tmp_path, backend).build(PROCESSES, "pairs")
    calls = backend.calls
    again = bank_of(tmp_path, backend)
    again.build(PROCESSES, "pairs")
    assert backend.calls == calls
    before = again.path(1).read_bytes()
    again.path(1).unlink()
    again.build(PROCESSES, "pairs")
    assert backend.calls == calls + calls // 3  # one of three shards
    assert again.path(1).read_bytes() == before


def test_whatever_states_depend_on_is_in_the_key(tmp_path):
    backend, other = Line(), Line()
    other.fingerprint = lambda: "other weights"
    keys = [
        bank_of(tmp_path, backend).key,
        bank_of(tmp_path, other).key,
        bank_of(tmp_path, backend, guidance=2.0).key,
        bank_of(tmp_path, backend, dtype="float16").key,
        bank_of(tmp_path, backend, every=5).key,
        bank_of(tmp_path, backend, pairs=Pairs(PAIRS.prompts, list(range(10)))).key,
        bank_of(tmp_path, backend, pairs=Pairs(PAIRS.prompts[::-1], PAIRS.seeds)).key,
    ]
    assert len(set(keys)) == len(keys)
    assert bank_of(tmp_path, Line()).key == keys[0]


def test_the_fingerprint_of_weights_changes_with_them():
    backend = load_backend(Spec(backend="digits"), "cpu")
    before = backend.fingerprint()
    assert load_backend(Spec(backend="digits"), "cpu").fingerprint() == before
    with torch.no_grad():
        backend.pipe.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert backend.fingerprint() != before


def test_a_damaged_shard_is_named(tmp_path):
    bank = bank_of(tmp_path, Line())
    bank.build(PROCESSES, "pairs")
    bank.path(2).write_bytes(bank.path(2).read_bytes()[:50])
    with pytest.raises(BankError, match=r"shard-00002.*remove the file"):
        bank.rows([9])


def test_a_shard_that_another_rank_wrote_elsewhere_is_named(tmp_path):
    bank = bank_of(tmp_path, Line())
    bank.build(PROCESSES, "pairs")
    bank.path(2).unlink()
    with pytest.raises(
        BankError, match=r"shard-00002.*: does not exist; bank.folder must be on storage that all ranks share"
    ) as caught:
        bank.rows([9])
    assert "\n" not in str(caught.value)


def test_half_precision_halves_the_states(tmp_path):
    full, half = bank_of(tmp_path, Line()), bank_of(tmp_path, Line(), dtype="float16")
    full.build(PROCESSES, "pairs")
    half.build(PROCESSES, "pairs")
    assert half.rows([0])[2].dtype == torch.float32
    torch.testing.assert_close(half.rows([0, 3])[2], full.rows([0, 3])[2], rtol=1e-3, atol=1e-3)


SCHEDULES = {
    "polynomial": lambda n: polynomial(n, 0.03, 14.6),
    "logsnr": lambda n: logsnr(n, 0.03, 14.6),
    "time_uniform": lambda n: time_uniform(n, 0.03, 14.6),
    "discrete": lambda n: Line().sigmas(Spec(num_steps=n, schedule_type="discrete")),
    "flowmatch shift": lambda n: flowmatch(n, shift=3.0),
    "flowmatch mu": lambda n: flowmatch(n, mu=1.15),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("intervals, every", [(1, 7), (3, 1), (4, 4), (10, 3)])
def test_teacher_nodes_contain_the_students(name, intervals, every):
    coarse, fine = SCHEDULES[name](intervals + 1), SCHEDULES[name](intervals * every + 1)
    nodes = refined(coarse, fine, every)
    assert torch.equal(nodes[::every], coarse)
    assert (nodes.diff() < 0).all()


def test_a_schedule_that_does_not_contain_the_nodes_is_refused():
    with pytest.raises(ValueError, match="does not contain"):
        refined(polynomial(4, 0.1, 5.0), logsnr(10, 0.1, 5.0), 3)


def test_fineness_falls_with_the_order_of_the_teacher(tmp_path):
    coarse, fine = bank_of(tmp_path, Line(), every=4), bank_of(tmp_path, Line(), every=16)
    for bank in (coarse, fine):
        bank.build(PROCESSES, "pairs")
    measure = ErrorMeasure(PROCESSES, 4)
    errors = [
        measure(bank, bank.teacher.solver, twice_as_fine(bank.teacher.nodes), 10).mean().item()
        for bank in (coarse, fine)
    ]
    ratio = errors[0] / errors[1]
    assert 8 < ratio < 40  # second order: 16
