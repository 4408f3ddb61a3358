"""Tables of labels that become tables of images, and corrections of labels.

Competitions publish tables with ids, or with a column of 0 and 1 for each class. corrections.csv comes from the page of
suspected label errors.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from finetune.core.files import IMAGE_SUFFIXES, list_visible, write_csv
from finetune.core.labels import LABEL_SEPARATOR, clean_label, clean_labels
from finetune.core.options import UserError
from finetune.core.texts import join_names, show_text
from finetune.data.stores import MARKS_AROUND
from finetune.data.tables import (
    IMAGE_COLUMN,
    SAMPLED_BYTES,
    TRUE_WORDS,
    UNNAMED,
    describe_encoding,
    describe_parser_error,
    find_class_names,
    find_encoding,
    find_kind_fault,
    find_separator_line,
    is_binary,
    is_image_path,
    parse_table,
    read_table,
    split_label,
)

SEPARATORS = ",;\t|"


class TableForm(NamedTuple):
    """How to read a table of labels.

    Attributes:
        label_column: the column with the labels, also in the result.
        is_label_column_given: whether the table must have that column.
        image_column: the column that names the images; empty finds it by its values.
        multi_label: whether an image may have several labels.
        separator: the mark between them in the table.
    """

    label_column: str = "class"
    is_label_column_given: bool = False
    image_column: str = ""
    multi_label: bool = False
    separator: str = LABEL_SEPARATOR


def convert_label_table(
    table_path: str, folder_path: str, form: TableForm, leave_out_missing: bool = False
) -> pd.DataFrame:
    """Makes a table of images from a table of labels and the folder of its images, at any depth.

    Args:
        table_path: a CSV file with commas, semicolons, tabs or bars between its fields.
        folder_path: the folder.
        form: how to read the table.
        leave_out_missing: leave out rows without an image; otherwise they are errors.

    Returns:
        The columns `path` and the form's `label_column`, one row per image, in the order of the table.
    """
    label_column, multi_label, separator = form.label_column, form.multi_label, form.separator
    table = read_label_table(table_path)
    images = ImageNames(folder_path)
    image_column = find_image_column(table, images, form.image_column, table_path)
    labels = find_labels(table.drop(columns=image_column), form, table_path)
    if multi_label and separator != LABEL_SEPARATOR:
        labels = [replace_separator(label, separator, table_path) for label in labels]
    labels = clean_labels(labels, table_path)
    files = pick_files(table[image_column], images, table_path, leave_out_missing)
    used = {file for file in files if file}
    if unused := [path for path in images.paths if path not in used]:
        print(f"Left out {len(unused)} images that no row of {table_path} names: {join_names(unused)}")
    if unlabelled := [f"row {row}" for row, label in zip(table.index, labels, strict=True) if not label]:
        print(f"Left out {len(unlabelled)} rows without a label: {join_names(unlabelled)}")
    found = pd.DataFrame({IMAGE_COLUMN: files, label_column: labels})
    found = found[(found[IMAGE_COLUMN] != "") & (found[label_column] != "")]
    if found.empty:
        raise UserError(f"{table_path}: no row has both an image in {folder_path} and a label. Check --folder_path.")
    return join_rows(found, label_column) if multi_label else found.reset_index(drop=True)


def read_label_table(table_path: str) -> pd.DataFrame:
    """Reads a table of texts, stripped, indexed by line number, without columns that have no name."""
    text = read_text(table_path)
    first, _, rest = text.partition("\n")
    separator = find_separator_line(first)
    if separator and separator not in SEPARATORS:
        raise UserError(
            f"{table_path} begins with '{show_text(first)}'. Expected commas, semicolons, tabs or bars. Use these."
        )
    start = 2 if separator else 1
    text = rest if separator else text
    header = text.partition("\n")[0]
    separator = separator or max(SEPARATORS, key=header.count)
    options = {"header": None, "dtype": str, "keep_default_na": False, "skip_blank_lines": False}
    try:
        rows = pd.read_csv(io.StringIO(text), sep=separator, **options)
    except ValueError as error:
        raise UserError(f"{table_path}: {describe_parser_error(error)}.") from error
    rows = rows.fillna("").apply(lambda column: column.str.strip())
    rows.index += start
    names, table = [name.strip(MARKS_AROUND) for name in rows.iloc[0]], rows.iloc[1:]
    table = table[(table != "").any(axis=1)]
    if table.empty or not any(names) or any(map(is_image_path, names)):
        raise UserError(
            f"{table_path}: expected a line of column names and one line per image. "
            f"Received: {show_text(join_names(names))}, and {len(table)} lines. Add what is missing."
        )
    if doubled := sorted({name for name in names if name and names.count(name) > 1}):
        raise UserError(f"{table_path} has several columns {show_text(join_names(doubled))}. Rename or remove them.")
    table.columns = names
    return table[[name for name in names if name and not re.fullmatch(UNNAMED, name)]]


def read_text(table_path: str) -> str:
    """Returns the text of a file in UTF-8 or UTF-16; raises UserError if it is no text."""
    try:
        with open(table_path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"Cannot read the table {table_path}: {error.strerror}. Check --table_path.") from error
    encoding = find_encoding(content)
    fault = "" if encoding else find_kind_fault(content[:SAMPLED_BYTES])
    try:
        text = content.decode(encoding or "utf-8-sig").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        described = "its encoding is damaged" if encoding else describe_encoding(content)
        raise UserError(f"{table_path} is not a UTF-8 CSV file: {described}. Save it as UTF-8.") from error
    if fault or "\0" in text:
        raise UserError(f"{table_path} is not a UTF-8 CSV file: {fault or 'it is no text. Name the table'}.")
    if not text.strip():
        raise UserError(f"{table_path} is empty. Expected a column with images and one or more with labels.")
    return text


class ImageNames:
    """The images below a folder, to be found by name; UserError if there are none."""

    def __init__(self, folder_path: str) -> None:
        if not os.path.isdir(folder_path):
            raise UserError(f"Cannot read the folder {folder_path}: there is none. Check --folder_path.")
        folder_path = os.path.normpath(folder_path)
        self.folder_path = folder_path
        # A path below it has so many more separators as it has parts there.
        self._depth = -1 if folder_path == "." else folder_path.rstrip(os.sep).count(os.sep)
        paths = map(os.path.normpath, list_visible(folder_path).files)
        self.paths = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
        if not self.paths:
            raise UserError(f"{folder_path} contains no image ({', '.join(IMAGE_SUFFIXES)}). Check --folder_path.")
        self._by_name = defaultdict(list)
        for path in self.paths:
            name = os.path.basename(path)
            for key in map(clean_label, (name, os.path.splitext(name)[0])):
                self._by_name[key].append(path)

    def find(self, text: str) -> list[str]:
        """Returns the images that a text names: a path or the end of one, with or without the file's ending.

        Folders above `folder_path` may differ. The longest agreement wins, then a name with its ending, then a path
        that starts in `folder_path`.
        """
        given = [part for part in re.split(r"[\\/]", text.strip(MARKS_AROUND)) if part not in ("", ".")]
        parts, ranks = [*map(clean_label, given)], {}
        for path in self._by_name.get(parts[-1], ()) if parts else ():
            whole, depth = clean_label(os.path.abspath(path)).split(os.sep), path.count(os.sep) - self._depth
            folders = zip(parts[-2::-1], whole[-2::-1], strict=False)
            agreeing = 1 + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], folders))
            if agreeing == len(parts) or agreeing > depth:
                is_exact = os.path.basename(path).startswith(given[-1])
                ranks[path] = agreeing, whole[-1] == parts[-1], depth == len(parts), is_exact
        return [path for path, rank in ranks.items() if rank == max(ranks.values())]


def find_image_column(table: pd.DataFrame, images: ImageNames, image_column: str, table_path: str) -> str:
    """Returns the column that names images: the given one, or the one that names most of them."""
    if image_column and image_column not in table.columns:
        columns = join_names(table.columns)
        raise UserError(f"{table_path} has no column {image_column!r}. Its columns: {columns}. Correct --image_column.")
    columns = [image_column] if image_column else list(table.columns)
    numbers = {name: [len(images.find(value)) for value in table[name].unique()] for name in columns}
    column = max(columns, key=lambda name: (numbers[name].count(1), sum(map(bool, numbers[name]))))
    if not any(numbers[column]):
        row = ", ".join(f"{name} {table[name].iloc[0]!r}" for name in columns[:3])
        raise UserError(
            f"{table_path}: no column names images in {images.folder_path}. Its first row has {show_text(row)}, the "
            f"folder {os.path.relpath(images.paths[0], images.folder_path)}. Correct folder_path or image_column."
        )
    if images.find(column):
        raise UserError(
            f"{table_path}: its first line is no header: it names the image {show_text(column)}. Put a line of column "
            "names in front of it, such as id,class."
        )
    return column


def pick_files(names: pd.Series, images: ImageNames, table_path: str, leave_out_missing: bool) -> list[str]:
    """Returns the image that each row names, empty if it is missing and left out; UserError if it is ambiguous."""
    found = [images.find(name) for name in names]
    for row, name, paths in zip(names.index, names, found, strict=True):
        if len(paths) > 1:
            raise UserError(
                f"{table_path}, row {row}: {show_text(name)} names {len(paths)} images: {join_names(paths)}. Write the "
                "whole name with its folder and ending, or set --folder_path to its folder."
            )
    if missing := [row for row, paths in zip(names.index, found, strict=True) if not paths]:
        shown = join_names([f"row {row} ({show_text(names[row])})" for row in missing])
        if not leave_out_missing:
            raise UserError(
                f"{table_path}: {len(missing)} of {len(names)} rows name no image in {images.folder_path}: {shown}. "
                "Check --folder_path, drop them, or leave them out by --skip_bad_images True."
            )
        print(f"Left out {len(missing)} rows that name no image in {images.folder_path}: {shown}")
    return [paths[0] if paths else "" for paths in found]


def find_labels(others: pd.DataFrame, form: TableForm, table_path: str) -> list[str]:
    """Returns the label of each row, empty if it has none, from the columns without that of the images."""
    label_column, is_given = form.label_column, form.is_label_column_given
    columns = list(others.columns)
    if label_column in columns or len(columns) == 1:
        column = label_column if label_column in columns else columns[0]
        if column == label_column or not is_given:
            return others[column].tolist()
    if not columns:
        raise UserError(
            f"{table_path} has one column, with the images. Expected a second one, with the labels. Add it."
        )
    if is_given:
        raise UserError(
            f"{table_path} has no column {label_column!r}. Its columns, without that of the images: "
            f"{join_names(columns)}. Set --csv_label_column to the one with the labels."
        )
    if wrong := [name for name in columns if not is_binary(others[name])]:
        raise UserError(
            f"{table_path}: expected one column of labels, or a column of 0 and 1 for each class, with that of the "
            f"images. Received {len(columns)}, of other values: {show_text(join_names(wrong))}. Set --csv_label_column "
            "to the one with the labels, or remove the columns that are no classes."
        )
    return join_classes(others, form.multi_label, table_path)


def join_classes(others: pd.DataFrame, multi_label: bool, table_path: str) -> list[str]:
    """Returns the label of each row of a table that has a column of 0 and 1 for each class."""
    if wrong := [name for name in others.columns if LABEL_SEPARATOR in name]:
        raise UserError(
            f"{table_path}: the column {wrong[0]} contains '{LABEL_SEPARATOR}', which separates labels. Rename it."
        )
    marked, given = others.isin(TRUE_WORDS).to_numpy(), np.array(others.columns, dtype=object)
    clean_labels(given[np.nonzero(marked)[1]].tolist(), table_path)
    columns_of = defaultdict(list)
    for position, name in enumerate(given):
        columns_of[clean_label(name)].append(position)
    # Columns whose names look the same are one class.
    present = np.stack([marked[:, columns].any(axis=1) for columns in columns_of.values()], axis=1)
    names = np.array([*columns_of], dtype=object)
    several = np.flatnonzero(present.sum(axis=1) > 1)
    if several.size and not multi_label:
        raise UserError(
            f"{table_path}, row {others.index[several[0]]}: {join_names(names[present[several[0]]])} are all 1, and "
            f"{several.size} rows have several classes. Expected one class per image. Correct the rows, or set "
            "multi_label_classification."
        )
    return [LABEL_SEPARATOR.join(names[row]) for row in present]


def replace_separator(label: str, separator: str, table_path: str) -> str:
    """Returns a label with its class names joined by `$` instead of `separator`; a blank means one or more."""
    if LABEL_SEPARATOR in label:
        raise UserError(
            f"{table_path}: the label {show_text(label)} contains '{LABEL_SEPARATOR}'. Leave out label_separator."
        )
    names = [name.strip() for name in label.split(separator)]
    return LABEL_SEPARATOR.join(name for name in names if name)


def join_rows(table: pd.DataFrame, label_column: str) -> pd.DataFrame:
    """Joins the rows of each image, with each of its labels once, and prints their number."""
    labels = defaultdict(dict)
    for path, label in zip(table[IMAGE_COLUMN], table[label_column], strict=True):
        labels[path] |= dict.fromkeys(label.split(LABEL_SEPARATOR))
    if len(labels) < len(table):
        print(f"Joined the labels of {len(table)} rows by their images: {len(labels)}.")
    joined = [LABEL_SEPARATOR.join(names) for names in labels.values()]
    return pd.DataFrame({IMAGE_COLUMN: list(labels), label_column: joined})


ROW_COLUMN = "row"
GIVEN_COLUMN = "given_label"
MARK_COLUMN = "mark"
CORRECTED_COLUMN = "corrected_label"
COLUMNS = (ROW_COLUMN, IMAGE_COLUMN, GIVEN_COLUMN, MARK_COLUMN, CORRECTED_COLUMN)
MARKS = ("right", "wrong", "unsure")


def name_corrected(csv_path: str) -> str:
    """Returns the path of the corrected table: `all_data_corrected.csv` for `all_data.csv`."""
    stem, ending = os.path.splitext(csv_path)
    return f"{stem}_corrected{ending}"


def apply_corrections(
    csv_path: str, corrections_path: str, write_path: str, label_column: str, multi_label: bool
) -> dict[str, int]:
    """Writes a copy of a table in which the labels that are marked wrong are corrected.

    Args:
        csv_path: the table.
        corrections_path: the file that the page of suspected label errors saved.
        write_path: the new table.
        label_column: the table's column with the labels.
        multi_label: whether an image may have several labels.

    Returns:
        The number of rows with each mark.

    Raises:
        UserError: a table cannot be used, or a correction does not fit; nothing is written then.
    """
    for path in (csv_path, corrections_path):
        if os.path.realpath(write_path) == os.path.realpath(path):
            raise UserError(f"write_path: {write_path} would overwrite a file that is read. Choose another one.")
    table = read_table(csv_path, label_column, multi_label)
    corrections = read_corrections(corrections_path)
    if faults := find_faults(corrections, table, label_column, multi_label):
        raise UserError(
            f"{corrections_path} does not fit {csv_path}: {join_names(faults, 3)}. Nothing was written. Give the table "
            "that find_label_errors.py was run on, or correct these rows."
        )
    wrong = corrections[corrections[MARK_COLUMN] == "wrong"]
    table.iloc[wrong[ROW_COLUMN].astype(int).to_numpy() - 2, table.columns.get_loc(label_column)] = wrong[
        CORRECTED_COLUMN
    ].to_numpy()
    write_csv(write_path, table)
    counts = {mark: int((corrections[MARK_COLUMN] == mark).sum()) for mark in MARKS}
    print(
        f"Corrected {counts['wrong']} of {len(table)} labels; {counts['right']} marked right and {counts['unsure']} "
        f"unsure stay as they are. Wrote {write_path}; {csv_path} is unchanged."
    )
    return counts


def read_corrections(path: str) -> pd.DataFrame:
    """Reads a file of corrections as a table of texts; raises UserError if it is none."""
    table = parse_table(path, IMAGE_COLUMN)
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise UserError(
            f"{path} has no column '{missing[0]}'. Its columns: {join_names(table.columns)}. Expected the "
            "corrections.csv that the page of find_label_errors.py saves."
        )
    # Pages of older versions saved labels that were not cleaned.
    return table.assign(**{name: table[name].map(clean_label) for name in (GIVEN_COLUMN, CORRECTED_COLUMN)})


def find_faults(corrections: pd.DataFrame, table: pd.DataFrame, label_column: str, multi_label: bool) -> list[str]:
    """Returns a text for each row of the corrections that does not fit the table from `read_table`."""
    class_names = {*find_class_names(table[label_column], multi_label)}
    paths, labels = table[IMAGE_COLUMN].tolist(), table[label_column].tolist()
    faults, seen = [], set()
    for row, path, given, mark, corrected in corrections[list(COLUMNS)].itertuples(index=False):
        position = int(row) - 2 if row.isascii() and row.isdigit() and len(row) < 10 else -1
        if not 0 <= position < len(table):
            fault = f"the table has no such row, only 2 to {len(table) + 1}"
        elif position in seen:
            fault = "it is listed twice"
        elif paths[position] != path:
            fault = f"its path is {show_text(paths[position])}, not {show_text(path)}"
        elif labels[position] != given:
            fault = f"its label is {show_text(labels[position])}, not {show_text(given)}"
        elif mark not in MARKS:
            fault = f"expected the mark {', '.join(MARKS)}, received {show_text(mark)!r}"
        elif mark == "wrong":
            fault = find_label_fault(split_label(corrected, multi_label), split_label(given, multi_label), class_names)
        else:
            fault = ""
        seen.add(position)
        faults += [f"row {show_text(row)}: {fault}"] * bool(fault)
    return faults


def find_label_fault(names: Sequence[str], given: Sequence[str], class_names: set[str]) -> str:
    """Returns what is wrong with the labels that replace the given ones; empty if they are right."""
    if unknown := [name for name in names if name not in class_names]:
        return f"{show_text(unknown[0])!r} is none of the table's {len(class_names)} classes"
    if len({*names}) < len(names):
        return f"{show_text(join_names(names))} names a class twice"
    return "it is marked wrong but has the same label" if {*names} == {*given} else ""
