"""Typed configurations: a YAML file over dataclass defaults, `key=value` overrides over both, every mistake
one line.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import note
from common.files import read_file
from common.plugins import is_code
from solvers import UserError
from solvers.predictor.options import SECRETS

Config = TypeVar("Config")
MAX_BYTES = 2**20  # of a file
MAX_NODES = 10**5


class ConfigError(UserError):
    """A configuration that cannot be used; the message is one line that names the file or option and
    the key.
    """


def renamed(old: str, default: Any) -> Any:
    """A dataclass field whose key had another name, which is still read, with a note."""
    return field(default=default, metadata={"old": old})


def load_config(schema: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """An instance of the dataclass `schema`: the file's values over its defaults, then `section.key=value`
    overrides.

    Unknown keys, wrong types and missing values: ConfigError.
    """
    try:
        text = read_file(path, MAX_BYTES).decode("utf-8-sig")
        values = _use_new_names(_created(text, str(path)), schema, str(path))
        config = _merge(OmegaConf.structured(schema), values, str(path))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: cannot be read as UTF-8 text ({error})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML ({_one_line(error)})") from None
    config = _with_overrides(config, schema, overrides)
    try:
        missing = OmegaConf.missing_keys(config)
        if not missing:
            return cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {_one_line(error)}") from None
    raise ConfigError(
        f"{path}: {min(missing)} is not set; give it in the file or with --override {min(missing)}=VALUE"
    )


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A complete configuration with `section.key=value` overrides over it; a mistake in one: ConfigError."""
    merged = _with_overrides(OmegaConf.structured(config), type(config), overrides)
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"--override: {error.full_key}: {_one_line(error)}") from None


def _with_overrides(config: Any, schema: type, overrides: Sequence[str]) -> Any:
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--override {text!r}: expected section.key=value")
        try:
            option = f"--override {text}"
            values = _without_resolvers(OmegaConf.from_dotlist([text]), option)
            config = _merge(config, _use_new_names(values, schema, option), option)
        except (yaml.YAMLError, OmegaConfBaseException, TypeError, RecursionError) as error:
            raise ConfigError(f"--override {text}: not a value ({_one_line(error)})") from None
    return config


def _created(text: str, option: str) -> Any:
    try:
        _check_size(yaml.compose(text, Loader=yaml.SafeLoader), option)
        return _without_resolvers(OmegaConf.create(text), option)
    except (OmegaConfBaseException, AssertionError) as error:
        raise ConfigError(f"{option}: expected sections of keys and values ({_one_line(error)})") from None


def _check_size(root: yaml.Node | None, option: str) -> None:
    """Refuse YAML whose aliases unfold to more than MAX_NODES: each of ten lines may hold the one before ten
    times.
    """
    waiting, count = [] if root is None else [root], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if count + len(waiting) > MAX_NODES:
            raise ConfigError(f"{option}: more than {MAX_NODES} keys and values; write it without aliases")


def _without_resolvers(values: Any, option: str) -> Any:
    """values, unless a text in them calls a resolver such as ${oc.env:NAME}, whose result, a secret perhaps,
    would be written into the run's files; ${section.key} refers to another key and is no resolver.
    """
    waiting: list[Any] = [OmegaConf.to_container(values, resolve=False)]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and ":" in item.partition("${")[2]:
            raise ConfigError(
                f"{option}: {item[:100]!r} calls a resolver, whose result would be written into files; write"
                " the value itself, a token into the environment as HF_TOKEN"
            )
    return values


def _use_new_names(values: Any, schema: type, option: str) -> Any:
    """The values of a file or override with keys of today."""
    for section, old, new in _renamed_keys(schema):
        part: Any = values.get(section) if OmegaConf.is_dict(values) else None
        if OmegaConf.is_dict(part) and old in part and new not in part:
            note(f"{option}: {section}.{old} is called {section}.{new} now")
            part[new] = part.pop(old)
    return values


def _renamed_keys(schema: Any) -> list[tuple[str, str, str]]:
    """(section, old key, key) of the renamed fields of a configuration's sections."""
    return [
        (section.name, key.metadata["old"], key.name)
        for section in fields(schema)
        if is_dataclass(section.type)
        for key in fields(section.type)
        if "old" in key.metadata
    ]


def _merge(config: Any, update: Any, option: str) -> Any:
    if not OmegaConf.is_dict(update):
        raise ConfigError(f"{option}: expected sections of keys and values")
    try:
        return OmegaConf.merge(config, update)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        known = f"; known here: {', '.join(_siblings(config, key))}" if "not in" in str(error) else ""
        raise ConfigError(f"{option}: {key}: {_one_line(error)}{known}") from None


def _siblings(config: Any, key: str) -> list[str]:
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


def or_code(value: object, names: Sequence) -> tuple:
    """The choices for a name that may be my_module:NAME of the user's own."""
    return (*names, value) if is_code(value) else tuple(names)


def value_at(config: object, key: str) -> Any:
    """The value of a "section.key"."""
    return functools.reduce(lambda section, name: vars(section)[name], key.split("."), config)


def check_ranges(
    config: object,
    lowest: Mapping[str, float],
    highest: Mapping[str, float],
    above_zero: Sequence[str] = (),
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
    values: dict = asdict(config)  # type: ignore[call-overload]
    return OmegaConf.to_yaml(OmegaConf.create(without_secrets(values)))


def without_secrets(values: dict) -> dict:
    """A mapping without the entries, at any depth, whose names are those of secrets."""
    kept = {k: v for k, v in values.items() if not str(k).lower().endswith(SECRETS)}
    return {k: without_secrets(v) if isinstance(v, dict) else v for k, v in kept.items()}
