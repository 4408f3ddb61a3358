"""What happens around an epoch: validation, checkpoints with the state to resume from, logs."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pandas as pd

from configs import Configs
from generator import AugmentedImageSequence
from metrics import get_aurocs, mean_of_defined, none_if_undefined
from utils import atomic_path, write_csv, write_json, write_text

STATE_MEMBER = "training_state.json"


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
        y_true, probabilities = self.sequence.get_y_true(), self.model.predict(self.sequence, verbose=0)
        logs["val_loss"] = float(np.mean(self.loss(y_true, probabilities)))
        if self.multi_label:
            self.aurocs = get_aurocs(y_true, probabilities)
            logs["val_auroc"] = mean_of_defined(self.aurocs)
        else:
            logs["val_accuracy"] = float(np.mean(probabilities.argmax(axis=1) == y_true))


class EpochOrder(keras.callbacks.Callback):
    """Tells the training sequence which epoch it is in: order and augmentation follow from it."""

    def __init__(self, sequence: AugmentedImageSequence) -> None:
        super().__init__()
        self.sequence = sequence

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.sequence.epoch = epoch


class Checkpoint(keras.callbacks.Callback):
    """Writes the models, the training log and the statistics of a run after each epoch.

    Every `.keras` file is written whole or not at all, and carries the state that resuming from it needs, so that
    the two cannot disagree: see `state`.

    Args:
        folder: the run's folder.
        monitor: the log entry that selects the best model; higher is better.
        plateau: the run's scheduler, whose state is kept.
        save_best_only: False also keeps every epoch's model.
        validation: tells the AUROC of each class, multi-label.
        class_names: in the order of the model's outputs.
        state: of the checkpoint that training continues from.
    """

    def __init__(
        self,
        folder: str,
        monitor: str,
        plateau: keras.callbacks.ReduceLROnPlateau,
        save_best_only: bool,
        validation: Validation,
        class_names: Sequence[str],
        state: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.monitor = monitor
        self.plateau = plateau
        self.save_best_only = save_best_only
        self.validation = validation
        self.class_names = class_names
        self.resumed_state = state
        self.log: list[dict[str, float]] = list(state["log"]) if state else []
        self.best: float | None = state["best"] if state else None
        self.best_epoch: int | None = state["best_epoch"] if state else None

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        # A plain view of the model with the mode's stock loss: the file loads without this project.
        self.saved_view = keras.Model(self.model.inputs, self.model.outputs, name=self.model.name)
        stock = "binary_crossentropy" if self.validation.multi_label else "sparse_categorical_crossentropy"
        self.saved_view.compile(self.model.optimizer, loss=stock)
        if self.resumed_state is None:
            return
        # The scheduler resets itself when training begins, before this callback's turn.
        self.plateau.wait = self.resumed_state["plateau"]["wait"]
        self.plateau.best = self.resumed_state["plateau"]["best"]
        self.plateau.cooldown_counter = self.resumed_state["plateau"]["cooldown_counter"]
        for variable, value in zip(seed_states(self.model), self.resumed_state["seed_states"], strict=True):
            variable.assign(np.array(value, dtype="uint32"))

    def state(self, epoch: int) -> dict[str, Any]:
        """Returns everything that resumes, beside the weights and the optimizer's variables in the model file."""
        return {
            "epochs_completed": epoch + 1,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "plateau": {
                "wait": int(self.plateau.wait),
                "best": float(self.plateau.best),
                "cooldown_counter": int(self.plateau.cooldown_counter),
            },
            "seed_states": [np.asarray(variable).tolist() for variable in seed_states(self.model)],
            "log": self.log,
        }

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.log.append({"epoch": epoch + 1} | {name: float(value) for name, value in logs.items()})
        score = logs[self.monitor]
        is_best = not np.isnan(score) and (self.best is None or score > self.best)
        if is_best:
            self.best, self.best_epoch = float(score), epoch + 1
        names = ["best_model.keras"] * is_best
        names += [f"model_epoch_{epoch + 1:03d}.keras"] * (not self.save_best_only)
        for name in [*names, "latest_model.keras"]:
            save_checkpoint(self.saved_view, os.path.join(self.folder, name), self.state(epoch))
        self._write_logs(is_best)

    def _write_logs(self, is_best: bool) -> None:
        write_csv(os.path.join(self.folder, "training_log.csv"), pd.DataFrame(self.log))
        stats = {
            "epochs_completed": len(self.log),
            "monitor": self.monitor,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "latest": self.log[-1],
        }
        if self.validation.aurocs is not None:
            by_class = dict(zip(self.class_names, map(none_if_undefined, self.validation.aurocs), strict=True))
            stats["latest_auroc_by_class"] = by_class
            if is_best:
                lines = [f"epoch {self.best_epoch}", f"mean {self.best:.4f}"]
                lines += [
                    f"{name} {'undefined' if auroc is None else f'{auroc:.4f}'}" for name, auroc in by_class.items()
                ]
                write_text(os.path.join(self.folder, "best_auroc.log"), "\n".join(lines) + "\n")
        write_json(os.path.join(self.folder, ".training_stats.json"), stats)


def build_callbacks(
    configs: Configs,
    training: AugmentedImageSequence,
    validation: AugmentedImageSequence,
    loss: Callable,
    state: dict[str, Any] | None,
) -> list[keras.callbacks.Callback]:
    """Builds a run's callbacks in the order that they need: measure, schedule, log, and last the checkpoint.

    Args:
        configs: with `classes` resolved.
        training: the training images.
        validation: the validation images.
        loss: of probabilities, as the training's.
        state: of the checkpoint that training continues from.
    """
    multi_label = configs.multi_label_classification
    measure = Validation(validation, loss, multi_label)
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="val_loss",
        factor=configs.learning_rate_decay_factor,
        patience=configs.reduce_lr_patience,
        min_lr=configs.minimum_learning_rate,
        verbose=1,
    )
    curves = keras.callbacks.TensorBoard(os.path.join(configs.save_model_path, "logs"), write_graph=False)
    checkpoint = Checkpoint(
        configs.save_model_path,
        "val_auroc" if multi_label else "val_accuracy",
        plateau,
        configs.save_best_model_only,
        measure,
        configs.classes,
        state,
    )
    return [EpochOrder(training), measure, plateau, curves, checkpoint]


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """Returns the random states of a model's dropout layers, which `.keras` files do not bring back."""
    return [variable for variable in model.variables if variable.name == "seed_generator_state"]


def save_checkpoint(model: keras.Model, path: str, state: dict[str, Any]) -> None:
    """Writes a `.keras` file that carries the training's state as one more member of its archive."""
    with atomic_path(path) as temporary:
        model.save(temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(STATE_MEMBER, json.dumps(state))


def read_state(path: str) -> dict[str, Any] | None:
    """Returns the training's state that a model file carries; None where it carries none."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if STATE_MEMBER not in archive.namelist():
            return None
        return json.loads(archive.read(STATE_MEMBER))
