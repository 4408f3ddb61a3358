"""One map from a picture of any size to its place in the batch: resizing, cropping, mirroring, turning at once."""

from __future__ import annotations

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
    source = matrix * [[picture.shape[1] / width], [picture.shape[0] / height]]
    columns, rows = np.maximum(np.hypot(source[:, 0], source[:, 1]).astype(int), 1).tolist()
    columns, rows = min(columns, picture.shape[1]), min(rows, picture.shape[0])
    if columns > 1 or rows > 1:
        size = picture.shape[1] // columns, picture.shape[0] // rows
        whole_blocks = picture[: size[1] * rows, : size[0] * columns]
        picture = cv2.resize(whole_blocks, size, interpolation=cv2.INTER_AREA)
        source /= [[columns], [rows]]
    # From corners of pixels to OpenCV's centres.
    source[:, 2] += source[:, :2].sum(axis=1) / 2 - 0.5
    cv2.warpAffine(picture, source, (width, height), target, FLAGS, cv2.BORDER_REFLECT_101)
