"""Several devices, and several processes, train the model that one would; what stops one of them stops all."""

import json
import signal
import time
from pathlib import Path

import distributed_run
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from loaded_processes import LoadedProcess
from small_runs import assert_same_run, options_of, read_weights
from team_settings import config_of, free_addresses

import train
from configs import Configs
from finetune.core.devices import set_seed
from finetune.core.options import UserError
from finetune.models.compiling import get_class_weights
from finetune.training.callbacks import EpochOrder
from finetune.training.resuming import check_same_data
from finetune.training.run import get_phases
from finetune.training.run_folder import fingerprint
from finetune.training.trainer import TrainingModel
from finetune.training.training import get_images
from generator import AugmentedImageSequence, Shares, get_generator
from model import ModelFactory

# Without batch normalisation and dropout, the sum of two halves is exactly the whole.
PLAIN = {"visual_model_name": "VGG16", "pop_conv_layers": 15, "final_layer_pooling": "avg"}
PLAIN |= {"classifier_layer_sizes": [], "augmentation_strength": "none", "num_epochs": 1}


@pytest.fixture(scope="module")
def tables(photo_folder, tmp_path_factory):
    """Tables of 25 and 11 photos: no number of devices divides them."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [(str(path), path.parent.name) for path in sorted(photo_folder.glob("*/*.jpg"))]
    table = pd.DataFrame(rows, columns=["path", "class"]).sample(frac=1, random_state=1)
    table[:25].to_csv(folder / "training_set.csv", index=False)
    table[25:].to_csv(folder / "testing_set.csv", index=False)
    return folder / "training_set.csv", folder / "testing_set.csv"


@pytest.fixture(scope="module")
def multi_label(multilabel_csv):
    sets = {"train_csv": str(multilabel_csv), "test_csv": str(multilabel_csv), "allow_duplicates": True}
    return sets | {"image_directory": str(multilabel_csv.parent), "multi_label_classification": True}


def run(path, runs, devices=1):
    process = distributed_run.start(path, runs, devices)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def start_workers(folder, options, number):
    addresses = free_addresses(number)
    options = options | {"distribution_strategy": "multi_worker"}
    return [
        distributed_run.start(folder / f"worker_{index}", [options], TF_CONFIG=config_of(addresses, index))
        for index in range(number)
    ]


def finish(workers):
    """Waits for processes, and returns their exit statuses and outputs."""
    outputs = [worker.communicate() for worker in workers]
    return [worker.returncode for worker in workers], outputs


def read_digests(folder, number):
    return [json.loads((folder / f"worker_{index}.digests").read_text())[-1] for index in range(number)]


def assert_close(first, second, tolerance=1e-5):
    logs = [pd.read_csv(Path(folder) / "training_log.csv") for folder in (first, second)]
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-4, atol=tolerance)
    expected, found = (read_weights(Path(folder) / "latest_model.keras") for folder in (first, second))
    assert len(expected) == len(found) > 5
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_one_device_trains_as_keras_does(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=2, augmentation_strength="none")
    configs = Configs(**options | {"classifier_layer_sizes": []}).validate()
    train.main(configs)
    set_seed(0, deterministic=True)
    model = ModelFactory().get_model(configs)
    sequence = get_generator(configs.train_csv, configs.classes, configs, True)
    weights = get_class_weights(sequence.labels, 3)
    model.fit(sequence, epochs=2, class_weight=weights, shuffle=False, verbose=0, callbacks=[EpochOrder(sequence)])
    log = pd.read_csv(tmp_path / "run" / "training_log.csv")
    np.testing.assert_allclose(log["loss"], model.history.history["loss"], rtol=1e-5)
    np.testing.assert_allclose(log["accuracy"], model.history.history["accuracy"], rtol=1e-6)
    expected = [np.array(variable) for variable in (*model.weights, *model.optimizer.variables)]
    for one, other in zip(expected, read_weights(tmp_path / "run" / "latest_model.keras"), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_the_learning_rates_are_scaled_only_on_request(capsys):
    options = {"head_epochs": 1, "fine_tune_learning_rate": 1e-4}
    for scale, factor in ((False, 1), (True, 4)):
        rates = [phase.learning_rate for phase in get_phases(Configs(**options, scale_learning_rate=scale), 4)]
        assert rates == pytest.approx([1e-3 * factor, 1e-4 * factor])
    assert capsys.readouterr().out.count("0.001 times 4 devices: 0.004") == 1


def test_a_run_within_an_epoch_keeps_its_number_of_devices(tables):
    sequence = AugmentedImageSequence([str(tables[0])] * 8, np.zeros(8, int), (8, 8), 2, shares=Shares(2, 0, 2))
    state = {"data": {name: fingerprint(sequence) for name in ("train_csv", "validation_csv")}}
    check_same_data(state | {"devices": 2, "steps_completed": 1}, sequence, sequence)
    check_same_data(state | {"steps_completed": 0}, sequence, sequence)
    with pytest.raises(UserError, match="expected 1. Received: 2"):
        check_same_data(state | {"steps_completed": 1}, sequence, sequence)


@pytest.mark.slow
def test_two_devices_give_the_weights_of_one_with_the_whole_batch(tables, multi_label, tmp_path):
    # 25 images: steps of 16 and 9, on the two devices 8 and 8, 4 and 5. In multi-label mode with 18 images 16 and 2.
    runs = []
    for mode, more in (("single", {}), ("multi", multi_label)):
        for name, options in (
            ("one", {"batch_size": 16}),
            ("two", {"batch_size": 8, "distribution_strategy": "mirrored"}),
            ("parts", {"batch_size": 4, "gradient_accumulation_steps": 2, "distribution_strategy": "mirrored"}),
        ):
            runs.append(options_of(tables, tmp_path / mode / name, **PLAIN | options | more))
    printed = run(tmp_path / "job", runs, devices=2)
    assert printed.count("Devices that train together: 2. Images a step: 2 x 8 = 16.") == 4
    for mode in ("single", "multi"):
        assert_close(tmp_path / mode / "one", tmp_path / mode / "two")
        assert_close(tmp_path / mode / "one", tmp_path / mode / "parts")


@pytest.mark.slow
def test_a_step_with_fewer_images_than_devices_counts_each_once(tables, tmp_path):
    # 25 images: twice 12, and one image for three devices.
    options = options_of(tables, tmp_path / "one", **PLAIN | {"batch_size": 12, "num_epochs": 2})
    other = options | {"batch_size": 4, "distribution_strategy": "mirrored", "save_model_path": str(tmp_path / "three")}
    run(tmp_path / "job", [options, other], devices=3)
    assert_close(tmp_path / "one", tmp_path / "three")


RECIPE = {
    "head_epochs": 1,
    "fine_tune_learning_rate": 1e-3,
    "learning_rate_schedule": "cosine",
    "warmup_epochs": 0.5,
    "weight_decay": 0.01,
    "ema_decay": 0.9,
    "gradient_accumulation_steps": 2,
    "batch_size": 2,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "optimizer_type": "AdamW",
    "label_smoothing": 0.1,
    "backbone_learning_rate_multiplier": 0.1,
    "augmentation_strength": "strong",
}
FEATURES = {"head_initialization": "linear_probe", "conv_layers_to_train": 0, "augmentation_strength": "none"}
AVERAGED = {"head_initialization": "linear_probe", "model_selection": "interpolate", "test_time_augmentation": "flip"}
AVERAGED |= {"early_stopping_patience": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "mode", "more"),
    [
        (2, "single-label", RECIPE),
        (3, "multi-label", FEATURES | {"loss": "asymmetric"}),
        (2, "single-label", AVERAGED),
    ],
)
def test_processes_give_the_bits_of_devices_in_one_process(tables, multi_label, tmp_path, number, mode, more):
    options = options_of(tables, tmp_path / "mirrored", num_epochs=2, early_stopping_patience=5) | more
    options |= multi_label if mode == "multi-label" else {}
    run(tmp_path / "job", [options | {"distribution_strategy": "mirrored"}], devices=number)
    folder = tmp_path / "processes"
    statuses, outputs = finish(start_workers(tmp_path, options | {"save_model_path": str(folder)}, number))
    assert statuses == [0] * number, outputs
    assert_same_run(tmp_path / "mirrored", folder)
    assert len(set(read_digests(tmp_path, number))) == 1
    assert ("The kept model's val_" if more is AVERAGED else "Best val_") in outputs[0][0]
    assert ("with a refitted head" in outputs[0][0]) == (more is AVERAGED)
    stats = json.loads((folder / ".training_stats.json").read_text())
    assert len(stats["input_wait_by_epoch"]) == stats["epochs_completed"]
    for output, _ in outputs[1:]:
        assert output.splitlines()[-1].endswith("prints and writes.")


def wait_for_checkpoint(folder, process):
    while not (folder / "latest_model.keras").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


@pytest.mark.slow
def test_a_killed_worker_stops_all_and_the_run_continues_to_the_same_bits(tables, tmp_path):
    options = options_of(tables, tmp_path / "whole", checkpoint_every_steps=1, num_epochs=2)
    folder = tmp_path / "killed"
    statuses, outputs = finish(start_workers(tmp_path, options, 2))
    assert statuses == [0, 0], outputs
    digests = read_digests(tmp_path, 2)
    options |= {"save_model_path": str(folder)}
    workers = start_workers(tmp_path, options, 2)
    wait_for_checkpoint(folder, workers[0])
    workers[0].kill()
    statuses, outputs = finish(workers)
    assert statuses == [-signal.SIGKILL, 1]
    (line,) = [line for line in outputs[1][1].splitlines() if line.startswith("Error: Worker 0 (")]
    assert f"--load_model_path {folder}" in line
    assert "Traceback" not in outputs[1][1]
    statuses, outputs = finish(start_workers(tmp_path, options | {"load_model_path": str(folder)}, 2))
    assert statuses == [0, 0], outputs
    assert_same_run(tmp_path / "whole", folder)
    assert read_digests(tmp_path, 2) == digests


@pytest.mark.slow
def test_a_signal_to_one_worker_stops_all_after_the_same_step(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=200, checkpoint_every_steps=1)
    workers = start_workers(tmp_path, options, 2)
    wait_for_checkpoint(tmp_path / "run", workers[0])
    workers[1].terminate()
    statuses, outputs = finish(workers)
    assert statuses == [143, 143], outputs
    assert "Stopped by SIGTERM. Continue with\npython train.py" in outputs[0][0]
    assert len(set(read_digests(tmp_path, 2))) == 1


@pytest.mark.slow
def test_only_the_chief_reports_bad_images_and_all_leave_them_out(tables, tmp_path):
    table = pd.read_csv(tables[1])
    bad = [str(tmp_path / f"bad_{position}.jpg") for position in range(2)]
    for path, row in zip(bad, (0, 8), strict=True):  # one in each worker's share of the validation images
        Path(path).write_bytes(b"no picture")
        table.loc[row, "path"] = path
    table.to_csv(tmp_path / "testing_set.csv", index=False)
    options = options_of((tables[0], tmp_path / "testing_set.csv"), tmp_path / "run", num_epochs=1)
    options |= {"skip_bad_images": True, "verify_data": "off"}
    statuses, outputs = finish(start_workers(tmp_path, options, 2))
    assert statuses == [0, 0], outputs
    assert "Left out 2 images that could not be read" in outputs[0][0]
    assert sorted(pd.read_csv(tmp_path / "run" / "data_report.csv")["path"]) == bad
    accuracy = pd.read_csv(tmp_path / "run" / "training_log.csv")["val_accuracy"][0]
    assert (accuracy * 9) == pytest.approx(round(accuracy * 9))


def train_scaled():
    """Trains on two devices, of which one has infinite gradients; prints a weight of each device, and the scale."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        inputs = keras.Input((1, 1, 3))
        outputs = keras.layers.Dense(2, kernel_initializer="ones")(keras.layers.Flatten()(inputs))
        model = TrainingModel(inputs, outputs)
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
        model.compile(optimizer, lambda y, p: tf.reduce_sum(p, axis=-1) * tf.cast(y, tf.float32), [])
    images, ones, bounds = np.ones((2, 1, 1, 3), np.float32), np.ones(2, np.float32), np.array([0, 1, 2], np.int32)
    for labels in ([1, 1], [1, np.inf], [np.inf, 1], [1, 1]):
        model._step(images, np.array(labels, np.float32), ones, bounds, np.float32(2), np.zeros(2, np.float32))
        kernels = [value.numpy()[0, 0] for value in strategy.experimental_local_results(model.weights[0].value)]
        print(*kernels, float(optimizer.dynamic_scale.numpy()))


@pytest.mark.slow
def test_all_devices_skip_a_step_if_one_has_infinite_gradients(tmp_path):
    process = LoadedProcess(tmp_path / "scaled", train_scaled)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    # The gradient of each weight is 1 in every step, the rate 0.1; a skipped step halves the scale.
    rows = np.array([line.split() for line in output.splitlines()], float)
    np.testing.assert_allclose(rows, [[0.9, 0.9, 8], [0.9, 0.9, 4], [0.9, 0.9, 2], [0.8, 0.8, 2]], rtol=1e-6)


def test_predictions_of_a_distributed_model_are_the_models(tables):
    table = pd.read_csv(tables[1])
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        inputs = keras.Input((8, 8, 3))
        outputs = keras.layers.Dense(3, activation="softmax")(keras.layers.Flatten()(inputs))
        model = TrainingModel(inputs, outputs)
        model.compile(keras.optimizers.SGD(), "mse", [])
    sequence = AugmentedImageSequence(table["path"], np.zeros(11, int), (8, 8), 4, shares=Shares(1, 0, 1))
    probabilities, is_read = model.predict_sequence(sequence)
    images = np.concatenate([sequence[index][0] for index in range(3)])
    np.testing.assert_allclose(probabilities, keras.Model(inputs, outputs).predict(images, verbose=0), rtol=1e-5)
    assert is_read.tolist() == [True] * 11


def test_a_class_without_validation_images_is_named_at_the_start(photo_folder, small_run, tmp_path, capsys):
    paths = {}
    for name, classes in (("training", ("blue", "green", "red")), ("validation", ("green",))):
        rows = [f"{photo_folder}/{one}/0{number}.jpg,{one}" for one in classes for number in range(2)]
        paths[name] = tmp_path / f"{name}.csv"
        paths[name].write_text("\n".join(["path,class", *rows]), "utf-8")
    configs = small_run(paths["training"], paths["validation"], classes=["blue", "green", "red"])
    get_images(configs, {str(path): set() for path in paths.values()}, Shares())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert "the validation set has no image of blue, red" in line
