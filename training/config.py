"""Typed configurations: a YAML file over dataclass defaults, `key=value` overrides over both, every mistake
one line.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from solvers import UserError
from solvers.predictor.options import SECRETS

Config = TypeVar("Config")


class ConfigError(UserError):
    """A configuration that cannot be used; the message is one line that names the file or option and
    the key.
    """


def load_config(schema: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """An instance of the dataclass `schema`: the file's values over its defaults, then `section.key=value`
    overrides.

    Unknown keys, wrong types and missing values: ConfigError.
    """
    try:
        config = _merge(
            OmegaConf.structured(schema), _created(path.read_text(encoding="utf-8"), str(path)), str(path)
        )
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: cannot be read as UTF-8 text ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({_one_line(error)})") from None
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--override {text!r}: expected section.key=value")
        try:
            config = _merge(config, OmegaConf.from_dotlist([text]), f"--override {text}")
        except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
            raise ConfigError(f"--override {text}: not a value ({_one_line(error)})") from None
    try:
        missing = OmegaConf.missing_keys(config)
        if not missing:
            return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {_one_line(error)}") from None
    raise ConfigError(
        f"{path}: {min(missing)} is not set; give it in the file or with --override {min(missing)}=VALUE"
    )


def _created(text: str, option: str):
    try:
        return OmegaConf.create(text)
    except (OmegaConfBaseException, AssertionError) as error:
        raise ConfigError(f"{option}: expected sections of keys and values ({_one_line(error)})") from None


def _merge(config, update, option: str):
    if not OmegaConf.is_dict(update):
        raise ConfigError(f"{option}: expected sections of keys and values")
    try:
        return OmegaConf.merge(config, update)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        known = f"; known here: {', '.join(_siblings(config, key))}" if "not in" in str(error) else ""
        raise ConfigError(f"{option}: {key}: {_one_line(error)}{known}") from None


def _siblings(config, key: str) -> list[str]:
    """The keys that exist beside a key."""
    for part in key.split(".")[:-1]:
        config = config[part]
    return sorted(map(str, config))


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def check_choices(items: Iterable[tuple[str, object, Sequence]]) -> None:
    """Refuse a (key, value, choices) whose value is none of the choices."""
    for key, value, choices in items:
        if value not in choices:
            valid = [str(c) for c in choices if c is not None]
            close = get_close_matches(str(value), valid, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{key} is {value!r}, expected one of {', '.join(valid)}{meant}")


def value_at(config: object, key: str) -> object:
    """The value of a "section.key"."""
    return functools.reduce(lambda section, name: vars(section)[name], key.split("."), config)


def check_ranges(
    config: object, lowest: dict[str, float], highest: dict[str, float], above_zero: Sequence[str] = ()
) -> None:
    """Refuse numbers of a configuration, by "section.key", that are out of range or not finite; None is left
    out.
    """
    for key in {**lowest, **dict.fromkeys(above_zero), **highest}:
        value = value_at(config, key)
        if value is None:
            continue
        if not math.isfinite(value) or (key in above_zero and value <= 0):
            raise ConfigError(
                f"{key} is {value}, expected {'a number above 0' if key in above_zero else 'a finite number'}"
            )
        if value < lowest.get(key, -math.inf):
            raise ConfigError(f"{key} is {value}, expected at least {lowest[key]}")
        if value > highest.get(key, math.inf):
            raise ConfigError(f"{key} is {value}, expected at most {highest[key]:g}")


def to_yaml(config: object) -> str:
    """A dataclass instance as YAML that load_config reads back to the same, but for secrets such as an access
    token.
    """
    return OmegaConf.to_yaml(OmegaConf.create(without_secrets(dataclasses.asdict(config))))


def without_secrets(values: dict) -> dict:
    """A mapping without the entries, at any depth, whose names say that they are secret."""
    kept = {k: v for k, v in values.items() if not str(k).lower().endswith(SECRETS)}
    return {k: without_secrets(v) if isinstance(v, dict) else v for k, v in kept.items()}
