"""RDPO: roll out tables, compare siblings, update the policy by PPO, measure its mean table on held-out
prompts.
"""

import hashlib
import json
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from common.statistics import clustered_halfwidth
from generation.output import make_grid, save_png
from solvers import SolverTable, Tableau, UserError

from ..processes import Processes
from ..run_folder import RunFolder
from ..trainer import Intervals, Trainer
from .advice import no_signal
from .base import Draw, Policy, same_numbers
from .config import RDPOConfig
from .loss import BASELINES, adapt_kl_coef, normalize_advantages, ppo_loss
from .rollout import Problem, RolloutPlan, rollout_scores, stream

SKIPS = 3  # steps in a row without a finite reward that end a run


class Diverged(UserError):
    """Rewards or log probabilities that are not finite, several steps in a row."""


class RDPOTrainer(Trainer):
    """An RDPO run."""

    title, module_key = "RDPO", "policy"
    measure, higher_is_better = "gain", True
    kept_checkpoints = 3
    config: RDPOConfig
    free_settings = frozenset(
        {
            "data",  # the content of its files counts
            "logging",
            "model.backend_options.model_name_or_path",  # its weights count
            "ppo.steps",
            "run.output_root",
            "run.run_name",
        }
    )

    def __init__(
        self,
        config: RDPOConfig,
        policy: Policy,
        problem: Problem,
        run: RunFolder,
        processes: Processes,
    ):
        self.config, self.policy, self.problem = config, policy, problem
        self.train, self.heldout = problem.train, problem.heldout
        self.skipped, self.kl_coef = 0, config.ppo.kl_coef
        self.base_scores: Tensor | None = None
        assert config.ppo.learning_rate is not None  # choose_exploration has set it
        optimiser = torch.optim.AdamW(policy.parameters(), lr=config.ppo.learning_rate, weight_decay=0.0)
        super().__init__(run, processes, policy, optimiser, intervals_of(config))
        self.clock = problem.train.clock

    # one step

    def learn(self) -> dict:
        """One step: rollout, advantages, update; what it logs. A step that is not finite is not applied, but
        recorded.
        """
        ppo, seed = self.config.ppo, self.config.run.seed
        plan = RolloutPlan.make(self.problem.prompts, ppo, seed, self.step)
        with torch.no_grad():
            distribution = self.policy()
            draw = distribution.sample(ppo.rollout_batch_size, stream(seed, self.step, 2))
            old_log_prob = distribution.log_prob(*draw)
        scores = rollout_scores(
            self.train,
            lambda part: self.policy.learned(draw.select(part)),
            plan,
            ppo.rollout_chunk,
            self.processes,
        )
        rewards = scores[:, 0].view(-1, ppo.rloo_k)
        self.step += 1
        if not (rewards.isfinite().all() and old_log_prob.isfinite().all()):
            return self.skip(plan, draw, rewards, old_log_prob)
        self.skipped = 0
        raw = BASELINES[ppo.baseline](rewards)
        advantages = normalize_advantages(raw, centre=ppo.baseline == "mixed").flatten()
        with self.clock.part("update"):
            update = self.update(draw, old_log_prob, advantages)
        update |= self.hold_anchor()
        return {
            "step": self.step,
            "reward": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "reward_within_std": rewards.var(1).mean().sqrt().item(),
            "reward_between_std": spread(rewards.mean(1)),
            "advantage_std": raw.square().mean().sqrt().item(),  # before it is scaled
            **{f"head_{name}": scores[:, i].mean().item() for i, name in enumerate(self.train.names)},
            **update,
            **self.policy.drift(),
        }

    def update(self, draw: Draw, old_log_prob: Tensor, advantages: Tensor) -> dict:
        """Epochs of minibatches of the clipped surrogate; every rank does the same, so nothing is
        exchanged.
        """
        ppo, batch = self.config.ppo, len(advantages)
        parts: list[dict] = []
        order = torch.Generator().manual_seed(stream(self.config.run.seed, self.step - 1, 3))
        for _ in range(ppo.ppo_epochs):
            for rows in torch.randperm(batch, generator=order).split(ppo.minibatch_size):
                distribution = self.policy()
                log_prob = distribution.log_prob(*draw.select(rows.tolist()))
                loss, diagnostics = ppo_loss(log_prob, old_log_prob[rows], advantages[rows], ppo.clip_range)
                if not parts and abs(diagnostics["ratio"] - 1) > 1e-9:
                    raise AssertionError(f"the first ratio of a step is {diagnostics['ratio']}, not 1")
                kl, entropy = distribution.kl(self.policy.base()), distribution.entropy()
                total = loss + self.kl_coef * kl - ppo.entropy_coef * entropy
                self.optimiser.zero_grad()
                total.backward()
                terms = {
                    "policy_loss": loss.item(),
                    "loss": total.item(),
                    "kl": kl.item(),
                    "entropy": entropy.item(),
                    "grad_norm": self.clip_gradient(),
                }
                self.optimiser.step()
                parts.append(diagnostics | terms)
        record = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        record["kl_coef"] = self.kl_coef
        if ppo.kl_target is not None:
            self.kl_coef = adapt_kl_coef(self.kl_coef, parts[-1]["kl"], ppo.kl_target)
        return record

    def hold_anchor(self) -> dict[str, float]:
        """Bring the policy back inside its bound, where it has one; how far it is from its start."""
        anchor = self.problem.anchor
        if anchor is None:
            return {}
        with self.clock.part("anchor"):
            return {f"anchor_{anchor.name}": anchor.hold(self.policy)}

    def clip_gradient(self) -> float:
        """Clip the gradient of all parameters together; its norm before. Not finite: Diverged."""
        limit = self.config.ppo.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit).item()
        if not math.isfinite(norm):
            raise Diverged(
                f"{self.run.path}: the gradient of step {self.step} is not finite; lower ppo.learning_rate"
            )
        return norm

    def skip(self, plan: RolloutPlan, draw: Draw, rewards: Tensor, log_prob: Tensor) -> dict:
        """Record a step that is not finite; too many in a row end the run."""
        self.skipped += 1
        bad = (~(rewards.flatten().isfinite() & log_prob.isfinite())).nonzero()[:, 0].tolist()
        image = bad[0]
        record = {
            "step": self.step,
            "skipped": f"rewards or log probabilities of {len(bad)} of {len(log_prob)} images are not finite",
            "prompts": [plan.prompts[i] for i in bad],
            "seeds": [plan.seeds[i] for i in bad],
            **self.policy.drawn_numbers(draw, image),
        }
        if self.skipped >= SKIPS:
            self.save()
            if self.processes.first:
                self.run.log(record)
            raise Diverged(
                f"{self.run.path}: rewards or log probabilities were not finite in {SKIPS} steps in a row"
                f" (last: step {self.step}, prompt {plan.prompts[image]!r}, seed {plan.seeds[image]});"
                f" the policy before them is saved; {self.policy.narrower}, or check the reward"
            )
        return record

    # held-out reward

    @property
    def trained_name(self) -> str:
        """The reward that is trained on, as records have it."""
        return self.train.rewards[0].name

    @property
    def selected_by(self) -> str:
        """The reward by whose gain the best policy is chosen, as records have it."""
        evaluation, rewards = self.config.evaluation, self.heldout.score.rewards
        if evaluation.select_by not in evaluation.rewards:
            return self.trained_name
        return rewards[1 + evaluation.rewards.index(evaluation.select_by)].name

    def evaluate(self) -> dict:
        """The mean table against the start table on fixed prompts and seeds: paired gains with 95 % intervals
        over the prompts.

        With one prompt there is no interval. Where the two tables are the same, as at step 0, one is
        measured.
        """
        with torch.no_grad():
            table, start = self.policy.mean(), self.policy.start_mean()
        if self.base_scores is None:
            self.base_scores = self.heldout.scores(start, self.processes)
        same = same_numbers(table, start)
        scores = self.base_scores if same else self.heldout.scores(table, self.processes)
        record = {"step": self.step, **self.gains(scores, self.base_scores)}
        if not all(math.isfinite(v) for v in record.values()):
            raise Diverged(
                f"{self.run.path}: a held-out reward at step {self.step} is not finite; check the reward and"
                " the start table"
            )
        self.compare_with_best(record[f"gain_{self.selected_by}"])
        self.save_images(table)
        return {**record, "table": self.policy.describe(table)}

    def save_images(self, table: SolverTable | Tableau) -> None:
        """Write the validation images of this step side by side: the first held-out prompts and seeds."""
        count = min(self.config.logging.validation_images, len(self.heldout.seeds))
        if count and self.processes.first:
            images = self.heldout.images(table, count)
            save_png(make_grid(images.cpu(), count), self.run.validation(self.step))

    def gains(self, scores: Tensor, base_scores: Tensor) -> dict[str, float]:
        """Mean held-out scores and paired gains, reward by reward."""
        record: dict[str, float] = {}
        for i, name in enumerate(self.heldout.score.names):
            gain = scores[:, i] - base_scores[:, i]
            record[f"heldout_{name}"] = scores[:, i].mean().item()
            record[f"gain_{name}"] = gain.mean().item()
            half = clustered_halfwidth(gain.tolist(), self.heldout.prompts)
            if half is not None:
                record[f"gain_{name}_halfwidth"] = half
        return record

    def warning(self, record: dict) -> str | None:
        if self.step < self.config.evaluation.warn_after:
            return None
        return no_signal(record, self.trained_name, self.step, self.config.ppo, self.problem.from_start)

    def progress(self, record: dict) -> str | None:
        if "table" in record:
            return None
        return f"reward {record.get('reward', math.nan):.4f} kl {record.get('kl', math.nan):.2f}"

    # files

    def state(self) -> dict:
        return {
            **super().state(),
            "export": self.exported(),
            "base_scores": self.base_scores,
            "kl_coef": self.kl_coef,
            "skipped": self.skipped,
        }

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.base_scores, self.kl_coef, self.skipped = (
            state[name] for name in ("base_scores", "kl_coef", "skipped")
        )

    def depends_on(self) -> dict[str, Any]:
        train, heldout = self.problem.prompts, self.heldout.prompts
        backend = self.train.backend
        return {
            "start table": self.problem.provenance["parent"],
            "nodes": self.train.nodes.tolist(),
            "prompts": hashlib.sha256("\0".join([*train, "", *heldout]).encode()).hexdigest(),
            "backbone": f"{backend.fingerprint()} in {backend.dtype} on {backend.device.type}",
            "rewards": json.dumps([r.protocol() for r in self.heldout.score.rewards], sort_keys=True),
        }

    def exported(self) -> dict:
        """What a predictor of this run holds beside its table."""
        problem = self.problem
        provenance = problem.provenance | self.policy.provenance()
        return {"spec": asdict(problem.spec), "nodes": self.train.nodes, "provenance": provenance}


def intervals_of(config: RDPOConfig) -> Intervals:
    """When a run of a configuration evaluates, writes and ends."""
    return Intervals(
        steps=config.ppo.steps,
        evaluation=config.evaluation.interval,
        checkpoint=config.logging.save_interval,
        checkpoint_minutes=config.logging.save_minutes,
        patience=config.evaluation.patience,
        log=config.logging.log_interval,
    )


def spread(values: Tensor) -> float:
    """Standard deviation, 0 for a single value."""
    return values.std().item() if len(values) > 1 else 0.0
