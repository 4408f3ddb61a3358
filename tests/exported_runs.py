"""Runs whose models are exported."""

import json

import keras
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

import compress_weights
import predict
from compress_weights import CompressConfigs

CLASSES = ["blue", "green", "red"]
EXPORTS = ["tflite", "onnx", "saved_model"]
ARTEFACTS = ["best_model.tflite", "best_model.onnx", "best_model_saved_model"]


def build_colour_model(activation="softmax", **options):
    """Builds a model that tells the three colours of the photos apart: the mean of each channel is a logit."""
    pooling, dense = keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, **options)
    layers = [keras.layers.Rescaling(1 / 64), pooling, dense, keras.layers.Activation(activation, dtype="float32")]
    model = keras.Sequential([keras.Input((32, 32, 3)), *layers])
    dense.set_weights([np.eye(3, dtype=np.float32)[::-1], np.zeros(3, np.float32)])
    return model


def answer(images):
    """Works out what the colour model answers, in float64."""
    logits = images.astype(np.float64).mean(axis=(1, 2))[:, ::-1] / 64
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def predict_photos(model_path, photo_folder, folder):
    """Runs predict.py and returns what it wrote."""
    path = folder / "predictions.csv"
    options = {"load_model_path": str(model_path), "input": str(photo_folder), "write_path": str(path)}
    predict.main(predict.PredictConfigs(**options, batch_size=5))
    return pd.read_csv(path)


def make_run(photo_folder, folder):
    """Makes a run's folder with a model that is always right, and the two tables of 18 photos in its configs.json."""
    folder.mkdir()
    rows = [(f"{path.parent.name}/{path.name}", path.parent.name) for path in sorted(photo_folder.rglob("*.jpg"))]
    stored = {"image_directory": str(photo_folder), "classes": CLASSES, "image_target_size": [32, 32, 3]}
    for number, name in enumerate(("train", "test")):
        stored[f"{name}_csv"] = str(folder.parent / f"{name}.csv")
        pd.DataFrame(rows[number::2], columns=["path", "class"]).to_csv(stored[f"{name}_csv"], index=False)
    (folder / "configs.json").write_text(json.dumps(stored))
    build_colour_model().save(folder / "best_model.keras")
    return folder


@pytest.fixture
def run_folder(photo_folder, tmp_path):
    """A run's folder, see `make_run`."""
    return make_run(photo_folder, tmp_path / "run")


def write_decision(folder, **values):
    """Writes a decision.json by hand."""
    decision = {"classes": CLASSES, "multi_label": False, "temperature": 1.0, "temperature_fitted_on": None}
    decision |= {"exact_match_threshold": 0.5, "best_f1_thresholds": None, "thresholds_fitted_on": None}
    decision |= {"model": "best_model.keras", "abstention": None} | values
    (folder / "decision.json").write_text(json.dumps(decision))
    return decision


def export(folder, *kinds, **options):
    return compress_weights.main(CompressConfigs(model_path=str(folder), export=list(kinds), **options))


def run_tflite(path, images):
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    found = []
    for image in images:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0])
    return np.array(found)


def run_onnx(path, images):
    return onnxruntime.InferenceSession(str(path)).run(None, {"image": images})[0]


def run_saved_model(path, images):
    model = tf.saved_model.load(str(path))
    return model.serve(tf.constant(images)).numpy()


RUNTIMES = dict(zip(ARTEFACTS, (run_tflite, run_onnx, run_saved_model), strict=True))
