"""Grad-CAM: where in an image a model finds its evidence for a class."""

from __future__ import annotations

import cv2
import keras
import numpy as np
import tensorflow as tf

from configs import UserError

# RGB of each of 256 values. OpenCV builds this table anew in every call, which takes longer than all else in a picture.
COLOURS = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_JET)[:, 0, ::-1].copy()
OPACITY = 0.4


class GradCam:
    """Locates the image regions that raise one class's score.

    The network up to the backbone's last spatial layer runs once an image; the gradient crosses the classifier only.
    Scores are logits, which do not saturate as probabilities do.

    Source: Selvaraju et al., ICCV 2017, eqs. 1-2 (arXiv:1610.02391).

    Args:
        model: a model of this collection, with the parts `backbone` and `classifier`.

    Raises:
        UserError: the model lacks these parts.
    """

    def __init__(self, model: keras.Model) -> None:
        names = [layer.name for layer in model.layers]
        if not {"backbone", "classifier"} <= set(names):
            raise UserError(
                f"Grad-CAM needs a model with the parts 'backbone' and 'classifier'. Received: {', '.join(names)}. "
                "Train one with train.py."
            )
        self._features = keras.Model(model.inputs, _input_of_classifier(model))
        *to_logits, self._to_probabilities = model.get_layer("classifier").layers
        self._logits = keras.Sequential(to_logits)
        self._explain = tf.function(self._explain_batch)

    def __call__(self, images: np.ndarray, class_indices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Explains a batch.

        Args:
            images: RGB `(batch, height, width, 3)`, pixels in `[0, 255]`.
            class_indices: int `(batch,)`, the class to explain; by default the most probable one.

        Returns:
            Heatmaps, float32 `(batch, h, w)`, unitless in `[0, 1]`, zeros where nothing supports the class; and
            probabilities, float32 `(batch, classes)`.
        """
        chosen = np.full(len(images), -1, np.int32) if class_indices is None else np.asarray(class_indices, np.int32)
        # One trace for every number of images: the last batch is often a smaller one.
        signature = tf.TensorSpec((None, *images.shape[1:]), images.dtype), tf.TensorSpec((None,), tf.int32)
        explain = self._explain.get_concrete_function(*signature)
        heatmaps, probabilities = explain(tf.convert_to_tensor(images), tf.convert_to_tensor(chosen))
        return heatmaps.numpy(), probabilities.numpy()

    def _explain_batch(self, images: tf.Tensor, class_indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        features = tf.cast(self._features(images, training=False), tf.float32)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(features)
            logits = self._logits(features, training=False)
            most_probable = tf.argmax(logits, axis=1, output_type=tf.int32)
            class_indices = tf.where(class_indices < 0, most_probable, class_indices)
            # Images do not mix in inference mode: the gradient of the sum holds each one's own.
            score = tf.reduce_sum(tf.gather(logits, class_indices, batch_dims=1))
        gradients = tape.gradient(score, features)
        weights = tf.reduce_mean(gradients, axis=(1, 2), keepdims=True)
        heatmaps = tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))
        peaks = tf.reduce_max(heatmaps, axis=(1, 2), keepdims=True)
        return tf.math.divide_no_nan(heatmaps, peaks), self._to_probabilities(logits)


def _input_of_classifier(model: keras.Model) -> keras.KerasTensor:
    """Returns the tensor that a model's graph feeds its classifier."""
    images = model.inputs[0]
    for layer in model.layers[1:-1]:
        images = layer(images)
    return images


def overlay_heatmap(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """Colours an image by a heatmap: red where it is 1.

    Args:
        image: uint8 RGB `(height, width, 3)`.
        heatmap: `(h, w)` in `[0, 1]`, of any size.

    Returns:
        uint8 RGB `(height, width, 3)`.
    """
    height, width = image.shape[:2]
    smooth = cv2.resize(heatmap.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    colours = COLOURS[np.uint8(255 * np.clip(smooth, 0, 1))]
    return cv2.addWeighted(colours, OPACITY, image, 1 - OPACITY, 0)


def write_caption(image: np.ndarray, caption: str) -> np.ndarray:
    """Puts a line of text in a bar below an image.

    Args:
        image: uint8 RGB `(height, width, 3)`.
        caption: shortened to what fits; characters beyond ASCII are shown as `?`.

    Returns:
        uint8 RGB, taller by the bar.
    """
    bar, width = max(18, image.shape[1] // 12), image.shape[1]
    scale = bar / 32
    text = caption.encode("ascii", "replace").decode()
    while len(text) > 1 and cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0] > width - 4:
        text = text[:-1]
    canvas = np.full((bar, width, 3), 255, np.uint8)
    cv2.putText(canvas, text, (2, int(bar * 0.72)), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([image, canvas])
