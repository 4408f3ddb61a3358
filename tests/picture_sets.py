"""Small pictures, and sequences and caches of them."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from augmenter import build_augmenter
from finetune.loading.caches import DiskCache, MemoryCache
from generator import AugmentedImageSequence

SIZE = (12, 16)


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(2)
    images = generator.integers(0, 256, (10, *SIZE, 3), np.uint8)
    paths = [str(tmp_path / f"{position}.png") for position in range(10)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths, images


def sequence_of(paths, labels=None, **options):
    labels = np.arange(len(paths)) if labels is None else labels
    return AugmentedImageSequence(paths, labels, **{"image_size": SIZE, "batch_size": 4} | options)


def one_epoch(sequence):
    images, labels = zip(*(sequence[index] for index in range(len(sequence))), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


UNREADABLE = {
    "missing": None,
    "empty": b"",
    "text": b"this is no image",
    "header only": png_header(12, 16),
    "oversized": png_header(2**17, 2**17),
}


@pytest.fixture(params=UNREADABLE, ids=lambda kind: kind.replace(" ", "_"))
def unreadable(request, tmp_path):
    path = tmp_path / "bad image.png"
    if UNREADABLE[request.param] is not None:
        path.write_bytes(UNREADABLE[request.param])
    return str(path)


def assert_blended(images, mixed, labels):
    """Checks that each mixed image is the sum of two images by their labels' shares, of which the first is its own."""
    for position, (image, shares) in enumerate(zip(mixed, labels, strict=True)):
        assert shares[position] > 0
        assert np.count_nonzero(shares) <= 2
        assert shares.sum() == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(image, np.tensordot(shares, images.astype(float), 1), atol=0.51)


def mixing_sequence(paths, labels=None, **options):
    options = {"mixup_alpha": 1.0, "number_of_classes": 10, "shuffle": True, "seed": 7} | options
    return sequence_of(paths, labels, **options)


def cache_of(kind, paths, folder, image_size=SIZE):
    return MemoryCache(len(paths), image_size) if kind == "memory" else DiskCache(paths, image_size, str(folder))


def assert_same_batch(found, expected):
    assert len(found) == len(expected)
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(part, other)
        assert part.dtype == other.dtype


def augmented_sequence(paths, seed=7, **options):
    return sequence_of(paths, augmenter=build_augmenter(), shuffle=True, seed=seed, batch_size=2, **options)
