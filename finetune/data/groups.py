"""Groups of photos that are not independent, and folds that keep each group whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from finetune.core.options import UserError
from finetune.core.texts import join_names, show_count
from finetune.data.tables import GROUP_COLUMN, parse_table


def read_groups(table: pd.DataFrame, label_column: str) -> np.ndarray | None:
    """Returns the groups of a table's images as `number_groups` does; None if it has no column of groups."""
    names = read_group_names(table, label_column)
    return number_groups(names) if len(names) else None


def read_group_names(table: pd.DataFrame, label_column: str) -> np.ndarray:
    """Returns the name of each image's group in a table, `(images,)`; empty if it has no column of groups."""
    if GROUP_COLUMN not in table or label_column == GROUP_COLUMN:
        return np.zeros(0, object)
    return table[GROUP_COLUMN].str.strip().to_numpy(object)


def find_shared(names: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the positions of images whose group name is also in another table."""
    known = {name for other in others for name in other if name}
    return np.flatnonzero([name in known for name in names])


def warn_of_shared_groups(csv_paths: dict[str, str], label_column: str) -> None:
    """Prints how many images of the other sets belong to groups of the training set.

    Args:
        csv_paths: by the set's name, `training` first.
        label_column: name of the column with the labels.
    """
    names = {name: read_group_names(parse_table(path, label_column), label_column) for name, path in csv_paths.items()}
    known = names.pop("training")
    for name, groups in names.items():
        if (shared := find_shared(groups, [known])).size:
            found = show_count(len({*groups[shared]}), "group")
            print(
                f"Warning: {len(shared)} of the {len(groups)} images of {csv_paths[name]} belong to {found} of "
                f"{csv_paths['training']} (column '{GROUP_COLUMN}'): the results of the {name} set will be optimistic. "
                "Split again with split_train_test.py."
            )


def describe_shared(set_name: str, metrics: dict[str, Any]) -> str:
    """Returns a sentence on a set's images whose groups the model knows, by the set's metrics; empty without any."""
    if not (number := metrics.get("images_of_known_groups")):
        return ""
    known, worth = ("trained on or selected by", "its metrics are optimistic")
    if set_name == "validation":
        known, worth = ("trained on", "a temperature fitted on it is overconfident")
    which = f"{number} of the {metrics['images']} images of the {set_name} set"
    return f"{which} belong to groups that the model was {known}: {worth}."


def describe_leak(test: dict[str, Any]) -> str:
    """Returns a text on near copies of test images in the training set, by its metrics; empty without any."""
    found = test.get("near_copies_in_training")
    if not found or not found["images"]:
        return ""
    text = f"{found['images']:,} of {test['images']:,} test images have a near copy in the training set"
    without = found["without"]
    if without is None:
        return f"{text}: the model has seen all of them in training. Split again with split_train_test.py."
    name = "accuracy" if "accuracy" in without else "mean_auroc"
    value, interval = without[name], without["intervals"].get(name)
    shown = f"{value:.4f}" if value is not None else "undefined"
    shown += f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
    return (
        f"{text}, so the results are optimistic. Without them, on {without['images']:,} images, the "
        f"{name.replace('_', ' ').replace('auroc', 'AUROC')} is {shown}."
    )


def number_groups(values: Sequence[str]) -> np.ndarray | None:
    """Returns the number of each image's group, int `(images,)` from 0 without gaps; None if each is its own group.

    Args:
        values: of each image. Blanks around them don't count; each empty value is a group of its own.
    """
    texts = pd.Series(values, dtype=object).str.strip()
    numbers, names = pd.factorize(texts)
    is_empty = (texts == "").to_numpy()
    numbers[is_empty] = len(names) + np.arange(is_empty.sum())
    return pick_groups(numbers, slice(None))


def pick_groups(groups: np.ndarray | None, rows: np.ndarray | slice) -> np.ndarray | None:
    """Returns the groups of some images, numbered as `number_groups` does."""
    if groups is None:
        return None
    found, numbers = np.unique(groups[rows], return_inverse=True)
    return numbers if len(found) < len(numbers) else None


def count_groups(groups: np.ndarray | None, images: int) -> int:
    """Returns the number of groups; without groups, the number of images."""
    return images if groups is None else int(groups.max()) + 1


def is_single_group(groups: np.ndarray | None) -> bool:
    """Returns whether all images are one group."""
    return groups is not None and count_groups(groups, len(groups)) == 1


def describe_groups(groups: np.ndarray | None) -> str:
    """Returns ` in 239 groups`, to append to a number of images; empty without groups."""
    return "" if groups is None else describe_group_count(count_groups(groups, len(groups)))


def describe_group_count(number: int | None) -> str:
    """Returns ` in 239 groups` from the number of groups; empty without one."""
    return "" if number is None else f" in {show_count(number, 'group')}"


def count_groups_of_classes(labels: np.ndarray, groups: np.ndarray, number: int) -> np.ndarray:
    """Returns the number of groups of each class, int `(classes,)`.

    Args:
        labels: int `(images,)`, or `(images, classes)` of zeros and ones.
        groups: of the images.
        number: of classes.
    """
    return np.bincount(_count_members(labels, groups, number).indices, minlength=number)


def find_lone_classes(labels: np.ndarray, groups: np.ndarray | None, number: int) -> np.ndarray:
    """Returns the classes whose images are all in one group, which cross-validation cannot hold out."""
    if groups is None:
        return np.zeros(0, int)
    return np.flatnonzero(count_groups_of_classes(labels, groups, number) == 1)


def describe_lone_classes(class_names: Sequence[str]) -> str:
    """Returns a sentence on the classes that cannot be cross-validated; empty without any."""
    if not len(class_names):
        return ""
    return f"Not cross-validated, because all their images are in one group: {join_names(class_names)}."


def refuse_lone_classes(labels: np.ndarray, groups: np.ndarray | None, number: int, what: str) -> None:
    """Raises UserError if each class is in one group only, so that no group can be held out.

    Args:
        labels: as `count_groups_of_classes` takes them.
        groups: of the images; None if they are independent.
        number: of classes.
        what: name of the images for the error.
    """
    if groups is not None and count_groups_of_classes(labels, groups, number).max() < 2:
        raise UserError(
            f"{what}: expected a class with images in at least two groups, so that one can be held out. Received: "
            f"{len(groups)} images{describe_groups(groups)} of the column '{GROUP_COLUMN}', each class in one of them. "
            "Correct the column, or remove it."
        )


def deal_groups(labels: np.ndarray, groups: np.ndarray, number: int, folds: int, seed: int) -> list[np.ndarray]:
    """Deals whole groups out to folds so that each fold has its share of every class and of the images.

    Groups with the rarest class come first, the largest of them before the others. Each goes where it adds least to the
    sum of the squared shares of classes and images, with equal weight for each class. A class of several groups is not
    in one fold only, unless every fold would be the only one of some class.

    scikit-learn's StratifiedGroupKFold may put both groups of a class into one fold, and takes one label per image.

    Args:
        labels: int `(images,)`, or `(images, classes)` of zeros and ones.
        groups: of the images, numbered from 0 without gaps.
        number: of classes.
        folds: at most, and no more than there are groups.
        seed: for the order of equal groups.

    Returns:
        The sorted positions of each fold's images.
    """
    members = _count_members(labels, groups, number)
    sizes, left = np.bincount(groups), np.bincount(members.indices, minlength=number)
    totals = np.maximum(np.asarray(members.sum(axis=0)).ravel(), 1)
    # A row has the shares of the classes in one fold, then its share of the images.
    shares, folds = np.zeros((min(folds, len(sizes)), number + 1)), min(folds, len(sizes))
    assigned, rarity = np.zeros(len(sizes), int), np.full(len(sizes), np.iinfo(int).max)
    np.minimum.at(rarity, np.repeat(np.arange(len(sizes)), np.diff(members.indptr)), left[members.indices])
    order = np.random.default_rng(seed).permutation(len(sizes))
    for group in order[np.lexsort((-sizes[order], rarity[order]))]:
        part = slice(members.indptr[group], members.indptr[group + 1])
        classes = members.indices[part]
        columns = np.append(classes, number)
        added = np.append(members.data[part] / totals[classes], sizes[group] / len(groups))
        costs = shares[:, columns] @ added
        # The last group of a class must not join all its other groups in one fold.
        last = classes[left[classes] == 1]
        closes = ((shares[:, last] > 0) & (np.count_nonzero(shares[:, last], axis=0) == 1)).any(axis=1)
        assigned[group] = np.lexsort((costs, closes))[0]
        shares[assigned[group], columns] += added
        left[classes] -= 1
    of_images = assigned[groups]
    return [np.flatnonzero(of_images == fold) for fold in range(folds)]


def _count_members(labels: np.ndarray, groups: np.ndarray, number: int) -> sparse.csr_array:
    """Returns how many images of each class each group has, `(groups, classes)`."""
    rows, classes = (np.arange(len(labels)), labels) if labels.ndim == 1 else np.nonzero(labels)
    shape = (int(groups.max()) + 1, number)
    counted = sparse.coo_array((np.ones(len(rows), int), (groups[rows], classes)), shape=shape).tocsr()
    counted.sum_duplicates()
    return counted
