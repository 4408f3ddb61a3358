"""Which models a run keeps: the best epoch's or an average (WiSE-FT); when they are written, and what stops the run."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from finetune.core.files import duplicate_file
from finetune.core.options import UserError
from finetune.core.texts import begin_line
from finetune.data.groups import describe_groups, pick_groups
from finetune.evaluation.intervals import (
    compare_scores,
    describe_choice,
    describe_errors,
    describe_rival,
    is_better,
)
from finetune.evaluation.metrics import none_if_undefined
from finetune.loading.batch_processes import WorkerEnded
from finetune.models.model_files import load_model, strip_views
from finetune.training.callbacks import AveragedWeights, InputWait, Validation, name_monitor
from finetune.training.resuming import CheckpointWriter, read_state, restore_metrics, seed_states, stops_early
from finetune.training.run import write_logs
from finetune.training.run_folder import BEST_MODEL, CONFIGS_FILE, LATEST_MODEL, START_MODEL, find_beside
from generator import AugmentedImageSequence

# The shares of the last epoch in the averages. A further share of 0.75 was rarely kept, and gained nothing.
SHARES = (0.0, 0.25, 0.5)


class Kept(NamedTuple):
    """The model to keep.

    Attributes:
        share: of the last epoch in the average; 0 is the start.
        is_refitted: whether its head is interpolated by the same factor towards the refitted head.
        weights: of the model.
        logs: its validation metrics, by the names of `Validation`.
        aurocs: multi-label: of each class.
    """

    share: float
    is_refitted: bool
    weights: list[np.ndarray]
    logs: dict[str, float]
    aurocs: np.ndarray | None


def mix_weights(start: Sequence[np.ndarray], end: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """Returns the weights interpolated from `start` (share 0) to `end` (share 1)."""
    return [(1 - share) * one + share * other for one, other in zip(start, end, strict=True)]


def choose_weights(
    model: keras.Model,
    start: Sequence[np.ndarray],
    validation: Validation,
    logs: dict[str, float],
    refit: Callable[[], Any] | None = None,
) -> Kept:
    """Validates averages of the weights before and after fine-tuning, and chooses one by its log loss.

    If both lie in one basin, an average is often better than either, especially with few images that resemble those of
    the pretraining. The statistics of batch normalisation are averaged too: recomputed from the training images, they
    cost 2 points of accuracy on 300 photos of flowers.

    An averaged head fits no features, and a head refitted to averaged features is overconfident, most of all if the
    network has memorised its images. With `refit`, an average therefore interpolates between both heads by its own
    share. With 20 and 60 photos a class, refitting gained 0.9 points, and the interpolation 0.4 more on 20 flowers.

    Source: Wortsman et al., CVPR 2022 (arXiv:2109.01903), section 4; Kumar et al., ICLR 2022 (arXiv:2202.10054).

    Args:
        model: has the last epoch's weights, before and after the call.
        start: the weights that training started from.
        validation: has just measured the last epoch's model.
        logs: the metrics of the last epoch.
        refit: refits the model's head to the training images.

    Returns:
        The model to keep: each average, beginning with the start, is replaced by a later one that is better by more
        than a quarter of the standard error of the paired difference. The reason is printed.
    """
    last = Kept(1.0, False, model.get_weights(), logs, validation.aurocs), validation.get_losses()
    tried = _measure_averages(model, start, validation, refit)
    if refit is None:
        tried.append(last)
    shown = "; ".join(f"{kept.share:.0%} {np.nanmean(losses):.4f}" for kept, losses in tried)
    head, groups = " with a refitted head" if refit else "", validation.get_groups()
    print(f"\nLog loss of the validation images, from the start (0%) to the last epoch{head} (100%): {shown}.")
    if groups is not None:
        print(f"The validation images lie{describe_groups(groups)}: {describe_errors(groups)}.")
    kept, losses = tried[0]
    for further, further_losses in tried[1:]:
        if is_better(*_compare(losses, further_losses, groups)[:2]):
            kept, losses = further, further_losses
    best, lowest = min(tried[1:], key=lambda one: np.nanmean(one[1]))
    chosen, chosen_losses = (kept, losses) if kept.share else (best, lowest)
    difference = _compare(tried[0][1], chosen_losses, groups)
    print(describe_choice(chosen.share, chosen.is_refitted, kept.share > 0, *difference))
    if kept.share not in (0, best.share):
        print(describe_rival(best.share, best.is_refitted, *_compare(losses, lowest, groups)[:2]))
    return kept


def _compare(losses: np.ndarray, others: np.ndarray, groups: np.ndarray | None) -> tuple[float, float, int]:
    """Returns how much lower the others are on average, the standard error, and the number of images."""
    # An image may have become unreadable in between.
    both = ~np.isnan(losses + others)
    return *compare_scores(-losses[both], -others[both], pick_groups(groups, both)), int(both.sum())


def _measure_averages(
    model: keras.Model, start: Sequence[np.ndarray], validation: Validation, refit: Callable[[], Any] | None
) -> list[tuple[Kept, np.ndarray]]:
    """Validates the start and the averages; returns each with the losses of the images."""
    end, measured = model.get_weights(), []
    for share in SHARES if refit is None else (*SHARES, 1.0):
        mixed = mix_weights(start, end, share)
        model.set_weights(mixed)
        if is_refitted := refit is not None and share > 0:
            refit()
            model.set_weights(mix_weights(mixed, model.get_weights(), share))
        logs: dict[str, float] = {}
        validation.on_epoch_end(-1, logs)
        kept = Kept(share, is_refitted, model.get_weights(), logs, validation.aurocs)
        measured.append((kept, validation.get_losses()))
    model.set_weights(end)
    return measured


class ModelSelection:
    """Chooses the model to keep, and records its metrics in the run's progress.

    `refit` refits the head of averaged weights; with None they keep their averaged head.
    """

    def __init__(self, writer: CheckpointWriter, measure: Validation, refit: Callable[[], Any] | None) -> None:
        configs = writer.run.configs
        self.writer = writer
        self.measure = measure
        self.refit = refit
        self.model = writer.run.model
        self.monitor = name_monitor(configs.multi_label_classification)
        self.class_names = configs.classes
        # The number of epochs after which the model is chosen; 0: the best epoch so far, after each epoch.
        self.last_epoch = 0 if configs.model_selection == "best_epoch" else configs.num_epochs
        self.interpolates = configs.model_selection == "interpolate"
        is_probed = configs.head_initialization == "linear_probe" and not configs.load_model_path
        self.starts_good = is_probed or self.interpolates
        self.source = configs.load_model_path or configs.save_model_path
        self.start_weights: list[np.ndarray] = []

    def keep_start(self) -> None:
        """Makes the start of training the model to beat, as epoch 0, if its head is fitted or loaded."""
        if not self.starts_good:
            return
        logs: dict[str, float] = {}
        self.measure.on_epoch_end(-1, logs)
        score = logs[self.monitor]
        print(f"The start, epoch 0: {self.monitor} {score:.4f}.")
        self.start_weights = self.model.get_weights() if self.interpolates else []
        if is_best := not self.last_epoch or self.interpolates:
            self._note(0, score, self.measure.aurocs)
        self.writer.save([*[BEST_MODEL] * is_best, *[START_MODEL] * self.interpolates, LATEST_MODEL], 0, 0)

    def resume(self) -> None:
        """Brings the models to compare with into the run's folder, if it continues in another one."""
        self._bring_best()
        self.start_weights = self._read_start() if self.interpolates else []

    def choose(self, epochs_completed: int, logs: dict[str, float]) -> bool:
        """Records the model to keep after an epoch; returns whether it is the epoch's own.

        Otherwise the start, or an average of it and the last epoch, is written here.
        """
        score, progress = logs[self.monitor], self.writer.progress
        if not self.last_epoch:
            is_best = not np.isnan(score) and (progress.best is None or score > progress.best)
        else:
            is_best = epochs_completed == self.last_epoch
        if is_best and self.interpolates:
            is_best = self._keeps_last(epochs_completed, logs)
        if is_best:
            self._note(epochs_completed, score, self.measure.aurocs)
        return is_best

    def _keeps_last(self, epochs_completed: int, logs: dict[str, float]) -> bool:
        """Chooses between start, averages and last epoch; writes the chosen model unless it is the last epoch's own."""
        progress = self.writer.progress
        with self.writer.run.strategy.scope():
            kept = choose_weights(self.model, self.start_weights, self.measure, logs, self.refit)
        progress.kept_share, progress.has_refitted_head = kept.share, kept.is_refitted
        if kept.share == 1 and not kept.is_refitted:
            return True
        self._note(epochs_completed if kept.share else 0, kept.logs[self.monitor], kept.aurocs)
        end = self.model.get_weights()
        self.model.set_weights(kept.weights)
        self.writer.save([BEST_MODEL], epochs_completed, 0, resumes=False)
        self.model.set_weights(end)
        return False

    def _note(self, epochs_completed: int, score: float, aurocs: np.ndarray | None) -> None:
        progress = self.writer.progress
        progress.best, progress.best_epoch = none_if_undefined(score), epochs_completed
        if aurocs is not None:
            progress.best_aurocs = dict(zip(self.class_names, map(none_if_undefined, aurocs), strict=True))

    def _read_start(self) -> list[np.ndarray]:
        """Reads the weights that the run has started from, and copies them into its own folder."""
        path, own = find_beside(self.source, START_MODEL), os.path.join(self.writer.folder, START_MODEL)
        if self.writer.run.team.is_chief and not os.path.exists(own):
            duplicate_file(path, own)
        return strip_views(load_model(path)).get_weights()

    def _bring_best(self) -> None:
        """Copies the best model so far into the run's own folder."""
        path, own = find_beside(self.source, BEST_MODEL), os.path.join(self.writer.folder, BEST_MODEL)
        best_epoch = self.writer.progress.best_epoch
        is_missing = best_epoch is not None and os.path.isfile(path) and not os.path.exists(own)
        if self.writer.run.team.is_chief and is_missing:
            state = read_state(path)
            # Averaged weights carry no state.
            if state is None or state["epochs_completed"] == best_epoch:
                duplicate_file(path, own)


class Checkpoint(keras.callbacks.Callback):
    """Writes models and logs when they are due, and on resuming restores what a model file does not.

    `averages` has given the model its averaged weights before; it is None without `ema_decay`.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        selection: ModelSelection,
        averages: AveragedWeights | None,
        input_wait: InputWait,
        training: AugmentedImageSequence,
    ) -> None:
        super().__init__()
        self.writer = writer
        self.selection = selection
        self.averages = averages
        self.input_wait = input_wait
        self.training = training
        self.configs = writer.run.configs
        self.to_restore = writer.run.state

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Saves the start of a new run; on resuming restores the random states and the logs."""
        self.writer.attach(self.model)
        if self.to_restore is not None:
            for variable, value in zip(seed_states(self.model), self.to_restore["seed_states"], strict=True):
                variable.assign(np.array(value, dtype="uint32"))
            self._write_logs()
            self.selection.resume()
        elif self.writer.run.state is None:
            self.selection.keep_start()

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Restores the running metrics of an epoch that began before the stop: Keras has just reset them."""
        if self.to_restore is not None and self.to_restore["steps_completed"]:
            restore_metrics(self.model, self.to_restore["metrics"])
        self.to_restore = None

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        every, steps_completed = self.configs.checkpoint_every_steps, self.training.first_step + batch + 1
        if every and steps_completed % every == 0 and steps_completed < self.training.steps:
            self.writer.save([LATEST_MODEL], self.training.epoch, steps_completed)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Writes the epoch's models and logs, and the best model if it is the best."""
        progress = self.writer.progress
        progress.input_waits.append(round(self.input_wait.share, 4))
        progress.log.append({"epoch": epoch + 1} | {name: float(value) for name, value in logs.items()})
        try:
            self._write_epoch(epoch, logs)
        except UserError:
            # The progress bar would show the metrics after this callback.
            shown = ", ".join(f"{name} {value:.4f}" for name, value in progress.log[-1].items() if name != "epoch")
            print(f"{begin_line()}Epoch {epoch + 1}: {shown}", flush=True)
            raise

    def _write_epoch(self, epoch: int, logs: dict[str, float]) -> None:
        names = [BEST_MODEL] * self.selection.choose(epoch + 1, logs)
        names += [f"model_epoch_{epoch + 1:03d}.keras"] * (not self.configs.save_best_model_only)
        if self.averages is None:
            names.append(LATEST_MODEL)
        if names:
            self.writer.save(names, epoch + 1, 0, resumes=self.averages is None)
        if self.averages is not None:
            self.averages.put_back()
            self.writer.save([LATEST_MODEL], epoch + 1, 0)
        self._write_logs()

    def _write_logs(self) -> None:
        if self.writer.run.team.is_chief:
            write_logs(self.writer.folder, self.selection.monitor, self.writer.progress)


class BeforeValidation(keras.callbacks.Callback):
    """Saves the model before the first validation, which may meet an unreadable image.

    It must run before the weights are averaged.
    """

    def __init__(self, writer: CheckpointWriter, steps: int) -> None:
        super().__init__()
        self.writer = writer
        self.steps = steps
        self.has_saved = False

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if not self.has_saved:
            self.writer.save([LATEST_MODEL], epoch, self.steps)
            self.has_saved = True


class FiniteLoss(keras.callbacks.Callback):
    """Stops training on a loss that is not finite, before anything is saved."""

    def __init__(self, folder: str, training: AugmentedImageSequence) -> None:
        super().__init__()
        self.folder = folder
        self.training = training

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        step = self.training.first_step + batch + 1
        self._check("loss", logs["loss"], f"epoch {self.training.epoch + 1}, step {step}")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self._check("validation loss", logs["val_loss"], f"epoch {epoch + 1}")

    def _check(self, name: str, value: float, moment: str) -> None:
        if not np.isfinite(value):
            raise UserError(
                f"The {name} is {value} in {moment}. The models in {self.folder} are older. Lower learning_rate, and "
                "continue with load_model_path."
            )


class Stopping(keras.callbacks.Callback):
    """Stops training after `early_stopping_patience` epochs without a better score, and on a signal.

    On a signal, the current step is completed and saved. After an epoch's last step, the epoch is validated first.
    """

    def __init__(self, writer: CheckpointWriter, training: AugmentedImageSequence) -> None:
        super().__init__()
        self.writer = writer
        self.training = training

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        steps_completed = self.training.first_step + batch + 1
        if self.writer.run.interruption.signal and steps_completed < self.training.steps:
            self.writer.save([LATEST_MODEL], self.training.epoch, steps_completed)
            self._stop_if_interrupted()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Runs after the epoch's models are saved."""
        configs, best_epoch = self.writer.run.configs, self.writer.progress.best_epoch
        patience = configs.early_stopping_patience
        self.model.stop_training = stops_early(epoch + 1, best_epoch, patience, configs.head_epochs)
        self._stop_if_interrupted()

    def _stop_if_interrupted(self) -> None:
        if number := self.writer.run.interruption.signal:
            command = write_resume_command(self.writer.folder)
            print(f"\nStopped by {signal.Signals(number).name}. Continue with\n{command}", flush=True)
            raise SystemExit(128 + number)


@contextlib.contextmanager
def advising_on_bad_images(folder: str, *sequences: AugmentedImageSequence) -> Iterator[None]:
    """Adds advice to the error of an image that is unreadable in training, or of its reader."""
    try:
        yield
    except UserError as error:
        if all(error is not sequence.error for sequence in sequences):
            raise
        is_of_image = not isinstance(error, WorkerEnded)
        text = str(error)
        if is_of_image:
            text += " Find all such images with --verify_data full, or leave them out with --skip_bad_images True."
        if os.path.isfile(os.path.join(folder, LATEST_MODEL)):
            command = write_resume_command(folder) + " --skip_bad_images True" * is_of_image
            text += f" The training so far is saved. Continue with\n{command}"
        raise UserError(text) from error


def write_resume_command(folder: str) -> str:
    """Returns the command line that continues a run, for this process's shell and working directory."""
    script = "train.py"
    is_here = os.path.exists(script) and os.path.exists(sys.argv[0]) and os.path.samefile(script, sys.argv[0])
    if os.path.basename(sys.argv[0]) == script and not is_here:
        script = sys.argv[0]
    options = ["--configs", os.path.join(folder, CONFIGS_FILE), "--load_model_path", folder]
    return shlex.join(["python", script, *options])
