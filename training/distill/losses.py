"""How far a student is from its teacher: the named terms of a distillation loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from backends import Backend
from solvers import Solver, trajectory
from solvers.solver import Velocity

from ..config import ConfigError
from .bank import rmse_per_image
from .config import LossConfig

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """Weighted terms, each image by image; states are measured in units of the teacher's RMS at their node.

    `scales` [n] are these RMS values at the student's nodes after the first (for a tableau: at the last).
    """

    config: LossConfig
    backend: Backend
    scales: Tensor
    features: Features | None = None

    def __call__(
        self, solver: Solver, nodes: Tensor, velocity: Velocity, x: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], int]:
        """The loss [B], its terms [B], and the first interval whose state is not finite (-1 if all are).

        `targets` [n, B, C, H, W] are the teacher's states at the student's nodes after the first.
        """
        terms: dict[str, Tensor] = {}
        broken = -1
        if self.config.stepwise:
            states = list(trajectory(solver, velocity, x, nodes, detach=True))
            terms["stepwise"] = self.errors(states, targets).mean(0)
            broken = first_broken(states)
        if any((self.config.trajectory, self.config.final, self.config.decoded, self.config.feature)):
            states = list(trajectory(solver, velocity, x, nodes))
            errors = self.errors(states, targets)
            if self.config.trajectory:
                terms["trajectory"] = errors.mean(0)
            if self.config.final:
                terms["final"] = errors[-1]
            terms.update(self.image_terms(states[-1], targets[-1]))
            broken = first_broken(states) if broken < 0 else broken
        weights = vars(self.config)
        total = sum(weights[name] * term for name, term in terms.items())
        return total, terms, broken

    def errors(self, states: list[Tensor], targets: Tensor) -> Tensor:
        """Normalised root mean square errors [n, B]."""
        rows = zip(states, targets, self.scales.to(targets.device), strict=True)
        return torch.stack([rmse_per_image(x, y) / scale for x, y, scale in rows])

    def image_terms(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The terms that need decoded images."""
        if not (self.config.decoded or self.config.feature):
            return {}
        image = checkpoint(self.backend.decode, x, use_reentrant=False)
        with torch.no_grad():
            teacher_image = self.backend.decode(target)
        terms = {"decoded": rmse_per_image(image, teacher_image)} if self.config.decoded else {}
        if self.config.feature and self.features is not None:
            with torch.no_grad():
                reference = self.features(teacher_image)
            features = checkpoint(self.features, image, use_reentrant=False)
            terms["feature"] = rmse_per_image(features, reference) / reference.double().square().mean().sqrt()
        return terms


def first_broken(states: list[Tensor]) -> int:
    """The first interval after which a state is not finite, or -1."""
    finite = torch.stack([state.detach().isfinite().all() for state in states]).tolist()
    return -1 if all(finite) else finite.index(False)


def checkpointed(velocity: Velocity) -> Velocity:
    """The same velocity, whose activations are computed again in the backward pass (Chen et al. 2016)."""
    return lambda x, sigma: checkpoint(velocity, x, sigma, use_reentrant=False)


def point_by_point(velocity: Velocity, images: int) -> Velocity:
    """The same velocity in a network call for each point of a level, for memory."""

    def calls(x: Tensor, sigma: Tensor) -> Tensor:
        parts = zip(x.split(images), sigma.expand(len(x)).split(images), strict=True)
        return torch.cat([velocity(*part) for part in parts])

    return calls


def load_features(name: str, device: torch.device) -> Features:
    """A frozen vision network by folder or hub id, as a differentiable function of images [B, 3, H, W] in [0,
    1].

    CLIP's image embedding where the network has one, else the pooled output. "judge" is the digits judge's
    features.
    """
    if name == "judge":
        from digits.judge import Judge

        return Judge(device=device).net.features
    from transformers import AutoImageProcessor, AutoModel

    try:
        model, info = AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError("weights are missing from its files")
    except Exception as error:  # what the libraries raise for a broken file has no common type
        raise ConfigError(
            f"loss.feature_network {name!r}: cannot be loaded ({' '.join(str(error).split())[:160]})"
        ) from error
    model = model.requires_grad_(False).eval().to(device)
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    side = size.get("height") or size["shortest_edge"]
    mean, std = (
        torch.tensor(v, device=device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std)
    )

    def features(images: Tensor) -> Tensor:
        resized = torch.nn.functional.interpolate(
            images, (side, side), mode="bicubic", antialias=True, align_corners=False
        )
        pixels = (resized - mean) / std
        if model.config.model_type == "clip":
            return model.get_image_features(pixel_values=pixels).pooler_output
        return model(pixel_values=pixels).pooler_output

    return features
