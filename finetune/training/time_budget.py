"""The number of epochs that fit into a given time, measured on the run's own model and images."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time

import keras

from configs import Configs
from finetune.core.files import TEMPORARY_PREFIX
from finetune.core.texts import begin_line, show_duration, show_moment
from finetune.core.values import get_input_size, parse_duration
from finetune.training.callbacks import EpochOrder
from finetune.training.checkpoints import SHARES
from finetune.training.resuming import save_checkpoint, seed_states
from finetune.training.run import Run, count_epochs, get_phases, get_training_set, prepare_phase, refits_head
from finetune.training.trainer import Interruption
from generator import AugmentedImageSequence, naming_bad_images

# An estimate needs this many steps.
TIMED_STEPS = 3
# The time of a validation batch, in training steps: it has no backward pass.
VALIDATION_SHARE = 0.4
# An epoch ends with a checkpoint; copying it, the logs and the start of validation take as long again.
SAVES = 2
# Training builds its graph again; the graphs of validation and of features together take about as long.
BUILDS = 2
# The share of a budget that is kept free for building graphs and comparing the probe's strengths.
RESERVE = 0.1


class StepTimes(keras.callbacks.Callback):
    """Times the first steps, except the very first, which builds the graph.

    Attributes:
        seconds: of a step; 0 until enough steps are timed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._times: list[float] = []
        self._begun = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        # The time between two epochs is not part of a step.
        self._begun = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Times a step, and calls `on_timed` once."""
        if self.seconds:
            return
        now = time.monotonic()
        self._times.append(now - self._begun)
        self._begun = now
        if len(self._times) > TIMED_STEPS:
            # Not the mean: the smaller last batch of the first epoch builds its own graph.
            self.seconds = statistics.median(self._times[1:])
            self.on_timed(batch)

    def on_timed(self, batch: int) -> None:
        """Stops training."""
        self.model.stop_training = True


def count_views(
    configs: Configs, training: AugmentedImageSequence, validation: AugmentedImageSequence, refits: bool
) -> tuple[float, float]:
    """Returns the cost, in training steps, of one validation, and of choosing the model at the end of the run.

    With `refits`, the compared averages get refitted heads.
    """
    larger = math.prod(get_input_size(configs)) / math.prod(configs.image_target_size[:2])
    share = VALIDATION_SHARE * larger
    once = share * (2 if configs.test_time_augmentation == "flip" else 1) * validation.steps
    if configs.model_selection != "interpolate":
        return once, 0.0
    # The last epoch, which has been validated without it, gets a refitted head too; the start keeps its own.
    refitting = once + share * (1 if configs.augmentation_strength == "none" else 2) * training.steps * len(SHARES)
    return once, len(SHARES) * once + refits * refitting


class TimeEstimate(StepTimes):
    """Prints after the first steps how long an epoch and the whole run will take, and when it will end.

    The costs of `validating` and of `choosing` the model are those of `count_views`.
    """

    def __init__(self, epochs: int, training: AugmentedImageSequence, validating: float, choosing: float) -> None:
        super().__init__()
        self.epochs = epochs
        self.training = training
        self.validating = validating
        self.choosing = choosing
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self._epoch = epoch

    def on_timed(self, batch: int) -> None:
        epochs = self.epochs - self._epoch
        steps = epochs * self.training.steps - self.training.first_step - batch - 1
        left = self.seconds * (steps + epochs * self.validating + self.choosing)
        epoch = self.seconds * (self.training.steps + self.validating)
        print(
            f"{begin_line()}About {show_duration(epoch)} an epoch, {show_duration(left)} to go for {self.epochs} "
            f"epochs, until {show_moment(left)}."
        )


def time_saving(model: keras.Model, folder: str) -> float:
    """Returns the seconds that writing a checkpoint into a folder takes."""
    os.makedirs(folder, exist_ok=True)
    # A killed process leaves the folder under a name that the next one removes.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{TEMPORARY_PREFIX}{os.getpid()}-") as place:
        begin = time.monotonic()
        save_checkpoint(model, os.path.join(place, "model.keras"), None, {})
        return time.monotonic() - begin


def resolve_epochs(run: Run, started: float) -> None:
    """Fits the run's number of epochs to `time_budget` or `min_steps`; a continued run keeps its own.

    The run `started` at this `time.monotonic`.
    """
    configs = run.configs
    if run.state or configs.find_learning_rate:
        return
    if configs.time_budget:
        epochs = run.team.exchange(fit_epochs(run, started))[0]
    else:
        steps = run.images.training.steps
        epochs = count_epochs(configs.num_epochs, configs.min_steps, steps)
        if epochs == configs.num_epochs:
            # It must not count as given: a continued run takes it from configs.py.
            return
        print(
            f"{epochs} epochs of {steps} steps, for min_steps {configs.min_steps} "
            f"({configs.num_epochs} with --min_steps 0)."
        )
    run.configs = configs.replace(num_epochs=epochs)


def fit_epochs(run: Run, started: float) -> int:
    """Returns how many epochs fit into `time_budget`, at least one, and prints it.

    A few steps of the last phase, which trains the most layers, are timed; then the weights are restored.
    """
    configs, model = run.configs, run.model
    with run.strategy.scope():
        trained = prepare_phase(run, get_phases(configs, 1)[-1], None)
        images = get_training_set(run)
        weights, seeds = model.get_weights(), [variable.numpy() for variable in seed_states(trained)]
    timed = StepTimes()
    epochs = 1 + math.ceil(TIMED_STEPS / images.steps)
    begin = time.monotonic()
    with naming_bad_images(images):
        trained.fit(images.to_dataset(), epochs, 0, [EpochOrder(images), timed], Interruption())
    building = max(0.0, time.monotonic() - begin - timed.seconds * (TIMED_STEPS + 1))
    saving = time_saving(trained, configs.save_model_path)
    with run.strategy.scope():
        model.set_weights(weights)
        for variable, seed in zip(seed_states(trained), seeds, strict=True):
            variable.assign(seed)
    validating, choosing = count_views(configs, *run.images, refits_head(configs, model))
    epoch = timed.seconds * (images.steps + validating) + SAVES * saving
    budget = parse_duration(configs.time_budget)
    left = budget * (1 - RESERVE) - (time.monotonic() - started) - timed.seconds * choosing
    left -= BUILDS * building
    epochs = max(1, int(left / epoch))
    note = "" if left >= epoch else ", which is more than the budget holds"
    print(f"time_budget {configs.time_budget}: {epochs} epochs of about {show_duration(epoch)}{note}.")
    return epochs
