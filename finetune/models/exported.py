"""What export formats share: a model in another runtime, and the preparation of a Keras model for export."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

# The names of the outputs of a file with features; a file without gives probabilities alone, under any name.
OUTPUTS = ("probabilities", "features")
Output = TypeVar("Output")
# Reads training images, uint8 `(height, width, 3)`, for the ranges of 8-bit activations.
Calibration = Callable[[], list[np.ndarray]]


class ExportedModel:
    """An exported model in its runtime, with the parts of a Keras model that predicting uses.

    Args:
        run: takes float32 RGB `(batch, height, width, 3)` in `[0, 255]`; returns probabilities `(batch, classes)`.
        input_shape: of its images, None for a variable size; the batch size is ignored.
        output_shape: of its probabilities.
        run_with_features: returns probabilities and features, if the file has both.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], np.ndarray],
        input_shape: Sequence[Any],
        output_shape: Sequence[Any],
        run_with_features: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        shapes = [
            [size if isinstance(size, int) and size > 0 else None for size in shape[1:]]
            for shape in (input_shape, output_shape)
        ]
        self.input_shape, self.output_shape = ((None, *shape) for shape in shapes)
        self._run = run
        self._run_with_features = run_with_features

    @property
    def gives_features(self) -> bool:
        """Whether the file also gives features."""
        return self._run_with_features is not None

    def __call__(self, images: Any, training: bool = False) -> np.ndarray:
        """Returns the probabilities of images of any numeric type, float32 `(batch, classes)`."""
        return self._run(np.asarray(images, np.float32))

    def run_with_features(self, images: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the probabilities and features of images; None for features that the file does not give."""
        if self._run_with_features is None:
            return self(images), None
        return self._run_with_features(np.asarray(images, np.float32))


def find_outputs(outputs: Mapping[str, Output]) -> tuple[Output, Output | None]:
    """Returns the output for probabilities and that for features, or None; raises ValueError for other outputs."""
    if len(outputs) == 1:
        return next(iter(outputs.values())), None
    if set(outputs) != {*OUTPUTS}:
        raise ValueError(f"Its outputs are {', '.join(map(str, outputs))}.")
    return tuple(outputs[name] for name in OUTPUTS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides TensorFlow's deprecation warnings and notes on written files."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def describe_input(model: keras.Model, batch_size: int | None) -> tf.TensorSpec:
    """Returns the input of an export."""
    return tf.TensorSpec((batch_size, *model.input_shape[1:]), tf.float32, name="image")


def trace(model: keras.Model) -> tf.types.experimental.PolymorphicFunction:
    """Returns a model as a TensorFlow function from float32 images to its outputs."""

    def serve(image: tf.Tensor) -> tf.Tensor | dict[str, tf.Tensor]:
        return model(image, training=False)

    return tf.function(serve, input_signature=[describe_input(model, None)])


def to_float32(model: keras.Model) -> keras.Model:
    """Returns a model that computes in float32 with the same weights: exporters don't support mixed precision."""
    layers = model.to_json()
    plain = re.sub('"mixed_b?float16"', '"float32"', layers)
    if plain == layers:
        return model
    rebuilt = keras.models.model_from_json(plain)
    rebuilt.set_weights(model.get_weights())
    return rebuilt
