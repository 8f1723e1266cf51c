"""The classical solvers by the names that command lines use, and nodes for a serial depth."""

import torch

from .errors import UserError
from .multi_step import IPNDM, DPMpp, UniPC
from .sampling import Solver
from .single_step import DPM, DPM2, Euler, Heun
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


def num_steps_for_depth(solver: Solver, depth: int, finish: str = "none") -> int:
    """The number of nodes with which a solver's serial depth is `depth`; none: UserError that names the nearest."""
    found: list[int] = []
    for num_steps in range(2, depth + 3):
        got = compile_tableau(solver, torch.linspace(2, 1, num_steps), finish).depth
        if got == depth:
            return num_steps
        found.append(got)
    nearest = sorted(set(found), key=lambda d: abs(d - depth))[:2]
    raise UserError(f"{type(solver).__name__} has no serial depth {depth}; the nearest are {' and '.join(map(str, sorted(nearest)))}")
