"""The registry of heads, and the parts that every model has.

A model is, by the names of its layers, `[downscaling ->] preprocessing -> backbone -> classifier`. The last one is the
head: `pooling` makes features `(batch, channels)` of the backbone's output, any layers may follow, and the last two
are `logits` and `probabilities`. Linear probe, Grad-CAM, refitting and the feature store rely on this and on nothing
else. To add a head, write a function that returns the layers before `logits`, and give it an entry in `HEADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

from finetune.core.options import UserError

# Names of layers. Saved files have them: the head is called classifier there.
BACKBONE, HEAD = "backbone", "classifier"
POOLING, LOGITS, PROBABILITIES = "pooling", "logits", "probabilities"
POOLINGS = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D, None: layers.Flatten}
# Images whose features go through the hidden layers at a time.
CHUNK = 1024


class HeadOptions(NamedTuple):
    """What the configs say of a head.

    Attributes:
        classes: the number of outputs.
        multi_label: sigmoid instead of softmax.
        layer_sizes: each a hidden ReLU layer of that many units (1 or more) or a dropout rate (less than 1).
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


# From the options to the layers before `logits`, the first of which is called `pooling`.
HEADS: dict[str, Callable[[HeadOptions], list[keras.Layer]]] = {"dense": list_dense_layers}


def build_head(name: str, options: HeadOptions) -> keras.Sequential:
    """Builds a head of the registry, from the backbone's output to probabilities `(batch, classes)`.

    Its last two layers are float32, so that Grad-CAM can explain unsaturated scores.
    """
    # First, so that each layer draws its seed in the order of the layers, on which a run of one seed depends.
    hidden = HEADS[name](options)
    activation = "sigmoid" if options.multi_label else "softmax"
    logits = layers.Dense(options.classes, dtype="float32", name=LOGITS)
    probabilities = layers.Activation(activation, dtype="float32", name=PROBABILITIES)
    return keras.Sequential([*hidden, logits, probabilities], name=HEAD)


class Parts(NamedTuple):
    """The parts of a model, in their order.

    Attributes:
        before: the layers between the images and the backbone.
        backbone: from preprocessed images to a feature map.
        pooling: from that to features `(batch, channels)`.
        hidden: the layers between features and logits.
        logits: the dense layer of scores.
        probabilities: their softmax or sigmoid.
    """

    before: list[keras.Layer]
    backbone: keras.Model
    pooling: keras.Layer
    hidden: list[keras.Layer]
    logits: keras.layers.Dense
    probabilities: keras.Layer


def has_parts(model: keras.Model) -> bool:
    """Returns whether a model ends in a backbone and a head, as those of this collection do."""
    return [layer.name for layer in model.layers[-2:]] == [BACKBONE, HEAD]


def split_model(model: keras.Model, purpose: str, advice: str) -> Parts:
    """Returns the parts of a model.

    Args:
        model: whose answer is that to the image as it is.
        purpose: begins the error message if it has no such parts.
        advice: ends it.

    Raises:
        UserError: it has none.
    """
    if not has_parts(model):
        names = ", ".join(layer.name for layer in model.layers)
        raise UserError(
            f"{purpose} needs a model that ends in the parts '{BACKBONE}' and '{HEAD}'. Received: {names}. {advice}"
        )
    *before, backbone, head = model.layers[1:]
    pooling, *hidden, logits, probabilities = head.layers
    return Parts(before, backbone, pooling, hidden, logits, probabilities)


def list_kernels(parts: Parts) -> list[keras.Layer]:
    """Returns the hidden layers that mix features by learnt kernels: with them a head is no linear probe."""
    return [layer for layer in parts.hidden if any(len(weight.shape) > 1 for weight in layer.weights)]


def compute_logit_inputs(parts: Parts, features: np.ndarray) -> np.ndarray:
    """Returns what the layer `logits` sees of features, float32 `(images, channels)`, outside of training."""
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
