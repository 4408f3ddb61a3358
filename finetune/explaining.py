"""What Grad-CAM explains: which classes of which images, and how faithful the maps of some are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from finetune.decision import Decision
from finetune.gradcam import GradCam, measure_faithfulness
from finetune.metrics import check_finite
from generator import AugmentedImageSequence

# Each takes two more passes of the network; as many tell the mean drop to about 0.02.
MOST_MEASURED = 200


class Explained(NamedTuple):
    """A batch with the heatmaps of pairs of an image and a class.

    Attributes:
        positions: int `(batch,)`, of the images in their sequence.
        images: uint8 RGB `(batch, height, width, 3)`.
        labels: `(batch,)` class positions or `(batch, classes)` of zeros and ones.
        probabilities: calibrated, `(batch, classes)`.
        rows: int `(pairs,)`, rising positions in the batch.
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


def choose_predicted(probabilities: np.ndarray, labels: np.ndarray, decision: Decision, top_k: int) -> np.ndarray:
    """Chooses the most probable class of each image, of several labels as well."""
    return _choose_most_probable(probabilities, 1)


def choose_true(probabilities: np.ndarray, labels: np.ndarray, decision: Decision, top_k: int) -> np.ndarray:
    """Chooses the classes that the CSV gives each image."""
    return labels > 0 if labels.ndim == 2 else labels[:, None] == np.arange(probabilities.shape[1])


def choose_top_k(probabilities: np.ndarray, labels: np.ndarray, decision: Decision, top_k: int) -> np.ndarray:
    """Chooses the `top_k` most probable classes of each image, or all where there are fewer."""
    return _choose_most_probable(probabilities, top_k)


def choose_above_threshold(probabilities: np.ndarray, labels: np.ndarray, decision: Decision, top_k: int) -> np.ndarray:
    """Chooses each image's classes that hold: multi-label those above their threshold, else the predicted one."""
    return decision.choose(probabilities)


def _choose_most_probable(probabilities: np.ndarray, number: int) -> np.ndarray:
    # Stable, so that the first of equal ones is the predicted class.
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :number]
    chosen = np.zeros(probabilities.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


# Of calibrated probabilities, labels, the decision and `cam_top_k`; returns bool `(batch, classes)`.
CHOOSERS: dict[str, Callable[..., np.ndarray]] = {
    "predicted": choose_predicted,
    "true": choose_true,
    "top_k": choose_top_k,
    "threshold": choose_above_threshold,
}


def explain_all(
    grad_cam: GradCam, sequence: AugmentedImageSequence, decision: Decision, choose: Callable[..., np.ndarray]
) -> Iterator[Explained]:
    """Explains a sequence's images batch by batch, each image's classes by falling probability.

    Args:
        grad_cam: explains.
        sequence: the images, in order.
        decision: calibrates the probabilities.
        choose: a value of `CHOOSERS`, of probabilities and labels.

    Raises:
        UserError: the model's probabilities are no numbers.
    """
    for index, (images, labels) in enumerate(sequence.to_dataset().as_numpy_iterator()):
        features, probabilities = grad_cam.read(images)
        check_finite(probabilities)
        probabilities = decision.calibrate(probabilities)
        rows, class_indices = np.nonzero(choose(probabilities, labels))
        order = np.lexsort((-probabilities[rows, class_indices], rows))
        rows, class_indices = rows[order], class_indices[order]
        heatmaps = grad_cam.explain(features, rows, class_indices)
        yield Explained(sequence.get_rows(index), images, labels, probabilities, rows, class_indices, heatmaps)


def measure_some(
    batches: Iterable[Explained],
    number_of_images: int,
    grad_cam: GradCam,
    decision: Decision,
    seed: int,
    drops: list[np.ndarray],
) -> Iterator[Explained]:
    """Passes batches on, and measures how faithful the maps of some images are, those of their most probable class.

    Args:
        batches: of all images, in order.
        number_of_images: of all; at most `MOST_MEASURED` of them, evenly taken, are measured.
        grad_cam: runs the network.
        decision: calibrates its probabilities.
        seed: of the random fifths.
        drops: receives what `measure_faithfulness` returns, an item an image; images without a class have none.
    """
    measured = np.zeros(number_of_images, bool)
    measured[np.linspace(0, number_of_images - 1, min(number_of_images, MOST_MEASURED)).round().astype(int)] = True
    rng = np.random.default_rng(seed)
    for batch in batches:
        yield batch
        rows, first_pairs = np.unique(batch.rows, return_index=True)
        pairs = first_pairs[measured[batch.positions[rows]]]
        if not len(pairs):
            continue
        rows, class_indices = batch.rows[pairs], batch.class_indices[pairs]
        drops += measure_faithfulness(
            lambda images: decision.calibrate(grad_cam.read(images)[1]),
            batch.images[rows],
            batch.heatmaps[pairs],
            class_indices,
            batch.probabilities[rows, class_indices],
            rng,
        ).tolist()
