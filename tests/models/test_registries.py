"""Adding a backbone, head, optimizer, loss or augmentation takes one registry entry and nothing else."""

import keras
import numpy as np
import pandas as pd
import pytest
from small_runs import options_of, tables  # noqa: F401

import augmenter
import compress_weights
import draw_activations
import predict
import test as evaluation
import train
from compress_weights import CompressConfigs
from configs import Configs
from finetune.core.options import UserError
from finetune.models.backbones import BACKBONES, Backbone
from finetune.models.compiling import LOSSES, OPTIMIZERS, Loss, Optimizer
from finetune.models.heads import HEADS, POOLING
from finetune.models.model_files import load_model
from predict import PredictConfigs


def build_toy_backbone(image_size, use_pretrained_weights):
    inputs = keras.Input((*image_size, 3))
    outputs = keras.layers.Conv2D(8, 3, strides=4, padding="same", activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Conv2D(8, 3, padding="same", activation="relu")(outputs))


def list_toy_layers(options):
    return [keras.layers.GlobalAveragePooling2D(name=POOLING), keras.layers.LayerNormalization(name="norm")]


@pytest.fixture
def toy_backbone(monkeypatch):
    entry = Backbone(build_toy_backbone, input_size=32, minimum_size=8, preprocessing=(1 / 64, -2.0), last_layer="last")
    monkeypatch.setitem(BACKBONES, "Toy", entry)
    return {"visual_model_name": "Toy", "use_imagenet_weights": False, "pop_conv_layers": 0}


@pytest.mark.slow
def test_a_backbone_is_trained_explained_exported_and_predicts(toy_backbone, tables, tmp_path):
    configs = Configs(**options_of(tables, tmp_path / "run", num_epochs=2, **toy_backbone))
    train.main(configs)
    model = load_model(str(tmp_path / "run" / "best_model.keras"))
    assert [layer.name for layer in model.layers[1:]] == ["preprocessing", "backbone", "classifier"]
    found = model.get_layer("preprocessing")(np.array([[[[128.0, 64.0, 0.0]]]]))
    np.testing.assert_allclose(found, [[[[0.0, -1.0, -2.0]]]])
    folder = str(tmp_path / "run")
    assert draw_activations.main(Configs(load_model_path=folder))
    report = compress_weights.main(CompressConfigs(model_path=folder, export=["tflite"], tolerance=100))
    assert report["artefacts"][1]["comparison"]["largest_difference"] < 1e-4
    options = {"input": pd.read_csv(tables[1])["path"][0], "write_path": str(tmp_path / "predictions.csv")}
    assert predict.main(PredictConfigs(load_model_path=folder, **options))
    assert pd.read_csv(options["write_path"]).shape[0] == 1


@pytest.mark.slow
def test_a_head_with_layer_norm_starts_from_a_linear_probe(toy_backbone, monkeypatch, tables, tmp_path):
    monkeypatch.setitem(HEADS, "toy", list_toy_layers)
    options = {"head": "toy", "head_initialization": "linear_probe", "conv_layers_to_train": 0, "learning_rate": 1e-6}
    results = train.main(Configs(**options_of(tables, tmp_path / "run", num_epochs=1, **toy_backbone | options)))
    # Every channel separates the photos' colours: a probe on the inputs of the logits finds all classes.
    assert results["best"] == 1
    folder = str(tmp_path / "run")
    assert evaluation.main(Configs(load_model_path=folder))["sets"]["test"]["accuracy"] == 1
    assert draw_activations.main(Configs(load_model_path=folder))


@pytest.mark.slow
def test_a_run_trains_with_an_added_optimizer_and_loss(toy_backbone, monkeypatch, tables, tmp_path):
    def build_loss(class_weights, label_smoothing):
        return keras.losses.sparse_categorical_crossentropy

    monkeypatch.setitem(OPTIMIZERS, "Ftrl", Optimizer(keras.optimizers.Ftrl))
    monkeypatch.setitem(LOSSES, "toy", Loss(build_loss, None))
    options = {"optimizer_type": "Ftrl", "loss": "toy"}
    configs = Configs(**options_of(tables, tmp_path / "run", num_epochs=1, **toy_backbone | options))
    assert np.isfinite(train.main(configs)["loss"])
    with pytest.raises(UserError, match="loss: toy .*multi_label_classification"):
        train.main(configs.replace(multi_label_classification=True, overwrite=True))


def test_a_function_augments_like_any_augmenter(monkeypatch):
    def invert_some(images, rng):
        chosen = rng.random(len(images)) < 0.5
        return np.where(chosen[:, None, None, None], 255 - images, images)

    monkeypatch.setitem(augmenter.STRENGTHS, "light", lambda: [invert_some])
    images = np.full((64, 4, 4, 3), 10, np.uint8)
    pipeline = augmenter.build_augmenter("light")
    pipeline.seed_(3)
    first = pipeline(images=images)
    assert first.dtype == np.uint8
    assert 10 < (first == 245).all(axis=(1, 2, 3)).sum() < 54
    pipeline.seed_(3)
    np.testing.assert_array_equal(pipeline(images=images), first)
    copied = pipeline.deepcopy()
    copied.seed_(3)
    np.testing.assert_array_equal(copied(images=images), first)


@pytest.mark.parametrize(
    ("option", "name", "nearest"),
    [
        ("visual_model_name", "DenseNet112", "DenseNet121"),
        ("head", "dens", "dense"),
        ("optimizer_type", "AdamWW", "AdamW"),
        ("loss", "focale", "focal"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(option, name, nearest, tables, tmp_path):
    with pytest.raises(UserError, match=rf"^{option}: .*{name}.* {nearest}\?"):
        train.main(Configs(**options_of(tables, tmp_path / "run") | {option: name}))
    assert not (tmp_path / "run").exists()
