"""Metrics, confusion matrices, curves and calibration, by hand and by scikit-learn."""

import json

import numpy as np
import pandas as pd
import pytest
from random_answers import (
    NAMES,
    one_hot,
    random_multilabel,
    random_single_label,
    share_of_ordered_pairs,
)
from sklearn import metrics as sk

from finetune.evaluation.metrics import (
    count_confusions,
    get_calibration,
    get_curves,
    get_evaluation_metrics,
    get_multilabel_evaluation_metrics,
    is_in_top_k,
    list_confusions,
    mean_of_defined,
    read_cells,
)

# Confusion matrices


def name_classes(number):
    # Their order is not that of the alphabet.
    return [f"class {position}" for position in range(number)]


TRUE, ANSWERED = np.array([0, 0, 3, 99, 3, 0, 11, 0]), np.array([0, 1, 3, 2, 3, 1, 2, 3])


@pytest.mark.parametrize("number", [100, 101])
def test_more_than_a_hundred_classes_are_stored_without_zeros_and_read_alike(number):
    names = name_classes(number)
    stored = count_confusions(TRUE, ANSWERED, names)
    matrix = np.zeros((100, 100), int)
    np.add.at(matrix, (TRUE, ANSWERED), 1)
    by_name = {
        "class 0": {"class 0": 1, "class 1": 2, "class 3": 1},
        "class 3": {"class 3": 2},
        "class 11": {"class 2": 1},
        "class 99": {"class 2": 1},
    }
    assert stored == (matrix.tolist() if number == 100 else by_name)
    assert json.loads(json.dumps(stored)) == stored
    cells = read_cells(stored, names)
    assert list(zip(cells.rows, cells.columns, cells.counts, cells.shares, strict=True)) == [
        *((0, 0, 1, 1 / 4), (0, 1, 2, 2 / 4), (0, 3, 1, 1 / 4)),
        *((3, 3, 2, 1), (11, 2, 1, 1), (99, 2, 1, 1)),
    ]
    assert list_confusions(stored, names, 3) == [
        {"true": "class 0", "predicted": "class 1", "count": 2, "share": 0.5},
        {"true": "class 0", "predicted": "class 3", "count": 1, "share": 0.25},
        {"true": "class 11", "predicted": "class 2", "count": 1, "share": 1.0},
    ]


@pytest.mark.parametrize("stored", [{}, [[0, 0], [0, 0]]])
def test_no_image_is_no_confusion(stored):
    assert list_confusions(stored, ["a", "b"], 3) == []


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


# Metrics


@pytest.mark.parametrize("number", [4, 12])
def test_single_label_metrics_equal_scikit_learns(number):
    y_true, probabilities = random_single_label(300, number)
    names, predicted = list("abcdefghijkl"[:number]), probabilities.argmax(axis=1)
    results = get_evaluation_metrics(y_true, probabilities, names)
    report = sk.classification_report(y_true, predicted, target_names=names, output_dict=True)
    for name, row in results["per_class"].items():
        assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(
            [report[name][key] for key in ("precision", "recall", "f1-score", "support")]
        )
    expected = {"accuracy": report["accuracy"], "macro_f1": report["macro avg"]["f1-score"]}
    expected |= {"balanced_accuracy": sk.balanced_accuracy_score(y_true, predicted)}
    expected |= {"top_5_accuracy": sk.top_k_accuracy_score(y_true, probabilities, k=5)} if number > 5 else {}
    assert {name: results[name] for name in expected} == pytest.approx(expected)
    assert results["confusion_matrix"] == sk.confusion_matrix(y_true, predicted).tolist()
    assert results.keys() == {*expected, "per_class", "confusion_matrix"}
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_multilabel_metrics_equal_independent_ones_on_random_data():
    y_true, probabilities = random_multilabel()
    results = get_multilabel_evaluation_metrics(y_true, probabilities, NAMES, threshold=0.45)
    predicted = probabilities >= 0.45
    assert results["exact_match_accuracy"] == pytest.approx(np.mean([*map(np.array_equal, predicted, y_true == 1)]))
    assert results["hamming_loss"] == pytest.approx(np.mean(predicted != y_true))
    for column, name in enumerate(NAMES):
        truth, chosen, row = y_true[:, column], predicted[:, column], results["per_class"][name]
        assert row["precision"] == pytest.approx(sk.precision_score(truth, chosen))
        assert row["recall"] == pytest.approx(sk.recall_score(truth, chosen))
        assert row["f1"] == pytest.approx(sk.f1_score(truth, chosen))
        assert row["support"] == truth.sum()
        assert row["auroc"] == pytest.approx(share_of_ordered_pairs(truth, probabilities[:, column]))
        assert row["average_precision"] == pytest.approx(sk.average_precision_score(truth, probabilities[:, column]))
    assert results["threshold"] == 0.45
    assert results["mean_auroc"] == pytest.approx(sk.roc_auc_score(y_true, probabilities))
    assert results["mean_average_precision"] == pytest.approx(sk.average_precision_score(y_true, probabilities))
    assert json.loads(json.dumps(results, allow_nan=False)) == results


@pytest.mark.parametrize(("labels", "average_precision"), [([0, 0, 0], None), ([1, 1, 1], 1.0)])
def test_undefined_metrics_are_none_and_left_out_of_the_mean(labels, average_precision):
    y_true = np.array([[1, labels[0]], [0, labels[1]], [0, labels[2]]], np.float32)
    probabilities = np.array([[0.8, 0.3], [0.9, 0.5], [0.1, 0.7]], np.float32)
    results = get_multilabel_evaluation_metrics(y_true, probabilities, ["ant", "bee"], threshold=0.5)
    assert results["per_class"]["bee"]["auroc"] is None
    assert results["per_class"]["bee"]["average_precision"] == average_precision
    assert results["mean_auroc"] == pytest.approx(1 / 2)
    defined = [1 / 2] if average_precision is None else [1 / 2, average_precision]
    assert results["mean_average_precision"] == pytest.approx(np.mean(defined))


@pytest.mark.filterwarnings("error")
def test_without_any_defined_class_the_means_are_none():
    results = get_multilabel_evaluation_metrics(np.zeros((2, 2)), np.full((2, 2), 0.3), ["ant", "bee"], 0.5)
    assert results["mean_auroc"] is None
    assert results["mean_average_precision"] is None
    assert np.isnan(mean_of_defined(np.array([np.nan, np.nan])))
    json.dumps(results, allow_nan=False)


def test_a_class_that_is_neither_true_nor_predicted_has_no_part_in_the_means():
    y_true, predicted = np.array([0, 2, 2]), np.array([0, 2, 0])
    results = get_evaluation_metrics(y_true, one_hot(predicted), NAMES)
    assert results["per_class"]["bee"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert results["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert results["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_of_equal_probabilities_the_first_is_in_the_top_k():
    probabilities = np.array([[0.3, 0.3, 0.3, 0.1]] * 4)
    assert is_in_top_k(np.arange(4), probabilities, k=1).tolist() == [True, False, False, False]
    assert is_in_top_k(np.arange(4), probabilities, k=2).tolist() == [True, True, False, False]
    assert is_in_top_k(np.arange(4), probabilities, k=4).all()


def test_multilabel_macro_f1_leaves_out_what_is_neither_true_nor_predicted():
    y_true = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
    probabilities = np.array([[0.9, 0.6, 0.1], [0.3, 0.8, 0.2], [0.4, 0.5, 0.3], [0.1, 0.2, 0.1]])
    results = get_multilabel_evaluation_metrics(y_true, probabilities, NAMES, threshold=0.5)
    assert results["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    nothing = get_multilabel_evaluation_metrics(y_true * 0, probabilities, NAMES, threshold=0.95)
    assert nothing["macro_f1"] is None


# Calibration


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
