"""A peer of the recipes: a plain Keras script, as Keras's guides to transfer learning and fine-tuning teach it.

python benchmarks/plain_keras.py train FOLDER      writes best_model.keras
python benchmarks/plain_keras.py predict FOLDER    writes probabilities.npy, of the test photos

FOLDER holds task.json from recipes.py. The head trains on the frozen backbone, then everything trains at a low learning
rate, with frozen batch normalisation. The epoch with the best validation accuracy (several labels: AUC) is kept. The
batch size is that of train.py: with the guides' 32 there would be half as many steps.

Source: https://keras.io/guides/transfer_learning.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

STARTED = time.monotonic()
BATCH_SIZE = 16
# Epochs, Adam's learning rate, and whether the backbone learns.
PHASES = ((3, 1e-3, False), (5, 1e-5, True))


def main() -> None:
    """Trains, or predicts the test photos."""
    # TensorFlow's notices would bury the lines that matter.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    action, folder = sys.argv[1:]
    task = json.loads(Path(folder, "task.json").read_text(encoding="utf-8"))
    {"train": train, "predict": predict}[action](folder, task)


def train(folder: str, task: dict[str, Any]) -> None:
    """Trains the phases, or until the budget is spent, and keeps the best epoch's model."""
    import keras

    keras.utils.set_random_seed(task["seed"])
    training, validation = load(task, "training"), load(task, "validation")
    model, backbone = build(task)
    if task["multi_label"]:
        loss, metric = "binary_crossentropy", keras.metrics.AUC(multi_label=True, name="auc")
    else:
        loss, metric = "sparse_categorical_crossentropy", keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    # One for both phases: the second must beat the best of the first.
    keeper = keras.callbacks.ModelCheckpoint(
        f"{folder}/best_model.keras", monitor=f"val_{metric.name}", mode="max", save_best_only=True
    )
    for epochs, learning_rate, trains_backbone in PHASES:
        backbone.trainable = trains_backbone
        model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=[metric])
        callbacks = [keeper, keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: stop_in_time(model, task))]
        model.fit(training, validation_data=validation, epochs=epochs, callbacks=callbacks, verbose=2)
        if model.stop_training:
            break


def stop_in_time(model: keras.Model, task: dict[str, Any]) -> None:
    """Ends training once the budget is spent, counted from the start of this process."""
    if time.monotonic() - STARTED >= task["budget"]:
        model.stop_training = True


def load(task: dict[str, Any], name: str) -> tf.data.Dataset:
    """Returns batches of a set's photos, float32 RGB from 0 to 255, and labels; the training set is shuffled."""
    import tensorflow as tf

    def read(path: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return tf.image.resize(image, (task["image_size"], task["image_size"])), label

    photos = task["sets"][name]
    dataset = tf.data.Dataset.from_tensor_slices((photos["paths"], photos["labels"]))
    dataset = dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE).cache()
    if name == "training":
        dataset = dataset.shuffle(len(photos["paths"]), task["seed"])
    return dataset.batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE)


def build(task: dict[str, Any]) -> tuple[keras.Model, keras.Model]:
    """Returns the model, and the backbone in it."""
    import keras
    from keras import layers

    constructor = getattr(keras.applications, task["backbone"])
    preprocess = sys.modules[constructor.__module__].preprocess_input
    shape = (task["image_size"], task["image_size"], 3)
    backbone = constructor(weights="imagenet", include_top=False, input_shape=shape)
    inputs = keras.Input(shape)
    outputs = layers.RandomFlip("horizontal")(inputs)
    outputs = layers.RandomRotation(0.1)(outputs)
    # Batch normalisation stays in inference mode when the backbone is unfrozen.
    outputs = backbone(preprocess(outputs), training=False)
    outputs = layers.GlobalAveragePooling2D()(outputs)
    outputs = layers.Dropout(0.2)(outputs)
    activation = "sigmoid" if task["multi_label"] else "softmax"
    return keras.Model(inputs, layers.Dense(task["classes"], activation)(outputs)), backbone


def predict(folder: str, task: dict[str, Any]) -> None:
    """Writes the probabilities of the test photos, float32 `(photos, classes)`."""
    import keras

    model = keras.models.load_model(f"{folder}/best_model.keras")
    np.save(f"{folder}/probabilities.npy", model.predict(load(task, "test"), verbose=0))


if __name__ == "__main__":
    main()
