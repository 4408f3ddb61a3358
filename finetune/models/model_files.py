"""Loading model files, checking them against configs, and the model with test-time augmentation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from finetune.core.arguments import take_flag, take_path
from finetune.core.options import UserError
from finetune.core.texts import join_names
from finetune.models import compressed
from finetune.models.formats import is_exported
from finetune.models.heads import split_model
from finetune.models.safety import check_model_file, largest_content, limiting_weights, telling_damage

MEAN_OF_VIEWS = "mean_of_views"


@contextlib.contextmanager
def preparing(prepare: Callable[[keras.Model], None]) -> Iterator[None]:
    """Runs a function on each model that is loaded, before its optimizer is built.

    A file stores whether each layer is trainable, but not whether its inner layers are.
    """
    compile_from_config = keras.Model.compile_from_config

    def prepare_and_compile(model: keras.Model, config: dict[str, Any]) -> None:
        prepare(model)
        compile_from_config(model, config)

    keras.Model.compile_from_config = prepare_and_compile
    try:
        yield
    finally:
        keras.Model.compile_from_config = compile_from_config


def load_model(path: str, with_optimizer: bool = False) -> keras.Model:
    """Loads a model file, `.keras`, HDF5 or compressed, and never runs code from it.

    Args:
        path: the file.
        with_optimizer: also restore the optimizer and its state, to resume training.

    Raises:
        UserError: the file is not a model, is damaged, holds code, or claims far more weights than its size allows.
    """
    path, with_optimizer = take_path("path", path), take_flag("with_optimizer", with_optimizer)
    if is_exported(path):
        raise UserError(
            f"{path} is an exported model, which predict.py and test.py take. This script needs the model that it was "
            "made of, a .keras or .h5 file."
        )
    stem, suffix = os.path.splitext(path)
    if suffix != ".keras" and os.path.isfile(f"{stem}.json"):
        return compressed.load(path)
    with telling_damage(f"{path} is not a model that Keras reads"):
        check_model_file(path)
        with limiting_weights(largest_content(path)):
            model = keras.models.load_model(path, compile=with_optimizer, safe_mode=True)
        if not isinstance(model, keras.Model):
            raise ValueError(f"It holds a {type(model).__name__}.")
    return model


def load_fitting_model(
    path: str, class_names: Sequence[str], image_size: Sequence[int], with_optimizer: bool = False
) -> keras.Model:
    """Loads a model by `load_model`; raises UserError if its input or output differs from the configs."""
    model = load_model(path, with_optimizer)
    # A model that is not a graph of layers has neither.
    if any(len(getattr(model, ends, None) or ()) != 1 for ends in ("inputs", "outputs")):
        raise UserError(f"{path} is no classifier of images: expected one input and one output.")
    check_fit(path, model.inputs[0].shape, model.outputs[0].shape, class_names, image_size)
    return model


def check_fit(
    path: str,
    input_shape: Sequence[int | None],
    output_shape: Sequence[int | None],
    class_names: Sequence[str],
    image_size: Sequence[int],
) -> None:
    """Raises UserError if a model's shapes differ from the configs."""
    (batch, *inputs), expected = input_shape, (*image_size, 3)
    if len(output_shape) != 2 or output_shape[-1] != len(class_names):
        raise UserError(
            f"{path} tells {output_shape[-1]} classes apart, but the configs name {len(class_names)}: "
            f"{join_names(class_names)}. Use the CSV files and classes that it was trained with."
            if len(output_shape) == 2
            else f"{path} gives outputs of shape {tuple(output_shape[1:])}. Expected one number a class, "
            f"{len(class_names)}."
        )
    fits = len(inputs) == 3 and all(size in (None, wanted) for size, wanted in zip(inputs, expected, strict=True))
    if not fits or batch is not None:
        shown = tuple(inputs) if batch is None else (batch, *inputs)
        raise UserError(
            f"{path} takes inputs of shape {shown}. Expected images of image_target_size or eval_image_size, "
            f"{expected}."
        )


def build_inference_model(model: keras.Model, test_time_augmentation: str) -> keras.Model:
    """Builds the model to save, with test-time augmentation inside, so that every reader answers as in validation.

    Source of mirror images: Krizhevsky et al., NIPS 2012, section 4.1.

    Args:
        model: from images `(batch, height, width, 3)` to probabilities `(batch, classes)`.
        test_time_augmentation: `none` or `flip`.

    Returns:
        A model of stock layers without an optimizer, which shares the weights of `model`.
    """
    if test_time_augmentation == "none":
        return keras.Model(model.inputs, model.outputs, name=model.name)
    (image,) = model.inputs
    images = keras.Input(image.shape[1:], dtype=image.dtype, name=image.name)
    # A loaded model may return its only output in a list.
    views = keras.tree.flatten([model(images), model(keras.ops.flip(images, axis=2))])
    return keras.Model(images, keras.layers.Average(name="mean")(views), name=MEAN_OF_VIEWS)


def build_with_features(model: keras.Model) -> keras.Model:
    """Returns a model that shares the weights of `model` and also returns the features that its head gets.

    Args:
        model: from images to probabilities, with or without test-time augmentation.

    Returns:
        A model with the outputs `probabilities` `(batch, classes)` and `features` `(batch, channels)`, after pooling;
        with test-time augmentation, both are means over the views.

    Raises:
        UserError: the model does not end in a backbone and a head.
    """
    inner = strip_views(model)
    parts = split_model(inner, "A model with features", "Name a model that train.py has written.")
    (image,) = model.inputs
    images = keras.Input(image.shape[1:], dtype=image.dtype, name=image.name)
    views = [images] if inner is model else [images, keras.ops.flip(images, axis=2)]
    found = []
    for outputs in views:
        for layer in (*parts.before, parts.backbone, parts.pooling):
            outputs = layer(outputs)
        features = outputs
        for layer in (*parts.hidden, parts.logits, parts.probabilities):
            outputs = layer(outputs)
        found.append((outputs, keras.ops.cast(features, "float32")))
    probabilities, features = found[0] if len(found) == 1 else map(_average, zip(*found, strict=True))
    return keras.Model(images, {"probabilities": probabilities, "features": features}, name="with_features")


def _average(views: Sequence[keras.KerasTensor]) -> keras.KerasTensor:
    return keras.layers.Average()([*views])


def strip_views(model: keras.Model) -> keras.Model:
    """Returns the model without test-time augmentation."""
    if model.name != MEAN_OF_VIEWS:
        return model
    (inner,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    return inner


def has_views(model: keras.Model) -> bool:
    """Returns whether a model has test-time augmentation."""
    return strip_views(model) is not model
