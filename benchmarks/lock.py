"""Measures how long the generator holds Python's lock for an image, and how long it works without the lock, by stage.

python benchmarks/lock.py FOLDER    prints milliseconds per image with the lock, then without; FOLDER has one folder per
                                    class

The C calls below release the lock. All other time of the thread counts as time with the lock, including the little that
these calls do before they release it. A second thread that counts would be noisier.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import simplejpeg

from augmenter import build_augmenter
from finetune.core.devices import keep_freed_memory
from finetune.loading.batches import ImageBatches

SIZE, BATCH, EPOCHS = 224, 16, 4
# By stage, the calls that release the lock.
CALLS = {
    "reading": [(np, "fromfile")],
    "decoding": [(simplejpeg, "decode_jpeg"), (cv2, "imdecode")],
    "blocks": [(cv2, "resize")],
    "warp": [(cv2, "warpAffine"), (cv2, "copyMakeBorder"), (cv2, "cvtColor")],
    "look-up": [(cv2, "LUT")],
}
CORES = (8, 16, 64)


def main() -> None:
    """Prints a line per stage, the rates to expect on more cores, and the two sums."""
    keep_freed_memory()  # as every script does
    paths = sorted(map(str, Path(sys.argv[1]).glob("*/*")))
    batches = ImageBatches(paths, np.zeros(len(paths), int), (SIZE, SIZE), BATCH, build_augmenter(), shuffle=True)
    spent: dict[str, float] = defaultdict(float)
    calls: list[str] = []
    for stage, functions in CALLS.items():
        for module, name in functions:
            setattr(module, name, time_call(getattr(module, name), stage, spent, calls))
    cost = measure_cost()
    # The first epoch reads headers too.
    make_epoch(batches, 0)
    least = {}
    for epoch in range(1, EPOCHS):
        spent.clear()
        calls.clear()
        start = time.thread_time()
        make_epoch(batches, epoch)
        rest = time.thread_time() - start - sum(spent.values()) - len(calls) * cost
        found = {**spent, "under the lock": rest}
        if not least or sum(found.values()) < sum(least.values()):
            least = found
    of_image = {stage: 1000 * seconds / len(paths) for stage, seconds in least.items()}
    for stage, milliseconds in of_image.items():
        print(f"{stage}: {milliseconds:.3f} ms per image")
    under = of_image.pop("under the lock")
    outside = sum(of_image.values())
    for cores in CORES:
        threads, processes = predict_rates(under, outside, cores)
        print(
            f"{cores} cores, by arithmetic: at most {threads:.0f} images/s with threads, {processes:.0f} with processes"
        )
    print(under, outside)


def make_epoch(batches: ImageBatches, epoch: int) -> None:
    """Computes all batches of an epoch."""
    batches.epoch = epoch
    for index in range(batches.steps):
        batches[index]


def time_call(call: Callable, stage: str, spent: dict[str, float], calls: list[str]) -> Callable:
    """Wraps a call: adds its thread time to the stage, and the stage to the list of calls."""

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.thread_time()
        try:
            return call(*arguments, **options)
        finally:
            spent[stage] += time.thread_time() - start
            calls.append(stage)

    return timed


def measure_cost(number: int = 10_000) -> float:
    """Returns how many seconds timing adds to a call."""
    spent: dict[str, float] = defaultdict(float)
    timed = time_call(lambda: None, "", spent, [])
    start = time.thread_time()
    for _ in range(number):
        timed()
    return (time.thread_time() - start - spent[""]) / number


def predict_rates(under: float, outside: float, cores: int) -> tuple[float, float]:
    """Returns the images/s to expect of threads and of processes, if memory and disk keep up: arithmetic.

    Cores and the lock limit threads. Only cores limit processes: copying an image from shared memory releases the
    lock.

    Args:
        under: milliseconds per image with the lock.
        outside: milliseconds per image without it.
        cores: one worker on each.
    """
    of_cores = 1000 * cores / (under + outside)
    return min(of_cores, 1000 / under), of_cores


if __name__ == "__main__":
    main()
