"""When models and logs are written, what stops a run, and what a model file does not restore on resuming."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator

import keras
import numpy as np

from finetune.core.options import UserError
from finetune.core.texts import begin_line
from finetune.loading.batch_processes import WorkerEnded
from finetune.training.callbacks import AveragedWeights, InputWait
from finetune.training.model_selection import ModelSelection
from finetune.training.resuming import stops_early
from finetune.training.run import write_logs
from finetune.training.run_folder import BEST_MODEL, CONFIGS_FILE, LATEST_MODEL
from finetune.training.training_state import CheckpointWriter, restore_metrics, seed_states
from generator import AugmentedImageSequence


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
