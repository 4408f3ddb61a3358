"""Measures how many planted near copies the search finds, and how many of its pairs are wrong.

python benchmarks/near_copies.py FOLDER [FOLDER ...]
    plants altered copies of up to 300 photos among all photos of each folder, one alteration at a time, and searches
    for them; prints recall and precision. Pairs that the search finds without planted copies count as real: check
    them. --pairs FILE.png shows 100 of them, drawn at random.
python benchmarks/near_copies.py --scale NUMBER
    searches that many images of filtered noise, with 1 % altered copies; prints seconds and peak memory
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from finetune.data.images import read_image
from finetune.data.near_copies import (
    THUMBNAIL_SIDE,
    find_near_pairs,
    group_near_pairs,
    make_thumbnail,
    stack_thumbnails,
)

PLANTED = 300
Alteration = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def compress(image: np.ndarray, quality: int = 80) -> np.ndarray:
    """Returns an image, uint8 RGB `(height, width, 3)`, after JPEG compression."""
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def crop(image: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Crops a share of height and width from random sides of an image."""
    sides = np.array(image.shape[:2])
    kept = np.maximum((sides * (1 - share)).round().astype(int), 1)
    top, left = (rng.uniform(0, 1, 2) * (sides - kept)).astype(int)
    return image[top : top + kept[0], left : left + kept[1]]


def turn(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turns an image about its centre; its edges are mirrored outwards."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)


def scale_values(image: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """Returns `factor * (image - 128) + 128 + offset`, clipped."""
    return np.clip((image.astype(float) - 128) * factor + 128 + offset, 0, 255).astype(np.uint8)


ALTERATIONS: dict[str, Alteration] = {
    "JPEG quality 30": lambda image, rng: compress(image, 30),
    "half the size": lambda image, rng: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "cropped by 5 %": lambda image, rng: crop(image, rng, 0.05),
    "cropped by 10 %": lambda image, rng: crop(image, rng, 0.1),
    "30 brighter": lambda image, rng: scale_values(image, 1, 30),
    "30 darker": lambda image, rng: scale_values(image, 1, -30),
    "contrast 0.7": lambda image, rng: scale_values(image, 0.7, 0),
    "contrast 1.3": lambda image, rng: scale_values(image, 1.3, 0),
    "mirrored": lambda image, rng: image[:, ::-1].copy(),
    "turned by 2 degrees": lambda image, rng: turn(image, 2),
}


def measure(folder: str, pairs_path: str) -> None:
    """Prints recall and precision of each alteration of the photos in a folder, and the groups without copies."""
    files = sorted(str(path) for path in Path(folder).rglob("*.jpg"))
    images = [read_image(file) for file in files]
    thumbnails = [make_thumbnail(image) for image in images]
    seen = [row for row, thumbnail in enumerate(thumbnails) if thumbnail is not None]
    base = stack_thumbnails([thumbnails[row] for row in seen])
    found = find_near_pairs(base).pairs
    groups = group_near_pairs(len(base), found)
    roots = np.array([groups[row] for row in range(len(base))])
    sizes = np.sort(np.unique(roots, return_counts=True)[1])[::-1]
    print(f"{folder}: {len(base)} photos, {len(found)} pairs in {(sizes > 1).sum()} groups, largest {sizes[:5]}")
    rng, real = np.random.default_rng(0), {(pair.first, pair.second) for pair in found}
    if pairs_path:
        draw_pairs(pairs_path, [(files[seen[pair.first]], files[seen[pair.second]]) for pair in found], rng)
    rows = np.sort(rng.permutation(len(base))[:PLANTED])
    for name, alter in ALTERATIONS.items():
        planted = [make_thumbnail(compress(alter(images[seen[row]], rng))) for row in rows]
        # An image of one tone has nothing to find.
        kept = [(row, one) for row, one in zip(rows, planted, strict=True) if one is not None]
        pairs = find_near_pairs(np.concatenate([base, stack_thumbnails([one for _, one in kept])])).pairs
        joined = group_near_pairs(len(base) + len(kept), pairs)
        hits = sum(joined.connected(row, len(base) + copy) for copy, (row, _) in enumerate(kept))
        originals = [*range(len(base)), *(row for row, _ in kept)]
        named = [(originals[pair.first], originals[pair.second]) for pair in pairs]
        right = sum(
            roots[first] == roots[second] or (min(first, second), max(first, second)) in real for first, second in named
        )
        print(f"  {name:20} recall {hits / len(rows):.3f}  precision {right / max(len(pairs), 1):.4f}", flush=True)


def draw_pairs(path: str, pairs: list[tuple[str, str]], rng: np.random.Generator) -> None:
    """Writes a sheet of up to 100 random pairs of photos."""
    side, columns = 110, 8
    chosen = [pairs[row] for row in np.sort(rng.permutation(len(pairs))[:100])]
    cells = [np.hstack([cv2.resize(cv2.imread(file), (side, side)) for file in pair]) for pair in chosen]
    cells = [cv2.copyMakeBorder(cell, 0, 4, 0, 6, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for cell in cells]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    rows = [np.hstack(cells[start : start + columns]) for start in range(0, len(cells), columns)]
    cv2.imwrite(path, np.vstack(rows))


def measure_scale(number: int) -> None:
    """Prints how long the search takes on images of noise with the spectrum of photos."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(THUMBNAIL_SIDE)] * 2)) + 1 / THUMBNAIL_SIDE
    thumbnails = np.empty((number, THUMBNAIL_SIDE, THUMBNAIL_SIDE), np.uint8)
    for start in range(0, number, 1000):
        part = thumbnails[start : start + 1000]
        noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal(part.shape)) / frequency).real
        part[:] = np.clip(128 + 50 * noise / noise.std(axis=(1, 2), keepdims=True), 0, 255)
    copies = rng.permutation(number)[: number // 100 * 2].reshape(2, -1)
    for first, second in copies.T:
        thumbnails[second] = cv2.resize(thumbnails[first][2:62, 1:61], (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    pairs = {(pair.first, pair.second) for pair in find_near_pairs(thumbnails).pairs}
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hits = sum((min(pair), max(pair)) in pairs for pair in copies.T.tolist())
    print(
        f"{number} images: {seconds:.0f} s, {(peak - before) / 2**20:.2f} GiB and {thumbnails.nbytes / 2**30:.2f} "
        f"GiB of thumbnails; {hits} of {copies.shape[1]} copies found, {len(pairs) - hits} other pairs"
    )


def main() -> None:
    """Runs the measurements of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--scale", type=int, default=0)
    parser.add_argument("--pairs", default="")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    for folder in options.folders:
        measure(folder, options.pairs)
    if options.scale:
        measure_scale(options.scale)


if __name__ == "__main__":
    main()
