"""The confusion matrix as metrics.json holds it: all its cells, or of many classes those above 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from finetune.texts import MOST_LISTED

# Rows true and columns predicted; or counts by the name of the true and then of the predicted class.
ConfusionMatrix = list[list[int]] | dict[str, dict[str, int]]


class Cells(NamedTuple):
    """The cells of a confusion matrix that are above 0, row by row.

    Attributes:
        rows: int `(cells,)`, positions of the true classes.
        columns: int `(cells,)`, positions of the predicted classes.
        counts: int `(cells,)`, images.
        shares: `(cells,)`, of the images of the true class, in `(0, 1]`.
    """

    rows: np.ndarray
    columns: np.ndarray
    counts: np.ndarray
    shares: np.ndarray


def count_confusions(y_true: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> ConfusionMatrix:
    """Counts which class was taken for which.

    Args:
        y_true: int `(images,)`, positions in `class_names`.
        predicted: likewise.
        class_names: in the order of the positions.

    Returns:
        Lists of counts, rows true and columns predicted, of up to `MOST_LISTED` classes. Of more, the counts above 0
        by the name of the true and then of the predicted class: `{"cat": {"cat": 9, "dog": 1}}`; a true class without
        images is not in it.
    """
    number = len(class_names)
    pairs, counts = np.unique(y_true.astype(np.int64) * number + predicted, return_counts=True)
    if number <= MOST_LISTED:
        matrix = np.zeros(number * number, np.int64)
        matrix[pairs] = counts
        return matrix.reshape(number, number).tolist()
    stored: dict[str, dict[str, int]] = {}
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        stored.setdefault(class_names[pair // number], {})[class_names[pair % number]] = count
    return stored


def read_cells(stored: ConfusionMatrix, class_names: Sequence[str]) -> Cells:
    """Returns the cells above 0 of what `count_confusions` returned, of either form."""
    if isinstance(stored, dict):
        positions = {name: position for position, name in enumerate(class_names)}
        found = sorted(
            (positions[true], positions[predicted], count)
            for true, row in stored.items()
            for predicted, count in row.items()
        )
        rows, columns, counts = np.array(found, int).reshape(-1, 3).T
    else:
        matrix = np.array(stored, int)
        rows, columns = np.nonzero(matrix)
        counts = matrix[rows, columns]
    totals = np.bincount(rows, counts, len(class_names))
    return Cells(rows, columns, counts, counts / totals[rows])


def list_confusions(stored: ConfusionMatrix, class_names: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Lists the most frequent confusions of two classes, the most frequent first.

    Args:
        stored: as `count_confusions` returns it.
        class_names: in the order of the positions.
        most: how many to list.

    Returns:
        `true` and `predicted`, names; `count` of images and their `share` of those of the true class.
    """
    cells = read_cells(stored, class_names)
    wrong = np.flatnonzero(cells.rows != cells.columns)
    order = wrong[np.argsort(-cells.counts[wrong], kind="stable")][:most]
    return [
        {
            "true": class_names[cells.rows[cell]],
            "predicted": class_names[cells.columns[cell]],
            "count": int(cells.counts[cell]),
            "share": float(cells.shares[cell]),
        }
        for cell in order
    ]
