"""How a model's files are named."""

import keras
import numpy as np
import pytest
from wide_models import (
    round_trip,
    wide_model,  # noqa: F401
)

from finetune.models.artefacts import WEIGHTS_DTYPES


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
