"""The phases of a run: which layers learn in which epochs, from images or from features."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import keras
import numpy as np

from configs import Configs
from finetune.core.options import UserError
from finetune.models.backbones import has_fixed_features, list_units, prepare_backbone
from finetune.models.features import FeatureSequence
from finetune.models.heads import BACKBONE
from finetune.models.model_files import strip_views
from finetune.training.probe import compute_features, split_head, takes_probe
from finetune.training.run import Images, Run
from finetune.training.trainer import TrainingModel, get_training_model
from generator import AugmentedImageSequence, naming_bad_images


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
