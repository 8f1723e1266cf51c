"""Distil a solver table or tableau: torchrun --nproc_per_node=N -m training.distill.launch --config FILE.yaml."""

from dataclasses import asdict
from pathlib import Path

import click
import torch
from torch import Tensor

from backends import SCHEDULES, Backend, load_backend
from backends.distributed import Ranks, process_group
from backends.prompts import read_prompts
from solvers import BASELINES, Predictor, UserError
from solvers.errors import run_command

from ..config import ConfigError, load_config, to_yaml
from ..run_folder import RunFolder, stop_requests
from .bank import Bank, Pairs, Teacher, fineness, refined
from .baselines import Baselines
from .config import DistillConfig, check
from .loop import Trainer
from .losses import Loss, load_features
from .plots import draw
from .students import Student, load_start, table_student, tableau_student

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
        Pairs([heldout[i % len(heldout)] for i in range(bank.heldout_pairs)], list(range(bank.heldout_seed, bank.heldout_seed + bank.heldout_pairs))),
    )


def make_teacher(config: DistillConfig, backend: Backend) -> Teacher:
    """The teacher on the student's nodes, or on those of more intervals, refined."""
    kept = config.teacher.intervals or config.nodes.num_steps - 1
    every = config.teacher.inner + 1
    spec = config.spec()
    coarse, fine = (backend.sigmas(config.spec(num_steps=n)) for n in (kept + 1, kept * every + 1))
    name = f"{config.teacher.solver}, {kept * every} intervals of {spec.schedule_type or backend.default_schedule}"
    return Teacher(name, BASELINES[config.teacher.solver], refined(coarse, fine, every), every)


def targets_kept(config: DistillConfig, kept: int) -> list[int]:
    """Which of a bank's states are the student's targets: its own nodes, or the last where its nodes are not the teacher's."""
    intervals = config.nodes.num_steps - 1
    if config.student.kind == "tableau":
        return [kept - 1]
    if config.student.learn_sigmas or kept % intervals:
        return [kept - 1] * intervals  # only the last is asked for
    return list(range(kept // intervals - 1, kept, kept // intervals))


def make_student(config: DistillConfig, backend: Backend, train: Bank, baselines: Baselines, loaded) -> Student:
    """The student of a configuration."""
    spec = config.spec(schedule=config.nodes.schedule or backend.default_schedule)
    if config.student.kind == "table":
        return table_student(config, spec, backend.sigmas(spec), loaded)
    condition, x, _ = train.rows(list(range(min(SHOWN, len(train)))))
    start: Predictor | object
    if loaded is not None:
        start, parent = loaded
    else:
        found = list(baselines.at(config.student.depth).values())
        if not found:
            raise ConfigError(f"student.depth {config.student.depth}: no baseline of evaluation.baselines has this serial depth")
        start, parent = found[0][0], f"{found[0][0].name} on {found[0][0].schedule} nodes"
    return tableau_student(config, spec, start, parent, train.teacher.nodes, backend.velocity(condition), x)


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
    baselines = Baselines(
        train, heldout, config.spec(), evaluation.baselines, schedules, evaluation.tuning_pairs, evaluation.batch, ranks
    )
    student = make_student(config, backend, train, baselines, loaded)
    kept = targets_kept(config, len(teacher.kept) - 1)
    if config.student.kind == "table" and not config.student.learn_sigmas and not torch.allclose(teacher.kept[1:][kept], student.nodes[1:]):
        raise ConfigError("nodes: the teacher's nodes do not contain the student's; leave teacher.intervals out, or choose a multiple")
    features = load_features(config.loss.feature_network, ranks.device) if config.loss.feature else None
    if config.loss.feature_network == "judge" and config.loss.feature:
        provenance |= {"trained_on_the_judge": True}
    provenance |= {"train": {k: getattr(config.train, k) for k in ("steps", "batch", "lr", "seed")}, "learned_sigmas": config.student.learn_sigmas}
    cost = student.cost()
    rivals = baselines.at(cost.depth) if evaluation.baselines else {}
    peak = config.train.lr * (start_error(student, train, config, ranks) if config.student.kind == "tableau" else 1.0)
    loss = Loss(config.loss, backend, state_scales(train, kept), features)
    count = sum(p.numel() for p in student.parameters())
    say(f"student: serial depth {cost.depth}, {cost.evaluations} evaluations an image, {count} parameters, from {student.parent}")
    return Trainer(config, ranks, run, student, loss, train, heldout, rivals, kept, peak, provenance), baselines


def start_error(student: Student, train: Bank, config: DistillConfig, ranks: Ranks) -> float:
    """Mean RMSE of the start on the tuning pairs: the unit of a tableau's learning rate."""
    from .baselines import errors

    with torch.no_grad():
        solver, nodes = student.solver()
    return errors(train, solver, nodes, config.evaluation.tuning_pairs, config.evaluation.batch, ranks).mean().item()


def summary(trainer: Trainer) -> str:
    """What came out, in one line."""
    heldout = {r["step"]: r for r in trainer.run.records() if "heldout" in r}
    best = heldout.get(trainer.best.step, {})
    line = f"best table: step {trainer.best.step}, held-out RMSE {trainer.best.error:.4f} ± {1.96 * best.get('heldout_se', 0):.4f}"
    if "ratio" in best:
        line += f", {best['ratio']:.2f} times the best baseline's ({best['baseline']} on {best['baseline_schedule']} nodes, {best['baseline_heldout']:.4f})"
    return line


def plan(config: DistillConfig) -> str:
    """The resolved configuration and what a run would do, without loading anything."""
    train, evals = config.train, config.bank.pairs + config.bank.heldout_pairs
    kept = config.teacher.intervals or config.nodes.num_steps - 1
    return (
        f"{to_yaml(config)}# dry run: {evals} teacher trajectories of {kept * (config.teacher.inner + 1)} intervals of {config.teacher.solver}, "
        f"then {train.steps} steps of {train.batch} pairs"
    )


def distill(config: DistillConfig, ranks: Ranks, run: RunFolder, state: dict | None, max_steps: int | None) -> Trainer:
    """Run to the end, to `max_steps`, or to a request to stop; writes everything under the run's folder."""

    def say(text: str) -> None:
        if ranks.rank == 0:
            click.echo(text)

    def log(record: dict) -> None:
        if ranks.rank == 0:
            run.log(record)
            for name, value in record.items():
                if isinstance(value, float):
                    board.add_scalar(name, value, record["step"])

    from torch.utils.tensorboard import SummaryWriter

    trainer, baselines = prepare(config, ranks, run, load_start(config), say)
    if state is not None:
        trainer.restore(state)
        if ranks.rank == 0:
            run.rewind(trainer.step)
    depths = sorted({trainer.student.cost().depth, *config.evaluation.depths})
    curves = {depth: baselines.at(depth) for depth in depths}
    board = SummaryWriter(str(run.path / "logs"), purge_step=trainer.step + 1) if ranks.rank == 0 else None
    last_step = min(config.train.steps, max_steps or config.train.steps)
    with stop_requests(ranks) as stop:
        finished = trainer.fit(last_step, stop, log)
    if ranks.rank == 0:
        board.close()
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
