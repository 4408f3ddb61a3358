"""Speeds measured in turns, multiply-adds, and the choice of the fastest model by both."""

import keras
import numpy as np
import pytest

from finetune.training import speeds
from finetune.training.speeds import (
    Timing,
    choose_fastest,
    count_multiply_adds,
    limit_memory,
    measure_noise,
    time_in_turns,
)


class Machine:
    """A machine whose clock is moved only by its own steps, some of which are slowed down."""

    def __init__(self, costs, slowed=lambda run: 1.0):
        self.now, self.runs, self.order = 0.0, 0, []
        self.steps = [lambda cost=cost, place=place: self.work(cost, place) for place, cost in enumerate(costs)]
        self.slowed = slowed

    def work(self, cost, place):
        self.now += cost * self.slowed(self.runs)
        self.runs += 1
        self.order.append(place)

    def time(self, limit=1e9):
        return time_in_turns(self.steps, limit, lambda: self.now)


def test_steps_run_in_turns_until_their_order_is_stable():
    machine = Machine([3.0, 1.0, 2.0])
    np.testing.assert_allclose(machine.time(), [[3, 1, 2]] * 3)
    assert machine.order == [0, 1, 2] * 3


def test_load_during_some_runs_does_not_change_the_least_times():
    # The faster step is slow in both of the first rounds, so that the order changes after that.
    machine = Machine([1.0, 1.5], slowed=lambda run: 4.0 if run in (0, 2) else 1.0)
    times = machine.time()
    assert times.min(axis=0).tolist() == [1.0, 1.5]
    assert len(times) == 5


def test_a_measurement_ends_at_its_limit_and_after_so_many_rounds():
    assert len(Machine([5.0, 6.0]).time(limit=10)) == 1
    # The order changes with each round: each step in turn has a new least time.
    shrinking = Machine([1.0, 1.0], slowed=lambda run: 0.5 ** (run if run % 4 in (1, 2) else 0))
    assert len(shrinking.time()) == speeds.MOST_ROUNDS


def test_noise_is_how_far_the_median_is_above_the_least():
    times = np.array([[1.0, 2.0], [2.0, 2.0], [3.0, 2.0]])
    assert measure_noise(times).tolist() == [2.0, 1.0]


def make_timing(size):
    return Timing(lambda: None, 10, 100.0, size)


def test_models_are_timed_together_as_long_as_the_memory_holds_them(monkeypatch):
    monkeypatch.setattr(speeds, "MOST_KEPT_BYTES", 100)
    timings = []
    for size in (60, 50, 40):
        timings.append(make_timing(size))
        limit_memory(timings)
    assert [timing.run is None for timing in timings] == [False, True, False]
    assert timings[1].seconds >= 0


def test_multiply_adds_of_mobilenet_are_those_of_its_paper():
    # Howard et al., 2017 (arXiv:1704.04861), table 7: millions of multiply-adds, with 1000 classes.
    model = keras.applications.MobileNet(weights=None, input_shape=(128, 128, 3))
    assert round(count_multiply_adds(model) / 1e6) == pytest.approx(186, abs=1)


def test_multiply_adds_of_every_kind_of_kernel_worked_out_by_hand():
    inputs = keras.Input((8, 8, 3))
    outputs = keras.layers.Conv2D(4, 3, strides=2, padding="same")(inputs)
    outputs = keras.layers.SeparableConv2D(6, 3, padding="same")(outputs)
    outputs = keras.layers.BatchNormalization()(outputs)
    inner = keras.Model(inputs, outputs)
    images = keras.Input((8, 8, 3))
    model = keras.Model(images, keras.layers.Dense(5)(keras.layers.GlobalAveragePooling2D()(inner(images))))
    # 4 x 4 places: 3 x 3 x 3 x 4, then 3 x 3 x 4 and 4 x 6; and the dense layer once.
    assert count_multiply_adds(model) == 16 * (108 + 36 + 24) + 6 * 5


@pytest.mark.parametrize(
    ("candidates", "chosen", "measured"),
    [
        # Backbone, speed, noise, multiply-adds. As on a busy machine: more pixels cannot be faster.
        ([("a", 29.7, 1.0, 567), ("a", 23.6, 1.0, 234)], 1, 0),
        # Of several with fewer multiply-adds, the one with the fewest.
        ([("a", 30, 1.0, 500), ("a", 20, 1.0, 300), ("a", 10, 1.0, 100)], 2, 0),
        # Another backbone with fewer multiply-adds may really be slower,
        ([("a", 30, 1.1, 500), ("b", 20, 1.1, 300)], 0, 0),
        # but not if the difference is within the noise.
        ([("a", 30, 1.1, 500), ("b", 20, 1.6, 300)], 1, 0),
        ([("a", 20, 1.0, 500), ("a", 30, 1.0, 300)], 1, 1),
        # Unknown multiply-adds.
        ([("a", 30, 2.0, 0), ("a", 29, 2.0, 0)], 0, 0),
    ],
)
def test_multiply_adds_decide_where_measured_speeds_contradict_them(candidates, chosen, measured):
    names, *facts = zip(*candidates, strict=True)
    assert choose_fastest(*(np.array(fact, float) for fact in facts), names) == (chosen, measured)
