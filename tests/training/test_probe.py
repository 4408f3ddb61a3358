"""The linear probe: features, the regression as the start of a head, and out-of-fold probabilities."""

import warnings

import cv2
import keras
import numpy as np
import pytest
from probed_photos import (
    Inverting,
    build,
    make_sequence,
    photos,  # noqa: F401
)
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from finetune.core.devices import precision_policy
from finetune.core.options import UserError
from finetune.data.groups import deal_groups
from finetune.data.images import read_image, resize_image
from finetune.models.features import FeatureSequence
from finetune.training import probe
from finetune.training.probe import compute_features, cross_validate, initialize_head, split_head, takes_probe


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return build()


def make_features(labels: np.ndarray, channels: int = 64, seed: int = 0) -> np.ndarray:
    """Draws features as of a ReLU that predict the labels with some uncertainty."""
    rng = np.random.default_rng(seed)
    targets = labels if labels.ndim == 2 else np.eye(labels.max() + 1)[labels]
    signal = targets @ rng.normal(size=(targets.shape[1], channels))
    return np.maximum(signal + rng.normal(1, 1.5, (len(labels), channels)), 0).astype(np.float32) * 3


def standardise(views: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Centres features on the mean of the first view, and gives all of them a variance of 1."""
    centred = views.astype(float) - first.mean(axis=0, dtype=float)
    return centred / np.sqrt((centred**2).mean())


def regress(strength: float, features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None):
    """Fits scikit-learn's regression."""
    regression = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
    if labels.ndim == 2:
        return OneVsRestClassifier(regression).fit(features, labels)
    return regression.fit(features, labels, sample_weight=weights)


def head_of(channels: int, **options) -> tuple[keras.Model, keras.Model]:
    """Returns a model whose features have that many channels, with its head."""
    model = build(4, channels, **options)
    return model, split_head(model)


def predict(head: keras.Model, features: np.ndarray) -> np.ndarray:
    return head(features.astype(np.float32), training=False).numpy()


def read_all(photos) -> np.ndarray:
    return make_sequence(photos, batch_size=36)[0][0]


# Features


def test_features_are_the_pooled_maps_in_the_order_of_paths_unaugmented(model, photos):
    shuffled = make_sequence(photos, shuffle=True, seed=3, augmenter=Inverting(), mixup_alpha=1.0, number_of_classes=3)
    features, is_read = compute_features(model, shuffled)
    maps = read_all(photos)
    for layer in model.layers[1:-1]:
        maps = layer(maps, training=False)
    np.testing.assert_allclose(features, np.asarray(maps).mean(axis=(1, 2)), atol=1e-5)
    assert features.dtype == np.float32
    assert is_read.all()
    assert shuffled.shuffle
    assert shuffled.mixes


def test_mirrored_features_equal_those_of_mirrored_images(model, photos, tmp_path):
    turned = [str(tmp_path / f"{row:02d}.png") for row in range(36)]
    for path, copy in zip(photos[0], turned, strict=True):
        cv2.imwrite(copy, resize_image(read_image(path), (32, 32))[:, ::-1, ::-1])
    expected, _ = compute_features(model, make_sequence((turned, photos[1])))
    found, _ = compute_features(model, make_sequence(photos), mirrored=True)
    np.testing.assert_allclose(found, expected, atol=0.02)
    plain, _ = compute_features(model, make_sequence(photos))
    assert np.abs(found - plain).max() > 2 * np.abs(found - expected).max()


@pytest.mark.parametrize("batch_size", [1, 8])
def test_rows_of_unreadable_images_are_nan(model, photos, tmp_path, batch_size):
    paths, labels = list(photos[0]), photos[1]
    paths[5] = str(tmp_path / "missing.jpg")
    sequence = make_sequence((paths, labels), batch_size=batch_size, shuffle=True, skip_bad_images=True)
    features, is_read = compute_features(model, sequence)
    whole, _ = compute_features(model, make_sequence(photos))
    assert np.flatnonzero(~is_read).tolist() == [5]
    assert np.isnan(features[5]).all()
    np.testing.assert_allclose(features[is_read], whole[is_read], atol=1e-5)
    assert "missing.jpg" in sequence.bad_images[5]
    with pytest.raises(UserError, match="missing.jpg"):
        compute_features(model, make_sequence((paths, labels)))


@pytest.mark.parametrize("shuffle", [False, True])
def test_unread_rows_are_replaced_or_left_out_as_images_are(model, photos, tmp_path, shuffle):
    paths = list(photos[0])
    paths[4:6] = [str(tmp_path / f"missing_{row}.jpg") for row in (4, 5)]
    images = make_sequence((paths, np.arange(36)), shuffle=shuffle, skip_bad_images=True)
    features = FeatureSequence.of(images, *compute_features(model, images))
    for (_, expected), (rows, labels) in zip(images.to_dataset(), features.to_dataset(), strict=True):
        np.testing.assert_array_equal(labels, expected)
        assert np.isfinite(rows).all()
    np.testing.assert_array_equal(features.get_y_true(), images.get_y_true())


def test_features_in_16_bits_arrive_as_float32(photos):
    with precision_policy(True):
        model = build()
    features, _ = compute_features(model, make_sequence(photos))
    assert features.dtype == np.float32
    assert np.isfinite(features).all()


def test_a_model_without_the_parts_is_refused(photos):
    inputs = keras.Input((32, 32, 3))
    foreign = keras.Model(inputs, keras.layers.Flatten(name="flat")(inputs))
    for use in (lambda: compute_features(foreign, make_sequence(photos)), lambda: split_head(foreign)):
        with pytest.raises(UserError, match="backbone.*flat.*head_epochs"):
            use()


# The head


@pytest.mark.parametrize("pooling", ["max", None])
def test_training_the_head_on_features_trains_the_model(photos, pooling):
    model = build(pooling=pooling, layer_sizes=[8, 0.4])
    features, _ = compute_features(model, make_sequence(photos))
    head, images, before = split_head(model), read_all(photos), model.get_layer("backbone").get_weights()
    np.testing.assert_allclose(predict(head, features), model(images, training=False), atol=1e-5)
    inner = model.get_layer("classifier")
    assert [id(variable) for variable in head.variables] == [id(variable) for variable in inner.variables]
    head.compile("adam", "sparse_categorical_crossentropy")
    head.fit(features, photos[1], epochs=1, verbose=0)
    np.testing.assert_allclose(predict(head, features), model(images, training=False), atol=1e-5)
    for old, new in zip(before, model.get_layer("backbone").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("number", "channels", "multi_label"), [(2, 20, False), (2, 150, False), (5, 150, False), (4, 100, True)]
)
def test_probabilities_are_those_of_scikit_learn(number, channels, multi_label):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, number, 90)
    if multi_label:
        labels = (rng.random((90, 4)) < [0.5, 0.2, 0.8, 0.05]).astype(np.float32)
    features = make_features(labels, channels)
    model, head = head_of(channels, number=number, multi_label=multi_label)
    strength = initialize_head(model, [features], labels, 0)
    scaled = standardise(features, features)
    expected = regress(strength, scaled, labels).predict_proba(scaled)
    np.testing.assert_allclose(predict(head, features), expected, atol=1e-5)


def test_the_whole_model_predicts_what_the_regression_does(photos):
    model = build()
    features, _ = compute_features(model, make_sequence(photos))
    strength = initialize_head(model, [features], photos[1], 0)
    scaled = standardise(features, features)
    expected = regress(strength, scaled, photos[1]).predict_proba(scaled)
    np.testing.assert_allclose(model(read_all(photos), training=False), expected, atol=1e-5)


def test_mirror_images_count_half_as_images_do():
    labels = np.repeat([0, 1, 2], 30)
    views = [make_features(labels, 40, seed) for seed in (0, 1)]
    model, head = head_of(40)
    strength = initialize_head(model, views, labels, 0)
    both = np.concatenate(views)
    scaled = standardise(both, views[0])
    expected = regress(strength, scaled, np.tile(labels, 2), np.full(180, 0.5)).predict_proba(scaled)
    np.testing.assert_allclose(predict(head, both), expected, atol=1e-5)


def test_noise_is_regularised_more_than_informative_features():
    labels = np.repeat([0, 1, 2], 30)
    noise = np.random.default_rng(0).normal(size=(90, 50)).astype(np.float32)
    clear = noise + 4 * np.eye(3, 50, dtype=np.float32)[labels]
    strengths = [initialize_head(head_of(50)[0], [features], labels, 0) for features in (noise, clear)]
    assert strengths[0] == pytest.approx(10**-2.5)
    assert strengths[1] > 10 * strengths[0]


def test_neither_the_scale_of_the_features_nor_a_repetition_changes_the_head():
    labels = np.repeat([0, 1, 2], 20)
    features = make_features(labels)
    model, head = head_of(64)
    found = [
        (initialize_head(model, [features * factor], labels, 7), predict(head, features * factor))
        for factor in (1, 1, 1000)
    ]
    assert found[0][0] == found[1][0] == found[2][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_allclose(found[0][1], found[2][1], atol=1e-4)


@pytest.mark.parametrize("counts", [(1, 20, 20), (1, 1, 1), (2, 3, 9)])
def test_classes_of_few_images_are_learnt_without_a_warning(counts):
    labels = np.repeat([0, 1, 2], counts)
    features = make_features(labels)
    model, head = head_of(64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strength = initialize_head(model, [features], labels, 0)
    assert 10**-2.6 < strength < 10**1.1
    scaled = standardise(features, features)
    expected = regress(strength, scaled, labels).predict_proba(scaled)
    np.testing.assert_allclose(predict(head, features), expected, atol=1e-5)


def test_a_class_without_images_stays_improbable_and_the_others_stay_in_order():
    labels = np.repeat([0, 2], 20)
    features = make_features(labels)
    model, head = head_of(64)
    initialize_head(model, [features], labels, 0)
    probabilities = predict(head, features)
    assert (probabilities.argmax(axis=1) == labels).mean() > 0.9
    # Smoothed, it has one image of 43.
    assert 0.002 < np.median(probabilities[:, 1]) < 0.2


PARTS = np.stack([np.zeros(8), np.ones(8), np.arange(8) % 2], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("features", "labels", "expected"),
    [
        # A single class: of 7 images and 3 classes, smoothed.
        (make_features(np.zeros(7, int), 8), np.zeros(7, int), [8 / 10, 1 / 10, 1 / 10]),
        # Features that are all the same.
        (np.full((60, 8), 0.5, np.float32), np.repeat([0, 1, 2], [10, 20, 30]), [1 / 6, 2 / 6, 3 / 6]),
        # Labels of no image and of all, multi-label.
        (make_features(PARTS, 8), PARTS, [1 / 10, 9 / 10]),
    ],
)
def test_without_information_the_probabilities_are_the_frequencies(features, labels, expected):
    model, head = head_of(8, multi_label=labels.ndim == 2)
    initialize_head(model, [features], labels, 0)
    np.testing.assert_allclose(predict(head, np.ones((1, 8)))[0, : len(expected)], expected, atol=1e-4)


def test_heads_with_hidden_layers_and_infinite_features_are_refused():
    hidden, features = head_of(8, layer_sizes=[16, 0.5])[0], np.zeros((4, 8), np.float32)
    with pytest.raises(UserError, match="16 units.*classifier_layer_sizes"):
        initialize_head(hidden, [features], np.arange(4) % 2, 0)
    inputs = keras.Input((8,))
    models = (head_of(8)[0], head_of(8, layer_sizes=[0.5])[0], hidden)
    found = [takes_probe(model) for model in (*models, keras.Model(inputs, keras.layers.Dense(2)(inputs)))]
    assert found == [True, True, False, False]
    features[2, 3] = np.inf
    with pytest.raises(UserError, match="features are not finite"):
        initialize_head(models[0], [features], np.arange(4) % 2, 0)


# Out-of-fold probabilities


@pytest.mark.parametrize(("multi_label", "channels"), [(False, 150), (True, 20)])
def test_an_image_is_predicted_by_a_regression_fitted_without_it(monkeypatch, multi_label, channels):
    rng = np.random.default_rng(1)
    labels = (rng.random((90, 3)) < [0.5, 0.2, 0.7]).astype(np.uint8) if multi_label else rng.integers(0, 3, 90)
    features = make_features(labels, channels)
    strength = initialize_head(head_of(channels, multi_label=multi_label)[0], [features], labels, 0)
    thirds = [np.arange(90)[fold::3] for fold in range(3)]
    monkeypatch.setattr(probe, "_deal_folds", lambda labels, seed: thirds)
    found = cross_validate([features], labels, 3, 0)
    scaled, expected = standardise(features, features), np.empty((90, 3))
    for held_out in thirds:
        learnt = np.setdiff1d(np.arange(90), held_out)
        expected[held_out] = regress(strength, scaled[learnt], labels[learnt]).predict_proba(scaled[held_out])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_out_of_fold_prediction_is_the_mean_over_an_image_and_its_mirror_image(monkeypatch):
    labels = np.random.default_rng(1).integers(0, 3, 90)
    views = [make_features(labels, 40, seed) for seed in (0, 1)]
    strength = initialize_head(head_of(40)[0], views, labels, 0)
    thirds = [np.arange(90)[fold::3] for fold in range(3)]
    monkeypatch.setattr(probe, "_deal_folds", lambda labels, seed: thirds)
    found = cross_validate(views, labels, 3, 0)
    scaled, expected = standardise(np.concatenate(views), views[0]).reshape(2, 90, 40), np.empty((90, 3))
    for held_out in thirds:
        learnt = np.setdiff1d(np.arange(90), held_out)
        both = np.concatenate(scaled[:, learnt])
        regression = regress(strength, both, np.tile(labels[learnt], 2), np.full(120, 0.5))
        expected[held_out] = np.mean([regression.predict_proba(view[held_out]) for view in scaled], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_out_of_fold_noise_stays_at_chance():
    labels = np.repeat([0, 1], 100)
    noise = np.random.default_rng(0).normal(size=(200, 400)).astype(np.float32)
    found = cross_validate([noise], labels, 2, 0)
    # In fold, 400 features separate 200 images perfectly; chance is 0.5, standard error 0.035.
    assert np.mean(found.argmax(axis=1) == labels) == pytest.approx(0.5, abs=0.11)


def test_each_fold_has_its_share_of_every_class_and_of_every_set_of_labels():
    labels = np.repeat([0, 1, 2], [52, 31, 17])
    for given in (labels, np.array([[0, 0], [1, 0], [1, 1]])[labels]):
        folds = probe._deal_folds(given, 3)
        assert sorted(np.concatenate(folds).tolist()) == list(range(100))
        counts = np.array([np.bincount(labels[fold], minlength=3) for fold in folds])
        assert counts.shape == (5, 3)
        assert np.ptp(counts, axis=0).max() <= 1
        assert np.ptp(counts.sum(axis=1)) <= 1


def test_folds_follow_from_the_seed():
    labels = np.repeat([0, 1, 2], 20)
    features = make_features(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again, other = (cross_validate([features], labels, 3, seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("counts", [(1, 1, 0), (4, 0, 0), (1, 20, 20), (9, 2, 0)])
@pytest.mark.parametrize("multi_label", [False, True])
def test_few_images_of_a_class_are_predicted_out_of_fold_without_a_warning(counts, multi_label):
    labels = np.repeat([0, 1, 2], counts)
    labels = np.eye(3, dtype=np.uint8)[labels] if multi_label else labels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cross_validate([make_features(labels, 8)], labels, 3, 0)
    assert found.shape == (sum(counts), 3)
    assert ((found > 0) & (found < 1)).all()
    if not multi_label:
        np.testing.assert_allclose(found.sum(axis=1), 1)


# Groups


def test_copies_of_an_image_predict_it_and_choose_the_strength_only_without_groups():
    """Without groups, copies make meaningless features look certain: the weakest regularisation is best."""
    rng = np.random.default_rng(4)
    photos = rng.normal(size=(60, 100))
    groups = rng.permutation(np.repeat(np.arange(60), 3))
    features = (photos[groups] + rng.normal(0, 0.02, (180, 100))).astype(np.float32)
    labels, model = rng.integers(0, 2, 60)[groups], head_of(100)[0]
    by_photo = cross_validate([features], labels, 2, 0)
    by_group = cross_validate([features], labels, 2, 0, groups=groups)
    assert np.mean(by_photo.argmax(axis=1) == labels) > 0.95
    # Chance on 60 photos is 0.5, standard error 0.065.
    assert np.mean(by_group.argmax(axis=1) == labels) == pytest.approx(0.5, abs=0.2)
    assert initialize_head(model, [features], labels, 0) == pytest.approx(10)
    assert initialize_head(model, [features], labels, 0, groups=groups) == pytest.approx(10**-2.5)


def test_each_image_is_predicted_by_images_of_other_groups():
    labels = np.random.default_rng(1).integers(0, 3, 90)
    groups = np.random.default_rng(2).permutation(np.repeat(np.arange(18), 5))
    features = make_features(labels, 20)
    strength = initialize_head(head_of(20)[0], [features], labels, 0, groups=groups)
    found = cross_validate([features], labels, 3, 0, groups=groups)
    scaled = standardise(features, features)
    for held_out in deal_groups(labels, groups, 3, 5, 0):
        learnt = ~np.isin(groups, groups[held_out])
        expected = regress(strength, scaled[learnt], labels[learnt]).predict_proba(scaled[held_out])
        np.testing.assert_allclose(found[held_out], expected, atol=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize(
    ("groups", "is_refused"),
    [
        # Each class in one group; all in one; a class in one group; two groups; a giant one.
        (np.repeat([0, 1, 2], [12, 12, 12]), True),
        (np.zeros(36, int), True),
        (np.concatenate([np.arange(24) // 3, np.full(12, 8)]), False),
        (np.tile([0, 1], 18), False),
        (np.concatenate([np.zeros(30, int), np.arange(1, 7)]), False),
    ],
)
def test_any_groups_give_a_head_and_finite_probabilities(groups, is_refused, multi_label):
    labels = np.repeat([0, 1, 2], 12)
    given, features = np.eye(3, dtype=np.uint8)[labels] if multi_label else labels, make_features(labels, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strength = initialize_head(head_of(8, multi_label=multi_label)[0], [features], given, 0, None, groups)
        assert strength in probe.STRENGTHS
        if is_refused:
            with pytest.raises(UserError, match="at least two groups"):
                cross_validate([features], given, 3, 0, groups=groups)
            return
        found = cross_validate([features], given, 3, 0, groups=groups)
    assert ((found > 0) & (found < 1)).all()
