"""mixup and CutMix against their papers' equations."""

import numpy as np
import pytest
from picture_sets import assert_blended
from PIL import Image

from finetune.loading.augmentation import draw_crop, mix_batch
from generator import AugmentedImageSequence


@pytest.mark.parametrize("size", [(240, 320), (100, 100)])
def test_crops_keep_to_their_areas_and_ratios_and_reach_everywhere(size):
    rng = np.random.default_rng(0)
    seen, areas = np.zeros(size, int), []
    for _ in range(2000):
        rows, columns = draw_crop(size, (0.6, 1.0), rng)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert min(rows.start, columns.start) >= 0
        assert rows.stop <= size[0]
        assert columns.stop <= size[1]
        assert 0.74 <= width / height <= 1.35
        areas.append(height * width / (size[0] * size[1]))
        seen[rows, columns] += 1
    # The largest areas between 0.6 and 1 often fit in no allowed ratio.
    assert 0.595 <= min(areas) < 0.61
    assert 0.7 < np.mean(areas) < 0.8
    assert seen.min() > 0


def test_the_only_crop_of_a_pixel_or_a_strip_is_from_its_middle():
    assert draw_crop((1, 1), (0.5, 1.0), np.random.default_rng(0)) == (slice(0, 1), slice(0, 1))
    assert draw_crop((10, 1000), (0.9, 1.0), np.random.default_rng(0)) == (slice(0, 10), slice(493, 506))


def test_training_images_are_crops_that_depend_on_seed_and_epoch_alone(tmp_path):
    """In a picture whose red is the column and whose green is the row."""
    picture = np.zeros((200, 240, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.arange(240), np.arange(200)[:, None]
    Image.fromarray(picture).save(tmp_path / "ramp.png")
    facts = {"paths": [str(tmp_path / "ramp.png")] * 6, "labels": np.zeros(6, int), "image_size": (20, 20)}
    facts |= {"batch_size": 3, "shuffle": True, "crop_area": (0.3, 0.5)}
    sequence = AugmentedImageSequence(**facts)
    first = np.concatenate([sequence[0][0], sequence[1][0]])
    spans = np.ptp(first[..., :2], axis=(1, 2))
    assert len(np.unique(first[:, 0, 0, 0])) > 1
    areas = spans.prod(axis=1, dtype=float) / (240 * 200)
    assert 0.2 < areas.min() < areas.max() < 0.5
    np.testing.assert_array_equal(AugmentedImageSequence(**facts)[1][0], sequence[1][0])
    sequence.epoch = 1
    assert (sequence[0][0] != first[:3]).any()
    whole = AugmentedImageSequence(**facts | {"shuffle": False})[0][0]
    assert np.ptp(whole[..., 0]) > 220


def mix(images, labels=None, seed=0, mixup_alpha=0.0, cutmix_alpha=0.0):
    labels = np.eye(len(images), dtype=np.float32) if labels is None else labels
    return mix_batch(images, labels, np.random.default_rng(seed), mixup_alpha, cutmix_alpha)


def random_images(count, height=12, width=16):
    return np.random.default_rng(8).integers(0, 256, (count, height, width, 3), np.uint8)


def test_mixup_blends_pixels_and_labels_by_the_same_share():
    images = random_images(12)
    original = images.copy()
    mixed, labels = mix(images, mixup_alpha=1.0)
    assert (mixed.dtype, labels.dtype) == (np.uint8, np.float32)
    assert_blended(images, mixed, labels)
    np.testing.assert_array_equal(images, original)
    # Each image occurs once as itself and once as a partner, and each pair has its own share.
    is_pair = np.count_nonzero(labels, axis=1) == 2
    assert is_pair.sum() >= 8
    assert ((labels > 0).sum(axis=0) == np.where(is_pair, 2, 1)).all()
    assert len(np.unique(labels.diagonal()[is_pair])) == is_pair.sum()


def test_cutmix_pastes_a_box_and_counts_its_pixels():
    images = np.zeros((40, 30, 50, 3), np.uint8) + (np.arange(40)[:, None, None, None] + [0, 50, 100]).astype(np.uint8)
    mixed, labels = mix(images, cutmix_alpha=1.0)
    assert (mixed.dtype, labels.dtype) == (np.uint8, np.float32)
    cut_off = 0
    for position, (image, shares) in enumerate(zip(mixed, labels, strict=True)):
        np.testing.assert_array_equal(image - image[..., :1], np.broadcast_to([0, 50, 100], image.shape))
        counts = np.bincount(image[..., 0].ravel(), minlength=40)
        np.testing.assert_allclose(shares, counts / counts.sum(), atol=1e-6)
        rows, columns = np.nonzero(image[..., 0] != position)
        if rows.size:
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert height * width == rows.size
            at_border = {rows.min(), columns.min()} & {0} or rows.max() == 29 or columns.max() == 49
            # A box that the border has not cut has the aspect ratio of the image.
            assert at_border or abs(height / 30 - width / 50) < 0.04
            cut_off += bool(at_border)
    assert 0 < cut_off < 40


def test_boxes_of_cutmix_reach_everywhere_and_have_the_drawn_size():
    images = np.zeros((400, 10, 10, 3), np.uint8)
    images[200:] = 255
    # Beta(1e6, 1e6) is a half: 7 * 7 is about half of 100. The border may cut a box.
    mixed, _ = mix(images, cutmix_alpha=1e6)
    pasted = mixed[..., 0] != images[..., 0]
    assert pasted.any(axis=0).all()
    assert pasted.any(axis=2).sum(axis=1).max() == pasted.any(axis=1).sum(axis=1).max() == 7
    assert pasted.sum(axis=(1, 2)).max() == 49


@pytest.mark.parametrize("alpha", [0.2, 4.0])
def test_shares_of_mixup_have_the_beta_distribution(alpha):
    labels = np.repeat(np.eye(2, dtype=np.float32), 5000, axis=0)
    _, mixed = mix(np.zeros((10000, 1, 1, 3), np.uint8), labels, mixup_alpha=alpha)
    # Two images of one class have the share 1.
    shares = np.concatenate([mixed[:5000, 0], mixed[5000:, 1]])
    shares = shares[shares < 1]
    assert 4500 < len(shares) <= 5500
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    # Of Beta(alpha, alpha) the variance is 1 / (4 (2 alpha + 1)).
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_mixup_and_cutmix_take_turns_at_even_odds():
    images = np.zeros((4, 6, 6, 3), np.uint8)
    images[2:] = 255
    # With shares of a half, blends have greys and boxes do not; pairs of one colour show nothing.
    batches = [mix(images, seed=seed, mixup_alpha=1e6, cutmix_alpha=1e6) for seed in range(300)]
    told = [mixed for mixed, _ in batches if (mixed != images).any()]
    blends = [bool(((mixed > 0) & (mixed < 255)).any()) for mixed in told]
    assert len(told) > 200
    assert 0.4 < np.mean(blends) < 0.6
    # A batch is all blends or all boxes.
    for mixed, is_blend in zip(told, blends, strict=True):
        assert all((len(np.unique(image)) == 1) == is_blend for image in mixed if len(np.unique(image)) > 1)


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)])
def test_one_image_is_mixed_with_itself(alphas):
    image = random_images(1)
    mixed, labels = mix(image, np.array([[0, 1, 1]], np.float32), 0, *alphas)
    np.testing.assert_array_equal(mixed, image)
    np.testing.assert_allclose(labels, [[0, 1, 1]], rtol=1e-6)


@pytest.mark.parametrize("alpha", [5e-324, 1e308])
@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_any_alpha_gives_shares(alpha, kind):
    _, labels = mix(random_images(5), **{kind: alpha})
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
    assert labels.min() >= 0
