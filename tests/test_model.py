import os
import re
import subprocess
import sys
import urllib.error

import keras
import numpy as np
import pytest
from backbone_checks import LARGER_SIZES
from built_models import (
    build,
    build_alive,
    flatten_layers,
    random_images,
)
from keras import layers

from configs import Configs
from finetune.core.options import UserError
from finetune.evaluation.gradcam import GradCam
from finetune.models.backbones import BACKBONES, build_backbone, build_preprocessing
from finetune.models.freezing import freeze_layers
from finetune.models.heads import HeadOptions, build_head
from finetune.models.optimizers import compile_model, get_optimizer
from model import ModelFactory, downscale

PARTS = ("downscaling", "preprocessing", "backbone", "classifier")
SMALLEST_OF_FAMILY = (
    *("VGG16", "DenseNet121", "Xception", "ResNet50", "ResNet50V2", "InceptionV3", "InceptionResNetV2"),
    *("NASNetMobile", "MobileNet", "MobileNetV2", "MobileNetV3Small", "EfficientNetB0", "EfficientNetV2B0"),
    "ConvNeXtTiny",
)


def is_convolution(layer: layers.Layer) -> bool:
    return "Conv2D" in type(layer).__name__


@pytest.fixture(scope="module")
def mobilenet():
    return build_alive()


@pytest.fixture(scope="module")
def downscaling_mobilenet():
    return build(
        image_target_size=(128, 128, 3), cnn_downscaling_factor=2, cnn_downscaling_filters=5, conv_layers_to_train=0
    )


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
def test_preprocessing_is_keras_own(name):
    images = random_images(2, 5, 7, 3).astype(np.float32)
    own = sys.modules[getattr(keras.applications, name).__module__].preprocess_input
    expected = np.asarray(own(images.copy()))
    found = build_preprocessing(BACKBONES[name].preprocessing)(images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_are_keras_own(name):
    default_size, minimum_size = ask_keras_for_sizes(name)
    assert ModelFactory().get_input_size(name) == (default_size, default_size)
    assert BACKBONES[name].minimum_size == minimum_size


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("turned", [False, True])
def test_too_small_an_image_is_refused(name, turned):
    smallest = BACKBONES[name].minimum_size
    size = (smallest - 1, 400) if not turned else (400, smallest - 1)
    with pytest.raises(UserError, match="image_target_size") as caught:
        build(visual_model_name=name, image_target_size=(*size, 3))
    assert f"from {smallest} pixels" in str(caught.value)
    assert f"{size[0]}x{size[1]}" in str(caught.value)


def test_too_small_an_image_after_downscaling_is_refused():
    with pytest.raises(UserError, match="image_target_size.*124x124.*31x31"):
        build(image_target_size=(124, 124, 3), cnn_downscaling_factor=2)


@pytest.mark.parametrize("name", ["VGG16", "DenseNet121", "MobileNet"])
def test_only_the_caffe_preprocessing_has_weights_and_none_train(name):
    layer = build_preprocessing(BACKBONES[name].preprocessing)
    layer(np.zeros((1, 4, 4, 3), np.float32))
    assert bool(layer.weights) == (name == "VGG16")
    assert layer.trainable_weights == []
    assert layer.name == "preprocessing"


@pytest.mark.parametrize(
    ("model_name", "parts"), [("mobilenet", PARTS[1:]), ("downscaling_mobilenet", PARTS)], ids=["plain", "downscaling"]
)
def test_parts_stand_in_order(model_name, parts, request):
    model = request.getfixturevalue(model_name)
    assert [layer.name for layer in model.layers if layer.name in PARTS] == list(parts)
    assert isinstance(model.get_layer("classifier"), keras.Sequential)


def test_output_is_a_probability_of_each_class(mobilenet):
    probabilities = np.asarray(mobilenet(random_images(3, 32, 32, 3)))
    assert probabilities.shape == (3, 3)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.ptp(probabilities, axis=0).min() > 1e-3


def test_input_of_any_numeric_type(mobilenet):
    images = random_images(2, 32, 32, 3)
    expected = mobilenet(images.astype(np.float32))
    for kind in (np.uint8, np.int32, np.int64, np.float64):
        np.testing.assert_array_equal(mobilenet(images.astype(kind)), expected)


def test_caffe_preprocessing_takes_any_numeric_type():
    model = build(visual_model_name="VGG16")
    images = random_images(1, 32, 32, 3)
    expected = model(images.astype(np.float32))
    for kind in (np.uint8, np.int32, np.float64):
        np.testing.assert_array_equal(model(images.astype(kind)), expected)
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("layer_sizes", "expected"),
    [
        ([10, 0.4, 5], [("Dense", 10), ("Dropout", 0.4), ("Dense", 5)]),
        ([0.4], [("Dropout", 0.4)]),
        ([], []),
        ([1.0, 0], [("Dense", 1), ("Dropout", 0)]),
    ],
)
def test_classifier_layer_sizes(layer_sizes, expected):
    head = build_head("dense", HeadOptions(3, False, layer_sizes))
    hidden = head.layers[1:-2]
    assert [(type(layer).__name__, getattr(layer, "units", getattr(layer, "rate", None))) for layer in hidden] == (
        expected
    )
    assert all(layer.activation is keras.activations.relu for layer in hidden if isinstance(layer, layers.Dense))
    assert [layer.name for layer in head.layers[-2:]] == ["logits", "probabilities"]
    assert head.layers[-2].activation is keras.activations.linear


def test_the_layers_of_a_head_draw_their_seeds_in_order():
    keras.utils.set_random_seed(3)
    head = build_head("dense", HeadOptions(3, False, [16, 0.4]))
    keras.utils.set_random_seed(3)
    plain = [keras.layers.Dense(16), keras.layers.Dropout(0.4), keras.layers.Dense(3)]
    expected = keras.Sequential([keras.layers.GlobalAveragePooling2D(), *plain])
    for model in (head, expected):
        model.build((None, 2, 2, 8))
    for found, wanted in zip(head.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("pooling", "pooled"), [("avg", [[2.5, 25]]), ("max", [[4, 40]]), (None, [[1, 10, 2, 20, 3, 30, 4, 40]])]
)
def test_pooling(pooling, pooled):
    head = build_head("dense", HeadOptions(2, False, [], pooling))
    features = np.array([[[[1, 10], [2, 20]], [[3, 30], [4, 40]]]], np.float32)
    head(features)
    np.testing.assert_allclose(head.layers[0](features), pooled)


@pytest.mark.parametrize(
    ("multi_label", "probabilities"),
    [(True, [0.5, 0.75, 0.2]), (False, [1 / 4.25, 3 / 4.25, 0.25 / 4.25])],
    ids=["sigmoid", "softmax"],
)
def test_probabilities_from_logits(multi_label, probabilities):
    head = build_head("dense", HeadOptions(3, multi_label))
    features = np.ones((1, 2, 2, 1), np.float32)
    head(features)
    head.get_layer("logits").set_weights([np.zeros((1, 3)), np.log([1, 3, 0.25])])
    np.testing.assert_allclose(head(features), [probabilities], rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["MobileNet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ConvNeXtTiny", "Xception"))]
)
@pytest.mark.parametrize("count", [1, 5])
def test_exactly_the_last_convolutions_of_a_backbone_train(name, count):
    backbone = build_backbone(name, LARGER_SIZES.get(name, (32, 32)), False, 0)
    freeze_layers(backbone, count)
    convolutions = [layer for layer in flatten_layers(backbone) if is_convolution(layer)]
    assert sum(bool(layer.trainable_weights) for layer in convolutions) == count


def test_the_models_batch_norms_have_the_momentum_of_the_configs(downscaling_mobilenet):
    norms = [layer for layer in flatten_layers(downscaling_mobilenet) if isinstance(layer, layers.BatchNormalization)]
    assert len(norms) == 27
    assert {layer.momentum for layer in norms} == {0.9}


def test_downscaling_learns_while_the_backbone_is_frozen(downscaling_mobilenet):
    assert len(downscaling_mobilenet.get_layer("downscaling").trainable_weights) == 10
    assert downscaling_mobilenet.get_layer("backbone").trainable_weights == []


@pytest.mark.parametrize(
    ("size", "factor", "backbone_size"),
    [((512, 512), 2, (128, 128)), ((512, 512), 3, (64, 64)), ((75, 101), 1, (38, 51))],
)
def test_downscaling_halves_what_the_backbone_receives(size, factor, backbone_size):
    model = build(image_target_size=(*size, 3), cnn_downscaling_factor=factor, cnn_downscaling_filters=4)
    assert model.input_shape == (None, *size, 3)
    assert model.get_layer("backbone").input_shape == (None, *backbone_size, 3)


def test_downscaling_layers(downscaling_mobilenet):
    structure = [
        (layer.filters, layer.kernel_size, layer.strides, layer.activation.__name__, layer.padding)
        for layer in downscaling_mobilenet.get_layer("downscaling").layers
    ]
    step = [(5, (4, 4), (2, 2), "relu", "same"), (5, (3, 3), (1, 1), "relu", "same")]
    assert structure == [*step, *step, (3, (3, 3), (1, 1), "tanh", "same")]


def test_downscaling_gives_pixels():
    inputs = keras.Input((16, 24, 3))
    model = keras.Model(inputs, downscale(inputs, 1, 4))
    last = model.get_layer("downscaling").layers[-1]
    last.set_weights([np.zeros(last.kernel.shape), np.array([-9.0, 0.0, 9.0])])
    pixels = np.asarray(model(random_images(2, 16, 24, 3)))
    assert pixels.shape == (2, 8, 12, 3)
    np.testing.assert_allclose(pixels, np.broadcast_to([0, 127.5, 255], pixels.shape), atol=1e-4)


@pytest.mark.parametrize(("popped", "last_layer", "shape"), [(0, "block5_pool", (1, 3)), (1, "block5_conv3", (2, 6))])
def test_popping_drops_layers_from_the_end(popped, last_layer, shape):
    backbone = build_backbone("VGG16", (32, 96), False, popped)
    assert backbone.layers[-1].name == last_layer
    assert backbone.output_shape == (None, *shape, 512)
    assert len(backbone.layers) == 19 - popped


def test_popping_down_to_the_first_layer():
    assert [layer.name for layer in build_backbone("VGG16", (32, 32), False, 17).layers[1:]] == ["block1_conv1"]


@pytest.mark.parametrize("popped", [18, 19, 500])
def test_popping_too_many_layers_is_refused(popped):
    with pytest.raises(UserError, match=rf"pop_conv_layers: VGG16 has 18 layers.*Received: {popped}"):
        build_backbone("VGG16", (32, 32), False, popped)


def test_popping_onto_no_feature_map_suggests_what_works():
    with pytest.raises(UserError, match="pop_conv_layers.*no feature map") as caught:
        build_backbone("EfficientNetB0", (64, 64), False, 9)
    suggested = int(re.search(r"Choose (\d+)", str(caught.value)).group(1))
    backbone = build_backbone("EfficientNetB0", (64, 64), False, suggested)
    assert len(backbone.output_shape) == 4
    assert backbone.output_shape[1:3] == (2, 2)


@pytest.mark.parametrize(("multi_label", "metric"), [(False, "accuracy"), (True, "auroc")])
@pytest.mark.parametrize("optimizer_type", ["Adam", "SGD"])
def test_compiling_uses_the_configs(multi_label, metric, optimizer_type):
    inputs = keras.Input((2, 2, 1))
    model = keras.Model(inputs, build_head("dense", HeadOptions(3, multi_label))(inputs))
    assert compile_model(model, get_optimizer(optimizer_type, 0.125), multi_label) is model
    assert type(model.optimizer).__name__ == optimizer_type
    assert float(model.optimizer.learning_rate) == 0.125
    labels = np.eye(3)[[0, 1, 2, 0]] if multi_label else np.array([0, 1, 2, 0])
    logs = model.train_on_batch(np.random.default_rng(0).random((4, 2, 2, 1)), labels, return_dict=True)
    assert set(logs) == {"loss", metric}


@pytest.fixture
def no_download(monkeypatch, tmp_path):
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


FAILURES = {
    "offline": urllib.error.URLError("Name or service not known"),
    "missing": urllib.error.HTTPError("https://example.org", 404, "Not Found", None, None),
}


def check_missing_weights(name: str, targets: list[tuple[str, str]]) -> None:
    size = LARGER_SIZES.get(name, (32, 32))
    with pytest.raises(UserError) as caught:
        build(visual_model_name=name, use_imagenet_weights=True, image_target_size=(*size, 3))
    (origin, target) = targets[-1]
    folder, file_name = os.path.split(target)
    for part in (origin, folder, f" {file_name} ", "--use_imagenet_weights False"):
        assert part in str(caught.value)


@pytest.mark.parametrize("failure", FAILURES)
def test_missing_imagenet_weights_are_explained(no_download, failure):
    check_missing_weights("MobileNet", no_download(FAILURES[failure]))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), TimeoutError("timed out")])
def test_a_download_that_breaks_off_is_explained(no_download, tmp_path, error):
    no_download(error)
    with pytest.raises(UserError, match="--use_imagenet_weights False") as caught:
        build(use_imagenet_weights=True)
    assert str(tmp_path / "models") in str(caught.value)


def test_imagenet_weights_in_a_folder_that_cannot_be_written_are_used(no_download, tmp_path, monkeypatch):
    targets = no_download(FAILURES["offline"])
    stored = keras.applications.MobileNet(weights=None, include_top=False, input_shape=(32, 32, 3))
    (tmp_path / "models").mkdir()
    stored.save(tmp_path / "models" / "mobilenet_1_0_224_tf_no_top.h5")
    access = os.access
    # As root, who may write anywhere, finds a disk that is read-only.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    backbone = build_backbone("MobileNet", (32, 32), True, 0)
    np.testing.assert_array_equal(backbone.get_weights()[0], stored.get_weights()[0])
    assert not targets


def test_imagenet_weights_that_may_not_be_read_are_explained(no_download, tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(keras.applications, "MobileNet", refuse)
    with pytest.raises(UserError, match="weights of MobileNet cannot be read: you have no permission") as caught:
        build_backbone("MobileNet", (32, 32), True, 0)
    assert str(tmp_path / "models") in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST_OF_FAMILY)
def test_missing_imagenet_weights_of_every_family_are_explained(no_download, name):
    check_missing_weights(name, no_download(FAILURES["offline"]))


LOAD_ELSEWHERE = """
import sys
import keras, numpy as np
model = keras.models.load_model(sys.argv[1], safe_mode=True)
assert not {"model", "configs", "utils", "finetune"} & set(sys.modules)
np.save(sys.argv[3], model(np.load(sys.argv[2]), training=False))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MobileNet", {"cnn_downscaling_factor": 1, "cnn_downscaling_filters": 2, "classifier_layer_sizes": [4, 0.4]}),
        pytest.param("ConvNeXtTiny", {}, marks=pytest.mark.slow),
        pytest.param("VGG16", {"final_layer_pooling": None, "pop_conv_layers": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_saved_model_loads_without_this_project(tmp_path, name, options):
    model = build_alive(visual_model_name=name, image_target_size=(64, 64, 3), **options)
    images = random_images(2, 64, 64, 3)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images)
    paths = [str(tmp_path / file) for file in ("model.keras", "images.npy", "probabilities.npy")]
    subprocess.run([sys.executable, "-I", "-c", LOAD_ELSEWHERE, *paths], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(paths[-1]), model(images, training=False), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_16_bits_and_answers_in_32(monkeypatch, tmp_path, kind):
    monkeypatch.setattr("finetune.core.devices.choose_mixed_policy", lambda: f"mixed_{kind}")
    options = {"visual_model_name": "MobileNet", "use_imagenet_weights": False, "image_target_size": (32, 32, 3)}
    configs = Configs(**options, classes=["a", "b", "c"], mixed_precision=True)
    model = ModelFactory().get_model(configs)
    backbone, head = model.get_layer("backbone"), model.get_layer("classifier")
    assert {layer.compute_dtype for layer in backbone.layers} == {kind}
    assert model.get_layer("preprocessing").compute_dtype == "float32"
    assert head.get_layer("logits").compute_dtype == "float32"
    assert {weight.dtype for weight in model.weights if "seed" not in weight.path} == {"float32"}
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (kind == "float16")
    assert keras.config.dtype_policy().name == "float32"
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    history = model.fit(images, np.arange(8) % 3, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    predicted = model.predict(images, verbose=0)
    assert predicted.dtype == np.float32
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        keras.models.load_model(tmp_path / "model.keras").predict(images, verbose=0), predicted
    )
    heatmaps, probabilities = GradCam(model)(images)
    assert heatmaps.dtype == probabilities.dtype == np.float32


@pytest.mark.slow
def test_mixed_precision_is_close_to_full_precision():
    options = {"visual_model_name": "MobileNet", "use_imagenet_weights": False, "image_target_size": (64, 64, 3)}
    full, mixed = (
        ModelFactory().get_model(Configs(**options, classes=["a", "b", "c"], mixed_precision=is_mixed))
        for is_mixed in (False, True)
    )
    mixed.set_weights(full.get_weights())
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    np.testing.assert_allclose(mixed.predict(images, verbose=0), full.predict(images, verbose=0), atol=0.02)
