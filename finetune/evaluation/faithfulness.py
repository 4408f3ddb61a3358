"""Faithfulness of class activation maps: the effect of removing the highlighted part of an image, or a random part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from scipy import stats

from finetune.data.groups import count_groups, describe_group_count, is_single_group

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
