"""Inspects image files: faults, unusual properties, the range of their values, and thumbnails."""

from __future__ import annotations

import contextlib
import functools
import io
import math
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

from configs import MAX_IMAGE_PIXELS, Configs
from finetune.core.files import IMAGE_SUFFIXES
from finetune.core.texts import show_count, show_progress
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
from finetune.data.stores import STORE_THREADS, explain_missing, is_url, open_url, read_bytes
from finetune.data.tables import make_image_table, parse_table
from finetune.data.tiffs import (
    ASSUMED_RANGES,
    Layout,
    Measure,
    find_odd_values,
    find_range,
    measure_values,
    read_layout,
)

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


TIFF_SUFFIXES = (".tif", ".tiff")
NAMES = {"float": "float TIFFs", "integer": "32-bit integer TIFFs"}
# Far enough from float64's own limits for differences to be finite.
LARGEST = 2.0**1022
# How many images are compared with a range. Little is left to see of a picture if this share of its values is outside
# the range, or if it spans less than this share of the range.
MOST_COMPARED, TOO_FAR_BEYOND, LEAST_SPAN = 100, 0.5, 0.02


def resolve_pixel_range(configs: Configs, csv_paths: Sequence[str]) -> Configs:
    """Returns the options with a `pixel_range`, as `resolve_pixel_range_of_files` does, for the images of tables.

    Raises:
        UserError: a table is not usable.
    """
    column = configs.csv_label_column
    tables = [
        make_image_table("", path, parse_table(path, column), column, configs.image_directory)
        for path in dict.fromkeys(csv_paths)
    ]
    return resolve_pixel_range_of_files(configs, {table.csv_path: table.files for table in tables})


def resolve_pixel_range_of_files(configs: Configs, files: dict[str, Sequence[str]]) -> Configs:
    """Returns the options with a `pixel_range`; prints it, and which tables do not fit it.

    Args:
        configs: the options.
        files: images by the table that names them. A range that is not given comes from the first table's images, and
            stays empty if none of them needs one.
    """
    if configs.pixel_range:
        for source in files:
            tell_unfit_range(source, files[source], configs.pixel_range)
        return configs
    csv_path, *others = files
    found = [one for one in measure_files(files[csv_path], configs) if one.low <= one.high]
    if not found:
        for other in others:
            tell_assumed_range(other, files[other], configs.pixel_range)
        return configs
    values, parts = [], []
    for kind in NAMES:
        if own := [one for one in found if one.kind == kind]:
            low, high = min(one.low for one in own), max(one.high for one in own)
            black, white = choose_range(kind, low, high)
            values += [black, white]
            held = f"values in the {len(own)} of {csv_path}: {low:g} to {high:g}"
            parts.append(f"{NAMES[kind]}: {black:g} is black and {white:g} white ({held})")
    text = "; ".join(parts)
    print(f"{text[0].upper()}{text[1:]}. --pixel_range LOW HIGH sets other values.")
    for other in others:
        tell_unfit_range(other, files[other], values)
    return configs.replace(pixel_range=values)


def choose_range(kind: str, low: float, high: float) -> tuple[float, float]:
    """Returns the values that are black and white for pictures with these limits; 0 and 1 for floats within them."""
    if kind == "float" and ASSUMED_RANGES[kind][0] <= low and high <= ASSUMED_RANGES[kind][1]:
        return ASSUMED_RANGES[kind]
    low, high = (float(np.clip(value, -LARGEST, LARGEST)) for value in (low, high))
    return low, high if high > low else low + max(1.0, abs(low))


def tell_assumed_range(source: str, files: Sequence[str], pixel_range: Sequence[float]) -> None:
    """Prints which values are assumed to be black and white if images need a `pixel_range` and it is empty."""
    if not len(pixel_range) and (number := len(_pick_needing(files))):
        floats, integers = (f"{low:g} is black and {high:g} white" for low, high in ASSUMED_RANGES.values())
        print(
            f"{source}: {show_count(number, 'float or 32-bit TIFF')} without a pixel_range from training images. "
            f"Assumed: in floats {floats}, in integers {integers}. --pixel_range LOW HIGH sets other values."
        )


def tell_unfit_range(source: str, files: Sequence[str], pixel_range: Sequence[float]) -> None:
    """Prints how many images a `pixel_range` makes mostly black or white; compares up to `MOST_COMPARED`."""
    if not len(pixel_range):
        return
    needing = _pick_needing(files)
    compared = needing[:: max(1, -(-len(needing) // MOST_COMPARED))]
    if unfit := [file for file in compared if is_unfit(file, pixel_range)]:
        kinds = zip(NAMES.values(), (find_range(pixel_range, kind) for kind in NAMES), strict=True)
        ranges = ", ".join(f"{low:g} to {high:g} for {name}" for name, (low, high) in kinds)
        print(
            f"{source}: {len(unfit)} of {show_count(len(compared), 'float or 32-bit TIFF')} compared with pixel_range "
            f"({ranges}) become mostly black or white, for example {unfit[0]}. Check their units."
        )


def is_unfit(path: str, pixel_range: Sequence[float]) -> bool:
    """Returns whether `pixel_range` leaves little to see of a TIFF; False if it is flat or cannot be read."""
    found = _measure(path, pixel_range)
    if found is None:
        return False
    low, high = find_range(pixel_range, found.kind)
    span = min(found.high, high) - max(found.low, low)
    return found.low < found.high and (found.beyond > TOO_FAR_BEYOND or span < LEAST_SPAN * (high - low))


def needs_range(path: str) -> bool:
    """Returns whether a file is a TIFF that needs a `pixel_range`; False if it cannot be read."""
    try:
        return read_range_layout(path) is not None
    except (BadImage, *PILLOW_ERRORS):
        return False


def _pick_needing(files: Sequence[str], workers: int | None = None) -> list[str]:
    with ThreadPoolExecutor(workers) as pool:
        return [file for file, needs in zip(files, pool.map(needs_range, files), strict=True) if needs]


def read_range_layout(path: str) -> Layout | None:
    """Returns the layout of an image that needs a `pixel_range`, else None; a URL must end as TIFFs do."""
    # Folders, devices and pipes are not read.
    if not (path.lower().endswith(TIFF_SUFFIXES) if is_url(path) else os.path.isfile(path)):
        return None
    with open_url(path) if is_url(path) else open(path, "rb") as file:
        layout = read_layout(file)
    return layout if layout is not None and layout.kind in NAMES else None


def measure_files(files: Sequence[str], configs: Configs) -> list[Measure]:
    """Measures those files that need a `pixel_range` and can be read."""
    workers = max(configs.generator_workers, 1)
    files, found = _pick_needing(list(filter(None, dict.fromkeys(files))), workers), []
    measure = functools.partial(_measure, max_pixels=configs.max_image_pixels)
    with ThreadPoolExecutor(workers) as pool, show_progress(len(files), "Measuring TIFFs", delay=1) as progress:
        for one in pool.map(measure, files):
            found += [one] * (one is not None)
            progress.update(1)
    return found


def _measure(path: str, pixel_range: Sequence[float] = (), max_pixels: float = math.inf) -> Measure | None:
    """Measures a file; None if it has too many pixels or cannot be read, which the data check reports."""
    try:
        layout = read_range_layout(path)
        if layout.size[0] * layout.size[1] > max_pixels:
            return None
        return measure_values(read_bytes(path).tobytes(), layout, pixel_range)
    except (BadImage, *PILLOW_ERRORS):
        return None
