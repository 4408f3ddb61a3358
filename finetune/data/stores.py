"""Where images are: files and, through fsspec, the objects that URLs name."""

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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from finetune.core.options import UserError
from finetune.core.texts import shorten, show_text
from finetune.data.findings import BadImage

if TYPE_CHECKING:
    import fsspec

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
    """Puts `image_directory`, a folder or a URL, in front of an image path that is neither absolute nor a URL.

    A path in the user's home may begin with `~/`. A file keeps the encoding of its accents on the disk.
    """
    if is_url(path):
        return path
    if path.startswith("~/") and not os.path.lexists(os.path.join(directory, path)):
        return pick_spelling(os.path.expanduser(path))
    if not is_url(directory) or os.path.isabs(path):
        return pick_spelling(os.path.join(directory, path))
    protocol, place = directory.split("://", 1)
    # Stores take "." and ".." for names of folders.
    return f"{protocol}://{posixpath.normpath(posixpath.join(place, path.replace(os.sep, '/')))}"


def pick_spelling(path: str) -> str:
    """Returns a path as its file is called: accents are encoded in two ways, NFC and, by macOS, NFD."""
    if path.isascii() or os.path.lexists(path):
        return path
    return next((other for form in ("NFC", "NFD") if os.path.isfile(other := unicodedata.normalize(form, path))), path)


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


def hash_file(path: str) -> bytes | str:
    """Returns a digest of the bytes of a file or URL, or its name where it can no longer be read."""
    try:
        if is_url(path):
            return hashlib.sha256(read_url(path)).digest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, BadImage):
        return path


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
    # Takes 0.1 s, and most images are files.
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
        remedy = f"Run pip install {package}" if package else shorten(str(error)).rstrip(".")
        raise UserError(f"{show_text(url)} needs a package that is not installed. {remedy}.") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadImage("missing", "does not exist") from error
    except Exception as error:
        # Each store has errors of its own, which are not those of Python: all of it is the store's answer.
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
        raise BadImage("unreachable", f"is out of reach: {shorten(reason) or type(error).__name__}") from error
