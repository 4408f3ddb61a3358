"""The batches of several devices and processes: shares of the same steps."""

import numpy as np
import pytest
from picture_sets import SIZE, assert_same_batch, augmented_sequence, pictures, sequence_of  # noqa: F401

from augmenter import build_augmenter
from generator import AugmentedImageSequence, Shares


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
def test_the_dataset_has_the_shares(pictures, processes):
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


def test_rows_leave_out_unreadable_images(pictures):
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
        # Only the process that was to read it notes it.
        assert [row for part in parts for row in part.bad_images] == [5]
