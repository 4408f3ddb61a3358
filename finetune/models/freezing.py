"""Which layers of a backbone learn, and how its batch normalisation runs."""

from __future__ import annotations

from collections.abc import Iterator

import keras
from keras import layers

from finetune.core.options import UserError
from finetune.models.heads import has_parts
from finetune.models.kerashub import TRANSFORMER_BLOCKS

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
    leaves = [leaf for layer in before for leaf in [layer, *_walk(layer)] if "Drop" in type(leaf).__name__]
    # Frozen or not, dropout drops; what drops whole paths says so by other names.
    is_random = any(getattr(leaf, rate, 0) for leaf in leaves for rate in ("rate", "drop_prob"))
    return not is_random and not any(layer.trainable_variables for layer in before)


def freeze_layers(backbone: keras.Model, conv_layers_to_train: int) -> None:
    """Freezes a backbone up to the n-th convolution, or transformer block, from its end.

    A frozen batch normalisation runs in inference mode: Keras does so where `trainable` is False.

    Args:
        backbone: changed in place.
        conv_layers_to_train: -1 leaves everything trainable, 0 freezes everything.

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
    """Returns the layers that partial freezing counts, in their order, and their name: blocks or convolutions."""
    blocks = [layer for layer in _walk(backbone) if type(layer).__name__ in TRANSFORMER_BLOCKS]
    convolutions = [layer for layer in leaf_layers(backbone) if isinstance(layer, CONVOLUTIONS)]
    return (blocks, "transformer blocks") if blocks else (convolutions, "convolutions")


def _freeze_before(part: keras.Layer, first: keras.Layer | None) -> bool:
    """Freezes all inner layers before `first`, or the whole layer without it; returns whether it contains `first`."""
    if part is first:
        return True
    inner = _list_inner(part)
    found = first in [*_walk(part)]
    if not found:
        part.trainable = False
    return found and any(_freeze_before(layer, first) for layer in inner)


def _list_inner(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the layers that a layer is made of, in their order."""
    if isinstance(layer, keras.Model):
        return layer.layers
    return list(layer._flatten_layers(include_self=False, recursive=False))


def _walk(layer: keras.Layer) -> Iterator[keras.Layer]:
    """Yields the layers within a layer, each before those that it is made of."""
    for inner in _list_inner(layer):
        yield inner
        yield from _walk(inner)


def leaf_layers(model: keras.Model) -> list[keras.Layer]:
    """Returns a model's layers in their order, with those of its blocks in the blocks' place."""
    return [layer for layer in _walk(model) if not _list_inner(layer)]


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
