"""The table of backbones, and the factory that builds a classifier on one.

A model takes raw RGB `[0, 255]` of any numeric type at `image_target_size`, or at
`test_image_size` where that is set. By name, its parts are
`[downscaling ->] preprocessing -> backbone -> classifier`: the backbone's own ImageNet preprocessing is inside, so
that no script can get it wrong. Only stock Keras layers: `keras.models.load_model` reads the file anywhere.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers
from keras.src.utils import file_utils

from configs import BACKBONE_NAMES, Configs
from finetune.core.arguments import take_names
from finetune.core.devices import precision_policy
from finetune.core.options import UserError
from finetune.core.texts import draws_bars
from finetune.core.values import get_input_size
from finetune.models.freezing import prepare_backbone
from finetune.models.optimizers import build_optimizer, compile_model


class Backbone(NamedTuple):
    """Facts about one of Keras's applications.

    Attributes:
        input_size: height and width that its ImageNet weights were trained at.
        minimum_size: the smallest height and width that it takes.
        preprocessing: how Keras scales its input: `torch`, `tf` or `caffe`; None where the backbone does so itself.
        last_layer: name of its last spatial layer. Those that Keras numbers by the order of building get this name.
    """

    input_size: int
    minimum_size: int
    preprocessing: str | None
    last_layer: str


LAST_LAYER_OF_FAMILY = {
    "VGG": "block5_pool",
    "DenseNet": "relu",
    "Xception": "block14_sepconv2_act",
    "ResNet": "conv5_block3_out",
    "ResNetV2": "post_relu",
    "InceptionV3": "mixed10",
    "InceptionResNetV2": "conv_7b_ac",
    "NASNet": "last_activation",
    "MobileNet": "conv_pw_13_relu",
    "MobileNetV2": "out_relu",
    "MobileNetV3": "last_activation",
    "EfficientNet": "top_activation",
    "ConvNeXt": "last_normalization",
}
_EFFICIENTNET_SIZES = (224, 240, 260, 300, 380, 456, 528, 600)
_EFFICIENTNET_V2_SIZES = {"B0": 224, "B1": 240, "B2": 260, "B3": 300, "S": 384, "M": 480, "L": 480}


def _family(names: Sequence[str], family: str, preprocessing: str | None, size: int, minimum: int) -> dict:
    return dict.fromkeys(names, Backbone(size, minimum, preprocessing, LAST_LAYER_OF_FAMILY[family]))


BACKBONES: dict[str, Backbone] = {
    **_family(("VGG16", "VGG19"), "VGG", "caffe", 224, 32),
    **_family(("DenseNet121", "DenseNet169", "DenseNet201"), "DenseNet", "torch", 224, 32),
    **_family(("Xception",), "Xception", "tf", 299, 71),
    **_family(("ResNet50", "ResNet101", "ResNet152"), "ResNet", "caffe", 224, 32),
    **_family(("ResNet50V2", "ResNet101V2", "ResNet152V2"), "ResNetV2", "tf", 224, 32),
    **_family(("InceptionV3",), "InceptionV3", "tf", 299, 75),
    **_family(("InceptionResNetV2",), "InceptionResNetV2", "tf", 299, 75),
    **_family(("NASNetMobile",), "NASNet", "tf", 224, 32),
    **_family(("NASNetLarge",), "NASNet", "tf", 331, 32),
    **_family(("MobileNet",), "MobileNet", "tf", 224, 32),
    **_family(("MobileNetV2",), "MobileNetV2", "tf", 224, 32),
    **_family(("MobileNetV3Small", "MobileNetV3Large"), "MobileNetV3", None, 224, 32),
    **{
        f"EfficientNetB{step}": Backbone(size, 32, None, LAST_LAYER_OF_FAMILY["EfficientNet"])
        for step, size in enumerate(_EFFICIENTNET_SIZES)
    },
    **{
        f"EfficientNetV2{variant}": Backbone(size, 32, None, LAST_LAYER_OF_FAMILY["EfficientNet"])
        for variant, size in _EFFICIENTNET_V2_SIZES.items()
    },
    **_family([name for name in BACKBONE_NAMES if name.startswith("ConvNeXt")], "ConvNeXt", None, 224, 32),
}
# Per channel of the backbone's input: `scale * pixel + offset`, where Keras computes `(pixel / 255 - mean) / std`
# (torch), `pixel / 127.5 - 1` (tf) or, with the channels turned to BGR, `pixel - mean` (caffe).
_TORCH_MEAN, _TORCH_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
AFFINE_PREPROCESSING = {
    "torch": (1 / (255 * _TORCH_STD), -_TORCH_MEAN / _TORCH_STD),
    "tf": (np.full(3, 1 / 127.5), np.full(3, -1.0)),
    "caffe": (np.ones(3), -np.array([103.939, 116.779, 123.68])),
}


class ModelFactory:
    """Builds classifiers as the configs describe them."""

    def get_input_size(self, name: str) -> tuple[int, int]:
        """Returns the `(height, width)` that a backbone's ImageNet weights were trained at."""
        Configs.check_values(visual_model_name=name)
        return BACKBONES[name].input_size, BACKBONES[name].input_size

    def get_last_conv_layer(self, name: str) -> str:
        """Returns the name of a backbone's last spatial layer, which Grad-CAM reads."""
        Configs.check_values(visual_model_name=name)
        return BACKBONES[name].last_layer

    def get_model(self, configs: Configs) -> keras.Model:
        """Builds and compiles the classifier.

        Args:
            configs: with `classes` resolved.

        Returns:
            A model from RGB `(batch, height, width, 3)`, `[0, 255]`, to probabilities `(batch, classes)`.

        Raises:
            UserError: the image is too small for the backbone, more layers are to be dropped or trained than there
                are, or the ImageNet weights cannot be had.
        """
        Configs.check(configs)
        take_names(configs.classes, "classes")
        name = configs.visual_model_name
        factor = 2**configs.cnn_downscaling_factor
        # The last one is what the model is built for.
        sizes = {"image_target_size": configs.image_target_size[:2], "test_image_size": get_input_size(configs)}
        for option, (height, width) in sizes.items():
            backbone_size = (math.ceil(height / factor), math.ceil(width / factor))
            if min(backbone_size) < BACKBONES[name].minimum_size:
                raise UserError(
                    f"{option}: {name} takes images from {BACKBONES[name].minimum_size} pixels a side on. Received: "
                    f"{height}x{width}, {backbone_size[0]}x{backbone_size[1]} after downscaling. Enlarge it."
                )
        with precision_policy(configs.mixed_precision):
            backbone = build_backbone(name, backbone_size, configs.use_imagenet_weights, configs.pop_conv_layers)
            classifier = build_classifier(
                len(configs.classes),
                configs.multi_label_classification,
                configs.classifier_layer_sizes,
                configs.final_layer_pooling,
            )
        prepare_backbone(backbone, configs.conv_layers_to_train, configs.batch_norm_momentum)
        inputs = outputs = keras.Input((height, width, 3), name="image")
        if configs.cnn_downscaling_factor:
            outputs = downscale(outputs, configs.cnn_downscaling_factor, configs.cnn_downscaling_filters)
        outputs = build_preprocessing(BACKBONES[name].preprocessing)(outputs)
        model = keras.Model(inputs, classifier(backbone(outputs)), name="image_classifier")
        optimizer = build_optimizer(configs)
        return compile_model(model, optimizer, configs.multi_label_classification)


def build_preprocessing(mode: str | None) -> keras.Layer:
    """Builds the layer `preprocessing`: Keras's `preprocess_input` of a backbone, for raw RGB `[0, 255]`.

    Args:
        mode: `torch`, `tf` or `caffe`; None leaves the pixels to the backbone's own layers.
    """
    if mode is None:
        return layers.Rescaling(1.0, name="preprocessing")
    scale, offset = AFFINE_PREPROCESSING[mode]
    if mode != "caffe":
        return layers.Rescaling(scale.tolist(), offset.tolist(), name="preprocessing")
    # Turning RGB to BGR is a permutation of channels: one fixed 1x1 convolution says it together with the means.
    layer = layers.Conv2D(3, 1, trainable=False, name="preprocessing")
    layer.build((None, None, None, 3))
    layer.set_weights([np.eye(3)[::-1][None, None] * scale, offset])
    return layer


def downscale(images: keras.KerasTensor, factor: int, filters: int) -> keras.KerasTensor:
    """Halves images `factor` times by trained convolutions; RGB `[0, 255]` in and out.

    The convolutions see pixels in `[-1, 1]`, and their tanh is spread over `[0, 255]` again: whatever range the
    backbone's preprocessing then makes of it is the one that the backbone knows.
    """
    stack = keras.Sequential(name="downscaling")
    for _ in range(factor):
        stack.add(layers.Conv2D(filters, 4, strides=2, padding="same", activation="relu"))
        stack.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
    stack.add(layers.Conv2D(3, 3, padding="same", activation="tanh"))
    images = layers.Rescaling(1 / 127.5, -1.0, name="to_unit_range")(images)
    return layers.Rescaling(127.5, 127.5, name="to_pixel_range")(stack(images))


def build_backbone(name: str, image_size: Sequence[int], use_imagenet_weights: bool, pop_layers: int) -> keras.Model:
    """Builds the model `backbone`, from preprocessed images to a feature map `(batch, h, w, channels)`.

    Args:
        name: a key of `BACKBONES`.
        image_size: `(height, width)`.
        use_imagenet_weights: False starts from random ones.
        pop_layers: layers dropped from its end.

    Raises:
        UserError: the weights cannot be had, or too many layers are dropped.
    """
    with _explaining_missing_weights(name), _drawing_bars_in_terminals(), _finding_stored_weights():
        application = getattr(keras.applications, name)(
            include_top=False,
            weights="imagenet" if use_imagenet_weights else None,
            input_shape=(*image_size, 3),
        )
    application.layers[-1].name = BACKBONES[name].last_layer
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
    return keras.Model(application.input, application.layers[-1 - pop_layers].output, name="backbone")


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


def build_classifier(
    number_of_classes: int, multi_label: bool, layer_sizes: Sequence[float], pooling: str | None
) -> keras.Sequential:
    """Builds the model `classifier`, from a feature map to probabilities `(batch, classes)`.

    Its last two layers are `logits` and `probabilities`, so that Grad-CAM can explain unsaturated scores.

    Args:
        number_of_classes: the output's width.
        multi_label: sigmoid instead of softmax.
        layer_sizes: each a hidden ReLU layer of that many units (1 or more) or a dropout rate (less than 1).
        pooling: `avg`, `max`, or None to flatten.
    """
    poolings = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D, None: layers.Flatten}
    classifier = keras.Sequential([poolings[pooling](name="pooling")], name="classifier")
    for size in layer_sizes:
        classifier.add(layers.Dense(int(size), activation="relu") if size >= 1 else layers.Dropout(size))
    classifier.add(layers.Dense(number_of_classes, dtype="float32", name="logits"))
    classifier.add(layers.Activation("sigmoid" if multi_label else "softmax", dtype="float32", name="probabilities"))
    return classifier
