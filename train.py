"""Trains a classifier on the images of train_csv; all it writes goes to save_model_path.

With load_model_path it continues a run, and ends with the model that the run would have given without a stop.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from configs import Configs, UserError, run_script

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from callbacks import Checkpoint, Interruption
    from generator import AugmentedImageSequence, Shares
    from utils import Team

# What a run writes, as patterns: a new run into the same folder may not mix with it.
RUN_FILES = ("best_model.keras", "latest_model.keras", "model_epoch_*.keras", "training_log.*", "best_auroc.log")
RUN_FILES += (".training_stats.json", "configs.json", "logs", "decision.json", "evaluation", "cam_output")


def main(configs: Configs) -> dict:
    """Trains, alone or with the other processes of TF_CONFIG; returns the last epoch's figures and the best."""
    # Imported here, so that --help does not wait for TensorFlow.
    from utils import join_team

    with join_team(configs) as team:
        return train(configs, team)


def train(configs: Configs, team: Team) -> dict:
    """Seeds, reads the data, builds or loads the model, trains; returns the last epoch's figures and the best."""
    from callbacks import Interruption, build_callbacks, check_same_data, locked
    from model import DistributedModel, get_loss
    from utils import build_strategy, check_sets, keep_freed_memory, resolve_class_names, set_gpu_usage, set_seed

    model_path, state, configs = find_start(configs)
    if state and has_ended(state, configs):
        print(f"This run has completed its {state['epochs_completed']} epochs. Raise num_epochs to go on.")
        return {"epochs_completed": state["epochs_completed"], "best": state["best"]}
    bad_rows = check_sets(list_sets(configs), configs, team.is_chief)
    set_gpu_usage(configs.gpu_percentage)
    strategy = build_strategy(configs.distribution_strategy)
    keep_freed_memory()
    configs.random_seed = set_seed(configs.random_seed, configs.deterministic)
    configs.classes = resolve_class_names(
        configs.classes, configs.train_csv, configs.csv_label_column, configs.multi_label_classification
    )
    training, validation = get_generators(configs, bad_rows, get_shares(strategy, team, configs))
    agree_on_start(team, training, validation, model_path)
    if state:
        check_same_data(state, training, validation)
    loss, class_weights = get_loss(configs, training.labels)
    with strategy.scope():
        model = get_model(configs, loss, model_path, state, strategy.num_replicas_in_sync)
    folder = configs.save_model_path
    with locked(folder, team.is_chief), Interruption(isinstance(model, DistributedModel)) as interruption:
        if team.is_chief:
            prepare_folder(configs)
        if configs.show_model_summary:
            model.summary()
        callbacks = build_callbacks(configs, training, validation, loss, interruption, team, state)
        fit(model, training, validation, configs.num_epochs, state, class_weights, callbacks, interruption)
    return report(callbacks[-1], folder)


def find_start(configs: Configs) -> tuple[str, dict[str, Any] | None, Configs]:
    """Finds the model to continue from, if any, the state of its training, if it carries one, and the run's configs."""
    from callbacks import configs_to_continue, read_state
    from utils import resolve_model_path

    refuse_other_run(configs)
    if not configs.load_model_path:
        return "", None, configs
    path = resolve_model_path(configs.load_model_path, preferred=("latest_model.keras", "best_model.keras"))
    state = read_state(path)
    if state is None:
        print(f"{path} carries no training state: its weights are the start of a new run, at epoch 0.")
        return path, None, configs
    steps = f" and {state['steps_completed']} steps" * bool(state["steps_completed"])
    print(f"Continuing {path} after {state['epochs_completed']} epochs{steps}.")
    return path, state, configs_to_continue(configs, state, path)


def refuse_other_run(configs: Configs) -> None:
    """Raises UserError where save_model_path holds models that this run neither continues nor may remove."""
    folder = configs.save_model_path
    held = [path for pattern in RUN_FILES[:3] for path in glob.glob(os.path.join(glob.escape(folder), pattern))]
    if held and not starts_in_own_folder(configs) and not configs.overwrite:
        raise UserError(
            f"{folder} holds the models of another run ({os.path.basename(held[0])}). Continue it with "
            f"--load_model_path {folder}, choose another save_model_path, or remove it with --overwrite True."
        )


def starts_in_own_folder(configs: Configs) -> bool:
    """Tells whether load_model_path leads into save_model_path."""
    path = configs.load_model_path
    source = path if os.path.isdir(path) else os.path.dirname(path)
    return bool(path) and os.path.realpath(source) == os.path.realpath(configs.save_model_path)


def has_ended(state: dict[str, Any], configs: Configs) -> bool:
    """Tells whether a run has nothing left to do: its epochs are over, or it stopped early."""
    from callbacks import stops_early

    epochs = state["epochs_completed"]
    stopped = stops_early(epochs, state["best_epoch"], configs.early_stopping_patience)
    return epochs >= configs.num_epochs or (stopped and not state["steps_completed"])


def list_sets(configs: Configs) -> dict[str, str]:
    """Returns the CSV files of a run's sets by name.

    The test set counts where it is also the validation set, or where its name is the user's choice as that of the
    training set is: an old data/testing_set.csv may be of other images.
    """
    sets = {"training": configs.train_csv, "validation": configs.validation_csv or configs.test_csv}
    is_chosen = "test_csv" in configs.given or "train_csv" not in configs.given
    if configs.validation_csv and is_chosen and os.path.isfile(configs.test_csv):
        sets["test"] = configs.test_csv
    return sets


def get_shares(strategy: tf.distribute.Strategy, team: Team, configs: Configs) -> Shares | None:
    """Finds out which of the devices that train together are this process's, if any do, and prints how many there are.

    Raises:
        UserError: the processes have different numbers of devices.
    """
    from generator import Shares

    if configs.distribution_strategy == "none":
        return None
    devices, batch_size = strategy.num_replicas_in_sync, configs.batch_size
    local = devices // team.size
    team.agree({"the number of devices": local})
    print(f"Devices that train together: {devices}. Images a step: {devices} x {batch_size} = {devices * batch_size}.")
    return Shares(devices, local * team.index, local)


def agree_on_start(
    team: Team, training: AugmentedImageSequence, validation: AugmentedImageSequence, model_path: str
) -> None:
    """Raises UserError in every process where they do not start from the same images, labels and model file."""
    from callbacks import fingerprint
    from utils import hash_file

    if team.size > 1:
        digest = hash_file(model_path).hex() if model_path else ""
        values = {"the images and labels of train_csv": fingerprint(training)}
        values |= {"the images and labels of the validation set": fingerprint(validation)}
        team.agree(values | {"the model to start from": digest})


def get_generators(
    configs: Configs, bad_rows: dict[str, set[int]], shares: Shares | None
) -> tuple[AugmentedImageSequence, AugmentedImageSequence]:
    """Builds the generators of the training and of the validation images, without the bad rows of their CSV files."""
    from utils import get_generator

    validation_csv = configs.validation_csv or configs.test_csv
    if not configs.validation_csv:
        print(
            f"No validation_csv is given: the test set {configs.test_csv} also selects the best model, "
            "so its figures will be optimistic."
        )
    training = get_generator(configs.train_csv, configs.classes, configs, True, bad_rows[configs.train_csv], shares)
    validation = get_generator(validation_csv, configs.classes, configs, False, bad_rows[validation_csv], shares)
    print(f"{len(training.paths)} training images, {len(validation.paths)} validation images.")
    print(f"Classes: {', '.join(configs.classes)}")
    return training, validation


def get_model(
    configs: Configs, loss: Callable, model_path: str, state: dict[str, Any] | None, devices: int
) -> keras.Model:
    """Builds the model, or loads the one to start from, in the scope of the run's strategy.

    With a state, its optimizer goes on too.
    """
    from model import DistributedModel, ModelFactory, compile_model, prepare_backbone
    from utils import load_fitting_model

    factor = devices if configs.scale_learning_rate else 1
    if factor > 1:
        print(f"learning_rate is {configs.learning_rate} times {factor} devices: {configs.learning_rate * factor:g}.")
    optimizer = None
    if not model_path:
        model = ModelFactory().get_model(configs)
    else:
        size = configs.image_target_size[:2]
        model = load_fitting_model(model_path, configs.classes, size, with_optimizer=state is not None)
        if state is not None:
            optimizer = model.optimizer
        elif "backbone" in [layer.name for layer in model.layers]:
            prepare_backbone(model.get_layer("backbone"), configs.conv_layers_to_train, configs.batch_norm_momentum)
    if configs.distribution_strategy != "none":
        model = DistributedModel(model.inputs, model.outputs, name=model.name)
    model = compile_model(model, configs, loss, optimizer)
    if optimizer is None or configs.learning_rate != state["configs"]["learning_rate"]:
        model.optimizer.learning_rate = configs.learning_rate * factor
    return model


def prepare_folder(configs: Configs) -> None:
    """Makes the run's folder ready, and writes its configs into it."""
    from utils import write_json

    clear_folder(configs)
    write_json(os.path.join(configs.save_model_path, "configs.json"), configs.to_dict())


def clear_folder(configs: Configs) -> None:
    """Removes what killed processes left in the run's folder and, to overwrite, the run that it holds.

    A run that goes on loses its thresholds and temperature: they belong to the model that it is about to replace.
    """
    from callbacks import remove_stale_files

    remove_stale_files(configs.save_model_path)
    decision = os.path.join(configs.save_model_path, "decision.json")
    if os.path.isfile(decision):
        os.remove(decision)
        print(f"Removed {decision}: it belongs to the model before. Run test.py after training.")
    if configs.overwrite and not starts_in_own_folder(configs):
        for pattern in RUN_FILES:
            for path in glob.glob(os.path.join(glob.escape(configs.save_model_path), pattern)):
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def fit(
    model: keras.Model,
    training: AugmentedImageSequence,
    validation: AugmentedImageSequence,
    num_epochs: int,
    state: dict[str, Any] | None,
    class_weights: dict[int, float] | None,
    callbacks: list[keras.callbacks.Callback],
    interruption: Interruption,
) -> None:
    """Runs Keras's fit with a progress bar, from the state's step on.

    Raises:
        UserError: an image turns out to be unreadable, or the loss is not finite.
    """
    from model import DistributedModel
    from utils import naming_bad_images

    # How Keras fits on one device, and the same loop on several.
    is_distributed = isinstance(model, DistributedModel)
    options = {"interruption": interruption} if is_distributed else {"shuffle": False}

    def run(first_epoch: int, end: int) -> None:
        """Trains the epochs from `first_epoch` to before `end`, counted from 0."""
        model.fit(
            training.to_dataset(),
            epochs=end,
            initial_epoch=first_epoch,
            class_weight=class_weights,
            callbacks=callbacks,
            **options,
        )

    first_epoch = state["epochs_completed"] if state else 0
    with naming_bad_images(training, validation):
        if state and state["steps_completed"]:
            # The rest of an epoch has fewer steps than those after it: Keras wants a call of its own for each number.
            if not is_distributed:
                model.test_on_batch(*training[0])
            training.first_step = state["steps_completed"]
            run(first_epoch, first_epoch + 1)
            training.first_step, first_epoch = 0, first_epoch + 1
        if first_epoch < num_epochs and not model.stop_training:
            run(first_epoch, num_epochs)


def report(checkpoint: Checkpoint, save_model_path: str) -> dict:
    """Prints the best epoch and where everything is; returns its figures with the last epoch's."""
    if checkpoint.best is None:
        print(f"{checkpoint.monitor} is undefined in every epoch, so no model is the best one.")
    else:
        print(f"Best {checkpoint.monitor}: {checkpoint.best:.4f} in epoch {checkpoint.best_epoch}.")
    print(f"Models and logs are in {save_model_path}")
    return {"best": checkpoint.best, "best_epoch": checkpoint.best_epoch} | checkpoint.log[-1]


if __name__ == "__main__":
    run_script(main)
