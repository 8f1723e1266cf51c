"""Records and locks of an output folder survive links, torn lines and full disks."""

import os
import resource
import signal

import pytest

from common.records import ManifestError, append_records, exclusive, read_records

RECORDS = [{"file": f"{i}.png", "seed": i, "prompt": "a"} for i in range(3)]


def test_a_lock_that_is_a_link_leaves_its_target_alone(tmp_path):
    target = tmp_path / "thesis.txt"
    target.write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").symlink_to(target)
    with (
        pytest.raises(ManifestError, match=r"out/\.lock: cannot be opened as a file"),
        exclusive(tmp_path / "out"),
    ):
        pass
    assert target.read_text() == "years of work"


def test_a_lock_that_is_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(ManifestError, match="not a file"), exclusive(tmp_path):
        pass


def test_a_folder_is_locked_until_the_end_of_the_run(tmp_path):
    busy = pytest.raises(ManifestError, match="another run is writing here")
    with exclusive(tmp_path), busy, exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_a_torn_line_is_not_glued_to_the_next(tmp_path):
    part = tmp_path / "manifest.part00000.jsonl"
    append_records(part, RECORDS[:1])
    whole = part.read_bytes()
    part.write_bytes(whole + b'{"file": "1.p')
    append_records(part, RECORDS[1:])
    assert read_records(part) == RECORDS


def test_a_write_that_does_not_fit_is_an_error(tmp_path):
    """A limit on the size of files stands for a full disk."""
    part = tmp_path / "manifest.part00000.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        with pytest.raises(OSError, match="File too large"):
            append_records(part, RECORDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
