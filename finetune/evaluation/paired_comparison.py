"""Comparing two models image by image, and which of them to keep: the simpler one unless the other is better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp
from scipy.stats import rankdata

from finetune.data.groups import count_groups, is_single_group

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
    what = _describe_weights(share, is_refitted)
    difference = f"by {gain:.4f}, standard error {error:.4f}, on {number} validation images"
    if is_kept:
        doubt = " Chance alone could explain this." if gain <= BY_CHANCE * error else ""
        return f"Kept {what}: the log loss is lower than the start's {difference}.{doubt}"
    # Rounding is no difference, and the same for every image.
    if -gain > error + 1e-6:
        return f"Kept the start: the log loss of {what} is no lower ({difference})."
    return (
        f"Kept the start, the simpler model: {what} would not be clearly better (log loss lower {difference}). "
        "latest_model.keras is the fine-tuned model."
    )


def describe_rival(share: float, is_refitted: bool, gain: float, error: float) -> str:
    """Says why weights with a lower log loss than the kept ones are not kept; arguments as in `describe_choice`."""
    numbers = f"log loss lower by {gain:.4f}, standard error {error:.4f}"
    return f"Not kept: {_describe_weights(share, is_refitted)}, which would not be clearly better ({numbers})."


def _describe_weights(share: float, is_refitted: bool) -> str:
    what = "the fine-tuned model" if share == 1 else f"the weights {share:.0%} of the way to the fine-tuned model's"
    return what + _describe_head(share, is_refitted)
