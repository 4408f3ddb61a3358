"""What imgaug's augmenters draw for a whole batch at once: affine maps, and new values for the 256 of a channel.

The numbers are those that the augmenters themselves would draw; only what is made of them is computed by NumPy, for all
images together. imgaug goes through them one by one, in Python, which keeps other threads from running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from imgaug import augmenters as iaa
from imgaug.random import RNG

AFFINE = (iaa.Affine, iaa.Fliplr, iaa.Flipud)
# imgaug's probabilities say yes from here on.
YES = 0.5
MIDDLE_VALUE = 127


def draw_maps(augmenters: Iterable[iaa.Augmenter], number: int, height: int, width: int) -> np.ndarray:
    """Draws where flips and affine augmenters, one after another, take the pixels of a batch from.

    Args:
        augmenters: of the kinds in `AFFINE`; `fit_output` is not set.
        number: of images.
        height: of each.
        width: of each.

    Returns:
        float64 `(number, 2, 3)`, from the result to the image. Coordinates are x, y; the first pixel is from 0 to 1.
    """
    forward = np.tile(np.eye(3), (number, 1, 1))
    for augmenter in augmenters:
        if augmenter.activated:
            draw = _draw_affine if isinstance(augmenter, iaa.Affine) else _draw_flips
            forward = draw(augmenter, number, height, width) @ forward
    return np.linalg.inv(forward)[:, :2]


def _draw_flips(augmenter: iaa.Fliplr | iaa.Flipud, number: int, height: int, width: int) -> np.ndarray:
    axis, side = (0, width) if isinstance(augmenter, iaa.Fliplr) else (1, height)
    flips = augmenter.p.draw_samples((number,), random_state=_get_random_state(augmenter)) >= YES
    maps = np.tile(np.eye(3), (number, 1, 1))
    maps[flips, axis, axis], maps[flips, axis, 2] = -1, side
    return maps


def _draw_affine(augmenter: iaa.Affine, number: int, height: int, width: int) -> np.ndarray:
    """Draws maps from the image to the result: around its middle it is turned, scaled, sheared, and then shifted."""
    drawn = augmenter._draw_samples(number, _get_random_state(augmenter))
    turn, scale, shear, shift = (np.tile(np.eye(3), (number, 1, 1)) for _ in range(4))
    angles = np.deg2rad(drawn.rotate.astype(float))
    turn[:, 0, 0] = turn[:, 1, 1] = np.cos(angles)
    turn[:, 1, 0] = np.sin(angles)
    turn[:, 0, 1] = -turn[:, 1, 0]
    for axis, side in enumerate((width, height)):
        scale[:, axis, axis] = drawn.scale[axis]
        shift[:, axis, 2] = drawn.translate[axis] * (side if drawn.translate_mode == "percent" else 1)
    # imgaug's own: the hyperbolic tangent.
    shear[:, 0, 1], shear[:, 1, 0] = (
        sign * np.tanh(np.deg2rad(angles)) for sign, angles in zip((-1, 1), drawn.shear, strict=True)
    )
    to_middle, back = np.eye(3), np.eye(3)
    back[:2, 2] = width / 2, height / 2
    to_middle[:2, 2] = -back[:2, 2]
    return back @ shift @ shear @ scale @ turn @ to_middle


def draw_values(augmenters: Iterable[iaa.Augmenter], number: int) -> np.ndarray:
    """Draws what augmenters that change values, wherever they stand, make of each of the 256.

    Args:
        augmenters: one after another.
        number: of images.

    Returns:
        uint8 `(number, 256, 3)`: a look-up table for each image and channel.
    """
    values = np.tile(np.arange(256, dtype=np.uint8)[:, None], (number, 1, 3))
    for augmenter in augmenters:
        change = KNOWN_CHANGES.get(type(augmenter))
        if change is None:
            # A picture of all values tells.
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
    # One number an image, or one for each of its channels.
    drawn = [augmenter.params1d[0].draw_samples((3 if each else 1,), random_state=state) for each in of_channels]
    factors = np.stack([np.broadcast_to(numbers, 3) for numbers in drawn]).astype(np.float32)
    # imgaug cuts off what is behind the point.
    return np.floor(np.clip(MIDDLE_VALUE + factors[:, None] * (values - MIDDLE_VALUE), 0, 255))


KNOWN_CHANGES: dict[type[iaa.Augmenter], Callable[[iaa.Augmenter, np.ndarray], np.ndarray]] = {
    iaa.Multiply: _multiply,
    iaa.LinearContrast: _change_contrast,
}


def _get_random_state(augmenter: iaa.Augmenter) -> RNG:
    """Returns what an augmenter draws from; one that was made deterministic starts anew each time."""
    return augmenter.random_state.copy() if augmenter.deterministic else augmenter.random_state
