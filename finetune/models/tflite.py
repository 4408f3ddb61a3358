"""TensorFlow Lite: writing files, and running them one image at a time."""

from __future__ import annotations

import os
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from finetune.core.files import atomic_path
from finetune.core.scripts import hiding_stderr
from finetune.models.exported import Calibration, ExportedModel, describe_input, to_float32


def write(model: keras.Model, path: str, precision: str, calibrate: Calibration) -> tuple[str, ...]:
    """Writes a file that takes one image at a time, as on phones; returns its path."""
    options: dict[str, Any] = {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}
    if precision != "float32":
        options["optimizations"] = [tf.lite.Optimize.DEFAULT]
    if precision == "int8":
        # Ops without an 8-bit version stay float32, as do images and probabilities.
        options["target_spec"]["supported_ops"].insert(0, tf.lite.OpsSet.TFLITE_BUILTINS_INT8)
        images = calibrate()
        options["representative_dataset"] = lambda: ([image[None].astype(np.float32)] for image in images)
    model = to_float32(model)
    with atomic_path(path) as temporary, hiding_stderr():
        model.export(temporary, format="litert", verbose=False, input_signature=[describe_input(model, 1)], **options)
    return (path,)


def load(path: str) -> ExportedModel:
    """Loads a file into LiteRT's interpreter, or into TensorFlow's if LiteRT is not installed."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        # The same interpreter; TensorFlow has deprecated it.
        Interpreter = tf.lite.Interpreter
    with open(path, "rb") as file:
        content = file.read()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*Warning: tf.lite.Interpreter is deprecated")
        interpreter = Interpreter(model_content=content, num_threads=os.cpu_count())
    (inputs,), (outputs,) = interpreter.get_input_details(), interpreter.get_output_details()
    if any(part["dtype"] is not np.float32 for part in (inputs, outputs)):
        raise ValueError("Its numbers are not float32.")
    interpreter.resize_tensor_input(inputs["index"], [1, *inputs["shape"][1:]])
    with hiding_stderr():
        interpreter.allocate_tensors()

    def run(images: np.ndarray) -> np.ndarray:
        probabilities = np.empty((len(images), outputs["shape"][-1]), np.float32)
        for row, image in enumerate(images):
            interpreter.set_tensor(inputs["index"], image[None])
            interpreter.invoke()
            probabilities[row] = interpreter.get_tensor(outputs["index"])[0]
        return probabilities

    return ExportedModel(run, inputs["shape"].tolist(), outputs["shape"].tolist())
