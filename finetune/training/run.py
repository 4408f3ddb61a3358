"""What the steps of a training run share."""

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
    """The sets of a run, or of a phase their features.

    Attributes:
        training: what the model learns from.
        validation: what selects the best model.
    """

    training: AugmentedImageSequence
    validation: AugmentedImageSequence


class Start(NamedTuple):
    """What training starts from.

    Attributes:
        model: the whole model, of which a phase may train the head alone.
        optimizer: that of a checkpoint, which goes on; None for a fresh one.
        features: of the training images, and which of these could be read, where the head has been started from them.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer | None = None
    features: tuple[np.ndarray, np.ndarray] | None = None


@dataclasses.dataclass
class Run:
    """A training run: what its steps share.

    Attributes:
        configs: with seed, classes and pixel range resolved, and by `resolve_epochs` the number of epochs.
        team: the processes that train together; its chief alone writes.
        strategy: of the devices.
        images: the sets.
        losses: of the sets.
        start: what training starts from.
        state: of the checkpoint that training continues from, or of the end of the phase before; None at first.
        interruption: tells which signal has arrived.
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
        """The whole model."""
        return self.start.model

    @property
    def csv_paths(self) -> Images:
        """The tables of the sets."""
        return Images(self.configs.train_csv, self.configs.validation_csv or self.configs.test_csv)
