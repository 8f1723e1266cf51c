"""Rewards by name, imported when used. A reward is one module with its class and one line of CLASSES."""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pkgutil import resolve_name
from typing import Any

import torch

from common.plugins import is_code, load_code

from .base import Reward, RewardError

CLASSES = {
    "digits": "clip_model:DigitsReward",
    "judge": "digits_judge:JudgeReward",
    "hps": "hps:HPSReward",
    "pickscore": "clip_model:PickScore",
    "clip": "clip_model:ClipScore",
    "aesthetic": "aesthetic:AestheticReward",
    "imagereward": "imagereward:ImageReward",
    "mps": "mps:MPSReward",
    "multi": "multi:MultiReward",
}
NAMES = tuple(CLASSES)
TRAINABLE = tuple(name for name in NAMES if name != "judge")  # the judge is for measuring only


def load_reward(name: str, config: Mapping[str, Any], device: torch.device | str) -> Reward:
    """The reward of a name, or of my_module:MyReward where the user gave that.

    Args:
        name: one of NAMES, or of a class in a module of the user's own.
        config: its options; None leaves an option at its default.
        device: where it computes.

    Raises:
        RewardError: an unknown name or option, or weights that are not there or do not fit.
    """
    reward, options = resolve(name, config)
    reward.check(options)
    return reward(device=torch.device(device), **options)


def check_reward(name: str, config: Mapping[str, Any]) -> list[str]:
    """Check a name and its options as load_reward does, without loading weights.

    Returns:
        Notes for the user, such as what will be fetched.

    Raises:
        RewardError: an unknown name or option, or weights that are not there.
    """
    reward, options = resolve(name, config)
    return reward.check(options)


def resolve(name: str, config: Mapping[str, Any]) -> tuple[type[Reward], dict[str, Any]]:
    """The class of a reward and all its options; an unknown name or option: RewardError."""
    reward = find_class(name)
    parameters = inspect.signature(reward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name != "device"}
    for option in config:
        choice(name, "option", option, tuple(defaults))
    return reward, defaults | {option: value for option, value in config.items() if value is not None}


def find_class(name: str) -> type[Reward]:
    """The class of a reward; an unknown name: RewardError."""
    if name in CLASSES:
        return resolve_name(f"{__package__}.{CLASSES[name]}")
    if not is_code(name):
        expected = f"expected one of {', '.join(NAMES)}, or my_module:MyReward"
        raise RewardError(f"reward {name!r}: {expected}{nearest(name, NAMES)}")
    reward = load_code(name, "reward", Reward)
    if not isinstance(reward, type):
        raise RewardError(f"reward {name!r} is an object, expected its class")
    return reward


def choice(reward: str, what: str, value: str, valid: Sequence[str]) -> None:
    """Refuse a value that is not one of the valid ones: RewardError."""
    if value in valid:
        return
    expected = (
        f"expected one of {', '.join(valid)}{nearest(value, valid)}" if valid else "it has none: leave it out"
    )
    raise RewardError(f"reward {reward!r}: unknown {what} {value!r}, {expected}")


def nearest(value: str, valid: Sequence[str]) -> str:
    """A question after the valid name that is most like a wrong one, if one is."""
    close = get_close_matches(str(value), valid, 1)
    return f" (did you mean {close[0]}?)" if close else ""
