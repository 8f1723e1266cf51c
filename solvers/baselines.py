"""The classical solvers by the names that command lines use, and nodes for a serial depth."""

from dataclasses import replace
from operator import attrgetter

import torch

from common.errors import UserError
from common.plugins import is_code, load_code

from .exponential import DPMpp, Exponential, UniPC
from .multi_step import IPNDM
from .single_step import DPM, DPM2, Euler, Heun
from .solver import Solver
from .tableau import compile_tableau

BASELINES: dict[str, Solver] = {
    "euler": Euler(),
    "heun": Heun(),
    "dpm2": DPM2(),
    "dpm": DPM(inner_steps=3),
    "ipndm2": IPNDM(max_order=2),
    "ipndm3": IPNDM(max_order=3),
    "ipndm": IPNDM(max_order=4),
    "dpmpp": DPMpp(order=2, lower_order_final=True),
    "dpmpp3": DPMpp(order=3, lower_order_final=True),
    "unipc": UniPC(order=2, lower_order_final=True),
    "unipc3": UniPC(order=3, lower_order_final=True),
}
COSTS = {"serial depth": attrgetter("depth"), "number of evaluations": attrgetter("evaluations")}


def find_baseline(name: str) -> Solver:
    """The solver of a name, or of my_module:NAME where the user gave that: an instance of Solver, or a class
    whose arguments all have defaults; else UserError.
    """
    if not is_code(name):
        return BASELINES[name]
    solver = load_code(name, "--solver", Solver)
    try:
        return solver() if isinstance(solver, type) else solver
    except TypeError as error:
        raise UserError(f"--solver {name!r}: cannot be made without arguments ({error})") from None


def baseline_of(name: str, flow: bool) -> Solver:
    """A baseline as it is used on a flow-matching model, or on others."""
    solver = find_baseline(name)
    return replace(solver, flow=True) if flow and isinstance(solver, Exponential) else solver


def num_steps_for_depth(solver: Solver, depth: int, finish: str = "none") -> int:
    """The number of nodes that gives a solver this serial depth; none: UserError that names the nearest."""
    return num_steps_for("serial depth", solver, depth, finish)


def num_steps_for_evaluations(solver: Solver, evaluations: int, finish: str = "none") -> int:
    """The number of nodes that gives a solver this NFE in total; none: UserError that names the nearest."""
    return num_steps_for("number of evaluations", solver, evaluations, finish)


def num_steps_for(cost: str, solver: Solver, wanted: int, finish: str) -> int:
    """The number of nodes with which a cost, one of COSTS, is as wanted; none: UserError that names the
    nearest.
    """
    tried: list[int] = []
    for num_steps in range(2, wanted + 3):
        value = COSTS[cost](compile_tableau(solver, torch.linspace(2, 1, num_steps), finish))
        if value == wanted:
            return num_steps
        tried.append(value)
    nearest = sorted(set(tried), key=lambda c: abs(c - wanted))[:2]
    raise UserError(
        f"{type(solver).__name__} has no {cost} {wanted}; the nearest are"
        f" {' and '.join(map(str, sorted(nearest)))}"
    )
