"""Errors that a user can mend, and how every command line of the project reports them."""

import sys

import click


class UserError(ValueError):
    """Bad input; the message is one line that names the file, key or value, what was expected and the remedy."""


def run_command(command: click.Command) -> None:
    """Run a command line; a UserError, or a file that cannot be used, becomes one line on standard error and exit status 2."""
    try:
        command()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        click.echo(f"error: {error.filename}: {error.strerror}", err=True)
        sys.exit(2)
