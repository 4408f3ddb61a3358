"""Models whose weights are worth compressing."""

import keras
import numpy as np
import pytest

from finetune.models.compressed import custom_load_model, custom_save_model


@pytest.fixture(scope="module")
def wide_model():
    """A model with each kind of weight, a depthwise kernel whose channels differ by powers of ten among them."""
    rng = np.random.default_rng(0)
    layers = keras.layers
    normalization = layers.Normalization()
    normalization.adapt(rng.normal(100, 30, (4, 8, 8, 3)).astype(np.float32))
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            normalization,
            keras.Sequential([layers.Conv2D(80, 3, name="conv"), layers.BatchNormalization(name="norm")]),
            layers.DepthwiseConv2D(5, padding="same", depth_multiplier=2, name="depthwise"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax", name="dense"),
        ]
    )
    model.set_weights(
        [rng.normal(size=w.shape).astype(w.dtype) if "kernel" in w.path else w.numpy() for w in model.weights]
    )
    scale = np.logspace(-6, 3, 160, dtype=np.float32).reshape(80, 2)
    model.get_layer("depthwise").kernel.assign(rng.uniform(-1, 1, (5, 5, 80, 2)) * scale)
    kernel = model.layers[1].get_layer("conv").kernel
    kernel.assign(kernel.numpy() * (np.arange(80) != 7))
    return model


def round_trip(model, folder, weights_dtype):
    path, _ = custom_save_model(model, str(folder), "model", weights_dtype)
    return path, custom_load_model(str(folder), "model")
