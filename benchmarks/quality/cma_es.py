"""CMA-ES on a solver table, with as many images as RDPO has: the baseline of the RDPO benchmark."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from backends import load_backend
from common.distributed import Ranks
from rewards import load_reward
from solvers import Predictor, SolverTable, Spec, Tableau
from training.config import load_config
from training.ppo.config import RDPOConfig
from training.ppo.gaussian import GaussianPolicy
from training.ppo.policies import exported_spec, new_policy
from training.ppo.rollout import RolloutPlan, Scorer
from training.ppo.setup import choose_exploration, find_start, merge_spec, prompts_of
from training.processes import Processes

POPULATION = 16


class Coordinates(Protocol):
    """Tables as points of a vector space."""

    @property
    def origin(self) -> list[float]:
        """The start's own point."""

    def tables(self, points: Tensor) -> SolverTable | Tableau:
        """The tables of points [..., dim]."""


@dataclass(frozen=True)
class Logits:
    """Logarithms of the gaps between a table's positions, then of its weights."""

    table: SolverTable

    @property
    def origin(self) -> list[float]:
        """The table's own point."""
        parts = self.table.gaps(), self.table.w
        return torch.cat([part.clamp(min=1e-6).log().flatten() for part in parts]).tolist()

    def tables(self, points: Tensor) -> SolverTable:
        """The tables [..., N, K] of points [..., dim]."""
        images, (intervals, k) = points.shape[:-1], self.table.r.shape
        gaps, weights = points.split([intervals * (k + 1), intervals * k], -1)
        arrays = self.table.arrays()
        scales = {n: v.expand(*images, *v.shape) for n, v in arrays.items() if n not in ("r", "w")}
        gaps, weights = gaps.view(*images, intervals, k + 1), weights.view(*images, intervals, k)
        return SolverTable.from_gaps(gaps.softmax(-1), weights.softmax(-1), **scales)


@dataclass(frozen=True)
class TableauCoordinates:
    """The coordinates of RDPO's Gaussian policy, in its own standard deviations."""

    policy: GaussianPolicy

    @property
    def origin(self) -> list[float]:
        """The start tableau's own point."""
        return [0.0] * len(self.policy.loc)

    def tables(self, points: Tensor) -> Tableau:
        """The tableaus of points [..., dim]."""
        return self.policy.tableau(points)


@dataclass(frozen=True)
class Search:
    """CMA-ES (Hansen 2016, arXiv 1604.00772) from a start table.

    Each generation tries 16 tables on the same pairs of prompt and noise, as many as make the images of a
    step of RDPO. With ppo.policy: gaussian it searches that policy's coordinates.
    """

    config: RDPOConfig
    score: Scorer
    prompts: list[str]
    coordinates: Coordinates
    strategy: Any
    spec: Spec

    @classmethod
    def make(cls, config: RDPOConfig, seed: int, spread: float) -> "Search":
        """A search whose first tables have the standard deviation `spread`."""
        import cma

        start = find_start(config)
        choose_exploration(config.ppo, start.predictor.is_start)
        spec, nodes = merge_spec(config, start), start.predictor.sigmas
        backend, reward = load_backend(spec, "cpu"), load_reward("digits", {}, "cpu")
        score = Scorer(backend, nodes, spec.guidance_rate, spec.afs, spec.max_order, [reward])
        prompts = prompts_of(config, "digits")[0]
        coordinates: Coordinates
        if config.ppo.policy == "gaussian":
            processes = Processes(Ranks(0, 1, torch.device("cpu")))
            policy = new_policy(config, start, (score, prompts), processes)
            assert isinstance(policy, GaussianPolicy)
            coordinates = TableauCoordinates(policy)
        else:
            coordinates = Logits(start.table)
        options = {"popsize": POPULATION, "seed": seed + 1, "verbose": -9}
        strategy = cma.CMAEvolutionStrategy(coordinates.origin, spread, options)
        return cls(config, score, prompts, coordinates, strategy, exported_spec(config, spec, nodes))

    def generation(self, seed: int, number: int) -> None:
        """One generation, on the prompts and noise of RDPO's step of that number."""
        points, ppo = self.strategy.ask(), self.config.ppo
        plan = RolloutPlan.make(self.prompts, ppo, seed, number)
        tried = torch.from_numpy(np.stack(points))
        rewards = scores_of_points(self.score, self.coordinates, tried, plan, ppo.rloo_k)
        self.strategy.tell(points, (-rewards).tolist())

    def mean(self) -> Predictor:
        """The table at the mean of the search's distribution."""
        table = self.coordinates.tables(torch.from_numpy(np.asarray(self.strategy.result.xfavorite)))
        return Predictor(table, self.spec, self.score.nodes)


def cma_es(path: Path, start: Path, seed: int, spread: float, overrides: tuple[str, ...] = ()) -> Predictor:
    """The table of CMA-ES with the images of RDPO's rollouts and of its evaluations by the configuration
    `path`.
    """
    config = load_config(RDPOConfig, path, [f"data.predictor_snapshot={start}", *overrides])
    search, ppo = Search.make(config, seed, spread), config.ppo
    evaluations = (ppo.steps // config.evaluation.interval + 1) * config.evaluation.images
    generations = range(ppo.steps + evaluations // ppo.rollout_batch_size)
    for number in tqdm(generations, desc=f"CMA-ES, spread {spread:g}", disable=None):
        search.generation(seed, number)
    return search.mean()


def scores_of_points(
    score: Scorer, coordinates: Coordinates, points: Tensor, plan: RolloutPlan, k: int
) -> Tensor:
    """The mean reward [P] of the table of each point [P, dim] on as many pairs of the plan, the same for all,
    as make the plan's number of images.
    """
    pairs = len(plan.seeds) // len(points)
    chosen = [i * k for i in range(pairs)]
    prompts, seeds = [plan.prompts[i] for i in chosen], [plan.seeds[i] for i in chosen]
    each = coordinates.tables(points.repeat_interleave(pairs, 0))
    scores = score(each, prompts * len(points), seeds * len(points))[:, 0]
    return scores.view(len(points), pairs).mean(1)
