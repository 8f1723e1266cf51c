"""Distil a solver table or tableau: torchrun --nproc_per_node=N -m training.distill.launch --config
FILE.yaml.
"""

from pathlib import Path

import click
import torch

from backends import Backend, load_backend
from common.distributed import StopRequested
from common.errors import run_command
from common.plugins import allow_code

from ..config import to_yaml
from ..estimates import distill_estimates
from ..launch import ActiveRun, RunOptions, active_run, run_options
from ..processes import Processes, stop_requests
from ..start import Start
from .checks import check
from .config import DistillConfig
from .plots import draw
from .setup import pairs_of, prepare
from .students import find_start
from .trainer import DistillTrainer


def summary(trainer: DistillTrainer) -> str:
    """The best step and its held-out error beside the best baseline's, in one line."""
    heldout = {r["step"]: r for r in trainer.run.records() if "heldout" in r}
    best = heldout.get(trainer.best.step, {})
    line = (
        f"best table: step {trainer.best.step}, held-out RMSE {trainer.best.value:.4f} ±"
        f" {1.96 * best.get('heldout_se', 0):.4f}"
    )
    if "ratio" in best:
        baseline = f"{best['baseline']} on {best['baseline_schedule']} nodes, {best['baseline_heldout']:.4f}"
        line += f", {best['ratio']:.2f} times the best baseline's ({baseline})"
    return line


def plan(config: DistillConfig, start: Start | None) -> str:
    """The resolved configuration and what a run would do and cost, without loading anything."""
    train, pairs = config.train, config.bank.pairs + config.bank.heldout_pairs
    kept = config.teacher.intervals or config.nodes.num_steps - 1
    first = (
        f"{to_yaml(config)}# dry run: {pairs} teacher trajectories of {kept * (config.teacher.inner + 1)}"
        f" intervals of {config.teacher.solver}, then {train.steps} steps of {train.batch} pairs"
    )
    return "\n# ".join([first, *distill_estimates(config, start)])


def checked_start(config: DistillConfig) -> Start | None:
    """Check all of a configuration that needs no weights; its start, where that is a predictor."""
    allow_code(config.backend.name)
    check(config)
    start = find_start(config)
    pairs_of(config)
    return start


def load_frozen(config: DistillConfig, device: torch.device) -> Backend:
    """The backbone of a configuration, with block checkpointing where that asks for it."""
    dtype = None if config.backend.dtype == "auto" else config.backend.dtype
    backend = load_backend(config.spec(), device, dtype)
    if config.backend.block_checkpointing:
        backend.checkpoint_blocks()
    return backend


def distill(
    config: DistillConfig, start: Start | None, active: ActiveRun, backend: Backend | None = None
) -> DistillTrainer | None:
    """Run to the end, to --max-steps, or to a request to stop; writes everything under the run's folder.

    Args:
        config: of the run.
        start: the predictor of student.start, where that names one.
        active: its folder, its processes and what it goes on from.
        backend: the frozen backbone, where it is loaded already.

    Returns:
        The trainer; None where the run was asked to stop before the bank and the baselines were complete.
    """
    ranks, run = active.ranks, active.folder
    backend = backend or load_frozen(config, ranks.device)
    with stop_requests(ranks) as stop:
        processes = Processes(ranks, stop.any_rank)
        try:
            trainer, baselines = prepare(config, start, backend, run, processes)
            active.restore(trainer)
            depths = sorted({trainer.student.cost().depth, *config.evaluation.depths})
            curves = {depth: baselines.at(depth) for depth in depths}
        except StopRequested:
            new = active.checkpoint is None
            remedy = "run the same command again" if new else f"go on with --resume {run.path}"
            processes.echo(
                f"stopped before step 1 as asked; what is complete in {config.bank.folder} is kept: {remedy}"
            )
            return None
        active.fit(trainer, stop)
    if ranks.rank == 0:
        trainer.export(last=True)
        draw(run, trainer, curves)
    processes.echo(f"{summary(trainer)}\nwrote {run.export}" if trainer.best.state else f"wrote {run.export}")
    ranks.barrier()
    return trainer


@click.command()
@run_options("training/distill/cfgs/digits.yaml")
@click.option("--run-name", default="distill", show_default=True, help="End of the run folder's name.")
@click.option(
    "--exps",
    type=click.Path(path_type=Path),
    default=Path("exps"),
    show_default=True,
    help="Where run folders are.",
)
def main(options: RunOptions, run_name: str, exps: Path) -> None:
    """Learn a table against a fine teacher. Interrupted, it goes on with --resume to the identical result."""
    run = options.find_run(exps, kind="teacher")
    config = options.load_config(DistillConfig, run)
    start = checked_start(config)
    if options.dry_run:
        click.echo(plan(config, start))
        return
    with active_run(options, run, config, run_name, exps) as active:
        distill(config, start, active)


if __name__ == "__main__":
    run_command(main)
