"""CSV tables of images: reading and encoding them, and remedies for wrong files."""

from __future__ import annotations

import csv
import difflib
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from finetune.core.files import IMAGE_SUFFIXES
from finetune.core.labels import LABEL_SEPARATOR, clean_label, clean_labels
from finetune.core.options import UserError
from finetune.core.texts import join_names
from finetune.data.stores import MARKS_AROUND, find_meant, is_url, join_path

IMAGE_COLUMN = "path"
# Optional: photos with the same value, such as near copies or photos of one patient, are not independent.
GROUP_COLUMN = "group"
WRITTEN_BY = {
    "all_data.csv": "make_csv_from_folders.py",
    **dict.fromkeys(("training_set.csv", "validation_set.csv", "testing_set.csv"), "split_train_test.py"),
}
DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "blanks"}
# The beginnings of other files: what they are, and what to do.
STARTS = {
    b"PK\x03\x04": "it is an Excel or OpenDocument workbook. Save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "it is an Excel workbook. Save it as CSV UTF-8",
    b"<!doctype": "it is a web page. Download the file itself",
    b"<html": "it is a web page. Download the file itself",
    b"version https://git-lfs": "it is a Git LFS pointer. Fetch the file with git lfs pull",
    b"\x1f\x8b": "it is compressed by gzip. Unpack it",
    b"{": "it is JSON. Save it as CSV UTF-8",
    b"[": "it is JSON. Save it as CSV UTF-8",
}
# Other names for this project's columns, in lower case without other characters.
IMAGE_WORDS = {"file", "files", "filename", "filepath", "image", "images", "imageid", "imagename", "imagepath", "id"}
IMAGE_WORDS |= {"paths", "img", "imgid", "imgname", "imgpath", "imagefile", "photo", "photoid", "picture", "imageids"}
LABEL_WORDS = {"label", "labels", "target", "targets", "category", "categories", "classname", "classes", "tag", "tags"}
TRUE_WORDS = {"1", "1.0", "True", "true", "TRUE"}
FALSE_WORDS = {"0", "0.0", "False", "false", "FALSE"}
# The name that pandas gives a column without one.
UNNAMED = r"Unnamed: \d+"
SAMPLED_BYTES = 2**16
SAMPLED_ROWS = 100


def read_table(csv_path: str, label_column: str, multi_label: bool = False) -> pd.DataFrame:
    """Reads a CSV file of images as a table of texts, one row per image.

    Args:
        csv_path: a CSV file with the columns `path` and `label_column`; other columns are kept.
        label_column: name of the column with the labels.
        multi_label: whether a label may hold several class names, none of them empty.

    Raises:
        UserError: the file is missing, empty or no CSV, or lacks a column, a path or a label; it names every such row.
    """
    table = parse_table(csv_path, label_column)
    if faults := _find_empty_cells(table, label_column, multi_label):
        raise UserError(
            "\n".join(
                f"{csv_path}, row{'s' * (len(rows) > 1)} {join_names(rows)}: {detail}."
                for detail, rows in faults.items()
            )
        )
    return table


def find_remedy(csv_path: str) -> str:
    """Returns what to do about a table that cannot be opened: another spelling, the script that writes it."""
    if meant := find_meant(csv_path):
        return f"There is {meant}: write that."
    script = WRITTEN_BY.get(os.path.basename(csv_path))
    first = f", or run {script} first" if script else ""
    return f"Check the path{first}." + f" Relative paths start in {os.getcwd()}." * (
        not os.path.isabs(csv_path) and not is_url(csv_path)
    )


def parse_table(csv_path: str, label_column: str) -> pd.DataFrame:
    """Reads a CSV file as `read_table` does, but allows empty paths and labels; cleans labels by `clean_labels`.

    Raises:
        UserError: the file is missing, empty or no CSV, or lacks a column or rows.
    """
    if not csv_path:
        raise UserError("Expected a CSV file of images. Received an empty path. Set train_csv or test_csv to one.")
    try:
        start = _read_start(csv_path)
        if fault := find_kind_fault(start):
            raise UserError(f"{csv_path} is not a UTF-8 CSV file: {fault}.")
        if start and (fault := find_start_fault(start, (IMAGE_COLUMN, label_column))):
            raise UserError(f"{csv_path} {fault}.")
        table = pd.read_csv(csv_path, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"Cannot read the CSV file {csv_path}: {error.strerror}. {find_remedy(csv_path)}") from error
    except UnicodeDecodeError as error:
        fault = describe_encoding(Path(csv_path).read_bytes())
        raise UserError(f"{csv_path} is not a UTF-8 CSV file: {fault}. Save it as UTF-8.") from error
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
        raise UserError(f"{csv_path} has no rows. Expected one row per image, with {IMAGE_COLUMN} and {label_column}.")
    if label_column != IMAGE_COLUMN:
        table = table.assign(**{label_column: clean_labels(table[label_column].tolist(), csv_path)})
    return table


def describe_encoding(content: bytes) -> str:
    """Returns the likely encoding of a text that is not UTF-8, with the line of its first foreign byte."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        if b"\0" in content:
            return f"it is no text (line {line})"
        shown = content[max(error.start - 10, 0) : error.start + 10].decode("latin-1").splitlines()
        text = next((part for part in shown if not part.isascii()), "")
        return f"line {line} ({text!r}) looks like Latin-1 or Windows-1252"
    return "its encoding is unknown"


def _find_empty_cells(table: pd.DataFrame, label_column: str, multi_label: bool) -> dict[str, list[int]]:
    """Returns the rows without a path or a label, or with an empty class name next to a `$`, by the fault."""
    rows = defaultdict(list)
    # predict.py reads tables without labels: the the paths replace the labels.
    for column in dict.fromkeys((IMAGE_COLUMN, label_column)):
        for position in np.flatnonzero(table[column].str.strip() == "").tolist():
            rows[f"the column '{column}' is empty. Fill it or drop the row"].append(position + 2)
    if multi_label:
        labels = table[label_column]
        wrong = labels.str.contains(rf"(?:^|\{LABEL_SEPARATOR})\s*(?:\{LABEL_SEPARATOR}|$)")
        for position in np.flatnonzero(wrong & (labels.str.strip() != "")).tolist():
            fault = f"the label '{labels.iloc[position]}' has an empty class name next to a '{LABEL_SEPARATOR}'"
            rows[f"{fault}. Correct it"].append(position + 2)
    return rows


def split_label(label: str, multi_label: bool) -> list[str]:
    """Returns the class names in one label: `class1$class2` has two if `multi_label` is set."""
    return label.split(LABEL_SEPARATOR) if multi_label else [label]


def find_class_names(labels: Collection[str], multi_label: bool) -> list[str]:
    """Returns the class names in labels, sorted, so that every process agrees on their order."""
    return sorted({name for label in set(labels) for name in split_label(label, multi_label)})


def count_classes(labels: Collection[str], multi_label: bool, class_names: Sequence[str] = ()) -> dict[str, int]:
    """Returns the number of images of each class: `class_names` first, even without images, then the others."""
    counts = dict.fromkeys([*class_names, *find_class_names(labels, multi_label)], 0)
    for label, number in Counter(labels).items():
        for name in set(split_label(label, multi_label)):
            counts[name] += number
    return counts


def resolve_class_names(
    classes: Sequence[str] | None, train_csv: str, label_column: str, multi_label: bool
) -> list[str]:
    """Returns the given class names, or those in the training CSV, sorted.

    Raises:
        UserError: the given classes differ from those in the training CSV, or there are fewer than two.
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
        raise UserError(f"{train_csv} has one class, {join_names(found)}. Expected at least two to tell apart.")
    return classes if classes is not None else found


def encode_labels(labels: Sequence[str], class_names: Sequence[str], multi_label: bool, csv_path: str) -> np.ndarray:
    """Turns labels into numbers for training.

    Returns:
        int32 `(images,)`, positions in `class_names`; multi-label: uint8 `(images, classes)` of zeros and ones.

    Raises:
        UserError: a label is not in `class_names`, with its row in `csv_path`; or two class names look the same.
    """
    # Runs of older versions have names that were not cleaned.
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
    """Returns the image count of each class, int `(number,)`, from labels of `encode_labels`."""
    return labels.sum(axis=0, dtype=int) if labels.ndim == 2 else np.bincount(labels, minlength=number)


def warn_of_missing_classes(counts: Sequence[int], class_names: Sequence[str], set_name: str) -> None:
    """Prints which classes have no image in a set, in one line."""
    if missing := [name for name, count in zip(class_names, counts, strict=True) if not count]:
        which = "this class" if len(missing) == 1 else f"these {len(missing)} classes"
        print(
            f"Warning: the {set_name} set has no image of {join_names(missing)}: its metrics say nothing about {which}."
        )


class ImageTable(NamedTuple):
    """The images of a CSV file: paths as written, their files, labels; position `n` is line `n + 2`."""

    set_name: str
    csv_path: str
    paths: list[str]
    files: list[str]
    labels: list[str]


def make_image_table(
    set_name: str, csv_path: str, table: pd.DataFrame, label_column: str, image_directory: str = ""
) -> ImageTable:
    """Makes the data check's table from one that `parse_table` has read."""
    paths = table[IMAGE_COLUMN].tolist()
    files = [join_path(image_directory, path) if path.strip() else "" for path in paths]
    files = [os.path.normpath(file) if file and not is_url(file) else file for file in files]
    return ImageTable(set_name, csv_path, paths, files, table[label_column].tolist())


# A file that is not the table that it should be


def _read_start(csv_path: str) -> bytes:
    """Returns the beginning of a file; nothing of a URL."""
    if not os.path.isfile(csv_path):
        return b""
    with open(csv_path, "rb") as file:
        return file.read(SAMPLED_BYTES)


def find_encoding(start: bytes) -> str:
    """Returns `utf-16-le` or `utf-16-be` if a file begins so, by its mark or its zeros; else an empty text."""
    for mark, encoding in {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.items():
        if start.startswith(mark):
            return encoding
    # A header of ASCII characters has a zero in one of every two bytes.
    sample = start[:64]
    zeros = [sample[offset::2].count(0) / max(len(sample[offset::2]), 1) for offset in (0, 1)]
    if len(sample) >= 4 and max(zeros) > 0.7 and min(zeros) < 0.1:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    return ""


def find_kind_fault(start: bytes) -> str:
    """Returns what a file is that begins as no UTF-8 table does, and what to do; empty if that is unknown."""
    if find_encoding(start):
        has_mark = start[:2] in (b"\xff\xfe", b"\xfe\xff")
        return f"it is UTF-16{'' if has_mark else ' without a byte order mark'}. Save it as UTF-8"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((fault for mark, fault in STARTS.items() if text.startswith(mark.lower())), "")


def find_start_fault(start: bytes, wanted: Sequence[str]) -> str:
    """Returns what is wrong with the first line of a table, and what to do; empty if it may be a header.

    None of the `wanted` columns may occur twice.
    """
    lines = start.decode("utf-8-sig", "replace").splitlines()
    if not any(lines):
        return ""
    if not lines[0].strip():
        return "begins with a blank line. Remove it"
    if found := find_separator_line(lines[0]):
        remedy = "" if found == "," else f", and separate the fields by commas, not {DELIMITERS.get(found, found)}"
        return f"begins with 'sep={found.replace(chr(9), ' ')}', a line for Excel only. Remove it{remedy}"
    if lines[0].startswith("#"):
        return "begins with '#'. Remove that mark" + ("" if "," in lines[0] else ", and the line if it is no header")
    header = next(csv.reader(lines[:1]), [])
    twice = next((name for name in wanted if header.count(name) > 1), "")
    return f"has two columns called {twice!r}. Rename or remove one" if twice else ""


def describe_parser_error(error: ValueError) -> str:
    """Returns pandas' complaint about the rows of a table in this project's words, with a remedy."""
    words = " ".join(str(error).split())
    if found := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", words):
        counts = f"line {found[2]} has {found[3]} fields, those before it have {found[1]}"
        return f"{counts}. Quote the fields that contain a comma"
    if found := re.search(r"inside string starting at row (\d+)", words):
        return f"a quotation mark that opens in line {int(found[1]) + 1} never closes. Close it, or remove it"
    return f"it is no table: {words}. Save it as one"


def find_separator_line(line: str) -> str:
    """Returns the character in a line `sep=;`, a setting of Excel; empty for another line."""
    found = re.fullmatch(r'"?sep=(.)"?[,;]*\s*', line, re.IGNORECASE)
    return found[1] if found else ""


def find_long_rows_fault(table: pd.DataFrame) -> str:
    """Returns what is wrong with a table whose rows have more fields than its header: the first are its index."""
    if table.shape[1] and (table.iloc[:, -1].fillna("") == "").all():
        return "has rows that end in a comma, unlike its first line. Remove these commas, or add one there"
    first = [str(value) for value in table.index.get_level_values(0)]
    if first in ([str(row) for row in range(start, len(first) + start)] for start in (0, 1)):
        return "has a number at the start of each row, without a name in the first line. Put 'row,' in front of it"
    return "has rows with more fields than its header. Quote the fields that contain a comma"


def find_column_remedies(table: pd.DataFrame, missing: Sequence[str], label_column: str, csv_path: str) -> list[str]:
    """Returns what to do about a table of texts that lacks `path`, `label_column` or both."""
    header = [str(name) for name in table.columns]
    wanted = ",".join(dict.fromkeys((IMAGE_COLUMN, label_column)))
    delimiter = next((mark for mark in DELIMITERS if mark in header[0]), "") if len(header) == 1 else ""
    cells = header[0].split(delimiter) if delimiter else header
    if len(header) == 1 and "," in header[0]:
        return ["Its lines are quoted as a whole: remove the quotation marks"]
    has_header = not any(is_image_path(cell) for cell in cells) and not cells[0].strip().isdigit()
    if delimiter == " " and has_header and not {*cells} & {*missing}:
        delimiter = ""
    remedies = []
    if delimiter:
        remedies.append(f"Its fields are separated by {DELIMITERS[delimiter]}: separate them by commas")
    if not has_header:
        line = f"the line {wanted}" if len(cells) <= 2 else f"a line of column names, including {wanted},"
        remedies.append(f"Its first line is no header: put {line} in front of it")
    if not remedies:
        spelt = {name: find_spelling(name, missing) for name in header}
        remedies = [f"{name!r} {spelt[name]}" for name in header if spelt[name]]
        missing = [name for name in missing if not any(f" {name}" in words for words in spelt.values())]
    if remedies or not missing:
        return remedies
    command = f"python make_csv_from_folders.py --table_path {shlex.quote(csv_path)} --folder_path FOLDER"
    if label_column in missing and find_class_columns(table):
        return [f"It has a column of 0 and 1 for each class: {command} converts it"]
    if IMAGE_COLUMN not in missing:
        return [find_label_remedy(header)]
    remedy, is_whole = find_image_remedy(table, command, wanted, label_column)
    return [remedy] if is_whole or label_column not in missing else [remedy, find_label_remedy(header)]


def is_image_path(text: str) -> bool:
    """Returns whether a text ends like the name of an image."""
    return text.strip(MARKS_AROUND).lower().endswith(IMAGE_SUFFIXES)


def find_spelling(name: str, missing: Sequence[str]) -> str:
    """Returns what to do about a column whose name resembles that of a missing one; empty otherwise."""
    plain = name.strip(MARKS_AROUND)
    if plain not in missing and clean_label(name) in map(clean_label, missing):
        return f"has invisible characters or accents encoded otherwise: write {clean_label(name)}"
    if plain in missing:
        return f"has {'blanks' if name.strip() == plain else 'quotation marks'} around it: write {plain}"
    return next((f"has other capitals: write {one}" for one in missing if plain.casefold() == one.casefold()), "")


def find_class_columns(table: pd.DataFrame) -> list[str]:
    """Returns the columns of 0 and 1 if a table has one for each class: two or more, and one other with a name."""
    columns = [name for name in table.columns if name and not re.fullmatch(UNNAMED, name)]
    found = [name for name in columns if is_binary(table[name])]
    return found if len(found) >= 2 and len(columns) - len(found) == 1 else []


def is_binary(column: pd.Series) -> bool:
    """Returns whether a column of texts has only the words of `TRUE_WORDS` and `FALSE_WORDS`."""
    return {*column.str.strip().unique()} <= TRUE_WORDS | FALSE_WORDS


def find_image_remedy(table: pd.DataFrame, command: str, wanted: str, label_column: str) -> tuple[str, bool]:
    """Returns what to do about a table without a column `path`, and whether nothing else is to be done."""
    start, columns = table.head(SAMPLED_ROWS), [name for name in table.columns if name != label_column]
    named = [name for name in columns if 2 * sum(map(is_image_path, start[name])) > len(start)]
    alike = [name for name in columns if re.sub(r"[\W\d_]", "", name.casefold()) in IMAGE_WORDS]
    if named:
        return f"Rename the column {named[0]!r} to {IMAGE_COLUMN}", False
    if alike and len(start):
        return f"The column {alike[0]!r} has names without endings: {command} converts the table", True
    near = [repr(name) for name in difflib.get_close_matches(IMAGE_COLUMN, columns, 1)]
    column = f"the column {near[0]}" if near else "the column with the images"
    return f"Rename {column} to {IMAGE_COLUMN}, or put the line {wanted} in front if it has no header", False


def find_label_remedy(header: Sequence[str]) -> str:
    """Returns what to do about a table without the column of labels."""
    columns = [name for name in header if name != IMAGE_COLUMN]
    alike = [name for name in columns if re.sub(r"[\W\d_]", "", name.casefold()) in LABEL_WORDS]
    alike += columns if len(columns) == 1 else []
    return f"Set csv_label_column to {alike[0]!r}" if alike else "Set csv_label_column accordingly"
