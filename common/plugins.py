"""Backbones, solvers and rewards from a user's own file, named my_module:NAME. Loading one runs that file.

So a name is only loaded where the user gave it, on the command line or in a configuration file (allow_code),
and never because a predictor or another data file holds it.
"""

import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import click

from .errors import UserError

_allowed: set[str] = set()


def is_code(name: object) -> bool:
    """Whether a name is that of an object in a module, my_module:NAME."""
    return isinstance(name, str) and ":" in name


def allow_code(*names: object) -> None:
    """Allow names that the user gave to be loaded by this process."""
    _allowed.update(name for name in names if isinstance(name, str) and is_code(name))


def load_code(name: str, what: str, expected: type) -> Any:
    """The object, or subclass, that my_module:NAME names.

    Args:
        name: module and name in it; the module is looked for on sys.path and in the working directory.
        what: the option or key that takes such a name, for messages.
        expected: what it must be an instance or a subclass of.

    Raises:
        UserError: the user did not give this name, or there is no such object.
    """
    module = name.partition(":")[0]
    if name not in _allowed:
        raise UserError(f"{what} {name!r} would run code of {module}.py: name it yourself, as {what} {name}")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        value = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{what} {name!r}: cannot be loaded ({error})") from None
    kind = value if isinstance(value, type) else type(value)
    if not issubclass(kind, expected):
        raise UserError(f"{what} {name!r} is a {kind.__name__}, expected a {expected.__name__}")
    return value


class NameOrCode(click.Choice):
    """An option that takes one of some names, or my_module:NAME, which is thereby allowed to be loaded."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if is_code(value):
            allow_code(value)
            return value
        return super().convert(value, param, ctx)
