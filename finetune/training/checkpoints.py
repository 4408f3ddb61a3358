"""When a run's models and logs are written, and what a model file does not restore on resuming."""

from __future__ import annotations

import keras
import numpy as np

from finetune.core.options import UserError
from finetune.core.texts import begin_line
from finetune.training.callbacks import AveragedWeights, InputWait
from finetune.training.checkpoint_writer import CheckpointWriter
from finetune.training.model_selection import ModelSelection
from finetune.training.progress import write_logs
from finetune.training.run_folder import BEST_MODEL, LATEST_MODEL
from finetune.training.training_state import restore_metrics, seed_states
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
