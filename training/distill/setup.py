"""From a configuration to all that a distillation run needs: pairs, teacher, banks, baselines,
student, loss.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from backends import Backend
from backends.parallel import ParallelEvaluator
from common.distributed import Ranks, never
from common.prompts import default_prompts
from solvers import Predictor, baseline_of, compile_tableau

from ..config import ConfigError
from ..prompts import digits_prompts, split_prompts
from ..run_folder import RunFolder
from .bank import Bank, Pairs, Teacher, refined, twice_as_fine
from .baselines import Baselines, errors
from .config import DistillConfig
from .losses import Loss, load_features
from .students.parameters import second_moments, widen
from .students.student import Student, TableauStart, load_start, table_student, tableau_student
from .trainer import Trainer, standard_error

SHOWN = 32  # training pairs from which a tableau learns what its start's states look like


def pairs_of(config: DistillConfig) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs: different prompts, different seeds."""
    bank = config.bank
    digits = bank.prompts == "digits" or (bank.prompts is None and config.backend.name == "digits")
    own = digits_prompts(bank.pairs, bank.heldout_pairs) if digits else None
    file = None if digits else bank.prompts or str(default_prompts(config.dataset_name))
    prompts, heldout = split_prompts(
        ("bank.prompts", file), ("bank.heldout_prompts", bank.heldout_prompts), bank.heldout_pairs, own
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
    """The teacher on the student's nodes, or on more or others where the configuration says so, refined."""
    kept = config.teacher.intervals or config.nodes.num_steps - 1
    every = config.teacher.inner + 1
    schedule = config.teacher.schedule or config.nodes.schedule or backend.default_schedule
    try:
        coarse, fine = (backend.sigmas(config.spec(n, schedule)) for n in (kept + 1, kept * every + 1))
    except ValueError as error:
        raise ConfigError(f"nodes: {error}") from None
    name = f"{config.teacher.solver}, {kept * every} intervals of {schedule}"
    return Teacher(
        name, baseline_of(config.teacher.solver, backend.flow), refined(coarse, fine, every), every
    )


def targets_kept(config: DistillConfig, kept: int) -> list[int]:
    """Which of a bank's `kept` states are the student's targets, step by step; the last for each where only
    that counts.
    """
    intervals = 1 if config.student.kind == "tableau" else config.nodes.num_steps - 1
    if config.needs_states:
        return list(range(kept // intervals - 1, kept, kept // intervals))
    return [kept - 1] * intervals


def check_nodes(student: Student, teacher: Teacher, kept: list[int], needs_states: bool) -> None:
    """Refuse a teacher that does not go through the student's nodes, or not from end to end."""
    ends = student.nodes[[0, -1]], teacher.nodes[[0, -1]]
    if not torch.allclose(*ends, rtol=1e-6, atol=0):
        mine, theirs = (" to ".join(f"{sigma:.6g}" for sigma in pair) for pair in ends)
        raise ConfigError(
            f"nodes: the student runs from {mine}, but the teacher from {theirs}; choose schedules with the"
            " same ends"
        )
    if needs_states and not torch.allclose(teacher.kept[1:][kept], student.nodes[1:], rtol=1e-6, atol=0):
        raise ConfigError(
            "teacher: its nodes do not contain the student's; leave teacher.schedule and"
            " teacher.intervals out"
        )


def tableau_start(
    config: DistillConfig, train: Bank, baselines: Baselines, loaded: tuple[Predictor, str] | None
) -> TableauStart:
    """The tableau of the predictor given, or of the best baseline of the depth asked for, with idle stages to
    learn.
    """
    tuning, student = config.evaluation.tuning_pairs, config.student
    if loaded is not None:
        predictor, parent = loaded
        nodes = predictor.sigmas
        shared = config.evaluation.batch, baselines.ranks, baselines.stop_requested
        error = errors(train, predictor.solver(), nodes, tuning, *shared).mean().item()
        tableau = compile_tableau(predictor.solver(), nodes)
        if student.widen:
            tableau = widen(tableau, student.num_points, student.stride, student.first_points)
        return TableauStart(tableau, predictor.spec.schedule_type, parent, error)
    found = [option for option, _ in baselines.at(student.depth).values()]
    if not found:
        raise ConfigError(
            f"student.depth {student.depth}: no baseline of evaluation.baselines has this serial depth"
        )
    best = found[0]
    tableau = widen(
        compile_tableau(best.solver, best.nodes), student.num_points, student.stride, student.first_points
    )
    return TableauStart(
        tableau,
        best.schedule,
        f"{best.name} on {best.schedule} nodes",
        baselines.cached(train, best, tuning).mean().item(),
    )


def state_scales(bank: Bank, kept: list[int]) -> Tensor:
    """RMS of the teacher's states at the student's nodes, over the first shard of a bank."""
    _, _, states = bank.rows(list(range(min(bank.shard_size, len(bank)))))
    return states[kept].double().flatten(1).square().mean(1).sqrt().cpu()


def make_banks(
    config: DistillConfig, backend: Backend, ranks: Ranks, stop_requested: Callable[[], bool] = never
) -> tuple[Bank, Bank]:
    """The training and the held-out bank, complete on disk."""
    settings, teacher = config.bank, make_teacher(config, backend)
    train, heldout = (
        Bank(
            Path(settings.folder),
            backend,
            teacher,
            config.guidance_scale,
            pairs,
            settings.shard_size,
            settings.dtype,
        )
        for pairs in pairs_of(config)
    )
    backend.precompute_embeddings(
        list(dict.fromkeys(train.missing_prompts(ranks) + heldout.missing_prompts(ranks))),
        config.guidance_scale,
    )
    train.build(ranks, "training pairs", stop_requested)
    heldout.build(ranks, "held-out pairs", stop_requested)
    return train, heldout


def make_student(config: DistillConfig, train: Bank, baselines: Baselines) -> tuple[Student, float]:
    """The student of a configuration and the unit of its learning rate: for a tableau, the error of its
    start.
    """
    backend, loaded = train.backend, load_start(config)
    spec = config.spec(schedule=config.nodes.schedule or backend.default_schedule)
    if config.student.kind == "table":
        recorded = None if loaded is None else loaded[0].sigmas
        return (
            table_student(config, spec, backend.sigmas(spec) if recorded is None else recorded, loaded),
            1.0,
        )
    start = tableau_start(config, train, baselines, loaded)
    shown, chunk = min(SHOWN, len(train)), min(config.train.chunk, SHOWN)
    gram = torch.zeros(start.tableau.evaluations + 1, start.tableau.evaluations + 1, dtype=torch.float64)
    points = ParallelEvaluator()
    with torch.no_grad():
        for i in range(0, shown, chunk):
            condition, x, _ = train.rows(list(range(i, min(i + chunk, shown))))
            gram += second_moments(start.tableau, points.velocity(backend, condition), x) * len(x) / shown
    return tableau_student(config, spec, start, baselines.ranks.broadcast(gram)), start.error


def prepare(
    config: DistillConfig,
    backend: Backend,
    ranks: Ranks,
    run: RunFolder,
    say: Callable[[str], None],
    stop_requested: Callable[[], bool] = never,
) -> tuple[Trainer, Baselines]:
    """Everything that a run needs, in order: banks, baselines, student, loss; StopRequested if asked to stop
    before all is there.
    """
    train, heldout = make_banks(config, backend, ranks, stop_requested)
    provenance = {
        "kind": "distilled",
        "teacher": train.teacher.name,
        "bank": [train.key, heldout.key],
        "loss": asdict(config.loss),
    }
    provenance |= {"train": {k: getattr(config.train, k) for k in ("steps", "batch", "lr", "seed")}}
    provenance |= {"learned_sigmas": config.student.learn_sigmas}
    if config.teacher.check:
        teacher, count = train.teacher, min(config.teacher.check, len(heldout))
        found = errors(
            heldout,
            teacher.solver,
            twice_as_fine(teacher.nodes),
            count,
            config.evaluation.batch,
            ranks,
            stop_requested,
        )
        error, se = found.mean().item(), standard_error(found)
        say(
            f"teacher: {train.teacher.name}; it differs by RMSE {error:.5f} ± {1.96 * se:.5f} from twice as"
            " many intervals"
        )
        provenance |= {"teacher_rmse_to_twice_as_fine": error}
    baselines = Baselines(train, heldout, config.spec(), config.evaluation, ranks, stop_requested)
    student, unit = make_student(config, train, baselines)
    kept = targets_kept(config, len(train.teacher.kept) - 1)
    check_nodes(student, train.teacher, kept, config.needs_states)
    features = load_features(config.loss.feature_network, ranks.device) if config.loss.feature else None
    provenance |= (
        {"trained_on_the_judge": True}
        if features is not None and config.loss.feature_network == "judge"
        else {}
    )
    cost, count = student.cost(), sum(p.numel() for p in student.parameters())
    say(
        f"student: serial depth {cost.depth}, {cost.evaluations} evaluations an image, {count} parameters,"
        f" from {student.parent}"
    )
    rivals = baselines.at(cost.depth) if config.evaluation.baselines else {}
    loss = Loss(config.loss, backend, state_scales(train, kept), features)
    return (
        Trainer(
            config,
            ranks,
            run,
            student,
            loss,
            train,
            heldout,
            rivals,
            kept,
            config.train.lr * unit,
            provenance,
        ),
        baselines,
    )
