"""Files are replaced as a whole, and what a run that died left behind is removed by the next one."""

import os
import time
from pathlib import Path

import pytest

from common import files
from common.files import HOST, write_atomically

from ..forked import Forked

DEAD = 2**22 + 1  # above the largest process id


@pytest.fixture
def leftover(tmp_path) -> Path:
    path = tmp_path / f"000001.png.{HOST}-{DEAD}.tmp"
    path.write_bytes(b"half")
    return path


def test_the_temporary_file_of_a_dead_process_is_removed(tmp_path, leftover):
    write_atomically(tmp_path / "other.png", b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["other.png"]


@pytest.mark.parametrize(
    "name",
    [
        "notes.tmp",
        f"a.png.{HOST}-x.tmp",
        f"a.png.{HOST}-{DEAD}.tmp.bak",
        f"a.png.{HOST}-OWN.tmp",  # of this process
        f"a.png.another-host-{DEAD}.tmp",
    ],
)
def test_nothing_else_is_removed(tmp_path, name):
    """Files of the user's own, of a process that lives, and of a process of another machine."""
    name = name.replace("OWN", str(os.getpid()))
    (tmp_path / name).write_bytes(b"kept")
    write_atomically(tmp_path / "other.png", b"whole")
    assert (tmp_path / name).read_bytes() == b"kept"


def test_an_old_one_of_another_machine_is_removed(tmp_path):
    path = tmp_path / f"a.png.another-host-{DEAD}.tmp"
    path.write_bytes(b"half")
    os.utime(path, (0, time.time() - 2 * files.OLD))
    write_atomically(tmp_path / "other.png", b"whole")
    assert not path.exists()


def write_slowly(path: Path) -> None:
    """A write that never comes to its end."""
    os.fsync = lambda number: time.sleep(600)
    write_atomically(path, b"whole")


def test_a_killed_write_leaves_the_file_as_it_was_and_the_next_one_cleans_up(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"before")
    Forked(write_slowly, path).signal_when(lambda: any(tmp_path.glob("*.tmp")))
    assert path.read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 2
    write_atomically(path, b"after")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"after"]
