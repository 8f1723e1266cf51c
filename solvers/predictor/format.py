"""Predictor files: a learned solver as a pickle of builtins, which opening cannot make run anything."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as brief

from torch import Tensor

from common.files import write_atomically

from ..table import SolverTable
from .kinds import KINDS, MAX_EVALUATIONS
from .paths import resolve_predictor_path
from .plain_data import mapping, plain, tensor_of
from .predictor import Predictor
from .published import read_published
from .safe_pickle import PredictorError, check_size, read_pickle
from .spec import spec_from

FORMAT = "epd-predictor/1"
KEYS = {"format", "sigmas", "spec", "provenance"}  # and the name of a kind


def save_predictor(predictor: Predictor, path: str | Path) -> None:
    """Write a predictor as a pickle of builtins only; the file is replaced as a whole or not at all.

    What load_predictor would refuse, or one table per image: PredictorError. Entries with secret names are
    left out.
    """
    kind = checked(predictor).kind
    document = {
        "format": FORMAT,
        kind.name: kind.to_lists(predictor.table),
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

    `path` is a file, or what resolve_predictor_path takes: a run folder, a folder of tables, a name under
    exps. A file that is truncated, malformed or holds a foreign class: PredictorError, one line that names
    it.
    """
    path = Path(path)
    if path.is_dir() or not (path.exists() or path.suffix == ".pkl"):
        path = resolve_predictor_path(str(path))
    document, foreign = read_pickle(path)
    try:
        if isinstance(document, dict) and "format" in document:
            if foreign:
                raise PredictorError(
                    "a predictor of the own format holds builtins only, but this one refers to classes"
                )
            return _from_document(document)
        return _from_published(*read_published(document))
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise PredictorError(f"{path}: {error}") from None


def _from_document(document: dict) -> Predictor:
    if document["format"] != FORMAT:
        raise PredictorError(
            f"format {brief(document['format'])}, expected {FORMAT!r}; a newer version of this program may"
            " read it"
        )
    check_size(document)
    unknown = set(document) - KEYS - set(KINDS)
    if unknown:
        raise PredictorError(f"unknown key {min(map(brief, unknown))}")
    held = [kind for name, kind in KINDS.items() if name in document]
    if len(held) != 1:
        raise PredictorError(f"expected either a {' or a '.join(KINDS)}")
    spec = spec_from(document.get("spec"))
    nodes = document.get("sigmas")
    sigmas = None if nodes is None else tensor_of(nodes, "sigmas", 1)
    provenance = plain(mapping(document.get("provenance", {}), "provenance"), "provenance")
    learned = held[0].from_lists(document[held[0].name], sigmas)
    return checked(Predictor(learned, spec, sigmas, provenance))


def _from_published(
    arrays: dict[str, Tensor], values: dict, provenance: dict, notes: tuple[str, ...]
) -> Predictor:
    table, origin = SolverTable(**arrays), plain(provenance, "provenance")
    return checked(Predictor(table, spec_from(values), None, origin, notes))


def checked(predictor: Predictor) -> Predictor:
    """The predictor, or an error when its parts contradict each other or cannot run."""
    table, spec, sigmas, kind = predictor.table, predictor.spec, predictor.sigmas, predictor.kind
    held = None if sigmas is None else len(sigmas)
    count = kind.num_evaluations(table)
    if count > MAX_EVALUATIONS:
        raise PredictorError(
            f"the {kind.name} takes {count} evaluations, more than a sampler has ({MAX_EVALUATIONS})"
        )
    facts = [("spec.solver", spec.solver, kind.solver_name), *kind.facts(table, spec)]
    needed = kind.num_nodes(table)
    facts.append(("number of sigmas", held, needed))
    facts.append(("spec.num_steps", spec.num_steps, held if needed is None else needed))
    for name, recorded, actual in facts:
        if recorded is not None and actual is not None and recorded != actual:
            raise PredictorError(f"{name} is {recorded}, but the table says {actual}")
    if sigmas is not None:
        broken = len(sigmas) < 2 or not sigmas.isfinite().all() or sigmas[-1] < 0
        if broken or (sigmas.diff() >= 0).any():
            raise PredictorError(
                f"sigmas are {brief(sigmas.tolist())}, expected at least 2 nodes, strictly descending, none"
                " below 0"
            )
        predictor.solver().check(sigmas)
    predictor.solver()
    return predictor
