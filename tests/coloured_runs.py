"""Runs of a model that sees the colour of an image, and predictions with them."""

import os

import keras
import numpy as np
import pandas as pd

import predict
from configs import Configs
from finetune.core.files import write_json
from predict import PredictConfigs

CLASSES = ["blue", "green", "red"]
SIZE = 32
# The mean red, green and blue of the left half, in [0, 255], times these weights are the logits.
WEIGHTS = np.array([[-0.012, -0.004, 0.012], [-0.008, 0.016, -0.012], [0.016, -0.012, -0.004]], np.float32)


def build_run(folder, multi_label):
    """Saves a model that sees the mean colour of an image's left half, and its configs."""
    inputs = keras.Input((SIZE, SIZE, 3))
    colours = keras.layers.GlobalAveragePooling2D()(keras.layers.Cropping2D(((0, 0), (0, SIZE // 2)))(inputs))
    dense = keras.layers.Dense(3, "sigmoid" if multi_label else "softmax", use_bias=False)
    model = keras.Model(inputs, dense(colours))
    dense.set_weights([WEIGHTS])
    os.makedirs(folder)
    model.save(folder / "best_model.keras")
    options = {"classes": CLASSES, "image_target_size": (SIZE, SIZE, 3), "multi_label_classification": multi_label}
    write_json(str(folder / "configs.json"), Configs(**options).to_dict())
    return folder


def run(run_folder, given, **options):
    """Returns the result of `main`, and the table that it wrote."""
    values = {"load_model_path": str(run_folder), "write_path": str(run_folder / "predictions.csv")}
    configs = PredictConfigs(**{**values, "input": str(given), "generator_workers": 2, **options}).validate()
    results = predict.main(configs)
    results["written"] = pd.read_csv(configs.write_path, keep_default_na=False)
    return results
