"""A table, an image and a model of a few weights."""

import keras
import numpy as np
import pytest

CLASSES = ["cat", "dog", "owl"]


def write_table(folder, content, encoding="utf-8"):
    path = folder / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


@pytest.fixture(scope="module")
def trained_model():
    """A small model with changed BatchNorm statistics, dropout seed and optimizer slots."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 10, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", loss="sparse_categorical_crossentropy", run_eagerly=True)
    rng = np.random.default_rng(0)
    model.fit(rng.uniform(0, 255, (16, 8, 10, 3)), rng.integers(0, 3, 16), verbose=0)
    return model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (4, 8, 10, 3)).astype(np.uint8)


def predict(model, images):
    return model(images, training=False).numpy()


def normalised_model():
    """A depthwise convolution, a normalisation and a dense layer; all their weights are 2."""
    inputs = keras.Input((4, 4, 3))
    outputs = keras.layers.BatchNormalization()(keras.layers.DepthwiseConv2D(3)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(outputs)))
    model.set_weights([np.full(weight.shape, 2, np.float32) for weight in model.weights])
    return model


def step_without_gradients(optimizer, model):
    optimizer.apply_gradients([(np.zeros(weight.shape, np.float32), weight) for weight in model.trainable_variables])
    return {"/".join(weight.path.split("/")[-2:]): weight.numpy() for weight in model.trainable_variables}


def assert_kernels_alone_have_changed(weights, factor):
    kernels = {name for name in weights if name.endswith("kernel")}
    assert len(kernels) == 2
    assert len(weights) == 6
    for name, value in weights.items():
        np.testing.assert_allclose(value, 2 * (factor if name in kernels else 1), rtol=1e-6)
