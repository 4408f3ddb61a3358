"""Running models that were exported, each in its own runtime."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry

from finetune.core.arguments import take_path
from finetune.core.options import UserError
from finetune.core.quiet import hiding_stderr
from finetune.core.texts import join_names, shorten
from finetune.models.artefacts import GRAPH_FILE, is_exported
from finetune.models.model_files import check_fit, load_fitting_model
from finetune.models.safety import telling_damage

# Ops with a state that do no more than read a model's own weights, or call other functions that are looked at too.
READING_OPS = {"VarHandleOp", "ReadVariableOp", "DisableCopyOnRead", "StatefulPartitionedCall"}
HARMLESS_OBJECTS = {"user_object", "function", "bare_concrete_function", "variable", "constant", "captured_tensor"}
# Only exports need these; what works with the versions in requirements.txt.
OPTIONAL_PACKAGES = {"tf2onnx": "tf2onnx>=1.17,<2", "onnxruntime": "onnxruntime>=1.20,<2"}


class ExportedModel:
    """A model that `compress_weights.py` exported, in its own runtime; has what predicting needs of a Keras model.

    Args:
        run: from images, float32 RGB `(batch, height, width, 3)` in `[0, 255]`, to probabilities, `(batch, classes)`.
        input_shape: of its images, None for a size that is not fixed; that of the batch is of no account.
        output_shape: of its probabilities.
    """

    def __init__(
        self, run: Callable[[np.ndarray], np.ndarray], input_shape: Sequence[Any], output_shape: Sequence[Any]
    ) -> None:
        shapes = [
            [size if isinstance(size, int) and size > 0 else None for size in shape[1:]]
            for shape in (input_shape, output_shape)
        ]
        self.input_shape, self.output_shape = ((None, *shape) for shape in shapes)
        self._run = run

    def __call__(self, images: Any, training: bool = False) -> np.ndarray:
        """Returns the probabilities of images of any numeric type, float32 `(batch, classes)`."""
        return self._run(np.asarray(images, np.float32))


@contextlib.contextmanager
def importing(purpose: str, *names: str) -> Iterator[None]:
    """Tells how to install packages that few need, where importing one of them fails.

    Args:
        purpose: begins the message.
        names: keys of `OPTIONAL_PACKAGES`.

    Raises:
        UserError: one is missing.
    """
    try:
        yield
    except ImportError as error:
        packages = " ".join(f"'{OPTIONAL_PACKAGES[name]}'" for name in names)
        raise UserError(f"{purpose} needs {join_names(names)}: {error}. Install: pip install {packages}") from error


def load_predictor(path: str, class_names: Sequence[str], image_size: Sequence[int]) -> keras.Model | ExportedModel:
    """Loads what is to predict, a Keras model or an exported one; which `compile_predictor` makes a function.

    Raises:
        UserError: the file is no model, does not fit, or its runtime is not installed.
    """
    if not is_exported(path):
        return load_fitting_model(path, class_names, image_size)
    model = load_exported_model(path)
    check_fit(path, model.input_shape, model.output_shape, class_names, image_size)
    return model


def load_exported_model(path: str) -> ExportedModel:
    """Loads an exported model in its own runtime, which uses all cores.

    Args:
        path: a `.tflite` or `.onnx` file, or the folder of a SavedModel.

    Raises:
        UserError: the file is no such model or is damaged, or its runtime is not installed.
    """
    path = take_path("path", path)
    suffix = os.path.splitext(path)[1]
    by_suffix = {".tflite": ("a TensorFlow Lite model", _load_tflite), ".onnx": ("an ONNX model", _load_onnx)}
    kind, load = by_suffix.get(suffix, ("a SavedModel", _load_saved_model))
    with telling_damage(f"{path} is not {kind} with images in and probabilities out"):
        if os.path.isfile(path) and not os.path.getsize(path):
            raise ValueError("It is empty.")
        return load(path)


def _load_tflite(path: str) -> ExportedModel:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        # The same interpreter, which TensorFlow means to drop.
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
        """Runs the images one after the other: the file holds one shape."""
        probabilities = np.empty((len(images), outputs["shape"][-1]), np.float32)
        for row, image in enumerate(images):
            interpreter.set_tensor(inputs["index"], image[None])
            interpreter.invoke()
            probabilities[row] = interpreter.get_tensor(outputs["index"])[0]
        return probabilities

    return ExportedModel(run, inputs["shape"].tolist(), outputs["shape"].tolist())


def _load_onnx(path: str) -> ExportedModel:
    with importing(path, "onnxruntime"):
        import onnxruntime
    available = onnxruntime.get_available_providers()
    # Others that may be there compile for minutes, or send the images elsewhere.
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    session = onnxruntime.InferenceSession(path, providers=providers)
    (inputs,), (outputs,) = session.get_inputs(), session.get_outputs()

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {inputs.name: images})[0]

    return ExportedModel(run, inputs.shape, outputs.shape)


def _load_saved_model(path: str) -> ExportedModel:
    _check_graph(path)
    loaded = tf.saved_model.load(path)
    function = loaded.signatures["serving_default"]
    ((name, inputs),) = function.structured_input_signature[1].items()
    ((output_name, outputs),) = function.structured_outputs.items()

    def run(images: np.ndarray) -> np.ndarray:
        # The function alone does not keep the weights.
        return loaded.signatures["serving_default"](**{name: tf.constant(images)})[output_name].numpy()

    return ExportedModel(run, inputs.shape, outputs.shape)


def _check_graph(path: str) -> None:
    """Checks that a SavedModel does no more than compute: TensorFlow's programs may write files and run Python.

    Raises:
        UserError: it holds anything else.
    """
    content = saved_model_pb2.SavedModel()
    with open(os.path.join(path, GRAPH_FILE), "rb") as file:
        content.ParseFromString(file.read())
    (graph,) = content.meta_graphs
    if not graph.HasField("object_graph_def"):
        # TensorFlow 1's form, whose loading runs whatever the file names.
        raise ValueError("It is of TensorFlow 1.")
    functions = {function.signature.name: function for function in graph.graph_def.library.function}
    foreign = {node.WhichOneof("kind") for node in graph.object_graph_def.nodes} - HARMLESS_OBJECTS
    # What cannot be reached from here, such as the function that saves the weights, never runs.
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


def compile_predictor(model: keras.Model | ExportedModel) -> Callable[[Any], Any]:
    """Returns what takes uint8 images `(batch, height, width, 3)` to probabilities; compiled once for all sizes."""
    if isinstance(model, ExportedModel):
        return model
    signature = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)
    return tf.function(lambda images: model(images, training=False), input_signature=[signature])
