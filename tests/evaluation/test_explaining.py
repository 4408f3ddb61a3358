"""Which classes of which images are explained."""

import numpy as np
import pytest
from drawn_runs import CLASS_NAMES

from finetune.evaluation.decision import Decision
from finetune.evaluation.explaining import CHOOSERS

MULTI_LABELS = np.array([[1, 0, 1], [0, 1, 0]], np.float32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("predicted", [[0, 1, 0], [1, 0, 0]]),
        ("true", [[1, 0, 1], [0, 1, 0]]),
        ("top_k", [[0, 1, 1], [1, 1, 0]]),
        ("threshold", [[0, 1, 1], [0, 0, 0]]),
    ],
)
def test_choosers_by_hand(name, expected):
    # Equal ones: the first is the predicted class.
    probabilities = np.array([[0.1, 0.9, 0.7], [0.3, 0.3, 0.2]], np.float32)
    decision = Decision(CLASS_NAMES, True, exact_match_threshold=0.7)
    chosen = CHOOSERS[name](probabilities, MULTI_LABELS, decision=decision, top_k=2)
    np.testing.assert_array_equal(chosen, np.array(expected, bool))
