"""Backbones, built once each, and images for them."""

from typing import NamedTuple

import keras
import numpy as np
import pytest
from keras import layers

from configs import BACKBONE_NAMES, Configs
from finetune.freezing import freeze_layers
from model import (
    ModelFactory,
)

SLOW_SIZES = {"Xception": (71, 96), "InceptionV3": (107, 139), "InceptionResNetV2": (107, 139)}


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


class Built(NamedTuple):
    name: str
    model: keras.Model
    own_last_name: str
    images: np.ndarray
    probabilities: np.ndarray


@pytest.fixture(scope="module", params=BACKBONE_NAMES)
def built(request):
    own_names = []

    def remember(*args, **kwargs):
        model = application(*args, **kwargs)
        own_names.append(model.layers[-1].name)
        return model

    name = request.param
    application = getattr(keras.applications, name)
    keras.utils.set_random_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.applications, name, remember)
        model = build_alive(visual_model_name=name, image_target_size=(*SLOW_SIZES.get(name, (64, 96)), 3))
    freeze_layers(model.get_layer("backbone"), 3)
    images = random_images(1, *model.input_shape[1:])
    yield Built(name, model, own_names[0], images, np.asarray(model(images, training=False)))
    del model
    keras.backend.clear_session()
