"""The registry of export formats: a format needs one entry and nothing else; file names identify artefacts."""

import re
import types
from pathlib import Path

import numpy as np
import pytest
from exported_runs import (
    CLASSES,
    answer,
    export,
    predict_photos,
    run_folder,  # noqa: F401
)

from compress_weights import CompressConfigs
from finetune.core.files import atomic_path
from finetune.core.options import UserError
from finetune.models.exported import ExportedModel
from finetune.models.formats import FORMATS, Format, artefact_stem, find_format, require_format
from finetune.predicting.predicting import load_exported_model, load_predictor
from finetune.training.run_folder import list_derived_files
from finetune.training.trained_model import resolve_model_path

PROJECT = Path(__file__).resolve().parents[2]


def write_arrays(model, path, precision, calibrate):
    """Writes the dense layer of the colour model; int8 scales it by the number of calibration images."""
    kernel, bias = model.get_weights()
    scale = 1.0 if precision == "float32" else 1 / len(calibrate())
    with atomic_path(path) as temporary:
        np.savez(temporary, kernel=kernel / scale, bias=bias, scale=scale)
    return (path,)


def load_arrays(path):
    """Reads the arrays and computes the colour model in NumPy."""
    with np.load(path) as arrays:
        kernel, bias = arrays["kernel"] * arrays["scale"], arrays["bias"]

    def run(images):
        logits = (images / 64).mean(axis=(1, 2)) @ kernel + bias
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)

    return ExportedModel(run, (None, 32, 32, 3), (None, 3))


TOY = Format(
    title="a file of arrays",
    endings={"float32": ("", ".npz"), "int8": ("_int8", ".npz")},
    runtime=lambda: types.SimpleNamespace(write=write_arrays, load=load_arrays),
    loading=("NumPy", "import numpy as np\n\narrays = np.load({path})"),
)


@pytest.mark.parametrize(("quantization", "name"), [("none", "best_model.npz"), ("int8", "best_model_int8.npz")])
def test_one_entry_adds_a_format(quantization, name, run_folder, photo_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "arrays", TOY)
    original = predict_photos(run_folder / "best_model.keras", photo_folder, tmp_path)
    # Exported and compared.
    artefact = export(run_folder, "arrays", export_quantization=quantization)["artefacts"][1]
    assert (artefact["kind"], artefact["path"]) == ("arrays", str(run_folder / name))
    assert artefact["comparison"]["accuracy"] == {"before": 1.0, "after": 1.0}
    assert artefact["comparison"]["largest_difference"] < 1e-5
    assert not artefact["rejected"]
    # On the model card.
    card = (run_folder / "MODEL_CARD.md").read_text()
    assert f'arrays = np.load("{name}")' in card
    assert f"{name}, with NumPy" in card
    # Read, also by predict.py without the run.
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    np.testing.assert_allclose(load_exported_model(str(run_folder / name))(images), answer(images), atol=1e-5)
    for kept in ("best_model.keras", "configs.json"):
        (run_folder / kept).unlink()
    found = predict_photos(run_folder / name, photo_folder, tmp_path)
    assert found["predicted"].tolist() == original["predicted"].tolist()
    # A new run clears it away.
    assert {name, f"evaluation_{name}"} <= {*list_derived_files()}


def test_an_added_format_that_loses_accuracy_is_rejected(run_folder, monkeypatch):
    blue = ExportedModel(lambda images: np.tile(np.float32([1, 0, 0]), (len(images), 1)), (None, 32, 32, 3), (None, 3))
    runtime = types.SimpleNamespace(write=write_arrays, load=lambda path: blue)
    monkeypatch.setitem(FORMATS, "arrays", TOY._replace(runtime=lambda: runtime))
    artefact = export(run_folder, "arrays")["artefacts"][1]
    assert artefact["rejected"]
    assert artefact["path"] == str(run_folder / "best_model.rejected.npz")
    assert "np.load" not in (run_folder / "MODEL_CARD.md").read_text()


def test_a_missing_package_of_a_writer_is_named_before_any_work(run_folder, monkeypatch):
    packages = {"no_such_package": "no-such-package>=1"}
    monkeypatch.setitem(FORMATS, "arrays", TOY._replace(writer_packages=packages))
    with pytest.raises(UserError, match=r"--export arrays .*no_such_package.*pip install 'no-such-package>=1'"):
        export(run_folder, "arrays")
    assert not list(run_folder.glob("best_model*.npz"))


def test_a_missing_package_of_a_reader_is_named(tmp_path, monkeypatch):
    def load(path):
        raise ImportError("No module named 'reader'")

    (tmp_path / "best_model.npz").write_bytes(b"arrays")
    toy = TOY._replace(runtime=lambda: types.SimpleNamespace(load=load), reader_packages={"reader": "reader>=2"})
    monkeypatch.setitem(FORMATS, "arrays", toy)
    with pytest.raises(UserError, match=r"best_model\.npz needs reader: .*pip install 'reader>=2'"):
        load_exported_model(str(tmp_path / "best_model.npz"))


def test_an_unknown_format_names_the_nearest(monkeypatch):
    monkeypatch.setitem(FORMATS, "arrays", TOY)
    with pytest.raises(UserError, match=r"^export: .*saved_model, arrays.* arrays\?$"):
        CompressConfigs(export=["array"]).validate()
    with pytest.raises(UserError, match="^export_quantization: .*tflite or arrays"):
        CompressConfigs(export=["onnx"], export_quantization="int8").validate()


@pytest.mark.parametrize("name", ["model.pb", "model", "folder"])
def test_a_path_without_a_format_is_refused(name, tmp_path):
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_bytes(b"bytes")
    for load in (load_exported_model, lambda path: load_predictor(path, CLASSES, (32, 32))):
        with pytest.raises(UserError) as raised:
            load(str(path))
        (line,) = str(raised.value).splitlines()
        for word in (str(path), ".tflite", ".onnx", "saved_model.pb", ".keras", "compress_weights.py"):
            assert word in line


def test_a_folder_is_identified_by_its_content(tmp_path):
    graph, run = tmp_path / "any_name", tmp_path / "run.onnx"
    for folder in (graph, run):
        folder.mkdir()
    (graph / "saved_model.pb").write_bytes(b"graph")
    (run / "best_model.keras").write_bytes(b"model")
    assert require_format(str(graph)) is FORMATS["saved_model"]
    assert resolve_model_path(str(graph)) == str(graph)
    assert find_format(str(run)) is None
    assert resolve_model_path(str(run)) == str(run / "best_model.keras")


def test_packages_are_those_that_the_tests_install():
    declared = (PROJECT / "tests" / "requirements.txt").read_text().splitlines()
    packages = {name for one in FORMATS.values() for name in (one.writer_packages | one.reader_packages).values()}
    assert packages
    assert packages <= {*declared}


def test_the_page_shows_how_each_is_loaded():
    page = (PROJECT / "docs" / "export.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    for name, one in FORMATS.items():
        path = f'"saved_model/best_model{"".join(one.endings["float32"])}"'
        assert one.loading[1].format(path=path) in blocks, name


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("run/best_model.keras", "best_model"),
        ("run/best_model_compressed.rejected.h5", "best_model"),
        ("best_model_int8.rejected.tflite", "best_model"),
        ("best_model_dynamic.tflite", "best_model"),
        ("run/best_model_saved_model/", "best_model"),
        ("run/best_model_saved_model.rejected", "best_model"),
        ("model_epoch_007.keras", "model_epoch_007"),
        ("mine_int8.keras", "mine_int8"),
        ("mine.v2.onnx", "mine.v2"),
    ],
)
def test_an_artefacts_name_contains_that_of_its_model(path, stem):
    assert artefact_stem(path) == stem
