"""Small models, and images for them."""

import keras
import numpy as np
from keras import layers

from configs import Configs
from model import (
    ModelFactory,
)


def small_configs(**options) -> Configs:
    fixed = {
        "visual_model_name": "MobileNet",
        "image_target_size": (32, 32, 3),
        "classes": ["a", "b", "c"],
        "use_imagenet_weights": False,
    }
    return Configs(**fixed | options)


def build(**options) -> keras.Model:
    return ModelFactory().get_model(small_configs(**options))


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def flatten_layers(model: keras.Model) -> list[layers.Layer]:
    return [layer for layer in model._flatten_layers(include_self=False) if not hasattr(layer, "layers")]


def build_alive(**options) -> keras.Model:
    model = build(batch_norm_momentum=0.0, **options)
    model(random_images(4, *model.input_shape[1:]), training=True)
    return model
