"""Photos and models whose features a regression is fitted to."""

import numpy as np
import pytest

from generator import AugmentedImageSequence

CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def photos(photo_folder) -> tuple[list[str], np.ndarray]:
    paths = [str(path) for name in CLASSES for path in sorted((photo_folder / name).iterdir())]
    return paths, np.repeat(np.arange(3), 12)


def make_sequence(photos, **options) -> AugmentedImageSequence:
    paths, labels = photos
    return AugmentedImageSequence(paths, labels, (32, 32), **{"batch_size": 8, "workers": 2} | options)


class Inverting:
    def deepcopy(self):
        return self

    def seed_(self, seed):
        pass

    def __call__(self, images):
        return 255 - images
