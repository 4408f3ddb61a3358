"""A learning rate, from the losses of steps under rising ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from finetune.core.options import UserError
from finetune.training.callbacks import EpochOrder
from finetune.training.phases import Phase, get_training_set, prepare_phase
from finetune.training.run import Run
from finetune.training.trainer import Interruption
from generator import naming_bad_images

# Of a learning-rate range test: a step's weight against that of the one beside it, the steps that tell how it started,
# those that it needs, and what its smoothed loss must fall by: a multiple of the noise of a step, which noise alone
# reaches in 1 of 20 tests of 100 steps, and a share of the loss.
SMOOTHING = 0.8
FIRST_STEPS = 5
LEAST_STEPS = 10
LEAST_FALL = 2.0
LEAST_SHARE = 0.01


class LearningRateFinder(keras.callbacks.Callback):
    """Raises the learning rate in every step, by the same factor, and notes the losses: `rates` and `losses`.

    It stops training after `steps`, or where the loss is not finite or four times that of the first steps.
    """

    def __init__(self, lowest: float = 1e-7, highest: float = 1.0, steps: int = 100) -> None:
        super().__init__()
        self.steps = steps
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._all_rates = np.geomspace(lowest, highest, steps).tolist()

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Starts from sums of zero."""
        self._sums = np.zeros(2)

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Sets the rate."""
        self.model.optimizer.learning_rate = self._all_rates[len(self.rates)]

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Notes rate and loss of the step."""
        loss, images = self.model.loss_sums - self._sums
        self._sums = self.model.loss_sums
        self.rates.append(self._all_rates[len(self.rates)])
        self.losses.append(float(loss / images))
        has_grown = self.losses[-1] > 4 * np.median(self.losses[:5])
        is_over = len(self.rates) == self.steps
        self.model.stop_training = bool(is_over or has_grown or not np.isfinite(self.losses[-1]))


def find_learning_rate(run: Run, phase: Phase) -> dict[str, Any]:
    """Trains a phase with rising learning rates and suggests one.

    Source: Smith, WACV 2017 (arXiv:1506.01186).

    Returns:
        `suggestion`, and the `rates` and `losses` of the steps.

    Raises:
        UserError: no rate makes the loss fall clearly, or an image cannot be read.
    """
    with run.strategy.scope():
        trained = prepare_phase(run, phase, None)
        images = get_training_set(run)
    finder = LearningRateFinder()
    epochs = 1 + math.ceil(finder.steps / images.steps)
    with naming_bad_images(images):
        trained.fit(images.to_dataset(), epochs, 0, [EpochOrder(images), finder], Interruption())
    suggestion = suggest_learning_rate(finder.rates, finder.losses)
    return {"suggestion": suggestion, "rates": finder.rates, "losses": finder.losses}


def smooth_losses(losses: np.ndarray) -> np.ndarray:
    """Smooths the losses of a learning-rate range test.

    The mean of two exponential averages, one from each end, both corrected for their start: one alone would lag.
    Losses above twice that of the start count as that: training has diverged there, and how far tells nothing.

    Args:
        losses: finite, `(steps,)`.

    Returns:
        float64 `(steps,)`.
    """
    capped = np.minimum(losses, 2 * np.median(losses[:FIRST_STEPS]))
    return (_average_exponentially(capped) + _average_exponentially(capped[::-1])[::-1]) / 2


def _average_exponentially(values: np.ndarray) -> np.ndarray:
    powers = SMOOTHING ** np.arange(len(values))
    return np.convolve(values, powers)[: len(values)] / np.cumsum(powers)


def find_fall(smooth: np.ndarray) -> tuple[int, int]:
    """Returns the steps between which a smoothed loss falls: that of its lowest value, and of the highest before."""
    lowest = int(smooth.argmin())
    return int(smooth[: lowest + 1].argmax()), lowest


def suggest_learning_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Suggests a learning rate from the losses of steps under rising ones.

    It is the last rate at which half of the way lies ahead that the smoothed loss falls, from its highest value to its
    lowest one after that: where an S-shaped curve falls the most steeply, and far from where training diverges.

    Source of the test: Smith, WACV 2017, section 3.3 (arXiv:1506.01186).

    Args:
        rates: `(steps,)`, rising.
        losses: of the steps' batches, `(steps,)`; those that are not finite are left out.

    Raises:
        UserError: fewer than 10 losses are finite, or the loss does not fall by more than noise.
    """
    is_finite = np.isfinite(losses)
    rates, known = np.asarray(rates)[is_finite], np.asarray(losses, np.float64)[is_finite]
    if len(known) < LEAST_STEPS:
        raise UserError(
            f"The learning-rate test needs {LEAST_STEPS} steps with a finite loss. Received: {len(known)} of "
            f"{len(losses)} steps. Check the images and the weights that training starts from."
        )
    smooth = smooth_losses(known)
    highest, lowest = find_fall(smooth)
    fall = smooth[highest] - smooth[lowest]
    # The steps' own differences: their distance from the smoothed curve would count its bends as noise.
    noise = np.std(np.diff(known[: max(lowest + 1, LEAST_STEPS)])) / np.sqrt(2)
    least = max(LEAST_FALL * noise, LEAST_SHARE * smooth[highest])
    if fall <= least:
        raise UserError(
            f"No learning rate from {rates[0]:.2g} to {rates[-1]:.2g} made the loss fall clearly: expected a fall of "
            f"more than {least:.2g}, {LEAST_FALL:g} times the noise of a step and {LEAST_SHARE:.0%} of the loss. "
            f"Received: {fall:.2g}. Raise batch_size against the noise, or check the labels."
        )
    halfway = smooth[lowest] + fall / 2
    return float(rates[np.flatnonzero(smooth[: lowest + 1] >= halfway)[-1]])
