"""Writing a run's models, log and statistics, and stopping it where that is due."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import pandas as pd

from configs import Configs
from finetune.core.files import duplicate_file, write_csv, write_json, write_text
from finetune.core.options import UserError
from finetune.core.texts import begin_line
from finetune.evaluation.metrics import none_if_undefined
from finetune.loading.batch_processes import WorkerEnded
from finetune.models.model_files import build_inference_model, get_classifier, load_model
from finetune.training.callbacks import AveragedWeights, InputWait, Validation
from finetune.training.phases import Phase
from finetune.training.run_folder import (
    AUROC_FILE,
    BEST_MODEL,
    CONFIGS_FILE,
    LATEST_MODEL,
    LOG_FILE,
    START_MODEL,
    STATISTICS_FILE,
    find_start_model,
    fingerprint,
)
from finetune.training.trainer import Interruption
from finetune.training.training_state import read_metrics, read_state, restore_metrics, save_checkpoint, seed_states
from finetune.training.weight_averaging import choose_weights
from generator import AugmentedImageSequence


class Checkpoint(keras.callbacks.Callback):
    """Writes the models, the training log and the statistics of a run, and stops it where that is due.

    Every `.keras` file is written whole or not at all, and carries the state that resuming from it needs, so that
    the two cannot disagree: see `state`. It stops training on a non-finite loss, after `early_stopping_patience`
    epochs without a better score, and on SIGINT, SIGTERM or SIGHUP, after the step that runs then.

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
        refit: fits the head anew, where averages of weights are compared.
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
        refit: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self._take_options(configs)
        self.start_weights: list[np.ndarray] = []
        self.run_state = {
            "configs": configs.to_stored(),
            "given": sorted(configs.given),
            "data": {"train_csv": fingerprint(training), "validation_csv": fingerprint(validation.sequence)},
            "devices": training.shares.devices,
            "steps": training.steps,
        }
        self.writes = writes
        self.refit = refit
        self.phase = phase
        self.classifier = classifier
        self.training = training
        self.validation = validation
        self.plateau = plateau
        self.averages = averages
        self.input_wait = input_wait
        self.interruption = interruption
        self.to_restore = state
        # A plateau of one phase does not bind the next.
        goes_on = state is not None and (state["epochs_completed"], state["steps_completed"]) > (phase.first_epoch, 0)
        self.plateau_state: dict[str, Any] = state["plateau"] if goes_on else {}
        self._take_figures(state or {})
        self.epoch = 0
        self.has_validated = False

    def _take_options(self, configs: Configs) -> None:
        """Takes from the options what a checkpoint depends on."""
        self.folder = configs.save_model_path
        self.monitor = "val_auroc" if configs.multi_label_classification else "val_accuracy"
        self.save_best_only = configs.save_best_model_only
        self.every_steps = configs.checkpoint_every_steps
        self.patience = configs.early_stopping_patience
        self.head_epochs = configs.head_epochs
        self.test_time_augmentation = configs.test_time_augmentation
        # The number of epochs after which the model to keep is known; 0: it is that of the best epoch so far.
        self.last_epoch = 0 if configs.model_selection == "best_epoch" else configs.num_epochs
        self.interpolates = configs.model_selection == "interpolate"
        is_probed = configs.head_initialization == "linear_probe" and not configs.load_model_path
        self.starts_good = is_probed or self.interpolates
        self.source = configs.load_model_path or self.folder
        self.class_names = configs.classes

    def _take_figures(self, state: dict[str, Any]) -> None:
        """Takes the run's figures from a checkpoint, or begins without any."""
        self.log: list[dict[str, float]] = list(state.get("log", []))
        self.best: float | None = state.get("best")
        self.best_epoch: int | None = state.get("best_epoch")
        self.best_aurocs: dict[str, float | None] | None = state.get("best_aurocs")
        # Of the way from the start to the last epoch; between them it is no epoch's model.
        self.kept_share: float | None = state.get("kept_share")
        self.has_refitted_head: bool = state.get("has_refitted_head", False)
        self.input_waits: list[float] = list(state.get("input_waits", []))

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Restores what Keras has just reset, and on resuming the random states and the logs."""
        # A plain view of the model with the mode's stock loss: the file loads without this project.
        self.saved_view = build_inference_model(self.classifier, self.test_time_augmentation)
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
            self._bring_best()
            self.start_weights = self._read_start() if self.interpolates else []
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
            self._save([LATEST_MODEL], self.epoch, steps_completed)
            self._stop_if_interrupted()

    def save_before_validation(self, epoch: int) -> None:
        """Keeps an epoch's training where its validation is the first: an image in that may turn out unreadable."""
        if not self.has_validated:
            self._save([LATEST_MODEL], epoch, self.training.steps)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Writes the epoch's models and logs, the best one where it is that, and stops where that is due."""
        self.has_validated = True
        self._check_finite("validation loss", logs["val_loss"], f"epoch {epoch + 1}")
        if self.plateau is not None:
            self.plateau_state = {
                "wait": int(self.plateau.wait),
                "best": float(self.plateau.best),
                "cooldown_counter": int(self.plateau.cooldown_counter),
            }
        self.input_waits.append(round(self.input_wait.share, 4))
        self.log.append({"epoch": epoch + 1} | {name: float(value) for name, value in logs.items()})
        try:
            self._write_epoch(epoch, logs)
        except UserError:
            # The progress bar would show them after this callback.
            shown = ", ".join(f"{name} {value:.4f}" for name, value in self.log[-1].items() if name != "epoch")
            print(f"{begin_line()}Epoch {epoch + 1}: {shown}", flush=True)
            raise
        self.model.stop_training = stops_early(epoch + 1, self.best_epoch, self.patience, self.head_epochs)
        self._stop_if_interrupted()

    def _write_epoch(self, epoch: int, logs: dict[str, float]) -> None:
        """Writes the models and logs that an epoch gives."""
        is_best = self._choose(epoch + 1, logs)
        names = [BEST_MODEL] * is_best
        names += [f"model_epoch_{epoch + 1:03d}.keras"] * (not self.save_best_only)
        if self.averages is None:
            names.append(LATEST_MODEL)
        if names:
            self._save(names, epoch + 1, 0, resumes=self.averages is None)
        if self.averages is not None:
            self.averages.put_back()
            self._save([LATEST_MODEL], epoch + 1, 0)
        self._write_logs()

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
            "kept_share": self.kept_share,
            "has_refitted_head": self.has_refitted_head,
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
        print(f"The start, epoch 0: {self.monitor} {logs[self.monitor]:.4f}.")
        self.start_weights = self.classifier.get_weights() if self.interpolates else []
        if is_best := not self.last_epoch or self.interpolates:
            self._note(0, logs[self.monitor], self.validation.aurocs)
        self._save([*[BEST_MODEL] * is_best, *[START_MODEL] * self.interpolates, LATEST_MODEL], 0, 0)

    def _read_start(self) -> list[np.ndarray]:
        """Reads the weights that the run has started from, and keeps them in its own folder too."""
        path, own = find_start_model(self.source), os.path.join(self.folder, START_MODEL)
        if self.writes and not os.path.exists(own):
            duplicate_file(path, own)
        return get_classifier(load_model(path)).get_weights()

    def _bring_best(self) -> None:
        """Keeps the best model so far in the run's own folder too, where the run goes on in another one."""
        folder = self.source if os.path.isdir(self.source) else os.path.dirname(self.source)
        path, own = (os.path.join(place, BEST_MODEL) for place in (folder, self.folder))
        if self.writes and self.best_epoch is not None and os.path.isfile(path) and not os.path.exists(own):
            state = read_state(path)
            # Averaged weights carry no state.
            if state is None or state["epochs_completed"] == self.best_epoch:
                duplicate_file(path, own)

    def _choose(self, epochs_completed: int, logs: dict[str, float]) -> bool:
        """Notes the model to keep, as far as it is known after an epoch; tells whether that is the epoch's own.

        The start, or an average of it and the last epoch, is written here.
        """
        score = logs[self.monitor]
        if not self.last_epoch:
            is_best = not np.isnan(score) and (self.best is None or score > self.best)
        else:
            is_best = epochs_completed == self.last_epoch
        if is_best and self.interpolates:
            with self.model.distribute_strategy.scope():
                kept = choose_weights(self.classifier, self.start_weights, self.validation, logs, self.refit)
            self.kept_share, self.has_refitted_head = kept.share, kept.is_refitted
            is_best = kept.share == 1 and not kept.is_refitted
            if not is_best:
                self._note(epochs_completed if kept.share else 0, kept.logs[self.monitor], kept.aurocs)
                end = self.classifier.get_weights()
                self.classifier.set_weights(kept.weights)
                self._save([BEST_MODEL], epochs_completed, 0, resumes=False)
                self.classifier.set_weights(end)
        if is_best:
            self._note(epochs_completed, score, self.validation.aurocs)
        return is_best

    def _note(self, epochs_completed: int, score: float, aurocs: np.ndarray | None) -> None:
        """Notes the figures of the model to keep."""
        self.best, self.best_epoch = none_if_undefined(score), epochs_completed
        if aurocs is not None:
            self.best_aurocs = dict(zip(self.class_names, map(none_if_undefined, aurocs), strict=True))

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
        save_checkpoint(self.saved_view, first, state if resumes else None, self.run_state["configs"])
        for path in others:
            duplicate_file(first, path)

    def _stop_if_interrupted(self) -> None:
        if self.interruption.signal:
            print(
                f"\nStopped by {signal.Signals(self.interruption.signal).name}. Continue with\n"
                f"{write_resume_command(self.folder)}",
                flush=True,
            )
            raise SystemExit(128 + self.interruption.signal)

    def _write_logs(self) -> None:
        if not self.log or not self.writes:
            return
        write_csv(os.path.join(self.folder, LOG_FILE), pd.DataFrame(self.log))
        stats = {
            "epochs_completed": len(self.log),
            "monitor": self.monitor,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "latest": self.log[-1],
            # Not in training_log.csv: two runs of one seed have the same log, but not the same times.
            "input_wait_by_epoch": self.input_waits,
        }
        if self.kept_share is not None:
            stats |= {"kept_share": self.kept_share, "has_refitted_head": self.has_refitted_head}
        if self.best_aurocs is not None:
            stats["best_auroc_by_class"] = self.best_aurocs
            # A validation set may define the AUROC of no class.
            values = [("mean", self.best), *self.best_aurocs.items()]
            lines = [f"epoch {self.best_epoch}"]
            lines += [f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in values]
            write_text(os.path.join(self.folder, AUROC_FILE), "\n".join(lines) + "\n")
        write_json(os.path.join(self.folder, STATISTICS_FILE), stats)


class BeforeValidation(keras.callbacks.Callback):
    """Lets a checkpoint keep an epoch's training: it has its turn before the weights are averaged and validated."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Runs before validation."""
        self.checkpoint.save_before_validation(epoch)


@contextlib.contextmanager
def advising_on_bad_images(folder: str, *sequences: AugmentedImageSequence) -> Iterator[None]:
    """Adds to the error of an image that turned out unreadable in training, or of its reader, how to go on."""
    try:
        yield
    except UserError as error:
        if all(error is not sequence.error for sequence in sequences):
            raise
        is_of_image = not isinstance(error, WorkerEnded)
        advice = (
            "Find all such images beforehand with --verify_data full, or leave them out with --skip_bad_images True."
        )
        parts = [str(error), *[advice] * is_of_image]
        if os.path.isfile(os.path.join(folder, LATEST_MODEL)):
            command = write_resume_command(folder) + " --skip_bad_images True" * is_of_image
            parts.append(f"What was trained is kept; go on with\n{command}")
        raise UserError(" ".join(parts)) from error


def write_resume_command(folder: str) -> str:
    """Returns the command line that goes on with a run, for the shell and the folder that this process runs in."""
    script = "train.py"
    is_here = os.path.exists(script) and os.path.exists(sys.argv[0]) and os.path.samefile(script, sys.argv[0])
    if os.path.basename(sys.argv[0]) == script and not is_here:
        script = sys.argv[0]
    options = ["--configs", os.path.join(folder, CONFIGS_FILE), "--load_model_path", folder]
    return shlex.join(["python", script, *options])


def stops_early(epochs_completed: int, best_epoch: int | None, patience: int, head_epochs: int = 0) -> bool:
    """Tells whether a run has gone `patience` epochs after its `head_epochs` without a better score; 0 never stops."""
    return bool(patience) and epochs_completed - max(best_epoch or 0, head_epochs) >= patience
