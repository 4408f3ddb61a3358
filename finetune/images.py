"""One image: its header, decoding it upright, resizing it. Nothing else decodes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import BinaryIO

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps

from configs import MAX_IMAGE_PIXELS
from finetune.findings import BadImage
from finetune.options import UserError
from finetune.stores import read_bytes

# Pillow's readers remark on tags that they skip; `read_header` sees to the limit of pixels.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)

# The last bytes of a whole file. A JPEG's compressed pixels never hold its two.
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
# Where the header has the file's length, what is to be added to it.
LENGTH_FIELDS = {b"RIFF": (4, 8), b"BM": (2, 0)}
JPEG_START = b"\xff\xd8\xff"
FIRST_BYTES = (JPEG_START, b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")
# What Pillow's readers let through on damaged files, beside its own errors.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, RuntimeError)
PILLOW_ERRORS += (struct.error, zlib.error, MemoryError, AttributeError)
TAIL_BYTES = 4096
# Deflate, the densest of the common packings, makes 1,032 bytes of one. A header that names more is damaged, or made
# to fill the memory; small pictures of one colour may be denser in other formats.
MOST_BITS_A_BYTE, ALWAYS_POSSIBLE_PIXELS = 8 * 1032, 2**24
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# OpenCV names its scaled decoding by grey and by BGR pictures; with the flag for RGB the former gives RGB.
DECODE_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
GREY_FLAGS = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
# What to do about an object that no store gives.
STORE_REMEDIES = {"missing": "Replace it", "unreachable": "Check the address, the network and your permissions"}


def read_image(path: str, image_size: Sequence[int] | None = None, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Decodes an image as an upright picture: its EXIF orientation is applied.

    Args:
        path: a file, or a URL that fsspec reads.
        image_size: `(height, width)` that the picture will be resized to: a JPEG at least twice as large is decoded
            at 1/2, 1/4 or 1/8 of its size, never below this one, which is faster.
        max_pixels: what the picture may have; the header tells before anything is decoded.

    Returns:
        uint8 RGB `(height, width, 3)`; grey is repeated, alpha dropped, 16 bits reduced to 8.

    Raises:
        UserError: the file is missing, cut short, too large or cannot be decoded.
    """
    try:
        encoded = read_bytes(path)
        sides = check_header(encoded, max_pixels)
        divisor = choose_divisor(encoded, sides, image_size) if image_size else 1
        image = decode_animated_png(encoded)
        if image is None and encoded.size:
            image = cv2.imdecode(encoded, DECODE_FLAGS[divisor])
    except (OSError, ValueError, cv2.error) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "err", None) or str(error)
        raise UserError(f"Cannot read the image {path}: {reason}. Replace it, or drop its row.") from error
    except BadImage as error:
        what = f"read the image {path}: it" if error.kind in STORE_REMEDIES else f"decode the image {path}:"
        remedy = STORE_REMEDIES.get(error.kind, "Replace it")
        raise UserError(f"Cannot {what} {error.detail}. {remedy}, or drop its row.") from error
    if image is None:
        raise UserError(f"Cannot decode the image {path}: it is damaged or no image. Replace it, or drop its row.")
    return image


def check_header(encoded: np.ndarray, max_pixels: int) -> tuple[int, int]:
    """Checks an image file's number of pixels, and that it has its end, before it is decoded.

    OpenCV decodes a JPEG that is cut short as if it were whole, the rest of it grey.

    Returns:
        Width and height; zeros where Pillow does not know the format.

    Raises:
        BadImage: it has too many pixels, or is cut short.
    """
    check_length(encoded[:12].tobytes(), encoded.size)
    file = io.BytesIO(encoded)
    header = read_header(file, max_pixels)
    if header is None:
        return 0, 0
    check_end(header, encoded[-TAIL_BYTES:].tobytes(), file)
    return header.size


def choose_divisor(encoded: np.ndarray, sides: Sequence[int], image_size: Sequence[int]) -> int:
    """Returns the largest of 8, 4, 2 and 1 by which a JPEG file's picture stays at least as large as `image_size`."""
    if encoded[:3].tobytes() != JPEG_START:
        return 1
    # Its EXIF orientation may turn the picture: the shorter side is taken for both.
    return next(divisor for divisor in (8, 4, 2, 1) if divisor == 1 or min(sides) // divisor >= max(image_size))


def resize_image(image: np.ndarray, image_size: Sequence[int], target: np.ndarray | None = None) -> np.ndarray:
    """Resizes an image to `(height, width)`; the aspect ratio may change.

    Where it shrinks, areas are averaged; where the sides shrink by less than 1.5, neighbours are interpolated, which
    takes 0.1 ms instead of 0.5 ms from 240x320 to 224x224.

    Args:
        image: `(any height, any width, 3)`.
        image_size: `(height, width)`.
        target: receives the result, `(height, width, 3)` of the image's type; None makes a new array.
    """
    height, width = image_size
    if image.shape[:2] == (height, width):
        if target is None:
            return image
        target[:] = image
        return target
    ratios = image.shape[0] / height, image.shape[1] / width
    averages = min(ratios) >= 1 and max(ratios) >= 1.5
    return cv2.resize(image, (width, height), target, interpolation=cv2.INTER_AREA if averages else cv2.INTER_LINEAR)


def read_header(file: BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS) -> PIL.Image.Image | None:
    """Reads the header of an image file with Pillow, which decodes no pixel.

    Args:
        file: the open file, or its bytes.
        max_pixels: what the image may have.

    Returns:
        The image, not loaded; None where Pillow does not know the format.

    Raises:
        BadImage: the header is damaged, or names too many pixels.
    """
    PIL.Image.MAX_IMAGE_PIXELS = max_pixels
    start, size = file.read(26), file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        image = PIL.Image.open(file)
        pixels = image.size[0] * image.size[1]
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        pixels = int(re.search(r"\d+", str(error))[0])
    except PILLOW_ERRORS as error:
        if start.startswith(FIRST_BYTES):
            raise BadImage("unreadable", "its header is damaged or cut short") from error
        return None
    if pixels > max_pixels:
        raise BadImage("too_many_pixels", f"it has {pixels:,} pixels, more than max_image_pixels ({max_pixels:,})")
    bits = start[24] * PNG_CHANNELS[start[25]] if image.format == "PNG" else 1
    if pixels * bits > size * MOST_BITS_A_BYTE and pixels > ALWAYS_POSSIBLE_PIXELS:
        raise BadImage("unreadable", f"its header names {pixels:,} pixels, which {size:,} bytes cannot hold")
    return image


def check_length(start: bytes, size: int) -> None:
    """Raises BadImage where a file of `size` bytes is shorter than its first 12 bytes say."""
    for name, (position, more) in LENGTH_FIELDS.items():
        if start.startswith(name) and int.from_bytes(start[position : position + 4], "little") + more > size:
            raise BadImage("truncated", "it is shorter than its header says")


def check_end(image: PIL.Image.Image, tail: bytes, file: BinaryIO) -> None:
    """Checks that a file has its end: from its last bytes, `tail`, where they suffice.

    Args:
        image: from `read_header`.
        tail: the last bytes of the file.
        file: open, for the rest of it.

    Raises:
        BadImage: the file is truncated.
    """
    mark = END_MARKS.get(image.format)
    if mark is None or tail.endswith(mark):
        return
    file.seek(0)
    data = file.read()
    if data.find(mark, find_scan(data)) < 0 and not decodes_strictly(data):
        raise BadImage("truncated", "its end is missing")


def find_scan(data: bytes) -> int:
    """Returns where a JPEG's compressed pixels begin: thumbnails before them have end marks of their own."""
    position = 2
    while data[:2] == b"\xff\xd8" and position + 4 <= len(data) and data[position] == 0xFF:
        if data[position + 1] == 0xDA:
            return position
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return 0


def decodes_strictly(data: bytes) -> bool:
    """Tells whether Pillow, which refuses what is cut short, decodes a file without an end mark."""
    try:
        PIL.Image.open(io.BytesIO(data)).load()
    except PILLOW_ERRORS:
        return False
    return True


def find_orientation(image: PIL.Image.Image) -> int:
    """Returns the EXIF orientation of an image from its header, 1 to 8; 1 is upright, and where there is none."""
    orientation = 1
    with contextlib.suppress(*PILLOW_ERRORS):
        if image.format == "TIFF":
            orientation = image.tag_v2.get(0x0112, 1)
        elif "exif" in image.info:
            exif = PIL.Image.Exif()
            exif.load(image.info["exif"])
            orientation = exif.get(0x0112, 1)
    return orientation if orientation in range(2, 9) else 1


def check_chunks(data: bytes) -> None:
    """Raises BadImage where a chunk of a PNG file is longer than the file: OpenCV would take that much memory."""
    position = 8
    while position + 8 <= len(data):
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        if position > len(data):
            raise BadImage("unreadable", "a part of it is longer than the file")
        if data.startswith(b"IEND", position - 8):
            return


def decode_animated_png(data: bytes | np.ndarray) -> np.ndarray | None:
    """Decodes the first picture of an animated PNG with Pillow: OpenCV 4.12 crashes where such a file is damaged.

    Returns:
        uint8 RGB `(height, width, 3)`, upright; None where the file is no animated PNG.

    Raises:
        BadImage: it cannot be decoded.
    """
    data = bytes(data) if bytes(data[:4]) == b"\x89PNG" else b""
    check_chunks(data)
    if b"acTL" not in data:
        return None
    try:
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
        return np.array(image.convert("RGBA").convert("RGB"))
    except PILLOW_ERRORS as error:
        raise BadImage("unreadable", "it is damaged") from error


def decode_grey(data: bytes, start: bytes, sides: tuple[int, int]) -> np.ndarray:
    """Decodes an image in grey; a JPEG at a fraction of its size: all of its compressed pixels are read all the same.

    Args:
        data: of the file.
        start: its first bytes.
        sides: its width and height.

    Returns:
        uint8 `(height, width)`.

    Raises:
        BadImage: it cannot be decoded.
    """
    is_jpeg = start.startswith(JPEG_START)
    divisor = next(number for number in (8, 4, 2, 1) if number == 1 or (is_jpeg and min(sides) >= number * 40))
    picture = decode_animated_png(data)
    try:
        if picture is not None:
            picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        else:
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), GREY_FLAGS[divisor])
    except cv2.error as error:
        raise BadImage("unreadable", f"OpenCV cannot decode it: {error.err}") from error
    if picture is None:
        raise BadImage("unreadable", "it is damaged, or of a kind that OpenCV does not read")
    return picture
