"""Shared fixtures: small JPEGs, tables of them, and the configs of a small run."""

import os
from types import SimpleNamespace

import cv2
import keras
import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from configs import Configs

IMAGE_SIZE = 32
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def write_photo(path, colour, rng):
    """Writes a JPEG: noise around a colour (RGB), with a random bright rectangle."""
    pixels = rng.normal(colour, 25, size=(48, 64, 3))
    top, left = rng.integers(0, 30, size=2)
    pixels[top : top + 12, left : left + 20] += 40
    os.makedirs(os.path.dirname(path), exist_ok=True)
    cv2.imwrite(str(path), np.clip(pixels, 0, 255).astype(np.uint8)[..., ::-1])


@pytest.fixture(autouse=True)
def same_weights_every_time():
    """Seeds Keras, so that networks without a seed of their own always have the same weights."""
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """A folder of three class folders with 12 JPEGs each."""
    folder, rng = tmp_path_factory.mktemp("photos") / "images", np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for number in range(12):
            write_photo(folder / name / f"{number:02d}.jpg", colour, rng)
    return folder


@pytest.fixture(scope="session")
def multilabel_csv(tmp_path_factory):
    """A table of 24 JPEGs, left half and right half of a colour each, labelled with both colours."""
    folder, rng, rows = tmp_path_factory.mktemp("multilabel"), np.random.default_rng(1), []
    names = list(COLOURS)
    for number in range(24):
        left, right = names[number % 3], names[(number // 3) % 3]
        halves = [rng.normal(COLOURS[name], 20, size=(48, 32, 3)) for name in (left, right)]
        pixels = np.clip(np.concatenate(halves, axis=1), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:02d}.jpg"), pixels[..., ::-1])
        rows.append((f"{number:02d}.jpg", "$".join(sorted({left, right}))))
    path = folder / "labels.csv"
    pd.DataFrame(rows, columns=["path", "class"]).to_csv(path, index=False)
    return path


@pytest.fixture
def store(monkeypatch):
    """An empty store for `memory://` URLs.

    `put` and `remove` change an object by its URL; `asked` lists the requests: `info` or `bytes`, the name of the
    object, and for bytes start and end.
    """
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    asked, info, cat_file = [], MemoryFileSystem.info, MemoryFileSystem.cat_file

    def tell(self, path, **options):
        asked.append(("info", path))
        return info(self, path, **options)

    def send(self, path, start=None, end=None, **options):
        asked.append(("bytes", path, start, end))
        return cat_file(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", tell)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", send)
    memory = MemoryFileSystem()
    return SimpleNamespace(put=memory.pipe_file, remove=memory.rm_file, asked=asked)


@pytest.fixture
def small_run(tmp_path):
    """Makes configs of a small run that saves into the test's own folder."""

    def make(train_csv, test_csv, **options):
        values = {
            "train_csv": str(train_csv),
            "test_csv": str(test_csv),
            "visual_model_name": "MobileNet",
            "pop_conv_layers": 75,
            "image_target_size": (IMAGE_SIZE, IMAGE_SIZE, 3),
            "use_imagenet_weights": False,
            "num_epochs": 2,
            "batch_size": 8,
            "show_model_summary": False,
            "generator_workers": 2,
            "save_model_path": str(tmp_path / "saved_model"),
        }
        return Configs(**(values | options)).validate()

    return make
