"""The confusion matrix is stored in full, or of many classes without its zeros, and read alike."""

import json

import numpy as np
import pytest

from finetune.evaluation.metrics import count_confusions, list_confusions, read_cells


def name_classes(number):
    # Their order is not that of the alphabet.
    return [f"class {position}" for position in range(number)]


TRUE, PREDICTED = np.array([0, 0, 3, 99, 3, 0, 11, 0]), np.array([0, 1, 3, 2, 3, 1, 2, 3])


def test_a_hundred_classes_are_stored_in_full():
    expected = np.zeros((100, 100), int)
    np.add.at(expected, (TRUE, PREDICTED), 1)
    assert count_confusions(TRUE, PREDICTED, name_classes(100)) == expected.tolist()


def test_more_classes_are_stored_without_zeros():
    stored = count_confusions(TRUE, PREDICTED, name_classes(101))
    assert stored == {
        "class 0": {"class 0": 1, "class 1": 2, "class 3": 1},
        "class 3": {"class 3": 2},
        "class 11": {"class 2": 1},
        "class 99": {"class 2": 1},
    }
    assert json.loads(json.dumps(stored)) == stored


@pytest.mark.parametrize("number", [100, 101])
def test_either_form_reads_alike(number):
    names = name_classes(number)
    stored = count_confusions(TRUE, PREDICTED, names)
    cells = read_cells(stored, names)
    assert list(zip(cells.rows, cells.columns, cells.counts, cells.shares, strict=True)) == [
        *((0, 0, 1, 1 / 4), (0, 1, 2, 2 / 4), (0, 3, 1, 1 / 4)),
        *((3, 3, 2, 1), (11, 2, 1, 1), (99, 2, 1, 1)),
    ]
    assert list_confusions(stored, names, 3) == [
        {"true": "class 0", "predicted": "class 1", "count": 2, "share": 0.5},
        {"true": "class 0", "predicted": "class 3", "count": 1, "share": 0.25},
        {"true": "class 11", "predicted": "class 2", "count": 1, "share": 1.0},
    ]


@pytest.mark.parametrize("stored", [{}, [[0, 0], [0, 0]]])
def test_no_image_is_no_confusion(stored):
    assert list_confusions(stored, ["a", "b"], 3) == []
