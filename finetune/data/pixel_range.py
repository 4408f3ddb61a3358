"""Which values of float and 32-bit TIFFs are black and white: from a run's training images, or assumed."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from configs import Configs
from finetune.core.texts import show_count, show_progress
from finetune.data.findings import BadImage
from finetune.data.headers import PILLOW_ERRORS
from finetune.data.stores import is_url, open_url, read_bytes
from finetune.data.tables import make_image_table, parse_table
from finetune.data.tiffs import ASSUMED_RANGES, Layout, Measure, find_range, measure_values, read_layout

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
