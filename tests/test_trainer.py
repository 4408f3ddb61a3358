"""The loop that trains, step by step."""

import keras
import numpy as np
import pytest
from small_recipes import flat_model, train_step


def kernels(model):
    return [model.get_layer(name).kernel.numpy() for name in ("backbone", "head")]


def test_accumulated_batches_make_the_step_of_the_whole_batch():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(7, 2)), rng.normal(size=7).astype(np.float32)
    whole, parts = flat_model(keras.optimizers.SGD(0.1)), flat_model(keras.optimizers.SGD(0.1), batch_size=3)
    for model in (whole, parts):
        train_step(model, images, labels)
        assert int(model.optimizer.iterations.numpy()) == 1
    for one, other in zip(kernels(whole), kernels(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert not np.allclose(one, 1)
    assert whole.loss_sums[1] == parts.loss_sums[1] == 7
    assert whole.loss_sums[0] == pytest.approx(parts.loss_sums[0])


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.Lion])
def test_the_backbone_learns_at_a_fraction_of_the_rate(optimizer):
    whole, slow = flat_model(optimizer(0.1)), flat_model(optimizer(0.1), multiplier=0.25)
    for model in (whole, slow):
        train_step(model, [[1.0, 2.0]], [1.0])
    np.testing.assert_allclose(kernels(slow)[0] - 1, (kernels(whole)[0] - 1) / 4, rtol=1e-5)
    np.testing.assert_allclose(kernels(slow)[1], kernels(whole)[1], rtol=1e-6)
