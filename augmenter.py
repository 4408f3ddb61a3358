"""The random changes that training makes to its images, so that the model learns to ignore them."""

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


def build_augmenter() -> FusedAugmenter:
    """Builds the pipeline for uint8 RGB batches `(batch, height, width, 3)`; it keeps shape and type.

    To remove a change, delete its line; to add one, add a line with any augmenter of imgaug that keeps an image's
    size (https://imgaug.readthedocs.io/en/latest/source/overview_of_augmenters.html), or change a range.
    """
    return FusedAugmenter(
        [
            iaa.Fliplr(0.5),
            iaa.Affine(
                rotate=(-15, 15),
                scale=(0.9, 1.15),
                shear=(-6, 6),
                translate_percent={"x": (-0.08, 0.08), "y": (-0.08, 0.08)},
                order=1,
                mode="reflect",
            ),
            # Colour: each channel is made up to a tenth brighter or darker on its own.
            iaa.Multiply((0.9, 1.1), per_channel=0.5),
            iaa.LinearContrast((0.8, 1.25)),
        ]
    )


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
    moved = augmenters.augment_keypoints([corners] * number)
    warped = np.empty_like(images)
    for image, points, target in zip(images, moved, warped, strict=True):
        origin, right, below = points.to_xy_array().astype(np.float64)
        matrix = np.column_stack([(right - origin) / width, (below - origin) / height, origin])
        # From imgaug's corners of pixels to OpenCV's centres.
        matrix[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5
        cv2.warpAffine(image, matrix, (width, height), target, cv2.INTER_LINEAR, cv2.BORDER_REFLECT_101)
    return warped


def _look_up(augmenters: iaa.Sequential, images: np.ndarray) -> np.ndarray:
    """Changes a picture of all 256 values, which gives a look-up table for each image and channel; in place."""
    every_value = np.empty((len(images), 1, 256, images.shape[-1]), np.uint8)
    every_value[:] = np.arange(256, dtype=np.uint8)[:, None]
    tables = augmenters(images=every_value)
    for image, table in zip(images, tables, strict=True):
        cv2.LUT(image, table, image)
    return images
