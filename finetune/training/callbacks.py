"""Callbacks around steps and epochs: order, learning rate, averages, validation, bad images."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import keras
import numpy as np

from configs import Configs
from finetune.core.texts import begin_line, join_names, show_count
from finetune.data.findings import Finding, write_data_report
from finetune.evaluation.intervals import get_log_losses
from finetune.evaluation.metrics import get_aurocs, mean_of_defined
from finetune.models.compiling import find_averages
from finetune.training.run import Phase, Progress
from finetune.training.workers import Team
from generator import AugmentedImageSequence

# The share of a cycle's steps in which the learning rate rises.
RISING_SHARE = 0.25


def name_monitor(multi_label: bool) -> str:
    """Returns the name of the metric that selects the best model."""
    return "val_auroc" if multi_label else "val_accuracy"


class Validation(keras.callbacks.Callback):
    """Measures the model on the validation images after each epoch, in one pass, and adds the metrics to the logs.

    The metrics are `val_loss`, and `val_accuracy` or multi-label `val_auroc`: the mean AUROC over the classes with both
    positive and negative images.

    Attributes:
        aurocs: multi-label: the AUROC of each class in the last epoch.
        y_true: the labels of the images that could be read.
        probabilities: their predictions in the last epoch.
        is_read: which of all images could be read.
    """

    def __init__(self, sequence: AugmentedImageSequence, loss: Callable, multi_label: bool) -> None:
        super().__init__()
        self.sequence = sequence
        self.loss = loss
        self.multi_label = multi_label
        self.aurocs: np.ndarray | None = None
        self.y_true = self.probabilities = np.zeros(0)
        self.is_read = np.zeros(0, bool)

    def get_losses(self) -> np.ndarray:
        """Returns each image's log loss in the last epoch, float64 `(images,)`; NaN for unreadable images."""
        losses = np.full(len(self.is_read), np.nan)
        losses[self.is_read] = get_log_losses(self.y_true, self.probabilities)
        return losses

    def get_groups(self) -> np.ndarray | None:
        """Returns the groups of all images, as `number_groups` does."""
        return self.sequence.get_groups()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Predicts the validation images and adds their metrics to `logs`, for the callbacks after this one."""
        self.probabilities, self.is_read = self.model.predict_sequence(self.sequence)
        self.y_true = self.sequence.get_labels(np.flatnonzero(self.is_read))
        logs["val_loss"] = float(np.mean(self.loss(self.y_true, self.probabilities)))
        if self.multi_label:
            self.aurocs = get_aurocs(self.y_true, self.probabilities)
            score = mean_of_defined(self.aurocs)
        else:
            score = float(np.mean(self.probabilities.argmax(axis=1) == self.y_true))
        logs[name_monitor(self.multi_label)] = score


class InputWait(keras.callbacks.Callback):
    """Measures the share of an epoch's training time that the model waits for batches: `share`, in `[0, 1]`.

    A share larger than `advise_above` is printed, with advice.
    """

    def __init__(self, advise_above: float = 0.1) -> None:
        super().__init__()
        self.advise_above = advise_above
        self.share = self._start = self._end = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._end = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        waited = self.model.seconds_waited
        self.share = waited / max(self._end - self._start, waited, 1e-9)
        if self.share > self.advise_above:
            print(
                f"{begin_line()}input_wait: the model waited for images in {self.share:.1%} of the epoch. Raise "
                "generator_workers up to the number of cores, or set image_cache to memory or disk."
            )


class Schedule(keras.callbacks.Callback):
    """Sets the learning rate of every step, from its epoch and number alone: warm-up, cosine, one cycle, constant.

    Args:
        phase: the epochs of the schedule and its highest rate.
        sequence: the training images, which know the steps of an epoch.
        kind: `plateau` (leaves the rate to `Plateau` after the warm-up), `cosine` (Loshchilov and Hutter, 2017, without
            restarts), `one_cycle` (a cosine up in the first quarter and another one down: Smith and Topin, 2018,
            arXiv:1708.07120, in fastai's form) or `constant`.
        warmup_epochs: in which the rate rises linearly from 0; `one_cycle` has its own rise.
        minimum: the rate at the end of the cosine.
    """

    def __init__(
        self, phase: Phase, sequence: AugmentedImageSequence, kind: str, warmup_epochs: float, minimum: float
    ) -> None:
        super().__init__()
        self.phase = phase
        self.sequence = sequence
        self.kind = kind
        self.warmup_epochs = warmup_epochs
        self.minimum = minimum
        self._epoch = 0

    def get_rate(self, step: int) -> float | None:
        """Returns the learning rate of a step of the phase, counted from 0; None if `Plateau` sets it."""
        first_epoch, end, highest, _ = self.phase
        warmup = self.warmup_epochs * self.sequence.steps
        if self.kind == "one_cycle":
            warmup = RISING_SHARE * (end - first_epoch) * self.sequence.steps
        if step < warmup:
            progress = min((step + 1) / warmup, 1)
            return highest * ((1 - math.cos(math.pi * progress)) / 2 if self.kind == "one_cycle" else progress)
        if self.kind in ("plateau", "constant"):
            return highest if self.kind == "constant" else None
        progress = (step - warmup) / max((end - first_epoch) * self.sequence.steps - warmup - 1, 1)
        lowest = min(self.minimum, highest)
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * min(progress, 1))) / 2

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        step = (self._epoch - self.phase.first_epoch) * self.sequence.steps + self.sequence.first_step + batch
        rate = self.get_rate(step)
        if rate is not None:
            self.model.optimizer.learning_rate = rate

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))


class Plateau(keras.callbacks.ReduceLROnPlateau):
    """Lowers the learning rate on a plateau of the validation loss, also across a stopped and continued run.

    The progress of the run keeps the counters, which Keras resets whenever training begins.
    """

    def __init__(self, configs: Configs, progress: Progress) -> None:
        super().__init__(
            monitor="val_loss",
            factor=configs.learning_rate_decay_factor,
            patience=configs.reduce_lr_patience,
            min_lr=configs.minimum_learning_rate,
            verbose=1,
        )
        self.progress = progress

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        super().on_train_begin(logs)
        for name, value in self.progress.plateau.items():
            setattr(self, name, value)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        self.progress.plateau = {
            "wait": int(self.wait),
            "best": float(self.best),
            "cooldown_counter": int(self.cooldown_counter),
        }


class LearningRateFinder(keras.callbacks.Callback):
    """Raises the learning rate by the same factor in every step, and records `rates` and `losses`.

    It stops training after `steps`, or once the loss is not finite or four times the loss of the first steps.
    """

    def __init__(self, lowest: float = 1e-7, highest: float = 1.0, steps: int = 100) -> None:
        super().__init__()
        self.steps = steps
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._all_rates = np.geomspace(lowest, highest, steps).tolist()

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._sums = np.zeros(2)

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self.model.optimizer.learning_rate = self._all_rates[len(self.rates)]

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        loss, images = self.model.loss_sums - self._sums
        self._sums = self.model.loss_sums
        self.rates.append(self._all_rates[len(self.rates)])
        self.losses.append(float(loss / images))
        has_grown = self.losses[-1] > 4 * np.median(self.losses[:5])
        is_over = len(self.rates) == self.steps
        self.model.stop_training = bool(is_over or has_grown or not np.isfinite(self.losses[-1]))


class AveragedWeights(keras.callbacks.Callback):
    """Gives the model the optimizer's moving average of its weights for validation, until `put_back`.

    Batch normalisation keeps the statistics of the model's own weights.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Runs before validation."""
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        variables = self.model.trainable_variables
        self._own = [variable.numpy() for variable in variables]
        for variable, average in zip(variables, find_averages(optimizer, variables), strict=True):
            variable.assign(average.numpy())

    def put_back(self) -> None:
        """Restores the model's own weights; runs after the averages have been saved."""
        for variable, value in zip(self.model.trainable_variables, self._own, strict=True):
            variable.assign(value)


class EpochOrder(keras.callbacks.Callback):
    """Sets the epoch of the training sequence, which determines order and augmentation."""

    def __init__(self, sequence: AugmentedImageSequence) -> None:
        super().__init__()
        self.sequence = sequence

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Runs before the epoch's workers start."""
        self.sequence.epoch = epoch


class BadImages(keras.callbacks.Callback):
    """Prints after each epoch which images could not be read, each image once, and adds them to data_report.csv.

    The sequences of images are given by the paths of their tables. The chief prints and writes for all processes.
    """

    def __init__(self, sequences: dict[str, AugmentedImageSequence], folder: str, team: Team) -> None:
        super().__init__()
        self.sequences = sequences
        self.folder = folder
        self.team = team
        self._reported: set[tuple[str, int]] = set()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        bad = [[name, *image] for name, images in self.sequences.items() for image in images.bad_images.items()]
        if not any(images.skip_bad_images for images in self.sequences.values()):
            return
        found = []
        for name, row, reason in sorted(itertools.chain.from_iterable(self.team.exchange(bad))):
            if (name, row) not in self._reported:
                self._reported.add((name, row))
                found.append(Finding("unreadable", "", name, None, self.sequences[name].paths[row], reason))
        if found and self.team.is_chief:
            number, paths = show_count(len(found), "image"), join_names([finding.path for finding in found])
            print(f"{begin_line()}Left out {number} that could not be read: {paths}")
            write_data_report(self.folder, found, is_more=True)
