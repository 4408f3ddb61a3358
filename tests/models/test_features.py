"""Sequences of features instead of images."""

import numpy as np
import pytest
from probed_photos import (
    Inverting,
    make_sequence,
    photos,  # noqa: F401
)

from finetune.models.features import FeatureSequence, read_plainly
from generator import Shares


def as_features(photos) -> np.ndarray:
    """Features that identify their row."""
    return np.arange(len(photos[0]), dtype=np.float32)[:, None] * [1, 10]


@pytest.mark.parametrize("shuffle", [False, True])
def test_features_come_in_the_order_of_the_images(photos, shuffle):
    images = make_sequence((photos[0], np.arange(36)), shuffle=shuffle, seed=4)
    for images.epoch, images.first_step in ((0, 0), (3, 0), (3, 2)):
        features = FeatureSequence.of(images, as_features(photos), np.ones(36, bool))
        assert len(images) == len(features) == 5 - images.first_step
        for (_, expected), (rows, labels) in zip(images.to_dataset(), features.to_dataset(), strict=True):
            np.testing.assert_array_equal(labels, expected)
            np.testing.assert_array_equal(rows, np.asarray(labels)[:, None] * [1, 10])


def test_features_of_multi_label_images_have_float_labels(photos):
    images = make_sequence((photos[0], np.eye(3, dtype=int)[photos[1]]))
    batch = next(iter(FeatureSequence.of(images, as_features(photos), np.ones(36, bool)).to_dataset()))
    assert batch[1].dtype == np.float32
    np.testing.assert_array_equal(batch[1], np.eye(3)[photos[1][:8]])


@pytest.mark.parametrize("batch_size", [8, 7])
def test_features_are_shared_out_as_the_images_are(photos, batch_size):
    """36 images in steps of 3 devices; of 3 x 7, the last step has 15, of 3 x 8 it has 12."""
    for first in (0, 1):
        shares = Shares(devices=3, first=first, local=2)
        images = make_sequence((photos[0], np.arange(36)), batch_size=batch_size, shuffle=True, shares=shares)
        features = FeatureSequence.of(images, as_features(photos), np.ones(36, bool))
        pairs = list(zip(images.to_dataset(), features.to_dataset(), strict=True))
        assert len(pairs) == 2
        for (_, *expected), (rows, *found) in pairs:
            for left, right in zip(expected, found, strict=True):
                np.testing.assert_array_equal(left, right)
            np.testing.assert_array_equal(rows, np.asarray(found[0])[:, None] * [1, 10])


def test_a_device_without_an_image_gets_a_row_of_weight_0(photos):
    few = photos[0][:2], photos[1][:2]
    images = make_sequence(few, shuffle=True, shares=Shares(devices=3, first=0, local=3))
    rows, _, weights, bounds, total = FeatureSequence.of(images, as_features(few), np.ones(2, bool)).get_shares(0)
    assert len(rows) == 3
    assert sorted(weights.tolist()) == [0, 1, 1]
    assert bounds.tolist() == [0, 1, 2, 3]
    assert total == 2


def test_features_are_not_mixed_and_their_labels_stay_positions(photos):
    images = make_sequence(photos, shuffle=True, mixup_alpha=1.0, number_of_classes=3)
    features = FeatureSequence.of(images, as_features(photos), np.ones(36, bool))
    assert next(iter(features.to_dataset()))[1].dtype == np.int64


def test_a_plain_copy_leaves_its_sequence_alone(photos):
    images = make_sequence(photos, shuffle=True, seed=1, augmenter=Inverting(), shares=Shares(2, 1, 1))
    images.epoch, images.first_step = 3, 1
    plain = read_plainly(images, images.image_size)
    # Steps of 2 devices have 16 of the 36 images.
    assert [len(plain), plain.get_y_true().tolist()] == [3, photos[1].tolist()]
    assert (images.shuffle, images.epoch, images.first_step, images.shares.devices) == (True, 3, 1, 2)
    plain.bad_images[0] = "unreadable"
    assert not images.bad_images
