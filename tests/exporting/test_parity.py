"""How the answers of an artefact are compared with the original's."""

import numpy as np
import pytest

from finetune.evaluation.decision import Decision
from finetune.exporting.parity import compare, find_drop_interval


def test_comparison_of_single_labels():
    before = np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [1, 0]], np.float32)
    after = np.array([[0.25, 0.75], [0.5, 0.5], [0.25, 0.75], [0.75, 0.25]], np.float32)
    found = compare(np.array([0, 0, 1, 1]), before, after, Decision(["cat", "dog"], False))
    assert found == {
        "images": 4,
        "largest_difference": 0.5,
        "mean_difference": 0.1875,
        "changed_predictions": 1,
        "measure": "accuracy",
        "accuracy": {"before": 0.75, "after": 0.5},
        "accuracy_drop": 25.0,
        # One image lost of four, none won: (1.5 - 0.5) / 6, plus or minus 1.96 * sqrt(1.5 + 0.5 - 1 / 6) / 6.
        "accuracy_drop_interval": pytest.approx([-27.56, 60.90], abs=0.01),
    }


def test_comparison_of_several_labels_counts_exact_matches_by_the_runs_threshold():
    decision = Decision(["cat", "dog"], True, exact_match_threshold=0.75)
    before = np.array([[0.5, 0.875], [0.875, 0.125]], np.float32)
    after = np.array([[0.875, 0.875], [0.875, 0.5]], np.float32)
    found = compare(np.array([[1, 1], [1, 0]]), before, after, decision)
    assert found["measure"] == "exact match"
    assert found["accuracy"] == {"before": 0.5, "after": 1.0}
    assert (found["changed_predictions"], found["accuracy_drop"]) == (1, -50.0)


def test_one_image_of_a_hundred_is_exactly_one_point():
    before = np.tile(np.array([1, 0], np.float32), (100, 1))
    after = before.copy()
    after[0] = [0, 1]
    found = compare(np.zeros(100, int), before, after, Decision(["cat", "dog"], False))
    assert found["accuracy_drop"] == 1
    # Half an image lost and half won of 98 + 2: 0 plus or minus 1.96 * sqrt(1) / 100.
    assert find_drop_interval(*[np.ones(98, bool)] * 2) == pytest.approx([-1.96, 1.96])


def test_the_interval_of_a_drop_counts_groups_and_not_their_images():
    before, after = np.arange(40) < 30, np.arange(40) < 26
    alone = find_drop_interval(before, after)
    copied = [one.repeat(5) for one in (before, after)]
    assert find_drop_interval(*copied, np.arange(40).repeat(5)) == pytest.approx(alone)
    low, high = find_drop_interval(*copied)
    assert high - low < 0.5 * (alone[1] - alone[0])
