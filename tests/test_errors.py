"""What every command line makes of errors."""

import click
import pytest
import torch

from common.errors import UserError, run_command


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("--depth 5: expected an even number"), "error: --depth 5: expected an even number\n"),
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            "error: a.txt: No such file or directory\n",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB"),
            (
                "error: the device's memory is full: make smaller batches, use a smaller dtype, or offload"
                " (CUDA out of memory.)\n"
            ),
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, line, monkeypatch, capsys):
    @click.command()
    def main() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as status:
        run_command(main)
    assert status.value.code == 2
    assert capsys.readouterr().err == line


def test_what_is_our_fault_is_not_hidden(monkeypatch):
    @click.command()
    def main() -> None:
        raise KeyError("x")

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(KeyError):
        run_command(main)
