"""ONNX: writing files with tf2onnx, and running them in ONNX Runtime."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import keras
import numpy as np
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from finetune.core.files import atomic_path
from finetune.models.exported import OUTPUTS, Calibration, ExportedModel, find_outputs, quiet, to_float32, trace

if TYPE_CHECKING:
    import tf2onnx


def write(model: keras.Model, path: str, precision: str, _: Calibration) -> tuple[str, ...]:
    """Writes a file that takes any number of images; returns its path.

    It calls tf2onnx directly: Keras 3.15's export fails on GELU and grouped convolutions (ConvNeXt), and on
    Normalization layers (EfficientNet).
    """
    import tf2onnx

    function = trace(to_float32(model)).get_concrete_function()
    # TensorFlow orders several outputs by their names.
    several = isinstance(function.structured_outputs, dict)
    names = sorted(function.structured_outputs) if several else OUTPUTS[:1]
    frozen = convert_variables_to_constants_v2(function, lower_control_flow=False)
    graph = frozen.graph.as_graph_def()
    for function in graph.library.function:
        # Without it, functions that Keras leaves to XLA are inlined.
        function.attr.pop("_noinline", None)
    for node in [*graph.node, *(node for function in graph.library.function for node in function.node_def)]:
        node.attr.pop("_XlaMustCompile", None)
    (image,), found = ([end.name for end in ends] for ends in (frozen.inputs, frozen.outputs))
    # The probabilities come first.
    outputs = dict(sorted(zip(found, names, strict=True), key=lambda output: OUTPUTS.index(output[1])))
    with atomic_path(path) as temporary, quiet():
        tf2onnx.convert.from_graph_def(
            graph,
            input_names=[image],
            output_names=[*outputs],
            tensors_to_rename={image: "image", **outputs},
            custom_op_handlers={"Erfc": (convert_erfc, [])},
            output_path=temporary,
        )
    # tf2onnx leaves copies of the graph in reference cycles: 6 GB for ConvNeXtTiny.
    gc.collect()
    return (path,)


def convert_erfc(graph: tf2onnx.graph.Graph, node: tf2onnx.graph.Node, name: str, _: list) -> None:
    """Replaces a node `erfc(x)`, which ONNX lacks, by `1 - erf(x)`; a handler for tf2onnx."""
    (output,) = node.output
    consumers, shape, dtype = graph.find_output_consumers(output), graph.get_shape(output), graph.get_dtype(output)
    node.type, node.domain = "Erf", ""
    one = graph.make_const(f"{name}/one", np.ones(1, np.float32))
    difference = graph.make_node("Sub", [one.output[0], output], shapes=[shape], dtypes=[dtype])
    graph.replace_all_inputs(output, difference.output[0], ops=consumers)


def load(path: str) -> ExportedModel:
    """Loads a file into ONNX Runtime, on a GPU if it supports one."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    # Other providers may compile for minutes, or send the images elsewhere.
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    session = onnxruntime.InferenceSession(path, providers=providers)
    (inputs,) = session.get_inputs()
    outputs, features = find_outputs({one.name: one for one in session.get_outputs()})

    def run(images: np.ndarray) -> np.ndarray:
        return session.run([outputs.name], {inputs.name: images})[0]

    def run_with_features(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(session.run([outputs.name, features.name], {inputs.name: images}))

    return ExportedModel(run, inputs.shape, outputs.shape, run_with_features if features else None)
