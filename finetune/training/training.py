"""The steps of a training run: preparing it from its configs, training, and finishing it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

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
from finetune.evaluation.intervals import describe_epoch
from finetune.models.backbones import has_fixed_features
from finetune.models.compiling import build_optimizer, get_losses
from finetune.models.description import hash_model
from finetune.models.model_files import load_fitting_model, preparing, strip_views
from finetune.training.callbacks import (
    AveragedWeights,
    BadImages,
    EpochOrder,
    InputWait,
    LearningRateFinder,
    Plateau,
    Schedule,
    Validation,
    name_monitor,
)
from finetune.training.checkpoints import (
    BeforeValidation,
    Checkpoint,
    FiniteLoss,
    ModelSelection,
    Stopping,
    advising_on_bad_images,
)
from finetune.training.feature_store import HeadFit
from finetune.training.learning_rate_finder import suggest_learning_rate
from finetune.training.resuming import CheckpointWriter, check_same_data
from finetune.training.run import (
    Images,
    Phase,
    Progress,
    Run,
    Start,
    describe_phase,
    get_sets,
    get_training_set,
    prepare_phase,
    refits_head,
    restore_trainable,
    run_phase,
    set_trainable,
)
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
    list_matches,
    locked,
)
from finetune.training.time_budget import TimeEstimate, count_views
from finetune.training.trainer import Interruption
from finetune.training.workers import Team
from generator import AugmentedImageSequence, Shares, get_generator, naming_bad_images
from model import ModelFactory


def find_learning_rate(run: Run, phase: Phase) -> dict[str, Any]:
    """Trains a phase with rising learning rates and suggests one.

    Source: Smith, WACV 2017 (arXiv:1506.01186).

    Returns:
        `suggestion`, and the `rates` and `losses` of the steps.

    Raises:
        UserError: no rate makes the loss fall clearly, or an image cannot be read.
    """
    with run.strategy.scope():
        trained = prepare_phase(run, phase, None)
        images = get_training_set(run)
    finder = LearningRateFinder()
    epochs = 1 + math.ceil(finder.steps / images.steps)
    with naming_bad_images(images):
        trained.fit(images.to_dataset(), epochs, 0, [EpochOrder(images), finder], Interruption())
    suggestion = suggest_learning_rate(finder.rates, finder.losses)
    return {"suggestion": suggestion, "rates": finder.rates, "losses": finder.losses}


def check_room(run: Run, phase: Phase) -> None:
    """Checks, before the first epoch, that the disk has room for a run's checkpoints in its last and largest phase.

    Raises:
        UserError: names the space that is needed and the space that is left.
    """
    if not run.team.is_chief:
        return
    configs = run.configs
    set_trainable(run.model, phase, configs)
    size, folder = estimate_checkpoint(configs, run.model), configs.save_model_path
    completed = run.state["epochs_completed"] if run.state else 0
    epochs = 0 if configs.save_best_model_only else configs.num_epochs - completed
    names = [BEST_MODEL, LATEST_MODEL, *[START_MODEL] * (configs.model_selection == "interpolate")]
    # A file is complete before it replaces the previous one.
    number = max(len(names), epochs) + 1
    is_removed = configs.overwrite and not leads_into(configs.load_model_path, folder)
    needed = number * size - measure_files(folder, MODEL_FILES if is_removed else names)
    free = shutil.disk_usage(find_existing(folder)).free
    if needed > free:
        fewer = ", or keep only the best model with --save_best_model_only True" if epochs > len(names) else ""
        raise UserError(
            f"{folder}: the checkpoints of this run need {show_bytes(needed)}: up to {number} files of "
            f"{show_bytes(size)}. The disk has {show_bytes(free)} left. Free space, choose another "
            f"save_model_path{fewer}."
        )


def estimate_checkpoint(configs: Configs, model: keras.Model) -> int:
    """Returns the approximate bytes of a checkpoint: the weights, and the optimizer's variables of those that learn."""
    optimizer, probe = build_optimizer(configs), keras.Variable(np.zeros((2, 3), np.float32))
    optimizer.build([probe])
    slots = sum(variable.shape == probe.shape for variable in optimizer.variables)
    weights, learning = (
        sum(int(np.prod(weight.shape)) * np.dtype(weight.dtype).itemsize for weight in part)
        for part in (model.weights, model.trainable_weights)
    )
    return weights + slots * learning


def measure_files(folder: str, patterns: Sequence[str]) -> int:
    """Returns the bytes that files of a folder take; several names of one file count once."""
    found = map(os.lstat, list_matches(folder, patterns))
    return sum({(status.st_dev, status.st_ino): status.st_size for status in found}.values())


@contextlib.contextmanager
def open_run(run: Run) -> Iterator[None]:
    """Locks and clears the run's folder and describes the run in it; while entered, signals end training after a step.

    Raises:
        UserError: another process trains into the folder, or it cannot be written.
    """
    configs, folder = run.configs, run.configs.save_model_path
    with locked(folder, run.team.is_chief), run.interruption:
        if run.team.is_chief:
            clear_folder(folder, configs.overwrite and not leads_into(configs.load_model_path, folder))
            sets = dict(zip(Images._fields, zip(run.csv_paths, run.images, strict=True), strict=True))
            describe_run(folder, configs.to_stored(), sets, configs.classes, configs.provenance.home)
        yield


def train_phases(run: Run, phases: Sequence[Phase]) -> Progress:
    """Trains the phases that the run's state has not completed; returns the progress of the run."""
    if run.configs.show_model_summary:
        run.model.summary()
    for phase in phases:
        if run.state and run.state["epochs_completed"] >= phase.end:
            continue
        with run.strategy.scope():
            trained = prepare_phase(run, phase, run.state)
            sets = get_sets(run)
        print(describe_phase(phase, run.model, sets.training))
        writer = CheckpointWriter(run, phase, sets)
        with advising_on_bad_images(run.configs.save_model_path, *sets):
            run_phase(trained, sets, phase, build_callbacks(run, phase, sets, writer), run)
        # The next phase starts like a continued run: all processes from the chief's random states.
        run.state = run.team.exchange(writer.get_state(phase.end, 0))[0]
        if trained.stop_training:
            break
    return writer.progress


def build_callbacks(run: Run, phase: Phase, sets: Images, writer: CheckpointWriter) -> list[keras.callbacks.Callback]:
    """Builds the callbacks of a phase in the order that they need.

    An epoch is saved before validation, then its weights are averaged. The metrics come before the schedules, and the
    learning rates before the logs. A loss that is not finite ends the run before anything is saved, patience or a
    signal after that.
    """
    configs, (training, validation), is_chief = run.configs, sets, run.team.is_chief
    folder = configs.save_model_path
    measure = Validation(validation, run.losses.validation, configs.multi_label_classification)
    averages = AveragedWeights() if configs.ema_decay else None
    input_wait = InputWait()
    refit = HeadFit(configs, run.model, training, run.team).refit if refits_head(configs, run.model) else None
    views = count_views(configs, training, validation, refits=refit is not None)
    selection = ModelSelection(writer, measure, refit)
    kind, minimum = configs.learning_rate_schedule, configs.minimum_learning_rate
    order = [
        EpochOrder(training),
        input_wait,
        TimeEstimate(configs.num_epochs, training, *views),
        BeforeValidation(writer, training.steps),
        averages,
        measure,
        Schedule(phase, training, kind, configs.warmup_epochs, minimum),
        Plateau(configs, writer.progress) if kind == "plateau" else None,
        keras.callbacks.TensorBoard(os.path.join(folder, CURVES_FOLDER), write_graph=False) if is_chief else None,
        BadImages(dict(zip(run.csv_paths, sets, strict=True)), folder, run.team),
        FiniteLoss(folder, training),
        Checkpoint(writer, selection, averages, input_wait, training),
        Stopping(writer, training),
    ]
    return [callback for callback in order if callback is not None]


def report_best(progress: Progress, configs: Configs) -> dict[str, Any]:
    """Prints the best epoch and the run's folder; returns the best metric and the last epoch's metrics."""
    monitor = name_monitor(configs.multi_label_classification)
    if progress.best is None and progress.kept_share is not None:
        print(f"The kept model's {monitor} is undefined: the validation set has each label on all or no image.")
    elif progress.best is None:
        print(f"{monitor} is undefined in every epoch, so no model is the best one.")
    else:
        place = describe_epoch(progress.best_epoch, progress.kept_share, progress.has_refitted_head)
        # An average is chosen by its log loss: an epoch may have a better metric.
        word = "Best" if progress.kept_share is None else "The kept model's"
        print(f"{word} {monitor}: {progress.best:.4f} in epoch {place}.")
    print(f"Models and logs are in {configs.save_model_path}")
    return {"best": progress.best, "best_epoch": progress.best_epoch} | progress.log[-1]


def prepare_run(
    configs: Configs,
    team: Team,
    strategy: tf.distribute.Strategy,
    bad_rows: dict[str, set[int]],
    model_path: str,
    state: dict[str, Any] | None,
) -> Run:
    """Resolves what the configs leave open, and builds the sets, the losses and the model of a run.

    Args:
        configs: with `pixel_range` resolved.
        team: the processes that train together.
        strategy: of the devices.
        bad_rows: the rows to leave out, by CSV file.
        model_path: of the model to start from; empty for a new one.
        state: of the run that the model continues, if any.
    """
    configs = resolve_seed_and_classes(configs, team)
    shares = get_shares(configs, strategy.num_replicas_in_sync, team)
    images = get_images(configs, bad_rows, shares)
    check_workers_match(team, images, model_path, state)
    losses = get_losses(configs, images.training.labels)
    with strategy.scope():
        start = get_start(configs, images.training, model_path, state, team)
    return Run(configs, team, strategy, images, losses, start, state, Interruption(is_shared=team.size > 1))


def resolve_seed_and_classes(configs: Configs, team: Team) -> Configs:
    """Resolves the seed and the classes, and seeds everything.

    Raises:
        UserError: the classes are not those of the training CSV, or there is nothing to interpolate from.
    """
    if (configs.model_selection, configs.head_initialization) == ("interpolate", "random") and not (
        configs.load_model_path
    ):
        raise UserError(
            "model_selection interpolate: expected head_initialization linear_probe, or a load_model_path. Received: "
            "head_initialization 'random', whose start is not worth keeping."
        )
    # All processes take the chief's: order and shares follow from it.
    configs.random_seed = team.exchange(set_seed(configs.random_seed, configs.deterministic))[0]
    configs.pixel_range = team.exchange(configs.pixel_range)[0]
    configs.classes = resolve_class_names(
        configs.classes, configs.train_csv, configs.csv_label_column, configs.multi_label_classification
    )
    return configs


def get_shares(configs: Configs, devices: int, team: Team) -> Shares:
    """Returns this process's share of the devices that train together, and prints how many there are.

    Raises:
        UserError: the processes have different numbers of devices.
    """
    if configs.distribution_strategy == "none":
        return Shares()
    batch_size = configs.batch_size * configs.gradient_accumulation_steps
    local = devices // team.size
    team.check_workers_match({"the number of devices": local})
    print(f"Devices that train together: {devices}. Images a step: {devices} x {batch_size} = {devices * batch_size}.")
    return Shares(devices, local * team.index, local)


def get_images(configs: Configs, bad_rows: dict[str, set[int]], shares: Shares) -> Images:
    """Builds the generators of the training and validation images, without the bad rows of their CSV files."""
    validation_csv = configs.validation_csv or configs.test_csv
    if not configs.validation_csv:
        print(
            f"No validation_csv is given: the test set {configs.test_csv} also selects the best model, "
            "so its metrics will be optimistic."
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


def check_workers_match(team: Team, images: Images, model_path: str, state: dict[str, Any] | None) -> None:
    """Checks that all processes start from the same images, labels and model, and a continued run from its own.

    Raises:
        UserError: they differ.
    """
    if team.size > 1:
        digest = str(hash_model(model_path)) if model_path else ""
        values = {"the images and labels of train_csv": fingerprint(images.training)}
        values |= {"the images and labels of the validation set": fingerprint(images.validation)}
        team.check_workers_match(values | {"the model to start from": digest})
    if state:
        check_same_data(state, *images)


def get_start(
    configs: Configs, training: AugmentedImageSequence, model_path: str, state: dict[str, Any] | None, team: Team
) -> Start:
    """Builds the model, or loads the one to start from, in the scope of the run's strategy."""
    if model_path:
        size = get_input_size(configs)
        with preparing(lambda model: restore_trainable(model, state, configs)):
            loaded = load_fitting_model(model_path, configs.classes, size, with_optimizer=state is not None)
        return Start(strip_views(loaded), loaded.optimizer if state else None)
    model = ModelFactory().get_model(configs)
    if configs.head_initialization != "linear_probe":
        return Start(model)
    if not configs.use_imagenet_weights and not has_fixed_features(model):
        print(
            "Warning: the linear probe is fitted to a backbone of random weights. Its batch normalisation changes the "
            "features as soon as it trains, and the loss may become infinite. Set head_initialization random and "
            "model_selection best_epoch."
        )
    return Start(model, features=HeadFit(configs, model, training, team).start(configs.image_cache_path))
