"""The rule of abstention: what is fitted, and its degenerate cases."""

import json

import numpy as np
import pytest
from scipy import special

from finetune.evaluation.abstention import (
    Evidence,
    Outcomes,
    Wishes,
    answer_evidence,
    describe_shortage,
    fit_abstention,
    list_promises,
    measure_answers,
)


def draw(images, rng, classes=4, skill=2.0, similarities=True):
    """Draws calibrated probabilities, with labels that follow them, and similarities."""
    calibrated = special.softmax(skill * rng.normal(size=(images, classes)), axis=1).astype(np.float32)
    y_true = np.array([rng.choice(classes, p=row / row.sum()) for row in calibrated.astype(float)])
    chosen = np.arange(classes) == calibrated.argmax(axis=1)[:, None]
    return Evidence(y_true, calibrated, chosen, rng.normal(0.7, 0.1, images) if similarities else None)


def draw_labels(images, rng):
    """Draws calibrated probabilities of three labels, the last of which is never certain."""
    calibrated = special.expit(rng.normal(0, 3, size=(images, 3)) * [1, 1, 0.05]).astype(np.float32)
    truth = (rng.uniform(size=calibrated.shape) < calibrated).astype(int)
    return Evidence(truth, calibrated, calibrated >= 0.5)


def test_one_photo_in_a_hundred_is_unknown_and_the_promise_holds_on_the_others():
    rng = np.random.default_rng(0)
    validation, test = draw(1000, rng, skill=4), draw(5000, rng, skill=4)
    rule = fit_abstention(validation, Wishes(0.05, 0.01))
    found = measure_answers(answer_evidence(rule, test), test.y_true)
    assert rule.unknown == pytest.approx(10, abs=1)
    assert found["unknown"] / 5000 == pytest.approx(0.01, abs=0.006)
    assert found["error"] < 0.05
    assert 0.3 < found["coverage"] < 1
    assert rule.unsure == measure_answers(answer_evidence(rule, validation), validation.y_true)["unsure"]


def test_a_photo_that_is_unsure_and_strange_is_unknown():
    rng = np.random.default_rng(1)
    evidence = draw(500, rng)
    rule = fit_abstention(evidence, Wishes(0.05, 0.01))
    strange = Evidence(np.zeros(1, int), np.full((1, 4), 0.25, np.float32), np.eye(4, dtype=bool)[:1], np.zeros(1))
    answers = answer_evidence(rule, strange)
    assert answers.is_unknown.tolist() == [True]
    assert not answers.is_unsure.any()
    assert not answers.labels.any()


def test_without_wishes_or_without_a_reference_every_photo_is_answered():
    evidence = draw(50, np.random.default_rng(2))
    for given, wishes in ((evidence, Wishes(0, 0)), (evidence._replace(similarities=None), Wishes(0, 0.01))):
        answers = answer_evidence(fit_abstention(given, wishes), given)
        assert answers.is_answered.all()
        np.testing.assert_array_equal(answers.labels, given.chosen)


def test_each_label_has_its_own_promise_and_one_without_is_never_given():
    rng = np.random.default_rng(3)
    validation, test = draw_labels(3000, rng), draw_labels(3000, rng)
    rule = fit_abstention(validation, Wishes(0.05, 0))
    assert rule.thresholds[2] is None
    answers = answer_evidence(rule, test)
    for position in (0, 1):
        given = answers.labels[:, position]
        assert given.sum() > 100
        assert (test.y_true[given, position] == 0).mean() < 0.07
    assert not answers.labels[:, 2].any()


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (lambda rng: draw(10, rng), "Give at least"),
        (lambda rng: draw(300, rng, skill=0.01), "wrong too often"),
    ],
)
def test_a_promise_that_cannot_be_made_answers_nothing_and_has_its_reason(evidence, words):
    validation = evidence(np.random.default_rng(4))
    rule = fit_abstention(validation, Wishes(0.02, 0.01))
    assert rule.thresholds == [None]
    assert measure_answers(answer_evidence(rule, validation), validation.y_true)["answered"] == 0
    assert words in describe_shortage(validation, rule)


def test_a_perfect_model_and_a_single_class_answer_everything():
    rng = np.random.default_rng(5)
    perfect = draw(300, rng)
    perfect = perfect._replace(y_true=perfect.calibrated.argmax(axis=1))
    single = Evidence(np.zeros(300, int), np.ones((300, 1), np.float32), np.ones((300, 1), bool), rng.uniform(size=300))
    for evidence in (perfect, single):
        rule = fit_abstention(evidence, Wishes(0.02, 0))
        assert answer_evidence(rule, evidence).is_answered.all()


def test_promises_are_tested_on_the_other_set():
    rng = np.random.default_rng(6)
    rows = list_promises(draw(800, rng, skill=4), draw(400, rng, skill=4), 0.01)
    assert [row["promised"] for row in rows] == [0.01, 0.02, 0.05, 0.1]
    assert rows[-1]["coverage"] >= rows[1]["coverage"]


def test_the_interval_of_the_error_is_clopper_and_pearsons():
    labels = np.repeat(np.eye(2, dtype=bool)[:1], 10, axis=0)
    for wrong, expected in ((0, (0, 0.3085)), (2, (0.0252, 0.5561)), (10, (0.6915, 1))):
        nothing = np.zeros(10, bool)
        found = measure_answers(Outcomes(nothing, nothing, labels, np.zeros(10)), (np.arange(10) < wrong).astype(int))
        assert found["error_interval"] == pytest.approx(expected, abs=1e-4)
        assert json.loads(json.dumps(found)) == found
