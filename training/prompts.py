"""Which prompts are learned from and which are kept apart to measure."""

from pathlib import Path
from typing import NamedTuple

from common.prompts import read_prompts

from .config import ConfigError


def digits_prompts(train: int, heldout: int) -> tuple[list[str], list[str]]:
    """As many training and held-out captions of the embedded digits as asked for."""
    from digits.data import evaluation_prompts, training_prompts

    return training_prompts(train), evaluation_prompts(heldout)


class PromptFile(NamedTuple):
    """A configuration's key and the file that it names, if it does."""

    key: str
    path: str | None


def split_prompts(
    training: PromptFile,
    heldout: PromptFile,
    count: int,
    own: tuple[list[str], list[str]] | None = None,
) -> tuple[list[str], list[str]]:
    """Training and held-out prompts, none in both.

    Args:
        training: the file to learn from.
        heldout: the file to measure with; by default the last of the training prompts are held out.
        count: how many of these are, a fifth at most.
        own: the backbone's own prompts of both kinds, used without a training file.

    Raises:
        ConfigError: a prompt in both files, too few to split, or no file at all.
    """
    if training.path is None:
        if own is None:
            raise ConfigError(
                f"{training.key} is not set: give a text or CSV file of prompts with --override"
                f" {training.key}=FILE"
            )
        train, held = own
    else:
        train, held = distinct(training.key, training.path), []
    if heldout.path is not None:
        held = distinct(heldout.key, heldout.path)
        if shared := set(train) & set(held):
            raise ConfigError(
                f"{heldout.key} {heldout.path}: {min(shared)!r} is a training prompt too; remove it from one"
            )
    elif not held:
        if len(train) < 2:
            raise ConfigError(
                f"{training.key} {training.path}: 1 prompt, expected at least 2, or {heldout.key}"
            )
        count = min(count, max(1, len(train) // 5))
        train, held = train[:-count], train[-count:]
    return train, held


def distinct(key: str, path: str) -> list[str]:
    """The prompts of a file, each once, in their order."""
    return list(dict.fromkeys(read_prompts(Path(path), key)))
