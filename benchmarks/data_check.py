"""Compares the data check and strict decoding with OpenCV's decoding alone, on one core.

python benchmarks/data_check.py FOLDER    prints three numbers: full check / decoding alone, files/s of the quick check,
                                          strict decoding / OpenCV's; FOLDER has one folder per class
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
REPEATS = 5


def measure(work: Callable[[], object], number: int) -> float:
    """Returns how many of `number` items are done in a second of processor time."""
    start = time.process_time()
    work()
    return number / (time.process_time() - start)


def main() -> None:
    """Measures in turns, so that a busy machine affects all alike, and prints the medians."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    import cv2

    from configs import MAX_IMAGE_PIXELS
    from finetune.data.images import read_image
    from finetune.data.inspection import inspect_images

    cv2.setNumThreads(1)
    files = sorted(str(path) for path in Path(sys.argv[1]).glob("*/*"))

    def decode() -> None:
        for file in files:
            cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR_RGB)

    def decode_strictly() -> None:
        for file in files:
            read_image(file)

    tasks = {
        "decode": decode,
        "strict": decode_strictly,
        "full": lambda: inspect_images(files, True, MAX_IMAGE_PIXELS, 1),
        "quick": lambda: inspect_images(files, False, MAX_IMAGE_PIXELS, 1),
    }
    # Warm up: fill the page cache and load the libraries.
    for work in tasks.values():
        work()
    rounds = [{name: measure(work, len(files)) for name, work in tasks.items()} for _ in range(REPEATS)]
    medians = {name: float(np.median([rates[name] for rates in rounds])) for name in tasks}
    print(medians["full"] / medians["decode"], medians["quick"], medians["strict"] / medians["decode"])


if __name__ == "__main__":
    main()
