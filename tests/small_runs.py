"""Runs of a network of a few layers, and whether two ended the same."""

import os
import signal
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

import train
from configs import Configs
from finetune.training.resuming import read_state
from generator import AugmentedImageSequence

# A backbone cut to its first layers: the tests are about the training around it.
TINY = {"visual_model_name": "MobileNet", "pop_conv_layers": 75, "final_layer_pooling": "max"}


@pytest.fixture(scope="session")
def tables(photo_folder, tmp_path_factory):
    """Training and validation tables of 27 and 9 photos: 9 full steps an epoch at a batch size of 3, traced once."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [(str(path), path.parent.name) for path in sorted(photo_folder.glob("*/*.jpg"))]
    table = pd.DataFrame(rows, columns=["path", "class"])
    in_validation = table.index % 4 == 3
    table[~in_validation].to_csv(folder / "training_set.csv", index=False)
    table[in_validation].to_csv(folder / "testing_set.csv", index=False)
    return folder / "training_set.csv", folder / "testing_set.csv"


def options_of(tables, save_model_path, **options):
    values = {
        "train_csv": str(tables[0]),
        "test_csv": str(tables[1]),
        "image_target_size": (32, 32, 3),
        "use_imagenet_weights": False,
        "num_epochs": 3,
        "batch_size": 3,
        "show_model_summary": False,
        "generator_workers": 2,
        "deterministic": True,
        "reduce_lr_patience": 1,
        "save_model_path": str(save_model_path),
    }
    return values | TINY | options


def start(**options):
    return train.main(Configs(**options).validate())


def read_weights(path):
    model = keras.models.load_model(path)
    return [variable.numpy() for variable in (*model.weights, *model.optimizer.variables)]


def assert_same_run(first, second, model_names=("best_model.keras", "latest_model.keras")):
    """Asserts that two runs have the same log and, bit by bit, the same models and states."""
    first, second = Path(first), Path(second)
    assert (first / "training_log.csv").read_bytes() == (second / "training_log.csv").read_bytes()
    for name in model_names:
        expected, found = (read_weights(folder / name) for folder in (first, second))
        assert len(expected) == len(found) > 10
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)
        states = [read_state(str(folder / name)) for folder in (first, second)]
        if states == [None, None]:
            continue  # averaged weights
        for key in ("epochs_completed", "steps_completed", "best", "best_epoch", "plateau", "seed_states", "log"):
            assert states[0][key] == states[1][key]


@pytest.fixture(scope="session")
def uninterrupted(tables, tmp_path_factory):
    """The folder of a finished run of three epochs."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "saved_model"
    start(**options_of(tables, folder))
    return folder


@pytest.fixture
def stop_at():
    """Returns a function that runs until this process gets a signal, as a batch of an epoch is made."""

    def run_until(epoch, index, number=signal.SIGTERM, **options):
        original = AugmentedImageSequence.__getitem__

        def make_batch(self, position):
            if self.shuffle and (self.epoch, position + self.first_step) == (epoch, index):
                os.kill(os.getpid(), number)
                time.sleep(0.1)
            return original(self, position)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AugmentedImageSequence, "__getitem__", make_batch)
            with pytest.raises(SystemExit) as stopped:
                start(**options)
        return stopped.value.code

    return run_until
