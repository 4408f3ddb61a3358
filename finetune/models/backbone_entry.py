"""An entry of the registry of backbones, whatever its source, and that of a model file of one's own."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras

from finetune.core.options import UserError
from finetune.models.formats import MODEL_SUFFIXES
from finetune.models.model_files import load_model

# Name of the last layer of backbones that do not come from Keras.
LAST_LAYER = "features"
Scaling = str | tuple[float | list[float], float | list[float]] | None


class Backbone(NamedTuple):
    """An entry of the registry.

    Attributes:
        build: from `(height, width)` and whether to load pretrained weights to a model without a head, whose last
            layer gives a feature map `(batch, h, w, channels)`. What raises UserError here is shown as it is.
        input_size: height and width that its pretrained weights were trained at.
        minimum_size: the smallest height and width that it takes.
        preprocessing: how its input is scaled: `torch`, `tf` or `caffe`, as Keras calls them, or a scale and an offset
            for RGB in `[0, 255]`, each one number or one a channel; None if the backbone does so itself.
        last_layer: the name that its last spatial layer gets, which Grad-CAM reads.
        size_multiple: heights and widths are multiples of this.
        is_square: it takes square images only.
        takes_any_size: built for one size, it can be trained at another.
    """

    build: Callable[[tuple[int, int], bool], keras.Model]
    input_size: int
    minimum_size: int
    preprocessing: Scaling
    last_layer: str
    size_multiple: int = 1
    is_square: bool = False
    takes_any_size: bool = True

    def check_size(self, name: str, option: str, shown: Sequence[int], size: tuple[int, int]) -> None:
        """Raises UserError if a backbone does not take images of a size.

        Args:
            name: of the backbone.
            option: that gives the size.
            shown: its height and width.
            size: the `(height, width)` that the backbone sees, smaller if the model halves its images first.
        """
        wrong = ""
        if min(size) < self.minimum_size:
            wrong = f"at least {self.minimum_size} pixels a side"
        elif any(side % self.size_multiple for side in size):
            wrong = f"a height and a width that are multiples of {self.size_multiple}, its patches"
        elif self.is_square and size[0] != size[1]:
            wrong = "square images"
        if wrong:
            smaller = "" if tuple(shown) == size else f", {size[0]}x{size[1]} after downscaling"
            advice = "Enlarge it." if min(size) < self.minimum_size else f"Set {option} to {self._advise(size)}."
            raise UserError(f"{option}: {name} needs {wrong}. Received: {shown[0]}x{shown[1]}{smaller}. {advice}")

    def _advise(self, size: tuple[int, int]) -> str:
        """Returns the nearest size that the backbone takes."""
        sides = [max(round(side / self.size_multiple), 1) * self.size_multiple for side in size]
        height, width = [min(sides)] * 2 if self.is_square else sides
        return f"{height} {width}"


def build_at_size(network: keras.Model, image_size: tuple[int, int], has_weights: bool = True) -> keras.Model:
    """Returns a network of the same layers and weights for images of one size, in the precision of now.

    Args:
        network: a graph of layers, from RGB `(batch, height, width, 3)`.
        image_size: `(height, width)`.
        has_weights: False draws new ones.

    Raises:
        ValueError: it takes images of another size only.
    """
    policy = keras.config.dtype_policy().name

    def copy(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if policy != "float32" and "dtype" in config:
            config["dtype"] = policy
        return type(layer).from_config(config)

    inputs = keras.Input((*image_size, 3))
    # A model that was read from a file may have its one input in a list.
    tensors = keras.tree.map_structure(lambda _: inputs, network.input)
    resized = keras.models.clone_model(network, input_tensors=tensors, clone_function=copy)
    if has_weights:
        resized.set_weights(network.get_weights())
    return keras.Model(resized.inputs[0], resized.outputs[0])


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
