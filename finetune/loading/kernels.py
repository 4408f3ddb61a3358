"""Augmentation kernels: imgaug augmenters, with neighbouring ones fused where that gives the same picture faster."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from imgaug import augmenters as iaa
from imgaug import parameters
from imgaug.augmenters import meta
from imgaug.random import RNG

from finetune.loading.random_parameters import AFFINE, draw_maps, draw_values

AugmentationFunction = Callable[[np.ndarray, np.random.Generator], np.ndarray]
FLAGS = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
# These give each value of a channel a new one, wherever in the image it stands.
BY_VALUE = (iaa.Add, iaa.Multiply, iaa.LinearContrast, iaa.GammaContrast, iaa.LogContrast, iaa.SigmoidContrast)
BY_VALUE += (iaa.Invert,)
# Of red, green and blue in brightness. Source: ITU-R BT.601.
BRIGHTNESS = np.array([0.299, 0.587, 0.114])


def resample(picture: np.ndarray, matrix: np.ndarray, target: np.ndarray) -> None:
    """Draws a picture into `target`, stretched to its size and changed by an affine map, interpolating once.

    Where it shrinks to a half or less, whole blocks of pixels are averaged first, so that none is passed over; bilinear
    interpolation takes the rest. Compared to an exact mean over the area of each pixel that comes closer than a
    resize to the target's size, and takes a third of the time.

    Args:
        picture: uint8 `(any height, any width, 3)`.
        matrix: float64 `(2, 3)`, from the result to the picture as it is when stretched to the size of `target`:
            coordinates are x, y, and the first pixel is from 0 to 1. Beyond the border the picture is mirrored.
        target: receives the result, uint8 `(height, width, 3)`.
    """
    height, width = target.shape[:2]
    # By axis, x and then y, in Python's own numbers: arrays of six take three times as long, and hold its lock.
    scales = [side / wanted for side, wanted in zip(picture.shape[1::-1], (width, height), strict=True)]
    axes = [[value * scale for value in row] for row, scale in zip(matrix.tolist(), scales, strict=True)]
    blocks = [max(1, int(math.hypot(across, down))) for across, down, _ in axes]
    if max(blocks) > 1:
        picture, blocks = average_blocks(picture, *blocks)
        axes = [[value / block for value in row] for row, block in zip(axes, blocks, strict=True)]
    # OpenCV warps four channels faster than three, and pixels from beyond the border more slowly than others.
    picture = cv2.cvtColor(picture, cv2.COLOR_RGB2RGBA)
    (left, right), (top, bottom) = (
        find_margins(row, side, width, height) for row, side in zip(axes, picture.shape[1::-1], strict=True)
    )
    if left or right or top or bottom:
        picture = cv2.copyMakeBorder(picture, top, bottom, left, right, cv2.BORDER_REFLECT_101)
    # From corners of pixels to OpenCV's centres.
    source = [
        [across, down, shift + (across + down) / 2 - 0.5 + margin]
        for (across, down, shift), margin in zip(axes, (left, top), strict=True)
    ]
    warped = cv2.warpAffine(picture, np.array(source), (width, height), None, FLAGS, cv2.BORDER_REFLECT_101)
    cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB, target)


def average_blocks(picture: np.ndarray, columns: int, rows: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns a picture with a pixel for each whole block of so many columns and rows, their mean, and these two.

    A picture that is narrower or lower than a block is one block wide or high.
    """
    columns, rows = min(columns, picture.shape[1]), min(rows, picture.shape[0])
    size = picture.shape[1] // columns, picture.shape[0] // rows
    # Between two neighbours, interpolation is their mean; OpenCV's own takes a fifth of the time.
    way = cv2.INTER_AREA if max(columns, rows) > 2 else cv2.INTER_LINEAR
    whole = picture[: size[1] * rows, : size[0] * columns]
    return cv2.resize(whole, size, interpolation=way), (columns, rows)


def find_margins(row: Sequence[float], side: int, width: int, height: int) -> tuple[int, int]:
    """Tells how far a warp reaches beyond a picture along one axis, before its first and after its last pixel.

    Where that is farther than the picture is long, it is 0: the border's pixels are found one by one then.

    Args:
        row: of the map from the result to the picture: what a step across and a step down add, and the first place.
        side: pixels of the picture.
        width: of the result.
        height: of the result.
    """
    across, down, shift = row
    across, down = across * width, down * height
    # A pixel more, for interpolation takes the neighbours.
    before = math.ceil(1 - shift - min(across, 0) - min(down, 0))
    after = math.ceil(1 + shift + max(across, 0) + max(down, 0) - side)
    before, after = max(before, 0), max(after, 0)
    return (before, after) if max(before, after) < side else (0, 0)


class FusedAugmenter:
    """Runs imgaug augmenters one after another, with neighbours fused where that gives the same picture sooner.

    imgaug draws every random number. Flips and affine augmenters that stand beside each other become one warp, which
    also blurs an image once only; those that change values become one look-up table. All others run as they are.

    Args:
        augmenters: in the order of their use; each keeps an image's size. A function takes uint8 images
            `(batch, height, width, 3)` and a `numpy.random.Generator`, and returns changed images.
    """

    def __init__(self, augmenters: Iterable[iaa.Augmenter | AugmentationFunction]) -> None:
        self._all = iaa.Sequential([one if isinstance(one, iaa.Augmenter) else _wrap(one) for one in augmenters])
        groups = itertools.groupby(self._all, key=_way_of_running)
        # Groups hold the same augmenters as `_all`: seeding that seeds them.
        self._groups = [(run, list(members)) for run, members in groups]

    def seed_(self, seed: int) -> None:
        """Reseeds the random numbers: the same seed gives the same images."""
        self._all.seed_(seed)

    def deepcopy(self) -> FusedAugmenter:
        """Returns a copy with random numbers of its own, as another thread needs one."""
        return copy.deepcopy(self)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns changed copies of images, uint8 `(batch, height, width, 3)`."""
        return self._run(self._groups, np.array(images))

    def draw_maps(self, number: int, image_size: Sequence[int]) -> np.ndarray | None:
        """Draws the warp that comes first, for whoever reads the images to do it from pictures of any size.

        Args:
            number: of images.
            image_size: `(height, width)` of the batch.

        Returns:
            As `draws.draw_maps` has it; None where no warp comes first. `finish` does the rest.
        """
        if not self._groups or self._groups[0][0] is not _warp:
            return None
        return draw_maps(self._groups[0][1], number, *image_size)

    def finish(self, images: np.ndarray) -> np.ndarray:
        """Changes images, in place or not, as all do that come after the warp of `draw_maps`."""
        return self._run(self._groups[self._groups[0][0] is _warp :] if self._groups else [], images)

    @staticmethod
    def _run(groups: Sequence[tuple[Callable, list[iaa.Augmenter]]], images: np.ndarray) -> np.ndarray:
        for run, augmenters in groups:
            images = run(augmenters, images)
        return images


def _wrap(function: AugmentationFunction) -> iaa.Lambda:
    """Makes an augmenter of imgaug of a function."""
    return iaa.Lambda(func_images=functools.partial(_call, function))


def _call(
    function: AugmentationFunction, images: np.ndarray, random_state: RNG, parents: Any, hooks: Any
) -> np.ndarray:
    return function(images, random_state.generator)


def _way_of_running(augmenter: iaa.Augmenter) -> Callable[[list[iaa.Augmenter], np.ndarray], np.ndarray]:
    if isinstance(augmenter, BY_VALUE):
        return _look_up
    is_other_warp = isinstance(augmenter, iaa.Affine) and not (
        # `resample` knows one interpolation and one border; imgaug does the rest itself.
        getattr(augmenter.mode, "value", None) == "reflect"
        and getattr(augmenter.order, "value", None) == 1
        and not augmenter.fit_output
    )
    return _warp if isinstance(augmenter, AFFINE) and not is_other_warp else _leave_to_imgaug


def _leave_to_imgaug(augmenters: list[iaa.Augmenter], images: np.ndarray) -> np.ndarray:
    for augmenter in augmenters:
        images = augmenter(images=images)
    return images


def _warp(augmenters: list[iaa.Augmenter], images: np.ndarray) -> np.ndarray:
    number, height, width, _ = images.shape
    warped = np.empty_like(images)
    for image, matrix, target in zip(images, draw_maps(augmenters, number, height, width), warped, strict=True):
        resample(image, matrix, target)
    return warped


def _look_up(augmenters: list[iaa.Augmenter], images: np.ndarray) -> np.ndarray:
    tables = draw_values(augmenters, len(images))
    is_grey = (tables == tables[:, :, :1]).all(axis=(1, 2)).tolist()
    # One table for all channels takes half as long.
    for image, table, one_does in zip(images, tables, is_grey, strict=True):
        if one_does:
            rows = image.reshape(len(image), -1)
            cv2.LUT(rows, np.ascontiguousarray(table[:, 0]), rows)
        else:
            cv2.LUT(image, table[None], image)
    return images


class Saturation(meta.Augmenter):
    """Moves each pixel away from the grey of its brightness, or towards it, by a factor drawn for each image.

    imgaug's own goes through HSV, which takes ten times as long.

    Args:
        factor: 0 gives grey, 1 the image itself; a number, or a pair to draw between.
        seed: of the random numbers.
        name: of the augmenter.
    """

    def __init__(self, factor: float | tuple[float, float], seed: int | None = None, name: str | None = None) -> None:
        super().__init__(seed=seed, name=name)
        self.factor = parameters.handle_continuous_param(factor, "factor", value_range=(0, None))

    def _augment_batch_(self, batch: Any, random_state: Any, parents: Any, hooks: Any) -> Any:
        factors = self.factor.draw_samples((len(batch.images),), random_state=random_state)
        for position, (image, factor) in enumerate(zip(batch.images, factors, strict=True)):
            matrix = factor * np.eye(3) + (1 - factor) * BRIGHTNESS
            batch.images[position] = cv2.transform(image, matrix)
        return batch

    def get_parameters(self) -> list[Any]:
        """Returns the factor."""
        return [self.factor]
