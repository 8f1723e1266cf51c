"""What a checkpoint holds, checked before a run goes on from it, and in one form for the same bytes."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import without_secrets
from .run_folder import RunError


def canonical(value: Any) -> Any:
    """A state in which equal texts are one object and no other object comes twice, so that equal states are
    equal bytes.
    """
    texts: dict[str, str] = {}

    def copied(part: Any) -> Any:
        if isinstance(part, str):
            return texts.setdefault(part, part)
        if isinstance(part, Tensor):
            return part.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(part, Mapping):
            return {copied(key): copied(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return type(part)([copied(item) for item in part])
        return part

    return copied(value)


def settings_of(config: object, free: frozenset[str]) -> dict[str, str]:
    """The settings of a configuration by "section.key", as text, without those that may change when a run
    goes on.
    """
    values = without_secrets(asdict(config))  # type: ignore[call-overload]
    flat: dict[str, str] = {}
    for section, keys in values.items():
        for key, value in keys.items() if isinstance(keys, dict) else [("", keys)]:
            name = f"{section}.{key}" if key else section
            if isinstance(value, dict):
                value = {k: v for k, v in value.items() if f"{name}.{k}" not in free}
            if name not in free and section not in free:
                flat[name] = repr(value)
    return flat


def check_settings(config_file: Path, recorded: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Refuse a configuration that is not the one that a checkpoint was made with."""
    for key in sorted(recorded.keys() & present.keys()):
        if recorded[key] != present[key]:
            raise RunError(
                f"{config_file}: {key} is {present[key]}, but its checkpoint was made with {recorded[key]};"
                " restore it, or start a new run with --config"
            )


def check_state(path: Path, state: object, keys: frozenset[str], steps: int) -> None:
    """Refuse what is no state of a run of so many steps.

    Args:
        path: the run, for the message.
        state: what was read.
        keys: what it must have.
        steps: how many steps the run has.
    """
    remedy = "remove the checkpoint to go on from the one before, or start a new run"
    if not isinstance(state, dict) or not keys <= state.keys():
        raise RunError(f"{path}: its checkpoint is not one of this kind of run; {remedy}")
    step, best = state["step"], state["best"]
    if type(step) is not int or not 0 <= step <= steps:
        raise RunError(f"{path}: its checkpoint is of step {step!r}, expected 0 to {steps}; {remedy}")
    last = {"evaluated": state.get("evaluated", step), "best step": best.get("step")}
    for name, value in last.items():
        if type(value) is not int or not -1 <= value <= step:
            raise RunError(f"{path}: {name} of its checkpoint is {value!r}, expected -1 to {step}; {remedy}")
    for name in sorted(keys):
        if not is_finite(state[name]):
            raise RunError(f"{path}: {name} of its checkpoint holds numbers that are not finite; {remedy}")


def is_finite(value: object) -> bool:
    """Whether all tensors and numbers in a state are finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all()) if value.is_floating_point() else True
    if isinstance(value, float):
        return value - value == 0
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_finite, value))
    return True
