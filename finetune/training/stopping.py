"""What stops a run early: a loss that is not finite, patience, signals, unreadable images; and how to continue."""

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
from finetune.loading.batch_processes import WorkerEnded
from finetune.training.checkpoint_writer import CheckpointWriter
from finetune.training.resuming import stops_early
from finetune.training.run_folder import CONFIGS_FILE, LATEST_MODEL
from generator import AugmentedImageSequence


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
