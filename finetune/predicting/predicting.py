"""From images to probabilities and answers, by a Keras model or an exported one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from augmenter import build_augmenter
from configs import RESIZE_MODES, Configs
from finetune.core.arguments import (
    argument_error,
    take_choice,
    take_flag,
    take_names,
    take_path,
    take_pixels,
    take_share,
)
from finetune.core.labels import look_the_same
from finetune.core.options import UserError
from finetune.core.texts import show_progress
from finetune.core.values import get_input_size
from finetune.data.images import fit_image, read_image
from finetune.data.inspection import tell_assumed_range, tell_unfit_range
from finetune.evaluation.decision import THRESHOLD_TYPES, Decision
from finetune.evaluation.metrics import check_finite
from finetune.evaluation.novelty import Reference, to_unit_length
from finetune.evaluation.rule import Sets
from finetune.loading.augmentation import FusedAugmenter
from finetune.models.exported import ExportedModel
from finetune.models.formats import MODEL_SUFFIXES, importing, is_exported, require_format
from finetune.models.heads import has_parts
from finetune.models.model_files import build_with_features, check_fit, load_fitting_model, strip_views
from finetune.models.safety import telling_damage
from finetune.predicting.kept_answers import KeptAnswers, identify
from generator import AugmentedImageSequence, naming_bad_images, tell_bad_images


def predict(
    model: keras.Model | ExportedModel, sequence: AugmentedImageSequence, title: str = "Predicting"
) -> np.ndarray:
    """Returns the probabilities of an unshuffled sequence's images, float32 `(images, classes)`.

    With `skip_bad_images`, unreadable images are left out and listed on the terminal.

    Raises:
        UserError: an image cannot be read.
    """
    network = compile_predictor(model)
    return np.concatenate([*_run(lambda images: np.asarray(network(images)), sequence, title)])


def _run(network: Callable[[Any], Any], sequence: AugmentedImageSequence, title: str) -> Iterator[Any]:
    """Yields what a function makes of each batch, and prints which images could not be read."""
    with show_progress(len(sequence.paths), title) as progress, naming_bad_images(sequence):
        for images, _ in sequence.to_dataset():
            yield network(images)
            progress.update(len(images))
    tell_bad_images(sequence)


class Outputs(NamedTuple):
    """What a model gives for images.

    Attributes:
        probabilities: raw, float32 `(images, classes)`.
        features: the input of its head at length 1, float16 `(images, channels)`; None if the model has none.
    """

    probabilities: np.ndarray
    features: np.ndarray | None


def predict_outputs(
    model: keras.Model | ExportedModel, sequence: AugmentedImageSequence, title: str = "Predicting"
) -> Outputs:
    """Returns probabilities as `predict` does, and with them the features of the same pass."""
    network, found = compile_with_features(model), []
    for probabilities, features in _run(network, sequence, title):
        found.append((np.asarray(probabilities), None if features is None else to_unit_length(features)))
    probabilities, features = zip(*found, strict=True)
    return Outputs(np.concatenate(probabilities), None if features[0] is None else np.concatenate(features))


def predict_sets(model: keras.Model | ExportedModel, sequences: dict[str, AugmentedImageSequence]) -> Sets:
    """Returns what a model gives for each set. With `skip_bad_images`, unreadable images are known only then."""
    outputs = {
        name: predict_outputs(model, sequence, f"Predicting the {name} set") for name, sequence in sequences.items()
    }
    probabilities = {name: output.probabilities for name, output in outputs.items()}
    return Sets(sequences, probabilities, {name: output.features for name, output in outputs.items()})


def classify_image(
    model: keras.Model | ExportedModel,
    image: np.ndarray,
    class_names: Sequence[str],
    multi_label: bool = False,
    threshold: float = 0.5,
    decision: Decision | None = None,
    threshold_type: str = "exact_match",
    resize_mode: str = "stretch",
) -> tuple[list[str], dict[str, float]]:
    """Classifies one image.

    `predict.py` decodes large JPEGs at a reduced size. For exactly the same answer, read them with
    `read_image(path, image_size)`; the pixels of `read_image(path)`, and so the probabilities, differ a little.

    Args:
        model: a model of this collection, or one from `load_exported_model`.
        image: RGB `(height, width, 3)`, pixels in `[0, 255]`, of any size.
        class_names: in the model's order, as in `configs.json`.
        multi_label: whether an image may have several labels.
        threshold: multi-label: the lowest probability of a predicted label.
        decision: from `read_decision`. Calibrates the probabilities and chooses the labels; `multi_label` and
            `threshold` are then ignored.
        threshold_type: the decision's thresholds to use, `exact_match` or `best_f1`.
        resize_mode: how the image is resized, as in `configs.json`.

    Returns:
        The predicted class names (one; multi-label: any number) and the probability of each class.

    Raises:
        UserError: an argument is not as described, or does not fit the model.
    """
    class_names, size = take_names(class_names), _take_input_size(model, class_names)
    take_choice("threshold_type", threshold_type, THRESHOLD_TYPES)
    take_choice("resize_mode", resize_mode, RESIZE_MODES)
    take_share("threshold", threshold)
    multi_label = take_flag("multi_label", multi_label)
    is_decision = isinstance(decision, Decision) and look_the_same(decision.class_names, class_names)
    if decision is not None and not is_decision:
        raise argument_error("decision", "a Decision for class_names, as read_decision returns it", decision)
    batch = fit_image(take_pixels(image), size, resize_mode)[None]
    probabilities = np.asarray(model(batch, training=False))
    if decision is not None:
        probabilities = decision.calibrate(probabilities)
        chosen = np.flatnonzero(decision.choose(probabilities, threshold_type)[0])
    else:
        chosen = np.flatnonzero(probabilities[0] >= threshold) if multi_label else [int(probabilities[0].argmax())]
    by_class = dict(zip(class_names, probabilities[0].tolist(), strict=True))
    return [class_names[position] for position in chosen], by_class


def _take_input_size(model: keras.Model | ExportedModel, class_names: Sequence[str]) -> tuple[int, int]:
    """Returns the `(height, width)` of a model's images; raises UserError if it is no model of these classes."""
    shape, outputs = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    if not isinstance(shape, tuple) or not isinstance(outputs, tuple) or len(shape) != 4 or None in shape[1:]:
        raise argument_error("model", "a model of images of one size, such as load_model returns", model)
    if len(class_names) != outputs[-1]:
        raise argument_error("class_names", f"{outputs[-1]} names, one for each class of the model", class_names)
    return shape[1:3]


class ForgivingReader:
    """Reads images for the generator instead of its cache: it notes unreadable images and returns black ones."""

    def __init__(self, paths: Sequence[str], configs: Configs) -> None:
        self.paths = paths
        self.image_size = get_input_size(configs)
        self.configs = configs
        self.errors: dict[int, str] = {}
        # The result of `identify` for each row.
        self.identities: dict[int, Any] = {}

    def get(self, row: int) -> np.ndarray:
        """Returns the image of a row, uint8 `(height, width, 3)`; zeros, and an entry in `errors`, on failure."""
        # Before it is read: if the file changes in the meantime, it is predicted again after a restart.
        self.identities[int(row)] = identify(self.paths[row])
        configs = self.configs
        try:
            image = read_image(
                self.paths[row], self.image_size, configs.max_image_pixels, pixel_range=configs.pixel_range
            )
            return fit_image(image, self.image_size, configs.resize_mode)
        except UserError as error:
            self.errors[int(row)] = str(error)
            return np.zeros((*self.image_size, 3), np.uint8)


class Views:
    """Makes the views of each image whose probabilities are averaged, instead of the generator's augmenter.

    Every image gets the same changes, so that its answer depends neither on the other images nor on the batch size.

    Args:
        copies: number of changed copies of each image.
        augmenter: makes them; None mirrors the image left to right.
    """

    def __init__(self, copies: int, augmenter: FusedAugmenter | None = None, seed: int = 0) -> None:
        self.number = 1 + copies
        self._augmenter = augmenter
        self._seed = seed

    def deepcopy(self) -> Views:
        """Returns a copy for another thread."""
        return copy.deepcopy(self)

    def seed_(self, seed: int) -> None:
        """Does nothing: the generator's seed differs from batch to batch."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns the images, then their first changed copies, and so on, uint8 `(number * batch, h, w, 3)`."""
        views = np.repeat(images[None], self.number, axis=0)
        if self._augmenter is None:
            views[1:] = images[:, :, ::-1]
        else:
            for position in range(len(images)):
                self._augmenter.seed_(self._seed)
                views[1:, position] = self._augmenter(images=views[1:, position].copy())
        return views.reshape(-1, *images.shape[1:])


def build_views(augmentation: str, seed: int) -> Views | None:
    """Builds the views that `test_time_augmentation` of `predict.py` asks for; None for none."""
    if augmentation in ("none", "flip"):
        return Views(1) if augmentation == "flip" else None
    return Views(int(augmentation), build_augmenter(), seed % 2**31)


def predict_missing(
    model: keras.Model | ExportedModel,
    kept: KeptAnswers,
    views: Views | None,
    configs: Configs,
    reference: Reference | None = None,
) -> None:
    """Predicts the images that have no answer yet, and adds the answers.

    If images need a `pixel_range`, it prints the assumed one, or which images do not fit the given one.

    Args:
        views: whose probabilities are averaged, or None.
        reference: the training photos to compare the images with, or None.

    Raises:
        UserError: a probability is not finite, or the answers cannot be written.
    """
    tell_assumed_range("The images to predict", kept.paths, configs.pixel_range)
    tell_unfit_range("The images to predict", kept.paths, configs.pixel_range)
    network, missing, number = _compile_for(model, reference), kept.missing, views.number if views else 1
    reference = reference.widen() if reference else None
    reader = ForgivingReader([kept.paths[row] for row in missing], configs)
    sequence = AugmentedImageSequence(
        reader.paths,
        # Rows instead of labels.
        np.arange(len(missing)),
        image_size=reader.image_size,
        batch_size=configs.batch_size,
        augmenter=views,
        workers=configs.generator_workers,
        # A batch of several views takes that many times the memory.
        max_queue_size=max(1, configs.generator_queue_length // number),
        cache=reader,
    )
    with show_progress(len(kept.paths), "Predicting", len(kept.paths) - len(missing)) as progress:
        for images, places in sequence.to_dataset() if len(missing) else ():
            found = [network(view) for view in tf.split(images, number)]
            probabilities = np.mean([one[0] for one in found], axis=0)
            check_finite(probabilities)
            similarities = np.full(len(probabilities), np.nan, np.float32)
            if reference and found[0][1] is not None:
                features = to_unit_length(np.mean([one[1] for one in found], axis=0))
                similarities = reference.find_neighbours(features).similarities.mean(axis=1)
            places = places.numpy().tolist()
            rows = missing[places]
            errors = {int(missing[place]): reader.errors.pop(place) for place in places if place in reader.errors}
            kept.add(rows, (probabilities, similarities), errors, [reader.identities.pop(place) for place in places])
            progress.update(len(rows))


def _compile_for(model: keras.Model | ExportedModel, reference: Reference | None) -> Callable[[Any], tuple[Any, Any]]:
    """Returns a function from images to probabilities and features; without a reference, None for the features."""
    if reference:
        return compile_with_features(model)
    network = compile_predictor(model)
    return lambda images: (network(images), None)


def load_predictor(path: str, class_names: Sequence[str], image_size: Sequence[int]) -> keras.Model | ExportedModel:
    """Loads a Keras model or an exported one.

    Raises:
        UserError: the file is no model, does not fit the classes or the image size, or its runtime is not installed.
    """
    # The .json file of compressed weights leads to both of their files.
    if not is_exported(path) and path.endswith((*MODEL_SUFFIXES, ".json")):
        return load_fitting_model(path, class_names, image_size)
    model = load_exported_model(path)
    check_fit(path, model.input_shape, model.output_shape, class_names, image_size)
    return model


def load_exported_model(path: str) -> ExportedModel:
    """Loads an exported model in its own runtime, which uses all cores.

    Args:
        path: a `.tflite` or `.onnx` file, or the folder of a SavedModel.

    Raises:
        UserError: the file is not such a model or is damaged, or its runtime is not installed.
    """
    path = take_path("path", path)
    found = require_format(path)
    damage = telling_damage(f"{path} is not {found.title} with images in and probabilities out")
    with damage, importing(path, found.reader_packages):
        if os.path.isfile(path) and not os.path.getsize(path):
            raise ValueError("It is empty.")
        return found.runtime().load(path)


def gives_features(model: keras.Model | ExportedModel) -> bool:
    """Returns whether a model gives features with its probabilities."""
    return model.gives_features if isinstance(model, ExportedModel) else has_parts(strip_views(model))


def compile_with_features(model: keras.Model | ExportedModel) -> Callable[[Any], tuple[Any, Any]]:
    """Returns a function from uint8 images to probabilities and features; None for features that a model lacks."""
    if isinstance(model, ExportedModel):
        return model.run_with_features
    if not gives_features(model):
        plain = compile_predictor(model)
        return lambda images: (plain(images), None)
    whole = build_with_features(model)
    signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)

    def run(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        outputs = whole(images, training=False)
        return outputs["probabilities"], outputs["features"]

    return tf.function(run, input_signature=[signature])


def compile_predictor(model: keras.Model | ExportedModel) -> Callable[[Any], Any]:
    """Returns a function from uint8 images `(batch, height, width, 3)` to probabilities, compiled once."""
    if isinstance(model, ExportedModel):
        return model
    signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)
    return tf.function(lambda images: model(images, training=False), input_signature=[signature])
