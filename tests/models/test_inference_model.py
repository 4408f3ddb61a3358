"""A run that answers with the mean over an image and its mirror image: the same in validation and in every file."""

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
from finetune.evaluation.gradcam import GradCam
from finetune.models.model_files import build_inference_model, has_views, strip_views
from finetune.training.training_state import read_state
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


def test_it_answers_with_the_mean_and_holds_the_inner_model_s_weights(tmp_path):
    inner, images = build_lopsided(), np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    build_inference_model(inner, "flip").save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    views = [inner.predict(view, verbose=0) for view in (images, images[:, :, ::-1])]
    assert np.abs(views[0] - views[1]).max() > 0.01
    np.testing.assert_allclose(model.predict(images, verbose=0), np.mean(views, axis=0), atol=1e-6)
    assert has_views(model)
    assert model.count_params() == inner.count_params()
    np.testing.assert_allclose(strip_views(model).predict(images, verbose=0), views[0], atol=1e-6)


def test_without_views_it_is_the_model_itself():
    inner, images = build_lopsided(), np.zeros((1, 8, 8, 3))
    model = build_inference_model(inner, "none")
    assert not has_views(model)
    assert strip_views(model) is model
    np.testing.assert_array_equal(model(images), inner(images))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, FROZEN], ids=["images", "features"])
def test_validation_and_every_script_answer_as_the_file_does(options, tables, tmp_path):
    folder = tmp_path / "run"
    start(**options_of(tables, folder, test_time_augmentation="flip", num_epochs=1, random_seed=3, **options))
    images, truth = read_validation(tables[1])
    expected = mean_over_views(folder / "latest_model.keras", images)
    log = pd.read_csv(folder / "training_log.csv")
    assert log["val_accuracy"].iloc[-1] == pytest.approx((expected.argmax(axis=1) == truth).mean())
    loss = -np.log(expected[np.arange(len(truth)), truth]).mean()
    assert log["val_loss"].iloc[-1] == pytest.approx(loss, rel=1e-4)

    expected = mean_over_views(folder / "best_model.keras", images)
    names = [f"probability_{name}" for name in ("blue", "green", "red")]
    evaluation.main(Configs(load_model_path=str(folder)))
    tested = pd.read_csv(folder / "evaluation" / "predictions.csv")[names].to_numpy()
    options = {"load_model_path": str(folder), "write_path": str(tmp_path / "predictions.csv")}
    predicted = predict.main(PredictConfigs(input=str(tables[1]), **options))["predictions"]
    np.testing.assert_allclose(predicted[names].to_numpy(), tested, atol=1e-5)
    model = keras.models.load_model(folder / "best_model.keras")
    np.testing.assert_allclose(GradCam(model).read(images)[1], expected, atol=1e-6)
    np.testing.assert_array_equal(tested.argmax(axis=1), expected.argmax(axis=1))
    assert len(draw_activations.main(Configs(load_model_path=str(folder)))["paths"]) == len(images)
    assert "| Test-time augmentation | flip |" in (folder / "MODEL_CARD.md").read_text()


@pytest.mark.slow
def test_exports_answer_as_the_file_does(tables, tmp_path):
    folder = tmp_path / "run"
    start(**options_of(tables, folder, test_time_augmentation="flip", num_epochs=1))
    report = export(folder, *EXPORTS)
    assert not any(artefact["rejected"] for artefact in report["artefacts"])
    images, _ = read_validation(tables[1])
    expected = mean_over_views(folder / "best_model.keras", images)
    for name, run in zip(ARTEFACTS, RUNTIMES.values(), strict=True):
        np.testing.assert_allclose(run(folder / name, images.astype(np.float32)), expected, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(tables, tmp_path):
    options = {"test_time_augmentation": "flip", "num_epochs": 2}
    start(**options_of(tables, tmp_path / "whole", **options))
    start(**options_of(tables, tmp_path / "halves", **options | {"num_epochs": 1}))
    stopped = tmp_path / "halves" / "latest_model.keras"
    assert read_state(str(stopped))["epochs_completed"] == 1
    start(**options_of(tables, tmp_path / "halves", load_model_path=str(stopped), **options))
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.slow
def test_a_run_does_not_change_its_views(tables, tmp_path):
    start(**options_of(tables, tmp_path / "run", num_epochs=1))
    options = {"load_model_path": str(tmp_path / "run"), "num_epochs": 2, "test_time_augmentation": "flip"}
    with pytest.raises(UserError, match="test_time_augmentation"):
        start(**options_of(tables, tmp_path / "run", **options))


@pytest.mark.slow
def test_another_run_may_start_from_its_weights(tables, tmp_path):
    start(**options_of(tables, tmp_path / "first", test_time_augmentation="flip", num_epochs=1))
    # Saved by Keras itself it is no checkpoint.
    keras.models.load_model(tmp_path / "first" / "best_model.keras").save(tmp_path / "weights.keras")
    start(**options_of(tables, tmp_path / "next", load_model_path=str(tmp_path / "weights.keras"), num_epochs=1))
    assert not has_views(keras.models.load_model(tmp_path / "next" / "latest_model.keras"))
