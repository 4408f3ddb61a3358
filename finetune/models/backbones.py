"""The registry of backbones: how each is built, what input it takes, and which layer Grad-CAM reads.

To add one, write a function from `(height, width)` and whether to load weights to a Keras model, and give it an entry
in `BACKBONES`. Two other sources make their entries when one of theirs is named: KerasHub, and a model file.
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
from finetune.models.backbone_entry import Backbone, Scaling
from finetune.models.heads import BACKBONE
from finetune.models.kerashub import PREFIX, describe_preset, find_hub_backbone
from finetune.models.own_file import find_own_backbone, is_model_file


def build_application(name: str, image_size: tuple[int, int], use_imagenet_weights: bool) -> keras.Model:
    """Builds one of `keras.applications` without its top.

    Raises:
        UserError: its ImageNet weights cannot be had.
    """
    with _explaining_missing_weights(name), _drawing_bars_in_terminals(), _finding_stored_weights():
        return getattr(keras.applications, name)(
            include_top=False,
            weights="imagenet" if use_imagenet_weights else None,
            input_shape=(*image_size, 3),
        )


def _list_applications(
    names: Sequence[str], sizes: Sequence[int], minimum_size: int, preprocessing: str | None, last_layer: str
) -> dict[str, Backbone]:
    """Returns the entries of a family; it has one input size, or one for each name."""
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
# Per channel of the backbone's input: `scale * pixel + offset`, where Keras computes `(pixel / 255 - mean) / std`
# (torch), `pixel / 127.5 - 1` (tf) or, with the channels turned to BGR, `pixel - mean` (caffe).
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
        scaling: as `backbone_preprocessing` has it; for Keras's own it is of no account.
        option: that names it, for errors.

    Raises:
        UserError: there is no such backbone, or its input scaling is not known.
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
            f"backbone_preprocessing: expected the input scaling of {name}, which does not say it: "
            f"{', '.join(SCALINGS)}, or a scale and an offset. Received: nothing."
        )
    return entry


def describe_source(name: str) -> str:
    """Returns where the weights of a backbone come from and what is known of their licence; nothing for Keras's own."""
    if name.startswith(PREFIX):
        return describe_preset(name.removeprefix(PREFIX))
    return f"a model file, {os.path.basename(name)}, under terms that its owner knows" if is_model_file(name) else ""


def build_preprocessing(mode: Scaling) -> keras.Layer:
    """Builds the layer `preprocessing`, from raw RGB in `[0, 255]` to what a backbone takes.

    Args:
        mode: as `Backbone.preprocessing` has it.
    """
    if mode is None or isinstance(mode, tuple):
        return layers.Rescaling(*(mode or (1.0, 0.0)), name="preprocessing")
    scale, offset = AFFINE_PREPROCESSING[mode]
    if mode != "caffe":
        return layers.Rescaling(scale.tolist(), offset.tolist(), name="preprocessing")
    # Turning RGB to BGR is a permutation of channels: one fixed 1x1 convolution says it together with the means.
    layer = layers.Conv2D(3, 1, trainable=False, name="preprocessing")
    layer.build((None, None, None, 3))
    layer.set_weights([np.eye(3)[::-1][None, None] * scale, offset])
    return layer


def build_backbone(
    name: str, entry: Backbone, image_size: Sequence[int], use_imagenet_weights: bool, pop_layers: int
) -> keras.Model:
    """Builds the model `backbone`, from preprocessed images to a feature map `(batch, h, w, channels)`.

    Args:
        name: of the backbone.
        entry: its entry.
        image_size: `(height, width)`.
        use_imagenet_weights: False starts from random ones.
        pop_layers: layers dropped from its end.

    Raises:
        UserError: the weights cannot be had, or too many layers are dropped.
    """
    application = entry.build(tuple(image_size), use_imagenet_weights)
    # Some layers of keras.applications are numbered by the order of building.
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
            f"'{application.layers[-1 - pop_layers].name}', which is no feature map. Choose {maps[-1]}."
        )
    return keras.Model(application.input, application.layers[-1 - pop_layers].output, name=BACKBONE)


def _is_feature_map(output: keras.KerasTensor, last: keras.KerasTensor) -> bool:
    """Tells feature maps from the pooled vectors inside attention blocks, which have less height and width."""
    return len(output.shape) == 4 and output.shape[1] >= last.shape[1] and output.shape[2] >= last.shape[2]


@contextlib.contextmanager
def _drawing_bars_in_terminals() -> Iterator[None]:
    """Keeps the bar of Keras's downloads out of files and pipes, where it would be thousands of lines in one."""
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
    """Makes Keras use weights from a folder that it cannot write: it would ask the network for them."""
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
    """Turns Keras's failed download into the file that is missing and what to do."""
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"The ImageNet weights of {name} cannot be read: you have no permission for {error.filename or 'the file'} "
            f"in {_locate_weights()}. Change its permissions, or name another folder by KERAS_HOME."
        ) from error
    except Exception as error:  # Keras raises a bare Exception where an address cannot be reached
        unreachable = re.search(r"URL fetch failure on (\S+): ", str(error))
        broken_off = isinstance(error, OSError | http.client.HTTPException) or "corrupted file" in str(error)
        if not unreachable and not broken_off:
            raise
        folder = _locate_weights()
        file_name = unreachable.group(1).rsplit("/", 1)[-1] if unreachable else f"of {name}"
        # Keras stores this family's files under another spelling than it downloads them.
        if file_name.startswith("NASNet-"):
            file_name = file_name.replace("NASNet-", "nasnet_").replace("-", "_")
        whole, address = ("", f" Its address: {unreachable.group(1)}") if unreachable else (f" whole ({error})", "")
        raise UserError(
            f"The ImageNet weights {file_name} are not in {folder} and could not be downloaded{whole}. "
            f"Put the file there, choose another backbone, or do without: --use_imagenet_weights False.{address}"
        ) from error
