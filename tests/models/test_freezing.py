"""Freezing layers and batch normalisation."""

import keras
import numpy as np
import pytest
from built_models import random_images
from keras import layers
from small_runs import options_of, start, tables  # noqa: F401

from configs import Configs
from finetune.core.options import UserError
from finetune.models.freezing import (
    freeze_layers,
    has_fixed_features,
    leaf_layers,
    prepare_backbone,
    set_batch_norm_momentum,
)
from finetune.models.heads import HeadOptions, build_head
from model import ModelFactory


def convolutions_and_norms() -> keras.Model:
    inputs = outputs = keras.Input((8, 8, 3))
    for position, kind in enumerate([layers.Conv2D, layers.SeparableConv2D, layers.DepthwiseConv2D]):
        sizes = (3, 3) if position < 2 else (3,)
        # The gradient of a bias before a normalisation is 0.
        outputs = kind(*sizes, use_bias=False, name=f"conv{position}")(outputs)
        outputs = layers.BatchNormalization(name=f"norm{position}")(outputs)
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize(
    ("conv_layers_to_train", "trained"),
    [(-1, "conv0 norm0 conv1 norm1 conv2 norm2"), (0, ""), (1, "conv2 norm2"), (2, "conv1 norm1 conv2 norm2")],
)
def test_freezing_trains_the_last_convolutions_and_what_follows(conv_layers_to_train, trained):
    backbone = convolutions_and_norms()
    freeze_layers(backbone, conv_layers_to_train)
    assert [layer.name for layer in backbone.layers if layer.trainable_weights] == trained.split()
    before = {weight.path: weight.numpy() for weight in backbone.weights}
    backbone.compile("sgd", loss="mse", run_eagerly=True)
    backbone.train_on_batch(random_images(4, 8, 8, 3), backbone(random_images(4, 8, 8, 3)) + 1)
    # Moving statistics are among them.
    changed = {weight.path for weight in backbone.weights if not np.array_equal(before[weight.path], weight.numpy())}
    assert changed == {path for path in before if path.split("/")[0] in trained.split()}


def test_all_convolutions_may_be_trained_but_not_more():
    backbone = convolutions_and_norms()
    freeze_layers(backbone, 3)
    assert all(layer.trainable for layer in backbone.layers if layer.weights)
    with pytest.raises(UserError, match="conv_layers_to_train.*3 convolutions.*Received: 4"):
        freeze_layers(backbone, 4)


@pytest.mark.parametrize(("momentum", "expected"), [(0.8, 0.8), (0.0, 0.0), (None, 0.99)])
def test_batch_norm_momentum_is_set_or_kept(momentum, expected):
    backbone = convolutions_and_norms()
    set_batch_norm_momentum(backbone, momentum)
    norms = [layer for layer in backbone.layers if isinstance(layer, layers.BatchNormalization)]
    assert {layer.momentum for layer in norms} == {expected}


@pytest.mark.slow
def test_freeze_batch_norm_leaves_its_weights_and_statistics(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=1, freeze_batch_norm=True)
    start(**options)
    configs = Configs(**options | {"classes": ["blue", "green", "red"]})
    keras.utils.set_random_seed(0)
    fresh = ModelFactory().get_model(configs)
    trained = keras.models.load_model(tmp_path / "run" / "latest_model.keras")
    norms = [
        [layer for layer in leaf_layers(model.get_layer("backbone")) if "BatchNorm" in type(layer).__name__]
        for model in (fresh, trained)
    ]
    assert len(norms[0]) == len(norms[1]) > 2
    for one, other in zip(*norms, strict=True):
        for before, after in zip(one.weights, other.weights, strict=True):
            np.testing.assert_array_equal(before.numpy(), after.numpy())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_only_a_frozen_backbone_without_dropout_has_fixed_features(dropout):
    inputs = keras.Input((8, 8, 3))
    backbone = keras.Model(inputs, layers.Dropout(dropout)(convolutions_and_norms()(inputs)), name="backbone")
    model = keras.Model(inputs, build_head("dense", HeadOptions(2, False))(backbone(inputs)))
    for trained in (0, 1):
        prepare_backbone(backbone, trained, None)
        assert has_fixed_features(model) == (not trained and not dropout)
    assert not has_fixed_features(backbone)
