"""ROC and precision-recall curves."""

import json

import numpy as np
import pytest
from random_answers import NAMES, random_single_label, share_of_ordered_pairs
from sklearn import metrics as sk

from finetune.evaluation.metrics import get_curves

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
