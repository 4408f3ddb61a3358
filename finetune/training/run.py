"""The data that the steps of a training run share: the run itself and its progress."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, NamedTuple

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from configs import Configs
from finetune.core.files import write_csv, write_json, write_text
from finetune.models.losses import Losses
from finetune.training.run_folder import AUROC_FILE, LOG_FILE, STATISTICS_FILE
from finetune.training.trainer import Interruption
from finetune.training.workers import Team
from generator import AugmentedImageSequence


class Images(NamedTuple):
    """The training and the validation set of a run, as images or, in a phase, as features."""

    training: AugmentedImageSequence
    validation: AugmentedImageSequence


class Start(NamedTuple):
    """The start of training.

    Attributes:
        model: the whole model.
        optimizer: of the checkpoint that is continued; None for a fresh one.
        features: of the training images, and which could be read, if the head was fitted to them.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer | None = None
    features: tuple[np.ndarray, np.ndarray] | None = None


@dataclasses.dataclass
class Run:
    """A training run.

    Attributes:
        configs: with seed, classes and pixel range resolved, and by `resolve_epochs` the number of epochs.
        team: the processes that train together; only its chief writes.
        strategy: of the devices.
        images: the sets.
        losses: of the sets.
        start: of training.
        state: of the checkpoint that training continues from, or of the previous phase; None at first.
        interruption: holds the signal that has arrived.
    """

    configs: Configs
    team: Team
    strategy: tf.distribute.Strategy
    images: Images
    losses: Losses
    start: Start
    state: dict[str, Any] | None
    interruption: Interruption

    @property
    def model(self) -> keras.Model:
        return self.start.model

    @property
    def csv_paths(self) -> Images:
        return Images(self.configs.train_csv, self.configs.validation_csv or self.configs.test_csv)


@dataclasses.dataclass
class Progress:
    """The progress of a run; every checkpoint stores it under these names.

    Attributes:
        best: the validation metric of the model to keep; None if undefined.
        best_epoch: the epoch of this model; 0 is the start.
        best_aurocs: multi-label: its AUROC of each class.
        kept_share: how far its weights are interpolated from the start (0) to the last epoch (1).
        has_refitted_head: whether its head was refitted.
        plateau: the counters of `Plateau` in this phase.
        log: the metrics of each epoch.
        input_waits: the share of each epoch that the model waited for images.
    """

    best: float | None = None
    best_epoch: int | None = None
    best_aurocs: dict[str, float | None] | None = None
    kept_share: float | None = None
    has_refitted_head: bool = False
    plateau: dict[str, Any] = dataclasses.field(default_factory=dict)
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)
    input_waits: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, state: dict[str, Any] | None) -> Progress:
        """Returns the progress that a checkpoint's state holds; empty for a new run."""
        stored = state or {}
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: stored[name] for name in names if name in stored})


def write_logs(folder: str, monitor: str, progress: Progress) -> None:
    """Writes the training log, the statistics, and multi-label the AUROC of each class, once an epoch is completed."""
    if not progress.log:
        return
    write_csv(os.path.join(folder, LOG_FILE), pd.DataFrame(progress.log))
    stats = {
        "epochs_completed": len(progress.log),
        "monitor": monitor,
        "best": progress.best,
        "best_epoch": progress.best_epoch,
        "latest": progress.log[-1],
        # Not in training_log.csv: two runs of one seed share the log, but not the times.
        "input_wait_by_epoch": progress.input_waits,
    }
    if progress.kept_share is not None:
        stats |= {"kept_share": progress.kept_share, "has_refitted_head": progress.has_refitted_head}
    if progress.best_aurocs is not None:
        stats["best_auroc_by_class"] = progress.best_aurocs
        values = [("mean", progress.best), *progress.best_aurocs.items()]
        lines = [f"epoch {progress.best_epoch}"]
        lines += [f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in values]
        write_text(os.path.join(folder, AUROC_FILE), "\n".join(lines) + "\n")
    write_json(os.path.join(folder, STATISTICS_FILE), stats)
