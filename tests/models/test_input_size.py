"""`test_image_size`: models for another image size than that of training."""

import json

import keras
import numpy as np
import pandas as pd
import pytest
from small_runs import (
    assert_same_run,
    options_of,
    start,
    tables,  # noqa: F401
)

import draw_activations
import predict
import test as evaluation
from configs import Configs
from finetune.core.options import UserError
from finetune.data.images import read_image, resize_image
from finetune.training.time_budget import count_views
from finetune.training.trainer import accept_any_size
from generator import AugmentedImageSequence
from model import ModelFactory
from predict import PredictConfigs

RECIPE = {"head_initialization": "linear_probe", "model_selection": "interpolate", "test_time_augmentation": "flip"}
RECIPE |= {"random_crop_area": [0.6, 1.0], "reduce_lr_patience": 0, "learning_rate_schedule": "one_cycle"}


def read_all(paths, size):
    return np.stack([resize_image(read_image(path, size), size) for path in paths])


@pytest.mark.parametrize("name", ["MobileNet", pytest.param("ConvNeXtTiny", marks=pytest.mark.slow)])
def test_a_model_answers_at_another_size_like_one_built_for_it(name):
    configs = Configs(visual_model_name=name, use_imagenet_weights=False, classes=["a", "b"])
    small, large = (ModelFactory().get_model(configs.replace(image_target_size=(side, side, 3))) for side in (32, 64))
    large.set_weights(small.get_weights())
    images = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
    accept_any_size(small)
    np.testing.assert_allclose(small(images, training=False), large(images, training=False), atol=1e-6)
    assert small.input_shape == (None, 32, 32, 3)


@pytest.mark.slow
def test_training_sees_one_size_and_every_script_the_other(tables, tmp_path, monkeypatch):
    sizes, make = {True: set(), False: set()}, AugmentedImageSequence.__getitem__

    def note(sequence, index):
        batch = make(sequence, index)
        sizes[bool(sequence.shuffle)].add(batch[0].shape[1:3])
        return batch

    monkeypatch.setattr(AugmentedImageSequence, "__getitem__", note)
    folder = tmp_path / "run"
    start(**options_of(tables, folder, test_image_size=[40, 48], num_epochs=2, **RECIPE))
    # The probe's photos are no training images.
    assert sizes == {True: {(32, 32)}, False: {(40, 48)}}
    model = keras.models.load_model(folder / "best_model.keras")
    assert model.input_shape == (None, 40, 48, 3)

    table = pd.read_csv(tables[1])
    answers = model.predict(read_all(table["path"], (40, 48)), verbose=0)
    evaluation.main(Configs(load_model_path=str(folder)))
    names = [f"probability_{name}" for name in ("blue", "green", "red")]
    tested = pd.read_csv(folder / "evaluation" / "predictions.csv")[names].to_numpy()
    np.testing.assert_array_equal(tested.argmax(axis=1), answers.argmax(axis=1))
    truth = table["class"].map({"blue": 0, "green": 1, "red": 2}).to_numpy()
    results = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert results["sets"]["test"]["accuracy"] == pytest.approx((answers.argmax(axis=1) == truth).mean())
    options = {"load_model_path": str(folder), "write_path": str(tmp_path / "predictions.csv")}
    predicted = predict.main(PredictConfigs(input=str(tables[1]), **options))["predictions"]
    np.testing.assert_allclose(predicted[names].to_numpy(), tested, atol=1e-5)
    assert len(draw_activations.main(Configs(load_model_path=str(folder)))["paths"]) == len(table)
    assert "shape `(images, 40, 48, 3)`" in (folder / "MODEL_CARD.md").read_text()
    with pytest.raises(UserError, match="test_image_size"):
        evaluation.main(Configs(load_model_path=str(folder), test_image_size=[32, 32]))


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"test_image_size": [48, 48]}, {"test_time_augmentation": "flip"}])
def test_a_run_resumes_bit_for_bit(tables, tmp_path, option):
    options = option | {"num_epochs": 2}
    start(**options_of(tables, tmp_path / "whole", **options))
    start(**options_of(tables, tmp_path / "halves", **options | {"num_epochs": 1}))
    start(**options_of(tables, tmp_path / "halves", load_model_path=str(tmp_path / "halves"), **options))
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_a_size_is_two_numbers_that_the_backbone_takes():
    with pytest.raises(UserError, match="test_image_size: .*height and a width"):
        Configs(test_image_size=[224]).validate()
    configs = Configs(test_image_size=[16, 64], use_imagenet_weights=False, visual_model_name="Xception", classes=["a"])
    with pytest.raises(UserError, match="test_image_size: Xception .* 71 pixels .*16x64"):
        ModelFactory().get_model(configs)


def test_validating_larger_images_takes_more_time():
    class Sequence:
        steps = 10

    configs = Configs(image_target_size=(100, 100, 3))
    once, _ = count_views(configs, Sequence, Sequence, refits=False)
    larger, _ = count_views(configs.replace(test_image_size=[200, 150]), Sequence, Sequence, refits=False)
    assert larger == pytest.approx(3 * once)
