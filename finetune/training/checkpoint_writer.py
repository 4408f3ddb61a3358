"""Writing a run's models, each with the state that training continues from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.core.files import duplicate_file
from finetune.models.model_files import build_inference_model
from finetune.training.phases import Phase, is_within
from finetune.training.progress import Progress
from finetune.training.run import Images, Run
from finetune.training.run_folder import fingerprint
from finetune.training.trainer import TrainingModel
from finetune.training.training_state import read_metrics, save_checkpoint, seed_states


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
