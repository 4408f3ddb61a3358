"""Exported models in their own runtimes."""

import sys
import warnings

import numpy as np
import pytest
from exported_runs import (
    ARTEFACTS,
    CLASSES,
    EXPORTS,
    answer,
    export,
    run_folder,  # noqa: F401
)

from finetune.core.options import UserError
from finetune.predicting.runtimes import load_exported_model, load_predictor


def test_tensorflows_interpreter_stands_in_for_litert(run_folder, monkeypatch):
    export(run_folder, "tflite")
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_exported_model(str(run_folder / "best_model.tflite"))
    assert (model.input_shape, model.output_shape) == ((None, 32, 32, 3), (None, 3))
    np.testing.assert_allclose(model(images), answer(images), atol=1e-5)


def test_a_model_of_other_classes_is_told(run_folder, photo_folder):
    export(run_folder, "onnx")
    with pytest.raises(UserError, match=r"best_model\.onnx tells 3 classes apart, but the configs name 2: cat, dog"):
        load_predictor(str(run_folder / "best_model.onnx"), ["cat", "dog"], (32, 32))
    with pytest.raises(UserError, match=r"takes inputs of shape \(32, 32, 3\)"):
        load_predictor(str(run_folder / "best_model.onnx"), CLASSES, (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTEFACTS)
@pytest.mark.parametrize("damage", ["empty", "text", "half"])
def test_a_damaged_artefact_is_told_in_a_line(name, damage, run_folder):
    export(run_folder, *EXPORTS)
    path = run_folder / name / "saved_model.pb" if name.endswith("saved_model") else run_folder / name
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"<html>not found</html>", "half": content[: len(content) // 2]}[damage])
    with pytest.raises(UserError, match=f"{name} is not (a|an) .* with images in and probabilities out: ") as raised:
        load_exported_model(str(run_folder / name))
    assert "\n" not in str(raised.value)
