"""Reward backpropagation: the rival of RDPO for rewards that have a gradient."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from solvers import sample

from ..distill.losses import checkpointed
from .rollout import RolloutPlan
from .trainer import Diverged, RDPOTrainer


class BackpropTrainer(RDPOTrainer):
    """Gradient ascent on the reward of the mean table's images, through reward, decoder, sampler and frozen
    network (DRaFT, Clark et al. 2023, arXiv 2309.17400; AlignProp, Prabhudesai et al. 2023, arXiv
    2310.03739).

    Activations of each network call, of the decoder and of the reward are computed again in the backward
    pass. A step has as many images as one of RDPO, each with a prompt and noise of its own, in minibatches of
    ppo.minibatch_size with an update each.
    """

    title = "reward backpropagation"

    def learn(self) -> dict:
        ppo = self.config.ppo
        alone = replace(ppo, rloo_k=1)
        plan = RolloutPlan.make(self.problem.prompts, alone, self.config.run.seed, self.step)
        self.step += 1
        rewards, updates, images = [], [], range(ppo.rollout_batch_size)
        for first in images[:: ppo.minibatch_size]:
            rows = slice(first, min(first + ppo.minibatch_size, len(images)))
            measure = partial(self.gradient, RolloutPlan(plan.prompts[rows], plan.seeds[rows]))
            result = self.processes.map(measure, rows.stop - first, ppo.rollout_chunk)
            if not result.isfinite().all():
                raise Diverged(
                    f"{self.run.path}: a reward at step {self.step}, or its gradient, is not finite; lower"
                    " ppo.learning_rate, or check the reward"
                )
            rewards.append(result[:, -1])
            with self.clock.part("update"):
                updates.append(self.ascend(result[:, :-1].sum(0) / len(result)))
        scores = torch.cat(rewards)
        record = {
            "step": self.step,
            "reward": scores.mean().item(),
            "reward_std": scores.std().item(),
            **{name: sum(u[name] for u in updates) / len(updates) for name in updates[0]},
            **self.policy.drift(),
        }
        return record | self.hold_anchor()

    def gradient(self, plan: RolloutPlan, rows: slice) -> Tensor:
        """Of some images: the summed gradient of their rewards, in the first row, and each image's reward
        [n, parameters + 1].
        """
        parameters = list(self.policy.parameters())
        rewards = self.rewards_of_mean(plan.prompts[rows], plan.seeds[rows])
        with self.clock.part("backward"):
            gradients = torch.autograd.grad(rewards.sum(), parameters)
        flat = torch.cat([g.flatten().cpu().double() for g in gradients])
        table = torch.zeros(len(rewards), len(flat) + 1, dtype=torch.float64)
        table[0, :-1], table[:, -1] = flat, rewards.detach().cpu().double()
        return table

    def rewards_of_mean(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Rewards [n] of the mean table's images, with their graph."""
        score = self.train
        backend, reward = score.backend, score.rewards[0]
        with torch.no_grad():
            condition = backend.encode(prompts, score.guidance_scale)
        with self.clock.part("sample"):
            x = sample(
                score.solver(self.policy.mean()),
                checkpointed(backend.velocity(condition)),
                backend.initial_latents(seeds, score.nodes[0]),
                score.nodes,
            )
        with self.clock.part("decode"):
            images = checkpoint(backend.decode, x, use_reentrant=False)
        with self.clock.part("reward"):
            parts = range(len(prompts))[:: score.reward_batch]
            return torch.cat(
                [
                    checkpoint(
                        reward.with_gradient,
                        images[i : i + score.reward_batch],
                        prompts[i : i + score.reward_batch],
                        use_reentrant=False,
                    )
                    for i in parts
                ]
            )

    def ascend(self, gradient: Tensor) -> dict[str, float]:
        """One step of the optimiser on the gradient of the mean reward; what it logs."""
        parameters = list(self.policy.parameters())
        kl = self.policy().kl(self.policy.base())
        self.optimiser.zero_grad()
        (self.kl_coef * kl).backward()
        pieces = gradient.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            ascent = -piece.view_as(parameter).to(parameter)
            parameter.grad = ascent if parameter.grad is None else parameter.grad + ascent
        norm = self.clip_gradient()
        self.optimiser.step()
        return {"kl": kl.item(), "grad_norm": norm, "kl_coef": self.kl_coef}
