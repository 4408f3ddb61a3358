"""Mixing the images of a batch, and their labels by the same shares: mixup and CutMix."""

from __future__ import annotations

import cv2
import numpy as np


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
