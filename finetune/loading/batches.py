"""Making a batch: choosing, reading, augmenting and mixing its images."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from imgaug import augmenters as iaa

from configs import MAX_IMAGE_PIXELS, Configs
from finetune.core.arguments import argument_error, check_rows, take_size
from finetune.core.options import UserError
from finetune.data.images import JPEG_HEADER, PAD_GREY, read_image, resize_image, shape_image
from finetune.loading.augmentation import (
    FusedAugmenter,
    choose_shape,
    draw_crop,
    enlarge_for_crops,
    mix_batch,
    resample,
)
from finetune.loading.caches import DiskCache, MemoryCache

# OpenCV's own threads would compete with the generator's workers for the same cores.
cv2.setNumThreads(1)

# Last part of the seeds of mixing and cropping: it keeps their random numbers apart from those of augmentation.
MIXING, CROPPING = 1, 2
# An epoch's remaining images make a step of their own from this share of a step on.
SMALLEST_REST = 0.25


class Shares(NamedTuple):
    """The devices that this process feeds, among all devices that train together.

    Attributes:
        devices: in all processes; each step has a batch for each of them.
        first: position of this process's first device.
        local: number of this process's devices.
    """

    devices: int = 1
    first: int = 0
    local: int = 1


@dataclasses.dataclass(eq=False, repr=False)
class ImageBatches:
    """Batches of images and labels, made on request in any thread or process.

    Order, augmentation and mixing depend on `(seed, epoch, index)` alone: neither on the number of workers nor on how
    the devices are spread over processes. Set `epoch` before each epoch of training. `first_step` skips the batches
    before it.

    Attributes:
        paths: image files.
        labels: class positions `(images,)`, or zeros and ones `(images, classes)`, which become float32 in batches.
        image_size: `(height, width)` of the images in a batch.
        batch_size: images per batch and device. The last batch of an epoch may be smaller. With `shuffle`, a remainder
            of less than a quarter of a step is spread over the other steps.
        augmenter: changes uint8 images; from `augmenter.py` or imgaug.
        shuffle: draw a new order for each epoch; otherwise keep the order of `paths`.
        seed: of order, augmentation and mixing.
        cache: keeps the resized images.
        max_pixels: an image with more pixels is an error.
        skip_bad_images: note unreadable images in `bad_images` and go on. With `shuffle`, the next readable image of
            the epoch takes the place of an unreadable one; otherwise its row is left out.
        shares: the devices to read images for.
        mixup_alpha: above 0, and with `shuffle`, `mix_batch` mixes each device's batch after augmentation. Labels in
            batches are then float32 `(batch, classes)`.
        cutmix_alpha: the same for CutMix.
        number_of_classes: needed for mixing class positions.
        crop_area: range of the area of random crops, used with `shuffle`: see `draw_crop`. Crops rule out a cache.
        resize_mode: how images of another shape are resized: see `place_image`. Random crops are stretched, but padded
            with `pad`.
        pixel_range: the values of black and white, as in `read_image`.
    """

    paths: Sequence[str]
    labels: np.ndarray
    image_size: Sequence[int]
    batch_size: int
    augmenter: FusedAugmenter | iaa.Augmenter | None = None
    shuffle: bool = False
    seed: int = 0
    cache: MemoryCache | DiskCache | None = None
    max_pixels: int = MAX_IMAGE_PIXELS
    skip_bad_images: bool = False
    shares: Shares | None = None
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    number_of_classes: int | None = None
    crop_area: Sequence[float] = (1.0, 1.0)
    resize_mode: str = "stretch"
    pixel_range: Sequence[float] = ()

    def __post_init__(self) -> None:
        Configs.check_values(
            batch_size=self.batch_size,
            random_seed=self.seed,
            max_image_pixels=self.max_pixels,
            mixup_alpha=self.mixup_alpha,
            cutmix_alpha=self.cutmix_alpha,
            random_crop_area=self.crop_area,
            resize_mode=self.resize_mode,
        )
        self.paths = np.asarray(self.paths, dtype=object)
        self.labels = np.asarray(self.labels)
        check_rows("labels", self.labels, self.paths)
        if not isinstance(self.shares, Shares | None):
            raise argument_error("shares", "Shares or None", self.shares)
        self.image_size = take_size("image_size", self.image_size)
        self.gives_shares = self.shares is not None and self.shuffle
        self.shares = self.shares or Shares()
        self.crop_area = tuple(self.crop_area)
        self.crops = self.shuffle and self.crop_area != (1, 1)
        self.mixes = self.shuffle and max(self.mixup_alpha, self.cutmix_alpha) > 0
        self.bad_images: dict[int, str] = {}
        self.epoch = 0
        self.first_step = 0
        # JPEG headers, kept from the first reading.
        self._headers = np.zeros(len(self.paths), JPEG_HEADER)
        self._of_thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_of_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _of_thread=threading.local())

    def copy_facts(self) -> ImageBatches:
        """Returns the same batches as a plain `ImageBatches`, which another process can unpickle."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(ImageBatches)}
        return ImageBatches(**facts)

    @property
    def _step_size(self) -> int:
        return self.batch_size * self.shares.devices

    @property
    def _spreads_rest(self) -> bool:
        """Whether the remaining images of an epoch are spread over its steps.

        Batch normalisation suffers from a last step of few images: with 33 images in batches of 16, the validation
        loss of ten seeds was higher by 0.15 (95 % confidence interval 0.04 to 0.26).
        """
        whole, images = self._step_size, len(self.paths)
        return self.shuffle and whole < images and 0 < images % whole < SMALLEST_REST * whole

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        whole, images = self._step_size, len(self.paths)
        return images // whole if self._spreads_rest else math.ceil(images / whole)

    @property
    def largest_share(self) -> int:
        """The most images that a step has on the devices of this process."""
        largest = math.ceil(len(self.paths) / self.steps) if self._spreads_rest else self._step_size
        return math.ceil(largest / self.shares.devices) * self.shares.local

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns batch `first_step + index` of this epoch: uint8 RGB `(batch, height, width, 3)` and its labels.

        Raises:
            UserError: an image cannot be read.
        """
        index += self.first_step
        first, *_, last = self._get_bounds(index)
        bounds = [bound - first for bound in self._get_bounds(index)]
        rows = self._order()[first:last].copy()
        images = np.empty((len(rows), *self.image_size, 3), np.uint8)
        parts, kept = [], np.ones(len(rows), bool)
        for position, (start, end) in enumerate(itertools.pairwise(bounds)):
            augmenter = self._get_augmenter(index, position) if end > start else None
            maps = augmenter.draw_maps(end - start, self.image_size) if isinstance(augmenter, FusedAugmenter) else None
            for place in range(start, end):
                matrix = None if maps is None else maps[place - start]
                kept[place] = self._load_or_replace(rows, place, first, images[place], matrix)
            part, is_kept = images[start:end], kept[start:end]
            part = part if is_kept.all() else part[is_kept]
            if augmenter is not None:
                part = augmenter.finish(part) if isinstance(augmenter, FusedAugmenter) else augmenter(images=part)
            labels = self._batch_labels_of(rows[start:end][is_kept])
            if self.mixes:
                generator = np.random.default_rng((*self._get_key(index, position), MIXING))
                part, labels = mix_batch(part, labels, generator, self.mixup_alpha, self.cutmix_alpha)
            parts.append((part, labels))
        if len(parts) == 1:
            return parts[0]
        images, labels = (np.concatenate(kind) for kind in zip(*parts, strict=True))
        return images, labels

    def get_shares(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.float32]:
        """Returns batch `first_step + index` for several devices, each with at least one image.

        If a step has fewer images than devices, a device without one gets a grey image of weight 0.

        Returns:
            Images and labels as in a batch, the weight of each image (1 or 0), the bounds `(local + 1,)` of each
            device's images, and the number of the step's images on all devices.
        """
        images, labels = self[index]
        bounds = np.array(self._get_bounds(self.first_step + index))
        total = self._get_start(self.first_step + index + 1) - self._get_start(self.first_step + index)
        weights, bounds = np.ones(len(images), np.float32), bounds - bounds[0]
        for device in np.flatnonzero(np.diff(bounds) == 0):
            place = bounds[device]
            images = np.insert(images, place, PAD_GREY, axis=0)
            labels, weights = np.insert(labels, place, 0, axis=0), np.insert(weights, place, 0)
            bounds[device + 1 :] += 1
        return images, labels, weights, bounds.astype(np.int32), np.float32(total)

    def _get_start(self, step: int) -> int:
        """Returns the position in the epoch's order of a step's first image."""
        if self._spreads_rest:
            return step * len(self.paths) // self.steps
        return min(step * self._step_size, len(self.paths))

    def _get_bounds(self, step: int) -> list[int]:
        """Returns the positions in the epoch's order where the images of this process's devices begin, and their end.

        The images of a step are divided as evenly as possible.
        """
        devices, first, local = self.shares
        start, end = self._get_start(step), self._get_start(step + 1)
        return [start + (end - start) * device // devices for device in range(first, first + local + 1)]

    def _load_or_replace(
        self, rows: np.ndarray, position: int, start: int, target: np.ndarray, matrix: np.ndarray | None = None
    ) -> bool:
        """Loads the image of `rows[position]` or its replacement; returns False if the row is left out."""
        order = self._order()
        for offset in range(len(order) if self.skip_bad_images and self.shuffle else 1):
            row = int(order[(start + position + offset) % len(order)])
            try:
                self._load(row, target, start + position, matrix)
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

    def _load(self, row: int, target: np.ndarray, place: int, matrix: np.ndarray | None) -> None:
        """Reads an image into `target`, warped by `matrix` if there is one: see `resample`."""
        image = self.cache.get(row) if self.cache else None
        if image is None:
            size = enlarge_for_crops(self.image_size, self.crop_area) if self.crops else self.image_size
            known = self._headers[row : row + 1]
            image = read_image(self.paths[row], size, self.max_pixels, known, self.pixel_range)
            if self.crops:
                key = self.seed, self.epoch, place, CROPPING
                shape = choose_shape(image.shape[:2], self.image_size, self.resize_mode)
                image = image[draw_crop(image.shape[:2], self.crop_area, np.random.default_rng(key), shape)]
            if not self.crops or self.resize_mode == "pad":
                image = shape_image(image, self.image_size, self.resize_mode)
            if self.cache:
                image = resize_image(image, self.image_size)
                self.cache.put(row, image)
        if matrix is None:
            resize_image(image, self.image_size, target)
        else:
            resample(image, matrix, target)

    def get_labels(self, rows: np.ndarray | slice) -> np.ndarray:
        """Returns the labels of these positions in `paths`, as in batches that are not mixed."""
        labels = self.labels[rows]
        return labels.astype(np.float32) if labels.ndim == 2 else labels

    def _batch_labels_of(self, rows: np.ndarray | slice) -> np.ndarray:
        labels = self.get_labels(rows)
        return np.eye(self.number_of_classes, dtype=np.float32)[labels] if self.mixes and labels.ndim == 1 else labels

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.paths))
        key = (self.seed, self.epoch)
        # The key keeps threads of two epochs from sharing an order.
        cached = getattr(self, "_cached_order", None)
        if cached is None or cached[0] != key:
            cached = key, np.random.default_rng(key).permutation(len(self.paths))
            self._cached_order = cached
        return cached[1]

    def _get_augmenter(self, step: int, position: int) -> FusedAugmenter | iaa.Augmenter | None:
        """Returns this thread's copy of the augmenter, seeded for a device's batch."""
        if self.augmenter is None:
            return None
        if not hasattr(self._of_thread, "augmenter"):
            self._of_thread.augmenter = self.augmenter.deepcopy()
        seed = np.random.SeedSequence(self._get_key(step, position)).generate_state(1)[0]
        self._of_thread.augmenter.seed_(int(seed) % 2**31)
        return self._of_thread.augmenter

    def _get_key(self, step: int, position: int) -> tuple[int, int, int]:
        """Returns the seed of a device's batch."""
        return self.seed, self.epoch, step * self.shares.devices + self.shares.first + position

    def get_y_true(self) -> np.ndarray:
        """Returns the labels of one epoch in its order, unmixed: int `(images,)` or float `(images, classes)`.

        Without `shuffle`, those of `bad_images` are left out, as in the batches.
        """
        return self.get_labels(self._order() if self.shuffle else self._list_read())

    def get_read_paths(self) -> np.ndarray:
        """Returns the paths of the images that could be read, text `(images,)`, in the order of `paths`."""
        return self.paths[self._list_read()]

    def _list_read(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self.paths)), list(self.bad_images))

    def get_rows(self, index: int) -> np.ndarray:
        """Returns the positions in `paths` of the images of a batch that has been read; not with `shuffle`."""
        bounds = self._get_bounds(index)
        return np.setdiff1d(np.arange(bounds[0], bounds[-1]), list(self.bad_images))
