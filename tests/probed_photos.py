"""Photos and models whose features a regression is fitted to."""

import keras
import numpy as np
import pytest

from finetune.models.backbones import build_preprocessing
from finetune.models.heads import HeadOptions, build_head
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


def build(size: int = 32, channels: int = 6, number: int = 3, multi_label: bool = False, **options) -> keras.Model:
    """Builds a model of the parts that `ModelFactory` gives one, with a backbone of one convolution."""
    fixed = {"layer_sizes": [0.4], "pooling": "avg"}
    inputs, backbone_inputs = keras.Input((size, size, 3)), keras.Input((size, size, 3))
    maps = keras.layers.Conv2D(channels, 3, strides=2, activation="relu")(backbone_inputs)
    backbone = keras.Model(backbone_inputs, maps, name="backbone")
    head = build_head("dense", HeadOptions(number, multi_label, **fixed | options))
    return keras.Model(inputs, head(backbone(build_preprocessing("tf")(inputs))))
