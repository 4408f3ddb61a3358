import itertools

import numpy as np
import pytest
from augmented import smooth_photos

from augmenter import STRENGTHS, build_augmenter
from configs import Configs


def noise(count: int, height: int = 24, width: int = 37) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, height, width, 3), np.uint8)


def augment(images: np.ndarray, seed: int, strength: str = "default") -> np.ndarray:
    augmenter = build_augmenter(strength)
    augmenter.seed_(seed)
    return np.asarray(augmenter(images=images))


@pytest.mark.parametrize("strength", ["light", "default", "strong", "photo"])
@pytest.mark.parametrize(("count", "height", "width"), [(1, 24, 37), (16, 37, 24)])
def test_changes_every_image_in_a_copy_of_the_same_shape_and_type(count, height, width, strength):
    images = noise(count, height, width)
    augmented = augment(images, 0, strength)
    assert augmented.shape == images.shape
    assert augmented.dtype == np.uint8
    np.testing.assert_array_equal(images, noise(count, height, width))
    assert all((after != before).any() for after, before in zip(augmented, images, strict=True))


def test_the_seed_decides_whatever_was_drawn_before():
    images, augmenter = noise(4), build_augmenter()
    augmenter.seed_(4)
    other = augmenter(images=images)
    augmenter.seed_(3)
    found = augmenter(images=images)
    np.testing.assert_array_equal(found, augment(images, seed=3))
    assert (found != other).any()


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
    augmented = augment(plain_images(32), seed=0).astype(int)
    assert augmented.min() > 0
    assert (np.diff(augmented, axis=-1) < 0).all()


def test_every_strength_of_the_configs_is_known():
    assert set(STRENGTHS) == set(Configs.options()["augmentation_strength"].metadata["choices"])
    assert build_augmenter("none") is None


def test_a_greater_strength_changes_more():
    images = smooth_photos(60)
    changes = [
        np.abs(augment(images, 0, strength).astype(int) - images).mean() for strength in ("light", "default", "strong")
    ]
    assert 2 < changes[0] < changes[1] - 2
    assert changes[1] < changes[2] - 5


def plain_images(count: int) -> np.ndarray:
    return np.full((count, 40, 60, 3), (120, 90, 60), np.uint8)


def test_light_changes_no_colour():
    np.testing.assert_array_equal(augment(plain_images(20), 0, "light"), plain_images(20))


def test_photo_turns_about_the_middle_and_leaves_moving_and_scaling_to_the_crops():
    augmenter = build_augmenter("photo")
    augmenter.seed_(0)
    maps = augmenter.draw_maps(500, (40, 60))
    np.testing.assert_allclose(maps @ [30, 20, 1], np.tile([30, 20], (500, 1)))
    # Areas stay, except for the effect of a shear by 8 degrees with a rotation by 15.
    np.testing.assert_allclose(np.abs(np.linalg.det(maps[:, :, :2])), 1, atol=0.05)
    columns = np.rad2deg(np.arctan(maps[:, 1, 0] / maps[:, 0, 0]))
    assert 13 < np.abs(columns).max() < 24
    assert abs(columns.mean()) < 2


def test_strong_hides_a_box_of_about_half_of_the_images():
    is_plain = []
    for image in augment(plain_images(200), 0, "strong"):
        colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        is_plain.append(len(colours) == 1)
        if not is_plain[-1]:
            assert len(colours) == 2
            rows, columns = np.nonzero((image == colours[counts.argmin()]).all(axis=-1))
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert counts.min() == height * width
            # Between 0.15 and 0.45 of each side, in whole pixels; the border may cut a part off.
            is_whole = rows.min() > 0 and rows.max() < 39 and columns.min() > 0 and columns.max() < 59
            assert height <= 19
            assert width <= 28
            assert not is_whole or (height >= 5 and width >= 8)
    assert 0.4 < np.mean(is_plain) < 0.6


def test_a_copy_draws_for_itself():
    images, original = noise(4), build_augmenter()
    original.seed_(3)
    copied = original.deepcopy()
    copied(images)
    copied(images)
    np.testing.assert_array_equal(original(images), augment(images, seed=3))
