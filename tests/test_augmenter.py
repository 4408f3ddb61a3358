import itertools

import numpy as np
import pytest

from augmenter import build_augmenter


def noise(count: int, height: int = 24, width: int = 37) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, height, width, 3), np.uint8)


def augment(images: np.ndarray, seed: int) -> np.ndarray:
    augmenter = build_augmenter()
    augmenter.seed_(seed)
    return np.asarray(augmenter(images=images))


@pytest.mark.parametrize(("count", "height", "width"), [(1, 24, 37), (5, 37, 24), (3, 64, 64)])
def test_keeps_shape_and_type(count, height, width):
    images = noise(count, height, width)
    augmented = augment(images, seed=0)
    assert augmented.shape == images.shape
    assert augmented.dtype == np.uint8


def test_changes_every_image_and_leaves_its_input_alone():
    images = noise(16)
    original = images.copy()
    augmented = augment(images, seed=0)
    np.testing.assert_array_equal(images, original)
    assert all((after != before).any() for after, before in zip(augmented, original, strict=True))


def test_same_seed_gives_the_same_images_and_another_seed_others():
    images = noise(4)
    np.testing.assert_array_equal(augment(images, seed=3), augment(images, seed=3))
    assert (augment(images, seed=3) != augment(images, seed=4)).any()


def test_reseeding_forgets_what_was_drawn_before():
    images = noise(4)
    augmenter = build_augmenter()
    augmenter.seed_(1)
    augmenter(images=images)
    augmenter.seed_(3)
    np.testing.assert_array_equal(augmenter(images=images), augment(images, seed=3))


def test_changes_each_image_of_a_batch_differently():
    augmented = augment(np.repeat(noise(1), 8, axis=0), seed=0)
    assert all((one != other).any() for one, other in itertools.combinations(augmented, 2))


def test_mirrors_about_half_of_the_images():
    half_bright = np.zeros((200, 32, 32, 3), np.uint8)
    half_bright[:, :, :16] = 200
    augmented = augment(half_bright, seed=0).mean(axis=(1, 3))
    mirrored = (augmented[:, :8].mean(axis=1) < augmented[:, -8:].mean(axis=1)).mean()
    assert 0.35 < mirrored < 0.65


def test_fills_borders_with_the_picture_and_keeps_the_order_of_channels():
    red = np.empty((32, 32, 32, 3), np.uint8)
    red[:] = (200, 100, 50)
    augmented = augment(red, seed=0).astype(int)
    assert augmented.min() > 0
    assert (np.diff(augmented, axis=-1) < 0).all()
