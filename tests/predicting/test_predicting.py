"""From images to probabilities and answers."""

import math
import shutil
import sys
import warnings

import keras
import numpy as np
import pytest
from exported_runs import ARTEFACTS, CLASSES, EXPORTS, answer, build_colour_model
from tiny_models import (
    CLASSES,
    images,  # noqa: F401
    predict,
    trained_model,  # noqa: F401
)

from finetune.core.options import UserError
from finetune.evaluation.decision import Decision
from finetune.models.formats import FORMATS
from finetune.predicting.predicting import classify_image, load_exported_model, load_predictor


@pytest.fixture
def photo():
    return np.random.default_rng(2).integers(0, 256, (32, 40, 3)).astype(np.uint8)


def test_an_image_gets_the_most_probable_class_after_resizing(trained_model, photo, images):
    blocks = photo.reshape(8, 4, 10, 4, 3).mean(axis=(1, 3))
    # The second one has the model's size.
    for image, resized in ((photo, np.rint(blocks).astype(np.uint8)), (images[0], images[0])):
        expected = predict(trained_model, resized[None])[0]
        names, probabilities = classify_image(trained_model, image, CLASSES)
        assert names == [CLASSES[expected.argmax()]]
        assert list(probabilities) == CLASSES
        assert list(probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-3)
    assert list(probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-6)


def build_constant_model():
    """Builds a model that answers 0.9, 0.5 and 0.1 for any image."""
    head = keras.layers.Dense(3, "sigmoid", kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((8, 10, 3)), keras.layers.GlobalAveragePooling2D(), head])
    head.bias.assign([math.log(9), 0.0, -math.log(9)])
    return model


@pytest.mark.parametrize(
    ("threshold", "names"), [(0.5, ["owl", "dog"]), (0.75, ["owl"]), (0.95, []), (0.0, ["owl", "dog", "cat"])]
)
def test_multi_label_an_image_gets_every_class_at_or_above_the_threshold(images, threshold, names):
    model = build_constant_model()
    chosen, probabilities = classify_image(model, images[0], ["owl", "dog", "cat"], True, threshold)
    assert chosen == names
    assert probabilities == pytest.approx({"owl": 0.9, "dog": 0.5, "cat": 0.1})


@pytest.mark.parametrize(
    ("threshold_type", "names"), [("exact_match", ["owl"]), ("best_f1", ["owl", "dog", "cat"])], ids=["one", "each"]
)
def test_a_decision_replaces_mode_and_threshold(images, threshold_type, names):
    model = build_constant_model()
    # Temperature 2 halves the logits: odds of 9 become odds of 3.
    decision = Decision(["owl", "dog", "cat"], True, 2.0, "validation", 0.7, [0.6, 0.4, 0.2], "validation")
    chosen, probabilities = classify_image(
        model, images[0], ["owl", "dog", "cat"], threshold=0.99, decision=decision, threshold_type=threshold_type
    )
    assert chosen == names
    assert probabilities == pytest.approx({"owl": 0.75, "dog": 0.5, "cat": 0.25})


def test_another_number_of_names_is_refused(trained_model, images):
    with pytest.raises(UserError, match=r"class_names: expected 3 names.*\['cat', 'dog'\]"):
        classify_image(trained_model, images[0], ["cat", "dog"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The colour model in each format."""
    folder = tmp_path_factory.mktemp("artefacts")
    for kind, name in zip(EXPORTS, ARTEFACTS, strict=True):
        FORMATS[kind].runtime().write(build_colour_model(), str(folder / name), "float32", list)
    return folder


def test_tensorflows_interpreter_replaces_a_missing_litert(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_exported_model(str(folder / "best_model.tflite"))
    assert (model.input_shape, model.output_shape) == ((None, 32, 32, 3), (None, 3))
    np.testing.assert_allclose(model(images), answer(images), atol=1e-5)


def test_a_model_of_other_classes_or_another_size_is_refused(folder):
    path = str(folder / "best_model.onnx")
    with pytest.raises(UserError, match=r"best_model\.onnx .*3 classes.* 2: cat, dog"):
        load_predictor(path, ["cat", "dog"], (32, 32))
    with pytest.raises(UserError, match=r"\(32, 32, 3\)"):
        load_predictor(path, CLASSES, (64, 64))


@pytest.mark.parametrize("name", ARTEFACTS)
@pytest.mark.parametrize("damage", ["empty", "text", "half"])
def test_a_damaged_artefact_is_an_error_of_one_line(name, damage, folder, tmp_path):
    path = tmp_path / name
    (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, path)
    file = path / "saved_model.pb" if path.is_dir() else path
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"<html>not found</html>", "half": content[: len(content) // 2]}[damage])
    with pytest.raises(UserError, match=f"{name} is not (a|an) .*: ") as raised:
        load_exported_model(str(path))
    assert "\n" not in str(raised.value)
