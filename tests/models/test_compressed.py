"""Compressed weights against the model that they were made of."""

import os

import h5py
import keras
import numpy as np
import pytest
from tiny_models import trained_model  # noqa: F401
from wide_models import (
    round_trip,
    wide_model,  # noqa: F401
)

from configs import Configs
from finetune.models.compressed import custom_load_model, custom_save_model
from finetune.models.formats import WEIGHTS_DTYPES
from model import ModelFactory


def test_compressed_model_holds_the_statistics_but_no_optimizer_state(tmp_path, trained_model):
    weights_path, _ = custom_save_model(trained_model, str(tmp_path), "model")
    with h5py.File(weights_path) as file:
        stored = [group[...] for group in file["weights"].values()]
    kernel, bias, gamma, beta, mean, variance = (3 * 3 * 3 * 4, 4, 4, 4, 4, 4)
    assert sum(array.size for array in stored) == kernel + bias + gamma + beta + mean + variance + 4 * 3 + 3
    restored = custom_load_model(str(tmp_path), "model")
    batch_norm = next(layer for layer in restored.layers if isinstance(layer, keras.layers.BatchNormalization))
    assert not np.allclose(batch_norm.moving_mean.numpy(), 0)


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


def test_float32_is_exact(wide_model, tmp_path):
    _, restored = round_trip(wide_model, tmp_path, "float32")
    for found, expected in zip(restored.get_weights(), wide_model.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_float16_rounds_to_eleven_bits(wide_model, tmp_path):
    _, restored = round_trip(wide_model, tmp_path, "float16")
    for found, expected in zip(restored.get_weights(), wide_model.get_weights(), strict=True):
        # Half a unit in the last of 11 bits; below 2^-14 the step no longer shrinks.
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=2**-25)
    assert {weight.dtype for weight in restored.weights} == {"float32", "int64"}


def test_int8_rounds_each_output_channel_by_its_own_scale(wide_model, tmp_path):
    _, restored = round_trip(wide_model, tmp_path, "int8")
    found, expected = (model.layers[1].get_layer("conv").kernel.numpy() for model in (restored, wide_model))
    for channel in range(80):
        step = np.abs(expected[..., channel]).max() / 127
        assert np.abs(found[..., channel] - expected[..., channel]).max() <= step * 0.5001
    assert not found[..., 7].any()
    found, expected = (model.get_layer("depthwise").kernel.numpy() for model in (restored, wide_model))
    for channel in range(80):
        for copy in range(2):
            step = np.abs(expected[..., channel, copy]).max() / 127
            assert 0 < np.abs(found[..., channel, copy] - expected[..., channel, copy]).max() <= step * 0.5001


def test_int8_holds_kernels_in_bytes_and_the_rest_in_halves(wide_model, tmp_path):
    path, _ = round_trip(wide_model, tmp_path, "int8")
    with h5py.File(path) as file:
        types = {array.attrs["path"].split("/", 1)[-1]: array.dtype.name for array in file["weights"].values()}
        scales = [array.shape for array in file["scales"].values()]
    kernels = [name for name, kind in types.items() if kind == "int8"]
    assert len(kernels) == len(scales) == 3
    assert all(name.endswith("kernel") for name in kernels)
    assert sorted(scales) == sorted([(1, 1, 1, 80), (1, 1, 80, 2), (1, 3)])
    assert set(types.values()) == {"int8", "float16", "float32", "int64"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNet", "DenseNet121", "VGG16"])
def test_sizes_against_the_checkpoint_with_adam(name, tmp_path):
    configs = Configs(
        visual_model_name=name, image_target_size=(64, 64, 3), use_imagenet_weights=False, classes=list("abcde")
    )
    model = ModelFactory().get_model(configs)
    # A graph would take ten times as long to build as this one step.
    model.run_eagerly = True
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    model.fit(images, np.array([0, 1, 2, 3]), verbose=0)
    model.save(tmp_path / "checkpoint.keras")
    size = os.path.getsize(tmp_path / "checkpoint.keras")
    for weights_dtype, share in (("float32", 3), ("float16", 6), ("int8", 11)):
        path, _ = custom_save_model(model, str(tmp_path), "model", weights_dtype)
        assert os.path.getsize(path) * share <= size


@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES)
def test_a_weight_that_float16_cannot_hold_stays_exact(weights_dtype, tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 100)), keras.layers.BatchNormalization()])
    variance = np.linspace(1, 1e6, 100, dtype=np.float32)
    model.layers[0].moving_variance.assign(variance)
    _, restored = round_trip(model, tmp_path, weights_dtype)
    np.testing.assert_array_equal(restored.layers[0].moving_variance.numpy(), variance)


@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES)
def test_restored_model_predicts_nearly_the_same_and_trains_on(wide_model, weights_dtype, tmp_path):
    _, restored = round_trip(wide_model, tmp_path, weights_dtype)
    images = np.random.default_rng(1).normal(100, 30, (4, 8, 8, 3)).astype(np.float32)
    pooled = [keras.Model(m.inputs, m.layers[-2].output)(images).numpy() for m in (wide_model, restored)]
    bound = {"float32": 0, "float16": 1e-2, "int8": 5e-2}[weights_dtype]
    assert np.abs(pooled[1] - pooled[0]).max() <= bound * np.abs(pooled[0]).max()
    restored.compile("sgd", "sparse_categorical_crossentropy")
    restored.fit(images, np.array([0, 1, 2, 0]), verbose=0)


def test_the_optimizer_of_a_compiled_model_is_left_behind(wide_model, tmp_path):
    compiled = keras.models.clone_model(wide_model)
    compiled.compile("adam", "sparse_categorical_crossentropy")
    compiled.train_on_batch(np.zeros((1, 8, 8, 3)), np.array([0]))
    for weights_dtype in WEIGHTS_DTYPES:
        _, restored = round_trip(compiled, tmp_path, weights_dtype)
        assert getattr(restored, "optimizer", None) is None
        assert len(restored.variables) == len(wide_model.variables)
