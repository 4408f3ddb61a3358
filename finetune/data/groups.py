"""Groups of photos that are not independent of each other, and folds that keep each group whole."""

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
    """Returns the groups of a table's images as `number_groups` does; None if it names none."""
    names = read_group_names(table, label_column)
    return number_groups(names) if len(names) else None


def read_group_names(table: pd.DataFrame, label_column: str) -> np.ndarray:
    """Returns what a table calls each image's group, text `(images,)`; nothing if it has no such column."""
    if GROUP_COLUMN not in table or label_column == GROUP_COLUMN:
        return np.zeros(0, object)
    return table[GROUP_COLUMN].str.strip().to_numpy(object)


def find_shared(names: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the positions of the images whose group, as `read_group_names` gives it, is in another table too."""
    known = {name for other in others for name in other if name}
    return np.flatnonzero([name in known for name in names])


def warn_of_shared_groups(csv_paths: dict[str, str], label_column: str) -> None:
    """Prints how many images of the other sets belong to groups that are in the training set too.

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
                f"{csv_paths['training']} (column '{GROUP_COLUMN}'): the results of the {name} set will be too good. "
                "Split again with split_train_test.py."
            )


def describe_shared(set_name: str, metrics: dict[str, Any]) -> str:
    """Says how many images of a set are of groups that the model knows, by the set's metrics; nothing without any."""
    if not (number := metrics.get("images_of_known_groups")):
        return ""
    known, worth = ("trained on or selected by", "its metrics are too good")
    if set_name == "validation":
        known, worth = ("trained on", "what is fitted on it is too sure of itself")
    which = f"{number} of the {metrics['images']} images of the {set_name} set"
    return f"{which} belong to groups that the model was {known}: {worth}."


def describe_leak(test: dict[str, Any]) -> str:
    """Returns one sentence or two on near copies of test images in the training set; empty if there are none.

    Args:
        test: the test set's part of metrics.json.
    """
    found = test.get("near_copies_in_training")
    if not found or not found["images"]:
        return ""
    text = f"{found['images']:,} of {test['images']:,} test images have a near copy in the training set"
    without = found["without"]
    if without is None:
        return (
            f"{text}: these results are those of photos that the model has seen. Split again with split_train_test.py."
        )
    name = "accuracy" if "accuracy" in without else "mean_auroc"
    value, interval = without[name], without["intervals"].get(name)
    shown = f"{value:.4f}" if value is not None else "undefined"
    shown += f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
    return (
        f"{text}, so the results are optimistic. Without them, on {without['images']:,} images, the "
        f"{name.replace('_', ' ').replace('auroc', 'AUROC')} is {shown}."
    )


def number_groups(values: Sequence[str]) -> np.ndarray | None:
    """Numbers the groups that a table's column names.

    Args:
        values: of each image; those that are equal but for blanks around them are one group, each empty one is its own.

    Returns:
        int `(images,)`, from 0 without gaps; None where each image is a group of its own.
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
    """Returns how many groups there are; without any, each of so many images is one."""
    return images if groups is None else int(groups.max()) + 1


def is_single_group(groups: np.ndarray | None) -> bool:
    """Returns whether all images are one group."""
    return groups is not None and count_groups(groups, len(groups)) == 1


def describe_groups(groups: np.ndarray | None) -> str:
    """Returns ` in 239 groups`, to follow a number of images; nothing without groups."""
    return "" if groups is None else describe_group_count(count_groups(groups, len(groups)))


def describe_group_count(number: int | None) -> str:
    """Returns what `describe_groups` does, from the number of groups; nothing without one."""
    return "" if number is None else f" in {show_count(number, 'group')}"


def count_groups_of_classes(labels: np.ndarray, groups: np.ndarray, number: int) -> np.ndarray:
    """Returns in how many groups each class lies, int `(classes,)`.

    Args:
        labels: int `(images,)`, or `(images, classes)` of zeros and ones.
        groups: of the images.
        number: of classes.
    """
    return np.bincount(_count_members(labels, groups, number).indices, minlength=number)


def find_lone_classes(labels: np.ndarray, groups: np.ndarray | None, number: int) -> np.ndarray:
    """Returns the classes whose images all lie in one group: none is left to learn them from when it is held out.

    Args:
        labels: as `count_groups_of_classes` takes them.
        groups: of the images; None finds none.
        number: of classes.
    """
    if groups is None:
        return np.zeros(0, int)
    return np.flatnonzero(count_groups_of_classes(labels, groups, number) == 1)


def describe_lone_classes(class_names: Sequence[str]) -> str:
    """Says that classes cannot be cross-validated; nothing without any."""
    if not len(class_names):
        return ""
    return f"Not cross-validated, as all their images lie in one group: {join_names(class_names)}."


def refuse_lone_classes(labels: np.ndarray, groups: np.ndarray | None, number: int, what: str) -> None:
    """Raises UserError where no image can be judged by others: each class lies in one group.

    Args:
        labels: as `count_groups_of_classes` takes them.
        groups: of the images; None: they are independent.
        number: of classes.
        what: names the images.
    """
    if groups is not None and count_groups_of_classes(labels, groups, number).max() < 2:
        raise UserError(
            f"{what}: expected a class with images in at least two groups, so that others than their own can judge "
            f"them. Received: {len(groups)} images{describe_groups(groups)} of the column '{GROUP_COLUMN}', each class "
            "in one of them. Correct the column, or remove it."
        )


def deal_groups(labels: np.ndarray, groups: np.ndarray, number: int, folds: int, seed: int) -> list[np.ndarray]:
    """Deals whole groups out to folds so that each fold has its share of every class and of the images.

    Those with the rarest class come first, of them the largest. Each goes where it adds least to the sum of the squared
    shares of classes and images, each class counting the same. A class that has several groups is not in one fold
    alone, unless every fold would be the only one of some class.

    scikit-learn's StratifiedGroupKFold may put both groups of a class into one fold, and knows one label an image.

    Args:
        labels: int `(images,)`, or `(images, classes)` of zeros and ones.
        groups: of the images, numbered from 0 without gaps.
        number: of classes.
        folds: at most; there are no more than groups.
        seed: of the order of groups that are alike.

    Returns:
        The sorted positions of each fold's images.
    """
    members = _count_members(labels, groups, number)
    sizes, left = np.bincount(groups), np.bincount(members.indices, minlength=number)
    totals = np.maximum(np.asarray(members.sum(axis=0)).ravel(), 1)
    # Each row sums to the shares of the classes in one fold, and last to that of the images.
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
        # The last group of a class does not join all others of it in their fold.
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
