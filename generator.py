"""Reads, resizes and augments images in worker threads and hands them to the model as batches of uint8 RGB."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import cv2
import keras
import numpy as np
import tensorflow as tf
from imgaug import augmenters as iaa

from augmenter import build_augmenter
from configs import MAX_IMAGE_PIXELS, Configs
from finetune.caches import DiskCache, MemoryCache, build_cache
from finetune.crops import draw_crop, enlarge_for_crops
from finetune.data_check import check_images
from finetune.images import read_image, resize_image
from finetune.mixing import mix_batch
from finetune.options import UserError
from finetune.stores import join_path
from finetune.tables import IMAGE_COLUMN, encode_labels, read_table
from finetune.texts import join_names
from finetune.warps import FusedAugmenter

# OpenCV's own threads would compete with the generator's workers for the same cores.
cv2.setNumThreads(1)

# Ends the key of mixing's random numbers, and of the crops': others than those of augmentation. Any number but 0 does.
MIXING, CROPPING = 1, 2


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
        crop_area: where it is not `(1, 1)` and `shuffle` is set, a part of each picture is shown, a share of it between
            these: see `draw_crop`. There must be no cache.
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
        crop_area: Sequence[float] = (1.0, 1.0),
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
        self.crop_area = tuple(crop_area)
        self.crops = shuffle and self.crop_area != (1, 1)
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
                self._load(row, target, start + position)
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

    def _load(self, row: int, target: np.ndarray, place: int) -> None:
        if self.crops:
            image = read_image(self.paths[row], enlarge_for_crops(self.image_size, self.crop_area), self.max_pixels)
            part = draw_crop(
                image.shape[:2], self.crop_area, np.random.default_rng((self.seed, self.epoch, place, CROPPING))
            )
            resize_image(image[part], self.image_size, target)
            return
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

    def get_read_paths(self) -> np.ndarray:
        """Returns the paths of the images that could be read, text `(images,)`, in the order of `paths`."""
        return self.paths[np.setdiff1d(np.arange(len(self.paths)), list(self.bad_images))]

    def get_rows(self, index: int) -> np.ndarray:
        """Returns the positions in `paths` of the images of a batch that has been read, in an order not shuffled."""
        bounds = self._get_bounds(index)
        return np.setdiff1d(np.arange(bounds[0], bounds[-1]), list(self.bad_images))

    def get_class_counts(self) -> np.ndarray:
        """Returns how many images each class position has; positions after the last one present are left out."""
        return self.labels.sum(axis=0).astype(int) if self.labels.ndim == 2 else np.bincount(self.labels)


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
    paths, labels = _list_images(csv_path, class_names, configs, bad_rows)
    image_size = configs.image_target_size[:2]
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
        cache=build_cache(configs.image_cache, paths, image_size, configs.image_cache_path),
        max_pixels=configs.max_image_pixels,
        skip_bad_images=configs.skip_bad_images,
        shares=shares,
        mixup_alpha=configs.mixup_alpha,
        cutmix_alpha=configs.cutmix_alpha,
        number_of_classes=len(class_names),
        crop_area=configs.random_crop_area if training else (1.0, 1.0),
    )


def _list_images(
    csv_path: str, class_names: Sequence[str], configs: Configs, bad_rows: Collection[int] | None
) -> tuple[list[str], np.ndarray]:
    """Returns the paths of a table's usable images and their labels, as `encode_labels` gives them."""
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
    return [paths[row] for row in kept], labels[kept]


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
