"""Which model a run keeps: the best epoch's, the last epoch's, or an average of the start and the last epoch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from finetune.core.files import duplicate_file
from finetune.evaluation.metrics import none_if_undefined
from finetune.models.model_files import load_model, strip_views
from finetune.training.callbacks import Validation, name_monitor
from finetune.training.run_folder import BEST_MODEL, LATEST_MODEL, START_MODEL, find_beside
from finetune.training.training_state import CheckpointWriter, read_state
from finetune.training.weight_averaging import choose_weights


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
