"""Caches of decoded, resized images, in memory or on disk."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from configs import Configs
from finetune.core.files import write_fault
from finetune.core.options import UserError
from finetune.data.findings import BadImage
from finetune.data.stores import is_url, read_version


class MemoryCache:
    """Keeps resized images in memory, which it reserves at once: too little memory is an error before training.

    Args:
        number: of images.
        image_size: `(height, width)`.

    Raises:
        UserError: there is too little free memory.
    """

    def __init__(self, number: int, image_size: Sequence[int]) -> None:
        shape = (number, *image_size, 3)
        needed, free = math.prod(shape), free_memory()
        if needed > free:
            raise UserError(
                f"image_cache: {number} images of {image_size[0]}x{image_size[1]} need {needed / 2**30:.1f} GiB of "
                f"memory. Free: {free / 2**30:.1f} GiB. Set image_cache to disk or none."
            )
        self._images = np.full(shape, 0, np.uint8)
        self._is_known = np.zeros(number, bool)

    def get(self, row: int) -> np.ndarray | None:
        """Returns the image of a row, uint8 `(height, width, 3)`, or None if it is not cached yet."""
        return self._images[row] if self._is_known[row] else None

    def put(self, row: int, image: np.ndarray) -> None:
        """Keeps the image of a row."""
        self._images[row] = image
        self._is_known[row] = True


class DiskCache:
    """Keeps resized images in a file that is mapped into memory, for this run, later runs and other processes.

    The file starts with an entry per image: the digest of `digest_image` and a checksum of the pixels. The pixels
    follow. They are written before their entry, and both are checked at an image's first use. So an image is decoded
    again if it has changed, or if a crash left it half written. Processes that share the file write the same bytes.

    Args:
        paths: image files or URLs.
        image_size: `(height, width)`.
        folder: of the file.
        resize_mode: how images of another shape are resized; each mode has its own file.
        pixel_range: black and white of some TIFFs; each range has its own file.

    Raises:
        UserError: the folder cannot be written, or has too little space.
    """

    ENTRY = np.dtype([("digest", "V16"), ("checksum", "<u4")])
    # To be raised when decoding or resizing changes.
    VERSION = 3

    def __init__(
        self,
        paths: Sequence[str],
        image_size: Sequence[int],
        folder: str,
        resize_mode: str = "stretch",
        pixel_range: Sequence[float] = (),
    ) -> None:
        self._paths = [path if is_url(path) else os.path.abspath(path) for path in paths]
        self._shape = (*image_size, 3)
        self._image_bytes = math.prod(self._shape)
        self._pixels_start = len(paths) * self.ENTRY.itemsize
        self._checked = np.zeros(len(paths), bool)
        self._digests: dict[int, bytes] = {}
        self._lock = threading.Lock()
        height, width = image_size
        key = "\0".join([str(self.VERSION), *map(repr, pixel_range), *self._paths])
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        kind = name_resizing(resize_mode)
        self.path = os.path.join(folder, f"images_{height}x{width}{kind}_{digest}.cache")
        try:
            os.makedirs(folder, exist_ok=True)
            Path(self.path).touch()
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 - stays open
            self._reserve(self._pixels_start + len(paths) * self._image_bytes)
        except OSError as error:
            raise write_fault(self.path, error, "image_cache_path") from error
        self._entries = np.memmap(self.path, self.ENTRY, "r", shape=len(paths))
        self._images = np.memmap(self.path, np.uint8, "r", offset=self._pixels_start, shape=(len(paths), *self._shape))

    def _reserve(self, size: int) -> None:
        status = os.fstat(self._file.fileno())
        missing = size - getattr(status, "st_blocks", status.st_size // 512) * 512
        free = shutil.disk_usage(os.path.dirname(self.path)).free
        if missing > free:
            raise UserError(
                f"image_cache: {self.path} needs {missing / 2**30:.1f} GiB more. Free: {free / 2**30:.1f} GiB. "
                "Choose another image_cache_path, or set image_cache to none."
            )
        if status.st_size != size:
            self._file.truncate(size)

    def get(self, row: int) -> np.ndarray | None:
        """Returns the image of a row, uint8 `(height, width, 3)`, or None if it is not cached or has changed."""
        if not self._checked[row]:
            entry, image, digest = self._entries[row], self._images[row], digest_image(self._paths[row])
            if entry["digest"].tobytes() != digest or entry["checksum"] != zlib.crc32(image):
                # For `put`: the image file may change while it is being read.
                self._digests[row] = digest
                return None
            self._checked[row] = True
        return self._images[row]

    def put(self, row: int, image: np.ndarray) -> None:
        """Keeps the image of a row that `get` did not find.

        Raises:
            UserError: it cannot be written.
        """
        digest = self._digests.pop(row, None) or digest_image(self._paths[row])
        entry = np.zeros((), self.ENTRY)
        entry["digest"], entry["checksum"] = np.void(digest), zlib.crc32(np.ascontiguousarray(image))
        parts = (self._pixels_start + row * self._image_bytes, image), (row * self.ENTRY.itemsize, entry)
        try:
            with self._lock:
                for start, part in parts:
                    self._file.seek(start)
                    self._file.write(part.tobytes())
        except OSError as error:
            raise write_fault(self.path, error, "image_cache_path") from error
        # A store answers more slowly than a disk, so it is asked once a run.
        self._checked[row] = is_url(self._paths[row])


def digest_image(path: str, pixel_range: Sequence[float] = ()) -> bytes:
    """Returns 16 bytes that identify an image: its path, size and modification time, or its URL and stored version.

    They also change with `pixel_range`, which some TIFFs depend on. The digest of an unreadable image is empty; reading
    the image gives the error.
    """
    path = path if is_url(path) else os.path.abspath(path)
    try:
        if is_url(path):
            version = read_version(path)
        else:
            status = os.stat(path)
            version = f"{status.st_size}\0{status.st_mtime_ns}"
    except (OSError, BadImage):
        return b""
    version = "\0".join([version, *map(repr, pixel_range)])
    return hashlib.blake2b(f"{path}\0{version}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def name_resizing(resize_mode: str) -> str:
    """Returns the part of a cache's file name that states the resize mode; older files have none."""
    return "" if resize_mode == "stretch" else f"_{resize_mode}"


def build_cache(configs: Configs, paths: Sequence[str], image_size: Sequence[int]) -> MemoryCache | DiskCache | None:
    """Builds the cache that the option `image_cache` names; raises UserError like `MemoryCache` and `DiskCache`."""
    if configs.image_cache == "memory":
        return MemoryCache(len(paths), image_size)
    if configs.image_cache == "none":
        return None
    return DiskCache(paths, image_size, configs.image_cache_path, configs.resize_mode, configs.pixel_range)


def free_memory() -> int:
    """Returns the free bytes of memory, within the limit of a container if there is one."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free
