"""Bootstrap intervals against resampling by hand."""

import numpy as np
import pytest
from random_answers import NAMES, one_hot, random_multilabel, random_single_label, share_of_ordered_pairs
from scipy import stats
from sklearn import metrics as sk
from sklearn.metrics import label_ranking_average_precision_score

from finetune.evaluation.decision import Decision
from finetune.evaluation.intervals import (
    compare_scores,
    describe_choice,
    describe_epoch,
    describe_rival,
    get_intervals,
    get_log_losses,
    is_better,
    score_images,
)


def draw_groups(groups, rng):
    """Draws whole groups with replacement, one after the other; returns the positions of their images."""
    rows_of = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    drawn = rng.integers(len(rows_of), size=len(rows_of))
    return np.array([row for group in drawn for row in rows_of[group]])


def make_groups(seed, images):
    """Numbers groups of 1 to 6 images in random order."""
    rng = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(images), rng.integers(1, 7, images))[:images]
    return rng.permutation(numbers)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("is_grouped", [False, True])
def test_each_metric_of_a_resample_is_scikit_learns_for_its_images(seed, is_grouped):
    y_true, raw = random_single_label(60, 12)
    groups = make_groups(seed, 60) if is_grouped else None
    intervals = get_intervals(y_true, raw, Decision(list("abcdefghijkl"), False), seed, 1, groups)
    drawn = draw_groups(np.arange(60) if groups is None else groups, np.random.default_rng(seed))
    truth, predicted = y_true[drawn], raw[drawn].argmax(axis=1)
    assert (len(drawn) != 60) is is_grouped
    expected = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.recall_score(truth, predicted, average="macro", labels=np.unique(truth)),
        "macro_f1": sk.f1_score(truth, predicted, average="macro"),
        "top_5_accuracy": sk.top_k_accuracy_score(truth, raw[drawn], k=5, labels=range(12)),
    }
    assert intervals == {name: pytest.approx([value, value]) for name, value in expected.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("is_grouped", [False, True])
def test_each_multilabel_metric_of_a_resample_is_scikit_learns_for_its_images(seed, is_grouped):
    number = 80 if is_grouped else 12
    y_true, raw = random_multilabel(number, 4)
    y_true[:, 3] = np.arange(number) == 0
    groups = make_groups(seed, number) if is_grouped else None
    decision = Decision(list("abcd"), True, exact_match_threshold=0.55)
    intervals = get_intervals(y_true, raw, decision, seed, 1, groups)
    drawn = draw_groups(np.arange(number) if groups is None else groups, np.random.default_rng(seed))
    truth, scores = y_true[drawn], raw[drawn]
    predicted = scores >= 0.55
    defined = [column for column in range(4) if truth[:, column].any()]
    pairs = [share_of_ordered_pairs(truth[:, column], scores[:, column]) for column in defined]
    expected = {
        "mean_auroc": np.mean(pairs),
        "mean_average_precision": sk.average_precision_score(truth[:, defined], scores[:, defined]),
        "exact_match_accuracy": sk.accuracy_score(truth, predicted),
        "hamming_loss": sk.hamming_loss(truth, predicted),
        "macro_f1": sk.f1_score(truth, predicted, average="macro", zero_division=np.nan),
    }
    per_class = intervals.pop("per_class")
    assert intervals == {name: pytest.approx([value, value], abs=1e-6) for name, value in expected.items()}
    scorers = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}
    for column, name in enumerate("abcd"):
        for key, scorer in scorers.items():
            value = scorer(truth[:, column], predicted[:, column], zero_division=np.nan)
            expected = None if np.isnan(value) else pytest.approx([value, value])
            assert per_class[name][key] == expected, (name, key)


@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_depend_on_the_seed_alone(multi_label, monkeypatch):
    y_true, raw = random_multilabel() if multi_label else random_single_label(60, 3)
    decision = Decision(NAMES, multi_label, 1.3, exact_match_threshold=0.6)
    first = get_intervals(y_true, raw, decision, seed=1, resamples=50)
    assert first != get_intervals(y_true, raw, decision, seed=2, resamples=50)
    monkeypatch.setattr("finetune.evaluation.calibration.BLOCK", 7 * 60)
    assert get_intervals(y_true, raw, decision, seed=1, resamples=50) == first


@pytest.mark.filterwarnings("error")
def test_what_is_undefined_in_every_resample_has_no_interval():
    intervals = get_intervals(np.zeros((5, 2)), np.full((5, 2), 0.3), Decision(["ant", "bee"], True), resamples=20)
    assert intervals["mean_auroc"] is intervals["mean_average_precision"] is intervals["macro_f1"] is None
    assert intervals["exact_match_accuracy"] == [pytest.approx(0.025 ** (1 / 5)), 1]
    assert intervals["per_class"]["ant"] == {"precision": None, "recall": None, "f1": None}


# Groups


def test_the_interval_of_grouped_images_is_that_of_a_cluster_bootstrap_and_of_theory():
    """Groups of four images that are right or wrong together are worth as many images as there are groups."""
    rng = np.random.default_rng(1)
    right = np.repeat(rng.random(100) < 0.8, 4)
    order = rng.permutation(400)
    groups, right = np.repeat(np.arange(100), 4)[order], right[order]
    y_true, raw = np.zeros(400, int), one_hot((~right).astype(int), 2)
    decision = Decision(["ant", "bee"], False)
    found = get_intervals(y_true, raw, decision, resamples=4000, groups=groups)["accuracy"]
    means = [right[draw_groups(groups, rng)].mean() for _ in range(2000)]
    assert found == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.011)
    assert found == pytest.approx(stats.binom.ppf([0.025, 0.975], 100, right.mean()) / 100, abs=0.011)
    alone = get_intervals(y_true, raw, decision, resamples=4000)["accuracy"]
    assert (found[1] - found[0]) / (alone[1] - alone[0]) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("multi_label", [False, True])
def test_groups_of_one_image_change_nothing(multi_label):
    y_true, raw = random_multilabel() if multi_label else random_single_label(60, 3)
    decision = Decision(NAMES, multi_label)
    alone = get_intervals(y_true, raw, decision, seed=1, resamples=50)
    assert get_intervals(y_true, raw, decision, 1, 50, np.arange(len(y_true))) == alone


def test_a_single_group_has_no_intervals():
    y_true, raw = random_single_label(60, 3)
    intervals = get_intervals(y_true, raw, Decision(NAMES, False), groups=np.zeros(60, int), resamples=20)
    assert intervals == dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1"))


@pytest.mark.parametrize(("groups", "units"), [(None, 8), (np.repeat(np.arange(4), 2), 4)])
def test_all_right_is_not_certain(groups, units):
    y_true = np.arange(8) % 2
    found = get_intervals(y_true, np.eye(2)[y_true] * 0.8 + 0.1, Decision(["a", "b"], False), groups=groups)
    # No wrong answer among n has a probability of (1 - p)^n, which is 0.025 at the end of the interval.
    assert found["accuracy"] == [pytest.approx(0.025 ** (1 / units)), 1]
    assert found["balanced_accuracy"] is None
    assert found["macro_f1"] is None
    wrong = get_intervals(np.array([0]), one_hot(np.array([1])), Decision(NAMES, False))
    assert wrong["accuracy"] == [0, pytest.approx(0.975)]


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
        ((1, False, True, 0.05, 0.012, 200), ("Kept the fine-tuned model (", "0.0500", "0.0120", "200 validation")),
        ((1, True, True, 0.05, 0.012, 200), ("Kept the fine-tuned model, with a refitted head (",)),
        ((1, False, True, 0.005, 0.012, 200), ("Chance alone",)),
        ((0.25, True, True, 0.05, 0.012, 200), ("Kept the weights 25%", "a head 25%")),
        ((0.5, False, False, 0.004, 0.02, 9), ("Kept the start", "the weights 50%", "not be clearly better", "0.0040")),
        (
            (1, False, False, -0.3, 0.1, 9),
            ("Kept the start", "the fine-tuned model would be worse", "higher than the start's by 0.3"),
        ),
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
