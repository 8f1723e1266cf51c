"""A run's folder: configuration, metrics, checkpoints and exports, and what it takes to go on from there."""

import json
import re
from datetime import datetime
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError

import torch

from common.distributed import Ranks
from common.files import write_atomically
from solvers import UserError


class RunError(UserError):
    """A run folder that cannot be used; the message is one line for the user."""


class RunFolder:
    """exps/<YYYYmmdd-HHMMSS>-<name>/ with configs/, logs/, checkpoints/ and export/."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "configs" / "resolved_config.yaml"
        self.metrics = path / "logs" / "metrics.jsonl"
        self.seconds = path / "logs" / "seconds.jsonl"
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"

    @classmethod
    def create(cls, name: str, resolved_config: str, ranks: Ranks, exps: Path = Path("exps")) -> "RunFolder":
        """A new folder with its configuration; its name is the same on all ranks."""
        if not name or not all(c.isalnum() or c in "._-" for c in name):
            raise RunError(f"--run-name {name!r}: expected letters, digits, '.', '_' and '-'")
        path = exps / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
        if ranks.rank == 0:
            for number in range(2, 1000):
                try:
                    path.mkdir(parents=True)
                    break
                except FileExistsError:
                    path = exps / f"{datetime.now():%Y%m%d-%H%M%S}-{name}-{number}"
        run = cls(Path(ranks.broadcast(str(path))))
        if ranks.rank == 0:
            for folder in (run.config.parent, run.metrics.parent, run.checkpoints, run.export):
                folder.mkdir()
            write_atomically(run.config, resolved_config.encode())
        ranks.barrier()
        return run

    @classmethod
    def find(
        cls, text: str, exps: Path = Path("exps"), kind: str = "", option: str = "--resume"
    ) -> "RunFolder":
        """The run folder meant by a path, a name under `exps`, or "latest": the newest there that has a
        checkpoint.

        `kind` is a top-level key that the configuration must have.
        """
        if text == "latest":
            runs = [cls(p) for p in sorted(exps.glob("*-*"), reverse=True) if p.is_dir()]
            runs = [
                r
                for r in runs
                if r.config.is_file() and r.is_kind(kind) and r.latest_checkpoint() is not None
            ]
            if not runs:
                raise RunError(
                    f"{option} latest: no run with a checkpoint under {exps}; start one without --resume"
                )
            return runs[0]
        for run in (cls(Path(text)), cls(exps / text)):
            if run.config.is_file():
                if not run.is_kind(kind):
                    raise RunError(
                        f"{option} {text}: {run.config} belongs to another kind of run (it has no section"
                        f" {kind!r})"
                    )
                if run.latest_checkpoint() is None:
                    raise RunError(
                        f"{option} {text}: {run.checkpoints} holds no checkpoint; start a run anew"
                    )
                return run
        places = f"{Path(text)} and {exps / text}"
        raise RunError(
            f"{option} {text}: no run folder there (looked for {places}); expected one with configs/ and"
            " checkpoints/"
        )

    def is_kind(self, kind: str) -> bool:
        """Whether the configuration has a top-level section."""
        return (
            any(line.startswith(f"{kind}:") for line in self.config.read_text(encoding="utf-8").splitlines())
            if kind
            else True
        )

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after a step goes."""
        return self.checkpoints / f"step{step:06d}.pt"

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint."""
        return next(reversed(self._by_step()), None)

    def _by_step(self) -> list[Path]:
        """The checkpoints in the order of their steps."""
        numbered = [(re.fullmatch(r"step(\d+)\.pt", p.name), p) for p in self.checkpoints.glob("step*.pt")]
        return [p for _, p in sorted((int(match[1]), p) for match, p in numbered if match)]

    def save_checkpoint(self, step: int, state: dict, keep: int = 2) -> Path:
        """Write a checkpoint as a whole or not at all, and remove all but the newest few."""
        buffer = BytesIO()
        torch.save(state, buffer)
        path = self.checkpoint(step)
        write_atomically(path, buffer.getvalue())
        for old in self._by_step()[:-keep]:
            old.unlink()
        return path

    def load_checkpoint(self, path: Path | None = None) -> dict:
        """Read a checkpoint, as data only."""
        path = path or self.latest_checkpoint()
        assert path is not None  # find has refused a run without one
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise RunError(
                f"{path}: not a readable checkpoint ({reason}); remove it to go on from the one before"
            ) from None

    def log(self, record: dict) -> None:
        """Add a line of strict JSON to the metrics; entries that are None are left out, other than finite
        numbers refused.
        """
        line = json.dumps({k: v for k, v in record.items() if v is not None}, allow_nan=False)
        with open(self.metrics, "ab", buffering=0) as file:
            file.write(line.encode() + b"\n")

    def records(self) -> list[dict]:
        """The complete lines of the metrics."""
        return complete_lines(self.metrics)

    def rewind(self, step: int, evaluated: int) -> None:
        """Forget the metrics of steps after `step` and of evaluations after step `evaluated`, which come
        again.
        """
        for path in (self.metrics, self.seconds):
            kept = [
                json.dumps(r)
                for r in complete_lines(path)
                if r["step"] <= (evaluated if "table" in r else step)
            ]
            write_atomically(path, "".join(line + "\n" for line in kept).encode())


def complete_lines(path: Path) -> list[dict]:
    """The records of a file of JSON lines; a last one that was torn is left out."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


class Log:
    """Rank 0's records: metrics.jsonl and tensorboard, and seconds.jsonl apart, since times are never the
    same twice.
    """

    def __init__(self, run: RunFolder, ranks: Ranks, step: int):
        self.run, self.first = run, ranks.rank == 0
        if self.first:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(str(run.path / "logs"), purge_step=step + 1)

    def __call__(self, record: dict, seconds: dict[str, float] | None = None) -> None:
        if self.first:
            self.run.log(record)
            if seconds:
                rounded = {name: round(value, 6) for name, value in seconds.items()}
                with open(self.run.seconds, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": record["step"]} | rounded) + "\n")
                for name, value in seconds.items():
                    self.board.add_scalar(f"seconds/{name}", value, record["step"])
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, record["step"])
            if "table" in record:
                self.board.flush()

    def close(self) -> None:
        if self.first:
            self.board.close()
