"""TensorFlow's SavedModel: writing a folder, and running one that is checked to do nothing but compute."""

from __future__ import annotations

import os

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry

from finetune.core.files import atomic_path
from finetune.core.options import UserError
from finetune.core.texts import shorten
from finetune.models.exported import OUTPUTS, Calibration, ExportedModel, find_outputs, quiet, to_float32, trace

# Stateful ops that only read the model's weights, or call functions that are checked too.
READING_OPS = {"VarHandleOp", "ReadVariableOp", "DisableCopyOnRead", "StatefulPartitionedCall"}
HARMLESS_OBJECTS = {"user_object", "function", "bare_concrete_function", "variable", "constant", "captured_tensor"}


def write(model: keras.Model, path: str, precision: str, _: Calibration) -> tuple[str, ...]:
    """Writes a folder that takes any number of images; returns its path.

    It uses TensorFlow's exporter: Keras 3.15's writes each weight twice (github.com/keras-team/keras/issues/23553).
    """
    model, module = to_float32(model), tf.Module()
    module.weights = [weight.value for weight in model.variables]
    module.serve = trace(model)
    with atomic_path(path) as temporary, quiet():
        tf.saved_model.save(module, temporary, signatures=module.serve)
    return (path,)


def load(path: str) -> ExportedModel:
    """Loads a folder into TensorFlow; raises UserError if it does more than compute."""
    _check_graph(path)
    loaded = tf.saved_model.load(path)
    function = loaded.signatures["serving_default"]
    ((name, inputs),) = function.structured_input_signature[1].items()
    outputs, features = find_outputs(function.structured_outputs)

    def run_all(images: np.ndarray) -> dict[str, tf.Tensor]:
        # `loaded` keeps the weights alive; the function alone does not.
        return loaded.signatures["serving_default"](**{name: tf.constant(images)})

    def run(images: np.ndarray) -> np.ndarray:
        return find_outputs(run_all(images))[0].numpy()

    def run_with_features(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = run_all(images)
        return tuple(found[one].numpy() for one in OUTPUTS)

    return ExportedModel(run, inputs.shape, outputs.shape, run_with_features if features is not None else None)


def _check_graph(path: str) -> None:
    """Raises UserError if a SavedModel does more than compute: TensorFlow's programs can write files and run Python."""
    content = saved_model_pb2.SavedModel()
    with open(os.path.join(path, "saved_model.pb"), "rb") as file:
        content.ParseFromString(file.read())
    (graph,) = content.meta_graphs
    if not graph.HasField("object_graph_def"):
        # Loading TensorFlow 1's format runs any op that the file names.
        raise ValueError("It is of TensorFlow 1.")
    functions = {function.signature.name: function for function in graph.graph_def.library.function}
    foreign = {node.WhichOneof("kind") for node in graph.object_graph_def.nodes} - HARMLESS_OBJECTS
    # Functions that cannot be reached from here never run, such as the one that saves the weights.
    pending, seen = list(graph.object_graph_def.concrete_functions), set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in functions[name].node_def:
            called = [attribute.func.name for attribute in node.attr.values() if attribute.HasField("func")]
            called += [part.name for attribute in node.attr.values() for part in attribute.list.func]
            pending += called
            definition = op_def_registry.get(node.op)
            if node.op not in READING_OPS and (definition is None or definition.is_stateful):
                foreign.add(node.op)
    if foreign:
        raise UserError(
            f"{path} is not loaded: it holds {shorten(min(map(str, foreign)))}, which does more than compute. "
            "Export the model again with compress_weights.py --export saved_model."
        )
