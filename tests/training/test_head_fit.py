"""The head fitted to a run's training images, at the start and refitted."""

import numpy as np
import pytest
from probed_photos import (
    build,
    make_sequence,
    photos,  # noqa: F401
)

from configs import Configs
from finetune.training.feature_store import HeadFit
from finetune.training.probe import FeaturesNotFinite, compute_features, initialize_head
from finetune.training.workers import Team


def weights_of(model):
    return model.get_layer("classifier").get_layer("logits").get_weights()


@pytest.mark.slow
@pytest.mark.parametrize("strength", ["none", "photo"])
def test_the_head_is_fitted_to_the_current_features(photos, strength):
    model, same = build(), build()
    configs = Configs(augmentation_strength=strength, random_seed=3, classes=["a", "b", "c"])
    fit = HeadFit(configs, model, make_sequence(photos), Team())
    fit.start("")
    backbone = model.get_layer("backbone")
    backbone.set_weights([weight * 0.5 + 0.5 for weight in backbone.get_weights()])
    same.set_weights(model.get_weights())
    features = [compute_features(same, make_sequence(photos), mirrored)[0] for mirrored in (False, True)]
    initialize_head(same, features[: 1 + (strength == "photo")], photos[1], 3)
    fit.refit()
    for one, other in zip(weights_of(model), weights_of(same), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("balances", [True, False])
def test_classes_are_balanced_as_training_balances_them(photos, balances):
    # 12, 6 and 3 photos, 7 on average. A regression with free intercepts gives each class its share of the weights.
    rows = np.r_[0:12, 12:18, 24:27]
    labels = photos[1][rows]
    images = make_sequence(([photos[0][row] for row in rows], labels), batch_size=32)
    model, configs = build(), Configs(classes=["a", "b", "c"], use_class_balancing=balances, random_seed=3)
    HeadFit(configs.replace(augmentation_strength="none"), model, images, Team()).start("")
    weights = [1, 1 + np.log(7 / 6), 1 + np.log(7 / 3)] if balances else [1, 1, 1]
    found = model(images[0][0], training=False).numpy()
    shown = (np.array(weights)[labels][:, None] * found).sum(axis=0)
    np.testing.assert_allclose(shown, np.multiply(weights, [12, 6, 3]), rtol=1e-3)


def test_weights_of_infinite_features_keep_their_head(photos):
    model = build()
    backbone = model.get_layer("backbone")
    kernel, bias = backbone.get_weights()
    backbone.set_weights([kernel, np.full_like(bias, np.inf)])
    before = weights_of(model)
    fit = HeadFit(Configs(random_seed=3, classes=["a", "b", "c"]), model, make_sequence(photos), Team())
    fit.refit()
    np.testing.assert_array_equal(weights_of(model)[0], before[0])
    with pytest.raises(FeaturesNotFinite, match="not finite"):
        fit.start("")
