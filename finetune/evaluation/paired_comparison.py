"""Which of two models to keep, by the images of a validation set: the simpler one where these cannot tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp
from scipy.stats import rankdata

from finetune.data.groups import count_groups, is_single_group

# Of the comparison of two models: 1 and steps of 9 % to a quarter and to 4.
TEMPERATURES = np.geomspace(1 / 4, 4, 33)
# Of a standard error: a smaller difference of two models tells nothing.
TELLING = 0.25
# Standard errors that 95 % of the differences by chance are within.
BY_CHANCE = 1.96


def score_images(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Scores the answer to each image, in `[0, 1]`, so that two models can be compared image by image.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`.

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
        other: those by the other one.
        groups: of the images, as `number_groups` gives them; None: the images are independent.

    Returns:
        The mean difference, other less simple, and its standard error, of the images' own differences; 0 for one image.
        Of groups, the error of a mean of clusters (Cameron and Miller, Journal of Human Resources, 2015, section II);
        a single one leaves that of the images, which is too small.
    """
    differences = np.asarray(other) - np.asarray(simple)
    number = len(differences)
    if groups is not None and not is_single_group(groups):
        units = count_groups(groups, number)
        sums = np.bincount(groups, weights=differences - differences.mean())
        return float(differences.mean()), float(np.sqrt(units / (units - 1) * (sums**2).sum()) / number)
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(number)) if number > 1 else 0.0


def describe_errors(groups: np.ndarray) -> str:
    """Says what the standard errors of `compare_scores` are worth."""
    if is_single_group(groups):
        return "standard errors are over images, and too small"
    return "standard errors are over groups"


def is_better(difference: float, error: float) -> bool:
    """Tells whether to prefer a model to a simpler one: it is better by more than a share of the standard error.

    A whole one, as in the one-standard-error rule (Breiman, Friedman, Olshen and Stone, Classification and Regression
    Trees, 1984, section 3.4.3), took few validation photos for none: on 20 training and 6 validation photos of each of
    ten hand signs it kept the probe in two splits of two, which had 4 and 6 points less on the test photos.
    """
    return difference > TELLING * error


def get_log_losses(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns the log loss of each image under the temperature of the lowest mean, so that two models can be compared.

    It tells them apart on fewer images than the share of right answers does. Without the temperature, which `test.py`
    fits for the model that is kept, smoothed labels would count as doubt.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`; 0 and 1 count as 1e-7 from there.

    Returns:
        float64 `(images,)` in nats, of several labels their mean; infinite where a probability is not finite.
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
    """Names the epoch of the model that is kept, of an average how far it is from the start, and a head of its own."""
    place = str(epoch)
    if kept_share not in (None, 0, 1):
        place += f", of the average that is {kept_share:.0%} of the way from the start to its weights"
    return place + _describe_head(kept_share, is_refitted)


def _describe_head(share: float | None, is_refitted: bool) -> str:
    if not is_refitted:
        return ""
    return ", with a refitted head" if share == 1 else ", with a head as far on the way to the refitted one"


def describe_choice(share: float, is_refitted: bool, is_kept: bool, gain: float, error: float, number: int) -> str:
    """Says which weights are kept, and why.

    Args:
        share: of the way from the start to the last epoch, where the weights stand that are kept, or the best but the
            start.
        is_refitted: their head stands as far on the way to the refitted one.
        is_kept: they are kept, and not the start.
        gain: by how much their log loss is below the start's.
        error: its standard error.
        number: of validation images.
    """
    what = _describe_weights(share, is_refitted)
    difference = f"by {gain:.4f}, standard error {error:.4f}, on {number} validation images"
    if is_kept:
        doubt = " Chance alone could explain that." if gain <= BY_CHANCE * error else ""
        return f"Kept {what}: the log loss is lower than the start's {difference}.{doubt}"
    # Rounding is no difference, and alike for each image.
    if -gain > error + 1e-6:
        return f"Kept the start: the log loss of {what} would be no lower ({difference})."
    return (
        f"Kept the start, the simpler model: the validation images do not tell that {what} would be better (log loss "
        f"lower {difference}). latest_model.keras is the fine-tuned one."
    )


def describe_rival(share: float, is_refitted: bool, gain: float, error: float) -> str:
    """Says why weights of a lower log loss are not kept; takes what `describe_choice` does, against the kept ones."""
    what = _describe_weights(share, is_refitted)
    return f"They do not tell that {what} would be better (log loss lower by {gain:.4f}, standard error {error:.4f})."


def _describe_weights(share: float, is_refitted: bool) -> str:
    what = "the fine-tuned model" if share == 1 else f"the weights {share:.0%} of the way to the fine-tuned model's"
    return what + _describe_head(share, is_refitted)
