"""Continuing a run: the training state in model files, and from which one, with which options, on the same data."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Sequence, Set
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from configs import Configs
from finetune.core.files import atomic_path, check_folder, duplicate_file, remove_stale_files
from finetune.core.labels import look_the_same
from finetune.core.options import LEGACY_NAMES, UserError, rename_legacy
from finetune.core.values import quote_difference
from finetune.models.description import LARGEST_STATE, LEGACY_DEFAULTS, STATE_MEMBER, add_description, read_member
from finetune.models.kerashub import settle_positions
from finetune.models.model_files import build_inference_model
from finetune.training.callbacks import name_monitor
from finetune.training.run import Images, Phase, Progress, Run, count_epochs, is_within, write_logs
from finetune.training.run_folder import (
    BEST_MODEL,
    CONFIGS_FILE,
    LATEST_MODEL,
    LOG_FILE,
    START_MODEL,
    TABLE_OPTIONS,
    disown_paths,
    find_beside,
    find_home,
    fingerprint,
    gives_other_tables,
    is_fixed,
    leads_into,
    locate_paths,
    locked,
    refuse_other_run,
    relate_path,
)
from finetune.training.trained_model import resolve_model_path
from finetune.training.trainer import TrainingModel
from generator import AugmentedImageSequence
from model import check_registered

STATE_PARTS = {"configs", "given", "data", "epochs_completed", "steps_completed", "best", "best_epoch", "best_aurocs"}
STATE_PARTS |= {"plateau", "seed_states", "metrics", "log"}


def read_state(path: str) -> dict[str, Any] | None:
    """Returns the training state in a model file; None if it has none.

    Raises:
        UserError: the state is damaged; starting over would lose the run.
    """
    try:
        state = read_member(path, STATE_MEMBER, LARGEST_STATE)
        if state is None:
            return None
        if not isinstance(state, dict) or not state.keys() >= STATE_PARTS:
            raise ValueError("it lacks parts")
        configs, given = state["configs"], state["given"]
        if not isinstance(configs, dict) or not isinstance(given, list) or not {*map(type, given)} <= {str}:
            raise ValueError("its options are not options")
        given = [LEGACY_NAMES.get(name, name) for name in given]
        return state | {"configs": rename_legacy(configs), "given": given}
    except ValueError as error:
        raise UserError(f"{path} has a damaged training state: {error}. Use another checkpoint.") from error


def save_checkpoint(model: keras.Model, path: str, state: dict[str, Any] | None, options: dict[str, Any]) -> None:
    """Writes a `.keras` file with the model's description and training state as further members of its archive.

    Args:
        model: to save.
        path: of the file.
        state: of the training; None if training cannot continue from this model.
        options: of the run; those that describe the model are stored.
    """
    settle_positions(model)
    with atomic_path(path) as temporary:
        model.save(temporary)
        add_description(temporary, options)
        if state is not None:
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.writestr(STATE_MEMBER, json.dumps(state))


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """Returns the random states of a model's dropout layers, which `.keras` files do not restore."""
    return [variable for variable in model.variables if variable.name == "seed_generator_state"]


def read_metrics(model: TrainingModel) -> list[Any]:
    """Returns the values of a model's running metrics, summed over devices, and the sums of the loss."""
    values = [np.asarray(variable).tolist() for metric in model.metrics for variable in metric.variables]
    return [*values, model.loss_sums.tolist()]


def restore_metrics(model: TrainingModel, values: Sequence[Any]) -> None:
    """Restores the values of `read_metrics`; the first device takes the sums."""
    variables = [variable for metric in model.metrics for variable in metric.variables]
    *values, loss_sums = values
    model.loss_sums = np.array(loss_sums)

    def assign() -> None:
        is_first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
        for variable, value in zip(variables, values, strict=True):
            variable.assign(np.array(value, dtype=variable.dtype) * tf.cast(is_first, variable.dtype))

    model.distribute_strategy.run(assign)


class CheckpointWriter:
    """Writes the models of a phase, each file atomically, with the whole model and the state to resume from.

    Attributes:
        progress: of the run.
    """

    def __init__(self, run: Run, phase: Phase, sets: Images) -> None:
        self.run = run
        self.folder = run.configs.save_model_path
        self.progress = Progress.read(run.state)
        if not is_within(run.state, phase):
            # Each phase counts its own plateau.
            self.progress.plateau = {}
        self._facts = {
            "configs": run.configs.to_stored(),
            "given": sorted(run.configs.given),
            "data": {"train_csv": fingerprint(sets.training), "validation_csv": fingerprint(sets.validation)},
            "devices": sets.training.shares.devices,
            "steps": sets.training.steps,
            "learning_rate": phase.learning_rate,
        }

    def attach(self, trained: TrainingModel) -> None:
        """Takes the training model of the phase, with its optimizer."""
        self.trained = trained
        configs = self.run.configs
        # With a stock loss, the file loads without this project.
        self._view = build_inference_model(self.run.model, configs.test_time_augmentation)
        stock = "binary_crossentropy" if configs.multi_label_classification else "sparse_categorical_crossentropy"
        self._view.compile(trained.optimizer, loss=stock)

    def get_state(self, epochs_completed: int, steps_completed: int) -> dict[str, Any]:
        """Returns all that resuming needs, except the weights and optimizer variables, which the model file holds.

        `steps_completed` counts the steps of the next epoch.
        """
        return {
            **self._facts,
            "epochs_completed": epochs_completed,
            "steps_completed": steps_completed,
            **dataclasses.asdict(self.progress),
            "seed_states": [np.asarray(variable).tolist() for variable in seed_states(self.trained)],
            "metrics": read_metrics(self.trained) if steps_completed else [],
        }

    def save(self, names: Sequence[str], epochs_completed: int, steps_completed: int, resumes: bool = True) -> None:
        """Writes the model under one or more names; training cannot continue from averaged weights."""
        # Every process takes part: reading the metrics exchanges them.
        state = self.get_state(epochs_completed, steps_completed)
        if not self.run.team.is_chief:
            return
        first, *others = (os.path.join(self.folder, name) for name in names)
        save_checkpoint(self._view, first, state if resumes else None, self._facts["configs"])
        for path in others:
            duplicate_file(first, path)


def find_start(configs: Configs, writes: bool = True) -> tuple[str, dict[str, Any] | None, Configs]:
    """Returns the path and the training state of the model to continue, each if any, and the run's configs.

    The folder is not checked without `writes`: another process of the run writes into it.

    Raises:
        UserError: there is no such model, the run cannot continue with these configs, or its folder cannot be written.
    """
    Configs.check(configs)
    path, state = "", None
    if configs.load_model_path:
        path = resolve_model_path(configs.load_model_path, preferred=(LATEST_MODEL, BEST_MODEL))
        state = read_state(path)
    if state:
        configs = continue_run(configs, state, path)
    elif path:
        print(f"{path} has no training state: its weights are the start of a new run, at epoch 0.")
    check_registered(configs, builds=not path)
    if not (configs.overwrite or configs.find_learning_rate):
        refuse_other_run(configs.save_model_path, path if state else "")
    if writes and not (state and has_ended(state, configs)):
        check_folder(configs.save_model_path, "save_model_path")
    return path, state, configs


def continue_run(configs: Configs, state: dict[str, Any], path: str) -> Configs:
    """Returns the configs to continue a checkpoint's run with, and prints how far it has come.

    Raises:
        UserError: it cannot continue with these configs, or the weights that it started from are missing.
    """
    steps = f" and {state['steps_completed']} steps" * bool(state["steps_completed"])
    print(f"Continuing {path} after {state['epochs_completed']} epochs{steps}.")
    configs = configs_to_continue(configs, state, path)
    start_path = find_beside(path, START_MODEL)
    if configs.model_selection == "interpolate" and not has_ended(state, configs) and not os.path.isfile(start_path):
        raise UserError(
            f"model_selection interpolate: expected {start_path}, the weights that this run has started from. The "
            "file does not exist. Put it back next to the checkpoint, or start a new run."
        )
    return configs


def has_ended(state: dict[str, Any], configs: Configs) -> bool:
    """Returns whether a run has nothing left to do: its epochs are over, or it stopped early."""
    epochs = state["epochs_completed"]
    stopped = stops_early(epochs, state["best_epoch"], configs.early_stopping_patience, configs.head_epochs)
    return epochs >= configs.num_epochs or (stopped and not state["steps_completed"])


def stops_early(epochs_completed: int, best_epoch: int | None, patience: int, head_epochs: int = 0) -> bool:
    """Returns whether the best epoch, or the end of `head_epochs`, is `patience` epochs ago; patience 0 never stops."""
    return bool(patience) and epochs_completed - max(best_epoch or 0, head_epochs) >= patience


def report_end(state: dict[str, Any] | None, configs: Configs) -> dict[str, Any]:
    """Returns the metrics of a run that has nothing left to do, and prints that; empty if it continues."""
    if not state or not has_ended(state, configs):
        return {}
    print(f"This run has completed its {state['epochs_completed']} epochs. Raise num_epochs to continue.")
    return {"epochs_completed": state["epochs_completed"], "best": state["best"]}


def restore_logs(state: dict[str, Any], configs: Configs) -> bool:
    """Writes the logs of a run that was killed between its last checkpoint and them; returns whether it was."""
    folder, progress = configs.save_model_path, Progress.read(state)
    if not leads_into(configs.load_model_path, folder) or count_logged(folder) >= len(progress.log):
        return False
    with locked(folder):
        remove_stale_files(folder)
        write_logs(folder, name_monitor(configs.multi_label_classification), progress)
    print(f"The run was killed before epoch {len(progress.log)} was logged: its logs are complete now.")
    return True


def count_logged(folder: str) -> int:
    """Returns the number of epochs in a run's training log; 0 without one."""
    path = os.path.join(folder, LOG_FILE)
    if not os.path.isfile(path):
        return 0
    with open(path, encoding="utf-8") as file:
        return sum(1 for _ in file) - 1


def configs_to_continue(configs: Configs, state: dict[str, Any], model_path: str) -> Configs:
    """Returns the configs to continue a checkpoint's run with, and prints what changes.

    An option given now counts, unless it would change the model or the order of the data. Next comes what was given
    when the run began, then the default.

    Raises:
        UserError: names the options that cannot change.
    """
    stored, options = LEGACY_DEFAULTS | state["configs"], Configs.options()
    configs = disown_paths(configs, model_path)
    kept, home = locate_from_here(configs, state, model_path)
    faults = []
    epochs, source = refit_epochs(configs, state)
    if "num_epochs" in configs.given and epochs != configs.num_epochs:
        kept["num_epochs"] = epochs
        print(f"num_epochs {configs.num_epochs} becomes {epochs}, by the run's {source}.")
    for name, option in options.items():
        before = tuple(stored[name]) if isinstance(getattr(configs, name), tuple) else stored.get(name)
        now = getattr(configs, name)
        if look_the_same(now, before) or name not in stored or name in kept or name in ("load_model_path", "overwrite"):
            continue
        is_free_choice = name in ("classes", "random_seed", "pixel_range") and now in (None, [])
        if is_free_choice or (name in state["given"] and name not in configs.given):
            kept[name] = before
        elif option.metadata["describes_model"] or option.metadata["fixed_in_run"]:
            faults.append("{} was {}, now {}".format(name, *quote_difference(before, now)))
        else:
            print(f"{name} changes from {before!r} to {now!r}.")
    if faults:
        raise UserError(
            f"{model_path} cannot continue with other options: {'; '.join(faults)}. "
            f"Use the run's own with --configs {os.path.join(os.path.dirname(model_path), CONFIGS_FILE)}, or "
            "start a new run from its weights alone, which compress_weights.py writes."
        )
    given = configs.given
    configs = configs.replace(**kept)
    configs.given = given | set(state["given"])
    written = tuple(list_stored(configs, given, stored, home).items())
    configs.provenance = configs.provenance._replace(home=home, stored=written)
    return configs


def refit_epochs(configs: Configs, state: dict[str, Any]) -> tuple[int, str]:
    """Returns the number of epochs of a run that continues with `num_epochs`, and the option that decides it.

    Raises:
        UserError: a different time budget is given.
    """
    stored = state["configs"]
    before = stored.get("time_budget", "")
    budget = configs.time_budget if "time_budget" in configs.given else before
    if budget and budget != before:
        raise UserError(
            f"time_budget: expected {before!r}, since a continued run keeps its {stored['num_epochs']} epochs. "
            f"Received: {budget!r}. Leave it out, or set --num_epochs with --time_budget ''."
        )
    if budget:
        return stored["num_epochs"], "time_budget"
    epochs = count_epochs(configs.num_epochs, stored.get("min_steps", 0), state.get("steps", 1))
    # On more devices an epoch has fewer steps, which must not give the run more epochs.
    return min(epochs, max(configs.num_epochs, stored["num_epochs"])), "min_steps"


def locate_from_here(configs: Configs, state: dict[str, Any], model_path: str) -> tuple[dict[str, Any], str]:
    """Finds the folder and the data of a continued run from here; prints where its relative paths start.

    Returns:
        The paths that are not given now, by option: the run continues next to its checkpoint. And the folder in which
        the run's relative paths start, empty for the working directory.
    """
    stored, folder = state["configs"], os.path.dirname(os.path.abspath(model_path))
    home = find_home(stored, folder, stored["save_model_path"])
    located = locate_paths(stored, home)
    if not stored["image_directory"] and gives_other_tables(configs, stored | located):
        # The paths in a given table start here, not where the run was started.
        located.pop("image_directory", None)
        if all(name in configs.given for name in TABLE_OPTIONS if stored[name]):
            home, located = "", {}
    kept = {
        name: path
        for name, path in located.items()
        if name not in configs.given and (name in state["given"] or getattr(configs, name) == stored[name])
    }
    if "save_model_path" not in configs.given:
        kept["save_model_path"] = os.path.dirname(model_path) or os.curdir
    home = home if located else ""
    if home:
        print(f"The run's relative paths start in {home}.")
    return kept, home


def list_stored(configs: Configs, given: Set[str], before: dict[str, Any], home: str) -> dict[str, Any]:
    """Returns the paths that a continued run stores instead of those in use: as given, not as found from here.

    Args:
        configs: to continue with.
        given: the options that the user gives now.
        before: the options as the run has stored them.
        home: the folder in which the run's relative paths start; empty for the working directory.
    """
    # The model that the run began with, not its own checkpoint.
    stored, located = {"load_model_path": before.get("load_model_path", "")}, locate_paths(before, home)
    for name in (*TABLE_OPTIONS, "image_directory"):
        path = getattr(configs, name)
        if path == located.get(name):
            stored[name] = before[name]
        elif home and not is_fixed(path) and (path or name == "image_directory"):
            stored[name] = relate_path(path, home)
    if "save_model_path" not in given or (home and not os.path.isabs(configs.save_model_path)):
        stored["save_model_path"] = relate_path(configs.save_model_path, home or os.getcwd())
    return stored


def check_same_data(
    state: dict[str, Any], training: AugmentedImageSequence, validation: AugmentedImageSequence
) -> None:
    """Raises UserError if a run began with other tables, or with other devices within the current epoch."""
    for option, sequence in (("train_csv", training), ("validation_csv", validation)):
        if state["data"][option] != fingerprint(sequence):
            raise UserError(
                f"The images or labels of {option} are not those that the run began with. Restore the table, "
                "or start a new run from the model's weights in another save_model_path."
            )
    before, now = state.get("devices", 1), training.shares.devices
    if before != now and state["steps_completed"]:
        raise UserError(
            f"The run stopped within an epoch on {before} devices: expected {before}. Received: {now}. Use {before} "
            "until the epoch is over, or start a new run from the model's weights."
        )
    if before != now:
        print(f"The number of devices changes from {before} to {now}, and with it the images of a step.")
