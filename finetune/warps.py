"""Running imgaug's augmenters, neighbours fused where that gives the same picture sooner."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence

import cv2
import numpy as np
from imgaug import augmenters as iaa

from finetune.draws import AFFINE, draw_maps, draw_values
from finetune.resampling import resample

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
        self._groups = [(run, list(members)) for run, members in groups]

    def seed_(self, seed: int) -> None:
        """Starts the random numbers anew: the same seed gives the same images."""
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
