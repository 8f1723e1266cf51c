"""The clipped surrogate of proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347),
equation 7.
"""

import torch
from torch import Tensor


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, float]]:
    """mean max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) of log probabilities and advantages [B], in float64;
    its diagnostics.

    approx_kl is the k3 estimator mean(ratio - 1 - log ratio); clipfrac the share of ratios outside the clip
    range.
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
