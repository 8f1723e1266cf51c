"""RDPO: roll out, compare siblings, update the policy, and measure its mean table on what it never sees."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from common.distributed import Ranks, StopRequested, never
from common.statistics import clustered_halfwidth
from solvers import Predictor, Spec, UserError

from ..run_folder import CheckpointTimer, RunFolder, StopRequest
from .advantages import BASELINES, normalize_advantages
from .advice import no_signal
from .config import RDPOConfig
from .loss import ppo_loss
from .policy import ResidualPolicy, TableSample
from .rollout import Plan, Scorer, evaluate_table, scores_of, stream

SKIPS = 3  # steps in a row without a finite reward that end a run


class Diverged(UserError):
    """Rewards or log probabilities that are not finite, several steps in a row."""


@dataclass
class Best:
    """The best policy so far by held-out reward, and since how many evaluations."""

    step: int = -1
    gain: float = -math.inf
    stale: int = 0
    state: dict = field(default_factory=dict)


@dataclass
class Trainer:
    """One run: the policy, what it is tried on, and where it is written."""

    config: RDPOConfig
    ranks: Ranks
    run: RunFolder
    policy: ResidualPolicy
    train: Scorer
    heldout: Scorer
    prompts: list[str]
    heldout_prompts: list[str]
    heldout_seeds: list[int]
    spec: Spec
    provenance: dict

    def __post_init__(self):
        self.optimiser = torch.optim.AdamW(
            self.policy.parameters(), lr=self.config.ppo.learning_rate, weight_decay=0.0
        )
        self.step, self.skipped, self.kl_coef = 0, 0, self.config.ppo.kl_coef
        self.best, self.base_scores = Best(), None
        self.evaluated = -1  # the last step that was evaluated
        self.stop_requested: Callable[[], bool] = never
        self.timer = CheckpointTimer(self.config.logging.save_minutes)

    # one step

    def learn(self) -> dict:
        """One step: rollout, advantages, update; what it logs. A step that is not finite is not applied, but
        recorded.
        """
        ppo, seed = self.config.ppo, self.config.run.seed
        plan = Plan.make(self.prompts, ppo, seed, self.step)
        with torch.no_grad():
            distribution = self.policy()
            draw = distribution.sample(ppo.rollout_batch_size, stream(seed, self.step, 2))
            old_log_prob = distribution.log_prob(*draw)
        scores = scores_of(
            self.train, self.policy, draw, plan, ppo.rollout_chunk, self.ranks, self.stop_requested
        )
        rewards = scores[:, 0].view(-1, ppo.rloo_k)
        self.step += 1
        if not (rewards.isfinite().all() and old_log_prob.isfinite().all()):
            return self.skip(plan, draw, rewards, old_log_prob)
        self.skipped = 0
        raw = BASELINES[ppo.baseline](rewards)
        advantages = normalize_advantages(raw, centre=ppo.baseline == "mixed").flatten()
        record = {"step": self.step, "reward": rewards.mean().item(), "reward_std": rewards.std().item()}
        record |= {
            "reward_within_std": rewards.var(1).mean().sqrt().item(),
            "reward_between_std": spread(rewards.mean(1)),
        }
        record |= {"advantage_std": raw.square().mean().sqrt().item()}  # before it is scaled
        record |= {f"head_{name}": scores[:, i].mean().item() for i, name in enumerate(self.train.names)}
        with self.train.clock.part("update"):
            record |= self.update(draw, old_log_prob, advantages)
        return record | self.describe()

    def update(self, draw: TableSample, old_log_prob: Tensor, advantages: Tensor) -> dict:
        """Epochs of minibatches of the clipped surrogate; every rank does the same, so nothing is
        exchanged.
        """
        ppo, batch, found = self.config.ppo, len(advantages), []
        order = torch.Generator().manual_seed(stream(self.config.run.seed, self.step - 1, 3))
        for epoch in range(ppo.ppo_epochs):
            shuffled = torch.randperm(batch, generator=order)
            for rows in shuffled.split(ppo.minibatch_size):
                distribution = self.policy()
                log_prob = distribution.log_prob(*draw.select(rows.tolist()))
                loss, diagnostics = ppo_loss(log_prob, old_log_prob[rows], advantages[rows], ppo.clip_range)
                if epoch == 0 and not found and abs(diagnostics["ratio"] - 1) > 1e-9:
                    raise AssertionError(f"the first ratio of a step is {diagnostics['ratio']}, not 1")
                kl, entropy = distribution.kl(self.policy.base()), distribution.entropy()
                total = loss + self.kl_coef * kl - ppo.entropy_coef * entropy
                self.optimiser.zero_grad()
                total.backward()
                norm = torch.nn.utils.clip_grad_norm_(
                    self.policy.parameters(), ppo.max_grad_norm or math.inf
                ).item()
                if not math.isfinite(norm):
                    raise Diverged(
                        f"{self.run.path}: the gradient of step {self.step} is not finite; lower"
                        " ppo.learning_rate"
                    )
                self.optimiser.step()
                parts = {
                    "policy_loss": loss.item(),
                    "loss": total.item(),
                    "kl": kl.item(),
                    "entropy": entropy.item(),
                    "grad_norm": norm,
                }
                found.append(diagnostics | parts)
        record = {name: sum(f[name] for f in found) / len(found) for name in found[0]}
        record["kl_coef"] = self.kl_coef
        if ppo.kl_target is not None:
            self.kl_coef = adapt_kl_coef(self.kl_coef, found[-1]["kl"], ppo.kl_target)
        return record

    def skip(self, plan: Plan, draw: TableSample, rewards: Tensor, log_prob: Tensor) -> dict:
        """Record a step that is not finite; too many in a row end the run."""
        self.skipped += 1
        bad = (~(rewards.flatten().isfinite() & log_prob.isfinite())).nonzero()[:, 0].tolist()
        image = bad[0]
        record = {
            "step": self.step,
            "skipped": f"rewards or log probabilities of {len(bad)} of {len(log_prob)} images are not finite",
        }
        record |= {"prompts": [plan.prompts[i] for i in bad], "seeds": [plan.seeds[i] for i in bad]}
        record |= {"positions": draw.table().r[image].tolist(), "weights": draw.weights[image].tolist()}
        if self.skipped >= SKIPS:
            self.save()
            if self.ranks.rank == 0:
                self.run.log(record)
            raise Diverged(
                f"{self.run.path}: rewards or log probabilities were not finite in {SKIPS} steps in a row"
                f" (last: step {self.step}, prompt {plan.prompts[image]!r}, seed {plan.seeds[image]}); the"
                " policy before them is saved; raise ppo.dirichlet_concentration, or check the reward"
            )
        return record

    def describe(self) -> dict:
        """Where the policy is: concentration sums and how far its mean table is from the start's."""
        with torch.no_grad():
            distribution, base = self.policy(), self.policy.base()
            now, start = distribution.mean(), base.mean()
            sums = [d.concentration.sum(-1).mean().item() for d in (distribution.pos, distribution.weight)]
        return {
            "concentration_pos": sums[0],
            "concentration_weight": sums[1],
            "drift_r": (now.r - start.r).abs().mean().item(),
            "drift_w": (now.w - start.w).abs().mean().item(),
        }

    # held-out reward

    def evaluate(self) -> dict:
        """The mean table against the start table on fixed prompts and seeds: paired gains with 95 % intervals
        over the prompts.

        With one prompt there is no interval. Where the two tables are the same, as at step 0, one is
        measured.
        """
        with torch.no_grad():
            table, start = (
                self.policy.with_fixed_scales(d.mean()) for d in (self.policy(), self.policy.base())
            )
        measure = (
            self.heldout_prompts,
            self.heldout_seeds,
            self.config.evaluation.batch,
            self.ranks,
            self.stop_requested,
        )
        if self.base_scores is None:
            self.base_scores = evaluate_table(self.heldout, start, *measure)
        same = all(torch.equal(value, table.arrays()[name]) for name, value in start.arrays().items())
        scores = self.base_scores if same else evaluate_table(self.heldout, table, *measure)
        record: dict = {"step": self.step}
        for i, name in enumerate(self.heldout.names):
            gain = scores[:, i] - self.base_scores[:, i]
            record |= {f"heldout_{name}": scores[:, i].mean().item(), f"gain_{name}": gain.mean().item()}
            half = clustered_halfwidth(gain.tolist(), self.heldout_prompts)
            record |= {} if half is None else {f"gain_{name}_halfwidth": half}
        if not all(math.isfinite(v) for v in record.values()):
            raise Diverged(
                f"{self.run.path}: a held-out reward at step {self.step} is not finite; check the reward and"
                " the start table"
            )
        trained = record[f"gain_{self.config.reward.type}"]
        if trained > self.best.gain:
            state = {k: v.detach().clone() for k, v in self.policy.state_dict().items()}
            self.best = Best(self.step, trained, 0, state)
        else:
            self.best.stale += 1
        self.evaluated = self.step
        return record | {"table": {"r": table.r.tolist(), "w": table.w.tolist()}}

    def warning(self, record: dict) -> str | None:
        """What to say when nothing has been learned for long."""
        if self.step < self.config.evaluation.warn_after:
            return None
        return no_signal(
            record, self.config.reward.type, self.step, self.config.ppo, self.policy.base().mean()
        )

    # files

    def state(self) -> dict:
        """Everything that the rest of the run depends on; all random numbers and the order of prompts follow
        from the seed and the step.
        """
        return {
            "depends_on": self.depends_on(),
            "export": self.exported(),
            "step": self.step,
            "policy": self.policy.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": asdict(self.best),
            "base_scores": self.base_scores,
            "evaluated": self.evaluated,
            "kl_coef": self.kl_coef,
            "skipped": self.skipped,
        }

    def save(self) -> None:
        """Write a checkpoint."""
        if self.ranks.rank == 0:
            self.run.save_checkpoint(self.step, self.state(), keep=3)
            self.timer.restart()

    def save_if_due(self, now: bool = False) -> None:
        """Write a checkpoint where one is due now, or by the time since the last; it changes nothing but what
        a crash costs.
        """
        if now or self.timer.due():
            self.save()

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint."""
        for name, value in self.depends_on().items():
            if state["depends_on"].get(name) != value:
                raise UserError(
                    f"{self.run.path}: its {name} changed since its checkpoint; restore it, or start a"
                    " new run"
                )
        self.policy.load_state_dict(state["policy"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.best, self.base_scores = state["step"], Best(**state["best"]), state["base_scores"]
        self.kl_coef, self.skipped = state["kl_coef"], state["skipped"]
        self.evaluated = state.get(
            "evaluated", self.step
        )  # absent from earlier checkpoints, which were written after evaluations

    def depends_on(self) -> dict:
        """What must be the same when a run goes on."""
        prompts = hashlib.sha256("\0".join([*self.prompts, "", *self.heldout_prompts]).encode()).hexdigest()
        backend = self.train.backend
        return {
            "start table": self.provenance["parent"],
            "nodes": self.train.nodes.tolist(),
            "prompts": prompts,
            "backbone": f"{backend.fingerprint()} in {backend.dtype} on {backend.device.type}",
            "rewards": json.dumps([reward.protocol() for reward in self.heldout.rewards], sort_keys=True),
        }

    def exported(self) -> dict:
        """What a predictor of this run says beside its table."""
        return {"spec": vars(self.spec), "nodes": self.train.nodes, "provenance": self.provenance}

    # the loop

    def fit(self, last_step: int, stop: StopRequest, log, say) -> bool:
        """Learn up to a step; False if asked to stop before. Evaluations fall on fixed steps.

        A step or evaluation that a stop interrupts is abandoned: the state before it is saved, and a resumed
        run does it again.
        """
        self.stop_requested = stop.any_rank
        bar = tqdm(
            total=self.config.ppo.steps,
            initial=self.step,
            desc="RDPO",
            unit="step",
            disable=self.ranks.rank > 0 or None,
        )
        with bar:
            try:
                self.learn_until(last_step, log, say, bar)
                finished = True
            except StopRequested:
                finished = False
        self.save()
        return finished

    def learn_until(self, last_step: int, log, say, bar: tqdm) -> None:
        """Steps and evaluations up to a step; StopRequested if asked to stop before."""
        settings = self.config.logging
        self.evaluate_if_due(log, say)
        self.save_if_due(now=self.step == 0)
        while self.step < last_step and not 0 < self.config.evaluation.patience <= self.best.stale:
            record = self.learn()
            if self.step % settings.log_interval == 0 or "skipped" in record:
                log(record, self.train.clock.read())
            bar.update()
            bar.set_postfix_str(
                f"reward {record.get('reward', math.nan):.4f} kl {record.get('kl', math.nan):.2f}"
            )
            self.save_if_due()
            self.evaluate_if_due(log, say)
            if self.stop_requested():
                raise StopRequested
            self.save_if_due(now=self.step % settings.save_interval == 0)

    def evaluate_if_due(self, log, say) -> None:
        """Evaluate and log where this step calls for it and has not been evaluated yet."""
        due = self.step % self.config.evaluation.interval == 0 or self.step == self.config.ppo.steps
        if not due or self.evaluated == self.step:
            return
        record = self.evaluate()
        log(record, self.train.clock.read())
        if self.step > 0 and (warning := self.warning(record)):
            say(warning)


def predictor_of(policy: ResidualPolicy, state: dict, exported: dict, found: dict) -> Predictor:
    """The mean table of a policy's state, with the scales and the solver that were rolled out; leaves the
    policy in that state.

    The empty state of a run that was stopped before its first evaluation: UserError.
    """
    if not state:
        raise UserError(
            "the run has no best policy yet: it was stopped before its first evaluation; go on with --resume"
        )
    policy.load_state_dict(state)
    with torch.no_grad():
        table = policy.with_fixed_scales(policy().mean())
    return Predictor(table, Spec(**exported["spec"]), exported["nodes"], exported["provenance"] | found)


def spread(values: Tensor) -> float:
    """Standard deviation, 0 for a single value."""
    return values.std().item() if len(values) > 1 else 0.0


def adapt_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """Twice the coefficient when KL is more than half above its target, half when it is as far below (PPO,
    section 4).
    """
    if kl > 1.5 * target:
        return max(kl_coef, 1e-4) * 2
    return kl_coef / 2 if kl < target / 1.5 else kl_coef
