"""Class activation maps: where in an image a model finds its evidence for a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from finetune.core.options import UserError
from finetune.core.texts import join_names
from finetune.core.values import find_nearest, quote_value
from finetune.models.heads import BACKBONE, split_model
from finetune.models.model_files import has_views, strip_views


def weigh_by_mean_gradient(features: tf.Tensor, gradients: tf.Tensor) -> tf.Tensor:
    """Grad-CAM: one weight per channel, its mean gradient.

    Source: Selvaraju et al., ICCV 2017, eq. 1 (arXiv:1610.02391).
    """
    return tf.reduce_mean(gradients, axis=(1, 2), keepdims=True)


def weigh_by_positive_gradients(features: tf.Tensor, gradients: tf.Tensor) -> tf.Tensor:
    """Grad-CAM++: one weight per channel, the sum of its positive gradients, each damped by the channel's total.

    The score is the exponential of the logit, and the head is piecewise linear. So the second and third derivatives are
    powers of the logit's gradient `g` times the exponential, which normalising the map cancels. Eq. 19's
    `g^2 / (2 g^2 + sum(A) g^3)` is `1 / (2 + sum(A) g)` if `g` is not 0, and does not underflow in this form. The
    derivation assumes features of at least 0.

    Source: Chattopadhay et al., WACV 2018, eq. 19 (arXiv:1710.11063).
    """
    totals = tf.reduce_sum(features, axis=(1, 2), keepdims=True)
    damped = tf.math.divide_no_nan(tf.nn.relu(gradients), 2 + totals * gradients)
    return tf.reduce_sum(damped, axis=(1, 2), keepdims=True)


def weigh_by_gradient(features: tf.Tensor, gradients: tf.Tensor) -> tf.Tensor:
    """HiResCAM: each place and channel has its own gradient as its weight.

    Source: Draelos and Carin, 2020 (arXiv:2011.08891).
    """
    return gradients


def weigh_by_positive_gradient(features: tf.Tensor, gradients: tf.Tensor) -> tf.Tensor:
    """LayerCAM: each place and channel has its own gradient as its weight, or 0 if it is negative.

    Source: Jiang et al., IEEE Transactions on Image Processing 30, 2021.
    """
    return tf.nn.relu(gradients)


# From features and gradients, float32 `(batch, h, w, channels)`, to weights that broadcast to that shape.
METHODS: dict[str, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = {
    "gradcam": weigh_by_mean_gradient,
    "gradcam++": weigh_by_positive_gradients,
    "hirescam": weigh_by_gradient,
    "layercam": weigh_by_positive_gradient,
}


class Reading(NamedTuple):
    """What the network gives for a batch.

    Attributes:
        start: what `GradCam.explain` starts from.
        probabilities: of the model, float32 `(batch, classes)`.
        features: the input of its head after pooling, float32 `(batch, channels)`.
    """

    start: tf.Tensor
    probabilities: np.ndarray
    features: np.ndarray


class GradCam:
    """Finds the image regions that raise a class's score: the positive part of the weighted sum of the features.

    The network up to the backbone's last spatial layer runs once per image, for any number of classes; the gradient
    crosses only the head. Scores are logits, because probabilities saturate. If a model averages an image with its
    mirror image, the map is that of the image itself.

    For another layer, the network cannot be cut in two, because residual connections go around it. Each explanation
    then runs all of it, and the gradient goes from the logits back to that layer.

    Args:
        model: a model of this collection.
        method: a key of `METHODS`.
        layer_name: a spatial layer of the backbone; empty for its last one.

    Raises:
        UserError: the model is of another structure, or has no such layer.
    """

    def __init__(self, model: keras.Model, method: str = "gradcam", layer_name: str = "") -> None:
        self._mirrors = has_views(model)
        model = strip_views(model)
        parts = split_model(model, "Grad-CAM", "Train one with train.py.")
        self._features = keras.Model(model.inputs, _input_of_head(model))
        self._maps = _build_maps(model, layer_name) if layer_name else None
        self._to_probabilities = parts.probabilities
        self._pool = parts.pooling
        self._logits = keras.Sequential([parts.pooling, *parts.hidden, parts.logits])
        self._weigh = METHODS[method]
        self._read = tf.function(self._read_batch)
        self._explain = tf.function(self._explain_pairs)

    def __call__(self, images: np.ndarray, class_indices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Explains a batch.

        Args:
            class_indices: int `(batch,)`, the class to explain, or `(batch, k)`, several per image; by default the
                most probable one.

        Returns:
            Heatmaps, float32 `(batch, h, w)` or `(batch, k, h, w)` in `[0, 1]`, zeros if nothing supports the class;
            and probabilities, float32 `(batch, classes)`.
        """
        start, probabilities, _ = self.read(images)
        chosen = probabilities.argmax(axis=1) if class_indices is None else np.asarray(class_indices)
        rows = np.arange(len(images)).repeat(chosen.size // len(images))
        heatmaps = self.explain(start, rows, chosen.ravel())
        return heatmaps.reshape(*chosen.shape, *heatmaps.shape[1:]), probabilities

    def read(self, images: np.ndarray) -> Reading:
        """Runs the network on a batch."""
        # One trace for any number of images: the last batch is often smaller.
        read = self._read.get_concrete_function(tf.TensorSpec((None, *images.shape[1:]), images.dtype))
        start, probabilities, features = read(tf.convert_to_tensor(images))
        return Reading(start, probabilities.numpy(), features.numpy())

    def explain(self, start: tf.Tensor, rows: np.ndarray, class_indices: np.ndarray) -> np.ndarray:
        """Returns the heatmaps of pairs of an image and a class, float32 `(pairs, h, w)` in `[0, 1]`.

        Args:
            start: of a batch, from `read`. No more pairs than it has images are in memory at once.
            rows: int `(pairs,)`, positions in that batch.
            class_indices: int `(pairs,)`, the class to explain.
        """
        integers = tf.TensorSpec((None,), tf.int32)
        signature = tf.TensorSpec((None, *start.shape[1:]), start.dtype), integers, integers
        explain = self._explain.get_concrete_function(*signature)
        pairs = np.stack([rows, class_indices]).astype(np.int32)
        heatmaps = [np.empty((0, *explain.outputs[0].shape[1:]), np.float32)]
        for first in range(0, len(rows), len(start)):
            part = tf.convert_to_tensor(pairs[:, first : first + len(start)])
            heatmaps.append(explain(start, part[0], part[1]).numpy())
        return np.concatenate(heatmaps)

    def _read_batch(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        features = self._features(images, training=False)
        probabilities, pooled = self._answer(features), self._summarize(features)
        if self._mirrors:
            mirrored = self._features(tf.reverse(images, axis=[2]), training=False)
            probabilities = (probabilities + self._answer(mirrored)) / 2
            pooled = (pooled + self._summarize(mirrored)) / 2
        return images if self._maps else features, probabilities, pooled

    def _summarize(self, features: tf.Tensor) -> tf.Tensor:
        return tf.cast(self._pool(features), tf.float32)

    def _answer(self, features: tf.Tensor) -> tf.Tensor:
        return self._to_probabilities(self._logits(tf.cast(features, tf.float32), training=False))

    def _explain_pairs(self, start: tf.Tensor, rows: tf.Tensor, class_indices: tf.Tensor) -> tf.Tensor:
        start = tf.cast(tf.gather(start, rows), tf.float32)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(start)
            maps, features = self._maps(start, training=False) if self._maps else (start, start)
            logits = self._logits(tf.cast(features, tf.float32), training=False)
            # Images are independent in inference mode: the gradient of the sum has that of each one.
            score = tf.reduce_sum(tf.gather(logits, class_indices, batch_dims=1))
        gradients = tf.cast(tape.gradient(score, maps), tf.float32)
        maps = tf.cast(maps, tf.float32)
        heatmaps = tf.nn.relu(tf.reduce_sum(self._weigh(maps, gradients) * maps, axis=-1))
        return tf.math.divide_no_nan(heatmaps, tf.reduce_max(heatmaps, axis=(1, 2), keepdims=True))


def _input_of_head(model: keras.Model) -> keras.KerasTensor:
    images = model.inputs[0]
    for layer in model.layers[1:-1]:
        images = layer(images)
    return images


def _build_maps(model: keras.Model, layer_name: str) -> keras.Model:
    """Returns a model from images to the output of a backbone's layer, and to the input of the head."""
    backbone = model.get_layer(BACKBONE)
    outputs = [find_spatial_layer(backbone, layer_name).output, backbone.output]
    maps = images = model.inputs[0]
    for layer in model.layers[1:-1]:
        if layer is backbone:
            maps, images = keras.Model(backbone.inputs, outputs)(images)
        else:
            images = layer(images)
    return keras.Model(model.inputs, [maps, images])


def find_spatial_layer(backbone: keras.Model, name: str) -> keras.Layer:
    """Returns a layer of a backbone by its name; its output must be a feature map, `(batch, h, w, channels)`.

    The output of a layer inside an attention block is smaller than the backbone's own, and is no feature map.

    Raises:
        UserError: there is no such layer.
    """
    height, width = backbone.output.shape[1:3]
    shapes = {layer.name: layer.output.shape for layer in backbone.layers[1:]}
    spatial = [key for key, shape in shapes.items() if len(shape) == 4 and shape[1] >= height and shape[2] >= width]
    if name in spatial:
        return backbone.get_layer(name)
    what = "has no places" if name in shapes else "does not exist"
    nearest = find_nearest(name, spatial, alikeness=0.4)
    hint = f"; did you mean {nearest}?" if nearest else "."
    raise UserError(
        f"cam_backbone_layer: expected a spatial layer of the backbone. Received: {quote_value(name)}, which {what}"
        f"{hint} The last ones: {join_names(spatial[::-1])}."
    )
