"""Which classes of which images Grad-CAM explains, and how faithful the maps are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from scipy import stats

from finetune.data.groups import count_groups, describe_group_count, is_single_group
from finetune.evaluation.decision import Decision
from finetune.evaluation.gradcam import GradCam
from finetune.evaluation.metrics import check_finite, to_indicators
from finetune.evaluation.novelty import Reference, to_unit_length
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
        similarities: to the training photos, `(batch,)`; None without a reference.
    """

    positions: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    rows: np.ndarray
    class_indices: np.ndarray
    heatmaps: np.ndarray
    similarities: np.ndarray | None


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
        reference: the training photos to compare images with, or None.
    """

    grad_cam: GradCam
    decision: Decision
    choose: Callable[..., np.ndarray]
    reference: Reference | None = None

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns the calibrated probabilities of images, `(batch, classes)`."""
        return self.decision.calibrate(self.grad_cam.read(images).probabilities)

    def explain(self, sequence: AugmentedImageSequence) -> Iterator[Explained]:
        """Explains a sequence's images in order, batch by batch.

        Raises:
            UserError: a probability is not finite.
        """
        for index, (images, labels) in enumerate(sequence.to_dataset().as_numpy_iterator()):
            start, probabilities, features = self.grad_cam.read(images)
            check_finite(probabilities)
            probabilities = self.decision.calibrate(probabilities)
            rows, class_indices = np.nonzero(self.choose(probabilities, labels))
            order = np.lexsort((-probabilities[rows, class_indices], rows))
            rows, class_indices = rows[order], class_indices[order]
            heatmaps = self.grad_cam.explain(start, rows, class_indices)
            pairs, similarities = (rows, class_indices, heatmaps), self._compare(features)
            yield Explained(sequence.get_rows(index), images, labels, probabilities, *pairs, similarities)

    def _compare(self, features: np.ndarray) -> np.ndarray | None:
        if self.reference is None:
            return None
        return self.reference.find_neighbours(to_unit_length(features)).similarities.mean(axis=1)


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


def summarise_some(found: list[np.ndarray], sequence: AugmentedImageSequence, removal: Removal) -> dict[str, Any]:
    """Returns the result of `summarise_faithfulness` for what `measure_some` found on a sequence's images."""
    rows = np.reshape(found, (-1, 4))
    return summarise_faithfulness(rows[:, :3], removal, sequence.get_groups(rows[:, 3].astype(int)))


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


# Standard deviation of the blur, as a share of the image's longer side: 14 pixels of 224.
BLUR_WIDTH = 1 / 16
# Radius in pixels around a hole from which OpenCV fills it.
FILL_RADIUS = 3
# The mean of fewer images is noise.
FEWEST_IMAGES = 10
# A removal is chosen if at least this share of the class's probability is left without a random part.
KEPT = 2 / 3
# If less than this share is left, maps are not called faithful.
LEAST_KEPT = 0.5
# Least lower end of the interval for "faithful" and for "weakly faithful". It was 0.17 for Grad-CAM on 100 flowers and
# on 100 tiles, 0.02 and -0.05 for the maps of other photos, and 0.03 and -0.15 for those of random weights.
FAITHFUL = 0.1
WEAKLY_FAITHFUL = 0.02


class Removal(NamedTuple):
    """A way to take a part out of an image.

    Attributes:
        name: for messages, with `{}` for the part.
        share: of the image's pixels in the part.
        remove: from an image, uint8 RGB `(height, width, 3)`, and a part, bool `(height, width)`, to the image
            without it.
    """

    name: str
    share: float
    remove: Callable[[np.ndarray, np.ndarray], np.ndarray]


def blur_part(image: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Returns an image with a part of it blurred."""
    blurred = cv2.GaussianBlur(image, (0, 0), max(image.shape) * BLUR_WIDTH)
    return np.where(part[..., None], blurred, image)


def fill_part(image: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Returns an image with a part of it filled from its surroundings.

    Source: Telea, Journal of Graphics Tools 9(1), 2004.
    """
    return cv2.inpaint(image, part.astype(np.uint8), FILL_RADIUS, cv2.INPAINT_TELEA)


# The strongest first. Nothing in nature looks like a blurred part, which alone can change an answer.
REMOVALS = (
    Removal("blurring {}", 0.2, blur_part),
    *(Removal("filling {} from its surroundings", share, fill_part) for share in (0.2, 0.1, 0.05, 0.02)),
)


def find_parts(
    heatmaps: np.ndarray, image_size: tuple[int, int], share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the highlighted part of each image, and a random part of the same shape.

    The random part is the highlighted one moved by a random distance, around the image's edges: every pixel is equally
    likely to be in it. It has the same shape because removing whole parts of an object changes an answer more than
    removing the same number of scattered pixels.

    Args:
        heatmaps: `(batch, h, w)` in `[0, 1]`, of any size.
        share: of the pixels in a part.

    Returns:
        The highlighted and the random parts, bool `(batch, height, width)` each.
    """
    highlighted = np.empty((len(heatmaps), *image_size), bool)
    moved = np.empty_like(highlighted)
    for row, heatmap in enumerate(heatmaps):
        highlighted[row] = find_highlighted(heatmap, image_size, share, rng)
        moved[row] = np.roll(highlighted[row], rng.integers(image_size), axis=(0, 1))
    return highlighted, moved


def find_highlighted(
    heatmap: np.ndarray, image_size: tuple[int, int], share: float, rng: np.random.Generator
) -> np.ndarray:
    """Returns a share of the pixels, those where a heatmap `(h, w)` is highest, bool `(height, width)`.

    `rng` chooses among equal values, such as zeros, in blocks as coarse as the heatmap.
    """
    fields = heatmap.astype(np.float32), rng.random(heatmap.shape, np.float32)
    values, noise = (cv2.resize(field, image_size[::-1], interpolation=cv2.INTER_LINEAR).ravel() for field in fields)
    # The noise is smaller than any difference in a heatmap: it only decides between equal values.
    keys, others = values + 1e-9 * noise.astype(float), len(values) - round(len(values) * share)
    mask = np.zeros(len(values), bool)
    mask[np.argpartition(keys, others)[others:]] = True
    return mask.reshape(image_size)


def predict_without(
    predict: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    parts: np.ndarray,
    class_indices: np.ndarray,
    removal: Removal,
) -> np.ndarray:
    """Returns the probability of each image's class after a part is removed, float `(batch,)`."""
    removed = np.stack([removal.remove(image, part) for image, part in zip(images, parts, strict=True)])
    return predict(removed)[np.arange(len(images)), class_indices]


def choose_removal(measure: Callable[[Removal], float], removals: Sequence[Removal] = REMOVALS) -> Removal:
    """Returns the first removal that leaves at least `KEPT`, or else the one that leaves the most.

    If removing any part destroys the answer, removing the highlighted one shows nothing.

    Args:
        measure: returns the share of the class's probability that is left without a random part.
        removals: the strongest first.
    """
    kept = []
    for removal in removals:
        kept.append(measure(removal))
        if kept[-1] >= KEPT:
            return removal
    return removals[int(np.argmax(kept))]


def summarise_faithfulness(
    probabilities: np.ndarray, removal: Removal, groups: np.ndarray | None = None
) -> dict[str, Any]:
    """Summarises the effect of removing parts of images on the probability of the explained class.

    Args:
        probabilities: of that class, `(images, 3)`: of the whole image, without the highlighted part, and without a
            random part.

    Returns:
        `images`, their number, and `groups` if there are fewer; `removal` and `share`; `highlighted` and `random`, the
        mean drops; `kept`, the share of the probability that is left without a random part. `explained` is how much
        more the highlighted part lowers the probability than a random part, as a share of the largest possible
        difference; `low` and `high` are its 95 % confidence interval; `verdict` is faithful, weakly faithful or not
        faithful. They are None if there are too few images.
    """
    number = len(probabilities)
    names = ("highlighted", "random", "kept", "explained", "low", "high", "verdict")
    summary = {"images": number, "removal": removal.name, "share": removal.share} | dict.fromkeys(names)
    if groups is not None:
        summary["groups"] = count_groups(groups, number)
    if not number:
        return summary
    whole, without, random = probabilities.mean(axis=0).tolist()
    summary |= {"highlighted": whole - without, "random": whole - random, "kept": random / whole if whole else 1.0}
    if number < FEWEST_IMAGES:
        return summary
    # A ratio of means, with its linearised standard error: Cochran, Sampling Techniques, 1977, section 6.3.
    explained = (random - without) / random if random else 0.0
    residuals = probabilities[:, 2] - probabilities[:, 1] - explained * probabilities[:, 2]
    units = number if is_single_group(groups) else count_groups(groups, number)
    sums = residuals if units == number else np.bincount(groups, residuals)
    error = float(sums.std(ddof=1)) * np.sqrt(units) / number / random if random else 0.0
    margin = float(stats.t.ppf(0.975, units - 1) * error)
    summary |= {"explained": explained, "low": explained - margin, "high": explained + margin}
    is_faithful = summary["low"] >= FAITHFUL and summary["kept"] >= LEAST_KEPT
    other = "weakly faithful" if summary["low"] >= WEAKLY_FAITHFUL else "not faithful"
    return summary | {"verdict": "faithful" if is_faithful else other}


def describe_faithfulness(summary: dict[str, Any], number_of_images: int) -> str:
    """Describes the result of `summarise_faithfulness`, for a set of `number_of_images`, and how far to trust maps."""
    if not summary["images"]:
        return "Faithfulness: no class was explained, so there is nothing to measure."
    effects = [
        f"{'lowers' if summary[name] >= 0 else 'raises'} {of} by {abs(summary[name]):.2f}"
        for name, of in (("highlighted", "the class's probability"), ("random", "it"))
    ]
    share = f"{100 * summary['share']:.0f} %"
    what = summary["removal"].format(f"the highlighted {share}")
    groups = describe_group_count(summary.get("groups"))
    measured = f"Faithfulness ({summary['images']} of {number_of_images} images{groups}): {what} {effects[0]}, "
    measured += f"a random {share} {effects[1]}."
    if summary["verdict"] is None:
        return f"{measured} Too few images for a verdict on the maps: at least {FEWEST_IMAGES} are needed."
    explained, low, high = (round(100 * summary[name]) for name in ("explained", "low", "high"))
    return (
        f"{measured} The maps explain {explained} % (95 % interval {low} to {high} %) of the drop that is possible "
        f"beyond a random part. {_explain_verdict(summary)}"
    )


def _explain_verdict(summary: dict[str, Any]) -> str:
    if summary["verdict"] == "faithful":
        return "Faithful: the answer rests clearly more on the highlighted parts than on others."
    if summary["verdict"] == "weakly faithful":
        if summary["kept"] < LEAST_KEPT:
            return "Weakly faithful at most: removing any part destroys most answers, so the maps show little."
        return "Weakly faithful: the maps are slightly better than a random part; do not rely on a single one."
    if summary["high"] < 0:
        return "Not faithful: the answer rests on other places than the maps show; do not rely on them."
    return "Not faithful: the maps are hardly or not at all better than a random part; do not rely on them."
