"""The saved model: with test-time augmentation inside, and for another image size than that of training."""

import json

import keras
import numpy as np
import pandas as pd
import pytest
from exported_runs import ARTEFACTS, EXPORTS, RUNTIMES, export
from small_runs import assert_same_run, options_of, start, tables  # noqa: F401

import draw_activations
import predict
import test as evaluation
from configs import Configs
from finetune.core.options import UserError
from finetune.data.images import read_image, resize_image
from finetune.models.model_files import build_inference_model, has_views, strip_views
from finetune.training.time_budget import count_views
from finetune.training.trainer import accept_any_size
from generator import AugmentedImageSequence
from model import ModelFactory
from predict import PredictConfigs

FROZEN = {"conv_layers_to_train": 0, "augmentation_strength": "none", "head_initialization": "linear_probe"}
RECIPE = {"head_initialization": "linear_probe", "model_selection": "interpolate", "test_time_augmentation": "flip"}
RECIPE |= {"random_crop_area": [0.6, 1.0], "reduce_lr_patience": 0, "learning_rate_schedule": "one_cycle"}


def read_validation(csv_path, size=(32, 32)):
    table = pd.read_csv(csv_path)
    images = np.stack([resize_image(read_image(path, size), size) for path in table["path"]])
    return images, table["class"].map({"blue": 0, "green": 1, "red": 2}).to_numpy()


def mean_over_views(path, images):
    """Works out a file's answer from the model inside alone."""
    inner = strip_views(keras.models.load_model(path, compile=False))
    assert inner.get_layer("backbone") is not None
    return (inner.predict(images, verbose=0) + inner.predict(images[:, :, ::-1], verbose=0)) / 2


def test_it_answers_with_the_mean_and_has_the_inner_models_weights(tmp_path):
    parts = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(3, activation="softmax")]
    layers = keras.Sequential([keras.Input((8, 8, 3)), *parts])
    inner = keras.Model(layers.inputs, layers.outputs, name="image_classifier")
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    build_inference_model(inner, "flip").save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    views = [np.asarray(inner(view)) for view in (images, images[:, :, ::-1])]
    assert np.abs(views[0] - views[1]).max() > 0.01
    np.testing.assert_allclose(model(images), np.mean(views, axis=0), atol=1e-6)
    assert has_views(model)
    assert model.count_params() == inner.count_params()
    np.testing.assert_allclose(strip_views(model)(images), views[0], atol=1e-6)
    plain = build_inference_model(inner, "none")
    assert strip_views(plain) is plain
    np.testing.assert_array_equal(plain(images), views[0])


@pytest.fixture(scope="module")
def flipped_run(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flipped") / "run"
    start(**options_of(tables, folder, test_time_augmentation="flip", num_epochs=1, random_seed=3))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("trains_on_features", [False, True])
def test_validation_answers_as_the_file_does(trains_on_features, flipped_run, tables, tmp_path):
    folder = flipped_run
    if trains_on_features:
        folder = tmp_path / "run"
        start(**options_of(tables, folder, test_time_augmentation="flip", num_epochs=1, **FROZEN))
    images, truth = read_validation(tables[1])
    expected = mean_over_views(folder / "latest_model.keras", images)
    log = pd.read_csv(folder / "training_log.csv")
    assert log["val_accuracy"].iloc[-1] == pytest.approx((expected.argmax(axis=1) == truth).mean())
    loss = -np.log(expected[np.arange(len(truth)), truth]).mean()
    assert log["val_loss"].iloc[-1] == pytest.approx(loss, rel=1e-4)
    assert "| Test-time augmentation | flip |" in (folder / "MODEL_CARD.md").read_text()


@pytest.mark.slow
def test_exports_answer_as_the_file_does(flipped_run, tables):
    report = export(flipped_run, *EXPORTS)
    assert not any(artefact["rejected"] for artefact in report["artefacts"])
    images, _ = read_validation(tables[1])
    expected = mean_over_views(flipped_run / "best_model.keras", images)
    for name, run in zip(ARTEFACTS, RUNTIMES.values(), strict=True):
        np.testing.assert_allclose(run(flipped_run / name, images.astype(np.float32)), expected, atol=1e-5)


@pytest.mark.slow
def test_another_run_may_start_from_its_weights_and_keeps_its_own_augmentation(flipped_run, tables, tmp_path):
    # A file saved by Keras is no checkpoint.
    keras.models.load_model(flipped_run / "best_model.keras").save(tmp_path / "weights.keras")
    start(**options_of(tables, tmp_path / "next", load_model_path=str(tmp_path / "weights.keras"), num_epochs=1))
    assert not has_views(keras.models.load_model(tmp_path / "next" / "latest_model.keras"))
    options = {"load_model_path": str(tmp_path / "next"), "num_epochs": 2, "test_time_augmentation": "flip"}
    with pytest.raises(UserError, match="test_time_augmentation"):
        start(**options_of(tables, tmp_path / "next", **options))


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(tables, tmp_path):
    options = {"test_time_augmentation": "flip", "eval_image_size": [48, 48], "num_epochs": 2}
    start(**options_of(tables, tmp_path / "whole", **options))
    start(**options_of(tables, tmp_path / "halves", **options | {"num_epochs": 1}))
    start(**options_of(tables, tmp_path / "halves", load_model_path=str(tmp_path / "halves"), **options))
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNet", "ConvNeXtTiny"])
def test_a_model_answers_at_another_size_like_one_built_for_it(name):
    configs = Configs(visual_model_name=name, use_imagenet_weights=False, classes=["a", "b"])
    small, large = (ModelFactory().get_model(configs.replace(image_target_size=(side, side, 3))) for side in (32, 64))
    large.set_weights(small.get_weights())
    images = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
    accept_any_size(small)
    np.testing.assert_allclose(small(images, training=False), large(images, training=False), atol=1e-6)
    assert small.input_shape == (None, 32, 32, 3)


@pytest.mark.slow
def test_training_sees_one_size_and_every_script_the_other(tables, tmp_path, monkeypatch):
    sizes, make = {True: set(), False: set()}, AugmentedImageSequence.__getitem__

    def note(sequence, index):
        batch = make(sequence, index)
        sizes[bool(sequence.shuffle)].add(batch[0].shape[1:3])
        return batch

    monkeypatch.setattr(AugmentedImageSequence, "__getitem__", note)
    folder = tmp_path / "run"
    start(**options_of(tables, folder, eval_image_size=[40, 48], num_epochs=2, **RECIPE))
    # The probe does not use augmented images.
    assert sizes == {True: {(32, 32)}, False: {(40, 48)}}
    model = keras.models.load_model(folder / "best_model.keras")
    assert model.input_shape == (None, 40, 48, 3)
    images, truth = read_validation(tables[1], (40, 48))
    answers = mean_over_views(folder / "best_model.keras", images)
    evaluation.main(Configs(load_model_path=str(folder)))
    names = [f"probability_{name}" for name in ("blue", "green", "red")]
    tested = pd.read_csv(folder / "evaluation" / "predictions.csv")[names].to_numpy()
    np.testing.assert_array_equal(tested.argmax(axis=1), answers.argmax(axis=1))
    results = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert results["sets"]["test"]["accuracy"] == pytest.approx((answers.argmax(axis=1) == truth).mean())
    options = {"load_model_path": str(folder), "write_path": str(tmp_path / "predictions.csv")}
    predicted = predict.main(PredictConfigs(input=str(tables[1]), **options))["predictions"]
    np.testing.assert_allclose(predicted[names].to_numpy(), tested, atol=1e-5)
    assert len(draw_activations.main(Configs(load_model_path=str(folder)))["paths"]) == len(images)
    assert "shape `(images, 40, 48, 3)`" in (folder / "MODEL_CARD.md").read_text()
    with pytest.raises(UserError, match="eval_image_size"):
        evaluation.main(Configs(load_model_path=str(folder), eval_image_size=[32, 32]))


def test_a_size_is_two_numbers_that_the_backbone_takes():
    with pytest.raises(UserError, match="eval_image_size: .*height and a width"):
        Configs(eval_image_size=[224]).validate()
    configs = Configs(eval_image_size=[16, 64], use_imagenet_weights=False, visual_model_name="Xception", classes=["a"])
    with pytest.raises(UserError, match="eval_image_size: Xception .* 71 pixels .*16x64"):
        ModelFactory().get_model(configs)


def test_validating_larger_images_takes_more_time():
    class Sequence:
        steps = 10

    configs = Configs(image_target_size=(100, 100, 3))
    once, _ = count_views(configs, Sequence, Sequence, refits=False)
    larger, _ = count_views(configs.replace(eval_image_size=[200, 150]), Sequence, Sequence, refits=False)
    assert larger == pytest.approx(3 * once)
