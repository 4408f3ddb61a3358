"""Whether a batch has too many images without an answer."""

import numpy as np
import pytest
from scipy import stats

from finetune.evaluation.abstention import Abstention
from finetune.evaluation.shift import FALSE_ALARMS, describe_excess, find_excess

RULE = Abstention(0.05, [0.8], 0.01, -1.0, [0.0, 1.0, 0.0, 1.0], images=200, unknown=2, unsure=40)


def test_the_usual_numbers_are_no_excess_and_few_images_say_nothing():
    assert find_excess(RULE, 1, 20, 100) == []
    assert find_excess(RULE, 29, 0, 29) == []
    assert find_excess(Abstention(), 50, 50, 100) == []


def test_an_excess_has_the_chance_of_fishers_test():
    (found,) = find_excess(RULE, 0, 45, 100)
    expected = stats.fisher_exact([[45, 55], [40, 160]], alternative="greater").pvalue
    assert (found.kind, found.number, found.images, found.expected) == ("unsure", 45, 100, 0.2)
    assert found.chance == pytest.approx(expected)
    assert "45.0% instead of 20.0%" in describe_excess(found, True)
    assert "does not cover" in describe_excess(found, True)
    assert "does not cover" not in describe_excess(found, False)


def test_batches_like_the_validation_images_rarely_alarm():
    rng, alarms, draws = np.random.default_rng(0), 0, 4000
    for _ in range(draws):
        validation = np.sort(rng.uniform(size=200))
        threshold = np.quantile(validation, 0.01, method="lower")
        rule = Abstention(0, None, 0.01, 0.0, [0, 1, 0, 1], 200, int((validation < threshold).sum()), 0)
        alarms += bool(find_excess(rule, int((rng.uniform(size=100) < threshold).sum()), 0, 100))
    assert stats.binom.sf(alarms - 1, draws, FALSE_ALARMS) > 0.01
