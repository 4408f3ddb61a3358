"""Wrong arguments in a user's own code end in one line that names them, as on the command line."""

import importlib
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest
from config_files import SCRIPT_CONFIGS
from exported_runs import CLASSES, build_colour_model

import predict
import train
import utils
from augmenter import build_augmenter
from configs import Configs
from finetune.core.options import UserError
from finetune.evaluation.decision import Decision
from finetune.training.trained_model import find_trained_model
from generator import AugmentedImageSequence
from model import ModelFactory

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


@pytest.mark.parametrize("script", SCRIPT_CONFIGS)
def test_every_script_checks_its_configs(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, configs_class = importlib.import_module(script.removesuffix(".py")).main, SCRIPT_CONFIGS[script]
    for name, value in (("batch_size", 0), ("learning_rate", NAN), ("resize_mode", "cropp"), ("train_csv", None)):
        refuse(name, main, configs_class(**{name: value}))
    refuse("configs", main, {"batch_size": 8})
    refuse("configs", main, None)
    assert not list(tmp_path.iterdir())


def test_the_error_is_the_same_as_on_the_command_line():
    with pytest.raises(UserError) as own_code:
        train.main(Configs(batch_size=0, num_epochs=-1))
    with pytest.raises(UserError) as command_line:
        Configs.from_command_line(arguments=["--batch_size", "0", "--num_epochs", "-1"])
    assert str(own_code.value) == str(command_line.value)
    assert len(str(own_code.value).splitlines()) == 2


def test_numpy_numbers_are_numbers():
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


@pytest.mark.parametrize("kind", [np.int64, np.uint16, np.float16, np.float32, np.float64, list])
def test_pixels_of_any_type_give_the_same_answer(model, kind):
    expected = utils.classify_image(model, PIXELS, CLASSES)
    found = utils.classify_image(model, PIXELS.tolist() if kind is list else PIXELS.astype(kind), CLASSES)
    assert found[0] == expected[0]
    np.testing.assert_allclose(list(found[1].values()), list(expected[1].values()), atol=1e-5)


def test_get_optimizer_takes_schedules_and_numpy_numbers():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    assert float(utils.get_optimizer("SGD", schedule).learning_rate) == pytest.approx(0.1)
    assert float(utils.get_optimizer("SGD", np.float32(0.5)).learning_rate) == 0.5


def classify(**options):
    return lambda model: utils.classify_image(**{"model": model, "image": PIXELS, "class_names": CLASSES} | options)


def optimizer(**options):
    return lambda _: utils.get_optimizer(**{"optimizer_type": "Adam", "learning_rate": 0.1} | options)


def evaluate(*arguments):
    several = len(arguments) > 3
    return lambda _: (utils.get_multilabel_evaluation_metrics if several else utils.get_evaluation_metrics)(*arguments)


def sequence(**options):
    facts = {"paths": ["a", "b"], "labels": np.zeros(2, int), "image_size": (32, 32), "batch_size": 2}
    return lambda _: AugmentedImageSequence(**facts | options)


def call(function, *arguments):
    return lambda _: function(*arguments)


RGBA = np.zeros((4, 4, 4), np.uint8)
NO_MODEL = keras.Sequential([keras.Input((None, None, 3)), keras.layers.GlobalMaxPooling2D()])
NO_IMAGES = [None, "a.jpg", PIXELS[..., 0], PIXELS[None], PIXELS[:0], RGBA, PIXELS / 255, PIXELS * -1.0, PIXELS + 250.0]
NO_POSITIONS = [[-1, 1], [0, 2], [0.5, 1], np.eye(2, dtype=int), [], None, ["a", "b"]]
# Calls that must be refused, by argument.
REFUSED = {
    "image": [classify(image=image) for image in [*NO_IMAGES, PIXELS * NAN, PIXELS > 0]],
    "class_names": [
        *(classify(class_names=CLASSES[:2]), classify(class_names=["a", "a", "b"])),
        call(utils.get_generator, "table.csv", "abc", Configs(), True),
        call(utils.read_decision, ".", [], False, "a.keras"),
        evaluate(np.arange(3), THIRDS, "abc"),
    ],
    "model": [
        *(classify(model="best_model.keras"), classify(model=NO_MODEL)),
        call(utils.custom_save_model, "a.keras", "nowhere", "a"),
    ],
    "resize_mode": [classify(resize_mode="cropp"), sequence(resize_mode="cropp")],
    "threshold": [classify(threshold=50), classify(threshold="0.5"), evaluate(np.eye(3), THIRDS, CLASSES, 50)],
    "threshold_type": [classify(threshold_type="f1")],
    "multi_label": [classify(multi_label="False"), call(utils.read_decision, ".", CLASSES, "no", "a.keras")],
    "decision": [classify(decision=one) for one in ({"temperature": 1}, Decision(["x", "y", "z"], False))],
    "path": [
        *(call(utils.read_image, path) for path in (None, b"photo.png", "a\0b")),
        *(call(load, None) for load in (utils.load_model, utils.load_exported_model)),
    ],
    "image_size": [
        *(call(utils.read_image, "a", size) for size in ((0, 32), (32, 32, 3), 32, "32", (1.5, 32))),
        sequence(image_size=(32, 32, 3)),
    ],
    "max_image_pixels": [call(utils.read_image, "a", None, number) for number in (0, "many")],
    "optimizer_type": [optimizer(optimizer_type="adam"), optimizer(optimizer_type=None)],
    "learning_rate": [optimizer(learning_rate=rate) for rate in (0, "0.1", NAN)],
    "weight_decay": [optimizer(weight_decay=1.0)],
    "ema_decay": [optimizer(ema_decay=-0.1)],
    "adam_beta_2": [optimizer(adam_beta_2=1)],
    "adam_epsilon": [optimizer(adam_epsilon=0)],
    "labels": [
        *(call(utils.get_class_weights, labels, 2) for labels in NO_POSITIONS),
        *(call(utils.get_multilabel_class_weights, labels) for labels in ([0, 1], np.eye(3) * 2, THIRDS[:0], None)),
        sequence(labels=np.zeros(1, int)),
    ],
    "number_of_classes": [call(utils.get_class_weights, [0, 1], 0)],
    "y_true": [
        *(
            evaluate(truth, THIRDS, CLASSES)
            for truth in (np.arange(2), np.array([0, 1, 3]), np.eye(3, dtype=int), CLASSES)
        ),
        *(evaluate(truth, THIRDS, CLASSES, 0.5) for truth in (np.eye(3)[:2], np.eye(3) * 2)),
    ],
    "probabilities": [
        *(evaluate(np.arange(3), probabilities, CLASSES) for probabilities in (THIRDS * NAN, THIRDS[0])),
        evaluate(np.arange(3), THIRDS, CLASSES[:2]),
    ],
    "ranking": [evaluate(np.eye(3), THIRDS, CLASSES, 0.5, THIRDS[:2])],
    "weights_dtype": [lambda model: utils.custom_save_model(model, "nowhere", "a", "float8")],
    "model_name": [lambda model: utils.custom_save_model(model, "nowhere", "")],
    "load_path": [call(utils.custom_load_model, None, "a")],
    "gpu_percentage": [call(utils.set_gpu_usage, 50)],
    "batch_size": [
        *(call(function, Configs(batch_size=0)) for function in (find_trained_model, ModelFactory().get_model)),
        call(utils.get_generator, "table.csv", CLASSES, Configs(batch_size=0), True),
        sequence(batch_size=0),
    ],
    "classes": [call(ModelFactory().get_model, Configs())],
    "configs": [call(utils.get_generator, "table.csv", CLASSES, {}, True), call(predict.main, Configs())],
    "csv_path": [call(utils.get_generator, None, CLASSES, Configs(), True)],
    "training": [call(utils.get_generator, "table.csv", CLASSES, Configs(), "no")],
    "bad_rows": [
        call(utils.get_generator, "table.csv", CLASSES, Configs(), True, rows)
        for rows in ("x", b"x", 5, [1.5], [1], ["3"])
    ],
    "shares": [sequence(shares=2)],
    "visual_model_name": [call(ModelFactory().get_input_size, "VGG"), call(ModelFactory().get_last_conv_layer, None)],
    "augmentation_strength": [call(build_augmenter, "much")],
    "mixup_alpha": [sequence(mixup_alpha=-1)],
    "random_crop_area": [sequence(crop_area=(0, 2))],
    "random_seed": [sequence(seed=-1)],
    "generator_workers": [sequence(workers="4")],
    "generator_queue_length": [sequence(max_queue_size=0)],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_named(model, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in REFUSED[name]:
        refuse(name, use, model)
    assert not list(tmp_path.iterdir())


def test_path_objects_and_numpy_numbers_are_taken(tmp_path):
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), PIXELS)
    assert utils.read_image(path, np.array([8, 8]), np.int64(10**6)).shape == PIXELS.shape
    for load in (utils.load_model, utils.load_exported_model):
        with pytest.raises(UserError, match=r"nope\.keras"):
            load(Path("nope.keras"))
