"""The samplers that benchmarks.speed.pipelines compares: diffusers' pipelines, and ours with the text encoded
anew each time, each on the schedule with the least error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backends.diffusers_pipeline import PipelineBackend
from digits.data import ALL_LABELS, evaluation_prompts
from generation.generate import Sampler
from training.distill.bank import rmse_per_image

from ..quality.teacher_reference import PromptSeeds, sampler_of, schedules_of, shipped, teacher_sampler
from .diffusers_baseline import SCHEDULERS, DiffusersBaseline

LEARNED = ("epd distilled", "tableau1 distilled", "wide2 distilled")


@dataclass(frozen=True)
class OwnSampler:
    """A sampler that encodes its prompts anew each time, as diffusers' pipelines do."""

    sampler: Sampler

    @property
    def name(self) -> str:
        return self.sampler.solver_name

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of B prompts and seeds."""
        self.sampler.backend.forget_prompts()
        return self.sampler.images(prompts, seeds)

    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Final latents [B, C, H, W] of B prompts and seeds."""
        return self.sampler.latents(prompts, seeds)


PipelineSampler = OwnSampler | DiffusersBaseline
Scheduled = dict[str, tuple[str, PipelineSampler]]  # a schedule and a sampler on it, by the sampler's name


@dataclass(frozen=True)
class FineSolution:
    """A fine solver's final latents of some prompts and seeds: at the last noise level of training, where our
    samplers end, and at 0, where diffusers' schedulers do.
    """

    pairs: PromptSeeds
    at_end: Tensor
    at_zero: Tensor

    @classmethod
    def make(
        cls, backend: PipelineBackend, guidance: float, pairs: PromptSeeds, intervals: int
    ) -> "FineSolution":
        """By DPM-Solver-2 with so many intervals."""
        teacher = replace(teacher_sampler(backend, guidance, intervals), finish="denoise")
        ends, zeros = [], []
        for i in range(0, len(pairs.seeds), pairs.batch):
            rows, states = slice(i, i + pairs.batch), dict[int, Tensor]()
            zeros.append(teacher.latents(pairs.prompts[rows], pairs.seeds[rows], states.__setitem__))
            ends.append(states[max(states)])
        return cls(pairs, torch.cat(ends), torch.cat(zeros))

    def errors(self, sampler: PipelineSampler) -> Tensor:
        """RMSE [n] of a sampler to the fine solver at the noise level where it ends, image by image."""
        size = self.pairs.batch
        rows = [slice(i, i + size) for i in range(0, len(self.pairs.seeds), size)]
        latents = torch.cat([sampler.latents(self.pairs.prompts[r], self.pairs.seeds[r]) for r in rows])
        target = self.at_zero if isinstance(sampler, DiffusersBaseline) else self.at_end
        return rmse_per_image(latents, target).cpu()

    def nearest(self, candidates: dict[str, PipelineSampler]) -> str:
        """The candidate with the least error."""
        return min(candidates, key=lambda name: self.errors(candidates[name]).mean().item())


@dataclass(frozen=True)
class Contest:
    """A backbone and its guidance, with a fine solution for the choice of schedules and one for the errors
    that are reported; without them schedules are those of the model's configuration, and only times count.
    """

    backend: PipelineBackend
    family: str
    guidance: float
    tuning: FineSolution | None = None
    heldout: FineSolution | None = None

    def diffusers_samplers(self, depth: int) -> Scheduled:
        """diffusers' schedulers by name."""
        samplers: Scheduled = {}
        for name in SCHEDULERS:
            candidates: dict[str, PipelineSampler] = {
                spacing: DiffusersBaseline(self.backend, name, spacing, depth, self.guidance)
                for spacing in DiffusersBaseline.spacings(self.backend)
            }
            best = next(iter(candidates)) if self.tuning is None else self.tuning.nearest(candidates)
            samplers[name] = (best, candidates[best])
        return samplers

    def own_samplers(self, depth: int) -> Scheduled:
        """Our solvers of the same names, and the learned tables, or equal points without errors to report."""
        backend, guidance, samplers = self.backend, self.guidance, Scheduled()
        for name in SCHEDULERS:
            candidates: dict[str, PipelineSampler] = {
                s: OwnSampler(sampler_of(backend, guidance, name, depth, s)) for s in schedules_of(backend)
            }
            best = backend.default_schedule if self.tuning is None else self.tuning.nearest(candidates)
            samplers[name] = (best, candidates[best])
        if self.tuning is None:
            own = backend.default_schedule
            table = OwnSampler(sampler_of(backend, guidance, "epd-start", depth, own))
            return samplers | {"epd": (own, table)}
        learned = shipped(backend, self.family, guidance, depth)
        return samplers | {k: ("learned", OwnSampler(learned[k])) for k in LEARNED if k in learned}

    def costs(self, sampler: PipelineSampler) -> dict[str, int]:
        """Network calls of an image, and its NFE: the rows of all calls, two of them one evaluation under
        CFG.
        """
        rows: list[int] = []
        networks = self.backend.networks()
        network = next(v for k, v in networks.items() if k in ("unet", "transformer"))
        hook = network.register_forward_hook(lambda module, inputs, output: rows.append(len(output[0])))
        try:
            sampler.images(evaluation_prompts(1, ALL_LABELS), [0])
        finally:
            hook.remove()
        doubled = 2 if self.guidance != 1 and self.backend.cfg_doubles_rows else 1
        return {"calls": len(rows), "evaluations": sum(rows) // doubled}
