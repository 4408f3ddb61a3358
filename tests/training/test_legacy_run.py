"""A run that an earlier version of the collection began goes on, and its checkpoint still loads.

legacy_run/ is the folder of a run that SIGTERM stopped after the first step of epoch 3 of 4, before the modules
moved into a package; expected_training_log.csv is the log of the same run without a stop. Both were made by train.py
with the options of configs.json, on the images that `write_sets` writes. The learning rate is one at which the
validation loss rises from the start, so that the plateau's patience ends only where the epochs on both sides of the
stop count. Left out are best_model.keras and the curves in logs/, which going on does not need; the members of
latest_model.keras are as they were, but deflated, which makes a seventh of it. start.keras, from which the run
started, has the parts of every model of the collection, with one convolution as its backbone (Keras 3.15.1):

    keras.utils.set_random_seed(5)
    inputs = keras.Input((32, 32, 3), name="features")
    outputs = layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name="conv")(inputs)
    outputs = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(outputs))
    backbone = keras.Model(inputs, outputs, name="backbone")
    image = keras.Input((32, 32, 3), name="image")
    outputs = build_classifier(3, False, [0.4], "avg")(backbone(build_preprocessing("tf")(image)))
    keras.Model(image, outputs, name="image_classifier").save("start.keras")
"""

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

STORED = Path(__file__).parent / "legacy_run"
COLOURS = {"blue": (90, 100, 150), "green": (95, 140, 100), "red": (150, 100, 90)}
TRAINING = [(name, name) for name, number in (("blue", 10), ("green", 8), ("red", 6)) for _ in range(number)]
# The last three have wrong labels: the surer the model, the higher the validation loss.
VALIDATION = [(name, name) for name in COLOURS for _ in range(2)]
VALIDATION += [("blue", "green"), ("green", "red"), ("red", "blue")]


def write_sets(folder):
    """Writes PNGs of noise around a colour, which no decoder changes, and the tables that the run was begun with."""
    rng = np.random.default_rng(0)
    for name, images in (("training", TRAINING), ("validation", VALIDATION)):
        rows = [(f"{name}_{number:02d}.png", label) for number, (_, label) in enumerate(images)]
        for (path, _), (colour, _) in zip(rows, images, strict=True):
            pixels = rng.integers(-80, 81, (32, 32, 3)) + COLOURS[colour]
            cv2.imwrite(str(folder / path), pixels.astype(np.uint8)[..., ::-1])
        pd.DataFrame(rows, columns=["path", "class"]).to_csv(folder / f"{name}_set.csv", index=False)


@pytest.fixture
def legacy_run(tmp_path, monkeypatch):
    """A copy of the stored run beside its images, in the working directory."""
    folder = tmp_path / "saved_model"
    shutil.copytree(STORED, folder)
    (folder / "expected_training_log.csv").unlink()
    write_sets(tmp_path)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_legacy_run_goes_on_to_the_same_end(legacy_run, capsys):
    stored = pd.read_csv(legacy_run / "training_log.csv")
    expected = pd.read_csv(STORED / "expected_training_log.csv")
    configs = Configs.from_json("saved_model/configs.json").replace(load_model_path="saved_model")
    results = train.main(configs.validate())
    assert "latest_model.keras after 2 epochs and 1 steps." in capsys.readouterr().out
    log = pd.read_csv(legacy_run / "training_log.csv")
    assert log["epoch"].tolist() == expected["epoch"].tolist() == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(log[:2], stored, check_exact=True)
    assert log["learning_rate"].tolist() == expected["learning_rate"].tolist()
    assert log["learning_rate"].nunique() == 2
    assert set(log) == set(expected)
    for name in expected:
        # The run began on another processor, and each rounds in its own way.
        assert log[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-3), name
    # No later epoch is better than the best one before the stop, whose model is not among the stored files.
    assert results["best_epoch"] == expected["val_accuracy"].idxmax() + 1 == 2
    assert results["best"] == expected["val_accuracy"].max()
    assert not (legacy_run / "best_model.keras").exists()
    model = keras.models.load_model(legacy_run / "latest_model.keras")
    assert int(model.optimizer.iterations) == 4 * 3


def test_a_legacy_run_goes_on_stretching_its_photos(legacy_run):
    configs = Configs.from_json("saved_model/configs.json").replace(load_model_path="saved_model", resize_mode="crop")
    with pytest.raises(UserError, match="resize_mode was 'stretch', now 'crop'"):
        train.main(configs.validate())


def test_a_legacy_checkpoint_loads(legacy_run):
    model = keras.models.load_model(legacy_run / "latest_model.keras")
    assert [layer.name for layer in model.layers] == ["image", "preprocessing", "backbone", "classifier"]
    assert int(model.optimizer.iterations) == 2 * 3 + 1
    images = np.stack([cv2.imread(f"validation_{number:02d}.png")[..., ::-1] for number in range(6)])
    assert model.predict(images, verbose=0).argmax(axis=1).tolist() == [0, 0, 1, 1, 2, 2]
