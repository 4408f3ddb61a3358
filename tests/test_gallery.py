"""Which images the report shows."""

import numpy as np
from sklearn.metrics import log_loss

from finetune.gallery import choose_gallery, get_image_losses


def test_gallery_of_single_labels():
    y_true = np.array([0, 1, 2, 0])
    probabilities = np.array([[0.9, 0.05, 0.05], [0.8, 0.15, 0.05], [0.05, 0.93, 0.02], [0.4, 0.3, 0.3]])
    chosen = probabilities == probabilities.max(axis=1, keepdims=True)
    mistakes, least_confident = choose_gallery(y_true, probabilities, chosen, 2)
    # Wrong are the rows 1 (0.15 for the true class) and 2 (0.02); the surest answers have 0.9, 0.8, 0.93, 0.4.
    assert mistakes.tolist() == [2, 1]
    assert least_confident.tolist() == [3, 1]


def test_gallery_of_several_labels_follows_the_thresholds():
    y_true = np.array([[1, 0], [1, 0], [0, 0]])
    probabilities = np.array([[0.3, 0.01], [0.99, 0.25], [0.05, 0.02]])
    chosen = probabilities >= 0.2
    mistakes, least_confident = choose_gallery(y_true, probabilities, chosen, 5)
    # At 0.2 row 0 is right in spite of its loss, and row 1 wrong; the product of each answer's probabilities is
    # 0.3 x 0.99 = 0.297, 0.99 x 0.25 = 0.2475, 0.95 x 0.98 = 0.931.
    assert mistakes.tolist() == [1]
    assert least_confident.tolist() == [1, 0, 2]


def test_gallery_without_a_mistake_is_empty_and_ties_keep_their_order():
    y_true, probabilities = np.array([0, 0, 1]), np.array([[0.7, 0.3], [0.7, 0.3], [0.3, 0.7]])
    mistakes, least_confident = choose_gallery(y_true, probabilities, probabilities > 0.5, 2)
    assert mistakes.tolist() == []
    assert least_confident.tolist() == [0, 1]


def test_losses_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), size=6)
    y_true = rng.integers(0, 4, 6)
    expected = [log_loss([label], [row], labels=range(4)) for label, row in zip(y_true, probabilities, strict=True)]
    np.testing.assert_allclose(get_image_losses(y_true, probabilities), expected, rtol=1e-6)
    labels = rng.integers(0, 2, (6, 4))
    expected = [log_loss(truth, row, labels=[0, 1]) for truth, row in zip(labels, probabilities, strict=True)]
    np.testing.assert_allclose(get_image_losses(labels, probabilities), expected, rtol=1e-6)


def test_loss_of_an_impossible_answer_is_finite():
    probabilities = np.array([[1, 0]], np.float32)
    np.testing.assert_allclose(get_image_losses(np.array([1]), probabilities), 16.118, rtol=1e-4)
    np.testing.assert_allclose(get_image_losses(np.array([[0, 1]]), probabilities), 16.118, rtol=1e-4)
