"""Solvers of a serial depth, and a fine solver, the teacher, on the same prompts and seeds."""

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from backends import Backend
from digits.data import ALL_LABELS, evaluation_prompts
from generation.generate import Sampler
from solvers import (
    BASELINES,
    DPM2,
    EPD,
    SolverTable,
    Spec,
    UserError,
    baseline_of,
    load_predictor,
    num_steps_for_depth,
)
from training.distill.bank import rmse_per_image

TEACHER_INTERVALS = 64
POINTS = 2
EXPS = Path(__file__).parents[2] / "exps"
SHIPPED_KINDS = ("epd", "tableau1", "tableau2", "wide2")
SOLVERS = [*BASELINES, "epd-start", "epd-plugin-start"]
SCHEDULES = ["discrete", "polynomial", "logsnr", "time_uniform"]


def schedules_of(backend: Backend) -> list[str]:
    """The schedules that a backbone can have, its own first."""
    return [s if s != "discrete" or backend.noise_schedule is not None else "flowmatch" for s in SCHEDULES]


def solver_of(name: str, depth: int):
    """A solver of serial depth `depth` and its number of nodes; the start tables of EPD have equally spaced
    points.
    """
    if name in BASELINES:
        return BASELINES[name], num_steps_for_depth(BASELINES[name], depth)
    if depth % 2 or depth < 2:
        raise UserError(f"{name} has no serial depth {depth}; the nearest are {depth - 1} and {depth + 1}")
    order = 2 if name == "epd-plugin-start" else 1
    return EPD(SolverTable.uniform(depth // 2, POINTS), max_order=order), depth // 2 + 1


def has_depth(name: str, depth: int) -> bool:
    """Whether a solver has this serial depth."""
    try:
        return bool(solver_of(name, depth))
    except UserError:
        return False


def sampler_of(backend: Backend, guidance: float, name: str, depth: int, schedule: str) -> Sampler:
    """A solver of one serial depth on the nodes of one schedule."""
    solver, num_steps = solver_of(name, depth)
    solver = baseline_of(name, backend.flow) if name in BASELINES else solver
    return Sampler(
        backend, solver, name, backend.sigmas(Spec(num_steps=num_steps, schedule_type=schedule)), guidance
    )


def teacher_sampler(
    backend: Backend, guidance: float, intervals: int, schedule: str | None = None
) -> Sampler:
    """DPM-Solver-2 on many intervals between the same first and last node; by default on nodes that bring it
    near the exact solution.
    """
    schedule = schedule or ("flowmatch" if backend.noise_schedule is None else "polynomial")
    nodes = backend.sigmas(Spec(num_steps=intervals + 1, schedule_type=schedule))
    return Sampler(backend, DPM2(), f"teacher: dpm2, {intervals} intervals", nodes, guidance)


def shipped(backend: Backend, family: str, guidance: float, depth: int) -> dict[str, Sampler]:
    """The learned predictors that come with the project, for a family, a guidance and a serial depth."""
    folder = EXPS / ("digits" if family == "ldm" else f"digits-{family}")
    cell = f"g{guidance:g}-d{depth}"
    paths = {f"{kind} distilled": folder / "grid" / f"{kind}-{cell}.pkl" for kind in SHIPPED_KINDS}
    if not paths["epd distilled"].is_file():
        paths["epd distilled"] = folder / "distilled.pkl"
    paths["epd rdpo"] = folder / "best.pkl"
    samplers = {}
    for name, path in paths.items():
        predictor = load_predictor(path) if path.is_file() else None
        if predictor is None or predictor.spec.guidance_rate != guidance or predictor.cost().depth != depth:
            continue
        samplers[name] = Sampler(backend, predictor.solver(), name, predictor.sigmas, guidance)
    return samplers


@dataclass(frozen=True)
class PromptSeeds:
    """The prompt and the seed of each image, and how many images are sampled at a time."""

    prompts: list[str]
    seeds: list[int]
    batch: int = 64

    @classmethod
    def evaluation(cls, n: int, first_seed: int, batch: int = 64) -> "PromptSeeds":
        """n evaluation prompts of the digits."""
        return cls.from_prompts(evaluation_prompts(n, ALL_LABELS), first_seed, batch)

    @classmethod
    def from_prompts(cls, prompts: list[str], first_seed: int, batch: int = 64) -> "PromptSeeds":
        """Prompts with seeds that follow each other."""
        return cls(prompts, list(range(first_seed, first_seed + len(prompts))), batch)

    def first(self, n: int) -> "PromptSeeds":
        """The first n images."""
        return replace(self, prompts=self.prompts[:n], seeds=self.seeds[:n])


Samples = tuple[Tensor, Tensor, float]
"""Latents [n, C, H, W], images [n, 3, H, W] in [0, 1], and seconds per image, text encoding and decoding
included.
"""


def sample_all(sampler: Sampler, pairs: PromptSeeds) -> Samples:
    """Sample all prompts, batch by batch."""
    begin, latents, images = time.perf_counter(), [], []
    for i in range(0, len(pairs.prompts), pairs.batch):
        rows = slice(i, i + pairs.batch)
        latents.append(sampler.latents(pairs.prompts[rows], pairs.seeds[rows]))
        with torch.inference_mode():
            images.append(sampler.backend.decode(latents[-1]).cpu())
    seconds = (time.perf_counter() - begin) / len(pairs.prompts)
    return torch.cat(latents).cpu(), torch.cat(images), seconds


@dataclass(frozen=True)
class TeacherReference:
    """What a fine solver makes of some prompts and seeds: the reference that others are compared with."""

    backend: Backend
    guidance: float
    pairs: PromptSeeds
    intervals: int
    teacher: Samples

    @classmethod
    def make(
        cls,
        backend: Backend,
        guidance: float,
        pairs: PromptSeeds,
        intervals: int | None = None,
        keep: Path | None = None,
    ) -> "TeacherReference":
        """Run the teacher, or read what an earlier run of the same kept.

        Args:
            backend: the backbone.
            guidance: its guidance scale.
            pairs: prompts and seeds.
            intervals: of DPM-Solver-2; 64 by default.
            keep: a folder for the teacher's samples.
        """
        intervals = TEACHER_INTERVALS if intervals is None else intervals
        key = (backend.fingerprint(), guidance, intervals, pairs.seeds, pairs.prompts, pairs.batch)
        name = f"teacher-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pt"
        path = None if keep is None else keep / name
        if path is not None and path.is_file():
            return cls(backend, guidance, pairs, intervals, torch.load(path, weights_only=True))
        teacher = sample_all(teacher_sampler(backend, guidance, intervals), pairs)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(teacher, path)
        return cls(backend, guidance, pairs, intervals, teacher)

    def sample(self, sampler: Sampler) -> Samples:
        """What a sampler makes of the same prompts and seeds."""
        return sample_all(sampler, self.pairs)

    def error(self, sampler: Sampler) -> float:
        """Mean RMSE to the teacher."""
        return rmse_per_image(self.sample(sampler)[0], self.teacher[0]).mean().item()
