"""Backbones from a Keras model file of one's own, such as a network pretrained on one's own kind of image."""

from __future__ import annotations

import functools
import os

import keras

from finetune.core.options import UserError
from finetune.models.backbone_entry import LAST_LAYER, Backbone, build_at_size
from finetune.models.formats import MODEL_SUFFIXES
from finetune.models.model_files import load_model

EXPECTED = (
    "a network from RGB images (batch, height, width, 3) to a feature map (batch, h, w, channels), without a head"
)


def is_model_file(name: str) -> bool:
    """Returns whether the name of a backbone is the path of a model file."""
    return name.endswith(MODEL_SUFFIXES)


def find_own_backbone(name: str, option: str) -> Backbone:
    """Returns the entry of a backbone in a model file, without an input scaling: no file states its own.

    Args:
        name: the path of the file.
        option: that names it, for errors.

    Raises:
        UserError: there is no such file, or it holds no backbone.
    """
    if not os.path.isfile(name):
        raise UserError(f"{option}: there is no model file {name}. Name another, or a backbone of docs/options.md.")
    shape = _load(name, option).inputs[0].shape
    fixed = [side for side in shape[1:3] if side]
    return Backbone(
        functools.partial(_build, name, option),
        input_size=fixed[0] if fixed else 224,
        minimum_size=1,
        preprocessing="",
        last_layer=LAST_LAYER,
        takes_any_size=not fixed,
    )


def _load(path: str, option: str) -> keras.Model:
    """Loads a model file that holds a backbone, in safe mode."""
    network = load_model(path)
    ends = [getattr(network, name, None) or [] for name in ("inputs", "outputs")]
    shapes = [tuple(one[0].shape) if len(one) == 1 else () for one in ends]
    if len(shapes[0]) != 4 or shapes[0][-1] != 3 or len(shapes[1]) != 4 or not isinstance(network, keras.Model):
        received = [" and ".join(str(tuple(tensor.shape)) for tensor in one) or "unknown" for one in ends]
        raise UserError(
            f"{option}: {path} is no backbone. Expected {EXPECTED}. Received: input {received[0]}, output "
            f"{received[1]}. Save its part up to the last feature map: "
            'keras.Model(model.input, model.get_layer("NAME").output).save("backbone.keras").'
        )
    return network


def _build(path: str, option: str, image_size: tuple[int, int], has_weights: bool) -> keras.Model:
    """Builds the network for an image size."""
    network = _load(path, option)
    try:
        return build_at_size(network, image_size, has_weights)
    except Exception as error:  # each layer has its own way of refusing a shape
        raise UserError(
            f"{path} cannot be built for images of {image_size[0]}x{image_size[1]} pixels: its input is "
            f"{tuple(network.inputs[0].shape)}. Set image_target_size to that, or name another backbone."
        ) from error
