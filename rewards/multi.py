"""A weighted sum of rewards, each brought to a common scale first."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from common.plugins import is_code

from .base import Reward, RewardError
from .registry import NAMES, check_reward, choice, load_reward

HEADS = tuple(name for name in NAMES if name not in ("judge", "multi"))
PUBLISHED = {  # lowest and highest score
    "hps": (0.0, 1.0),
    "pickscore": (0.0, 26.0),
    "imagereward": (-3.1000185, 6.8999815),  # of the standard score; published as 0 to 10 of it plus 3 std
    "clip": (0.0, 1.0),
    "aesthetic": (0.0, 10.0),
}
STANDARD = {"imagereward": (0.0, 1.0)}  # mean and standard deviation; the other heads' depend on the images
CONSTANTS = {"published": PUBLISHED, "standard": STANDARD}


class MultiReward(Reward):
    """sum_h weight_h n_h / sum_h weight_h over heads h with a weight above 0; the others are not loaded.

    Args:
        device: where the heads compute.
        weights: of the heads by name; 1 for each published head by default.
        normalise: "published" is n = clip((s - low) / (high - low), 0, 1) of a head's score s, "standard"
            n = (s - mean) / std.
        constants: the pair (low, high) or (mean, std) of a head, by default the published one.
        configs: the options of each head.

    Raises:
        RewardError: a head without a pair, a weight below 0, or an unknown name.
    """

    name = "multi"
    version = "1"

    def __init__(
        self,
        device: torch.device | str,
        weights: Mapping[str, float] | None = None,
        normalise: str = "published",
        constants: Mapping[str, Sequence[float]] | None = None,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.device, self.normalise = torch.device(device), normalise
        self.weights = weights_of(weights)
        self.constants = constants_of(self.weights, normalise, constants or {})
        own = configs_of(self.weights, configs or {})
        self.rewards = {name: load_reward(name, own[name], device) for name in self.weights}
        self.parts = tuple(self.rewards)
        self.options = {"normalise": normalise, "weights": self.weights, "constants": self.constants}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        weights = weights_of(options["weights"])
        constants_of(weights, options["normalise"], options["constants"] or {})
        own = configs_of(weights, options["configs"] or {})
        return [note for name in weights for note in check_reward(name, own[name])]

    def heads(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {name: reward(images, prompts) for name, reward in self.rewards.items()}

    def combine(self, heads: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum [B] of the heads' own scores [B]."""
        parts = (weight * self.normalised(name, heads[name]) for name, weight in self.weights.items())
        return sum(parts, torch.zeros(())) / sum(self.weights.values())

    def normalised(self, name: str, scores: Tensor) -> Tensor:
        """A head's scores on the common scale."""
        first, second = self.constants[name]
        if self.normalise == "standard":
            return (scores - first) / second
        return ((scores - first) / (second - first)).clamp(0, 1)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.combine(self.heads(images, prompts))

    def with_gradient(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.combine({name: r.with_gradient(images, prompts) for name, r in self.rewards.items()})

    def protocol(self) -> dict[str, Any]:
        heads = {name: reward.protocol() for name, reward in self.rewards.items()}
        hashes = [weights for head in heads.values() for weights in head["weights"]]
        options = {**self.options, "heads": heads}
        return super().protocol() | {
            "weights": hashes,
            "preprocessing": "that of each head",
            "options": options,
        }


def check_head(what: str, name: str) -> None:
    """Refuse what is neither one of HEADS nor my_module:MyReward: RewardError."""
    if not is_code(name):
        choice("multi", what, name, HEADS)


def weights_of(asked: Mapping[str, float] | None) -> dict[str, float]:
    """The weights above 0; by default 1 for each published head."""
    weights = dict.fromkeys(PUBLISHED, 1.0) if asked is None else dict(asked)
    for name, weight in weights.items():
        check_head("head", name)
        if not is_number(weight) or weight < 0:
            raise RewardError(
                f"reward 'multi': weights.{name} is {weight!r}, expected a number of at least 0"
            )
    positive = {name: float(weight) for name, weight in weights.items() if weight > 0}
    if not positive:
        raise RewardError("reward 'multi': no weight is above 0; give one, such as weights.hps: 1")
    return positive


def constants_of(
    weights: Mapping[str, float], normalise: str, asked: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """The pair of numbers that brings each head to the common scale."""
    choice("multi", "normalise", normalise, tuple(CONSTANTS))
    for name in asked:
        check_head("head of constants", name)
    known, constants = CONSTANTS[normalise] | dict(asked), {}
    meaning = "[mean, std] with std above 0" if normalise == "standard" else "[lowest, highest] in this order"
    for name in weights:
        if name not in known:
            raise RewardError(
                f"reward 'multi': no {normalise} constants for {name!r}; give constants.{name}: {meaning}"
            )
        pair = known[name]
        if not is_pair(pair) or pair[1] <= (0 if normalise == "standard" else pair[0]):
            raise RewardError(f"reward 'multi': constants.{name} is {pair!r}, expected {meaning}")
        constants[name] = [float(value) for value in pair]
    return constants


def is_number(value: object) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and isfinite(value)


def is_pair(value: object) -> bool:
    """Two finite numbers."""
    return isinstance(value, Sequence) and len(value) == 2 and all(map(is_number, value))


def configs_of(
    weights: Mapping[str, float], asked: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Each head's own options."""
    for name in asked:
        check_head("head of configs", name)
    if "offset" in asked.get("imagereward", {}):
        raise RewardError(
            "reward 'multi': configs.imagereward.offset has no use here: constants.imagereward are of the"
            " standard score"
        )
    return {name: dict(asked.get(name, {})) for name in weights}
