"""Fitting a temperature and thresholds to a set's probabilities."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import optimize, special

from finetune.evaluation.metrics import check_finite

THRESHOLD_STEP = 0.01
TEMPERATURE_RANGE = (0.05, 20.0)
# Below float32's smallest positive number: 0 stays the lowest probability of a row, and its logarithm is finite.
LEAST_PROBABILITY = 1e-46
# Half of float32's step below 1: a sigmoid closer to 1 than this rounds to 1.
LEAST_DISTANCE_FROM_ONE = 2.0**-25
# Numbers in one block of work: a few arrays of this size fit into a processor's cache.
BLOCK = 2**20
SOFTMAX = functools.partial(special.softmax, axis=1)


def get_logits(probabilities: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns the logits, float64 of the same shape; of a softmax, up to a constant per row."""
    clipped = np.clip(probabilities, LEAST_PROBABILITY, 1, dtype=np.float64)
    logits = np.log(clipped)
    return logits - np.log(np.maximum(1 - clipped, LEAST_DISTANCE_FROM_ONE)) if multi_label else logits


def split_rows(rows: int, columns: int) -> Iterator[slice]:
    """Yields slices of rows, about `BLOCK` numbers each."""
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def fit_temperature(y_true: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> float:
    """Finds the temperature under which a set's labels are most likely.

    Source: Guo et al., ICML 2017, section 4.2 (arXiv:1706.04599); multi-label: the same with sigmoids.

    Returns:
        A number in `TEMPERATURE_RANGE`. 1 if no answer is wrong: the likelihood then keeps rising as the temperature
        falls to 0.

    Raises:
        UserError: a probability is not finite.
    """
    check_finite(probabilities)
    truth = np.asarray(y_true, bool) if multi_label else np.asarray(y_true)
    if multi_label:
        wrong = np.where(truth, probabilities < 0.5, probabilities > 0.5)
    else:
        wrong = probabilities > np.take_along_axis(probabilities, truth[:, None], axis=1)
    if not wrong.any():
        return 1.0
    slope = functools.partial(_likelihood_slope, truth, probabilities, multi_label)
    lowest, highest = np.log(TEMPERATURE_RANGE)
    if slope(lowest) <= 0:
        return TEMPERATURE_RANGE[0]
    if slope(highest) >= 0:
        return TEMPERATURE_RANGE[1]
    return float(np.exp(optimize.brentq(slope, lowest, highest, xtol=1e-9)))


def _likelihood_slope(truth: np.ndarray, probabilities: np.ndarray, multi_label: bool, log_temperature: float) -> float:
    """Returns the derivative of the negative log-likelihood by `1 / temperature`, with which it rises."""
    total = 0.0
    for rows in split_rows(*probabilities.shape):
        logits = get_logits(probabilities[rows], multi_label)
        scaled = logits * np.exp(-log_temperature)
        if multi_label:
            total += (logits * (special.expit(scaled) - truth[rows])).sum()
        else:
            at_truth = np.take_along_axis(logits, truth[rows, None], axis=1)
            total += (logits * SOFTMAX(scaled)).sum() - at_truth.sum()
    return float(total)


def find_exact_match_threshold(
    y_true: np.ndarray, probabilities: np.ndarray, threshold_range: Sequence[float]
) -> tuple[float, float]:
    """Finds the threshold, in steps of 0.01, at which the most images have exactly the right labels.

    Returns:
        The threshold (the middle one of equally good ones) and its exact-match accuracy.
    """
    lowest, highest = threshold_range
    # Python floats: NumPy's float64 would be compared in another precision than in the evaluation.
    candidates = np.round(np.arange(lowest, highest + THRESHOLD_STEP / 2, THRESHOLD_STEP), 4).tolist()
    truth = y_true.astype(bool)
    accuracies = np.array([((probabilities >= threshold) == truth).all(axis=1).mean() for threshold in candidates])
    best = np.flatnonzero(accuracies == accuracies.max())
    return candidates[best[len(best) // 2]], float(accuracies.max())


def find_best_f1_thresholds(y_true: np.ndarray, probabilities: np.ndarray, fallback: float) -> list[float]:
    """Finds the threshold with the highest F1 for each class; `fallback` for classes without images.

    Returns:
        For each class a float32 number in `[0, 1]` as a Python float: the midpoint of the lowest probability above it
        and the highest one below; the middle one of equally good thresholds.
    """
    return [
        _find_best_f1_threshold(truth, scores) if truth.any() else float(fallback)
        for truth, scores in zip(y_true.astype(bool).T, np.asarray(probabilities, np.float32).T, strict=True)
    ]


def _find_best_f1_threshold(truth: np.ndarray, scores: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    descending = np.append(scores[order], np.float32(0))
    counts = np.append(1 + np.flatnonzero(np.diff(descending[:-1])), len(scores))
    f1 = 2 * np.cumsum(truth[order])[counts - 1] / (counts + truth.sum())
    best = np.flatnonzero(f1 == f1.max())
    count = counts[best[len(best) // 2]]
    lowest_chosen, highest_left = descending[count - 1], descending[count]
    middle = np.float32((float(lowest_chosen) + float(highest_left)) / 2)
    return float(middle if middle > highest_left else lowest_chosen)
