"""A backbone from a model file of one's own."""

import keras
import numpy as np
import pandas as pd
import pytest
from built_models import random_images
from keras import layers
from small_runs import options_of, tables  # noqa: F401

import compress_weights
import draw_activations
import test as evaluation
import train
from compress_weights import CompressConfigs
from configs import Configs
from finetune.core.options import UserError
from finetune.core.values import scaling_fault
from finetune.models.backbone_entry import Backbone
from finetune.models.backbones import find_backbone
from finetune.models.model_files import load_model
from model import ModelFactory

CLASSES = ["blue", "green", "red"]


def write_network(path, size=(None, None), head=(), channels=3) -> keras.Model:
    """Writes a backbone of two convolutions, which pads at two sides as none of Keras's does."""
    inputs = outputs = keras.Input((*size, channels))
    for filters in (8, 12):
        outputs = layers.ZeroPadding2D()(outputs)
        outputs = layers.Conv2D(filters, 3, strides=2)(outputs)
        outputs = layers.BatchNormalization()(outputs)
        outputs = layers.ReLU()(outputs)
    for layer in head:
        outputs = layer(outputs)
    network = keras.Model(inputs, outputs)
    network.save(path)
    return network


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "own.keras")


def options(path, **others):
    return {
        "visual_model_name": path,
        "image_target_size": (24, 40, 3),
        "classes": CLASSES,
        "backbone_preprocessing": ["tf"],
        **others,
    }


@pytest.mark.parametrize(
    ("scaling", "scale"),
    [
        (["tf"], lambda pixels: pixels / 127.5 - 1),
        (["0.5", "-3"], lambda pixels: pixels * 0.5 - 3),
        (["none"], lambda pixels: pixels),
        (["caffe"], lambda pixels: pixels[..., ::-1] - [103.939, 116.779, 123.68]),
    ],
)
def test_a_backbone_sees_what_its_scaling_makes_of_the_pixels(path, scaling, scale):
    network = write_network(path)
    model = ModelFactory().get_model(Configs(**options(path, backbone_preprocessing=scaling)))
    images = random_images(2, 24, 40, 3)
    assert [layer.name for layer in model.layers[1:]] == ["preprocessing", "backbone", "classifier"]
    found = model.get_layer("backbone")(model.get_layer("preprocessing")(images.astype("float32")))
    np.testing.assert_allclose(found, network(scale(images.astype("float32"))), rtol=1e-4, atol=1e-4)


def test_random_weights_and_16_bits_where_they_are_asked_for(path):
    network = write_network(path)
    configs = Configs(**options(path, use_imagenet_weights=False, mixed_precision=True))
    backbone = ModelFactory().get_model(configs).get_layer("backbone")
    assert not np.allclose(backbone.weights[0], network.weights[0])
    assert {layer.compute_dtype for layer in backbone.layers if layer.weights} == {"bfloat16"}
    assert backbone.layers[-1].name == find_backbone(path, ["tf"]).last_layer


@pytest.mark.parametrize(
    ("network", "named"),
    [
        ({"head": [layers.GlobalAveragePooling2D()]}, ["(None, None, None, 3)", "(None, 12)", "feature map"]),
        ({"head": [layers.Flatten()], "size": (24, 40)}, ["(None, 720)", "feature map"]),
        ({"channels": 1}, ["(None, None, None, 1)", "(batch, height, width, 3)"]),
    ],
)
def test_a_file_that_is_no_backbone_is_refused_with_what_was_expected(path, network, named):
    write_network(path, **network)
    with pytest.raises(UserError, match="visual_model_name") as caught:
        ModelFactory().get_model(Configs(**options(path)))
    assert all(words in str(caught.value) for words in [path, *named])


def test_a_file_of_one_size_takes_no_other(path):
    write_network(path, size=(32, 32), head=[layers.Reshape((8 * 8, 12)), layers.Reshape((8, 8, 12))])
    with pytest.raises(UserError, match=r"own.keras.*24x40.*\(None, 32, 32, 3\)"):
        ModelFactory().get_model(Configs(**options(path)))
    configs = Configs(**options(path, image_target_size=(32, 32, 3)))
    assert ModelFactory().get_model(configs).get_layer("backbone").output_shape == (None, 8, 8, 12)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"backbone_preprocessing": []}, ["backbone_preprocessing", "own.keras", "torch, tf, caffe, none"]),
        ({"visual_model_name": "missing.keras"}, ["visual_model_name", "missing.keras"]),
        ({"visual_model_name": __file__.replace(".py", ".h5")}, ["visual_model_name", "test_own_file.h5"]),
    ],
)
def test_what_is_missing_is_told_before_training(path, changed, named, tables, tmp_path):
    write_network(path)
    with pytest.raises(UserError) as caught:
        train.main(Configs(**options_of(tables, tmp_path / "run", **options(path) | {"pop_conv_layers": 0} | changed)))
    assert all(words in str(caught.value) for words in named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("values", [["keras"], ["1"], ["0", "1"], ["1", "inf"], ["1", "x"], ["1", "2", "3"]])
def test_a_scaling_that_is_none_is_refused(values):
    assert "torch, tf, caffe, none" in scaling_fault(values)
    with pytest.raises(UserError, match="backbone_preprocessing"):
        Configs(backbone_preprocessing=values).validate()


@pytest.mark.parametrize("values", [[], ["none"], ["caffe"], ["0.0039", "-1"]])
def test_a_scaling_that_is_one_is_taken(values):
    assert scaling_fault(values) == ""


@pytest.mark.parametrize(
    ("size", "named"),
    [((15, 32), ["16 pixels", "15x32"]), ((32, 40), ["multiples of 16", "32 32"]), ((32, 48), ["square", "32 32"])],
)
def test_a_size_that_a_backbone_does_not_take_is_refused_with_one_that_it_does(size, named):
    entry = Backbone(write_network, 224, 16, None, "last", size_multiple=16, is_square=True)
    with pytest.raises(UserError, match="eval_image_size: Toy") as caught:
        entry.check_size("Toy", "eval_image_size", size, size)
    assert all(words in str(caught.value) for words in named)
    entry.check_size("Toy", "eval_image_size", (64, 64), (32, 32))


@pytest.mark.slow
def test_one_is_trained_tested_explained_and_exported(path, tables, tmp_path):
    write_network(path)
    folder = str(tmp_path / "run")
    recipe = {"head_initialization": "linear_probe", "conv_layers_to_train": 1, "use_imagenet_weights": True}
    others = options(path, image_target_size=(24, 24, 3), pop_conv_layers=0, num_epochs=1, classes=None, **recipe)
    results = train.main(Configs(**options_of(tables, folder, **others)))
    assert np.isfinite(results["loss"])
    assert evaluation.main(Configs(load_model_path=folder))["sets"]["test"]["accuracy"] > 0.5
    assert draw_activations.main(Configs(load_model_path=folder))
    formats = ["tflite", "onnx", "saved_model"]
    report = compress_weights.main(CompressConfigs(model_path=folder, export=formats, tolerance=100))
    assert len(report["artefacts"]) == 4
    assert all(one["comparison"]["largest_difference"] < 1e-4 for one in report["artefacts"])
    # The file that it came from is no longer needed.
    (tmp_path / "own.keras").unlink()
    train.main(Configs(load_model_path=folder, save_model_path=folder, num_epochs=2))
    assert len(pd.read_csv(f"{folder}/training_log.csv")) == 2
    assert load_model(f"{folder}/best_model.keras").output_shape == (None, 3)
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert "own.keras" in card
    assert str(tmp_path) not in card
