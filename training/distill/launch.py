"""Distil a solver table or tableau: torchrun --nproc_per_node=N -m training.distill.launch --config
FILE.yaml.
"""

from contextlib import closing
from pathlib import Path

import click

from backends import load_backend
from common.distributed import Ranks, StopRequested, process_group, use_single_thread
from common.errors import run_command
from solvers import UserError

from ..config import load_config, to_yaml
from ..estimates import distill_estimates
from ..run_folder import Log, RunFolder, stop_requests
from .config import DistillConfig, check
from .plots import draw
from .setup import pairs_of, prepare
from .students.student import load_start
from .trainer import Trainer


def summary(trainer: Trainer) -> str:
    """What came out, in one line."""
    heldout = {r["step"]: r for r in trainer.run.records() if "heldout" in r}
    best = heldout.get(trainer.best.step, {})
    line = (
        f"best table: step {trainer.best.step}, held-out RMSE {trainer.best.error:.4f} ±"
        f" {1.96 * best.get('heldout_se', 0):.4f}"
    )
    if "ratio" in best:
        rival = f"{best['baseline']} on {best['baseline_schedule']} nodes, {best['baseline_heldout']:.4f}"
        line += f", {best['ratio']:.2f} times the best baseline's ({rival})"
    return line


def plan(config: DistillConfig) -> str:
    """The resolved configuration and what a run would do and cost, without loading anything."""
    train, evals = config.train, config.bank.pairs + config.bank.heldout_pairs
    kept = config.teacher.intervals or config.nodes.num_steps - 1
    done = (
        f"{to_yaml(config)}# dry run: {evals} teacher trajectories of {kept * (config.teacher.inner + 1)}"
        f" intervals of {config.teacher.solver}, then {train.steps} steps of {train.batch} pairs"
    )
    loaded = load_start(config)
    return "\n# ".join([done, *distill_estimates(config, None if loaded is None else loaded[0])])


def distill(
    config: DistillConfig, ranks: Ranks, run: RunFolder, state: dict | None, max_steps: int | None
) -> Trainer | None:
    """Run to the end, to `max_steps`, or to a request to stop; writes everything under the run's folder.

    None where it was asked to stop before the bank and the baselines were complete.
    """

    def say(text: str) -> None:
        if ranks.rank == 0:
            click.echo(text)

    dtype = None if config.backend.dtype == "auto" else config.backend.dtype
    backend = load_backend(config.spec(), ranks.device, dtype)
    if config.backend.block_checkpointing:
        backend.checkpoint_blocks()
    with stop_requests(ranks) as stop:
        try:
            trainer, baselines = prepare(config, backend, ranks, run, say, stop.any_rank)
            if state is not None:
                trainer.restore(state)
            curves = {
                depth: baselines.at(depth)
                for depth in sorted({trainer.student.cost().depth, *config.evaluation.depths})
            }
        except StopRequested:
            again = "run the same command again" if state is None else f"go on with --resume {run.path}"
            say(f"stopped before step 1 as asked; what is complete in {config.bank.folder} is kept: {again}")
            return None
        if state is not None and ranks.rank == 0:
            run.rewind(trainer.step, trainer.evaluated)
        with closing(Log(run, ranks, trainer.step)) as log:
            finished = trainer.fit(min(config.train.steps, max_steps or config.train.steps), stop, log)
    if ranks.rank == 0:
        trainer.export(last=True)
        draw(run, trainer, curves)
    if not finished:
        say(f"stopped at step {trainer.step} as asked; go on with --resume {run.path}")
    say(f"{summary(trainer)}\nwrote {run.export}" if trainer.best.state else f"wrote {run.export}")
    ranks.barrier()
    return trainer


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="YAML file, such as training/distill/cfgs/digits.yaml.",
)
@click.option(
    "--override", "overrides", multiple=True, help="section.key=value over the file; may be repeated."
)
@click.option("--run-name", default="distill", show_default=True, help="End of the run folder's name.")
@click.option("--max-steps", type=click.IntRange(1), help="Stop after this step, with a checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and what would be done.")
@click.option("--resume", help='Run folder to go on in, or "latest".')
@click.option(
    "--exps",
    type=click.Path(path_type=Path),
    default=Path("exps"),
    show_default=True,
    help="Where run folders are.",
)
@click.option("--device", help="cpu, cuda or cuda:1 (float64 is needed); CUDA where there is one by default.")
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
    if device is not None and device.startswith("mps"):
        raise UserError("--device mps: it has no float64, in which tables are learned; give cpu or cuda")
    with process_group(device) as ranks:
        use_single_thread(ranks)
        run = run or RunFolder.create(run_name, to_yaml(config), ranks, exps)
        if ranks.rank == 0:
            click.echo(f"run folder: {run.path}")
        distill(config, ranks, run, state, max_steps)


if __name__ == "__main__":
    run_command(main)
