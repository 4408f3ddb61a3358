"""The options that make better models: phases, schedules, averages, accumulation, features that are computed once."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from test_resume import assert_same_run, options_of, start, tables  # noqa: F401 - a fixture

from configs import Configs
from finetune import phases, training
from finetune.callbacks import RangeTest, Schedule
from finetune.freezing import has_fixed_features, leaf_layers, prepare_backbone
from finetune.images import read_image, resize_image
from finetune.interruption import Interruption
from finetune.optimizers import find_averages
from finetune.options import UserError
from finetune.phases import Phase, run_phase
from finetune.trainer import TrainingModel
from finetune.training_state import read_state
from model import ModelFactory


def weights_of(folder, name="latest_model.keras"):
    model = keras.models.load_model(Path(folder) / name)
    return [np.array(variable) for variable in model.weights]


def flat_model(optimizer, **attributes):
    """A model of two dense layers, `backbone` and `head`, whose loss is its output times the label."""
    inputs = keras.Input((1, 1, 2))
    features = keras.layers.Flatten()(inputs)
    slow = keras.layers.Dense(2, kernel_initializer="ones", name="backbone")
    outputs = keras.layers.Dense(1, kernel_initializer="ones", name="head")(slow(features))
    model = TrainingModel(inputs, outputs)
    model.slow_layers = (slow,)
    for name, value in attributes.items():
        setattr(model, name, value)
    model.compile(optimizer, lambda labels, outputs: outputs[:, 0] * tf.cast(labels, tf.float32), [])
    return model


def train_step(model, images, labels):
    number = len(images)
    batch = (np.array(images, np.float32).reshape(-1, 1, 1, 2), np.array(labels), np.ones(number, np.float32))
    model._train_on((*batch, np.array([0, number], np.int32), np.float32(number)), Interruption())


def kernels(model):
    return [model.get_layer(name).kernel.numpy() for name in ("backbone", "head")]


def test_accumulated_batches_make_the_step_of_the_whole_batch():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(7, 2)), rng.normal(size=7).astype(np.float32)
    whole, parts = flat_model(keras.optimizers.SGD(0.1)), flat_model(keras.optimizers.SGD(0.1), batch_size=3)
    for model in (whole, parts):
        train_step(model, images, labels)
        assert int(model.optimizer.iterations.numpy()) == 1
    for one, other in zip(kernels(whole), kernels(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert not np.allclose(one, 1)
    assert whole.loss_sums[1] == parts.loss_sums[1] == 7
    assert whole.loss_sums[0] == pytest.approx(parts.loss_sums[0])


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.Lion])
def test_the_backbone_learns_at_a_fraction_of_the_rate(optimizer):
    whole, slow = flat_model(optimizer(0.1)), flat_model(optimizer(0.1), multiplier=0.25)
    for model in (whole, slow):
        train_step(model, [[1.0, 2.0]], [1.0])
    np.testing.assert_allclose(kernels(slow)[0] - 1, (kernels(whole)[0] - 1) / 4, rtol=1e-5)
    np.testing.assert_allclose(kernels(slow)[1], kernels(whole)[1], rtol=1e-6)


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_averages_follow_the_weights_that_the_model_has_had(multiplier):
    model = flat_model(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9), multiplier=multiplier)
    variables, expected = model.trainable_variables, None
    for step in range(3):
        train_step(model, [[1.0, 2.0]], [1.0 + step])
        now = [variable.numpy() for variable in variables]
        before = now if expected is None else expected
        expected = [0.9 * one + 0.1 * other for one, other in zip(before, now, strict=True)]
        found = [average.numpy() for average in find_averages(model.optimizer, variables)]
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


def schedule(kind, warmup=0.0, first=0, end=4, rate=0.1, minimum=0.01, steps=5):
    sequence = SimpleNamespace(steps=steps, first_step=0)
    return Schedule(Phase(first, end, rate, False), sequence, kind, warmup, minimum)


def test_cosine_falls_from_the_rate_to_the_minimum():
    rates = [schedule("cosine").get_rate(step) for step in range(20)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.01)
    assert rates[5] == pytest.approx(0.01 + 0.09 * (1 + math.cos(math.pi * 5 / 19)) / 2)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("kind", "after"), [("constant", 0.1), ("plateau", None), ("cosine", 0.1)])
def test_warm_up_rises_linearly(kind, after):
    rates = [schedule(kind, warmup=2.0).get_rate(step) for step in range(11)]
    np.testing.assert_allclose(rates[:10], [0.01 * (step + 1) for step in range(10)])
    assert rates[10] == after


def test_a_schedule_counts_from_the_first_epoch_of_its_phase():
    one = schedule("cosine", first=3, end=5)
    one.set_model(SimpleNamespace(optimizer=SimpleNamespace(learning_rate=None)))
    one.on_epoch_begin(4)
    one.sequence.first_step = 2
    one.on_train_batch_begin(1)
    assert one.model.optimizer.learning_rate == schedule("cosine", first=0, end=2).get_rate(5 + 2 + 1)


@pytest.mark.slow
def test_frozen_layers_have_no_gradient_and_no_optimizer_memory(tables, tmp_path):  # noqa: F811
    memory = {}
    for layers in (-1, 1, 0):
        options = options_of(tables, tmp_path / str(layers), num_epochs=1, conv_layers_to_train=layers)
        start(**options)
        model = keras.models.load_model(tmp_path / str(layers) / "latest_model.keras")
        memory[layers] = sum(math.prod(variable.shape) for variable in model.optimizer.variables)
        trained = sum(math.prod(variable.shape) for variable in model.trainable_variables)
        # Adam: two moments of each weight, the number of steps and the learning rate.
        assert memory[layers] == 2 * trained + 2
    assert memory[0] < memory[1] < memory[-1]


def test_freeze_batch_norm_leaves_its_weights_and_statistics(tables, tmp_path):  # noqa: F811
    options = options_of(tables, tmp_path / "run", num_epochs=1, freeze_batch_norm=True)
    start(**options)
    configs = Configs(**options | {"classes": ["blue", "green", "red"]})
    keras.utils.set_random_seed(0)
    fresh = ModelFactory().get_model(configs)
    trained = keras.models.load_model(tmp_path / "run" / "latest_model.keras")
    norms = [
        [layer for layer in leaf_layers(model.get_layer("backbone")) if "BatchNorm" in type(layer).__name__]
        for model in (fresh, trained)
    ]
    assert len(norms[0]) == len(norms[1]) > 2
    for one, other in zip(*norms, strict=True):
        for before, after in zip(one.weights, other.weights, strict=True):
            np.testing.assert_array_equal(before.numpy(), after.numpy())


PHASES = {"num_epochs": 4, "head_epochs": 2, "learning_rate": 1e-2, "fine_tune_learning_rate": 1e-3}
PHASES |= {"augmentation_strength": "light"}


@pytest.mark.slow
def test_head_epochs_leave_the_backbone_alone_and_the_rest_trains_it(tables, tmp_path):  # noqa: F811
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
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_with_every_option_continues_to_the_same_bits(tables, tmp_path, stop):  # noqa: F811
    # The cosine ends with the run: what is stopped must be a run of as many epochs.
    whole, run = options_of(tables, tmp_path / "whole", **EVERY), options_of(tables, tmp_path / "run", **EVERY)
    start(**whole)
    original = run_phase

    class Stop(Exception):
        pass

    class StopAfter(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch + 1 == stop:
                raise Stop

    def fit(model, training, validation, phase, state, callbacks, interruption):
        original(model, training, validation, phase, state, [*callbacks, StopAfter()], interruption)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_phase", fit)
        with pytest.raises(Stop):
            start(**run)
    start(**run | {"load_model_path": str(tmp_path / "run" / "latest_model.keras")})
    assert_same_run(tmp_path / "whole", tmp_path / "run", ["latest_model.keras"])
    for one, other in zip(*(weights_of(tmp_path / name, "best_model.keras") for name in ("whole", "run")), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_the_best_model_holds_the_averages_and_starts_no_resume(tables, tmp_path, capsys):  # noqa: F811
    options = options_of(tables, tmp_path / "run", num_epochs=1, ema_decay=0.9)
    start(**options)
    latest = keras.models.load_model(tmp_path / "run" / "latest_model.keras")
    best = keras.models.load_model(tmp_path / "run" / "best_model.keras")
    averages = find_averages(latest.optimizer, latest.trainable_variables)
    for average, kept in zip(averages, best.trainable_variables, strict=True):
        np.testing.assert_array_equal(average.numpy(), kept.numpy())
    assert read_state(str(tmp_path / "run" / "best_model.keras")) is None


@pytest.mark.slow
def test_features_computed_once_train_the_head_as_images_do(tables, tmp_path, monkeypatch):  # noqa: F811
    options = {"conv_layers_to_train": 0, "augmentation_strength": "none", "num_epochs": 3}
    start(**options_of(tables, tmp_path / "features", **options))
    monkeypatch.setattr(phases, "trains_on_features", lambda *_: False)
    start(**options_of(tables, tmp_path / "images", **options))
    logs = [pd.read_csv(tmp_path / name / "training_log.csv") for name in ("features", "images")]
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-4, atol=1e-5)
    for one, other in zip(weights_of(tmp_path / "features"), weights_of(tmp_path / "images"), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_only_a_backbone_that_is_frozen_and_without_dropout_has_fixed_features():
    def classifier(name, layers):
        configs = Configs(visual_model_name=name, use_imagenet_weights=False, classes=["a", "b"])
        configs.image_target_size = (64, 64, 3)
        model = ModelFactory().get_model(configs)
        prepare_backbone(model.get_layer("backbone"), layers, None)
        return model

    assert has_fixed_features(classifier("MobileNet", 0))
    assert not has_fixed_features(classifier("MobileNet", 1))
    assert not has_fixed_features(classifier("EfficientNetB0", 0))


def test_linear_probe_then_train_starts_above_a_random_head(tables, tmp_path, capsys):  # noqa: F811
    options = {"conv_layers_to_train": 0, "augmentation_strength": "none", "num_epochs": 1, "learning_rate": 1e-6}
    start(**options_of(tables, tmp_path / "probe", head_initialization="linear_probe", **options))
    start(**options_of(tables, tmp_path / "random", **options))
    losses = [pd.read_csv(tmp_path / name / "training_log.csv")["loss"][0] for name in ("probe", "random")]
    assert losses[0] < losses[1]
    assert "The head starts from a logistic regression on" in capsys.readouterr().out


@pytest.mark.slow
def test_training_that_makes_the_probe_worse_leaves_it_the_best_model(tables, tmp_path, capsys):  # noqa: F811
    options = options_of(tables, tmp_path / "run", head_initialization="linear_probe", learning_rate=10.0, num_epochs=1)
    found = start(**options | {"optimizer_type": "SGD"})
    printed = capsys.readouterr().out
    assert found["best_epoch"] == 0
    assert f"The head's start: val_accuracy {found['best']:.4f}." in printed
    assert f"Best val_accuracy: {found['best']:.4f} in epoch 0." in printed
    best = keras.models.load_model(tmp_path / "run" / "best_model.keras")
    table = pd.read_csv(tables[1])
    images = np.stack([read_image(path, (32, 32)) for path in table["path"]])
    images = np.stack([resize_image(image, (32, 32)) for image in images])
    expected = np.array(sorted(set(table["class"])))[best.predict(images, verbose=0).argmax(axis=1)] == table["class"]
    assert expected.mean() == pytest.approx(found["best"])


@pytest.mark.slow
def test_range_test_suggests_a_rate_and_trains_nothing(tables, tmp_path, capsys):  # noqa: F811
    # Without rate and noise of its own: one step an epoch, of all images as they are.
    options = options_of(tables, tmp_path / "run", find_learning_rate=True, classifier_layer_sizes=[], batch_size=27)
    options |= {"augmentation_strength": "none"}
    found = start(**options)
    assert 1e-7 < found["suggestion"] < 1
    assert (tmp_path / "run" / "learning_rate.png").stat().st_size > 1000
    assert not (tmp_path / "run" / "latest_model.keras").exists()
    assert f"Suggested learning_rate: {found['suggestion']:.2g}" in capsys.readouterr().out


def test_range_test_notes_the_losses_of_each_step_and_stops():
    test = RangeTest(1e-3, 1.0, steps=4)
    test.set_model(SimpleNamespace(optimizer=SimpleNamespace(learning_rate=None), loss_sums=np.zeros(2)))
    test.on_epoch_begin(0)
    for step, loss in enumerate([2.0, 1.0, 9.0]):
        test.on_train_batch_begin(step)
        assert test.model.optimizer.learning_rate == pytest.approx(10.0 ** (step - 3))
        test.model.loss_sums = np.add(test.model.loss_sums, [loss * 3, 3])
        test.on_train_batch_end(step)
    assert test.losses == [2, 1, 9]
    assert test.model.stop_training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fine_tune_learning_rate": 1e-4}, "fine_tune_learning_rate: 0.0001 has no effect without head_epochs"),
        ({"loss": "focal"}, "loss: focal has no effect without multi_label_classification True"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected a number at least 0 and below 1"),
        ({"learning_rate_schedule": "step"}, "learning_rate_schedule: expected one of"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected"),
    ],
)
def test_options_that_cannot_be_are_told(options, message):
    with pytest.raises(UserError) as found:
        Configs(**options).validate()
    assert message in str(found.value)


def test_recommended_configs_hold_only_options_of_the_project():
    path = Path(__file__).parent.parent / "data" / "recommended.json"
    assert Configs.from_json(str(path)).validate()
    assert json.loads(path.read_text()).keys() <= Configs.options().keys()
