"""Photos to measure with, made from those of scikit-image."""

from __future__ import annotations

import os

import cv2
import numpy as np
import skimage.data


def generate_photos(folder: str) -> str:
    """Writes 96 photos of 640x480: four of scikit-image's, with a sensor's noise; returns their folder."""
    rng = np.random.default_rng(0)
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        os.makedirs(f"{folder}/{name}")
        photo = cv2.resize(getattr(skimage.data, name)(), (640, 480), interpolation=cv2.INTER_CUBIC)[..., ::-1]
        for number in range(24):
            noisy = np.clip(photo + rng.normal(0, 6, photo.shape), 0, 255).astype(np.uint8)
            cv2.imwrite(f"{folder}/{name}/{number:02d}.jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return folder
