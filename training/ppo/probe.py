"""Training prompts on which a policy is measured: before it learns, and how far its mean has moved."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backends import Backend
from backends.parallel import ParallelEvaluator
from solvers import Solver, Tableau, compile_tableau, sample

from ..distill.students.tableau import second_moments
from .gaussian import FIRST_STD, GaussianPolicy

PROBES = 64  # training prompts from which the moments and the width of draws are measured
PROBE_SEED = 2_000_000
TARGET_CHANGE = 0.1  # RMS change of the final state by a draw, over its RMS
WIDTH_STEPS = 5


def compiled_start(solver: Solver, nodes: Tensor) -> Tableau:
    """A start as a tableau: itself, or an EPD table compiled on its nodes."""
    return solver if isinstance(solver, Tableau) else compile_tableau(solver, nodes)


@dataclass(frozen=True)
class Probe:
    """Training prompts with noise, on which a policy's draws and its mean are compared with its start."""

    backend: Backend
    prompts: list[str]
    guidance_scale: float
    chunk: int

    def parts(self, nodes: Tensor):
        """Velocities and initial latents, a chunk at a time."""
        points = ParallelEvaluator()
        for i in range(0, len(self.prompts), self.chunk):
            prompts = self.prompts[i : i + self.chunk]
            velocity = points.velocity(self.backend, self.backend.encode(prompts, self.guidance_scale))
            seeds = list(range(PROBE_SEED + i, PROBE_SEED + i + len(prompts)))
            yield velocity, self.backend.initial_latents(seeds, nodes[0])

    def moments(self, start: Tableau, nodes: Tensor) -> Tensor:
        """The second moments [S + 1, S + 1] of x_0 and the denoised states of a start."""
        with torch.inference_mode():
            parts = [
                second_moments(start, velocity, x) * len(x) / len(self.prompts)
                for velocity, x in self.parts(nodes)
            ]
        return torch.stack(parts).sum(0).clone()

    def relative_change(self, start: Solver, moved: Callable[[slice], Solver], nodes: Tensor) -> float:
        """The RMS change of the final latents over their RMS.

        Args:
            start: the solver that they are compared with.
            moved: the solver of some of the images.
            nodes: noise levels [N].
        """
        first, changed, total = 0, 0.0, 0.0
        with torch.inference_mode():
            for velocity, x in self.parts(nodes):
                part = slice(first, first + len(x))
                first += len(x)
                final = sample(start, velocity, x, nodes).double()
                changed += (sample(moved(part), velocity, x, nodes).double() - final).square().sum().item()
                total += final.square().sum().item()
        return math.sqrt(changed / total)


def measure_std(policy: GaussianPolicy, probe: Probe, nodes: Tensor) -> float:
    """The standard deviation at which draws change the final state by 10 % RMS, to three digits."""
    draw = policy.base().sample(len(probe.prompts), PROBE_SEED)
    std = FIRST_STD
    for _ in range(WIDTH_STEPS):
        policy.std.fill_(std)
        change = probe.relative_change(policy.start, lambda part: policy.learned(draw.select(part)), nodes)
        std = min(max(std * TARGET_CHANGE / max(change, 1e-9), 1e-5), 1.0)
    return float(f"{std:.3g}")
