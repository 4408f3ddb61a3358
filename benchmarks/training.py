"""Measures what training and Grad-CAM cost in addition to the network: MobileNet at 224x224, random weights.

On a GPU, larger networks show how many images it consumes: its appetite.

python benchmarks/training.py IMAGES    prints the peak memory of draw_activations.py in MiB on that many images
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from finetune.training.checkpoints import Checkpoint

EPOCHS, STEPS = 4, 24
# Backbones in mixed precision and their batch size, on a GPU.
APPETITES, GPU_BATCH = ("DenseNet121", "ResNet50"), 64


def measure_checkpoint_cost(images: str) -> dict[str, float]:
    """Trains, and measures the share of each epoch that checkpoints take.

    Every epoch also writes the best model, the costlier case. The first epoch, which builds the graph, does not count.

    Args:
        images: a folder with one folder per class.

    Returns:
        Medians over the epochs: `epoch_s`, `checkpoint_s`, and `share`, their ratio.
    """
    import make_csv_from_folders
    import split_train_test
    import train
    from configs import Configs

    spent, ends = [], []
    original = Checkpoint.on_epoch_end

    def timed(checkpoint: Checkpoint, epoch: int, logs: dict[str, float]) -> None:
        start = time.perf_counter()
        original(checkpoint, epoch, logs | {checkpoint.selection.monitor: float(epoch)})
        ends.append(time.perf_counter())
        spent.append(ends[-1] - start)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Checkpoint, "on_epoch_end", timed):
        table = f"{folder}/all_data.csv"
        make_csv_from_folders.main(make_csv_from_folders.FolderConfigs(folder_path=images, write_path=table))
        split_train_test.main(split_train_test.SplitConfigs(csv_path=table))
        configs = Configs(
            train_csv=f"{folder}/training_set.csv",
            test_csv=f"{folder}/testing_set.csv",
            visual_model_name="MobileNet",
            use_imagenet_weights=False,
            num_epochs=EPOCHS,
            show_model_summary=False,
            save_model_path=f"{folder}/saved_model",
        )
        train.main(configs.validate())
    epochs, spent = np.diff(ends), np.array(spent[1:])
    return {
        "epoch_s": float(np.median(epochs)),
        "checkpoint_s": float(np.median(spent)),
        "share": float(np.median(spent / epochs)),
    }


def build_model(backbone: str = "MobileNet", mixed_precision: bool = False) -> object:
    """Returns a model of two classes with random weights."""
    from configs import Configs
    from finetune.core.devices import keep_freed_memory
    from model import ModelFactory

    keep_freed_memory()
    options = {"visual_model_name": backbone, "mixed_precision": mixed_precision, "use_imagenet_weights": False}
    return ModelFactory().get_model(Configs(**options, classes=["a", "b"]))


def measure_appetites(paths: list[str]) -> dict[str, dict[str, float]]:
    """Returns `measure_fit` of each backbone in mixed precision; nothing without a GPU."""
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return {}
    return {name: measure_fit(paths, name, True, GPU_BATCH, os.cpu_count()) for name in APPETITES}


def measure_fit(
    paths: list[str], backbone: str = "MobileNet", mixed_precision: bool = False, batch: int = 16, workers: int = 4
) -> dict[str, float]:
    """Returns images/s of training on files and on one batch in memory, and the median ratio of neighbouring runs."""
    import keras
    import tensorflow as tf

    from augmenter import build_augmenter
    from configs import Configs
    from finetune.training.callbacks import InputWait
    from finetune.training.trainer import Interruption, get_training_model
    from generator import AugmentedImageSequence, Shares

    network = build_model(backbone, mixed_precision)
    model = get_training_model(network, Configs(), keras.losses.sparse_categorical_crossentropy)
    interruption = Interruption()
    paths = (paths * (STEPS * batch // len(paths) + 1))[: STEPS * batch]
    labels = np.arange(len(paths), dtype=np.int32) % 2
    options = {"augmenter": build_augmenter(), "shuffle": True, "workers": workers, "shares": Shares()}
    sequence = AugmentedImageSequence(paths, labels, (224, 224), batch, **options)
    files, wait = sequence.to_dataset(), InputWait()
    in_memory = tf.data.Dataset.from_tensors(sequence.get_shares(0)).repeat(STEPS)
    model.fit(files, 1, 0, [], interruption)
    rates, waits = [], []
    for _ in range(3):
        pair = []
        for data, callbacks in ((files, [wait]), (in_memory, [])):
            start = time.perf_counter()
            model.fit(data, 1, 0, callbacks, interruption)
            pair.append(len(paths) / (time.perf_counter() - start))
        rates.append(pair)
        waits.append(wait.share)
    on_files, in_memory_rate = np.median(rates, axis=0)
    ratio = float(np.median([first / second for first, second in rates]))
    return {
        "files": float(on_files),
        "memory": float(in_memory_rate),
        "ratio": ratio,
        "input_wait": float(np.median(waits)),
    }


def measure_grad_cam() -> dict[str, float]:
    """Returns images/s of Grad-CAM, of `predict`, and of Grad-CAM that builds a gradient model for each image."""
    import keras
    import tensorflow as tf

    from finetune.evaluation.gradcam import GradCam

    model = build_model()
    images = np.random.default_rng(0).integers(0, 256, (128, 224, 224, 3), np.uint8)
    grad_cam = GradCam(model)

    def batched() -> int:
        for start in range(0, len(images), 16):
            grad_cam(images[start : start + 16])
        return len(images)

    def predict() -> int:
        model.predict(images, batch_size=16, verbose=0)
        return len(images)

    def rebuilt_per_image() -> int:
        for image in images[:4]:
            backbone, head = model.get_layer("backbone"), model.get_layer("classifier")
            features = keras.Model(model.inputs, backbone(model.get_layer("preprocessing")(model.inputs[0])))
            with tf.GradientTape() as tape:
                maps = features(image[None])
                tape.watch(maps)
                score = tf.reduce_max(head(maps))
            weights = tf.reduce_mean(tape.gradient(score, maps), axis=(1, 2), keepdims=True)
            tf.nn.relu(tf.reduce_sum(weights * maps, axis=-1)).numpy()
        return 4

    rates = {function.__name__: [] for function in (batched, predict, rebuilt_per_image)}
    for repeat in range(6):
        for function in (batched, predict, rebuilt_per_image):
            start = time.perf_counter()
            number = function()
            if repeat:  # the first traces the graphs
                rates[function.__name__].append(number / (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in rates.items()}


def measure_memory_of_drawing(number: int) -> float:
    """Draws Grad-CAM of `number` photos of 640x480; returns this process's peak memory in MiB."""
    import photos
    import tables

    import draw_activations
    from configs import Configs

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        photos.generate_photos(f"{folder}/photos")
        files = sorted(Path(folder, "photos").glob("*/*"))
        with open(f"{folder}/photos.csv", "w", encoding="utf-8") as table:
            table.write("path,class\n")
            for row in range(number):
                os.link(files[row % len(files)], f"{folder}/{row:05d}.jpg")
                table.write(f"{folder}/{row:05d}.jpg,{'ab'[row % 2]}\n")
        build_model().save(f"{folder}/best_model.keras")
        tables_of_run = {
            "train_csv": f"{folder}/photos.csv",
            "test_csv": f"{folder}/photos.csv",
            "save_model_path": folder,
        }
        draw_activations.main(Configs(**tables_of_run, visual_model_name="MobileNet").validate())
    return tables.largest_memory()


if __name__ == "__main__":
    print(measure_memory_of_drawing(int(sys.argv[1])))
