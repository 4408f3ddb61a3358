"""Runs that older versions began continue to the end that they would have had, and their checkpoints still load.

Each folder in legacy_runs/ is a run that SIGTERM stopped after the first step of epoch 3 of 4;
expected_training_log.csv is the log of the same run without a stop. Both were made by train.py of that version with
the options of configs.json, on the images of `write_sets` (Keras 3.15.1). Files that continuing does not need are
missing; the members of the .keras files are as they were, but deflated. The folders:

`plateau` is from before the modules moved into a package. Its learning rate makes the validation loss rise from the
start, so that the plateau's patience ends only if the epochs on both sides of the stop count. Its model has the parts
of every model of the collection, with a backbone of one convolution, batch normalisation and ReLU.

`interpolated` is from before the package got subpackages: data/recommended.json's options on the first layers of a
MobileNet with random weights.
"""

import re
import shutil
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import pytest

import train
from configs import Configs
from finetune.core.options import UserError

STORED = Path(__file__).parent / "legacy_runs"
COLOURS = {"blue": (90, 100, 150), "green": (95, 140, 100), "red": (150, 100, 90)}
TRAINING = [(name, name) for name, number in (("blue", 10), ("green", 8), ("red", 6)) for _ in range(number)]
# The last three have wrong labels: the more confident the model, the higher the validation loss.
VALIDATION = [(name, name) for name in COLOURS for _ in range(2)]
VALIDATION += [("blue", "green"), ("green", "red"), ("red", "blue")]


def write_sets(folder):
    """Writes PNGs of noise around a colour, which all decoders read alike, and the tables of the runs."""
    rng = np.random.default_rng(0)
    for name, images in (("training", TRAINING), ("validation", VALIDATION)):
        rows = [(f"{name}_{number:02d}.png", label) for number, (_, label) in enumerate(images)]
        for (path, _), (colour, _) in zip(rows, images, strict=True):
            pixels = rng.integers(-80, 81, (32, 32, 3)) + COLOURS[colour]
            cv2.imwrite(str(folder / path), pixels.astype(np.uint8)[..., ::-1])
        pd.DataFrame(rows, columns=["path", "class"]).to_csv(folder / f"{name}_set.csv", index=False)


@pytest.fixture
def copy_run(tmp_path, monkeypatch):
    """Copies a stored run and its images into the working directory."""

    def copy(name):
        folder = tmp_path / "saved_model"
        shutil.copytree(STORED / name, folder)
        (folder / "expected_training_log.csv").unlink()
        write_sets(tmp_path)
        monkeypatch.chdir(tmp_path)
        return folder

    return copy


def continue_run(**options):
    configs = Configs.from_json("saved_model/configs.json").replace(load_model_path="saved_model", **options)
    return train.main(configs.validate())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "best_epoch"), [("plateau", 2), ("interpolated", 0)])
def test_a_legacy_run_continues_to_the_same_end(copy_run, capsys, name, best_epoch):
    folder = copy_run(name)
    stored = pd.read_csv(folder / "training_log.csv")
    expected = pd.read_csv(STORED / name / "expected_training_log.csv")
    results = continue_run()
    printed = capsys.readouterr().out
    assert "latest_model.keras after 2 epochs and 1 steps." in printed
    log = pd.read_csv(folder / "training_log.csv")
    assert log["epoch"].tolist() == expected["epoch"].tolist() == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(log[:2], stored, check_exact=True)
    assert log["learning_rate"].tolist() == expected["learning_rate"].tolist()
    assert log["learning_rate"].nunique() > 1
    assert set(log) == set(expected)
    for column in expected:
        # The run began on another processor, which rounds differently.
        assert log[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-3), column
    assert results["best_epoch"] == best_epoch
    assert results["best"] == expected["val_accuracy"].max()
    # In plateau, the best epoch is before the stop, and its model is not stored. In interpolated, the start is kept,
    # and written at the end of the run.
    assert (folder / "best_model.keras").exists() == (name == "interpolated")
    model = keras.models.load_model(folder / "latest_model.keras")
    assert int(model.optimizer.iterations) == 4 * 3
    if name == "interpolated":
        # The start, two averages, and the last epoch with a refitted head.
        (line,) = re.findall(r"Log loss .*", printed)
        losses = [float(loss) for loss in re.findall(r"\d+% (\d\.\d+)", line)]
        assert losses == pytest.approx([0.8859, 0.8854, 0.8867, 0.8830], rel=1e-3)


@pytest.mark.parametrize("name", ["plateau", "interpolated"])
def test_a_legacy_checkpoint_loads_and_keeps_stretching_its_images(copy_run, name):
    folder = copy_run(name)
    with pytest.raises(UserError, match="resize_mode was 'stretch', now 'crop'"):
        continue_run(resize_mode="crop")
    model = keras.models.load_model(folder / "latest_model.keras")
    assert int(model.optimizer.iterations) == 2 * 3 + 1
    if name == "plateau":
        assert [layer.name for layer in model.layers] == ["image", "preprocessing", "backbone", "classifier"]
    images = np.stack([cv2.imread(f"validation_{number:02d}.png")[..., ::-1] for number in range(6)])
    assert model.predict(images, verbose=0).argmax(axis=1).tolist() == [0, 0, 1, 1, 2, 2]
