"""Random crops of a picture at its own size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Width to height of a crop, at the least and at the most.
CROP_RATIOS = 3 / 4, 4 / 3
MOST_TRIES = 10


def draw_crop(
    image_size: Sequence[int], area: Sequence[float], generator: np.random.Generator, shape: float = 1.0
) -> tuple[slice, slice]:
    """Draws the part of a picture that is shown: its area uniformly, the logarithm of its ratio too, then its place.

    Source: Szegedy et al., CVPR 2015 (arXiv:1409.4842), section 6; the tries and the ratios are those of torchvision's
    RandomResizedCrop. Where none of the tries fits, it is the largest part of an allowed ratio, from the middle.

    Args:
        image_size: `(height, width)` of the picture.
        area: the least and the largest share of it, in `(0, 1]`.
        generator: draws.
        shape: width to height that a crop's ratio is relative to, as `choose_shape` gives it.

    Returns:
        The rows and the columns, at least one of each.
    """
    height, width = image_size
    for _ in range(MOST_TRIES):
        pixels = height * width * generator.uniform(*area)
        ratio = shape * math.exp(generator.uniform(*map(math.log, CROP_RATIOS)))
        rows, columns = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top = int(generator.integers(height - rows + 1))
            left = int(generator.integers(width - columns + 1))
            return slice(top, top + rows), slice(left, left + columns)
    lowest, highest = (shape * ratio for ratio in CROP_RATIOS)
    rows, columns = min(height, max(1, round(width / lowest))), min(width, max(1, round(height * highest)))
    top, left = (height - rows) // 2, (width - columns) // 2
    return slice(top, top + rows), slice(left, left + columns)


def choose_shape(picture_size: Sequence[int], image_size: Sequence[int], resize_mode: str) -> float:
    """Returns the width to height that crops are drawn around.

    With `crop` and `pad` things in a test image keep their shape: random crops are then of nearly the input's shape, to
    which they are stretched, or of nearly the picture's own, padded as test images are.

    Args:
        picture_size: `(height, width)` of the picture.
        image_size: `(height, width)` of the model's input.
        resize_mode: one of `configs.RESIZE_MODES`.
    """
    sizes = {"stretch": (1, 1), "crop": image_size, "pad": picture_size}
    height, width = sizes[resize_mode]
    return width / height


def enlarge_for_crops(image_size: Sequence[int], area: Sequence[float]) -> list[int]:
    """Returns the size `(height, width)` of a picture whose smallest crop has at least `image_size` pixels."""
    factor = 1 / math.sqrt(area[0] * CROP_RATIOS[0])
    return [math.ceil(side * factor) for side in image_size]
