import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from picture_sets import (
    SIZE,
    assert_blended,
    cache_of,
    mixing_sequence,
    one_epoch,
    pictures,  # noqa: F401
    sequence_of,
)
from PIL import Image

from augmenter import build_augmenter
from configs import Configs
from finetune.core.options import UserError
from finetune.data.stores import read_version
from finetune.predicting.predicting import predict
from finetune.training.callbacks import EpochOrder, InputWait
from finetune.training.trainer import Interruption, TrainingModel
from generator import AugmentedImageSequence, Shares, get_generator, naming_bad_images


def assert_same_batch(found, expected):
    assert len(found) == len(expected)
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(part, other)
        assert part.dtype == other.dtype


def test_batches_are_uint8_rgb_in_the_order_of_the_csv(pictures):
    assert_same_batch(one_epoch(sequence_of(pictures[0])), (pictures[1], np.arange(10)))


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    # A quarter of a batch or more stays a batch of its own; there is no other batch for 3 of 16.
    [(33, 16, [16, 17]), (35, 16, [17, 18]), (36, 16, [16, 16, 4]), (65, 16, [16, 16, 16, 17]), (3, 16, [3])],
)
def test_a_small_rest_of_an_epoch_is_spread_over_the_other_batches(pictures, images, batch_size, sizes):
    paths, labels = [pictures[0][row % 10] for row in range(images)], np.arange(images)
    sequence = sequence_of(paths, labels, shuffle=True, seed=1, batch_size=batch_size)
    batches = [sequence[index] for index in range(len(sequence))]
    assert [len(batch[0]) for batch in batches] == sizes
    assert sorted(np.concatenate([batch[1] for batch in batches])) == [*range(images)]


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4, 2]), (5, [5, 5]), (9, [9, 1]), (16, [10])])
def test_without_shuffling_the_last_batch_may_be_short(pictures, batch_size, sizes):
    sequence = sequence_of(pictures[0], batch_size=batch_size)
    assert sequence.steps == len(sequence) == len(sizes)
    assert [sequence[index][0].shape for index in range(len(sizes))] == [(size, *SIZE, 3) for size in sizes]


def test_shuffling_keeps_images_with_their_labels_in_an_order_of_seed_and_epoch(pictures):
    paths, images = pictures
    orders = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 1)]:
        sequence = sequence_of(paths, shuffle=True, seed=seed)
        sequence.epoch = epoch
        batches, labels = one_epoch(sequence)
        assert sorted(labels) == list(range(10))
        np.testing.assert_array_equal(batches, images[labels])
        orders.append(tuple(labels))
    assert len({*orders, tuple(range(10))}) == 5
    assert orders[-1] == orders[1]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("labels", [np.arange(10), np.eye(10, 3, dtype=np.float32)], ids=["single", "multi"])
def test_y_true_has_the_labels_of_the_batches(pictures, labels, shuffle):
    sequence = sequence_of(pictures[0], labels, shuffle=shuffle, seed=5)
    for sequence.epoch in (0, 3):
        np.testing.assert_array_equal(sequence.get_y_true(), one_epoch(sequence)[1])


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
@pytest.mark.parametrize("kind", ["predict", "fit", "cache"])
def test_an_unreadable_image_is_named_whatever_the_workers(pictures, tmp_path, workers, kind):
    paths = [*pictures[0], str(tmp_path / "lost image.png"), *pictures[0]]
    cache = cache_of("disk", paths, tmp_path) if kind == "cache" else None
    sequence = sequence_of(paths, workers=workers, batch_size=2, cache=cache)
    with pytest.raises(UserError, match="lost image.png"), naming_bad_images(sequence):
        flat_model().fit(sequence, verbose=0) if kind == "fit" else predict(flat_model(), sequence)


@pytest.mark.parametrize("workers", [0, 3])
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


def test_batches_do_not_depend_on_threads_or_access_order(pictures):
    for build in (augmented_sequence, mixing_sequence):
        sequence, direct = build(pictures[0], workers=3), build(pictures[0])
        for epoch in (2, 0, 2):
            sequence.epoch = direct.epoch = epoch
            indices = np.random.default_rng(epoch).permutation(np.tile(np.arange(len(direct)), 4)).tolist()
            with ThreadPoolExecutor(3) as pool:
                for index, batch in zip(indices, pool.map(sequence.__getitem__, indices), strict=True):
                    assert_same_batch(batch, direct[index])


def test_fit_receives_the_batches_of_each_epoch(pictures):
    received = []
    sequence, direct = augmented_sequence(pictures[0], workers=3), augmented_sequence(pictures[0])
    flat_model(received).fit(sequence, epochs=3, shuffle=False, verbose=0, callbacks=[EpochOrder(sequence)])
    assert len(received) == 15
    for position, batch in enumerate(received):
        direct.epoch = position // 5
        assert_same_batch(batch, direct[position % 5])


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
    plain = sequence_of(pictures[0], shuffle=True, seed=7)
    other = mixing_sequence(pictures[0], mixup_alpha=0.0, number_of_classes=None)
    for index in range(3):
        assert_same_batch(other[index], plain[index])
    images, labels = one_epoch(mixing_sequence(pictures[0], shuffle=False, cutmix_alpha=1.0))
    np.testing.assert_array_equal(images, pictures[1])
    np.testing.assert_array_equal(labels, np.arange(10))


def test_mixing_changes_with_seed_epoch_and_index(pictures):
    same = [pictures[0][0], pictures[0][1]] * 4
    options = {"labels": np.tile([0, 1], 4), "number_of_classes": 2, "cutmix_alpha": 1.0, "batch_size": 4}
    first, second = mixing_sequence(same, **options), mixing_sequence(same, **options)
    second.epoch = 1
    batches = [first[0], first[1], second[0], second[1], mixing_sequence(same, **options, seed=8)[0]]
    assert len({labels.tobytes() for _, labels in batches}) == 5


def test_each_device_mixes_its_own_images_however_they_are_spread(pictures):
    options = {"batch_size": 3, "cutmix_alpha": 1.0}
    together = mixing_sequence(pictures[0], shares=Shares(2, 0, 2), **options)
    apart = [mixing_sequence(pictures[0], shares=Shares(2, first, 1), **options) for first in (0, 1)]
    plain = sequence_of(pictures[0], shuffle=True, seed=7, batch_size=6)
    for step in range(2):
        parts = [sequence[step] for sequence in apart]
        assert_same_batch(together[step], [np.concatenate(part) for part in zip(*parts, strict=True)])
        for own, (_, labels) in zip(np.split(plain[step][1], 2), parts, strict=True):
            assert not np.delete(labels, own, axis=1).any()


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


def test_configs_decide_how_training_images_change(pictures, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("path,class\n" + "".join(f"{path},{'ab'[row % 2]}\n" for row, path in enumerate(pictures[0])))
    configs = Configs(image_target_size=(*SIZE, 3), augmentation_strength="none", batch_size=10, cutmix_alpha=0.5)
    training, validation = (get_generator(str(table), ["a", "b"], configs, kind) for kind in (True, False))
    assert training.augmenter is validation.augmenter is None
    images, labels = training[0]
    assert labels.shape == (10, 2)
    assert (images != pictures[1][training._order()]).any(axis=(1, 2, 3)).any()
    assert_same_batch(validation[0], (pictures[1], np.array([0, 1] * 5, validation.labels.dtype)))
    configs = configs.replace(cutmix_alpha=0.0, augmentation_strength="light")
    training = get_generator(str(table), ["a", "b"], configs, True)
    assert training.augmenter is not None
    assert training[0][1].shape == (10,)


def test_the_given_augmenter_is_not_reseeded(pictures):
    given, untouched = build_augmenter(), build_augmenter()
    for augmenter in (given, untouched):
        augmenter.seed_(1)
    sequence_of(pictures[0], augmenter=given)[0]
    np.testing.assert_array_equal(given(images=pictures[1]), untouched(images=pictures[1]))


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("build", [augmented_sequence, mixing_sequence])
def test_the_dataset_has_the_batches_of_each_epoch(pictures, workers, build):
    sequence, direct = build(pictures[0], workers=workers), build(pictures[0])
    dataset = sequence.to_dataset()
    for epoch in (0, 1):
        sequence.epoch = direct.epoch = epoch
        batches = list(dataset.as_numpy_iterator())
        assert len(batches) == len(direct)
        for index, batch in enumerate(batches):
            assert_same_batch(batch, direct[index])
    sequence.first_step = 2
    batches = list(sequence.to_dataset().as_numpy_iterator())
    assert len(batches) == len(direct) - 2
    assert_same_batch(batches[0], direct[2])


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_cache_gives_the_same_batches_without_reading_again(pictures, tmp_path, kind, monkeypatch):
    expected = augmented_sequence(pictures[0])
    cached = augmented_sequence(pictures[0], cache=cache_of(kind, pictures[0], tmp_path / "cache"), workers=2)
    one_epoch(cached)
    cached.epoch = expected.epoch = 1
    with monkeypatch.context() as patch:
        patch.setattr("finetune.loading.batches.read_image", lambda *_: pytest.fail("an image was read again"))
        batches = one_epoch(cached)
    assert_same_batch(batches, one_epoch(expected))


def test_a_changed_image_is_read_again(pictures, tmp_path):
    paths, images = pictures
    one_epoch(sequence_of(paths, cache=cache_of("disk", paths, tmp_path)))
    Image.fromarray(images[7]).save(paths[3])
    os.utime(paths[3], ns=(1, 1))
    batches, _ = one_epoch(sequence_of(paths, cache=cache_of("disk", paths, tmp_path)))
    np.testing.assert_array_equal(batches, images[[0, 1, 2, 7, 4, 5, 6, 7, 8, 9]])


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


# Images in stores


@pytest.fixture
def urls(pictures, store):
    """The URLs of the pictures in a store, and the pictures."""
    found = [f"memory://bucket/{number}.png" for number in range(10)]
    for url, path in zip(found, pictures[0], strict=True):
        store.put(url, Path(path).read_bytes())
    return found, pictures[1]


def test_batches_of_urls_are_those_of_files(urls, pictures):
    of_urls, of_files = augmented_sequence(urls[0], workers=3), augmented_sequence(pictures[0])
    for index, batch in enumerate(of_urls.to_dataset().as_numpy_iterator()):
        assert_same_batch(batch, of_files[index])


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://bucket/lost.png", "not exist"),
        ("memory://bucket", "not exist"),
        ("memory://bucket/text.png", "no image"),
        ("htps://host/a.png", "Protocol not known: htps"),
        ("zip://a.png::memory://bucket/a.zip", "'::'"),
    ],
)
def test_a_url_that_brings_no_image_is_named(urls, store, url, reason):
    store.put("memory://bucket/text.png", b"no image")
    sequence = sequence_of([*urls[0][:8], url], cache=None)
    with pytest.raises(UserError) as caught:
        sequence[2]
    assert sequence.error is caught.value
    (line,) = str(caught.value).splitlines()
    assert url in line
    assert reason in line


def test_a_disk_cache_asks_a_store_once_an_image_and_fetches_only_what_is_new(urls, tmp_path, store, pictures):
    paths, images = urls
    names, expected = [f"/bucket/{number}.png" for number in range(10)], images
    versions = [("info", name) for name in names]
    for fetched in (names, [], ["/bucket/3.png"]):
        if len(fetched) == 1:
            store.put(paths[3], Path(pictures[0][7]).read_bytes())
            expected = images[[0, 1, 2, 7, 4, 5, 6, 7, 8, 9]]
        store.asked.clear()
        sequence = sequence_of(paths, cache=cache_of("disk", paths, tmp_path))
        for sequence.epoch in range(2):
            np.testing.assert_array_equal(one_epoch(sequence)[0], expected)
        assert sorted(store.asked) == sorted(versions + [("bytes", name, None, None) for name in fetched])
    assert len(list(tmp_path.glob("*.cache"))) == 1


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"ETag": '"a"'}, {"ETag": '"b"'}, False),
        ({"last_modified": "2026-01-01"}, {"last_modified": "2026-01-02"}, False),
        ({"Last-Modified": "Thu"}, {"Last-Modified": "Fri"}, False),
        ({"size": 1}, {"size": 2}, False),
        ({"StorageClass": "STANDARD", "time": 1}, {"StorageClass": "GLACIER", "time": 2}, True),
    ],
)
def test_the_version_of_an_object_changes_with_its_bytes(urls, monkeypatch, first, second, same):
    versions = []
    for told in (first, second):
        monkeypatch.setattr(MemoryFileSystem, "info", lambda *_, told=told: {"type": "file", "size": 9} | told)
        versions.append(read_version(urls[0][0]))
    assert (versions[0] == versions[1]) is same


def test_an_image_without_a_version_is_read_in_every_run(urls, tmp_path, store, monkeypatch):
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
@pytest.mark.parametrize(("images", "batch_size"), [(1, 4), (3, 1), (10, 4), (23, 1), (23, 4)])
@pytest.mark.parametrize(("devices", "processes"), [(1, 1), (2, 2), (3, 3), (4, 1), (4, 2), (5, 5)])
def test_every_image_is_read_by_one_process_once_an_epoch(monkeypatch, devices, processes, images, batch_size, shuffle):
    read = []
    monkeypatch.setattr(
        "finetune.loading.batches.read_image", lambda path, *_: read.append(path) or np.zeros((*SIZE, 3), np.uint8)
    )
    paths, step_size = [f"{number}.png" for number in range(images)], batch_size * devices
    whole = sequence_of(paths, batch_size=step_size, shuffle=shuffle, seed=3)
    steps = -(-images // step_size) - (shuffle and images > step_size and 0 < images % step_size < step_size / 4)
    parts = sequences_of(paths, devices, processes, batch_size=batch_size, shuffle=shuffle, seed=3)
    for epoch in (0, 1):
        read.clear()
        labels = []
        for part in parts:
            part.epoch = epoch
            assert len(part) == part.steps == steps
            labels.append([part[step][1].tolist() for step in range(len(part))])
        assert sorted(read) == sorted(paths)
        whole.epoch = epoch
        for step, of_step in enumerate(zip(*labels, strict=True)):
            # The processes in turn have the images of one device, divided as evenly as possible.
            assert [label for part in of_step for label in part] == whole[step][1].tolist()
            sizes = [len(part) for part in of_step]
            assert max(sizes) - min(sizes) <= devices // processes


def test_augmentation_does_not_depend_on_which_process_has_a_device(pictures):
    options = {"augmenter": build_augmenter(), "shuffle": True, "seed": 7, "batch_size": 2}
    expected = None
    for processes in (1, 2, 4):
        parts = sequences_of(pictures[0], 4, processes, **options)
        for part in parts:
            part.epoch = 2
        found = [np.concatenate([part[step][0] for part in parts]) for step in range(2)]
        assert [len(images) for images in found] == [8, 2]
        expected = expected or found
        assert_same_batch(found, expected)
    # Two devices augment differently, and one like a sequence without shares.
    (same,) = sequences_of(pictures[0][:1] * 4, 2, 1, **options)
    assert len({image.tobytes() for image in same[0][0]}) == 4
    (shared,) = sequences_of(pictures[0], 1, 1, **options)
    np.testing.assert_array_equal(shared.get_shares(3)[0], augmented_sequence(pictures[0])[3][0])


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
            assert_same_batch(batch, part.get_shares(step))


def test_shares_of_an_order_that_is_not_shuffled_are_plain_batches(pictures):
    expected = [[[0, 1, 2, 3], [8]], [[4, 5, 6, 7], [9]]]
    for sequence, rows in zip(sequences_of(pictures[0], 4, 2, batch_size=2), expected, strict=True):
        assert [labels.tolist() for _, labels in sequence.to_dataset().as_numpy_iterator()] == rows
        assert [sequence.get_rows(step).tolist() for step in range(2)] == rows


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


SLOW_BATCHES = """
import atexit
import sys
import time
import numpy as np
import generator
from generator import AugmentedImageSequence

made = []

def make(self, index):
    time.sleep(0.5)
    made.append(index)
    return np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int32)

generator.ImageBatches.__getitem__ = make
sequence = AugmentedImageSequence(["a"] * 64, np.zeros(64, np.int32), (8, 8), 2, workers=2)
batches = iter(sequence.to_dataset())
next(batches)
time.sleep(0.2)
begun = set(generator._making)
atexit.unregister(generator._end_batches)
def tell():
    before = len(made)
    generator._end_batches()
    print(len(begun), len(made) - before, len(generator._making), flush=True)
atexit.register(tell)
sys.exit(3)
"""


@pytest.mark.slow
def test_batches_that_are_being_made_end_before_python_does():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", SLOW_BATCHES]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (3, "2 2 0\n")
