"""Compares the weights of compress_weights.py with the checkpoint of training; one backbone per process.

python benchmarks/compression.py NAME    prints for float32, float16 and int8 how many times smaller the file is, and
                                         how many times faster it loads
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from finetune.models.compressed import custom_load_model, custom_save_model
from finetune.models.formats import WEIGHTS_DTYPES

BACKBONES = ("MobileNet", "DenseNet121", "VGG16")
REPEATS = 5


def write_checkpoint(name: str, folder: str) -> str:
    """Trains a model with random weights for one step of Adam, and returns the path of its checkpoint."""
    from configs import Configs
    from model import ModelFactory

    options = {"visual_model_name": name, "use_imagenet_weights": False, "classes": list("abcde")}
    model = ModelFactory().get_model(Configs(**options))
    images = np.random.default_rng(0).integers(0, 256, (4, *model.input_shape[1:])).astype(np.uint8)
    model.fit(images, np.array([0, 1, 2, 3]), verbose=0)
    path = os.path.join(folder, "checkpoint.keras")
    model.save(path)
    return path


def measure(name: str) -> list[float]:
    """Returns how many times smaller each file is, and how many times faster its best loading is, in turns."""
    import keras

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(name, folder)
        model, smaller = keras.models.load_model(checkpoint), []
        for dtype in WEIGHTS_DTYPES:
            path, _ = custom_save_model(model, folder, dtype, dtype)
            smaller.append(os.path.getsize(checkpoint) / os.path.getsize(path))
        loaders = [lambda: keras.models.load_model(checkpoint)]
        loaders += [lambda dtype=dtype: custom_load_model(folder, dtype) for dtype in WEIGHTS_DTYPES]
        times = []
        for _ in range(REPEATS):
            for load in loaders:
                keras.backend.clear_session()
                start = time.perf_counter()
                load()
                times.append(time.perf_counter() - start)
    first, *others = np.reshape(times, (REPEATS, -1)).min(axis=0)
    return [*smaller, *(first / seconds for seconds in others)]


def main() -> None:
    """Prints one line of values for one backbone."""
    with contextlib.redirect_stdout(io.StringIO()):
        values = measure(sys.argv[1])
    print(*values)


if __name__ == "__main__":
    main()
