"""The promised error against its definition, by simulation and by values of the binomial distribution."""

import numpy as np
import pytest
from scipy import stats

from finetune.evaluation.promise import (
    ASSURANCE,
    choose_threshold,
    count_photos,
    count_units,
    get_bound,
    get_smallest_promise,
)


def draw(photos, rng, hardest=0.2):
    """Draws confidences, uniform, and errors with a risk from 0 at the highest to `hardest` at the lowest."""
    confidences = rng.uniform(size=photos)
    return confidences, rng.uniform(size=photos) < hardest * (1 - confidences)


def test_the_bound_is_clopper_and_pearsons():
    for errors, photos in ((0, 59), (1, 93), (7, 200)):
        assert get_bound(errors, photos) == pytest.approx(stats.beta.ppf(ASSURANCE, errors + 1, photos - errors))
    assert get_bound(5, 5) == 1
    # Half as many independent photos with the same share of errors.
    assert get_bound(2, 100, 50) == pytest.approx(get_bound(1, 50))


def test_the_numbers_that_allow_more_errors_are_the_smallest():
    assert [count_photos(errors, 0.05) for errors in (0, 1, 2)] == [59, 93, 124]
    for errors in range(6):
        number = count_photos(errors, 0.05)
        assert get_bound(errors, number) <= 0.05 < get_bound(errors, number - 1)
    assert get_smallest_promise(59) <= 0.05 < get_smallest_promise(58)
    assert get_smallest_promise(0) == 1


@pytest.mark.parametrize("promised", [0.05, 0.08])
def test_promises_are_kept_in_95_of_100_draws_and_answer_much(promised):
    rng, broken, answered, draws = np.random.default_rng(0), 0, 0.0, 500
    for _ in range(draws):
        confidences, wrong = draw(1000, rng)
        found = choose_threshold(confidences, wrong, promised, risks=0.2 * (1 - confidences))
        if found.threshold is not None:
            # Above a confidence t the mean error is 0.2 * (1 - t) / 2.
            broken += 0.1 * (1 - found.threshold) > promised
            answered += 1 - found.threshold
    assert stats.binom.sf(broken - 1, draws, 1 - ASSURANCE) > 0.001
    # With the true risk known, 10 times the promise could be answered.
    assert answered / draws > 0.4 * 10 * promised


def test_an_easy_set_is_answered_whole_and_a_hopeless_one_not_at_all():
    rng = np.random.default_rng(1)
    confidences = rng.uniform(size=200)
    assert choose_threshold(confidences, np.zeros(200, bool), 0.02).threshold == confidences.min()
    hopeless = choose_threshold(confidences, rng.uniform(size=200) < 0.5, 0.02)
    assert (hopeless.threshold, hopeless.answered, hopeless.needed) == (None, 0, None)
    few = choose_threshold(confidences[:19], np.zeros(19, bool), 0.05)
    assert few.threshold is None
    assert few.smallest == pytest.approx(1 - 0.05 ** (1 / 19))
    assert few.needed >= 59
    assert choose_threshold(np.zeros(0), np.zeros(0, bool), 0.05).threshold is None


def test_equal_confidences_are_answered_together():
    confidences = np.repeat([0.9, 0.5], 100)
    found = choose_threshold(confidences, np.arange(200) >= 100, 0.05, risks=np.repeat([0.01, 0.5], 100))
    assert (found.threshold, found.answered, found.errors) == (0.9, 100, 0)


def test_photos_of_one_group_count_as_one_if_they_err_together():
    # Groups of 2, 3 and 1 photos: (2 + 3 + 1)^2 / (4 + 9 + 1).
    assert count_units(np.array([0, 0, 1, 1, 1, 2]), 6)[-1] == pytest.approx(36 / 14)
    np.testing.assert_array_equal(count_units(None, 3), [1, 2, 3])
    rng, broken, draws = np.random.default_rng(2), 0, 500
    groups = np.repeat(np.arange(300), 3)
    for _ in range(draws):
        confidences, wrong = (np.repeat(part, 3) for part in draw(300, rng))
        found = choose_threshold(confidences, wrong, 0.05, 0.2 * (1 - confidences), groups)
        broken += found.threshold is not None and 0.1 * (1 - found.threshold) > 0.05
    assert stats.binom.sf(broken - 1, draws, 1 - ASSURANCE) > 0.001
