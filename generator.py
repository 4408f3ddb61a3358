"""Reads, resizes and augments images in worker threads and hands them to the model as batches of uint8 RGB."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import math
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import keras
import numpy as np
import psutil
import tensorflow as tf

from configs import MAX_IMAGE_PIXELS, UserError
from utils import (
    TAIL_BYTES,
    BadImage,
    check_end,
    check_length,
    decode_animated_png,
    is_url,
    read_bytes,
    read_header,
    read_version,
)

if TYPE_CHECKING:
    from imgaug import augmenters as iaa

    from augmenter import FusedAugmenter

# OpenCV's own threads would compete with the generator's workers for the same cores.
cv2.setNumThreads(1)

# OpenCV names its scaled decoding by grey and by BGR pictures; with the flag for RGB the former gives RGB.
DECODE_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
JPEG_START = b"\xff\xd8\xff"
# Ends the key of mixing's random numbers, which are others than those of augmentation. Any number but 0 does.
MIXING = 1
# What to do about an object that no store gives.
STORE_REMEDIES = {"missing": "Replace it", "unreachable": "Check the address, the network and your permissions"}


def read_image(path: str, image_size: Sequence[int] | None = None, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Decodes an image as an upright picture: its EXIF orientation is applied.

    Args:
        path: a file, or a URL that fsspec reads.
        image_size: `(height, width)` that the picture will be resized to: a JPEG at least twice as large is decoded
            at 1/2, 1/4 or 1/8 of its size, never below this one, which is faster.
        max_pixels: what the picture may have; the header tells before anything is decoded.

    Returns:
        uint8 RGB `(height, width, 3)`; grey is repeated, alpha dropped, 16 bits reduced to 8.

    Raises:
        UserError: the file is missing, cut short, too large or cannot be decoded.
    """
    try:
        encoded = read_bytes(path)
        sides = check_header(encoded, max_pixels)
        divisor = choose_divisor(encoded, sides, image_size) if image_size else 1
        image = decode_animated_png(encoded)
        if image is None and encoded.size:
            image = cv2.imdecode(encoded, DECODE_FLAGS[divisor])
    except (OSError, ValueError, cv2.error) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "err", None) or str(error)
        raise UserError(f"Cannot read the image {path}: {reason}. Replace it, or drop its row.") from error
    except BadImage as error:
        what = f"read the image {path}: it" if error.kind in STORE_REMEDIES else f"decode the image {path}:"
        remedy = STORE_REMEDIES.get(error.kind, "Replace it")
        raise UserError(f"Cannot {what} {error.detail}. {remedy}, or drop its row.") from error
    if image is None:
        raise UserError(f"Cannot decode the image {path}: it is damaged or no image. Replace it, or drop its row.")
    return image


def check_header(encoded: np.ndarray, max_pixels: int) -> tuple[int, int]:
    """Checks an image file's number of pixels, and that it has its end, before it is decoded.

    OpenCV decodes a JPEG that is cut short as if it were whole, the rest of it grey.

    Returns:
        Width and height; zeros where Pillow does not know the format.

    Raises:
        BadImage: it has too many pixels, or is cut short.
    """
    check_length(encoded[:12].tobytes(), encoded.size)
    file = io.BytesIO(encoded)
    header = read_header(file, max_pixels)
    if header is None:
        return 0, 0
    check_end(header, encoded[-TAIL_BYTES:].tobytes(), file)
    return header.size


def choose_divisor(encoded: np.ndarray, sides: Sequence[int], image_size: Sequence[int]) -> int:
    """Returns the largest of 8, 4, 2 and 1 by which a JPEG file's picture stays at least as large as `image_size`."""
    if encoded[:3].tobytes() != JPEG_START:
        return 1
    # Its EXIF orientation may turn the picture: the shorter side is taken for both.
    return next(divisor for divisor in (8, 4, 2, 1) if divisor == 1 or min(sides) // divisor >= max(image_size))


def resize_image(image: np.ndarray, image_size: Sequence[int], target: np.ndarray | None = None) -> np.ndarray:
    """Resizes an image to `(height, width)`; the aspect ratio may change.

    Where it shrinks, areas are averaged; where the sides shrink by less than 1.5, neighbours are interpolated, which
    takes 0.1 ms instead of 0.5 ms from 240x320 to 224x224.

    Args:
        image: `(any height, any width, 3)`.
        image_size: `(height, width)`.
        target: receives the result, `(height, width, 3)` of the image's type; None makes a new array.
    """
    height, width = image_size
    if image.shape[:2] == (height, width):
        if target is None:
            return image
        target[:] = image
        return target
    ratios = image.shape[0] / height, image.shape[1] / width
    averages = min(ratios) >= 1 and max(ratios) >= 1.5
    return cv2.resize(image, (width, height), target, interpolation=cv2.INTER_AREA if averages else cv2.INTER_LINEAR)


def mix_batch(
    images: np.ndarray, labels: np.ndarray, generator: np.random.Generator, mixup_alpha: float, cutmix_alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mixes each image of a batch with another one of it, and their labels by the same share.

    mixup blends the two; CutMix pastes a box of the other into the one. Where both alphas are above 0, even odds choose
    one of them for the batch. The others are a random permutation of the batch, in which an image may meet itself.
    Each pair has a share, and a box, of its own, as in the papers' equations; their programs draw one a batch.

    Source: Zhang et al., ICLR 2018, section 1 (arXiv:1710.09412); Yun et al., ICCV 2019, eqs. 1-2 (arXiv:1905.04899).

    Args:
        images: uint8 `(batch, height, width, 3)`.
        labels: float `(batch, classes)`.
        generator: draws everything.
        mixup_alpha: shares are drawn from Beta(alpha, alpha); 0 leaves mixup out.
        cutmix_alpha: likewise of CutMix; one of the two is above 0.

    Returns:
        The mixed images, uint8, and labels, float32: each image's own share of both, and its other's for the rest.
    """
    cuts = cutmix_alpha > 0 and (mixup_alpha <= 0 or generator.random() < 0.5)
    alpha = cutmix_alpha if cuts else mixup_alpha
    others = generator.permutation(len(images))
    shares = generator.beta(alpha, alpha, len(images))
    mix = _paste if cuts else _blend
    mixed, shares = mix(images, images[others], shares, generator)
    own = shares.astype(np.float32)[:, None]
    return mixed, (own * labels + (1 - own) * labels[others]).astype(np.float32)


def _blend(
    images: np.ndarray, others: np.ndarray, shares: np.ndarray, _: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    mixed = np.empty_like(images)
    for target, image, other, share in zip(mixed, images, others, shares.tolist(), strict=True):
        cv2.addWeighted(image, share, other, 1 - share, 0, target)
    return mixed, shares


def _paste(
    images: np.ndarray, others: np.ndarray, shares: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pastes boxes that have the image's own aspect ratio and any centre; the border cuts them off.

    Returns:
        The images, and their own shares of the pixels as they are then.
    """
    mixed, sides = images.copy(), np.array(images.shape[1:3])
    box_sides = np.rint(sides * np.sqrt(1 - shares)[:, None]).astype(int)
    starts = generator.integers(sides, size=box_sides.shape) - box_sides // 2
    starts, ends = np.maximum(starts, 0), np.minimum(starts + box_sides, sides)
    for target, other, (top, left), (bottom, right) in zip(mixed, others, starts, ends, strict=True):
        target[top:bottom, left:right] = other[top:bottom, left:right]
    return mixed, 1 - (ends - starts).prod(axis=1) / sides.prod()


class MemoryCache:
    """Keeps resized images in memory, which it takes at once: what does not fit is told before training starts.

    Args:
        number: of images.
        image_size: `(height, width)`.

    Raises:
        UserError: the memory that is free does not suffice.
    """

    def __init__(self, number: int, image_size: Sequence[int]) -> None:
        shape = (number, *image_size, 3)
        needed, free = math.prod(shape), free_memory()
        if needed > free:
            raise UserError(
                f"image_cache: {number} images of {image_size[0]}x{image_size[1]} need {needed / 2**30:.1f} GiB of "
                f"memory. Free are {free / 2**30:.1f} GiB. Set image_cache to disk or none."
            )
        self._images = np.full(shape, 0, np.uint8)
        self._is_known = np.zeros(number, bool)

    def get(self, row: int) -> np.ndarray | None:
        """Returns the image of a row, uint8 `(height, width, 3)`; None where it is not known yet."""
        return self._images[row] if self._is_known[row] else None

    def put(self, row: int, image: np.ndarray) -> None:
        """Keeps the image of a row."""
        self._images[row] = image
        self._is_known[row] = True


class DiskCache:
    """Keeps resized images in a file that is mapped into memory, for this run, later ones and other processes.

    The file holds an entry per image (a digest of its path, size and modification time, or of its URL and what the
    store tells without sending it, and a checksum of its pixels) and after the entries the pixels. Pixels are written
    before their entry, and both are checked at an image's first use: what changed meanwhile, or was half written when
    a process or the machine stopped, is decoded anew. Processes that share the file write the same bytes.

    Args:
        paths: image files or URLs.
        image_size: `(height, width)`.
        folder: where the file is, or will be.

    Raises:
        UserError: the folder cannot be written, or has too little room.
    """

    ENTRY = np.dtype([("digest", "V16"), ("checksum", "<u4")])
    # To be raised when images are decoded or resized in another way.
    VERSION = 1

    def __init__(self, paths: Sequence[str], image_size: Sequence[int], folder: str) -> None:
        self._paths = [path if is_url(path) else os.path.abspath(path) for path in paths]
        self._shape = (*image_size, 3)
        self._image_bytes = math.prod(self._shape)
        self._pixels_start = len(paths) * self.ENTRY.itemsize
        self._checked = np.zeros(len(paths), bool)
        self._digests: dict[int, bytes] = {}
        self._lock = threading.Lock()
        height, width = image_size
        key = "\0".join([str(self.VERSION), *self._paths])
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        self.path = os.path.join(folder, f"images_{height}x{width}_{digest}.cache")
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - open as long as the cache
            self._file.close()
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
            self._reserve(self._pixels_start + len(paths) * self._image_bytes)
        except OSError as error:
            raise UserError(f"Cannot write the image cache {self.path}: {error.strerror}.") from error
        self._entries = np.memmap(self.path, self.ENTRY, "r", shape=len(paths))
        self._images = np.memmap(self.path, np.uint8, "r", offset=self._pixels_start, shape=(len(paths), *self._shape))

    def _reserve(self, size: int) -> None:
        status = os.fstat(self._file.fileno())
        missing = size - getattr(status, "st_blocks", status.st_size // 512) * 512
        free = shutil.disk_usage(os.path.dirname(self.path)).free
        if missing > free:
            raise UserError(
                f"image_cache: {self.path} needs {missing / 2**30:.1f} GiB more. Free are {free / 2**30:.1f} GiB. "
                "Choose another image_cache_path, or set image_cache to none."
            )
        if status.st_size != size:
            self._file.truncate(size)

    def get(self, row: int) -> np.ndarray | None:
        """Returns the image of a row, uint8 `(height, width, 3)`; None where it is not known, or no longer right."""
        if not self._checked[row]:
            entry, image, digest = self._entries[row], self._images[row], self._digest(row)
            if entry["digest"].tobytes() != digest or entry["checksum"] != zlib.crc32(image):
                # Kept for `put`: the file may change while it is being read.
                self._digests[row] = digest
                return None
            self._checked[row] = True
        return self._images[row]

    def put(self, row: int, image: np.ndarray) -> None:
        """Keeps the image of a row, which was read after `get` did not have it.

        Raises:
            UserError: it cannot be written.
        """
        digest = self._digests.pop(row, None) or self._digest(row)
        entry = np.zeros((), self.ENTRY)
        entry["digest"], entry["checksum"] = np.void(digest), zlib.crc32(np.ascontiguousarray(image))
        parts = (self._pixels_start + row * self._image_bytes, image), (row * self.ENTRY.itemsize, entry)
        try:
            with self._lock:
                for start, part in parts:
                    self._file.seek(start)
                    self._file.write(part.tobytes())
        except OSError as error:
            raise UserError(f"Cannot write the image cache {self.path}: {error.strerror}. Free the space.") from error
        # A store is asked once a run: it takes longer to answer than a disk.
        self._checked[row] = is_url(self._paths[row])

    def _digest(self, row: int) -> bytes:
        path = self._paths[row]
        try:
            if is_url(path):
                version = read_version(path)
            else:
                status = os.stat(path)
                version = f"{status.st_size}\0{status.st_mtime_ns}"
        except (OSError, BadImage):
            return b""  # reading the image tells what is wrong with it; no entry's digest is that short
        key = f"{path}\0{version}"
        return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def free_memory() -> int:
    """Returns the bytes of memory that can still be taken, within a container's limit where there is one."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free


class Shares(NamedTuple):
    """Which of the devices that train together this process feeds.

    Attributes:
        devices: in all processes; a step has a batch for each.
        first: the position among them of this process's first one.
        local: how many of them this process has.
    """

    devices: int = 1
    first: int = 0
    local: int = 1


class AugmentedImageSequence(keras.utils.Sequence):
    """Batches of images and labels.

    Order, augmentation and mixing follow from `(seed, epoch, index)` alone, whatever the number of workers, and however
    the devices that train together are spread over processes; set `epoch` before each epoch of training, and
    `first_step` to leave out the batches before it.

    Args:
        paths: image files.
        labels: `(images,)` class positions, or `(images, classes)` of zeros and ones, in batches float32.
        image_size: `(height, width)` that images are resized to.
        batch_size: images a batch and device; the last one of an epoch may be smaller.
        augmenter: of uint8 images, from `augmenter.py` or imgaug itself, or None.
        shuffle: give each epoch an order of its own; otherwise the order is that of `paths`.
        seed: of order, augmentation and mixing.
        workers: threads that prepare batches.
        max_queue_size: batches kept ready.
        cache: keeps the resized images, or None.
        max_pixels: what an image may have.
        skip_bad_images: an image that cannot be read is noted in `bad_images`. Where `shuffle` is set the next one of
            the epoch's order that can be read takes its place; otherwise its row is left out.
        shares: the devices that train together whose images of every step these batches are; nothing else is read.
        mixup_alpha: where it or `cutmix_alpha` is above 0 and `shuffle` is set, each device's batch is mixed by
            `mix_batch` after augmentation: the labels in batches are float32 `(batch, classes)` then.
        cutmix_alpha: likewise.
        number_of_classes: of class positions, where batches are mixed.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: np.ndarray,
        image_size: Sequence[int],
        batch_size: int,
        augmenter: FusedAugmenter | iaa.Augmenter | None = None,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 1,
        max_queue_size: int = 12,
        cache: MemoryCache | DiskCache | None = None,
        max_pixels: int = MAX_IMAGE_PIXELS,
        skip_bad_images: bool = False,
        shares: Shares | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        number_of_classes: int | None = None,
    ) -> None:
        super().__init__(workers=max(workers, 1), max_queue_size=max_queue_size)
        self.paths = np.asarray(paths, dtype=object)
        self.labels = labels
        self.image_size = tuple(image_size)
        self.batch_size = batch_size
        self.augmenter = augmenter
        self.shuffle = shuffle
        self.seed = seed
        self.cache = cache
        self.max_pixels = max_pixels
        self.skip_bad_images = skip_bad_images
        self.bad_images: dict[int, str] = {}
        self.gives_shares = shares is not None and shuffle
        self.shares = shares or Shares()
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.number_of_classes = number_of_classes
        self.mixes = shuffle and max(mixup_alpha, cutmix_alpha) > 0
        self.epoch = 0
        self.first_step = 0
        self.error: UserError | None = None
        self._of_thread = threading.local()

    @property
    def steps(self) -> int:
        """Steps a whole epoch."""
        return math.ceil(len(self.paths) / (self.batch_size * self.shares.devices))

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns batch `first_step + index` of this epoch: uint8 RGB `(batch, height, width, 3)` and its labels."""
        index += self.first_step
        bounds = self._get_bounds(index)
        rows = self._order()[bounds[0] : bounds[-1]].copy()
        images = np.empty((len(rows), *self.image_size, 3), np.uint8)
        try:
            kept = [
                position
                for position, target in enumerate(images)
                if self._load_or_replace(rows, position, bounds[0], target)
            ]
        except UserError as error:
            # Keras turns what a worker raises into an error of its own: kept for whoever runs the model.
            self.error = error
            raise
        if len(kept) < len(rows):
            images, rows = images[kept], rows[kept]
        bounds = [bound - bounds[0] for bound in bounds]
        if self.augmenter is not None:
            images = self._augment(images, index, bounds)
        labels = self._batch_labels_of(rows)
        return self._mix(images, labels, index, bounds) if self.mixes else (images, labels)

    def get_shares(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.float32]:
        """Returns batch `first_step + index` for several devices, of which each has at least one image.

        Where a step has fewer images than there are devices, those without one get a grey image of weight 0.

        Returns:
            Images and labels as a batch has them, the images' weights (1 or 0), the bounds `(local + 1,)` of each
            device's images among them, and the number of the step's images on all devices.
        """
        images, labels = self[index]
        bounds = np.array(self._get_bounds(self.first_step + index))
        total = self._count(self.first_step + index)
        weights, bounds = np.ones(len(images), np.float32), bounds - bounds[0]
        for device in np.flatnonzero(bounds[1:] == bounds[:-1]):
            place = bounds[device]
            images = np.insert(images, place, 127, axis=0)
            labels, weights = np.insert(labels, place, 0, axis=0), np.insert(weights, place, 0)
            bounds[device + 1 :] += 1
        return images, labels, weights, bounds.astype(np.int32), np.float32(total)

    def to_dataset(self) -> tf.data.Dataset:
        """Returns the batches of an epoch for `fit` or `predict`, prepared ahead by threads of TensorFlow.

        Each pass over it is an epoch, the one that `epoch` says when it begins. Where `shares` are given, and `shuffle`
        is set, a batch is what `get_shares` returns.
        """
        return self._make_dataset(tf.TensorSpec((None, *self.image_size, 3), tf.uint8))

    def _make_dataset(self, inputs: tf.TensorSpec) -> tf.data.Dataset:
        labels = self._batch_labels_of(slice(0))
        specs = [inputs, tf.TensorSpec((None, *labels.shape[1:]), labels.dtype)]
        make_batch = self.__getitem__
        if self.gives_shares:
            make_batch = self.get_shares
            specs += [tf.TensorSpec((None,), tf.float32), tf.TensorSpec((self.shares.local + 1,), tf.int32)]
            specs += [tf.TensorSpec((), tf.float32)]

        def load(index: tf.Tensor) -> tuple[tf.Tensor, ...]:
            # What it returns follows from the index: op determinism would otherwise run it in the model's own thread.
            batch = tf.numpy_function(make_batch, [index], [spec.dtype for spec in specs], stateful=False)
            return tuple(tf.ensure_shape(part, spec.shape) for part, spec in zip(batch, specs, strict=True))

        options = tf.data.Options()
        options.threading.private_threadpool_size = self.workers + 1
        batches = tf.data.Dataset.range(len(self)).map(load, num_parallel_calls=self.workers, deterministic=True)
        return batches.prefetch(self.max_queue_size).with_options(options)

    def _count(self, step: int) -> int:
        """Counts a step's images on all devices."""
        whole = self.batch_size * self.shares.devices
        return min(whole, len(self.paths) - step * whole)

    def _get_bounds(self, step: int) -> list[int]:
        """Returns where in the epoch's order the images of this process's devices begin, and where the last end.

        What a step has is divided as evenly as can be.
        """
        devices, first, local = self.shares
        start, count = step * self.batch_size * devices, self._count(step)
        return [start + count * device // devices for device in range(first, first + local + 1)]

    def _load_or_replace(self, rows: np.ndarray, position: int, start: int, target: np.ndarray) -> bool:
        """Loads the image of `rows[position]`, or the one that takes its place; False where its row is left out."""
        order = self._order()
        for offset in range(len(order) if self.skip_bad_images and self.shuffle else 1):
            row = int(order[(start + position + offset) % len(order)])
            try:
                self._load(row, target)
            except UserError as error:
                if not self.skip_bad_images:
                    raise
                self.bad_images[row] = str(error)
            else:
                rows[position] = row
                return True
        if len(self.bad_images) == len(self.paths):
            raise UserError(f"None of the {len(self.paths)} images can be read. {next(iter(self.bad_images.values()))}")
        return False

    def _load(self, row: int, target: np.ndarray) -> None:
        image = self.cache.get(row) if self.cache else None
        if image is not None:
            target[:] = image
            return
        resize_image(read_image(self.paths[row], self.image_size, self.max_pixels), self.image_size, target)
        if self.cache:
            self.cache.put(row, target)

    def _labels_of(self, rows: np.ndarray | slice) -> np.ndarray:
        labels = self.labels[rows]
        return labels.astype(np.float32) if labels.ndim == 2 else labels

    def _batch_labels_of(self, rows: np.ndarray | slice) -> np.ndarray:
        labels = self._labels_of(rows)
        if not self.mixes or labels.ndim == 2:
            return labels
        return np.eye(self.number_of_classes, dtype=np.float32)[labels]

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.paths))
        key = (self.seed, self.epoch)
        # Worker threads of two epochs never share the cached order: it carries the key that it was made for.
        cached = getattr(self, "_cached_order", None)
        if cached is None or cached[0] != key:
            cached = key, np.random.default_rng(key).permutation(len(self.paths))
            self._cached_order = cached
        return cached[1]

    def _augment(self, images: np.ndarray, step: int, bounds: Sequence[int]) -> np.ndarray:
        # imgaug's augmenters share one random state: each thread has a copy, seeded anew for every device's batch.
        if not hasattr(self._of_thread, "augmenter"):
            self._of_thread.augmenter = self.augmenter.deepcopy()
        parts = []
        for position, (start, end) in enumerate(itertools.pairwise(bounds)):
            seed = np.random.SeedSequence(self._get_key(step, position)).generate_state(1)[0]
            self._of_thread.augmenter.seed_(int(seed) % 2**31)
            parts += [self._of_thread.augmenter(images=images[start:end])] if end > start else []
        return np.concatenate(parts) if len(parts) > 1 else (parts or [images])[0]

    def _mix(
        self, images: np.ndarray, labels: np.ndarray, step: int, bounds: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for position, (start, end) in enumerate(itertools.pairwise(bounds)):
            generator = np.random.default_rng((*self._get_key(step, position), MIXING))
            part = images[start:end], labels[start:end]
            parts.append(mix_batch(*part, generator, self.mixup_alpha, self.cutmix_alpha))
        images, labels = (np.concatenate(kind) for kind in zip(*parts, strict=True))
        return images, labels

    def _get_key(self, step: int, position: int) -> tuple[int, int, int]:
        """Returns what the random numbers of a device's batch follow from."""
        return self.seed, self.epoch, step * self.shares.devices + self.shares.first + position

    def get_y_true(self) -> np.ndarray:
        """Returns the labels of one epoch in its order, unmixed: int `(images,)` or float `(images, classes)`.

        Those of `bad_images` are left out, as they are from the batches of an order that is not shuffled.
        """
        order = self._order()
        return self._labels_of(order if self.shuffle else np.setdiff1d(order, list(self.bad_images)))

    def get_labels(self, rows: np.ndarray) -> np.ndarray:
        """Returns the labels of these positions in `paths`, as batches have them that are not mixed."""
        return self._labels_of(rows)

    def get_rows(self, index: int) -> np.ndarray:
        """Returns the positions in `paths` of the images of a batch that has been read, in an order not shuffled."""
        bounds = self._get_bounds(index)
        return np.setdiff1d(np.arange(bounds[0], bounds[-1]), list(self.bad_images))

    def get_class_counts(self) -> np.ndarray:
        """Returns how many images each class position has; positions after the last one present are left out."""
        return self.labels.sum(axis=0).astype(int) if self.labels.ndim == 2 else np.bincount(self.labels)


# Features in the place of images


def read_plainly(sequence: AugmentedImageSequence) -> AugmentedImageSequence:
    """Returns a sequence of the same images in the order of `paths`, without augmentation."""
    plain = copy.copy(sequence)
    plain.shuffle, plain.augmenter, plain.mixes = False, None, False
    plain.gives_shares = False
    plain.epoch, plain.first_step, plain.error, plain.bad_images = 0, 0, None, {}
    return plain


class FeatureSequence(AugmentedImageSequence):
    """Batches of features in the place of the images of another sequence, with its order, labels and shares.

    It trains the classifier on a frozen backbone without running the backbone. Images are not augmented.

    Args:
        features: float32 `(images, channels)`, in the order of `paths`. Rows of `bad_images` are not used: the next
            one in the epoch's order takes their place, or they are left out, as the images' own sequence does it.
        bad_images: why an image could not be read, by its position in `paths`.
        facts: what `AugmentedImageSequence` takes.
    """

    def __init__(self, features: np.ndarray, bad_images: dict[int, str], **facts: Any) -> None:
        super().__init__(**facts)
        self.features = features
        self.bad_images = dict(bad_images)

    @classmethod
    def of(cls, sequence: AugmentedImageSequence, features: np.ndarray, is_read: np.ndarray) -> FeatureSequence:
        """Puts features in the place of a sequence's images.

        Args:
            sequence: whose order, labels, shares, epoch and step it takes.
            features: as `model.compute_features` gives them.
            is_read: likewise.
        """
        features_only = cls(
            features,
            # What another process was to read is known to that one.
            {row: sequence.bad_images.get(row, "it could not be read") for row in np.flatnonzero(~is_read).tolist()},
            paths=sequence.paths,
            labels=sequence.labels,
            image_size=sequence.image_size,
            batch_size=sequence.batch_size,
            shuffle=sequence.shuffle,
            seed=sequence.seed,
            max_queue_size=sequence.max_queue_size,
            skip_bad_images=sequence.skip_bad_images,
            shares=sequence.shares if sequence.gives_shares or not sequence.shuffle else None,
        )
        features_only.epoch, features_only.first_step = sequence.epoch, sequence.first_step
        return features_only

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns batch `first_step + index` of this epoch: float32 `(batch, channels)` and its labels."""
        bounds = self._get_bounds(index + self.first_step)
        rows = self._order()[bounds[0] : bounds[-1]].copy()
        features = np.empty((len(rows), self.features.shape[1]), np.float32)
        kept = [
            position
            for position, target in enumerate(features)
            if self._load_or_replace(rows, position, bounds[0], target)
        ]
        return features[kept], self._labels_of(rows[kept])

    def to_dataset(self) -> tf.data.Dataset:
        """Returns the batches of an epoch, as the images' own sequence does it."""
        return self._make_dataset(tf.TensorSpec((None, self.features.shape[1]), tf.float32))

    def _load(self, row: int, target: np.ndarray) -> None:
        if row in self.bad_images:
            raise UserError(self.bad_images[row])
        target[:] = self.features[row]
