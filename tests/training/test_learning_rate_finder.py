"""The learning rate that a range test suggests."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import special

from finetune.core.options import UserError
from finetune.training.callbacks import LearningRateFinder
from finetune.training.learning_rate_finder import smooth_losses, suggest_learning_rate

RATES = np.geomspace(1e-6, 1, 100)


def test_smoothed_losses_equal_weighted_means_worked_out_by_hand():
    from_left = [1, (0.8 * 1 + 2) / 1.8, (0.64 * 1 + 0.8 * 2 + 4) / 2.44]
    from_right = [(0.64 * 4 + 0.8 * 2 + 1) / 2.44, (0.8 * 4 + 2) / 1.8, 4]
    expected = (np.array(from_left) + from_right) / 2
    np.testing.assert_allclose(smooth_losses(np.array([1.0, 2.0, 4.0])), expected)


def test_smoothing_leaves_a_constant_and_caps_what_diverges():
    np.testing.assert_allclose(smooth_losses(np.full(30, 1.5)), 1.5)
    diverging = np.append(np.full(30, 1.5), 1e9)
    assert smooth_losses(diverging).max() <= 3


@pytest.mark.parametrize("middle", [-4.0, -2.5])
def test_the_suggested_rate_is_where_an_s_shaped_curve_falls_most_steeply(middle):
    logarithms = np.log10(RATES)
    losses = 1.6 - special.expit(4 * (logarithms - middle)) + np.exp(np.minimum(8 * (logarithms + 0.7), 50))
    assert np.log10(suggest_learning_rate(RATES, losses)) == pytest.approx(middle, abs=0.3)


def test_the_suggested_rate_withstands_noise_and_infinite_losses():
    logarithms, generator = np.log10(RATES), np.random.default_rng(0)
    losses = 1.6 - special.expit(4 * (logarithms + 3)) + generator.normal(0, 0.1, 100)
    losses[logarithms > -0.7] = np.nan
    losses[[0, 20, 50]] = np.nan, np.inf, np.nan
    assert np.log10(suggest_learning_rate(RATES.tolist(), losses.tolist())) == pytest.approx(-3, abs=0.5)


@pytest.mark.parametrize(
    "losses",
    [
        np.full(100, 1.6),
        np.linspace(1.6, 3, 100),
        np.exp(np.linspace(0, 700, 100)),
        1.6 + np.random.default_rng(1).normal(0, 0.2, 100),
    ],
)
def test_losses_that_never_fall_suggest_no_rate(losses):
    with pytest.raises(UserError, match="from 1e-06 to 1 .*batch_size"):
        suggest_learning_rate(RATES, losses)


def test_too_few_finite_losses_suggest_no_rate():
    losses = np.where(np.arange(100) < 9, 1.0, np.nan)
    with pytest.raises(UserError, match="expected 10 steps.*Received: 9 of 100"):
        suggest_learning_rate(RATES, losses)


def test_the_learning_rate_finder_records_the_losses_of_each_step_and_stops():
    test = LearningRateFinder(1e-3, 1.0, steps=4)
    test.set_model(SimpleNamespace(optimizer=SimpleNamespace(learning_rate=None), loss_sums=np.zeros(2)))
    test.on_epoch_begin(0)
    for step, loss in enumerate([2.0, 1.0, 9.0]):
        test.on_train_batch_begin(step)
        assert test.model.optimizer.learning_rate == pytest.approx(10.0 ** (step - 3))
        test.model.loss_sums = np.add(test.model.loss_sums, [loss * 3, 3])
        test.on_train_batch_end(step)
    assert test.losses == [2, 1, 9]
    assert test.model.stop_training
