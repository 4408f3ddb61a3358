"""Photos unlike those that a model was trained on: the reference of training features, and a score of familiarity.

Neither a low probability nor a low similarity alone finds them all: the probability misses photos of something else
entirely, the similarity misses new classes of the same kind of thing. So the score is their standardised sum.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from finetune.core.files import atomic_path
from finetune.core.options import UserError
from finetune.evaluation.calibration import LEAST_DISTANCE_FROM_ONE, LEAST_PROBABILITY
from finetune.models.description import hash_model
from finetune.models.formats import is_exported, metadata_path, reference_path

REFERENCE_FILE = "reference.npz"
# The reference's digest in an artefact's metadata.
DIGEST = "reference"
# Bytes of the features in the file.
LARGEST_REFERENCE = 10_000_000
LARGEST_FILE = 2 * LARGEST_REFERENCE
NEIGHBOURS = 5
# Numbers in one block of similarities: 64 MiB.
BLOCK = 2**24


class Neighbours(NamedTuple):
    """The training photos most similar to each image, the nearest first.

    Attributes:
        similarities: cosines, float32 `(images, number)`.
        positions: in the reference, int `(images, number)`.
    """

    similarities: np.ndarray
    positions: np.ndarray


class Reference(NamedTuple):
    """Features of training photos.

    Attributes:
        features: of length 1, float16 `(photos, channels)`.
        paths: of the photos.
        labels: of the photos, as in the table.
        model: digest of the model that computed them, hexadecimal.
    """

    features: np.ndarray
    paths: list[str]
    labels: list[str]
    model: str

    @classmethod
    def choose(cls, features: np.ndarray, paths: Sequence[str], labels: Sequence[str], model: str, seed: int) -> Self:
        """Returns a reference of at most `LARGEST_REFERENCE` bytes; of more photos, a random part."""
        most = max(1, LARGEST_REFERENCE // (2 * features.shape[1]))
        rows = np.sort(np.random.default_rng(seed).permutation(len(features))[:most])
        return cls(features[rows], [paths[row] for row in rows], [labels[row] for row in rows], model)

    def widen(self) -> Self:
        """Returns the reference in float32, which compares many batches faster."""
        return self._replace(features=self.features.astype(np.float32))

    def find_neighbours(self, features: np.ndarray, number: int = NEIGHBOURS) -> Neighbours:
        """Returns the most similar photos for features of length 1, `(images, channels)`.

        Raises:
            UserError: these are features of another model.
        """
        if features.ndim != 2 or features.shape[1] != self.features.shape[1]:
            raise UserError(
                f"The reference of training photos has {self.features.shape[1]} features a photo, but the model gives "
                f"{features.shape[-1]}. Give the model its own {REFERENCE_FILE}, or delete it."
            )
        number, known = min(number, len(self.features)), self.features.astype(np.float32, copy=False)
        step = max(1, BLOCK // len(known))
        parts = []
        for start in range(0, len(features), step):
            cosines = features[start : start + step].astype(np.float32) @ known.T
            nearest = np.argpartition(-cosines, number - 1, axis=1)[:, :number]
            values = np.take_along_axis(cosines, nearest, axis=1)
            order = np.argsort(-values, axis=1, kind="stable")
            parts.append([np.take_along_axis(part, order, axis=1) for part in (values, nearest)])
        if not parts:
            return Neighbours(np.zeros((0, number), np.float32), np.zeros((0, number), int))
        return Neighbours(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def digest(self) -> str:
        """Returns a digest of the features, hexadecimal."""
        return hashlib.blake2b(np.ascontiguousarray(self.features).tobytes(), digest_size=16).hexdigest()

    def write(self, folder: str) -> str:
        """Writes `reference.npz` into a folder and returns its path."""
        path = os.path.join(folder, REFERENCE_FILE)
        self.write_file(path)
        return path

    def write_file(self, path: str) -> None:
        """Writes a reference under any name."""
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **{name: np.asarray(value) for name, value in self._asdict().items()})

    @classmethod
    def read(cls, path: str) -> Self:
        """Reads a reference.

        Raises:
            UserError: the file is damaged or too large.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
                if size > LARGEST_FILE:
                    raise ValueError(f"it holds {size} bytes, of which at most {LARGEST_FILE} are expected")
                found = {}
                for name in cls._fields:
                    with archive.open(f"{name}.npy") as file:
                        # It refuses pickled objects.
                        found[name] = np.lib.format.read_array(file)
            features, paths, labels = (found[name] for name in ("features", "paths", "labels"))
            if features.ndim != 2 or not len(features) == len(paths) == len(labels) > 0:
                raise ValueError(f"its parts have {len(features)}, {len(paths)} and {len(labels)} photos")
            if not np.isfinite(features).all():
                raise ValueError("its features are not finite")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            raise UserError(f"{path} is damaged: {error}. Run test.py again, or delete the file.") from error
        return cls(features, paths.tolist(), labels.tolist(), str(found["model"]))


def find_reference(folder: str, model_path: str, needed: bool, gives_features: bool = True) -> Reference | None:
    """Returns the reference of a model; None, and prints why if one is needed, without its own.

    It is in a folder or next to the model; next to an exported model, it has the model's name.

    Args:
        folder: of the results.
        model_path: of the model. A `.keras` file must be the one that computed the reference, and an exported one must
            have it in its metadata; the other forms of a model compute nearly the same features.
        needed: whether the model's decision has a threshold for unknown photos.
        gives_features: whether the model gives features.

    Raises:
        UserError: the file is damaged.
    """
    if not gives_features:
        if needed:
            advice = " Export it again with compress_weights.py --export_features." * is_exported(model_path)
            print(f"{model_path} gives no features, so no photo is called unknown.{advice}")
        return None
    places = [os.path.join(place, REFERENCE_FILE) for place in (folder, os.path.dirname(os.path.abspath(model_path)))]
    own = reference_path(model_path)
    places = [own, *places] if is_exported(model_path) else [*places, own]
    path = next(filter(os.path.isfile, places), "")
    if not path:
        if needed:
            print(f"There is no {places[0]}, so no photo is called unknown. Run test.py again, or copy it there.")
        return None
    reference = Reference.read(path)
    if model_path.endswith(".keras"):
        fits = reference.model == name_model_digest(model_path)
    else:
        is_marked = is_exported(model_path) or path == own
        fits = not is_marked or reference.digest() == read_reference_digest(model_path)
    if not fits:
        advice = "Export the model again." if is_exported(model_path) else "Run test.py again."
        print(f"{path} is of another model than {model_path}, so no photo is called unknown. {advice}")
    return reference if fits else None


def read_reference_digest(model_path: str) -> str:
    """Returns the digest of the reference that belongs to an artefact, from its metadata; empty if it names none."""
    try:
        with open(metadata_path(model_path), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return ""
    return str(content.get(DIGEST, "")) if isinstance(content, dict) else ""


def name_model_digest(model_path: str) -> str:
    """Returns the digest that a reference keeps of its model."""
    digest = hash_model(model_path)
    return digest.hex() if isinstance(digest, bytes) else digest


def to_unit_length(features: np.ndarray) -> np.ndarray:
    """Returns features `(images, channels)` at length 1, float16; zeros stay zeros."""
    wide = np.asarray(features, np.float32)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float16)


def get_certainty(calibrated: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns the logit of each image's highest probability, float64 `(images,)`."""
    probabilities = np.array(calibrated, np.float64)
    highest = probabilities.max(axis=1)
    if multi_label:
        rest = np.maximum(1 - highest, LEAST_DISTANCE_FROM_ONE)
    else:
        # More exact than 1 - highest: float32 rounds a certain answer to 1.
        probabilities[np.arange(len(probabilities)), probabilities.argmax(axis=1)] = 0
        rest = probabilities.sum(axis=1)
    return np.log(np.maximum(highest, LEAST_PROBABILITY)) - np.log(np.maximum(rest, LEAST_PROBABILITY))
