"""The training state in a model file, from which training continues, and writing both."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from finetune.core.files import atomic_path, duplicate_file
from finetune.core.options import LEGACY_NAMES, UserError, rename_legacy
from finetune.models.description import LARGEST_STATE, STATE_MEMBER, add_description, read_member
from finetune.models.kerashub import settle_positions
from finetune.models.model_files import build_inference_model
from finetune.training.phases import Phase, is_within
from finetune.training.run import Images, Progress, Run
from finetune.training.run_folder import fingerprint
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
