"""Splits a table into sets, with every class in each, and keeps groups of rows together."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import DisjointSet

from configs import Configs
from finetune.core.labels import clean_label
from finetune.core.options import UserError
from finetune.core.texts import MOST_LISTED, MOST_TELLING, join_names, show_count
from finetune.data.data_check import Reading, ShowCopies, check_tables, look_for_copies
from finetune.data.findings import Finding, Inspection, describe_fault, get_bad_rows
from finetune.data.tables import (
    GROUP_COLUMN,
    count_classes,
    find_class_names,
    make_image_table,
    parse_table,
    read_table,
    split_label,
)

SET_FILES = {"training": "training_set.csv", "validation": "validation_set.csv", "testing": "testing_set.csv"}


def refuse_own_input(csv_path: str, written: dict[str, str]) -> None:
    """Raises UserError if a file to be written is the one that is read."""
    if os.path.realpath(csv_path) in map(os.path.realpath, written.values()):
        raise UserError(f"{csv_path} would be overwritten by the result. Rename it first.")


def read_rows(
    csv_path: str, group_column: str, mode: str, configs: Configs, show_copies: ShowCopies, folder: str = ""
) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Reads the table, looks for copies among its images, and groups the rows that have to stay together.

    Args:
        csv_path: the table.
        group_column: rows with the same value stay together; empty: the column `group`, if there is one.
        mode: `full` checks every image, and raises errors; `quick` looks for copies for about a minute; `headers` and
            `off` read no image.
        configs: the options of every script.
        show_copies: shows copies with different labels.
        folder: receives the check's files; empty: the table's folder.

    Returns:
        The table, without the images that `skip_bad_images` leaves out and with the groups' names in the column
        `group`; and the number of each row's group, int `(rows,)`, or None if all groups are single rows.

    Raises:
        UserError: the table, an image in it or `group_column` is not usable.
    """
    label_column, multi_label = configs.csv_label_column, configs.multi_label_classification
    findings, numbers = _find_copies(csv_path, mode, configs, show_copies, folder)
    table = read_table(csv_path, label_column, multi_label)
    names_groups = label_column != GROUP_COLUMN
    groups = DisjointSet(range(len(table)))
    given = group_column or GROUP_COLUMN * (names_groups and GROUP_COLUMN in table.columns)
    values = _read_column(table, given, csv_path) if given else [""] * len(table)
    # An empty cell of the column `group` is a group of its own.
    join_equal(groups, [value or row for row, value in enumerate(values)])
    join_equal(groups, range(len(table)) if numbers is None else numbers)
    kept = np.setdiff1d(np.arange(len(table)), [row - 2 for row in get_bad_rows(findings)[csv_path]])
    if not kept.size:
        raise UserError(f"{csv_path}: none of the {len(table)} images can be used. Check image_directory.")
    first_rows: dict[int, int] = {}
    numbers = np.array([first_rows.setdefault(groups[row], row) for row in range(len(table))])[kept]
    table = table.iloc[kept]
    if len(np.unique(numbers)) == len(numbers):
        return table, None
    if not names_groups:
        print(f"The column '{GROUP_COLUMN}' contains the labels, so the groups of rows are not written.")
        return table, numbers
    return table.assign(**{GROUP_COLUMN: name_groups(numbers, [values[row] for row in kept])}), numbers


def _find_copies(
    csv_path: str, mode: str, configs: Configs, show_copies: ShowCopies, folder: str
) -> tuple[list[Finding], np.ndarray | None]:
    """Looks for copies among a table's images and prints their number.

    Returns the findings of a full check, and a number per row, equal for copies; None if no image is read.
    """
    if mode not in ("quick", "full"):
        return [], None
    label_column, multi_label, findings = configs.csv_label_column, configs.multi_label_classification, []
    listed = make_image_table("", csv_path, parse_table(csv_path, label_column), label_column, configs.image_directory)
    if mode == "full":
        findings, copies = check_tables([listed], configs, multi_label, show_copies=show_copies, folder=folder)
    else:
        known, copies = look_for_copies([listed], mode, Reading.of(configs), needs_headers=False)
        report_unread(known)
        show_copies(folder or os.path.dirname(csv_path), copies, multi_label, configs)
    numbers = copies.number_rows(listed)
    report_copies(numbers)
    return findings, numbers


def join_equal(groups: DisjointSet, numbers: Iterable[Any]) -> None:
    """Joins rows with equal numbers."""
    first_row = {}
    for row, number in enumerate(numbers):
        groups.merge(first_row.setdefault(number, row), row)


def name_groups(numbers: np.ndarray, values: Sequence[str]) -> list[str]:
    """Returns the name of each row's group: its first value, or `copies 1`, `copies 2` if no row of it has a value.

    A row that is alone and has no value gets an empty name.
    """
    sizes, named = Counter(numbers.tolist()), {}
    for number, value in zip(numbers.tolist(), values, strict=True):
        if value:
            named.setdefault(number, value)
    taken, candidates = set(values), (f"copies {number}" for number in itertools.count(1))
    for number, size in sizes.items():
        if number not in named and size > 1:
            named[number] = next(name for name in candidates if name not in taken)
    return [named.get(number, "") for number in numbers.tolist()]


def report_unread(known: dict[str, Inspection]) -> None:
    """Prints how many images could not be read: their copies are not found."""
    faults = [(path, one.fault[1]) for path, one in known.items() if one.fault]
    if faults:
        print(
            f"Warning: {show_count(len(faults), 'image')} of {len(known):,} cannot be read: "
            f"{describe_fault(*faults[0])}. --verify True lists all."
        )


def report_copies(numbers: np.ndarray) -> None:
    """Prints how many images are copies, by the group number of each image."""
    sizes = np.unique(numbers, return_counts=True)[1]
    sizes = sizes[sizes > 1]
    if sizes.size:
        print(
            f"Copies, exact or near: {sizes.sum():,} of {len(numbers):,} images, in {show_count(sizes.size, 'group')} "
            f"of up to {sizes.max()}. Each group stays in one set; the column '{GROUP_COLUMN}' names it."
        )


def split_rows(
    labels: np.ndarray, fractions: dict[str, float], multi_label: bool, rng: np.random.Generator | None
) -> dict[str, np.ndarray]:
    """Splits rows so that every class is divided by the same fractions, as far as whole images allow.

    The rarest class is divided first, so that its few images reach every set. A multi-label image counts for each of
    its labels (iterative stratification, Sechidis et al., ECML PKDD 2011, one label after another).

    Args:
        labels: texts, one per row.
        fractions: the share of each set, by its name; they add up to 1.
        multi_label: whether a text may hold several class names.
        rng: draws the rows; None fills the sets in the order of the rows: training, validation, test.

    Returns:
        The sorted row numbers of each set.
    """
    codes, names = _label_matrix(labels, multi_label)
    order = np.arange(len(labels)) if rng is None else rng.permutation(len(labels))
    kept = [name for name in SET_FILES if fractions.get(name)]
    shares = np.array([fractions[name] for name in kept])
    totals = np.bincount(np.concatenate(codes), minlength=len(names))
    wanted = np.outer(shares, totals)
    assigned = np.full(len(labels), -1)
    rows_of = [[] for _ in names]
    for row in order:
        for position in codes[row]:
            rows_of[position].append(row)
    for position in np.argsort(totals, kind="stable"):
        rows = [row for row in rows_of[position] if assigned[row] < 0]
        for row, chosen in zip(rows, _fill_sets(wanted[:, position], len(rows)), strict=True):
            assigned[row] = chosen
            wanted[chosen, codes[row]] -= 1
    return {name: np.flatnonzero(assigned == position) for position, name in enumerate(kept)}


def split_groups(
    labels: np.ndarray,
    groups: np.ndarray,
    fractions: dict[str, float],
    multi_label: bool,
    rng: np.random.Generator | None,
) -> dict[str, np.ndarray]:
    """Splits rows as `split_rows` does, but keeps each group whole; `groups` has the number of each row's group.

    Groups with the rarest class come first, the largest of them before the others. Each goes to the set where it most
    reduces the squared distance to the wanted counts, relative to these; but if a class has no more groups left than
    there are sets without it, to one of those sets. `rng` draws among equal groups.
    """
    codes, names = _label_matrix(labels, multi_label)
    kept = [name for name in SET_FILES if fractions.get(name)]
    shares = np.array([fractions[name] for name in kept])
    _, numbers = np.unique(groups, return_inverse=True)
    rows_of = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])
    counted = [np.unique(np.concatenate([codes[row] for row in rows]), return_counts=True) for rows in rows_of]
    totals = np.bincount(np.concatenate(codes), minlength=len(names))
    left = np.bincount(np.concatenate([classes for classes, _ in counted]), minlength=len(names))
    wanted = np.outer(shares, totals).astype(float)
    missing, assigned = np.ones(wanted.shape, bool), np.empty(len(labels), int)
    order = np.arange(len(rows_of)) if rng is None else rng.permutation(len(rows_of))
    for group in sorted(order, key=lambda group: (totals[counted[group][0]].min(), -len(rows_of[group]))):
        classes, counts = counted[group]
        scale = shares[:, None] * totals[classes]
        costs = ((counts**2 - 2 * counts * wanted[:, classes]) / scale).sum(axis=1)
        rarest = classes[totals[classes].argmin()]
        if missing[:, rarest].any() and left[rarest] <= missing[:, rarest].sum():
            costs = np.where(missing[:, rarest], costs, np.inf)
        chosen = int(costs.argmin())
        assigned[rows_of[group]] = chosen
        wanted[chosen, classes] -= counts
        missing[chosen, classes] = False
        left[classes] -= 1
    return {name: np.flatnonzero(assigned == position) for position, name in enumerate(kept)}


def _label_matrix(labels: np.ndarray, multi_label: bool) -> tuple[list[np.ndarray], list[str]]:
    """Returns the class positions of each row, and the class names."""
    names = find_class_names(labels, multi_label)
    positions = {name: position for position, name in enumerate(names)}
    codes, distinct = pd.factorize(labels)
    decoded = [np.array([positions[name] for name in set(split_label(label, multi_label))]) for label in distinct]
    return [decoded[code] for code in codes], names


def _fill_sets(wanted: np.ndarray, number_of_rows: int) -> np.ndarray:
    """Returns the set of each row of a class, ascending, in proportion to the numbers that the sets still want.

    Largest remainders decide. Each set gets a row if there are enough; the first set gets even the only one.
    """
    wanted = np.maximum(wanted, 0)
    shares = wanted / wanted.sum() * number_of_rows if wanted.sum() else np.eye(len(wanted))[0] * number_of_rows
    counts = np.floor(shares + 1e-9).astype(int)
    remainder_first = np.argsort(-(shares - counts), kind="stable")
    counts[remainder_first[: number_of_rows - counts.sum()]] += 1
    for position in np.flatnonzero((counts == 0) & (wanted > 0)):
        if counts.max() > 1 or position == 0:
            counts[counts.argmax()] -= 1
            counts[position] += 1
    return np.repeat(np.arange(len(wanted)), counts)


def tabulate_counts(labels: dict[str, pd.Series], class_names: list[str], multi_label: bool) -> pd.DataFrame:
    """Returns the image counts of the labels of sets, with a row per class and a column per set."""
    counts = {name: count_classes(of_set, multi_label, class_names) for name, of_set in labels.items()}
    return pd.DataFrame(counts, index=class_names)


def warn_of_other_fractions(sets: dict[str, np.ndarray], fractions: dict[str, float]) -> None:
    """Prints which sets differ by more than 2 percentage points from their fraction."""
    number = sum(map(len, sets.values()))
    for name, rows in sets.items():
        if abs(len(rows) / number - fractions[name]) > 0.02:
            print(
                f"Warning: the {name} set has {len(rows) / number:.1%} of the images, not {fractions[name]:.1%}: "
                "groups stay whole, and each class is divided separately."
            )


def warn_of_stale_sets(written: Collection[str]) -> None:
    """Prints which tables of sets in the same folder were not written now."""
    folder = os.path.dirname(next(iter(written)))
    for file in SET_FILES.values():
        path = os.path.join(folder, file)
        if path not in written and os.path.exists(path):
            print(f"Warning: {path} is from an earlier split and may share images with the new sets. Delete it.")


def format_counts(counts: pd.DataFrame) -> str:
    """Returns a table of image counts as text; of many classes only the smallest."""
    if len(counts) <= MOST_LISTED:
        return counts.to_string()
    order = counts.sum(axis=1).sort_values(kind="stable").index
    smallest = counts.loc[order[:MOST_TELLING]].to_string()
    return f"The {MOST_TELLING} smallest of {len(counts)} classes; the tables below have all.\n{smallest}"


def format_class_counts(counts: dict[str, int]) -> str:
    """Returns the number of images of each class as text, one line each; of many classes only the smallest."""
    names, lines = [*counts], []
    if len(names) > MOST_LISTED:
        names = sorted(names, key=counts.__getitem__)[:MOST_TELLING]
        lines = [f"The {MOST_TELLING} smallest of {len(counts)} classes; the table has all."]
    for name in names:
        count = counts[name]
        lines.append(f"{name}: {show_count(count, 'image') if count else 'no images, so it is not in the table'}")
    return "\n".join(lines)


def warn_of_missing_classes(counts: pd.DataFrame) -> None:
    """Prints which classes are too small to be in every set; if there are many, how many each set lacks."""
    missing = counts.index[(counts == 0).any(axis=1)]
    for set_name in counts.columns if len(missing) > MOST_TELLING else ():
        if names := [*counts.index[counts[set_name] == 0]]:
            print(f"Warning: the {set_name} set has none of {len(names)} small classes: {join_names(names)}.")
    for name in missing if len(missing) <= MOST_TELLING else ():
        row = counts.loc[name]
        for set_name in row.index[row == 0]:
            print(f"Warning: {name} has {show_count(row.sum(), 'image')}, so the {set_name} set has none of it.")


def _read_column(table: pd.DataFrame, column: str, csv_path: str) -> list[str]:
    """Returns the values of the column that groups rows; UserError if it lacks one and is not `group`."""
    if column not in table.columns:
        columns = ", ".join(table.columns)
        raise UserError(
            f"{csv_path} has no column '{column}'. Its columns: {columns}. Set group_column to one of them."
        )
    values = table[column].map(clean_label).str.strip().tolist()
    if "" in values and column != GROUP_COLUMN:
        raise UserError(f"{csv_path}, row {values.index('') + 2}: the column '{column}' is empty. Fill it in.")
    return values
