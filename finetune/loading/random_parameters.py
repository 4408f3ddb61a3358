"""The random parameters of imgaug's augmenters for a whole batch: affine maps, and look-up tables of pixel values.

imgaug draws the same numbers, but computes image by image in Python, which blocks other threads. Here NumPy computes
all images at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from imgaug import augmenters as iaa
from imgaug.parameters import AutoPrefetcher
from imgaug.random import RNG

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
