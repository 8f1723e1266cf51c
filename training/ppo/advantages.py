"""Advantages with leave-one-out baselines (RLOO, Ahmadian et al. 2024, arXiv 2402.14740)."""

import torch
from torch import Tensor


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Each reward [P, k] less the mean of the other k - 1 of the same group; k = 1: the reward itself."""
    k = rewards.shape[-1]
    if k == 1:
        return rewards.clone()
    return (rewards * k - rewards.sum(-1, keepdim=True)) / (k - 1)


def mixed_advantages(rewards: Tensor) -> Tensor:
    """The published estimator: rewards [P, k] read group after group into k rows, leave-one-out down each
    column.

    A column mixes prompts, so that a prompt's difficulty is part of the noise.
    """
    groups, k = rewards.shape
    return rloo_advantages(rewards.reshape(k, groups).T).T.reshape(groups, k)


BASELINES = {"prompt": rloo_advantages, "mixed": mixed_advantages}


def normalize_advantages(advantages: Tensor, centre: bool) -> Tensor:
    """Advantages over their standard deviation, of the whole step over all ranks; all 0 where they do not
    differ.

    Leave-one-out advantages of groups have mean 0 already; `centre` subtracts it all the same (published).
    """
    if centre:
        advantages = advantages - advantages.mean()
    scale = advantages.square().mean().sqrt()
    return advantages / scale if scale > 1e-12 else torch.zeros_like(advantages)
