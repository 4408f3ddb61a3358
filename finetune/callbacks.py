"""What happens around steps and epochs: validation, checkpoints with the state to resume from, logs, interruption."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from configs import Configs, UserError
from finetune.metrics import get_aurocs, mean_of_defined, none_if_undefined
from generator import AugmentedImageSequence
from model import TrainingModel, find_averages
from utils import (
    TEMPORARY_PREFIX,
    Finding,
    Team,
    atomic_path,
    join_names,
    write_csv,
    write_data_report,
    write_json,
    write_text,
)

STATE_MEMBER = "training_state.json"
STATE_PARTS = {"configs", "given", "data", "epochs_completed", "steps_completed", "best", "best_epoch", "best_aurocs"}
STATE_PARTS |= {"plateau", "seed_states", "metrics", "log"}
LARGEST_STATE = 2**28
LOCK_FILE = ".lock"


class Validation(keras.callbacks.Callback):
    """Measures the model on the validation images after each epoch, in one pass, and adds what it finds to the logs.

    `val_loss`, and `val_accuracy`, or multi-label `val_auroc`: the mean AUROC over classes with both positive and
    negative images.

    Args:
        sequence: the validation images, in order.
        loss: of probabilities, as the training's.
        multi_label: which of the two metrics.
    """

    def __init__(self, sequence: AugmentedImageSequence, loss: Callable, multi_label: bool) -> None:
        super().__init__()
        self.sequence = sequence
        self.loss = loss
        self.multi_label = multi_label
        self.aurocs: np.ndarray | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Predicts the validation images and adds their figures to `logs`, which the callbacks after this one see."""
        probabilities, is_read = self.model.predict_sequence(self.sequence)
        y_true = self.sequence.get_labels(np.flatnonzero(is_read))
        logs["val_loss"] = float(np.mean(self.loss(y_true, probabilities)))
        if self.multi_label:
            self.aurocs = get_aurocs(y_true, probabilities)
            logs["val_auroc"] = mean_of_defined(self.aurocs)
        else:
            logs["val_accuracy"] = float(np.mean(probabilities.argmax(axis=1) == y_true))


class InputWait(keras.callbacks.Callback):
    """Prints the share of an epoch's training time that the model waits for batches: `share`, in `[0, 1]`.

    Args:
        advise_above: the share from which on advice is printed.
    """

    def __init__(self, advise_above: float = 0.1) -> None:
        super().__init__()
        self.advise_above = advise_above
        self.share = 0.0
        self._start = 0.0
        self._end = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Starts to count."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Notes when the training part of the epoch has ended, should this be its last step."""
        self._end = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Prints the share and what to do about it."""
        waited = self.model.seconds_waited
        self.share = waited / max(self._end - self._start, waited, 1e-9)
        print(f"\ninput_wait: {self.share:.1%} of the epoch")
        if self.share > self.advise_above:
            print(
                "The model waited for images. Raise generator_workers up to the number of cores, or set image_cache "
                "to memory or disk."
            )


class Phase(NamedTuple):
    """Epochs that train the same layers in the same way.

    Attributes:
        first_epoch: counted from 0.
        end: the first epoch after them.
        learning_rate: the highest one.
        trains_head_only: the classifier alone learns.
    """

    first_epoch: int
    end: int
    learning_rate: float
    trains_head_only: bool


class Schedule(keras.callbacks.Callback):
    """Sets the learning rate of every step, as far as a plateau does not decide it: warm-up, cosine, constant.

    Each phase has a schedule of its own. What it sets follows from epoch and step alone.

    Args:
        phase: its epochs and its highest rate.
        sequence: the training images, for the steps of an epoch.
        kind: `plateau` (after the warm-up it leaves the rate alone), `cosine` (Loshchilov and Hutter, 2017, without
            restarts) or `constant`.
        warmup_epochs: in which the rate rises linearly from 0.
        minimum: the rate of the cosine's end.
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
        """Returns the learning rate of a step, counted from the phase's first; None where a plateau decides it."""
        first_epoch, end, highest, _ = self.phase
        warmup = self.warmup_epochs * self.sequence.steps
        if step < warmup:
            return highest * min((step + 1) / warmup, 1)
        if self.kind == "plateau":
            return None
        if self.kind == "constant":
            return highest
        progress = (step - warmup) / max((end - first_epoch) * self.sequence.steps - warmup - 1, 1)
        lowest = min(self.minimum, highest)
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * min(progress, 1))) / 2

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Sets the rate."""
        step = (self._epoch - self.phase.first_epoch) * self.sequence.steps + self.sequence.first_step + batch
        rate = self.get_rate(step)
        if rate is not None:
            self.model.optimizer.learning_rate = rate

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Adds the rate to the logs."""
        logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))


class RangeTest(keras.callbacks.Callback):
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


class AveragedWeights(keras.callbacks.Callback):
    """Gives the model the moving average of its weights, as the optimizer keeps it, for as long as it is tested.

    `put_back` gives it its own weights again. Batch normalisation's statistics stay those of its own weights.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Runs before validation."""
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        self._own = [variable.numpy() for variable in self.model.trainable_variables]
        variables = self.model.trainable_variables
        for variable, average in zip(variables, find_averages(optimizer, variables), strict=True):
            variable.assign(average.numpy())

    def put_back(self) -> None:
        """Runs after what holds the averages has been saved."""
        for variable, value in zip(self.model.trainable_variables, self._own, strict=True):
            variable.assign(value)


class EpochOrder(keras.callbacks.Callback):
    """Tells the training sequence which epoch it is in: order and augmentation follow from it."""

    def __init__(self, sequence: AugmentedImageSequence) -> None:
        super().__init__()
        self.sequence = sequence

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Runs before the epoch's workers start."""
        self.sequence.epoch = epoch


class BadImages(keras.callbacks.Callback):
    """Says after each epoch which images could not be read for the first time, and adds them to data_report.csv.

    Args:
        sequences: the training and the validation images, by their name.
        folder: that of the run.
        team: whose images these are; its chief tells of all.
    """

    def __init__(self, sequences: dict[str, AugmentedImageSequence], folder: str, team: Team) -> None:
        super().__init__()
        self.sequences = sequences
        self.folder = folder
        self.team = team
        self._told: set[tuple[str, int]] = set()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Tells of each image once."""
        bad = [[name, *image] for name, images in self.sequences.items() for image in images.bad_images.items()]
        if all(not images.skip_bad_images for images in self.sequences.values()):
            return
        found = []
        for name, row, reason in sorted(itertools.chain.from_iterable(self.team.exchange(bad))):
            if (name, row) not in self._told:
                self._told.add((name, row))
                found.append(Finding("unreadable", "", name, None, self.sequences[name].paths[row], reason))
        if found and self.team.is_chief:
            print(f"\n{len(found)} images could not be read and were left out: {join_names([x.path for x in found])}")
            write_data_report(self.folder, found, is_more=True)


class Checkpoint(keras.callbacks.Callback):
    """Writes the models, the training log and the statistics of a run, and stops it where that is due.

    Every `.keras` file is written whole or not at all, and carries the state that resuming from it needs, so that
    the two cannot disagree: see `state`. It stops training on a non-finite loss, after `early_stopping_patience`
    epochs without a better score, and on SIGINT or SIGTERM, after the step that runs then.

    Args:
        configs: of the run, with `classes` resolved; stored with every model.
        phase: of the run.
        classifier: the whole model, of which the trained one may be the head; every file holds it.
        training: the training images.
        validation: tells the AUROC of each class, multi-label.
        plateau: the run's scheduler, whose state is kept; None where the learning rate follows from the step.
        averages: what has given the model its averaged weights, where `ema_decay` is set.
        input_wait: tells the share of each epoch that the model waited.
        interruption: tells which signal has arrived.
        writes: False where another process of the run does so.
        state: of the checkpoint that training continues from.
    """

    def __init__(
        self,
        configs: Configs,
        phase: Phase,
        classifier: keras.Model,
        training: AugmentedImageSequence,
        validation: Validation,
        plateau: keras.callbacks.ReduceLROnPlateau | None,
        averages: AveragedWeights | None,
        input_wait: InputWait,
        interruption: Interruption,
        writes: bool = True,
        state: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.folder = configs.save_model_path
        self.monitor = "val_auroc" if configs.multi_label_classification else "val_accuracy"
        self.save_best_only = configs.save_best_model_only
        self.every_steps = configs.checkpoint_every_steps
        self.patience = configs.early_stopping_patience
        self.head_epochs = configs.head_epochs
        self.starts_good = configs.head_initialization == "linear_probe" and not configs.load_model_path
        self.class_names = configs.classes
        self.run_state = {
            "configs": configs.to_dict(),
            "given": sorted(configs.given),
            "data": {"train_csv": fingerprint(training), "validation_csv": fingerprint(validation.sequence)},
            "devices": training.shares.devices,
        }
        self.writes = writes
        self.phase = phase
        self.classifier = classifier
        self.training = training
        self.validation = validation
        self.plateau = plateau
        self.averages = averages
        self.input_wait = input_wait
        self.input_waits: list[float] = list(state.get("input_waits", [])) if state else []
        self.interruption = interruption
        self.to_restore = state
        # A plateau of one phase does not bind the next.
        goes_on = state is not None and (state["epochs_completed"], state["steps_completed"]) > (phase.first_epoch, 0)
        self.plateau_state: dict[str, Any] = state["plateau"] if goes_on else {}
        self.log: list[dict[str, float]] = list(state["log"]) if state else []
        self.best: float | None = state["best"] if state else None
        self.best_epoch: int | None = state["best_epoch"] if state else None
        self.best_aurocs: dict[str, float | None] | None = state["best_aurocs"] if state else None
        self.epoch = 0

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Restores what Keras has just reset, and on resuming the random states and the logs."""
        # A plain view of the model with the mode's stock loss: the file loads without this project.
        self.saved_view = keras.Model(self.classifier.inputs, self.classifier.outputs, name=self.classifier.name)
        stock = "binary_crossentropy" if self.validation.multi_label else "sparse_categorical_crossentropy"
        self.saved_view.compile(self.model.optimizer, loss=stock)
        # The scheduler resets itself whenever `fit` begins, before this callback's turn.
        if self.plateau is not None:
            for name, value in self.plateau_state.items():
                setattr(self.plateau, name, value)
        if self.to_restore is not None:
            for variable, value in zip(seed_states(self.model), self.to_restore["seed_states"], strict=True):
                variable.assign(np.array(value, dtype="uint32"))
            self._write_logs()
        elif self.starts_good:
            self._keep_start()

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Restores the running figures of an epoch that began before the stop: Keras has just set them to zero."""
        self.epoch = epoch
        if self.to_restore is not None and self.to_restore["steps_completed"]:
            restore_metrics(self.model, self.to_restore["metrics"])
        self.to_restore = None

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        """Stops on a loss that is not finite or on a signal; writes a checkpoint where one is due."""
        steps_completed = self.training.first_step + batch + 1
        self._check_finite("loss", logs["loss"], f"epoch {self.epoch + 1}, step {steps_completed}")
        is_last = steps_completed == self.training.steps
        is_due = self.every_steps and steps_completed % self.every_steps == 0
        if not is_last and (is_due or self.interruption.signal):
            self._save(["latest_model.keras"], self.epoch, steps_completed)
            self._stop_if_interrupted()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Writes the epoch's models and logs, the best one where it is that, and stops where that is due."""
        self._check_finite("validation loss", logs["val_loss"], f"epoch {epoch + 1}")
        if self.plateau is not None:
            self.plateau_state = {
                "wait": int(self.plateau.wait),
                "best": float(self.plateau.best),
                "cooldown_counter": int(self.plateau.cooldown_counter),
            }
        self.input_waits.append(round(self.input_wait.share, 4))
        self.log.append({"epoch": epoch + 1} | {name: float(value) for name, value in logs.items()})
        is_best = self._note_best(epoch + 1, logs[self.monitor])
        names = ["best_model.keras"] * is_best
        names += [f"model_epoch_{epoch + 1:03d}.keras"] * (not self.save_best_only)
        if self.averages is None:
            names.append("latest_model.keras")
        if names:
            self._save(names, epoch + 1, 0, resumes=self.averages is None)
        if self.averages is not None:
            self.averages.put_back()
            self._save(["latest_model.keras"], epoch + 1, 0)
        self._write_logs()
        self.model.stop_training = stops_early(epoch + 1, self.best_epoch, self.patience, self.head_epochs)
        self._stop_if_interrupted()

    def state(self, epochs_completed: int, steps_completed: int) -> dict[str, Any]:
        """Returns everything that resumes, beside the weights and the optimizer's variables in the model file.

        Args:
            epochs_completed: of the run.
            steps_completed: of the epoch after them.
        """
        return {
            **self.run_state,
            "learning_rate": self.phase.learning_rate,
            "epochs_completed": epochs_completed,
            "steps_completed": steps_completed,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_aurocs": self.best_aurocs,
            "plateau": self.plateau_state,
            "seed_states": [np.asarray(variable).tolist() for variable in seed_states(self.model)],
            "metrics": read_metrics(self.model) if steps_completed else [],
            "log": self.log,
            "input_waits": self.input_waits,
        }

    def _keep_start(self) -> None:
        """Makes the model that training starts from the one to beat, as epoch 0."""
        logs: dict[str, float] = {}
        self.validation.on_epoch_end(-1, logs)
        print(f"The head's start: {self.monitor} {logs[self.monitor]:.4f}.")
        is_best = self._note_best(0, logs[self.monitor])
        self._save([*["best_model.keras"] * is_best, "latest_model.keras"], 0, 0)

    def _note_best(self, epochs_completed: int, score: float) -> bool:
        """Notes a score where it is the best so far; tells whether it is."""
        is_best = not np.isnan(score) and (self.best is None or score > self.best)
        if is_best:
            self.best, self.best_epoch = float(score), epochs_completed
            if self.validation.aurocs is not None:
                aurocs = map(none_if_undefined, self.validation.aurocs)
                self.best_aurocs = dict(zip(self.class_names, aurocs, strict=True))
        return is_best

    def _check_finite(self, name: str, value: float, moment: str) -> None:
        if not np.isfinite(value):
            raise UserError(
                f"The {name} is {value} in {moment}. What {self.folder} holds is of before. Lower learning_rate, and "
                "continue with load_model_path."
            )

    def _save(self, names: Sequence[str], epochs_completed: int, steps_completed: int, resumes: bool = True) -> None:
        """Writes a model under one or more names; where it has averaged weights, training cannot go on from it."""
        first, *others = (os.path.join(self.folder, name) for name in names)
        # Reading the metrics of several processes takes all of them.
        state = self.state(epochs_completed, steps_completed)
        if not self.writes:
            return
        save_checkpoint(self.saved_view, first, state if resumes else None)
        for path in others:
            duplicate_file(first, path)

    def _stop_if_interrupted(self) -> None:
        if self.interruption.signal:
            print(
                f"\nStopped by {signal.Signals(self.interruption.signal).name}. Continue with\n"
                f"python train.py --configs {os.path.join(self.folder, 'configs.json')} "
                f"--load_model_path {self.folder}",
                flush=True,
            )
            raise SystemExit(128 + self.interruption.signal)

    def _write_logs(self) -> None:
        if not self.log or not self.writes:
            return
        write_csv(os.path.join(self.folder, "training_log.csv"), pd.DataFrame(self.log))
        stats = {
            "epochs_completed": len(self.log),
            "monitor": self.monitor,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "latest": self.log[-1],
            # Not in training_log.csv: two runs of one seed have the same log, but not the same times.
            "input_wait_by_epoch": self.input_waits,
        }
        if self.best_aurocs is not None:
            stats["best_auroc_by_class"] = self.best_aurocs
            lines = [f"epoch {self.best_epoch}", f"mean {self.best:.4f}"]
            lines += [
                f"{name} {'undefined' if auroc is None else f'{auroc:.4f}'}" for name, auroc in self.best_aurocs.items()
            ]
            write_text(os.path.join(self.folder, "best_auroc.log"), "\n".join(lines) + "\n")
        write_json(os.path.join(self.folder, ".training_stats.json"), stats)


class Interruption:
    """Notes SIGINT and SIGTERM while it is entered, so that training can end after its step; a second one ends it.

    Args:
        is_shared: training ends where all processes of the run have agreed on it, by `get_flags` and `note_flags`.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self.signal = 0
        self._received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Python lets the main thread alone handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in self.NUMBERS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def get_flags(self) -> np.ndarray:
        """Returns which of the signals this process has received, as zeros and ones."""
        return np.array([self._received == number for number in self.NUMBERS], np.float32)

    def note_flags(self, flags: Sequence[float]) -> None:
        """Takes the sum of all processes' flags: what one has received holds for all."""
        self.signal = next((number for number, flag in zip(self.NUMBERS, flags, strict=True) if flag), self.signal)

    def _note(self, number: int, _: object) -> None:
        self._received = number
        if not self.is_shared:
            self.signal = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


def build_callbacks(
    configs: Configs,
    phase: Phase,
    classifier: keras.Model,
    training: AugmentedImageSequence,
    validation: AugmentedImageSequence,
    loss: Callable,
    interruption: Interruption,
    team: Team,
    state: dict[str, Any] | None,
) -> list[keras.callbacks.Callback]:
    """Builds the callbacks of a phase in the order that they need: measure, schedule, log, and last the checkpoint.

    Args:
        configs: with `classes` resolved.
        phase: of the run.
        classifier: the whole model.
        training: the training images, or their features.
        validation: the validation images.
        loss: of probabilities, for the validation images.
        interruption: tells which signal has arrived.
        team: the processes that train together; its chief alone writes.
        state: of the checkpoint that training continues from.
    """
    measure = Validation(validation, loss, configs.multi_label_classification)
    schedule = Schedule(
        phase, training, configs.learning_rate_schedule, configs.warmup_epochs, configs.minimum_learning_rate
    )
    plateau = None
    if configs.learning_rate_schedule == "plateau":
        plateau = keras.callbacks.ReduceLROnPlateau(
            monitor="val_loss",
            factor=configs.learning_rate_decay_factor,
            patience=configs.reduce_lr_patience,
            min_lr=configs.minimum_learning_rate,
            verbose=1,
        )
    averages = AveragedWeights() if configs.ema_decay else None
    input_wait = InputWait()
    sequences = {configs.train_csv: training, configs.validation_csv or configs.test_csv: validation}
    bad_images = BadImages(sequences, configs.save_model_path, team)
    curves = None
    if team.is_chief:
        curves = keras.callbacks.TensorBoard(os.path.join(configs.save_model_path, "logs"), write_graph=False)
    checkpoint = Checkpoint(
        configs, phase, classifier, training, measure, plateau, averages, input_wait, interruption, team.is_chief, state
    )
    order = [EpochOrder(training), input_wait, averages, measure, schedule, plateau, curves, bad_images, checkpoint]
    return [callback for callback in order if callback is not None]


def stops_early(epochs_completed: int, best_epoch: int | None, patience: int, head_epochs: int = 0) -> bool:
    """Tells whether a run has gone `patience` epochs after its `head_epochs` without a better score; 0 never stops."""
    return bool(patience) and epochs_completed - max(best_epoch or 0, head_epochs) >= patience


def fingerprint(sequence: AugmentedImageSequence) -> str:
    """Returns a digest of a set's labels and file names in their order; folders may move between runs."""
    digest = hashlib.sha256(np.ascontiguousarray(sequence.labels).tobytes())
    for path in sequence.paths:
        digest.update(os.path.basename(path).encode() + b"\0")
    return digest.hexdigest()


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """Returns the random states of a model's dropout layers, which `.keras` files do not bring back."""
    return [variable for variable in model.variables if variable.name == "seed_generator_state"]


def read_metrics(model: TrainingModel) -> list[Any]:
    """Returns the values of a model's running metrics, of several devices their sums, and the sums of the loss."""
    values = [np.asarray(variable).tolist() for metric in model.metrics for variable in metric.variables]
    return [*values, model.loss_sums.tolist()]


def restore_metrics(model: TrainingModel, values: Sequence[Any]) -> None:
    """Gives a model's running metrics the values that `read_metrics` returned; the first device has all of them."""
    variables = [variable for metric in model.metrics for variable in metric.variables]
    *values, loss_sums = values
    model.loss_sums = np.array(loss_sums)

    def assign() -> None:
        is_first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
        for variable, value in zip(variables, values, strict=True):
            variable.assign(np.array(value, dtype=variable.dtype) * tf.cast(is_first, variable.dtype))

    model.distribute_strategy.run(assign)


def save_checkpoint(model: keras.Model, path: str, state: dict[str, Any] | None) -> None:
    """Writes a `.keras` file that carries the training's state, if there is one, as one more member of its archive."""
    with atomic_path(path) as temporary:
        model.save(temporary)
        if state is not None:
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.writestr(STATE_MEMBER, json.dumps(state))


def duplicate_file(source: str, path: str) -> None:
    """Gives a file a second name, without a second copy where the file system allows it."""
    with atomic_path(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def read_state(path: str) -> dict[str, Any] | None:
    """Returns the training's state that a model file carries; None where it carries none.

    Raises:
        UserError: the state is damaged: to start anew in its place would lose the run.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if STATE_MEMBER not in archive.namelist():
                return None
            if archive.getinfo(STATE_MEMBER).file_size > LARGEST_STATE:
                raise ValueError("it is too large")
            state = json.loads(archive.read(STATE_MEMBER))
        if not isinstance(state, dict) or not state.keys() >= STATE_PARTS:
            raise ValueError("it lacks parts")
    except Exception as error:
        # zipfile and json fail in many ways on a damaged file; each of them is the file's fault.
        raise UserError(f"{path} carries a training state that is damaged: {error}. Use another checkpoint.") from error
    return state


def remove_stale_files(folder: str) -> None:
    """Removes the temporary files that processes of the past left in a folder when they were killed."""
    for entry in os.scandir(folder):
        found = re.match(rf"{re.escape(TEMPORARY_PREFIX)}(\d+)-", entry.name)
        if found and (int(found[1]) == os.getpid() or not is_running(int(found[1]))):
            shutil.rmtree(entry.path, ignore_errors=True)


def is_running(process_id: int) -> bool:
    """Tells whether a process exists; where the system cannot say, that it does."""
    try:
        os.kill(process_id, 0) if os.name == "posix" else None
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def locked(folder: str, is_needed: bool = True) -> Iterator[None]:
    """Holds a folder for this process alone; the system lets go of it however the process ends.

    Where it is not needed, another process of the same run holds it.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    if not is_needed:
        yield
        return
    path = os.path.join(folder, LOCK_FILE)
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 - closed below, after the lock's work is done
    except OSError as error:
        raise UserError(f"Cannot write into {folder}: {error.strerror}. Choose another save_model_path.") from error
    try:
        lock_file(file)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"Another process is training into {folder}. Wait, or choose another save_model_path."
        ) from error
    finally:
        file.close()


def lock_file(file: TextIO) -> None:
    """Locks an open file for this process; raises BlockingIOError where another one has."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def configs_to_continue(configs: Configs, state: dict[str, Any], model_path: str) -> Configs:
    """Settles each option of a continued run: as it was, or as the user wants it now.

    What the user gives now holds, unless it would change the model or the order of the data; what was given when
    the run began and is not given now holds on; the rest comes from `configs.py`.

    Args:
        configs: those of now.
        state: of the checkpoint.
        model_path: of the checkpoint.

    Returns:
        The configs to go on with; what has changed is printed.

    Raises:
        UserError: names the options that cannot change.
    """
    stored, options = state["configs"], Configs.options()
    kept, faults = {}, []
    for name, option in options.items():
        before = tuple(stored[name]) if isinstance(getattr(configs, name), tuple) else stored.get(name)
        now = getattr(configs, name)
        if now == before or name not in stored or name in ("load_model_path", "overwrite"):
            continue
        is_free_choice = name in ("classes", "random_seed") and now is None
        if is_free_choice or (name in state["given"] and name not in configs.given):
            kept[name] = before
        elif option.metadata["describes_model"] or option.metadata["fixed_in_run"]:
            faults.append(f"{name} was {before!r}, now {now!r}")
        else:
            print(f"{name} changes from {before!r} to {now!r}.")
    if faults:
        raise UserError(
            f"{model_path} cannot go on with other options: {'; '.join(faults)}. "
            f"Take the run's own with --configs {os.path.join(os.path.dirname(model_path), 'configs.json')}, or "
            "start a new run from its weights alone, which compress_weights.py writes."
        )
    given = configs.given
    configs = configs.replace(**kept)
    configs.given = given | set(state["given"])
    return configs


def check_same_data(
    state: dict[str, Any], training: AugmentedImageSequence, validation: AugmentedImageSequence
) -> None:
    """Raises UserError where the tables are not those that a run began with."""
    for option, sequence in (("train_csv", training), ("validation_csv", validation)):
        if state["data"][option] != fingerprint(sequence):
            raise UserError(
                f"The images or labels of {option} are not those that the run began with. Restore the table, "
                "or start a new run from the model's weights in another save_model_path."
            )
    before, now = state.get("devices", 1), training.shares.devices
    if before != now and state["steps_completed"]:
        raise UserError(
            f"The run stopped within an epoch on {before} devices, whose steps are not those of {now}. Go on with "
            f"{before} until the epoch is over, or start a new run from the model's weights."
        )
    if before != now:
        print(f"The number of devices changes from {before} to {now}, and with it the images of a step.")
