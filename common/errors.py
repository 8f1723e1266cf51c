"""Errors that a user can mend, and how every command line of the project reports them."""

import os
import sys

import click
import torch

MAX_MESSAGE = 2000  # characters


class UserError(ValueError):
    """Bad input; the message is one line that names the file, key or value, what was expected and the
    remedy.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """text as one line of printable characters; what a terminal would act on is escaped."""
    text = text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class SharedError(UserError):
    """An error that every rank of a run raises; one process of each machine reports it."""


def is_reporter() -> bool:
    """Whether this process reports what all ranks of its machine know."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def note(text: str) -> None:
    """Print a note for the user on standard error, once for all processes of a torchrun launch."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"note: {printable(text)}", err=True)


def run_command(command: click.Command) -> None:
    """Run a command line; a UserError, an unusable file or a full memory is one line and exit status 2."""
    try:
        command()
    except UserError as error:
        if is_reporter() or not isinstance(error, SharedError):
            click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        click.echo(f"error: {printable(str(error.filename))}: {error.strerror}", err=True)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0][:200]
        click.echo(
            "error: the device's memory is full: make smaller batches, use a smaller dtype, or offload"
            f" ({reason})",
            err=True,
        )
        sys.exit(2)
