"""Reads, resizes and augments images in worker threads and hands them to the model as batches of uint8 RGB."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import keras
import numpy as np

from configs import UserError

if TYPE_CHECKING:
    from imgaug import augmenters as iaa

# OpenCV's own threads would compete with the generator's workers for the same cores.
cv2.setNumThreads(1)


def read_image(path: str) -> np.ndarray:
    """Decodes an image file as an upright picture: its EXIF orientation is applied.

    Returns:
        uint8 RGB `(height, width, 3)`; grey is repeated, alpha dropped, 16 bits reduced to 8.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    try:
        encoded = np.fromfile(path, np.uint8)
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB) if encoded.size else None
    except (OSError, cv2.error) as error:
        reason = error.strerror if isinstance(error, OSError) else error.err
        raise UserError(f"Cannot read the image {path}: {reason}. Replace it, or drop its row.") from error
    if image is None:
        raise UserError(f"Cannot decode the image {path}: it is damaged or no image. Replace it, or drop its row.")
    return image


def resize_image(image: np.ndarray, image_size: Sequence[int]) -> np.ndarray:
    """Resizes an image to `(height, width)`, averaging areas where it shrinks; the aspect ratio may change."""
    height, width = image_size
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


class AugmentedImageSequence(keras.utils.Sequence):
    """Batches of images and labels.

    Order and augmentation follow from `(seed, epoch, index)` alone, whatever the number of workers; set `epoch`
    before each epoch of training, and `first_step` to leave out the batches before it.

    Args:
        paths: image files.
        labels: `(images,)` class positions, or `(images, classes)` of zeros and ones.
        image_size: `(height, width)` that images are resized to.
        batch_size: images a batch; the last one of an epoch may be smaller.
        augmenter: imgaug augmenter of uint8 images, or None.
        shuffle: give each epoch an order of its own; otherwise the order is that of `paths`.
        seed: of order and augmentation.
        workers: threads that prepare batches; 0 or 1 uses the main one.
        max_queue_size: batches kept ready.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: np.ndarray,
        image_size: Sequence[int],
        batch_size: int,
        augmenter: iaa.Augmenter | None = None,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 1,
        max_queue_size: int = 12,
    ) -> None:
        super().__init__(workers=max(workers, 1), max_queue_size=max_queue_size)
        self.paths = np.asarray(paths, dtype=object)
        self.labels = labels
        self.image_size = tuple(image_size)
        self.batch_size = batch_size
        self.augmenter = augmenter
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.first_step = 0
        self.error: UserError | None = None
        self._of_thread = threading.local()

    @property
    def steps(self) -> int:
        """Batches a whole epoch."""
        return math.ceil(len(self.paths) / self.batch_size)

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns batch `first_step + index` of this epoch: uint8 RGB `(batch, height, width, 3)` and its labels."""
        index += self.first_step
        rows = self._order()[index * self.batch_size : (index + 1) * self.batch_size]
        try:
            images = np.stack([resize_image(read_image(path), self.image_size) for path in self.paths[rows]])
        except UserError as error:
            # Keras turns what a worker raises into an error of its own: kept for whoever runs the model.
            self.error = error
            raise
        if self.augmenter is not None:
            images = self._augment(images, index)
        return images, self.labels[rows]

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

    def _augment(self, images: np.ndarray, index: int) -> np.ndarray:
        # imgaug's augmenters share one random state: each thread has a copy, seeded anew for every batch.
        if not hasattr(self._of_thread, "augmenter"):
            self._of_thread.augmenter = self.augmenter.deepcopy()
        seed = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0]
        self._of_thread.augmenter.seed_(int(seed) % 2**31)
        return self._of_thread.augmenter(images=images)

    def get_y_true(self) -> np.ndarray:
        """Returns the labels of one epoch in its order: int `(images,)` or float `(images, classes)`."""
        return self.labels[self._order()]

    def get_class_counts(self) -> np.ndarray:
        """Returns how many images each class position has; positions after the last one present are left out."""
        return self.labels.sum(axis=0).astype(int) if self.labels.ndim == 2 else np.bincount(self.labels)
