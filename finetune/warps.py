"""Running imgaug's augmenters, neighbours fused where that gives the same picture sooner."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import cv2
import numpy as np
from imgaug import Keypoint, KeypointsOnImage
from imgaug import augmenters as iaa

AFFINE = (iaa.Affine, iaa.Fliplr, iaa.Flipud)
# These give each value of a channel a new one, wherever in the image it stands.
BY_VALUE = (iaa.Add, iaa.Multiply, iaa.LinearContrast, iaa.GammaContrast, iaa.LogContrast, iaa.SigmoidContrast)
BY_VALUE += (iaa.Invert,)


class FusedAugmenter:
    """Runs imgaug augmenters one after another, with neighbours fused where that gives the same picture sooner.

    imgaug draws every random number. Flips and affine augmenters that stand beside each other become one warp, which
    also blurs an image once only; those that change values become one look-up table. All others run as they are.

    Args:
        augmenters: in the order of their use; each keeps an image's size.
    """

    def __init__(self, augmenters: Iterable[iaa.Augmenter]) -> None:
        self._all = iaa.Sequential(list(augmenters))
        groups = itertools.groupby(self._all, key=_way_of_running)
        # Groups hold the same augmenters as `_all`: seeding that seeds them.
        self._groups = [(run, iaa.Sequential(list(members))) for run, members in groups]

    def seed_(self, seed: int) -> None:
        """Starts the random numbers anew: the same seed gives the same images."""
        self._all.seed_(seed)

    def deepcopy(self) -> FusedAugmenter:
        """Returns a copy with random numbers of its own, as another thread needs one."""
        return copy.deepcopy(self)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns changed copies of images, uint8 `(batch, height, width, 3)`."""
        images = np.asarray(images)
        if self._groups and self._groups[0][0] is _look_up:
            images = images.copy()
        for run, augmenters in self._groups:
            images = run(augmenters, images)
        return images


def _way_of_running(augmenter: iaa.Augmenter) -> object:
    if isinstance(augmenter, BY_VALUE):
        return _look_up
    is_other_warp = isinstance(augmenter, iaa.Affine) and not (
        # `_warp` knows one interpolation and one border; imgaug draws the rest itself.
        getattr(augmenter.mode, "value", None) == "reflect"
        and getattr(augmenter.order, "value", None) == 1
        and not augmenter.fit_output
    )
    return _warp if isinstance(augmenter, AFFINE) and not is_other_warp else _leave_to_imgaug


def _leave_to_imgaug(augmenters: iaa.Sequential, images: np.ndarray) -> np.ndarray:
    return augmenters(images=images)


def _warp(augmenters: iaa.Sequential, images: np.ndarray) -> np.ndarray:
    """Asks where three corners go, which tells the affine map, and warps each image once."""
    number, height, width, _ = images.shape
    corners = KeypointsOnImage([Keypoint(0, 0), Keypoint(width, 0), Keypoint(0, height)], shape=images.shape[1:])
    moved = np.stack([points.to_xy_array() for points in augmenters.augment_keypoints([corners] * number)])
    origins, rights, belows = moved.astype(np.float64).swapaxes(0, 1)
    matrices = np.stack([(rights - origins) / width, (belows - origins) / height, origins], axis=-1)
    # From imgaug's corners of pixels to OpenCV's centres.
    matrices[:, :, 2] += matrices[:, :, :2].sum(axis=2) / 2 - 0.5
    sources = np.stack([cv2.invertAffineTransform(matrix) for matrix in matrices])
    warped = np.empty_like(images)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    for image, target, source, margins in zip(
        images, warped, sources, _find_margins(sources, height, width), strict=True
    ):
        # A margin first: OpenCV is slow for pixels from beyond the border, 0.5 ms against 0.35 ms for both steps.
        if max(margins) < max(height, width):
            left, top, right, bottom = margins
            image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REFLECT_101)
            source[:, 2] += left, top
        cv2.warpAffine(image, source, (width, height), target, flags, cv2.BORDER_REFLECT_101)
    return warped


def _find_margins(sources: np.ndarray, height: int, width: int) -> list[list[int]]:
    """Tells how far a warp reaches beyond an image: left, top, right and bottom, in pixels.

    Args:
        sources: `(batch, 2, 3)`, from pixels of the result to pixels of the image.
        height: of both.
        width: of both.
    """
    corners = np.array([[x, y, 1.0] for x in (0, width - 1) for y in (0, height - 1)])
    reached = sources @ corners.T
    # A pixel more, for interpolation takes the neighbours.
    before = 1 - np.floor(reached.min(axis=2))
    after = np.ceil(reached.max(axis=2)) + 2 - (width, height)
    return np.maximum(np.concatenate([before, after], axis=1), 0).astype(int).tolist()


def _look_up(augmenters: iaa.Sequential, images: np.ndarray) -> np.ndarray:
    """Changes a picture of all 256 values, which gives a look-up table for each image and channel; in place."""
    every_value = np.empty((len(images), 1, 256, images.shape[-1]), np.uint8)
    every_value[:] = np.arange(256, dtype=np.uint8)[:, None]
    tables = augmenters(images=every_value)
    for image, table in zip(images, tables, strict=True):
        cv2.LUT(image, table, image)
    return images
