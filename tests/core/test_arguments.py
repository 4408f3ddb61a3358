"""What a user's own code passes is checked as the command line is: one line that names it, in place of a traceback."""

from pathlib import Path

import cv2
import keras
import numpy as np
import pytest
from exported_runs import CLASSES, build_colour_model

import compare_backbones
import compress_weights
import draw_activations
import find_label_errors
import make_csv_from_folders
import plot_training_log
import predict
import split_train_test
import test as evaluation
import train
import utils
from augmenter import build_augmenter
from configs import Configs
from finetune.core.options import UserError
from finetune.evaluation.decision import Decision
from finetune.training.trained_model import find_trained_model
from generator import AugmentedImageSequence
from model import ModelFactory

SCRIPTS = {
    compare_backbones.main: compare_backbones.CompareConfigs,
    compress_weights.main: compress_weights.CompressConfigs,
    draw_activations.main: Configs,
    find_label_errors.main: find_label_errors.LabelErrorConfigs,
    make_csv_from_folders.main: make_csv_from_folders.FolderConfigs,
    plot_training_log.main: plot_training_log.PlotConfigs,
    predict.main: predict.PredictConfigs,
    split_train_test.main: split_train_test.SplitConfigs,
    evaluation.main: Configs,
    train.main: Configs,
}
PIXELS = np.full((40, 30, 3), 7, np.uint8)
THIRDS = np.full((3, 3), 1 / 3)
NAN = float("nan")


@pytest.fixture(scope="module")
def model():
    return build_colour_model()


def refuse(name, function, *arguments, **options):
    with pytest.raises(UserError, match=rf"^{name}: .*[Rr]eceived: ") as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("main", SCRIPTS, ids=lambda main: main.__module__)
def test_every_script_checks_its_configs(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs_class = SCRIPTS[main]
    for name, value in (("batch_size", 0), ("learning_rate", NAN), ("resize_mode", "cropp"), ("train_csv", None)):
        refuse(name, main, configs_class(**{name: value}))
    refuse("configs", main, {"batch_size": 8})
    refuse("configs", main, None)
    assert not list(tmp_path.iterdir())


def test_the_line_is_that_of_the_command_line():
    faults = []
    for build in (
        lambda: train.main(Configs(batch_size=0, num_epochs=-1)),
        lambda: Configs.from_command_line(arguments=["--batch_size", "0", "--num_epochs", "-1"]),
    ):
        with pytest.raises(UserError) as caught:
            build()
        faults.append(str(caught.value))
    assert faults[0] == faults[1]
    assert len(faults[0].splitlines()) == 2


def test_a_scripts_own_options_are_needed():
    refuse("configs", predict.main, Configs())


def test_shared_functions_check_their_configs(tmp_path):
    wrong = Configs(batch_size=0)
    refuse("batch_size", find_trained_model, wrong)
    refuse("batch_size", utils.get_generator, "table.csv", CLASSES, wrong, True)
    refuse("batch_size", ModelFactory().get_model, wrong)
    refuse("classes", ModelFactory().get_model, Configs())
    refuse("configs", utils.get_generator, "table.csv", CLASSES, {}, True)
    refuse("class_names", utils.get_generator, "table.csv", "abc", Configs(), True)
    refuse("csv_path", utils.get_generator, None, CLASSES, Configs(), True)
    refuse("training", utils.get_generator, "table.csv", CLASSES, Configs(), "no")
    refuse("visual_model_name", ModelFactory().get_input_size, "VGG")
    refuse("visual_model_name", ModelFactory().get_last_conv_layer, None)
    refuse("augmentation_strength", build_augmenter, "much")


def test_numbers_of_numpy_are_numbers():
    configs = Configs(batch_size=np.int64(8), learning_rate=np.float32(0.5), image_target_size=np.array([8, 8, 3]))
    with pytest.raises(UserError, match="^image_target_size"):
        configs.validate()
    configs.image_target_size = tuple(np.array([8, 9, 3]))
    configs.validate()
    values = configs.batch_size, configs.learning_rate, *configs.image_target_size
    assert values == (8, 0.5, 8, 9, 3)
    assert {type(value) for value in values} == {int, float}
    for wrong in (np.float64(8), np.True_, True, 8.0):
        refuse("batch_size", Configs(batch_size=wrong).validate)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("image", None),
        ("image", "photo.jpg"),
        ("image", PIXELS[..., 0]),
        ("image", PIXELS[None]),
        ("image", PIXELS[:0]),
        ("image", np.zeros((4, 4, 4), np.uint8)),
        ("image", PIXELS / 255),
        ("image", PIXELS * -1.0),
        ("image", PIXELS + 250.0),
        ("image", PIXELS * NAN),
        ("image", PIXELS > 0),
    ],
)
def test_an_image_that_is_none_is_refused(model, name, image):
    refuse(name, utils.classify_image, model, image, CLASSES)


@pytest.mark.parametrize("kind", [np.int64, np.uint16, np.float16, np.float32, np.float64, list])
def test_pixels_of_any_type_get_the_same_answer(model, kind):
    expected = utils.classify_image(model, PIXELS, CLASSES)
    found = utils.classify_image(model, PIXELS.tolist() if kind is list else PIXELS.astype(kind), CLASSES)
    assert found[0] == expected[0]
    np.testing.assert_allclose(list(found[1].values()), list(expected[1].values()), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("class_names", {"class_names": CLASSES[:2]}),
        ("class_names", {"class_names": ["a", "a", "b"]}),
        ("model", {"model": "best_model.keras"}),
        ("model", {"model": keras.Sequential([keras.Input((None, None, 3)), keras.layers.GlobalMaxPooling2D()])}),
        ("resize_mode", {"resize_mode": "cropp"}),
        ("threshold", {"threshold": 50}),
        ("threshold", {"threshold": "0.5"}),
        ("threshold_type", {"threshold_type": "f1"}),
        ("multi_label", {"multi_label": "False"}),
        ("decision", {"decision": {"temperature": 1}}),
        ("decision", {"decision": Decision(["x", "y", "z"], False)}),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model, name, options):
    refuse(name, utils.classify_image, **{"model": model, "image": PIXELS, "class_names": CLASSES} | options)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("path", (None,)),
        ("path", (b"photo.png",)),
        ("path", ("a\0b",)),
        ("image_size", (0, 32)),
        ("image_size", (32, 32, 3)),
        ("image_size", 32),
        ("image_size", "32"),
        ("image_size", (1.5, 32)),
        ("max_image_pixels", 0),
        ("max_image_pixels", "many"),
    ],
)
def test_read_image_refuses(tmp_path, name, arguments):
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), PIXELS)
    assert utils.read_image(path, np.array([8, 8]), np.int64(10**6)).shape == PIXELS.shape
    if name == "path":
        refuse(name, utils.read_image, *arguments)
    else:
        refuse(name, utils.read_image, str(path), **{name.replace("max_image", "max"): arguments})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("optimizer_type", {"optimizer_type": "adam"}),
        ("optimizer_type", {"optimizer_type": None}),
        ("learning_rate", {"learning_rate": 0}),
        ("learning_rate", {"learning_rate": "0.1"}),
        ("learning_rate", {"learning_rate": NAN}),
        ("weight_decay", {"weight_decay": 1.0}),
        ("ema_decay", {"ema_decay": -0.1}),
        ("adam_beta_2", {"adam_beta_2": 1}),
        ("adam_epsilon", {"adam_epsilon": 0}),
    ],
)
def test_get_optimizer_refuses(name, options):
    refuse(name, utils.get_optimizer, **{"optimizer_type": "Adam", "learning_rate": 0.1} | options)


def test_get_optimizer_takes_schedules_and_numbers_of_numpy():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    assert float(utils.get_optimizer("SGD", schedule).learning_rate) == pytest.approx(0.1)
    assert float(utils.get_optimizer("SGD", np.float32(0.5)).learning_rate) == 0.5


@pytest.mark.parametrize("labels", [[-1, 1], [0, 2], [0.5, 1], np.eye(2, dtype=int), [], None, ["a", "b"]])
def test_labels_that_are_no_class_positions_are_refused(labels):
    refuse("labels", utils.get_class_weights, labels, 2)
    refuse("number_of_classes", utils.get_class_weights, [0, 1], 0)


@pytest.mark.parametrize("labels", [[0, 1], np.eye(3) * 2, np.zeros((0, 3)), None])
def test_labels_that_are_no_zeros_and_ones_are_refused(labels):
    refuse("labels", utils.get_multilabel_class_weights, labels)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("y_true", (np.arange(2), THIRDS, CLASSES)),
        ("y_true", (np.array([0, 1, 3]), THIRDS, CLASSES)),
        ("y_true", (np.eye(3, dtype=int), THIRDS, CLASSES)),
        ("y_true", (CLASSES, THIRDS, CLASSES)),
        ("probabilities", (np.arange(3), THIRDS * NAN, CLASSES)),
        ("probabilities", (np.arange(3), THIRDS[0], CLASSES)),
        ("probabilities", (np.arange(3), THIRDS, CLASSES[:2])),
        ("class_names", (np.arange(3), THIRDS, "abc")),
        ("y_true", (np.eye(3)[:2], THIRDS, CLASSES, 0.5)),
        ("y_true", (np.eye(3) * 2, THIRDS, CLASSES, 0.5)),
        ("threshold", (np.eye(3), THIRDS, CLASSES, 50)),
        ("ranking", (np.eye(3), THIRDS, CLASSES, 0.5, THIRDS[:2])),
    ],
)
def test_figures_of_what_does_not_belong_together_are_refused(name, arguments):
    several = len(arguments) > 3
    refuse(name, utils.get_multilabel_evaluation_metrics if several else utils.get_evaluation_metrics, *arguments)


def test_model_files_are_named_by_paths(model, tmp_path):
    for load in (utils.load_model, utils.load_exported_model):
        refuse("path", load, None)
        with pytest.raises(UserError, match=r"nope\.keras"):
            load(Path("nope.keras"))
    refuse("weights_dtype", utils.custom_save_model, model, str(tmp_path), "a", "float8")
    refuse("model_name", utils.custom_save_model, model, str(tmp_path), "")
    refuse("model", utils.custom_save_model, "a.keras", str(tmp_path), "a")
    refuse("load_path", utils.custom_load_model, None, "a")
    refuse("class_names", utils.read_decision, ".", [], False, "a.keras")
    refuse("multi_label", utils.read_decision, ".", CLASSES, "no", "a.keras")
    refuse("gpu_percentage", utils.set_gpu_usage, 50)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("batch_size", {"batch_size": 0}),
        ("labels", {"labels": np.zeros(1, int)}),
        ("image_size", {"image_size": (32, 32, 3)}),
        ("resize_mode", {"resize_mode": "cropp"}),
        ("mixup_alpha", {"mixup_alpha": -1}),
        ("random_crop_area", {"crop_area": (0, 2)}),
        ("random_seed", {"seed": -1}),
        ("generator_workers", {"workers": "4"}),
        ("generator_queue_length", {"max_queue_size": 0}),
    ],
)
def test_a_sequence_refuses(name, options):
    facts = {"paths": ["a", "b"], "labels": np.zeros(2, int), "image_size": (32, 32), "batch_size": 2}
    refuse(name, AugmentedImageSequence, **facts | options)
