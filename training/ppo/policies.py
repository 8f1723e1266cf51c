"""The policy of a configuration, by ppo.policy: a Dirichlet one over a table, or a Gaussian one over a
tableau.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers import Solver, SolverTable, Spec, Tableau, compile_tableau
from solvers.predictor.kinds import kind_of

from ..config import ConfigError
from ..processes import Processes
from ..start import Start
from .anchor import Anchor, LatentChange, divergence
from .base import Policy
from .config import RDPOConfig
from .gaussian import GaussianPolicy
from .policy import SCALES, PolicySettings, make_policy
from .probe import PROBES, Probe, measure_std
from .rollout import Scorer

ANCHOR_PROMPTS = 16  # training prompts on which the change of the latents is measured after each step


@dataclass(frozen=True)
class Around:
    """What a policy is made around: a start on its nodes."""

    start: Start
    nodes: Tensor

    @property
    def tableau(self) -> Tableau:
        """The start as a tableau: itself, or an EPD table compiled on its nodes."""
        solver: Solver = self.start.predictor.solver()
        return solver if isinstance(solver, Tableau) else compile_tableau(solver, self.nodes)


def dirichlet(config: RDPOConfig, around: Around) -> Policy:
    """The Dirichlet policy around the start table."""
    ppo, table = config.ppo, around.start.table
    chosen = {"scale_dir": ppo.train_scale_dir, "scale_time": ppo.train_scale_time}
    learned = [name in table.arrays() if chosen[name] is None else chosen[name] for name in SCALES]
    assert ppo.dirichlet_concentration is not None  # choose_exploration has set it
    settings = PolicySettings(
        concentration=ppo.dirichlet_concentration,
        scale_std=ppo.scale_std,
        learned_scales=tuple(name for name, is_learned in zip(SCALES, learned, strict=True) if is_learned),
        limit=ppo.max_log_change,
        residual=ppo.policy,
        seed=config.run.seed,
        frozen=tuple(ppo.frozen_levels),
    )
    return make_policy(table, settings)


def gaussian(config: RDPOConfig, around: Around) -> GaussianPolicy:
    """The Gaussian policy around the start; what it measures is in its checkpoint."""
    return GaussianPolicy(around.tableau, frozen=config.ppo.frozen_levels)


def measured_gaussian(
    config: RDPOConfig, around: Around, probe: Probe, processes: Processes
) -> GaussianPolicy:
    """A new run's Gaussian policy, with rank 0's moments and width on training prompts."""
    tableau, nodes, broadcast = around.tableau, around.nodes, processes.ranks.broadcast
    gram, frozen = broadcast(probe.moments(tableau, nodes)), config.ppo.frozen_levels
    policy = GaussianPolicy(tableau, gram=gram, frozen=frozen)
    std = config.ppo.policy_std
    measured = measure_std(policy, probe, nodes) if std is None else std
    policy.std.copy_(broadcast(torch.tensor(measured, dtype=torch.float64)))
    return policy


POLICIES: dict[str, Callable[[RDPOConfig, Around], Policy]] = {
    "table": dirichlet,
    "mlp": dirichlet,
    "gaussian": gaussian,
}


def policy_of(config: RDPOConfig, start: Start, nodes: Tensor) -> Policy:
    """The policy around the start on nodes, for parameters that a run has learned."""
    return POLICIES[config.ppo.policy](config, Around(start, nodes))


def new_policy(
    config: RDPOConfig, start: Start, train: tuple[Scorer, list[str]], processes: Processes
) -> Policy:
    """The policy of a new run.

    Args:
        config: of the run.
        start: its start table.
        train: the scorer and the prompts that it is trained with.
        processes: its ranks.
    """
    scorer, prompts = train
    if config.ppo.policy != "gaussian":
        return policy_of(config, start, scorer.nodes)
    probe = Probe(scorer.backend, prompts[:PROBES], scorer.guidance_scale, config.ppo.rollout_chunk)
    return measured_gaussian(config, Around(start, scorer.nodes), probe, processes)


def anchor_of(config: RDPOConfig, scorer: Scorer, prompts: list[str], processes: Processes) -> Anchor | None:
    """The bound of ppo.anchor; None where there is none."""
    anchor = config.ppo.anchor
    if anchor.kl is not None:
        return Anchor("kl", anchor.kl, divergence, processes)
    if anchor.latents is None:
        return None
    chunk = config.ppo.rollout_chunk
    probe = Probe(scorer.backend, prompts[:ANCHOR_PROMPTS], scorer.guidance_scale, chunk)
    change = LatentChange(probe, scorer.nodes, scorer.solver)
    return Anchor("latents", anchor.latents, change, processes)


def exported_spec(config: RDPOConfig, spec: Spec, nodes: Tensor) -> Spec:
    """The spec of the run's predictors: a tableau's on its nodes for a Gaussian policy."""
    if config.ppo.policy != "gaussian":
        return spec
    return replace(spec, solver="tableau", num_steps=len(nodes), num_points=None, afs=False, max_order=1)


def check_start(config: RDPOConfig, start: Start) -> None:
    """Refuse a start table that the policy cannot learn, and frozen levels that it does not have."""
    predictor, ppo = start.predictor, config.ppo
    is_table = isinstance(predictor.table, SolverTable)
    if not is_table and ppo.policy != "gaussian":
        raise ConfigError(
            f"data.predictor_snapshot {start.path} holds a {kind_of(predictor.table).name}, which ppo.policy"
            f" {ppo.policy} cannot learn: set ppo.policy=gaussian"
        )
    count = start.table.num_intervals if ppo.policy != "gaussian" else predictor.cost().depth
    frozen = set(ppo.frozen_levels)
    if not frozen <= set(range(count)) or len(frozen) == count:
        raise ConfigError(
            f"ppo.frozen_levels is {list(ppo.frozen_levels)}, expected some but not all of 0 to {count - 1},"
            f" the levels of {start.path}"
        )
