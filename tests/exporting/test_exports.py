"""Models for other runtimes: their answers, the files next to them, and the scripts that take them."""

import gc
import json
import os
import shutil
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
from ai_edge_litert.interpreter import Interpreter
from exported_runs import (
    ARTEFACTS,
    CLASSES,
    EXPORTS,
    RUNTIMES,
    answer,
    build_colour_model,
    export,
    make_run,
    predict_photos,
    run_folder,  # noqa: F401
    run_tflite,
    write_decision,
)

import compress_weights
import draw_activations
import test as evaluation
import train
from compress_weights import CompressConfigs
from configs import Configs
from finetune.core.options import UserError
from finetune.data.images import read_image, resize_image
from finetune.evaluation.decision import Decision, read_decision
from finetune.exporting.exports import find_earlier, read_calibration_images, write_metadata
from finetune.models import onnx_format, saved_model, tflite
from finetune.models.formats import FORMATS
from model import ModelFactory


@pytest.fixture(scope="module")
def exported(photo_folder, tmp_path_factory):
    """A run's folder with every export, not to be changed, and the report on those of float32."""
    folder = make_run(photo_folder, tmp_path_factory.mktemp("exported") / "run")
    report = export(folder, *EXPORTS)
    return SimpleNamespace(folder=folder, report=report)


@pytest.fixture
def exported_copy(exported, tmp_path):
    """The same folder, to be changed."""
    return shutil.copytree(exported.folder, tmp_path / "run")


def write_exports(model, folder):
    """Writes a model in each format, without the script."""
    for kind, name in zip(EXPORTS, ARTEFACTS, strict=True):
        FORMATS[kind].runtime().write(model, str(folder / name), "float32", list)


def random_images(number, size=32):
    return np.random.default_rng(0).integers(0, 256, (number, size, size, 3)).astype(np.float32)


# The artefacts


def test_each_runtime_gives_the_models_answers(exported):
    images = random_images(5)
    for name, run in RUNTIMES.items():
        np.testing.assert_allclose(run(exported.folder / name, images), answer(images), atol=1e-5)
    assert [artefact["kind"] for artefact in exported.report["artefacts"]] == ["weights", *EXPORTS]
    for artefact in exported.report["artefacts"]:
        assert artefact["precision"] == "float32"
        assert artefact["comparison"]["accuracy"] == {"before": 1.0, "after": 1.0}
        assert artefact["comparison"]["largest_difference"] < 1e-5
        assert min(artefact["comparison"]["images_per_second"].values()) > 0
    assert exported.report == json.loads((exported.folder / "compression_report.json").read_text())
    assert not [name for name in os.listdir(exported.folder) if "rejected" in name or name.startswith(".tmp")]


def test_sizes_are_those_of_all_files(exported):
    files = [path for path in (exported.folder / "best_model_saved_model").rglob("*") if path.is_file()]
    expected = {str(path): path.stat().st_size for path in sorted(files)}
    assert exported.report["artefacts"][3]["files"] == expected
    assert len(files) >= 3


def test_a_saved_model_holds_each_weight_once(tmp_path):
    wide = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(3, "softmax")])
    saved_model.write(wide, str(tmp_path / "model"), "float32", list)
    (variables,) = (tmp_path / "model" / "variables").glob("variables.data*")
    assert 1 <= variables.stat().st_size / (4 * wide.count_params()) < 1.2


@pytest.mark.slow
def test_onnx_leaves_no_copies_of_the_model_in_memory(tmp_path):
    import tf2onnx

    gc.disable()
    try:
        onnx_format.write(build_colour_model(), str(tmp_path / "model.onnx"), "float32", list)
        assert not [one for one in gc.get_objects() if isinstance(one, tf2onnx.graph.Graph)]
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_becomes_float32(policy, tmp_path):
    write_exports(build_colour_model(dtype=policy), tmp_path)
    images = random_images(2)
    for name, run in RUNTIMES.items():
        # Nearer than 8 or 11 bits would be.
        np.testing.assert_allclose(run(tmp_path / name, images), answer(images), atol=1e-6)


# The last layers are left out: they are of the same kinds as the first ones.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pop_conv_layers"),
    [("MobileNetV3Small", 138), ("EfficientNetB0", 218), ("ConvNeXtTiny", 107), ("DenseNet121", 406)],
)
def test_backbones_answer_the_same_in_each_runtime(name, pop_conv_layers, tmp_path):
    options = {"image_target_size": (64, 64, 3), "use_imagenet_weights": False, "classes": CLASSES}
    model = ModelFactory().get_model(Configs(visual_model_name=name, pop_conv_layers=pop_conv_layers, **options))
    write_exports(model, tmp_path)
    images = random_images(2, 64)
    expected = model.predict(images, verbose=0)
    for artefact, run in RUNTIMES.items():
        np.testing.assert_allclose(run(tmp_path / artefact, images), expected, atol=1e-5)


@pytest.mark.slow
def test_a_second_export_replaces_the_first_even_in_a_folder_called_rejected(run_folder, capsys):
    folder = run_folder.rename(run_folder.with_name("first.rejected.run"))
    export(folder, *EXPORTS, test_csv="")
    model = build_colour_model()
    model.layers[2].set_weights([np.zeros((3, 3)), np.array([9, 0, 0])])
    model.save(folder / "best_model.keras")
    report = export(folder, *EXPORTS, test_csv="")
    images = np.zeros((1, 32, 32, 3), np.float32)
    for name, run in RUNTIMES.items():
        assert run(folder / name, images).argmax() == 0
    paths = [folder / name for name in ("best_model_compressed.h5", *ARTEFACTS)]
    assert [artefact["path"] for artefact in report["artefacts"]] == list(map(str, paths))
    assert all(path.exists() for path in paths)
    assert not [name for name in os.listdir(folder) if name.startswith(".tmp")]
    # Without a test set nothing is compared.
    assert {artefact["comparison"] for artefact in report["artefacts"]} == {None}
    assert capsys.readouterr().out.count("Written, not compared: ") == 8


# Quantization


@pytest.mark.parametrize(
    ("quantization", "kernel"),
    [
        pytest.param("none", 4, marks=pytest.mark.slow),
        pytest.param("dynamic", 1, marks=pytest.mark.slow),
        ("int8", 1),
    ],
)
def test_quantization_stores_kernels_in_bytes(quantization, kernel, run_folder, capsys):
    rng = np.random.default_rng(0)
    convolution = keras.layers.Conv2D(64, 7, activation="relu")
    dense = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, "softmax")]
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), convolution, *dense])
    convolution.set_weights([rng.normal(size=(7, 7, 3, 64)), np.zeros(64)])
    # Small enough that no class is certain: rounding changes all probabilities, and none by more than the bound.
    dense[1].set_weights([rng.normal(0, 0.05, (64, 3)), np.zeros(3)])
    model.save(run_folder / "best_model.keras")
    artefact = export(run_folder, "tflite", export_quantization=quantization, test_csv="")["artefacts"][1]
    name = {"none": "best_model.tflite"}.get(quantization, f"best_model_{quantization}.tflite")
    assert artefact["path"] == str(run_folder / name)
    assert artefact["precision"] == {"none": "float32"}.get(quantization, quantization)
    # 9,408 numbers, and no more than 7 kB for all else.
    assert 0 <= os.path.getsize(artefact["path"]) - kernel * 7 * 7 * 3 * 64 < 7000
    interpreter = Interpreter(artefact["path"])
    ends = interpreter.get_input_details() + interpreter.get_output_details()
    assert [end["dtype"] for end in ends] == [np.float32, np.float32]
    images, bound = random_images(4), {"none": 1e-5, "dynamic": 0.02, "int8": 0.03}[quantization]
    np.testing.assert_allclose(run_tflite(artefact["path"], images), model.predict(images, verbose=0), atol=bound)
    assert ("int8: ranges from 18 images" in capsys.readouterr().out) == (quantization == "int8")


def test_calibration_images_are_the_resized_training_images(run_folder):
    stored = json.loads((run_folder / "configs.json").read_text())
    images = read_calibration_images(CompressConfigs(**stored | {"image_target_size": (32, 32, 3)}))
    paths = [os.path.join(stored["image_directory"], name) for name in pd.read_csv(stored["train_csv"])["path"]]
    expected = [resize_image(read_image(path, (32, 32)), (32, 32)) for path in paths]
    assert {image.dtype for image in images} == {np.dtype(np.uint8)}
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in expected)


def test_int8_without_training_images_is_an_error(run_folder):
    os.remove(run_folder.parent / "train.csv")
    with pytest.raises(UserError, match="train_csv: .*int8.* Expected a CSV file"):
        export(run_folder, "tflite", export_quantization="int8", test_csv="")
    assert not (run_folder / "best_model_int8.tflite").exists()


# Metadata and decisions


@pytest.mark.parametrize("fitted_on", ["validation", None])
def test_artefacts_ship_with_class_names_options_and_a_decision_that_later_ones_do_not_change(fitted_on, run_folder):
    decision = write_decision(run_folder, temperature=2.0, temperature_fitted_on=fitted_on)
    export(run_folder, "onnx", test_csv="")
    assert (run_folder / "best_model_labels.txt").read_text() == "blue\ngreen\nred\n"
    metadata = json.loads((run_folder / "best_model_metadata.json").read_text())
    assert metadata["decision"] == decision
    assert (metadata["options"]["classes"], metadata["options"]["image_target_size"]) == (CLASSES, [32, 32, 3])
    # Options of the training are left out.
    assert not metadata["options"].keys() & {"train_csv", "learning_rate", "save_model_path"}
    write_decision(run_folder, temperature=3.0, temperature_fitted_on="validation")
    paths = {name: str(run_folder / name) for name in ("best_model.keras", "best_model.onnx")}
    found = {name: read_decision(str(run_folder), CLASSES, False, path).temperature for name, path in paths.items()}
    assert found == {"best_model.keras": 3.0, "best_model.onnx": 2.0 if fitted_on else 3.0}


def test_a_class_name_stays_on_its_line(tmp_path):
    names = ["bl\nue", "green", "red"]
    write_metadata(str(tmp_path / "best_model.keras"), CompressConfigs(classes=names), Decision(names, False), True)
    assert (tmp_path / "best_model_labels.txt").read_text() == "bl ue\ngreen\nred\n"
    assert json.loads((tmp_path / "best_model_metadata.json").read_text())["options"]["classes"] == names


@pytest.mark.slow
def test_shipped_thresholds_decide(multilabel_csv, tmp_path):
    # Each label's probability is sigmoid(mean / 64), 0.5 to 0.98.
    build_colour_model("sigmoid").save(tmp_path / "best_model.keras")
    stored = {"image_directory": str(multilabel_csv.parent), "classes": CLASSES}
    stored |= {"multi_label_classification": True, "image_target_size": [32, 32, 3]}
    (tmp_path / "configs.json").write_text(json.dumps(stored))
    write_decision(tmp_path, multi_label=True, exact_match_threshold=0.875, thresholds_fitted_on="validation")
    export(tmp_path, "onnx", test_csv="")
    for name in ("best_model.keras", "configs.json", "decision.json"):
        os.remove(tmp_path / name)
    table = predict_photos(tmp_path / "best_model.onnx", multilabel_csv.parent, tmp_path)
    shown = table[[f"probability_{name}" for name in CLASSES]].to_numpy() >= 0.875
    expected = ["$".join(name for name, holds in zip(CLASSES, row, strict=True) if holds) for row in shown]
    assert table["predicted"].fillna("").tolist() == expected
    assert 0 < shown.mean() < 1
    assert len(set(expected)) > 2


# The report


@pytest.mark.slow
def test_only_artefacts_with_other_answers_are_rejected(run_folder, monkeypatch, capsys):
    blue = build_colour_model()
    blue.layers[2].set_weights([np.zeros((3, 3)), np.array([9, 0, 0])])
    for module in (tflite, onnx_format, saved_model):
        monkeypatch.setattr(module, "to_float32", lambda model: blue)
    (run_folder / "best_model.onnx").write_text("an earlier one")
    with pytest.raises(SystemExit) as raised:
        compress_weights.compress(CompressConfigs(model_path=str(run_folder), export=EXPORTS))
    assert raised.value.code == 1
    weights, *exported = json.loads((run_folder / "compression_report.json").read_text())["artefacts"]
    assert not weights["rejected"]
    names = ["best_model.rejected.tflite", "best_model.rejected.onnx", "best_model_saved_model.rejected"]
    assert [os.path.basename(artefact["path"]) for artefact in exported] == names
    for artefact in exported:
        assert artefact["rejected"]
        assert artefact["comparison"]["changed_predictions"] == 12
        assert artefact["comparison"]["accuracy_drop"] == pytest.approx(200 / 3)
        assert os.path.exists(artefact["path"])
    assert (run_folder / "best_model.onnx").read_text() == "an earlier one"
    assert not (run_folder / "best_model_saved_model").exists()
    assert capsys.readouterr().out.count("Rejected: ") == 3


def test_the_report_keeps_earlier_artefacts_of_the_same_model(run_folder):
    export(run_folder, "tflite", test_csv="")
    names = [os.path.basename(artefact["path"]) for artefact in export(run_folder, test_csv="")["artefacts"]]
    assert names == ["best_model_compressed.h5", "best_model.tflite"]


def test_earlier_artefacts_must_be_accepted_unchanged_and_of_the_same_model(tmp_path):
    (tmp_path / "kept.tflite").write_text("12345")
    path, now = str(tmp_path / "kept.tflite"), {"path": str(tmp_path / "new.h5")}
    artefact = {"path": path, "rejected": False, "files": {path: 5}}
    report = {"model_sha256": "a", "test_csv": None, "artefacts": [artefact]}

    def find(stored, model_sha256="a", now=now):
        (tmp_path / "compression_report.json").write_text(stored if isinstance(stored, str) else json.dumps(stored))
        return find_earlier(str(tmp_path), report | {"model_sha256": model_sha256, "artefacts": [now]})

    assert find(report) == [artefact]
    assert find(report, model_sha256="b") == find(report, now={"path": path}) == []
    for change in ({"rejected": True}, {"files": {path: 6}}, {"files": {path + "x": 5}}):
        assert find(report | {"artefacts": [artefact | change]}) == []
    for damaged in ('{"artefacts": 3', "[]", '{"model_sha256": "a"}'):
        assert find(damaged) == []


# Packages and options


@pytest.mark.parametrize("name", ["tf2onnx", "onnxruntime"])
def test_a_missing_package_is_an_error_before_any_work(name, run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    install = r"pip install 'tf2onnx>=\S+' 'onnxruntime>=\S+'$"
    with pytest.raises(UserError, match=f"^--export onnx needs tf2onnx, onnxruntime: .*{name}.* {install}"):
        export(run_folder, "onnx")
    assert sorted(os.listdir(run_folder)) == ["best_model.keras", "configs.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights_dtype", "int4"], "weights_dtype: .*float32, float16, int8.*'int4'"),
        (["--export", "coreml"], "export: .*tflite, onnx, saved_model.*'coreml'"),
        (["--export", "onnx", "--export_quantization", "int8"], "export_quantization: .* --export tflite"),
        (["--export", "tflite", "--export_quantization", "int4"], "export_quantization: .*none, dynamic, int8"),
    ],
)
def test_invalid_options_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        CompressConfigs.from_command_line(arguments=arguments)


# The scripts that take exported models


@pytest.mark.slow
def test_predict_gives_the_same_labels_in_the_runs_folder_and_elsewhere(exported_copy, photo_folder, tmp_path):
    export(exported_copy, "tflite", export_quantization="int8")
    original = predict_photos(exported_copy / "best_model.keras", photo_folder, tmp_path)
    assert original["predicted"].tolist() == sorted(CLASSES * 12)
    columns = [f"probability_{class_name}" for class_name in CLASSES]
    for is_at_home in (True, False):
        if not is_at_home:
            # Away from the run, the files next to an artefact must be enough.
            for name in ("best_model.keras", "configs.json"):
                os.remove(exported_copy / name)
        for name in (*ARTEFACTS, "best_model_int8.tflite", "best_model_compressed.h5"):
            found = predict_photos(exported_copy / name, photo_folder, tmp_path)
            assert found["predicted"].tolist() == original["predicted"].tolist()
            bound = 0.02 if "int8" in name else 1e-5
            np.testing.assert_allclose(found[columns], original[columns], atol=bound)


@pytest.mark.slow
def test_test_measures_artefacts_and_leaves_the_run_as_it_is(exported_copy, capsys):
    stored = json.loads((exported_copy / "configs.json").read_text())
    configs = CompressConfigs(**{name: stored[name] for name in ("train_csv", "test_csv", "image_directory")})
    original = evaluation.main(configs.replace(load_model_path=str(exported_copy / "best_model.keras")))
    kept = [exported_copy / "evaluation" / "metrics.json", exported_copy / "decision.json"]
    before = [path.read_text() for path in kept]
    for artefact in ("best_model.onnx", "best_model_saved_model"):
        found = evaluation.main(configs.replace(load_model_path=str(exported_copy / artefact)))
        assert found["sets"]["test"]["accuracy"] == original["sets"]["test"]["accuracy"] == 1
        folders = ("evaluation", f"evaluation_{artefact}")
        predictions = [pd.read_csv(exported_copy / folder / "predictions.csv") for folder in folders]
        assert predictions[0]["predicted"].tolist() == predictions[1]["predicted"].tolist()
        assert [path.read_text() for path in kept] == before
        assert "no heatmaps: Grad-CAM needs the Keras model" in capsys.readouterr().out


@pytest.mark.parametrize("script", [train, draw_activations, compress_weights])
def test_scripts_that_need_the_layers_refuse_exported_models(script, exported, small_run):
    path, stored = exported.folder / "best_model.onnx", json.loads((exported.folder / "configs.json").read_text())
    given = {"image_directory": stored["image_directory"], "load_model_path": str(path)}
    configs = small_run(stored["train_csv"], stored["test_csv"], **given)
    if script is not train:
        configs = CompressConfigs(test_csv=stored["test_csv"], **given)
    with pytest.raises(UserError, match=r"best_model\.onnx is an exported model, .*predict\.py and test\.py"):
        script.main(configs)
