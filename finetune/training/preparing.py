"""Preparing a training run: its configs, image sets, losses and model."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from configs import Configs
from finetune.core.devices import set_seed
from finetune.core.options import UserError
from finetune.core.texts import MOST_TELLING, join_names
from finetune.core.values import get_input_size
from finetune.data.data_check import list_sets
from finetune.data.groups import warn_of_shared_groups
from finetune.data.tables import count_labels, resolve_class_names, warn_of_missing_classes
from finetune.models.description import hash_model
from finetune.models.freezing import has_fixed_features
from finetune.models.losses import get_losses
from finetune.models.model_files import load_fitting_model, strip_views
from finetune.training.head_fit import HeadFit
from finetune.training.resuming import check_same_data
from finetune.training.run import Images, Run, Start
from finetune.training.run_folder import fingerprint
from finetune.training.trainer import Interruption
from finetune.training.workers import Team
from generator import AugmentedImageSequence, Shares, get_generator
from model import ModelFactory


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
