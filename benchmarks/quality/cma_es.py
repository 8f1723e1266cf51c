"""CMA-ES on a solver table, with as many images as RDPO has: the baseline of the RDPO benchmark."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from backends import load_backend
from rewards import load_reward
from solvers import Predictor, SolverTable
from training.config import load_config
from training.ppo.config import RDPOConfig
from training.ppo.rollout import RolloutPlan, Scorer
from training.ppo.setup import find_start, merge_spec, prompts_of

POPULATION = 16


@dataclass(frozen=True)
class Logits:
    """Tables as points of a vector space: logarithms of the gaps between positions, then of the weights."""

    table: SolverTable

    @property
    def origin(self) -> list[float]:
        """The table's own point."""
        parts = self.table.gaps(), self.table.w
        return torch.cat([part.clamp(min=1e-6).log().flatten() for part in parts]).tolist()

    def tables(self, points: list[np.ndarray]) -> SolverTable:
        """The tables [P, N, K] of P points."""
        rows, (intervals, k) = torch.from_numpy(np.stack(points)), self.table.r.shape
        gaps, weights = rows.split([intervals * (k + 1), intervals * k], -1)
        arrays = self.table.arrays()
        scales = {name: v.expand(len(rows), *v.shape) for name, v in arrays.items() if name not in ("r", "w")}
        gaps, weights = gaps.view(-1, intervals, k + 1), weights.view(-1, intervals, k)
        return SolverTable.from_gaps(gaps.softmax(-1), weights.softmax(-1), **scales)


def rows_of(table: SolverTable, change) -> SolverTable:
    """A table of which each tensor is changed alike."""
    return SolverTable(**{name: change(tensor) for name, tensor in table.arrays().items()})


def cma_es(path: Path, start: Path, seed: int, spread: float) -> Predictor:
    """CMA-ES (Hansen 2016, arXiv 1604.00772) from a start table, with the images that RDPO has by the
    configuration `path`.

    Each generation tries 16 tables on the same pairs of prompt and noise, at first with standard deviation
    `spread`; it has the images of RDPO's rollouts and of its evaluations, and ends with the mean of its
    distribution.
    """
    import cma

    config = load_config(RDPOConfig, path, [f"data.predictor_snapshot={start}"])
    table_start = find_start(config)
    predictor = table_start.predictor
    spec, ppo = predictor.spec, config.ppo
    backend, reward = load_backend(merge_spec(config, table_start), "cpu"), load_reward("digits", {}, "cpu")
    score = Scorer(backend, predictor.sigmas, spec.guidance_rate, spec.afs, spec.max_order, [reward])
    logits, prompts = Logits(table_start.table), prompts_of(config, "digits")[0]
    strategy = cma.CMAEvolutionStrategy(
        logits.origin, spread, {"popsize": POPULATION, "seed": seed + 1, "verbose": -9}
    )
    evaluations = (ppo.steps // config.evaluation.interval + 1) * config.evaluation.images
    for step in tqdm(
        range(ppo.steps + evaluations // ppo.rollout_batch_size),
        desc=f"CMA-ES, spread {spread:g}",
        disable=None,
    ):
        points = strategy.ask()
        rewards = scores_of_points(
            score, logits.tables(points), RolloutPlan.make(prompts, ppo, seed, step), ppo.rloo_k
        )
        strategy.tell(points, (-rewards).tolist())
    best = logits.tables([np.asarray(strategy.result.xfavorite)])
    return Predictor(rows_of(best, lambda tensor: tensor[0]), spec, predictor.sigmas)


def scores_of_points(score: Scorer, tried: SolverTable, plan: RolloutPlan, k: int) -> Tensor:
    """The mean reward of each table [P] on as many pairs of the plan, the same for all, as make the plan's
    number of images.
    """
    pairs = len(plan.seeds) // POPULATION
    chosen = [i * k for i in range(pairs)]
    prompts, seeds = [plan.prompts[i] for i in chosen], [plan.seeds[i] for i in chosen]
    each = rows_of(tried, lambda tensor: tensor.repeat_interleave(pairs, 0))
    return score(each, prompts * POPULATION, seeds * POPULATION)[:, 0].view(POPULATION, pairs).mean(1)
