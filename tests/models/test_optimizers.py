"""Optimizers, weight decay and compiling."""

import keras
import numpy as np
import pytest
from small_recipes import flat_model, train_step
from tiny_models import assert_kernels_alone_have_changed, normalised_model, step_without_gradients

from configs import Configs
from finetune.core.options import UserError
from finetune.models.compiling import (
    OPTIMIZERS,
    check_optimizer,
    exclude_from_weight_decay,
    find_averages,
    get_optimizer,
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_has_its_name_and_rate(name):
    optimizer = get_optimizer(name, 0.0123)
    assert type(optimizer) is getattr(keras.optimizers, name)
    assert float(optimizer.learning_rate) == pytest.approx(0.0123)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_takes_from_kernels_alone(name):
    model, optimizer = normalised_model(), get_optimizer(name, 0.5, weight_decay=0.2)
    exclude_from_weight_decay(model, optimizer)
    assert_kernels_alone_have_changed(step_without_gradients(optimizer, model), 1 - 0.5 * 0.2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_weight_decay_no_weight_changes(name):
    model, optimizer = normalised_model(), get_optimizer(name, 0.5)
    for weight in step_without_gradients(optimizer, model).values():
        np.testing.assert_array_equal(weight, 2)
    # Keras can rebuild it from its saved config.
    assert type(optimizer).from_config(optimizer.get_config()).weight_decay in (None, 0.0)


def test_weight_decay_is_decoupled_from_the_gradient():
    weight, optimizer = keras.Variable([[3.0]]), get_optimizer("SGD", 0.5, weight_decay=0.2)
    optimizer.apply_gradients([(np.array([[0.4]], np.float32), weight)])
    assert float(weight[0, 0]) == pytest.approx(3 - 3 * 0.5 * 0.2 - 0.5 * 0.4)


def test_biases_are_excluded_from_an_optimizer_that_is_built_or_scales_the_loss():
    for wraps in (False, True):
        model, optimizer = normalised_model(), get_optimizer("AdamW", 0.5, weight_decay=0.2)
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer) if wraps else optimizer
        optimizer.build(model.trainable_variables)
        exclude_from_weight_decay(model, optimizer)
        assert_kernels_alone_have_changed(step_without_gradients(optimizer, model), 1 - 0.5 * 0.2)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_divides_by_the_root_of_the_average_and_epsilon(name):
    weight, optimizer = keras.Variable([0.0]), get_optimizer(name, 0.5, adam_beta_2=0.5, adam_epsilon=0.25)
    optimizer.apply_gradients([(np.array([1.0], np.float32), weight)])
    # By hand: the averages without bias, and epsilon added to the biased root.
    average, step = 0.5**0.5, 0.5 * (1 - 0.5) ** 0.5
    np.testing.assert_allclose(weight, [-step / (average + 0.25)], rtol=1e-5)
    moved = float(weight[0])
    optimizer.apply_gradients([(np.array([0.0], np.float32), weight)])
    average, step = 0.25**0.5, 0.5 * (1 - 0.5**2) ** 0.5 * 0.09 / (1 - 0.9**2)
    np.testing.assert_allclose(weight, [moved - step / (average + 0.25)], rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_adam_family_takes_its_options(name):
    adams = {"adam_beta_2": 0.9, "adam_epsilon": 1e-3}
    if OPTIMIZERS[name].takes:
        optimizer = get_optimizer(name, 0.5, **adams)
        assert (optimizer.beta_2, optimizer.epsilon) == (0.9, 1e-3)
        check_optimizer(Configs(optimizer_type=name, **adams))
        stock, own = (
            getattr(keras.optimizers, name)(learning_rate=0.5).get_config(),
            get_optimizer(name, 0.5).get_config(),
        )
        assert all(own[key] == stock[key] for key in ("beta_1", "beta_2", "epsilon"))
        return
    stock, own = (get_optimizer(name, 0.5, **options).get_config() for options in ({}, adams))
    assert own | {"name": ""} == stock | {"name": ""}
    for option, value in adams.items():
        with pytest.raises(UserError, match=f"{option}: .*optimizer_type Adam, .*{name}"):
            check_optimizer(Configs(optimizer_type=name, **{option: value}))


def test_ema_decay_keeps_a_moving_average_of_the_weights():
    weight, optimizer = keras.Variable([3.0]), get_optimizer("SGD", 1.0, ema_decay=0.75)
    for gradient in (1.0, 4.0):
        optimizer.apply_gradients([(np.array([gradient], np.float32), weight)])
    np.testing.assert_allclose(weight, [-2.0])
    (average,) = [variable for variable in optimizer.variables if variable.name.endswith("average")]
    # It starts from the weights after the first step, which are 2.
    np.testing.assert_allclose(average, [0.75 * 2 + 0.25 * -2])
    assert not get_optimizer("SGD", 1.0).use_ema


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_averages_follow_the_weights_of_the_model(multiplier):
    model = flat_model(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9), multiplier=multiplier)
    variables, expected = model.trainable_variables, None
    for step in range(3):
        train_step(model, [[1.0, 2.0]], [1.0 + step])
        now = [variable.numpy() for variable in variables]
        before = now if expected is None else expected
        expected = [0.9 * one + 0.1 * other for one, other in zip(before, now, strict=True)]
        found = [average.numpy() for average in find_averages(model.optimizer, variables)]
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)
