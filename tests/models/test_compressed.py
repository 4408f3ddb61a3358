"""Compressed models against their originals."""

import os

import h5py
import keras
import numpy as np
import pytest
from built_models import build
from tiny_models import trained_model  # noqa: F401

from finetune.models.compressed import custom_load_model, custom_save_model


@pytest.fixture(scope="module")
def wide_model():
    """A model with every kind of weight. The channels of its depthwise kernel differ by powers of ten."""
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


def test_more_than_ten_weights_keep_their_order(tmp_path):
    inputs = keras.Input((2,))
    outputs = inputs
    for _ in range(8):
        outputs = keras.layers.Dense(2)(outputs)
    model = keras.Model(inputs, outputs)
    custom_save_model(model, str(tmp_path), "model")
    for restored, expected in zip(
        custom_load_model(str(tmp_path), "model").get_weights(), model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(restored, expected)


def test_float32_is_exact_and_float16_rounds_to_eleven_bits(wide_model, tmp_path):
    _, exact = round_trip(wide_model, tmp_path, "float32")
    _, rounded = round_trip(wide_model, tmp_path, "float16")
    for whole, half, expected in zip(exact.get_weights(), rounded.get_weights(), wide_model.get_weights(), strict=True):
        np.testing.assert_array_equal(whole, expected)
        # Half a unit in the last of 11 bits; below 2^-14 the step no longer shrinks.
        np.testing.assert_allclose(half, expected, rtol=2**-11, atol=2**-25)
    assert {weight.dtype for weight in rounded.weights} == {"float32", "int64"}


def test_int8_rounds_each_output_channel_by_its_own_scale(wide_model, tmp_path):
    path, restored = round_trip(wide_model, tmp_path, "int8")
    models = restored, wide_model
    found, expected = (model.layers[1].get_layer("conv").kernel.numpy() for model in models)
    steps = np.abs(expected).max(axis=(0, 1, 2)) / 127
    assert (np.abs(found - expected) <= steps * 0.5001).all()
    assert not found[..., 7].any()
    found, expected = (model.get_layer("depthwise").kernel.numpy() for model in models)
    errors, steps = np.abs(found - expected).max(axis=(0, 1)), np.abs(expected).max(axis=(0, 1)) / 127
    assert (errors > 0).all()
    assert (errors <= steps * 0.5001).all()
    with h5py.File(path) as file:
        types = {array.attrs["path"].split("/", 1)[-1]: array.dtype.name for array in file["weights"].values()}
        scales = [array.shape for array in file["scales"].values()]
    kernels = [name for name, kind in types.items() if kind == "int8"]
    assert len(kernels) == 3
    assert all(name.endswith("kernel") for name in kernels)
    assert sorted(scales) == [(1, 1, 1, 80), (1, 1, 80, 2), (1, 3)]
    assert set(types.values()) == {"int8", "float16", "float32", "int64"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNet", "DenseNet121"])
def test_sizes_against_the_checkpoint_with_adam(name, tmp_path):
    model = build(visual_model_name=name)
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "checkpoint.keras")
    size = os.path.getsize(tmp_path / "checkpoint.keras")
    for weights_dtype, share in (("float32", 3), ("float16", 6), ("int8", 11)):
        path, _ = custom_save_model(model, str(tmp_path), "model", weights_dtype)
        assert os.path.getsize(path) * share <= size


@pytest.mark.parametrize("weights_dtype", ["float16", "int8"])
def test_a_weight_that_float16_cannot_hold_stays_exact(weights_dtype, tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 100)), keras.layers.BatchNormalization()])
    variance = np.linspace(1, 1e6, 100, dtype=np.float32)
    model.layers[0].moving_variance.assign(variance)
    _, restored = round_trip(model, tmp_path, weights_dtype)
    np.testing.assert_array_equal(restored.layers[0].moving_variance.numpy(), variance)


@pytest.mark.parametrize(("weights_dtype", "bound"), [("float32", 0), ("float16", 1e-2), ("int8", 5e-2)])
def test_restored_model_predicts_nearly_the_same_and_trains_on(wide_model, weights_dtype, bound, tmp_path):
    _, restored = round_trip(wide_model, tmp_path, weights_dtype)
    images = np.random.default_rng(1).normal(100, 30, (4, 8, 8, 3)).astype(np.float32)
    expected, found = (keras.Model(m.inputs, m.layers[-2].output)(images).numpy() for m in (wide_model, restored))
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()
    restored.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    restored.train_on_batch(images, np.array([0, 1, 2, 0]))


def test_the_statistics_of_a_trained_model_are_kept_but_not_its_optimizer(trained_model, tmp_path):
    path, restored = round_trip(trained_model, tmp_path, "float32")
    with h5py.File(path) as file:
        kernel, bias, statistics, dense = 3 * 3 * 3 * 4, 4, 4 * 4, 4 * 3 + 3
        assert sum(array.size for array in file["weights"].values()) == kernel + bias + statistics + dense
    batch_norm = next(layer for layer in restored.layers if isinstance(layer, keras.layers.BatchNormalization))
    assert not np.allclose(batch_norm.moving_mean.numpy(), 0)
    assert getattr(restored, "optimizer", None) is None
