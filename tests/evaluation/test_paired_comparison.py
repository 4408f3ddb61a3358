"""Which of two models is kept, by the images of a validation set."""

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score

from finetune.evaluation.paired_comparison import (
    compare_scores,
    describe_choice,
    describe_epoch,
    describe_rival,
    get_log_losses,
    is_better,
    score_images,
)


def test_an_image_scores_by_its_most_probable_class():
    probabilities = np.array([[0.7, 0.3], [0.4, 0.6], [0.2, 0.8]])
    assert score_images(np.array([0, 0, 1]), probabilities).tolist() == [1, 0, 1]


def test_an_image_of_several_labels_scores_by_their_ranks():
    rng = np.random.default_rng(0)
    truth, scores = rng.random((40, 7)) < 0.3, rng.random((40, 7)).round(1)
    expected = [label_ranking_average_precision_score([row], [score]) for row, score in zip(truth, scores, strict=True)]
    assert score_images(truth.astype(np.uint8), scores) == pytest.approx(expected)


def test_two_models_are_compared_image_by_image():
    simple = np.zeros(200)
    other = np.where(np.arange(200) < 20, 1.0, 0.0)
    # The standard error of a share of a tenth in 200.
    assert compare_scores(simple, other) == pytest.approx((0.1, (0.09 / 199) ** 0.5))
    assert compare_scores(other, other) == (0, 0)
    assert compare_scores([0.5], [0.7]) == pytest.approx((0.2, 0))


def test_two_models_are_compared_group_by_group():
    rng = np.random.default_rng(0)
    simple = rng.random(300)
    # Copies of a photo tell nothing more: the error is that of the photos alone.
    other = simple + rng.normal(0.1, 1, 300)
    groups = np.repeat(np.arange(300), 5)
    expected = compare_scores(simple, other)
    assert compare_scores(simple.repeat(5), other.repeat(5), groups) == pytest.approx(expected)
    assert compare_scores(simple, other, np.arange(300)) == pytest.approx(expected)
    assert compare_scores(simple, other, np.zeros(300, int)) == expected


def test_the_error_of_groups_of_many_sizes_is_that_of_a_cluster_bootstrap():
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 12, 150)
    groups = np.repeat(np.arange(150), sizes)
    differences = rng.normal(0, 1, 150)[groups] + rng.normal(0.2, 0.5, len(groups))
    rows_of = [np.flatnonzero(groups == group) for group in range(150)]
    means = [differences[np.concatenate([rows_of[g] for g in rng.integers(0, 150, 150)])].mean() for _ in range(2000)]
    mean, error = compare_scores(np.zeros(len(groups)), differences, groups)
    assert mean == pytest.approx(differences.mean())
    assert error == pytest.approx(np.std(means), rel=0.08)
    assert error > 1.8 * compare_scores(np.zeros(len(groups)), differences)[1]


def test_a_model_is_kept_that_is_better_by_more_than_a_quarter_of_a_standard_error():
    assert is_better(0.011, 0.04)
    assert not is_better(0.009, 0.04)
    assert not is_better(0.0, 0.0)


def test_the_log_loss_of_an_image_is_that_of_its_class_at_the_best_temperature():
    # With three of four right the best answer is 0.75, whatever the model claims.
    for claimed in (0.6, 0.75, 0.9):
        probabilities, truth = np.tile([[claimed, 1 - claimed]], (4, 1)), np.array([0, 0, 0, 1])
        assert get_log_losses(truth, probabilities) == pytest.approx(-np.log([0.75, 0.75, 0.75, 0.25]), rel=0.05)
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], 50)
    sharper = probabilities**2 / (probabilities**2).sum(axis=1, keepdims=True)
    truth = probabilities.argmax(axis=1)
    truth[:15] = 0
    assert get_log_losses(truth, sharper).mean() == pytest.approx(get_log_losses(truth, probabilities).mean(), rel=1e-3)


def test_the_log_loss_of_an_image_of_several_labels_is_their_mean():
    # Of eight labels six are as they were claimed to be.
    probabilities = np.array([[0.9, 0.1, 0.9, 0.1], [0.9, 0.1, 0.9, 0.1]])
    truth = np.array([[1, 0, 1, 0], [1, 0, 0, 1]], np.uint8)
    expected = [-np.log(0.75), -(np.log(0.75) + np.log(0.25)) / 2]
    assert get_log_losses(truth, probabilities) == pytest.approx(expected, rel=0.05)


def test_a_model_without_an_answer_loses():
    assert np.isinf(get_log_losses(np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, 0.5]]))).all()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((1, False, True, 0.05, 0.012, 200), ("Kept the fine-tuned model:", "0.0500", "0.0120", "200 validation")),
        ((1, True, True, 0.05, 0.012, 200), ("Kept the fine-tuned model, with a refitted head:",)),
        ((1, False, True, 0.005, 0.012, 200), ("Chance alone",)),
        ((0.25, True, True, 0.05, 0.012, 200), ("Kept the weights 25%", "a head 25%")),
        ((0.5, False, False, 0.004, 0.02, 9), ("Kept the start", "the weights 50%", "not be clearly better", "0.0040")),
        ((1, False, False, -0.3, 0.1, 9), ("Kept the start", "the fine-tuned model is no lower")),
    ],
)
def test_the_choice_is_explained_with_its_numbers(arguments, parts):
    described = describe_choice(*arguments)
    assert all(part in described for part in parts)
    assert ("Chance alone" in described) == ("Chance alone" in parts)


def test_a_lower_loss_that_is_not_kept_is_explained():
    described = describe_rival(0.5, False, 0.004, 0.02)
    assert all(part in described for part in ("the weights 50%", "0.0040", "0.0200"))


def test_the_kept_epoch_is_named_with_its_average_and_its_head():
    assert describe_epoch(7, None, False) == describe_epoch(7, 1, False) == "7"
    assert describe_epoch(7, 1, True) == "7, with a refitted head"
    described = describe_epoch(7, 0.25, True)
    assert described.startswith("7, averaged 25% ")
    assert "a head 25% " in described
