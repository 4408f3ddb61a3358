"""Exported models in their own runtimes."""

import shutil
import sys
import warnings

import numpy as np
import pytest
from exported_runs import ARTEFACTS, CLASSES, EXPORTS, answer, build_colour_model

from finetune.core.options import UserError
from finetune.models.formats import FORMATS
from finetune.predicting.runtimes import load_exported_model, load_predictor


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
