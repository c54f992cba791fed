"""Any image file as upright 8-bit RGB, or a UserError that says why not.

EXIF orientation is applied, 16 bits are divided by 257 unless a range is given, transparency is laid over white, and of several
frames the first is used.
"""
from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from dtg_core.config import DEFAULT_RULES, DataRules
from dtg_core.errors import NeedsSetting, UserError, printable

EXIF_ORIENTATION = 0x0112
GAP = 2  # a reduced image is at least so many times as large as what it is resized to (Pillow's choice for thumbnails)
SIXTEEN_BITS = 0, 2**16 - 1
log = logging.getLogger(__name__)
_said: set[str] = set()  # by this process
RETRIES = (0.1, 0.5, 2.0)  # seconds to wait after an error of the disk or the network
NO_IMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, KeyError, IndexError, ArithmeticError, AttributeError,
            MemoryError, RuntimeError)  # what Pillow raises for damaged files  # fmt: skip

# What can be odd about an image that is used anyway.
ALPHA = "images with transparency are laid over white"
DEEP = "images of more than 8 bits are scaled to 8"
DARK = "images of 16 bits have no value over 4095 and are nearly black - set data.rules.float_range=[0, 4095] if that is white"
FRAMES = "images of several frames are used by their first"
BAD_EXIF = "images have EXIF data that cannot be read, which is ignored"
UNTURNED = "images are not turned by their EXIF orientation, as in the sizes of their JSON"


@dataclass(frozen=True)
class Decoded:
    """An image, which may be a reduced one, and the (height, width) of the whole one, turned in the same way."""

    image: Image.Image
    size: tuple[int, int]


def read_image(path: Path, size: tuple[int, int] | None = None, rules: DataRules = DEFAULT_RULES) -> Image.Image:
    """Decode an image in full size. Arguments and errors as those of ``decode``."""
    return decode(path, size, rules).image


def decode(
    path: Path, size: tuple[int, int] | None = None, rules: DataRules = DEFAULT_RULES, odd: set[str] | None = None,
    as_stored: bool = False, wanted: Callable[[int, int], tuple[int, int]] | None = None,
) -> Decoded:
    """Decode an image, reduced if it is a JPEG far larger than what is wanted of it.

    Args:
        path: the file.
        size: (height, width) that annotations were made for, 0 where unknown. If the file has that size only without its
            EXIF orientation, it is not turned, because then the boxes were drawn on the stored pixels.
        rules: how truncated, float and huge files are handled.
        odd: collects what is odd about the image.
        as_stored: never turn it, since the boxes of its data set were drawn on stored pixels.
        wanted: gives the (height, width) to which an image of a (height, width) will be resized at most. A JPEG of ``2 * GAP``
            times that or more is decoded at a half, a quarter or an eighth, which takes a fraction of the time; the rest of the
            way is left to the resizing. None: in full size.

    Raises:
        UserError: the file is missing or not a readable image; NeedsSetting if it is float or 32 bits deep and the rules
            give no range, or if it is cut off and they treat that as an error.
    """
    told, odd = odd is not None, set() if odd is None else odd
    with _opened(path, rules) as image:
        stored = image.height, image.width
        if wanted is not None and image.mode in ("RGB", "L"):
            height, width = wanted(*stored)
            image.draft(None, (GAP * width, GAP * height))  # of other formats than JPEG: no effect
        if rules.truncated == "use":
            ImageFile.LOAD_TRUNCATED_IMAGES = True  # Pillow has no other way; it holds for the whole process
        try:
            image.load()
        except OSError as error:
            if rules.truncated == "error" and "truncated" in str(error):
                raise NeedsSetting(f"{path}: it is cut off ({error}) - restore it, or set data.rules.truncated=skip") from error
            raise
        if getattr(image, "n_frames", 1) > 1:
            odd.add(FRAMES)
        orientation, whole = _orientation(image, odd), stored
        if orientation > 1 and (as_stored or (orientation >= 5 and size == stored and size != stored[::-1])):
            odd.add(UNTURNED)
        elif orientation > 1:
            image = ImageOps.exif_transpose(image)
            whole = stored[::-1] if orientation >= 5 else stored
        result = to_rgb(image, path, rules, odd)
    if DARK in odd and not told:
        _say_once(DARK, path)
    return Decoded(result, whole)


def _say_once(kind: str, path: Path) -> None:
    """Log what is odd about the first of such images that this process has read."""
    if kind not in _said:
        _said.add(kind)
        log.warning("%s: %s", printable(str(path)), kind)


def image_size(path: Path, rules: DataRules = DEFAULT_RULES) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) as stored and as turned upright, from the file's header. Raises UserError as ``read_image``
    does."""
    with _opened(path, rules) as image:
        stored = image.height, image.width
        return stored, stored[::-1] if _orientation(image, set()) >= 5 else stored


def is_turned(path: Path, rules: DataRules) -> bool:
    """Whether EXIF turns or mirrors the image, from the file's header. Raises UserError as ``read_image`` does."""
    with _opened(path, rules) as image:
        return _orientation(image, set()) > 1


@contextlib.contextmanager
def _opened(path: Path, rules: DataRules) -> Iterator[Image.Image]:
    """The image with nothing decoded yet. Everything Pillow raises for it, here or in the caller's block, becomes a
    UserError."""
    try:
        if path.exists() and not path.is_file():  # a FIFO or a device would never end
            raise UserError(f"{path}: it is not a regular file - take it out of the data set")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here, and of metadata
            # Pillow itself refuses twice as many, also for an image within the file; this holds for the whole process.
            Image.MAX_IMAGE_PIXELS = rules.max_pixels
            with _retried(path) as image:
                if image.width * image.height > rules.max_pixels:
                    found = f"{image.width} x {image.height} px"
                    raise UserError(f"{path}: it is too large ({found}) - shrink it, or raise data.rules.max_pixels")
                yield image
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image - restore it, or take it out of the data set") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: it is too large (over {2 * rules.max_pixels} px) - shrink it, or raise data.rules.max_pixels"
                        ) from error
    except NO_IMAGE as error:
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else f"{error}" or "damaged"
        raise UserError(f"{path}: it cannot be read as an image ({reason}) - replace it, or take it out") from error


def _retried(path: Path) -> Image.Image:
    """Open an image, again after errors that a disk or a network may recover from."""
    for wait in RETRIES:
        try:
            return Image.open(path)
        except OSError as error:  # a decoder's own errors carry no number
            if error.errno is None or isinstance(error, (FileNotFoundError, PermissionError)):
                raise
            time.sleep(wait)
    return Image.open(path)


def _orientation(image: Image.Image, odd: set[str]) -> int:
    """1 to 8. Pillow only warns about broken EXIF data, and then has no entries from it."""
    try:
        exif = image.getexif()
        found = int(exif.get(EXIF_ORIENTATION, 1))
        broken = bool(image.info.get("exif")) and not len(exif)
    except NO_IMAGE:
        found, broken = 1, True
    if broken or not 1 <= found <= 8:
        odd.add(BAD_EXIF)
        return 1
    return found


def to_rgb(image: Image.Image, path: Path, rules: DataRules, odd: set[str]) -> Image.Image:
    """The same image in 8-bit RGB. Arguments as those of ``decode``; raises NeedsSetting as it does, for ``path``."""
    if image.mode == "F" or image.mode.startswith("I"):
        odd.add(DEEP)
        deep = np.asarray(image).astype(np.float64)
        low, high = _levels(image.mode, deep, path, rules)
        if (low, high) == SIXTEEN_BITS and image.mode.startswith("I;16") and deep.max(initial=0) < 4096:
            odd.add(DARK)
        unit = np.nan_to_num((deep - low) / (high - low)).clip(0, 1)
        return Image.fromarray((unit * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        odd.add(ALPHA)
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")  # a copy if it is RGB already, independent of the file


def _levels(mode: str, deep: np.ndarray, path: Path, rules: DataRules) -> tuple[float, float]:
    """The values of black and white, which do not depend on the image: similar images should be equally bright. NeedsSetting if
    they are unknown."""
    if rules.float_range is not None:
        return rules.float_range
    if mode.startswith("I;16"):
        return SIXTEEN_BITS
    if mode == "I" and ((deep >= SIXTEEN_BITS[0]) & (deep <= SIXTEEN_BITS[1])).all():  # 16 bits also come in the 32-bit mode
        return SIXTEEN_BITS
    kind = "floats" if mode == "F" else "whole numbers beyond 16 bits"
    raise NeedsSetting(f"{path}: its pixels are {kind}, whose range it does not say - set data.rules.float_range=[LOW, HIGH]")
