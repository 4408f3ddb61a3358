"""Scores labels against out-of-fold answers, and estimates how many are wrong, as cleanlab counts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import cleanlab.count
import cleanlab.multilabel_classification
import cleanlab.rank
import numpy as np

from finetune.data.groups import (
    count_groups,
    is_single_group,
)

RESAMPLINGS = 200


class Estimate(NamedTuple):
    """How many labels are wrong by cleanlab's count, with its 95 % confidence interval over images."""

    number: int
    low: int
    high: int


def find_wrong_labels(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns which of several labels are wrong as cleanlab counts them, each judged by itself, bool.

    Args:
        labels: `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`.
    """
    is_wrong = np.zeros(labels.shape, bool)
    for position, (given, probability) in enumerate(zip(labels.T.astype(int), probabilities.T, strict=True)):
        pair = np.stack([1 - probability, probability], axis=1)
        _, rows = cleanlab.count.compute_confident_joint(
            given, pair, calibrate=False, return_indices_of_off_diagonals=True
        )
        rows = np.array(rows, int)
        is_wrong[rows, position] = pair.argmax(axis=1)[rows] != given[rows]
    return is_wrong


def find_likely(labels: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns the likely labels as `encode_labels` gives them.

    Of several labels, those that cleanlab counts as wrong are changed or, where it counts none, the most doubtful one
    if it is more probably wrong than right; all others are left. At least one label is likely.
    """
    best = probabilities.argmax(axis=1)
    if not multi_label:
        return best
    changes, doubts = find_wrong_labels(labels, probabilities), np.where(labels == 1, 1 - probabilities, probabilities)
    rows = np.flatnonzero(~changes.any(axis=1) & (doubts.max(axis=1) > 0.5))
    changes[rows, doubts[rows].argmax(axis=1)] = True
    likely = np.where(changes, 1 - labels, labels).astype(np.uint8)
    rows = np.flatnonzero(~likely.any(axis=1))
    likely[rows, best[rows]] = 1
    return likely


def score_labels(labels: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns cleanlab's quality of each image's label, in `[0, 1]`, the lowest the most doubtful.

    Single-label it is the probability of the given label; multi-label a mean over all labels, in which the worst one
    counts most.

    Source: Kuan and Mueller, ICML 2022 workshop DataPerf; multi-label Thyagarajan et al., 2022 (arXiv:2211.13895).
    """
    if multi_label:
        # cleanlab refuses labels that all images have: one more image, without the last label, changes no other score.
        given = [*(np.flatnonzero(row).tolist() for row in labels), [0]]
        padded = np.concatenate([probabilities, probabilities[:1]])
        return cleanlab.multilabel_classification.get_label_quality_scores(given, padded)[:-1]
    return cleanlab.rank.get_label_quality_scores(labels, probabilities, method="self_confidence")


def rank_suspects(
    labels: np.ndarray, probabilities: np.ndarray, multi_label: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks the images whose likely label is another one than the given.

    Args:
        labels: as `encode_labels` gives them.
        probabilities: `(images, classes)`, of images that the judge has not learnt from.
        multi_label: which kind of labels.

    Returns:
        Positions of the suspects, the most doubtful first; of every image, the quality of its label, and the likely
        one as `find_likely` gives it.
    """
    qualities, likely = (
        score_labels(labels, probabilities, multi_label),
        find_likely(labels, probabilities, multi_label),
    )
    differs = likely != labels
    suspects = np.flatnonzero(differs.any(axis=1) if multi_label else differs)
    return suspects[np.argsort(qualities[suspects], kind="stable")], qualities, likely


def count_errors(labels: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> int:
    """Returns how many images have a wrong label, as cleanlab counts them.

    Source: Northcutt et al., JAIR 2021 (arXiv:1911.00068): an image counts whose probability of another label is at
    least the mean one of the images with that label. Of several labels, each is judged by itself.
    """
    if not multi_label and (labels == labels[0]).all():
        # cleanlab needs two classes; a resample may lack a rare one.
        return int((probabilities.argmax(axis=1) != labels).sum())
    if not multi_label:
        return int(cleanlab.count.num_label_issues(labels, probabilities))
    return int(find_wrong_labels(labels, probabilities).any(axis=1).sum())


def estimate_errors(
    labels: np.ndarray, probabilities: np.ndarray, multi_label: bool, seed: int, groups: np.ndarray | None = None
) -> Estimate:
    """Estimates how many labels are wrong, with a bootstrap over images, or over groups of them.

    Args:
        labels: as `encode_labels` gives them.
        probabilities: `(images, classes)`.
        multi_label: which kind of labels.
        seed: of the bootstrap.
        groups: of the images, as `number_groups` gives them.

    Returns:
        Where none is found, the upper bound is 3: as many are still found by none in 5 of 100 samples. Of groups it is
        as many images as three groups have on average.
    """
    # One group shows nothing of how groups differ: `summarize` says so.
    groups = None if is_single_group(groups) else groups
    rng, number = np.random.default_rng(seed), count_errors(labels, probabilities, multi_label)
    counts = []
    for rows in _draw_rows(len(labels), groups, rng):
        # Resamples of groups differ in size.
        share = len(labels) / len(rows)
        counts.append(count_errors(labels[rows], probabilities[rows], multi_label) * share)
    low, high = np.percentile(counts, [2.5, 97.5])
    unseen = int(np.ceil(3 * len(labels) / count_groups(groups, len(labels))))
    return Estimate(
        number, min(int(low), number), max(int(np.ceil(high)), number, 0 if number else min(unseen, len(labels)))
    )


def _draw_rows(images: int, groups: np.ndarray | None, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields the positions of the images in each resample: images, or whole groups, drawn with replacement."""
    if groups is None:
        for _ in range(RESAMPLINGS):
            yield rng.integers(images, size=images)
        return
    sizes = np.bincount(groups)
    rows_of = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
    for _ in range(RESAMPLINGS):
        yield np.concatenate([rows_of[group] for group in rng.integers(len(sizes), size=len(sizes))])
