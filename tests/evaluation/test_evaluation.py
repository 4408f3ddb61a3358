"""A set evaluated under a decision, as metrics and as text."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from random_answers import NAMES, PREDICTED, Y_TRUE, one_hot, random_multilabel, random_single_label
from scipy import special
from sklearn import metrics as sk

from finetune.core.options import UserError
from finetune.data.groups import pick_groups
from finetune.evaluation.calibration import find_exact_match_threshold, fit_temperature
from finetune.evaluation.decision import Decision, fit_decision
from finetune.evaluation.evaluation import (
    check_report_by,
    evaluate_by,
    evaluate_set,
    evaluate_sets,
    format_breakdown,
    format_evaluation,
    print_results,
)
from finetune.evaluation.intervals import get_intervals
from finetune.evaluation.metrics import (
    get_calibration,
    get_evaluation_metrics,
    get_multilabel_evaluation_metrics,
)


def test_probabilities_that_are_no_numbers_are_a_users_mistake():
    raw = np.array([[0.5, 0.5], [np.nan, 0.5], [np.inf, 0]])
    for call in (
        lambda: fit_temperature(np.array([0, 1, 1]), raw, False),
        lambda: evaluate_set(np.array([0, 1, 1]), raw, Decision(["ant", "bee"], False)),
        lambda: fit_decision({"training": np.eye(2)[[0, 1, 1]]}, {"training": raw}, "ab", True, [0.1, 0.9], "m"),
    ):
        with pytest.raises(UserError, match="2 of 3 images are not finite"):
            call()


# Evaluation of one set


def test_evaluating_a_set_of_one_label_an_image():
    y_true, raw = random_single_label(80, 3)
    decision = Decision(NAMES, False, 3.0, "validation")
    metrics = evaluate_set(y_true, raw, decision, seed=3)
    plain = get_evaluation_metrics(y_true, raw, NAMES)
    assert metrics.keys() == {*plain, "images", "calibration", "intervals"}
    assert {name: metrics[name] for name in plain} == plain
    assert metrics["images"] == 80
    assert metrics["intervals"] == get_intervals(y_true, raw, decision, seed=3)
    for name, (low, high) in metrics["intervals"].items():
        assert low <= metrics[name] <= high
    calibrated, right = decision.calibrate(raw), raw.argmax(axis=1) == y_true
    after, before = (get_calibration(scores.max(axis=1), right) for scores in (calibrated, raw))
    assert metrics["calibration"] == {
        "expected_calibration_error": after[0],
        "bins": after[1],
        "expected_calibration_error_uncalibrated": before[0],
        "bins_uncalibrated": before[1],
    }
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert "intervals" not in evaluate_set(y_true, raw, decision)


def test_images_of_groups_that_the_model_knows_are_counted(capsys):
    y_true, raw = random_single_label(6, 3)
    names = {"training": ["a", "b", "", "", "c", "d"], "validation": ["a", "a", "", "e", "f", "g"]}
    names["test"] = ["b", "g", "g", "", "h", "i"]
    sequences = {
        name: SimpleNamespace(
            get_y_true=lambda: y_true,
            get_read_groups=lambda: None,
            group_names=np.array(groups, object),
            bad_images={2: "it could not be read"} if name == "test" else {},
        )
        for name, groups in names.items()
    }
    decision = Decision(NAMES, False, 1.5, "validation")
    sets = evaluate_sets(sequences, dict.fromkeys(names, raw), decision, [0.1, 0.9], 0, "")
    known = {name: metrics.get("images_of_known_groups") for name, metrics in sets.items()}
    assert known == {"training": None, "validation": 2, "test": 2}
    csv = {name: metrics | {"csv": f"{name}.csv"} for name, metrics in sets.items()}
    print_results({"decision": decision.to_dict(), "multi_label": False, "sets": csv})
    printed = capsys.readouterr().out
    assert "Warning: 2 of the 6 images of the test set belong to groups" in printed
    assert "Warning: 2 of the 6 images of the validation set belong to groups" in printed


def test_evaluating_a_multilabel_set():
    y_true, raw = random_multilabel(80)
    decision = Decision(NAMES, True, 2.0, "validation", 0.45, [0.3, 0.5, 0.7], "validation")
    metrics = evaluate_set(y_true, raw, decision, seed=0, threshold_range=[0.2, 0.8])
    calibrated = decision.calibrate(raw)
    assert metrics["threshold"] == 0.45
    assert metrics["exact_match_accuracy"] == pytest.approx(((calibrated >= 0.45) == y_true).all(axis=1).mean())
    for column, (name, threshold) in enumerate(zip(NAMES, [0.3, 0.5, 0.7], strict=True)):
        row, chosen = metrics["per_class"][name], calibrated[:, column] >= np.float32(threshold)
        assert row["best_f1_threshold"] == pytest.approx(threshold)
        assert row["f1_at_best_f1_threshold"] == pytest.approx(sk.f1_score(y_true[:, column], chosen))
        assert row["f1"] == pytest.approx(sk.f1_score(y_true[:, column], calibrated[:, column] >= 0.45))
        for key, (low, high) in metrics["intervals"]["per_class"][name].items():
            assert low <= row[key] <= high
    threshold, accuracy = find_exact_match_threshold(y_true, calibrated, [0.2, 0.8])
    note = "chosen on the test set itself: optimistic"
    assert metrics["optimistic"] == {"threshold": threshold, "exact_match_accuracy": accuracy, "note": note}
    error, bins = get_calibration(calibrated.ravel(), y_true.ravel() == 1)
    assert metrics["calibration"]["expected_calibration_error"] == error
    assert metrics["calibration"]["bins"] == bins
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert evaluate_set(y_true, raw, decision).keys() == metrics.keys() - {"intervals", "optimistic"}


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


# Text


def format_cells(metrics):
    return [line.split() for line in format_evaluation(metrics).splitlines()]


def test_single_label_metrics_as_text():
    metrics = get_evaluation_metrics(Y_TRUE, one_hot(PREDICTED), NAMES)
    metrics |= {"images": 5, "intervals": {"accuracy": [0.2, 1], "macro_f1": None}}
    metrics["calibration"] = {"expected_calibration_error": 0.01, "expected_calibration_error_uncalibrated": 0.2}
    metrics["optimistic"] = {"threshold": 0.25, "exact_match_accuracy": 0.5, "note": "a note"}
    lines, cells = format_evaluation(metrics).splitlines(), format_cells(metrics)
    assert cells[0] == ["class", "precision", "recall", "f1", "support"]
    assert cells[2] == ["bee", "0.6667", "1.0000", "0.8000", "2"]
    start = lines.index("confusion matrix")
    assert [row[-3:] for row in cells[start + 2 : start + 5]] == [list("110"), list("020"), list("100")]
    assert "accuracy: 0.6000 (95 % interval 0.2000 to 1.0000)" in lines
    assert "macro f1: 0.4333" in lines
    assert "expected calibration error: 0.0100 (0.2000 without the temperature)" in lines
    assert "best exact match accuracy: 0.5000 at threshold 0.2500 (a note)" in lines


def test_multilabel_metrics_as_text():
    y_true, probabilities = np.array([[1, 0], [0, 0]], np.float32), np.array([[0.9, 0.6], [0.1, 0.2]], np.float32)
    metrics = get_multilabel_evaluation_metrics(y_true, probabilities, ["ant", "bee"], threshold=0.25)
    cells = format_cells(metrics)
    assert cells[1] == ["ant", "1.0000", "1.0000", "1.0000", "1", "1.0000", "1.0000"]
    assert cells[2] == ["bee", "0.0000", "0.0000", "0.0000", "0", "undefined", "undefined"]
    lines = format_evaluation(metrics).splitlines()
    for line in ("mean auroc: 1.0000", "exact match accuracy: 0.5000", "hamming loss: 0.2500", "threshold: 0.2500"):
        assert line in lines
    head = format_evaluation(evaluate_set(y_true, probabilities, Decision(["ant", "bee"], True))).splitlines()[0]
    assert "  best f1 threshold  f1 at best f1 threshold" in head


def test_counts_of_any_width_and_names_of_any_length_stay_apart():
    y_true = np.array([0] * 123456 + [1])
    metrics = get_evaluation_metrics(y_true, one_hot(y_true, 2), ["a", "a rather long class name"])
    assert ["0", "a", "123456", "0"] in format_cells(metrics)


def many_labels(classes):
    """Two images of each class but the last: of classes 90 to 99 both, of 40 to 49 one, are taken for class 0."""
    y_true = np.repeat(np.arange(min(classes, 100)), 2)
    predicted = y_true.copy()
    predicted[180:200] = predicted[80:100:2] = 0
    return y_true, one_hot(predicted, classes), [f"class {position:03d}" for position in range(classes)]


def test_of_many_classes_the_worst_are_shown():
    metrics = get_evaluation_metrics(*many_labels(101))
    head, columns, *lines = format_cells(metrics)[:22]
    assert head[:5] == ["The", "20", "worst", "of", "101"]
    assert columns == ["class", "precision", "recall", "f1", "support"]
    # Class 0 is right twice of 32 times; the last class has no image.
    worst = [(f"{position:03d}", "0.0000") for position in range(90, 100)] + [("000", "0.1176")]
    worst += [(f"{position:03d}", "0.6667") for position in range(40, 49)]
    assert [(cells[1], cells[4]) for cells in lines] == worst
    assert "confusion matrix" not in format_evaluation(metrics)
    assert ["accuracy:", "0.8500"] in format_cells(metrics)
    # Of equally bad ones, those with more images come first.
    y_true = np.concatenate([np.arange(101), [50]])
    lines = format_cells(get_evaluation_metrics(y_true, one_hot(1 - (y_true == 1), 101), many_labels(101)[2]))
    assert [cells[1] for cells in lines[2:5]] == ["050", "000", "001"]
    empty = evaluate_set(np.zeros((3, 101)), np.full((3, 101), 0.5), Decision(many_labels(101)[2], True))
    assert format_cells(empty)[0][:5] == ["The", "0", "worst", "of", "101"]


def test_a_hundred_classes_and_their_confusion_matrix_are_shown():
    lines = format_cells(get_evaluation_metrics(*many_labels(100)))
    assert [cells[1] for cells in lines[1:101]] == [f"{position:03d}" for position in range(100)]
    assert lines[101:103] == [[], ["confusion", "matrix"]]
    assert len(lines[104]) == 103


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_class_without_images_is_named(multi_label, capsys):
    labels = np.array([0, 0, 2, 2])
    probabilities = np.eye(3)[labels] * 0.7 + 0.1
    truth = np.eye(3, dtype=np.uint8)[labels] if multi_label else labels
    decision = Decision(["a", "b", "c"], multi_label)
    metrics = evaluate_set(truth, probabilities, decision) | {"csv": "t.csv"}
    print_results({"multi_label": multi_label, "decision": decision.to_dict(), "sets": {"test": metrics}})
    printed = capsys.readouterr().out
    assert printed.count("Warning") == 1
    assert "Warning: the test set has no image of b" in printed


def make_sites(number):
    return pd.Series(np.where(np.arange(number) % 3 == 0, " north", ["south", ""] * (number // 2)), name="site")


def test_each_site_has_the_metrics_and_intervals_of_its_own_images():
    y_true, raw = random_single_label(120, 3)
    decision, groups, sites = Decision(NAMES, False), np.arange(120) // 6, make_sites(120)
    found = evaluate_by(sites, y_true, raw, decision, 5, groups)
    assert found["column"] == "site"
    assert list(found["values"]) == ["", "north", "south"]
    assert sum(row["images"] for row in found["values"].values()) == 120
    for value, row in found["values"].items():
        rows = np.flatnonzero(sites.str.strip() == value)
        predicted = raw[rows].argmax(axis=1)
        assert row["accuracy"] == pytest.approx(sk.accuracy_score(y_true[rows], predicted))
        assert row["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y_true[rows], predicted))
        assert row["groups"] == len(np.unique(groups[rows]))
        expected = get_intervals(y_true[rows], raw[rows], decision, 5, groups=pick_groups(groups, rows))
        assert row["intervals"] == {name: expected[name] for name in ("accuracy", "balanced_accuracy")}


def test_each_site_has_its_multilabel_metrics():
    y_true, raw = random_multilabel(60)
    decision = Decision(NAMES, True, exact_match_threshold=0.45)
    found = evaluate_by(make_sites(60), y_true, raw, decision, 0, None)["values"]
    rows = np.flatnonzero(np.arange(60) % 3 == 0)
    assert found["north"]["exact_match_accuracy"] == pytest.approx(
        ((raw[rows] >= 0.45) == y_true[rows]).all(axis=1).mean()
    )
    expected = sk.average_precision_score(y_true[rows], raw[rows])
    assert found["north"]["mean_average_precision"] == pytest.approx(expected)
    assert "groups" not in found["north"]


def test_a_site_of_one_class_or_one_group_has_a_line_too():
    y_true, raw = random_single_label(40, 3)
    y_true[:10] = 1
    sites = pd.Series(["one class"] * 10 + ["other"] * 30, name="site")
    found = evaluate_by(sites, y_true, raw, Decision(NAMES, False), 0, np.repeat([0, 1, 2], [10, 15, 15]))
    assert found["values"]["one class"]["groups"] == 1
    assert found["values"]["one class"]["intervals"] == {"accuracy": None, "balanced_accuracy": None}
    lines = format_breakdown(found).splitlines()
    assert lines[1].split() == ["site", "images", "groups", "accuracy", "balanced", "accuracy"]
    assert lines[2].split()[:4] == ["one", "class", "10", "1"]
    assert lines[3].split()[:3] == ["other", "30", "2"]
    assert len(lines) == 4


def test_of_many_sites_the_worst_are_shown():
    row = {"images": 9, "balanced_accuracy": 0.5, "intervals": {"accuracy": [0, 1], "balanced_accuracy": [0, 1]}}
    values = {f"site {number}": row | {"accuracy": (number * 37 % 200) / 200} for number in range(200)}
    lines = format_breakdown({"column": "site", "values": values}).splitlines()
    assert "20 worst of 200" in lines[0]
    assert [float(line.split()[3]) for line in lines[2:]] == [number / 200 for number in range(20)]


def test_a_column_that_is_not_there_or_names_each_image_is_refused():
    table = pd.DataFrame({"path": [f"{row}.jpg" for row in range(1001)], "class": "a", "site": "x"})
    check_report_by(table, "", "t.csv")
    check_report_by(table, "site", "t.csv")
    with pytest.raises(UserError, match=r"t.csv .*'camera'.* path, class, site\. Set report_by"):
        check_report_by(table, "camera", "t.csv")
    with pytest.raises(UserError, match="report_by .* 1001 in the column 'path'"):
        check_report_by(table, "path", "t.csv")
