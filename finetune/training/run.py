"""A training run: what its steps share, its progress, and its phases: which layers learn in which epochs."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, NamedTuple

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from configs import Configs
from finetune.core.files import write_csv, write_json, write_text
from finetune.core.options import UserError
from finetune.models.backbones import has_fixed_features, list_units, prepare_backbone
from finetune.models.compiling import Losses
from finetune.models.features import FeatureSequence
from finetune.models.heads import BACKBONE
from finetune.models.model_files import strip_views
from finetune.training.probe import (
    compute_features,
    split_head,
    takes_probe,
)
from finetune.training.run_folder import AUROC_FILE, LOG_FILE, STATISTICS_FILE
from finetune.training.trainer import Interruption, TrainingModel, get_training_model
from finetune.training.workers import Team
from generator import AugmentedImageSequence, naming_bad_images


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


class Phase(NamedTuple):
    """Epochs that train the same layers in the same way.

    Attributes:
        first_epoch: counted from 0.
        end: the first epoch after the phase.
        learning_rate: the highest one.
        trains_head_only: only the head learns.
    """

    first_epoch: int
    end: int
    learning_rate: float
    trains_head_only: bool


def count_epochs(num_epochs: int, min_steps: int, steps: int) -> int:
    """Returns how many epochs of `steps` training steps a run has: at least `num_epochs`, and at least `min_steps`."""
    return max(num_epochs, math.ceil(min_steps / steps))


def get_phases(configs: Configs, devices: int) -> list[Phase]:
    """Divides a run into the epochs that train only the head, if any, and those that train everything."""
    factor = devices if configs.scale_learning_rate else 1
    if factor > 1:
        print(f"learning_rate is {configs.learning_rate} times {factor} devices: {configs.learning_rate * factor:g}.")
    border = min(configs.head_epochs, configs.num_epochs)
    rate = configs.learning_rate * factor
    later = rate if configs.fine_tune_learning_rate is None else configs.fine_tune_learning_rate * factor
    phases = [Phase(0, border, rate, True), Phase(border, configs.num_epochs, later if border else rate, False)]
    return [phase for phase in phases if phase.end > phase.first_epoch]


def prepare_phase(run: Run, phase: Phase, state: dict[str, Any] | None) -> TrainingModel:
    """Makes the layers of a phase trainable and builds its training model, in the scope of the strategy.

    `state` is of the checkpoint to continue from; None for a fresh start.
    """
    set_trainable(run.model, phase, run.configs)
    continues = is_within(state, phase)
    part = split_head(run.model) if trains_on_features(run.model, changes_images(run.configs)) else run.model
    optimizer = run.start.optimizer if continues else None
    trained = get_training_model(part, run.configs, run.losses.training, optimizer)
    # Legacy checkpoints, from before head_epochs, have the one rate of their configs.
    if not continues or phase.learning_rate != state.get("learning_rate", state["configs"]["learning_rate"]):
        trained.optimizer.learning_rate = phase.learning_rate
    return trained


def set_trainable(model: keras.Model, phase: Phase, configs: Configs) -> None:
    """Makes the layers of a phase trainable, and no others.

    Raises:
        UserError: the phase trains only the head, and the model has no backbone.
    """
    names = [layer.name for layer in model.layers]
    if BACKBONE in names:
        convolutions = 0 if phase.trains_head_only else configs.conv_layers_to_train
        backbone = model.get_layer(BACKBONE)
        prepare_backbone(backbone, convolutions, configs.batch_norm_momentum, configs.freeze_batch_norm)
    elif phase.trains_head_only:
        raise UserError(
            f"head_epochs: expected a model with a part named 'backbone'. Received: {', '.join(names)}. Set "
            "head_epochs to 0."
        )
    if "downscaling" in names:
        model.get_layer("downscaling").trainable = not phase.trains_head_only


def restore_trainable(model: keras.Model, state: dict[str, Any] | None, configs: Configs) -> None:
    """Makes trainable the layers of a loaded model that its checkpoint's optimizer trains.

    Args:
        model: from a file, before its optimizer is built.
        state: of its training.
        configs: of the run.
    """
    inner = strip_views(model)
    if state and BACKBONE in [layer.name for layer in inner.layers]:
        trains_head = (state["epochs_completed"], state["steps_completed"]) <= (configs.head_epochs, 0)
        set_trainable(inner, Phase(0, 0, 1.0, bool(configs.head_epochs) and trains_head), configs)


def describe_phase(phase: Phase, model: keras.Model, training: AugmentedImageSequence) -> str:
    """Returns the line that describes a prepared phase: its epochs, their steps, and its parameters."""
    first, count = phase.first_epoch + 1, model.count_params()
    epochs = f"Epoch {first}" if phase.end == first else f"Epochs {first} to {phase.end}"
    learning = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    steps, images = training.steps, training.batch_size * training.shares.devices
    shown = f"{epochs}: {steps} steps of {images} images each; {learning:,} of {count:,} parameters are trained."
    if BACKBONE not in [layer.name for layer in model.layers]:
        return shown
    units, word = list_units(model.get_layer(BACKBONE))
    trained = sum(bool(unit.trainable_weights) for unit in units)
    part = f" Of the backbone's {len(units)} {word}, the last {trained} are trained."
    return shown + part * (0 < trained < len(units))


def is_within(state: dict[str, Any] | None, phase: Phase) -> bool:
    """Returns whether a checkpoint was written after the first step of a phase, with the phase's optimizer."""
    return bool(state) and (state["epochs_completed"], state["steps_completed"]) > (phase.first_epoch, 0)


def changes_images(configs: Configs) -> bool:
    """Returns whether training changes an image in every epoch."""
    crops = configs.random_crop_area != [1.0, 1.0]
    return bool(configs.augmentation_strength != "none" or crops or configs.mixup_alpha or configs.cutmix_alpha)


def refits_head(configs: Configs, model: keras.Model) -> bool:
    """Returns whether averages of a run's weights are compared with refitted heads.

    With a frozen backbone, the refitted head would be the first one. In multi-label runs refitted heads were worse by a
    point: the features were trained on the same photos, so that weak regularisation looks best.
    """
    if configs.model_selection != "interpolate" or configs.multi_label_classification:
        return False
    return takes_probe(model) and not has_fixed_features(model)


def trains_on_features(model: keras.Model, images_change: bool) -> bool:
    """Returns whether each image has the same features in every epoch of a phase."""
    return not images_change and has_fixed_features(model)


def get_sets(run: Run) -> Images:
    """Returns the images of a phase, or their features if those stay the same; in the scope of the strategy.

    With `test_time_augmentation`, the features of a validation image include those of its mirror image.
    """
    training, images = get_training_set(run), run.images
    if training is images.training:
        return images
    features, is_read = compute_features(run.model, images.validation)
    if run.configs.test_time_augmentation == "flip":
        mirrored, _ = compute_features(run.model, images.validation, mirrored=True)
        features = np.stack([features, mirrored], axis=1)
    return Images(training, FeatureSequence.of(images.validation, features, is_read))


def get_training_set(run: Run) -> AugmentedImageSequence:
    """Returns the training images of a phase, or their features if those stay the same."""
    training = run.images.training
    if not trains_on_features(run.model, changes_images(run.configs)):
        return training
    print("The backbone is frozen and the images do not change: their features are computed once.")
    return FeatureSequence.of(training, *(run.start.features or compute_features(run.model, training)))


def run_phase(
    trained: TrainingModel, sets: Images, phase: Phase, callbacks: list[keras.callbacks.Callback], run: Run
) -> None:
    """Runs the epochs of a phase with a progress bar, from the step of the run's state.

    Raises:
        UserError: an image is unreadable, or the loss is not finite.
    """
    training, state = sets.training, run.state

    def fit(first_epoch: int, end: int) -> None:
        trained.fit(training.to_dataset(), end, first_epoch, callbacks, run.interruption)

    first_epoch, first_step = phase.first_epoch, 0
    if is_within(state, phase):
        first_epoch, first_step = state["epochs_completed"], state["steps_completed"]
    with naming_bad_images(*sets):
        if first_step:
            # The rest of this epoch has fewer steps than a whole one.
            training.first_step = first_step
            fit(first_epoch, first_epoch + 1)
            training.first_step, first_epoch = 0, first_epoch + 1
        if first_epoch < phase.end and not trained.stop_training:
            fit(first_epoch, phase.end)
