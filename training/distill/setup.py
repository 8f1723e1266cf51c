"""From a configuration to all that a distillation run needs: pairs, teacher, banks, baselines,
student, loss.
"""

from dataclasses import asdict

import torch
from torch import Tensor

from backends import Backend
from common.prompts import default_prompts
from common.same_run import check_same
from solvers import baseline_of

from ..config import ConfigError
from ..processes import Processes
from ..prompts import PromptFile, digits_prompts, split_prompts
from ..run_folder import RunFolder
from ..start import Start
from .bank import Bank, Pairs, Teacher, refined, twice_as_fine
from .baselines import Baselines, ErrorMeasure, standard_error
from .config import DistillConfig
from .losses import Loss, load_features
from .students import STUDENTS, Student, StudentData
from .trainer import DistillTrainer, Problem


def pairs_of(config: DistillConfig) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs: different prompts, different seeds."""
    bank = config.bank
    digits = bank.prompts == "digits" or (bank.prompts is None and config.backend.name == "digits")
    own = digits_prompts(bank.pairs, bank.heldout_pairs) if digits else None
    file = None if digits else bank.prompts or str(default_prompts(config.dataset_name))
    prompts, heldout = split_prompts(
        PromptFile("bank.prompts", file),
        PromptFile("bank.heldout_prompts", bank.heldout_prompts),
        bank.heldout_pairs,
        own,
    )
    return (
        Pairs(
            [prompts[i % len(prompts)] for i in range(bank.pairs)],
            list(range(bank.first_seed, bank.first_seed + bank.pairs)),
        ),
        Pairs(
            [heldout[i % len(heldout)] for i in range(bank.heldout_pairs)],
            list(range(bank.heldout_seed, bank.heldout_seed + bank.heldout_pairs)),
        ),
    )


def make_teacher(config: DistillConfig, backend: Backend) -> Teacher:
    """The teacher on the student's nodes, or on those of the teacher section, refined."""
    kept = config.teacher.intervals or config.nodes.num_steps - 1
    every = config.teacher.inner + 1
    schedule = config.teacher.schedule or config.nodes.schedule or backend.default_schedule
    try:
        coarse, fine = (backend.sigmas(config.spec(n, schedule)) for n in (kept + 1, kept * every + 1))
    except ValueError as error:
        raise ConfigError(f"nodes: {error}") from None
    name = f"{config.teacher.solver}, {kept * every} intervals of {schedule}"
    solver = baseline_of(config.teacher.solver, backend.flow)
    return Teacher(name, solver, refined(coarse, fine, every), every)


def targets_kept(config: DistillConfig, kept: int) -> list[int]:
    """Which of a bank's `kept` states are the student's targets, step by step; the last for each where only
    that counts.
    """
    steps = STUDENTS[config.student.kind].num_steps(config)
    if config.needs_states:
        return list(range(kept // steps - 1, kept, kept // steps))
    return [kept - 1] * steps


def check_nodes(student: Student, teacher: Teacher, kept: list[int], needs_states: bool) -> None:
    """Refuse a teacher that does not go through the student's nodes, or not from end to end."""
    nodes = student.fixed_nodes
    ends = nodes[[0, -1]], teacher.nodes[[0, -1]]
    if not torch.allclose(*ends, rtol=1e-6, atol=0):
        student_ends, teacher_ends = (" to ".join(f"{sigma:.6g}" for sigma in pair) for pair in ends)
        raise ConfigError(
            f"nodes: the student runs from {student_ends}, but the teacher from {teacher_ends}; choose"
            " schedules with the same ends"
        )
    if needs_states and not torch.allclose(teacher.kept[1:][kept], nodes[1:], rtol=1e-6, atol=0):
        raise ConfigError(
            "teacher: its nodes do not contain the student's; leave teacher.schedule and"
            " teacher.intervals out"
        )


def state_scales(bank: Bank, kept: list[int]) -> Tensor:
    """RMS of the teacher's states at the student's nodes, over the first shard of a bank."""
    _, _, states = bank.rows(list(range(min(bank.shard_size, len(bank)))))
    return states[kept].double().flatten(1).square().mean(1).sqrt().cpu()


def make_banks(config: DistillConfig, backend: Backend, processes: Processes) -> tuple[Bank, Bank]:
    """The training and the held-out bank, complete on disk."""
    teacher, ranks = make_teacher(config, backend), processes.ranks
    train, heldout = (
        Bank(config.bank, backend, teacher, config.guidance_scale, pairs) for pairs in pairs_of(config)
    )
    backend.note_truncated(train.pairs.prompts + heldout.pairs.prompts)
    check_same(ranks, {f"{k} of the bank": v for bank in (train, heldout) for k, v in bank.contents.items()})
    backend.precompute_embeddings(
        list(dict.fromkeys(train.missing_prompts(ranks) + heldout.missing_prompts(ranks))),
        config.guidance_scale,
    )
    train.build(processes, "training pairs")
    heldout.build(processes, "held-out pairs")
    return train, heldout


def make_student(config: DistillConfig, data: StudentData) -> Student:
    """The student of a configuration, at its start."""
    spec = config.spec(schedule=config.nodes.schedule or data.train.backend.default_schedule)
    return STUDENTS[config.student.kind].make(config, spec, data)


def check_teacher(config: DistillConfig, heldout: Bank, measure: ErrorMeasure) -> dict:
    """Compare the teacher with one of twice as many intervals, where the configuration asks for it; what the
    provenance records of it.
    """
    if not config.teacher.check:
        return {}
    teacher, count = heldout.teacher, min(config.teacher.check, len(heldout))
    values = measure(heldout, teacher.solver, twice_as_fine(teacher.nodes), count)
    error, se = values.mean().item(), standard_error(values)
    measure.processes.echo(
        f"teacher: {teacher.name}; it differs by RMSE {error:.5f} ± {1.96 * se:.5f} from twice as many"
        " intervals"
    )
    return {"teacher_rmse_to_twice_as_fine": error}


def provenance_of(config: DistillConfig, train: Bank, heldout: Bank, teacher_error: dict) -> dict:
    """What a predictor records of where it comes from."""
    settings = config.train
    judge = config.loss.feature and config.loss.feature_network == "judge"
    return {
        "kind": "distilled",
        "teacher": train.teacher.name,
        "bank": [train.key, heldout.key],
        "loss": asdict(config.loss),
        "train": {
            "steps": settings.steps,
            "batch": settings.batch,
            "lr": settings.lr,
            "seed": settings.seed,
        },
        "learned_sigmas": config.student.learn_sigmas,
        **teacher_error,
        **({"trained_on_the_judge": True} if judge else {}),
    }


def make_loss(config: DistillConfig, train: Bank, kept: list[int]) -> Loss:
    """The loss of a configuration on a bank."""
    features = None
    if config.loss.feature:
        assert config.loss.feature_network is not None  # checked with the configuration
        features = load_features(config.loss.feature_network, train.backend.device)
    return Loss(config.loss, train.backend, state_scales(train, kept), features)


def prepare(
    config: DistillConfig, start: Start | None, backend: Backend, run: RunFolder, processes: Processes
) -> tuple[DistillTrainer, Baselines]:
    """Everything that a run needs, in order: banks, baselines, student, loss.

    Args:
        config: of the run.
        start: the predictor of student.start, where that names one.
        backend: the frozen backbone.
        run: where it writes.
        processes: its ranks, and whether it was asked to stop.

    Raises:
        StopRequested: asked to stop before all is there.
    """
    train, heldout = make_banks(config, backend, processes)
    measure = ErrorMeasure(processes, config.evaluation.batch)
    teacher_error = check_teacher(config, heldout, measure)
    baselines = Baselines(train, heldout, config.spec(), config.evaluation, measure)
    student = make_student(config, StudentData(train, baselines, start))
    kept = targets_kept(config, len(train.teacher.kept) - 1)
    check_nodes(student, train.teacher, kept, config.needs_states)
    cost, count = student.cost(), sum(p.numel() for p in student.parameters())
    processes.echo(
        f"student: serial depth {cost.depth}, NFE {cost.evaluations} an image, {count} parameters, from"
        f" {student.parent}"
    )
    loss = make_loss(config, train, kept)
    matched = baselines.at(cost.depth) if config.evaluation.baselines else {}
    provenance = provenance_of(config, train, heldout, teacher_error)
    problem = Problem(train, heldout, kept, loss, matched, provenance)
    return DistillTrainer(config, student, problem, run, processes), baselines
