"""Backbones of KerasHub, on small ones with random weights: no accuracy is claimed of any."""

import json
import sys
from types import SimpleNamespace
from typing import NamedTuple

import keras
import numpy as np
import pytest
from built_models import random_images
from hub_presets import OFFSET, SCALE, SIDE, SMALL, needs_keras_hub, write_preset
from small_runs import assert_same_run, options_of, start, tables  # noqa: F401

import compare_backbones
import compress_weights
import draw_activations
import find_label_errors
import test as evaluation
from compare_backbones import CompareConfigs
from compress_weights import CompressConfigs
from configs import Configs
from find_label_errors import LabelErrorConfigs
from finetune.core.options import UserError
from finetune.evaluation.gradcam import GradCam
from finetune.models.backbones import (
    describe_source,
    find_backbone,
    freeze_layers,
    has_fixed_features,
    list_units,
    prepare_backbone,
)
from finetune.models.kerashub import PREFIX, resize_positions, settle_positions
from finetune.models.model_files import load_model
from finetune.models.safety import check_layers, list_layer_packages
from model import ModelFactory

CLASSES = ["blue", "green", "red"]
TRANSFORMERS = {"ViT", "DeiT", "DINOV2", "DINOV3", "SigLIPVisionEncoder", "CLIPVisionEncoder", "SwinTransformer", "MiT"}
STOCK = {"CSPNet", "EfficientNet", "ResNet", "Xception", "VGG", "DenseNet"}
MAIN = ["DINOV2Backbone", "HGNetV2Backbone", "MobileNetV5Backbone"]


class Built(NamedTuple):
    kind: str
    folder: str
    own: keras.Model
    model: keras.Model


def configs_of(folder, side=SIDE, **options):
    values = {"visual_model_name": f"{PREFIX}{folder}", "image_target_size": (side, side, 3), "classes": CLASSES}
    return Configs(**values | options)


@pytest.fixture(scope="module", params=SMALL)
def built(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp(request.param) / "preset")
    own = write_preset(request.param, folder)
    return Built(request.param, folder, own, ModelFactory().get_model(configs_of(folder)))


@needs_keras_hub
@pytest.mark.slow
def test_a_backbone_gives_what_kerashub_computes_of_the_scaled_pixels(built):
    images = random_images(2, SIDE, SIDE, 3).astype("float32")
    scaled = images * np.array(SCALE) + np.array(OFFSET)
    np.testing.assert_allclose(built.model.get_layer("preprocessing")(images), scaled, rtol=1e-5, atol=1e-5)
    own = built.own
    if built.kind == "SigLIPVisionEncoder":  # its own output is pooled
        own = keras.Model(own.input, own.post_layer_norm.output)
    names = own.input if isinstance(own.input, dict) else {}
    found = own(dict.fromkeys(names, scaled) if names else scaled)
    found = np.asarray([*found.values()][-1] if isinstance(found, dict) else found)
    features = np.asarray(built.model.get_layer("backbone")(scaled))
    assert features.ndim == 4
    if found.ndim == 3:
        found = found[:, -features.shape[1] * features.shape[2] :].reshape(features.shape)
    if built.kind == "DINOV2Backbone":  # its positions are interpolated from those of 80 pixels
        assert features.shape == found.shape
        return
    np.testing.assert_allclose(features, found, rtol=1e-3, atol=1e-4)


@needs_keras_hub
@pytest.mark.slow
def test_what_is_trained_saved_and_read_back_answers_the_same(built, tmp_path):
    model = ModelFactory().get_model(configs_of(built.folder, 96))
    images, labels = random_images(4, 96, 96, 3), np.array([0, 1, 2, 0])
    before = np.asarray(model(images, training=False))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", run_eagerly=True)
    for _ in range(2):
        model.train_on_batch(images, labels)
    answers = np.asarray(model(images, training=False))
    assert np.abs(answers - before).max() > 1e-4
    settle_positions(model)
    np.testing.assert_array_equal(model(images, training=False), answers)
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = load_model(path)
    np.testing.assert_allclose(loaded(images, training=False), answers, rtol=0, atol=1e-6)
    assert bool(list_layer_packages(path)) != (built.kind.removesuffix("Backbone") in STOCK)
    heatmaps, probabilities = GradCam(loaded)(images)
    assert heatmaps.shape[1:] == model.get_layer("backbone").output_shape[1:3]
    np.testing.assert_allclose(probabilities, answers, atol=1e-4)


@needs_keras_hub
@pytest.mark.slow
def test_the_last_blocks_or_convolutions_are_trained(built):
    backbone = built.model.get_layer("backbone")
    units, word = list_units(backbone)
    is_transformer = built.kind.removesuffix("Backbone") in TRANSFORMERS
    assert word == ("transformer blocks" if is_transformer else "convolutions")
    prepare_backbone(backbone, 1, 0.9)
    assert [bool(unit.trainable_weights) for unit in units] == [False] * (len(units) - 1) + [True]
    with pytest.raises(UserError, match=f"conv_layers_to_train.*{len(units)} {word}"):
        freeze_layers(backbone, len(units) + 1)
    prepare_backbone(backbone, 0, 0.9)
    assert not backbone.trainable_weights
    # These two drop parts at random in training.
    assert has_fixed_features(built.model) == (built.kind not in ("SwinTransformerBackbone", "MiTBackbone"))
    prepare_backbone(backbone, -1, 0.8, freeze_batch_norm=True)
    norms = [layer for layer in backbone._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    assert {(layer.momentum, bool(layer.trainable_weights)) for layer in norms} <= {(0.8, False)}


@pytest.fixture(scope="module", params=MAIN)
def run(request, tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    write_preset(request.param, folder / "preset")
    recipe = {"head_initialization": "linear_probe", "conv_layers_to_train": 1, "pop_conv_layers": 0}
    names = {"visual_model_name": f"{PREFIX}{folder}/preset", "use_imagenet_weights": True}
    options = options_of(tables, folder / "run", **names, **recipe, num_epochs=2)
    start(**options)
    return folder, options


@needs_keras_hub
@pytest.mark.slow
def test_one_is_trained_tested_explained_and_exported(run):
    folder, _ = run
    path = str(folder / "run")
    assert "accuracy" in evaluation.main(Configs(load_model_path=path))["sets"]["test"]
    assert draw_activations.main(Configs(load_model_path=path))
    formats = ["tflite", "onnx", "saved_model"]
    report = compress_weights.main(CompressConfigs(model_path=path, export=formats, tolerance=100))
    assert [one["comparison"]["largest_difference"] < 1e-4 for one in report["artefacts"]] == [True] * 4
    card = (folder / "run" / "MODEL_CARD.md").read_text()
    assert "keras-hub" in card
    assert str(folder) not in card


@needs_keras_hub
@pytest.mark.slow
@pytest.mark.parametrize("run", ["DINOV2Backbone"], indirect=True)
def test_a_run_goes_on_bit_for_bit_without_its_preset(run):
    folder, options = run
    stopped = str(folder / "stopped")
    start(**options | {"save_model_path": stopped, "num_epochs": 1})
    (folder / "preset").rename(folder / "moved")
    try:
        start(load_model_path=stopped, save_model_path=stopped, num_epochs=2)
    finally:
        (folder / "moved").rename(folder / "preset")
    assert_same_run(folder / "run", stopped)


@needs_keras_hub
@pytest.mark.slow
def test_they_are_compared_and_find_label_errors(tables, tmp_path):
    write_preset("HGNetV2Backbone", tmp_path / "preset")
    name, cache = f"{PREFIX}{tmp_path}/preset", str(tmp_path / "cache")
    common = {"train_csv": str(tables[0]), "image_target_size": (32, 32, 3), "image_cache_path": cache}
    compared = CompareConfigs(backbones=[name], write_path=str(tmp_path / "table.csv"), **common)
    assert compare_backbones.main(compared)["ranking"]["backbone"].tolist() == [name]
    found = LabelErrorConfigs(
        visual_model_name=name, csv_path=str(tables[0]), write_path=str(tmp_path / "e.csv"), **common
    )
    assert find_label_errors.main(found) is not None


@needs_keras_hub
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "named"),
    [
        ("ViTBackbone", (70, 64, 3), ["multiples of 16", "64 64"]),
        ("DINOV2Backbone", (64, 80, 3), ["square"]),
        ("MiTBackbone", (4, 8, 3), ["8 pixels"]),
    ],
)
def test_a_size_of_no_whole_patches_is_refused(kind, size, named, tmp_path):
    write_preset(kind, tmp_path / "preset")
    with pytest.raises(UserError, match="image_target_size") as caught:
        ModelFactory().get_model(configs_of(tmp_path / "preset", image_target_size=size))
    assert all(words in str(caught.value) for words in named)


@needs_keras_hub
@pytest.mark.slow
def test_a_vit_takes_oblong_images_but_no_second_size(tmp_path):
    write_preset("ViTBackbone", tmp_path / "preset")
    configs = configs_of(tmp_path / "preset", image_target_size=(32, 80, 3))
    pretrained, random = (
        ModelFactory().get_model(configs.replace(use_imagenet_weights=loads)).get_layer("backbone")
        for loads in (True, False)
    )
    assert pretrained.output_shape == random.output_shape == (None, 2, 5, 16)
    assert not np.allclose(pretrained.get_weights()[0], random.get_weights()[0])
    with pytest.raises(UserError, match="eval_image_size"):
        ModelFactory().get_model(configs.replace(eval_image_size=[64, 160]))


@needs_keras_hub
@pytest.mark.slow
def test_the_image_tower_of_two_is_taken(tmp_path):
    import keras_hub

    tower = keras_hub.models.CLIPVisionEncoder(**SMALL["CLIPVisionEncoder"])
    text = {"vocabulary_size": 9, "embedding_dim": 16, "hidden_dim": 16, "max_sequence_length": 4}
    encoder = keras_hub.models.CLIPTextEncoder(**text, num_layers=1, num_heads=2, intermediate_dim=16)
    keras_hub.models.CLIPBackbone(tower, encoder, projection_dim=8).save_to_preset(str(tmp_path))
    configs = configs_of(tmp_path, backbone_preprocessing=["tf"])
    images = random_images(2, SIDE, SIDE, 3).astype("float32")
    found = ModelFactory().get_model(configs).get_layer("backbone")(images / 127.5 - 1)
    expected = np.asarray(tower({"images": images / 127.5 - 1}))[:, 1:]
    np.testing.assert_allclose(np.asarray(found).reshape(expected.shape), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="backbone_preprocessing"):
        find_backbone(f"{PREFIX}{tmp_path}")


def test_position_embeddings_keep_their_place():
    values = np.concatenate([np.full((1, 1, 2), 7.0), np.arange(32.0).reshape(1, 16, 2)], axis=1).astype("float32")
    np.testing.assert_array_equal(resize_positions(values, (1, 17, 2), (4, 4), True), values)
    resized = resize_positions(values, (1, 9, 2), (2, 4), True)
    np.testing.assert_array_equal(resized[0, 0], [7, 7])
    grid = resized[0, 1:].reshape(2, 4, 2)
    assert (np.diff(grid, axis=0) > 0).all()
    assert (np.diff(grid, axis=1) > 0).all()
    assert grid.mean() == pytest.approx(15.5, abs=0.2)


class ViTEncoderBlock(keras.layers.Layer):
    """By its name a block, of a layer that has a convolution."""

    def build(self, input_shape):
        self.inner = keras.layers.Conv2D(3, 1, name="inner")
        self.inner.build(input_shape)

    def call(self, inputs):
        return self.inner(inputs)


def test_blocks_within_a_layer_are_counted_in_the_place_of_convolutions():
    encoder = keras.Sequential([ViTEncoderBlock(name=f"block{number}") for number in range(3)])
    inputs = keras.Input((8, 8, 3))
    backbone = keras.Model(inputs, encoder(keras.layers.Conv2D(3, 3, name="stem")(inputs)))
    units, word = list_units(backbone)
    assert ([unit.name for unit in units], word) == (["block0", "block1", "block2"], "transformer blocks")
    prepare_backbone(backbone, 2, None)
    trained = [
        layer.name
        for layer in backbone._flatten_layers()
        if type(layer).__name__ == "Conv2D" and layer.trainable_weights
    ]
    assert len(trained) == 2
    assert [bool(unit.trainable_weights) for unit in units] == [False, True, True]


# What goes wrong, with a KerasHub that has two presets and no network.


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def download(handle):
        raise OSError(f"no route to {handle}")

    facts = {name: {"metadata": {"path": name[:6]}, "kaggle_handle": f"kaggle://keras/{name}/1"} for name in PRESETS}
    backbone = SimpleNamespace(presets=facts | {"bert": {"metadata": {"path": "bert"}, "kaggle_handle": "kaggle://b"}})
    monkeypatch.setitem(sys.modules, "keras_hub", SimpleNamespace(models=SimpleNamespace(Backbone=backbone)))
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(model_download=download))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    return tmp_path


PRESETS = ("dinov2_small", "dinov2_base", "dinov3_vit_small")


def test_an_unknown_preset_is_told_with_the_nearest(offline):
    with pytest.raises(UserError, match="visual_model_name.*dinov2_smal'.*dinov2_small or"):
        find_backbone("kerashub:dinov2_smal")
    with pytest.raises(UserError, match="backbones.*'bert'"):
        find_backbone("kerashub:bert", option="backbones")


def test_a_preset_that_cannot_be_had_is_told_with_its_folder(offline, capsys):
    with pytest.raises(UserError, match="kerashub:FOLDER") as caught:
        find_backbone("kerashub:dinov3_vit_small")
    assert str(offline / "models" / "keras" / "dinov3_vit_small" / "1") in str(caught.value)
    assert "no route" in str(caught.value)
    # Said before the download.
    assert "DINOv3 License" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "named"),
    [("{", "not a preset"), ("[]", "not a preset"), ('{"class_name": "BertBackbone"}', "BertBackbone")],
)
def test_a_folder_that_is_no_preset_of_images_is_refused(offline, content, named):
    folder = offline / "models" / "keras" / "dinov2_base" / "1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    for name in ("dinov2_base", str(folder)):
        with pytest.raises(UserError, match=named) as caught:
            find_backbone(PREFIX + name)
        assert "\n" not in str(caught.value)


def test_without_keras_hub_the_line_to_install_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(UserError, match=r"kerashub:dinov2_small.*pip install 'keras-hub>=0.32,<0.33'"):
        find_backbone("kerashub:dinov2_small")
    layer = {"module": "keras_hub.src.models.vit.vit_backbone", "class_name": "ViTBackbone"}
    with pytest.raises(UserError, match=r"model.keras.*pip install 'keras-hub>=0.32,<0.33'"):
        check_layers(layer | {"registered_name": "keras_hub>ViTBackbone", "config": {}}, "model.keras")


@pytest.mark.parametrize(
    "layer",
    [
        {"module": "keras_hub.src.utils.preset_utils", "class_name": "KerasPresetSaver"},
        {"module": "keras_hub.src.models.bert.bert_tokenizer", "class_name": "BertTokenizer"},
        {"module": "keras_hub.src.models.vit.vit_presets", "class_name": "x"},
        {"module": "keras_hub.evil", "class_name": "x"},
        {"module": "keras_hub_evil.src.models.vit.vit_layers", "class_name": "x"},
        {"module": "keras.layers", "class_name": "Dense", "registered_name": "keras_hub>BertTokenizer"},
    ],
)
def test_nothing_but_layers_of_image_backbones_is_trusted(layer):
    with pytest.raises(UserError, match=r"model.keras is not loaded"):
        check_layers({"config": {"layers": [layer]}}, "model.keras")


@needs_keras_hub
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "registered", "trusted"),
    [
        ("ViTBackbone", "keras_hub>ViTBackbone", True),
        ("ViTBackbone", "keras_hub>BertTokenizer", False),
        ("standardize_data_format", "function", False),
        ("missing", "missing", False),
    ],
)
def test_a_trusted_module_holds_more_than_is_trusted(name, registered, trusted):
    layer = {"module": "keras_hub.src.models.vit.vit_backbone", "class_name": name, "registered_name": registered}
    if trusted:
        check_layers(layer, "model.keras")
    else:
        with pytest.raises(UserError, match=r"model.keras is not loaded"):
            check_layers(layer, "model.keras")


def test_the_source_and_the_licence_are_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"class_name": "DINOV3Backbone"}))
    assert "DINOv3 License" in describe_source(f"{PREFIX}{tmp_path}")
    assert "dinov2_small" in describe_source(f"{PREFIX}dinov2_small")
    assert "Gemma" in describe_source(f"{PREFIX}mobilenetv5_300m_enc_gemma3n")
    assert "own.keras" in describe_source("folder/own.keras")
    assert describe_source("MobileNet") == ""
