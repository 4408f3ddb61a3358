"""What an image of the generator takes under Python's lock, and outside of it, by stage.

python benchmarks/lock.py FOLDER    prints milliseconds an image: under the lock, then outside; FOLDER holds one folder
                                    per class

The lock is let go of in the C calls below. The time of the thread outside of them is held against the lock, the
little that these calls do before they let go too. A counting thread beside it would be noisier.
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
# By stage, the calls that let go of the lock.
CALLS = {
    "reading": [(np, "fromfile")],
    "decoding": [(simplejpeg, "decode_jpeg"), (cv2, "imdecode")],
    "blocks": [(cv2, "resize")],
    "warp": [(cv2, "warpAffine"), (cv2, "copyMakeBorder"), (cv2, "cvtColor")],
    "look-up": [(cv2, "LUT")],
}
CORES = (8, 16, 64)


def main() -> None:
    """Measures, prints a line a stage and what follows for more cores, and last the two sums."""
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
        print(f"{stage}: {milliseconds:.3f} ms an image")
    under = of_image.pop("under the lock")
    outside = sum(of_image.values())
    for cores in CORES:
        threads, processes = predict_rates(under, outside, cores)
        print(f"{cores} cores, by arithmetic: at most {threads:.0f} images/s by threads, {processes:.0f} by processes")
    print(under, outside)


def make_epoch(batches: ImageBatches, epoch: int) -> None:
    """Makes all batches of an epoch."""
    batches.epoch = epoch
    for index in range(batches.steps):
        batches[index]


def time_call(call: Callable, stage: str, spent: dict[str, float], calls: list[str]) -> Callable:
    """Returns a call that adds the time it takes of its thread to a stage's, and the stage to the list of calls."""

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.thread_time()
        try:
            return call(*arguments, **options)
        finally:
            spent[stage] += time.thread_time() - start
            calls.append(stage)

    return timed


def measure_cost(number: int = 10_000) -> float:
    """Returns the seconds that timing a call takes beside the call."""
    spent: dict[str, float] = defaultdict(float)
    timed = time_call(lambda: None, "", spent, [])
    start = time.thread_time()
    for _ in range(number):
        timed()
    return (time.thread_time() - start - spent[""]) / number


def predict_rates(under: float, outside: float, cores: int) -> tuple[float, float]:
    """Returns the images/s of threads and of processes on so many cores, if memory and disk keep up: arithmetic.

    Threads are bound by the cores, and by the lock, which one of them holds at a time; processes by the cores alone:
    copying an image out of shared memory lets go of the lock.

    Args:
        under: milliseconds of an image under the lock.
        outside: the others.
        cores: one worker each.
    """
    of_cores = 1000 * cores / (under + outside)
    return min(of_cores, 1000 / under), of_cores


if __name__ == "__main__":
    main()
