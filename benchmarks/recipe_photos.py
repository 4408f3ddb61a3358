"""The photos of recipes.py: which train, choose and test."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from finetune.core.files import IMAGE_SUFFIXES, write_csv
from finetune.core.options import UserError
from finetune.data.groups import deal_groups
from finetune.data.images import read_image
from finetune.data.near_copies import (
    NearPair,
    find_near_pairs,
    group_near_pairs,
    make_thumbnail,
    stack_thumbnails,
)
from finetune.data.stores import hash_file
from finetune.data.tables import IMAGE_COLUMN, LABEL_SEPARATOR, read_table
from finetune.evaluation.intervals import score_images

LABEL_COLUMN = "class"
POOL_SEED = 77
FIRST_SPLIT_SEED = 1000
FEWEST_VALIDATION = 4
# A larger class would decide the accuracy alone.
LARGEST_CLASS = 0.5
# For recipes without a size of their own.
IMAGE_SIZE = 224


class Photos(NamedTuple):
    """A data set.

    Attributes:
        name: in the tables.
        paths: of the photos.
        truth: float64 `(photos, classes)` of zeros and ones.
        class_names: sorted.
        multi_label: whether a photo may have several labels.
        image_size: pixels a side; None leaves it to the recipes.
        per_class: training photos of each class; None takes all.
        copies: rows that are left out, because their files are identical to others.
        groups: int `(photos,)`, equal for photos that stay in one set; None if all are independent.
    """

    name: str
    paths: np.ndarray
    truth: np.ndarray
    class_names: list[str]
    multi_label: bool
    image_size: int | None = None
    per_class: int | None = None
    copies: Sequence[int] = ()
    groups: np.ndarray | None = None

    @property
    def metric(self) -> str:
        """The name of the score: balanced accuracy if one class has more than half of the photos."""
        if self.multi_label:
            return "mean_average_precision"
        return "balanced_accuracy" if self.truth.mean(axis=0).max() > LARGEST_CLASS else "accuracy"


def read_photos(name: str, place: str, image_size: int | None = None) -> Photos:
    """Lists the photos of class folders, or of a CSV file with several labels an image.

    Args:
        name: in the tables.
        place: a folder, or CSV:IMAGE_FOLDER.
        image_size: pixels a side; None leaves it to the recipes.

    Raises:
        UserError: there are no photos, or the CSV file cannot be read.
    """
    csv_stem, is_csv, folder = place.partition(".csv:")
    if is_csv:
        table = read_table(f"{csv_stem}.csv", LABEL_COLUMN, multi_label=True)
        paths = [os.path.join(folder, path) for path in table[IMAGE_COLUMN]]
        labels = [label.split(LABEL_SEPARATOR) for label in table[LABEL_COLUMN]]
    else:
        found = sorted(path for path in Path(place).glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
        paths, labels = [str(path) for path in found], [[path.parent.name] for path in found]
    if not paths:
        raise UserError(f"--data {name}: expected a folder with one folder per class. {place} holds no such photos.")
    class_names = sorted({label for row in labels for label in row})
    truth = np.array([[class_name in row for class_name in class_names] for row in labels], float)
    paths = np.array([os.path.abspath(path) for path in paths])
    copies = find_copies(paths)
    if copies:
        print(f"{name}: left out, as their files are identical: {', '.join(paths[copies])}")
    return Photos(name, paths, truth, class_names, bool(is_csv), image_size, copies=copies)


def find_copies(paths: Sequence[str]) -> list[int]:
    """Returns the rows of all files that are identical to another one."""
    digests = [hash_file(path) for path in paths]
    counts = Counter(digests)
    return [row for row, digest in enumerate(digests) if counts[digest] > 1]


def keep_near_copies_together(photos: Photos) -> Photos:
    """Returns the data set with near copies as groups, as `split_train_test.py` finds them."""
    thumbnails = {row: make_thumbnail(read_image(path)) for row, path in enumerate(photos.paths)}
    seen = [row for row, thumbnail in thumbnails.items() if thumbnail is not None]
    found = find_near_pairs(stack_thumbnails([thumbnails[row] for row in seen]))
    pairs = [NearPair(seen[pair.first], seen[pair.second], pair.correlation) for pair in found.pairs]
    joined = group_near_pairs(len(photos.paths), pairs)
    groups = np.unique([joined[row] for row in range(len(photos.paths))], return_inverse=True)[1]
    print(f"{photos.name}: {len(photos.paths)} photos in {groups.max() + 1} groups of near copies")
    return photos._replace(groups=groups)


def vary_size(photos: Photos, numbers: Sequence[int], seeds: Sequence[int]) -> list[Photos]:
    """Returns a data set for each number of training photos a class.

    It stays whole without numbers, with several labels a photo, and with groups.

    Raises:
        UserError: a split has fewer photos of a class than a number asks for.
    """
    if photos.multi_label or photos.groups is not None or not numbers:
        return [photos]
    for seed in seeds:
        counts = {name: photos.truth[rows].sum(axis=0) for name, rows in split_photos(photos.truth, seed).items()}
        for number in numbers:
            for name, wanted in {"training": number, "validation": count_validation(number)}.items():
                rarest = counts[name].argmin()
                if counts[name][rarest] < wanted:
                    raise UserError(
                        f"--train_per_class {number}: expected {wanted} {name} photos of each class of {photos.name}. "
                        f"With seed {seed} there are {counts[name][rarest]:.0f} of {photos.class_names[rarest]}."
                    )
    return [
        photos._replace(name=f"{photos.name} at {number} a class", per_class=number)
        for number in dict.fromkeys(numbers)
    ]


def count_validation(per_class: int) -> int:
    """Returns the number of validation photos a class for so many training photos."""
    return max(per_class // 3, FEWEST_VALIDATION)


def split_photos(truth: np.ndarray, seed: int, per_class: int | None = None) -> dict[str, np.ndarray]:
    """Splits photos into three sets, so that no test photo of any seed is a validation photo of any seed.

    Args:
        truth: `(photos, classes)` of zeros and ones.
        seed: of the halves; the pools are the same for all.
        per_class: training photos of each class to keep; None keeps all. The photos of a smaller number are a subset
            of those of a larger one.

    Returns:
        The rows of `training`, `validation` and `test`, ascending: about three fifths, one and one, without
        `per_class`.
    """
    number = len(truth)
    pool = number * 2 // 5
    sizes = [number - 2 * pool, pool, pool]
    always, choosing, reporting = deal(truth, np.arange(number), sizes, np.random.default_rng(POOL_SEED))
    rng = np.random.default_rng(FIRST_SPLIT_SEED + seed)
    halves = [pool // 2, pool - pool // 2]
    first, validation = deal(truth, choosing, halves, rng)
    second, test = deal(truth, reporting, halves, rng)
    training = np.sort(np.concatenate([always, first, second]))
    if per_class is not None:
        training, validation = (
            draw(truth, rows, number, rng)
            for rows, number in ((training, per_class), (validation, count_validation(per_class)))
        )
    return {"training": training, "validation": validation, "test": test}


def split_groups(truth: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Splits photos with one label each as `split_photos` does, and keeps each group in one set."""
    labels, classes = truth.argmax(axis=1), truth.shape[1]

    def deal_rows(rows: np.ndarray, folds: int, fold_seed: int) -> list[np.ndarray]:
        numbers = np.unique(groups[rows], return_inverse=True)[1]
        return [rows[fold] for fold in deal_groups(labels[rows], numbers, classes, folds, fold_seed)]

    fifths = deal_rows(np.arange(len(labels)), 5, POOL_SEED)
    pools = [np.sort(np.concatenate(fifths[start : start + 2])) for start in (1, 3)]
    halves = [deal_rows(pool, 2, FIRST_SPLIT_SEED + seed) for pool in pools]
    training = np.sort(np.concatenate([fifths[0], halves[0][0], halves[1][0]]))
    return {"training": training, "validation": halves[0][1], "test": halves[1][1]}


def draw(truth: np.ndarray, rows: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Draws the same number of photos of each class, with one label each.

    Args:
        truth: `(photos, classes)` of zeros and ones, of all photos.
        rows: which photos to draw from.
        number: of each class.
        rng: draws the order of all rows; the first of each class are taken.

    Returns:
        The rows, ascending.
    """
    order = rng.permutation(rows)
    return np.sort(np.concatenate([order[column[order] > 0][:number] for column in truth.T]))


def deal(truth: np.ndarray, rows: np.ndarray, sizes: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Deals photos to parts of given sizes: the rarest label first, each photo to the part that lacks it most.

    Source: Sechidis et al., ECML PKDD 2011, algorithm 1, with sizes that hold exactly.

    Args:
        truth: `(photos, classes)` of zeros and ones, of all photos; each has a label.
        rows: which photos to deal out.
        sizes: of the parts; their sum is the number of rows.
        rng: draws the order, and which of equal parts.

    Returns:
        The rows of each part, ascending.
    """
    room = np.array(sizes, float)
    lacking = (room / room.sum())[:, None] * truth[rows].sum(axis=0)
    parts: list[list[int]] = [[] for _ in sizes]
    left = np.sort(rows)
    while len(left):
        counts = truth[left].sum(axis=0)
        rarest = np.argmin(np.where(counts > 0, counts, np.inf))
        has_rarest = truth[left, rarest] > 0
        for row in rng.permutation(left[has_rarest]):
            # Smaller than any true difference: it only breaks ties.
            wishes = lacking[:, rarest] + 1e-3 * rng.uniform(size=len(sizes))
            part = np.argmax(np.where(room > 0, wishes, -np.inf))
            parts[part].append(row)
            lacking[part] -= truth[row]
            room[part] -= 1
        left = left[~has_rarest]
    return [np.array(sorted(part), int) for part in parts]


def describe_split(photos: Photos) -> dict[str, int | str]:
    """Describes a data set: number of classes, image size, photos in each set of the first seed, and a digest.

    The order of the file names decides which photos test: scores are comparable if `test_photos`, a digest of their
    contents, is the same.
    """
    sets = select(photos, 0)
    sizes = {name: len(rows) for name, rows in sets.items()}
    contents = sorted(str(hash_file(path)) for path in photos.paths[sets["test"]])
    digest = hashlib.sha256("".join(contents).encode()).hexdigest()[:12]
    size = photos.image_size or IMAGE_SIZE
    return {"classes": len(photos.class_names), "image_size": size, **sizes, "test_photos": digest}


def select(photos: Photos, seed: int) -> dict[str, np.ndarray]:
    """Returns the rows of the `training`, `validation` and `test` photos, of a split, without copies.

    Copies are left out after the split, which stays that of the whole folder.
    """
    if photos.groups is None:
        sets = split_photos(photos.truth, seed, photos.per_class)
    else:
        sets = split_groups(photos.truth, photos.groups, seed)
    return {name: np.setdiff1d(rows, photos.copies) for name, rows in sets.items()}


def select_truth(photos: Photos, seed: int) -> np.ndarray:
    """Returns the labels of the test photos: `(photos,)` class positions, or `(photos, classes)` of zeros and ones."""
    truth = photos.truth[select(photos, seed)["test"]]
    return truth if photos.multi_label else truth.argmax(axis=1)


def score_test_photos(photos: Photos, seed: int, probabilities: np.ndarray) -> list[float]:
    """Returns the score of each test photo; their mean is the accuracy or balanced accuracy of one-label photos."""
    truth = select_truth(photos, seed)
    scores = score_images(truth, probabilities)
    if photos.metric == "balanced_accuracy":
        counts = np.bincount(truth)
        scores = scores * len(truth) / np.count_nonzero(counts) / counts[truth]
    return scores.tolist()


def write_tables(photos: Photos, seed: int, folder: str) -> dict[str, str]:
    """Writes the tables of the three sets into a folder; returns their paths by the sets' names."""
    labels = np.array([LABEL_SEPARATOR.join(np.array(photos.class_names)[row > 0]) for row in photos.truth])
    tables = {}
    for name, rows in select(photos, seed).items():
        tables[name] = f"{folder}/{name}.csv"
        write_csv(tables[name], pd.DataFrame({IMAGE_COLUMN: photos.paths[rows], LABEL_COLUMN: labels[rows]}))
    return tables
