"""Phases: frozen layers, head epochs, features that are computed once, the probe, refitted heads."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers
from probed_photos import build
from small_runs import (
    assert_same_run,
    options_of,
    read_weights,
    start,
    stop_at,  # noqa: F401
    tables,  # noqa: F401
)

from configs import Configs
from finetune.data.images import read_image, resize_image
from finetune.models.backbones import prepare_backbone
from finetune.training import run
from finetune.training.run import Phase, describe_phase, refits_head
from generator import Shares
from model import ModelFactory


@pytest.mark.slow
def test_frozen_layers_have_no_gradient_and_no_optimizer_memory(tables, tmp_path):
    memory = {}
    for number in (-1, 1, 0):
        options = options_of(tables, tmp_path / str(number), num_epochs=1, conv_layers_to_train=number)
        start(**options)
        model = keras.models.load_model(tmp_path / str(number) / "latest_model.keras")
        memory[number] = sum(math.prod(variable.shape) for variable in model.optimizer.variables)
        trained = sum(math.prod(variable.shape) for variable in model.trainable_variables)
        # Adam: two moments of each weight, the number of steps and the learning rate.
        assert memory[number] == 2 * trained + 2
    assert memory[0] < memory[1] < memory[-1]


def test_a_phase_is_described():
    frozen = layers.Dense(4, trainable=False)
    model = keras.Sequential([keras.Input((3,)), frozen, layers.Dropout(0.5), layers.Dense(2)])
    training = SimpleNamespace(steps=20, batch_size=8, shares=Shares(2, 0, 2))
    # Of 3 x 4 + 4 frozen parameters, and 4 x 2 + 2 that learn.
    shown = describe_phase(Phase(0, 3, 1e-3, True), model, training)
    assert shown == "Epochs 1 to 3: 20 steps of 16 images each; 10 of 26 parameters are trained."
    assert describe_phase(Phase(3, 4, 1e-3, False), model, training).startswith("Epoch 4: 20 steps")


PHASES = {"num_epochs": 4, "head_epochs": 2, "learning_rate": 1e-2, "fine_tune_learning_rate": 1e-3}
PHASES |= {"augmentation_strength": "light"}


@pytest.mark.slow
def test_head_epochs_freeze_the_backbone_and_the_others_train_it(tables, tmp_path):
    start(**options_of(tables, tmp_path / "head", **PHASES | {"num_epochs": 2}))
    start(**options_of(tables, tmp_path / "all", **PHASES))
    fresh = Configs(**options_of(tables, tmp_path / "fresh", **PHASES), classes=["blue", "green", "red"])
    keras.utils.set_random_seed(0)
    before = ModelFactory().get_model(fresh).get_layer("backbone").get_weights()
    models = [keras.models.load_model(tmp_path / name / "latest_model.keras") for name in ("head", "all")]
    head, whole = (model.get_layer("backbone").get_weights() for model in models)
    for one, other in zip(before, head, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(not np.array_equal(one, other) for one, other in zip(before, whole, strict=True))
    rates = pd.read_csv(tmp_path / "all" / "training_log.csv")["learning_rate"]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 1e-3, 1e-3], rtol=1e-6)


EVERY = PHASES | {"learning_rate_schedule": "cosine", "warmup_epochs": 0.5, "weight_decay": 0.01, "ema_decay": 0.9}
EVERY |= {"gradient_accumulation_steps": 2, "batch_size": 2, "mixup_alpha": 0.2, "cutmix_alpha": 1.0}
EVERY |= {"optimizer_type": "AdamW", "label_smoothing": 0.1, "backbone_learning_rate_multiplier": 0.1}


@pytest.mark.slow
def test_a_run_with_every_option_continues_to_the_same_bits(tables, tmp_path, stop_at):
    """It is stopped in the head's first epoch, in the last step before its second phase, and in that phase."""
    start(**options_of(tables, tmp_path / "whole", **EVERY))
    run = options_of(tables, tmp_path / "run", **EVERY)
    for stop in ((0, 2), (1, 6), (3, 1)):
        assert stop_at(*stop, **run) == 143
        run |= {"load_model_path": str(tmp_path / "run")}
    start(**run)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_features_computed_once_train_the_head_as_images_do(tables, tmp_path, monkeypatch):
    options = {"conv_layers_to_train": 0, "augmentation_strength": "none", "num_epochs": 2}
    start(**options_of(tables, tmp_path / "features", **options))
    monkeypatch.setattr(run, "trains_on_features", lambda *_: False)
    start(**options_of(tables, tmp_path / "images", **options))
    logs = [pd.read_csv(tmp_path / name / "training_log.csv") for name in ("features", "images")]
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-4, atol=1e-5)
    found = (read_weights(tmp_path / name / "latest_model.keras") for name in ("features", "images"))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_linear_probe_then_train_starts_above_a_random_head(tables, tmp_path, capsys):
    options = {"conv_layers_to_train": 0, "augmentation_strength": "none", "num_epochs": 1, "learning_rate": 1e-6}
    start(**options_of(tables, tmp_path / "probe", head_initialization="linear_probe", **options))
    start(**options_of(tables, tmp_path / "random", **options))
    losses = [pd.read_csv(tmp_path / name / "training_log.csv")["loss"][0] for name in ("probe", "random")]
    assert losses[0] < losses[1]
    assert "The head starts from a logistic regression on" in (printed := capsys.readouterr().out)
    assert "Warning: the linear probe" not in printed


@pytest.mark.slow
def test_training_that_makes_the_probe_worse_leaves_it_the_best_model(tables, tmp_path, capsys):
    options = options_of(tables, tmp_path / "run", head_initialization="linear_probe", learning_rate=10.0, num_epochs=1)
    found = start(**options | {"optimizer_type": "SGD"})
    printed = capsys.readouterr().out
    assert found["best_epoch"] == 0
    assert f"The start, epoch 0: val_accuracy {found['best']:.4f}." in printed
    assert f"Best val_accuracy: {found['best']:.4f} in epoch 0." in printed
    best = keras.models.load_model(tmp_path / "run" / "best_model.keras")
    table = pd.read_csv(tables[1])
    images = np.stack([read_image(path, (32, 32)) for path in table["path"]])
    images = np.stack([resize_image(image, (32, 32)) for image in images])
    expected = np.array(sorted(set(table["class"])))[best.predict(images, verbose=0).argmax(axis=1)] == table["class"]
    assert expected.mean() == pytest.approx(found["best"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"model_selection": "last_epoch"}, False),
        ({"multi_label_classification": True}, False),
        # The features, and so the regression, stay the same.
        ({"conv_layers_to_train": 0}, False),
        ({"classifier_layer_sizes": [16]}, False),
    ],
)
def test_heads_are_refitted_if_the_backbone_learns_single_labels(options, expected):
    configs = Configs(**{"model_selection": "interpolate"} | options)
    model = build(layer_sizes=configs.classifier_layer_sizes, multi_label=configs.multi_label_classification)
    prepare_backbone(model.get_layer("backbone"), configs.conv_layers_to_train, None)
    assert refits_head(configs, model) is expected


@pytest.mark.slow
def test_the_learning_rate_finder_suggests_a_rate_and_trains_nothing(tables, tmp_path, capsys):
    # Without noise: one step an epoch, of all images as they are.
    options = options_of(tables, tmp_path / "run", find_learning_rate=True, classifier_layer_sizes=[], batch_size=27)
    options |= {"augmentation_strength": "none"}
    found = start(**options)
    assert 1e-7 < found["suggestion"] < 1
    assert (tmp_path / "run" / "learning_rate.png").stat().st_size > 1000
    assert not (tmp_path / "run" / "latest_model.keras").exists()
    assert f"Suggested learning_rate: {found['suggestion']:.2g}" in capsys.readouterr().out


def test_recommended_configs_hold_only_options_of_the_project():
    path = Path(__file__).resolve().parents[2] / "data" / "recommended.json"
    assert Configs.from_json(str(path)).validate()
    assert json.loads(path.read_text()).keys() <= Configs.options().keys()
