"""Schedules of the learning rate."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from configs import Configs
from finetune.training.callbacks import Plateau, Schedule
from finetune.training.run import Phase, Progress


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


def test_a_plateau_continues_after_a_stop():
    def run_epochs(progress, losses):
        plateau = Plateau(Configs(reduce_lr_patience=3, learning_rate_decay_factor=0.5), progress)
        plateau.set_model(SimpleNamespace(optimizer=SimpleNamespace(learning_rate=0.1)))
        plateau.on_train_begin()
        for epoch, loss in enumerate(losses):
            plateau.on_epoch_end(epoch, {"val_loss": loss})
        return plateau.model.optimizer.learning_rate

    progress = Progress()
    assert run_epochs(progress, [1.0, 2.0, 2.0]) == 0.1
    assert progress.plateau == {"wait": 2, "best": 1.0, "cooldown_counter": 0}
    assert run_epochs(Progress(), [2.0]) == 0.1
    assert run_epochs(progress, [2.0]) == 0.05
