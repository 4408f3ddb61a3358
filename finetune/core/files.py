"""Files and folders: writing files atomically, as JSON and CSV too, and listing folders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.core.options import UserError
from finetune.core.scripts import ASCII_NAMES, has_ascii_names
from finetune.core.texts import join_names

if TYPE_CHECKING:
    import pandas as pd

TEMPORARY_PREFIX = ".tmp-"
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png")
IMAGE_SUFFIXES += (".tif", ".tiff", ".webp")
FREE_SPACE, CHANGE_PERMISSIONS = "Free space or choose", "Change the permissions or choose"
# Why a path cannot be written, and what to do: the words before "another ...".
WRITE_FAULTS = {
    errno.ENOSPC: ("there is no space left on the disk", FREE_SPACE),
    errno.EROFS: ("the file system is read-only", "Choose"),
    errno.EACCES: ("you have no permission to write there", CHANGE_PERMISSIONS),
    errno.EPERM: ("you have no permission to write there", CHANGE_PERMISSIONS),
    errno.EFBIG: ("the file is larger than the system allows", "Choose"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "Choose"),
    errno.EEXIST: ("a part of the path is a file, not a folder", "Choose"),
}
if hasattr(errno, "EDQUOT"):
    WRITE_FAULTS[errno.EDQUOT] = ("your disk quota is used up", FREE_SPACE)


def write_fault(path: str, error: OSError, option: str = "path") -> UserError:
    """Returns the error for a path that cannot be written, with the reason and a remedy.

    Args:
        path: the path as the user knows it.
        error: from the system, or from HDF5, whose errors have the number only in their text.
        option: what the user can change.
    """
    number = error.errno
    if found := re.search(r"errno = (\d+)", str(error)):
        number = int(found[1])
    reason, remedy = WRITE_FAULTS.get(number, (error.strerror or str(error), "Choose"))
    return UserError(f"Cannot write {path}: {reason}. {remedy} another {option}.")


def find_existing(folder: str) -> str:
    """Returns a folder, or its nearest parent that exists."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    return place


def check_folder(folder: str, option: str) -> str:
    """Returns a folder after checking that files can be written into it, without making it.

    Args:
        folder: its path.
        option: the option that names it.

    Raises:
        UserError: the folder is not writable.
    """
    try:
        with tempfile.TemporaryFile(dir=find_existing(folder), prefix=f"{TEMPORARY_PREFIX}{os.getpid()}-") as file:
            # Only now do some file systems report that they are full.
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_fault(folder, error, option) from error
    return folder


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """Yields the path of a temporary file or folder, which replaces `path` once it is complete and on the disk.

    It has the same name, as some writers choose the format by the suffix, in a temporary folder beside `path`. The name
    of this folder contains the process ID, so that `remove_stale_files` finds what a killed process left.

    Raises:
        UserError: the path cannot be written.
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
            # A folder cannot replace another one.
            os.replace(path, f"{temporary}.before")
        os.replace(temporary, path)
        if os.name == "posix":
            # The new name is on the disk only after this.
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise write_fault(path, error) from error
    finally:
        shutil.rmtree(temporary_folder, ignore_errors=True)


def list_files(path: str) -> list[str]:
    """Returns all files below a folder, sorted, or the path itself if it is a file."""
    if not os.path.isdir(path):
        return [path]
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)


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


class Visible(NamedTuple):
    """The contents of a folder, each list sorted.

    Attributes:
        files: the paths of all files.
        closed: broken links, links to a parent folder, and folders that cannot be opened.
        folders: the folder itself and all folders below it.
    """

    files: list[str]
    closed: list[str]
    folders: list[str]


def list_visible(folder_path: str) -> Visible:
    """Lists the files below a folder and in linked folders, without hidden files and folders.

    Each folder is entered once, preferably under its own name rather than through a link. A link to a parent folder is
    not followed, as that would never end.

    Raises:
        UserError: a CSV file cannot hold a file name.
    """
    files, closed, entered = [], [], {}
    # Each with its parent folders. Links come last, so that a folder is found under its own name first.
    folders, links = [(folder_path, ())], []
    while folders or links:
        folder, around = folders.pop() if folders else links.pop(0)
        place = os.path.realpath(folder)
        if place in entered:
            continue
        entered[place] = folder
        try:
            with os.scandir(folder) as found:
                entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda one: one.name)
        except OSError:
            closed.append(folder)
            continue
        for entry in entries:
            check_file_name(entry.path)
            # Only links need another system call.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                is_link = os.path.realpath(entry.path) != os.path.join(place, entry.name)
                if is_link and any(lies_around(entry.path, inner) for inner in (*around, place)):
                    closed += [entry.path] * (os.path.realpath(entry.path) not in entered)
                elif is_link:
                    links.append((entry.path, (*around, place)))
                else:
                    folders.append((entry.path, around))
            else:
                (closed if entry.is_symlink() and not os.path.isfile(entry.path) else files).append(entry.path)
    return Visible(sorted(files), sorted(closed), sorted(entered.values()))


def report_closed(paths: Sequence[str], report: Callable[[str], object] = print) -> None:
    """Reports the links and folders that `list_visible` could not enter."""
    if paths:
        report(f"Left out broken or circular links and unreadable folders ({len(paths)}): {join_names(paths)}")


def lies_around(folder: str, other: str) -> bool:
    """Returns whether a folder is or contains another one, with links resolved."""
    folder, other = os.path.realpath(folder), os.path.realpath(other)
    return os.path.join(other, "").startswith(os.path.join(folder, ""))


def check_file_name(path: str) -> None:
    """Raises UserError if a CSV file cannot hold a path."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        fault = f"ASCII. {ASCII_NAMES}" if has_ascii_names() else "UTF-8. Rename the file."
        raise UserError(f"The file name {path!a} is not {fault}") from error


def duplicate_file(source: str, path: str) -> None:
    """Gives a file a second name: as a hard link, or as a copy if the file system has no hard links."""
    with atomic_path(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def remove_stale_files(folder: str) -> None:
    """Removes the temporary files that killed processes left in a folder."""
    for entry in os.scandir(folder):
        found = re.match(rf"{re.escape(TEMPORARY_PREFIX)}(\d+)-", entry.name)
        if found and (int(found[1]) == os.getpid() or not is_running(int(found[1]))):
            shutil.rmtree(entry.path, ignore_errors=True)


def is_running(process_id: int) -> bool:
    """Returns whether a process exists; True if the system cannot say."""
    if os.name == "posix":
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return True
