"""Learned solvers and their files."""

from .format import FORMAT, load_predictor, save_predictor
from .paths import resolve_predictor_path, tables_in
from .predictor import Predictor
from .safe_pickle import PredictorError
from .spec import Spec

__all__ = [
    "FORMAT",
    "Predictor",
    "PredictorError",
    "Spec",
    "load_predictor",
    "resolve_predictor_path",
    "save_predictor",
    "tables_in",
]
