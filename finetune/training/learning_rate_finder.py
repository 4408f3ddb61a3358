"""The learning rate range test: a suggestion from the losses of steps at rising rates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.core.options import UserError

# A step's weight in an exponential average, relative to the next step's.
SMOOTHING = 0.8
# The first steps give the loss of the start; the fewest steps allow a suggestion.
FIRST_STEPS = 5
LEAST_STEPS = 10
# How far the smoothed loss must fall: multiples of a step's noise, which noise alone reaches in 1 of 20 tests of 100
# steps, and a share of the loss.
LEAST_FALL = 2.0
LEAST_SHARE = 0.01


def smooth_losses(losses: np.ndarray) -> np.ndarray:
    """Returns the smoothed losses of a learning rate range test, float64 `(steps,)`, of finite losses `(steps,)`.

    They are the mean of two exponential averages, one from each end, both corrected for their start: one alone would
    lag. Losses are capped at twice the loss of the start, since training has diverged there.
    """
    capped = np.minimum(losses, 2 * np.median(losses[:FIRST_STEPS]))
    return (_average_exponentially(capped) + _average_exponentially(capped[::-1])[::-1]) / 2


def _average_exponentially(values: np.ndarray) -> np.ndarray:
    powers = SMOOTHING ** np.arange(len(values))
    return np.convolve(values, powers)[: len(values)] / np.cumsum(powers)


def find_fall(smooth: np.ndarray) -> tuple[int, int]:
    """Returns the steps of the highest smoothed loss before the lowest one, and of the lowest one."""
    lowest = int(smooth.argmin())
    return int(smooth[: lowest + 1].argmax()), lowest


def suggest_learning_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Suggests a learning rate from the losses of steps at rising rates.

    It is the last rate before the smoothed loss has fallen by half, from its highest value to its lowest one after
    that. An S-shaped curve falls most steeply there, and it is far from the rates at which training diverges.

    Source of the test: Smith, WACV 2017, section 3.3 (arXiv:1506.01186).

    Args:
        rates: `(steps,)`, rising.
        losses: of the steps' batches, `(steps,)`; infinite losses and NaN are ignored.

    Raises:
        UserError: fewer than 10 losses are finite, or the loss does not fall by more than noise.
    """
    is_finite = np.isfinite(losses)
    rates, known = np.asarray(rates)[is_finite], np.asarray(losses, np.float64)[is_finite]
    if len(known) < LEAST_STEPS:
        raise UserError(
            f"find_learning_rate: expected {LEAST_STEPS} steps with a finite loss. Received: {len(known)} of "
            f"{len(losses)} steps. Check the images and the weights that training starts from."
        )
    smooth = smooth_losses(known)
    highest, lowest = find_fall(smooth)
    fall = smooth[highest] - smooth[lowest]
    # From differences of steps: the distance from the smoothed curve would count its bends as noise.
    noise = np.std(np.diff(known[: max(lowest + 1, LEAST_STEPS)])) / np.sqrt(2)
    least = max(LEAST_FALL * noise, LEAST_SHARE * smooth[highest])
    if fall <= least:
        raise UserError(
            f"No learning rate from {rates[0]:.2g} to {rates[-1]:.2g} made the loss fall clearly: expected a fall of "
            f"more than {least:.2g} ({LEAST_FALL:g} times the noise of a step, and {LEAST_SHARE:.0%} of the loss). "
            f"Received: {fall:.2g}. Raise batch_size to reduce the noise, or check the labels."
        )
    halfway = smooth[lowest] + fall / 2
    return float(rates[np.flatnonzero(smooth[: lowest + 1] >= halfway)[-1]])
