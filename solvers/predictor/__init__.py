"""Predictor files: a learned table with all that is needed to sample with it, as plain data."""

import json
import math
import pickle
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch
from torch import Tensor

from ..epd import EPD
from ..files import write_atomically
from ..sampling import Solver
from ..schedules import flowmatch, schedule_nodes
from ..table import SolverTable
from ..tableau import Tableau, compile_tableau
from .options import MACHINE, SECRETS
from .paths import resolve_predictor_path, tables_in
from .published import read_published
from .reading import PredictorError, check_size, read_pickle

FORMAT = "epd-predictor/1"

__all__ = ["FORMAT", "Predictor", "PredictorError", "Spec", "load_predictor", "resolve_predictor_path", "save_predictor", "tables_in"]


@dataclass(frozen=True)
class Spec:
    """The settings a table was made for; None where the file does not say. Names as in the published predictors."""

    dataset_name: str | None = None
    backend: str | None = None
    """Backbone family: ldm, sd3, flux or digits."""
    backend_config: dict = field(default_factory=dict)
    """Options of the backend: model_name_or_path, resolution, torch_dtype, ... Never a token."""
    num_steps: int | None = None
    """Number of nodes, one more than the table has rows."""
    num_points: int | None = None
    guidance_type: str | None = None
    guidance_rate: float | None = None
    schedule_type: str | None = None
    """polynomial, logsnr, time_uniform, discrete or flowmatch."""
    schedule_rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    flowmatch_mu: float | None = None
    flowmatch_shift: float | None = None
    afs: bool = False
    max_order: int = 1
    """1 is EPD-Solver; above 1 EPD-Plugin, the order of the extrapolation that places the points."""
    solver: str = "epd"
    """epd for a table, tableau for a whole tableau."""


SPEC_TYPES = {f.name: f.type for f in fields(Spec)}


@dataclass(frozen=True)
class Predictor:
    """A learned table (or a whole tableau), what it was made for, its resolved nodes and where it comes from."""

    table: SolverTable | Tableau
    spec: Spec
    sigmas: Tensor | None = None
    provenance: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What its reader left out of a published file, in words for the user; never saved."""

    @property
    def is_start(self) -> bool:
        """Whether nothing was learned yet: a table with the same points in each interval and equal weights."""
        table = self.table
        if self.provenance.get("kind") in ("distilled", "rdpo"):
            return False
        if isinstance(table, Tableau) or table.scale_dir is not None or table.scale_time is not None:
            return False
        return bool(torch.equal(table.r, table.r[:1].expand_as(table.r)) and (table.w == table.w[0, 0]).all())

    def notices(self) -> list[str]:
        """What a command line says of this predictor when it uses it."""
        untrained = "a start table, in which nothing was learned yet; distil first (./launch.sh distill NAME)"
        return [*self.notes, *([untrained] if self.is_start else [])]

    def solver(self, parallel: bool = True, max_batch: int | None = None) -> Solver:
        """The solver that this predictor describes."""
        if isinstance(self.table, Tableau):
            return self.table
        return EPD(self.table, self.spec.afs, self.spec.max_order, parallel, max_batch)

    def nodes(self, sigma_min: float | None = None, sigma_max: float | None = None) -> Tensor:
        """Its nodes [num_steps] for a denoiser of one's own: those it holds, else its schedule's from sigma_max to sigma_min.

        The ends are the recorded ones by default. A schedule that needs more than its ends (discrete, or flowmatch without a
        shift), or ends that are neither given nor recorded: PredictorError.
        """
        if self.sigmas is not None:
            return self.sigmas
        spec, steps = self.spec, self.table.num_intervals + 1
        if spec.schedule_type == "flowmatch" and (spec.flowmatch_mu, spec.flowmatch_shift) != (None, None):
            mu = spec.flowmatch_mu
            return flowmatch(steps, shift=spec.flowmatch_shift) if mu is None else flowmatch(steps, mu=mu)
        low, high = spec.sigma_min if sigma_min is None else sigma_min, spec.sigma_max if sigma_max is None else sigma_max
        if low is None or high is None:
            raise PredictorError("the nodes: neither sigma_min and sigma_max are given, nor does the predictor record them")
        try:
            return schedule_nodes(spec.schedule_type or "none", steps, low, high, spec.schedule_rho)
        except ValueError as error:
            raise PredictorError(f"the nodes: {error}, or make them with solvers.discrete or solvers.flowmatch") from None

    def cost(self, finish: str = "none") -> Tableau:
        """The compiled tableau, off which depth and evaluations are read; they do not depend on the nodes."""
        intervals = 1 if isinstance(self.table, Tableau) else self.table.num_intervals
        nodes = torch.linspace(2, 1, intervals + 1) if self.sigmas is None else self.sigmas
        return compile_tableau(self.solver(), nodes, finish)


def save_predictor(predictor: Predictor, path: str | Path) -> None:
    """Write a predictor as a pickle of builtins only; the file is replaced as a whole or not at all.

    What load_predictor would refuse, or one table per image: PredictorError. Entries with secret names are left out.
    """
    table, kind = checked(predictor).table, "tableau" if isinstance(predictor.table, Tableau) else "table"
    if kind == "table":
        arrays: dict[str, Any] = {k: v.detach().tolist() for k, v in table.arrays().items()}
    else:
        arrays = {k: vars(table)[k].detach().tolist() for k in ("sigmas", "stages", "output")}
        arrays["levels"] = [list(level) for level in table.levels]
    document = {
        "format": FORMAT,
        kind: arrays,
        "sigmas": None if predictor.sigmas is None else predictor.sigmas.tolist(),
        "spec": asdict(spec_from(asdict(predictor.spec))),
        "provenance": plain(mapping(predictor.provenance, "provenance"), "provenance"),
    }
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = json.loads(json.dumps(document))  # no object twice, so that equal predictors are equal bytes
        write_atomically(path, pickle.dumps(fresh, protocol=4))
    except OSError as error:
        raise PredictorError(f"{path}: cannot be written ({error.strerror})") from None


def load_predictor(path: str | Path) -> Predictor:
    """Read a predictor in the own or in the published format; nothing in the file is ever executed.

    A file that is truncated, malformed or holds a foreign class: PredictorError, one line that names it.
    """
    path = Path(path)
    document, foreign = read_pickle(path)
    try:
        if isinstance(document, dict) and "format" in document:
            if foreign:
                raise PredictorError("a predictor of the own format holds builtins only, but this one refers to classes")
            return _from_document(document)
        return _from_published(*read_published(document))
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise PredictorError(f"{path}: {error}") from None


def _from_document(document: dict) -> Predictor:
    if document["format"] != FORMAT:
        raise PredictorError(f"format {brief(document['format'])}, expected {FORMAT!r}; a newer version of this program may read it")
    check_size(document)
    unknown = set(document) - {"format", "table", "tableau", "sigmas", "spec", "provenance"}
    if unknown:
        raise PredictorError(f"unknown key {min(map(brief, unknown))}")
    if ("table" in document) == ("tableau" in document):
        raise PredictorError("expected either a table or a tableau")
    spec = spec_from(document.get("spec"))
    nodes = document.get("sigmas")
    sigmas = None if nodes is None else tensor_of(nodes, "sigmas", 1)
    provenance = plain(mapping(document.get("provenance", {}), "provenance"), "provenance")
    table = replace(_tableau(document["tableau"]), nodes=sigmas) if "tableau" in document else _table(document["table"])
    return checked(Predictor(table, spec, sigmas, provenance))


def _table(parts: Any) -> SolverTable:
    parts = mapping(parts, "table", ("r", "w", "scale_dir", "scale_time"), required=("r", "w"))
    return SolverTable(**{k: tensor_of(v, f"table.{k}", 2) for k, v in parts.items() if v is not None or k in "rw"})


def _tableau(parts: Any) -> Tableau:
    names = ("sigmas", "stages", "output", "levels")
    parts = mapping(parts, "tableau", names, required=names)
    sigmas, stages, output = (tensor_of(parts[k], f"tableau.{k}", n) for k, n in (("sigmas", 1), ("stages", 2), ("output", 1)))
    levels = parts["levels"]
    lists = isinstance(levels, list) and all(isinstance(level, list) for level in levels)
    if not lists or not all(type(s) is int and 0 <= s < len(sigmas) for level in levels for s in level):
        raise PredictorError(f"tableau.levels is {brief(levels)}, expected lists of stage numbers below {len(sigmas)}")
    return Tableau(sigmas, stages, output, tuple(map(tuple, levels)))


def _from_published(arrays: dict[str, Tensor], values: dict, provenance: dict, notes: tuple[str, ...]) -> Predictor:
    return checked(Predictor(SolverTable(**arrays), spec_from(values), None, plain(provenance, "provenance"), notes))


def checked(predictor: Predictor) -> Predictor:
    """The predictor, or an error when its parts contradict each other or cannot run."""
    table, spec, sigmas = predictor.table, predictor.spec, predictor.sigmas
    nodes = None if sigmas is None else len(sigmas)
    facts = [("spec.solver", spec.solver, "tableau" if isinstance(table, Tableau) else "epd")]
    if isinstance(table, SolverTable):
        if table.r.ndim != 2:
            raise PredictorError(f"the table has shape {list(table.r.shape)}, expected one table [intervals, points]")
        facts += [("spec.num_points", spec.num_points, table.num_points), ("number of sigmas", nodes, table.num_intervals + 1)]
        nodes = table.num_intervals + 1
    for name, told, found in [*facts, ("spec.num_steps", spec.num_steps, nodes)]:
        if told is not None and found is not None and told != found:
            raise PredictorError(f"{name} is {told}, but the table says {found}")
    if sigmas is not None:
        if len(sigmas) < 2 or not sigmas.isfinite().all() or (sigmas.diff() >= 0).any() or sigmas[-1] < 0:
            raise PredictorError(f"sigmas are {brief(sigmas.tolist())}, expected at least 2 nodes, strictly descending, none below 0")
        predictor.solver().check(sigmas)
    predictor.solver()
    return predictor


def spec_from(values: Any) -> Spec:
    """A Spec of plain values, without options of a machine; an unknown key or a value of the wrong type is an error that names it."""
    values = mapping(values, "spec", SPEC_TYPES)
    checked_values: dict[str, Any] = {}
    for name, value in values.items():
        expected = SPEC_TYPES[name]
        if value is not None and "float" in str(expected) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise PredictorError(f"spec.{name} is {brief(value)}, expected {expected.__name__ if isinstance(expected, type) else expected}")
        if isinstance(value, float) and not math.isfinite(value):
            raise PredictorError(f"spec.{name} is {value}, expected a finite number")
        checked_values[name] = plain(value, f"spec.{name}")
    if "backend_config" in checked_values:
        config = checked_values["backend_config"]
        checked_values["backend_config"] = {k: v for k, v in config.items() if k not in MACHINE}
    return Spec(**checked_values)


def mapping(value: Any, name: str, allowed: Collection[str] | None = None, required: Collection[str] = ()) -> dict:
    """value, if it is a dict whose keys are all allowed, and those required are there."""
    if not isinstance(value, dict):
        raise PredictorError(f"{name} is {brief(value)}, expected a dict")
    for key in value:
        if allowed is not None and key not in allowed:
            raise PredictorError(f"unknown key {name}.{key if isinstance(key, str) else brief(key)}")
    for key in required:
        if key not in value:
            raise PredictorError(f"{name}.{key} is missing")
    return value


def tensor_of(value: Any, name: str, ndim: int) -> Tensor:
    """A float64 tensor of nested lists of numbers."""
    try:
        tensor = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise PredictorError(f"{name} is {brief(value)}, expected numbers in lists of {ndim} dimensions") from None
    if tensor.ndim != ndim:
        raise PredictorError(f"{name} has {tensor.ndim} dimensions, expected {ndim}")
    if not tensor.isfinite().all():
        raise PredictorError(f"{name} holds {tensor[~tensor.isfinite()][0]}, expected finite numbers")
    return tensor


def plain(value: Any, name: str, depth: int = 0) -> Any:
    """value, if it is made of dict, list, str, int, float, bool and None only, at most 8 deep; tuples become lists.

    Entries whose names say that they are secret are left out.
    """
    if depth > 8:
        raise PredictorError(f"{name} is nested more than 8 deep")
    if isinstance(value, dict):
        return {str(k): plain(v, f"{name}.{k}", depth + 1) for k, v in value.items() if not str(k).lower().endswith(SECRETS)}
    if isinstance(value, list | tuple):
        return [plain(v, name, depth + 1) for v in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise PredictorError(f"{name} holds a {type(value).__name__}, expected plain data")
