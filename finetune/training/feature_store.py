"""A frozen backbone's features of images, stored on disk, and the head that is fitted to those of a run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence

import keras
import numpy as np

from configs import Configs
from finetune.core.files import check_folder, write_fault
from finetune.core.texts import show_progress
from finetune.data.groups import describe_groups, describe_lone_classes, find_lone_classes
from finetune.loading.caches import digest_image, name_resizing
from finetune.models.compiling import get_class_weights
from finetune.models.features import select_rows
from finetune.models.heads import HEAD, LOGITS, Parts, split_model
from finetune.training.probe import (
    FeaturesNotFinite,
    build_extractor,
    compute_features,
    extract_features,
    initialize_head,
)
from finetune.training.trainer import TrainingModel
from finetune.training.workers import Team
from generator import AugmentedImageSequence, naming_bad_images

# Raise this when images are decoded or resized in another way.
VERSION = 2
# After this many images, the features are written and the bar moves.
CHUNK = 256


class FeatureStore:
    """Features of images by one backbone at one size, in a file that grows; it may be deleted at any time.

    A record holds a digest of the image's path, size and modification time, a checksum, and the features, float32. A
    record that a killed process left incomplete is ignored; of two records of an image the later one counts.

    Args:
        folder: where the file is, or will be.
        model: of this collection; the file name depends on its backbone's weights, input and preprocessing.
        mirrored: whether the images are mirrored.
        resize_mode: how images are resized.
    """

    def __init__(self, folder: str, model: keras.Model, mirrored: bool, resize_mode: str = "stretch") -> None:
        parts = split_model(model, "Features", "Name a model that train.py has written.")
        self._channels = parts.pooling.compute_output_shape(parts.backbone.output_shape)[-1]
        height, width = model.input_shape[1:3]
        size = f"{height}x{width}{name_resizing(resize_mode)}"
        kind = "mirrored" if mirrored else "plain"
        self.path = os.path.join(folder, f"features_{size}_{_digest_backbone(model, parts)}_{kind}.bin")
        self._record = np.dtype([("digest", "V16"), ("checksum", "<u4"), ("features", "<f4", (self._channels,))])

    def read(self, digests: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the stored features of images, float32 `(images, channels)`, and which are known, bool `(images,)`.

        Args:
            digests: of the images, by `digest_image`; empty for an unreadable image.
        """
        features = np.full((len(digests), self._channels), np.nan, np.float32)
        is_known = np.zeros(len(digests), bool)
        if not os.path.isfile(self.path) or not (number := os.path.getsize(self.path) // self._record.itemsize):
            return features, is_known
        records = np.memmap(self.path, self._record, "r", shape=number)
        places = {digest.tobytes(): place for place, digest in enumerate(records["digest"])}
        for row, digest in enumerate(digests):
            place = places.get(digest)
            if place is not None and records[place]["checksum"] == zlib.crc32(records[place]["features"].tobytes()):
                features[row], is_known[row] = records[place]["features"], True
        return features, is_known

    def add(self, digests: Sequence[bytes], features: np.ndarray) -> None:
        """Writes the features of more images, float32 `(images, channels)`.

        Raises:
            UserError: the file cannot be written.
        """
        # An image without a digest, in a store that gives no size and time, is computed each time.
        kept = [row for row, digest in enumerate(digests) if digest]
        records = np.zeros(len(kept), self._record)
        for record, row in zip(records, kept, strict=True):
            record["digest"], record["features"] = np.void(digests[row]), features[row]
            record["checksum"] = zlib.crc32(record["features"].tobytes())
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            with open(self.path, "ab") as file:
                # An incomplete record of a killed process would shift all that follow.
                file.truncate(file.tell() // self._record.itemsize * self._record.itemsize)
                file.write(records.tobytes())
        except OSError as error:
            raise write_fault(self.path, error, "image_cache_path") from error


def _digest_backbone(model: keras.Model, parts: Parts) -> str:
    """Returns 16 hexadecimal digits of everything but the image that features depend on."""
    digest = hashlib.blake2b(digest_size=8)
    before, backbone, pooling = parts.before, parts.backbone, parts.pooling
    settings = ("scale", "offset", "mode")
    described = [
        [type(layer).__name__, [layer.get_config().get(name) for name in settings]] for layer in (*before, pooling)
    ]
    precision = backbone.layers[-1].compute_dtype
    facts = [VERSION, model.input_shape, backbone.output_shape, precision, described]
    digest.update(json.dumps(facts, default=str).encode())
    for layer in (*before, backbone):
        for weight in layer.weights:
            values = np.ascontiguousarray(keras.ops.convert_to_numpy(weight))
            digest.update(f"{weight.name}{values.shape}{values.dtype}".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()


def get_features(
    model: keras.Model,
    sequence: AugmentedImageSequence,
    folder: str,
    mirrored: bool = False,
    title: str = "Features",
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features as `compute_features` does; computes and stores those that the store lacks.

    They are written every few images: stopped and started again, it continues from there.

    Args:
        model: of this collection, with the backbone's weights.
        sequence: of the images, in one process.
        folder: of the store.
        mirrored: use the mirror images.
        title: of the progress bar.

    Returns:
        float32 `(images, channels)` in the order of `paths`, NaN for unreadable images, and which could be read.

    Raises:
        UserError: an image cannot be read and `skip_bad_images` is not set, or the file cannot be written.
    """
    store = FeatureStore(folder, model, mirrored, sequence.resize_mode)
    digests = [digest_image(path, sequence.pixel_range) for path in sequence.paths]
    features, is_known = store.read(digests)
    missing = np.flatnonzero(~is_known)
    if len(missing):
        check_folder(folder, "image_cache_path")
    with show_progress(len(digests), title, len(digests) - len(missing), delay=1) as progress:
        extractor = build_extractor(model, mirrored) if len(missing) else None
        for rows in _split_rows(missing, sequence.batch_size):
            chunk = select_rows(sequence, rows)
            with naming_bad_images(chunk):
                found, is_read = extractor.predict_sequence(chunk)
            sequence.bad_images.update({int(rows[place]): reason for place, reason in chunk.bad_images.items()})
            store.add([digests[row] for row in rows[is_read]], found)
            features[rows[is_read]], is_known[rows[is_read]] = found, True
            progress.update(len(rows))
    return features, is_known


def _split_rows(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Splits rows into chunks; the first has every size of batch, each of which builds a graph."""
    step = max(1, CHUNK // batch_size) * batch_size
    starts = range(batch_size + len(rows) % batch_size, len(rows), step)
    return np.split(rows, starts) if len(rows) else []


def find_features(
    model: keras.Model, sequence: AugmentedImageSequence, folder: str, mirrored: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features as `compute_features` does, from the store if it has all of them; never writes."""
    digests = [digest_image(path, sequence.pixel_range) for path in sequence.paths]
    features, is_known = FeatureStore(folder, model, mirrored, sequence.resize_mode).read(digests)
    return (features, is_known) if is_known.all() else compute_features(model, sequence, mirrored)


class HeadFit:
    """Makes a model's head the logistic regression on the current features of the training images.

    If training augments images, their mirror images count too; if it balances the classes, so does this.

    Args:
        configs: of the run.
        model: its head is changed, in the scope of the run's strategy.
        training: the training images.
        team: all its processes get the chief's weights.
    """

    def __init__(self, configs: Configs, model: keras.Model, training: AugmentedImageSequence, team: Team) -> None:
        self.seed = configs.random_seed
        self.mirrors = configs.augmentation_strength != "none"
        self.class_weights = None
        if configs.use_class_balancing and not configs.multi_label_classification:
            self.class_weights = np.array([*get_class_weights(training.labels, len(configs.classes)).values()])
        self.class_names = configs.classes
        self.model = model
        self.training = training
        self.team = team
        # A graph takes seconds to build; it always uses the current weights.
        self._get_extractor: Callable[[bool], TrainingModel] = functools.cache(
            functools.partial(build_extractor, model)
        )

    def start(self, store: str) -> tuple[np.ndarray, np.ndarray]:
        """Fits the head; returns the features and which images could be read, as `compute_features` does.

        Args:
            store: the folder of features from other scripts, or empty; several processes compute their own.
        """
        find = functools.partial(find_features, folder=store) if self.team.size == 1 and store else compute_features
        features, is_read, strength = self._fit(lambda mirrored: find(self.model, self.training, mirrored=mirrored))
        groups, number = self.training.get_groups(is_read), len(self.class_names)
        images = f"{is_read.sum()} images{describe_groups(groups)}"
        print(f"The head starts from a logistic regression on {images}, C = {strength:.3g}.")
        lone = find_lone_classes(self.training.labels[is_read], groups, number)
        if lone.size:
            print(describe_lone_classes([self.class_names[position] for position in lone]))
        return features, is_read

    def refit(self) -> None:
        """Refits the head to the current features; keeps it if they are not finite."""
        with contextlib.suppress(FeaturesNotFinite):
            self._fit(lambda mirrored: extract_features(self._get_extractor(mirrored), self.training, mirrored))

    def _fit(self, find: Callable[[bool], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, float]:
        """Fits the head to the features of images (and mirror images); returns them with `is_read` and the strength."""
        features, is_read = find(False)
        views = [features[is_read]]
        if self.mirrors:
            views.append(find(True)[0][is_read])
        labels, groups = self.training.labels[is_read], self.training.get_groups(is_read)
        strength = initialize_head(self.model, views, labels, self.seed, self.class_weights, groups)
        # Hosts may round differently: all take the chief's weights.
        logits = self.model.get_layer(HEAD).get_layer(LOGITS)
        weights = self.team.exchange([weight.tolist() for weight in logits.get_weights()])[0]
        logits.set_weights([np.array(weight) for weight in weights])
        return features, is_read, strength
