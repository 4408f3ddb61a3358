import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats
from sklearn import metrics as sk

from finetune import metrics
from finetune.curves import get_curves
from finetune.decision import (
    Decision,
    find_best_f1_thresholds,
    find_exact_match_threshold,
    fit_decision,
    fit_temperature,
)
from finetune.decision_file import read_decision, write_decision
from finetune.evaluation import evaluate_set, format_evaluation
from finetune.intervals import get_intervals
from finetune.metrics import (
    get_aurocs,
    get_average_precisions,
    get_calibration,
    get_evaluation_metrics,
    get_multilabel_evaluation_metrics,
    is_in_top_k,
    mean_of_defined,
)
from finetune.options import UserError
from finetune.range_test import smooth_losses, suggest_learning_rate

NAMES = ["ant", "bee", "cow"]
Y_TRUE = np.array([0, 0, 1, 1, 2])
PREDICTED = np.array([0, 1, 1, 1, 0])


def one_hot(positions: np.ndarray, classes: int = 3) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[positions]


def random_multilabel(images: int = 60, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    y_true = (generator.random((images, classes)) < 0.4).astype(np.float32)
    return y_true, generator.random((images, classes)).round(1).astype(np.float32)


def random_single_label(images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(6)
    y_true, logits = generator.integers(0, classes, images), generator.normal(0, 2, (images, classes))
    logits[np.arange(images), y_true] += 2
    return y_true, special.softmax(logits, axis=1).astype(np.float32)


def share_of_ordered_pairs(truth: np.ndarray, scores: np.ndarray) -> float:
    positive, negative = scores[truth == 1][:, None], scores[truth == 0][None]
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


def test_single_label_figures_of_a_hand_worked_example():
    figures = get_evaluation_metrics(Y_TRUE, one_hot(PREDICTED), NAMES)
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["confusion_matrix"] == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert figures["per_class"] == {
        "ant": pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2}),
        "bee": pytest.approx({"precision": 2 / 3, "recall": 1, "f1": 4 / 5, "support": 2}),
        "cow": pytest.approx({"precision": 0, "recall": 0, "f1": 0, "support": 1}),
    }


def test_single_label_figures_equal_scikit_learns():
    generator = np.random.default_rng(1)
    y_true, probabilities = generator.integers(0, 4, 200), generator.dirichlet(np.ones(4), 200)
    predicted = probabilities.argmax(axis=1)
    figures = get_evaluation_metrics(y_true, probabilities, list("abcd"))
    report = sk.classification_report(y_true, predicted, target_names=list("abcd"), output_dict=True)
    assert figures["accuracy"] == pytest.approx(report["accuracy"])
    for name, row in figures["per_class"].items():
        assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(
            [report[name][key] for key in ("precision", "recall", "f1-score", "support")]
        )
    assert figures["confusion_matrix"] == sk.confusion_matrix(y_true, predicted).tolist()


def test_a_class_without_images_or_predictions_keeps_its_place():
    figures = get_evaluation_metrics(np.array([0, 2]), one_hot(np.array([0, 2])), NAMES)
    assert figures["per_class"]["bee"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert figures["confusion_matrix"] == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_multilabel_figures_of_a_hand_worked_example():
    y_true = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], np.float32)
    probabilities = np.array([[0.9, 0.6], [0.3, 0.8], [0.4, 0.5], [0.1, 0.2]], np.float32)
    figures = get_multilabel_evaluation_metrics(y_true, probabilities, ["ant", "bee"], threshold=0.5)
    assert figures["exact_match_accuracy"] == pytest.approx(2 / 4)
    assert figures["hamming_loss"] == pytest.approx(2 / 8)
    assert figures["threshold"] == 0.5
    assert figures["per_class"]["ant"] == pytest.approx(
        {"precision": 1, "recall": 1 / 2, "f1": 2 / 3, "support": 2, "auroc": 3 / 4, "average_precision": 5 / 6}
    )
    assert figures["per_class"]["bee"] == pytest.approx(
        {"precision": 2 / 3, "recall": 1, "f1": 4 / 5, "support": 2, "auroc": 3 / 4, "average_precision": 5 / 6}
    )
    assert figures["mean_auroc"] == pytest.approx(3 / 4)
    assert figures["mean_average_precision"] == pytest.approx(5 / 6)


def test_multilabel_figures_equal_independent_ones_on_random_data():
    y_true, probabilities = random_multilabel()
    figures = get_multilabel_evaluation_metrics(y_true, probabilities, NAMES, threshold=0.45)
    predicted = probabilities >= 0.45
    assert figures["exact_match_accuracy"] == pytest.approx(np.mean([*map(np.array_equal, predicted, y_true == 1)]))
    assert figures["hamming_loss"] == pytest.approx(np.mean(predicted != y_true))
    for column, name in enumerate(NAMES):
        truth, chosen, row = y_true[:, column], predicted[:, column], figures["per_class"][name]
        assert row["precision"] == pytest.approx(sk.precision_score(truth, chosen))
        assert row["recall"] == pytest.approx(sk.recall_score(truth, chosen))
        assert row["f1"] == pytest.approx(sk.f1_score(truth, chosen))
        assert row["support"] == truth.sum()
        assert row["auroc"] == pytest.approx(share_of_ordered_pairs(truth, probabilities[:, column]))
        assert row["average_precision"] == pytest.approx(sk.average_precision_score(truth, probabilities[:, column]))
    assert figures["mean_auroc"] == pytest.approx(sk.roc_auc_score(y_true, probabilities))


def test_a_single_class_is_measured_by_its_present_label():
    y_true, probabilities = np.array([[1], [1], [0]], np.float32), np.array([[0.9], [0.2], [0.8]], np.float32)
    figures = get_multilabel_evaluation_metrics(y_true, probabilities, ["ant"], threshold=0.5)
    assert figures["per_class"]["ant"] == pytest.approx(
        {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2, "auroc": 1 / 2, "average_precision": 5 / 6}
    )
    assert figures["exact_match_accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("labels", "average_precision"), [([0, 0, 0], None), ([1, 1, 1], 1.0)])
def test_undefined_auroc_is_none_and_left_out_of_the_mean(labels, average_precision):
    y_true = np.array([[1, labels[0]], [0, labels[1]], [0, labels[2]]], np.float32)
    probabilities = np.array([[0.8, 0.3], [0.9, 0.5], [0.1, 0.7]], np.float32)
    figures = get_multilabel_evaluation_metrics(y_true, probabilities, ["ant", "bee"], threshold=0.5)
    assert figures["per_class"]["bee"]["auroc"] is None
    assert figures["per_class"]["bee"]["average_precision"] == average_precision
    assert figures["mean_auroc"] == pytest.approx(1 / 2)
    defined = [1 / 2] if average_precision is None else [1 / 2, average_precision]
    assert figures["mean_average_precision"] == pytest.approx(np.mean(defined))


@pytest.mark.filterwarnings("error")
def test_without_any_defined_class_the_means_are_none():
    figures = get_multilabel_evaluation_metrics(np.zeros((2, 2)), np.full((2, 2), 0.3), ["ant", "bee"], 0.5)
    assert figures["mean_auroc"] is None
    assert figures["mean_average_precision"] is None
    assert np.isnan(mean_of_defined(np.array([np.nan, np.nan])))
    json.dumps(figures, allow_nan=False)


def test_auroc_and_average_precision_are_nan_where_undefined():
    y_true, probabilities = np.array([[1, 1, 0], [0, 1, 0]]), np.array([[0.9, 0.1, 0.1], [0.1, 0.2, 0.2]])
    np.testing.assert_array_equal(get_aurocs(y_true, probabilities), [1, np.nan, np.nan])
    np.testing.assert_array_equal(get_average_precisions(y_true, probabilities), [1, 1, np.nan])


def test_exact_match_threshold_is_the_middle_of_the_best():
    y_true = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    probabilities = np.array([[0.95, 0.405], [0.205, 0.85], [0.805, 0.9]])
    threshold, accuracy = find_exact_match_threshold(y_true, probabilities, [0.01, 0.99])
    assert accuracy == 1
    assert threshold in (pytest.approx(0.60), pytest.approx(0.61))


def test_exact_match_threshold_of_conflicting_images_takes_the_majority():
    y_true = np.array([[1], [1], [1], [0]], np.float32)
    probabilities = np.array([[0.805], [0.705], [0.305], [0.505]])
    threshold, accuracy = find_exact_match_threshold(y_true, probabilities, [0.01, 0.99])
    assert accuracy == pytest.approx(3 / 4)
    assert threshold <= 0.30 or 0.51 <= threshold <= 0.70


@pytest.mark.parametrize("threshold_range", [[0.3, 0.3], [0.01, 0.99], [0.55, 0.99]])
def test_exact_match_threshold_stays_in_its_range(threshold_range):
    y_true, probabilities = random_multilabel()
    threshold, _ = find_exact_match_threshold(y_true, probabilities, threshold_range)
    assert threshold_range[0] <= threshold <= threshold_range[1]


@pytest.mark.parametrize("score", [0.01, 0.07, 0.3, 0.7, 0.99])
def test_both_ends_of_the_threshold_range_are_tried(score):
    y_true, probabilities = np.array([[1, 0]]), np.array([[score, score - 0.005]])
    assert find_exact_match_threshold(y_true, probabilities, [score, 0.99]) == (pytest.approx(score), 1)
    assert find_exact_match_threshold(y_true, probabilities, [0.01, score]) == (pytest.approx(score), 1)


@pytest.mark.parametrize("score", [0.1, 0.3, 0.6, 0.7, 0.9])
def test_the_evaluation_agrees_with_the_accuracy_found_for_its_threshold(score):
    y_true, probabilities = np.array([[1, 0], [0, 1]]), np.array([[score, 0], [0, score]], np.float32)
    threshold, accuracy = find_exact_match_threshold(y_true, probabilities, [score, score])
    figures = get_multilabel_evaluation_metrics(y_true, probabilities, ["ant", "bee"], threshold)
    assert figures["exact_match_accuracy"] == accuracy


def cells(line: str) -> list[str]:
    return line.split()


def test_format_prints_single_label_figures():
    lines = format_evaluation(get_evaluation_metrics(Y_TRUE, one_hot(PREDICTED), NAMES)).splitlines()
    assert cells(lines[0]) == ["class", "precision", "recall", "f1", "support"]
    assert cells(lines[2]) == ["bee", "0.6667", "1.0000", "0.8000", "2"]
    start = lines.index("confusion matrix")
    assert [cells(line)[-3:] for line in lines[start + 2 : start + 5]] == [list("110"), list("020"), list("100")]
    assert "accuracy: 0.6000" in lines


def test_format_prints_multilabel_figures_and_what_is_undefined():
    y_true, probabilities = np.array([[1, 0], [0, 0]], np.float32), np.array([[0.9, 0.6], [0.1, 0.2]], np.float32)
    figures = get_multilabel_evaluation_metrics(y_true, probabilities, ["ant", "bee"], threshold=0.25)
    lines = format_evaluation(figures).splitlines()
    assert cells(lines[1]) == ["ant", "1.0000", "1.0000", "1.0000", "1", "1.0000", "1.0000"]
    assert cells(lines[2]) == ["bee", "0.0000", "0.0000", "0.0000", "0", "undefined", "undefined"]
    for line in ("mean auroc: 1.0000", "exact match accuracy: 0.5000", "hamming loss: 0.2500", "threshold: 0.2500"):
        assert line in lines


def test_format_aligns_counts_of_any_width_and_names_of_any_length():
    y_true = np.array([0] * 123456 + [1])
    text = format_evaluation(get_evaluation_metrics(y_true, one_hot(y_true, 2), ["a", "a rather long class name"]))
    assert ["0", "a", "123456", "0"] in [cells(line) for line in text.splitlines()]


def test_figures_are_json():
    y_true, probabilities = random_multilabel()
    for figures in (
        get_evaluation_metrics(Y_TRUE, one_hot(PREDICTED), NAMES),
        get_multilabel_evaluation_metrics(y_true, probabilities, NAMES, 0.5),
    ):
        assert json.loads(json.dumps(figures, allow_nan=False)) == figures


# Further figures of one label an image


def test_balanced_accuracy_and_macro_f1_of_a_hand_worked_example():
    figures = get_evaluation_metrics(Y_TRUE, one_hot(PREDICTED), NAMES)
    assert figures["balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert figures["macro_f1"] == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    assert "top_5_accuracy" not in figures


def test_many_classes_have_scikit_learns_balanced_macro_and_top_5_figures():
    y_true, probabilities = random_single_label(300, 12)
    figures = get_evaluation_metrics(y_true, probabilities, list("abcdefghijkl"))
    predicted = probabilities.argmax(axis=1)
    assert figures["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y_true, predicted))
    assert figures["macro_f1"] == pytest.approx(sk.f1_score(y_true, predicted, average="macro"))
    assert figures["top_5_accuracy"] == pytest.approx(sk.top_k_accuracy_score(y_true, probabilities, k=5))


def test_a_class_that_is_neither_true_nor_predicted_has_no_part_in_the_means():
    y_true, predicted = np.array([0, 2, 2]), np.array([0, 2, 0])
    figures = get_evaluation_metrics(y_true, one_hot(predicted), NAMES)
    assert figures["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_of_equal_probabilities_the_first_is_in_the_top_k():
    probabilities = np.array([[0.3, 0.3, 0.3, 0.1]] * 4)
    assert is_in_top_k(np.arange(4), probabilities, k=1).tolist() == [True, False, False, False]
    assert is_in_top_k(np.arange(4), probabilities, k=2).tolist() == [True, True, False, False]
    assert is_in_top_k(np.arange(4), probabilities, k=4).all()


def test_multilabel_macro_f1_leaves_out_what_is_neither_true_nor_predicted():
    y_true = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
    probabilities = np.array([[0.9, 0.6, 0.1], [0.3, 0.8, 0.2], [0.4, 0.5, 0.3], [0.1, 0.2, 0.1]])
    figures = get_multilabel_evaluation_metrics(y_true, probabilities, NAMES, threshold=0.5)
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    nothing = get_multilabel_evaluation_metrics(y_true * 0, probabilities, NAMES, threshold=0.95)
    assert nothing["macro_f1"] is None


# Temperature


def test_a_temperature_of_two_takes_the_root_of_the_odds():
    single, multi = Decision(["ant", "bee"], False, 2.0), Decision(["ant", "bee"], True, 2.0)
    np.testing.assert_allclose(single.calibrate(np.array([[0.9, 0.1]])), [[0.75, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(multi.calibrate(np.array([[0.9, 0.2]])), [[0.75, 1 / 3]], rtol=1e-6)
    assert single.calibrate(np.array([[0.9, 0.1]])).dtype == np.float32


def test_temperature_one_changes_no_bit():
    _, probabilities = random_single_label(50, 4)
    np.testing.assert_array_equal(Decision(list("abcd"), False).calibrate(probabilities), probabilities)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.4, 3.0, 20.0])
def test_probabilities_of_zero_and_one_stay_finite_and_in_order(multi_label, temperature):
    raw = np.array([[1, 0, 0], [1e-30, 1, 1e-45], [0, 1e-7, 1 - 1e-7], [1, 1 - 6e-8, 0]], np.float32)
    calibrated = Decision(NAMES, multi_label, temperature).calibrate(raw)
    assert np.isfinite(calibrated).all()
    assert ((calibrated >= 0) & (calibrated <= 1)).all()
    for before, after in zip(raw, calibrated, strict=True):
        assert (np.diff(after[np.argsort(before, kind="stable")]) >= 0).all()
    if not multi_label:
        np.testing.assert_allclose(calibrated.sum(axis=1), 1, rtol=1e-6)


def test_a_high_temperature_does_not_change_which_class_is_highest():
    almost = np.nextafter(np.float32(0.5), np.float32(0))
    raw = np.array([[almost, 0.5], [0.5, almost], [0.25, 0.75]], np.float32)
    decision = Decision(["ant", "bee"], False, 20.0)
    assert decision.choose(decision.calibrate(raw)).tolist() == [[False, True], [True, False], [False, True]]


@pytest.mark.parametrize(
    ("confidence", "right", "temperature"),
    [(0.9, 0.75, 2.0), (0.75, 0.9, 0.5), (0.6, 0.9, np.log(1.5) / np.log(9)), (0.9, 0.9, 1.0)],
)
def test_the_fitted_temperature_makes_confidence_the_share_that_is_right(confidence, right, temperature):
    """Where all answers are equally sure, the likelihood is highest where that is how often they are right."""
    is_right = np.arange(20) < round(20 * right)
    single = np.tile([[confidence, 1 - confidence]], (20, 1))
    assert fit_temperature(1 - is_right, single, False) == pytest.approx(temperature, rel=1e-5)
    multi = np.where(is_right[:, None], single, 1 - single)
    assert fit_temperature(np.tile([[1, 0]], (20, 1)), multi, True) == pytest.approx(temperature, rel=1e-5)


@pytest.mark.parametrize("multi_label", [False, True])
def test_no_other_temperature_has_a_lower_log_loss_by_scikit_learn(multi_label):
    y_true, raw = random_multilabel(200, 4) if multi_label else random_single_label(200, 4)
    raw = np.clip(0.6 * raw + 0.4 * y_true, 0.01, 0.99) if multi_label else raw

    def loss(temperature):
        calibrated = Decision(list("abcd"), multi_label, temperature).calibrate(raw).astype(float)
        if multi_label:
            return sk.log_loss(y_true.ravel(), calibrated.ravel())
        return sk.log_loss(y_true, calibrated / calibrated.sum(axis=1, keepdims=True))

    fitted = fit_temperature(y_true, raw, multi_label)
    assert 0.05 < fitted < 20
    assert all(loss(fitted) < loss(fitted * factor) for factor in (0.2, 0.9, 0.98, 1.02, 1.1, 1.5))


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("low", [0.0, 1e-45, 0.2])
def test_a_set_without_a_mistake_leaves_the_temperature_at_one(multi_label, low):
    raw = np.array([[1 - low, low], [low, 1 - low]], np.float32)
    assert fit_temperature(np.eye(2) if multi_label else np.arange(2), raw, multi_label) == 1


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_temperature_is_bounded(multi_label):
    y_true = np.eye(2)[[0] * 9 + [1]] if multi_label else np.array([0] * 9 + [1])
    timid = np.tile(np.array([[0.5001, 0.4999]], np.float32), (10, 1))
    assert fit_temperature(y_true, timid, multi_label) == 0.05
    assert fit_temperature(y_true, timid[:, ::-1], multi_label) == 20
    certain = np.tile(np.array([[0, 1]], np.float32), (10, 1))
    assert fit_temperature(y_true, certain, multi_label) == 20


def test_a_block_of_any_size_gives_the_same_temperature_and_probabilities(monkeypatch):
    y_true, raw = random_single_label(100, 4)
    expected, decision = fit_temperature(y_true, raw, False), Decision(list("abcd"), False, 1.7)
    calibrated = decision.calibrate(raw)
    monkeypatch.setattr("finetune.decision.BLOCK", 28)
    assert fit_temperature(y_true, raw, False) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_array_equal(decision.calibrate(raw), calibrated)


def test_probabilities_that_are_no_numbers_are_a_users_mistake():
    raw = np.array([[0.5, 0.5], [np.nan, 0.5], [np.inf, 0]])
    for call in (
        lambda: fit_temperature(np.array([0, 1, 1]), raw, False),
        lambda: evaluate_set(np.array([0, 1, 1]), raw, Decision(["ant", "bee"], False)),
        lambda: fit_decision({"training": np.eye(2)[[0, 1, 1]]}, {"training": raw}, "ab", True, [0.1, 0.9], "m"),
    ):
        with pytest.raises(UserError, match="2 of 3 images are not finite"):
            call()


# Calibration


def test_calibration_of_a_hand_worked_example():
    confidences = np.array([0.95, 0.97, 0.99, 1.0, 0.55, 0.6, 0.1], np.float32)
    error, bins = get_calibration(confidences, np.array([1, 1, 1, 0, 1, 0, 0], bool))
    assert [place["count"] for place in bins] == [1, 2, 4]
    assert [place["confidence"] for place in bins] == pytest.approx([0.1, 0.575, 0.9775])
    assert [place["accuracy"] for place in bins] == pytest.approx([0, 0.5, 0.75])
    assert error == pytest.approx((1 * 0.1 + 2 * 0.075 + 4 * 0.2275) / 7)


def test_calibration_equals_a_grouping_by_pandas():
    generator = np.random.default_rng(4)
    table = pd.DataFrame({"confidence": generator.random(500).astype(np.float32)})
    table["accuracy"] = generator.random(500) < table["confidence"] ** 2
    groups = table.groupby(pd.cut(table["confidence"], np.arange(16) / 15), observed=True)
    means, counts = groups.mean(), groups.size()
    error, bins = get_calibration(table["confidence"].to_numpy(), table["accuracy"].to_numpy())
    assert [place["count"] for place in bins] == counts.tolist()
    assert [place["confidence"] for place in bins] == pytest.approx(means["confidence"].tolist())
    assert [place["accuracy"] for place in bins] == pytest.approx(means["accuracy"].tolist())
    gaps = (means["confidence"] - means["accuracy"]).abs()
    assert error == pytest.approx((gaps * counts).sum() / 500)


def test_an_edge_belongs_to_the_bin_below_it_in_float32_too():
    _, bins = get_calibration(np.array([0.2, 0.21, 0, 1], np.float32), np.ones(4))
    assert [place["count"] for place in bins] == [1, 1, 1, 1]
    _, bins = get_calibration(np.array([0.2, 0.19], np.float32), np.ones(2))
    assert [place["count"] for place in bins] == [2]


# Thresholds


@pytest.mark.parametrize("decimals", [1, 2, 7])
def test_no_threshold_has_a_higher_f1_than_the_best_by_scikit_learn(decimals):
    generator = np.random.default_rng(decimals)
    y_true = generator.random((80, 5)) < [0.05, 0.2, 0.5, 0.9, 0.3]
    scores = (0.6 * generator.random((80, 5)) + 0.4 * y_true).round(decimals).astype(np.float32)
    for truth, column, threshold in zip(y_true.T, scores.T, find_best_f1_thresholds(y_true, scores, 0.5), strict=True):
        found = sk.f1_score(truth, column >= np.float32(threshold))
        assert found == pytest.approx(max(sk.f1_score(truth, column >= score) for score in column))


def test_the_best_f1_threshold_is_halfway_between_the_neighbours():
    y_true, scores = np.array([[1], [1], [0], [1], [0]]), np.array([[0.875], [0.75], [0.25], [0.125], [0]])
    # Two chosen: 4/5; four chosen: 6/7.
    assert find_best_f1_thresholds(y_true, scores, 0.5) == [0.0625]
    assert find_best_f1_thresholds(y_true[:3], scores[:3], 0.5) == [0.5]


def test_of_equally_good_f1_thresholds_the_middle_one_is_taken():
    y_true, scores = np.array([[1], [0], [0], [1]]), np.array([[0.75], [0.5], [0.25], [0.125]])
    # One chosen: 2/3; two: 1/2; three: 2/5; all four: 2/3.
    assert find_best_f1_thresholds(y_true, scores, 0.5) == [0.0625]


def test_a_class_without_positives_takes_the_fallback_and_one_without_negatives_all():
    y_true, scores = np.array([[0, 1, 1], [0, 1, 1]]), np.array([[0.4, 0.4, 0], [0.6, 0.6, 0]])
    assert find_best_f1_thresholds(y_true, scores, 0.37) == [0.37, pytest.approx(0.2), 0]


@pytest.mark.parametrize("upper", [0.3, 0.7, 1e-44, 1.0])
def test_a_best_f1_threshold_separates_neighbouring_float32_numbers(upper):
    upper = np.float32(upper)
    scores = np.array([[upper], [np.nextafter(upper, np.float32(0))]])
    decision = Decision(["ant"], True, best_f1_thresholds=find_best_f1_thresholds(np.array([[1], [0]]), scores, 0.5))
    assert decision.choose(scores, "best_f1").tolist() == [[True], [False]]


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6, 0.7, 0.9])
def test_a_probability_at_its_threshold_holds(threshold):
    decision = Decision(["ant"], True, exact_match_threshold=threshold, best_f1_thresholds=[threshold])
    for kind in (np.float32, np.float64):
        scores = np.array([[threshold], [threshold - 1e-4]], kind)
        for threshold_type in ("exact_match", "best_f1"):
            assert decision.choose(scores, threshold_type).tolist() == [[True], [False]]


def test_thresholds_are_one_a_class_and_default_to_the_exact_match_threshold():
    decision = Decision(NAMES, True, exact_match_threshold=0.25)
    assert decision.thresholds().tolist() == decision.thresholds("best_f1").tolist() == [0.25] * 3
    own = Decision(NAMES, True, exact_match_threshold=0.25, best_f1_thresholds=[0.5, 0.75, 0.125])
    assert own.thresholds("best_f1").tolist() == [0.5, 0.75, 0.125]
    assert own.thresholds("exact_match").tolist() == [0.25] * 3


def test_where_one_label_holds_the_first_of_the_highest_is_chosen():
    chosen = Decision(NAMES, False).choose(np.array([[0.2, 0.4, 0.4], [0.3, 0.3, 0.4]]))
    assert chosen.tolist() == [[False, True, False], [False, False, True]]


# Decisions


def test_the_decision_is_fitted_on_the_validation_set_alone():
    y_true, raw = random_multilabel()
    unusable = np.full_like(raw, np.nan)
    truths = {"training": y_true, "validation": y_true, "test": y_true}
    probabilities = {"training": unusable, "validation": raw, "test": unusable}
    decision = fit_decision(truths, probabilities, NAMES, True, [0.2, 0.8], "runs/best_model.keras")
    assert decision.model == "best_model.keras"
    assert decision.temperature_fitted_on == decision.thresholds_fitted_on == "validation"
    assert decision.temperature == fit_temperature(y_true, raw, True)
    calibrated = decision.calibrate(raw)
    matches = [((calibrated >= step / 100) == y_true).all(axis=1).mean() for step in range(20, 81)]
    chosen = decision.choose(calibrated)
    assert (chosen == y_true).all(axis=1).mean() == pytest.approx(max(matches))
    for column, threshold in enumerate(decision.best_f1_thresholds):
        best = max(sk.f1_score(y_true[:, column], calibrated[:, column] >= score) for score in calibrated[:, column])
        assert sk.f1_score(y_true[:, column], calibrated[:, column] >= np.float32(threshold)) == pytest.approx(best)


def test_without_a_validation_set_thresholds_come_from_the_training_set_and_no_temperature():
    y_true, raw = random_multilabel()
    truths, probabilities = {"training": y_true, "test": y_true}, {"training": raw, "test": raw * np.nan}
    decision = fit_decision(truths, probabilities, NAMES, True, [0.01, 0.99], "best_model.keras")
    assert (decision.temperature, decision.temperature_fitted_on) == (1, None)
    assert decision.thresholds_fitted_on == "training"
    assert decision.exact_match_threshold == find_exact_match_threshold(y_true, raw, [0.01, 0.99])[0]
    single = fit_decision({"training": Y_TRUE}, {"training": one_hot(PREDICTED)}, NAMES, False, [0.1, 0.9], "m.keras")
    assert single == Decision(NAMES, False, model="m.keras")


def test_one_label_an_image_has_a_temperature_and_no_thresholds():
    y_true, raw = random_single_label(60, 3)
    decision = fit_decision({"validation": y_true}, {"validation": raw}, NAMES, False, [0.1, 0.9], "best_model.keras")
    temperature = fit_temperature(y_true, raw, False)
    assert decision == Decision(NAMES, False, temperature, "validation", model="best_model.keras")


DECISIONS = [
    Decision(NAMES, False, 1.25, "validation", model="best_model.keras"),
    Decision(
        NAMES, True, 0.7, "validation", 0.31, [0.1, float(np.float32(0.7)), 1.0], "validation", "best_model.keras"
    ),
    Decision(NAMES, True, thresholds_fitted_on="training", model="best_model.keras"),
]


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("model", ["best_model.keras", "best_model_compressed.h5", "best_model_compressed.json"])
def test_a_decision_survives_its_file(tmp_path, decision, model):
    path = write_decision(str(tmp_path), decision)
    assert path == str(tmp_path / "decision.json")
    assert read_decision(str(tmp_path), NAMES, decision.multi_label, str(tmp_path / model)) == decision


def test_the_file_names_the_threshold_of_each_class(tmp_path):
    write_decision(str(tmp_path), DECISIONS[1])
    assert json.loads((tmp_path / "decision.json").read_text()) == {
        "classes": ["ant", "bee", "cow"],
        "multi_label": True,
        "temperature": 0.7,
        "temperature_fitted_on": "validation",
        "exact_match_threshold": 0.31,
        "best_f1_thresholds": {"ant": 0.1, "bee": float(np.float32(0.7)), "cow": 1.0},
        "thresholds_fitted_on": "validation",
        "model": "best_model.keras",
    }


def test_without_a_file_or_with_another_models_the_defaults_hold(tmp_path, capsys):
    assert read_decision(str(tmp_path), NAMES, True, "best_model.keras") == Decision(NAMES, True)
    assert capsys.readouterr().out == ""
    write_decision(str(tmp_path), DECISIONS[1])
    assert read_decision(str(tmp_path), NAMES, True, "latest_model.keras") == Decision(NAMES, True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert "was fitted for best_model.keras: latest_model.keras goes without it" in printed[0]


def test_a_file_that_was_edited_by_hand_may_use_whole_numbers_and_another_order(tmp_path):
    content = DECISIONS[1].to_dict() | {"temperature": 2, "best_f1_thresholds": {"cow": 1, "ant": 0, "bee": 0.5}}
    (tmp_path / "decision.json").write_text(json.dumps(content))
    decision = read_decision(str(tmp_path), NAMES, True, "best_model.keras")
    assert (decision.temperature, decision.best_f1_thresholds) == (2.0, [0, 0.5, 1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", 0),
        ("temperature", -1.0),
        ("temperature", 1000),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", None),
        ("temperature_fitted_on", "test"),
        ("exact_match_threshold", 1.01),
        ("exact_match_threshold", -0.01),
        ("exact_match_threshold", [0.5]),
        ("best_f1_thresholds", [0.1, 0.2, 0.3]),
        ("best_f1_thresholds", {"ant": 0.1, "bee": 0.2}),
        ("best_f1_thresholds", {"ant": 0.1, "bee": 0.2, "cow": 0.3, "dog": 0.4}),
        ("best_f1_thresholds", {"ant": 0.1, "bee": 0.2, "cow": "0.3"}),
        ("best_f1_thresholds", {"ant": 0.1, "bee": 0.2, "cow": float("nan")}),
        ("best_f1_thresholds", {"ant": 0.1, "bee": 0.2, "cow": 2}),
        ("thresholds_fitted_on", "test"),
        ("multi_label", 1),
        ("multi_label", False),
        ("classes", "ant"),
        ("classes", []),
        ("classes", ["ant", "ant", "bee"]),
        ("classes", ["ant", 2, "cow"]),
        ("model", None),
        ("model", "two\nlines.keras"),
        ("model", "../elsewhere/best_model.keras"),
        ("colour", "red"),
        ("colour\n", "red"),
    ],
)
def test_a_wrong_field_is_one_line_that_names_it(tmp_path, field, value):
    content = DECISIONS[1].to_dict() | {field: value}
    (tmp_path / "decision.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=field.strip()) as caught:
        read_decision(str(tmp_path), NAMES, True, "best_model.keras")
    assert "\n" not in str(caught.value)
    assert "Received" in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\ud800", "[" * 100_000, "{}", '{"classes": ' + "9" * 5000 + "}"]
)
def test_a_file_that_is_no_object_of_all_fields_is_one_line(tmp_path, text):
    (tmp_path / "decision.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="decision.json: expected") as caught:
        read_decision(str(tmp_path), NAMES, True, "best_model.keras")
    assert "\n" not in str(caught.value)


def test_an_oversized_or_unreadable_file_is_a_users_mistake(tmp_path):
    (tmp_path / "decision.json").write_text(json.dumps(DECISIONS[0].to_dict()) + " " * 2**22)
    with pytest.raises(UserError, match="at most 4194304 bytes"):
        read_decision(str(tmp_path), NAMES, False, "best_model.keras")
    (tmp_path / "decision.json").unlink()
    (tmp_path / "decision.json").mkdir()
    with pytest.raises(UserError, match="Cannot read"):
        read_decision(str(tmp_path), NAMES, False, "best_model.keras")


@pytest.mark.parametrize("names", [["ant", "bee"], ["ant", "cow", "bee"], ["ant", "bee", "dog"]])
def test_a_decision_of_other_classes_is_an_error(tmp_path, names):
    write_decision(str(tmp_path), DECISIONS[1])
    with pytest.raises(UserError, match="expected the model's classes ant, .*Received: 'ant, bee, cow'"):
        read_decision(str(tmp_path), names, True, "best_model.keras")


# Intervals


@pytest.mark.parametrize("seed", range(4))
def test_each_figure_of_a_resample_is_scikit_learns_for_its_images(seed):
    y_true, raw = random_single_label(25, 12)
    intervals = get_intervals(y_true, raw, Decision(list("abcdefghijkl"), False), seed, resamples=1)
    drawn = np.random.default_rng(seed).integers(25, size=25)
    truth, predicted = y_true[drawn], raw[drawn].argmax(axis=1)
    expected = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.recall_score(truth, predicted, average="macro", labels=np.unique(truth)),
        "macro_f1": sk.f1_score(truth, predicted, average="macro"),
        "top_5_accuracy": sk.top_k_accuracy_score(truth, raw[drawn], k=5, labels=range(12)),
    }
    assert intervals == {name: pytest.approx([value, value]) for name, value in expected.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
def test_each_multilabel_figure_of_a_resample_is_scikit_learns_for_its_images(seed):
    y_true, raw = random_multilabel(12, 4)
    y_true[:, 3] = np.arange(12) == 0
    decision = Decision(list("abcd"), True, exact_match_threshold=0.55)
    intervals = get_intervals(y_true, raw, decision, seed, resamples=1)
    drawn = np.random.default_rng(seed).integers(12, size=12)
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


def test_the_interval_of_accuracy_is_that_of_a_binomial_number():
    """Drawing images with replacement makes the number of right ones binomial."""
    y_true, predicted = np.zeros(200, int), (np.arange(200) >= 160).astype(int)
    intervals = get_intervals(y_true, one_hot(predicted, 2), Decision(["ant", "bee"], False), resamples=4000)
    assert intervals["accuracy"] == pytest.approx(stats.binom.ppf([0.025, 0.975], 200, 0.8) / 200, abs=0.006)


@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_depend_on_the_seed_alone(multi_label, monkeypatch):
    y_true, raw = random_multilabel() if multi_label else random_single_label(60, 3)
    decision = Decision(NAMES, multi_label, 1.3, exact_match_threshold=0.6)
    first = get_intervals(y_true, raw, decision, seed=1, resamples=50)
    assert first != get_intervals(y_true, raw, decision, seed=2, resamples=50)
    monkeypatch.setattr("finetune.decision.BLOCK", 7 * 60)
    monkeypatch.setattr("finetune.intervals.BLOCK", 7 * 60)
    assert get_intervals(y_true, raw, decision, seed=1, resamples=50) == first


@pytest.mark.filterwarnings("error")
def test_what_is_undefined_in_every_resample_has_no_interval():
    intervals = get_intervals(np.zeros((5, 2)), np.full((5, 2), 0.3), Decision(["ant", "bee"], True), resamples=20)
    assert intervals["mean_auroc"] is intervals["mean_average_precision"] is intervals["macro_f1"] is None
    assert intervals["exact_match_accuracy"] == [1, 1]
    assert intervals["per_class"]["ant"] == {"precision": None, "recall": None, "f1": None}


def test_perfect_answers_and_a_single_image_have_intervals_without_width():
    y_true = np.arange(3)
    perfect = get_intervals(y_true, one_hot(y_true), Decision(NAMES, False), resamples=20)
    assert perfect == {name: [1, 1] for name in ("accuracy", "balanced_accuracy", "macro_f1")}
    alone = get_intervals(np.array([0]), one_hot(np.array([1])), Decision(NAMES, False), resamples=20)
    assert alone["accuracy"] == [0, 0]


# Evaluation of one set


def test_evaluating_a_set_of_one_label_an_image():
    y_true, raw = random_single_label(80, 3)
    decision = Decision(NAMES, False, 3.0, "validation")
    figures = evaluate_set(y_true, raw, decision, bootstrap=True, seed=3)
    plain = get_evaluation_metrics(y_true, raw, NAMES)
    assert figures.keys() == {*plain, "images", "calibration", "intervals"}
    assert {name: figures[name] for name in plain} == plain
    assert figures["images"] == 80
    assert figures["intervals"] == get_intervals(y_true, raw, decision, seed=3)
    for name, (low, high) in figures["intervals"].items():
        assert low <= figures[name] <= high
    calibrated, right = decision.calibrate(raw), raw.argmax(axis=1) == y_true
    after, before = (get_calibration(scores.max(axis=1), right) for scores in (calibrated, raw))
    assert figures["calibration"] == {
        "expected_calibration_error": after[0],
        "bins": after[1],
        "expected_calibration_error_uncalibrated": before[0],
        "bins_uncalibrated": before[1],
    }
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert "intervals" not in evaluate_set(y_true, raw, decision)


def test_evaluating_a_multilabel_set():
    y_true, raw = random_multilabel(80)
    decision = Decision(NAMES, True, 2.0, "validation", 0.45, [0.3, 0.5, 0.7], "validation")
    figures = evaluate_set(y_true, raw, decision, bootstrap=True, threshold_range=[0.2, 0.8])
    calibrated = decision.calibrate(raw)
    assert figures["threshold"] == 0.45
    assert figures["exact_match_accuracy"] == pytest.approx(((calibrated >= 0.45) == y_true).all(axis=1).mean())
    for column, (name, threshold) in enumerate(zip(NAMES, [0.3, 0.5, 0.7], strict=True)):
        row, chosen = figures["per_class"][name], calibrated[:, column] >= np.float32(threshold)
        assert row["best_f1_threshold"] == pytest.approx(threshold)
        assert row["f1_at_best_f1_threshold"] == pytest.approx(sk.f1_score(y_true[:, column], chosen))
        assert row["f1"] == pytest.approx(sk.f1_score(y_true[:, column], calibrated[:, column] >= 0.45))
        for key, (low, high) in figures["intervals"]["per_class"][name].items():
            assert low <= row[key] <= high
    threshold, accuracy = find_exact_match_threshold(y_true, calibrated, [0.2, 0.8])
    note = "chosen on the test set itself: optimistic"
    assert figures["optimistic"] == {"threshold": threshold, "exact_match_accuracy": accuracy, "note": note}
    error, bins = get_calibration(calibrated.ravel(), y_true.ravel() == 1)
    assert figures["calibration"]["expected_calibration_error"] == error
    assert figures["calibration"]["bins"] == bins
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert evaluate_set(y_true, raw, decision).keys() == figures.keys() - {"intervals", "optimistic"}


def test_a_temperature_changes_neither_accuracy_nor_auroc_nor_average_precision():
    y_true, raw = random_multilabel(80)
    raw = 0.9 + raw / 10.0001
    sharp, plain = (evaluate_set(y_true, raw, Decision(NAMES, True, temperature)) for temperature in (0.05, 1.0))
    for name in ("mean_auroc", "mean_average_precision"):
        assert sharp[name] == plain[name]
    y_true, raw = random_single_label(80, 12)
    names = list("abcdefghijkl")
    for temperature in (0.05, 20.0):
        changed = evaluate_set(y_true, raw, Decision(names, False, temperature))
        assert changed["calibration"] != evaluate_set(y_true, raw, Decision(names, False))["calibration"]
        for name, value in get_evaluation_metrics(y_true, raw, names).items():
            assert changed[name] == value


def test_the_fitted_temperature_mends_an_overconfident_model():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(5000, 4))
    honest = special.softmax(logits, axis=1)
    y_true = np.array([generator.choice(4, p=row) for row in honest])
    raw = special.softmax(3 * logits, axis=1).astype(np.float32)
    decision = fit_decision({"validation": y_true[:1000]}, {"validation": raw[:1000]}, "abcd", False, [0, 1], "m.keras")
    assert decision.temperature == pytest.approx(3, rel=0.1)
    calibration = evaluate_set(y_true[1000:], raw[1000:], decision)["calibration"]
    assert calibration["expected_calibration_error"] < 0.05
    assert calibration["expected_calibration_error_uncalibrated"] > 0.2


# Curves


def test_curves_of_a_hand_worked_example():
    curves = get_curves(np.array([[1], [0], [1], [0]]), np.array([[0.9], [0.7], [0.6], [0.2]]), ["ant"])["ant"]
    assert list(zip(curves["false_positive_rate"], curves["true_positive_rate"], strict=True)) == [
        *((0, 0), (0, 0.5), (0.5, 0.5), (0.5, 1), (1, 1)),
    ]
    points = list(zip(curves["recall"], curves["precision"], strict=True))
    assert points == [(1, 0.5), (1, pytest.approx(2 / 3)), (0.5, 0.5), (0.5, 1), (0, 1)]
    assert curves["auroc"] == pytest.approx(3 / 4)
    assert curves["average_precision"] == pytest.approx(5 / 6)


def test_curves_of_one_label_an_image_are_each_class_against_the_rest():
    y_true, raw = random_single_label(60, 3)
    assert get_curves(y_true, raw, NAMES) == get_curves(np.eye(3)[y_true], raw, NAMES)
    assert get_curves(y_true, raw, NAMES)["bee"]["auroc"] == pytest.approx(
        share_of_ordered_pairs((y_true == 1).astype(int), raw[:, 1])
    )


def test_long_curves_are_thinned_to_500_points_that_keep_their_area():
    generator = np.random.default_rng(0)
    y_true = generator.random((20_000, 1)) < 0.3
    scores = generator.normal(y_true).astype(np.float32)
    curves = get_curves(y_true, scores, ["ant"])["ant"]
    for x, y in (("false_positive_rate", "true_positive_rate"), ("recall", "precision")):
        assert 100 < len(curves[x]) == len(curves[y]) <= 500
    assert (curves["false_positive_rate"][0], curves["true_positive_rate"][0]) == (0, 0)
    assert (curves["false_positive_rate"][-1], curves["true_positive_rate"][-1]) == (1, 1)
    assert (curves["recall"][0], curves["recall"][-1], curves["precision"][-1]) == (1, 0, 1)
    area = np.trapezoid(curves["true_positive_rate"], curves["false_positive_rate"])
    assert area == pytest.approx(sk.roc_auc_score(y_true, scores), abs=0.002)
    assert curves["auroc"] == pytest.approx(sk.roc_auc_score(y_true, scores))


@pytest.mark.filterwarnings("error")
def test_undefined_curves_are_empty():
    curves = get_curves(np.array([[0, 1], [0, 1]]), np.array([[0.1, 0.2], [0.3, 0.4]]), ["ant", "bee"])
    assert curves["ant"] == {
        **{key: [] for key in ("false_positive_rate", "true_positive_rate", "precision", "recall")},
        **dict.fromkeys(("auroc", "average_precision")),
    }
    assert curves["bee"]["false_positive_rate"] == []
    assert curves["bee"]["auroc"] is None
    assert curves["bee"]["average_precision"] == 1
    json.dumps(curves, allow_nan=False)


# Text


def test_format_prints_intervals_calibration_and_the_optimistic_threshold():
    figures = get_evaluation_metrics(Y_TRUE, one_hot(PREDICTED), NAMES)
    figures |= {"images": 5, "intervals": {"accuracy": [0.2, 1], "macro_f1": None}}
    figures["calibration"] = {"expected_calibration_error": 0.01, "expected_calibration_error_uncalibrated": 0.2}
    figures["optimistic"] = {"threshold": 0.25, "exact_match_accuracy": 0.5, "note": "a note"}
    lines = format_evaluation(figures).splitlines()
    assert "accuracy: 0.6000 (95 % interval 0.2000 to 1.0000)" in lines
    assert "macro f1: 0.4333" in lines
    assert "expected calibration error: 0.0100 (0.2000 without the temperature)" in lines
    assert "best exact match accuracy: 0.5000 at threshold 0.2500 (a note)" in lines


def test_format_keeps_long_column_names_apart():
    y_true, raw = random_multilabel()
    head = format_evaluation(evaluate_set(y_true, raw, Decision(NAMES, True))).splitlines()[0]
    assert "  best f1 threshold  f1 at best f1 threshold" in head


def test_no_tensorflow_is_imported():
    command = "import sys, finetune.metrics; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=Path(metrics.__file__).parent.parent, check=True)


# Learning-rate range test

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


@pytest.mark.parametrize("middle", [-4.0, -3.0, -2.5])
def test_suggested_rate_is_where_an_s_shaped_curve_falls_the_most_steeply(middle):
    logarithms = np.log10(RATES)
    losses = 1.6 - special.expit(4 * (logarithms - middle)) + np.exp(np.minimum(8 * (logarithms + 0.7), 50))
    assert np.log10(suggest_learning_rate(RATES, losses)) == pytest.approx(middle, abs=0.3)


def test_suggested_rate_withstands_noise_and_losses_that_are_not_finite():
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
    with pytest.raises(UserError, match="No learning rate from 1e-06 to 1 made the loss fall clearly: expected"):
        suggest_learning_rate(RATES, losses)


def test_too_few_finite_losses_suggest_no_rate():
    losses = np.where(np.arange(100) < 9, 1.0, np.nan)
    with pytest.raises(UserError, match="10 steps with a finite loss. Received: 9 of 100 steps."):
        suggest_learning_rate(RATES, losses)
