"""How fast models are: measured in turns, checked against how much they compute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from finetune.models.features import select_rows
from finetune.training.probe import build_extractor
from generator import AugmentedImageSequence

# Rounds of a measurement, and after how many without a change their order is stable.
FEWEST_ROUNDS = 3
MOST_ROUNDS = 10
STABLE_ROUNDS = 2
# Seconds that all models together are timed, and batches of each in a round.
TIMING_LIMIT = 120.0
TIMED_BATCHES = 2
# Of models that stay in memory to be timed in turns; those beyond are timed alone.
MOST_KEPT_BYTES = 2**30
FLOAT_BYTES = 4


@dataclass
class Timing:
    """What the speed of a model's features is measured by.

    Attributes:
        run: computes the features of some images; None once they are timed.
        images: how many.
        views: images whose features take as long as the whole training does, about.
        size: of the model in memory, in bytes.
        seconds: that an image takes.
        noise: as `measure_noise` gives it.
    """

    run: Callable[[], object] | None
    images: int
    views: float
    size: int
    seconds: float = math.nan
    noise: float = 1.0


def prepare_timing(model: keras.Model, sequence: AugmentedImageSequence, views: float) -> Timing:
    """Prepares to time how fast a model's features are computed, from the reading of the images on.

    Args:
        model: of this collection.
        sequence: of the images.
        views: images whose features take as long as the whole training does.
    """
    extractor = build_extractor(model)
    rows = np.resize(np.arange(len(sequence.paths)), TIMED_BATCHES * sequence.batch_size)

    def run() -> int:
        return len(extractor.predict_sequence(select_rows(sequence, rows))[0])

    # The first run builds TensorFlow's graph.
    return Timing(run, max(run(), 1), views, FLOAT_BYTES * model.count_params())


def limit_memory(timings: Sequence[Timing]) -> None:
    """Measures the last model alone if the memory does not hold it with those that wait to be timed in turns."""
    waiting = [timing for timing in timings if timing.run]
    if sum(timing.size for timing in waiting) > MOST_KEPT_BYTES:
        time_together(waiting[-1:])


def time_together(timings: Sequence[Timing]) -> None:
    """Measures models in turns, and lets go of them."""
    if not timings:
        return
    times = time_in_turns([timing.run for timing in timings], TIMING_LIMIT)
    for timing, least, noise in zip(timings, times.min(axis=0), measure_noise(times), strict=True):
        timing.seconds, timing.noise, timing.run = float(least) / timing.images, float(noise), None


def time_in_turns(
    steps: Sequence[Callable[[], object]], limit: float, clock: Callable[[], float] = time.perf_counter
) -> np.ndarray:
    """Returns the seconds that steps took, which run in turns so that whatever slows the machine meets all of them.

    Rounds end once the order of the steps' least times has been the same for a few, or at a limit.

    Args:
        steps: have run before, so that their graphs are built.
        limit: of the measurement, in seconds; the round that passes it is the last one.
        clock: returns the time in seconds.

    Returns:
        float `(rounds, steps)`.
    """
    times, orders, started = [], [], clock()
    while True:
        row = []
        for step in steps:
            began = clock()
            step()
            row.append(clock() - began)
        times.append(row)
        orders.append(np.argsort(np.min(times, axis=0), kind="stable").tolist())
        is_stable = len(times) >= FEWEST_ROUNDS and all(order == orders[-1] for order in orders[-1 - STABLE_ROUNDS :])
        if is_stable or len(times) >= MOST_ROUNDS or clock() - started > limit:
            return np.array(times)


def measure_noise(times: np.ndarray) -> np.ndarray:
    """Returns how many times its least time each step's median time is, `(steps,)`, of times `(rounds, steps)`."""
    return np.median(times, axis=0) / np.maximum(np.min(times, axis=0), 1e-9)


def count_multiply_adds(model: keras.Model) -> int:
    """Returns the multiplications, each with an addition, that a model's kernels make of one image.

    0 if unknown: KerasHub has layers whose inner layers keep the shapes of their outputs to themselves.
    """
    parts = model._flatten_layers(include_self=False)
    if any(not isinstance(part, keras.Model) and part._layers for part in parts):
        return 0
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            total += count_multiply_adds(layer)
            continue
        # A kernel is applied once at each place of what the layer returns.
        kernels = sum(math.prod(weight.shape) for weight in layer.weights if weight.name.endswith("kernel"))
        total += kernels * math.prod(layer.output.shape[1:-1]) if kernels else 0
    return total


def choose_fastest(
    speeds: np.ndarray, noises: np.ndarray, multiply_adds: np.ndarray, names: Sequence[str]
) -> tuple[int, int]:
    """Chooses the fastest of candidates, by how much they compute where the measured speeds contradict that.

    They do if a candidate computes less than the one measured fastest, and either both are the same backbone, whose
    cost grows with the image, or the difference of their speeds is within the noise of the measurement.

    Args:
        speeds: `(candidates,)`, higher is better.
        noises: of the candidates, as `measure_noise` gives them.
        multiply_adds: of the candidates; 0 if unknown.
        names: of the candidates' backbones.

    Returns:
        The position of the fastest, and of the one that was measured fastest.
    """
    measured = int(np.argmax(speeds))
    is_same = np.array(names) == names[measured]
    is_close = speeds[measured] <= speeds * np.maximum(noises, noises[measured])
    contradicts = (multiply_adds < multiply_adds[measured]) & (multiply_adds > 0) & (is_same | is_close)
    if not contradicts.any():
        return measured, measured
    return int(np.argmin(np.where(contradicts, multiply_adds, np.inf))), measured
