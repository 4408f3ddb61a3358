"""Losses and class weights against their formulas."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from built_models import small_configs
from sklearn.metrics import log_loss

from finetune.core.options import UserError
from finetune.models.compiling import (
    get_class_weights,
    get_losses,
    get_multilabel_class_weights,
    weighted_binary_crossentropy,
)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([11] * 7, [1] * 7),
        ([8, 2], [1, 1 + math.log(2.5)]),
        ([60, 30, 10], [1, 1 + math.log(10 / 9), 1 + math.log(10 / 3)]),
        ([6, 0], [1, 1]),
        ([10**6, 1], [1, 1 + math.log(500000.5)]),
    ],
)
def test_rare_class_weighs_more_and_none_less_than_1(counts, expected):
    weights = get_class_weights(np.repeat(np.arange(len(counts)), counts), len(counts))
    assert weights == pytest.approx(dict(enumerate(expected)))
    assert min(weights.values()) >= 1


def test_multi_label_weights_raise_the_rarer_of_present_and_absent():
    labels = np.zeros((10, 5))
    for position, present in enumerate([2, 5, 8, 0, 10]):
        labels[:present, position] = 1
    more = 1 + math.log(4)
    weights = get_multilabel_class_weights(labels)
    np.testing.assert_allclose(weights, [[1, 1, more, 1, 1], [more, 1, 1, 1, 1]], rtol=1e-6)
    assert weights.dtype == np.float32


@pytest.mark.parametrize("kind", [np.float32, np.uint8, bool])
def test_weighted_binary_crossentropy_is_a_weighted_mean_of_keras(kind):
    generator = np.random.default_rng(0)
    y_true, y_pred = generator.integers(0, 2, (6, 4)), generator.random((6, 4)).astype(np.float32)
    weights = generator.uniform(0.5, 2, (2, 4)).astype(np.float32)
    of_each = keras.losses.binary_crossentropy(y_true.astype(np.float32)[..., None], y_pred[..., None]).numpy()
    expected = (of_each * weights[y_true, np.arange(4)]).mean(axis=1)
    found = weighted_binary_crossentropy(weights)(y_true.astype(kind), y_pred)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_weighted_binary_crossentropy_stays_finite_at_certainty():
    loss = weighted_binary_crossentropy(np.ones((2, 2), np.float32))
    assert np.isfinite(loss(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]], np.float32))).all()
    np.testing.assert_allclose(loss(np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]], np.float32)), 0, atol=1e-5)


def test_without_balancing_the_loss_of_single_labels_is_plain():
    losses = get_losses(small_configs(use_class_balancing=False), np.array([0, 0, 1, 2]))
    labels, probabilities = np.array([1, 2]), np.array([[0.2, 0.5, 0.3]] * 2, np.float32)
    for loss in losses:
        np.testing.assert_allclose(loss(labels, probabilities), -np.log([0.5, 0.3]), rtol=1e-5)


def random_probabilities(count: int, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(5).dirichlet(np.ones(classes), count).astype(np.float32)


def test_loss_of_single_labels_weighs_rare_classes_as_in_scikit_learn():
    labels, probabilities = np.array([0, 2, 1, 0, 0, 2, 0, 0]), random_probabilities(8)
    losses = get_losses(small_configs(), labels)
    # 8 images of 3 classes, 5, 1 and 2: the mean is 8/3.
    weights = np.array([1, 1 + np.log(8 / 3), 1 + np.log(8 / 6)])[labels]
    for loss, sample_weight in ((losses.training, weights), (losses.validation, None)):
        expected = log_loss(labels, probabilities, sample_weight=sample_weight, normalize=False)
        found = np.asarray(loss(labels, probabilities))
        assert found.shape == (8,)
        assert found.sum() == pytest.approx(expected, rel=1e-5)


def test_loss_of_shares_weighs_each_class_by_its_share():
    losses = get_losses(small_configs(), np.array([0, 0, 0, 1, 1, 2]))
    shares, probabilities = np.array([[0.75, 0, 0.25]], np.float32), np.array([[0.6, 0.3, 0.1]], np.float32)
    expected = (0.75 + 0.25 * (1 + np.log(2))) * -(0.75 * np.log(0.6) + 0.25 * np.log(0.1))
    np.testing.assert_allclose(losses.training(shares, probabilities), [expected], rtol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_whole_shares_have_the_loss_of_their_classes(label_smoothing):
    labels, probabilities = np.array([0, 2, 1, 0]), random_probabilities(4)
    losses = get_losses(small_configs(label_smoothing=label_smoothing), np.array([0, 0, 0, 1, 1, 2]))
    np.testing.assert_allclose(
        losses.training(np.eye(3, dtype=np.float32)[labels], probabilities),
        losses.training(labels, probabilities),
        rtol=1e-5,
    )


def test_smoothing_spreads_a_share_of_single_labels_over_all_classes():
    losses = get_losses(small_configs(label_smoothing=0.3), np.array([0, 0, 0, 1, 1, 2]))
    labels, probabilities = np.array([2]), np.array([[0.2, 0.3, 0.5]], np.float32)
    # 0.7 of the class itself, and 0.1 of each.
    expected = -(0.1 * np.log(0.2) + 0.1 * np.log(0.3) + 0.8 * np.log(0.5))
    np.testing.assert_allclose(losses.training(labels, probabilities), [(1 + np.log(2)) * expected], rtol=1e-5)
    np.testing.assert_allclose(losses.validation(labels, probabilities), [-np.log(0.5)], rtol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [np.array([1]), np.array([[0, 1, 0]], np.float32)], ids=["int", "shares"])
def test_single_labels_keep_their_gradient_when_the_model_is_certain_and_wrong(labels, label_smoothing):
    loss = get_losses(small_configs(label_smoothing=label_smoothing), np.array([0, 1, 2])).training
    logits = tf.Variable([[200.0, 0.0, 0.0]])

    @tf.function
    def differentiate(labels):
        with tf.GradientTape() as tape:
            value = loss(labels, keras.layers.Activation("softmax")(logits))
        return value, tape.gradient(value, logits)

    value, gradient = differentiate(tf.constant(labels))
    # log(softmax) is (0, -200, -200).
    assert float(value[0]) == pytest.approx(200 * (1 - label_smoothing / 3), rel=1e-5)
    wanted = np.array([0, 1, 0]) * (1 - label_smoothing) + label_smoothing / 3
    np.testing.assert_allclose(gradient, [[1, 0, 0] - wanted], atol=1e-5)


@pytest.mark.parametrize("loss", ["focal", "asymmetric"])
def test_single_labels_have_one_loss(loss):
    with pytest.raises(UserError, match=f"loss: {loss} .*multi_label_classification"):
        get_losses(small_configs(loss=loss), np.array([0, 1, 2]))


@pytest.mark.parametrize(
    ("options", "present"),
    [
        ({}, 1 + np.log(3)),
        ({"use_class_balancing": False}, 1),
        ({"positive_weights_multiply": 2.0}, 2 * (1 + np.log(3))),
        ({"positive_weights_multiply": 2.0, "use_class_balancing": False}, 2),
    ],
)
def test_losses_of_multiple_labels_weigh_rare_presence(options, present):
    configs = small_configs(multi_label_classification=True, classes=["a"], **options)
    y_true, y_pred = np.array([[1], [0]], np.float32), np.array([[0.3], [0.4]], np.float32)
    for loss in get_losses(configs, np.array([[1], [0], [0], [0]], np.float32)):
        np.testing.assert_allclose(loss(y_true, y_pred), [-present * np.log(0.3), -np.log(0.6)], rtol=1e-5)


def multilabel_losses(**options):
    configs = small_configs(multi_label_classification=True, **{"use_class_balancing": False} | options)
    return get_losses(configs, np.eye(3, dtype=np.float32))


def test_focal_loss_is_that_of_keras():
    generator = np.random.default_rng(0)
    y_true, y_pred = generator.integers(0, 2, (6, 3)).astype(np.float32), generator.random((6, 3)).astype(np.float32)
    expected = keras.losses.binary_focal_crossentropy(y_true, y_pred, gamma=2.0)
    np.testing.assert_allclose(multilabel_losses(loss="focal").training(y_true, y_pred), expected, rtol=1e-5)


def test_focal_loss_has_the_weights_of_presence():
    losses = multilabel_losses(loss="focal", use_class_balancing=True)
    # Each of the three classes is absent twice and present once.
    y_true, y_pred = np.array([[1, 0, 0]], np.float32), np.array([[0.6, 0.1, 0.5]], np.float32)
    expected = (1 + np.log(2)) * 0.16 * np.log(0.6) + 0.01 * np.log(0.9) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(losses.training(y_true, y_pred), [-expected / 3], rtol=1e-5)


def test_asymmetric_loss_of_a_hand_worked_example():
    losses = multilabel_losses(loss="asymmetric")
    y_true = np.array([[1, 0, 0], [0, 0, 0]], np.float32)
    y_pred = np.array([[0.3, 0.55, 0.04], [0.05, 0.0, 0.049]], np.float32)
    # Present labels cost their cross-entropy, absent ones only for a probability above 0.05.
    expected = [-(np.log(0.3) + 0.5**4 * np.log(0.5)) / 3, 0]
    np.testing.assert_allclose(losses.training(y_true, y_pred), expected, rtol=1e-4, atol=1e-9)
    plain = [-(np.log(0.3) + np.log(0.45) + np.log(0.96)) / 3, -(np.log(0.95) + np.log(0.951)) / 3]
    np.testing.assert_allclose(losses.validation(y_true, y_pred), plain, rtol=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "asymmetric"])
def test_smoothing_spreads_multiple_labels_over_all_classes(loss):
    y_true = np.array([[1, 0, 0.2], [1, 1, 1], [0, 0, 0]], np.float32)
    y_pred = np.array([[0.7, 0.2, 0.9], [0.4, 0.5, 0.6], [0.3, 0.2, 0.1]], np.float32)
    smoothed, plain = multilabel_losses(loss=loss, label_smoothing=0.2), multilabel_losses(loss=loss)
    # A fifth of the first image's 1.2 labels goes to its three classes; the others have even labels.
    expected = plain.training(np.array([[0.88, 0.08, 0.24], [1, 1, 1], [0, 0, 0]], np.float32), y_pred)
    np.testing.assert_allclose(smoothed.training(y_true, y_pred), expected, rtol=1e-5)
    np.testing.assert_array_equal(smoothed.validation(y_true, y_pred), plain.validation(y_true, y_pred))


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "asymmetric"])
def test_losses_of_multiple_labels_have_finite_gradients_everywhere(loss):
    y_pred = tf.Variable([[0.0, 1e-9, 0.02], [0.05, 0.5, 1.0]])
    for y_true in (np.zeros((2, 3)), np.ones((2, 3)), np.full((2, 3), 0.3)):
        with tf.GradientTape() as tape:
            value = multilabel_losses(loss=loss).training(y_true, y_pred)
        assert np.isfinite(value).all()
        assert (value.numpy() >= 0).all()
        assert np.isfinite(tape.gradient(value, y_pred)).all()
