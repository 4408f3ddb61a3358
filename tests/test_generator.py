import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image, ImageOps

from augmenter import build_augmenter
from configs import Configs
from finetune.caches import DiskCache, MemoryCache
from finetune.callbacks import EpochOrder, InputWait
from finetune.images import choose_divisor, read_image, resize_image
from finetune.interruption import Interruption
from finetune.mixing import mix_batch
from finetune.options import UserError
from finetune.predicting import predict
from finetune.stores import read_version
from finetune.trainer import TrainingModel
from generator import AugmentedImageSequence, Shares, get_generator, naming_bad_images

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


def test_batches_are_uint8_rgb_in_the_order_of_the_csv(pictures):
    paths, images = pictures
    batches, labels = one_epoch(sequence_of(paths))
    assert batches.dtype == np.uint8
    np.testing.assert_array_equal(batches, images)
    np.testing.assert_array_equal(labels, np.arange(10))


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4, 2]), (5, [5, 5]), (10, [10]), (16, [10]), (1, [1] * 10)])
def test_the_last_batch_may_be_short(pictures, batch_size, sizes):
    sequence = sequence_of(pictures[0], batch_size=batch_size)
    assert sequence.steps == len(sequence) == len(sizes)
    assert [sequence[index][0].shape for index in range(len(sizes))] == [(size, *SIZE, 3) for size in sizes]


def test_images_are_resized_to_height_by_width(pictures):
    images, _ = sequence_of(pictures[0], image_size=(8, 5))[0]
    assert images.shape == (4, 8, 5, 3)


def test_shuffling_keeps_images_with_their_labels_and_loses_none(pictures):
    paths, images = pictures
    batches, labels = one_epoch(sequence_of(paths, shuffle=True))
    assert sorted(labels) == list(range(10))
    assert labels.tolist() != list(range(10))
    np.testing.assert_array_equal(batches, images[labels])


def test_the_order_changes_with_epoch_and_seed_and_repeats_for_the_same(pictures):
    def order(seed, epoch):
        sequence = sequence_of(pictures[0], shuffle=True, seed=seed)
        sequence.epoch = epoch
        return tuple(one_epoch(sequence)[1])

    orders = {key: order(*key) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(set(orders.values())) == 4
    assert order(0, 1) == orders[0, 1]


def test_going_back_to_an_epoch_gives_its_order_again(pictures):
    sequence = sequence_of(pictures[0], shuffle=True)
    first = one_epoch(sequence)[1]
    sequence.epoch = 1
    one_epoch(sequence)
    sequence.epoch = 0
    np.testing.assert_array_equal(one_epoch(sequence)[1], first)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("labels", [np.arange(10), np.eye(10, 3, dtype=np.float32)], ids=["single", "multi"])
def test_y_true_is_what_the_batches_bring(pictures, labels, epoch, shuffle):
    sequence = sequence_of(pictures[0], labels, shuffle=shuffle, seed=5)
    sequence.epoch = epoch
    np.testing.assert_array_equal(sequence.get_y_true(), one_epoch(sequence)[1])


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        (np.array([2, 0, 2, 2], np.int32), [1, 0, 3]),
        (np.array([[1, 0], [1, 0], [0, 0], [1, 0]], np.float32), [3, 0]),
    ],
    ids=["single", "multi"],
)
def test_class_counts(labels, counts):
    found = sequence_of(["unread.png"] * 4, labels, shuffle=True).get_class_counts()
    assert found.tolist() == counts
    assert np.issubdtype(found.dtype, np.integer)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    quadrants = np.zeros((32, 48, 3), np.uint8)
    quadrants[:16, :24], quadrants[:16, 24:], quadrants[16:, :24] = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / "photo.jpg")
    Image.fromarray(quadrants).save(path, exif=exif, quality=95, subsampling=0)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    image = read_image(path)
    assert image.shape == ((48, 32, 3) if orientation > 4 else (32, 48, 3))
    assert np.abs(image.astype(int) - upright).mean() < 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_of_any_mode_is_read_as_8_bit_rgb(tmp_path, mode):
    colours = np.random.default_rng(3).integers(0, 256, (*SIZE, 3), np.uint8)
    picture = Image.fromarray(colours).convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.fromarray(colours[..., 0]))
    path = str(tmp_path / "picture.png")
    picture.save(path)
    image = read_image(path)
    assert image.dtype == np.uint8
    expected = picture.convert("RGBA").convert("RGB") if mode in ("LA", "RGBA") else picture.convert("RGB")
    np.testing.assert_array_equal(image, np.asarray(expected))


def test_palette_png_with_a_transparent_colour_keeps_its_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([250, 10, 20, 30, 240, 40, 50, 60, 230])
    path = str(tmp_path / "palette.png")
    picture.save(path, transparency=1)
    assert read_image(path).tolist() == [[[250, 10, 20], [30, 240, 40], [50, 60, 230]]]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_png_is_reduced_to_8_bits(tmp_path, channels):
    eight = np.random.default_rng(4).integers(0, 256, (*SIZE, channels), np.uint8)
    path = str(tmp_path / "deep.png")
    cv2.imwrite(path, eight.astype(np.uint16) * 257)
    expected = np.repeat(eight, 3, axis=2) if channels == 1 else eight[..., 2::-1]
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("name", ["žltý kvet/ďatelina č. 1.png", "花.png", "with space.png", "UPPER.PNG"])
def test_any_path_is_read(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (5, 3), (1, 2, 3)).save(path)
    assert read_image(str(path)).tolist() == [[[1, 2, 3]] * 5] * 3


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


def test_an_unreadable_image_is_named(unreadable):
    with pytest.raises(UserError) as caught:
        read_image(unreadable)
    assert unreadable in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_half_an_image_is_refused(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"half.{suffix}"):
        read_image(str(path))


def test_a_folder_in_place_of_an_image_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        read_image(str(tmp_path))


def test_the_sequence_keeps_its_error(pictures, unreadable):
    sequence = sequence_of([*pictures[0], unreadable])
    sequence[0]
    assert sequence.error is None
    with pytest.raises(UserError) as caught:
        sequence[2]
    assert sequence.error is caught.value


def flat_model(record: list | None = None) -> keras.Model:
    class Recorder(keras.Model):
        def train_step(self, data):
            record.append(tuple(part.numpy() for part in data))
            return {"loss": 0.0}

    inputs = keras.Input((*SIZE, 3))
    outputs = keras.layers.Dense(2, kernel_initializer="ones")(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, outputs) if record is None else Recorder(inputs, outputs)
    model.compile(loss="mse", run_eagerly=True)
    return model


@pytest.mark.parametrize("workers", [1, 3])
def test_predict_names_an_unreadable_image_whatever_the_workers(pictures, tmp_path, workers):
    bad = tmp_path / "damaged.jpg"
    bad.write_bytes(b"\xff\xd8\xff\xe0 damaged")
    paths = [*pictures[0], str(bad), *pictures[0]]
    with pytest.raises(UserError, match="damaged.jpg"):
        predict(flat_model(), sequence_of(paths, workers=workers, batch_size=2))


@pytest.mark.parametrize("workers", [1, 3])
def test_fit_names_an_unreadable_image_whatever_the_workers(pictures, tmp_path, workers):
    sequence = sequence_of([*pictures[0], str(tmp_path / "lost.png")], workers=workers, batch_size=2)
    with pytest.raises(UserError, match=r"lost\.png"), naming_bad_images(sequence):
        flat_model().fit(sequence, verbose=0)


def test_an_error_of_another_kind_passes_naming_bad_images(pictures):
    with pytest.raises(ZeroDivisionError), naming_bad_images(sequence_of(pictures[0])):
        _ = 1 / 0


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_predictions_come_in_the_order_of_the_csv_whatever_the_workers(pictures, workers):
    paths, images = pictures
    predictions = predict(flat_model(), sequence_of(paths, workers=workers, batch_size=3))
    np.testing.assert_allclose(predictions[:, 0], images.sum(axis=(1, 2, 3)), rtol=1e-5)


def augmented_sequence(paths, seed=7, **options):
    return sequence_of(paths, augmenter=build_augmenter(), shuffle=True, seed=seed, batch_size=2, **options)


def test_augmentation_changes_with_seed_epoch_and_index(pictures):
    same = [pictures[0][0]] * 4
    first, second = augmented_sequence(same), augmented_sequence(same)
    second.epoch = 1
    batches = [first[0][0], first[1][0], second[0][0], augmented_sequence(same, seed=8)[0][0]]
    assert len({batch.tobytes() for batch in batches}) == 4
    assert len({image.tobytes() for image in first[0][0]}) == 2


def test_augmented_batches_do_not_depend_on_threads_or_access_order(pictures):
    sequential = augmented_sequence(pictures[0])
    expected = {}
    for sequential.epoch in range(3):
        expected |= {(sequential.epoch, index): sequential[index] for index in range(len(sequential))}
    for number_of_threads in (1, 3):
        sequence = augmented_sequence(pictures[0], workers=number_of_threads)
        for epoch in (2, 0, 1, 0):
            sequence.epoch = epoch
            indices = np.random.default_rng(epoch).permutation(np.tile(np.arange(len(sequence)), 4)).tolist()
            with ThreadPoolExecutor(number_of_threads) as pool:
                for index, batch in zip(indices, pool.map(sequence.__getitem__, indices), strict=True):
                    np.testing.assert_array_equal(batch[0], expected[epoch, index][0])
                    np.testing.assert_array_equal(batch[1], expected[epoch, index][1])


@pytest.mark.parametrize("workers", [1, 3])
def test_fit_receives_the_same_batches_whatever_the_workers(pictures, workers):
    received = []
    sequence = augmented_sequence(pictures[0], workers=workers)
    flat_model(received).fit(sequence, epochs=3, shuffle=False, verbose=0, callbacks=[EpochOrder(sequence)])
    expected = []
    direct = augmented_sequence(pictures[0])
    for direct.epoch in range(3):
        expected += [direct[index] for index in range(len(direct))]
    assert len(received) == len(expected)
    for (images, labels), (expected_images, expected_labels) in zip(received, expected, strict=True):
        np.testing.assert_array_equal(labels, expected_labels)
        np.testing.assert_array_equal(images, expected_images)


def mix(images, labels=None, seed=0, mixup_alpha=0.0, cutmix_alpha=0.0):
    labels = np.eye(len(images), dtype=np.float32) if labels is None else labels
    return mix_batch(images, labels, np.random.default_rng(seed), mixup_alpha, cutmix_alpha)


def random_images(count, height=12, width=16):
    return np.random.default_rng(8).integers(0, 256, (count, height, width, 3), np.uint8)


def assert_blended(images, mixed, labels):
    """Checks that each mixed image is the sum of two images by their labels' shares, of which the first is its own."""
    for position, (image, shares) in enumerate(zip(mixed, labels, strict=True)):
        assert shares[position] > 0
        assert np.count_nonzero(shares) <= 2
        assert shares.sum() == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(image, np.tensordot(shares, images.astype(float), 1), atol=0.51)


def test_mixup_blends_pixels_and_labels_by_the_same_share():
    images = random_images(12)
    original = images.copy()
    mixed, labels = mix(images, mixup_alpha=1.0)
    assert (mixed.dtype, labels.dtype) == (np.uint8, np.float32)
    assert_blended(images, mixed, labels)
    np.testing.assert_array_equal(images, original)
    # Each image is in the batch once as itself and once as the other one, and each pair has a share of its own.
    is_pair = np.count_nonzero(labels, axis=1) == 2
    assert is_pair.sum() >= 8
    assert ((labels > 0).sum(axis=0) == np.where(is_pair, 2, 1)).all()
    assert len(np.unique(labels.diagonal()[is_pair])) == is_pair.sum()


def test_cutmix_pastes_a_box_and_counts_its_pixels():
    images = np.empty((40, 30, 50, 3), np.uint8)
    images[:] = np.arange(40)[:, None, None, None] + [0, 50, 100]
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
            # Where the border has cut nothing off, a box is as high to its width as an image.
            assert at_border or abs(height / 30 - width / 50) < 0.04
            cut_off += bool(at_border)
    assert 0 < cut_off < 40


def test_boxes_of_cutmix_reach_everywhere_and_have_the_drawn_size():
    images = np.zeros((400, 10, 10, 3), np.uint8)
    images[200:] = 255
    # Beta(1e6, 1e6) is a half: a box of 7 pixels a side, for 7 * 7 is about half of 100; its border may cut it off.
    mixed, _ = mix(images, cutmix_alpha=1e6)
    pasted = mixed[..., 0] != images[..., 0]
    assert pasted.any(axis=0).all()
    assert pasted.any(axis=2).sum(axis=1).max() == pasted.any(axis=1).sum(axis=1).max() == 7
    assert pasted.sum(axis=(1, 2)).max() == 49


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_of_mixup_are_of_the_beta_distribution(alpha):
    labels = np.repeat(np.eye(2, dtype=np.float32), 5000, axis=0)
    _, mixed = mix(np.zeros((10000, 1, 1, 3), np.uint8), labels, mixup_alpha=alpha)
    # Where both are of one class, the share of the other is 0.
    shares = np.concatenate([mixed[:5000, 0], mixed[5000:, 1]])
    shares = shares[shares < 1]
    assert 4500 < len(shares) <= 5500
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    # Of Beta(alpha, alpha) the variance is 1 / (4 (2 alpha + 1)).
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_mixup_and_cutmix_take_turns_at_even_odds():
    images = np.zeros((4, 6, 6, 3), np.uint8)
    images[2:] = 255
    # At shares of a half, a blend has greys and a box has none; a batch whose pairs are of one colour tells nothing.
    batches = [mix(images, seed=seed, mixup_alpha=1e6, cutmix_alpha=1e6) for seed in range(300)]
    told = [mixed for mixed, _ in batches if (mixed != images).any()]
    blends = [bool(((mixed > 0) & (mixed < 255)).any()) for mixed in told]
    assert len(told) > 200
    assert 0.4 < np.mean(blends) < 0.6
    # A batch is either the one or the other.
    for mixed, is_blend in zip(told, blends, strict=True):
        assert all((len(np.unique(image)) == 1) == is_blend for image in mixed if len(np.unique(image)) > 1)


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)])
def test_one_image_is_mixed_with_itself(alphas):
    image = random_images(1)
    mixed, labels = mix(image, np.array([[0, 1, 1]], np.float32), 0, *alphas)
    np.testing.assert_array_equal(mixed, image)
    np.testing.assert_allclose(labels, [[0, 1, 1]], rtol=1e-6)


@pytest.mark.parametrize("alpha", [5e-324, 1e-3, 1e5, 1e308])
def test_any_alpha_gives_shares(alpha):
    for alphas in ((alpha, 0.0), (0.0, alpha)):
        _, labels = mix(random_images(5), None, 0, *alphas)
        np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
        assert labels.min() >= 0


def mixing_sequence(paths, labels=None, **options):
    options = {"mixup_alpha": 1.0, "number_of_classes": 10, "shuffle": True, "seed": 7} | options
    return sequence_of(paths, labels, **options)


def test_batches_are_mixed_after_augmentation(pictures):
    plain, mixing = augmented_sequence(pictures[0]), mixing_sequence(pictures[0])
    mixing.augmenter, mixing.batch_size = build_augmenter(), 2
    for epoch in range(2):
        plain.epoch = mixing.epoch = epoch
        for index in range(5):
            (images, classes), (mixed, labels) = plain[index], mixing[index]
            assert (mixed.dtype, labels.dtype, labels.shape) == (np.uint8, np.float32, (2, 10))
            assert_blended(images, mixed, labels[:, classes])


def test_without_alphas_or_in_order_nothing_is_mixed(pictures):
    for options in ({"mixup_alpha": 0.0, "number_of_classes": 10}, {"mixup_alpha": 0.0, "number_of_classes": None}):
        plain, other = sequence_of(pictures[0], shuffle=True, seed=7), mixing_sequence(pictures[0], **options)
        for index in range(3):
            for expected, found in zip(plain[index], other[index], strict=True):
                np.testing.assert_array_equal(found, expected)
                assert found.dtype == expected.dtype
    images, labels = one_epoch(mixing_sequence(pictures[0], shuffle=False, cutmix_alpha=1.0))
    np.testing.assert_array_equal(images, pictures[1])
    np.testing.assert_array_equal(labels, np.arange(10))


def test_mixing_changes_with_seed_epoch_and_index_but_not_with_threads(pictures):
    same = [pictures[0][0], pictures[0][1]] * 4
    options = {"labels": np.tile([0, 1], 4), "number_of_classes": 2, "cutmix_alpha": 1.0, "batch_size": 4}
    first, second = mixing_sequence(same, **options), mixing_sequence(same, **options)
    second.epoch = 1
    batches = [first[0], first[1], second[0], second[1], mixing_sequence(same, **options, seed=8)[0]]
    assert len({labels.tobytes() for _, labels in batches}) == 5
    for workers in (1, 3):
        sequence = mixing_sequence(same, **options, workers=workers)
        with ThreadPoolExecutor(workers) as pool:
            for index, found in zip([1, 0] * 8, pool.map(sequence.__getitem__, [1, 0] * 8), strict=True):
                for part, expected in zip(found, first[index], strict=True):
                    np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_dataset_brings_mixed_batches(pictures, workers):
    sequence, direct = mixing_sequence(pictures[0], workers=workers), mixing_sequence(pictures[0])
    dataset = sequence.to_dataset()
    assert dataset.element_spec[1] == tf.TensorSpec((None, 10), tf.float32)
    for index, (images, labels) in enumerate(dataset.as_numpy_iterator()):
        np.testing.assert_array_equal(images, direct[index][0])
        np.testing.assert_array_equal(labels, direct[index][1])
    np.testing.assert_array_equal(np.sort(sequence.get_y_true()), np.arange(10))
    assert sequence.get_labels(np.array([3, 1])).tolist() == [3, 1]


def test_each_device_mixes_its_own_images_however_they_are_spread(pictures):
    options = {"batch_size": 3, "cutmix_alpha": 1.0}
    together = mixing_sequence(pictures[0], shares=Shares(2, 0, 2), **options)
    apart = [mixing_sequence(pictures[0], shares=Shares(2, first, 1), **options) for first in (0, 1)]
    plain = sequence_of(pictures[0], shuffle=True, seed=7, batch_size=6)
    for step in range(2):
        images, labels = together[step]
        parts = [sequence[step] for sequence in apart]
        np.testing.assert_array_equal(images, np.concatenate([part[0] for part in parts]))
        np.testing.assert_array_equal(labels, np.concatenate([part[1] for part in parts]))
        classes = plain[step][1]
        middle = len(classes) // 2
        for own, (_, part) in zip((classes[:middle], classes[middle:]), parts, strict=True):
            assert not np.delete(part, own, axis=1).any()


def test_a_device_without_an_image_has_no_share_of_any_class(pictures):
    sequence = mixing_sequence(pictures[0][:1], np.array([4]), batch_size=3, shares=Shares(2, 0, 2))
    images, labels, weights, bounds, total = sequence.get_shares(0)
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels[weights == 0], np.zeros((1, 10)))
    np.testing.assert_allclose(labels[weights == 1], np.eye(10)[[4]], rtol=1e-6)
    np.testing.assert_array_equal(images[weights == 1], pictures[1][:1])
    assert (bounds.tolist(), total) == ([0, 1, 2], 1)
    (batch,) = sequence.to_dataset().as_numpy_iterator()
    np.testing.assert_array_equal(batch[1], labels)


def test_several_labels_are_mixed_as_they_are(pictures):
    present = np.eye(10, dtype=int)
    present[:, 0] = 1
    _, labels = one_epoch(mixing_sequence(pictures[0], present, number_of_classes=None))
    assert labels.dtype == np.float32
    # All images have the first label, and so has each mixed one; of the others it has shares.
    np.testing.assert_allclose(labels[:, 0], 1, rtol=1e-6)
    assert ((labels > 0) & (labels < 0.999)).any()


def test_mixing_leaves_a_cache_as_it_is(pictures, tmp_path):
    sequence = mixing_sequence(pictures[0], cutmix_alpha=1.0, cache=MemoryCache(10, SIZE))
    first, second = one_epoch(sequence), one_epoch(sequence)
    np.testing.assert_array_equal(first[0], second[0])
    for row in range(10):
        np.testing.assert_array_equal(sequence.cache.get(row), pictures[1][row])


def test_the_configs_say_how_training_images_change(pictures, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("path,class\n" + "".join(f"{path},{'ab'[row % 2]}\n" for row, path in enumerate(pictures[0])))
    configs = Configs(image_target_size=(*SIZE, 3), augmentation_strength="none", batch_size=10, cutmix_alpha=0.5)
    training, validation = (get_generator(str(table), ["a", "b"], configs, kind) for kind in (True, False))
    assert training.augmenter is validation.augmenter is None
    images, labels = training[0]
    assert labels.shape == (10, 2)
    assert (np.abs(images.astype(int) - pictures[1][training._order()]).sum(axis=(1, 2, 3)) > 0).any()
    np.testing.assert_array_equal(validation[0][0], pictures[1])
    assert validation[0][1].tolist() == [0, 1] * 5
    configs = configs.replace(cutmix_alpha=0.0, augmentation_strength="light")
    assert get_generator(str(table), ["a", "b"], configs, True).augmenter is not None
    assert get_generator(str(table), ["a", "b"], configs, True)[0][1].shape == (10,)


def test_the_given_augmenter_is_not_reseeded(pictures):
    augmenter = build_augmenter()
    augmenter.seed_(1)
    untouched = build_augmenter()
    untouched.seed_(1)
    sequence_of(pictures[0], augmenter=augmenter)[0]
    np.testing.assert_array_equal(augmenter(images=pictures[1]), untouched(images=pictures[1]))


@pytest.mark.parametrize("size", [(5, 7), (40, 9), (9, 40), (33, 50), (12, 16)])
def test_resizing_gives_height_by_width_uint8(size):
    resized = resize_image(np.zeros((*SIZE, 3), np.uint8), size)
    assert resized.shape == (*size, 3)
    assert resized.dtype == np.uint8


def test_shrinking_averages_areas():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:2, :4] = [[[0, 40, 80]] * 4, [[20, 60, 100]] * 4]
    image[2, 6] = 200
    expected = np.zeros((2, 2, 3))
    expected[0, 0], expected[1, 1] = (10, 50, 90), 25
    np.testing.assert_array_equal(resize_image(image, (2, 2)), expected)


def test_shrinking_by_any_factor_keeps_the_mean():
    image = np.random.default_rng(6).integers(0, 256, (45, 64, 3), np.uint8)
    np.testing.assert_allclose(resize_image(image, (13, 22)).mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=0.5)


def test_an_image_of_the_right_size_stays_as_it_is():
    image = np.random.default_rng(6).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(resize_image(image, (5, 7)), image)


@pytest.mark.parametrize("size", [(3, 3), (12, 30), (31, 8), (50, 50)])
def test_resizing_keeps_a_plain_colour(size):
    plain = np.full((*SIZE, 3), (10, 120, 250), np.uint8)
    assert np.unique(resize_image(plain, size).reshape(-1, 3), axis=0).tolist() == [[10, 120, 250]]


def photo_jpeg(path, height, width, **options):
    """Writes a real photo, enlarged or shrunk, as a JPEG file."""
    image = Image.fromarray(skimage.data.astronaut()).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path, quality=90, **options)
    return str(path)


@pytest.mark.parametrize(
    ("height", "width", "image_size", "divisor"),
    [
        *((3000, 4000, (224, 224), 8), (1800, 1800, (224, 224), 8), (1791, 3000, (224, 224), 4)),
        *((448, 640, (224, 224), 2), (447, 640, (224, 224), 1), (100, 100, (224, 224), 1)),
        # Turned upright the picture may be 300 wide, which a half of would be below 200.
        *((300, 900, (100, 200), 1), (400, 900, (100, 200), 2)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_suffices(tmp_path, height, width, image_size, divisor):
    encoded = np.fromfile(photo_jpeg(tmp_path / "photo.jpg", height, width), np.uint8)
    assert choose_divisor(encoded, (width, height), image_size) == divisor


@pytest.mark.parametrize(("height", "width"), [(480, 640), (1000, 1500), (3000, 4000)])
def test_scaled_decoding_is_close_to_full_decoding(tmp_path, height, width):
    path = photo_jpeg(tmp_path / "photo.jpg", height, width)
    scaled = read_image(path, (224, 224))
    assert min(scaled.shape[:2]) >= 224
    assert scaled.shape[0] <= height // 2
    full = cv2.resize(read_image(path), (224, 224), interpolation=cv2.INTER_AREA)
    assert np.abs(resize_image(scaled, (224, 224)).astype(int) - full).mean() < 2


@pytest.mark.parametrize("orientation", [3, 6])
def test_scaled_decoding_keeps_the_orientation_and_rgb(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = photo_jpeg(tmp_path / "photo.jpg", 400, 600, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path)).resize((30, 30), Image.Resampling.BOX)
    assert np.abs(resize_image(read_image(path, (30, 30)), (30, 30)).astype(int) - np.asarray(upright)).mean() < 3


def test_other_formats_are_decoded_whole(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(skimage.data.astronaut()).save(path)
    np.testing.assert_array_equal(read_image(str(path), (32, 32)), skimage.data.astronaut())


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_dataset_brings_the_batches_of_each_epoch(pictures, workers):
    sequence, direct = augmented_sequence(pictures[0], workers=workers), augmented_sequence(pictures[0])
    dataset = sequence.to_dataset()
    for epoch in (0, 1):
        sequence.epoch = direct.epoch = epoch
        batches = list(dataset.as_numpy_iterator())
        assert len(batches) == len(direct) == 5
        for index, (images, labels) in enumerate(batches):
            np.testing.assert_array_equal(images, direct[index][0])
            np.testing.assert_array_equal(labels, direct[index][1])


def test_the_dataset_begins_at_the_first_step(pictures):
    sequence = sequence_of(pictures[0])
    sequence.first_step = 2
    assert [labels.tolist() for _, labels in sequence.to_dataset().as_numpy_iterator()] == [[8, 9]]


def cache_of(kind, paths, folder, image_size=SIZE):
    return MemoryCache(len(paths), image_size) if kind == "memory" else DiskCache(paths, image_size, str(folder))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_cache_gives_the_same_batches_without_reading_again(pictures, tmp_path, kind, monkeypatch):
    paths = pictures[0]
    expected = augmented_sequence(paths)
    cached = augmented_sequence(paths, cache=cache_of(kind, paths, tmp_path / "cache"), workers=2)
    list(cached.to_dataset().as_numpy_iterator())
    monkeypatch.setattr("generator.read_image", lambda *_: pytest.fail("an image was read again"))
    cached.epoch = 1
    batches = [images for images, _ in cached.to_dataset().as_numpy_iterator()]
    monkeypatch.undo()
    expected.epoch = 1
    for index, images in enumerate(batches):
        np.testing.assert_array_equal(images, expected[index][0])


@pytest.mark.slow
def test_a_later_process_uses_the_disk_cache(pictures, tmp_path):
    paths, images = pictures
    sequence = sequence_of(paths, cache=cache_of("disk", paths, tmp_path))
    one_epoch(sequence)
    code = (
        "import sys; from finetune.caches import DiskCache; import numpy as np; "
        f"cache = DiskCache(sys.argv[1:], {SIZE}, {str(tmp_path)!r}); "
        "print(sum(int(cache.get(row).sum()) for row in range(len(sys.argv) - 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert int(done.stdout) == images.sum()


def test_a_changed_image_is_read_again(pictures, tmp_path):
    paths, images = pictures
    one_epoch(sequence_of(paths, cache=cache_of("disk", paths, tmp_path)))
    Image.fromarray(images[7]).save(paths[3])
    os.utime(paths[3], ns=(1, 1))
    batches, _ = one_epoch(sequence_of(paths, cache=cache_of("disk", paths, tmp_path)))
    np.testing.assert_array_equal(batches[3], images[7])
    np.testing.assert_array_equal(np.delete(batches, 3, axis=0), np.delete(images, 3, axis=0))


def test_an_image_that_changes_while_it_is_read_is_read_again(pictures, tmp_path):
    paths, images = pictures
    cache = cache_of("disk", paths, tmp_path)
    assert cache.get(3) is None
    Image.fromarray(images[7]).save(paths[3])
    os.utime(paths[3], ns=(1, 1))
    cache.put(3, images[3])
    assert cache.get(3) is None


def test_another_image_size_has_a_cache_of_its_own(pictures, tmp_path):
    one_epoch(sequence_of(pictures[0], cache=cache_of("disk", pictures[0], tmp_path)))
    other = cache_of("disk", pictures[0], tmp_path, (6, 8))
    assert [other.get(row) for row in range(10)] == [None] * 10
    assert len(list(tmp_path.glob("*.cache"))) == 2


def test_half_written_pixels_are_read_again(pictures, tmp_path):
    paths, images = pictures
    cache = cache_of("disk", paths, tmp_path)
    one_epoch(sequence_of(paths, cache=cache))
    with open(cache.path, "r+b") as file:
        file.seek(-images[0].nbytes, os.SEEK_END)
        file.write(b"\0" * 40)
    again = cache_of("disk", paths, tmp_path)
    assert again.get(9) is None
    assert again.get(8) is not None
    np.testing.assert_array_equal(one_epoch(sequence_of(paths, cache=again))[0], images)


def test_two_processes_that_fill_one_cache_agree(pictures, tmp_path):
    paths, images = pictures
    first, second = (sequence_of(paths, cache=cache_of("disk", paths, tmp_path)) for _ in range(2))
    first[0], second[1], first[2]
    for sequence in (first, second):
        np.testing.assert_array_equal(one_epoch(sequence)[0], images)


def test_a_disk_cache_that_is_killed_while_it_is_filled_is_right_afterwards(pictures, tmp_path):
    paths, images = pictures
    code = (
        "import os, signal, sys, threading, time; import numpy as np; from finetune.caches import DiskCache\n"
        "from finetune.images import read_image\n"
        f"cache = DiskCache(sys.argv[1:], {SIZE}, {str(tmp_path)!r})\n"
        "threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "while True:\n"
        "    for row, path in enumerate(sys.argv[1:]): cache.put(row, read_image(path))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    cache = cache_of("disk", paths, tmp_path)
    for row, image in enumerate(images):
        assert cache.get(row) is None or (cache.get(row) == image).all()


@pytest.mark.parametrize(
    ("patched", "value", "kind"),
    [("finetune.caches.free_memory", 5000, "memory"), ("finetune.caches.shutil.disk_usage", None, "disk")],
)
def test_a_cache_that_does_not_fit_is_refused_before_the_start(pictures, tmp_path, monkeypatch, patched, value, kind):
    usage = shutil.disk_usage(tmp_path)._replace(free=3000)
    monkeypatch.setattr(patched, (lambda: value) if kind == "memory" else (lambda _: usage))
    with pytest.raises(UserError, match="image_cache: .*Free are 0.0 GiB"):
        cache_of(kind, pictures[0], tmp_path)


def test_a_cache_folder_that_cannot_be_written_is_named(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write the image cache .*file"):
        cache_of("disk", pictures[0], tmp_path / "file")


def test_a_missing_image_is_named_with_a_cache_too(pictures, tmp_path):
    paths = [*pictures[0], str(tmp_path / "lost.png")]
    with pytest.raises(UserError, match=r"lost\.png"):
        one_epoch(sequence_of(paths, cache=cache_of("disk", paths, tmp_path)))


# Images in stores


@pytest.fixture
def urls(pictures, store):
    """The URLs of the pictures in a store, and the pictures."""
    found = [f"memory://bucket/{number}.png" for number in range(10)]
    for url, path in zip(found, pictures[0], strict=True):
        store.put(url, Path(path).read_bytes())
    return found, pictures[1]


@pytest.mark.parametrize("size", [None, (30, 40)])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "gif"])
def test_an_image_in_a_store_is_that_of_the_file(tmp_path, store, kind, size):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(skimage.data.astronaut()[:300, :400]).save(path)
    store.put(f"memory://bucket/a.{kind}", path.read_bytes())
    np.testing.assert_array_equal(read_image(f"memory://bucket/a.{kind}", size), read_image(str(path), size))


def test_batches_of_urls_are_those_of_files(urls, pictures):
    for workers in (1, 3):
        of_files, of_urls = (
            list(augmented_sequence(paths, workers=workers).to_dataset().as_numpy_iterator())
            for paths in (pictures[0], urls[0])
        )
        for (images, labels), (expected, of_expected) in zip(of_urls, of_files, strict=True):
            np.testing.assert_array_equal(images, expected)
            np.testing.assert_array_equal(labels, of_expected)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/lost.png", "lost.png: it does not exist. Replace it, or drop its row.$"),
        ("memory://bucket", "memory://bucket: it does not exist"),
        ("memory://bucket/text.png", "Cannot decode the image memory://bucket/text.png: it is damaged or no image"),
        ("htps://host/a.png", "out of reach: Protocol not known: htps. Check the address, .* or drop its row.$"),
        ("zip://a.png::memory://bucket/a.zip", "URLs joined by '::' are not read"),
    ],
)
def test_a_url_that_brings_no_image_is_named(urls, store, url, message):
    store.put("memory://bucket/text.png", b"no image")
    sequence = sequence_of([*urls[0][:8], url], cache=None)
    with pytest.raises(UserError, match=message) as caught:
        sequence[2]
    assert sequence.error is caught.value
    assert "\n" not in str(caught.value)


def test_a_warm_disk_cache_downloads_nothing_and_asks_once_an_image(urls, tmp_path, store):
    paths, images = urls
    names = [f"/bucket/{number}.png" for number in range(10)]
    # The first run fetches each image once in its two epochs; a later one only asks for each one's version.
    for expected in ([("info", name) for name in names] + [("bytes", name, None, None) for name in names], None):
        store.asked.clear()
        sequence = sequence_of(paths, cache=cache_of("disk", paths, tmp_path))
        for sequence.epoch in range(2):
            np.testing.assert_array_equal(one_epoch(sequence)[0], images)
        assert sorted(store.asked) == sorted(expected or [("info", name) for name in names])
    assert len(list(tmp_path.glob("*.cache"))) == 1


def test_an_object_that_was_replaced_is_fetched_anew(urls, tmp_path, store, pictures):
    paths, images = urls
    one_epoch(sequence_of(paths, cache=cache_of("disk", paths, tmp_path)))
    store.put(paths[3], Path(pictures[0][7]).read_bytes())
    store.asked.clear()
    batches, _ = one_epoch(sequence_of(paths, cache=cache_of("disk", paths, tmp_path)))
    np.testing.assert_array_equal(batches, images[[0, 1, 2, 7, 4, 5, 6, 7, 8, 9]])
    assert [asked for asked in store.asked if asked[0] == "bytes"] == [("bytes", "/bucket/3.png", None, None)]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"ETag": '"a"'}, {"ETag": '"a"'}, True),
        ({"ETag": '"a"'}, {"ETag": '"b"'}, False),
        ({"last_modified": "2026-01-01"}, {"last_modified": "2026-01-02"}, False),
        ({"Last-Modified": "Thu"}, {"Last-Modified": "Fri"}, False),
        ({"size": 1}, {"size": 2}, False),
        ({"StorageClass": "STANDARD", "time": 1}, {"StorageClass": "GLACIER", "time": 2}, True),
    ],
)
def test_the_version_is_what_changes_with_the_bytes(urls, monkeypatch, first, second, same):
    versions = []
    for told in (first, second):
        monkeypatch.setattr(MemoryFileSystem, "info", lambda *_, told=told: {"type": "file", "size": 9} | told)
        versions.append(read_version(urls[0][0]))
    assert (versions[0] == versions[1]) is same


def test_an_image_whose_store_tells_no_version_is_read_in_every_run(urls, tmp_path, store, monkeypatch):
    def refuse(*_):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    paths, images = urls
    for _ in range(2):
        store.asked.clear()
        sequence = sequence_of(paths, cache=cache_of("disk", paths, tmp_path))
        for _ in range(2):
            np.testing.assert_array_equal(one_epoch(sequence)[0], images)
        assert len(store.asked) == 10


def test_input_wait_is_the_share_of_the_time_that_the_model_waits(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    wait = InputWait()
    wait.set_model(SimpleNamespace(seconds_waited=0.0))
    for epoch in range(2):
        wait.model.seconds_waited = 0.0
        wait.on_epoch_begin(epoch)
        for batch in range(3):
            now[0] += 0.3
            wait.model.seconds_waited += 0.3
            now[0] += 0.1
            wait.on_train_batch_end(batch)
        now[0] += 1000  # validation
        wait.on_epoch_end(epoch)
    assert wait.share == pytest.approx(0.75)
    printed = capsys.readouterr().out
    assert printed.count("input_wait: 75.0% of the epoch") == 2
    assert printed.count("Raise generator_workers") == 2


@pytest.mark.slow
def test_a_starved_model_waits_longer_than_one_that_is_fed(pictures):
    class Slow(AugmentedImageSequence):
        def __getitem__(self, index):
            time.sleep(0.2)
            return super().__getitem__(index)

    class Busy(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.2)

    shares = []
    for kind, work in ((Slow, []), (AugmentedImageSequence, [Busy()])):
        sequence = kind(pictures[0], np.zeros(10, int), SIZE, 1, shuffle=True, shares=Shares())
        inputs = keras.Input((*SIZE, 3))
        model = TrainingModel(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(inputs)))
        model.compile(keras.optimizers.SGD(1e-9), lambda labels, outputs: outputs[:, 0], [])
        wait = InputWait()
        model.fit(sequence.to_dataset(), 2, 0, [*work, wait], Interruption())
        shares.append(wait.share)
    assert 1 >= shares[0] > shares[1] >= 0


# Devices that train together


def sequences_of(paths, devices, processes, **options):
    """The sequences of processes that have the same number of devices each."""
    local = devices // processes
    return [sequence_of(paths, shares=Shares(devices, local * number, local), **options) for number in range(processes)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("images", [1, 3, 10, 23])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("devices", "processes"), [(1, 1), (2, 1), (2, 2), (3, 3), (4, 1), (4, 2), (4, 4), (5, 1), (5, 5)]
)
def test_every_image_is_read_by_one_process_once_an_epoch(monkeypatch, devices, processes, batch_size, images, shuffle):
    read = []
    monkeypatch.setattr("generator.read_image", lambda path, *_: read.append(path) or np.zeros((*SIZE, 3), np.uint8))
    paths = [f"{number}.png" for number in range(images)]
    whole = sequence_of(paths, batch_size=batch_size * devices, shuffle=shuffle, seed=3)
    parts = sequences_of(paths, devices, processes, batch_size=batch_size, shuffle=shuffle, seed=3)
    for epoch in (0, 1):
        labels, read_by = [], []
        for part in parts:
            part.epoch = epoch
            assert len(part) == part.steps == -(-images // (batch_size * devices))
            labels.append([part[step][1].tolist() for step in range(len(part))])
            read_by.append(read.copy())
            read.clear()
        assert sorted(path for process in read_by for path in process) == sorted(paths)
        whole.epoch = epoch
        for step, of_step in enumerate(zip(*labels, strict=True)):
            # One process after the other has what one device would have at once, in parts as even as can be.
            assert [label for part in of_step for label in part] == whole[step][1].tolist()
            sizes = [len(part) for part in of_step]
            assert max(sizes) - min(sizes) <= devices // processes
        read.clear()


def test_augmentation_does_not_depend_on_which_process_has_a_device(pictures):
    expected = None
    for processes in (1, 2, 4):
        parts = sequences_of(pictures[0], 4, processes, augmenter=build_augmenter(), shuffle=True, seed=7, batch_size=2)
        for part in parts:
            part.epoch = 2
        found = [np.concatenate([part[step][0] for part in parts]) for step in range(2)]
        assert [len(images) for images in found] == [8, 2]
        expected = expected or found
        for images, before in zip(found, expected, strict=True):
            np.testing.assert_array_equal(images, before)
    # Two devices do not augment alike.
    (same,) = sequences_of(pictures[0][:1] * 4, 2, 1, augmenter=build_augmenter(), shuffle=True, batch_size=2)
    assert len({image.tobytes() for image in same[0][0]}) == 4


def test_one_device_augments_as_without_shares(pictures):
    (shared,) = sequences_of(pictures[0], 1, 1, augmenter=build_augmenter(), shuffle=True, seed=7, batch_size=2)
    alone = augmented_sequence(pictures[0])
    for step in range(5):
        np.testing.assert_array_equal(shared.get_shares(step)[0], alone[step][0])


@pytest.mark.parametrize(
    ("shares", "step", "rows", "weights", "bounds", "total"),
    [
        # 10 images, 4 devices of 2: 8 of the first step two by two, and in the second step none, one, none, one.
        (Shares(4, 0, 4), 0, [0, 1, 2, 3, 4, 5, 6, 7], [1] * 8, [0, 2, 4, 6, 8], 8),
        (Shares(4, 2, 2), 0, [4, 5, 6, 7], [1] * 4, [0, 2, 4], 8),
        (Shares(4, 0, 4), 1, [None, 8, None, 9], [0, 1, 0, 1], [0, 1, 2, 3, 4], 2),
        (Shares(4, 0, 1), 1, [None], [0], [0, 1], 2),
        (Shares(4, 1, 1), 1, [8], [1], [0, 1], 2),
        (Shares(4, 2, 2), 1, [None, 9], [0, 1], [0, 1, 2], 2),
        # 3 devices of 2: 4 are left, of which the last device has two.
        (Shares(3, 0, 3), 1, [6, 7, 8, 9], [1] * 4, [0, 1, 2, 4], 4),
        (Shares(3, 2, 1), 1, [8, 9], [1] * 2, [0, 2], 4),
        # 6 devices of 1.
        (Shares(6, 0, 3), 1, [None, 6, 7], [0, 1, 1], [0, 1, 2, 3], 4),
        (Shares(6, 3, 3), 1, [None, 8, 9], [0, 1, 1], [0, 1, 2, 3], 4),
    ],
)
@pytest.mark.parametrize("labels", [np.arange(10) + 20, np.eye(10, dtype=np.float32)], ids=["single", "multi"])
def test_each_device_has_its_share_or_a_grey_image_that_does_not_count(
    pictures, monkeypatch, labels, shares, step, rows, weights, bounds, total
):
    paths, images = pictures
    monkeypatch.setattr(AugmentedImageSequence, "_order", lambda _: np.arange(10))
    batch_size = 1 if shares.devices == 6 else 2
    sequence = sequence_of(paths, labels, shuffle=True, batch_size=batch_size, shares=shares)
    # Whether the steps before it are left out or not.
    for sequence.first_step, index in ((0, step), (step, 0)):
        found = sequence.get_shares(index)
        expected = [np.full((*SIZE, 3), 127, np.uint8) if row is None else images[row] for row in rows]
        np.testing.assert_array_equal(found[0], expected)
        np.testing.assert_array_equal(found[1], [0 * labels[0] if row is None else labels[row] for row in rows])
        assert [part.tolist() for part in found[2:]] == [weights, bounds, total]
        assert [part.dtype for part in found] == [np.uint8, labels.dtype, np.float32, np.int32, np.float32]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_dataset_brings_the_shares(pictures, processes):
    for part in sequences_of(pictures[0], 4, processes, shuffle=True, batch_size=2, workers=2):
        dataset = part.to_dataset()
        assert int(dataset.cardinality()) == 2
        for step, batch in enumerate(dataset.as_numpy_iterator()):
            for found, expected in zip(batch, part.get_shares(step), strict=True):
                np.testing.assert_array_equal(found, expected)


def test_shares_of_an_order_that_is_not_shuffled_are_plain_batches(pictures):
    first, second = sequences_of(pictures[0], 4, 2, batch_size=2)
    assert [labels.tolist() for _, labels in first.to_dataset().as_numpy_iterator()] == [[0, 1, 2, 3], [8]]
    assert [labels.tolist() for _, labels in second.to_dataset().as_numpy_iterator()] == [[4, 5, 6, 7], [9]]
    assert [first.get_rows(step).tolist() for step in range(2)] == [[0, 1, 2, 3], [8]]
    assert [second.get_rows(step).tolist() for step in range(2)] == [[4, 5, 6, 7], [9]]
    np.testing.assert_array_equal(second.get_labels(np.array([9, 4])), [9, 4])


def test_rows_leave_out_what_could_not_be_read(pictures):
    paths, images = pictures
    paths = [*paths[:5], "lost.png", *paths[6:]]
    _, second = sequences_of(paths, 2, 2, batch_size=4, skip_bad_images=True)
    batch, labels = second[0]
    assert labels.tolist() == second.get_rows(0).tolist() == [4, 6, 7]
    np.testing.assert_array_equal(batch, images[[4, 6, 7]])
    assert list(second.bad_images) == [5]


def test_an_image_that_cannot_be_read_is_replaced_as_on_one_device(pictures):
    paths = [*pictures[0][:5], "lost.png", *pictures[0][6:]]
    options = {"shuffle": True, "seed": 1, "skip_bad_images": True}
    whole = sequence_of(paths, batch_size=10, **options)
    expected = whole[0][1].tolist()
    assert 5 not in expected
    for processes in (1, 5):
        parts = sequences_of(paths, 5, processes, batch_size=2, **options)
        assert [label for part in parts for label in part.get_shares(0)[1].tolist()] == expected
        # The one whose share it is tells of it.
        assert [row for part in parts for row in part.bad_images] == [5]
