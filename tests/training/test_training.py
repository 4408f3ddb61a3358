"""Several devices, and several processes, train the model that one would; what stops one of them stops all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import train
from configs import Configs
from finetune.core.devices import set_seed
from finetune.core.options import UserError
from finetune.models.losses import get_class_weights
from finetune.training.callbacks import EpochOrder
from finetune.training.preparing import get_images
from finetune.training.trainer import TrainingModel
from finetune.training.training_state import read_state
from generator import AugmentedImageSequence, Shares, get_generator
from model import ModelFactory

PROJECT = Path(__file__).resolve().parents[2]
# Nothing to normalise, and dropout only where it is wanted: the sum of two halves is then the whole.
PLAIN = {"visual_model_name": "VGG16", "pop_conv_layers": 15, "final_layer_pooling": "avg"}
PLAIN |= {"classifier_layer_sizes": [], "augmentation_strength": "none"}
# Batch normalisation and dropout, in a backbone cut to its first layers.
NORMED = {"visual_model_name": "MobileNet", "pop_conv_layers": 66, "final_layer_pooling": "max"}


@pytest.fixture(scope="module")
def tables(photo_folder, tmp_path_factory):
    """Tables of 25 and 11 photos: no number of devices divides them."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [(str(path), path.parent.name) for path in sorted(photo_folder.glob("*/*.jpg"))]
    table = pd.DataFrame(rows, columns=["path", "class"]).sample(frac=1, random_state=1)
    table[:25].to_csv(folder / "training_set.csv", index=False)
    table[25:].to_csv(folder / "testing_set.csv", index=False)
    return folder / "training_set.csv", folder / "testing_set.csv"


def options_of(tables, folder, **options):
    values = {
        "train_csv": str(tables[0]),
        "test_csv": str(tables[1]),
        "image_target_size": (32, 32, 3),
        "use_imagenet_weights": False,
        "num_epochs": 1,
        "batch_size": 4,
        "show_model_summary": False,
        "generator_workers": 2,
        "deterministic": True,
        "reduce_lr_patience": 1,
        "save_model_path": str(folder),
    }
    return values | options


def write_job(path, runs, devices=1):
    job = {"devices": devices, "runs": runs}
    path.write_text(json.dumps(job | {"digests": f"{path}.digests"}))
    return path


def start(job, **environment):
    command = [sys.executable, str(PROJECT / "tests" / "distributed_run.py"), str(job)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=PROJECT, env=environment, **pipes)


def run(path, runs, devices=1):
    process = start(write_job(path, runs, devices))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start_workers(folder, options, number):
    """Starts a training in that many processes; each has a job file of its own, and the last one other options."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(number)]}
    workers = []
    for index in range(number):
        job = write_job(folder / f"worker_{index}.json", [options])
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        workers.append(start(job, TF_CONFIG=json.dumps(config)))
    return workers


def finish(workers):
    """Waits for processes, and returns their exit statuses and what they printed."""
    outputs = [worker.communicate(timeout=300) for worker in workers]
    return [worker.returncode for worker in workers], outputs


def read_digests(folder, number):
    return [json.loads((folder / f"worker_{index}.json.digests").read_text())[-1] for index in range(number)]


def weights_of(path):
    model = keras.models.load_model(path)
    return [np.array(variable) for variable in (*model.weights, *model.optimizer.variables)]


def assert_close(first, second, tolerance):
    logs = [pd.read_csv(Path(folder) / "training_log.csv") for folder in (first, second)]
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-4, atol=tolerance)
    expected, found = (weights_of(Path(folder) / "latest_model.keras") for folder in (first, second))
    assert len(expected) == len(found) > 5
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def assert_same(first, second):
    names = ["training_log.csv"]
    assert [(Path(first) / name).read_bytes() for name in names] == [
        (Path(second) / name).read_bytes() for name in names
    ]
    for name in ("best_model.keras", "latest_model.keras"):
        expected, found = (weights_of(Path(folder) / name) for folder in (first, second))
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)
        if read_state(str(Path(first) / name)) is None:
            continue  # averaged weights
        states = [read_state(str(Path(folder) / name)) for folder in (first, second)]
        for key in ("epochs_completed", "steps_completed", "best", "best_epoch", "plateau", "seed_states", "log"):
            assert states[0][key] == states[1][key]


@pytest.fixture(scope="module")
def multi_label(multilabel_csv):
    sets = {"train_csv": str(multilabel_csv), "test_csv": str(multilabel_csv), "allow_duplicates": True}
    return sets | {"image_directory": str(multilabel_csv.parent), "multi_label_classification": True}


@pytest.mark.slow
def test_one_device_trains_as_keras_does(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=2, augmentation_strength="none", **NORMED)
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
    for one, other in zip(expected, weights_of(tmp_path / "run" / "latest_model.keras"), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_the_learning_rate_is_scaled_only_where_that_is_wanted(tables, tmp_path, capsys, monkeypatch):
    rates = {}

    def note(model, *_):
        rates[len(rates)] = float(model.optimizer.learning_rate.numpy())
        raise UserError("enough")

    monkeypatch.setattr("finetune.training.training.run_phase", note)
    monkeypatch.setattr("finetune.training.preparing.get_shares", lambda *_: Shares(4, 0, 4))
    monkeypatch.setattr(tf.distribute.MirroredStrategy, "num_replicas_in_sync", 4)
    for scale in (False, True):
        options = options_of(tables, tmp_path / str(scale), **PLAIN, scale_learning_rate=scale)
        with pytest.raises(UserError, match="enough"):
            train.main(Configs(**options, distribution_strategy="mirrored").validate())
    assert rates == {0: pytest.approx(1e-3), 1: pytest.approx(4e-3)}
    assert "learning_rate is 0.001 times 4 devices: 0.004." in capsys.readouterr().out


def test_a_run_within_an_epoch_keeps_its_number_of_devices(tables, tmp_path):
    from finetune.training.resuming import check_same_data
    from finetune.training.run_folder import fingerprint

    paths = [str(tables[0])] * 8
    sequence = AugmentedImageSequence(paths, np.zeros(8, int), (8, 8), 2, shares=Shares(2, 0, 2))
    state = {"data": {name: fingerprint(sequence) for name in ("train_csv", "validation_csv")}}
    check_same_data(state | {"devices": 2, "steps_completed": 1}, sequence, sequence)
    check_same_data(state | {"steps_completed": 0}, sequence, sequence)
    with pytest.raises(UserError, match="expected 1. Received: 2"):
        check_same_data(state | {"steps_completed": 1}, sequence, sequence)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single-label", "multi-label"])
def test_two_devices_give_the_weights_of_one_with_twice_the_batch(tables, multi_label, tmp_path, mode):
    # 25 images: steps of 16 and 9, on the two devices 8 and 8, 4 and 5. In multi-label mode with 18 images 16 and 2.
    options = options_of(tables, tmp_path / "one", batch_size=16, **PLAIN)
    options |= multi_label if mode == "multi-label" else {}
    other = options | {"batch_size": 8, "distribution_strategy": "mirrored", "save_model_path": str(tmp_path / "two")}
    printed = run(tmp_path / "job.json", [options, other], devices=2)
    assert "Devices that train together: 2. Images a step: 2 x 8 = 16." in printed
    assert_close(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.mark.slow
def test_a_step_with_fewer_images_than_devices_counts_each_once(tables, tmp_path):
    # 25 images: twice 12, and one image for three devices.
    options = options_of(tables, tmp_path / "one", batch_size=12, num_epochs=2, **PLAIN)
    other = options | {"batch_size": 4, "distribution_strategy": "mirrored", "save_model_path": str(tmp_path / "three")}
    run(tmp_path / "job.json", [options, other], devices=3)
    assert_close(tmp_path / "one", tmp_path / "three", 1e-5)


RECIPE = {"num_epochs": 3, "head_epochs": 1, "fine_tune_learning_rate": 1e-3, "learning_rate_schedule": "cosine"}
RECIPE |= {
    "warmup_epochs": 0.5,
    "weight_decay": 0.01,
    "ema_decay": 0.9,
    "gradient_accumulation_steps": 2,
    "batch_size": 2,
}
RECIPE |= {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "optimizer_type": "AdamW", "label_smoothing": 0.1}
RECIPE |= {"backbone_learning_rate_multiplier": 0.1, "augmentation_strength": "strong"}
FEATURES = {"head_initialization": "linear_probe", "conv_layers_to_train": 0, "augmentation_strength": "none"}
AVERAGED = {"head_initialization": "linear_probe", "model_selection": "interpolate", "test_time_augmentation": "flip"}
AVERAGED |= {"early_stopping_patience": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "mode", "more"),
    [
        (3, "single-label", {}),
        (2, "multi-label", {"loss": "asymmetric"}),
        (2, "single-label", RECIPE),
        (2, "single-label", FEATURES),
        (2, "single-label", AVERAGED),
    ],
)
def test_processes_give_the_bits_of_devices_in_one_process(tables, multi_label, tmp_path, number, mode, more):
    options = options_of(tables, tmp_path / "mirrored", num_epochs=2, early_stopping_patience=5, **NORMED) | more
    options |= multi_label if mode == "multi-label" else {}
    mirrored = options | {"distribution_strategy": "mirrored"}
    run(tmp_path / "job.json", [mirrored], devices=number)
    folder = tmp_path / "processes"
    options |= {"distribution_strategy": "multi_worker", "save_model_path": str(folder)}
    statuses, outputs = finish(start_workers(tmp_path, options, number))
    assert statuses == [0] * number, outputs
    assert_same(tmp_path / "mirrored", folder)
    assert len(set(read_digests(tmp_path, number))) == 1
    assert ("The kept model's val_" if more is AVERAGED else "Best val_") in outputs[0][0]
    assert ("with a refitted head" in outputs[0][0]) == (more is AVERAGED)
    stats = json.loads((folder / ".training_stats.json").read_text())
    assert len(stats["input_wait_by_epoch"]) == stats["epochs_completed"]
    for output, _ in outputs[1:]:
        assert output.splitlines()[-1].endswith("prints and writes.")


@pytest.mark.slow
def test_accumulated_batches_on_two_devices_give_the_weights_of_one(tables, tmp_path):
    options = options_of(tables, tmp_path / "one", batch_size=16, **PLAIN)
    other = options | {"batch_size": 4, "gradient_accumulation_steps": 2, "distribution_strategy": "mirrored"}
    other |= {"save_model_path": str(tmp_path / "two")}
    printed = run(tmp_path / "job.json", [options, other], devices=2)
    assert "Devices that train together: 2. Images a step: 2 x 8 = 16." in printed
    assert_close(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.fixture(scope="module")
def whole(tables, tmp_path_factory):
    """The folder of a run of two workers that was not stopped, and the options that it had."""
    folder = tmp_path_factory.mktemp("whole")
    options = options_of(tables, folder / "run", num_epochs=4, checkpoint_every_steps=1, **NORMED)
    options |= {"distribution_strategy": "multi_worker"}
    statuses, outputs = finish(start_workers(folder, options, 2))
    assert statuses == [0, 0], outputs
    return folder, options


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_stops_all_and_the_run_goes_on_to_the_same_bits(whole, tmp_path, victim):
    whole_folder, options = whole
    folder = tmp_path / "killed"
    options = options | {"save_model_path": str(folder)}
    latest, rng = folder / "latest_model.keras", np.random.default_rng(victim)
    workers = start_workers(tmp_path, options, 2)
    while not latest.exists():
        assert workers[0].poll() is None, workers[0].communicate()
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    workers[victim].kill()
    killed = time.monotonic()
    statuses, outputs = finish(workers)
    assert time.monotonic() - killed < 30
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] == 1
    lines = [line for line in outputs[1 - victim][1].splitlines() if line.startswith(f"Error: Worker {victim} (")]
    assert len(lines) == 1
    assert f"--load_model_path {folder}" in lines[0]
    assert "Traceback" not in outputs[1 - victim][1]
    statuses, outputs = finish(start_workers(tmp_path, options | {"load_model_path": str(folder)}, 2))
    assert statuses == [0, 0], outputs
    assert_same(whole_folder / "run", folder)
    assert read_digests(whole_folder, 2) == read_digests(tmp_path, 2)


@pytest.mark.slow
def test_a_signal_to_one_worker_stops_all_after_the_same_step(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=200, checkpoint_every_steps=1, **NORMED)
    workers = start_workers(tmp_path, options | {"distribution_strategy": "multi_worker"}, 2)
    while not (tmp_path / "run" / "latest_model.keras").exists():
        assert workers[0].poll() is None, workers[0].communicate()
        time.sleep(0.01)
    workers[1].terminate()
    statuses, outputs = finish(workers)
    assert statuses == [143, 143], outputs
    assert "Stopped by SIGTERM. Continue with\npython train.py" in outputs[0][0]
    digests = read_digests(tmp_path, 2)
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_only_the_chief_tells_of_bad_images_and_all_leave_them_out(tables, tmp_path):
    table = pd.read_csv(tables[1])
    bad = []
    for position, row in enumerate((0, 8)):  # one in each worker's share of the validation images
        bad.append(tmp_path / f"bad_{position}.jpg")
        bad[-1].write_bytes(b"no picture")
        table.loc[row, "path"] = str(bad[-1])
    table.to_csv(tmp_path / "testing_set.csv", index=False)
    options = options_of((tables[0], tmp_path / "testing_set.csv"), tmp_path / "run", **NORMED)
    options |= {"distribution_strategy": "multi_worker", "skip_bad_images": True, "verify_data": "off"}
    statuses, outputs = finish(start_workers(tmp_path, options, 2))
    assert statuses == [0, 0], outputs
    assert "Left out 2 images that could not be read" in outputs[0][0]
    report = pd.read_csv(tmp_path / "run" / "data_report.csv")
    assert sorted(report["path"]) == sorted(map(str, bad))
    accuracy = pd.read_csv(tmp_path / "run" / "training_log.csv")["val_accuracy"][0]
    assert (accuracy * 9) == pytest.approx(round(accuracy * 9))


UPSTREAM = """
import sys, keras, numpy as np, tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
model.fit(tf.data.Dataset.from_tensor_slices((np.ones((8, 4)), np.ones((8, 2)))).batch(4), verbose=0)
"""


@pytest.mark.slow
def test_keras_still_needs_a_loop_of_our_own_on_several_hosts():
    """Where this test fails, Keras's own `fit` works there: see whether `TrainingModel` can be simpler."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    workers = []
    for index in range(2):
        config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
        command = [sys.executable, "-c", UPSTREAM]
        workers.append(
            subprocess.Popen(command, env=os.environ | {"TF_CONFIG": config}, stderr=subprocess.PIPE, text=True)
        )
    outputs = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] != [0, 0]
    assert any("PerReplica" in output or "rank" in output or "axis" in output for output in outputs), outputs


SCALED = """
import sys
sys.path.insert(0, sys.argv[1])
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from finetune.training.trainer import TrainingModel
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    inputs = keras.Input((1, 1, 3))
    outputs = keras.layers.Dense(2, kernel_initializer="ones")(keras.layers.Flatten()(inputs))
    model = TrainingModel(inputs, outputs)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
    model.compile(optimizer, lambda y, p: tf.reduce_sum(p, axis=-1) * tf.cast(y, tf.float32), [])
step = model._step
images = np.ones((2, 1, 1, 3), np.float32)
def train(labels):
    labels, bounds = np.array(labels, np.float32), np.array([0, 1, 2], np.int32)
    step(images, labels, np.ones(2, np.float32), bounds, np.float32(2), np.zeros(2, np.float32))
    kernels = [value.numpy()[0, 0] for value in strategy.experimental_local_results(model.weights[0].value)]
    print(*kernels, float(optimizer.dynamic_scale.numpy()))
train([1, 1])
train([1, np.inf])
train([np.inf, 1])
train([1, 1])
"""


@pytest.mark.slow
def test_all_devices_leave_out_the_step_in_which_one_has_gradients_that_are_not_finite():
    found = subprocess.run([sys.executable, "-c", SCALED, str(PROJECT)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    # The gradient of each weight is 1 in every step, the rate 0.1; the scale is halved where a step is left out.
    rows = np.array([line.split() for line in found.stdout.splitlines()], float)
    np.testing.assert_allclose(rows, [[0.9, 0.9, 8], [0.9, 0.9, 4], [0.9, 0.9, 2], [0.8, 0.8, 2]], rtol=1e-6)


@pytest.mark.slow
def test_memory_is_limited_on_every_gpu_before_a_strategy_takes_them(monkeypatch):
    limits = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["gpu0", "gpu1"])
    monkeypatch.setattr("finetune.core.devices.gpu_memory_sizes", lambda number: [2**34, 2**33])
    monkeypatch.setattr(tf.config, "set_logical_device_configuration", lambda *limit: limits.append(limit))
    from finetune.core.devices import set_gpu_usage

    set_gpu_usage(0.5)
    assert [(gpu, config[0].memory_limit) for gpu, config in limits] == [("gpu0", 2**13), ("gpu1", 2**12)]


def test_predictions_of_a_distributed_model_are_those_of_the_model(tables, tmp_path):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    table = pd.read_csv(tables[1])
    with strategy.scope():
        inputs = keras.Input((8, 8, 3))
        outputs = keras.layers.Dense(3, activation="softmax")(keras.layers.Flatten()(inputs))
        model = TrainingModel(inputs, outputs)
        model.compile(keras.optimizers.SGD(), "mse", [])
    sequence = AugmentedImageSequence(table["path"], np.zeros(11, int), (8, 8), 4, shares=Shares(1, 0, 1))
    probabilities, is_read = model.predict_sequence(sequence)
    images = np.concatenate([sequence[index][0] for index in range(3)])
    np.testing.assert_allclose(probabilities, keras.Model(inputs, outputs).predict(images, verbose=0), rtol=1e-5)
    assert is_read.tolist() == [True] * 11


def test_a_class_that_the_validation_set_lacks_is_named_at_the_start(photo_folder, small_run, tmp_path, capsys):
    paths = {}
    for name, classes in (("training", ("blue", "green", "red")), ("validation", ("green",))):
        rows = [f"{photo_folder}/{one}/0{number}.jpg,{one}" for one in classes for number in range(2)]
        paths[name] = tmp_path / f"{name}.csv"
        paths[name].write_text("\n".join(["path,class", *rows]), "utf-8")
    configs = small_run(paths["training"], paths["validation"], classes=["blue", "green", "red"])
    get_images(configs, {str(path): set() for path in paths.values()}, Shares())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert lines == [
        "Warning: the validation set has no image of blue, red: its metrics say nothing about these 2 classes."
    ]
