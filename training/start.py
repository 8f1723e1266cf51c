"""The predictor that a training run starts from."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from backends import check_backbone_known
from solvers import Predictor, SolverTable, load_predictor


@dataclass(frozen=True)
class Start:
    """A predictor that a run starts from, loaded once."""

    predictor: Predictor
    path: Path
    parent: str
    """Its file name and hash, which the provenance of the run's own predictors records."""

    @property
    def table(self) -> SolverTable:
        """The predictor's table, where the run has checked that it is one."""
        assert isinstance(self.predictor.table, SolverTable)
        return self.predictor.table


def load_start(path: Path) -> Start:
    """Read the predictor of a file; one of an unknown backbone: BackendError."""
    predictor = load_predictor(path)
    check_backbone_known(predictor.spec, path)
    return Start(predictor, path, f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}")
