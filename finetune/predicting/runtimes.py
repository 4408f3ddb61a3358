"""Loading a model to predict with: a Keras model, or an exported one in its own runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from finetune.core.arguments import take_path
from finetune.models.exported import ExportedModel
from finetune.models.formats import MODEL_SUFFIXES, importing, is_exported, require_format
from finetune.models.model_files import check_fit, load_fitting_model
from finetune.models.safety import telling_damage


def load_predictor(path: str, class_names: Sequence[str], image_size: Sequence[int]) -> keras.Model | ExportedModel:
    """Loads a Keras model or an exported one.

    Raises:
        UserError: the file is no model, does not fit the classes or the image size, or its runtime is not installed.
    """
    # The .json file of compressed weights leads to both of their files.
    if not is_exported(path) and path.endswith((*MODEL_SUFFIXES, ".json")):
        return load_fitting_model(path, class_names, image_size)
    model = load_exported_model(path)
    check_fit(path, model.input_shape, model.output_shape, class_names, image_size)
    return model


def load_exported_model(path: str) -> ExportedModel:
    """Loads an exported model in its own runtime, which uses all cores.

    Args:
        path: a `.tflite` or `.onnx` file, or the folder of a SavedModel.

    Raises:
        UserError: the file is not such a model or is damaged, or its runtime is not installed.
    """
    path = take_path("path", path)
    found = require_format(path)
    damage = telling_damage(f"{path} is not {found.title} with images in and probabilities out")
    with damage, importing(path, found.reader_packages):
        if os.path.isfile(path) and not os.path.getsize(path):
            raise ValueError("It is empty.")
        return found.runtime().load(path)


def compile_predictor(model: keras.Model | ExportedModel) -> Callable[[Any], Any]:
    """Returns a function from uint8 images `(batch, height, width, 3)` to probabilities, compiled once."""
    if isinstance(model, ExportedModel):
        return model
    signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)
    return tf.function(lambda images: model(images, training=False), input_signature=[signature])
