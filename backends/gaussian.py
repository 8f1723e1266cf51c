"""A backbone whose velocity is known exactly: a Gaussian mixture in latent space."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from solvers import NoiseSchedule
from solvers.solver import Velocity

from .base import Backend
from .conditioning import Condition, apply_cfg, repeat_condition
from .family import Family

SHAPE = (4, 8, 8)
COMPONENTS, STD, SEED = 4, 0.3, 20251222


class GaussianMixture(Backend):
    """The ODE of a mixture of isotropic Gaussians (Karras et al. 2022, appendix B.3) with SD1.5's noise
    levels.

    A prompt makes one component, chosen by its checksum, e^3 times as likely as the others, which is what
    guidance acts on.
    """

    name = "gaussian"
    dtype = torch.float64

    def __init__(self, device: torch.device):
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(SEED)
        self.means = torch.randn(COMPONENTS, *SHAPE, generator=generator, dtype=torch.float64).to(self.device)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.noise_schedule = NoiseSchedule((1 - betas).cumprod(0))
        self.sigma_min, self.sigma_max = self.noise_schedule.sigma_min, self.noise_schedule.sigma_max
        self.latent_shape = SHAPE

    def identity(self) -> str:
        return f"gaussian mixture {SEED}"

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Condition:
        chosen = [zlib.crc32(p.encode()) % COMPONENTS for p in prompts]
        logits = 3 * torch.eye(COMPONENTS, dtype=torch.float64, device=self.device)[chosen]
        negative = None if guidance_scale == 1 else {"logits": torch.zeros_like(logits[:1])}
        return Condition({"logits": logits}, negative, guidance_scale)

    def velocity(self, condition: Condition) -> Velocity:
        batches: dict[int, dict[str, Tensor]] = {}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            logits = repeat_condition(condition, len(x), batches)["logits"]
            branches = len(logits) // len(x)
            sigma = sigma.double().to(x.device).expand(len(x)).repeat(branches)
            return apply_cfg(self._eps(x.double().repeat(branches, 1, 1, 1), sigma, logits), condition)

        return velocity

    def _eps(self, x: Tensor, sigma: Tensor, logits: Tensor) -> Tensor:
        """E[eps | x] = sigma / (STD^2 + sigma^2) sum_k w_k (x - mean_k): -sigma times the score."""
        variance = STD**2 + sigma.view(-1, 1) ** 2
        gap = x.flatten(1)[:, None] - self.means.flatten(1)
        weights = (logits - gap.square().sum(-1) / (2 * variance)).softmax(-1)
        eps = sigma.view(-1, 1) / variance * (weights[..., None] * gap).sum(1)
        return eps.view_as(x)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents[:, :3].float() / 4 + 0.5).clamp(0, 1)


def load(config: dict, device: torch.device, dtype: torch.dtype, name: str) -> GaussianMixture:
    """The mixture on a device; it has no weights."""
    return GaussianMixture(device)


FAMILY = Family("gaussian", GaussianMixture, load, {}, fixed_dtype=torch.float64)
