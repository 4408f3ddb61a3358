"""Going on with a run: from which checkpoint, with which options, on the same data."""

from __future__ import annotations

import os
from typing import Any

from configs import Configs
from finetune.checkpoints import stops_early
from finetune.labels import look_the_same
from finetune.model_description import OF_BEFORE
from finetune.options import UserError
from finetune.phases import count_epochs
from finetune.run_data import DATA_OPTIONS, locate_data
from finetune.run_folder import (
    BEST_MODEL,
    CONFIGS_FILE,
    LATEST_MODEL,
    find_start_model,
    fingerprint,
    refuse_other_run,
    resolve_model_path,
)
from finetune.training_state import read_state
from finetune.values import quote_difference
from generator import AugmentedImageSequence


def find_start(configs: Configs) -> tuple[str, dict[str, Any] | None, Configs]:
    """Finds the model to continue from, if any, the state of its training, if it carries one, and the run's configs."""
    Configs.check(configs)
    if not (configs.overwrite or configs.find_learning_rate):
        refuse_other_run(configs.save_model_path, configs.load_model_path)
    if not configs.load_model_path:
        return "", None, configs
    path = resolve_model_path(configs.load_model_path, preferred=(LATEST_MODEL, BEST_MODEL))
    state = read_state(path)
    if state is None:
        print(f"{path} carries no training state: its weights are the start of a new run, at epoch 0.")
        return path, None, configs
    steps = f" and {state['steps_completed']} steps" * bool(state["steps_completed"])
    print(f"Continuing {path} after {state['epochs_completed']} epochs{steps}.")
    configs = configs_to_continue(configs, state, path)
    start_path = find_start_model(path)
    if configs.model_selection == "interpolate" and not has_ended(state, configs) and not os.path.isfile(start_path):
        raise UserError(
            f"model_selection interpolate: expected {start_path}, the weights that this run has started from. There is "
            "no such file. Put it back beside the checkpoint, or start a new run."
        )
    return path, state, configs


def has_ended(state: dict[str, Any], configs: Configs) -> bool:
    """Tells whether a run has nothing left to do: its epochs are over, or it stopped early."""
    epochs = state["epochs_completed"]
    stopped = stops_early(epochs, state["best_epoch"], configs.early_stopping_patience, configs.head_epochs)
    return epochs >= configs.num_epochs or (stopped and not state["steps_completed"])


def configs_to_continue(configs: Configs, state: dict[str, Any], model_path: str) -> Configs:
    """Settles each option of a continued run: as it was, or as the user wants it now.

    What the user gives now holds, unless it would change the model or the order of the data; what was given when
    the run began and is not given now holds on; the rest comes from `configs.py`.

    Args:
        configs: those of now.
        state: of the checkpoint.
        model_path: of the checkpoint.

    Returns:
        The configs to go on with; what has changed is printed.

    Raises:
        UserError: names the options that cannot change.
    """
    stored, options = OF_BEFORE | state["configs"], Configs.options()
    kept, faults = locate_from_here(configs, state, model_path), []
    epochs, source = refit_epochs(configs, state)
    if "num_epochs" in configs.given and epochs != configs.num_epochs:
        kept["num_epochs"] = epochs
        print(f"num_epochs {configs.num_epochs} is {epochs} here, by the run's {source}.")
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
            f"{model_path} cannot go on with other options: {'; '.join(faults)}. "
            f"Take the run's own with --configs {os.path.join(os.path.dirname(model_path), CONFIGS_FILE)}, or "
            "start a new run from its weights alone, which compress_weights.py writes."
        )
    given = configs.given
    configs = configs.replace(**kept)
    configs.given = given | set(state["given"])
    return configs


def refit_epochs(configs: Configs, state: dict[str, Any]) -> tuple[int, str]:
    """Returns how many epochs a run has that goes on with `num_epochs`, and the option that they are fitted to.

    Raises:
        UserError: they would have to be fitted to another time.
    """
    stored = state["configs"]
    before = stored.get("time_budget", "")
    budget = configs.time_budget if "time_budget" in configs.given else before
    if budget and budget != before:
        raise UserError(
            f"time_budget: expected {before!r}, for the {stored['num_epochs']} epochs of a run that goes on are fitted "
            f"already. Received: {budget!r}. Leave it out, or give the epochs by --num_epochs and --time_budget ''."
        )
    if budget:
        return stored["num_epochs"], "time_budget"
    epochs = count_epochs(configs.num_epochs, stored.get("min_steps", 0), state.get("steps", 1))
    # On more devices an epoch has fewer steps: that is no reason for more epochs than the run has.
    return min(epochs, max(configs.num_epochs, stored["num_epochs"])), "min_steps"


def locate_from_here(configs: Configs, state: dict[str, Any], model_path: str) -> dict[str, Any]:
    """Returns the run's folder and the paths of its data, as they are from here, that go on as they were.

    Empty where this process was started where the run was: its paths are right as they are.
    """
    stored, folder = state["configs"], os.path.dirname(os.path.abspath(model_path))
    located = locate_data(stored, folder, stored["save_model_path"])
    if located is stored:
        return {}
    located |= {"save_model_path": os.path.dirname(model_path)}
    goes_on = [
        name
        for name in (*DATA_OPTIONS, "save_model_path")
        if name not in configs.given and (name in state["given"] or getattr(configs, name) == stored[name])
    ]
    return {name: located[name] for name in goes_on}


def check_same_data(
    state: dict[str, Any], training: AugmentedImageSequence, validation: AugmentedImageSequence
) -> None:
    """Raises UserError where the tables are not those that a run began with."""
    for option, sequence in (("train_csv", training), ("validation_csv", validation)):
        if state["data"][option] != fingerprint(sequence):
            raise UserError(
                f"The images or labels of {option} are not those that the run began with. Restore the table, "
                "or start a new run from the model's weights in another save_model_path."
            )
    before, now = state.get("devices", 1), training.shares.devices
    if before != now and state["steps_completed"]:
        raise UserError(
            f"The run stopped within an epoch on {before} devices, whose steps are not those of {now}. Go on with "
            f"{before} until the epoch is over, or start a new run from the model's weights."
        )
    if before != now:
        print(f"The number of devices changes from {before} to {now}, and with it the images of a step.")
