"""A promised error: the lowest confidence down to which at most that share of the answers is wrong.

Source: selective classification with guaranteed risk, Geifman and El-Yaniv, NeurIPS 2017 (arXiv:1705.08500).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

# The promise holds with this probability, over the draw of the validation photos.
ASSURANCE = 0.95
METHOD = "sequence of exact binomial tests (Clopper and Pearson)"
# The sequence starts at the lowest confidence whose predicted power is this close to the best.
LOST_POWER = 0.05
# It starts at this share of the photos at the latest: predicted risks may be far too low.
LATEST_START = 0.4
# Tests between two numbers of photos that allow one more error each: more find a higher share, but stop earlier.
STEPS = 3
# Of the estimate of photos that a promise needs: shares of answered photos to try, and the most errors to allow.
SHARES, MOST_ERRORS = 20, 200


@dataclasses.dataclass(frozen=True)
class Promise:
    """The result of `choose_threshold`.

    Attributes:
        threshold: the lowest confidence that is answered; None if the promise cannot be made.
        answered: photos at or above the threshold.
        errors: those of them that are wrong.
        bound: the largest error that the answers allow at this threshold, from `get_bound`; NaN without one.
        photos: all photos.
        units: independent photos among them; fewer than photos if some are in groups.
        smallest: the smallest error that so many photos could promise, without any mistake.
        needed: about how many independent photos this promise needs; None if this model is too often wrong.
    """

    threshold: float | None
    answered: int
    errors: int
    bound: float
    photos: int
    units: float
    smallest: float
    needed: int | None


def choose_threshold(
    confidences: np.ndarray,
    wrong: np.ndarray,
    max_error: float,
    risks: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Promise:
    """Finds the lowest confidence at which, with 95 % assurance, at most `max_error` of the answers are wrong.

    Exact binomial tests of falling thresholds, which end at the first failure and need no correction. Which are tested
    does not depend on the labels, except through the temperature of `risks`. Source: Geifman and El-Yaniv, NeurIPS 2017
    (arXiv:1705.08500); Angelopoulos et al., Learn then Test (arXiv:2110.01052), fixed-sequence testing.

    Args:
        confidences: `(photos,)` of the answers; multi-label: the probabilities of one label.
        wrong: bool `(photos,)`; multi-label: whether a photo does not have the label.
        max_error: the promise, above 0 and below 1.
        risks: `(photos,)`, the predicted probability that an answer is wrong. They decide only where the sequence
            starts: wrong ones may cost answers, never the promise. None takes `1 - confidences`.
        groups: int `(photos,)` of near copies, which are not independent, see `count_units`.
    """
    order = np.argsort(-confidences, kind="stable")
    descending, mistakes = confidences[order], np.cumsum(wrong[order])
    risks = 1 - confidences if risks is None else risks
    units = count_units(None if groups is None else groups[order], len(order))
    predicted = np.cumsum(risks[order]) / np.arange(1, len(order) + 1)
    kept, bound = 0, math.nan
    for number in _list_numbers(descending, units, predicted, max_error):
        tried = get_bound(mistakes[number - 1], number, units[number - 1])
        if tried > max_error:
            break
        kept, bound = number, tried
    threshold, errors = (float(descending[kept - 1]), int(mistakes[kept - 1])) if kept else (None, 0)
    total = float(units[-1]) if len(order) else 0.0
    needed = estimate_needed(mistakes, units, max_error)
    return Promise(threshold, kept, errors, bound, len(order), total, get_smallest_promise(total), needed)


def get_bound(errors: float, photos: float, units: float | None = None) -> float:
    """Returns the largest error that the answers allow, at 95 % assurance.

    Source: Clopper and Pearson, Biometrika, 1934; with fewer independent units than photos, the same share of errors
    among them (Korn and Graubard, Survey Methodology, 1998).

    Args:
        errors: among `photos`.
        photos: at least 1.
        units: independent photos; None if all are.
    """
    units = photos if units is None else units
    scaled = errors * units / photos
    return float(special.betaincinv(scaled + 1, units - scaled, ASSURANCE)) if scaled < units else 1.0


def count_units(groups: np.ndarray | None, photos: int) -> np.ndarray:
    """Returns how many independent photos the first 1, 2, ... photos are worth, float64 `(photos,)`.

    Without groups, as many. With groups, their effective number if the answers within a group are all right or all
    wrong, which is the worst case. Source: Kish, Survey Sampling, 1965, section 5.4, with a correlation of 1.
    """
    numbers = np.arange(1, photos + 1, dtype=float)
    if groups is None:
        return numbers
    positions = np.unique(groups, return_inverse=True)[1]
    order = np.argsort(positions, kind="stable")
    starts = np.searchsorted(positions[order], positions[order])
    earlier = np.empty(photos)
    earlier[order] = np.arange(photos) - starts
    return numbers**2 / np.cumsum(2 * earlier + 1)


def get_smallest_promise(units: float) -> float:
    """Returns the smallest error that can be promised if none of so many independent answers is wrong."""
    return 1 - (1 - ASSURANCE) ** (1 / units) if units else 1.0


def count_photos(errors: np.ndarray | int, max_error: float) -> np.ndarray:
    """Returns the smallest number of photos among which so many errors still allow the promise, int."""
    # The number of right answers before one more error has this distribution.
    return stats.nbinom.ppf(ASSURANCE, np.asarray(errors) + 1, max_error).astype(int) + errors + 1


def estimate_needed(mistakes: np.ndarray, units: np.ndarray, max_error: float) -> int | None:
    """Estimates how many independent photos the promise needs, if errors are as frequent as in these.

    Args:
        mistakes: int `(photos,)` among the first 1, 2, ... photos, the surest first.
        units: from `count_units`.
        max_error: the promise.

    Returns:
        The smallest number over all shares of answered photos at which the promise is kept about every second time.
        None if no share of the answers is right often enough, or without photos.
    """
    if not len(units):
        return None
    # Fewer than a tenth of the photos say little about the error.
    tried = np.unique(np.linspace(max(1, len(units) // 10), len(units), SHARES).round().astype(int)) - 1
    allowed = np.arange(MOST_ERRORS)
    sizes = count_photos(allowed, max_error)
    found = []
    for position in tried:
        enough = np.flatnonzero(mistakes[position] / (position + 1) * sizes <= allowed + 0.5)
        if enough.size:
            found.append(sizes[enough[0]] * units[-1] / units[position])
    return math.ceil(min(found)) if found else None


def _list_numbers(descending: np.ndarray, units: np.ndarray, predicted: np.ndarray, max_error: float) -> Sequence[int]:
    """Returns the numbers of answered photos to test, ascending; empty if there are too few photos.

    Tests have most power at the numbers that just allow one more error. The first one tested is the largest with a
    predicted power close to the best, or the first of at least `LATEST_START`; a few lie between one and the next.
    """
    total = len(descending)
    most = units.max(initial=0)
    # More errors than this can't be allowed: the bound is above the share of errors.
    sizes = count_photos(np.arange(int(most * max_error) + 1), max_error)
    sizes = sizes[sizes <= most]
    if not sizes.size:
        return []
    # The effective number may fall by a group's next photo: the first place that reaches each size.
    full = np.searchsorted(np.maximum.accumulate(units), sizes) + 1
    allowed = np.arange(len(full))
    powers = stats.binom.cdf(allowed, sizes, np.clip(predicted[full - 1], 0, 1))
    latest = min(int(np.searchsorted(full, LATEST_START * total)), len(full) - 1)
    first = min(np.flatnonzero(powers >= powers.max() - LOST_POWER)[-1], latest)
    corners = np.array([*full[first:], total])
    places = np.linspace(0, len(corners) - 1, STEPS * (len(corners) - 1) + 1)
    numbers = np.interp(places, np.arange(len(corners)), corners).round().astype(int)
    # Photos with equal confidence are answered together.
    ends = np.searchsorted(-descending, -descending[numbers - 1], side="right")
    return np.unique(ends).tolist()
