"""Augmentation: imgaug augmenters, fused into one warp or look-up table for speed; random crops, mixup and CutMix."""

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
from imgaug.parameters import AutoPrefetcher
from imgaug.random import RNG

AugmentationFunction = Callable[[np.ndarray, np.random.Generator], np.ndarray]
FLAGS = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
# These map the values of a channel, whatever the pixel's position.
BY_VALUE = (iaa.Add, iaa.Multiply, iaa.LinearContrast, iaa.GammaContrast, iaa.LogContrast, iaa.SigmoidContrast)
BY_VALUE += (iaa.Invert,)
# Weights of red, green and blue. Source: ITU-R BT.601.
BRIGHTNESS = np.array([0.299, 0.587, 0.114])


def resample(picture: np.ndarray, matrix: np.ndarray, target: np.ndarray) -> None:
    """Draws a picture into `target`, stretched to its size and warped by an affine map, with one interpolation.

    When the picture shrinks to a half or less, blocks of pixels are averaged first, so that no pixel is skipped. This
    comes closer to the exact mean over each pixel's area than resizing first, and takes a third of the time.

    Args:
        picture: uint8 `(any height, any width, 3)`.
        matrix: float64 `(2, 3)`, from the result to the picture stretched to the size of `target`. Coordinates are
            x, y; the first pixel spans 0 to 1. The picture is mirrored beyond its border.
        target: receives the result, uint8 `(height, width, 3)`.
    """
    height, width = target.shape[:2]
    # By axis, x then y, in Python's numbers: arrays of six numbers take three times as long and hold Python's lock.
    scales = [side / wanted for side, wanted in zip(picture.shape[1::-1], (width, height), strict=True)]
    axes = [[value * scale for value in row] for row, scale in zip(matrix.tolist(), scales, strict=True)]
    blocks = [max(1, int(math.hypot(across, down))) for across, down, _ in axes]
    if max(blocks) > 1:
        picture, blocks = average_blocks(picture, *blocks)
        axes = [[value / block for value in row] for row, block in zip(axes, blocks, strict=True)]
    # OpenCV warps four channels faster than three, and is slow with pixels beyond the border.
    picture = cv2.cvtColor(picture, cv2.COLOR_RGB2RGBA)
    (left, right), (top, bottom) = (
        find_margins(row, side, width, height) for row, side in zip(axes, picture.shape[1::-1], strict=True)
    )
    if left or right or top or bottom:
        picture = cv2.copyMakeBorder(picture, top, bottom, left, right, cv2.BORDER_REFLECT_101)
    # From pixel corners to OpenCV's pixel centres.
    source = [
        [across, down, shift + (across + down) / 2 - 0.5 + margin]
        for (across, down, shift), margin in zip(axes, (left, top), strict=True)
    ]
    warped = cv2.warpAffine(picture, np.array(source), (width, height), None, FLAGS, cv2.BORDER_REFLECT_101)
    cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB, target)


def average_blocks(picture: np.ndarray, columns: int, rows: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns a picture of the means of whole blocks, and the block size, which is at most the picture's size."""
    columns, rows = min(columns, picture.shape[1]), min(rows, picture.shape[0])
    size = picture.shape[1] // columns, picture.shape[0] // rows
    # Linear interpolation between two neighbours is their mean, and takes OpenCV a fifth of the time.
    way = cv2.INTER_AREA if max(columns, rows) > 2 else cv2.INTER_LINEAR
    whole = picture[: size[1] * rows, : size[0] * columns]
    return cv2.resize(whole, size, interpolation=way), (columns, rows)


def find_margins(row: Sequence[float], side: int, width: int, height: int) -> tuple[int, int]:
    """Returns how many pixels a warp needs before and after a picture along one axis.

    It returns 0 for a margin longer than the picture: OpenCV then mirrors pixel by pixel.

    Args:
        row: of the map from the result to the picture.
        side: of the picture along this axis.
        width: of the result.
        height: of the result.
    """
    across, down, shift = row
    across, down = across * width, down * height
    # One pixel more, because interpolation uses the neighbours.
    before = math.ceil(1 - shift - min(across, 0) - min(down, 0))
    after = math.ceil(1 + shift + max(across, 0) + max(down, 0) - side)
    before, after = max(before, 0), max(after, 0)
    return (before, after) if max(before, after) < side else (0, 0)


class FusedAugmenter:
    """Runs imgaug augmenters in sequence, faster than imgaug itself and with the same random numbers.

    Neighbouring flips and affine augmenters become one warp, which interpolates only once. Neighbouring augmenters of
    pixel values become one look-up table. All others run in imgaug.

    Args:
        augmenters: in order; each keeps an image's size. A function takes uint8 images `(batch, height, width, 3)` and
            a `numpy.random.Generator`, and returns changed images.
    """

    def __init__(self, augmenters: Iterable[iaa.Augmenter | AugmentationFunction]) -> None:
        self._all = iaa.Sequential(
            [
                one if isinstance(one, iaa.Augmenter) else iaa.Lambda(func_images=functools.partial(_call, one))
                for one in augmenters
            ]
        )
        groups = itertools.groupby(self._all, key=_way_of_running)
        # The groups share their augmenters with `_all`, so seeding that seeds them.
        self._groups = [(run, list(members)) for run, members in groups]

    def seed_(self, seed: int) -> None:
        """Seeds the random numbers."""
        self._all.seed_(seed)

    def deepcopy(self) -> FusedAugmenter:
        """Returns a copy with its own random state, for another thread."""
        return copy.deepcopy(self)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns changed copies of images, uint8 `(batch, height, width, 3)`."""
        return self._run(self._groups, np.array(images))

    def draw_maps(self, number: int, image_size: Sequence[int]) -> np.ndarray | None:
        """Draws the maps of the first step for `resample`, as `random_parameters.draw_maps`; None if it is no warp.

        The caller warps the images while it reads them; `finish` does the other steps.
        """
        if not self._groups or self._groups[0][0] is not _warp:
            return None
        return draw_maps(self._groups[0][1], number, *image_size)

    def finish(self, images: np.ndarray) -> np.ndarray:
        """Runs the steps after the warp of `draw_maps`; it may change the images in place."""
        return self._run(self._groups[self._groups[0][0] is _warp :] if self._groups else [], images)

    @staticmethod
    def _run(groups: Sequence[tuple[Callable, list[iaa.Augmenter]]], images: np.ndarray) -> np.ndarray:
        for run, augmenters in groups:
            images = run(augmenters, images)
        return images


def _call(
    function: AugmentationFunction, images: np.ndarray, random_state: RNG, parents: Any, hooks: Any
) -> np.ndarray:
    return function(images, random_state.generator)


def _way_of_running(augmenter: iaa.Augmenter) -> Callable[[list[iaa.Augmenter], np.ndarray], np.ndarray]:
    if isinstance(augmenter, BY_VALUE):
        return _look_up
    is_other_warp = isinstance(augmenter, iaa.Affine) and not (
        # `resample` has one interpolation and one border.
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
    # One table for all channels is twice as fast.
    for image, table, one_does in zip(images, tables, is_grey, strict=True):
        if one_does:
            rows = image.reshape(len(image), -1)
            cv2.LUT(rows, np.ascontiguousarray(table[:, 0]), rows)
        else:
            cv2.LUT(image, table[None], image)
    return images


class Saturation(meta.Augmenter):
    """Changes the saturation of each image by a random factor, ten times as fast as imgaug's way through HSV.

    The factor is a number, or a pair to draw between: 0 gives grey, 1 the image itself.
    """

    def __init__(self, factor: float | tuple[float, float]) -> None:
        super().__init__()
        self.factor = parameters.handle_continuous_param(factor, "factor", value_range=(0, None))

    def _augment_batch_(self, batch: Any, random_state: Any, parents: Any, hooks: Any) -> Any:
        factors = self.factor.draw_samples((len(batch.images),), random_state=random_state)
        for position, (image, factor) in enumerate(zip(batch.images, factors, strict=True)):
            matrix = factor * np.eye(3) + (1 - factor) * BRIGHTNESS
            batch.images[position] = cv2.transform(image, matrix)
        return batch

    def get_parameters(self) -> list[Any]:
        """Returns the parameters, as imgaug requires."""
        return [self.factor]


AFFINE = (iaa.Affine, iaa.Fliplr, iaa.Flipud)
# From here on, imgaug takes a drawn number as yes.
YES = 0.5
MIDDLE_VALUE = 127


def draw_maps(augmenters: Iterable[iaa.Augmenter], number: int, height: int, width: int) -> np.ndarray:
    """Draws one affine map per image for a chain of flips and affine augmenters.

    Args:
        augmenters: of the types in `AFFINE`, without `fit_output`.
        number: of images.
        height: of each image.
        width: of each image.

    Returns:
        float64 `(number, 2, 3)`, from the result to the image. Coordinates are x, y; the first pixel spans 0 to 1.
    """
    linear, shifts = np.tile(np.eye(2), (number, 1, 1)), np.zeros((number, 2))
    for augmenter in augmenters:
        if augmenter.activated:
            draw = _draw_affine if isinstance(augmenter, iaa.Affine) else _draw_flips
            # Both are relative to the middle of the image.
            own_linear, own_shifts = draw(augmenter, number, height, width)
            linear, shifts = own_linear @ linear, (own_linear @ shifts[..., None])[..., 0] + own_shifts
    middle = np.array([width / 2, height / 2])
    inverse = np.linalg.inv(linear)
    return np.concatenate([inverse, middle[:, None] - inverse @ (shifts + middle)[..., None]], axis=2)


def _draw_flips(
    augmenter: iaa.Fliplr | iaa.Flipud, number: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    flips = augmenter.p.draw_samples((number,), random_state=_get_random_state(augmenter)) >= YES
    axis = 0 if isinstance(augmenter, iaa.Fliplr) else 1
    linear = np.tile(np.eye(2), (number, 1, 1))
    linear[flips, axis, axis] = -1
    return linear, np.zeros((number, 2))


def _draw_affine(augmenter: iaa.Affine, number: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws maps from the image to the result: rotation, scaling along x and y, shear, then translation."""
    drawn = augmenter._draw_samples(number, _get_random_state(augmenter))
    cosine, sine = np.cos(turn := np.deg2rad(drawn.rotate.astype(float))), np.sin(turn)
    scale_x, scale_y = drawn.scale
    # As in imgaug: the hyperbolic tangent.
    shear_x, shear_y = (np.tanh(np.deg2rad(angles.astype(float))) for angles in drawn.shear)
    top, bottom = (scale_x * cosine, -scale_x * sine), (scale_y * sine, scale_y * cosine)
    linear = np.empty((number, 2, 2))
    for column in (0, 1):
        linear[:, 0, column] = top[column] - shear_x * bottom[column]
        linear[:, 1, column] = bottom[column] + shear_y * top[column]
    sides = (width, height) if drawn.translate_mode == "percent" else (1, 1)
    return linear, np.stack(drawn.translate, axis=1) * sides


def draw_values(augmenters: Iterable[iaa.Augmenter], number: int) -> np.ndarray:
    """Draws look-up tables, uint8 `(number of images, 256, 3)`, for a chain of augmenters that map pixel values."""
    values = np.tile(np.arange(256, dtype=np.uint8)[:, None], (number, 1, 3))
    for augmenter in augmenters:
        change = KNOWN_CHANGES.get(type(augmenter))
        if change is None:
            # A picture of all 256 values shows the mapping.
            values = augmenter(images=values[:, None])[:, 0]
        elif augmenter.activated:
            values = np.rint(np.clip(change(augmenter, values.astype(np.float32)), 0, 255)).astype(np.uint8)
    return values


def _multiply(augmenter: iaa.Multiply, values: np.ndarray) -> np.ndarray:
    number, state = len(values), _get_random_state(augmenter)
    of_channels = augmenter.per_channel.draw_samples((number,), random_state=state) > YES
    factors = augmenter.mul.draw_samples((number, 3), random_state=state).astype(np.float32)
    return values * np.where(of_channels[:, None], factors, factors[:, :1])[:, None]


def _change_contrast(augmenter: iaa.LinearContrast, values: np.ndarray) -> np.ndarray:
    number, state = len(values), _get_random_state(augmenter)
    of_channels = augmenter.per_channel.draw_samples((number,), random_state=state) > YES
    # One number per image or per channel. imgaug draws those of the first image separately, and then thousands in
    # advance, which start with these.
    ends = np.cumsum(np.where(of_channels, 3, 1))
    parameter = augmenter.params1d[0]
    drawn = [parameter.draw_samples((int(ends[0]),), random_state=state)]
    if number > 1:
        parameter = parameter.other_param if isinstance(parameter, AutoPrefetcher) else parameter
        drawn.append(parameter.draw_samples((int(ends[-1] - ends[0]),), random_state=state))
    places = np.where(of_channels, ends - 3, ends - 1)[:, None] + of_channels[:, None] * np.arange(3)
    factors = np.concatenate(drawn)[places].astype(np.float32)
    # imgaug truncates.
    return np.floor(np.clip(MIDDLE_VALUE + factors[:, None] * (values - MIDDLE_VALUE), 0, 255))


KNOWN_CHANGES: dict[type[iaa.Augmenter], Callable[[iaa.Augmenter, np.ndarray], np.ndarray]] = {
    iaa.Multiply: _multiply,
    iaa.LinearContrast: _change_contrast,
}


def _get_random_state(augmenter: iaa.Augmenter) -> RNG:
    """Returns an augmenter's random state; a deterministic augmenter starts over each time."""
    return augmenter.random_state.copy() if augmenter.deterministic else augmenter.random_state


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
