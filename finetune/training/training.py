"""The steps of a training run, once it is prepared."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from configs import Configs
from finetune.core.files import find_existing
from finetune.core.options import UserError
from finetune.core.texts import show_bytes
from finetune.evaluation.paired_comparison import describe_epoch
from finetune.models.optimizers import build_optimizer
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
from finetune.training.checkpoint_writer import CheckpointWriter
from finetune.training.checkpoints import BeforeValidation, Checkpoint
from finetune.training.head_fit import HeadFit
from finetune.training.learning_rate_finder import suggest_learning_rate
from finetune.training.model_selection import ModelSelection
from finetune.training.phases import (
    Phase,
    describe_phase,
    get_sets,
    get_training_set,
    prepare_phase,
    refits_head,
    run_phase,
    set_trainable,
)
from finetune.training.progress import Progress
from finetune.training.run import Images, Run
from finetune.training.run_folder import (
    BEST_MODEL,
    CURVES_FOLDER,
    LATEST_MODEL,
    MODEL_FILES,
    START_MODEL,
    clear_folder,
    describe_run,
    leads_into,
    list_matches,
    locked,
)
from finetune.training.stopping import FiniteLoss, Stopping, advising_on_bad_images
from finetune.training.time_budget import TimeEstimate, count_views
from finetune.training.trainer import Interruption
from generator import naming_bad_images


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
