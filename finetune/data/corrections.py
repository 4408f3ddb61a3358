"""corrections.csv, from the page of suspected label errors: checked against its table, and applied to a copy."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pandas as pd

from finetune.core.files import write_csv
from finetune.core.labels import clean_label
from finetune.core.options import UserError
from finetune.core.texts import join_names, show_text
from finetune.data.tables import IMAGE_COLUMN, find_class_names, parse_table, read_table, split_label

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
