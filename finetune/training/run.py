"""The data that the steps of a training run share."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from configs import Configs
from finetune.models.losses import Losses
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
