"""Freezing layers of a backbone, and its batch normalisation."""

from __future__ import annotations

import keras
from keras import layers

from finetune.core.options import UserError
from finetune.models.heads import has_parts

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
    leaves = [leaf for layer in before for leaf in ([layer] if not hasattr(layer, "layers") else leaf_layers(layer))]
    # Freezing does not stop dropout.
    is_random = any(isinstance(leaf, layers.Dropout) and leaf.rate for leaf in leaves)
    return not is_random and not any(layer.trainable_variables for layer in before)


def freeze_layers(backbone: keras.Model, conv_layers_to_train: int) -> None:
    """Freezes a backbone before the n-th convolution from its end; frozen batch normalisation runs in inference mode.

    Args:
        backbone: changed in place.
        conv_layers_to_train: -1 freezes nothing, 0 everything.

    Raises:
        UserError: there are fewer convolutions.
    """
    if conv_layers_to_train < 0:
        return
    every_layer = leaf_layers(backbone)
    convolutions = [position for position, layer in enumerate(every_layer) if isinstance(layer, CONVOLUTIONS)]
    if conv_layers_to_train > len(convolutions):
        raise UserError(
            f"conv_layers_to_train: the backbone has {len(convolutions)} convolutions. "
            f"Received: {conv_layers_to_train}. Choose -1 to train them all."
        )
    first_trained = convolutions[-conv_layers_to_train] if conv_layers_to_train else len(every_layer)
    for layer in every_layer[:first_trained]:
        layer.trainable = False


def leaf_layers(model: keras.Model) -> list[keras.Layer]:
    """Returns a model's layers in order, with nested models replaced by their layers."""
    leaves = []
    for layer in model.layers:
        leaves += leaf_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return leaves


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
