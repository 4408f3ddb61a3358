"""Bootstrap intervals against resampling by hand."""

import numpy as np
import pytest
from random_answers import NAMES, one_hot, random_multilabel, random_single_label, share_of_ordered_pairs
from scipy import stats
from sklearn import metrics as sk

from finetune.evaluation.decision import Decision
from finetune.evaluation.intervals import get_intervals


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
    monkeypatch.setattr("finetune.evaluation.decision.BLOCK", 7 * 60)
    monkeypatch.setattr("finetune.evaluation.intervals.BLOCK", 7 * 60)
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
