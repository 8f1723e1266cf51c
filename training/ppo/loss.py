"""The PPO update of RDPO: leave-one-out advantages and the clipped surrogate."""

import torch
from torch import Tensor


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Leave-one-out advantages (RLOO, Ahmadian et al. 2024, arXiv 2402.14740): each reward [P, k] less the
    mean of the other k - 1 of the same group; k = 1: the reward itself.
    """
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


BASELINES = {"prompt": rloo_advantages, "mixed": mixed_advantages}  # by ppo.baseline


def normalize_advantages(advantages: Tensor, centre: bool) -> Tensor:
    """Advantages over their standard deviation, of the whole step over all ranks; all 0 where they do not
    differ.

    Leave-one-out advantages of groups have mean 0 already; `centre` subtracts it all the same (published).
    """
    if centre:
        advantages = advantages - advantages.mean()
    scale = advantages.square().mean().sqrt()
    return advantages / scale if scale > 1e-12 else torch.zeros_like(advantages)


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, float]]:
    """The clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347, equation 7), in float64: mean
    max(-A ratio, -A clip(ratio, 1 - c, 1 + c)).

    Args:
        log_prob: [B], of the policy that is updated.
        old_log_prob: [B], of the policy that was rolled out.
        advantages: [B].
        clip_range: c.

    Returns:
        The loss, and its diagnostics: the mean ratio, approx_kl (the k3 estimator mean(ratio - 1 - log
        ratio)) and clipfrac, the share of ratios outside the clip range.
    """
    log_ratio = log_prob.double() - old_log_prob.double()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    with torch.no_grad():
        diagnostics = {
            "ratio": ratio.mean().item(),
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            "clipfrac": ((ratio - 1).abs() > clip_range).double().mean().item(),
        }
    return loss, diagnostics


def adapt_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """Twice the coefficient when KL is more than half above its target, half when it is as far below (PPO,
    section 4).
    """
    if kl > 1.5 * target:
        return max(kl_coef, 1e-4) * 2
    return kl_coef / 2 if kl < target / 1.5 else kl_coef
