"""Compressed models: layers as JSON and weights as HDF5 in 32, 16 or 8 bits, without the optimizer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence

import h5py
import keras
import numpy as np
from keras import layers

from finetune.core.arguments import argument_error, take_choice, take_path
from finetune.core.files import atomic_path, write_text
from finetune.core.options import LARGEST_JSON_FILE, UserError
from finetune.models.exported import Calibration
from finetune.models.formats import WEIGHTS_DTYPES
from finetune.models.safety import check_arrays, check_layers, largest_content, limiting_weights, telling_damage

# Numbers in a weight: smaller ones save nothing in a file, and only large ones are worth unpacking.
SMALLEST_ROUNDED = 64
PACKED_FROM = 100_000
# Fewer numbers per channel in int8 save too little, next to their scale.
FEWEST_PER_SCALE = 16


def write(model: keras.Model, path: str, precision: str, _: Calibration) -> tuple[str, str]:
    """Writes a model by `custom_save_model`, given the path of its weights: the interface of an export format."""
    folder, name = os.path.split(path)
    return custom_save_model(model, folder, os.path.splitext(name)[0], precision)


def load(path: str) -> keras.Model:
    """Reads a model by `custom_load_model`, given the path of its weights or its layers."""
    folder, name = os.path.split(path)
    return custom_load_model(folder, os.path.splitext(name)[0])


def custom_save_model(
    model: keras.Model, save_path: str, model_name: str, weights_dtype: str = "float32"
) -> tuple[str, str]:
    """Writes a model as `model_name.json` (its layers) and `model_name.h5` (its weights), without optimizer state.

    Args:
        model: any model of stock Keras layers.
        save_path: the folder.
        model_name: the files' name without ending.
        weights_dtype: one of `WEIGHTS_DTYPES`. `float32` is exact. `float16` rounds the weights and packs large ones
            without loss. `int8` stores kernels as whole numbers from -127 to 127 with a scale per output channel, and
            the other weights and kernels of a few numbers per channel as float16. Weights beyond float16's range, or
            with fewer than 64 numbers, stay float32.

    Returns:
        The paths of the HDF5 and the JSON file.

    Raises:
        UserError: an argument is invalid, or a file cannot be written.
    """
    save_path, model_name = take_path("save_path", save_path), take_path("model_name", model_name)
    take_choice("weights_dtype", weights_dtype, WEIGHTS_DTYPES)
    if not model_name:
        raise argument_error("model_name", "a file name without ending", model_name)
    if not isinstance(model, keras.Model):
        raise argument_error("model", "a Keras model", model)
    weights_path, layers_path = (os.path.join(save_path, model_name + suffix) for suffix in (".h5", ".json"))
    depthwise = {id(kernel) for kernel in _find_depthwise_kernels(model)}
    with atomic_path(weights_path) as temporary, h5py.File(temporary, "w") as file:
        for position, weight in enumerate(model.weights):
            name, values = f"{position:05d}", weight.numpy()
            channel_axes = (-2, -1) if id(weight) in depthwise else (-1,)
            stored, scales = _encode_weight(values, weights_dtype, channel_axes)
            packs = stored.dtype == np.float16 and stored.size >= PACKED_FROM
            packing = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if packs else {}
            file.create_dataset(f"weights/{name}", data=stored, **packing).attrs["path"] = weight.path
            if scales is not None:
                file[f"scales/{name}"] = scales
    write_text(layers_path, model.to_json())
    return weights_path, layers_path


def custom_load_model(load_path: str, model_name: str) -> keras.Model:
    """Reads a model that `custom_save_model` wrote, with weights of any of `WEIGHTS_DTYPES`.

    Args:
        load_path: the folder.
        model_name: the files' name without ending.

    Returns:
        An ordinary Keras model with weights in its training precision.

    Raises:
        UserError: a file is missing or damaged, or the two files are of different models.
    """
    load_path, model_name = take_path("load_path", load_path), take_path("model_name", model_name)
    weights_path, layers_path = (os.path.join(load_path, model_name + suffix) for suffix in (".h5", ".json"))
    with telling_damage(f"{weights_path} and {layers_path} are not a compressed model"):
        with open(layers_path, "rb") as file:
            content = file.read(LARGEST_JSON_FILE + 1)
        if len(content) > LARGEST_JSON_FILE:
            raise ValueError(f"The layers take more than {LARGEST_JSON_FILE} bytes.")
        layers, limit = json.loads(content), largest_content(weights_path)
        check_layers(layers, layers_path)
        # Building the optimizer would take a fifth of the time, and memory for twice the weights.
        layers.pop("compile_config", None)
        with h5py.File(weights_path) as file:
            check_arrays(file, limit)
            with limiting_weights(limit, initialize=False):
                model = keras.saving.deserialize_keras_object(layers, safe_mode=True)
            if not isinstance(model, keras.Model):
                raise ValueError("The JSON file describes no model.")
            stored, weights = {name: file["weights"][name] for name in sorted(file["weights"])}, model.weights
            if [array.shape for array in stored.values()] != [tuple(weight.shape) for weight in weights]:
                raise UserError(
                    f"{weights_path} does not belong to {layers_path}: their weights differ in number or shape."
                )
            model.set_weights(
                [_decode_weight(file, name, weight) for name, weight in zip(stored, weights, strict=True)]
            )
    for layer in _walk_layers(model):
        # This layer computes with reshaped copies of its weights.
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    return model


def _walk_layers(layer: keras.Layer) -> Iterator[keras.Layer]:
    """Yields a layer and all layers in it."""
    yield layer
    for inner in getattr(layer, "layers", ()):
        yield from _walk_layers(inner)


def _find_depthwise_kernels(model: keras.Model) -> Iterator[keras.Variable]:
    """Yields the kernels whose last two axes together are the output channels."""
    names = dict.fromkeys((layers.DepthwiseConv1D, layers.DepthwiseConv2D), "kernel")
    names |= dict.fromkeys((layers.SeparableConv1D, layers.SeparableConv2D), "depthwise_kernel")
    for layer in _walk_layers(model):
        if type(layer) in names:
            yield getattr(layer, names[type(layer)])


def _encode_weight(
    values: np.ndarray, weights_dtype: str, channel_axes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the array to store for a weight and, for int8, the float32 scales of its output channels.

    The scales have the array's number of axes; the largest error is half a scale. `channel_axes` are the axes of the
    output channels, counted from the last.
    """
    if weights_dtype == "float32" or values.dtype != np.float32 or values.size < SMALLEST_ROUNDED:
        return values, None
    with np.errstate(over="ignore"):
        halved = values.astype(np.float16)
    if not np.isfinite(halved).all():
        return values, None
    inner = tuple(axis for axis in range(values.ndim) if axis - values.ndim not in channel_axes)
    if weights_dtype == "float16" or math.prod(values.shape[axis] for axis in inner) < FEWEST_PER_SCALE:
        return halved, None
    highest = np.abs(values).max(axis=inner, keepdims=True)
    scales = np.maximum(highest / np.float32(127), np.finfo(np.float32).tiny)
    return np.rint(values / scales).astype(np.int8), scales


def _decode_weight(file: h5py.File, name: str, weight: keras.Variable) -> np.ndarray:
    """Returns the stored values of a weight; raises ValueError if the scales of an int8 array are missing or wrong."""
    values = file["weights"][name][...]
    if values.dtype != np.int8 or weight.dtype == "int8":
        return values
    scales = file["scales"][name][...] if f"scales/{name}" in file else np.empty(())
    sizes = zip(scales.shape, values.shape, strict=False)
    fits = scales.dtype == np.float32 and scales.ndim == values.ndim and all(size in (1, all_) for size, all_ in sizes)
    if not fits or not (np.isfinite(scales) & (scales > 0)).all():
        raise ValueError(f"Its part weights/{name} has no scales that fit it.")
    return values * scales
