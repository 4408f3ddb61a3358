"""The parts of a training run: its sets, model, callbacks, and the learning-rate test."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from configs import Configs
from finetune.core.devices import set_seed
from finetune.core.files import find_existing
from finetune.core.options import UserError
from finetune.core.texts import MOST_TELLING, join_names, show_bytes
from finetune.core.values import get_input_size
from finetune.data.data_check import list_sets
from finetune.data.groups import warn_of_shared_groups
from finetune.data.tables import count_labels, resolve_class_names, warn_of_missing_classes
from finetune.evaluation.paired_comparison import describe_epoch
from finetune.models.description import hash_model
from finetune.models.freezing import has_fixed_features
from finetune.models.losses import Losses
from finetune.models.model_files import get_classifier, load_fitting_model
from finetune.models.optimizers import build_optimizer
from finetune.training.callbacks import (
    AveragedWeights,
    BadImages,
    EpochOrder,
    InputWait,
    RangeTest,
    Schedule,
    Validation,
)
from finetune.training.checkpoints import BeforeValidation, Checkpoint, advising_on_bad_images
from finetune.training.head_fit import HeadFit
from finetune.training.learning_rate_finder import suggest_learning_rate
from finetune.training.phases import (
    Phase,
    changes_images,
    count_epochs,
    describe_phase,
    get_sets,
    prepare_phase,
    refits_head,
    run_phase,
    set_trainable,
)
from finetune.training.resuming import check_same_data
from finetune.training.run_folder import (
    BEST_MODEL,
    CURVES_FOLDER,
    LATEST_MODEL,
    MODEL_FILES,
    START_MODEL,
    clear_folder,
    describe_run,
    fingerprint,
    leads_into,
    locked,
)
from finetune.training.time_budget import TimeEstimate, count_views, fit_epochs
from finetune.training.trainer import Interruption
from finetune.training.workers import Team
from generator import AugmentedImageSequence, Shares, get_generator, naming_bad_images
from model import ModelFactory


class Images(NamedTuple):
    """The sets of a run.

    Attributes:
        training: what the model learns from.
        validation: what selects the best model.
    """

    training: AugmentedImageSequence
    validation: AugmentedImageSequence


class Start(NamedTuple):
    """What training starts from.

    Attributes:
        classifier: the whole model.
        optimizer: that of a checkpoint, which goes on; None for a fresh one.
        features: of the training images, and which of these could be read, where the head has been started from them.
    """

    classifier: keras.Model
    optimizer: keras.optimizers.Optimizer | None = None
    features: tuple[np.ndarray, np.ndarray] | None = None


def settle(configs: Configs, team: Team) -> Configs:
    """Seeds everything, and finds what configs may leave open: the seed and the classes.

    Raises:
        UserError: the classes are not those of the training CSV, or there is nothing to interpolate from.
    """
    if (configs.model_selection, configs.head_initialization) == ("interpolate", "random") and not (
        configs.load_model_path
    ):
        raise UserError(
            "model_selection interpolate: expected a start that is worth keeping, of head_initialization linear_probe "
            "or a load_model_path. Received: head_initialization 'random'."
        )
    # Drawn or given, it is the chief's: order and shares follow from it.
    configs.random_seed = team.exchange(set_seed(configs.random_seed, configs.deterministic))[0]
    configs.pixel_range = team.exchange(configs.pixel_range)[0]
    configs.classes = resolve_class_names(
        configs.classes, configs.train_csv, configs.csv_label_column, configs.multi_label_classification
    )
    return configs


def get_shares(configs: Configs, devices: int, team: Team) -> Shares:
    """Finds out which of all devices that train together are this process's, and prints how many there are.

    Raises:
        UserError: the processes have different numbers of devices.
    """
    if configs.distribution_strategy == "none":
        return Shares()
    batch_size = configs.batch_size * configs.gradient_accumulation_steps
    local = devices // team.size
    team.agree({"the number of devices": local})
    print(f"Devices that train together: {devices}. Images a step: {devices} x {batch_size} = {devices * batch_size}.")
    return Shares(devices, local * team.index, local)


def get_images(configs: Configs, bad_rows: dict[str, set[int]], shares: Shares) -> Images:
    """Builds the generators of the training and of the validation images, without the bad rows of their CSV files."""
    validation_csv = configs.validation_csv or configs.test_csv
    if not configs.validation_csv:
        print(
            f"No validation_csv is given: the test set {configs.test_csv} also selects the best model, "
            "so its figures will be optimistic."
        )
    training = get_generator(configs.train_csv, configs.classes, configs, True, bad_rows[configs.train_csv], shares)
    validation = get_generator(validation_csv, configs.classes, configs, False, bad_rows[validation_csv], shares)
    print(f"{len(training.paths)} training images, {len(validation.paths)} validation images.")
    for name, images in (("training", training), ("validation", validation)):
        warn_of_missing_classes(count_labels(images.labels, len(configs.classes)), configs.classes, name)
    warn_of_shared_groups(list_sets(configs), configs.csv_label_column)
    number = f" ({len(configs.classes)})" if len(configs.classes) > MOST_TELLING else ""
    print(f"Classes{number}: {join_names(configs.classes, MOST_TELLING)}")
    return Images(training, validation)


def agree_on_start(
    team: Team,
    images: Images,
    model_path: str,
    state: dict[str, Any] | None,
) -> None:
    """Checks that all processes start from the same images, labels and model file, and that a run's are its own.

    Raises:
        UserError: in every process where that is not so.
    """
    if team.size > 1:
        digest = str(hash_model(model_path)) if model_path else ""
        values = {"the images and labels of train_csv": fingerprint(images.training)}
        values |= {"the images and labels of the validation set": fingerprint(images.validation)}
        team.agree(values | {"the model to start from": digest})
    if state:
        check_same_data(state, *images)


def get_model(
    configs: Configs, training: AugmentedImageSequence, model_path: str, state: dict[str, Any] | None, team: Team
) -> Start:
    """Builds the classifier, or loads the one to start from, in the scope of the run's strategy."""
    if model_path:
        size = get_input_size(configs)
        model = load_fitting_model(model_path, configs.classes, size, with_optimizer=state is not None)
        return Start(get_classifier(model), model.optimizer if state else None)
    classifier = ModelFactory().get_model(configs)
    if configs.head_initialization != "linear_probe":
        return Start(classifier)
    if not configs.use_imagenet_weights and not has_fixed_features(classifier):
        print(
            "Warning: the linear probe is fitted to a backbone of random weights, whose batch normalisation gives "
            "other features as soon as it trains; the loss may become infinite. Set head_initialization random and "
            "model_selection best_epoch."
        )
    return Start(classifier, features=HeadFit(configs, classifier, training, team).start(configs.image_cache_path))


def try_learning_rates(
    phase: Phase,
    configs: Configs,
    strategy: tf.distribute.Strategy,
    classifier: keras.Model,
    training: AugmentedImageSequence,
    loss: Callable,
) -> dict[str, Any]:
    """Trains with rising learning rates and suggests one.

    Source: Smith, WACV 2017 (arXiv:1506.01186).

    Returns:
        `suggestion`, and the `rates` and `losses` of the steps.

    Raises:
        UserError: no rate makes the loss fall clearly, or an image cannot be read.
    """
    with strategy.scope():
        model = prepare_phase(classifier, phase, configs, loss, None, None)
        images = get_sets(classifier, changes_images(configs), training, training)[0]
    test = RangeTest()
    epochs = 1 + math.ceil(test.steps / images.steps)
    with naming_bad_images(images):
        model.fit(images.to_dataset(), epochs, 0, [EpochOrder(images), test], Interruption())
    suggestion = suggest_learning_rate(test.rates, test.losses)
    return {"suggestion": suggestion, "rates": test.rates, "losses": test.losses}


def settle_epochs(
    configs: Configs,
    started: float,
    strategy: tf.distribute.Strategy,
    classifier: keras.Model,
    images: Images,
    loss: Callable,
    team: Team,
    state: dict[str, Any] | None,
) -> Configs:
    """Fits the number of epochs to `time_budget` or `min_steps`; a run that goes on keeps its own."""
    if state or configs.find_learning_rate:
        return configs
    if configs.time_budget:
        epochs = team.exchange(fit_epochs(configs, started, strategy, classifier, *images, loss))[0]
    else:
        epochs = count_epochs(configs.num_epochs, configs.min_steps, images.training.steps)
        if epochs == configs.num_epochs:
            # It does not count as given: a run that goes on takes it from configs.py.
            return configs
        print(
            f"{epochs} epochs of {images.training.steps} steps, for min_steps {configs.min_steps} "
            f"({configs.num_epochs} with --min_steps 0)."
        )
    return configs.replace(num_epochs=epochs)


def check_room(
    configs: Configs, classifier: keras.Model, phase: Phase, state: dict[str, Any] | None, team: Team
) -> None:
    """Checks, before the first epoch, that the disk has room for the checkpoints of a run.

    Args:
        configs: of the run, with the number of epochs settled.
        classifier: the whole model.
        phase: the last one, which trains the most.
        state: of the checkpoint that training continues from.
        team: its chief alone writes.

    Raises:
        UserError: says how much is needed and how much there is.
    """
    if not team.is_chief:
        return
    set_trainable(classifier, phase, configs)
    size, folder = estimate_checkpoint(configs, classifier), configs.save_model_path
    epochs = 0 if configs.save_best_model_only else configs.num_epochs - (state["epochs_completed"] if state else 0)
    names = [BEST_MODEL, LATEST_MODEL, *[START_MODEL] * (configs.model_selection == "interpolate")]
    # Each file is written whole before it takes the place of the one before.
    number = max(len(names), epochs) + 1
    is_removed = configs.overwrite and not leads_into(configs.load_model_path, folder)
    needed = number * size - measure_files(folder, MODEL_FILES if is_removed else names)
    free = shutil.disk_usage(find_existing(folder)).free
    if needed > free:
        fewer = ", or keep only the best model by --save_best_model_only True" if epochs > len(names) else ""
        raise UserError(
            f"{folder}: the checkpoints of this run need {show_bytes(needed)}: up to {number} files of "
            f"{show_bytes(size)}. The disk has {show_bytes(free)} left. Free space, choose another "
            f"save_model_path{fewer}."
        )


def estimate_checkpoint(configs: Configs, classifier: keras.Model) -> int:
    """Returns about how many bytes a checkpoint has: the weights, and what the optimizer keeps of those that learn."""
    optimizer, probe = build_optimizer(configs), keras.Variable(np.zeros((2, 3), np.float32))
    optimizer.build([probe])
    slots = sum(variable.shape == probe.shape for variable in optimizer.variables)
    weights, learning = (
        sum(int(np.prod(weight.shape)) * np.dtype(weight.dtype).itemsize for weight in part)
        for part in (classifier.weights, classifier.trainable_weights)
    )
    return weights + slots * learning


def measure_files(folder: str, patterns: list[str] | tuple[str, ...]) -> int:
    """Returns the bytes that files of a folder take; several names of one file count once."""
    paths = [path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(folder), pattern))]
    found = {(status.st_dev, status.st_ino): status.st_size for status in map(os.lstat, paths)}
    return sum(found.values())


@contextlib.contextmanager
def open_run(configs: Configs, images: Images, team: Team) -> Iterator[Interruption]:
    """Holds the run's folder while it is entered, made ready: cleared, and with the run's configs and data described.

    Yields:
        What notes the signals that end training after a step.

    Raises:
        UserError: another process trains into the folder, or it cannot be written.
    """
    folder, csv_paths = configs.save_model_path, (configs.train_csv, configs.validation_csv or configs.test_csv)
    with locked(folder, team.is_chief), Interruption(is_shared=team.size > 1) as interruption:
        if team.is_chief:
            clear_folder(folder, configs.overwrite and not leads_into(configs.load_model_path, folder))
            sets = dict(zip(Images._fields, zip(csv_paths, images, strict=True), strict=True))
            describe_run(folder, configs.to_stored(), sets, configs.classes, configs.provenance.home)
        yield interruption


def report_best(checkpoint: Checkpoint, folder: str) -> dict[str, Any]:
    """Prints the best epoch and where everything is; returns its figures with the last's."""
    if checkpoint.best is None and checkpoint.kept_share is not None:
        print(
            f"The kept model's {checkpoint.monitor} is undefined: the validation set has each label on all or no image."
        )
    elif checkpoint.best is None:
        print(f"{checkpoint.monitor} is undefined in every epoch, so no model is the best one.")
    else:
        place = describe_epoch(checkpoint.best_epoch, checkpoint.kept_share, checkpoint.has_refitted_head)
        # An average is chosen by its log loss: an epoch may have had a better figure.
        word = "Best" if checkpoint.kept_share is None else "The kept model's"
        print(f"{word} {checkpoint.monitor}: {checkpoint.best:.4f} in epoch {place}.")
    print(f"Models and logs are in {folder}")
    return {"best": checkpoint.best, "best_epoch": checkpoint.best_epoch} | checkpoint.log[-1]


def build_plateau(configs: Configs) -> keras.callbacks.ReduceLROnPlateau | None:
    """Builds what lowers the learning rate on a plateau of the validation loss; None where the step decides it."""
    if configs.learning_rate_schedule != "plateau":
        return None
    return keras.callbacks.ReduceLROnPlateau(
        monitor="val_loss",
        factor=configs.learning_rate_decay_factor,
        patience=configs.reduce_lr_patience,
        min_lr=configs.minimum_learning_rate,
        verbose=1,
    )


def build_callbacks(
    configs: Configs,
    phase: Phase,
    classifier: keras.Model,
    training: AugmentedImageSequence,
    validation: AugmentedImageSequence,
    loss: Callable,
    interruption: Interruption,
    team: Team,
    state: dict[str, Any] | None,
) -> list[keras.callbacks.Callback]:
    """Builds the callbacks of a phase in the order that they need: measure, schedule, log, and last the checkpoint.

    Args:
        configs: with `classes` resolved.
        phase: of the run.
        classifier: the whole model.
        training: the training images, or their features.
        validation: the validation images.
        loss: of probabilities, for the validation images.
        interruption: tells which signal has arrived.
        team: the processes that train together; its chief alone writes.
        state: of the checkpoint that training continues from.
    """
    measure = Validation(validation, loss, configs.multi_label_classification)
    schedule = Schedule(
        phase, training, configs.learning_rate_schedule, configs.warmup_epochs, configs.minimum_learning_rate
    )
    plateau = build_plateau(configs)
    averages = AveragedWeights() if configs.ema_decay else None
    input_wait = InputWait()
    sequences = {configs.train_csv: training, configs.validation_csv or configs.test_csv: validation}
    bad_images = BadImages(sequences, configs.save_model_path, team)
    curves = None
    if team.is_chief:
        curves = keras.callbacks.TensorBoard(os.path.join(configs.save_model_path, CURVES_FOLDER), write_graph=False)
    writes = team.is_chief
    refit = HeadFit(configs, classifier, training, team).refit if refits_head(configs, classifier) else None
    checkpoint = Checkpoint(
        configs, phase, classifier, training, measure, plateau, averages, input_wait, interruption, writes, state, refit
    )
    views = count_views(configs, training, validation, refits=refit is not None)
    estimate = TimeEstimate(configs.num_epochs, training, *views)
    before = [EpochOrder(training), input_wait, estimate, BeforeValidation(checkpoint), averages]
    order = [*before, measure, schedule, plateau, curves, bad_images, checkpoint]
    return [callback for callback in order if callback is not None]


def train_phases(
    phases: Sequence[Phase],
    configs: Configs,
    strategy: tf.distribute.Strategy,
    start: Start,
    images: Images,
    losses: Losses,
    interruption: Interruption,
    team: Team,
    state: dict[str, Any] | None,
) -> Checkpoint:
    """Trains one phase after the other.

    Args:
        phases: of the run, of which the state may have left some behind.
        configs: with `classes` resolved.
        strategy: of the devices.
        start: of the run.
        images: of the run.
        losses: of the run.
        interruption: tells which signal has arrived.
        team: the processes that train together.
        state: of the checkpoint that training continues from.

    Returns:
        The last phase's checkpoint, which knows the run's figures.
    """
    classifier, optimizer, features = start
    if configs.show_model_summary:
        classifier.summary()
    for phase in phases:
        if state and state["epochs_completed"] >= phase.end:
            continue
        with strategy.scope():
            model = prepare_phase(classifier, phase, configs, losses.training, optimizer, state)
            mirrors = configs.test_time_augmentation == "flip"
            sets = get_sets(classifier, changes_images(configs), *images, features, mirrors)
        print(describe_phase(phase, classifier, sets[0]))
        callbacks = build_callbacks(configs, phase, classifier, *sets, losses.validation, interruption, team, state)
        with advising_on_bad_images(configs.save_model_path, *sets):
            run_phase(model, *sets, phase, state, callbacks, interruption)
        # The next phase goes on from here as a run does that continues: all from the chief's random states.
        state = team.exchange(callbacks[-1].state(phase.end, 0))[0]
        if model.stop_training:
            break
    return callbacks[-1]
