"""Files: written whole or not at all, JSON and CSV, walking folders."""

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
from finetune.core.streams import ASCII_NAMES, has_ascii_names
from finetune.core.texts import join_names

if TYPE_CHECKING:
    import pandas as pd

TEMPORARY_PREFIX = ".tmp-"
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png")
IMAGE_SUFFIXES += (".tif", ".tiff", ".webp")
FREE_SPACE, CHANGE_PERMISSIONS = "Free space or choose", "Change the permissions or choose"
# Why a path cannot be written, and what to do, in front of "another ...".
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
    """Returns the error for a path that cannot be written: no space, a read-only disk and no permission differ.

    Args:
        path: as the user knows it.
        error: the system's. HDF5's libraries name its number in their text alone.
        option: what to change.
    """
    number = error.errno
    if found := re.search(r"errno = (\d+)", str(error)):
        number = int(found[1])
    reason, remedy = WRITE_FAULTS.get(number, (error.strerror or str(error), "Choose"))
    return UserError(f"Cannot write {path}: {reason}. {remedy} another {option}.")


def find_existing(folder: str) -> str:
    """Returns a folder or, if it has yet to be made, the nearest one around it that exists."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    return place


def check_folder(folder: str, option: str) -> str:
    """Returns a folder after checking, before any work, that files can be written into it.

    Args:
        folder: one that has yet to be made is not made.
        option: the one that names it.

    Raises:
        UserError: says why not.
    """
    try:
        with tempfile.TemporaryFile(dir=find_existing(folder), prefix=f"{TEMPORARY_PREFIX}{os.getpid()}-") as file:
            # Some file systems notice only here that they are full.
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_fault(folder, error, option) from error
    return folder


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
        raise write_fault(path, error) from error
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


class Visible(NamedTuple):
    """What lies below a folder, each list sorted.

    Attributes:
        files: their paths.
        closed: what leads to no file: broken links, links to a folder around them, folders that cannot be opened.
        folders: the folder itself and those below it.
    """

    files: list[str]
    closed: list[str]
    folders: list[str]


def list_visible(folder_path: str) -> Visible:
    """Lists the files below a folder, those of linked folders too; hidden files and folders are left out.

    Each folder is entered once: under its own name where it has one below `folder_path`, else through the first link.
    A link to a folder around itself is not followed, since that would have no end.

    Raises:
        UserError: a name is no text, so that a CSV file cannot hold it.
    """
    files, closed, entered = [], [], {}
    # Folders before links to folders: a name of its own comes first. With each, the folders that lie around it.
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
            # Only links cost another look.
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
    """Reports which links and folders lead to no file."""
    if paths:
        what = "links or folders that lead nowhere, lead back or are closed"
        report(f"Left out {len(paths)} {what}: {join_names(paths)}")


def lies_around(folder: str, other: str) -> bool:
    """Tells whether a folder is another one or holds it at any depth, links followed."""
    folder, other = os.path.realpath(folder), os.path.realpath(other)
    return os.path.join(other, "").startswith(os.path.join(folder, ""))


def check_file_name(path: str) -> None:
    """Raises UserError where a path is no text, so that a CSV file cannot hold it."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        fault = f"ASCII. {ASCII_NAMES}" if has_ascii_names() else "UTF-8. Rename the file."
        raise UserError(f"The file name {path!a} is not {fault}") from error


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
