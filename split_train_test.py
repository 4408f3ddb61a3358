"""Splits a CSV file of images into training_set.csv and testing_set.csv beside it, with every class in both."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import numpy as np

from configs import Configs, UserError, define, run_script
from utils import (
    Finding,
    Groups,
    check_data,
    find_class_names,
    get_bad_rows,
    make_image_table,
    parse_table,
    read_table,
    report_findings,
    split_label,
    write_csv,
)

if TYPE_CHECKING:
    import pandas as pd

SET_FILES = {"training": "training_set.csv", "validation": "validation_set.csv", "testing": "testing_set.csv"}


@dataclasses.dataclass
class SplitConfigs(Configs):
    """The options of this script, beside those of every script."""

    csv_path: str = define("./data/all_data.csv", "The CSV file to split")
    test_split_fraction: float = define(0.2, "Share of every class that goes to the test set", above=0, below=1)
    validation_split_fraction: float = define(
        0.0, "Share of every class that goes to validation_set.csv; 0 writes none", at_least=0, below=1
    )
    group_column: str = define(
        "", "A column, such as that of a patient or a video, whose rows of one value stay in one set; empty: none"
    )
    verify: bool = define(
        False, "Decode every image, list what is wrong in data_report.csv, and keep copies of an image in one set"
    )
    shuffle: bool = define(True, "Draw the images at random; False takes the last ones of each class")


def main(configs: SplitConfigs) -> dict:
    """Splits, writes and prints the counts; returns the image count of each class in each set."""
    fractions = {"testing": configs.test_split_fraction, "validation": configs.validation_split_fraction}
    fractions["training"] = 1 - sum(fractions.values())
    if fractions["training"] <= 0:
        raise UserError("test_split_fraction and validation_split_fraction leave nothing to train on. Lower them.")
    folder = os.path.dirname(configs.csv_path)
    written = {name: os.path.join(folder, file) for name, file in SET_FILES.items() if fractions[name]}
    refuse_own_input(configs.csv_path, written)
    table, groups = read_rows(configs)
    labels = table[configs.csv_label_column]
    rng = np.random.default_rng(configs.random_seed) if configs.shuffle else None
    if groups is None:
        sets = split_rows(labels.to_numpy(object), fractions, configs.multi_label_classification, rng)
    else:
        sets = split_groups(labels.to_numpy(object), groups, fractions, configs.multi_label_classification, rng)
        warn_of_other_fractions(sets, fractions)
    class_names = find_class_names(labels, configs.multi_label_classification)
    counts = count_classes(labels, sets, class_names, configs.multi_label_classification)
    print(counts.to_string())
    warn_of_missing_classes(counts)
    if empty := [name for name, rows in sets.items() if not len(rows)]:
        raise UserError(f"{configs.csv_path} has too few images: the {empty[0]} set would be empty. Add images.")
    for name, path in written.items():
        write_csv(path, table.iloc[sets[name]])
        print(f"Wrote {len(sets[name])} rows to {path}")
    stale = os.path.join(folder, SET_FILES["validation"])
    if "validation" not in written and os.path.exists(stale):
        print(f"Warning: {stale} is of an earlier split and shares images with the new sets. Delete it.")
    return counts.to_dict()


def refuse_own_input(csv_path: str, written: dict[str, str]) -> None:
    """Raises UserError where a file to be written is the one that is split."""
    if os.path.realpath(csv_path) in map(os.path.realpath, written.values()):
        raise UserError(f"{csv_path} would be replaced by a part of itself. Rename it first.")


def read_rows(configs: SplitConfigs) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Reads the table, checks its images where `verify` is set, and finds which rows have to stay together.

    Returns:
        The table, without the images that `skip_bad_images` leaves out, and the number of each row's group, int
        `(rows,)`; None where no two rows belong together.

    Raises:
        UserError: the table, an image in it or `group_column` is not usable.
    """
    findings = []
    if configs.verify:
        findings = check_images_of(parse_table(configs.csv_path, configs.csv_label_column), configs)
    table = read_table(configs.csv_path, configs.csv_label_column, configs.multi_label_classification)
    groups = Groups(len(table))
    if configs.group_column:
        join_by_column(groups, table, configs.group_column, configs.csv_path)
    copies = [(finding.copy_of - 2, finding.row - 2) for finding in findings if finding.copy_of]
    for first, second in copies:
        groups.join(first, second)
    if copies:
        print(f"Copies, exact or near, that stay in one set with their original: {len(copies)}.")
    kept = np.setdiff1d(np.arange(len(table)), [row - 2 for row in get_bad_rows(findings)[configs.csv_path]])
    if not kept.size:
        raise UserError(f"{configs.csv_path}: none of the {len(table)} images can be read. Check image_directory.")
    numbers = np.array([groups.find(int(row)) for row in kept])
    return table.iloc[kept], numbers if copies or configs.group_column else None


def check_images_of(table: pd.DataFrame, configs: SplitConfigs) -> list[Finding]:
    """Checks a table and every image in it, prints what it finds and writes data_report.csv beside it.

    Raises:
        UserError: there are errors; of images that cannot be read only where `skip_bad_images` is not set.
    """
    label_column, image_directory = configs.csv_label_column, configs.image_directory
    findings = check_data(
        [make_image_table("", configs.csv_path, table, label_column, image_directory)],
        configs.multi_label_classification,
        mode="full",
        image_size=configs.image_target_size[:2],
        max_pixels=configs.max_image_pixels,
        workers=configs.generator_workers,
    )
    report_findings(findings, os.path.dirname(configs.csv_path), configs.skip_bad_images)
    return findings


def join_by_column(groups: Groups, table: pd.DataFrame, column: str, csv_path: str) -> None:
    """Joins the rows of a table that have the same value in a column.

    Raises:
        UserError: there is no such column, or a row has no value in it.
    """
    if column not in table.columns:
        columns = ", ".join(table.columns)
        raise UserError(
            f"{csv_path} has no column '{column}'. Its columns: {columns}. Set group_column to one of them."
        )
    first_row = {}
    for row, value in enumerate(table[column].str.strip()):
        if not value:
            raise UserError(f"{csv_path}, row {row + 2}: the column '{column}' is empty. Fill it in.")
        groups.join(first_row.setdefault(value, row), row)


def split_rows(
    labels: np.ndarray, fractions: dict[str, float], multi_label: bool, rng: np.random.Generator | None
) -> dict[str, np.ndarray]:
    """Divides rows so that every class is divided by the same fractions, as nearly as whole images allow.

    The rarest class is divided first, so that its few images reach every set; multi-label, an image counts for
    each of its labels (the iterative stratification of Sechidis et al., ECML PKDD 2011, one label after another).

    Args:
        labels: texts, one a row.
        fractions: the share of each set, by its name; they add up to 1.
        multi_label: whether a text holds several class names.
        rng: draws the rows; None fills each set in the order of the rows: training first, then validation, then test.

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
    """Divides rows as `split_rows` does, but each group as a whole, so that fractions hold as nearly as groups allow.

    The groups with the rarest class come first, the largest of them before the others. Each goes to the set where it
    lowers the squared distance to the wanted numbers most, relative to them; where a class has no more groups than
    there are sets without it, to one of those.

    Args:
        labels: texts, one a row.
        groups: the number of each row's group.
        fractions: the share of each set, by its name; they add up to 1.
        multi_label: whether a text holds several class names.
        rng: draws among groups that are alike; None takes them in the order of the rows.

    Returns:
        The sorted row numbers of each set.
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


def warn_of_other_fractions(sets: dict[str, np.ndarray], fractions: dict[str, float]) -> None:
    """Prints which sets differ by more than 2 points from the share that they were to have."""
    number = sum(map(len, sets.values()))
    for name, rows in sets.items():
        if abs(len(rows) / number - fractions[name]) > 0.02:
            print(
                f"Warning: the {name} set has {len(rows) / number:.1%} of the images, not {fractions[name]:.1%}: "
                "groups stay whole."
            )


def _label_matrix(labels: np.ndarray, multi_label: bool) -> tuple[list[np.ndarray], list[str]]:
    """Returns the class positions of each row, and the class names."""
    import pandas as pd

    names = find_class_names(labels, multi_label)
    positions = {name: position for position, name in enumerate(names)}
    codes, distinct = pd.factorize(labels)
    decoded = [np.array([positions[name] for name in set(split_label(label, multi_label))]) for label in distinct]
    return [decoded[code] for code in codes], names


def _fill_sets(wanted: np.ndarray, number_of_rows: int) -> np.ndarray:
    """Gives `number_of_rows` rows of a class to sets in proportion to what they still want; ascending set numbers.

    Largest remainders round the shares. A set that wants something gets at least one row where there are enough,
    the first set even the only one.
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


def count_classes(
    labels: pd.Series, sets: dict[str, np.ndarray], class_names: list[str], multi_label: bool
) -> pd.DataFrame:
    """Returns a table of image counts, a row a class and a column a set."""
    import pandas as pd

    counts = pd.DataFrame(0, index=class_names, columns=list(sets))
    for name, rows in sets.items():
        for label, count in labels.iloc[rows].value_counts().items():
            for class_name in set(split_label(label, multi_label)):
                counts.loc[class_name, name] += count
    return counts


def warn_of_missing_classes(counts: pd.DataFrame) -> None:
    """Prints which classes are too small to be in every set."""
    for name, row in counts.iterrows():
        for set_name in row.index[row == 0]:
            print(f"Warning: {name} has {row.sum()} images, so the {set_name} set has none of it.")


if __name__ == "__main__":
    run_script(main, SplitConfigs)
