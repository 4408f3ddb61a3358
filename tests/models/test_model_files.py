"""Loading model files and checking them against configs."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from tiny_models import (
    CLASSES,
    assert_kernels_alone_have_changed,
    images,  # noqa: F401
    normalised_model,
    predict,
    step_without_gradients,
    trained_model,  # noqa: F401
)

from finetune.core.options import UserError
from finetune.models.compiling import exclude_from_weight_decay, get_optimizer
from finetune.models.compressed import custom_load_model, custom_save_model
from finetune.models.model_files import load_fitting_model, load_model

LEGACY = Path(__file__).parent / "legacy_models"


@pytest.fixture(scope="module")
def model_files(trained_model, tmp_path_factory):
    """The trained model as a file, by ending."""
    folder = tmp_path_factory.mktemp("models")
    files = {suffix: str(folder / f"model{suffix}") for suffix in (".keras", ".h5", ".hdf5")}
    # The .keras file first: saving HDF5 drops the optimizer from the model's compile config.
    for path in files.values():
        trained_model.save(path)
    return files


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


def test_optimizer_is_restored_on_request(model_files, trained_model):
    assert getattr(load_model(model_files[".keras"]), "optimizer", None) is None
    restored = load_model(model_files[".keras"], with_optimizer=True).optimizer
    for variable, expected in zip(restored.variables, trained_model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), expected.numpy())


def test_compressed_model_predicts_the_same(tmp_path, trained_model, images, monkeypatch):
    paths = custom_save_model(trained_model, str(tmp_path / "new"), "model")
    assert paths == (str(tmp_path / "new" / "model.h5"), str(tmp_path / "new" / "model.json"))
    monkeypatch.chdir(tmp_path)
    custom_save_model(trained_model, "", "model")
    loaded = custom_load_model(str(tmp_path / "new"), "model"), load_model(paths[0]), load_model("model.h5")
    for model in loaded:
        np.testing.assert_array_equal(predict(model, images), predict(trained_model, images))


@pytest.mark.parametrize("missing", ["model.h5", "model.json"])
def test_half_of_a_compressed_model_is_refused(tmp_path, trained_model, missing):
    path, _ = custom_save_model(trained_model, str(tmp_path), "model")
    os.remove(tmp_path / missing)
    for load in (load_model, lambda _: custom_load_model(str(tmp_path), "model")):
        with pytest.raises(UserError, match=r"model\.h5"):
            load(path)


@pytest.mark.parametrize("content", ["", "{}", "[]", "3", '{"class_name": "Nonsense", "config": {}}'])
def test_compressed_model_with_a_foreign_json_is_refused(tmp_path, trained_model, content):
    custom_save_model(trained_model, str(tmp_path), "model")
    (tmp_path / "model.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.json"):
        load_model(str(tmp_path / "model.h5"))


def test_weights_of_another_model_or_without_one_are_refused(tmp_path, trained_model):
    custom_save_model(trained_model, str(tmp_path), "model")
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    custom_save_model(other, str(tmp_path), "other")
    shutil.copy(tmp_path / "other.json", tmp_path / "model.json")
    with pytest.raises(UserError, match=r"model\.h5 .*model\.json"):
        load_model(str(tmp_path / "model.h5"))
    trained_model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(UserError, match=r"model\.weights\.h5 holds weights"):
        load_model(str(tmp_path / "model.weights.h5"))


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".txt", ""])
@pytest.mark.parametrize("content", [None, b"", b"this is no model"])
def test_file_that_is_no_model_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=path.name) as raised:
        load_model(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_truncated_model_or_foreign_archive_is_refused(tmp_path, model_files, suffix):
    content, path = Path(model_files[suffix]).read_bytes(), tmp_path / f"model{suffix}"
    for kept in (0.1, 0.95):
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(UserError, match="is not a model"):
            load_model(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "x")
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


@pytest.mark.parametrize(
    ("class_names", "image_size", "parts"),
    [(["cat", "dog"], (8, 10), ["3 classes", "2: cat, dog"]), (CLASSES, (10, 8), ["(8, 10, 3)", "(10, 8, 3)"])],
)
def test_model_that_does_not_fit_is_refused(model_files, class_names, image_size, parts):
    with pytest.raises(UserError) as caught:
        load_fitting_model(model_files[".keras"], class_names, image_size)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("input_shape", [(8, 10, 1), (8,), (8, 10)])
def test_model_of_other_input_than_rgb_is_refused(tmp_path, input_shape):
    keras.Sequential([keras.Input(input_shape), keras.layers.Flatten(), keras.layers.Dense(3)]).save(
        tmp_path / "m.keras"
    )
    with pytest.raises(UserError, match=r"m\.keras takes"):
        load_fitting_model(str(tmp_path / "m.keras"), CLASSES, (8, 10))


@pytest.mark.parametrize("size", [(8, 10), (None, None)])
def test_model_of_the_image_size_or_of_any_fits(tmp_path, size):
    layers = [keras.Input((*size, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)]
    keras.Sequential(layers).save(tmp_path / "model.keras")
    assert load_fitting_model(str(tmp_path / "model.keras"), CLASSES, (8, 10)).output_shape == (None, 3)


@pytest.mark.parametrize("name", ["model", "compressed"])
def test_a_legacy_model_answers_as_before(name):
    """The files are the first layers of a trained MobileNet, written before the package had subpackages."""
    answers = json.loads((LEGACY / "answers.json").read_text())[name]
    photos = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    models = [load_model(str(LEGACY / f"{name}.h5"))]
    if name == "compressed":
        models.append(custom_load_model(str(LEGACY), name))
    for model in models:
        # Processors round differently.
        np.testing.assert_allclose(predict(model, photos), answers, rtol=1e-4)
