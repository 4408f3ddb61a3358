"""One map from a picture of any size to its place in the batch: resizing, cropping, mirroring, turning at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

FLAGS = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


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
