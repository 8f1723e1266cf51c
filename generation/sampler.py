"""A backbone with a solver on its nodes: all that decides an image besides prompt and seed."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from backends import Backend
from backends.parallel import ParallelEvaluator
from solvers import Solver, Tableau, compile_tableau, sample

StepCallback = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Sampler:
    """From prompts and seeds to latents and images, by one solver on the nodes `sigmas` of one backbone."""

    backend: Backend
    solver: Solver
    solver_name: str
    sigmas: Tensor
    guidance_scale: float
    finish: str = "none"
    predictor: Path | None = None
    evaluator: ParallelEvaluator = field(default_factory=ParallelEvaluator)

    @cached_property
    def cost(self) -> Tableau:
        """The compiled tableau, off which serial depth and NFE are read."""
        return compile_tableau(self.solver, self.sigmas, self.finish)

    @property
    def cfg_rows(self) -> int:
        """Network rows of an evaluation: 2 where CFG needs the unconditional output as well."""
        return 2 if self.guidance_scale != 1 and self.backend.cfg_doubles_rows else 1

    @property
    def steps(self) -> int:
        """How many states the solver goes through."""
        return self.solver.num_steps(self.sigmas)

    def settings(self) -> dict:
        """What the manifest records of every image."""
        path = self.predictor
        return {
            "solver": self.solver_name,
            "predictor": None if path is None else hashlib.sha256(path.read_bytes()).hexdigest(),
            "nodes": self.sigmas.tolist(),
            "depth": self.cost.depth,
            "evaluations": self.cost.evaluations,
            "guidance": self.guidance_scale,
            "guidance_rows": self.cfg_rows,
            "finish": self.finish,
            "backbone": f"{self.backend.name}: {self.backend.identity()}",
            "config": self.backend.image_options(),
            "dtype": str(self.backend.dtype).removeprefix("torch."),
        }

    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], callback: StepCallback | None = None
    ) -> Tensor:
        """Final latents [B, C, H, W] of B prompts and seeds; callback(n, x) sees those after step n."""
        with torch.inference_mode():
            condition = self.backend.encode(prompts, self.guidance_scale)
            velocity = self.evaluator.velocity(self.backend, condition)
            x = self.backend.initial_latents(seeds, self.sigmas[0])
            return sample(self.solver, velocity, x, self.sigmas, callback, self.finish)

    def images(
        self, prompts: Sequence[str], seeds: Sequence[int], callback: StepCallback | None = None
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of B prompts and seeds."""
        with torch.inference_mode():
            return self.backend.decode(self.latents(prompts, seeds, callback))
