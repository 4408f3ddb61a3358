"""The linear probe: features, the regression as the start of a head, and out-of-fold probabilities."""

import warnings

import cv2
import keras
import numpy as np
import pytest
from probed_photos import (
    CLASSES,
    Inverting,
    build,
    make_sequence,
    photos,  # noqa: F401
)
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from configs import Configs
from finetune.core.devices import precision_policy
from finetune.core.options import UserError
from finetune.data.groups import deal_groups
from finetune.data.images import read_image, resize_image
from finetune.models.features import FeatureSequence
from finetune.training import probe
from finetune.training.probe import compute_features, cross_validate, initialize_head, split_head, takes_probe
from model import ModelFactory


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return build()


def make_features(labels: np.ndarray, channels: int = 64, seed: int = 0) -> np.ndarray:
    """Draws features as of a ReLU that predict the labels with some uncertainty."""
    rng = np.random.default_rng(seed)
    targets = labels if labels.ndim == 2 else np.eye(labels.max() + 1)[labels]
    signal = targets @ rng.normal(size=(targets.shape[1], channels))
    return np.maximum(signal + rng.normal(1, 1.5, (len(labels), channels)), 0).astype(np.float32) * 3


def standardise(features: np.ndarray) -> np.ndarray:
    return (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0).mean())


def head_of(channels: int, **options) -> tuple[keras.Model, keras.Model]:
    """Returns a model whose features have that many channels, with its head."""
    model = build(4, channels, **options)
    return model, split_head(model)


# Features


def test_features_are_what_the_pooling_gives_in_the_order_of_paths_unaugmented(model, photos):
    shuffled = make_sequence(photos, shuffle=True, seed=3, augmenter=Inverting(), mixup_alpha=1.0, number_of_classes=3)
    features, is_read = compute_features(model, shuffled)
    images = np.concatenate([images for images, _ in (make_sequence(photos)[step] for step in range(5))])
    maps = images
    for layer in model.layers[1:-1]:
        maps = layer(maps, training=False)
    np.testing.assert_allclose(features, np.asarray(maps).mean(axis=(1, 2)), atol=1e-5)
    assert features.dtype == np.float32
    assert is_read.all()
    assert shuffled.shuffle
    assert shuffled.mixes


def test_mirrored_features_equal_those_of_mirrored_images(model, photos, tmp_path):
    for row, path in enumerate(photos[0]):
        cv2.imwrite(str(tmp_path / f"{row:02d}.png"), resize_image(read_image(path), (32, 32))[:, ::-1, ::-1])
    turned = [str(tmp_path / f"{row:02d}.png") for row in range(36)]
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
def test_the_head_gives_the_probabilities_of_the_model(photos, pooling):
    model = build(pooling=pooling, layer_sizes=[8, 0.4])
    features, _ = compute_features(model, make_sequence(photos))
    expected = model.predict(make_sequence(photos).to_dataset(), verbose=0)
    np.testing.assert_allclose(split_head(model).predict(features, verbose=0), expected, atol=1e-5)


def test_training_the_head_trains_the_model(photos, tmp_path):
    model = build(layer_sizes=[8, 0.4])
    features, _ = compute_features(model, make_sequence(photos))
    head = split_head(model)
    inner = model.get_layer("classifier")
    assert [id(variable) for variable in head.variables] == [id(variable) for variable in inner.variables]
    before = model.get_layer("backbone").get_weights()
    head.compile("adam", "sparse_categorical_crossentropy")
    head.fit(features, photos[1], epochs=3, verbose=0)
    trained = model.predict(make_sequence(photos).to_dataset(), verbose=0)
    np.testing.assert_allclose(trained, head.predict(features, verbose=0), atol=1e-5)
    for old, new in zip(before, model.get_layer("backbone").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# Its start


@pytest.mark.parametrize(("number", "channels"), [(2, 20), (2, 150), (5, 150)])
def test_single_label_probabilities_are_those_of_scikit_learn(number, channels):
    labels = np.random.default_rng(1).integers(0, number, 90)
    features = make_features(labels, channels)
    model, head = head_of(channels, number=number)
    strength = initialize_head(model, [features], labels, 0)
    scaled = standardise(features.astype(float))
    regression = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(scaled, labels)
    np.testing.assert_allclose(head.predict(features, verbose=0), regression.predict_proba(scaled), atol=1e-5)


def test_multi_label_probabilities_are_those_of_scikit_learn():
    labels = (np.random.default_rng(1).random((90, 4)) < [0.5, 0.2, 0.8, 0.05]).astype(np.float32)
    features = make_features(labels, 100)
    model, head = head_of(100, number=4, multi_label=True)
    strength = initialize_head(model, [features], labels, 0)
    scaled = standardise(features.astype(float))
    regressions = OneVsRestClassifier(LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)).fit(scaled, labels)
    np.testing.assert_allclose(head.predict(features, verbose=0), regressions.predict_proba(scaled), atol=1e-5)


@pytest.mark.slow
def test_the_whole_model_predicts_what_the_regression_does(photos):
    fixed = {"visual_model_name": "MobileNet", "image_target_size": (32, 32, 3), "pop_conv_layers": 67}
    model = ModelFactory().get_model(Configs(classes=CLASSES, use_imagenet_weights=False, **fixed))
    features, _ = compute_features(model, make_sequence(photos))
    strength = initialize_head(model, [features], photos[1], 0)
    scaled = standardise(features.astype(float))
    expected = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(scaled, photos[1]).predict_proba(scaled)
    found = model.predict(make_sequence(photos).to_dataset(), verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_mirror_images_count_half_as_images_do():
    labels = np.repeat([0, 1, 2], 30)
    features, mirrored = (make_features(labels, 40, seed) for seed in (0, 1))
    model, head = head_of(40)
    strength = initialize_head(model, [features, mirrored], labels, 0)
    both = np.concatenate([features, mirrored]).astype(float)
    centred = both - features.mean(axis=0, dtype=float)
    scaled = centred / np.sqrt((centred**2).mean())
    regression = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
    regression.fit(scaled, np.tile(labels, 2), sample_weight=np.full(180, 0.5))
    np.testing.assert_allclose(head.predict(both, verbose=0), regression.predict_proba(scaled), atol=1e-5)


def test_noise_is_regularised_more_than_informative_features():
    labels = np.repeat([0, 1, 2], 30)
    noise = np.random.default_rng(0).normal(size=(90, 50)).astype(np.float32)
    clear = noise + 4 * np.eye(3, 50, dtype=np.float32)[labels]
    strengths = [initialize_head(head_of(50)[0], [features], labels, 0) for features in (noise, clear)]
    assert strengths[0] == pytest.approx(10**-2.5)
    assert strengths[1] > 10 * strengths[0]


def test_the_scale_of_the_features_does_not_matter():
    labels = np.repeat([0, 1, 2], 20)
    features = make_features(labels)
    found = []
    for factor in (1, 1000):
        model, head = head_of(64)
        strength = initialize_head(model, [features * factor], labels, 0)
        found.append((strength, head.predict(features * factor, verbose=0)))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-4)


def test_two_runs_give_the_same_head():
    labels = np.repeat([0, 1, 2], 20)
    model, found = head_of(64)[0], []
    for _ in range(2):
        initialize_head(model, [make_features(labels)], labels, 7)
        found.append(model.get_layer("classifier").get_layer("logits").get_weights())
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("counts", [(1, 20, 20), (1, 1, 1), (2, 3, 9)])
def test_classes_of_few_images_are_learnt_without_a_warning(counts):
    labels = np.repeat([0, 1, 2], counts)
    features = make_features(labels)
    model, head = head_of(64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strength = initialize_head(model, [features], labels, 0)
    assert 10**-2.6 < strength < 10**1.1
    scaled = standardise(features.astype(float))
    expected = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(scaled, labels).predict_proba(scaled)
    np.testing.assert_allclose(head.predict(features, verbose=0), expected, atol=1e-5)


def test_a_class_without_images_stays_improbable_and_the_others_stay_in_order():
    labels = np.repeat([0, 2], 20)
    features = make_features(labels)
    model, head = head_of(64)
    initialize_head(model, [features], labels, 0)
    probabilities = head.predict(features, verbose=0)
    assert (probabilities.argmax(axis=1) == labels).mean() > 0.9
    # Smoothed, it has one image of 43.
    assert 0.002 < np.median(probabilities[:, 1]) < 0.2


def test_a_single_class_gives_the_smoothed_frequencies():
    model, head = head_of(8)
    initialize_head(model, [make_features(np.zeros(7, int), 8)], np.zeros(7, int), 0)
    np.testing.assert_allclose(head.predict(np.ones((1, 8)), verbose=0), [[8 / 10, 1 / 10, 1 / 10]], rtol=1e-5)


def test_labels_of_no_image_or_of_all_keep_their_smoothed_frequency():
    labels = np.stack([np.zeros(8), np.ones(8), np.arange(8) % 2], axis=1).astype(np.float32)
    model, head = head_of(16, multi_label=True)
    initialize_head(model, [make_features(labels, 16)], labels, 0)
    probabilities = head.predict(np.random.default_rng(0).random((5, 16)), verbose=0)
    np.testing.assert_allclose(probabilities[:, :2], np.tile([1 / 10, 9 / 10], (5, 1)), rtol=1e-5)


def test_features_that_are_all_the_same_give_the_frequencies():
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    model, head = head_of(6)
    initialize_head(model, [np.full((60, 6), 0.5, np.float32)], labels, 0)
    np.testing.assert_allclose(head.predict(np.ones((1, 6)), verbose=0), [[1 / 6, 2 / 6, 3 / 6]], atol=1e-4)


def test_hidden_layers_are_refused():
    model, _ = head_of(8, layer_sizes=[16, 0.5])
    with pytest.raises(UserError, match="without hidden layers. Received: 16 units."):
        initialize_head(model, [np.zeros((4, 8), np.float32)], np.arange(4) % 2, 0)


def test_only_a_head_without_hidden_layers_takes_a_probe():
    assert takes_probe(head_of(8)[0])
    assert takes_probe(head_of(8, layer_sizes=[0.5])[0])
    assert not takes_probe(head_of(8, layer_sizes=[16, 0.5])[0])
    inputs = keras.Input((8,))
    assert not takes_probe(keras.Model(inputs, keras.layers.Dense(2)(inputs)))


def test_features_that_are_not_finite_are_refused():
    features = np.zeros((4, 8), np.float32)
    features[2, 3] = np.inf
    with pytest.raises(UserError, match="features are not finite"):
        initialize_head(head_of(8)[0], [features], np.arange(4) % 2, 0)


# Answers out of fold


def in_thirds(number: int) -> list[np.ndarray]:
    return [np.arange(number)[fold::3] for fold in range(3)]


@pytest.mark.parametrize(("multi_label", "channels"), [(False, 150), (True, 20)])
def test_an_image_is_predicted_by_a_regression_fitted_without_it(monkeypatch, multi_label, channels):
    rng = np.random.default_rng(1)
    labels = (rng.random((90, 3)) < [0.5, 0.2, 0.7]).astype(np.uint8) if multi_label else rng.integers(0, 3, 90)
    features = make_features(labels, channels)
    strength = initialize_head(head_of(channels, multi_label=multi_label)[0], [features], labels, 0)
    monkeypatch.setattr(probe, "_deal_folds", lambda labels, seed: in_thirds(90))
    found = cross_validate([features], labels, 3, 0)
    scaled, expected = standardise(features.astype(float)), np.empty((90, 3))
    for held_out in in_thirds(90):
        learnt = np.setdiff1d(np.arange(90), held_out)
        regression = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
        regression = OneVsRestClassifier(regression) if multi_label else regression
        expected[held_out] = regression.fit(scaled[learnt], labels[learnt]).predict_proba(scaled[held_out])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_out_of_fold_prediction_is_the_mean_over_an_image_and_its_mirror_image(monkeypatch):
    labels = np.random.default_rng(1).integers(0, 3, 90)
    views = [make_features(labels, 40, seed) for seed in (0, 1)]
    strength = initialize_head(head_of(40)[0], views, labels, 0)
    monkeypatch.setattr(probe, "_deal_folds", lambda labels, seed: in_thirds(90))
    found = cross_validate(views, labels, 3, 0)
    both = np.concatenate(views).astype(float) - views[0].mean(axis=0, dtype=float)
    scaled = (both / np.sqrt((both**2).mean())).reshape(2, 90, 40)
    expected = np.empty((90, 3))
    for held_out in in_thirds(90):
        learnt = np.setdiff1d(np.arange(90), held_out)
        regression = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
        regression.fit(np.concatenate(scaled[:, learnt]), np.tile(labels[learnt], 2), sample_weight=np.full(120, 0.5))
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
    sets = np.array([[0, 0], [1, 0], [1, 1]])[labels]
    for given in (labels, sets):
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


# Features as batches


@pytest.mark.parametrize("shuffle", [False, True])
def test_unread_rows_are_replaced_or_left_out_as_images_are(photos, tmp_path, shuffle):
    paths = list(photos[0])
    for row in (4, 5):
        paths[row] = str(tmp_path / f"missing_{row}.jpg")
    model, images = build(), make_sequence((paths, np.arange(36)), shuffle=shuffle, skip_bad_images=True)
    features = FeatureSequence.of(images, *compute_features(model, images))
    for (_, expected), (rows, labels) in zip(images.to_dataset(), features.to_dataset(), strict=True):
        np.testing.assert_array_equal(labels, expected)
        assert np.isfinite(rows).all()
    np.testing.assert_array_equal(features.get_y_true(), images.get_y_true())


# Groups


def copy_photos(number=60, copies=3, channels=100):
    """Makes random photos with copies, and random labels that copies share."""
    rng = np.random.default_rng(4)
    photos = rng.normal(size=(number, channels))
    groups = rng.permutation(np.repeat(np.arange(number), copies))
    features = photos[groups] + rng.normal(0, 0.02, (len(groups), channels))
    return features.astype(np.float32), rng.integers(0, 2, number)[groups], groups


def test_copies_of_an_image_do_not_predict_it():
    features, labels, groups = copy_photos()
    by_photo = cross_validate([features], labels, 2, 0)
    by_group = cross_validate([features], labels, 2, 0, groups=groups)
    assert np.mean(by_photo.argmax(axis=1) == labels) > 0.95
    # Of 60 photos by chance a half, standard error 0.065.
    assert np.mean(by_group.argmax(axis=1) == labels) == pytest.approx(0.5, abs=0.2)


def test_the_strength_is_chosen_on_whole_groups():
    """Without groups, copies make meaningless features look certain: the weakest regularisation is best."""
    features, labels, groups = copy_photos()
    model = head_of(100)[0]
    assert initialize_head(model, [features], labels, 0) == pytest.approx(10)
    assert initialize_head(model, [features], labels, 0, groups=groups) == pytest.approx(10**-2.5)


def test_each_image_is_predicted_by_images_of_other_groups():
    labels = np.random.default_rng(1).integers(0, 3, 90)
    groups = np.random.default_rng(2).permutation(np.repeat(np.arange(18), 5))
    features = make_features(labels, 20)
    strength = initialize_head(head_of(20)[0], [features], labels, 0, groups=groups)
    found = cross_validate([features], labels, 3, 0, groups=groups)
    scaled = standardise(features.astype(float))
    for held_out in deal_groups(labels, groups, 3, 5, 0):
        learnt = ~np.isin(groups, groups[held_out])
        regression = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(scaled[learnt], labels[learnt])
        np.testing.assert_allclose(found[held_out], regression.predict_proba(scaled[held_out]), atol=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize(
    "groups",
    [
        # Each class in one group; all in one; a class in one group; two groups; a giant one.
        np.repeat([0, 1, 2], [12, 12, 12]),
        np.zeros(36, int),
        np.concatenate([np.arange(24) // 3, np.full(12, 8)]),
        np.tile([0, 1], 18),
        np.concatenate([np.zeros(30, int), np.arange(1, 7)]),
    ],
)
def test_any_groups_give_a_head_and_finite_probabilities(groups, multi_label):
    labels = np.repeat([0, 1, 2], 12)
    given, features = np.eye(3, dtype=np.uint8)[labels] if multi_label else labels, make_features(labels, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strength = initialize_head(head_of(8, multi_label=multi_label)[0], [features], given, 0, None, groups)
        assert strength in probe.STRENGTHS
        if (np.bincount(groups, minlength=3) == 12).all() or not groups.any():
            with pytest.raises(UserError, match="at least two groups"):
                cross_validate([features], given, 3, 0, groups=groups)
            return
        found = cross_validate([features], given, 3, 0, groups=groups)
    assert ((found > 0) & (found < 1)).all()
