"""What a file is that is not the table it should be, which images are missing, and what to do about it."""

from __future__ import annotations

import csv
import difflib
import os
import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence

import pandas as pd

from finetune.core.files import IMAGE_SUFFIXES
from finetune.core.labels import clean_label, show_difference
from finetune.core.texts import show_text
from finetune.data.stores import is_url

IMAGE_COLUMN = "path"
DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "blanks"}
# How a file of another kind begins: what it is, and what to do.
STARTS = {
    b"PK\x03\x04": "it is an Excel or OpenDocument workbook. Save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "it is an Excel workbook. Save it as CSV UTF-8",
    b"<!doctype": "it is a web page. Download the file itself",
    b"<html": "it is a web page. Download the file itself",
    b"version https://git-lfs": "it is the place that Git LFS keeps for a file. Fetch that by git lfs pull",
    b"\x1f\x8b": "it is packed by gzip. Unpack it",
    b"{": "it is JSON. Save it as CSV UTF-8",
    b"[": "it is JSON. Save it as CSV UTF-8",
}
# What columns are called that this project calls otherwise, in small letters alone.
IMAGE_WORDS = {"file", "files", "filename", "filepath", "image", "images", "imageid", "imagename", "imagepath", "id"}
IMAGE_WORDS |= {"paths", "img", "imgid", "imgname", "imgpath", "imagefile", "photo", "photoid", "picture", "imageids"}
LABEL_WORDS = {"label", "labels", "target", "targets", "category", "categories", "classname", "classes", "tag", "tags"}
TRUE_WORDS = {"1", "1.0", "True", "true", "TRUE"}
FALSE_WORDS = {"0", "0.0", "False", "false", "FALSE"}
MARKS_AROUND = " \t\r\n\xa0\ufeff'\"`\u2018\u2019\u201c\u201d"
# How pandas calls a column without a name.
UNNAMED = r"Unnamed: \d+"
SAMPLED_BYTES = 2**16
SAMPLED_ROWS = 100
ENDING_REMEDY = "add the ending, as make_csv_from_folders.py --table_path does"
DRIVE = re.compile(r"(?:^|(?<=/))([A-Za-z]:)/")
HOME = re.compile(r"(?:^|(?<=/))~/")


def read_start(csv_path: str) -> bytes:
    """Returns how a file begins; nothing of what is no file on the disk.

    Raises:
        OSError: it cannot be read.
    """
    if not os.path.isfile(csv_path):
        return b""
    with open(csv_path, "rb") as file:
        return file.read(SAMPLED_BYTES)


def find_encoding(start: bytes) -> str:
    """Returns the Unicode encoding, wider than UTF-8, that a file's beginning shows: by its mark or its zeros."""
    marks = {
        b"\xff\xfe\0\0": "utf-32-le",
        b"\0\0\xfe\xff": "utf-32-be",
        b"\xff\xfe": "utf-16-le",
        b"\xfe\xff": "utf-16-be",
    }
    for mark, encoding in marks.items():
        if start.startswith(mark):
            return encoding
    # A header is of letters and commas: of the two bytes of each, one is zero.
    sample = start[:64]
    zeros = [sample[offset::2].count(0) / max(len(sample[offset::2]), 1) for offset in (0, 1)]
    if len(sample) >= 4 and max(zeros) > 0.7 and min(zeros) < 0.1:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    return ""


def find_kind_fault(start: bytes) -> str:
    """Returns what a file is that begins as no UTF-8 table does, and what to do; empty where that does not tell."""
    if encoding := find_encoding(start):
        has_mark = start[:2] in (b"\xff\xfe", b"\xfe\xff") or start[2:4] == b"\xfe\xff"
        return f"it is {encoding[:6].upper()}{'' if has_mark else ' without a byte order mark'}. Save it as UTF-8"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((fault for mark, fault in STARTS.items() if text.startswith(mark.lower())), "")


def find_start_fault(start: bytes, wanted: Sequence[str] = ()) -> str:
    """Returns what is wrong with the first line of a table, and what to do; empty where it may be a header.

    Args:
        start: of the file.
        wanted: the columns that are read, of which there may be no two.
    """
    lines = start.decode("utf-8-sig", "replace").splitlines()
    if not any(lines):
        return ""
    if not lines[0].strip():
        return "begins with a blank line. Remove it"
    if found := find_separator_line(lines[0]):
        remedy = "" if found == "," else f", and separate the fields by commas, not {DELIMITERS.get(found, found)}"
        return f"begins with 'sep={found.replace(chr(9), ' ')}', a line for Excel alone. Remove it{remedy}"
    if lines[0].startswith("#"):
        return "begins with '#'. Remove that mark" + ("" if "," in lines[0] else ", and the line if it is no header")
    header = next(csv.reader(lines[:1]), [])
    twice = next((name for name in wanted if header.count(name) > 1), "")
    return f"has two columns that are called {twice!r}. Rename or remove one" if twice else ""


def describe_parser_error(error: ValueError) -> str:
    """Returns what pandas found wrong with the rows of a table, and what to do about it."""
    words = " ".join(str(error).split())
    if found := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", words):
        counts = f"line {found[2]} has {found[3]} fields, those before it have {found[1]}"
        return f"{counts}. Quote the fields that hold a comma"
    if found := re.search(r"inside string starting at row (\d+)", words):
        return f"a quotation mark that opens in line {int(found[1]) + 1} never closes. Close it, or remove it"
    return f"it is no table: {words}. Save it as one"


def find_separator_line(line: str) -> str:
    """Returns the character that a line `sep=;` names, which Excel takes for a setting; empty for another line."""
    found = re.fullmatch(r'"?sep=(.)"?[,;]*\s*', line, re.IGNORECASE)
    return found[1] if found else ""


def find_long_rows_fault(table: pd.DataFrame) -> str:
    """Returns what is wrong with a table whose rows have more fields than its header, and what to do.

    Args:
        table: as pandas reads it: the first fields are its index.
    """
    if table.shape[1] and (table.iloc[:, -1].fillna("") == "").all():
        return "has rows that end in a comma, which its first line does not. Remove it, or put one there"
    first = [str(value) for value in table.index.get_level_values(0)]
    if first in ([str(row) for row in range(start, len(first) + start)] for start in (0, 1)):
        return "has a number in front of each row that its first line has no name for. Put 'row,' in front of that line"
    return "has rows with more fields than its header. Quote the fields that hold a comma"


def find_column_remedies(table: pd.DataFrame, missing: Sequence[str], label_column: str, csv_path: str) -> list[str]:
    """Returns what to do about a table that lacks columns.

    Args:
        table: of texts.
        missing: `path` or the column with the labels, or both.
        label_column: the column with the labels.
        csv_path: where it is.
    """
    header = [str(name) for name in table.columns]
    wanted = ",".join(dict.fromkeys((IMAGE_COLUMN, label_column)))
    delimiter = next((mark for mark in DELIMITERS if mark in header[0]), "") if len(header) == 1 else ""
    cells = header[0].split(delimiter) if delimiter else header
    if len(header) == 1 and "," in header[0]:
        return ["Its lines are in quotes as a whole: remove these"]
    has_header = not any(is_image_path(cell) for cell in cells) and not cells[0].strip().isdigit()
    if delimiter == " " and has_header and not {*cells} & {*missing}:
        delimiter = ""
    remedies = []
    if delimiter:
        remedies.append(f"Its fields are separated by {DELIMITERS[delimiter]}: separate them by commas")
    if not has_header:
        line = f"the line {wanted}" if len(cells) <= 2 else f"a line of names, {wanted} among them,"
        remedies.append(f"Its first line is no header: put {line} in front of it")
    if not remedies:
        spelt = {name: find_spelling(name, missing) for name in header}
        remedies = [f"{name!r} {spelt[name]}" for name in header if spelt[name]]
        missing = [name for name in missing if not any(f" {name}" in words for words in spelt.values())]
    if remedies or not missing:
        return remedies
    command = f"python make_csv_from_folders.py --table_path {shlex.quote(csv_path)} --folder_path FOLDER"
    if label_column in missing and find_class_columns(table):
        return [f"It has a column of 0 and 1 for each class: {command} makes a table of images of it"]
    if IMAGE_COLUMN not in missing:
        return [find_label_remedy(header)]
    remedy, is_whole = find_image_remedy(table, command, wanted, label_column)
    return [remedy] if is_whole or label_column not in missing else [remedy, find_label_remedy(header)]


def is_image_path(text: str) -> bool:
    """Tells whether a text ends as images do."""
    return text.strip(MARKS_AROUND).lower().endswith(IMAGE_SUFFIXES)


def find_spelling(name: str, missing: Sequence[str]) -> str:
    """Returns what to do about a column that is called nearly as a missing one; empty where it is not."""
    plain = name.strip(MARKS_AROUND)
    if plain not in missing and clean_label(name) in map(clean_label, missing):
        return f"has invisible characters or accents encoded otherwise: write {clean_label(name)}"
    if plain in missing:
        return f"has {'blanks' if name.strip() == plain else 'quotation marks'} around it: write {plain}"
    return next((f"has other capitals: write {one}" for one in missing if plain.casefold() == one.casefold()), "")


def find_class_columns(table: pd.DataFrame) -> list[str]:
    """Returns the columns of 0 and 1 where a table has one for each class: at least two, and one more column at most.

    A column without a name, which pandas names itself, is not counted.
    """
    columns = [name for name in table.columns if name and not re.fullmatch(UNNAMED, name)]
    found = [name for name in columns if is_binary(table[name])]
    return found if len(found) >= 2 and len(columns) - len(found) == 1 else []


def is_binary(column: pd.Series) -> bool:
    """Tells whether a column of texts holds 0 and 1 alone, in any spelling of `TRUE_WORDS` and `FALSE_WORDS`."""
    return {*column.str.strip().unique()} <= TRUE_WORDS | FALSE_WORDS


def find_image_remedy(table: pd.DataFrame, command: str, wanted: str, label_column: str) -> tuple[str, bool]:
    """Returns what to do about a table without a column `path`, and whether that is all that there is to do."""
    start, columns = table.head(SAMPLED_ROWS), [name for name in table.columns if name != label_column]
    named = [name for name in columns if 2 * sum(map(is_image_path, start[name])) > len(start)]
    alike = [name for name in columns if re.sub(r"[\W\d_]", "", name.casefold()) in IMAGE_WORDS]
    if named:
        return f"Rename the column {named[0]!r} to {IMAGE_COLUMN}", False
    if alike and len(start):
        return f"The column {alike[0]!r} holds names without endings: {command} makes a table of images of it", True
    near = [repr(name) for name in difflib.get_close_matches(IMAGE_COLUMN, columns, 1)]
    column = f"the column {near[0]}" if near else "the column with the images"
    return f"Rename {column} to {IMAGE_COLUMN}, or put the line {wanted} in front where there is no header", False


def find_label_remedy(header: Sequence[str]) -> str:
    """Returns what to do about a table without the column of labels."""
    columns = [name for name in header if name != IMAGE_COLUMN]
    alike = [name for name in columns if re.sub(r"[\W\d_]", "", name.casefold()) in LABEL_WORDS]
    alike += columns if len(columns) == 1 else []
    return f"Set csv_label_column to {alike[0]!r}" if alike else "Set csv_label_column accordingly"


def find_meant(path: str) -> str:
    """Returns the path of the file or folder that a path means which does not exist; empty if there is none."""
    if not path or "\0" in path or is_url(path) or os.path.exists(path):
        return ""
    meant = _respell(path)[0]
    drive = DRIVE.search(meant) if os.sep == "/" else None
    meant = (drive and _leave_out_drive(meant, drive)) or meant
    folder, _ = _Disk().find_folder(os.path.dirname(meant))
    key = _make_key(os.path.basename(meant))
    names = [name for name in _list_sorted(folder) if _make_key(name) == key]
    found = os.path.join(folder, names[0]) if len(names) == 1 else meant
    return found if os.path.exists(found) else ""


class _Disk:
    """What folders hold; each is listed once."""

    def __init__(self) -> None:
        self._images: dict[str, dict[str, list[str]]] = {}
        self._folders: dict[str, tuple[str, list[str]]] = {}

    def find_images(self, folder: str, key: str) -> list[str]:
        """Returns the images in a folder, sorted, whose name has this key, with or without the ending."""
        if folder not in self._images:
            found = self._images[folder] = {}
            for name in _list_sorted(folder):
                if name.lower().endswith(IMAGE_SUFFIXES):
                    for one in (_make_key(name), _make_key(os.path.splitext(name)[0])):
                        found.setdefault(one, []).append(name)
        return self._images[folder].get(key, [])

    def find_folder(self, folder: str) -> tuple[str, list[str]]:
        """Returns the folder that a path means, and how its spelling differs; the path itself if there is none."""
        if folder not in self._folders:
            above, name = os.path.split(folder)
            if os.path.isdir(folder or os.curdir) or not name:
                return folder, []
            meant, steps = self.find_folder(above)
            names = [one for one in _list_sorted(meant) if _make_key(one) == _make_key(name)]
            names = [name] if name in names else names
            path, differs = os.path.join(meant, *names), names != [name]
            if len(names) == 1 and os.path.isdir(path):
                self._folders[folder] = path, steps + ([_tell_difference(name, names)] if differs else [])
            else:
                self._folders[folder] = folder, []
        return self._folders[folder]


def explain_missing(files: Iterable[str]) -> dict[str, str]:
    """Finds the files that are meant by names of files that do not exist.

    Each folder is listed once, and only those that should hold such a file.

    Args:
        files: that do not exist.

    Returns:
        What is wrong with a name and what to do, of each for which that can be told.
    """
    disk, found = _Disk(), {}
    for file in files:
        if not is_url(file) and "\0" not in file and (reason := _explain(file, disk)):
            found[file] = f"does not exist{reason}"
    return found


def _explain(file: str, disk: _Disk) -> str:
    meant, steps = _respell(file)
    drive = DRIVE.search(meant) if os.sep == "/" else None
    if drive and (found := _leave_out_drive(meant, drive)):
        meant = found
        steps.append(f"its path here has no {drive[1]}")
    if not steps or not os.path.isfile(meant):
        folder, differences = disk.find_folder(os.path.dirname(meant))
        name = os.path.basename(meant)
        if not differences or not os.path.isfile(os.path.join(folder, name)):
            names = disk.find_images(folder, _make_key(name))
            other = not names and disk.find_images(folder, _make_key(os.path.splitext(name)[0]))
            if not names and not (other and name.lower().endswith(IMAGE_SUFFIXES)):
                return f": {drive[1]} is a drive of Windows. Write paths below image_directory" if drive else ""
            differences = [*differences, _tell_difference(name, names or other)]
            name = (names or other)[0]
        steps += differences
        meant = os.path.join(folder, name)
    return f", but {show_text(os.path.normpath(meant))} does: {', '.join(dict.fromkeys(steps))}"


def _respell(file: str) -> tuple[str, list[str]]:
    """Returns a path with the separators, the home folder and without the marks that are foreign here, and why."""
    meant, steps = file, []
    if "\\" in meant and os.sep != "\\":
        meant = meant.replace("\\", "/")
        steps.append("write / for \\")
    plain = (
        "/".join(part.strip(MARKS_AROUND) for part in meant.split("/")) if os.sep == "/" else meant.strip(MARKS_AROUND)
    )
    if plain != meant:
        is_blank = plain == "/".join(part.strip() for part in meant.split("/"))
        meant = plain
        steps.append(f"remove the {'blanks' if is_blank else 'quotation marks'} around it")
    if home := HOME.search(meant):
        meant = os.path.expanduser(meant[home.start() :])
        steps.append("write the home folder for ~")
    return meant, steps


def _leave_out_drive(path: str, drive: re.Match[str]) -> str:
    """Returns the file that a path with a drive of Windows means: under WSL's mount, or below here by its end."""
    beginning, parts = path[: drive.start()], path[drive.end() :].split("/")
    mounted = os.path.join("/mnt", drive[1][0].lower(), *parts)
    ends = [os.path.join(*parts[start:]) for start in range(len(parts))]
    tried = [mounted, *(os.path.join(folder, end) for end in ends for folder in dict.fromkeys((beginning, "")))]
    return next((one for one in tried if os.path.isfile(one)), "")


def _tell_difference(name: str, names: list[str]) -> str:
    """Returns what to do about a name that stands for the first of some files, or for any of them."""
    if len(names) > 1:
        return f"write which of {len(names)} files it is"
    if unicodedata.normalize("NFC", names[0]) == unicodedata.normalize("NFC", name):
        return "its accents are encoded otherwise (NFC or NFD)"
    if clean_label(names[0]) == clean_label(name):
        return f"'{show_difference(name)}' and '{show_difference(names[0])}' differ by invisible characters"
    if _make_key(names[0]) == _make_key(name):
        return "its capitals differ"
    return ENDING_REMEDY if _make_key(os.path.splitext(names[0])[0]) == _make_key(name) else "its ending differs"


def _make_key(name: str) -> str:
    """Returns what names have in common that people take for the same."""
    return clean_label(name).casefold()


def _list_sorted(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or os.curdir))
    except OSError:
        return []
