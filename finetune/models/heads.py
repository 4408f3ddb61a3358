"""The registry of heads, and the parts that every model has.

The names of a model's layers are `[downscaling ->] preprocessing -> backbone -> classifier`. The last one is the head:
`pooling` turns the backbone's output into features `(batch, channels)`, any layers may follow, and the last two are
`logits` and `probabilities`. Linear probe, Grad-CAM, refitting and the feature store rely on nothing else. To add a
head, write a function that returns the layers before `logits`, and add it to `HEADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

from finetune.core.options import UserError

# Names of layers, also in saved files. The head is called classifier there.
BACKBONE, HEAD = "backbone", "classifier"
POOLING, LOGITS, PROBABILITIES = "pooling", "logits", "probabilities"
POOLINGS = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D, None: layers.Flatten}
# Number of images whose features pass through the hidden layers at once.
CHUNK = 1024


class HeadOptions(NamedTuple):
    """The options of a head.

    Attributes:
        classes: the number of outputs.
        multi_label: sigmoid instead of softmax.
        layer_sizes: units of hidden ReLU layers (1 or more) and dropout rates (less than 1).
        pooling: `avg`, `max`, or None to flatten.
    """

    classes: int
    multi_label: bool
    layer_sizes: Sequence[float] = ()
    pooling: str | None = "avg"


def list_dense_layers(options: HeadOptions) -> list[keras.Layer]:
    """Returns pooling, then the dense and dropout layers of `classifier_layer_sizes`."""
    hidden = [
        layers.Dense(int(size), activation="relu") if size >= 1 else layers.Dropout(size)
        for size in options.layer_sizes
    ]
    return [POOLINGS[options.pooling](name=POOLING), *hidden]


# Each returns the layers before `logits`; the first one is called `pooling`.
HEADS: dict[str, Callable[[HeadOptions], list[keras.Layer]]] = {"dense": list_dense_layers}


def build_head(name: str, options: HeadOptions) -> keras.Sequential:
    """Builds a head of the registry, from the backbone's output to probabilities `(batch, classes)`.

    Its last two layers are float32, so that Grad-CAM can explain unsaturated scores.
    """
    # Built first: the layers must draw their seeds in order, or a seed would give another run.
    hidden = HEADS[name](options)
    activation = "sigmoid" if options.multi_label else "softmax"
    logits = layers.Dense(options.classes, dtype="float32", name=LOGITS)
    probabilities = layers.Activation(activation, dtype="float32", name=PROBABILITIES)
    return keras.Sequential([*hidden, logits, probabilities], name=HEAD)


class Parts(NamedTuple):
    """The parts of a model, in order: `before` the backbone, and `hidden` between features and logits."""

    before: list[keras.Layer]
    backbone: keras.Model
    pooling: keras.Layer
    hidden: list[keras.Layer]
    logits: keras.layers.Dense
    probabilities: keras.Layer


def has_parts(model: keras.Model) -> bool:
    """Returns whether a model ends in a backbone and a head, like all models of `ModelFactory`."""
    return [layer.name for layer in model.layers[-2:]] == [BACKBONE, HEAD]


def split_model(model: keras.Model, purpose: str, advice: str) -> Parts:
    """Returns the parts of a model, or raises UserError, whose message begins with `purpose` and ends with `advice`."""
    if not has_parts(model):
        names = ", ".join(layer.name for layer in model.layers)
        raise UserError(
            f"{purpose} needs a model that ends in the parts '{BACKBONE}' and '{HEAD}'. Received: {names}. {advice}"
        )
    *before, backbone, head = model.layers[1:]
    pooling, *hidden, logits, probabilities = head.layers
    return Parts(before, backbone, pooling, hidden, logits, probabilities)


def list_kernels(parts: Parts) -> list[keras.Layer]:
    """Returns the hidden layers with learnt kernels: a head with any of them is no linear probe."""
    return [layer for layer in parts.hidden if any(len(weight.shape) > 1 for weight in layer.weights)]


def compute_logit_inputs(parts: Parts, features: np.ndarray) -> np.ndarray:
    """Returns the input of the layer `logits` for features, float32 `(images, channels)`, in inference mode."""
    hidden = [layer for layer in parts.hidden if not isinstance(layer, layers.Dropout)]
    if not hidden:
        return features
    chunks = []
    for first in range(0, len(features), CHUNK):
        chunk = keras.ops.convert_to_tensor(features[first : first + CHUNK])
        for layer in hidden:
            chunk = layer(chunk, training=False)
        chunks.append(keras.ops.convert_to_numpy(chunk).astype(np.float32))
    return np.concatenate(chunks)
