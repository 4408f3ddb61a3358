"""The model factory: the parts of a model, their order, types and precision."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from built_models import build, build_alive, flatten_layers, random_images
from keras import layers

from finetune.core.options import UserError
from finetune.evaluation.gradcam import GradCam
from finetune.models.compiling import compile_model, get_optimizer
from finetune.models.heads import HeadOptions, build_head
from model import downscale

PARTS = ["downscaling", "preprocessing", "backbone", "classifier"]


@pytest.fixture(scope="module")
def mobilenet():
    return build_alive()


@pytest.fixture(scope="module")
def downscaling_mobilenet():
    return build(
        image_target_size=(126, 141, 3), cnn_downscaling_factor=2, cnn_downscaling_filters=5, conv_layers_to_train=0
    )


def test_too_small_an_image_after_downscaling_is_refused():
    with pytest.raises(UserError, match="image_target_size.*124x124.*31x31"):
        build(image_target_size=(124, 124, 3), cnn_downscaling_factor=2)


def test_output_is_a_probability_of_each_class(mobilenet):
    assert [layer.name for layer in mobilenet.layers[1:]] == PARTS[1:]
    probabilities = np.asarray(mobilenet(random_images(3, 32, 32, 3)))
    assert probabilities.shape == (3, 3)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.ptp(probabilities, axis=0).min() > 1e-3


@pytest.mark.parametrize("name", ["MobileNet", pytest.param("VGG16", marks=pytest.mark.slow)])
def test_input_of_any_numeric_type(name, mobilenet):
    """MobileNet's preprocessing scales its input; that of VGG16 is a convolution."""
    model, images = build(visual_model_name=name) if name == "VGG16" else mobilenet, random_images(2, 32, 32, 3)
    expected = model(images.astype(np.float32))
    for kind in (np.uint8, np.int32, np.int64, np.float64):
        np.testing.assert_array_equal(model(images.astype(kind)), expected)
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("layer_sizes", "expected"),
    [
        ([10, 0.4, 5], [("Dense", 10), ("Dropout", 0.4), ("Dense", 5)]),
        ([], []),
        ([1.0, 0], [("Dense", 1), ("Dropout", 0)]),
    ],
)
def test_classifier_layer_sizes(layer_sizes, expected):
    head = build_head("dense", HeadOptions(3, False, layer_sizes))
    hidden = head.layers[1:-2]
    found = [(type(layer).__name__, getattr(layer, "units", getattr(layer, "rate", None))) for layer in hidden]
    assert found == expected
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


def test_downscaling_halves_images_and_learns_while_the_backbone_is_frozen(downscaling_mobilenet):
    model = downscaling_mobilenet
    assert [layer.name for layer in model.layers if layer.name in PARTS] == PARTS
    assert model.input_shape == (None, 126, 141, 3)
    assert model.get_layer("backbone").input_shape == (None, 32, 36, 3)
    structure = [
        (layer.filters, layer.kernel_size, layer.strides, layer.activation.__name__, layer.padding)
        for layer in model.get_layer("downscaling").layers
    ]
    step = [(5, (4, 4), (2, 2), "relu", "same"), (5, (3, 3), (1, 1), "relu", "same")]
    assert structure == [*step, *step, (3, (3, 3), (1, 1), "tanh", "same")]
    assert len(model.get_layer("downscaling").trainable_weights) == 10
    assert model.get_layer("backbone").trainable_weights == []


def test_batch_norms_have_the_momentum_of_the_configs(downscaling_mobilenet):
    norms = [layer for layer in flatten_layers(downscaling_mobilenet) if isinstance(layer, layers.BatchNormalization)]
    assert len(norms) == 27
    assert {layer.momentum for layer in norms} == {0.9}


def test_downscaling_gives_pixels_and_rounds_odd_sizes_up():
    inputs = keras.Input((15, 24, 3))
    model = keras.Model(inputs, downscale(inputs, 1, 4))
    last = model.get_layer("downscaling").layers[-1]
    last.set_weights([np.zeros(last.kernel.shape), np.array([-9.0, 0.0, 9.0])])
    pixels = np.asarray(model(random_images(2, 15, 24, 3)))
    assert pixels.shape == (2, 8, 12, 3)
    np.testing.assert_allclose(pixels, np.broadcast_to([0, 127.5, 255], pixels.shape), atol=1e-4)


@pytest.mark.parametrize(("multi_label", "metric"), [(False, "accuracy"), (True, "auroc")])
def test_compiling_uses_the_mode(multi_label, metric):
    inputs = keras.Input((2, 2, 1))
    model = keras.Model(inputs, build_head("dense", HeadOptions(3, multi_label))(inputs))
    optimizer = get_optimizer("SGD", 0.125)
    assert compile_model(model, optimizer, multi_label) is model
    assert model.optimizer is optimizer
    model.run_eagerly = True
    labels = np.eye(3)[[0, 1, 2, 0]] if multi_label else np.array([0, 1, 2, 0])
    logs = model.train_on_batch(np.random.default_rng(0).random((4, 2, 2, 1)), labels, return_dict=True)
    assert set(logs) == {"loss", metric}


LOAD_ELSEWHERE = """
import sys
import keras, numpy as np
images = np.load(sys.argv[1])
for path in sys.argv[2:]:
    model = keras.models.load_model(path, safe_mode=True)
    np.save(path + ".npy", model(images, training=False))
assert not {"model", "configs", "utils", "finetune"} & set(sys.modules)
"""


@pytest.mark.slow
def test_saved_models_load_without_this_project(tmp_path):
    head = {"classifier_layer_sizes": [4, 0.4]}
    cases = {
        "MobileNet": head | {"cnn_downscaling_factor": 1, "cnn_downscaling_filters": 2},
        "ConvNeXtTiny": {},
        "VGG16": {"final_layer_pooling": None, "pop_conv_layers": 1},
    }
    images, expected = random_images(2, 64, 64, 3), {}
    np.save(tmp_path / "images.npy", images)
    for name, options in cases.items():
        model = build_alive(visual_model_name=name, image_target_size=(64, 64, 3), **options)
        model.save(tmp_path / f"{name}.keras")
        expected[str(tmp_path / f"{name}.keras")] = np.asarray(model(images, training=False))
    command = [sys.executable, "-I", "-c", LOAD_ELSEWHERE, str(tmp_path / "images.npy"), *expected]
    subprocess.run(command, cwd=tmp_path, check=True)
    for path, answers in expected.items():
        np.testing.assert_allclose(np.load(path + ".npy"), answers, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_16_bits_and_answers_in_32(monkeypatch, tmp_path, kind):
    monkeypatch.setattr("finetune.core.devices.choose_mixed_policy", lambda: f"mixed_{kind}")
    model, full = build(mixed_precision=True, pop_conv_layers=66), build(pop_conv_layers=66)
    backbone, head = model.get_layer("backbone"), model.get_layer("classifier")
    assert {layer.compute_dtype for layer in backbone.layers} == {kind}
    assert model.get_layer("preprocessing").compute_dtype == "float32"
    assert head.get_layer("logits").compute_dtype == "float32"
    assert {weight.dtype for weight in model.weights if "seed" not in weight.path} == {"float32"}
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (kind == "float16")
    assert keras.config.dtype_policy().name == "float32"
    images = random_images(8, 32, 32, 3)
    model.set_weights(full.get_weights())
    np.testing.assert_allclose(model(images), full(images), atol=0.02)
    history = model.fit(images, np.arange(8) % 3, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    predicted = model.predict(images, verbose=0)
    assert predicted.dtype == np.float32
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), predicted)
    heatmaps, probabilities = GradCam(model)(images)
    assert heatmaps.dtype == probabilities.dtype == np.float32
