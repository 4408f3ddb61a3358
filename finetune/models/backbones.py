"""The registry of backbones: how to build each, its input, and the layer that Grad-CAM reads.

To add one, write a function that takes `(height, width)` and whether to load weights and returns a Keras model, and add
it to `BACKBONES`. `find_backbone` also finds KerasHub's presets and model files, whose entries are made on demand.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers
from keras.src.utils import file_utils

from finetune.core.arguments import look_up
from finetune.core.options import UserError
from finetune.core.texts import draws_bars
from finetune.core.values import SCALINGS, read_scaling
from finetune.models.backbone_entry import Backbone, Scaling, find_own_backbone, is_model_file
from finetune.models.heads import BACKBONE, has_parts
from finetune.models.kerashub import PREFIX, TRANSFORMER_BLOCKS, describe_preset, find_hub_backbone


def build_application(name: str, image_size: tuple[int, int], use_imagenet_weights: bool) -> keras.Model:
    """Builds one of `keras.applications` without its top; raises UserError if its ImageNet weights are missing."""
    with _explaining_missing_weights(name), _drawing_bars_in_terminals(), _finding_stored_weights():
        return getattr(keras.applications, name)(
            include_top=False,
            weights="imagenet" if use_imagenet_weights else None,
            input_shape=(*image_size, 3),
        )


def _list_applications(
    names: Sequence[str], sizes: Sequence[int], minimum_size: int, preprocessing: str | None, last_layer: str
) -> dict[str, Backbone]:
    """Returns the entries of a family with one input size for all, or one each."""
    sizes = sizes if len(sizes) == len(names) else [*sizes] * len(names)
    return {
        name: Backbone(functools.partial(build_application, name), size, minimum_size, preprocessing, last_layer)
        for name, size in zip(names, sizes, strict=True)
    }


BACKBONES: dict[str, Backbone] = {
    **_list_applications(("VGG16", "VGG19"), [224], 32, "caffe", "block5_pool"),
    **_list_applications(("DenseNet121", "DenseNet169", "DenseNet201"), [224], 32, "torch", "relu"),
    **_list_applications(("Xception",), [299], 71, "tf", "block14_sepconv2_act"),
    **_list_applications(("ResNet50", "ResNet101", "ResNet152"), [224], 32, "caffe", "conv5_block3_out"),
    **_list_applications(("ResNet50V2", "ResNet101V2", "ResNet152V2"), [224], 32, "tf", "post_relu"),
    **_list_applications(("InceptionV3",), [299], 75, "tf", "mixed10"),
    **_list_applications(("InceptionResNetV2",), [299], 75, "tf", "conv_7b_ac"),
    **_list_applications(("NASNetMobile", "NASNetLarge"), [224, 331], 32, "tf", "last_activation"),
    **_list_applications(("MobileNet",), [224], 32, "tf", "conv_pw_13_relu"),
    **_list_applications(("MobileNetV2",), [224], 32, "tf", "out_relu"),
    **_list_applications(("MobileNetV3Small", "MobileNetV3Large"), [224], 32, None, "last_activation"),
    **_list_applications(
        [f"EfficientNetB{step}" for step in range(8)],
        [224, 240, 260, 300, 380, 456, 528, 600],
        *(32, None, "top_activation"),
    ),
    **_list_applications(
        [f"EfficientNetV2{variant}" for variant in ("B0", "B1", "B2", "B3", "S", "M", "L")],
        [224, 240, 260, 300, 384, 480, 480],
        *(32, None, "top_activation"),
    ),
    **_list_applications(
        [f"ConvNeXt{variant}" for variant in ("Tiny", "Small", "Base", "Large", "XLarge")],
        [224],
        *(32, None, "last_normalization"),
    ),
}
# Scale and offset per channel. Keras computes `(pixel / 255 - mean) / std` (torch), `pixel / 127.5 - 1` (tf) or, with
# the channels reversed to BGR, `pixel - mean` (caffe).
_TORCH_MEAN, _TORCH_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
AFFINE_PREPROCESSING = {
    "torch": (1 / (255 * _TORCH_STD), -_TORCH_MEAN / _TORCH_STD),
    "tf": (np.full(3, 1 / 127.5), np.full(3, -1.0)),
    "caffe": (np.ones(3), -np.array([103.939, 116.779, 123.68])),
}


def find_backbone(name: str, scaling: Sequence[str] = (), option: str = "visual_model_name") -> Backbone:
    """Returns the entry of a backbone: of Keras, of KerasHub, or in a model file.

    Args:
        name: a key of `BACKBONES`, `kerashub:` and a preset or its folder, or the path of a model file.
        scaling: the option `backbone_preprocessing`, which Keras's own backbones ignore.
        option: the option with the name, for errors.

    Raises:
        UserError: there is no such backbone, or its input scaling is unknown.
    """
    sources = [(is_model_file, find_own_backbone), (lambda name: name.startswith(PREFIX), find_hub_backbone)]
    find = next((find for is_its, find in sources if isinstance(name, str) and is_its(name)), None)
    if find is None:
        return look_up(BACKBONES, option, name)
    entry = find(name, option)
    if scaling:
        mode = read_scaling(scaling)
        entry = entry._replace(preprocessing=None if mode == "none" else mode)
    if entry.preprocessing == "":
        raise UserError(
            f"backbone_preprocessing: expected the input scaling of {name}, which has none of its own: "
            f"{', '.join(SCALINGS)}, or a scale and an offset. Received: nothing."
        )
    return entry


def describe_source(name: str) -> str:
    """Returns the source and the licence of a backbone's weights, as far as known; empty for Keras's own."""
    if name.startswith(PREFIX):
        return describe_preset(name.removeprefix(PREFIX))
    return f"a model file, {os.path.basename(name)}, under its owner's terms" if is_model_file(name) else ""


def build_preprocessing(mode: Scaling) -> keras.Layer:
    """Builds the layer `preprocessing` for raw RGB in `[0, 255]` from the mode in `Backbone.preprocessing`."""
    if mode is None or isinstance(mode, tuple):
        return layers.Rescaling(*(mode or (1.0, 0.0)), name="preprocessing")
    scale, offset = AFFINE_PREPROCESSING[mode]
    if mode != "caffe":
        return layers.Rescaling(scale.tolist(), offset.tolist(), name="preprocessing")
    # A fixed 1x1 convolution reverses the channels and subtracts the means.
    layer = layers.Conv2D(3, 1, trainable=False, name="preprocessing")
    layer.build((None, None, None, 3))
    layer.set_weights([np.eye(3)[::-1][None, None] * scale, offset])
    return layer


def build_backbone(
    name: str,
    image_size: Sequence[int],
    use_imagenet_weights: bool,
    pop_layers: int,
    entry: Backbone | None = None,
) -> keras.Model:
    """Builds the model `backbone`, from preprocessed images to a feature map `(batch, h, w, channels)`.

    Args:
        name: of the backbone.
        image_size: `(height, width)`.
        use_imagenet_weights: False starts from random weights.
        pop_layers: layers to drop from its end.
        entry: of the backbone; by default the one that `find_backbone` finds.

    Raises:
        UserError: the weights are missing, or `pop_layers` is too large or leaves no feature map.
    """
    entry = entry or find_backbone(name)
    application = entry.build(tuple(image_size), use_imagenet_weights)
    # Keras numbers some names by the order of building.
    application.layers[-1].name = entry.last_layer
    if pop_layers >= len(application.layers) - 1:
        raise UserError(
            f"pop_conv_layers: {name} has {len(application.layers) - 1} layers after its input. "
            f"Received: {pop_layers}. Choose a smaller number."
        )
    maps = [n for n in range(pop_layers + 1) if _is_feature_map(application.layers[-1 - n].output, application.output)]
    if maps[-1] != pop_layers:
        raise UserError(
            f"pop_conv_layers: without its last {pop_layers} layers, {name} ends in "
            f"'{application.layers[-1 - pop_layers].name}', which is not a feature map. Choose {maps[-1]}."
        )
    return keras.Model(application.input, application.layers[-1 - pop_layers].output, name=BACKBONE)


def _is_feature_map(output: keras.KerasTensor, last: keras.KerasTensor) -> bool:
    """Returns whether an output is a feature map, and not a pooled vector inside an attention block."""
    return len(output.shape) == 4 and output.shape[1] >= last.shape[1] and output.shape[2] >= last.shape[2]


@contextlib.contextmanager
def _drawing_bars_in_terminals() -> Iterator[None]:
    """Hides Keras's progress bars in files and pipes, which would hold thousands of bars in one line."""
    is_drawn = draws_bars(sys.stdout) or not keras.config.is_interactive_logging_enabled()
    if is_drawn:
        yield
        return
    keras.config.disable_interactive_logging()
    try:
        yield
    finally:
        keras.config.enable_interactive_logging()


def _locate_weights() -> str:
    """Returns the folder of Keras's ImageNet weights."""
    return os.path.join(os.path.expanduser(os.environ.get("KERAS_HOME") or "~/.keras"), "models")


@contextlib.contextmanager
def _finding_stored_weights() -> Iterator[None]:
    """Makes Keras use stored weights in a read-only folder; it would download them again."""
    get_file = file_utils.get_file

    def find_file(fname: str, origin: str, **options: Any) -> str:
        path = os.path.join(_locate_weights(), fname)
        digest = options.get("file_hash")
        if os.path.isfile(path) and (digest is None or file_utils.validate_file(path, digest)):
            return path
        return get_file(fname, origin, **options)

    file_utils.get_file = find_file
    try:
        yield
    finally:
        file_utils.get_file = get_file


@contextlib.contextmanager
def _explaining_missing_weights(name: str) -> Iterator[None]:
    """Turns a failed download by Keras into an error that names the missing file and says what to do."""
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"The ImageNet weights of {name} cannot be read: no permission for {error.filename or 'the file'} "
            f"in {_locate_weights()}. Change its permissions, or set KERAS_HOME to another folder."
        ) from error
    except Exception as error:  # Keras raises a bare Exception for an unreachable address
        unreachable = re.search(r"URL fetch failure on (\S+): ", str(error))
        broken_off = isinstance(error, OSError | http.client.HTTPException) or "corrupted file" in str(error)
        if not unreachable and not broken_off:
            raise
        folder = _locate_weights()
        file_name = unreachable.group(1).rsplit("/", 1)[-1] if unreachable else f"of {name}"
        # Keras stores this family's files under other names than it downloads.
        if file_name.startswith("NASNet-"):
            file_name = file_name.replace("NASNet-", "nasnet_").replace("-", "_")
        reason, address = ("", f" Its address: {unreachable.group(1)}") if unreachable else (f": {error}", "")
        raise UserError(
            f"The ImageNet weights {file_name} are not in {folder} and could not be downloaded{reason}. "
            f"Put the file there, choose another backbone, or set --use_imagenet_weights False.{address}"
        ) from error


CONVOLUTIONS = (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)


def prepare_backbone(
    backbone: keras.Model,
    conv_layers_to_train: int,
    batch_norm_momentum: float | None,
    freeze_batch_norm: bool = False,
) -> None:
    """Prepares a backbone for training: see `freeze_layers` and `set_batch_norm_momentum`."""
    # Keras only passes changes on to the layers.
    backbone.trainable = False
    backbone.trainable = True
    freeze_layers(backbone, conv_layers_to_train)
    set_batch_norm_momentum(backbone, batch_norm_momentum)
    if freeze_batch_norm:
        for layer in leaf_layers(backbone):
            layer.trainable = layer.trainable and not isinstance(layer, layers.BatchNormalization)


def has_fixed_features(model: keras.Model) -> bool:
    """Returns whether an image always has the same features: all before the head is frozen, without dropout."""
    if not has_parts(model):
        return False
    before = model.layers[:-1]
    # Freezing does not stop dropout, nor the layers that drop whole paths, which have various names.
    drops = [part for layer in before for part in [layer, *_walk(layer)] if "Drop" in type(part).__name__]
    is_random = any(getattr(part, rate, 0) for part in drops for rate in ("rate", "drop_prob"))
    return not is_random and not any(layer.trainable_variables for layer in before)


def freeze_layers(backbone: keras.Model, conv_layers_to_train: int) -> None:
    """Freezes a backbone before the n-th convolution, or transformer block, from its end.

    Frozen batch normalisation runs in inference mode.

    Args:
        backbone: changed in place.
        conv_layers_to_train: -1 freezes nothing, 0 everything.

    Raises:
        UserError: there are fewer convolutions or blocks.
    """
    if conv_layers_to_train < 0:
        return
    units, word = list_units(backbone)
    if conv_layers_to_train > len(units):
        raise UserError(
            f"conv_layers_to_train: the backbone has {len(units)} {word}. "
            f"Received: {conv_layers_to_train}. Choose -1 to train them all."
        )
    _freeze_before(backbone, units[-conv_layers_to_train] if conv_layers_to_train else None)


def list_units(backbone: keras.Model) -> tuple[list[keras.Layer], str]:
    """Returns the layers that partial freezing counts, in order, and their name: blocks or convolutions."""
    blocks = [layer for layer in _walk(backbone) if type(layer).__name__ in TRANSFORMER_BLOCKS]
    convolutions = [layer for layer in leaf_layers(backbone) if isinstance(layer, CONVOLUTIONS)]
    return (blocks, "transformer blocks") if blocks else (convolutions, "convolutions")


def _freeze_before(part: keras.Layer, first: keras.Layer | None) -> bool:
    """Freezes all inner layers before `first`, or the whole layer without it; returns whether it contains `first`."""
    if part is first:
        return True
    found = first in [*_walk(part)]
    if not found:
        part.trainable = False
    return found and any(_freeze_before(layer, first) for layer in _list_inner(part))


def _list_inner(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the layers that a layer is made of, in order."""
    if isinstance(layer, keras.Model):
        return layer.layers
    return list(layer._flatten_layers(include_self=False, recursive=False))


def _walk(layer: keras.Layer) -> Iterator[keras.Layer]:
    """Yields the layers within a layer, each before its own inner layers."""
    for inner in _list_inner(layer):
        yield inner
        yield from _walk(inner)


def leaf_layers(model: keras.Model) -> list[keras.Layer]:
    """Returns a model's layers in order, with nested models and layers replaced by their inner layers."""
    return [layer for layer in _walk(model) if not _list_inner(layer)]


def set_batch_norm_momentum(backbone: keras.Model, momentum: float | None) -> None:
    """Sets the momentum of the moving statistics; None keeps the backbone's.

    The backbones' momentum suits the thousands of steps of an ImageNet epoch. On a few hundred images, the statistics
    would lag behind the weights for tens of epochs.
    """
    if momentum is None:
        return
    for layer in leaf_layers(backbone):
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = momentum
