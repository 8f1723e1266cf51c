"""Tune a solver table on a reward (RDPO): torchrun --nproc_per_node=N -m training.ppo.launch --config
FILE.yaml.
"""

from pathlib import Path

import click

from backends import Backend, check_backend, load_backend
from common.distributed import Ranks
from common.errors import note, run_command
from common.plugins import allow_code
from solvers import UserError, save_predictor

from ..config import to_yaml
from ..estimates import rdpo_estimates
from ..launch import ActiveRun, RunOptions, active_run, run_options
from ..processes import Processes, stop_requests
from ..start import Start
from .advice import gain_text
from .checks import check, config_notes
from .config import RDPOConfig
from .plots import draw
from .setup import (
    check_rewards,
    choose_exploration,
    find_start,
    merge_spec,
    predictor_of,
    prepare,
    prompts_of,
    start_notes,
    step_cost,
)
from .trainer import RDPOTrainer


def export(trainer: RDPOTrainer) -> Path:
    """Write the best policy's mean table, by its step and as best.pkl."""
    best = trainer.best
    predictor = predictor_of(
        trainer.policy, best.state, trainer.exported(), {"step": best.step, "heldout_gain": best.value}
    )
    for name in (f"step{best.step:06d}", "best"):
        save_predictor(predictor, trainer.run.export / f"network-snapshot-export-{name}.pkl")
    return trainer.run.export / "network-snapshot-export-best.pkl"


def summary(trainer: RDPOTrainer) -> str:
    """The best step and its held-out gains, in one line."""
    record = next((r for r in trainer.run.records() if r["step"] == trainer.best.step and "table" in r), None)
    if record is None:
        return f"best policy: step {trainer.best.step}"
    gains = [f"{name} {gain_text(record, name)}" for name in trainer.heldout.score.names]
    tried = sum("table" in r for r in trainer.run.records())
    where = f"on held-out prompts and seeds, as the best of {tried} evaluations there"
    return f"best policy: step {trainer.best.step}; gain over the start table {where}: {', '.join(gains)}"


def train(config: RDPOConfig, start: Start, active: ActiveRun) -> RDPOTrainer:
    """Run to the end, to --max-steps, or to a request to stop; writes everything under the run's folder."""
    ranks, run = active.ranks, active.folder
    processes = Processes(ranks)
    backend = load_backend(merge_spec(config, start), ranks.device)
    trainer = prepare(config, start, backend, run, processes)
    for text in run_notes(start, trainer, backend):
        note(text)
    if (idle := idle_ranks(config, ranks)) > 0:
        processes.echo(
            f"{idle} of {ranks.world} processes have nothing to roll out: lower ppo.rollout_chunk"
            f" ({config.ppo.rollout_chunk})"
        )
    active.restore(trainer)
    with stop_requests(ranks) as stop:
        active.fit(trainer, stop)
    if trainer.best.state and ranks.rank == 0:
        processes.echo(f"{summary(trainer)}\nwrote {export(trainer)}")
        draw(run, trainer.best.step)
    ranks.barrier()
    return trainer


def run_notes(start: Start, trainer: RDPOTrainer, backend: Backend) -> list[str]:
    """Notes on nodes that the backbone would not choose itself, unless they were learned."""
    if start.predictor.provenance.get("learned_sigmas"):
        return []
    text = backend.nodes_note(trainer.problem.spec, trainer.train.nodes)
    return [text] if text else []


def idle_ranks(config: RDPOConfig, ranks: Ranks) -> int:
    """How many ranks have no chunk of a step's images."""
    return ranks.world - -(-config.ppo.rollout_batch_size // config.ppo.rollout_chunk)


def check_all(config: RDPOConfig, start: Start, name: str | None, dry_run: bool) -> None:
    """Refuse what cannot be run before anything loads, print notes and, for a dry run, the plan.

    Args:
        config: of the run.
        start: its start table.
        name: of the configuration; None for a run that goes on.
        dry_run: whether the plan is printed; missing weights of a reward are only a note then.
    """
    spec = merge_spec(config, start)
    check_backend(spec)
    prompts_of(config, spec.backend, spec.dataset_name)
    for text in [*config_notes(config), *([] if name is None else start_notes(start, name))]:
        note(text)
    if dry_run:
        plan = f"{to_yaml(config)}# dry run, {step_cost(config, spec, start.predictor)}"
        click.echo("\n# ".join([plan, *rdpo_estimates(config, spec, start)]))
    try:
        for text in check_rewards(config):
            note(text)
    except UserError as error:
        if not dry_run:
            raise
        note(f"before a run: {error}")


@click.command()
@run_options("training/ppo/cfgs/digits.yaml")
@click.option("--run-name", help="End of the run folder's name; run.run_name by default.")
@click.option(
    "--output-root",
    type=click.Path(path_type=Path),
    help="Where run folders are; run.output_root by default.",
)
def main(options: RunOptions, run_name: str | None, output_root: Path | None) -> None:
    """Learn a table by reward. Interrupted, it goes on with --resume to the identical result."""
    run = options.find_run(output_root or Path("exps"), kind="ppo")
    config = options.load_config(RDPOConfig, run)
    allow_code(config.model.backend, config.reward.type, *config.evaluation.rewards)
    check(config)
    start = find_start(config)
    config.data.predictor_snapshot = str(start.path)
    choose_exploration(config.ppo, start.predictor.is_start)
    check_all(
        config, start, None if options.config_file is None else options.config_file.stem, options.dry_run
    )
    if options.dry_run:
        return
    root, name = output_root or Path(config.run.output_root), run_name or config.run.run_name
    with active_run(options, run, config, name, root) as active:
        train(config, start, active)


if __name__ == "__main__":
    run_command(main)
