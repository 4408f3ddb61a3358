"""How a model's raw probabilities become an answer: temperature and thresholds."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import optimize, special

from finetune.evaluation.metrics import check_finite

THRESHOLD_STEP = 0.01
THRESHOLD_TYPES = ("exact_match", "best_f1")
TEMPERATURE_RANGE = (0.05, 20.0)
# Below float32's smallest positive number: 0 stays the lowest probability of a row, and its logarithm is finite.
LEAST_PROBABILITY = 1e-46
# Half of float32's step below 1: a sigmoid closer to 1 than this rounds to 1.
LEAST_DISTANCE_FROM_ONE = 2.0**-25
# Numbers in one block of work: a few arrays of this size fit into a processor's cache.
BLOCK = 2**20
SOFTMAX = functools.partial(special.softmax, axis=1)


@dataclasses.dataclass(frozen=True)
class Decision:
    """How a model's raw probabilities become an answer.

    Attributes:
        class_names: in the model's order.
        multi_label: whether an image may have several labels.
        temperature: divides the logits.
        temperature_fitted_on: "validation"; None without a validation set, and the temperature is 1.
        exact_match_threshold: multi-label: one threshold for all classes, with the most exact matches.
        best_f1_thresholds: multi-label: one per class; None uses `exact_match_threshold` for each.
        thresholds_fitted_on: "validation" or "training"; None if they are not fitted.
        model: file name of the model that this was fitted for; empty for any.
    """

    class_names: list[str]
    multi_label: bool
    temperature: float = 1.0
    temperature_fitted_on: str | None = None
    exact_match_threshold: float = 0.5
    best_f1_thresholds: list[float] | None = None
    thresholds_fitted_on: str | None = None
    model: str = ""

    def calibrate(self, probabilities: np.ndarray) -> np.ndarray:
        """Divides the logits behind probabilities by the temperature.

        Returns:
            float32 `(images, classes)`; the classes of a row keep their order.
        """
        raw = np.asarray(probabilities, np.float32)
        if self.temperature == 1:
            return raw
        calibrated = np.empty_like(raw)
        to_probabilities = special.expit if self.multi_label else SOFTMAX
        for rows in _row_blocks(*raw.shape):
            calibrated[rows] = to_probabilities(_logits(raw[rows], self.multi_label) / self.temperature)
        if not self.multi_label:
            highest = raw.argmax(axis=1)
            # Rounding to float32 can make the two highest probabilities of a row equal.
            tied = np.flatnonzero(calibrated.argmax(axis=1) != highest)
            calibrated[tied, highest[tied]] = np.nextafter(calibrated[tied].max(axis=1), np.float32(2))
        return calibrated

    def thresholds(self, threshold_type: str = "exact_match") -> np.ndarray:
        """Returns the lowest calibrated probability at which each label is predicted, float32 `(classes,)`."""
        by_class = self.best_f1_thresholds if threshold_type == "best_f1" else None
        return np.array(by_class or [self.exact_match_threshold] * len(self.class_names), np.float32)

    def choose(self, calibrated: np.ndarray, threshold_type: str = "exact_match") -> np.ndarray:
        """Returns the predicted labels, bool `(images, classes)`; single-label: the first of the most probable ones."""
        if self.multi_label:
            # Both in float32: a float64 threshold of 0.7 is above the float32 probability 0.7.
            return np.asarray(calibrated, np.float32) >= self.thresholds(threshold_type)
        return calibrated.argmax(axis=1)[:, None] == np.arange(len(self.class_names))

    def measure_confidence(self, calibrated: np.ndarray) -> np.ndarray:
        """Returns the probability of each image's answer, `(images,)`; multi-label: that of its least certain label."""
        if not self.multi_label:
            return calibrated.max(axis=1)
        return np.where(self.choose(calibrated), calibrated, 1 - calibrated).min(axis=1)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `decision.json`."""
        content = dataclasses.asdict(self)
        classes, by_class = content.pop("class_names"), self.best_f1_thresholds
        if by_class is not None:
            content["best_f1_thresholds"] = dict(zip(classes, by_class, strict=True))
        return {"classes": classes, **content}


def _logits(probabilities: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns the logits, float64 of the same shape; of a softmax, up to a constant per row."""
    clipped = np.clip(probabilities, LEAST_PROBABILITY, 1, dtype=np.float64)
    logits = np.log(clipped)
    return logits - np.log(np.maximum(1 - clipped, LEAST_DISTANCE_FROM_ONE)) if multi_label else logits


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yields slices of rows, about `BLOCK` numbers each."""
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def fit_decision(
    truths: dict[str, np.ndarray],
    raw_probabilities: dict[str, np.ndarray],
    class_names: Sequence[str],
    multi_label: bool,
    threshold_range: Sequence[float],
    model: str,
) -> Decision:
    """Fits the temperature on the validation set, and thresholds there or, without one, on the training set.

    Args:
        truths: the labels by set; `test` is ignored, `validation` may be missing.
        raw_probabilities: by set.
        threshold_range: lowest and highest exact-match threshold to try, on calibrated probabilities.

    Raises:
        UserError: a probability is not finite.
    """
    decision = Decision(list(class_names), multi_label, model=os.path.basename(model))
    fitted_on = next((name for name in ("validation", "training") if name in truths), None)
    if fitted_on == "validation":
        temperature = fit_temperature(truths[fitted_on], raw_probabilities[fitted_on], multi_label)
        decision = dataclasses.replace(decision, temperature=temperature, temperature_fitted_on=fitted_on)
    if not multi_label or fitted_on is None:
        return decision
    check_finite(raw_probabilities[fitted_on])
    y_true, calibrated = truths[fitted_on], decision.calibrate(raw_probabilities[fitted_on])
    threshold, _ = find_exact_match_threshold(y_true, calibrated, threshold_range)
    return dataclasses.replace(
        decision,
        exact_match_threshold=threshold,
        best_f1_thresholds=find_best_f1_thresholds(y_true, calibrated, threshold),
        thresholds_fitted_on=fitted_on,
    )


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
    for rows in _row_blocks(*probabilities.shape):
        logits = _logits(probabilities[rows], multi_label)
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
