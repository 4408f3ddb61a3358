"""Test-time augmentation: validation, every file and every script answer with the mean over an image and its mirror."""

import keras
import numpy as np
import pandas as pd
import pytest
from exported_runs import ARTEFACTS, EXPORTS, RUNTIMES, export
from small_runs import options_of, start, tables  # noqa: F401

import draw_activations
import predict
import test as evaluation
from configs import Configs
from finetune.core.options import UserError
from finetune.data.images import read_image, resize_image
from finetune.evaluation.gradcam import GradCam
from finetune.models.model_files import build_inference_model, has_views, strip_views
from predict import PredictConfigs

FROZEN = {"conv_layers_to_train": 0, "augmentation_strength": "none", "head_initialization": "linear_probe"}


def build_lopsided() -> keras.Model:
    """Builds a model whose answer depends on which side is bright."""
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(3, activation="softmax")]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    return keras.Model(model.inputs, model.outputs, name="image_classifier")


def read_validation(csv_path):
    table = pd.read_csv(csv_path)
    images = np.array([resize_image(read_image(path, (32, 32)), (32, 32)) for path in table["path"]])
    return images, np.array(sorted(set(table["class"]))).searchsorted(table["class"])


def mean_over_views(path, images):
    """Works out, from the model inside alone, what a run's file has to answer."""
    inner = strip_views(keras.models.load_model(path, compile=False))
    assert inner.get_layer("backbone") is not None
    return (inner.predict(images, verbose=0) + inner.predict(images[:, :, ::-1], verbose=0)) / 2


def test_it_answers_with_the_mean_and_has_the_inner_models_weights(tmp_path):
    inner, images = build_lopsided(), np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
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


@pytest.fixture(scope="module")
def frozen_run(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen") / "run"
    start(**options_of(tables, folder, test_time_augmentation="flip", num_epochs=1, random_seed=3, **FROZEN))
    return folder


def check_validation(folder, images, truth):
    expected = mean_over_views(folder / "latest_model.keras", images)
    log = pd.read_csv(folder / "training_log.csv")
    assert log["val_accuracy"].iloc[-1] == pytest.approx((expected.argmax(axis=1) == truth).mean())
    loss = -np.log(expected[np.arange(len(truth)), truth]).mean()
    assert log["val_loss"].iloc[-1] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_validation_on_features_is_that_of_the_file(frozen_run, tables):
    check_validation(frozen_run, *read_validation(tables[1]))


@pytest.mark.slow
def test_validation_and_every_script_answer_as_the_file_does(flipped_run, tables, tmp_path):
    images, truth = read_validation(tables[1])
    check_validation(flipped_run, images, truth)
    expected = mean_over_views(flipped_run / "best_model.keras", images)
    names = [f"probability_{name}" for name in ("blue", "green", "red")]
    evaluation.main(Configs(load_model_path=str(flipped_run)))
    tested = pd.read_csv(flipped_run / "evaluation" / "predictions.csv")[names].to_numpy()
    options = {"load_model_path": str(flipped_run), "write_path": str(tmp_path / "predictions.csv")}
    predicted = predict.main(PredictConfigs(input=str(tables[1]), **options))["predictions"]
    np.testing.assert_allclose(predicted[names].to_numpy(), tested, atol=1e-5)
    model = keras.models.load_model(flipped_run / "best_model.keras")
    np.testing.assert_allclose(GradCam(model).read(images)[1], expected, atol=1e-6)
    np.testing.assert_array_equal(tested.argmax(axis=1), expected.argmax(axis=1))
    assert len(draw_activations.main(Configs(load_model_path=str(flipped_run)))["paths"]) == len(images)
    assert "| Test-time augmentation | flip |" in (flipped_run / "MODEL_CARD.md").read_text()


@pytest.mark.slow
def test_exports_answer_as_the_file_does(flipped_run, tables):
    report = export(flipped_run, *EXPORTS)
    assert not any(artefact["rejected"] for artefact in report["artefacts"])
    images, _ = read_validation(tables[1])
    expected = mean_over_views(flipped_run / "best_model.keras", images)
    for name, run in zip(ARTEFACTS, RUNTIMES.values(), strict=True):
        np.testing.assert_allclose(run(flipped_run / name, images.astype(np.float32)), expected, atol=1e-5)


@pytest.mark.slow
def test_a_run_keeps_its_augmentation_and_another_run_may_start_from_its_weights(flipped_run, tables, tmp_path):
    options = {"load_model_path": str(flipped_run), "num_epochs": 2}
    with pytest.raises(UserError, match="test_time_augmentation"):
        start(**options_of(tables, flipped_run, **options))
    # Saved by Keras, a file is no checkpoint.
    keras.models.load_model(flipped_run / "best_model.keras").save(tmp_path / "weights.keras")
    start(**options_of(tables, tmp_path / "next", load_model_path=str(tmp_path / "weights.keras"), num_epochs=1))
    assert not has_views(keras.models.load_model(tmp_path / "next" / "latest_model.keras"))
