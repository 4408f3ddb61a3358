"""Models for other runtimes: their own answers, what ships beside them, and the scripts that take them."""

import gc
import json
import os
import shutil
import sys

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
    predict_photos,
    run_folder,  # noqa: F401
    run_tflite,
)

import compress_weights
import draw_activations
import test as evaluation
import train
from compress_weights import CompressConfigs
from finetune.core.options import UserError
from finetune.evaluation.decision_file import read_decision
from finetune.models import onnx_format, saved_model, tflite
from finetune.models.formats import FORMATS

# What is written


def test_each_runtime_gives_the_models_answers(run_folder):
    report = export(run_folder, *EXPORTS)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.float32)
    for name, run in RUNTIMES.items():
        np.testing.assert_allclose(run(run_folder / name, images), answer(images), atol=1e-5)
    assert [artefact["kind"] for artefact in report["artefacts"]] == ["weights", *EXPORTS]
    for artefact in report["artefacts"]:
        assert artefact["precision"] == "float32"
        assert artefact["comparison"]["accuracy"] == {"before": 1.0, "after": 1.0}
        assert artefact["comparison"]["largest_difference"] < 1e-5
        assert min(artefact["comparison"]["images_per_second"].values()) > 0
    assert report == json.loads((run_folder / "compression_report.json").read_text())
    assert not [name for name in os.listdir(run_folder) if "rejected" in name or name.startswith(".tmp")]


def test_sizes_are_those_of_all_files(run_folder):
    artefact = export(run_folder, "saved_model")["artefacts"][1]
    files = [path for path in (run_folder / "best_model_saved_model").rglob("*") if path.is_file()]
    assert artefact["files"] == {str(path): path.stat().st_size for path in sorted(files)}
    assert len(files) >= 3


def test_a_saved_model_holds_each_weight_once(run_folder):
    wide = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(3, "softmax")])
    wide.save(run_folder / "best_model.keras")
    export(run_folder, "saved_model")
    (variables,) = (run_folder / "best_model_saved_model" / "variables").glob("variables.data*")
    assert 1 <= variables.stat().st_size / (4 * wide.count_params()) < 1.2


def test_onnx_leaves_no_copies_of_the_model_in_memory(run_folder):
    import tf2onnx

    gc.disable()
    try:
        export(run_folder, "onnx")
        assert not [one for one in gc.get_objects() if isinstance(one, tf2onnx.graph.Graph)]
    finally:
        gc.enable()


def test_labels_and_metadata_stand_beside(run_folder):
    decision = {"classes": CLASSES, "multi_label": False, "temperature": 2.0, "temperature_fitted_on": "validation"}
    decision |= {"exact_match_threshold": 0.5, "best_f1_thresholds": None, "thresholds_fitted_on": None}
    decision |= {"model": "best_model.keras"}
    (run_folder / "decision.json").write_text(json.dumps(decision))
    export(run_folder, "tflite")
    assert (run_folder / "best_model_labels.txt").read_text() == "blue\ngreen\nred\n"
    metadata = json.loads((run_folder / "best_model_metadata.json").read_text())
    assert metadata["decision"] == decision
    assert (metadata["options"]["classes"], metadata["options"]["image_target_size"]) == (CLASSES, [32, 32, 3])
    # What only says how to train stays at home.
    assert not metadata["options"].keys() & {"train_csv", "learning_rate", "save_model_path"}


def test_a_class_name_stays_on_its_line(run_folder):
    stored = json.loads((run_folder / "configs.json").read_text())
    names = ["bl\nue", "green", "red"]
    (run_folder / "configs.json").write_text(json.dumps(stored | {"classes": names}))
    export(run_folder, "tflite", test_csv="")
    assert (run_folder / "best_model_labels.txt").read_text() == "bl ue\ngreen\nred\n"
    assert json.loads((run_folder / "best_model_metadata.json").read_text())["options"]["classes"] == names


@pytest.mark.parametrize(("quantization", "kernel"), [("none", 4), ("dynamic", 1), ("int8", 1)])
def test_quantization_stores_kernels_in_bytes(quantization, kernel, run_folder):
    rng = np.random.default_rng(0)
    convolution = keras.layers.Conv2D(64, 7, activation="relu")
    dense = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, "softmax")]
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), convolution, *dense])
    convolution.set_weights([rng.normal(size=(7, 7, 3, 64)), np.zeros(64)])
    # Small enough that no class is certain: what rounding does shows in all of them, and in none as much as is allowed.
    dense[1].set_weights([rng.normal(0, 0.05, (64, 3)), np.zeros(3)])
    model.save(run_folder / "best_model.keras")
    artefact = export(run_folder, "tflite", export_quantization=quantization, tolerance=100)["artefacts"][1]
    name = {"none": "best_model.tflite"}.get(quantization, f"best_model_{quantization}.tflite")
    assert artefact["path"] == str(run_folder / name)
    assert artefact["precision"] == {"none": "float32"}.get(quantization, quantization)
    # 9,408 numbers, and no more than 7 kB for all else.
    assert 0 <= os.path.getsize(artefact["path"]) - kernel * 7 * 7 * 3 * 64 < 7000
    interpreter = Interpreter(artefact["path"])
    ends = interpreter.get_input_details() + interpreter.get_output_details()
    assert [end["dtype"] for end in ends] == [np.float32, np.float32]
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    bound = {"none": 1e-5, "dynamic": 0.02, "int8": 0.03}[quantization]
    found = run_tflite(artefact["path"], images)
    np.testing.assert_allclose(found, model.predict(images, verbose=0), atol=bound)


def test_int8_takes_its_ranges_from_the_training_images(run_folder, monkeypatch, capsys):
    shown, write = [], tflite.write

    def spy(model, path, precision, calibrate):
        return write(model, path, precision, lambda: shown.append(calibrate()) or shown[0])

    monkeypatch.setattr(tflite, "write", spy)
    export(run_folder, "tflite", export_quantization="int8")
    (images,) = shown
    names = pd.read_csv(run_folder.parent / "train.csv")["path"]
    stored = json.loads((run_folder / "configs.json").read_text())
    from finetune.data.images import read_image, resize_image

    paths = [os.path.join(stored["image_directory"], name) for name in names]
    expected = [resize_image(read_image(path, (32, 32)), (32, 32)) for path in paths]
    assert {image.dtype for image in images} == {np.dtype(np.uint8)}
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in expected)
    assert "int8: ranges from 18 images" in capsys.readouterr().out


def test_int8_without_training_images_is_told(run_folder):
    os.remove(run_folder.parent / "train.csv")
    with pytest.raises(UserError, match="takes its ranges from training images. Expected a CSV file"):
        export(run_folder, "tflite", export_quantization="int8")
    assert not (run_folder / "best_model_int8.tflite").exists()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_becomes_float32(policy, run_folder):
    build_colour_model(dtype=policy).save(run_folder / "best_model.keras")
    export(run_folder, *EXPORTS)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.float32)
    for name, run in RUNTIMES.items():
        # Nearer than 8 or 11 bits would be.
        np.testing.assert_allclose(run(run_folder / name, images), answer(images), atol=1e-6)


@pytest.mark.slow
def test_a_second_export_takes_the_place_of_the_first(run_folder):
    export(run_folder, *EXPORTS)
    model = build_colour_model()
    model.layers[2].set_weights([np.zeros((3, 3)), np.array([9, 0, 0])])
    model.save(run_folder / "best_model.keras")
    export(run_folder, *EXPORTS)
    images = np.zeros((1, 32, 32, 3), np.float32)
    for name, run in RUNTIMES.items():
        assert run(run_folder / name, images).argmax() == 0
    assert not [name for name in os.listdir(run_folder) if name.startswith(".tmp")]


@pytest.mark.slow
def test_a_folder_may_be_called_rejected(run_folder):
    folder = run_folder.rename(run_folder.with_name("first.rejected.run"))
    for _ in range(2):
        report = export(folder, *EXPORTS)
    paths = [folder / name for name in ("best_model_compressed.h5", *ARTEFACTS)]
    assert [artefact["path"] for artefact in report["artefacts"]] == list(map(str, paths))
    assert all(path.exists() for path in paths)


# The gate


def test_only_what_answers_otherwise_is_rejected(run_folder, monkeypatch, capsys):
    blue = build_colour_model()
    blue.layers[2].set_weights([np.zeros((3, 3)), np.array([9, 0, 0])])
    for module in (tflite, onnx_format, saved_model):
        monkeypatch.setattr(module, "to_float32", lambda model: blue)
    (run_folder / "best_model.onnx").write_text("an earlier one")
    with pytest.raises(SystemExit) as raised:
        compress_weights.compress(CompressConfigs(model_path=str(run_folder), export=EXPORTS))
    assert raised.value.code == 1
    report = json.loads((run_folder / "compression_report.json").read_text())
    weights, *exported = report["artefacts"]
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


@pytest.mark.slow
def test_the_report_keeps_what_an_earlier_call_made_of_the_same_model(run_folder):
    def list_names():
        found = json.loads((run_folder / "compression_report.json").read_text())["artefacts"]
        return [os.path.basename(artefact["path"]) for artefact in found]

    export(run_folder, "tflite")
    export(run_folder, "tflite", export_quantization="dynamic")
    assert list_names() == ["best_model_compressed.h5", "best_model_dynamic.tflite", "best_model.tflite"]
    os.remove(run_folder / "best_model.tflite")
    export(run_folder)
    assert list_names() == ["best_model_compressed.h5", "best_model_dynamic.tflite"]
    build_colour_model("sigmoid").save(run_folder / "best_model.keras")
    export(run_folder)
    assert list_names() == ["best_model_compressed.h5"]


def test_a_damaged_earlier_report_is_no_obstacle(run_folder):
    (run_folder / "compression_report.json").write_text('{"artefacts": 3')
    assert len(export(run_folder)["artefacts"]) == 1


def test_without_a_test_set_exports_are_written_and_not_compared(run_folder, capsys):
    report = export(run_folder, *EXPORTS, test_csv="")
    assert {artefact["comparison"] for artefact in report["artefacts"]} == {None}
    assert all((run_folder / name).exists() for name in ARTEFACTS)
    assert capsys.readouterr().out.count("Written, not compared: ") == 4


# Packages and options


@pytest.mark.parametrize("name", ["tf2onnx", "onnxruntime"])
def test_a_missing_package_is_told_before_any_work(name, run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    install = r"Install: pip install 'tf2onnx>=\S+' 'onnxruntime>=\S+'$"
    with pytest.raises(UserError, match=f"^--export onnx needs tf2onnx, onnxruntime: .*{name}.* {install}"):
        export(run_folder, "onnx")
    assert sorted(os.listdir(run_folder)) == ["best_model.keras", "configs.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export", "coreml"], "export: expected any of tflite, onnx, saved_model. Received: 'coreml'"),
        (["--export", "onnx", "--export_quantization", "int8"], "expected none without --export tflite"),
        (["--export", "tflite", "--export_quantization", "int4"], "expected one of none, dynamic, int8"),
    ],
)
def test_options_that_mean_nothing_are_told(arguments, message):
    with pytest.raises(UserError, match=message):
        CompressConfigs.from_command_line(arguments=arguments)


# The scripts that take them


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ARTEFACTS, "best_model_int8.tflite", "best_model_compressed.h5"])
@pytest.mark.parametrize("place", ["the run's folder", "elsewhere"])
def test_predict_gives_the_same_labels(name, place, run_folder, photo_folder, tmp_path):
    quantization = {"best_model_int8.tflite": "int8"}.get(name, "none")
    exports = ["tflite"] if "tflite" in name else [kind for kind in ("onnx", "saved_model") if kind in name]
    export(run_folder, *exports, export_quantization=quantization)
    original = predict_photos(run_folder / "best_model.keras", photo_folder, tmp_path)
    if place == "elsewhere":
        # Away from the run, what is beside it must do.
        for kept in ("best_model.keras", "configs.json"):
            os.remove(run_folder / kept)
    found = predict_photos(run_folder / name, photo_folder, tmp_path)
    assert found["predicted"].tolist() == original["predicted"].tolist() == sorted(CLASSES * 12)
    columns = [f"probability_{class_name}" for class_name in CLASSES]
    bound = 0.02 if quantization == "int8" else 1e-5
    np.testing.assert_allclose(found[columns], original[columns], atol=bound)


def test_shipped_thresholds_decide(multilabel_csv, tmp_path):
    # Each label's probability is sigmoid(mean / 64), 0.5 to 0.98.
    build_colour_model("sigmoid").save(tmp_path / "best_model.keras")
    stored = {"test_csv": str(multilabel_csv), "image_directory": str(multilabel_csv.parent), "classes": CLASSES}
    stored |= {"multi_label_classification": True, "image_target_size": [32, 32, 3]}
    (tmp_path / "configs.json").write_text(json.dumps(stored))
    decision = {"classes": CLASSES, "multi_label": True, "temperature": 1.0, "temperature_fitted_on": None}
    decision |= {"exact_match_threshold": 0.875, "best_f1_thresholds": None, "thresholds_fitted_on": "validation"}
    (tmp_path / "decision.json").write_text(json.dumps(decision | {"model": "best_model.keras"}))
    export(tmp_path, "onnx")
    for name in ("best_model.keras", "configs.json", "decision.json"):
        os.remove(tmp_path / name)
    table = predict_photos(tmp_path / "best_model.onnx", multilabel_csv.parent, tmp_path)
    shown = table[[f"probability_{name}" for name in CLASSES]].to_numpy() >= 0.875
    expected = ["$".join(name for name, holds in zip(CLASSES, row, strict=True) if holds) for row in shown]
    assert table["predicted"].fillna("").tolist() == expected
    assert 0 < shown.mean() < 1
    assert len(set(expected)) > 2


@pytest.mark.parametrize("fitted_on", ["validation", None])
def test_a_later_decision_changes_no_artefact_that_ships_with_one(fitted_on, run_folder):
    decision = {"classes": CLASSES, "multi_label": False, "temperature": 2.0, "temperature_fitted_on": fitted_on}
    decision |= {"exact_match_threshold": 0.5, "best_f1_thresholds": None, "thresholds_fitted_on": None}
    decision |= {"model": "best_model.keras"}
    (run_folder / "decision.json").write_text(json.dumps(decision))
    export(run_folder, "onnx")
    later = decision | {"temperature": 3.0, "temperature_fitted_on": "validation"}
    (run_folder / "decision.json").write_text(json.dumps(later))
    paths = {name: str(run_folder / name) for name in ("best_model.keras", "best_model.onnx")}
    found = {name: read_decision(str(run_folder), CLASSES, False, path).temperature for name, path in paths.items()}
    assert found == {"best_model.keras": 3.0, "best_model.onnx": 2.0 if fitted_on else 3.0}


@pytest.mark.slow
def test_test_measures_artefacts_and_leaves_the_run_as_it_is(run_folder, capsys):
    export(run_folder, *EXPORTS)
    stored = json.loads((run_folder / "configs.json").read_text())
    tables = {name: stored[name] for name in ("train_csv", "test_csv", "image_directory")}
    configs = CompressConfigs(**tables)
    original = evaluation.main(configs.replace(load_model_path=str(run_folder / "best_model.keras")))
    before = (run_folder / "evaluation" / "metrics.json").read_text()
    decision = (run_folder / "decision.json").read_text()
    for artefact in ARTEFACTS:
        found = evaluation.main(configs.replace(load_model_path=str(run_folder / artefact)))
        assert found["sets"]["test"]["accuracy"] == original["sets"]["test"]["accuracy"] == 1
        folders = ("evaluation", f"evaluation_{artefact}")
        predictions = [pd.read_csv(run_folder / folder / "predictions.csv") for folder in folders]
        assert predictions[0]["predicted"].tolist() == predictions[1]["predicted"].tolist()
        assert (run_folder / "evaluation" / "metrics.json").read_text() == before
        assert (run_folder / "decision.json").read_text() == decision
        assert "no heatmaps: Grad-CAM needs the Keras model" in capsys.readouterr().out


@pytest.mark.parametrize("script", [train, draw_activations, compress_weights])
def test_what_needs_the_layers_says_so(script, run_folder, small_run):
    export(run_folder, "onnx")
    stored = json.loads((run_folder / "configs.json").read_text())
    configs = small_run(
        stored["train_csv"],
        stored["test_csv"],
        image_directory=stored["image_directory"],
        load_model_path=str(run_folder / "best_model.onnx"),
    )
    if script is not train:
        names = ("test_csv", "image_directory", "load_model_path")
        configs = CompressConfigs(**{name: getattr(configs, name) for name in names})
    with pytest.raises(UserError, match=r"best_model\.onnx is an exported model, which predict\.py and test\.py take"):
        script.main(configs)


# Foreign and damaged ones


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV3Small", "EfficientNetB0", "ConvNeXtTiny", "DenseNet121"])
def test_backbones_answer_the_same_in_each_runtime(name, tmp_path):
    from configs import Configs
    from model import ModelFactory

    options = {"visual_model_name": name, "image_target_size": (64, 64, 3), "use_imagenet_weights": False}
    model = ModelFactory().get_model(Configs(**options, classes=CLASSES))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.float32)
    expected = model.predict(images, verbose=0)
    for (kind, artefact), run in zip(zip(EXPORTS, ARTEFACTS, strict=True), RUNTIMES.values(), strict=True):
        FORMATS[kind].runtime().write(model, str(tmp_path / artefact), "float32", list)
        np.testing.assert_allclose(run(tmp_path / artefact, images), expected, atol=1e-5)
    shutil.rmtree(tmp_path)
