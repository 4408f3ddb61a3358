"""CSV tables of images, and what their labels say."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from finetune.core.labels import LABEL_SEPARATOR, clean_label, clean_labels
from finetune.core.options import UserError
from finetune.core.texts import join_names
from finetune.data.findings import Finding
from finetune.data.stores import is_url, join_path
from finetune.data.table_faults import (
    IMAGE_COLUMN,
    describe_parser_error,
    find_column_remedies,
    find_kind_fault,
    find_long_rows_fault,
    find_meant,
    find_start_fault,
    read_start,
)

# Optional column: photos with the same value, near copies or one patient's, are not independent of each other.
GROUP_COLUMN = "group"
WRITTEN_BY = {
    "all_data.csv": "make_csv_from_folders.py",
    **dict.fromkeys(("training_set.csv", "validation_set.csv", "testing_set.csv"), "split_train_test.py"),
}


def read_table(csv_path: str, label_column: str, multi_label: bool = False) -> pd.DataFrame:
    """Reads a CSV file of images.

    Args:
        csv_path: a CSV file with the columns `path` and `label_column`; more columns are kept.
        label_column: name of the column with the labels.
        multi_label: whether a label may hold several class names; none of them may be empty then.

    Returns:
        A table of texts, one row an image.

    Raises:
        UserError: the file is missing, empty or no CSV, or lacks a column, a path or a label; every such row is told.
    """
    table = parse_table(csv_path, label_column)
    faults = defaultdict(list)
    for finding in find_empty_cells(table, csv_path, label_column, multi_label):
        faults[finding.detail].append(finding.row)
    if faults:
        raise UserError(
            "\n".join(
                f"{csv_path}, row{'s' * (len(rows) > 1)} {join_names(rows)}: {detail}."
                for detail, rows in faults.items()
            )
        )
    return table


def find_remedy(csv_path: str) -> str:
    """Says what to do about a table that cannot be opened: another spelling, where it begins, what writes it."""
    if meant := find_meant(csv_path):
        return f"There is {meant}: write that."
    script = WRITTEN_BY.get(os.path.basename(csv_path))
    first = f", or run {script} first" if script else ""
    return f"Check the path{first}." + f" Relative paths begin in {os.getcwd()}." * (
        not os.path.isabs(csv_path) and not is_url(csv_path)
    )


def parse_table(csv_path: str, label_column: str) -> pd.DataFrame:
    """Reads a CSV file as `read_table` does, empty paths and labels included; labels are cleaned by `clean_labels`.

    Raises:
        UserError: the file is missing, empty or no CSV, or lacks a column or rows.
    """
    if not csv_path:
        raise UserError("Expected a CSV file of images. Received an empty path. Set train_csv or test_csv to one.")
    try:
        start = read_start(csv_path)
        if fault := find_kind_fault(start):
            raise UserError(f"{csv_path} is not a UTF-8 CSV file: {fault}.")
        if start and (fault := find_start_fault(start, (IMAGE_COLUMN, label_column))):
            raise UserError(f"{csv_path} {fault}.")
        table = pd.read_csv(csv_path, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"Cannot read the CSV file {csv_path}: {error.strerror}. {find_remedy(csv_path)}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{csv_path} is not a UTF-8 CSV file: {describe_encoding(csv_path)}. Save it as UTF-8."
        ) from error
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{csv_path} is empty. Expected the columns {IMAGE_COLUMN} and {label_column}.") from error
    except ValueError as error:
        raise UserError(f"{csv_path} is not a UTF-8 CSV file: {describe_parser_error(error)}.") from error
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(f"{csv_path} {find_long_rows_fault(table)}.")
    blank = (table == "").all(axis=1).to_numpy()
    table = table.iloc[: len(table) - int(np.argmin(blank[::-1])) if not blank.all() else 0]
    if missing := [name for name in dict.fromkeys((IMAGE_COLUMN, label_column)) if name not in table.columns]:
        remedies = ". ".join(find_column_remedies(table, missing, label_column, csv_path))
        raise UserError(
            f"{csv_path} has no column '{missing[0]}'. Its columns: {join_names(table.columns)}. {remedies}."
        )
    if table.empty:
        raise UserError(f"{csv_path} has no rows. Expected one row an image, with {IMAGE_COLUMN} and {label_column}.")
    if label_column != IMAGE_COLUMN:
        table = table.assign(**{label_column: clean_labels(table[label_column].tolist(), csv_path)})
    return table


def describe_encoding(csv_path: str) -> str:
    """Returns what a text file that is not UTF-8 may be, with the line of its first foreign byte."""
    with open(csv_path, "rb") as file:
        content = file.read()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        shown = content[max(error.start - 10, 0) : error.start + 10].decode("latin-1").splitlines()
        if b"\0" in content:
            return f"it is no text (line {line})"
        text = next((part for part in shown if not part.isascii()), "")
        return f"line {line} ({text!r}) looks like Latin-1 or Windows-1252"
    return "its encoding is unknown"


def find_empty_cells(table: pd.DataFrame, csv_path: str, label_column: str, multi_label: bool) -> list[Finding]:
    """Finds the rows of a table without a path or a label, and those with an empty class name beside a `$`."""
    found = []
    # The list of images that predict.py reads has no column of labels: its paths stand for both.
    for column in dict.fromkeys((IMAGE_COLUMN, label_column)):
        kind = "empty_path" if column == IMAGE_COLUMN else "empty_label"
        detail = f"the column '{column}' is empty. Fill it or drop the row"
        for position in np.flatnonzero(table[column].str.strip() == "").tolist():
            found.append(Finding(kind, "", csv_path, position + 2, table[IMAGE_COLUMN].iloc[position], detail))
    empty_name = rf"(?:^|\{LABEL_SEPARATOR})\s*(?:\{LABEL_SEPARATOR}|$)"
    if multi_label:
        labels = table[label_column]
        wrong = labels.str.contains(empty_name) & (labels.str.strip() != "")
        for position in np.flatnonzero(wrong).tolist():
            path, label = table[IMAGE_COLUMN].iloc[position], labels.iloc[position]
            detail = f"the label '{label}' has an empty class name beside a '{LABEL_SEPARATOR}'. Correct it"
            found.append(Finding("empty_label_part", "", csv_path, position + 2, path, detail))
    return found


def split_label(label: str, multi_label: bool) -> list[str]:
    """Returns the class names in one label: `class1$class2` holds two where `multi_label` is set."""
    return label.split(LABEL_SEPARATOR) if multi_label else [label]


def find_class_names(labels: Sequence[str], multi_label: bool) -> list[str]:
    """Returns the class names in labels, sorted, so that every process agrees on their order."""
    return sorted({name for label in set(labels) for name in split_label(label, multi_label)})


def resolve_class_names(
    classes: Sequence[str] | None, train_csv: str, label_column: str, multi_label: bool
) -> list[str]:
    """Returns the class names in their order: those given, or those found in the training CSV, sorted.

    Raises:
        UserError: the given classes are not those of the training CSV, or there are fewer than two.
    """
    found = find_class_names(read_table(train_csv, label_column, multi_label)[label_column], multi_label)
    classes = [clean_label(name) for name in classes] if classes is not None else None
    if doubled := [name for name, count in Counter(classes).items() if count > 1]:
        raise UserError(
            f"classes: expected each name once. Received several that look like {doubled[0]!r}. Correct it."
        )
    if classes is not None and set(classes) != set(found):
        missing, surplus = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
        faults = [f"it lacks {join_names(missing)}"] * bool(missing)
        faults += [f"{train_csv} has no image of {join_names(surplus)}"] * bool(surplus)
        raise UserError(f"classes does not match {train_csv}: {'; '.join(faults)}. Correct it, or set it to none.")
    if len(found) < (1 if multi_label else 2):
        raise UserError(f"{train_csv} holds one class, {join_names(found)}. Expected at least two to tell apart.")
    return classes if classes is not None else found


def encode_labels(labels: Sequence[str], class_names: Sequence[str], multi_label: bool, csv_path: str) -> np.ndarray:
    """Turns labels into what the model is trained on.

    Returns:
        int32 `(images,)`, positions in `class_names`; multi-label: uint8 `(images, classes)` of zeros and ones.

    Raises:
        UserError: a label that is none of `class_names`, with its row in `csv_path`; two of these look the same.
    """
    # Older runs have names that aren't cleaned.
    positions = {clean_label(name): position for position, name in enumerate(class_names)}
    if len(positions) < len(class_names):
        raise UserError(
            f"The model's classes {join_names([ascii(name) for name in class_names])} have names that look the same. "
            "Train a new model: its classes are merged."
        )
    codes, distinct = pd.factorize(np.asarray(labels, dtype=object))
    encoded = np.zeros((len(distinct), len(class_names)), np.uint8)
    for row, label in enumerate(distinct):
        for name in split_label(label, multi_label):
            if name not in positions:
                line = int(np.flatnonzero(codes == row)[0]) + 2
                raise UserError(
                    f"{csv_path}, row {line}: the label '{name}' is none of the {len(class_names)} classes of the "
                    f"training set ({join_names(class_names)}). Correct it, drop the row, or train with it."
                )
            encoded[row, positions[name]] = 1
    return encoded[codes] if multi_label else encoded.argmax(axis=1).astype(np.int32)[codes]


def count_labels(labels: np.ndarray, number: int) -> np.ndarray:
    """Returns the image count of each class, int `(number,)`, from labels as `encode_labels` gives them."""
    return labels.sum(axis=0, dtype=int) if labels.ndim == 2 else np.bincount(labels, minlength=number)


def warn_of_missing_classes(counts: Sequence[int], class_names: Sequence[str], set_name: str) -> None:
    """Prints which classes have no image in a set, in one line."""
    if missing := [name for name, count in zip(class_names, counts, strict=True) if not count]:
        which = "this class" if len(missing) == 1 else f"these {len(missing)} classes"
        print(
            f"Warning: the {set_name} set has no image of {join_names(missing)}: its metrics say nothing about {which}."
        )


class ImageTable(NamedTuple):
    """The images of a CSV file: paths as written, the files that they mean, labels; row `n` is line `n + 2`."""

    set_name: str
    csv_path: str
    paths: list[str]
    files: list[str]
    labels: list[str]


def make_image_table(
    set_name: str, csv_path: str, table: pd.DataFrame, label_column: str, image_directory: str = ""
) -> ImageTable:
    """Takes what the data check needs from a table that `parse_table` has read."""
    paths = table[IMAGE_COLUMN].tolist()
    files = [join_path(image_directory, path) if path.strip() else "" for path in paths]
    files = [os.path.normpath(file) if file and not is_url(file) else file for file in files]
    return ImageTable(set_name, csv_path, paths, files, table[label_column].tolist())
