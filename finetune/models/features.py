"""Sequences of a frozen backbone's features instead of images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from finetune.core.options import UserError
from generator import AugmentedImageSequence


def read_plainly(sequence: AugmentedImageSequence, image_size: Sequence[int]) -> AugmentedImageSequence:
    """Returns a sequence of the same images at another size, in the order of `paths`, without augmentation."""
    plain = copy.copy(sequence)
    if plain.image_size != tuple(image_size):
        # Cached images have the other size.
        plain.image_size, plain.cache = tuple(image_size), None
    plain.shuffle, plain.augmenter, plain.mixes, plain.crops = False, None, False, False
    plain.gives_shares, plain.processes = False, None
    plain.epoch, plain.first_step, plain.error, plain.bad_images = 0, 0, None, {}
    return plain


def select_rows(sequence: AugmentedImageSequence, rows: np.ndarray) -> AugmentedImageSequence:
    """Returns a sequence of the images at these positions, without augmentation, for one device."""
    plain = read_plainly(sequence, sequence.image_size)
    facts = {"paths": sequence.paths[rows], "labels": sequence.labels[rows], "workers": sequence.workers}
    names = ("image_size", "resize_mode", "batch_size", "max_pixels", "pixel_range", "skip_bad_images")
    facts |= {name: getattr(plain, name) for name in names}
    return AugmentedImageSequence(**facts, max_queue_size=sequence.max_queue_size)


class FeatureSequence(AugmentedImageSequence):
    """Batches of features instead of images, to train the head on a frozen backbone without running the backbone.

    Order, labels and shares are those of the image sequence. There is no augmentation.

    Args:
        features: float32 `(images, channels)` in the order of `paths`, or `(images, views, channels)` for several views
            of each image. Rows of `bad_images` are replaced or left out as in the image sequence.
        bad_images: why an image could not be read, by its position in `paths`.
        facts: the arguments of `AugmentedImageSequence`.
    """

    def __init__(self, features: np.ndarray, bad_images: dict[int, str], **facts: Any) -> None:
        super().__init__(**facts)
        self.features = features
        self.bad_images = dict(bad_images)

    @classmethod
    def of(cls, sequence: AugmentedImageSequence, features: np.ndarray, is_read: np.ndarray) -> FeatureSequence:
        """Returns a sequence with the order, labels, shares, epoch and step of `sequence`.

        `features` and `is_read` are results of `probe.compute_features`.
        """
        names = ("paths", "labels", "image_size", "batch_size", "shuffle", "seed", "max_queue_size", "skip_bad_images")
        facts = {name: getattr(sequence, name) for name in names}
        # Only the process that was to read an image knows why it could not.
        bad = {row: sequence.bad_images.get(row, "it could not be read") for row in np.flatnonzero(~is_read).tolist()}
        shares = sequence.shares if sequence.gives_shares or not sequence.shuffle else None
        features_only = cls(features, bad, **facts, shares=shares)
        features_only.epoch, features_only.first_step = sequence.epoch, sequence.first_step
        features_only.table, features_only.groups = sequence.table, sequence.groups
        return features_only

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns batch `first_step + index` of this epoch: its float32 features and labels."""
        bounds = self._get_bounds(index + self.first_step)
        rows = self._order()[bounds[0] : bounds[-1]].copy()
        features = np.empty((len(rows), *self.features.shape[1:]), np.float32)
        kept = [
            position
            for position, target in enumerate(features)
            if self._load_or_replace(rows, position, bounds[0], target)
        ]
        return features[kept], self.get_labels(rows[kept])

    def to_dataset(self) -> tf.data.Dataset:
        """Returns the batches of an epoch, as for images."""
        return self._make_dataset(tf.TensorSpec((None, *self.features.shape[1:]), tf.float32))

    def _load(self, row: int, target: np.ndarray, place: int, matrix: np.ndarray | None) -> None:
        if row in self.bad_images:
            raise UserError(self.bad_images[row])
        target[:] = self.features[row]
