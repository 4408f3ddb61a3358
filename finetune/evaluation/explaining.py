"""Which classes of which images Grad-CAM explains, and how the faithfulness of the maps is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from finetune.evaluation.decision import Decision
from finetune.evaluation.faithfulness import Removal, choose_removal, find_parts, predict_without
from finetune.evaluation.gradcam import GradCam
from finetune.evaluation.metrics import check_finite, to_indicators
from finetune.models.features import select_rows
from generator import AugmentedImageSequence, naming_bad_images

# Each takes two more passes of the network. The mean drop of 200 images is accurate to about 0.02.
MOST_MEASURED = 200
# Images for choosing the removal; each takes up to ten more passes.
PILOT_IMAGES = 32


class Explained(NamedTuple):
    """A batch with the heatmaps of pairs of an image and a class.

    Attributes:
        positions: int `(batch,)`, in the sequence.
        images: uint8 RGB `(batch, height, width, 3)`.
        labels: `(batch,)` class positions or `(batch, classes)` of zeros and ones.
        probabilities: calibrated, `(batch, classes)`.
        rows: int `(pairs,)`, positions in the batch, in ascending order.
        class_indices: int `(pairs,)`.
        heatmaps: float32 `(pairs, h, w)` in `[0, 1]`.
    """

    positions: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    rows: np.ndarray
    class_indices: np.ndarray
    heatmaps: np.ndarray


def _choose_most_probable(probabilities: np.ndarray, number: int) -> np.ndarray:
    # Stable, so that the first of equal ones is the predicted class.
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :number]
    chosen = np.zeros(probabilities.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


# The classes to explain, bool `(batch, classes)`, from calibrated probabilities, labels, the decision and `cam_top_k`.
CHOOSERS: dict[str, Callable[..., np.ndarray]] = {
    "predicted": lambda probabilities, labels, decision, top_k: _choose_most_probable(probabilities, 1),
    "true": lambda probabilities, labels, decision, top_k: to_indicators(labels, probabilities.shape[1]),
    "top_k": lambda probabilities, labels, decision, top_k: _choose_most_probable(probabilities, top_k),
    "threshold": lambda probabilities, labels, decision, top_k: decision.choose(probabilities),
}


class Explainer(NamedTuple):
    """Explains the chosen classes of images, the most probable class first.

    Attributes:
        grad_cam: makes the heatmaps.
        decision: calibrates the probabilities.
        choose: one of `CHOOSERS`, as a function of probabilities and labels.
    """

    grad_cam: GradCam
    decision: Decision
    choose: Callable[..., np.ndarray]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns the calibrated probabilities of images, `(batch, classes)`."""
        return self.decision.calibrate(self.grad_cam.read(images)[1])

    def explain(self, sequence: AugmentedImageSequence) -> Iterator[Explained]:
        """Explains a sequence's images in order, batch by batch.

        Raises:
            UserError: a probability is not finite.
        """
        for index, (images, labels) in enumerate(sequence.to_dataset().as_numpy_iterator()):
            features, probabilities = self.grad_cam.read(images)
            check_finite(probabilities)
            probabilities = self.decision.calibrate(probabilities)
            rows, class_indices = np.nonzero(self.choose(probabilities, labels))
            order = np.lexsort((-probabilities[rows, class_indices], rows))
            rows, class_indices = rows[order], class_indices[order]
            heatmaps = self.grad_cam.explain(features, rows, class_indices)
            yield Explained(sequence.get_rows(index), images, labels, probabilities, rows, class_indices, heatmaps)


def choose_removal_on(explainer: Explainer, sequence: AugmentedImageSequence, seed: int) -> Removal:
    """Chooses how to remove parts of a sequence's images, see `choose_removal`, from a few of them.

    Raises:
        UserError: an image cannot be read and `skip_bad_images` is not set.
    """
    pilot = select_rows(sequence, _take_evenly(len(sequence.paths), PILOT_IMAGES))
    with naming_bad_images(pilot):
        batches = [batch for batch in explainer.explain(pilot) if len(batch.rows)]

    def measure_kept(removal: Removal) -> float:
        rng = np.random.default_rng(seed)
        found = [_measure(batch, _find_first_pairs(batch), explainer.predict, removal, rng) for batch in batches]
        whole, _, random = np.concatenate([np.zeros((0, 3)), *found]).sum(axis=0)
        return random / whole if whole else 1.0

    return choose_removal(measure_kept)


def measure_some(
    batches: Iterable[Explained],
    number_of_images: int,
    predict: Callable[[np.ndarray], np.ndarray],
    removal: Removal,
    seed: int,
    found: list[np.ndarray],
) -> Iterator[Explained]:
    """Passes batches on, and measures the faithfulness of some images' maps of their most probable class.

    Args:
        batches: all images, in order.
        number_of_images: in all batches; at most `MOST_MEASURED` of them, evenly spaced, are measured.
        predict: from images to calibrated probabilities `(batch, classes)`.
        found: receives one row per measured image that has a class: the three probabilities that
            `summarise_faithfulness` takes, and the image's position.
    """
    measured = np.zeros(number_of_images, bool)
    measured[_take_evenly(number_of_images, MOST_MEASURED)] = True
    rng = np.random.default_rng(seed)
    for batch in batches:
        yield batch
        pairs = _find_first_pairs(batch)
        pairs = pairs[measured[batch.positions[batch.rows[pairs]]]]
        if len(pairs):
            places = batch.positions[batch.rows[pairs]]
            found += [*np.column_stack([_measure(batch, pairs, predict, removal, rng), places])]


def _take_evenly(number: int, most: int) -> np.ndarray:
    return np.linspace(0, number - 1, min(number, most)).round().astype(int)


def _find_first_pairs(batch: Explained) -> np.ndarray:
    """Returns the pair of each image's most probable class."""
    return np.unique(batch.rows, return_index=True)[1]


def _measure(
    batch: Explained,
    pairs: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray],
    removal: Removal,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns each pair's probability in the whole image, without its highlighted part, and without a random part."""
    rows, class_indices = batch.rows[pairs], batch.class_indices[pairs]
    images = batch.images[rows]
    parts = find_parts(batch.heatmaps[pairs], images.shape[1:3], removal.share, rng)
    without = [predict_without(predict, images, part, class_indices, removal) for part in parts]
    return np.stack([batch.probabilities[rows, class_indices], *without], axis=1)
