"""Tune a solver table on a reward (RDPO): torchrun --nproc_per_node=N -m training.ppo.launch --config
FILE.yaml.
"""

from contextlib import closing
from pathlib import Path

import click

from backends import check_backend, load_backend
from common.distributed import Ranks, process_group, use_single_thread
from common.errors import note, run_command
from solvers import UserError, resolve_predictor_path, save_predictor

from ..config import load_config, to_yaml
from ..estimates import rdpo_estimates
from ..run_folder import Log, RunFolder, stop_requests
from .advice import gain_text
from .config import RDPOConfig, check, config_notes
from .setup import (
    START_KINDS,
    calls_of,
    check_rewards,
    choose_exploration,
    load_start,
    merge_spec,
    prepare,
    prompts_of,
    start_notes,
)
from .trainer import Trainer, predictor_of


def export(trainer: Trainer) -> Path:
    """Write the best policy's mean table, by its step and as best.pkl."""
    best = trainer.best
    predictor = predictor_of(
        trainer.policy, best.state, trainer.exported(), {"step": best.step, "heldout_gain": best.gain}
    )
    for name in (f"step{best.step:06d}", "best"):
        save_predictor(predictor, trainer.run.export / f"network-snapshot-export-{name}.pkl")
    return trainer.run.export / "network-snapshot-export-best.pkl"


def summary(trainer: Trainer) -> str:
    """What came out, in one line."""
    record = next((r for r in trainer.run.records() if r["step"] == trainer.best.step and "table" in r), None)
    if record is None:
        return f"best policy: step {trainer.best.step}"
    gains = [f"{name} {gain_text(record, name)}" for name in trainer.heldout.names]
    tried = sum("table" in r for r in trainer.run.records())
    where = f"on held-out prompts and seeds, as the best of {tried} evaluations there"
    return f"best policy: step {trainer.best.step}; gain over the start table {where}: {', '.join(gains)}"


def train(
    config: RDPOConfig, ranks: Ranks, run: RunFolder, state: dict | None, max_steps: int | None
) -> Trainer:
    """Run to the end, to `max_steps`, or to a request to stop; writes everything under the run's folder."""

    def say(text: str) -> None:
        if ranks.rank == 0:
            click.echo(text)

    backend = load_backend(merge_spec(config, load_start(config)[0]), ranks.device)
    trainer = prepare(config, backend, ranks, run)
    predictor = load_start(config)[0]
    if not predictor.provenance.get("learned_sigmas") and (
        text := backend.nodes_note(trainer.spec, trainer.train.nodes)
    ):
        note(text)
    if (idle := ranks.world - -(-config.ppo.rollout_batch_size // config.ppo.rollout_chunk)) > 0:
        say(
            f"{idle} of {ranks.world} processes have nothing to roll out: lower ppo.rollout_chunk"
            f" ({config.ppo.rollout_chunk})"
        )
    if state is not None:
        trainer.restore(state)
        if ranks.rank == 0:
            run.rewind(trainer.step, trainer.evaluated)
    log = Log(run, ranks, trainer.step)
    with stop_requests(ranks) as stop, closing(log):
        finished = trainer.fit(min(config.ppo.steps, max_steps or config.ppo.steps), stop, log, say)
    if not finished:
        say(f"stopped at step {trainer.step} as asked; go on with --resume {run.path}")
    if trainer.best.state and ranks.rank == 0:
        say(f"{summary(trainer)}\nwrote {export(trainer)}")
    ranks.barrier()
    return trainer


def check_all(config: RDPOConfig, name: str | None, dry_run: bool) -> None:
    """Refuse what cannot be run before anything loads, print notes and, for a dry run, the plan.

    `name` is the configuration's, None for a run that goes on. Reward weights that are missing do not spoil a
    dry run.
    """
    predictor, _ = load_start(config)
    spec = merge_spec(config, predictor)
    check_backend(spec)
    prompts_of(config, spec.backend, spec.dataset_name)
    for text in [*config_notes(config), *([] if name is None else start_notes(config, name))]:
        note(text)
    if dry_run:
        lines = [
            f"{to_yaml(config)}# dry run, {calls_of(config, predictor)}",
            *rdpo_estimates(config, spec, predictor),
        ]
        click.echo("\n# ".join(lines))
    try:
        for text in check_rewards(config):
            note(text)
    except UserError as error:
        if not dry_run:
            raise
        note(f"before a run: {error}")


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="YAML file, such as training/ppo/cfgs/digits.yaml.",
)
@click.option(
    "--override", "overrides", multiple=True, help="section.key=value over the file; may be repeated."
)
@click.option("--run-name", help="End of the run folder's name; run.run_name by default.")
@click.option("--max-steps", type=click.IntRange(1), help="Stop after this step, with a checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and what a step costs.")
@click.option("--resume", help='Run folder to go on in, or "latest".')
@click.option(
    "--output-root",
    type=click.Path(path_type=Path),
    help="Where run folders are; run.output_root by default.",
)
@click.option("--device", help="cpu, cuda or cuda:1 (float64 is needed); CUDA where there is one by default.")
def main(path, overrides, run_name, max_steps, dry_run, resume, output_root, device) -> None:
    """Learn a table by reward. Interrupted, it goes on with --resume to the identical result."""
    if (path is None) == (resume is None):
        raise UserError("give either --config FILE to start a run, or --resume RUN_DIR to go on with one")
    if resume is not None and overrides:
        raise UserError("--override cannot change a run that goes on; start a new one with --config")
    run = None if resume is None else RunFolder.find(resume, output_root or Path("exps"), kind="ppo")
    config = load_config(RDPOConfig, path if run is None else run.config, overrides)
    check(config)
    config.data.predictor_snapshot = str(
        resolve_predictor_path(config.data.predictor_snapshot, kinds=START_KINDS)
    )
    choose_exploration(config.ppo, load_start(config)[0].is_start)
    check_all(config, None if path is None else path.stem, dry_run)
    if dry_run:
        return
    state = None if run is None else run.load_checkpoint()
    if device is not None and device.startswith("mps"):
        raise UserError("--device mps: it has no float64, in which tables are learned; give cpu or cuda")
    with process_group(device) as ranks:
        use_single_thread(ranks)
        root = output_root or Path(config.run.output_root)
        run = run or RunFolder.create(run_name or config.run.run_name, to_yaml(config), ranks, root)
        if ranks.rank == 0:
            click.echo(f"run folder: {run.path}")
        train(config, ranks, run, state, max_steps)


if __name__ == "__main__":
    run_command(main)
