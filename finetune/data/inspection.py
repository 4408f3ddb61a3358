"""Inspects image files: faults, unusual properties, and thumbnails to find near copies by."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import cv2
import numpy as np
import PIL.Image

from configs import MAX_IMAGE_PIXELS
from finetune.core.files import IMAGE_SUFFIXES
from finetune.core.texts import show_progress
from finetune.data.findings import BadImage, Inspection
from finetune.data.headers import (
    PILLOW_ERRORS,
    PILLOW_FORMATS,
    check_length,
    find_orientation,
    is_transparent,
    lacks_end,
    read_header,
)
from finetune.data.images import decode_pixels
from finetune.data.near_copies import THUMBNAIL_SIDE, make_thumbnail
from finetune.data.stores import STORE_THREADS, explain_missing, is_url, open_url
from finetune.data.tiffs import find_odd_values

FORMAT_SUFFIXES = {
    **dict.fromkeys(("JPEG", "MPO"), (".jpg", ".jpeg", ".jpe", ".jfif")),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
}
TAIL_BYTES = 4096
# Files to decode for an estimate of the time that all of them take.
SAMPLE_FILES = 48
# A JPEG may be decoded at a fraction of its size, but not below this.
SMALLEST_SIDES = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
# Grey values, of 256, between the darkest and the lightest pixel: 12 bits in a 16-bit file give at most 16.
FEWEST_TONES = 16
# Smaller pictures often have one colour.
FEWEST_PIXELS = 64


def inspect_images(
    files: Sequence[str], decode: bool, max_pixels: int, workers: int, pixel_range: Sequence[float] = ()
) -> list[Inspection]:
    """Inspects image files in threads; for a missing file it names the one that is probably meant."""
    size = 32
    if any(map(is_url, files)):
        size, workers = 1, max(workers, STORE_THREADS)
    parts = [files[start : start + size] for start in range(0, len(files), size)]

    def inspect(part: Sequence[str]) -> list[Inspection]:
        return [inspect_image(file, decode, max_pixels, pixel_range) for file in part]

    found = []
    with (
        show_progress(len(files), "Checking images", delay=1) as progress,
        ThreadPoolExecutor(max(workers, 1)) as pool,
    ):
        for part in pool.map(inspect, parts):
            found += part
            progress.update(len(part))
    listed = [*zip(files, found, strict=True)]
    reasons = explain_missing(file for file, one in listed if one.fault and one.fault[0] == "missing")
    return [one._replace(fault=("missing", reasons[file])) if file in reasons else one for file, one in listed]


def estimate_seconds(files: Sequence[str], max_pixels: int, workers: int, pixel_range: Sequence[float] = ()) -> float:
    """Returns how long `inspect_images` would take to decode all files, from a sample."""
    sample = files[:: max(len(files) // SAMPLE_FILES, 1)][:SAMPLE_FILES]
    started = time.monotonic()
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        list(pool.map(lambda file: inspect_image(file, True, max_pixels, pixel_range), sample))
    return (time.monotonic() - started) / max(len(sample), 1) * len(files)


def inspect_image(
    path: str, decode: bool = False, max_pixels: int = MAX_IMAGE_PIXELS, pixel_range: Sequence[float] = ()
) -> Inspection:
    """Inspects the header and the end of an image file or URL and, with `decode`, its pixels."""
    # Also skips folders, devices and pipes.
    if not is_url(path) and not os.path.isfile(path):
        return Inspection(("missing", "does not exist"), [])
    try:
        with open_url(path) if is_url(path) else open(path, "rb") as file:
            return _inspect_open(path, io.BytesIO(file.read()) if decode else file, decode, max_pixels, pixel_range)
    except BadImage as error:
        return Inspection((error.kind, error.detail), [])
    except OSError as error:
        return Inspection(("unreadable", str(error.strerror or error)), [])


def _inspect_open(path: str, file: BinaryIO, decode: bool, max_pixels: int, pixel_range: Sequence[float]) -> Inspection:
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise BadImage("empty", "is empty")
    file.seek(0)
    start = file.read(32)
    file.seek(0)
    check_length(start, size)
    image = read_header(file, max_pixels)
    if (image is None or image.format not in PILLOW_FORMATS) and not is_known_to_opencv(path, file):
        if image is None:
            raise BadImage("not_an_image", "is no image that OpenCV reads")
        raise BadImage("unsupported", f"it is a file of the kind {image.format}")
    file.seek(max(size - TAIL_BYTES, 0))
    tail = file.read()
    remarks, sides, thumbnail = [], (0, 0), None
    if image is not None:
        remarks, sides = list(find_remarks(path, image, start)), image.size
    # Some cameras leave the end mark out: then the pixels decide.
    if decode or (image is not None and lacks_end(image, tail, file)):
        file.seek(0)
        encoded = file.read()
        picture = decode_pixels(np.frombuffer(encoded, np.uint8), image, SMALLEST_SIDES, pixel_range)
        thumbnail = make_thumbnail(picture) if decode else None
        remarks += [*find_lack_of_tones(picture), *find_odd_values(encoded, pixel_range)] if decode else []
    return Inspection(None, remarks, sides, (size, zlib.crc32(tail)), thumbnail)


def is_known_to_opencv(path: str, file: BinaryIO) -> bool:
    """Returns whether OpenCV has a reader for an open file, or for the open object of a URL."""
    if not is_url(path):
        return cv2.haveImageReader(path)
    # OpenCV examines only files.
    with tempfile.TemporaryDirectory() as folder:
        beginning = os.path.join(folder, "beginning")
        file.seek(0)
        with open(beginning, "wb") as copy:
            copy.write(file.read(TAIL_BYTES))
        return cv2.haveImageReader(beginning)


def find_remarks(path: str, image: PIL.Image.Image, start: bytes) -> Iterator[tuple[str, str]]:
    """Yields what is unusual about an image by its header."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES and suffix not in FORMAT_SUFFIXES.get(image.format, (suffix,)):
        yield "wrong_extension", f"its content is {image.format}"
    if (orientation := find_orientation(image)) != 1:
        yield "rotated", f"EXIF orientation {orientation}"
    with contextlib.suppress(*PILLOW_ERRORS):
        # MPO files contain one photo and its previews.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            yield "animated", "several frames or pages"
    if "16" in image.mode or (image.format == "PNG" and start[24:25] == b"\x10"):
        yield "deep", "16 bits a channel"
    if image.mode == "CMYK":
        yield "cmyk", "CMYK"
    if image.mode == "P" and image.format != "GIF":
        yield "palette", "palette"
    if is_transparent(image):
        yield "alpha", "alpha"


def find_lack_of_tones(image: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yields a remark if a picture, uint8 RGB `(height, width, 3)`, has nearly one colour."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    darkest, lightest, *_ = cv2.minMaxLoc(grey)
    # Colours of one brightness differ in their channels, which take longer to compare.
    if (
        lightest - darkest <= FEWEST_TONES
        and grey.size >= FEWEST_PIXELS
        and np.ptp(image, axis=(0, 1)).max() <= FEWEST_TONES
    ):
        yield "nearly_uniform", f"its grey values are from {darkest:.0f} to {lightest:.0f} of 255"
