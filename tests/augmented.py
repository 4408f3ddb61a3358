"""Augmenters side by side."""

import cv2
import numpy as np
import skimage.data


def smooth_photos(count: int) -> np.ndarray:
    photo = cv2.resize(skimage.data.astronaut(), (70, 60), interpolation=cv2.INTER_AREA)
    return np.stack([cv2.GaussianBlur(photo, (0, 0), 2)] * count)
