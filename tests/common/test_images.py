"""Images that others made: PNG and JPEG only, looked at before they are decoded."""

import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from common.images import ImageError, decode_image, holds_image, is_image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"


def saved(kind: str = "PNG", size: tuple[int, int] = (32, 32), **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few KB that unfolds to width x height pixels of grey."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(min(width * height, 2**24)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG with a compressed text of 64 MiB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 2**26, zip=True)
    return saved(pnginfo=info)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_are_decoded_as_before(kind):
    content = saved(kind)
    expected = np.asarray(Image.open(BytesIO(content)).convert("RGB"))
    assert (np.asarray(decode_image(content, Path("a.png"))) == expected).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (EPS, "not a readable image"),
        (saved("GIF"), "not a readable image"),
        (saved("TIFF"), "not a readable image"),
        (b"", "not a readable image"),
        (saved()[:1500], "not a readable image"),
        (saved("JPEG")[:300], "not a readable image"),
        (text_bomb(), "not a readable image"),
        (bomb(9000, 9000), "9000 x 9000 pixels, expected at most 67108864"),
        (bomb(12000, 12000), "not a readable image"),
        (bomb(60000, 60000), "not a readable image"),
        (bomb(2**31 - 1, 2**31 - 1), "not a readable image"),
    ],
    ids=["eps", "gif", "tiff", "empty", "torn", "torn jpeg", "text", "81 MP", "144 MP", "3600 MP", "2^62"],
)
def test_other_files_are_one_line_and_nothing_starts(content, reason, monkeypatch, recwarn):
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)  # as PIL does for Ghostscript
    with pytest.raises(ImageError, match=reason) as error:
        decode_image(content, Path("a.png"))
    assert str(error.value).startswith("a.png: ")
    assert not recwarn.list
    assert not is_image(content)


def test_a_bomb_takes_no_memory(tmp_path):
    """Reading images of 3.6 and 0.14 gigapixels in a process of its own, which may have 100 MB beyond its
    start.
    """
    for i, side in enumerate((60000, 12000)):
        (tmp_path / f"{i}.png").write_bytes(bomb(side, side))
    code = (
        "import resource, sys; from pathlib import Path; from common.images import holds_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert not any(holds_image(Path(name)) for name in sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    names = [str(tmp_path / f"{i}.png") for i in range(2)]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert int(done.stdout) < 100 * 1024, done.stderr  # KiB


def test_whether_a_file_holds_an_image(tmp_path):
    path = tmp_path / "a.png"
    assert not holds_image(path)
    path.write_bytes(saved())
    assert holds_image(path)
    path.write_bytes(saved()[:-60])
    assert not holds_image(path)
    assert not holds_image(tmp_path)
