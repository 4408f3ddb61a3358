"""The rule of abstention on a run's sets: what it does on the test set, and the nearest training photos."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from configs import Configs
from finetune.core.options import UserError
from finetune.evaluation.abstention import Abstention, Evidence
from finetune.evaluation.decision import Decision
from finetune.evaluation.novelty import Neighbours, Reference
from finetune.evaluation.rule import (
    Nearest,
    Sets,
    check_wishes,
    collect_answers,
    describe_rule,
    evaluate_rule,
    list_evidence,
    list_nearest,
)

NAMES = ["cat", "dog"]


def make_evidence(y_true, dogs, similarities=None):
    """Returns evidence of two classes from the probability of the second one."""
    calibrated = np.stack([1 - np.array(dogs), dogs], axis=1).astype(np.float32)
    return Evidence(np.array(y_true), calibrated, np.eye(2, dtype=bool)[calibrated.argmax(axis=1)], similarities)


def decide(rule=None, multi_label=False):
    return Decision(NAMES, multi_label, abstention=rule)


def test_answers_and_curve_are_those_worked_out_by_hand():
    # The surest first: right at 0.95, right at 0.9, wrong at 0.85, and unsure below 0.8: right at 0.7, wrong at 0.6.
    evidence = make_evidence([1, 0, 0, 1, 0], [0.95, 0.1, 0.85, 0.7, 0.6])
    found = evaluate_rule(decide(Abstention(0.1, [0.8])), {"test": evidence})
    assert found.keys() == {"answers", "risk_coverage"}
    answers = found["answers"]
    assert [answers[name] for name in ("images", "unknown", "unsure", "answered", "wrong")] == [5, 0, 2, 3, 1]
    assert (answers["coverage"], answers["error"]) == pytest.approx((0.6, 1 / 3))
    np.testing.assert_allclose(found["risk_coverage"]["coverage"], [0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(found["risk_coverage"]["error"], [0, 0, 1 / 3, 1 / 4, 2 / 5])
    assert json.loads(json.dumps(found)) == found


def test_a_long_curve_keeps_its_ends_and_at_most_500_points():
    rng = np.random.default_rng(0)
    found = evaluate_rule(decide(), {"test": make_evidence(rng.integers(0, 2, 3000), rng.uniform(size=3000))})
    curve = found["risk_coverage"]
    assert len(curve["coverage"]) == len(curve["error"]) <= 500
    assert curve["coverage"][0] == pytest.approx(1 / 3000)
    assert curve["coverage"][-1] == 1
    assert curve["error"][-1] == found["answers"]["error"]


def test_a_perfect_model_keeps_every_promise_and_answers_everything():
    truth = np.arange(2000) % 2
    evidence = make_evidence(truth, np.where(truth, 0.9, 0.1))
    found = evaluate_rule(decide(), {"validation": evidence, "test": evidence})
    assert [row["promised"] for row in found["promises"]] == [0.01, 0.02, 0.05, 0.1]
    assert {(row["coverage"], row["error"]) for row in found["promises"]} == {(1.0, 0.0)}


def test_a_model_of_one_class_is_always_right():
    calibrated = np.ones((900, 1), np.float32)
    evidence = Evidence(np.zeros(900, int), calibrated, calibrated > 0)
    found = evaluate_rule(Decision(["cat"], False), {"validation": evidence, "test": evidence})
    assert {(row["coverage"], row["error"]) for row in found["promises"]} == {(1.0, 0.0)}
    assert found["risk_coverage"] == {"coverage": [1.0], "error": [0.0]}


@pytest.mark.parametrize(("images", "is_right"), [(1000, False), (19, True)], ids=["chance", "few"])
def test_a_chance_model_and_few_validation_photos_promise_nothing(images, is_right):
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, images)
    dogs = np.where(truth, 0.99, 0.01) if is_right else rng.uniform(size=images)
    evidence = make_evidence(truth, dogs)
    found = evaluate_rule(decide(), {"validation": evidence, "test": evidence})
    assert [(row["coverage"], row["error"], row["error_interval"]) for row in found["promises"]] == [
        (0, None, None)
    ] * 4
    lines = describe_rule(decide(Abstention(0.02, [None], images=images)), found)
    assert "0.02 cannot be promised" in lines[0]
    assert [line.split(":")[1] for line in lines[-4:]] == [" nothing is answered"] * 4


def test_several_labels_are_counted_by_the_label():
    # Given from 0.5: 0.9 right, 0.8 wrong, 0.7 right, 0.6 right. The rule gives the second label from 0.65.
    y_true, calibrated = np.array([[1, 0], [0, 1], [1, 0]]), np.array([[0.9, 0.8], [0.1, 0.7], [0.6, 0.2]], np.float32)
    evidence = Evidence(y_true, calibrated, calibrated >= 0.5)
    found = evaluate_rule(decide(Abstention(0.3, [None, 0.65]), True), {"test": evidence})
    np.testing.assert_allclose(found["risk_coverage"]["coverage"], [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found["risk_coverage"]["error"], [0, 1 / 2, 1 / 3, 1 / 4])
    assert (found["answers"]["answered"], found["answers"]["wrong"], found["answers"]["unsure"]) == (2, 1, 1)
    (line,) = describe_rule(decide(Abstention(0.3, [None, 0.65]), True), found)
    assert "Never given, because nothing can be promised: cat." in line


def test_unknown_photos_are_not_counted_as_none_if_nothing_was_compared():
    decision = decide(Abstention(0.0, None, 0.05, 1.0, [0.0, 1.0, 0.0, 1.0]))
    # log(0.9 / 0.1) - 2 is below the threshold of 1, and log(0.9 / 0.1) + 0 above it.
    evidence = make_evidence([1, 1], [0.9, 0.9])
    compared = evidence._replace(similarities=np.array([-2.0, 0.0]))
    assert evaluate_rule(decision, {"test": compared})["answers"]["unknown"] == 1
    found = evaluate_rule(decision, {"test": evidence})
    assert found["answers"]["unknown"] is None
    (line,) = describe_rule(decision, found)
    assert "Unknown: not counted" in line


# The nearest training photos

REFERENCE = Reference(np.eye(4, dtype=np.float16), ["b.jpg", "c.jpg", "d.jpg", "gone.jpg"], ["cat", "dog"] * 2, "model")


def make_sequence(names, folder="photos", y_true=()):
    return SimpleNamespace(
        table=pd.DataFrame({"path": names}),
        paths=np.array([f"{folder}/{name}" for name in names], object),
        get_y_true=lambda: np.array(y_true),
        get_read_groups=lambda: None,
        get_read_paths=lambda: [f"{folder}/{name}" for name in names],
    )


def test_nearest_photos_have_the_files_of_the_training_table():
    sets = Sets({"training": make_sequence(["a.jpg", "b.jpg", "c.jpg", "d.jpg"])}, {}, {})
    neighbours = Neighbours(
        np.array([[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, 0.3, 0.2]]), np.array([[2, 0, 1, 3], [3, 0, 1, 2]])
    )
    # Three of the four that were found.
    assert list_nearest(sets, neighbours, REFERENCE) == [
        [Nearest("photos/d.jpg", "cat", 0.9), Nearest("photos/b.jpg", "cat", 0.8), Nearest("photos/c.jpg", "dog", 0.7)],
        # The reference of an exported model may have photos that the table lacks.
        [Nearest("gone.jpg", "dog", 0.5), Nearest("photos/b.jpg", "cat", 0.4), Nearest("photos/c.jpg", "dog", 0.3)],
    ]
    assert list_nearest(sets, None, REFERENCE) is None
    assert list_nearest(sets, neighbours, None) is None


def test_a_reference_of_few_photos_has_as_many_neighbours():
    reference = Reference(np.eye(2, dtype=np.float16), ["a.jpg", "b.jpg"], NAMES, "model")
    neighbours = reference.find_neighbours(np.array([[0.6, 0.8]]))
    (found,) = list_nearest(Sets({"training": make_sequence(["a.jpg", "b.jpg"])}, {}, {}), neighbours, reference)
    assert [one.path for one in found] == ["photos/b.jpg", "photos/a.jpg"]
    assert [one.similarity for one in found] == pytest.approx([0.8, 0.6], abs=1e-3)


def test_evidence_has_the_similarities_of_each_set_and_answers_keep_those_of_the_test_set():
    sequences = {name: make_sequence(["x.jpg", "y.jpg"], y_true=[0, 1]) for name in ("validation", "test")}
    raw = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    features = {"validation": np.eye(4)[:2], "test": np.array([[0.6, 0.8, 0, 0], [0, 0, 1, 0]])}
    sets = Sets(sequences, dict.fromkeys(sequences, raw), features)
    evidence, neighbours = list_evidence(sets, decide(), REFERENCE)
    # The mean over all four photos.
    np.testing.assert_allclose(evidence["validation"].similarities, [0.25, 0.25], atol=1e-3)
    np.testing.assert_allclose(evidence["test"].similarities, [0.35, 0.25], atol=1e-3)
    assert neighbours.positions[:, 0].tolist() == [1, 2]
    answers = collect_answers(sequences["test"], evidence["test"], decide())
    assert answers.images == ["photos/x.jpg", "photos/y.jpg"]
    np.testing.assert_array_equal(answers.similarities, evidence["test"].similarities)
    # A model without features.
    evidence, neighbours = list_evidence(sets._replace(features=dict.fromkeys(features)), decide(), REFERENCE)
    assert neighbours is None
    assert collect_answers(sequences["test"], evidence["test"], decide()).similarities is None


def test_a_promise_needs_a_validation_set():
    with pytest.raises(UserError, match=r"max_error 0.05.*validation_csv"):
        check_wishes(Configs(max_error=0.05), "run/best_model.keras")
    check_wishes(Configs(max_error=0.05, validation_csv="validation.csv"), "run/best_model.keras")
    check_wishes(Configs(), "run/best_model.keras")
    # An exported model keeps its rule.
    check_wishes(Configs(max_error=0.05), "run/best_model.tflite")
