"""Rollouts: groups of siblings that share a prompt, each with a table of its own, from noise to reward."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backends import Backend
from backends.parallel import ParallelEvaluator
from rewards import Reward
from solvers import EPD, Solver, SolverTable, Spec, sample

from ..clock import Clock
from ..processes import Processes
from .anchor import Anchor
from .config import PPOConfig

# training noise has seeds from here to 2^32, evaluation noise below; generators distinguish no more than 2^32
SEEDS = 2**31


@dataclass(frozen=True)
class Scorer:
    """From prompts, seeds and one table an image to scores: the very solver that is exported, points in
    parallel.
    """

    backend: Backend
    nodes: Tensor
    guidance_scale: float
    afs: bool
    max_order: int
    rewards: list[Reward]
    reward_batch: int = 64
    clock: Clock = field(default_factory=Clock)
    points: ParallelEvaluator = field(default_factory=ParallelEvaluator)
    """How many rows a network call may have; fewer once memory ended."""

    def solver(self, learned: SolverTable | Solver) -> Solver:
        """The solver that samples with a table."""
        return learned if isinstance(learned, Solver) else EPD(learned, self.afs, self.max_order)

    def __call__(self, learned: SolverTable | Solver, prompts: list[str], seeds: list[int]) -> Tensor:
        """Scores [B, names] in float64, of an EPD table or any other solver, one in all or one an image."""
        solver, part = self.solver(learned), self.clock.part
        with torch.inference_mode():
            with part("encode"):
                velocity = self.points.velocity(
                    self.backend, self.backend.encode(prompts, self.guidance_scale)
                )
            with part("sample"):
                x = sample(
                    solver,
                    velocity,
                    self.backend.initial_latents(seeds, self.nodes[0]),
                    self.nodes,
                )
            with part("decode"):
                images = self.backend.decode(x)
            with part("reward"):
                return torch.cat([self.scores(reward, images, prompts) for reward in self.rewards], -1)

    def scores(self, reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
        """A reward's score and, where it is a sum of several, each head's: [B, 1 or more], a few images at a
        time.
        """
        rows = []
        for i in range(0, len(images), self.reward_batch):
            heads = reward.heads(images[i : i + self.reward_batch], prompts[i : i + self.reward_batch])
            parts = [reward.combine(heads), *(heads[name] for name in reward.parts)]
            rows.append(torch.stack([part.cpu().double() for part in parts], -1))
        return torch.cat(rows)

    @property
    def names(self) -> list[str]:
        """What the columns of scores are."""
        return [name for r in self.rewards for name in (r.name, *(f"{r.name}_{part}" for part in r.parts))]


@dataclass(frozen=True)
class RolloutPlan:
    """The images of a step: the prompt and the noise seed of each, group after group."""

    prompts: list[str]
    seeds: list[int]

    @classmethod
    def make(cls, prompts: list[str], config: PPOConfig, seed: int, step: int) -> "RolloutPlan":
        """Prompts in a new order each epoch; both follow from the seed and the step alone."""
        groups, k = config.rollout_batch_size // config.rloo_k, config.rloo_k
        chosen = []
        for position in range(step * groups, (step + 1) * groups):
            order = torch.randperm(
                len(prompts),
                generator=torch.Generator().manual_seed(stream(seed, position // len(prompts), 0)),
            )
            chosen += [prompts[int(order[position % len(prompts)])]] * k
        drawn = torch.randint(
            SEEDS, (groups, k), generator=torch.Generator().manual_seed(stream(seed, step, 1))
        )
        if config.group_noise == "shared":
            drawn = drawn[:, :1].expand(groups, k)
        return cls(chosen, (drawn + SEEDS).flatten().tolist())


def stream(seed: int, step: int, purpose: int) -> int:
    """A seed of its own for each purpose (0 prompts, 1 noise, 2 tables, 3 minibatches) and step of a run."""
    return (seed * 1_000_003 + step) * 4 + purpose


def rollout_scores(
    score: Scorer,
    table_of: Callable[[slice], SolverTable | Solver],
    plan: RolloutPlan,
    chunk: int,
    processes: Processes,
) -> Tensor:
    """Scores [B, rewards] of all images of a step.

    Args:
        score: from prompts, seeds and tables to scores.
        table_of: the tables [b, N, K], or the tableaus, of some images.
        plan: the prompts and seeds of the images.
        chunk: images at a time on a rank.
        processes: the ranks, which take chunks in turn.
    """

    def measure(part: slice) -> Tensor:
        return score(table_of(part), plan.prompts[part], plan.seeds[part])

    return processes.map(measure, len(plan.seeds), chunk)


@dataclass
class HeldOut:
    """Prompts and seeds that are never trained on, and what is measured on them."""

    score: Scorer
    prompts: list[str]
    seeds: list[int]
    batch: int = 64

    def scores(self, table: SolverTable | Solver, processes: Processes) -> Tensor:
        """Scores [n, rewards] of one table; the ranks take batches in turn."""
        return processes.map(
            lambda part: self.score(table, self.prompts[part], self.seeds[part]), len(self.seeds), self.batch
        )


@dataclass
class Problem:
    """What a policy learns from and is measured on."""

    train: Scorer
    prompts: list[str]
    heldout: HeldOut
    spec: Spec
    """Of the predictors that are exported."""
    provenance: dict
    from_start: bool = False
    """Whether nothing was learned yet in the table that the policy is centred on."""
    anchor: Anchor | None = None
    """How far the policy may move from it."""
