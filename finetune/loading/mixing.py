"""Augmentations of a batch: random resized crops, mixup and CutMix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

# Smallest and largest width to height of a crop.
CROP_RATIOS = 3 / 4, 4 / 3
MOST_TRIES = 10


def draw_crop(
    image_size: Sequence[int], area: Sequence[float], generator: np.random.Generator, shape: float = 1.0
) -> tuple[slice, slice]:
    """Draws a random crop: its area uniformly, its aspect ratio log-uniformly, then its place.

    If no try fits into the picture, the largest centred crop of an allowed ratio is taken.

    Source: Szegedy et al., CVPR 2015 (arXiv:1409.4842), section 6; tries and ratios as in torchvision's
    RandomResizedCrop.

    Args:
        image_size: `(height, width)` of the picture.
        area: smallest and largest share of the picture, in `(0, 1]`.
        generator: draws.
        shape: width to height to which ratios are relative: see `choose_shape`.

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
    """Returns the width to height around which the ratios of crops are drawn.

    With `crop` and `pad`, objects in a test image keep their shape. So random crops have about the shape of the input
    (`crop`), or about that of the picture, and are padded like test images (`pad`).
    """
    sizes = {"stretch": (1, 1), "crop": image_size, "pad": picture_size}
    height, width = sizes[resize_mode]
    return width / height


def enlarge_for_crops(image_size: Sequence[int], area: Sequence[float]) -> list[int]:
    """Returns the `(height, width)` of a picture whose smallest crop still has `image_size`."""
    factor = 1 / math.sqrt(area[0] * CROP_RATIOS[0])
    return [math.ceil(side * factor) for side in image_size]


def mix_batch(
    images: np.ndarray, labels: np.ndarray, generator: np.random.Generator, mixup_alpha: float, cutmix_alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mixes each image of a batch with a partner, and their labels in the same proportion.

    mixup blends the two images; CutMix pastes a box of the partner. If both alphas are above 0, each batch uses one of
    them at even odds. The partners are a random permutation of the batch; an image may be its own partner. Each pair
    draws its own share and box, as in the papers' equations. The papers' programs draw one share a batch.

    Source: Zhang et al., ICLR 2018, section 1 (arXiv:1710.09412); Yun et al., ICCV 2019, eqs. 1-2 (arXiv:1905.04899).

    Args:
        images: uint8 `(batch, height, width, 3)`.
        labels: float `(batch, classes)`.
        generator: draws everything.
        mixup_alpha: shares are drawn from Beta(alpha, alpha); 0 turns mixup off.
        cutmix_alpha: the same for CutMix; one of the two is above 0.

    Returns:
        The mixed images, uint8, and labels, float32.
    """
    cuts = cutmix_alpha > 0 and (mixup_alpha <= 0 or generator.random() < 0.5)
    alpha = cutmix_alpha if cuts else mixup_alpha
    others = generator.permutation(len(images))
    shares = generator.beta(alpha, alpha, len(images))
    mix = _paste if cuts else _blend
    mixed, shares = mix(images, images[others], shares, generator)
    own = shares.astype(np.float32)[:, None]
    return mixed, (own * labels + (1 - own) * labels[others]).astype(np.float32)


def _blend(
    images: np.ndarray, others: np.ndarray, shares: np.ndarray, _: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    mixed = np.empty_like(images)
    for target, image, other, share in zip(mixed, images, others, shares.tolist(), strict=True):
        cv2.addWeighted(image, share, other, 1 - share, 0, target)
    return mixed, shares


def _paste(
    images: np.ndarray, others: np.ndarray, shares: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pastes boxes with the image's aspect ratio around random centres, cut off at the border.

    Returns:
        The images, and the share of pixels that each has kept.
    """
    mixed, sides = images.copy(), np.array(images.shape[1:3])
    box_sides = np.rint(sides * np.sqrt(1 - shares)[:, None]).astype(int)
    starts = generator.integers(sides, size=box_sides.shape) - box_sides // 2
    starts, ends = np.maximum(starts, 0), np.minimum(starts + box_sides, sides)
    for target, other, (top, left), (bottom, right) in zip(mixed, others, starts, ends, strict=True):
        target[top:bottom, left:right] = other[top:bottom, left:right]
    return mixed, 1 - (ends - starts).prod(axis=1) / sides.prod()
