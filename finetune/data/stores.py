"""Where images are: files and, through fsspec, the objects that URLs name; and which file a wrong path means."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from finetune.core.files import IMAGE_SUFFIXES
from finetune.core.labels import clean_label, show_difference
from finetune.core.options import UserError
from finetune.core.texts import shorten, show_text
from finetune.data.findings import BadImage

if TYPE_CHECKING:
    import fsspec

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# The packages that fsspec needs for a protocol. For others its own message names them.
STORE_PACKAGES = dict.fromkeys(("s3", "s3a"), "s3fs") | dict.fromkeys(("gs", "gcs"), "gcsfs")
STORE_PACKAGES |= dict.fromkeys(("abfs", "abfss", "az"), "adlfs") | dict.fromkeys(("http", "https"), "aiohttp")
# Fields that change with an object's bytes, in lower case without separators.
VERSION_FIELDS = frozenset({"size", "etag", "md5hash", "contentmd5", "crc32c", "checksum", "digest", "generation"})
VERSION_FIELDS |= {"versionid", "sha", "blobid", "mtime", "modified", "modify", "lastmodified", "updated", "created"}
# Bytes: enough for most headers, and hardly slower to fetch than one byte.
FIRST_PART = 2**16
# Threads that wait for stores need no core each.
STORE_THREADS = 16
# Marks that people leave around a path or a name.
MARKS_AROUND = " \t\r\n\xa0\ufeff'\"`\u2018\u2019\u201c\u201d"
DRIVE = re.compile(r"(?:^|(?<=/))([A-Za-z]:)/")
HOME = re.compile(r"(?:^|(?<=/))~/")


def is_url(path: str) -> bool:
    """Returns whether an image path is a URL, which fsspec reads. A Windows drive, one letter, is none."""
    return URL.match(path) is not None


def join_path(directory: str, path: str) -> str:
    """Puts `image_directory`, a folder or a URL, in front of an image path that is neither absolute nor a URL.

    `~/` means the user's home. Accents are returned in the encoding (NFC or NFD) of the file's name on the disk.
    """
    if is_url(path):
        return path
    if path.startswith("~/") and not os.path.lexists(os.path.join(directory, path)):
        return pick_spelling(os.path.expanduser(path))
    if not is_url(directory) or os.path.isabs(path):
        return pick_spelling(os.path.join(directory, path))
    protocol, place = directory.split("://", 1)
    # To stores "." and ".." are ordinary names.
    return f"{protocol}://{posixpath.normpath(posixpath.join(place, path.replace(os.sep, '/')))}"


def pick_spelling(path: str) -> str:
    """Returns a path with its accents in NFC or NFD, which macOS writes, whichever names an existing file."""
    if path.isascii() or os.path.lexists(path):
        return path
    return next((other for form in ("NFC", "NFD") if os.path.isfile(other := unicodedata.normalize(form, path))), path)


def read_bytes(path: str) -> np.ndarray:
    """Reads an image file, or the object that a URL names, as uint8 `(bytes,)`.

    Raises:
        OSError: the file cannot be read.
        BadImage: the object does not exist, or the store does not return it.
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
    with _describing_store_faults(url):
        store, name = _find_store(url)
        return store.cat_file(name)


def open_url(url: str) -> BinaryIO:
    """Opens the object that a URL names as a file, of which only the parts that are read are fetched if possible.

    Raises as `read_bytes` does, also while the file is read.
    """
    with _describing_store_faults(url):
        store, name = _find_store(url)
        size = _ask_store(store, name).get("size")
        # Some servers don't give the size.
        if size is None:
            return io.BytesIO(store.cat_file(name))

    def fetch(start: int, end: int) -> bytes:
        with _describing_store_faults(url):
            return store.cat_file(name, start=start, end=end)

    return io.BufferedReader(PartlyFetched(fetch, size))


def read_version(url: str) -> str:
    """Returns those facts of an object that change with its bytes: size, hashes, times. Raises as `read_bytes` does."""
    with _describing_store_faults(url):
        told = _ask_store(*_find_store(url))
    fields = {re.sub(r"[ _-]", "", name).lower(): value for name, value in told.items()}
    return json.dumps({name: str(fields[name]) for name in sorted(fields.keys() & VERSION_FIELDS)})


def hash_file(path: str) -> bytes | str:
    """Returns a digest of the bytes of a file or URL; its name if it can no longer be read."""
    try:
        if is_url(path):
            return hashlib.sha256(read_url(path)).digest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, BadImage):
        return path


class PartlyFetched(io.RawIOBase):
    """A file of `size` bytes whose parts are fetched when they are read, each twice as large as the one before.

    `fetch` returns the bytes from a start to an end, or the whole file if it cannot return parts.
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
        """Reads into a buffer and returns the number of bytes, 0 at the end; BadImage if the file's length changed."""
        part = self._read_part(len(buffer))[: len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def readall(self) -> bytes:
        """Returns the rest of the file, fetched at once; raises as `readinto` does."""
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
    """Returns the file system of a URL and the object's name there; raises anything."""
    # Takes 0.1 s, and most images are files.
    import fsspec.core
    from fsspec.implementations.local import LocalFileSystem

    if "::" in url:
        # The URLs after it tell fsspec how to read the first, and may name files that contain programs.
        raise ValueError("URLs joined by '::' are not read")
    store, name = fsspec.core.url_to_fs(url)
    # A pipe or a device has no end.
    if isinstance(store, LocalFileSystem) and not os.path.isfile(name):
        raise FileNotFoundError(name)
    return store, name


def _ask_store(store: fsspec.AbstractFileSystem, name: str) -> dict[str, Any]:
    """Returns a store's description of an object; raises anything, FileNotFoundError for a folder."""
    try:
        told = store.info(name)
    except FileNotFoundError:
        # fsspec's HTTP reader raises this for every failure. Asking for a byte gives the reason.
        store.cat_file(name, start=0, end=1)
        raise
    if told["type"] == "directory":
        raise FileNotFoundError(name)
    return told


@contextlib.contextmanager
def _describing_store_faults(url: str) -> Iterator[None]:
    try:
        yield
    except (BadImage, UserError):
        raise
    except ImportError as error:
        package = STORE_PACKAGES.get(url.split("://")[0])
        remedy = f"Run pip install {package}" if package else shorten(str(error)).rstrip(".")
        raise UserError(f"{show_text(url)} needs a package that is not installed. {remedy}.") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadImage("missing", "does not exist") from error
    except Exception as error:
        # Each store has exception types of its own.
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
        raise BadImage("unreachable", f"is out of reach: {shorten(reason) or type(error).__name__}") from error


def find_meant(path: str) -> str:
    """Returns the existing file or folder that a path means which does not exist; empty if there is none."""
    if not path or "\0" in path or is_url(path) or os.path.exists(path):
        return ""
    meant, _ = _respell(path)
    folder, _ = _Disk().find_folder(os.path.dirname(meant))
    key = _make_key(os.path.basename(meant))
    names = [name for name in _list_sorted(folder) if _make_key(name) == key]
    found = os.path.join(folder, names[0]) if len(names) == 1 else meant
    return found if os.path.exists(found) else ""


def explain_missing(files: Iterable[str]) -> dict[str, str]:
    """Returns what is wrong with the names of files that do not exist, for those that mean an existing file.

    Each folder is listed once, and only those in which such a file should be.
    """
    disk, found = _Disk(), {}
    for file in files:
        if not is_url(file) and "\0" not in file and (reason := _explain(file, disk)):
            found[file] = f"does not exist{reason}"
    return found


class _Disk:
    """The contents of folders, each listed once."""

    def __init__(self) -> None:
        self._images: dict[str, dict[str, list[str]]] = {}
        self._folders: dict[str, tuple[str, list[str]]] = {}

    def find_images(self, folder: str, key: str) -> list[str]:
        """Returns the images in a folder, sorted, whose name has this key, with or without the ending."""
        if folder not in self._images:
            found = self._images[folder] = {}
            for name in _list_sorted(folder):
                if name.lower().endswith(IMAGE_SUFFIXES):
                    for one in (name, os.path.splitext(name)[0]):
                        found.setdefault(_make_key(one), []).append(name)
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
            path = os.path.join(meant, *names)
            if len(names) == 1 and os.path.isdir(path):
                self._folders[folder] = path, steps + [_describe_difference(name, names)] * (names != [name])
            else:
                self._folders[folder] = folder, []
        return self._folders[folder]


def _explain(file: str, disk: _Disk) -> str:
    meant, steps = _respell(file)
    if not steps or not os.path.isfile(meant):
        folder, differences = disk.find_folder(os.path.dirname(meant))
        name = os.path.basename(meant)
        if not differences or not os.path.isfile(os.path.join(folder, name)):
            names = disk.find_images(folder, _make_key(name))
            if not names and name.lower().endswith(IMAGE_SUFFIXES):
                names = disk.find_images(folder, _make_key(os.path.splitext(name)[0]))
            if not names:
                drive = _find_drive(meant)
                return f": {drive[1]} is a drive of Windows. Write paths below image_directory" if drive else ""
            differences = [*differences, _describe_difference(name, names)]
            name = names[0]
        steps += differences
        meant = os.path.join(folder, name)
    return f", but {show_text(os.path.normpath(meant))} does: {', '.join(dict.fromkeys(steps))}"


def _respell(file: str) -> tuple[str, list[str]]:
    """Returns a path as it is written on this system, and what had to change."""
    meant, steps = file, []
    if "\\" in meant and os.sep != "\\":
        meant = meant.replace("\\", "/")
        steps.append("write / for \\")
    parts = meant.split("/") if os.sep == "/" else [meant]
    plain = "/".join(part.strip(MARKS_AROUND) for part in parts)
    if plain != meant:
        marks = "blanks" if plain == "/".join(part.strip() for part in parts) else "quotation marks"
        meant = plain
        steps.append(f"remove the {marks} around it")
    if home := HOME.search(meant):
        meant = os.path.expanduser(meant[home.start() :])
        steps.append("write the home folder for ~")
    if (drive := _find_drive(meant)) and (found := _leave_out_drive(meant, drive)):
        meant = found
        steps.append(f"its path here has no {drive[1]}")
    return meant, steps


def _find_drive(path: str) -> re.Match[str] | None:
    return DRIVE.search(path) if os.sep == "/" else None


def _leave_out_drive(path: str, drive: re.Match[str]) -> str:
    """Returns the file that a path with a Windows drive means: under WSL's mount, or below here by its end."""
    beginning, parts = path[: drive.start()], path[drive.end() :].split("/")
    mounted = os.path.join("/mnt", drive[1][0].lower(), *parts)
    ends = [os.path.join(*parts[start:]) for start in range(len(parts))]
    tried = [mounted, *(os.path.join(folder, end) for end in ends for folder in dict.fromkeys((beginning, "")))]
    return next((one for one in tried if os.path.isfile(one)), "")


def _describe_difference(name: str, names: list[str]) -> str:
    """Returns what to do about a name that means the first of some files, or any of them."""
    if len(names) > 1:
        return f"write which of {len(names)} files it is"
    if unicodedata.normalize("NFC", names[0]) == unicodedata.normalize("NFC", name):
        return "its accents are encoded otherwise (NFC or NFD)"
    if clean_label(names[0]) == clean_label(name):
        return f"'{show_difference(name)}' and '{show_difference(names[0])}' differ by invisible characters"
    if _make_key(names[0]) == _make_key(name):
        return "its capitals differ"
    if _make_key(os.path.splitext(names[0])[0]) == _make_key(name):
        return "add the ending, as make_csv_from_folders.py --table_path does"
    return "its ending differs"


def _make_key(name: str) -> str:
    """Returns what names that people take for the same have in common."""
    return clean_label(name).casefold()


def _list_sorted(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or os.curdir))
    except OSError:
        return []
