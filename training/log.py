"""Where the records of a run go: metrics.jsonl always, and tensorboard or Weights & Biases beside it."""

import json
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from common.distributed import Ranks
from solvers import UserError

from .run_folder import RunFolder

REPORT_TO = ("tensorboard", "wandb", "none")


class Board(ABC):
    """A viewer of training curves."""

    @abstractmethod
    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add numbers by name."""

    @abstractmethod
    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add a picture [H, W, 3] of 8 bits."""

    def flush(self) -> None:  # noqa: B027
        """Show what was added, where that is not done at once."""

    @abstractmethod
    def close(self) -> None:
        """End."""


class TensorboardBoard(Board):
    """Event files under the run's logs/; those of steps that come again are replaced."""

    def __init__(self, run: RunFolder, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(run.path / "logs"), purge_step=step + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbBoard(Board):
    """A run of Weights & Biases under the folder's logs/, of the folder's name, which a resumed run goes on
    with; WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY are used as everywhere.
    """

    def __init__(self, run: RunFolder, config: dict[str, Any]):
        import wandb

        self.picture = wandb.Image
        name = run.path.name
        settings = wandb.Settings(console="off", silent=True)
        self.run = wandb.init(
            id=name, name=name, dir=str(run.path / "logs"), config=config, resume="allow", settings=settings
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.run.log({name: self.picture(pixels), "step": step})

    def close(self) -> None:
        self.run.finish()


def check_report_to(report_to: str) -> None:
    """Refuse a viewer that is not installed: UserError."""
    if report_to == "wandb" and find_spec("wandb") is None:
        raise UserError(
            "logging.report_to is wandb, which is not installed: run pip install wandb, or set"
            " logging.report_to=tensorboard"
        )


def board_of(report_to: str, run: RunFolder, config: dict[str, Any], step: int) -> Board | None:
    """The viewer of a configuration, None for none; `step` is the one that the run goes on from."""
    if report_to == "wandb":
        return WandbBoard(run, config)
    return TensorboardBoard(run, step) if report_to == "tensorboard" else None


class Log:
    """Rank 0's records: metrics.jsonl, a viewer, and seconds.jsonl apart, since times are never the same
    twice.
    """

    def __init__(self, run: RunFolder, ranks: Ranks, board: Board | None = None):
        self.run, self.first, self.board = run, ranks.rank == 0, board

    def __call__(self, record: dict, seconds: dict[str, float] | None = None) -> None:
        if not self.first:
            return
        self.run.log(record)
        if seconds:
            self.log_seconds(record["step"], seconds)
        if self.board is not None:
            self.show(self.board, record, seconds or {})

    def log_seconds(self, step: int, seconds: dict[str, float]) -> None:
        """Add a line of seconds by part of the work."""
        rounded = {name: round(value, 6) for name, value in seconds.items()}
        with open(self.run.seconds, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | rounded) + "\n")

    def show(self, board: Board, record: dict, seconds: dict[str, float]) -> None:
        """Add a record's numbers to the viewer, and an evaluation's images."""
        step = record["step"]
        numbers = {
            name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"
        }
        board.scalars(numbers | {f"seconds/{name}": value for name, value in seconds.items()}, step)
        if "table" in record:
            if (path := self.run.validation(step)).is_file():
                board.image("validation", pixels_of(path), step)
            board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def pixels_of(path: Path) -> np.ndarray:
    """The pixels [H, W, 3] of an image that the run has written."""
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))
