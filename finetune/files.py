"""Files: written whole or not at all, JSON and CSV, walking folders."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetune.options import UserError

if TYPE_CHECKING:
    import pandas as pd

TEMPORARY_PREFIX = ".tmp-"
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png")
IMAGE_SUFFIXES += (".tif", ".tiff", ".webp")


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


def duplicate_file(source: str, path: str) -> None:
    """Gives a file a second name, without a second copy where the file system allows it."""
    with atomic_path(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def remove_stale_files(folder: str) -> None:
    """Removes the temporary files that processes of the past left in a folder when they were killed."""
    for entry in os.scandir(folder):
        found = re.match(rf"{re.escape(TEMPORARY_PREFIX)}(\d+)-", entry.name)
        if found and (int(found[1]) == os.getpid() or not is_running(int(found[1]))):
            shutil.rmtree(entry.path, ignore_errors=True)


def is_running(process_id: int) -> bool:
    """Tells whether a process exists; where the system cannot say, that it does."""
    try:
        os.kill(process_id, 0) if os.name == "posix" else None
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
