"""The model factory.

A model takes raw RGB in `[0, 255]` of any numeric type, at `eval_image_size` if set, else at `image_target_size`. The
names of its parts are `[downscaling ->] preprocessing -> backbone -> classifier`. The backbone's preprocessing is part
of the model, so that no script can get it wrong. See the registries `finetune/models/backbones.py` and
`finetune/models/heads.py`.
"""

from __future__ import annotations

import math

import keras
from keras import layers

from configs import Configs
from finetune.core.arguments import look_up, take_names
from finetune.core.devices import precision_policy
from finetune.core.options import UserError
from finetune.core.values import get_input_size
from finetune.models.backbones import build_backbone, build_preprocessing, find_backbone, prepare_backbone
from finetune.models.compiling import build_optimizer, check_optimizer, compile_model, find_loss
from finetune.models.heads import HEADS, HeadOptions, build_head


def check_registered(configs: Configs, builds: bool = True) -> None:
    """Raises UserError if a name in the configs is not registered, or an option does not suit the others.

    Args:
        configs: to check.
        builds: False if the model is loaded from a file; the backbone's own file or preset may be gone then.
    """
    if builds:
        find_backbone(configs.visual_model_name, configs.backbone_preprocessing)
    look_up(HEADS, "head", configs.head)
    find_loss(configs.loss, configs.multi_label_classification)
    check_optimizer(configs)


class ModelFactory:
    """Builds models from configs."""

    def get_input_size(self, name: str) -> tuple[int, int]:
        """Returns the `(height, width)` at which a backbone's ImageNet weights were trained."""
        return (find_backbone(name).input_size,) * 2

    def get_last_conv_layer(self, name: str) -> str:
        """Returns the name of a backbone's last spatial layer, for Grad-CAM."""
        return find_backbone(name).last_layer

    def get_model(self, configs: Configs) -> keras.Model:
        """Builds and compiles the model.

        Args:
            configs: with `classes` resolved.

        Returns:
            A model from RGB `(batch, height, width, 3)`, `[0, 255]`, to probabilities `(batch, classes)`.

        Raises:
            UserError: the image is too small for the backbone, too many layers are to be dropped or trained, or the
                ImageNet weights are missing.
        """
        check_registered(Configs.check(configs))
        take_names(configs.classes, "classes")
        name = configs.visual_model_name
        entry = find_backbone(name, configs.backbone_preprocessing)
        factor = 2**configs.cnn_downscaling_factor
        # The model is built for the last one.
        sizes = {"image_target_size": tuple(configs.image_target_size[:2]), "eval_image_size": get_input_size(configs)}
        for option, (height, width) in sizes.items():
            backbone_size = (math.ceil(height / factor), math.ceil(width / factor))
            entry.check_size(name, option, (height, width), backbone_size)
        if len({*sizes.values()}) > 1 and not entry.takes_any_size:
            raise UserError(
                f"eval_image_size: expected none, because {name} is built for one size. Received: {height} {width}. "
                "Leave it out, and set image_target_size."
            )
        with precision_policy(configs.mixed_precision):
            backbone = build_backbone(name, backbone_size, configs.use_imagenet_weights, configs.pop_conv_layers, entry)
            options = HeadOptions(
                len(configs.classes),
                configs.multi_label_classification,
                configs.classifier_layer_sizes,
                configs.final_layer_pooling,
            )
            head = build_head(configs.head, options)
        prepare_backbone(backbone, configs.conv_layers_to_train, configs.batch_norm_momentum)
        inputs = outputs = keras.Input((height, width, 3), name="image")
        if configs.cnn_downscaling_factor:
            outputs = downscale(outputs, configs.cnn_downscaling_factor, configs.cnn_downscaling_filters)
        outputs = build_preprocessing(entry.preprocessing)(outputs)
        model = keras.Model(inputs, head(backbone(outputs)), name="image_classifier")
        optimizer = build_optimizer(configs)
        return compile_model(model, optimizer, configs.multi_label_classification)


def downscale(images: keras.KerasTensor, factor: int, filters: int) -> keras.KerasTensor:
    """Halves images `factor` times by trained convolutions; RGB `[0, 255]` in and out.

    The convolutions work on pixels in `[-1, 1]`. Their tanh output is scaled back to `[0, 255]`, the range that the
    backbone's preprocessing expects.
    """
    stack = keras.Sequential(name="downscaling")
    for _ in range(factor):
        stack.add(layers.Conv2D(filters, 4, strides=2, padding="same", activation="relu"))
        stack.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
    stack.add(layers.Conv2D(3, 3, padding="same", activation="tanh"))
    images = layers.Rescaling(1 / 127.5, -1.0, name="to_unit_range")(images)
    return layers.Rescaling(127.5, 127.5, name="to_pixel_range")(stack(images))
