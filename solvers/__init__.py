"""Samplers of the diffusion ODE dx/dsigma = velocity(x, sigma), learned and classical, and their files."""

from common.errors import UserError

from .baselines import (
    BASELINES,
    baseline_of,
    find_baseline,
    num_steps_for_depth,
    num_steps_for_evaluations,
)
from .epd import EPD
from .exponential import DPMpp, UniPC
from .multi_step import IPNDM
from .predictor import (
    Predictor,
    PredictorError,
    Spec,
    load_predictor,
    resolve_predictor_path,
    save_predictor,
    tables_in,
)
from .schedules import (
    SCHEDULES,
    NoiseSchedule,
    discrete,
    dynamic_shift,
    flowmatch,
    logsnr,
    polynomial,
    schedule_nodes,
    time_uniform,
)
from .single_step import DPM, DPM2, Euler, Heun
from .solver import FINISHES, Solver, denoiser_from_velocity, sample, trajectory, velocity_from_denoiser
from .table import SolverTable
from .tableau import Tableau, compile_tableau

__all__ = [
    "BASELINES",
    "DPM",
    "DPM2",
    "EPD",
    "FINISHES",
    "IPNDM",
    "SCHEDULES",
    "DPMpp",
    "Euler",
    "Heun",
    "NoiseSchedule",
    "Predictor",
    "PredictorError",
    "Solver",
    "SolverTable",
    "Spec",
    "Tableau",
    "UniPC",
    "UserError",
    "baseline_of",
    "compile_tableau",
    "denoiser_from_velocity",
    "discrete",
    "dynamic_shift",
    "find_baseline",
    "flowmatch",
    "load_predictor",
    "logsnr",
    "num_steps_for_depth",
    "num_steps_for_evaluations",
    "polynomial",
    "resolve_predictor_path",
    "sample",
    "save_predictor",
    "schedule_nodes",
    "tables_in",
    "time_uniform",
    "trajectory",
    "velocity_from_denoiser",
]
