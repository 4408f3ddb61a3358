"""Scores labels by out-of-fold probabilities, and estimates how many are wrong, both with cleanlab."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import cleanlab.count
import cleanlab.multilabel_classification
import cleanlab.rank
import numpy as np

from finetune.data.groups import count_groups, is_single_group

RESAMPLINGS = 200


class Estimate(NamedTuple):
    """The number of wrong labels by cleanlab, with its 95 % confidence interval."""

    number: int
    low: int
    high: int


def find_wrong_labels(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns which labels of multi-label images are wrong by cleanlab, class by class, bool `(images, classes)`."""
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
    """Returns the likely labels in the form that `encode_labels` returns.

    Multi-label, the given labels change where cleanlab finds them wrong. If it finds none of an image's wrong, its most
    doubtful one changes if that is probably wrong. An image keeps at least one label.
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
    """Returns cleanlab's quality of each image's label, in `[0, 1]`, lowest for the most doubtful.

    Single-label it is the probability of the given label, multi-label a mean over all labels that weights the worst
    most.

    Source: Kuan and Mueller, ICML 2022 workshop DataPerf; multi-label Thyagarajan et al., 2022 (arXiv:2211.13895).
    """
    if multi_label:
        # cleanlab rejects a label that all images have. One more image without it changes no other score.
        given = [*(np.flatnonzero(row).tolist() for row in labels), [0]]
        padded = np.concatenate([probabilities, probabilities[:1]])
        return cleanlab.multilabel_classification.get_label_quality_scores(given, padded)[:-1]
    return cleanlab.rank.get_label_quality_scores(labels, probabilities, method="self_confidence")


def rank_suspects(
    labels: np.ndarray, probabilities: np.ndarray, multi_label: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks the images whose likely label differs from the given one.

    Returns:
        Their positions, the most doubtful label first; and of every image the quality of its label, and the likely
        labels as `find_likely` returns them.
    """
    qualities = score_labels(labels, probabilities, multi_label)
    likely = find_likely(labels, probabilities, multi_label)
    differs = likely != labels
    suspects = np.flatnonzero(differs.any(axis=1) if multi_label else differs)
    return suspects[np.argsort(qualities[suspects], kind="stable")], qualities, likely


def count_errors(labels: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> int:
    """Returns how many images have a wrong label by cleanlab.

    Source: Northcutt et al., JAIR 2021 (arXiv:1911.00068): an image counts if its probability of another class is at
    least the mean probability of that class over the images labelled with it. Multi-label, each class is judged by
    itself.
    """
    if multi_label:
        return int(find_wrong_labels(labels, probabilities).any(axis=1).sum())
    if (labels == labels[0]).all():
        # cleanlab needs two classes, and a bootstrap sample may lack a rare one.
        return int((probabilities.argmax(axis=1) != labels).sum())
    return int(cleanlab.count.num_label_issues(labels, probabilities))


def estimate_errors(
    labels: np.ndarray, probabilities: np.ndarray, multi_label: bool, seed: int, groups: np.ndarray | None = None
) -> Estimate:
    """Estimates how many labels are wrong, with a bootstrap over images or groups.

    Returns:
        The estimate. If no label is found wrong, the upper end is 3 images (the rule of three) or, with groups, as
        many images as three groups have on average.
    """
    # A single group cannot be resampled: `summarize` warns.
    groups = None if is_single_group(groups) else groups
    rng, number = np.random.default_rng(seed), count_errors(labels, probabilities, multi_label)
    counts = []
    for rows in _draw_rows(len(labels), groups, rng):
        # Samples of groups differ in size.
        share = len(labels) / len(rows)
        counts.append(count_errors(labels[rows], probabilities[rows], multi_label) * share)
    low, high = np.percentile(counts, [2.5, 97.5])
    low, high = min(int(low), number), max(int(np.ceil(high)), number)
    if not number:
        unseen = int(np.ceil(3 * len(labels) / count_groups(groups, len(labels))))
        high = max(high, min(unseen, len(labels)))
    return Estimate(number, low, high)


def _draw_rows(images: int, groups: np.ndarray | None, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields the positions of the images in each bootstrap sample, of images or of whole groups."""
    if groups is None:
        for _ in range(RESAMPLINGS):
            yield rng.integers(images, size=images)
        return
    sizes = np.bincount(groups)
    rows_of = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
    for _ in range(RESAMPLINGS):
        yield np.concatenate([rows_of[group] for group in rng.integers(len(sizes), size=len(sizes))])
