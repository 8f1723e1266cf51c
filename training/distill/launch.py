"""Distil a solver table or tableau: torchrun --nproc_per_node=N -m training.distill.launch --config FILE.yaml."""

from dataclasses import asdict
from pathlib import Path

import click
import torch
from torch import Tensor

from backends import SCHEDULES, Backend, load_backend
from backends.distributed import Ranks, process_group
from backends.prompts import read_prompts
from solvers import BASELINES, Predictor, UserError, compile_tableau
from solvers.errors import run_command

from ..config import ConfigError, load_config, to_yaml
from ..run_folder import RunFolder, stop_requests
from .bank import Bank, Pairs, Teacher, fineness, refined
from .baselines import Baselines, errors
from .config import DistillConfig, check
from .loop import Trainer
from .losses import Loss, load_features
from .plots import draw
from .student import widened
from .students import Student, TableauStart, load_start, table_student, tableau_student

SHOWN = 32  # training pairs from which a tableau learns what its start's states look like


def pairs_of(config: DistillConfig) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs: different prompts, different seeds."""
    bank = config.bank
    if bank.prompts == "digits":
        from backends.digits.data import evaluation_prompts, training_prompts

        prompts, heldout = training_prompts(bank.pairs), evaluation_prompts(bank.heldout_pairs)
    else:
        prompts, heldout = list(dict.fromkeys(read_prompts(Path(bank.prompts), "bank.prompts"))), []
    if bank.heldout_prompts is not None:
        heldout = list(dict.fromkeys(read_prompts(Path(bank.heldout_prompts), "bank.heldout_prompts")))
        shared = set(prompts) & set(heldout)
        if shared:
            raise ConfigError(f"bank.heldout_prompts {bank.heldout_prompts}: {min(shared)!r} is a training prompt too; remove it from one")
    elif not heldout:
        if len(prompts) < 2:
            raise ConfigError(f"bank.prompts {bank.prompts}: 1 prompt, expected at least 2, or bank.heldout_prompts")
        count = min(bank.heldout_pairs, max(1, len(prompts) // 5))
        prompts, heldout = prompts[:-count], prompts[-count:]
    return (
        Pairs([prompts[i % len(prompts)] for i in range(bank.pairs)], list(range(bank.first_seed, bank.first_seed + bank.pairs))),
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
    coarse, fine = (backend.sigmas(config.spec(n, schedule)) for n in (kept + 1, kept * every + 1))
    name = f"{config.teacher.solver}, {kept * every} intervals of {schedule}"
    return Teacher(name, BASELINES[config.teacher.solver], refined(coarse, fine, every), every)


def targets_kept(config: DistillConfig, kept: int) -> list[int]:
    """Which of a bank's `kept` states are the student's targets, step by step; the last for each where only that counts."""
    intervals = 1 if config.student.kind == "tableau" else config.nodes.num_steps - 1
    if config.needs_states:
        return list(range(kept // intervals - 1, kept, kept // intervals))
    return [kept - 1] * intervals


def check_nodes(student: Student, teacher: Teacher, kept: list[int], needs_states: bool) -> None:
    """Refuse a teacher that does not go through the student's nodes, or not from end to end."""
    ends = student.nodes[[0, -1]], teacher.nodes[[0, -1]]
    if not torch.allclose(*ends, rtol=1e-6, atol=0):
        mine, theirs = (" to ".join(f"{sigma:.6g}" for sigma in pair) for pair in ends)
        raise ConfigError(f"nodes: the student runs from {mine}, but the teacher from {theirs}; choose schedules with the same ends")
    if needs_states and not torch.allclose(teacher.kept[1:][kept], student.nodes[1:], rtol=1e-6, atol=0):
        raise ConfigError("teacher: its nodes do not contain the student's; leave teacher.schedule and teacher.intervals out")


def tableau_start(
    config: DistillConfig, train: Bank, baselines: Baselines, loaded: tuple[Predictor, str] | None, ranks: Ranks
) -> TableauStart:
    """The tableau of the predictor given, or of the best baseline of the depth asked for, with idle stages to learn."""
    tuning = config.evaluation.tuning_pairs
    if loaded is not None:
        predictor, parent = loaded
        nodes = predictor.sigmas
        error = errors(train, predictor.solver(), nodes, tuning, config.evaluation.batch, ranks).mean().item()
        return TableauStart(compile_tableau(predictor.solver(), nodes), predictor.spec.schedule_type, parent, error)
    found = [option for option, _ in baselines.at(config.student.depth).values()]
    if not found:
        raise ConfigError(f"student.depth {config.student.depth}: no baseline of evaluation.baselines has this serial depth")
    best, student = found[0], config.student
    tableau = widened(compile_tableau(best.solver, best.nodes), student.num_points, student.stride)
    return TableauStart(
        tableau, best.schedule, f"{best.name} on {best.schedule} nodes", baselines.cached(train, best, tuning).mean().item()
    )


def state_scales(bank: Bank, kept: list[int]) -> Tensor:
    """RMS of the teacher's states at the student's nodes, over the first shard of a bank."""
    _, _, states = bank.rows(list(range(min(bank.shard_size, len(bank)))))
    return states[kept].double().flatten(1).square().mean(1).sqrt().cpu()


def prepare(config: DistillConfig, ranks: Ranks, run: RunFolder, loaded, say) -> tuple[Trainer, Baselines]:
    """Everything that a run needs, in order: backbone, banks, baselines, student, loss."""
    dtype = None if config.backend.dtype == "auto" else config.backend.dtype
    backend = load_backend(config.spec(), ranks.device, dtype)
    if config.backend.block_checkpointing:
        backend.checkpoint_blocks()
    teacher, (train_pairs, heldout_pairs) = make_teacher(config, backend), pairs_of(config)
    settings = config.bank
    train, heldout = (
        Bank(Path(settings.folder), backend, teacher, config.guidance_scale, pairs, settings.shard_size, settings.dtype)
        for pairs in (train_pairs, heldout_pairs)
    )
    train.build(ranks, "training pairs")
    heldout.build(ranks, "held-out pairs")
    provenance = {"kind": "distilled", "teacher": teacher.name, "bank": [train.key, heldout.key], "loss": asdict(config.loss)}
    if config.teacher.check:
        error, half = fineness(heldout, min(config.teacher.check, len(heldout)))
        say(f"teacher: {teacher.name}; it differs by RMSE {error:.5f} ± {1.96 * half:.5f} from twice as many intervals")
        provenance |= {"teacher_rmse_to_twice_as_fine": error}
    evaluation = config.evaluation
    schedules = evaluation.schedules or list(SCHEDULES)
    baselines = Baselines(train, heldout, config.spec(), evaluation.baselines, schedules, evaluation.tuning_pairs, evaluation.batch, ranks)
    spec, peak = config.spec(schedule=config.nodes.schedule or backend.default_schedule), config.train.lr
    if config.student.kind == "table":
        student = table_student(config, spec, backend.sigmas(spec), loaded)
    else:
        start = tableau_start(config, train, baselines, loaded, ranks)
        condition, x, _ = train.rows(list(range(min(SHOWN, len(train)))))
        student, peak = tableau_student(config, spec, start, backend.velocity(condition), x), peak * start.error
    kept = targets_kept(config, len(teacher.kept) - 1)
    check_nodes(student, teacher, kept, config.needs_states)
    features = load_features(config.loss.feature_network, ranks.device) if config.loss.feature else None
    if config.loss.feature_network == "judge" and config.loss.feature:
        provenance |= {"trained_on_the_judge": True}
    provenance |= {
        "train": {k: getattr(config.train, k) for k in ("steps", "batch", "lr", "seed")},
        "learned_sigmas": config.student.learn_sigmas,
    }
    cost = student.cost()
    rivals = baselines.at(cost.depth) if evaluation.baselines else {}
    loss = Loss(config.loss, backend, state_scales(train, kept), features)
    count = sum(p.numel() for p in student.parameters())
    say(f"student: serial depth {cost.depth}, {cost.evaluations} evaluations an image, {count} parameters, from {student.parent}")
    return Trainer(config, ranks, run, student, loss, train, heldout, rivals, kept, peak, provenance), baselines


def summary(trainer: Trainer) -> str:
    """What came out, in one line."""
    heldout = {r["step"]: r for r in trainer.run.records() if "heldout" in r}
    best = heldout.get(trainer.best.step, {})
    line = f"best table: step {trainer.best.step}, held-out RMSE {trainer.best.error:.4f} ± {1.96 * best.get('heldout_se', 0):.4f}"
    if "ratio" in best:
        rival = f"{best['baseline']} on {best['baseline_schedule']} nodes, {best['baseline_heldout']:.4f}"
        line += f", {best['ratio']:.2f} times the best baseline's ({rival})"
    return line


def plan(config: DistillConfig) -> str:
    """The resolved configuration and what a run would do, without loading anything."""
    train, evals = config.train, config.bank.pairs + config.bank.heldout_pairs
    kept = config.teacher.intervals or config.nodes.num_steps - 1
    return (
        f"{to_yaml(config)}# dry run: {evals} teacher trajectories of {kept * (config.teacher.inner + 1)} intervals of {config.teacher.solver}, "
        f"then {train.steps} steps of {train.batch} pairs"
    )


class Log:
    """Rank 0's records: metrics.jsonl, tensorboard and the terminal."""

    def __init__(self, run: RunFolder, ranks: Ranks, step: int):
        self.run, self.first = run, ranks.rank == 0
        if self.first:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(str(run.path / "logs"), purge_step=step + 1)

    def __call__(self, record: dict) -> None:
        if self.first:
            self.run.log(record)
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self.first:
            self.board.close()


def distill(config: DistillConfig, ranks: Ranks, run: RunFolder, state: dict | None, max_steps: int | None) -> Trainer:
    """Run to the end, to `max_steps`, or to a request to stop; writes everything under the run's folder."""

    def say(text: str) -> None:
        if ranks.rank == 0:
            click.echo(text)

    trainer, baselines = prepare(config, ranks, run, load_start(config), say)
    if state is not None:
        trainer.restore(state)
        if ranks.rank == 0:
            run.rewind(trainer.step)
    curves = {depth: baselines.at(depth) for depth in sorted({trainer.student.cost().depth, *config.evaluation.depths})}
    log = Log(run, ranks, trainer.step)
    with stop_requests(ranks) as stop:
        finished = trainer.fit(min(config.train.steps, max_steps or config.train.steps), stop, log)
    log.close()
    if ranks.rank == 0:
        trainer.export(last=True)
        draw(run, trainer, curves)
    if not finished:
        say(f"stopped at step {trainer.step} as asked; go on with --resume {run.path}")
    say(f"{summary(trainer)}\nwrote {run.export}")
    ranks.barrier()
    return trainer


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path), help="YAML file, such as training/distill/cfgs/digits.yaml.")
@click.option("--override", "overrides", multiple=True, help="section.key=value over the file; may be repeated.")
@click.option("--run-name", default="distill", show_default=True, help="End of the run folder's name.")
@click.option("--max-steps", type=click.IntRange(1), help="Stop after this step, with a checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and what would be done.")
@click.option("--resume", help='Run folder to go on in, or "latest".')
@click.option("--exps", type=click.Path(path_type=Path), default=Path("exps"), show_default=True, help="Where run folders are.")
@click.option("--device", help="cpu, cuda, cuda:1, mps; CUDA where there is one by default.")
def main(path, overrides, run_name, max_steps, dry_run, resume, exps, device) -> None:
    """Learn a table against a fine teacher. Interrupted, it goes on with --resume to the identical result."""
    if (path is None) == (resume is None):
        raise UserError("give either --config FILE to start a run, or --resume RUN_DIR to go on with one")
    if resume is not None and overrides:
        raise UserError("--override cannot change a run that goes on; start a new one with --config")
    run = None if resume is None else RunFolder.find(resume, exps, kind="teacher")
    config = load_config(DistillConfig, path if run is None else run.config, overrides)
    check(config)
    load_start(config)
    pairs_of(config)
    if dry_run:
        click.echo(plan(config))
        return
    state = None if run is None else run.load_checkpoint()
    with process_group(device) as ranks:
        run = run or RunFolder.create(run_name, to_yaml(config), ranks, exps)
        if ranks.rank == 0:
            click.echo(f"run folder: {run.path}")
        distill(config, ranks, run, state, max_steps)


if __name__ == "__main__":
    run_command(main)
