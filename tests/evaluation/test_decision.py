"""Temperature and thresholds against their definitions."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from random_answers import NAMES, PREDICTED, Y_TRUE, one_hot, random_multilabel, random_single_label
from sklearn import metrics as sk

from finetune.core.options import UserError
from finetune.evaluation.abstention import Abstention
from finetune.evaluation.calibration import find_best_f1_thresholds, find_exact_match_threshold, fit_temperature
from finetune.evaluation.decision import (
    Decision,
    fit_decision,
    get_decision,
    read_decision,
    write_decision,
)
from finetune.evaluation.metrics import get_multilabel_evaluation_metrics

each_kind = pytest.mark.parametrize("multi_label", [False, True])


@pytest.mark.parametrize(
    ("y_true", "probabilities", "expected", "accuracy"),
    [
        # All thresholds from 0.41 to 0.80 are right: the middle one.
        ([[1, 0], [0, 1], [1, 1]], [[0.95, 0.405], [0.205, 0.85], [0.805, 0.9]], (0.60, 0.61), 1),
        # The last image is right above 0.505, the third one below 0.305.
        ([[1], [1], [1], [0]], [[0.805], [0.705], [0.305], [0.505]], (*np.arange(1, 71) / 100,), 3 / 4),
    ],
)
def test_exact_match_threshold_is_the_middle_of_the_best(y_true, probabilities, expected, accuracy):
    found, share = find_exact_match_threshold(np.array(y_true), np.array(probabilities), [0.01, 0.99])
    assert min(abs(found - value) for value in expected) < 1e-9
    assert share == ((np.array(probabilities) >= found) == np.array(y_true)).all(axis=1).mean() == accuracy


@pytest.mark.parametrize("score", [0.01, 0.07, 0.1, 0.3, 0.6, 0.7, 0.9, 0.99])
def test_the_threshold_range_includes_both_ends_and_the_evaluation_agrees(score):
    y_true, probabilities = np.array([[1, 0]]), np.array([[score, score - 0.005]])
    assert find_exact_match_threshold(y_true, probabilities, [score, 0.99]) == (pytest.approx(score), 1)
    assert find_exact_match_threshold(y_true, probabilities, [0.01, score]) == (pytest.approx(score), 1)
    y_true, probabilities = np.array([[1, 0], [0, 1]]), np.array([[score, 0], [0, score]], np.float32)
    threshold, accuracy = find_exact_match_threshold(y_true, probabilities, [score, score])
    assert threshold == pytest.approx(score)
    metrics = get_multilabel_evaluation_metrics(y_true, probabilities, ["ant", "bee"], threshold)
    assert metrics["exact_match_accuracy"] == accuracy


# Temperature


def test_a_temperature_of_two_takes_the_root_of_the_odds():
    for multi_label, raw, expected in ((False, [0.9, 0.1], [0.75, 0.25]), (True, [0.9, 0.2], [0.75, 1 / 3])):
        calibrated = Decision(["ant", "bee"], multi_label, 2.0).calibrate(np.array([raw]))
        np.testing.assert_allclose(calibrated, [expected], rtol=1e-6)
        assert calibrated.dtype == np.float32
    _, probabilities = random_single_label(50, 4)
    np.testing.assert_array_equal(Decision(list("abcd"), False).calibrate(probabilities), probabilities)


@each_kind
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
def test_the_fitted_temperature_makes_the_confidence_equal_to_the_accuracy(confidence, right, temperature):
    is_right = np.arange(20) < round(20 * right)
    single = np.tile([[confidence, 1 - confidence]], (20, 1))
    assert fit_temperature(1 - is_right, single, False) == pytest.approx(temperature, rel=1e-5)
    multi = np.where(is_right[:, None], single, 1 - single)
    assert fit_temperature(np.tile([[1, 0]], (20, 1)), multi, True) == pytest.approx(temperature, rel=1e-5)


@each_kind
def test_the_temperature_is_bounded_and_one_without_a_mistake(multi_label):
    for low in (0.0, 1e-45, 0.2):
        raw = np.array([[1 - low, low], [low, 1 - low]], np.float32)
        assert fit_temperature(np.eye(2) if multi_label else np.arange(2), raw, multi_label) == 1
    y_true = np.eye(2)[[0] * 9 + [1]] if multi_label else np.array([0] * 9 + [1])
    timid, certain = (np.tile(np.array([row], np.float32), (10, 1)) for row in ([0.5001, 0.4999], [0, 1]))
    assert fit_temperature(y_true, timid, multi_label) == 0.05
    assert fit_temperature(y_true, timid[:, ::-1], multi_label) == fit_temperature(y_true, certain, multi_label) == 20


def test_a_block_of_any_size_gives_the_same_temperature_and_probabilities(monkeypatch):
    y_true, raw = random_single_label(100, 4)
    expected, decision = fit_temperature(y_true, raw, False), Decision(list("abcd"), False, 1.7)
    calibrated = decision.calibrate(raw)
    monkeypatch.setattr("finetune.evaluation.calibration.BLOCK", 28)
    assert fit_temperature(y_true, raw, False) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_array_equal(decision.calibrate(raw), calibrated)


# Thresholds


@pytest.mark.parametrize("decimals", [1, 2, 7])
def test_no_threshold_has_a_higher_f1_than_the_best_by_scikit_learn(decimals):
    generator = np.random.default_rng(decimals)
    y_true = generator.random((40, 3)) < [0.1, 0.5, 0.9]
    scores = (0.6 * generator.random((40, 3)) + 0.4 * y_true).round(decimals).astype(np.float32)
    for truth, column, threshold in zip(y_true.T, scores.T, find_best_f1_thresholds(y_true, scores, 0.5), strict=True):
        found = sk.f1_score(truth, column >= np.float32(threshold))
        assert found == pytest.approx(max(sk.f1_score(truth, column >= score) for score in np.unique(column)))


@pytest.mark.parametrize(
    ("truth", "scores", "threshold"),
    [
        # Halfway between neighbours. F1 with two chosen: 4/5; with four: 6/7.
        ([1, 1, 0, 1, 0], [0.875, 0.75, 0.25, 0.125, 0], 0.0625),
        ([1, 1, 0], [0.875, 0.75, 0.25], 0.5),
        # The middle of equally good ones. One chosen: 2/3; two: 1/2; three: 2/5; all four: 2/3.
        ([1, 0, 0, 1], [0.75, 0.5, 0.25, 0.125], 0.0625),
        # No positive: the fallback. No negative: all are chosen.
        ([0, 0], [0.4, 0.6], 0.37),
        ([1, 1], [0.4, 0.6], 0.2),
        ([1, 1], [0, 0], 0),
    ],
)
def test_the_best_f1_threshold_by_hand(truth, scores, threshold):
    found = find_best_f1_thresholds(np.array(truth)[:, None], np.array(scores)[:, None], 0.37)
    assert found == [pytest.approx(threshold)]


@pytest.mark.parametrize("upper", [0.3, 0.7, 1e-44, 1.0])
def test_a_best_f1_threshold_separates_neighbouring_float32_numbers(upper):
    upper = np.float32(upper)
    scores = np.array([[upper], [np.nextafter(upper, np.float32(0))]])
    decision = Decision(["ant"], True, best_f1_thresholds=find_best_f1_thresholds(np.array([[1], [0]]), scores, 0.5))
    assert decision.choose(scores, "best_f1").tolist() == [[True], [False]]


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6, 0.7, 0.9])
def test_a_label_is_predicted_at_its_threshold(threshold):
    decision = Decision(["ant"], True, exact_match_threshold=threshold, best_f1_thresholds=[threshold])
    for kind in (np.float32, np.float64):
        scores = np.array([[threshold], [threshold - 1e-4]], kind)
        for threshold_type in ("exact_match", "best_f1"):
            assert decision.choose(scores, threshold_type).tolist() == [[True], [False]]


def test_thresholds_are_one_per_class_and_default_to_the_exact_match_threshold():
    decision = Decision(NAMES, True, exact_match_threshold=0.25)
    assert decision.thresholds().tolist() == decision.thresholds("best_f1").tolist() == [0.25] * 3
    own = Decision(NAMES, True, exact_match_threshold=0.25, best_f1_thresholds=[0.5, 0.75, 0.125])
    assert own.thresholds("best_f1").tolist() == [0.5, 0.75, 0.125]
    assert own.thresholds("exact_match").tolist() == [0.25] * 3


def test_the_first_of_the_highest_probabilities_is_chosen():
    chosen = Decision(NAMES, False).choose(np.array([[0.2, 0.4, 0.4], [0.3, 0.3, 0.4]]))
    assert chosen.tolist() == [[False, True, False], [False, False, True]]


# Decisions


def test_confidence_is_the_probability_of_the_answer_or_of_its_least_certain_label():
    calibrated = np.array([[0.7, 0.2, 0.1], [0.9, 0.8, 0.4], [0.1, 0.2, 0.45]])
    one, several = Decision(NAMES[:3], False), Decision(NAMES[:3], True, exact_match_threshold=0.5)
    np.testing.assert_allclose(one.measure_confidence(calibrated), [0.7, 0.9, 0.45])
    # The answers yes, no, no have 0.7, 0.8, 0.9; yes, yes, no 0.9, 0.8, 0.6; no, no, no 0.9, 0.8, 0.55.
    np.testing.assert_allclose(several.measure_confidence(calibrated), [0.7, 0.6, 0.55])


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
    assert decision.exact_match_threshold == find_exact_match_threshold(y_true, calibrated, [0.2, 0.8])[0]
    expected = find_best_f1_thresholds(y_true, calibrated, decision.exact_match_threshold)
    assert decision.best_f1_thresholds == expected


def test_without_a_validation_set_thresholds_come_from_the_training_set_and_no_temperature():
    y_true, raw = random_multilabel()
    truths, probabilities = {"training": y_true, "test": y_true}, {"training": raw, "test": raw * np.nan}
    decision = fit_decision(truths, probabilities, NAMES, True, [0.01, 0.99], "best_model.keras")
    assert (decision.temperature, decision.temperature_fitted_on) == (1, None)
    assert decision.thresholds_fitted_on == "training"
    assert decision.exact_match_threshold == find_exact_match_threshold(y_true, raw, [0.01, 0.99])[0]
    single = fit_decision({"training": Y_TRUE}, {"training": one_hot(PREDICTED)}, NAMES, False, [0.1, 0.9], "m.keras")
    assert single == Decision(NAMES, False, model="m.keras")


def test_single_label_decisions_have_a_temperature_and_no_thresholds():
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
    assert write_decision(str(tmp_path), decision) == str(tmp_path / "decision.json")
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
        "abstention": None,
    }


@pytest.mark.parametrize(
    "rule",
    [
        Abstention(0.02, [0.9, None, 1.0], 0.01, -4.5, [1.0, 0.5, 0.7, 0.1], 300),
        Abstention(0.0, None, 0.0, None, None, 20),
    ],
)
def test_a_rule_is_stored_with_its_method_and_read_again(rule, tmp_path):
    decision = dataclasses.replace(DECISIONS[1], abstention=rule)
    path = write_decision(str(tmp_path), decision)
    stored = json.loads(Path(path).read_text())["abstention"]
    assert stored["fitted_on"] == "validation"
    assert "binomial" in stored["method"]
    assert read_decision(str(tmp_path), decision.class_names, True, "best_model.keras") == decision


@pytest.mark.parametrize(
    "change",
    [
        {"max_error": 2},
        {"thresholds": [0.5]},
        {"thresholds": ["high", 0.5, 0.5]},
        {"unknown_threshold": float("nan")},
        {"scales": [1, 0, 1, 1]},
        {"scales": None},
        {"images": -1},
    ],
)
def test_a_damaged_rule_is_a_users_mistake(change, tmp_path):
    rule = Abstention(0.02, [0.9, 0.8, 1.0], 0.01, -4.5, [1.0, 0.5, 0.7, 0.1], 300)
    path = Path(write_decision(str(tmp_path), dataclasses.replace(DECISIONS[1], abstention=rule)))
    stored = json.loads(path.read_text())
    stored["abstention"] |= change
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="abstention"):
        read_decision(str(tmp_path), DECISIONS[1].class_names, True, "best_model.keras")


def test_legacy_files_have_no_rule(tmp_path):
    path = Path(write_decision(str(tmp_path), DECISIONS[1]))
    stored = json.loads(path.read_text())
    del stored["abstention"]
    path.write_text(json.dumps(stored))
    assert read_decision(str(tmp_path), DECISIONS[1].class_names, True, "best_model.keras") == DECISIONS[1]


def test_without_a_file_or_with_another_models_the_defaults_hold(tmp_path, capsys):
    assert read_decision(str(tmp_path), NAMES, True, "best_model.keras") == Decision(NAMES, True)
    assert capsys.readouterr().out == ""
    write_decision(str(tmp_path), DECISIONS[1])
    assert read_decision(str(tmp_path), NAMES, True, "latest_model.keras") == Decision(NAMES, True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert "fitted for best_model.keras" in printed[0]


def test_what_was_fitted_on_a_validation_set_stays_where_there_is_none(tmp_path, capsys):
    model, fitted = str(tmp_path / "best_model.keras"), DECISIONS[1]
    write_decision(str(tmp_path), fitted)
    truth, probabilities = {"test": np.eye(3)}, {"test": np.full((3, 3), 0.4)}
    found = get_decision(model, truth, probabilities, NAMES, True, (0.1, 0.9))
    assert found == fitted == read_decision(str(tmp_path), NAMES, True, model)
    assert "keeping the decision" in capsys.readouterr().out
    other = str(tmp_path / "latest_model.keras")
    assert get_decision(other, truth, probabilities, NAMES, True, (0.1, 0.9)).temperature == 1
    write_decision(str(tmp_path), DECISIONS[2])
    assert get_decision(model, truth, probabilities, NAMES, True, (0.1, 0.9)).thresholds_fitted_on is None


def test_a_file_that_was_edited_by_hand_may_use_whole_numbers_and_another_order(tmp_path):
    content = DECISIONS[1].to_dict() | {"temperature": 2, "best_f1_thresholds": {"cow": 1, "ant": 0, "bee": 0.5}}
    (tmp_path / "decision.json").write_text(json.dumps(content))
    decision = read_decision(str(tmp_path), NAMES, True, "best_model.keras")
    assert (decision.temperature, decision.best_f1_thresholds) == (2.0, [0, 0.5, 1])


THRESHOLDS = {"ant": 0.1, "bee": 0.2, "cow": 0.3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in ("1", True, 0, 1000, float("inf"), None)],
        *[("exact_match_threshold", value) for value in (1.01, -0.01, [0.5])],
        *[("best_f1_thresholds", value) for value in ([0.1, 0.2, 0.3], {"ant": 0.1, "bee": 0.2})],
        *[("best_f1_thresholds", THRESHOLDS | one) for one in ({"dog": 0.4}, {"cow": "0.3"}, {"cow": 2})],
        *[("temperature_fitted_on", "test"), ("thresholds_fitted_on", "test"), ("multi_label", False)],
        *[("classes", value) for value in ("ant", [], ["ant", "ant", "bee"], ["ant", 2, "cow"])],
        *[("model", value) for value in (None, "two\nlines.keras")],
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


@pytest.mark.parametrize("text", ["null", "\ud800", "{}", '{"classes": ' + "9" * 5000 + "}", " " * (2**22 + 1)])
def test_a_file_that_is_no_object_of_all_fields_is_one_line(tmp_path, text):
    (tmp_path / "decision.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="decision.json: expected") as caught:
        read_decision(str(tmp_path), NAMES, True, "best_model.keras")
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_a_users_mistake(tmp_path):
    (tmp_path / "decision.json").mkdir()
    with pytest.raises(UserError, match="Cannot read"):
        read_decision(str(tmp_path), NAMES, False, "best_model.keras")


@pytest.mark.parametrize("names", [["ant", "bee"], ["ant", "cow", "bee"], ["ant", "bee", "dog"]])
def test_a_decision_of_other_classes_is_an_error(tmp_path, names):
    write_decision(str(tmp_path), DECISIONS[1])
    with pytest.raises(UserError, match=f"{', '.join(names)} .*ant, bee, cow"):
        read_decision(str(tmp_path), names, True, "best_model.keras")
