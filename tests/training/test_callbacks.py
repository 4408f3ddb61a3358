"""What happens around steps and epochs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from finetune.training.callbacks import RangeTest, Schedule
from finetune.training.phases import Phase


def schedule(kind, warmup=0.0, first=0, end=4, rate=0.1, minimum=0.01, steps=5):
    sequence = SimpleNamespace(steps=steps, first_step=0)
    return Schedule(Phase(first, end, rate, False), sequence, kind, warmup, minimum)


def test_cosine_falls_from_the_rate_to_the_minimum():
    rates = [schedule("cosine").get_rate(step) for step in range(20)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.01)
    assert rates[5] == pytest.approx(0.01 + 0.09 * (1 + math.cos(math.pi * 5 / 19)) / 2)
    assert rates == sorted(rates, reverse=True)


def test_one_cycle_rises_in_the_first_quarter_and_falls_to_the_minimum():
    rates = [schedule("one_cycle").get_rate(step) for step in range(20)]
    rising = [0.1 * (1 - math.cos(math.pi * (step + 1) / 5)) / 2 for step in range(5)]
    assert rates[:5] == pytest.approx(rising)
    falling = [0.01 + 0.09 * (1 + math.cos(math.pi * step / 14)) / 2 for step in range(15)]
    assert rates[5:] == pytest.approx(falling)


@pytest.mark.parametrize(("kind", "after"), [("constant", 0.1), ("plateau", None), ("cosine", 0.1)])
def test_warm_up_rises_linearly(kind, after):
    rates = [schedule(kind, warmup=2.0).get_rate(step) for step in range(11)]
    np.testing.assert_allclose(rates[:10], [0.01 * (step + 1) for step in range(10)])
    assert rates[10] == after


def test_a_schedule_counts_from_the_first_epoch_of_its_phase():
    one = schedule("cosine", first=3, end=5)
    one.set_model(SimpleNamespace(optimizer=SimpleNamespace(learning_rate=None)))
    one.on_epoch_begin(4)
    one.sequence.first_step = 2
    one.on_train_batch_begin(1)
    assert one.model.optimizer.learning_rate == schedule("cosine", first=0, end=2).get_rate(5 + 2 + 1)


def test_range_test_notes_the_losses_of_each_step_and_stops():
    test = RangeTest(1e-3, 1.0, steps=4)
    test.set_model(SimpleNamespace(optimizer=SimpleNamespace(learning_rate=None), loss_sums=np.zeros(2)))
    test.on_epoch_begin(0)
    for step, loss in enumerate([2.0, 1.0, 9.0]):
        test.on_train_batch_begin(step)
        assert test.model.optimizer.learning_rate == pytest.approx(10.0 ** (step - 3))
        test.model.loss_sums = np.add(test.model.loss_sums, [loss * 3, 3])
        test.on_train_batch_end(step)
    assert test.losses == [2, 1, 9]
    assert test.model.stop_training
