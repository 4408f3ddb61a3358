"""Which layers of a backbone learn, and how its batch normalisation runs."""

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
    """Makes a backbone trainable as a run wants it: see `freeze_layers` and `set_batch_norm_momentum`."""
    # Keras passes on to the layers only what changes.
    backbone.trainable = False
    backbone.trainable = True
    freeze_layers(backbone, conv_layers_to_train)
    set_batch_norm_momentum(backbone, batch_norm_momentum)
    if freeze_batch_norm:
        for layer in leaf_layers(backbone):
            layer.trainable = layer.trainable and not isinstance(layer, layers.BatchNormalization)


def has_fixed_features(model: keras.Model) -> bool:
    """Tells whether what comes before the head is frozen, and gives an image the same features in training."""
    if not has_parts(model):
        return False
    before = model.layers[:-1]
    leaves = [leaf for layer in before for leaf in ([layer] if not hasattr(layer, "layers") else leaf_layers(layer))]
    # Frozen or not, dropout drops.
    is_random = any(isinstance(leaf, layers.Dropout) and leaf.rate for leaf in leaves)
    return not is_random and not any(layer.trainable_variables for layer in before)


def freeze_layers(backbone: keras.Model, conv_layers_to_train: int) -> None:
    """Freezes a backbone up to the n-th convolution from its end.

    A frozen batch normalisation runs in inference mode: Keras does so where `trainable` is False.

    Args:
        backbone: changed in place.
        conv_layers_to_train: -1 leaves everything trainable, 0 freezes everything.

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
    """Returns a model's layers in their order, with those of its blocks in the blocks' place."""
    leaves = []
    for layer in model.layers:
        leaves += leaf_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return leaves


def set_batch_norm_momentum(backbone: keras.Model, momentum: float | None) -> None:
    """Sets how slowly the moving statistics follow the batches; None keeps the backbone's own.

    The backbones' own momentum suits the thousands of steps of an ImageNet epoch: on a few hundred images the
    statistics would trail the weights for tens of epochs.
    """
    if momentum is None:
        return
    for layer in leaf_layers(backbone):
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = momentum
