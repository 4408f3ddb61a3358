"""95 % bootstrap confidence intervals of metrics, and paired comparisons of models on the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import sparse, stats
from scipy.special import logsumexp
from scipy.stats import rankdata

from finetune.data.groups import count_groups, is_single_group
from finetune.evaluation import calibration
from finetune.evaluation.decision import Decision
from finetune.evaluation.metrics import MANY_CLASSES, TOP_K, is_in_top_k, to_indicators

RESAMPLES = 1000


def get_intervals(
    y_true: np.ndarray,
    raw_probabilities: np.ndarray,
    decision: Decision,
    seed: int = 0,
    resamples: int = RESAMPLES,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Estimates 95 % bootstrap percentile intervals of the headline metrics.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3; groups: Davison and Hinkley,
    Bootstrap Methods and their Application, 1997, section 3.8. Images, or whole groups of them, are drawn with
    replacement. As in the metrics themselves, means leave out classes that are undefined in a resample.

    Returns:
        `[low, high]` by the metric's name. None if it is undefined in all resamples, if all images are of one group, or
        if all resamples are equal, see `_interval`. Multi-label: `per_class` has those of `precision`, `recall` and
        `f1` by class name.
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

    If all images are right, or all wrong, all resamples are equal, and their interval would be too narrow. A share of
    images then gets the exact binomial interval (Clopper and Pearson, Biometrika 26, 1934), any other metric none.

    Args:
        values: of the resamples; NaN if undefined.
        units: the number of images or groups that the values are shares of; 0 for other metrics.
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
    """Yields blocks of resamples: how often each image is drawn, float32 `(resamples, images)`."""
    step, units = max(1, calibration.BLOCK // images), count_groups(groups, images)
    for start in range(0, resamples, step):
        shape = min(step, resamples - start), units
        drawn = rng.integers(units, size=shape) + units * np.arange(shape[0])[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(shape).astype(np.float32)
        yield counts if groups is None else np.take(counts, groups, axis=1)


Measure = Callable[[np.ndarray], dict[str, np.ndarray]]


def _prepare_counts(y_true: np.ndarray, raw: np.ndarray, decision: Decision) -> Measure:
    """Returns a function that computes the metrics that are based on counts.

    From weights `(resamples, images)`, how often an image is drawn, to metrics `(resamples,)`, and to `precision`,
    `recall` and `f1` `(resamples, classes)`; NaN if undefined.
    """
    predicted = decision.choose(decision.calibrate(raw))
    truth = to_indicators(y_true, predicted.shape[1])
    per_image = {"accuracy": (truth == predicted).all(axis=1)}
    if decision.multi_label:
        per_image = {"exact_match_accuracy": per_image["accuracy"]}
    elif predicted.shape[1] >= MANY_CLASSES:
        per_image[f"top_{TOP_K}_accuracy"] = is_in_top_k(y_true, raw)
    indicators = [sparse.csc_array(chosen.astype(np.float32)).T for chosen in (truth, predicted, truth & predicted)]

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
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
    """Returns a function that computes the mean AUROC and average precision, like `_prepare_counts`."""
    rankings = [_Ranking.of(*column) for column in zip(truth.T, scores.T, strict=True)]

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        by_image = np.ascontiguousarray(weights.T)
        aurocs, precisions = np.stack([ranking.measure(by_image) for ranking in rankings], axis=-1)
        return {"mean_auroc": _row_means(aurocs), "mean_average_precision": _row_means(precisions)}

    return measure


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """One class's images by descending score, and the scores that positive images have.

    Attributes:
        order: int32 `(images,)`, all images by descending score.
        positives: int32, the positive images in that order.
        starts: int32, for each positive's score, the number of images with a higher score.
        ends: int32, for each positive's score, the number of images with at least this score.
        positive_ends: int32, for each positive's score, the number of positive images with at least this score.
    """

    order: np.ndarray
    positives: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    positive_ends: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, scores: np.ndarray) -> _Ranking:
        order = np.argsort(-scores, kind="stable").astype(np.int32)
        descending = -scores[order]
        at_positives = descending[truth[order]]
        groups, counts = np.unique(at_positives, return_counts=True)
        starts, ends = (np.searchsorted(descending, groups, side=side) for side in ("left", "right"))
        places = (part.astype(np.int32) for part in (starts, ends, np.cumsum(counts)))
        return cls(order, order[truth[order]], *places)

    def measure(self, weights: np.ndarray) -> np.ndarray:
        """Returns AUROC and average precision `(2, resamples)` from weights `(images, resamples)`; NaN if undefined."""
        bounds = np.unique(np.concatenate([[0], self.starts, self.ends, [len(self.order)]])).astype(np.int32)
        drawn, right = _cumulate(weights, self.order, bounds), _cumulate(weights, self.positives, self.positive_ends)
        images, positives = drawn[-1], right[-1]
        before, chosen = (drawn[np.searchsorted(bounds, places)] for places in (self.starts, self.ends))
        right, gains = right[1:], np.diff(right, axis=0)
        # Pairs of a positive and an image with a higher score; pairs with equal scores count half.
        above = (gains * (chosen + before)).sum(axis=0) / 2
        negatives_above = above - positives**2 / 2
        precisions = (gains * right / np.maximum(chosen, 1)).sum(axis=0)
        aurocs = 1 - _divide(negatives_above, positives * (images - positives))
        return np.stack([aurocs, _divide(precisions, positives)])


def _cumulate(weights: np.ndarray, order: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Returns a row of zeros, and the sums of the weights of the first `bounds` images in an order, float64."""
    bounds = np.concatenate([np.zeros(1, np.int32), bounds[bounds > 0]])
    # The sum between two bounds is a row of a sparse product: each weight is read once, and nothing is copied.
    shape = (len(bounds) - 1, len(weights))
    parts = sparse.csr_array((np.ones(len(order), np.float32), order, bounds), shape=shape) @ weights
    return np.concatenate([np.zeros((1, weights.shape[1])), np.cumsum(parts, axis=0, dtype=np.float64)])


def _divide(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Returns the quotients, NaN if the denominator is 0."""
    quotients = np.full(np.shape(numerators), np.nan)
    return np.divide(numerators, denominators, out=quotients, where=denominators > 0, dtype=np.float64)


def _row_means(values: np.ndarray) -> np.ndarray:
    """Returns the mean of each row without its NaNs; NaN if it has no other values."""
    defined = ~np.isnan(values)
    return _divide(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1))


# In steps of 9 %.
TEMPERATURES = np.geomspace(1 / 4, 4, 33)
# In standard errors: a smaller gain does not justify the less simple model.
LEAST_GAIN = 0.25
# In standard errors: 95 % of random differences are smaller.
BY_CHANCE = 1.96


def score_images(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Scores the answer to each image, in `[0, 1]`.

    Returns:
        float64 `(images,)`: whether the most probable class is right; multi-label the label ranking average precision
        (Tsoumakas et al., Data Mining and Knowledge Discovery Handbook, 2010, 34.7.2), 1 for an image without labels.
    """
    if y_true.ndim == 1:
        return (probabilities.argmax(axis=1) == y_true).astype(float)
    truth = y_true.astype(bool)
    ranks = rankdata(-probabilities, method="max", axis=1)
    among_true = [rankdata(row[known], method="max") / row[known] for row, known in zip(ranks, truth, strict=True)]
    return np.array([precisions.mean() if len(precisions) else 1.0 for precisions in among_true])


def compare_scores(
    simple: Sequence[float], other: Sequence[float], groups: np.ndarray | None = None
) -> tuple[float, float]:
    """Compares two models on the same images.

    Args:
        simple: the scores of each image by the simpler model.
        other: the scores by the other model.

    Returns:
        The mean difference, other less simple, and its standard error; 0 for one image. With groups, it is that of a
        mean of clusters (Cameron and Miller, Journal of Human Resources, 2015, section II). With a single group it is
        that of independent images, which is too small.
    """
    differences = np.asarray(other) - np.asarray(simple)
    number = len(differences)
    if groups is not None and not is_single_group(groups):
        units = count_groups(groups, number)
        sums = np.bincount(groups, weights=differences - differences.mean())
        return float(differences.mean()), float(np.sqrt(units / (units - 1) * (sums**2).sum()) / number)
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(number)) if number > 1 else 0.0


def describe_errors(groups: np.ndarray) -> str:
    """Says what the standard errors of `compare_scores` are based on."""
    if is_single_group(groups):
        return "standard errors are over images, and are too small"
    return "standard errors are over groups"


def is_better(difference: float, error: float) -> bool:
    """Returns whether to prefer a model to a simpler one, by the mean difference and its standard error.

    A whole standard error, as in the one-standard-error rule (Breiman, Friedman, Olshen and Stone, Classification and
    Regression Trees, 1984, section 3.4.3), is too strict for few validation images. With 20 training and 6 validation
    photos of each of ten hand signs it kept the probe in two splits of two, which lost 4 and 6 points on the test
    photos.
    """
    return difference > LEAST_GAIN * error


def get_log_losses(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns the log loss of each image at the temperature with the lowest mean.

    It needs fewer images than accuracy does to show a difference between two models. Without a temperature, which
    `test.py` fits later, it would count label smoothing as doubt.

    Returns:
        float64 `(images,)` in nats, multi-label: the mean over the labels; infinite if a probability is not finite.
    """
    if not np.isfinite(probabilities).all():
        return np.full(len(y_true), np.inf)
    bounded = np.clip(np.asarray(probabilities, np.float64), 1e-7, 1 - 1e-7)
    if y_true.ndim == 1:
        scores = np.log(bounded)
        tried = [logsumexp(scores / t, axis=1) - scores[np.arange(len(y_true)), y_true] / t for t in TEMPERATURES]
    else:
        against = np.where(y_true.astype(bool), -1, 1) * (np.log(bounded) - np.log1p(-bounded))
        tried = [np.logaddexp(0, against / t).mean(axis=1) for t in TEMPERATURES]
    return min(tried, key=np.mean)


def describe_epoch(epoch: int, kept_share: float | None, is_refitted: bool) -> str:
    """Names the epoch of the kept model; if it is an average, also its share and its head."""
    place = str(epoch)
    if kept_share not in (None, 0, 1):
        place += f", averaged {kept_share:.0%} of the way from the start to its weights"
    return place + _describe_head(kept_share, is_refitted)


def _describe_head(share: float | None, is_refitted: bool) -> str:
    if not is_refitted:
        return ""
    return ", with a refitted head" if share == 1 else f", with a head {share:.0%} of the way to the refitted one"


def describe_choice(share: float, is_refitted: bool, is_kept: bool, gain: float, error: float, number: int) -> str:
    """Says which weights are kept, and why.

    Args:
        share: of the way from the start to the last epoch: the kept weights, or the best ones except the start.
        is_refitted: their head is the same share of the way to the refitted head.
        is_kept: they are kept, not the start.
        gain: how much lower their log loss is than the start's.
    """
    what, difference = _describe_weights(share, is_refitted), _describe_difference(gain, error, "the start's")
    numbers = f"({difference}, on {number} validation images)"
    if is_kept:
        doubt = " Chance alone could explain this." if gain <= BY_CHANCE * error else ""
        return f"Kept {what} {numbers}.{doubt}"
    # Rounding is no difference, and the same for every image.
    if -gain > error + 1e-6:
        return f"Kept the start: {what} would be worse {numbers}."
    return (
        f"Kept the start, the simpler model: {what} would not be clearly better {numbers}. "
        "latest_model.keras is the fine-tuned model."
    )


def describe_rival(share: float, is_refitted: bool, gain: float, error: float) -> str:
    """Says why weights with a lower log loss than the kept ones are not kept; arguments as in `describe_choice`."""
    what, difference = (
        _describe_weights(share, is_refitted),
        _describe_difference(gain, error, "that of the kept weights"),
    )
    return f"Not kept: {what} would not be clearly better ({difference})."


def _describe_difference(gain: float, error: float, other: str) -> str:
    word = "lower" if gain >= 0 else "higher"
    return f"log loss {word} than {other} by {abs(gain):.4f}, standard error {error:.4f}"


def _describe_weights(share: float, is_refitted: bool) -> str:
    what = "the fine-tuned model" if share == 1 else f"the weights {share:.0%} of the way to the fine-tuned model's"
    return what + _describe_head(share, is_refitted)
