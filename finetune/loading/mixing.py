"""Augmentations of a batch: random resized crops, mixup and CutMix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
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


def mix_batch(
    images: np.ndarray, labels: np.ndarray, generator: np.random.Generator, mixup_alpha: float, cutmix_alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mixes each image of a batch with another one of it, and their labels by the same share.

    mixup blends the two; CutMix pastes a box of the other into the one. Where both alphas are above 0, even odds choose
    one of them for the batch. The others are a random permutation of the batch, in which an image may meet itself.
    Each pair has a share, and a box, of its own, as in the papers' equations; their programs draw one a batch.

    Source: Zhang et al., ICLR 2018, section 1 (arXiv:1710.09412); Yun et al., ICCV 2019, eqs. 1-2 (arXiv:1905.04899).

    Args:
        images: uint8 `(batch, height, width, 3)`.
        labels: float `(batch, classes)`.
        generator: draws everything.
        mixup_alpha: shares are drawn from Beta(alpha, alpha); 0 leaves mixup out.
        cutmix_alpha: likewise of CutMix; one of the two is above 0.

    Returns:
        The mixed images, uint8, and labels, float32: each image's own share of both, and its other's for the rest.
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
    """Pastes boxes that have the image's own aspect ratio and any centre; the border cuts them off.

    Returns:
        The images, and their own shares of the pixels as they are then.
    """
    mixed, sides = images.copy(), np.array(images.shape[1:3])
    box_sides = np.rint(sides * np.sqrt(1 - shares)[:, None]).astype(int)
    starts = generator.integers(sides, size=box_sides.shape) - box_sides // 2
    starts, ends = np.maximum(starts, 0), np.minimum(starts + box_sides, sides)
    for target, other, (top, left), (bottom, right) in zip(mixed, others, starts, ends, strict=True):
        target[top:bottom, left:right] = other[top:bottom, left:right]
    return mixed, 1 - (ends - starts).prod(axis=1) / sides.prod()
