"""The registry of backbones: all against Keras's own facts, and one network of each family in full."""

import gc
import os
import re
import sys
import urllib.error
from collections.abc import Iterator

import keras
import numpy as np
import pytest
from built_models import build, build_alive, flatten_layers, random_images
from keras import layers
from small_runs import options_of, start, tables  # noqa: F401

from configs import Configs
from finetune.core.options import UserError
from finetune.evaluation.gradcam import GradCam
from finetune.models.backbones import (
    BACKBONES,
    _explaining_missing_weights,
    build_backbone,
    build_preprocessing,
    freeze_layers,
    has_fixed_features,
    leaf_layers,
    prepare_backbone,
    set_batch_norm_momentum,
)
from finetune.models.heads import HeadOptions, build_head
from finetune.models.safety import limiting_weights
from model import ModelFactory

# The smallest network of each family.
FAMILIES = (
    *("VGG16", "DenseNet121", "Xception", "ResNet50", "ResNet50V2", "InceptionV3", "InceptionResNetV2"),
    *("NASNetMobile", "MobileNet", "MobileNetV2", "MobileNetV3Small", "EfficientNetB0", "EfficientNetV2B0"),
    "ConvNeXtTiny",
)
# Sizes at which the last feature map has more than one pixel.
SIZES = {"Xception": (71, 96), "InceptionV3": (107, 139), "InceptionResNetV2": (107, 139)}


class Asked(Exception):
    pass


def ask_keras_for_sizes(name: str) -> tuple[int, int]:
    def answer(input_shape=None, default_size=None, min_size=None, **_):
        raise Asked(default_size, min_size)

    if name.startswith("MobileNetV3"):
        return 224, 32
    application = getattr(keras.applications, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keras.src.applications.imagenet_utils.obtain_input_shape", answer)
        patch.setattr(sys.modules[application.__module__], "obtain_input_shape", answer, raising=False)
        with pytest.raises(Asked) as caught:
            application(weights=None)
    return caught.value.args


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_and_preprocessing_are_those_of_keras(name):
    entry = BACKBONES[name]
    default_size, minimum_size = ask_keras_for_sizes(name)
    assert ModelFactory().get_input_size(name) == (default_size, default_size)
    assert entry.minimum_size == minimum_size
    images = random_images(2, 5, 7, 3).astype(np.float32)
    expected = sys.modules[getattr(keras.applications, name).__module__].preprocess_input(images.copy())
    layer = build_preprocessing(entry.preprocessing)
    np.testing.assert_allclose(layer(images), expected, rtol=1e-5, atol=1e-5)
    assert layer.name == "preprocessing"
    assert layer.trainable_weights == []
    for size in ((minimum_size - 1, 400), (400, minimum_size - 1)):
        with pytest.raises(UserError, match=f"image_target_size: {name} .* {minimum_size} .*{size[0]}x{size[1]}"):
            build(visual_model_name=name, image_target_size=(*size, 3))


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Names of what Keras would fetch and build: each network's weights file, its address, and its last layer."""
    facts = []

    def remember(application):
        def build_one(**options):
            model = application(**options)
            facts.append(model.layers[-1].name)
            return model

        return build_one

    for name in BACKBONES:
        monkeypatch.setattr(keras.applications, name, remember(getattr(keras.applications, name)))
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", lambda name, origin, **_: facts.extend([name, origin]))
    monkeypatch.setattr(keras.Model, "load_weights", lambda *_: None)
    return facts


@pytest.fixture
def freed_afterwards() -> Iterator[None]:
    """Frees the networks of a test at once: they hold themselves in reference cycles of up to several GB."""
    yield
    keras.backend.clear_session()
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_built_at_its_smallest_size_and_ends_in_its_last_layer(name, fetched, freed_afterwards):
    # Zeros take a tenth of the time of random weights.
    with limiting_weights(2**33, initialize=False):
        backbone = build_backbone(name, (BACKBONES[name].minimum_size,) * 2, True, 0)
    file_name, address, own_name = fetched
    last = backbone.layers[-1]
    assert last.name == BACKBONES[name].last_layer == ModelFactory().get_last_conv_layer(name)
    assert last.name.startswith("last_") or last.name == own_name
    assert last.output.shape == backbone.output_shape
    assert len(backbone.output_shape) == 4
    freeze_layers(backbone, 3)
    trained = [layer for layer in flatten_layers(backbone) if layer.trainable_weights and "Conv2D" in str(type(layer))]
    assert len(trained) == 3
    # Keras stores NASNet's weights under another name than it fetches them.
    with pytest.raises(UserError) as caught, _explaining_missing_weights(name):
        raise Exception(f"URL fetch failure on {address}: 404")
    assert f" {file_name} " in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_each_family_answers_is_explained_and_survives_saving(name, tmp_path, freed_afterwards):
    model = build_alive(visual_model_name=name, image_target_size=(*SIZES.get(name, (64, 96)), 3))
    freeze_layers(model.get_layer("backbone"), 3)
    images = random_images(1, *model.input_shape[1:])
    answer = np.asarray(model(images, training=False))
    assert answer.shape == (1, 3)
    assert answer.sum() == pytest.approx(1, abs=1e-5)
    assert np.ptp(answer) > 1e-3
    heatmaps, probabilities = GradCam(model)(images)
    assert heatmaps.shape == (1, *model.get_layer("backbone").output_shape[1:3])
    assert heatmaps.min() >= 0
    assert heatmaps.max() in (0, 1)
    # Fused operations of the compiled network round differently.
    np.testing.assert_allclose(probabilities, answer, atol=1e-3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(loaded(images, training=False), answer, rtol=1e-5, atol=1e-7)
    assert len(loaded.trainable_weights) == len(model.trainable_weights)


@pytest.mark.parametrize(
    ("popped", "last_layer", "shape"),
    [(0, "block5_pool", (1, 3, 512)), (1, "block5_conv3", (2, 6, 512)), (17, "block1_conv1", (32, 96, 64))],
)
def test_popping_drops_layers_from_the_end(popped, last_layer, shape):
    backbone = build_backbone("VGG16", (32, 96), False, popped)
    assert backbone.layers[-1].name == last_layer
    assert backbone.output_shape == (None, *shape)
    assert len(backbone.layers) == 19 - popped


@pytest.mark.parametrize("popped", [18, 500])
def test_popping_too_many_layers_is_refused(popped):
    with pytest.raises(UserError, match=rf"pop_conv_layers: VGG16 .*18.*Received: {popped}"):
        build_backbone("VGG16", (32, 32), False, popped)


@pytest.mark.slow
def test_popping_onto_no_feature_map_suggests_a_number_that_works():
    with pytest.raises(UserError, match="pop_conv_layers") as caught:
        build_backbone("EfficientNetB0", (64, 64), False, 9)
    suggested = int(re.search(r"Choose (\d+)", str(caught.value)).group(1))
    assert build_backbone("EfficientNetB0", (64, 64), False, suggested).output_shape[1:3] == (2, 2)


@pytest.fixture
def no_download(monkeypatch, tmp_path):
    """Makes downloads fail with an error; returns the addresses and targets of the attempts."""
    targets = []

    def fail(error):
        def retrieve(origin, target, *_):
            targets.append((origin, target))
            raise error

        monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", retrieve)
        return targets

    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))
    return fail


OFFLINE = urllib.error.URLError("Name or service not known")
MISSING = urllib.error.HTTPError("https://example.org", 404, "Not Found", None, None)


@pytest.mark.parametrize("failure", [OFFLINE, MISSING])
def test_missing_imagenet_weights_are_explained(no_download, failure):
    targets = no_download(failure)
    with pytest.raises(UserError) as caught:
        build_backbone("MobileNet", (32, 32), True, 0)
    (origin, target) = targets[-1]
    folder, file_name = os.path.split(target)
    for part in (origin, folder, f" {file_name} ", "--use_imagenet_weights False"):
        assert part in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), TimeoutError("timed out")])
def test_a_download_that_breaks_off_is_explained(no_download, tmp_path, error):
    no_download(error)
    with pytest.raises(UserError, match="--use_imagenet_weights False") as caught:
        build_backbone("MobileNet", (32, 32), True, 0)
    assert str(tmp_path / "models") in str(caught.value)


@pytest.mark.slow
def test_imagenet_weights_in_a_read_only_folder_are_used(no_download, tmp_path, monkeypatch):
    targets = no_download(OFFLINE)
    stored = keras.applications.MobileNet(weights=None, include_top=False, input_shape=(32, 32, 3))
    (tmp_path / "models").mkdir()
    stored.save(tmp_path / "models" / "mobilenet_1_0_224_tf_no_top.h5")
    access = os.access
    # Root may write anywhere but to a read-only disk.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    backbone = build_backbone("MobileNet", (32, 32), True, 0)
    np.testing.assert_array_equal(backbone.get_weights()[0], stored.get_weights()[0])
    assert not targets


def test_unreadable_imagenet_weights_are_explained(no_download, tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(keras.applications, "MobileNet", refuse)
    with pytest.raises(UserError, match="weights of MobileNet.*permission") as caught:
        build_backbone("MobileNet", (32, 32), True, 0)
    assert str(tmp_path / "models") in str(caught.value)


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
