"""From images to probabilities and answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from augmenter import build_augmenter
from configs import MAX_IMAGE_PIXELS, RESIZE_MODES, Configs
from finetune.core.arguments import argument_error, take_choice, take_flag, take_names, take_pixels, take_share
from finetune.core.labels import look_the_same
from finetune.core.options import UserError
from finetune.core.texts import show_progress
from finetune.core.values import get_input_size
from finetune.data.images import fit_image, read_image
from finetune.data.pixel_range import tell_assumed_range, tell_unfit_range
from finetune.evaluation.decision import THRESHOLD_TYPES, Decision
from finetune.evaluation.metrics import check_finite
from finetune.loading.kernels import FusedAugmenter
from finetune.models.exported import ExportedModel
from finetune.predicting.kept_answers import KeptAnswers, identify
from finetune.predicting.runtimes import compile_predictor
from generator import AugmentedImageSequence, naming_bad_images, tell_bad_images


def predict(
    model: keras.Model | ExportedModel, sequence: AugmentedImageSequence, title: str = "Predicting"
) -> np.ndarray:
    """Returns the probabilities of a sequence's images in its order, float32 `(images, classes)`.

    Under `skip_bad_images` those that cannot be read are left out, and printed.

    Args:
        model: of either kind.
        sequence: not shuffled.
        title: of the progress bar.

    Raises:
        UserError: an image cannot be read.
    """
    network, found = compile_predictor(model), []
    with show_progress(len(sequence.paths), title) as progress, naming_bad_images(sequence):
        for images, _ in sequence.to_dataset():
            found.append(np.asarray(network(images)))
            progress.update(len(images))
    tell_bad_images(sequence)
    return np.concatenate(found)


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
    """Classifies one image, with a run's decision as `predict.py` does.

    The image is resized as the generator does it. `predict.py` decodes large JPEGs at a fraction of their size: to
    have the same answer, read them with `read_image(path, image_size)`. `read_image(path)` gives a picture
    that differs a little, and so do the probabilities then.

    Args:
        model: a model of this collection, or one that `load_exported_model` returns.
        image: RGB `(height, width, 3)`, pixels in `[0, 255]`, of any size.
        class_names: in the model's order, as `configs.json` has them.
        multi_label: whether several labels may hold.
        threshold: multi-label: lowest probability of a label that holds.
        decision: from `read_decision`: calibrates the probabilities and chooses the labels, in the place of
            `multi_label` and `threshold`.
        threshold_type: which of the decision's thresholds hold, `exact_match` or `best_f1`.
        resize_mode: how the image comes to the model's size, as `configs.json` has it.

    Returns:
        The predicted class names (one, or multi-label any number) and the probability of each class.

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
    """Returns the `(height, width)` of a model's images; raises UserError where it is no model of the names."""
    shape, outputs = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    if not isinstance(shape, tuple) or not isinstance(outputs, tuple) or len(shape) != 4 or None in shape[1:]:
        raise argument_error("model", "a model of images of one size, such as load_model returns", model)
    if len(class_names) != outputs[-1]:
        raise argument_error("class_names", f"{outputs[-1]} names, one for each class of the model", class_names)
    return shape[1:3]


class ForgivingReader:
    """Reads images for the generator, in the place of its cache: it notes what cannot be read and gives black then.

    Args:
        paths: image files.
        image_size: `(height, width)` that images are resized to.
        resize_mode: in which way.
        max_pixels: what an image may have.
        pixel_range: what is black and white, as `read_image` takes it.
    """

    def __init__(
        self,
        paths: Sequence[str],
        image_size: Sequence[int],
        resize_mode: str,
        max_pixels: int = MAX_IMAGE_PIXELS,
        pixel_range: Sequence[float] = (),
    ) -> None:
        self.paths = paths
        self.image_size = tuple(image_size)
        self.resize_mode = resize_mode
        self.max_pixels = max_pixels
        self.pixel_range = pixel_range
        self.errors: dict[int, str] = {}
        # Which files were read, by their rows: what `identify` returns.
        self.identities: dict[int, Any] = {}

    def get(self, row: int) -> np.ndarray:
        """Returns the image of a row, uint8 `(height, width, 3)`; zeros, and an entry in `errors`, on failure."""
        # Before it is read: a file that changes meanwhile is another one for the next start.
        self.identities[int(row)] = identify(self.paths[row])
        try:
            image = read_image(self.paths[row], self.image_size, self.max_pixels, pixel_range=self.pixel_range)
            return fit_image(image, self.image_size, self.resize_mode)
        except UserError as error:
            self.errors[int(row)] = str(error)
            return np.zeros((*self.image_size, 3), np.uint8)


class Views:
    """Makes the views of each image whose probabilities are averaged, in the place of the generator's augmenter.

    Every image gets the same changes, so that its answer depends neither on the other images nor on the batch size.

    Args:
        copies: changed ones of each image.
        augmenter: makes them; None mirrors the image left to right.
        seed: of the augmenter.
    """

    def __init__(self, copies: int, augmenter: FusedAugmenter | None = None, seed: int = 0) -> None:
        self.number = 1 + copies
        self._augmenter = augmenter
        self._seed = seed

    def deepcopy(self) -> Views:
        """Returns a copy for another thread."""
        return copy.deepcopy(self)

    def seed_(self, seed: int) -> None:
        """Does nothing: the generator's seed is another one in every batch."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns all images as they are, then all of them changed, and so on; uint8.

        Args:
            images: uint8 RGB `(batch, height, width, 3)`; the result has `number` times as many.
        """
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


def build_sequence(
    reader: ForgivingReader, views: Views | None, batch_size: int, workers: int, queue_length: int
) -> AugmentedImageSequence:
    """Builds the generator of a reader's images in their order; in the place of labels it has their rows.

    Args:
        reader: of the images.
        views: of each image, or None.
        batch_size: images a batch.
        workers: threads.
        queue_length: batches of one view kept ready.
    """
    return AugmentedImageSequence(
        reader.paths,
        np.arange(len(reader.paths)),
        image_size=reader.image_size,
        batch_size=batch_size,
        augmenter=views,
        workers=workers,
        # Batches of several views take that many times the memory.
        max_queue_size=max(1, queue_length // (views.number if views else 1)),
        cache=reader,
    )


def predict_missing(
    model: keras.Model | ExportedModel, kept: KeptAnswers, views: Views | None, configs: Configs
) -> None:
    """Runs the model over the images that have no answer yet, and adds the answers.

    Prints which values are assumed to be black and white if images need a `pixel_range` and there is none, and which
    images do not fit the one that there is.

    Args:
        model: gives its own probabilities, of which the means over the views are taken.
        kept: takes the answers.
        views: of each image, or None.
        configs: say how images are read.

    Raises:
        UserError: the model's probabilities are not finite, or the answers cannot be written.
    """
    tell_assumed_range("The images to predict", kept.paths, configs.pixel_range)
    tell_unfit_range("The images to predict", kept.paths, configs.pixel_range)
    network, missing = compile_predictor(model), kept.missing
    paths, size = [kept.paths[row] for row in missing], get_input_size(configs)
    reader = ForgivingReader(paths, size, configs.resize_mode, configs.max_image_pixels, configs.pixel_range)
    workers, queue_length = configs.generator_workers, configs.generator_queue_length
    sequence = build_sequence(reader, views, configs.batch_size, workers, queue_length)
    with show_progress(len(kept.paths), "Predicting", len(kept.paths) - len(missing)) as progress:
        for images, places in sequence.to_dataset() if len(missing) else ():
            of_views = [network(view) for view in tf.split(images, views.number if views else 1)]
            probabilities = np.mean(of_views, axis=0)
            check_finite(probabilities)
            places = places.numpy().tolist()
            rows = missing[places]
            errors = {int(missing[place]): reader.errors.pop(place) for place in places if place in reader.errors}
            kept.add(rows, probabilities, errors, [reader.identities.pop(place) for place in places])
            progress.update(len(rows))
