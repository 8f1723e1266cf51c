"""What the command lines of both training stages share: options, the run folder, the processes, the end of a
run.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from common.distributed import Ranks, process_group, use_single_thread
from common.same_run import check_same, locked_by_run
from solvers import UserError

from .config import load_config, to_yaml, without_secrets
from .log import Board, Log, board_of, check_report_to
from .processes import Processes, StopRequest
from .run_folder import RunFolder
from .trainer import Trainer

Config = TypeVar("Config")


@dataclass(frozen=True)
class RunOptions:
    """The options that both stages have."""

    config_file: Path | None
    overrides: tuple[str, ...]
    max_steps: int | None
    dry_run: bool
    resume: str | None
    device: str | None

    def find_run(self, exps: Path, kind: str) -> RunFolder | None:
        """The run of --resume, None for a new one.

        Args:
            exps: where run folders are.
            kind: a section that the stage's configurations have.
        """
        if (self.config_file is None) == (self.resume is None):
            raise UserError("give either --config FILE to start a run, or --resume RUN_DIR to go on with one")
        if self.resume is None:
            return None
        if self.overrides:
            raise UserError("--override cannot change a run that goes on; start a new one with --config")
        return RunFolder.find(self.resume, exps, kind)

    def load_config(self, schema: type[Config], run: RunFolder | None) -> Config:
        """The configuration of a new run or of one that goes on."""
        path = self.config_file if run is None else run.config
        assert path is not None  # find_run has checked it
        return load_config(schema, path, self.overrides)


def run_options(example: str | None) -> Callable[[Callable], Callable]:
    """The options of RunOptions on a click command, which gets them together as its first argument.

    Args:
        example: a configuration file to name in the help; None for a command without --config.
    """
    config_file = click.option(
        "--config", "config_file", type=click.Path(path_type=Path), help=f"YAML file, such as {example}."
    )
    options = [
        *([] if example is None else [config_file]),
        click.option(
            "--override", "overrides", multiple=True, help="section.key=value over the file; may be repeated."
        ),
        click.option("--max-steps", type=click.IntRange(1), help="Stop after this step, with a checkpoint."),
        click.option("--dry-run", is_flag=True, help="Print the resolved configuration and what it costs."),
        click.option(
            "--resume", "--resume-from-checkpoint", "resume", help='Run folder to go on in, or "latest".'
        ),
        click.option(
            "--device", help="cpu, cuda or cuda:1 (float64 is needed); CUDA where there is one by default."
        ),
    ]

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def collected(*first: Any, **values: Any) -> Any:
            shared = RunOptions(**{f.name: values.pop(f.name, None) for f in fields(RunOptions)})
            return command(*first, shared, **values)

        for option in reversed(options):
            collected = option(collected)
        return collected

    return decorate


@dataclass(frozen=True)
class ActiveRun:
    """A run that has its folder and its processes."""

    folder: RunFolder
    ranks: Ranks
    checkpoint: dict | None = None
    """The state to go on from."""
    max_steps: int | None = None
    report_to: str = "tensorboard"
    config: dict = field(default_factory=dict)
    """What a viewer shows beside the curves."""

    def restore(self, trainer: Trainer) -> None:
        """Bring a trainer to the checkpoint; ranks with other prompts, tables or weights: SharedError."""
        check_same(self.ranks, trainer.depends_on())
        if self.checkpoint is not None:
            trainer.restore(self.checkpoint)

    def board(self, step: int) -> Board | None:
        """The viewer of the first process."""
        return None if self.ranks.rank else board_of(self.report_to, self.folder, self.config, step)

    def fit(self, trainer: Trainer, stop: StopRequest) -> bool:
        """Train to the end, to --max-steps or to a request to stop; False for the last."""
        if self.checkpoint is not None and self.ranks.rank == 0:
            self.folder.rewind(trainer.step, trainer.evaluated)
        steps = trainer.intervals.steps
        with closing(Log(self.folder, self.ranks, self.board(trainer.step))) as log:
            finished = trainer.fit(min(steps, self.max_steps or steps), stop, log)
        if not finished:
            text = f"stopped at step {trainer.step} as asked; go on with --resume {self.folder.path}"
            Processes(self.ranks).echo(text)
        return finished


def check_float64(device: str | None) -> None:
    """Refuse a device that has no float64, in which tables are learned."""
    if device is not None and device.startswith("mps"):
        raise UserError("--device mps: it has no float64, in which tables are learned; give cpu or cuda")


@contextmanager
def active_run(
    options: RunOptions, run: RunFolder | None, config: Any, name: str, exps: Path
) -> Iterator[ActiveRun]:
    """The processes and the folder of a run.

    Args:
        options: the command line.
        run: the folder of a run that goes on; None for a new one.
        config: what a new folder records; its logging.report_to is the viewer.
        name: end of a new folder's name.
        exps: where a new folder goes.
    """
    check_float64(options.device)
    check_report_to(config.logging.report_to)
    with process_group(options.device) as ranks:
        use_single_thread(ranks)
        check_same(ranks, {"configuration": to_yaml(config), "run to go on with": run and str(run.path)})
        folder = run or RunFolder.create(name, to_yaml(config), ranks, exps)
        shown = without_secrets(asdict(config))
        with locked_by_run(folder.path, ranks, "wait for it, or stop it"):
            state = None if run is None else run.load_checkpoint()
            Processes(ranks).echo(f"run folder: {folder.path}")
            yield ActiveRun(folder, ranks, state, options.max_steps, config.logging.report_to, shown)
