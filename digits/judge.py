"""The independent judge of digit images: a small CNN trained on the real training scans, never on samples."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .data import COLOURS, DIGITS, WEIGHTS, Label

FOLDER = Path(__file__).parent / "judge"


class JudgeNet(nn.Module):
    """A CNN with 64 features and a linear head each for digit, ink colour and stroke weight."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 64)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, o) for o in widths[1:])
        self.hidden = nn.Linear(64 * 16, 64)
        heads = {"digit": len(DIGITS), "colour": len(COLOURS), "weight": len(WEIGHTS)}
        self.heads = nn.ModuleDict({name: nn.Linear(64, n) for name, n in heads.items()})

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features [n, 64] of images [n, 3, 32, 32] in [0, 1]."""
        x = images * 2 - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.silu(norm(conv(x))), 2)
        return torch.tanh(self.hidden(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        f = self.features(images)
        return {name: head(f) for name, head in self.heads.items()}


def frechet_distance(mean_a, cov_a, mean_b, cov_b) -> float:
    """Squared Frechet (Wasserstein-2) distance of two Gaussians (Heusel et al. 2017, equation 6), in
    float64.
    """
    root = sqrt_psd(cov_a)
    cross = sqrt_psd(root @ cov_b @ root)
    return ((mean_a - mean_b).square().sum() + (cov_a + cov_b - 2 * cross).diagonal().sum()).item()


def sqrt_psd(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semi-definite matrix [d, d]."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [d] and covariance [d, d] of features [n, d], in float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


@dataclass(frozen=True)
class Verdict:
    """Whether images [n] show the labels asked for: booleans [n], True where a label leaves a part open, and
    features [n, 64].
    """

    digit: torch.Tensor
    colour: torch.Tensor
    weight: torch.Tensor
    features: torch.Tensor

    @property
    def digit_and_colour(self) -> torch.Tensor:
        return self.digit & self.colour


class Judge:
    """Digit, colour and weight accuracy, and the Frechet distance of features to held-out real digits.

    The distance is given in percent of the trace of the real features' covariance; it falls with the number
    of images, so compare only figures of equal n.
    """

    def __init__(self, folder: Path = FOLDER, device: str | torch.device = "cpu"):
        state = load_file(folder / "judge.safetensors")
        self.real = {k: state.pop(k).double() for k in ("real.mean", "real.cov")}
        self.net = JudgeNet().requires_grad_(False).eval()
        self.net.load_state_dict({k: v.float() for k, v in state.items()})
        self.net.to(device)

    def __call__(self, images: torch.Tensor, labels: list[Label]) -> Verdict:
        with torch.inference_mode():
            features = torch.cat([self.net.features(chunk) for chunk in images.to(self.device).split(256)])
            read = {name: head(features).argmax(-1).cpu() for name, head in self.net.heads.items()}
        right = {}
        for name in ("digit", "colour", "weight"):
            asked = torch.tensor([vars(label)[name] for label in labels])
            right[name] = (read[name] == asked) | (asked < 0)
        return Verdict(**right, features=features.cpu())

    def frechet(self, features: torch.Tensor) -> float:
        """Frechet distance of features [n, 64] to those of held-out real digits, in percent of their
        variance.
        """
        mean, cov = moments(features)
        return (
            100
            * frechet_distance(mean, cov, self.real["real.mean"], self.real["real.cov"])
            / self.real["real.cov"].trace().item()
        )

    @property
    def device(self) -> torch.device:
        return self.net.hidden.weight.device
