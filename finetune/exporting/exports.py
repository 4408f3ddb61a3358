"""Writing a model for other runtimes: TensorFlow Lite, ONNX, SavedModel."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from configs import Configs
from finetune.core.files import atomic_path
from finetune.core.options import UserError
from finetune.core.quiet import hiding_stderr
from finetune.core.values import get_input_size
from finetune.data.images import build_reader, fit_image
from finetune.models.compressed import custom_save_model
from finetune.predicting.runtimes import importing
from generator import get_generator

if TYPE_CHECKING:
    import tf2onnx

CALIBRATION_IMAGES = 200
# Reads the training images, uint8 `(height, width, 3)`, from which the ranges of 8-bit activations follow.
Calibration = Callable[[], list[np.ndarray]]


def require_packages(exports: Sequence[str]) -> None:
    """Raises UserError where a package is missing that an export needs, before any work."""
    if "onnx" in exports:
        with importing("--export onnx", "tf2onnx", "onnxruntime"):
            import onnxruntime  # noqa: F401
            import tf2onnx  # noqa: F401


def write_weights(model: keras.Model, path: str, precision: str, _: Calibration) -> tuple[str, ...]:
    """Writes weights and layers; returns the paths of both files, that of the weights first."""
    folder, name = os.path.split(path)
    return custom_save_model(model, folder, os.path.splitext(name)[0], precision)


def write_tflite(model: keras.Model, path: str, precision: str, calibrate: Calibration) -> tuple[str, ...]:
    """Writes a TensorFlow Lite file that takes one image at a time, as phones do it; returns its path."""
    options: dict[str, Any] = {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}
    if precision != "float32":
        options["optimizations"] = [tf.lite.Optimize.DEFAULT]
    if precision == "int8":
        # Ops without an 8-bit form stay float32, and so do images and probabilities.
        options["target_spec"]["supported_ops"].insert(0, tf.lite.OpsSet.TFLITE_BUILTINS_INT8)
        images = calibrate()
        options["representative_dataset"] = lambda: ([image[None].astype(np.float32)] for image in images)
    model = to_float32(model)
    with atomic_path(path) as temporary, hiding_stderr():
        model.export(temporary, format="litert", verbose=False, input_signature=[describe_input(model, 1)], **options)
    return (path,)


def write_onnx(model: keras.Model, path: str, precision: str, _: Calibration) -> tuple[str, ...]:
    """Writes an ONNX file that takes any number of images; returns its path.

    By tf2onnx itself: through Keras 3.15 it fails on GELU and grouped convolutions, which ConvNeXt has, and on the
    numbers of a Normalization layer, which EfficientNet has.
    """
    with importing("--export onnx", "tf2onnx"):
        import tf2onnx
    function = trace(to_float32(model)).get_concrete_function()
    frozen = convert_variables_to_constants_v2(function, lower_control_flow=False)
    graph = frozen.graph.as_graph_def()
    for function in graph.library.function:
        # What Keras leaves to XLA would stay a call; without this it becomes part of the graph.
        function.attr.pop("_noinline", None)
    for node in [*graph.node, *(node for function in graph.library.function for node in function.node_def)]:
        node.attr.pop("_XlaMustCompile", None)
    (image,), (probabilities,) = ([end.name for end in ends] for ends in (frozen.inputs, frozen.outputs))
    with atomic_path(path) as temporary, quiet():
        tf2onnx.convert.from_graph_def(
            graph,
            input_names=[image],
            output_names=[probabilities],
            tensors_to_rename={image: "image", probabilities: "probabilities"},
            custom_op_handlers={"Erfc": (convert_erfc, [])},
            output_path=temporary,
        )
    # tf2onnx leaves copies of the graph in circles, which Python would find late: 6 GB of ConvNeXtTiny.
    gc.collect()
    return (path,)


def convert_erfc(graph: tf2onnx.graph.Graph, node: tf2onnx.graph.Node, name: str, _: list) -> None:
    """Makes of a node `erfc(x)`, which ONNX has not, `1 - erf(x)`; as tf2onnx calls it."""
    (output,) = node.output
    consumers, shape, dtype = graph.find_output_consumers(output), graph.get_shape(output), graph.get_dtype(output)
    node.type, node.domain = "Erf", ""
    one = graph.make_const(f"{name}/one", np.ones(1, np.float32))
    difference = graph.make_node("Sub", [one.output[0], output], shapes=[shape], dtypes=[dtype])
    graph.replace_all_inputs(output, difference.output[0], ops=consumers)


def write_saved_model(model: keras.Model, path: str, precision: str, _: Calibration) -> tuple[str, ...]:
    """Writes a TensorFlow SavedModel that takes any number of images; returns its folder.

    By TensorFlow's own exporter: Keras 3.15's writes each weight twice (github.com/keras-team/keras/issues/23553).
    """
    model, module = to_float32(model), tf.Module()
    module.weights = [weight.value for weight in model.variables]
    module.serve = trace(model)
    with atomic_path(path) as temporary, quiet():
        tf.saved_model.save(module, temporary, signatures=module.serve)
    return (path,)


WRITERS = {"weights": write_weights, "tflite": write_tflite, "onnx": write_onnx, "saved_model": write_saved_model}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TensorFlow from telling about its own old parts, and where it writes to."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def describe_input(model: keras.Model, batch_size: int | None) -> tf.TensorSpec:
    """Returns the form of the images that an export takes."""
    return tf.TensorSpec((batch_size, *model.input_shape[1:]), tf.float32, name="image")


def trace(model: keras.Model) -> tf.types.experimental.PolymorphicFunction:
    """Returns a model as TensorFlow's function from float32 images to probabilities."""

    def serve(image: tf.Tensor) -> tf.Tensor:
        return model(image, training=False)

    return tf.function(serve, input_signature=[describe_input(model, None)])


def to_float32(model: keras.Model) -> keras.Model:
    """Returns a model that computes in float32 with the same weights; the exporters know nothing of mixed precision."""
    layers = model.to_json()
    plain = re.sub('"mixed_b?float16"', '"float32"', layers)
    if plain == layers:
        return model
    rebuilt = keras.models.model_from_json(plain)
    rebuilt.set_weights(model.get_weights())
    return rebuilt


def read_calibration_images(configs: Configs) -> list[np.ndarray]:
    """Reads up to `CALIBRATION_IMAGES` training images, drawn at random, uint8 RGB `(height, width, 3)`.

    Raises:
        UserError: there is no training table, it is neither the run's nor given, or an image cannot be read.
    """
    if "train_csv" not in configs.given:
        raise UserError(
            "train_csv: --export_quantization int8 takes its ranges from training images, and no configs.json names "
            "those of this model. Give --train_csv."
        )
    if not os.path.isfile(configs.train_csv):
        raise UserError(
            f"train_csv: --export_quantization int8 takes its ranges from training images. Expected a CSV file. "
            f"Received: {configs.train_csv!r}, and there is none. Give --train_csv."
        )
    paths = get_generator(configs.train_csv, configs.classes, configs, training=False).paths
    rng = np.random.default_rng(configs.random_seed or 0)
    chosen = rng.permutation(len(paths))[:CALIBRATION_IMAGES]
    size, read = get_input_size(configs), build_reader(configs)
    print(f"int8: ranges from {len(chosen)} images of {configs.train_csv}")
    return [fit_image(read(paths[row], size), size, configs.resize_mode) for row in chosen]
