"""Models are found, loaded and checked against the configs."""

import os
import shutil
import zipfile
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from exported_runs import ARTEFACTS, EXPORTS, export
from small_runs import assert_same_run, options_of, start, tables  # noqa: F401
from test_exports import RUNTIMES
from tiny_models import (
    CLASSES,
    assert_kernels_alone_have_changed,
    images,  # noqa: F401
    normalised_model,
    predict,
    step_without_gradients,
    trained_model,  # noqa: F401
)

import draw_activations
import predict
import test as evaluation
from configs import Configs
from finetune.core.options import UserError
from finetune.data.images import read_image, resize_image
from finetune.evaluation.gradcam import GradCam
from finetune.models.compressed import custom_load_model, custom_save_model
from finetune.models.model_files import build_inference_model, get_classifier, has_views, load_fitting_model, load_model
from finetune.models.optimizers import exclude_from_weight_decay, get_optimizer
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
    """Works out, from the classifier alone, what a run's file has to answer."""
    classifier = get_classifier(keras.models.load_model(path, compile=False))
    assert classifier.get_layer("backbone") is not None
    return (classifier.predict(images, verbose=0) + classifier.predict(images[:, :, ::-1], verbose=0)) / 2


def test_it_answers_with_the_mean_and_holds_the_classifiers_weights(tmp_path):
    classifier, images = build_lopsided(), np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    build_inference_model(classifier, "flip").save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    views = [classifier.predict(view, verbose=0) for view in (images, images[:, :, ::-1])]
    assert np.abs(views[0] - views[1]).max() > 0.01
    np.testing.assert_allclose(model.predict(images, verbose=0), np.mean(views, axis=0), atol=1e-6)
    assert has_views(model)
    assert model.count_params() == classifier.count_params()
    np.testing.assert_allclose(get_classifier(model).predict(images, verbose=0), views[0], atol=1e-6)


def test_without_views_it_is_the_classifier():
    classifier, images = build_lopsided(), np.zeros((1, 8, 8, 3))
    model = build_inference_model(classifier, "none")
    assert not has_views(model)
    assert get_classifier(model) is model
    np.testing.assert_array_equal(model(images), classifier(images))


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


@pytest.fixture(scope="module")
def model_files(trained_model, tmp_path_factory):
    """The trained model as a file, by ending."""
    folder = tmp_path_factory.mktemp("models")
    # The .keras file first: saving HDF5 drops the optimizer from the compile configuration that it stores.
    for suffix in (".keras", ".h5", ".hdf5"):
        trained_model.save(folder / f"model{suffix}")
    return {suffix: str(folder / f"model{suffix}") for suffix in (".keras", ".h5", ".hdf5")}


def test_biases_are_excluded_again_after_loading(tmp_path):
    model = normalised_model()
    model.compile(get_optimizer("AdamW", 0.5, weight_decay=0.2))
    exclude_from_weight_decay(model, model.optimizer)
    step_without_gradients(model.optimizer, model)
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = load_model(path, with_optimizer=True)
    assert loaded.optimizer.built
    exclude_from_weight_decay(loaded, loaded.optimizer)
    assert_kernels_alone_have_changed(step_without_gradients(loaded.optimizer, loaded), (1 - 0.5 * 0.2) ** 2)


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".hdf5"])
def test_whole_model_file_is_loaded(model_files, trained_model, images, suffix):
    loaded = load_model(model_files[suffix])
    np.testing.assert_array_equal(predict(loaded, images), predict(trained_model, images))


def test_optimizer_comes_back_only_where_it_is_asked_for(model_files, trained_model):
    assert getattr(load_model(model_files[".keras"]), "optimizer", None) is None
    restored = load_model(model_files[".keras"], with_optimizer=True).optimizer
    for variable, expected in zip(restored.variables, trained_model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), expected.numpy())


def test_compressed_model_predicts_the_same(tmp_path, trained_model, images):
    weights_path, layers_path = custom_save_model(trained_model, str(tmp_path / "new"), "model")
    assert (weights_path, layers_path) == (str(tmp_path / "new" / "model.h5"), str(tmp_path / "new" / "model.json"))
    assert sorted(os.listdir(tmp_path / "new")) == ["model.h5", "model.json"]
    for loaded in (custom_load_model(str(tmp_path / "new"), "model"), load_model(weights_path)):
        np.testing.assert_array_equal(predict(loaded, images), predict(trained_model, images))


def test_compressed_model_in_the_working_folder_is_loaded(tmp_path, trained_model, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    custom_save_model(trained_model, "", "model")
    np.testing.assert_array_equal(predict(load_model("model.h5"), images), predict(trained_model, images))


@pytest.mark.parametrize("missing", ["model.h5", "model.json"])
def test_half_of_a_compressed_model_is_refused(tmp_path, trained_model, missing):
    custom_save_model(trained_model, str(tmp_path), "model")
    os.remove(tmp_path / missing)
    with pytest.raises(UserError, match=r"model\.h5"):
        custom_load_model(str(tmp_path), "model")
    with pytest.raises(UserError, match=r"model\.h5"):
        load_model(str(tmp_path / "model.h5"))


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "3", '{"class_name": "Nonsense", "config": {}}', "{"])
def test_compressed_model_with_a_foreign_json_is_refused(tmp_path, trained_model, content):
    custom_save_model(trained_model, str(tmp_path), "model")
    (tmp_path / "model.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.json"):
        load_model(str(tmp_path / "model.h5"))


def test_weights_of_another_model_are_refused(tmp_path, trained_model):
    custom_save_model(trained_model, str(tmp_path), "model")
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    custom_save_model(other, str(tmp_path), "other")
    shutil.copy(tmp_path / "other.json", tmp_path / "model.json")
    with pytest.raises(UserError, match="does not belong to"):
        load_model(str(tmp_path / "model.h5"))


def test_weights_without_a_model_are_refused(tmp_path, trained_model):
    trained_model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(UserError, match=r"model\.weights\.h5 holds weights but no model"):
        load_model(str(tmp_path / "model.weights.h5"))


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".hdf5", ".txt", ""])
@pytest.mark.parametrize("content", [None, b"", b"this is no model"])
def test_file_that_is_no_model_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="model") as raised:
        load_model(str(path))
    assert "\n" not in str(raised.value)


def test_foreign_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(UserError, match="is not a model"):
        load_model(str(tmp_path / "model.keras"))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_truncated_model_is_refused(tmp_path, model_files, suffix, kept):
    content = Path(model_files[suffix]).read_bytes()
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match="is not a model"):
        load_model(str(path))


@pytest.mark.parametrize("suffix", [".keras", ".h5", "compressed"])
def test_code_in_a_model_file_is_never_run(tmp_path, suffix):
    model = keras.Sequential([keras.Input((8, 10, 3)), keras.layers.Lambda(lambda x: x * 2), keras.layers.Flatten()])
    path = str(tmp_path / f"model{suffix}")
    if suffix == "compressed":
        path, _ = custom_save_model(model, str(tmp_path), "model")
    else:
        model.save(path)
    with pytest.raises(UserError, match=r"[Ll]ambda"):
        load_model(path)


def test_fitting_model_is_loaded(model_files):
    model = load_fitting_model(model_files[".keras"], CLASSES, (8, 10))
    assert model.output_shape == (None, 3)


@pytest.mark.parametrize(
    ("class_names", "image_size", "message"),
    [
        (["cat", "dog"], (8, 10), "tells 3 classes apart, but the configs name 2: cat, dog"),
        (
            CLASSES,
            (10, 8),
            r"takes inputs of shape .8, 10, 3.\. Expected images of image_target_size or test_image_size, .10, 8, 3\)",
        ),
    ],
)
def test_model_that_does_not_fit_is_refused(model_files, class_names, image_size, message):
    with pytest.raises(UserError, match=message):
        load_fitting_model(model_files[".keras"], class_names, image_size)


@pytest.mark.parametrize("input_shape", [(8, 10, 1), (8,), (8, 10)])
def test_model_of_other_input_than_rgb_is_refused(tmp_path, input_shape):
    layers = [keras.Input(input_shape), keras.layers.Flatten(), keras.layers.Dense(3)]
    keras.Sequential(layers).save(tmp_path / "model.keras")
    with pytest.raises(UserError, match=r"model\.keras takes"):
        load_fitting_model(str(tmp_path / "model.keras"), CLASSES, (8, 10))


def test_model_of_any_image_size_fits(tmp_path):
    layers = [keras.Input((None, None, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)]
    keras.Sequential(layers).save(tmp_path / "model.keras")
    model = load_fitting_model(str(tmp_path / "model.keras"), CLASSES, (8, 10))
    assert model.output_shape == (None, 3)
