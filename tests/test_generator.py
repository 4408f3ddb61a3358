"""The Keras sequence: order, augmentation, mixing, errors and the dataset."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from picture_sets import (
    SIZE,
    assert_blended,
    assert_same_batch,
    augmented_sequence,
    cache_of,
    mixing_sequence,
    one_epoch,
    pictures,  # noqa: F401
    sequence_of,
)

from augmenter import build_augmenter
from configs import Configs
from finetune.core.options import UserError
from finetune.predicting.predicting import predict
from finetune.training.callbacks import EpochOrder, InputWait
from finetune.training.trainer import Interruption, TrainingModel
from generator import AugmentedImageSequence, Shares, get_generator, naming_bad_images


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
    # All images have the first label, and so do the mixed ones.
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
    assert printed.count("75.0%") == 2
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
atexit.unregister(generator._end_batches)
def end():
    before, begun = len(made), len(generator._making)
    generator._end_batches()
    print(len(made) - before >= begun, len(generator._making), flush=True)
atexit.register(end)
sys.exit(3)
"""


@pytest.mark.slow
def test_python_waits_for_unfinished_batches():
    command, root = [sys.executable, "-c", SLOW_BATCHES], Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (3, "True 0\n")
