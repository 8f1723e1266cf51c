"""Files that others made: read only where they are files, of a bounded size, below their folder."""

import os

import pytest

from common.errors import UserError
from common.files import FileError, path_within, read_file


def test_pipes_devices_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path.__class__("/dev/zero")):
        with pytest.raises((FileError, IsADirectoryError)):
            read_file(path)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no space on the disk
    with pytest.raises(FileError, match="large: 1099511627776 bytes, expected at most 1073741824"):
        read_file(path)
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(FileError):
        read_file(path, 4)


@pytest.mark.parametrize(
    "name",
    ["../private.png", "/etc/passwd", "a/../../b", "..", "", ".", "a\0b", "out.png", "linked/private.png"],
)
def test_names_out_of_a_folder_are_refused(tmp_path, name):
    (tmp_path / "private.png").touch()
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "out.png").symlink_to(tmp_path / "private.png")
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(FileError, match="is not a file of this folder"):
        path_within(folder, name)


def test_names_below_a_folder_are_paths(tmp_path):
    real = tmp_path / "real"
    (real / "000000").mkdir(parents=True)
    (real / "a.png").symlink_to(real / "b.png")
    (tmp_path / "link").symlink_to(real)
    for folder in (real, tmp_path / "link"):
        for name in ("a.png", "000000/1.png", "none.png", "..png"):
            assert path_within(folder, name) == folder / name


def test_a_message_is_one_printable_line():
    message = str(UserError("a\nb \x1b[2J \u202e" + "x" * 3000))
    assert message.isprintable()
    assert message.startswith("a\\nb \\x1b[2J \\u202e")
    assert len(message) < 2100
