"""How far metrics would vary with other images: bootstrap intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import sparse, stats

from finetune.data.groups import count_groups, is_single_group
from finetune.evaluation.decision import BLOCK, Decision
from finetune.evaluation.metrics import MANY_CLASSES, TOP_K, is_in_top_k

RESAMPLES = 1000


def get_intervals(
    y_true: np.ndarray,
    raw_probabilities: np.ndarray,
    decision: Decision,
    seed: int = 0,
    resamples: int = RESAMPLES,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Estimates how far the headline metrics would vary with other images: 95 % bootstrap percentile intervals.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3; groups: Davison and Hinkley,
    Bootstrap Methods and their Application, 1997, section 3.8. Whole images, or whole groups of them, are drawn with
    replacement. As in the metrics themselves, a class that is undefined in a resample has no part in its means.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        raw_probabilities: of the model, `(images, classes)`.
        decision: what the answers follow from.
        seed: of the resamples.
        resamples: how many.
        groups: of the images, as `number_groups` gives them; None: the images are independent.

    Returns:
        `[low, high]` by the name of each headline metric, None where it is undefined throughout, of a single group,
        which shows nothing of how groups differ, and where no resample differs (see `_interval`); multi-label:
        `per_class` holds those of `precision`, `recall` and `f1` by class name.
    """
    measures = [_prepare_counts(y_true, raw_probabilities, decision)]
    if decision.multi_label:
        measures.append(_prepare_ranking(y_true.astype(bool), raw_probabilities))
    parts = [
        {name: values for measure in measures for name, values in measure(weights).items()}
        for weights in _draw_resamples(len(y_true), resamples, np.random.default_rng(seed), groups)
    ]
    samples = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if is_single_group(groups):
        samples = {name: np.full_like(values, np.nan, dtype=float) for name, values in samples.items()}
    units = count_groups(groups, len(y_true))
    intervals: dict[str, Any] = {
        name: _interval(values, units if name.endswith("accuracy") and name != "balanced_accuracy" else 0)
        for name, values in samples.items()
        if values.ndim == 1
    }
    if decision.multi_label:
        intervals["per_class"] = {
            name: {key: _interval(samples[key][:, position]) for key in ("precision", "recall", "f1")}
            for position, name in enumerate(decision.class_names)
        }
    return intervals


def _interval(values: np.ndarray, units: int = 0) -> list[float] | None:
    """Returns the percentile interval of resamples.

    Where all images are right, or all wrong, no resample differs, which says nothing of how sure that is. A share of
    images then gets the exact binomial interval (Clopper and Pearson, Biometrika 26, 1934), any other metric none.

    Args:
        values: of the resamples; NaN where undefined.
        units: of what the values are shares of, images or groups of them; 0 if they are no such shares.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    if len(defined) == 1 or np.ptp(defined) > 0:
        return np.percentile(defined, [2.5, 97.5]).tolist()
    if not units:
        return None
    return list(stats.binomtest(round(float(defined[0]) * units), units).proportion_ci(method="exact"))


def _draw_resamples(
    images: int, resamples: int, rng: np.random.Generator, groups: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Yields how often each image is drawn, float32 `(some resamples, images)`, a block at a time."""
    step, units = max(1, BLOCK // images), count_groups(groups, images)
    for start in range(0, resamples, step):
        shape = min(step, resamples - start), units
        drawn = rng.integers(units, size=shape) + units * np.arange(shape[0])[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(shape).astype(np.float32)
        yield counts if groups is None else np.take(counts, groups, axis=1)


Measure = Callable[[np.ndarray], dict[str, np.ndarray]]


def _prepare_counts(y_true: np.ndarray, raw: np.ndarray, decision: Decision) -> Measure:
    """Prepares the metrics that follow from counts of right and wrong labels.

    Returns:
        A function from weights `(resamples, images)` to metrics `(resamples,)`, and `precision`, `recall` and `f1`
        `(resamples, classes)`, NaN where undefined.
    """
    predicted = decision.choose(decision.calibrate(raw))
    truth = y_true.astype(bool) if decision.multi_label else y_true[:, None] == np.arange(predicted.shape[1])
    per_image = {"accuracy": (truth == predicted).all(axis=1)}
    if decision.multi_label:
        per_image = {"exact_match_accuracy": per_image["accuracy"]}
    elif predicted.shape[1] >= MANY_CLASSES:
        per_image[f"top_{TOP_K}_accuracy"] = is_in_top_k(y_true, raw)
    indicators = [sparse.csc_array(chosen.astype(np.float32)).T for chosen in (truth, predicted, truth & predicted)]

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the metrics of each resample, from how often it draws each image."""
        images = weights.sum(axis=1)
        metrics = {name: _divide(weights @ values.astype(np.float32), images) for name, values in per_image.items()}
        support, chosen, right = ((indicator @ weights.T).T for indicator in indicators)
        by_class = {
            "precision": _divide(right, chosen),
            "recall": _divide(right, support),
            "f1": _divide(2 * right, support + chosen),
        }
        if decision.multi_label:
            metrics["hamming_loss"] = _divide((support + chosen - 2 * right).sum(axis=1), images * truth.shape[1])
        else:
            metrics["balanced_accuracy"] = _row_means(by_class["recall"])
        return {**metrics, "macro_f1": _row_means(by_class["f1"]), **by_class}

    return measure


def _prepare_ranking(truth: np.ndarray, scores: np.ndarray) -> Measure:
    """Prepares the mean AUROC and average precision, as `_prepare_counts` does.

    Args:
        truth: bool `(images, classes)`.
        scores: `(images, classes)`.
    """
    rankings = [_Ranking.of(*column) for column in zip(truth.T, scores.T, strict=True)]

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns both means of each resample, from how often it draws each image."""
        by_image = np.ascontiguousarray(weights.T)
        aurocs, precisions = np.stack([ranking.measure(by_image) for ranking in rankings], axis=-1)
        return {"mean_auroc": _row_means(aurocs), "mean_average_precision": _row_means(precisions)}

    return measure


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """One class's images from the highest score to the lowest, in groups of one score that hold a positive.

    Attributes:
        order: int32 `(images,)`, all images by descending score.
        positives: int32, the positive images in that order.
        starts: int32, of each group, the images that rank higher.
        ends: int32, of each group, the images that rank higher or within it.
        positive_ends: int32, of each group, the positive ones of these.
    """

    order: np.ndarray
    positives: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    positive_ends: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, scores: np.ndarray) -> _Ranking:
        """Ranks bool `(images,)` by scores `(images,)`."""
        order = np.argsort(-scores, kind="stable").astype(np.int32)
        descending = -scores[order]
        at_positives = descending[truth[order]]
        groups, counts = np.unique(at_positives, return_counts=True)
        starts, ends = (np.searchsorted(descending, groups, side=side) for side in ("left", "right"))
        places = (part.astype(np.int32) for part in (starts, ends, np.cumsum(counts)))
        return cls(order, order[truth[order]], *places)

    def measure(self, weights: np.ndarray) -> np.ndarray:
        """Returns AUROC and average precision `(2, resamples)`, NaN where undefined.

        Args:
            weights: float32 `(images, resamples)`.
        """
        bounds = np.unique(np.concatenate([[0], self.starts, self.ends, [len(self.order)]])).astype(np.int32)
        drawn, right = _cumulate(weights, self.order, bounds), _cumulate(weights, self.positives, self.positive_ends)
        images, positives = drawn[-1], right[-1]
        before, chosen = (drawn[np.searchsorted(bounds, places)] for places in (self.starts, self.ends))
        right, gains = right[1:], np.diff(right, axis=0)
        # Pairs of a positive and an image that ranks higher, those of one score by half: half of the positives' own.
        above = (gains * (chosen + before)).sum(axis=0) / 2
        negatives_above = above - positives**2 / 2
        precisions = (gains * right / np.maximum(chosen, 1)).sum(axis=0)
        aurocs = 1 - _divide(negatives_above, positives * (images - positives))
        return np.stack([aurocs, _divide(precisions, positives)])


def _cumulate(weights: np.ndarray, order: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Returns 0, and the sums of the weights up to each place in an order.

    Args:
        weights: float32 `(images, resamples)`.
        order: int32, rows of the weights.
        bounds: int32, rising places in the order.

    Returns:
        float64 `(1 + places above 0, resamples)`.
    """
    bounds = np.concatenate([np.zeros(1, np.int32), bounds[bounds > 0]])
    # A sum between two bounds is a row of a sparse product: each weight is read once, and nothing is copied.
    shape = (len(bounds) - 1, len(weights))
    parts = sparse.csr_array((np.ones(len(order), np.float32), order, bounds), shape=shape) @ weights
    return np.concatenate([np.zeros((1, weights.shape[1])), np.cumsum(parts, axis=0, dtype=np.float64)])


def _divide(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Returns the quotients, NaN where the denominator is 0."""
    quotients = np.full(np.shape(numerators), np.nan)
    return np.divide(numerators, denominators, out=quotients, where=denominators > 0, dtype=np.float64)


def _row_means(values: np.ndarray) -> np.ndarray:
    """Returns the mean of each row's values that are not NaN; NaN where there is none."""
    defined = ~np.isnan(values)
    return _divide(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1))
