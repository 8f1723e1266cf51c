"""Which prompts are learned from and which are kept apart to measure."""

from pathlib import Path

from common.prompts import read_prompts

from .config import ConfigError


def digits_prompts(train: int, heldout: int) -> tuple[list[str], list[str]]:
    """As many training and held-out captions of the embedded digits as asked for."""
    from digits.data import evaluation_prompts, training_prompts

    return training_prompts(train), evaluation_prompts(heldout)


def split_prompts(
    told: tuple[str, str | None],
    apart: tuple[str, str | None],
    count: int,
    own: tuple[list[str], list[str]] | None = None,
) -> tuple[list[str], list[str]]:
    """Training and held-out prompts, none in both, from files given as (configuration key, path).

    Without a file of held-out prompts they are the last `count` of the others, a fifth at most; without a
    file of training prompts both are `own`. A prompt in both files, or too few to split: ConfigError.
    """
    if told[1] is None:
        if own is None:
            raise ConfigError(
                f"{told[0]} is not set: give a text or CSV file of prompts with --override {told[0]}=FILE"
            )
        train, heldout = own
    else:
        train, heldout = distinct(*told), []
    if apart[1] is not None:
        heldout = distinct(*apart)
        if shared := set(train) & set(heldout):
            raise ConfigError(
                f"{apart[0]} {apart[1]}: {min(shared)!r} is a training prompt too; remove it from one"
            )
    elif not heldout:
        if len(train) < 2:
            raise ConfigError(f"{told[0]} {told[1]}: 1 prompt, expected at least 2, or {apart[0]}")
        count = min(count, max(1, len(train) // 5))
        train, heldout = train[:-count], train[-count:]
    return train, heldout


def distinct(key: str, path: str) -> list[str]:
    """The prompts of a file, each once, in their order."""
    return list(dict.fromkeys(read_prompts(Path(path), key)))
