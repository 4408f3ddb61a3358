import json

import numpy as np
import pytest
from sklearn import metrics as sk

from metrics import (
    find_exact_match_threshold,
    format_evaluation,
    get_aurocs,
    get_average_precisions,
    get_evaluation_metrics,
    get_multilabel_evaluation_metrics,
    mean_of_defined,
)

NAMES = ["ant", "bee", "cow"]
Y_TRUE = np.array([0, 0, 1, 1, 2])
PREDICTED = np.array([0, 1, 1, 1, 0])


def one_hot(positions: np.ndarray, classes: int = 3) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[positions]


def random_multilabel(images: int = 60, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    y_true = (generator.random((images, classes)) < 0.4).astype(np.float32)
    return y_true, generator.random((images, classes)).round(1).astype(np.float32)


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
