"""Images that users bring: PNG and JPEG, of a bounded size, looked at before they are decoded."""

import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image

from .files import FileError, read_file

FORMATS = ("PNG", "JPEG")  # others may start programs (EPS) or have no bound
MAX_BYTES = 2**28
MAX_PIXELS = 2**26  # 8192 x 8192


class ImageError(FileError):
    """A file that is not an image, or too large a one; the message is one line that names it."""


def decode_image(content: bytes, path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a PNG or JPEG file, as RGB.

    Args:
        content: the bytes of the file.
        path: the file, for messages.
        max_pixels: more are refused before any is decoded.

    Raises:
        ImageError: another format, a damaged file, or too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height <= max_pixels:
            return image.convert("RGB")
    except Exception as error:  # what the library raises for a damaged file has no common type
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ImageError(f"{path}: not a readable image, PNG or JPEG ({reason}); make it again") from error
    raise ImageError(
        f"{path}: {width} x {height} pixels, expected at most {max_pixels} in all; make it smaller"
    )


def is_image(content: bytes) -> bool:
    """Whether a file's content is a whole image; the checksums of a PNG must be right."""
    try:
        decode_image(content, Path())
        Image.open(BytesIO(content), formats=FORMATS).verify()
    except (ImageError, OSError, SyntaxError):
        return False
    return True


def holds_image(path: Path) -> bool:
    """Whether there is a file with a whole image."""
    try:
        return is_image(read_file(path, MAX_BYTES))
    except (OSError, FileError):
        return False
