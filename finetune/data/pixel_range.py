"""Which values of float and 32-bit TIFFs are black and white: found in a run's training images, or assumed."""

from __future__ import annotations

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
# How many images are compared with a given range; the share of a picture's values beyond it, and the share of it that a
# picture spans, from which on little is left to see.
MOST_COMPARED, TOO_FAR_BEYOND, LEAST_SPAN = 100, 0.5, 0.02


def resolve_pixel_range(configs: Configs, csv_paths: Sequence[str]) -> Configs:
    """Returns the options with the `pixel_range` of the first table's images: see `resolve_pixel_range_of_files`.

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
    """Returns the options with a `pixel_range`; prints what is black and white, and which tables that does not fit.

    Args:
        configs: the options.
        files: images by the table that names them. The first table's images set a range that is not given. If only
            others need one, it stays empty.
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
        own = [one for one in found if one.kind == kind]
        if not own:
            continue
        low, high = min(one.low for one in own), max(one.high for one in own)
        black, white = choose_range(kind, low, high)
        values += [black, white]
        held = f"the {len(own)} of {csv_path} hold {low:g} to {high:g}"
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
    """Prints which values are assumed to be black and white if images need a `pixel_range` and there is none."""
    if len(pixel_range):
        return
    with ThreadPoolExecutor() as pool:
        number = sum(pool.map(needs_range, files, chunksize=64))
    if number:
        floats, integers = (f"{low:g} is black and {high:g} white" for low, high in ASSUMED_RANGES.values())
        print(
            f"{source}: {show_count(number, 'float or 32-bit TIFF')} without a pixel_range from training images. "
            f"Assumed: in floats {floats}, in integers {integers}. --pixel_range LOW HIGH sets other values."
        )


def tell_unfit_range(source: str, files: Sequence[str], pixel_range: Sequence[float]) -> None:
    """Prints how many images a `pixel_range` makes mostly black or white; compares up to `MOST_COMPARED`."""
    if not len(pixel_range):
        return
    with ThreadPoolExecutor() as pool:
        needing = [file for file, needs in zip(files, pool.map(needs_range, files, chunksize=64), strict=True) if needs]
        compared = needing[:: max(1, -(-len(needing) // MOST_COMPARED))]
        unfit = [file for file in compared if is_unfit(file, pixel_range)]
    if unfit:
        kinds = zip(NAMES.values(), (find_range(pixel_range, kind) for kind in NAMES), strict=True)
        ranges = ", ".join(f"{low:g} to {high:g} for {name}" for name, (low, high) in kinds)
        print(
            f"{source}: {len(unfit)} of {show_count(len(compared), 'float or 32-bit TIFF')} compared with pixel_range "
            f"({ranges}) become mostly black or white, as {unfit[0]} does. Check their units."
        )


def is_unfit(path: str, pixel_range: Sequence[float]) -> bool:
    """Returns whether `pixel_range` leaves little to see of a TIFF; False of one that is flat or cannot be read."""
    try:
        layout = read_range_layout(path)
        found = measure_values(read_bytes(path).tobytes(), layout, pixel_range)
    except (BadImage, *PILLOW_ERRORS):
        return False
    low, high = find_range(pixel_range, found.kind)
    span = min(found.high, high) - max(found.low, low)
    return found.low < found.high and (found.beyond > TOO_FAR_BEYOND or span < LEAST_SPAN * (high - low))


def needs_range(path: str) -> bool:
    """Returns whether a file is a TIFF that needs a `pixel_range`; False if it cannot be read."""
    try:
        layout = read_range_layout(path)
    except (BadImage, *PILLOW_ERRORS):
        return False
    return layout is not None


def read_range_layout(path: str) -> Layout | None:
    """Returns the layout of an image that needs a `pixel_range`, else None; a URL needs a TIFF's ending."""
    # Folders, devices and pipes are not read.
    if not (path.lower().endswith(TIFF_SUFFIXES) if is_url(path) else os.path.isfile(path)):
        return None
    with open_url(path) if is_url(path) else open(path, "rb") as file:
        layout = read_layout(file)
    return layout if layout is not None and layout.kind in NAMES else None


def measure_files(files: Sequence[str], configs: Configs) -> list[Measure]:
    """Measures those files that need a `pixel_range` and can be read."""

    def measure(path: str) -> Measure | None:
        # A file that cannot be read is the data check's to report.
        try:
            layout = read_range_layout(path)
            if layout.size[0] * layout.size[1] > configs.max_image_pixels:
                return None
            return measure_values(read_bytes(path).tobytes(), layout)
        except (BadImage, *PILLOW_ERRORS):
            return None

    files, found = list(filter(None, dict.fromkeys(files))), []
    with ThreadPoolExecutor(max(configs.generator_workers, 1)) as pool:
        files = [file for file, is_needed in zip(files, pool.map(needs_range, files), strict=True) if is_needed]
        with show_progress(len(files), "Measuring TIFFs", delay=1) as progress:
            for one in pool.map(measure, files):
                found += [one] * (one is not None)
                progress.update(1)
    return found
