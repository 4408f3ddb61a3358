"""What several scripts share: tables and labels, class weights, seeds, GPU set-up, files, saving and loading models.

TensorFlow, Keras and pandas are imported inside the functions that need them, so that the scripts start at once.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import hashlib
import io
import json
import math
import os
import posixpath
import queue
import re
import select
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from configs import LARGEST_JSON_FILE, MAX_IMAGE_PIXELS, Configs, UserError

if TYPE_CHECKING:
    import fsspec
    import h5py
    import keras
    import pandas as pd
    import PIL.Image
    import tensorflow as tf

    from finetune.metrics import Decision
    from generator import AugmentedImageSequence, Shares

IMAGE_COLUMN = "path"
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LABEL_SEPARATOR = "$"
MODEL_SUFFIXES = (".keras", ".h5", ".hdf5")
LAYERS_MEMBER = "config.json"
WEIGHTS_MEMBER = "model.weights.h5"
# What holds program code in a model file, by the name of its class there.
CODE_LAYERS = {"Lambda": "Lambda layer", "__lambda__": "Python lambda"}
CODE_LAYERS |= {"TFSMLayer": "TFSMLayer", "TorchModuleWrapper": "TorchModuleWrapper"}
# Of compressed models. Numbers in a weight: fewer take less than the file's note of it, so they stay exact; and as many
# are worth the time that unpacking takes. In int8, fewer numbers than this save too little beside their scale.
WEIGHTS_DTYPES = ("float32", "float16", "int8")
SMALLEST_ROUNDED = 64
PACKED_FROM = 100_000
FEWEST_PER_SCALE = 16
# How compress_weights.py names what it makes of model.keras, by kind and precision; the longest that fits counts.
ARTEFACT_ENDINGS = {("weights", dtype): ("_compressed", ".h5") for dtype in WEIGHTS_DTYPES}
ARTEFACT_ENDINGS |= {("tflite", "float32"): ("", ".tflite"), ("tflite", "dynamic"): ("_dynamic", ".tflite")}
ARTEFACT_ENDINGS |= {("tflite", "int8"): ("_int8", ".tflite")}
ARTEFACT_ENDINGS |= {("onnx", "float32"): ("", ".onnx"), ("saved_model", "float32"): ("_saved_model", "")}
# Marks an artefact that costs too much accuracy, in front of its suffix.
REJECTED = ".rejected"
GRAPH_FILE = "saved_model.pb"
# Ops with a state that do no more than read a model's own weights, or call other functions that are looked at too.
READING_OPS = {"VarHandleOp", "ReadVariableOp", "DisableCopyOnRead", "StatefulPartitionedCall"}
HARMLESS_OBJECTS = {"user_object", "function", "bare_concrete_function", "variable", "constant", "captured_tensor"}
# Only exports need these; what works with the versions in requirements.txt.
OPTIONAL_PACKAGES = {"tf2onnx": "tf2onnx>=1.17,<2", "onnxruntime": "onnxruntime>=1.20,<2"}
LONGEST_LIST = 5
TEMPORARY_PREFIX = ".tmp-"
DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


# Files


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """Yields the name of a temporary file or folder, which takes the place of `path` once it is whole and on the disk.

    It has the same name in a temporary folder beside `path`: some writers tell the format by the ending. The
    folder's name begins with this process's number, so that what a killed process leaves can be told.

    Raises:
        UserError: the folder cannot be made or written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary_folder = os.path.join(folder, f"{TEMPORARY_PREFIX}{os.getpid()}-{name}")
    temporary = os.path.join(temporary_folder, name)
    try:
        os.makedirs(temporary_folder, exist_ok=True)
        yield temporary
        for written in list_files(temporary):
            with open(written, "r+b") as file:
                os.fsync(file.fileno())
        if os.path.isdir(temporary) and os.path.isdir(path):
            # A folder takes no other one's place.
            os.replace(path, f"{temporary}.before")
        os.replace(temporary, path)
        sync_folder(folder)
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}. Free the space or choose another path."
        ) from error
    finally:
        shutil.rmtree(temporary_folder, ignore_errors=True)


def list_files(path: str) -> list[str]:
    """Returns the files of a folder and of the folders in it, sorted, or the file that `path` is."""
    if not os.path.isdir(path):
        return [path]
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)


def sync_folder(folder: str) -> None:
    """Brings a folder's list of names to the disk, where the system has that (Windows has not)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def write_json(path: str, content: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: str, table: pd.DataFrame) -> None:
    """Writes a table as CSV, without its index, atomically."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8")


def walk_visible(folder_path: str) -> Iterator[str]:
    """Yields the files below a folder; hidden files and folders are left out.

    Raises:
        UserError: a name is no text, so that a CSV file cannot hold it.
    """
    for folder, subfolders, files in os.walk(folder_path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            path = os.path.join(folder, file)
            check_file_name(path)
            if not file.startswith("."):
                yield path


def check_file_name(path: str) -> None:
    """Raises UserError where a path is no text, so that a CSV file cannot hold it."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The file name {path!a} is not UTF-8. Rename the file.") from error


# Images, on the disk and in stores


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# What fsspec needs beside itself for a protocol; of the others its own words tell.
STORE_PACKAGES = dict.fromkeys(("s3", "s3a"), "s3fs") | dict.fromkeys(("gs", "gcs"), "gcsfs")
STORE_PACKAGES |= dict.fromkeys(("abfs", "abfss", "az"), "adlfs") | dict.fromkeys(("http", "https"), "aiohttp")
# What stores call that which changes with an object's bytes, in small letters and without what joins words.
VERSION_FIELDS = frozenset({"size", "etag", "md5hash", "contentmd5", "crc32c", "checksum", "digest", "generation"})
VERSION_FIELDS |= {"versionid", "sha", "blobid", "mtime", "modified", "modify", "lastmodified", "updated", "created"}
# Bytes: holds most headers and many an image, and takes a store hardly longer than one byte.
FIRST_PART = 2**16
# Threads that ask stores: waiting for an answer takes no core.
STORE_THREADS = 16


def is_url(path: str) -> bool:
    """Tells whether an image path is a URL, which fsspec reads; a Windows drive, of one letter, is none."""
    return URL.match(path) is not None


def join_path(directory: str, path: str) -> str:
    """Puts `image_directory`, a folder or a URL, in front of an image path that is neither absolute nor a URL."""
    if is_url(path):
        return path
    if not is_url(directory) or os.path.isabs(path):
        return os.path.join(directory, path)
    protocol, place = directory.split("://", 1)
    # Stores take "." and ".." for names of folders.
    return f"{protocol}://{posixpath.normpath(posixpath.join(place, path.replace(os.sep, '/')))}"


def read_bytes(path: str) -> np.ndarray:
    """Reads the whole of an image file, or of the object that a URL names.

    Returns:
        uint8 `(bytes,)`.

    Raises:
        OSError: the file cannot be read.
        BadImage: there is no such object, or the store does not give it.
        UserError: fsspec needs another package for the URL.
    """
    if is_url(path):
        return np.frombuffer(read_url(path), np.uint8)
    # A pipe or a device has no end.
    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return np.fromfile(path, np.uint8)


def read_url(url: str) -> bytes:
    """Reads the object that a URL names; raises as `read_bytes` does."""
    with _telling_store_faults(url):
        store, name = _find_store(url)
        return store.cat_file(name)


def open_url(url: str) -> BinaryIO:
    """Opens the object that a URL names as a file; what is not read of a large one is not fetched, where that can be.

    Raises:
        BadImage: there is no such object, or the store does not give it; while it is read as well.
        UserError: fsspec needs another package for the URL.
    """
    with _telling_store_faults(url):
        store, name = _find_store(url)
        size = _ask_store(store, name).get("size")
        # Some servers do not tell the size.
        if size is None:
            return io.BytesIO(store.cat_file(name))

    def fetch(start: int, end: int) -> bytes:
        with _telling_store_faults(url):
            return store.cat_file(name, start=start, end=end)

    return io.BufferedReader(PartlyFetched(fetch, size))


def read_version(url: str) -> str:
    """Returns what a store tells of an object, without sending it, that changes with its bytes: size, hashes, times.

    Raises:
        BadImage: there is no such object, or the store does not tell.
        UserError: fsspec needs another package for the URL.
    """
    with _telling_store_faults(url):
        told = _ask_store(*_find_store(url))
    fields = {re.sub(r"[ _-]", "", name).lower(): value for name, value in told.items()}
    return json.dumps({name: str(fields[name]) for name in sorted(fields.keys() & VERSION_FIELDS)})


class PartlyFetched(io.RawIOBase):
    """A file of which only the parts that are read are fetched, each once, and each twice as large as the one before.

    Args:
        fetch: returns the bytes from a start to an end, or all of them where it cannot tell parts.
        size: bytes of the file.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        self._size = size
        self._position = 0
        self._parts: list[tuple[int, bytes]] = []

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position, and returns it."""
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        self._position = max(0, origins[whence] + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Reads into a buffer, and returns how many bytes: 0 at the end, and else at least one.

        Raises:
            BadImage: the file is not as long as it was to be.
        """
        part = self._read_part(len(buffer))[: len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def readall(self) -> bytes:
        """Returns the rest of the file, which is fetched at once; raises as `readinto` does."""
        parts = []
        while part := self._read_part(self._size):
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)

    def _read_part(self, wanted: int) -> bytes:
        position = self._position
        if position >= self._size:
            return b""
        for start, part in self._parts:
            if start <= position < start + len(part):
                return part[position - start :]
        end = min(self._size, position + max(wanted, FIRST_PART << len(self._parts)))
        part = self._fetch(position, end)
        if len(part) == self._size:
            self._parts = [(0, part)]
            return part[position:]
        if len(part) != end - position:
            raise BadImage("unreachable", "is out of reach: it changed while it was read")
        self._parts.append((position, part))
        return part


def _find_store(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns what reads a URL, and the object's name there; raises anything."""
    import fsspec.core
    from fsspec.implementations.local import LocalFileSystem

    if "::" in url:
        # The URLs behind it would tell fsspec how to read the first; some of what they name can hold programs.
        raise ValueError("URLs joined by '::' are not read")
    store, name = fsspec.core.url_to_fs(url)
    # A pipe or a device has no end.
    if isinstance(store, LocalFileSystem) and not os.path.isfile(name):
        raise FileNotFoundError(name)
    return store, name


def _ask_store(store: fsspec.AbstractFileSystem, name: str) -> dict[str, Any]:
    """Returns what a store tells of an object; raises anything, FileNotFoundError for a folder."""
    try:
        told = store.info(name)
    except FileNotFoundError:
        # fsspec's own reader of web pages says so whatever is the matter; asking for a byte brings the reason.
        store.cat_file(name, start=0, end=1)
        raise
    if told["type"] == "directory":
        raise FileNotFoundError(name)
    return told


@contextlib.contextmanager
def _telling_store_faults(url: str) -> Iterator[None]:
    try:
        yield
    except (BadImage, UserError):
        raise
    except ImportError as error:
        package = STORE_PACKAGES.get(url.split("://")[0])
        remedy = f"Run pip install {package}" if package else _shorten(str(error)).rstrip(".")
        raise UserError(f"{show_text(url)} needs a package that is not installed. {remedy}.") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadImage("missing", "does not exist") from error
    except Exception as error:
        # Each store has errors of its own, which are not those of Python: all of it is the store's answer.
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
        raise BadImage("unreachable", f"is out of reach: {_shorten(reason) or type(error).__name__}") from error


# Tables and labels


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


def parse_table(csv_path: str, label_column: str) -> pd.DataFrame:
    """Reads a CSV file as `read_table` does, empty paths and labels included.

    Raises:
        UserError: the file is missing, empty or no CSV, or lacks a column or rows.
    """
    import pandas as pd

    try:
        table = pd.read_csv(csv_path, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"Cannot read the CSV file {csv_path}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{csv_path} is not a UTF-8 CSV file: {describe_encoding(csv_path)}. Save it as UTF-8."
        ) from error
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{csv_path} is empty. Expected the columns {IMAGE_COLUMN} and {label_column}.") from error
    except ValueError as error:
        raise UserError(f"{csv_path} is not a UTF-8 CSV file: {str(error).strip()}. Save it as one.") from error
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(f"{csv_path} has rows with more fields than its header. Quote the fields that hold a comma.")
    blank = (table == "").all(axis=1).to_numpy()
    table = table.iloc[: len(table) - int(np.argmin(blank[::-1])) if not blank.all() else 0]
    for column, remedy in ((IMAGE_COLUMN, "Rename the column with the images"), (label_column, "Set csv_label_column")):
        if column not in table.columns:
            columns = ", ".join(table.columns)
            other = next((name for mark, name in DELIMITERS.items() if mark in columns and len(table.columns) == 1), "")
            remedy = (
                f"Its fields are separated by {other}: separate them by commas" if other else f"{remedy} accordingly"
            )
            raise UserError(f"{csv_path} has no column '{column}'. Its columns: {columns}. {remedy}.")
    if table.empty:
        raise UserError(f"{csv_path} has no rows. Expected one row an image, with {IMAGE_COLUMN} and {label_column}.")
    return table


def describe_encoding(csv_path: str) -> str:
    """Returns what a text file that is not UTF-8 may be, with the line of its first foreign byte."""
    with open(csv_path, "rb") as file:
        content = file.read()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "it is UTF-16"
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
    if classes is not None and set(classes) != set(found):
        missing, surplus = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
        faults = [f"it lacks {join_names(missing)}"] * bool(missing)
        faults += [f"{train_csv} has no image of {join_names(surplus)}"] * bool(surplus)
        raise UserError(f"classes does not match {train_csv}: {'; '.join(faults)}. Correct it, or set it to none.")
    if len(found) < (1 if multi_label else 2):
        raise UserError(f"{train_csv} holds one class, {join_names(found)}. Expected at least two to tell apart.")
    return list(classes) if classes is not None else found


def join_names(names: Sequence[Any]) -> str:
    """Returns the first few names joined by commas, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:LONGEST_LIST])
    return shown + (f" and {len(names) - LONGEST_LIST} more" if len(names) > LONGEST_LIST else "")


def encode_labels(labels: Sequence[str], class_names: Sequence[str], multi_label: bool, csv_path: str) -> np.ndarray:
    """Turns labels into what the model is trained on.

    Returns:
        int32 `(images,)`, positions in `class_names`; multi-label: uint8 `(images, classes)` of zeros and ones.

    Raises:
        UserError: a label that is none of `class_names`, with its row in `csv_path`.
    """
    import pandas as pd

    positions = {name: position for position, name in enumerate(class_names)}
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


# Checking data


class Finding(NamedTuple):
    """One thing that the data check has found; the fields are the columns of data_report.csv.

    `row` is a line number in the CSV file, of which the header is line 1, None where a whole file is meant; `copy_of`
    the line of the same file that holds the image of which this one is a copy.
    """

    kind: str
    set_name: str
    csv_path: str
    row: int | None
    path: str
    detail: str
    copy_of: int | None = None


class Kind(NamedTuple):
    """How much a finding matters, `error`, `warning` or `note`, and what it means."""

    severity: str
    meaning: str


KINDS = {
    "missing": Kind("error", "There is no such file. Correct image_directory or the paths, or drop the rows."),
    "unreachable": Kind("error", "The store does not give it. Check address, network and permissions, or drop it."),
    "empty": Kind("error", "The file has no bytes. Copy it again, or drop the row."),
    "truncated": Kind("error", "The end of the file is missing. Copy it again, or drop the row."),
    "unreadable": Kind("error", "The image cannot be decoded. Replace it, or drop the row."),
    "not_an_image": Kind("error", "The file is no image, whatever its name says. Replace it, or drop the row."),
    "too_many_pixels": Kind("error", "Decoding it would fill the memory. Shrink it, or raise max_image_pixels."),
    "empty_path": Kind("error", "The row names no image. Fill it in, or drop the row."),
    "empty_label": Kind("error", "The image has no label. Fill it in, or drop the row."),
    "empty_label_part": Kind("error", "A '$' stands without a class name beside it. Correct the label."),
    "unknown_class": Kind("error", "The training set has no image of the class. Correct the label, or drop the row."),
    "white_space_variant": Kind("error", "Two class names differ by white space alone. Remove it from the label."),
    "duplicate_with_other_label": Kind("error", "The same image has two labels. Keep the right row."),
    "duplicate_across_sets": Kind(
        "error", "The same image is in two sets: drop one, or allow it by --allow_duplicates True."
    ),
    "near_duplicate_across_sets": Kind(
        "error", "Nearly the same image is in two sets: drop one, or allow it by --allow_duplicates True."
    ),
    "allowed_duplicate": Kind("warning", "The same image, or nearly, is in two sets: figures will be optimistic."),
    "near_duplicate_with_other_label": Kind("warning", "Nearly the same image has two labels. Look at both."),
    "white_space": Kind("warning", "White space at the ends of a class name is a part of the name."),
    "case_variant": Kind("warning", "Class names that differ by case or accents' encoding alone are two classes."),
    "doubled_label": Kind("warning", "A label names a class twice; it counts once."),
    "duplicate_path": Kind("warning", "The table names the same file twice; it counts twice."),
    "duplicate": Kind("warning", "The same image is twice in a set; it counts twice."),
    "near_duplicate": Kind("warning", "Nearly the same image is twice in a set."),
    "class_of_one_image": Kind("warning", "One image is hardly enough to learn a class from."),
    "wrong_extension": Kind("warning", "The file's content is not what its ending says; it is read by its content."),
    "exif_ignored": Kind("warning", "The EXIF rotation of this format is not applied. Save the image upright."),
    "small": Kind("warning", "The image is smaller than image_target_size and will be enlarged."),
    "unusual_size": Kind("warning", "The image's size or shape is far from that of the rest."),
    "rotated": Kind("note", "turned upright by EXIF"),
    "animated": Kind("note", "animated or of several pages, of which the first is taken"),
    "deep": Kind("note", "of 16 bits, reduced to 8"),
    "cmyk": Kind("note", "CMYK, converted to RGB"),
    "palette": Kind("note", "with a palette, converted to RGB"),
    "alpha": Kind("note", "with transparency, which is dropped"),
}
IMAGE_FAULTS = ("missing", "unreachable", "empty", "truncated", "unreadable", "not_an_image", "too_many_pixels")
REPORT_FILE = "data_report.csv"

FORMAT_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
}
# The last bytes of a whole file. A JPEG's compressed pixels never hold its two.
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
# Where the header has the file's length, what is to be added to it.
LENGTH_FIELDS = {b"RIFF": (4, 8), b"BM": (2, 0)}
FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")
# What Pillow's readers let through on damaged files, beside its own errors.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, RuntimeError)
PILLOW_ERRORS += (struct.error, zlib.error, MemoryError, AttributeError)
TAIL_BYTES = 4096
# Deflate, the densest of the common packings, makes 1,032 bytes of one. A header that names more is damaged, or made
# to fill the memory; small pictures of one colour may be denser in other formats.
MOST_BITS_A_BYTE, ALWAYS_POSSIBLE_PIXELS = 8 * 1032, 2**24
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Bits that may differ between copies of one photo, of 64 of the difference hash and of 256 of the DCT's. On photos of
# flowers and of street scenes they found 97 % of copies cropped by 4 % a side, and no pair that is none.
NEAR_DISTANCES = 14, 84
HASHED_SIDE = 32
SIZE_FACTOR, SHAPE_FACTOR, FEWEST_SIZES = 4, 3, 10


class BadImage(Exception):
    """An image that cannot be used: a key of `KINDS`, and what was found."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class Inspection(NamedTuple):
    """What is known of an image file: its fault, if any, what is unusual, its sides, its length and last bytes."""

    fault: tuple[str, str] | None
    remarks: list[tuple[str, str]]
    sides: tuple[int, int] = (0, 0)
    signature: tuple[int, int] = (0, 0)
    near_hash: bytes | None = None


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


def check_data(
    tables: Sequence[ImageTable],
    multi_label: bool,
    mode: str = "quick",
    image_size: Sequence[int] = (1, 1),
    max_pixels: int = MAX_IMAGE_PIXELS,
    workers: int = 4,
    allow_duplicates: bool = False,
) -> list[Finding]:
    """Looks for everything in tables and their images that makes training fail, or wrong.

    Args:
        tables: of the sets, the training set first.
        multi_label: whether a label may hold several class names.
        mode: `quick` reads headers, and whole files only where two may be the same; `full` decodes every image, and
            also finds near copies.
        image_size: `(height, width)` that images are resized to.
        max_pixels: what an image may have.
        workers: threads.
        allow_duplicates: an image in two sets is a warning.

    Returns:
        The findings in the order of `KINDS`.
    """
    findings = [finding for table in tables for finding in check_labels(table, multi_label)]
    findings += find_unknown_classes(tables, multi_label)
    files = list(dict.fromkeys(file for table in tables for file in table.files if file))
    known = dict(zip(files, inspect_images(files, mode == "full", max_pixels, workers), strict=True))
    unusual = find_unusual_sizes(known, image_size)
    for table in tables:
        for row, (path, file) in enumerate(zip(table.paths, table.files, strict=True), start=2):
            if file and (known[file].fault or known[file].remarks or file in unusual):
                found = [known[file].fault] if known[file].fault else [*known[file].remarks, *unusual.get(file, [])]
                findings += [Finding(kind, table.set_name, table.csv_path, row, path, text) for kind, text in found]
    findings += find_copies(tables, known, multi_label, allow_duplicates)
    order = {kind: position for position, kind in enumerate(KINDS)}
    return sorted(findings, key=lambda finding: order[finding.kind])


# Checking labels


def check_labels(table: ImageTable, multi_label: bool) -> list[Finding]:
    """Finds empty, doubled and suspicious labels in one table."""
    rows_of = defaultdict(list)
    for row, label in enumerate(table.labels, start=2):
        rows_of[label].append(row)
    found, names, first_row = [], Counter(), {}

    def add(kind: str, row: int, detail: str) -> None:
        found.append(Finding(kind, table.set_name, table.csv_path, row, table.paths[row - 2], detail))

    for row, file in enumerate(table.files, start=2):
        if not file:
            add("empty_path", row, "the path is empty")
    for label, rows in rows_of.items():
        parts = split_label(label, multi_label)
        for name in set(parts):
            names[name] += len(rows)
            first_row[name] = min(rows[0], first_row.get(name, rows[0]))
        faults = [("empty_label", "the label is empty")] * (not label.strip())
        if label.strip() and not all(part.strip() for part in parts):
            faults.append(("empty_label_part", f"the label {label!r}"))
        if len(set(parts)) < len(parts):
            faults.append(("doubled_label", f"the label {label!r}"))
        for kind, detail in faults:
            for row in rows:
                add(kind, row, detail)
    named = {name: count for name, count in names.items() if name.strip()}
    for name, kind, detail in compare_names(named):
        for label, rows in rows_of.items():
            if name in split_label(label, multi_label):
                for row in rows:
                    add(kind, row, detail)
    if table.set_name in ("", "training"):
        for name in sorted(name for name, count in named.items() if count == 1):
            add("class_of_one_image", first_row[name], f"the class {name!r}")
    return found


def compare_names(counts: dict[str, int]) -> list[tuple[str, str, str]]:
    """Finds class names that are variants of another one, or have white space at their ends.

    Args:
        counts: images of each class name.

    Returns:
        For each, the name, a key of `KINDS` and what was found.
    """
    found, variants = [], defaultdict(list)
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        plain = " ".join(name.split())
        if plain != name and plain in counts:
            found.append((name, "white_space_variant", f"{name!r} beside {plain!r}"))
        elif name != name.strip():
            found.append((name, "white_space", f"the label {name!r}"))
        if plain == name or plain not in counts:
            variants[unicodedata.normalize("NFKC", plain).casefold()].append(name)
    for common, *others in variants.values():
        for name in others:
            text = f"{name!r} ({counts[name]} images) beside {common!r} ({counts[common]})"
            found.append((name, "case_variant", text))
    return found


def find_unknown_classes(tables: Sequence[ImageTable], multi_label: bool) -> list[Finding]:
    """Finds the labels of other sets that the training set has no image of."""
    training = next((table for table in tables if table.set_name == "training"), None)
    if training is None:
        return []
    known, found = set(find_class_names(training.labels, multi_label)), []
    for table in tables:
        unknown = {label: sorted(set(split_label(label, multi_label)) - known) for label in set(table.labels)}
        for row, label in enumerate(table.labels, start=2):
            if unknown[label] and label.strip():
                names = join_names([repr(name) for name in unknown[label]])
                text = f"the label {names} is none of the {len(known)} classes of the training set"
                path = table.paths[row - 2]
                found.append(Finding("unknown_class", table.set_name, table.csv_path, row, path, text))
    return found


# Checking image files


@functools.cache
def import_pillow() -> Any:
    """Returns Pillow's module `Image`; `read_header` sees to its limit of pixels."""
    import warnings

    import PIL.Image

    # Pillow's readers remark on tags that they skip.
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
    return PIL.Image


def read_header(file: BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS) -> PIL.Image.Image | None:
    """Reads the header of an image file with Pillow, which decodes no pixel.

    Args:
        file: the open file, or its bytes.
        max_pixels: what the image may have.

    Returns:
        The image, not loaded; None where Pillow does not know the format.

    Raises:
        BadImage: the header is damaged, or names too many pixels.
    """
    pillow = import_pillow()
    pillow.MAX_IMAGE_PIXELS = max_pixels
    start, size = file.read(26), file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        image = pillow.open(file)
        pixels = image.size[0] * image.size[1]
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        pixels = int(re.search(r"\d+", str(error))[0])
    except PILLOW_ERRORS as error:
        if start.startswith(FIRST_BYTES):
            raise BadImage("unreadable", "its header is damaged or cut short") from error
        return None
    if pixels > max_pixels:
        raise BadImage("too_many_pixels", f"it has {pixels:,} pixels, more than max_image_pixels ({max_pixels:,})")
    bits = start[24] * PNG_CHANNELS[start[25]] if image.format == "PNG" else 1
    if pixels * bits > size * MOST_BITS_A_BYTE and pixels > ALWAYS_POSSIBLE_PIXELS:
        raise BadImage("unreadable", f"its header names {pixels:,} pixels, which {size:,} bytes cannot hold")
    return image


def check_length(start: bytes, size: int) -> None:
    """Raises BadImage where a file of `size` bytes is shorter than its first 12 bytes say."""
    for name, (position, more) in LENGTH_FIELDS.items():
        if start.startswith(name) and int.from_bytes(start[position : position + 4], "little") + more > size:
            raise BadImage("truncated", "it is shorter than its header says")


def check_end(image: PIL.Image.Image, tail: bytes, file: BinaryIO) -> None:
    """Checks that a file has its end: from its last bytes, `tail`, where they suffice.

    Args:
        image: from `read_header`.
        tail: the last bytes of the file.
        file: open, for the rest of it.

    Raises:
        BadImage: the file is truncated.
    """
    mark = END_MARKS.get(image.format)
    if mark is None or tail.endswith(mark):
        return
    file.seek(0)
    data = file.read()
    if data.find(mark, find_scan(data)) < 0 and not decodes_strictly(data):
        raise BadImage("truncated", "its end is missing")


def find_scan(data: bytes) -> int:
    """Returns where a JPEG's compressed pixels begin: thumbnails before them have end marks of their own."""
    position = 2
    while data[:2] == b"\xff\xd8" and position + 4 <= len(data) and data[position] == 0xFF:
        if data[position + 1] == 0xDA:
            return position
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return 0


def decodes_strictly(data: bytes) -> bool:
    """Tells whether Pillow, which refuses what is cut short, decodes a file without an end mark."""
    try:
        import_pillow().open(io.BytesIO(data)).load()
    except PILLOW_ERRORS:
        return False
    return True


def inspect_images(files: Sequence[str], decode: bool, max_pixels: int, workers: int) -> list[Inspection]:
    """Inspects image files in threads, with a progress bar where it takes longer than a second."""
    from tqdm import tqdm

    size = 32
    if any(map(is_url, files)):
        size, workers = 1, max(workers, STORE_THREADS)
    parts = [files[start : start + size] for start in range(0, len(files), size)]

    def inspect(part: Sequence[str]) -> list[Inspection]:
        return [inspect_image(file, decode, max_pixels) for file in part]

    found = []
    with (
        tqdm(total=len(files), unit="image", desc="Checking images", delay=1) as progress,
        ThreadPoolExecutor(max(workers, 1)) as pool,
    ):
        for part in pool.map(inspect, parts):
            found += part
            progress.update(len(part))
    return found


def inspect_image(path: str, decode: bool = False, max_pixels: int = MAX_IMAGE_PIXELS) -> Inspection:
    """Inspects an image file or URL: its header and its end, and its pixels where `decode` is set.

    Raises:
        UserError: fsspec needs another package for the URL.
    """
    # False for folders, devices and pipes as well, from which nothing is to be read.
    if not is_url(path) and not os.path.isfile(path):
        return Inspection(("missing", "does not exist"), [])
    try:
        with open_url(path) if is_url(path) else open(path, "rb") as file:
            return _inspect_open(path, io.BytesIO(file.read()) if decode else file, decode, max_pixels)
    except BadImage as error:
        return Inspection((error.kind, error.detail), [])
    except OSError as error:
        return Inspection(("unreadable", str(error.strerror or error)), [])


def _inspect_open(path: str, file: BinaryIO, decode: bool, max_pixels: int) -> Inspection:
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise BadImage("empty", "is empty")
    file.seek(0)
    start = file.read(32)
    file.seek(0)
    check_length(start, size)
    image = read_header(file, max_pixels)
    if image is None and not is_known_to_opencv(path, file):
        raise BadImage("not_an_image", "is no image that OpenCV reads")
    file.seek(max(size - TAIL_BYTES, 0))
    tail = file.read()
    remarks, sides = [], (0, 0)
    if image is not None:
        remarks, sides = list(find_remarks(path, image, start)), image.size
        check_end(image, tail, file)
    near_hash = hash_picture(file.getvalue(), start, sides) if decode else None
    return Inspection(None, remarks, sides, (size, zlib.crc32(tail)), near_hash)


def is_known_to_opencv(path: str, file: BinaryIO) -> bool:
    """Tells whether a file, open, or the object of a URL begins as one that OpenCV has a reader for."""
    import cv2

    if not is_url(path):
        return cv2.haveImageReader(path)
    # OpenCV looks at files alone.
    with tempfile.TemporaryDirectory() as folder:
        beginning = os.path.join(folder, "beginning")
        file.seek(0)
        with open(beginning, "wb") as copy:
            copy.write(file.read(TAIL_BYTES))
        return cv2.haveImageReader(beginning)


def find_remarks(path: str, image: PIL.Image.Image, start: bytes) -> Iterator[tuple[str, str]]:
    """Yields what is unusual about an image, from its header alone."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES and suffix not in FORMAT_SUFFIXES.get(image.format, (suffix,)):
        yield "wrong_extension", f"its content is {image.format}"
    if (orientation := find_orientation(image)) != 1:
        yield ("exif_ignored" if image.format == "WEBP" else "rotated"), f"EXIF orientation {orientation}"
    with contextlib.suppress(*PILLOW_ERRORS):
        # A file of one photo and its previews is no animation.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            yield "animated", "several frames or pages"
    if "16" in image.mode or (image.format == "PNG" and start[24:25] == b"\x10"):
        yield "deep", "16 bits a channel"
    if image.mode == "CMYK":
        yield "cmyk", "CMYK"
    if image.mode == "P" and image.format != "GIF":
        yield "palette", "palette"
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        yield "alpha", "alpha"


def find_orientation(image: PIL.Image.Image) -> int:
    """Returns the EXIF orientation of an image from its header, 1 to 8; 1 is upright, and where there is none."""
    orientation = 1
    with contextlib.suppress(*PILLOW_ERRORS):
        if image.format == "TIFF":
            orientation = image.tag_v2.get(0x0112, 1)
        elif "exif" in image.info:
            exif = import_pillow().Exif()
            exif.load(image.info["exif"])
            orientation = exif.get(0x0112, 1)
    return orientation if orientation in range(2, 9) else 1


def hash_picture(data: bytes, start: bytes, sides: tuple[int, int]) -> bytes | None:
    """Decodes an image and takes two perceptual hashes of ImageHash, whose bits stand for coarse shapes.

    A JPEG is decoded in grey and at a fraction of its size: all of its compressed pixels are read all the same.

    Args:
        data: of the file.
        start: its first bytes.
        sides: its width and height.

    Returns:
        40 bytes, the difference hash and the DCT's; None for a picture of one colour, which has no shapes.

    Raises:
        BadImage: it cannot be decoded.
    """
    import cv2
    import imagehash

    flags = {1: cv2.IMREAD_GRAYSCALE, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2}
    flags |= {4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
    is_jpeg = start.startswith(FIRST_BYTES[0])
    divisor = next(number for number in (8, 4, 2, 1) if number == 1 or (is_jpeg and min(sides) >= number * 40))
    picture = decode_animated_png(data)
    try:
        if picture is not None:
            picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        else:
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags[divisor])
    except cv2.error as error:
        raise BadImage("unreadable", f"OpenCV cannot decode it: {error.err}") from error
    if picture is None:
        raise BadImage("unreadable", "it is damaged, or of a kind that OpenCV does not read")
    picture = cv2.resize(picture, (HASHED_SIDE, HASHED_SIDE), interpolation=cv2.INTER_AREA)
    if picture.std() < 2:
        return None
    small = import_pillow().fromarray(picture)
    hashes = imagehash.dhash(small), imagehash.phash(small, hash_size=16, highfreq_factor=HASHED_SIDE // 16)
    return b"".join(np.packbits(found.hash).tobytes() for found in hashes)


def check_chunks(data: bytes) -> None:
    """Raises BadImage where a chunk of a PNG file is longer than the file: OpenCV would take that much memory."""
    position = 8
    while position + 8 <= len(data):
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        if position > len(data):
            raise BadImage("unreadable", "a part of it is longer than the file")
        if data.startswith(b"IEND", position - 8):
            return


def decode_animated_png(data: bytes | np.ndarray) -> np.ndarray | None:
    """Decodes the first picture of an animated PNG with Pillow: OpenCV 4.12 crashes where such a file is damaged.

    Returns:
        uint8 RGB `(height, width, 3)`, upright; None where the file is no animated PNG.

    Raises:
        BadImage: it cannot be decoded.
    """
    data = bytes(data) if bytes(data[:4]) == b"\x89PNG" else b""
    check_chunks(data)
    if b"acTL" not in data:
        return None
    import PIL.ImageOps

    try:
        image = PIL.ImageOps.exif_transpose(import_pillow().open(io.BytesIO(data)))
        return np.array(image.convert("RGBA").convert("RGB"))
    except PILLOW_ERRORS as error:
        raise BadImage("unreadable", "it is damaged") from error


def find_unusual_sizes(known: dict[str, Inspection], image_size: Sequence[int]) -> dict[str, list[tuple[str, str]]]:
    """Finds images that are smaller than the target, or whose size or shape is far from the median.

    Far is a mean side 4 times as long or as short, or sides' ratio 3 times as large or as small.

    Args:
        known: the inspected files.
        image_size: `(height, width)` that images are resized to.

    Returns:
        The kinds and details of each such file.
    """
    files = [file for file, inspection in known.items() if min(inspection.sides)]
    if not files:
        return {}
    sides = np.array([known[file].sides for file in files], float)
    logs = np.stack([np.log(sides).mean(axis=1), np.log(sides[:, 0] / sides[:, 1])], axis=1)
    distance = np.abs(logs - np.median(logs, axis=0))
    far = (distance > np.log([SIZE_FACTOR, SHAPE_FACTOR])).any(axis=1) & (len(files) >= FEWEST_SIZES)
    small = (sides < [image_size[1], image_size[0]]).any(axis=1)
    typical = np.median(sides, axis=0)
    found = defaultdict(list)
    for kind, rows, beside in (
        ("small", small, f"the target is {image_size[1]}x{image_size[0]}"),
        ("unusual_size", far, f"the median is {typical[0]:.0f}x{typical[1]:.0f}"),
    ):
        for row in np.flatnonzero(rows):
            found[files[row]].append((kind, f"{sides[row, 0]:.0f}x{sides[row, 1]:.0f}, {beside}"))
    return found


# Finding copies


class _Place(NamedTuple):
    table: ImageTable
    row: int

    @property
    def path(self) -> str:
        return self.table.paths[self.row - 2]

    def label(self, multi_label: bool) -> frozenset[str]:
        return frozenset(split_label(self.table.labels[self.row - 2], multi_label))


def find_copies(
    tables: Sequence[ImageTable], known: dict[str, Inspection], multi_label: bool, allow_duplicates: bool
) -> list[Finding]:
    """Finds images that are in the tables more than once, by path, content or looks.

    Args:
        tables: of the sets.
        known: the inspected files.
        multi_label: whether a label may hold several class names.
        allow_duplicates: an image in two sets is a warning.
    """
    content_of = group_by_content(known)
    first_place, repeated = {}, defaultdict(list)
    for table in tables:
        for row, file in enumerate(table.files, start=2):
            content = content_of.get(file)
            if content in first_place:
                repeated[content].append(_Place(table, row))
            elif content is not None:
                first_place[content] = table, row
    found = []
    for content, others in repeated.items():
        group = [_Place(*first_place[content]), *others]
        for position, place in enumerate(others, start=1):
            other = next((one for one in group[:position] if one.table is not place.table), group[0])
            found += compare_places(other, place, multi_label, allow_duplicates, None)
            if other is not group[0] and group[0].table is place.table:
                found += compare_places(group[0], place, multi_label, allow_duplicates, None)
    hashes = {content: known[content].near_hash for content in first_place if known[content].near_hash is not None}
    places = [_Place(*first_place[content]) for content in hashes]
    values = np.frombuffer(b"".join(hashes.values()), np.uint64).reshape(-1, 5)
    for first, second, distance in join_near(values, [place.table.set_name for place in places]):
        found += compare_places(places[first], places[second], multi_label, allow_duplicates, distance)
    return found


def compare_places(
    first: _Place, second: _Place, multi_label: bool, allow_duplicates: bool, distance: int | None
) -> list[Finding]:
    """Says what it means that two rows have the same image, or by `distance` bits of 256 nearly the same one."""
    across, near = first.table is not second.table, "near_" * (distance is not None)
    same_file = first.table.files[first.row - 2] == second.table.files[second.row - 2]
    kinds = []
    if across:
        kinds.append("allowed_duplicate" if allow_duplicates else f"{near}duplicate_across_sets")
    if first.label(multi_label) != second.label(multi_label):
        kinds.append(f"{near}duplicate_with_other_label")
    if not kinds:
        kinds.append("duplicate_path" if same_file else f"{near}duplicate")
    where = f"{first.table.csv_path}, row {first.row}" if across else f"row {first.row}"
    text = f"{'nearly ' * bool(near)}the same as {show_text(first.path)} ({where})"
    if kinds[-1].endswith("other_label"):
        labels = [place.table.labels[place.row - 2] for place in (second, first)]
        text += f", {labels[0]!r} here and {labels[1]!r} there"
    copy_of = None if across else first.row
    table = second.table
    return [Finding(kind, table.set_name, table.csv_path, second.row, second.path, text, copy_of) for kind in kinds]


def group_by_content(known: dict[str, Inspection]) -> dict[str, str]:
    """Returns for each sound file the first one with the same bytes; those that agree in length and end are read."""
    whole = {file: inspection.signature for file, inspection in known.items() if not inspection.fault}
    counts, first, content_of = Counter(whole.values()), {}, {}
    for file, signature in whole.items():
        content_of[file] = file if counts[signature] == 1 else first.setdefault(hash_file(file), file)
    return content_of


def hash_file(path: str) -> bytes | str:
    """Returns a digest of the bytes of a file or URL, or its name where it can no longer be read."""
    try:
        if is_url(path):
            return hashlib.sha256(read_url(path)).digest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, BadImage):
        return path


def join_near(hashes: np.ndarray, set_names: Sequence[str]) -> list[tuple[int, int, int]]:
    """Finds pairs of near hashes: those that join all which belong together, and each pair of two sets.

    The first 64 bits of every one are compared with those of every other, in blocks: 100,000 take seconds, and
    little memory.

    Args:
        hashes: uint64 `(images, 5)`, of `hash_picture`.
        set_names: of each.

    Returns:
        Positions of the earlier and the later image, and the bits of 256 that differ; at most two pairs an image.
    """
    joined, flagged, pairs = Groups(len(hashes)), set(), []
    first_words, block = np.ascontiguousarray(hashes[:, 0]), 256
    for start in range(0, len(hashes), block):
        near = np.bitwise_count(first_words[start : start + block, None] ^ first_words[start:]) <= NEAR_DISTANCES[0]
        firsts, seconds = np.nonzero(near) + np.array([[start]] * 2)
        firsts, seconds = firsts[seconds > firsts], seconds[seconds > firsts]
        distances = np.bitwise_count(hashes[firsts, 1:] ^ hashes[seconds, 1:]).sum(axis=1, dtype=int)
        for position in np.argsort(distances, kind="stable")[: (distances <= NEAR_DISTANCES[1]).sum()]:
            first, second = int(firsts[position]), int(seconds[position])
            across = set_names[first] != set_names[second]
            if joined.join(first, second) or (across and second not in flagged):
                pairs.append((first, second, int(distances[position])))
                flagged.update([second] * across)
    return pairs


class Groups:
    """Sets of things that belong together, by their positions."""

    def __init__(self, number: int) -> None:
        self._parents = list(range(number))

    def find(self, position: int) -> int:
        """Returns the position that stands for the group of this one."""
        while self._parents[position] != position:
            self._parents[position] = self._parents[self._parents[position]]
            position = self._parents[position]
        return position

    def join(self, first: int, second: int) -> bool:
        """Makes one group of two; returns whether they were two."""
        first, second = sorted((self.find(first), self.find(second)))
        self._parents[second] = first
        return first != second


# Reporting on data


def get_bad_rows(findings: Sequence[Finding]) -> dict[str, set[int]]:
    """Returns the line numbers of the images that cannot be used, by CSV file."""
    rows = defaultdict(set)
    for finding in findings:
        if finding.kind in IMAGE_FAULTS:
            rows[finding.csv_path].add(finding.row)
    return rows


def show_text(text: str) -> str:
    """Returns a text on one line: as it is, or with escapes where it holds what cannot be printed."""
    return text if text.isprintable() else ascii(text)


def format_findings(findings: Sequence[Finding], severities: Collection[str] = ("error", "warning", "note")) -> str:
    """Returns findings as text: a paragraph for each kind with its number and the first few, all notes in one line."""
    groups = defaultdict(list)
    for finding in findings:
        groups[finding.kind].append(finding)
    lines, notes = [], []
    for name, kind in KINDS.items():
        if not groups[name] or kind.severity not in severities:
            continue
        if kind.severity == "note":
            notes.append(f"{len(groups[name])} {kind.meaning}")
            continue
        lines.append(f"{kind.severity}, {name.replace('_', ' ')} ({len(groups[name])}): {kind.meaning}")
        for finding in groups[name][:LONGEST_LIST]:
            row = f", row {finding.row}" if finding.row else ""
            lines.append(f"  {finding.csv_path}{row}: {show_text(finding.path)} {show_text(finding.detail)}")
        lines += [f"  and {len(groups[name]) - LONGEST_LIST} more rows"] * (len(groups[name]) > LONGEST_LIST)
    lines += [f"Images that are decoded right: {'; '.join(notes)}."] * bool(notes)
    return "\n".join(lines)


def write_data_report(folder: str, findings: Sequence[Finding], is_more: bool = False) -> str:
    """Writes findings into data_report.csv in a folder, or adds them to it where `is_more` is set.

    Returns:
        Its path.
    """
    import pandas as pd

    path = os.path.join(folder, REPORT_FILE)
    rows = [(KINDS[finding.kind].severity, *finding) for finding in findings]
    table = pd.DataFrame(rows, columns=["severity", *Finding._fields]).astype({"row": "Int64", "copy_of": "Int64"})
    if is_more and os.path.isfile(path):
        table = pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False), table.astype(str).replace("<NA>", "")])
    write_csv(path, table)
    return path


def report_findings(
    findings: Sequence[Finding], folder: str, skip_bad_images: bool, writes_report: bool = True
) -> None:
    """Prints what the data check has found, and writes data_report.csv where that is anything.

    Args:
        findings: from `check_data`.
        folder: receives the report.
        skip_bad_images: images that cannot be used are left out, not errors.
        writes_report: False leaves the report to another process that finds the same.

    Raises:
        UserError: there are errors; the text lists them.
    """
    skipped = [finding for finding in findings if finding.kind in IMAGE_FAULTS and skip_bad_images]
    errors = [finding for finding in findings if KINDS[finding.kind].severity == "error" and finding not in skipped]
    if not findings and not os.path.exists(os.path.join(folder, REPORT_FILE)):
        return
    path = write_data_report(folder, findings) if writes_report else os.path.join(folder, REPORT_FILE)
    if text := format_findings([*skipped, *(one for one in findings if KINDS[one.kind].severity != "error")]):
        print(text)
    if skipped:
        print(f"Left out {len(skipped)} images that cannot be read; {path} lists them.")
    if errors:
        counts = Counter(KINDS[finding.kind].severity for finding in findings)
        raise UserError(
            f"The data check found errors: {counts['error'] - len(skipped)}, warnings: {counts['warning']}. "
            f"{path} lists them all.\n{format_findings(errors)}"
        )
    if any(KINDS[finding.kind].severity == "warning" for finding in findings):
        print(f"{path} lists everything that the data check found.")


def check_images(
    paths: Sequence[str],
    csv_path: str,
    max_pixels: int = MAX_IMAGE_PIXELS,
    workers: int = 4,
    skip_bad_images: bool = False,
) -> list[int]:
    """Checks that every path is a file that starts and ends as an image does; decoding waits until it is read.

    Returns:
        The line numbers of those that are not, where `skip_bad_images` is set; they are printed.

    Raises:
        UserError: names the first few files that are missing, empty or no images, with their rows.
    """
    inspections = inspect_images(paths, False, max_pixels, workers)
    faults = {row: inspection.fault[1] for row, inspection in enumerate(inspections, start=2) if inspection.fault}
    if not faults:
        return []
    shown = [f"row {row}: {paths[row - 2]} {detail}" for row, detail in list(faults.items())[:LONGEST_LIST]]
    more = f" (and {len(faults) - LONGEST_LIST} more rows)" if len(faults) > LONGEST_LIST else ""
    if skip_bad_images:
        print(f"{csv_path}: left out {len(faults)} images: {'; '.join(shown)}{more}.")
        return list(faults)
    raise UserError(f"{csv_path}: {'; '.join(shown)}{more}. Correct image_directory or the paths, or drop the rows.")


# Class weights


def get_class_weights(labels: np.ndarray, number_of_classes: int) -> dict[int, float]:
    """Weighs rare classes more in the loss, by the logarithm of their inverse frequency.

    A class with the mean number of images or more weighs 1, one with a fraction `f` of the mean `1 + ln(1 / f)`.

    Args:
        labels: int `(images,)`, class positions.
        number_of_classes: classes in total; one without images weighs 1.

    Returns:
        The weight, never under 1, of each class position.
    """
    counts = np.bincount(labels, minlength=number_of_classes)
    weights = damped_inverse(counts, np.full(number_of_classes, len(labels) / number_of_classes))
    return dict(enumerate(weights.tolist()))


def get_multilabel_class_weights(
    labels: np.ndarray, positive_weights_multiply: float = 1.0, balance: bool = True
) -> np.ndarray:
    """Weighs the rarer of present and absent more in each class's binary cross-entropy.

    Args:
        labels: `(images, classes)` of zeros and ones.
        positive_weights_multiply: multiplies the weight of the labels that are present.
        balance: False leaves the weights at 1, times `positive_weights_multiply`.

    Returns:
        float32 `(2, classes)`: the weights of an absent and of a present label.
    """
    positives = labels.sum(axis=0)
    negatives = len(labels) - positives
    if balance:
        weights = np.stack([damped_inverse(negatives, positives), damped_inverse(positives, negatives)])
    else:
        weights = np.ones((2, labels.shape[1]))
    return (weights * [[1.0], [positive_weights_multiply]]).astype(np.float32)


def damped_inverse(counts: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns `1 + ln(reference / counts)` where that is above 1 and both are above 0, else 1; float64."""
    known = (counts > 0) & (reference > 0)
    ratio = np.where(known, reference, 1) / np.where(known, counts, 1)
    return 1 + np.log(np.maximum(ratio, 1))


# Seeds and devices


def set_seed(random_seed: int | None, deterministic: bool = False) -> int:
    """Seeds Python, NumPy and Keras; None draws a seed.

    Args:
        random_seed: below 2**32.
        deterministic: also make TensorFlow's operations give the same bits every time, where they can.

    Returns:
        The seed in use.
    """
    import keras

    seed = int.from_bytes(os.urandom(4), "little") if random_seed is None else random_seed
    keras.utils.set_random_seed(seed)
    if deterministic:
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    return seed


def set_gpu_usage(gpu_percentage: float) -> None:
    """Limits TensorFlow to a share of every visible GPU's memory; to be called before TensorFlow uses one.

    Args:
        gpu_percentage: in `[0, 1]`; 0 hides all GPUs.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpu_percentage == 0:
        tf.config.set_visible_devices([], "GPU")
        return
    for gpu, memory in zip(gpus, gpu_memory_sizes(len(gpus)), strict=True):
        limit = tf.config.LogicalDeviceConfiguration(memory_limit=int(memory * gpu_percentage) // 2**20)
        tf.config.set_logical_device_configuration(gpu, [limit])


def build_strategy(name: str) -> tf.distribute.Strategy:
    """Builds the strategy that makes devices train together; to be called before TensorFlow computes anything.

    Args:
        name: `mirrored` for the visible GPUs of this machine, or where it has none for its logical CPUs;
            `multi_worker` for those of every host in TF_CONFIG; `none` for one device.
    """
    import tensorflow as tf

    if name == "none":
        return tf.distribute.get_strategy()
    if name == "multi_worker":
        # Left alone, TensorFlow takes its own ring over gRPC for GPUs as well.
        kinds = tf.distribute.experimental.CommunicationImplementation
        kind = kinds.NCCL if tf.config.list_physical_devices("GPU") else kinds.AUTO
        options = tf.distribute.experimental.CommunicationOptions(implementation=kind)
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def start_devices(gpu_percentage: float, distribution_strategy: str) -> tf.distribute.Strategy:
    """Makes the devices ready, in the order that TensorFlow wants, and returns the strategy that they train by."""
    set_gpu_usage(gpu_percentage)
    strategy = build_strategy(distribution_strategy)
    keep_freed_memory()
    return strategy


def keep_freed_memory() -> None:
    """Lets the C library reuse the memory that TensorFlow frees, where it is glibc.

    The first `tf.data` generator of TensorFlow 2.21 tells glibc to give freed memory back to the system at once, and
    every training step then asks for it anew: on 2 cores an epoch of MobileNet took 7.5 s instead of 2.9 s.
    """
    import tensorflow as tf

    for _ in tf.data.Dataset.from_generator(lambda: iter([0]), output_signature=tf.TensorSpec((), tf.int32)):
        pass
    trim_threshold, mmap_threshold, largest_mmap_threshold = -1, -3, 2**25
    with contextlib.suppress(OSError, AttributeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(trim_threshold, 2**31 - 1)
        c_library.mallopt(mmap_threshold, largest_mmap_threshold)


def gpu_memory_sizes(number_of_gpus: int) -> list[int]:
    """Asks the CUDA driver for the memory of its GPUs, in its own order, which TensorFlow shares.

    Returns:
        Bytes of each GPU.

    Raises:
        UserError: the driver does not answer.
    """
    if not number_of_gpus:
        return []
    sizes = []
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        status = cuda.cuInit(0)
        for position in range(number_of_gpus):
            device, size = ctypes.c_int(), ctypes.c_size_t()
            status = status or cuda.cuDeviceGet(ctypes.byref(device), position)
            status = status or cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
            sizes.append(size.value)
    except (OSError, AttributeError) as error:
        raise UserError(
            f"Cannot ask the CUDA driver for the GPUs' memory: {error}. Set gpu_percentage to 0."
        ) from error
    if status:
        raise UserError(f"The CUDA driver answered with error {status}. Check nvidia-smi, or set gpu_percentage to 0.")
    return sizes


# Processes that train together

# How long every worker may take to come, in seconds.
WAIT_SECONDS = 300.0
PING_SECONDS = 5.0
# A worker that has said nothing for that long is lost; one that is killed is noticed at once.
LOST_AFTER_SECONDS = 60.0
LONGEST_MESSAGE = 2**26
# What may differ from host to host; what the paths lead to is compared.
OWN_OPTIONS = {"train_csv", "test_csv", "validation_csv", "image_directory", "load_model_path", "save_model_path"}
OWN_OPTIONS |= {"generator_workers", "generator_queue_length", "image_cache", "image_cache_path", "gpu_percentage"}
ADDRESS = re.compile(r"[^\s/]+:[0-9]{1,5}")
# The port of the first task on each host of a Slurm step; the others have those after it.
SLURM_PORT = 8888
# In the place of what a worker says, once it has nothing left to do.
LEFT = object()


def read_cluster() -> tuple[list[str], int]:
    """Reads from TF_CONFIG, or where it is not set from Slurm's variables, which processes train together.

    Slurm's are put into TF_CONFIG, where TensorFlow finds them.

    Returns:
        The address, host:port, of each worker, the chief's first; and the position of this process among them.

    Raises:
        UserError: there is neither, or TF_CONFIG is not what TensorFlow expects.
    """
    if "TF_CONFIG" not in os.environ and "SLURM_PROCID" in os.environ:
        os.environ["TF_CONFIG"] = json.dumps(_read_slurm_step())
    expected = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'
    text = os.environ.get("TF_CONFIG", "")
    try:
        content = json.loads(text)
        cluster, task = content["cluster"], content["task"]
        addresses = [*cluster.get("chief", []), *cluster.get("worker", [])]
        index = task["index"] + (len(cluster.get("chief", [])) if task["type"] == "worker" else 0)
        is_right = cluster.keys() <= {"chief", "worker"} and len(cluster.get("chief", addresses[:1])) == 1
        is_right = is_right and type(task["index"]) is int and 0 <= task["index"] < len(cluster[task["type"]])
        is_right = is_right and len(set(addresses)) == len(addresses) and all(map(ADDRESS.fullmatch, addresses))
        is_right = is_right and all(0 < int(address.rpartition(":")[2]) < 2**16 for address in addresses)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_right = False
    if not is_right:
        raise UserError(
            f"distribution_strategy multi_worker: expected TF_CONFIG to be like {expected}, the same cluster and "
            f"another index in every process, or a Slurm step. Received: {_shorten(text) if text else 'nothing'}. "
            "docs/distributed.md shows how to start."
        )
    return addresses, index


def _read_slurm_step() -> dict[str, Any]:
    """Returns what TF_CONFIG has to be in a task of a Slurm step; raises UserError where there is none."""
    import tensorflow as tf

    try:
        # The GPUs stay those that Slurm gives: the resolver would number them from 0, and fails where there are none.
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=SLURM_PORT, gpus_per_node=2**16, gpus_per_task=1, auto_set_gpu=False
        )
        cluster = resolver.cluster_spec().as_dict()
        # Not by rank: the resolver sorts the hosts by name, and Slurm may deal the tasks out in turn.
        own = f"{os.environ['SLURMD_NODENAME']}:{SLURM_PORT + int(os.environ['SLURM_LOCALID'])}"
        return {"cluster": cluster, "task": {"type": "worker", "index": cluster["worker"].index(own)}}
    except (RuntimeError, KeyError, ValueError) as error:
        reason = f"{error} is not set" if isinstance(error, KeyError) else _shorten(str(error)).rstrip(".")
        raise UserError(
            f"distribution_strategy multi_worker: Slurm's variables do not name the workers: {reason}. Start train.py "
            "with srun, or set TF_CONFIG. docs/distributed.md shows how."
        ) from error


def join_team(configs: Configs) -> Team:
    """Builds the team that these configs want: of every worker in TF_CONFIG, or of this process alone."""
    if configs.distribution_strategy != "multi_worker":
        return Team()
    return Team(*read_cluster(), get_settings(configs), configs.load_model_path or configs.save_model_path)


def get_settings(configs: Configs) -> dict[str, Any]:
    """Returns the options that must be the same in all processes that train together."""
    return {name: value for name, value in configs.to_dict().items() if name not in OWN_OPTIONS}


def end_at_once(status: int) -> None:
    """Ends this process before TensorFlow closes its connections: ten seconds, and errors about the other workers."""
    # Python sets it where an error has ended the script.
    if not hasattr(sys, "last_type"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def read_message(peer: socket.socket) -> dict[str, Any]:
    """Returns the first message of whoever is connected, and nothing of what follows; an empty one where it is none."""
    try:
        message = json.loads(peer.makefile("rb", buffering=0).readline(LONGEST_MESSAGE))
    except (OSError, ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def describe_end(error: BaseException) -> tuple[int, str, str]:
    """Returns the exit status of a process that an error ends, what it prints, and the reason in a few words."""
    if isinstance(error, UserError):
        return 2, f"Error: {error}", str(error).partition("\n")[0]
    if isinstance(error, KeyboardInterrupt):
        return 130, "Interrupted.", "it was interrupted"
    return 1, "".join(traceback.format_exception(error)), f"{type(error).__name__}, as its own output tells"


class Team:
    """The processes that train one model together, and a way to talk that is not TensorFlow's.

    Each worker keeps a connection with the chief, the first of them, at the address that TensorFlow will use. Over it
    they compare what they start with, and learn within seconds that one has failed, been killed or been cut off:
    TensorFlow would wait, or end with a page of its own. All leave together.

    Args:
        addresses: host:port of each worker, the chief's first.
        index: the position of this process among them.
        settings: what must be the same in all of them, by name.
        folder: named as the place to continue from.
    """

    def __init__(
        self, addresses: Sequence[str] = ("",), index: int = 0, settings: dict[str, Any] | None = None, folder: str = ""
    ) -> None:
        self.addresses = list(addresses)
        self.index = index
        self.settings = settings or {}
        self.folder = folder
        self._peers: dict[int, socket.socket] = {}
        self._received: dict[int, queue.Queue] = {}
        self._has_left: set[int] = set()
        self._is_over = False
        self._sending = threading.Lock()
        # Whoever ends this process keeps it, and all others wait for that end.
        self._ending = threading.Lock()
        self._silence = contextlib.ExitStack()

    @property
    def is_chief(self) -> bool:
        """Whether this process writes and prints."""
        return self.index == 0

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self.addresses)

    def __enter__(self) -> Team:
        if self.size == 1:
            return self
        try:
            self._meet_workers() if self.is_chief else self._meet_chief()
        except BaseException:
            for peer in self._peers.values():
                peer.close()
            raise
        for index, peer in self._peers.items():
            peer.settimeout(LOST_AFTER_SECONDS)
            self._received[index] = queue.Queue()
            threading.Thread(target=self._listen, args=(index,), daemon=True).start()
        threading.Thread(target=self._ping, daemon=True).start()
        self.agree(self.settings)
        print(f"Worker {self.index} of {self.size}. The chief, {self.addresses[0]}, prints and writes.", flush=True)
        if not self.is_chief:
            nowhere = self._silence.enter_context(open(os.devnull, "w"))
            self._silence.enter_context(contextlib.redirect_stdout(nowhere))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        self._silence.close()
        if self.size == 1:
            return
        if error is None or isinstance(error, SystemExit):
            self._leave()
            atexit.register(end_at_once, (error.code or 0) if error else 0)
            return
        if kind.__module__.startswith("tensorflow"):
            # Most likely another worker's end: it is told as that as soon as it is noticed.
            time.sleep(2 * PING_SECONDS)
        status, shown, reason = describe_end(error)
        with self._ending:
            # TensorFlow would wait for the other workers at this process's end.
            self._stop(shown, status, "" if self._is_over else f"{self._name(self.index)} has stopped: {reason}")

    def agree(self, values: dict[str, Any]) -> None:
        """Compares values by name, which JSON can hold, over all workers.

        Raises:
            UserError: in every worker: one has another value than the chief; names it.
        """
        first, *others = self.exchange(values)
        for index, other in enumerate(others, start=1):
            for name in first | other:
                if first.get(name) != other.get(name):
                    # All find the same: nobody has to be told.
                    self._leave()
                    theirs, ours = (_shorten(repr(worker.get(name))) for worker in (other, first))
                    raise UserError(
                        f"The workers do not start with the same: {name} is {theirs} for {self._name(index)} and "
                        f"{ours} for the chief. Give both the same."
                    )

    def exchange(self, value: Any) -> list[Any]:
        """Returns the values of all workers in their order; each calls it as often as the others."""
        if self.size == 1:
            return [value]
        if not self.is_chief:
            self._tell({"value": value})
            return self._received[0].get()
        values = [json.loads(json.dumps(value)), *(self._hear(index) for index in range(1, self.size))]
        self._tell({"value": values})
        return values

    def _hear(self, index: int, has_left: bool = False) -> Any:
        """Returns what a worker says next; ends all where it has left and should not have, or the other way round."""
        value = self._received[index].get()
        if (value is LEFT) != has_left:
            self._end(
                f"{self._name(index)} has {'more' if has_left else 'nothing more'} to do, and the chief has "
                f"{'nothing' if has_left else 'something'}. Give every worker the same model to continue from.",
                2,
            )
        return value

    def _name(self, index: int) -> str:
        return f"worker {index} ({self.addresses[index]})"

    def _meet_workers(self) -> None:
        """Waits at the chief's address until every worker has come."""
        with self._open_port() as server:
            end = time.monotonic() + WAIT_SECONDS
            while missing := [self._name(index) for index in range(1, self.size) if not self._waits(index)]:
                server.settimeout(max(end - time.monotonic(), 0.01))
                try:
                    self._welcome(server.accept()[0])
                except TimeoutError as error:
                    reason = (
                        f"{join_names(missing)} did not come to the chief at {self.addresses[0]} within "
                        f"{WAIT_SECONDS:.0f} seconds. Start train.py on every host of TF_CONFIG, with its own index."
                    )
                    self._tell({"end": reason, "status": 2})
                    raise UserError(reason) from error
        self._tell({"welcome": self.addresses})

    def _welcome(self, peer: socket.socket) -> None:
        """Takes in a worker that has come to the chief.

        Raises:
            UserError: in that worker and those before it too: its TF_CONFIG does not go with the chief's.
        """
        peer.settimeout(PING_SECONDS)
        try:
            hello = read_message(peer)["hello"]
            index, addresses = int(hello["index"]), list(hello["addresses"])
            if not 0 < index < len(addresses):
                raise ValueError(index)
        except (ValueError, KeyError, TypeError, OverflowError):
            # No worker: a port scan, or a probe of the scheduler.
            peer.close()
            return
        reason = ""
        if addresses != self.addresses:
            theirs, ours = (_shorten(str(names)) for names in (addresses, self.addresses))
            reason = f"TF_CONFIG names the workers {ours} for the chief and {theirs} for worker {index}"
        elif self._waits(index):
            reason = f"TF_CONFIG: two processes say that they are {self._name(index)}"
        if reason:
            self._peers[-1] = peer
            self._tell({"end": f"{reason}. Correct TF_CONFIG.", "status": 2})
            raise UserError(f"{reason}. Correct TF_CONFIG.")
        self._peers[index] = peer

    def _waits(self, index: int) -> bool:
        """Tells whether a worker has come to the chief and is still there: it says nothing until all have come."""
        return index in self._peers and not select.select([self._peers[index]], [], [], 0)[0]

    def _meet_chief(self) -> None:
        """Connects with the chief, and waits there until every worker has come."""
        self._open_port().close()
        self._peers[0] = self._reach_chief()
        self._tell({"hello": {"index": self.index, "addresses": self.addresses}})
        # Longer than the chief waits, who then says who is missing.
        self._peers[0].settimeout(WAIT_SECONDS + 2 * PING_SECONDS)
        answer = read_message(self._peers[0])
        if "end" in answer:
            raise UserError(answer["end"])
        if "welcome" not in answer:
            raise UserError(
                f"The chief at {self.addresses[0]} has ended, or what answers there is no train.py that waits for its "
                "workers. Stop every worker, and start them all again."
            )

    def _reach_chief(self) -> socket.socket:
        """Connects with the chief as soon as that listens."""
        host, _, port = self.addresses[0].rpartition(":")
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                peer = socket.create_connection((host.strip("[]"), int(port)), timeout=PING_SECONDS)
                # On one machine a connection may be given the very port that it calls, and reach itself.
                if peer.getsockname() != peer.getpeername():
                    return peer
                peer.close()
            except OSError as error:
                if time.monotonic() > end:
                    raise UserError(
                        f"The chief, {self._name(0)}, did not answer within {WAIT_SECONDS:.0f} seconds: "
                        f"{error.strerror or error}. Start train.py there too, and let its port be reached from here."
                    ) from error
            time.sleep(0.2)

    def _open_port(self) -> socket.socket:
        """Takes the port of this process's own address; the caller closes it before TensorFlow needs it."""
        port = int(self.addresses[self.index].rpartition(":")[2])
        server = socket.socket()
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            # Room for strangers too: whoever finds none tries again only after a second.
            server.listen(self.size + 128)
        except OSError as error:
            server.close()
            raise UserError(
                f"Port {port}, of {self._name(self.index)} in TF_CONFIG, cannot be used on this host: "
                f"{error.strerror}. End the program that has it, or choose another port for all workers."
            ) from error
        return server

    def _listen(self, index: int) -> None:
        """Takes what a peer sends, until it leaves; ends this process where the peer ends otherwise."""
        try:
            with self._peers[index].makefile("rb") as lines:
                while line := lines.readline(LONGEST_MESSAGE):
                    message = json.loads(line)
                    if "end" in message:
                        self._end(message["end"], message["status"])
                    elif "left" in message:
                        self._has_left.add(index)
                        self._received[index].put(LEFT)
                    elif "value" in message:
                        self._received[index].put(message["value"])
        except (OSError, ValueError):
            pass
        if index not in self._has_left:
            self._end(
                f"{self._name(index)} was killed or cannot be reached any more. Every worker stops. Start them all "
                f"again with --load_model_path {self.folder}: training goes on after the last checkpoint.",
                1,
            )

    def _end(self, text: str, status: int) -> None:
        """Ends this process for what has happened to another, unless all have left."""
        with self._ending:
            if not self._is_over:
                self._stop(f"\nError: {text[0].upper()}{text[1:]}", status, text if self.is_chief else "")

    def _stop(self, shown: str, status: int, told: str) -> NoReturn:
        """Ends this process with a message: its main thread may wait in a collective operation for ever."""
        try:
            if told:
                self._tell({"end": told, "status": status})
            self._silence.close()
            print(shown, file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:
            os._exit(status)

    def _tell(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for peer in self._peers.values():
                # Whoever listens to that peer notices that it is gone.
                with contextlib.suppress(OSError):
                    peer.sendall(line)

    def _ping(self) -> None:
        while not self._is_over:
            self._tell({})
            time.sleep(PING_SECONDS)

    def _leave(self) -> None:
        """Waits until all are done: the end of one would end the others."""
        if not self.is_chief:
            self._tell({"left": True})
        for index in self._received:
            self._hear(index, has_left=True)
        with self._ending:
            self._is_over = True
        if self.is_chief:
            self._tell({"left": True})


# Factories that take configs


def get_generator(
    csv_path: str,
    class_names: Sequence[str],
    configs: Configs,
    training: bool,
    bad_rows: Collection[int] | None = None,
    shares: Shares | None = None,
) -> AugmentedImageSequence:
    """Builds the generator of one CSV file: augmented, mixed and reshuffled every epoch for training, else in order.

    Args:
        csv_path: the table.
        class_names: in the model's order.
        configs: the options.
        training: whether the model learns from these images.
        bad_rows: line numbers to leave out, where the data check has run. None checks the images now.
        shares: the devices to feed, where several train together.

    Raises:
        UserError: the CSV, a label or an image in it is not usable.
    """
    from augmenter import build_augmenter
    from generator import AugmentedImageSequence, DiskCache, MemoryCache

    table = read_table(csv_path, configs.csv_label_column, configs.multi_label_classification)
    labels = encode_labels(table[configs.csv_label_column], class_names, configs.multi_label_classification, csv_path)
    paths = [join_path(configs.image_directory, path) for path in table[IMAGE_COLUMN]]
    if bad_rows is None:
        bad_rows = check_images(
            paths, csv_path, configs.max_image_pixels, configs.generator_workers, configs.skip_bad_images
        )
    kept = np.setdiff1d(np.arange(len(paths)), np.array(sorted(bad_rows), int) - 2)
    if not kept.size:
        raise UserError(f"{csv_path}: none of the {len(paths)} images can be read. Check image_directory.")
    paths, labels = [paths[row] for row in kept], labels[kept]
    image_size = configs.image_target_size[:2]
    cache = None
    if configs.image_cache == "memory":
        cache = MemoryCache(len(paths), image_size)
    elif configs.image_cache == "disk":
        cache = DiskCache(paths, image_size, configs.image_cache_path)
    return AugmentedImageSequence(
        paths,
        labels,
        image_size=image_size,
        batch_size=configs.batch_size * (configs.gradient_accumulation_steps if training else 1),
        augmenter=build_augmenter(configs.augmentation_strength) if training else None,
        shuffle=training,
        seed=configs.random_seed or 0,
        workers=configs.generator_workers,
        max_queue_size=configs.generator_queue_length,
        cache=cache,
        max_pixels=configs.max_image_pixels,
        skip_bad_images=configs.skip_bad_images,
        shares=shares,
        mixup_alpha=configs.mixup_alpha,
        cutmix_alpha=configs.cutmix_alpha,
        number_of_classes=len(class_names),
    )


def check_sets(csv_paths: dict[str, str], configs: Configs, writes_report: bool = True) -> dict[str, set[int]]:
    """Checks the tables of a run and their images, prints what it finds and writes data_report.csv.

    Args:
        csv_paths: by the set's name: training, validation, and where it is another one test.
        configs: the options.
        writes_report: False leaves the report to another process that finds the same.

    Returns:
        The line numbers of each CSV file that `skip_bad_images` leaves out.

    Raises:
        UserError: a table is not usable, or something makes training wrong: the summary of that.
    """
    if configs.verify_data == "off":
        return {path: set() for path in csv_paths.values()}
    label_column = configs.csv_label_column
    tables = [
        make_image_table(name, path, parse_table(path, label_column), label_column, configs.image_directory)
        for name, path in csv_paths.items()
        if name != "test" or os.path.realpath(path) != os.path.realpath(csv_paths["validation"])
    ]
    findings = check_data(
        tables,
        configs.multi_label_classification,
        configs.verify_data,
        configs.image_target_size[:2],
        configs.max_image_pixels,
        configs.generator_workers,
        configs.allow_duplicates,
    )
    report_findings(findings, configs.save_model_path, configs.skip_bad_images, writes_report)
    bad = get_bad_rows(findings)
    return {path: bad.get(path, set()) for path in csv_paths.values()}


def get_optimizer(
    optimizer_type: str, learning_rate: float, weight_decay: float = 0.0, ema_decay: float = 0.0
) -> keras.optimizers.Optimizer:
    """Builds the Keras optimizer of that name.

    Args:
        optimizer_type: one of `OPTIMIZER_NAMES`.
        learning_rate: above 0.
        weight_decay: in `[0, 1)`. Each step takes it times the learning rate away from the weights, apart from the
            gradients: Loshchilov and Hutter, ICLR 2019 (arXiv:1711.05101). See `exclude_from_weight_decay`.
        ema_decay: in `[0, 1)`: of the moving average of the weights that the optimizer keeps; 0 keeps none.
    """
    import keras

    # Keras's AdamW has a decay of its own, and takes no None.
    options = {"weight_decay": weight_decay} if weight_decay or optimizer_type == "AdamW" else {}
    if ema_decay:
        options |= {"use_ema": True, "ema_momentum": ema_decay, "ema_overwrite_frequency": None}
    return getattr(keras.optimizers, optimizer_type)(learning_rate=learning_rate, **options)


def exclude_from_weight_decay(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Leaves biases and what normalisations learn without weight decay: all weights of fewer than two axes.

    A model file does not bring this back: to be called again after loading, before the first step.

    Args:
        model: whose weights the optimizer changes.
        optimizer: built or not.
    """
    import keras

    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    optimizer.exclude_from_weight_decay([weight for weight in model.weights if len(weight.shape) < 2])


# Models and the folders of runs


def resolve_model_path(path: str, preferred: Sequence[str] = ("best_model.keras", "latest_model.keras")) -> str:
    """Finds the model file that a path means.

    Args:
        path: a model file, or a run's folder.
        preferred: names of files in a run's folder, the first choice first.

    Returns:
        An existing file; where it is not the named one, the substitution is printed.

    Raises:
        UserError: there is no model.
    """
    if os.path.isfile(path):
        return path
    if os.path.isfile(os.path.join(path, GRAPH_FILE)):
        return os.path.normpath(path)
    if os.path.isdir(path):
        for name in preferred:
            if os.path.isfile(os.path.join(path, name)):
                return os.path.join(path, name)
        raise UserError(f"The folder {path} holds no model. Expected {' or '.join(preferred)}. Train first.")
    stem, suffix = os.path.splitext(path)
    for other in MODEL_SUFFIXES:
        if suffix in MODEL_SUFFIXES and os.path.isfile(stem + other):
            print(f"{path} does not exist: using {stem + other} beside it.")
            return stem + other
    raise UserError(f"There is no model at {path}. Expected a .keras, .h5 or .hdf5 file, or the folder of a run.")


def find_trained_model(configs: Configs) -> tuple[str, Configs]:
    """Finds the trained model that configs name, and what its own `configs.json` says of it.

    Args:
        configs: `load_model_path`, or where that is empty `save_model_path`, leads to the model.

    Returns:
        The model file, and `configs` with the options that describe a model taken from the file beside it, or where
        there is none the classes from the training CSV. Where `load_model_path` alone is given, `save_model_path`
        becomes the model's folder: what is found out about a run belongs there, not into another one.

    Raises:
        UserError: there is no model, or a given option contradicts it.
    """
    model_path = resolve_model_path(configs.load_model_path or configs.save_model_path)
    configs = describe_model(configs, model_path)
    if "save_model_path" not in configs.given:
        configs = configs.replace(save_model_path=os.path.dirname(model_path) or ".")
    if configs.classes is None:
        class_names = resolve_class_names(
            None, configs.train_csv, configs.csv_label_column, configs.multi_label_classification
        )
        configs = configs.replace(classes=class_names)
    return model_path, configs


def describe_model(configs: Configs, model_path: str) -> Configs:
    """Takes the options that describe a model from the `configs.json` beside it, or an artefact's `_metadata.json`.

    Raises:
        UserError: an option that the user gave contradicts it.
    """
    stored_path = os.path.join(os.path.dirname(os.path.abspath(model_path)), "configs.json")
    if os.path.isfile(stored_path):
        stored = Configs.read_json(stored_path)
    elif os.path.isfile(stored_path := metadata_path(model_path)):
        stored = Configs.read_json(stored_path, part="options")
    else:
        return configs
    described = {
        name: stored[name]
        for name, option in Configs.options().items()
        if option.metadata["describes_model"] and name in stored
    }
    for name in sorted(described.keys() & configs.given):
        given = getattr(configs, name)
        # For the classes alone, none means that they are to be found.
        if given != described[name] and not (name == "classes" and given is None):
            source = os.path.basename(stored_path)
            raise UserError(
                f"{name} is {described[name]!r} for the model {model_path} (its {source} says so). "
                f"Received: {given!r}. Leave {name} out, or name another model."
            )
    return configs.replace(**described)


def load_model(path: str, with_optimizer: bool = False) -> keras.Model:
    """Loads a model file, `.keras` or HDF5, or a compressed one; never runs code that the file brings.

    Args:
        path: the file.
        with_optimizer: also restore the optimizer and its state, to go on training.

    Raises:
        UserError: the file is no model, is damaged, holds code, or claims far more weights than it has bytes.
    """
    import keras

    if is_exported(path):
        raise UserError(
            f"{path} is an exported model, which predict.py and test.py take. This script needs the model that it was "
            "made of, a .keras or .h5 file."
        )
    stem, suffix = os.path.splitext(path)
    if suffix != ".keras" and os.path.isfile(f"{stem}.json"):
        return custom_load_model(os.path.dirname(path), os.path.basename(stem))
    with _telling_damage(f"{path} is not a model that Keras reads"):
        _check_model_file(path)
        with _limiting_weights(_largest_content(path)):
            model = keras.models.load_model(path, compile=with_optimizer, safe_mode=True)
        if not isinstance(model, keras.Model):
            raise ValueError(f"It holds a {type(model).__name__}.")
    return model


@contextlib.contextmanager
def _telling_damage(sentence: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Keras, h5py, zipfile and json fail in any way on a damaged file: all of it is the file's fault.
        # Keras quotes all layers before it says what is wrong with one of them.
        reason = str(error).split("Exception encountered:")[-1].strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{sentence}: {_shorten(reason).rstrip('.')}. Copy it again, or name another.") from error


def _check_model_file(path: str) -> None:
    """Checks what a model file claims before Keras reads it.

    Raises:
        UserError: it needs code, or has no model.
        Exception: of any kind, where it is damaged.
    """
    import h5py

    limit, (stem, suffix) = _largest_content(path), os.path.splitext(path)
    if suffix not in MODEL_SUFFIXES:
        raise ValueError(f"Expected a file that ends in {', '.join(MODEL_SUFFIXES)}.")
    if not os.path.getsize(path):
        raise ValueError("It is empty.")
    if suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path, limit)
        return
    with h5py.File(path) as file:
        if "model_config" not in file.attrs:
            raise UserError(f"{path} holds weights but no model, and {stem}.json is not beside it.")
        _check_arrays(file, limit)
        for name in ("model_config", "training_config"):
            if name in file.attrs:
                _check_layers(json.loads(file.attrs[name]), path)


def _check_archive(archive: zipfile.ZipFile, path: str, limit: int) -> None:
    import h5py

    members = {member.filename: member for member in archive.infolist()}
    for name, member in members.items():
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise ValueError(f"Its part {name} lies outside of it.")
        # Python unpacks the other kinds without a limit.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"Its part {name} is packed in a way that Keras does not use.")
    if missing := [name for name in (LAYERS_MEMBER, WEIGHTS_MEMBER) if name not in members]:
        raise ValueError(f"It has no part {missing[0]}.")
    _check_claim(sum(member.file_size for member in archive.infolist()), limit)
    if members[LAYERS_MEMBER].file_size > LARGEST_JSON_FILE:
        raise ValueError(f"Its layers take more than {LARGEST_JSON_FILE} bytes.")
    _check_layers(json.loads(archive.read(LAYERS_MEMBER)), path)
    # In memory, as Keras does it: HDF5 seeks a lot, and seeking in an archive is slow.
    with h5py.File(io.BytesIO(archive.read(WEIGHTS_MEMBER))) as file:
        _check_arrays(file, limit)


def _check_arrays(file: h5py.File, limit: int) -> None:
    """Raises ValueError where an HDF5 file leads to other files, or its arrays claim more than `limit` bytes."""
    import h5py

    claimed = 0

    def find_outside(name: str, link: Any) -> str | None:
        # What is returned ends the visit; an error in here would reach nobody.
        nonlocal claimed
        item = file[name] if isinstance(link, h5py.HardLink) else None
        is_array = isinstance(item, h5py.Dataset)
        if is_array:
            claimed += max(item.size or 0, math.prod(item.chunks or ())) * item.dtype.itemsize
        return name if item is None or (is_array and (item.external or item.is_virtual)) else None

    if name := file.visititems_links(find_outside):
        raise ValueError(f"Its part {name} lies outside of it.")
    _check_claim(claimed, limit)


def _check_layers(layers: Any, path: str) -> None:
    """Checks that a model's layers need no code, neither in the file itself nor of another package than Keras.

    Args:
        layers: a model's description, as JSON holds it.
        path: of the model.

    Raises:
        UserError: they do.
        ValueError: it is no description of layers.
    """
    if not isinstance(layers, dict):
        raise ValueError("It describes no layers.")
    pending = [layers]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        if not isinstance(part, dict):
            continue
        pending += part.values()
        name, module = part.get("class_name"), part.get("module")
        name = part.get("config") if name == "function" else name
        if name in CODE_LAYERS:
            raise UserError(
                f"{path} is not loaded: it holds a {CODE_LAYERS[name]}, program code of whoever made the file, which "
                "would run on this computer. Build the model again with Keras's own layers, such as Rescaling, copy "
                "its weights with set_weights, and save that."
            )
        if isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins"):
            raise UserError(
                f"{path} is not loaded: it needs {_shorten(f'{module}.{name}')}, code that is not Keras's own. Build "
                "the model again with Keras's own layers, copy its weights with set_weights, and save that."
            )


def _shorten(text: str) -> str:
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= 300 else f"{shown[:300]}..."


def _largest_content(path: str) -> int:
    """Returns how many bytes of weights a file may claim: packed weights are smaller, but not by more than that."""
    return max(2**28, 10 * os.path.getsize(path))


def _check_claim(claimed: int, limit: int) -> None:
    if claimed > limit:
        raise ValueError(f"It claims more weights than the {limit >> 20} MiB that a file of its size can hold.")


@contextlib.contextmanager
def _limiting_weights(limit: int, initialize: bool = True) -> Iterator[None]:
    """Raises ValueError before a model takes more than `limit` bytes for its weights, whatever its layers claim.

    Args:
        limit: in bytes.
        initialize: draw the initial weights. Where all are to be replaced, zeros take less time.
    """
    import keras

    claimed, add_weight = 0, keras.Layer.add_weight

    def add_counted(
        layer: keras.Layer, shape: Sequence[int] | None = None, initializer: Any = None, *values: Any, **options: Any
    ) -> Any:
        nonlocal claimed
        claimed += 4 * math.prod(shape or ())
        _check_claim(claimed, limit)
        return add_weight(layer, shape, initializer if initialize else "zeros", *values, **options)

    # Keras has no hook for this, and TensorFlow's is told of a variable, but not how large it will be.
    keras.Layer.add_weight = add_counted
    try:
        yield
    finally:
        keras.Layer.add_weight = add_weight


def load_fitting_model(
    path: str, class_names: Sequence[str], image_size: Sequence[int], with_optimizer: bool = False
) -> keras.Model:
    """Loads a model file as `load_model` does, and checks its input and output against configs.

    Raises:
        UserError: the file is no model, or it does not fit; names what differs.
    """
    model = load_model(path, with_optimizer)
    # A model of another kind than a graph of layers has neither.
    if any(len(getattr(model, ends, None) or ()) != 1 for ends in ("inputs", "outputs")):
        raise UserError(f"{path} is no classifier of images: expected one input and one output.")
    _check_fit(path, model.inputs[0].shape, model.outputs[0].shape, class_names, image_size)
    return model


def _check_fit(
    path: str,
    input_shape: Sequence[int | None],
    output_shape: Sequence[int | None],
    class_names: Sequence[str],
    image_size: Sequence[int],
) -> None:
    """Raises UserError where a model's shapes are not those of a classifier of such images into these classes."""
    (batch, *inputs), expected = input_shape, (*image_size, 3)
    if len(output_shape) != 2 or output_shape[-1] != len(class_names):
        raise UserError(
            f"{path} tells {output_shape[-1]} classes apart, but the configs name {len(class_names)}: "
            f"{join_names(class_names)}. Use the CSV files and classes that it was trained with."
            if len(output_shape) == 2
            else f"{path} gives outputs of shape {tuple(output_shape[1:])}. Expected one number a class, "
            f"{len(class_names)}."
        )
    fits = len(inputs) == 3 and all(size in (None, wanted) for size, wanted in zip(inputs, expected, strict=True))
    if not fits or batch is not None:
        shown = tuple(inputs) if batch is None else (batch, *inputs)
        raise UserError(f"{path} takes inputs of shape {shown}. Expected images of image_target_size, {expected}.")


def custom_save_model(
    model: keras.Model, save_path: str, model_name: str, weights_dtype: str = "float32"
) -> tuple[str, str]:
    """Writes a model as `model_name.json` (its layers) and `model_name.h5` (its weights), without optimizer state.

    Args:
        model: any model of stock Keras layers.
        save_path: the folder.
        model_name: the files' name without ending.
        weights_dtype: one of `WEIGHTS_DTYPES`. `float32` is exact. `float16` rounds the weights, and packs the large
            ones without loss. `int8` holds kernels as whole numbers from -127 to 127, each output channel times a
            scale of its own, and the rest, kernels of a few numbers a channel too, as float16. Weights that float16
            cannot hold, or that have fewer than 64 numbers, stay float32.

    Returns:
        The paths of the HDF5 and the JSON file.
    """
    import h5py

    weights_path, layers_path = (os.path.join(save_path, model_name + suffix) for suffix in (".h5", ".json"))
    depthwise = {id(kernel) for kernel in _find_depthwise_kernels(model)}
    with atomic_path(weights_path) as temporary, h5py.File(temporary, "w") as file:
        for position, weight in enumerate(model.weights):
            name, values = f"{position:05d}", weight.numpy()
            channel_axes = (-2, -1) if id(weight) in depthwise else (-1,)
            stored, scales = _encode_weight(values, weights_dtype, channel_axes)
            packs = stored.dtype == np.float16 and stored.size >= PACKED_FROM
            packing = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if packs else {}
            file.create_dataset(f"weights/{name}", data=stored, **packing).attrs["path"] = weight.path
            if scales is not None:
                file[f"scales/{name}"] = scales
    write_text(layers_path, model.to_json())
    return weights_path, layers_path


def _walk_layers(layer: keras.Layer) -> Iterator[keras.Layer]:
    """Yields a layer and all layers in it."""
    yield layer
    for inner in getattr(layer, "layers", ()):
        yield from _walk_layers(inner)


def _find_depthwise_kernels(model: keras.Model) -> Iterator[keras.Variable]:
    """Yields the kernels whose last two axes together are the output channels."""
    from keras import layers

    names = dict.fromkeys((layers.DepthwiseConv1D, layers.DepthwiseConv2D), "kernel")
    names |= dict.fromkeys((layers.SeparableConv1D, layers.SeparableConv2D), "depthwise_kernel")
    for layer in _walk_layers(model):
        if type(layer) in names:
            yield getattr(layer, names[type(layer)])


def _encode_weight(
    values: np.ndarray, weights_dtype: str, channel_axes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Turns a weight into what a file holds.

    Args:
        values: of the weight.
        weights_dtype: one of `WEIGHTS_DTYPES`.
        channel_axes: the axes, counted from the last one, along which the output channels lie.

    Returns:
        The array to store and, where it is int8, the scales to multiply it by: float32, of one number an output
        channel, with as many axes as the array. The largest error is half a scale.
    """
    if weights_dtype == "float32" or values.dtype != np.float32 or values.size < SMALLEST_ROUNDED:
        return values, None
    with np.errstate(over="ignore"):
        halved = values.astype(np.float16)
    if not np.isfinite(halved).all():
        return values, None
    inner = tuple(axis for axis in range(values.ndim) if axis - values.ndim not in channel_axes)
    if weights_dtype == "float16" or math.prod(values.shape[axis] for axis in inner) < FEWEST_PER_SCALE:
        return halved, None
    highest = np.abs(values).max(axis=inner, keepdims=True)
    scales = np.maximum(highest / np.float32(127), np.finfo(np.float32).tiny)
    return np.rint(values / scales).astype(np.int8), scales


def _decode_weight(file: h5py.File, name: str, weight: keras.Variable) -> np.ndarray:
    """Returns the values that a file holds of a weight; raises ValueError where an int8 array has not its scales."""
    values = file["weights"][name][...]
    if values.dtype != np.int8 or weight.dtype == "int8":
        return values
    scales = file["scales"][name][...] if f"scales/{name}" in file else np.empty(())
    sizes = zip(scales.shape, values.shape, strict=False)
    fits = scales.dtype == np.float32 and scales.ndim == values.ndim and all(size in (1, all_) for size, all_ in sizes)
    if not fits or not (np.isfinite(scales) & (scales > 0)).all():
        raise ValueError(f"Its part weights/{name} has no scales that fit it.")
    return values * scales


def custom_load_model(load_path: str, model_name: str) -> keras.Model:
    """Reads a model that `custom_save_model` wrote, with weights of any of `WEIGHTS_DTYPES`.

    Args:
        load_path: the folder.
        model_name: the files' name without ending.

    Returns:
        An ordinary Keras model, its weights in the precision that it was trained in.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    import h5py
    import keras

    weights_path, layers_path = (os.path.join(load_path, model_name + suffix) for suffix in (".h5", ".json"))
    with _telling_damage(f"{weights_path} and {layers_path} are not a compressed model"):
        with open(layers_path, "rb") as file:
            content = file.read(LARGEST_JSON_FILE + 1)
        if len(content) > LARGEST_JSON_FILE:
            raise ValueError(f"The layers take more than {LARGEST_JSON_FILE} bytes.")
        layers, limit = json.loads(content), _largest_content(weights_path)
        _check_layers(layers, layers_path)
        # The optimizer of a compiled model would take a fifth of the time, and twice the weights' memory.
        layers.pop("compile_config", None)
        with h5py.File(weights_path) as file:
            _check_arrays(file, limit)
            with _limiting_weights(limit, initialize=False):
                model = keras.saving.deserialize_keras_object(layers, safe_mode=True)
            if not isinstance(model, keras.Model):
                raise ValueError("The JSON file describes no model.")
            stored, weights = {name: file["weights"][name] for name in sorted(file["weights"])}, model.weights
            if [array.shape for array in stored.values()] != [tuple(weight.shape) for weight in weights]:
                raise UserError(
                    f"{weights_path} does not belong to {layers_path}: their weights differ in number or shape."
                )
            model.set_weights(
                [_decode_weight(file, name, weight) for name, weight in zip(stored, weights, strict=True)]
            )
    for layer in _walk_layers(model):
        # It computes with copies of its weights, in another shape.
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    return model


# Models of other runtimes


class ExportedModel:
    """A model that `compress_weights.py` exported, in its own runtime; has what predicting needs of a Keras model.

    Args:
        run: from images, float32 RGB `(batch, height, width, 3)` in `[0, 255]`, to probabilities, `(batch, classes)`.
        input_shape: of its images, None for a size that is not fixed; that of the batch is of no account.
        output_shape: of its probabilities.
    """

    def __init__(
        self, run: Callable[[np.ndarray], np.ndarray], input_shape: Sequence[Any], output_shape: Sequence[Any]
    ) -> None:
        shapes = [
            [size if isinstance(size, int) and size > 0 else None for size in shape[1:]]
            for shape in (input_shape, output_shape)
        ]
        self.input_shape, self.output_shape = ((None, *shape) for shape in shapes)
        self._run = run

    def __call__(self, images: Any, training: bool = False) -> np.ndarray:
        """Returns the probabilities of images of any numeric type, float32 `(batch, classes)`."""
        return self._run(np.asarray(images, np.float32))

    def predict(self, batches: tf.data.Dataset, verbose: int = 1) -> np.ndarray:
        """Returns the probabilities of batches of images and labels, with a progress bar where `verbose` is not 0."""
        from tqdm import tqdm

        return np.concatenate([self(images) for images, _ in tqdm(batches, disable=not verbose, desc="Predicting")])


def artefact_stem(path: str) -> str:
    """Returns the name without ending of the model that a file or a SavedModel was made of, or is."""
    name = os.path.basename(os.path.normpath(path)).replace(REJECTED, "")
    endings = {"".join(parts) for parts in ARTEFACT_ENDINGS.values()} | {"_compressed.json"}
    for ending in sorted(endings, key=len, reverse=True):
        if name.endswith(ending) and name != ending:
            return name.removesuffix(ending)
    return os.path.splitext(name)[0]


def metadata_path(path: str) -> str:
    """Returns where what an artefact needs beside it stands: its classes, its image size, its decision."""
    return os.path.join(os.path.dirname(os.path.abspath(path)), f"{artefact_stem(path)}_metadata.json")


def is_exported(path: str) -> bool:
    """Tells whether a path is that of a model for another runtime than Keras."""
    return os.path.splitext(path)[1] in (".tflite", ".onnx") or os.path.isfile(os.path.join(path, GRAPH_FILE))


@contextlib.contextmanager
def importing(name: str, purpose: str) -> Iterator[None]:
    """Tells how to install a package that few need, where its import fails.

    Args:
        name: a key of `OPTIONAL_PACKAGES`.
        purpose: begins the message.

    Raises:
        UserError: it is missing.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package {name}: {error}. Install it: pip install '{OPTIONAL_PACKAGES[name]}'"
        ) from error


def load_predictor(path: str, class_names: Sequence[str], image_size: Sequence[int]) -> keras.Model | ExportedModel:
    """Loads what is to predict, a Keras model or an exported one; both have `predict` and are called with images.

    Raises:
        UserError: the file is no model, does not fit, or its runtime is not installed.
    """
    if not is_exported(path):
        return load_fitting_model(path, class_names, image_size)
    model = load_exported_model(path)
    _check_fit(path, model.input_shape, model.output_shape, class_names, image_size)
    return model


def load_exported_model(path: str) -> ExportedModel:
    """Loads an exported model in its own runtime, which uses all cores.

    Args:
        path: a `.tflite` or `.onnx` file, or the folder of a SavedModel.

    Raises:
        UserError: the file is no such model or is damaged, or its runtime is not installed.
    """
    suffix = os.path.splitext(path)[1]
    by_suffix = {".tflite": ("a TensorFlow Lite model", _load_tflite), ".onnx": ("an ONNX model", _load_onnx)}
    kind, load = by_suffix.get(suffix, ("a SavedModel", _load_saved_model))
    with _telling_damage(f"{path} is not {kind} with images in and probabilities out"):
        if os.path.isfile(path) and not os.path.getsize(path):
            raise ValueError("It is empty.")
        return load(path)


def _load_tflite(path: str) -> ExportedModel:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        # The same interpreter, which TensorFlow means to drop.
        import tensorflow as tf

        Interpreter = tf.lite.Interpreter
    with open(path, "rb") as file:
        content = file.read()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*Warning: tf.lite.Interpreter is deprecated")
        interpreter = Interpreter(model_content=content, num_threads=os.cpu_count())
    (inputs,), (outputs,) = interpreter.get_input_details(), interpreter.get_output_details()
    if any(part["dtype"] is not np.float32 for part in (inputs, outputs)):
        raise ValueError("Its numbers are not float32.")
    interpreter.resize_tensor_input(inputs["index"], [1, *inputs["shape"][1:]])
    interpreter.allocate_tensors()

    def run(images: np.ndarray) -> np.ndarray:
        probabilities = np.empty((len(images), outputs["shape"][-1]), np.float32)
        for row, image in enumerate(images):
            interpreter.set_tensor(inputs["index"], image[None])
            interpreter.invoke()
            probabilities[row] = interpreter.get_tensor(outputs["index"])[0]
        return probabilities

    return ExportedModel(run, inputs["shape"].tolist(), outputs["shape"].tolist())


def _load_onnx(path: str) -> ExportedModel:
    with importing("onnxruntime", path):
        import onnxruntime
    available = onnxruntime.get_available_providers()
    # Others that may be there compile for minutes, or send the images elsewhere.
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    session = onnxruntime.InferenceSession(path, providers=providers)
    (inputs,), (outputs,) = session.get_inputs(), session.get_outputs()

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {inputs.name: images})[0]

    return ExportedModel(run, inputs.shape, outputs.shape)


def _load_saved_model(path: str) -> ExportedModel:
    import tensorflow as tf

    _check_graph(path)
    loaded = tf.saved_model.load(path)
    function = loaded.signatures["serving_default"]
    ((name, inputs),) = function.structured_input_signature[1].items()
    ((output_name, outputs),) = function.structured_outputs.items()

    def run(images: np.ndarray) -> np.ndarray:
        # The function alone does not keep the weights.
        return loaded.signatures["serving_default"](**{name: tf.constant(images)})[output_name].numpy()

    return ExportedModel(run, inputs.shape, outputs.shape)


def _check_graph(path: str) -> None:
    """Checks that a SavedModel does no more than compute: TensorFlow's programs may write files and run Python.

    Raises:
        UserError: it holds anything else.
    """
    from tensorflow.core.protobuf import saved_model_pb2
    from tensorflow.python.framework import op_def_registry

    content = saved_model_pb2.SavedModel()
    with open(os.path.join(path, GRAPH_FILE), "rb") as file:
        content.ParseFromString(file.read())
    (graph,) = content.meta_graphs
    if not graph.HasField("object_graph_def"):
        # TensorFlow 1's form, whose loading runs whatever the file names.
        raise ValueError("It is of TensorFlow 1.")
    functions = {function.signature.name: function for function in graph.graph_def.library.function}
    foreign = {node.WhichOneof("kind") for node in graph.object_graph_def.nodes} - HARMLESS_OBJECTS
    # What cannot be reached from here, such as the function that saves the weights, never runs.
    pending, seen = list(graph.object_graph_def.concrete_functions), set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in functions[name].node_def:
            called = [attribute.func.name for attribute in node.attr.values() if attribute.HasField("func")]
            called += [part.name for attribute in node.attr.values() for part in attribute.list.func]
            pending += called
            definition = op_def_registry.get(node.op)
            if node.op not in READING_OPS and (definition is None or definition.is_stateful):
                foreign.add(node.op)
    if foreign:
        raise UserError(
            f"{path} is not loaded: it holds {_shorten(min(map(str, foreign)))}, which does more than compute. "
            "Export the model again with compress_weights.py --export saved_model."
        )


def compile_model(model: keras.Model | ExportedModel) -> Callable[[Any], Any]:
    """Returns what takes uint8 images `(batch, height, width, 3)` to probabilities; compiled once for all sizes."""
    import tensorflow as tf

    if isinstance(model, ExportedModel):
        return model
    signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)
    return tf.function(lambda images: model(images, training=False), input_signature=[signature])


# Predicting


@contextlib.contextmanager
def naming_bad_images(*sequences: AugmentedImageSequence) -> Iterator[None]:
    """Raises a sequence's own error, with the path of the image, in place of what Keras makes of it."""
    try:
        yield
    except Exception as error:
        if reason := next((sequence.error for sequence in sequences if sequence.error), None):
            raise reason from error
        raise


def tell_bad_images(sequence: AugmentedImageSequence) -> None:
    """Prints which images of a sequence could not be read and were left out."""
    if bad_rows := sorted(sequence.bad_images):
        paths = join_names([sequence.paths[row] for row in bad_rows])
        print(f"{len(bad_rows)} images could not be read and were left out: {paths}")


def predict(model: keras.Model | ExportedModel, sequence: AugmentedImageSequence) -> np.ndarray:
    """Returns the probabilities of a sequence's images in its order, float32 `(images, classes)`.

    Under `skip_bad_images` those that cannot be read are left out, and printed.

    Raises:
        UserError: an image cannot be read.
    """
    with naming_bad_images(sequence):
        probabilities = model.predict(sequence.to_dataset(), verbose=1)
    tell_bad_images(sequence)
    return probabilities


def classify_image(
    model: keras.Model | ExportedModel,
    image: np.ndarray,
    class_names: Sequence[str],
    multi_label: bool = False,
    threshold: float = 0.5,
    decision: Decision | None = None,
    threshold_type: str = "exact_match",
) -> tuple[list[str], dict[str, float]]:
    """Classifies one image, with a run's decision as `predict.py` does.

    The image is resized as the generator does it. `predict.py` decodes large JPEGs at a fraction of their size: to
    have the same answer, read them with `generator.read_image(path, image_size)`. `read_image(path)` gives a picture
    that differs a little, and so do the probabilities then.

    Args:
        model: a model of this collection, or one that `load_exported_model` returns.
        image: RGB `(height, width, 3)`, pixels in `[0, 255]`, of any size.
        class_names: in the model's order, as `configs.json` has them.
        multi_label: whether several labels may hold.
        threshold: multi-label: lowest probability of a label that holds.
        decision: from `metrics.read_decision`: calibrates the probabilities and chooses the labels, in the place of
            `multi_label` and `threshold`.
        threshold_type: which of the decision's thresholds hold, `exact_match` or `best_f1`.

    Returns:
        The predicted class names (one, or multi-label any number) and the probability of each class.
    """
    from generator import resize_image

    batch = resize_image(image, model.input_shape[1:3])[None]
    probabilities = np.asarray(model(batch, training=False))
    if decision is not None:
        probabilities = decision.calibrate(probabilities)
        chosen = np.flatnonzero(decision.choose(probabilities, threshold_type)[0])
    else:
        chosen = np.flatnonzero(probabilities[0] >= threshold) if multi_label else [int(probabilities[0].argmax())]
    by_class = dict(zip(class_names, probabilities[0].tolist(), strict=True))
    return [class_names[position] for position in chosen], by_class
