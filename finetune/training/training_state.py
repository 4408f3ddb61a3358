"""The training state in a model file, from which training can continue."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from finetune.core.files import atomic_path
from finetune.core.options import LEGACY_NAMES, UserError, rename_legacy
from finetune.models.description import LARGEST_STATE, STATE_MEMBER, add_description, read_member
from finetune.training.trainer import TrainingModel

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
        given = [LEGACY_NAMES.get(name, name) for name in state["given"]]
        return state | {"configs": rename_legacy(state["configs"]), "given": given}
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
