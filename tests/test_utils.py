"""Tables, labels, weights, files, devices and model files: right values by hand, and one clear line for a mistake."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from configs import OPTIMIZER_NAMES, Configs
from finetune import devices
from finetune.compressed import custom_load_model, custom_save_model
from finetune.data_check import check_images
from finetune.decision import Decision
from finetune.devices import gpu_memory_sizes, set_gpu_usage, set_seed
from finetune.files import atomic_path, write_csv, write_json, write_text
from finetune.losses import get_class_weights, get_multilabel_class_weights
from finetune.model_files import load_fitting_model, load_model
from finetune.optimizers import exclude_from_weight_decay, get_optimizer
from finetune.options import UserError
from finetune.predicting import classify_image
from finetune.run_folder import describe_model, find_trained_model, resolve_model_path
from finetune.stores import is_url, join_path
from finetune.tables import encode_labels, find_class_names, read_table, resolve_class_names

PROJECT = Path(__file__).parent.parent
CLASSES = ["cat", "dog", "owl"]


def write_table(folder, content, encoding="utf-8"):
    path = folder / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


def write_configs(folder, **options):
    (folder / "configs.json").write_text(json.dumps(options), encoding="utf-8")


@pytest.fixture(scope="module")
def trained_model():
    """A small model whose BatchNorm statistics, dropout seed and optimizer slots have left their initial values."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 10, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", loss="sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    model.fit(rng.uniform(0, 255, (16, 8, 10, 3)), rng.integers(0, 3, 16), verbose=0)
    return model


@pytest.fixture(scope="module")
def model_files(trained_model, tmp_path_factory):
    """The trained model as a file, by ending."""
    folder = tmp_path_factory.mktemp("models")
    # The .keras file first: saving HDF5 drops the optimizer from the compile configuration that it stores.
    for suffix in (".keras", ".h5", ".hdf5"):
        trained_model.save(folder / f"model{suffix}")
    return {suffix: str(folder / f"model{suffix}") for suffix in (".keras", ".h5", ".hdf5")}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (4, 8, 10, 3)).astype(np.uint8)


def predict(model, images):
    return model(images, training=False).numpy()


# Tables


def test_table_is_read_as_texts_with_its_other_columns(tmp_path):
    path = write_table(tmp_path, "path,class,note\n001,NA,x\n002,None,\n003,1.50,nan\n")
    assert read_table(path, "class").to_dict("list") == {
        "path": ["001", "002", "003"],
        "class": ["NA", "None", "1.50"],
        "note": ["x", "", "nan"],
    }


def test_byte_order_mark_is_accepted(tmp_path):
    table = read_table(write_table(tmp_path, "path,class\na.jpg,Ärmel\n", "utf-8-sig"), "class")
    assert table.to_dict("list") == {"path": ["a.jpg"], "class": ["Ärmel"]}


def test_windows_line_ends_and_quotes_are_read(tmp_path):
    table = read_table(write_table(tmp_path, 'path,class\r\n"a, b.jpg","say ""x"""\r\n'), "class")
    assert table.to_dict("list") == {"path": ["a, b.jpg"], "class": ['say "x"']}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty. Expected the columns path and label"),
        ("\n\n", "is empty"),
        ("path,label\n", "has no rows"),
        ("path,class\na.jpg,cat\n", r"has no column 'label'\. Its columns: path, class\. Set csv_label_column"),
        ("file,label\na.jpg,cat\n", r"has no column 'path'\. Its columns: file, label\."),
        ("path;label\na.jpg;cat\n", r"has no column 'path'\. Its columns: path;label\."),
        ("path,label\na.jpg,cat\nb.jpg,\n", "row 3: the column 'label' is empty"),
        ("path,label\na.jpg,cat\nb.jpg,  \n", "row 3: the column 'label' is empty"),
        ("path,label\na.jpg,cat\nb.jpg\n", "row 3: the column 'label' is empty"),
        ("path,label\n,cat\n", "row 2: the column 'path' is empty"),
        ("path,label\na.jpg,cat\nb.jpg,cat,dog\n", "is not a UTF-8 CSV file"),
        ('path,label\na.jpg,"cat\n', "is not a UTF-8 CSV file"),
        ("path,label\na.jpg,Ärmel\n".encode("latin-1"), "is not a UTF-8 CSV file"),
        ("path,label\na.jpg,cat\n".encode("utf-16"), "is not a UTF-8 CSV file"),
        (b"\x89PNG\r\n\x1a\n\xff\x00", "is not a UTF-8 CSV file"),
    ],
)
def test_unusable_table_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"table\.csv,? ?{message}"):
        read_table(write_table(tmp_path, content), "label")


def test_rows_with_more_fields_than_the_header_are_refused_not_shifted(tmp_path):
    with pytest.raises(UserError, match=r"table\.csv"):
        read_table(write_table(tmp_path, "path,class\na.jpg,cat,dog\nb.jpg,dog,cat\n"), "class")


def test_blank_line_between_rows_is_named_and_those_at_the_end_are_harmless(tmp_path):
    with pytest.raises(UserError, match="row 3: the column 'path' is empty"):
        read_table(write_table(tmp_path, "path,class\na.jpg,cat\n\nb.jpg,dog\n"), "class")
    table = read_table(write_table(tmp_path, "path,class\na.jpg,cat\nb.jpg,dog\n\n\n"), "class")
    assert table["path"].tolist() == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_table_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(UserError, match="Cannot read the CSV file .*Check the path"):
        read_table(str(tmp_path / name), "class")


# Class names and labels


def test_class_names_are_sorted():
    assert find_class_names(["owl", "cat", "owl", "Dog"], False) == ["Dog", "cat", "owl"]


def test_multi_label_class_names_are_split():
    assert find_class_names(["owl$cat", "dog", "cat"], True) == ["cat", "dog", "owl"]
    assert find_class_names(["owl$cat", "dog"], False) == ["dog", "owl$cat"]


def test_class_names_do_not_depend_on_the_hash_seed():
    code = (
        "from finetune.tables import find_class_names\n"
        "print(find_class_names([f'{n % 29}${n % 13}' for n in range(300)], True))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=PROJECT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{sorted(map(str, range(29)))}\n"}


def test_given_classes_keep_their_order(tmp_path):
    path = write_table(tmp_path, "path,class\na,cat\nb,dog\n")
    assert resolve_class_names(["dog", "cat"], path, "class", False) == ["dog", "cat"]
    assert resolve_class_names(None, path, "class", False) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cat"], "it lacks dog"),
        (["cat", "dog", "owl"], "has no image of owl"),
        (["cat", "owl"], "it lacks dog; .*has no image of owl"),
        ([], "it lacks cat, dog"),
    ],
)
def test_classes_that_are_not_those_of_the_table_are_refused(tmp_path, given, message):
    path = write_table(tmp_path, "path,class\na,cat\nb,dog\n")
    with pytest.raises(UserError, match=rf"classes does not match .*table\.csv.*{message}"):
        resolve_class_names(given, path, "class", False)


def test_one_class_is_refused_unless_multi_label(tmp_path):
    path = write_table(tmp_path, "path,class\na,cat\nb,cat\n")
    with pytest.raises(UserError, match="holds one class, cat"):
        resolve_class_names(None, path, "class", False)
    assert resolve_class_names(None, path, "class", True) == ["cat"]


def test_single_labels_become_positions():
    encoded = encode_labels(["owl", "cat", "owl"], CLASSES, False, "t.csv")
    assert encoded.tolist() == [2, 0, 2]
    assert encoded.dtype == np.int32


def test_positions_follow_the_given_order():
    assert encode_labels(["owl", "cat"], ["owl", "dog", "cat"], False, "t.csv").tolist() == [0, 2]


def test_multi_labels_become_zeros_and_ones():
    encoded = encode_labels(["owl$cat", "dog", "cat$cat"], CLASSES, True, "t.csv")
    assert encoded.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert encoded.dtype == np.uint8


@pytest.mark.parametrize(
    ("labels", "multi_label", "row", "name"),
    [
        (["cat", "dog", "emu", "emu"], False, 4, "emu"),
        (["cat", "dog$emu"], True, 3, "emu"),
        (["cat$dog"], False, 2, r"cat\$dog"),
    ],
)
def test_unknown_label_names_its_row(labels, multi_label, row, name):
    with pytest.raises(UserError, match=rf"t\.csv, row {row}: the label '{name}'.*cat, dog, owl"):
        encode_labels(labels, CLASSES, multi_label, "t.csv")


@pytest.mark.parametrize("label", ["cat$", "$cat", "cat$$dog"])
def test_separator_without_a_name_beside_it_makes_no_class(tmp_path, label):
    path = write_table(tmp_path, f"path,class\na,dog\nb,{label}\n")
    with pytest.raises(UserError):
        resolve_class_names(None, path, "class", True)


# Images


def test_images_of_any_format_pass(tmp_path):
    names = ["a.png", "b.jpg", "c.bmp", "d.tif", "e.webp"]
    for name in names:
        cv2.imwrite(str(tmp_path / name), np.zeros((4, 4, 3), np.uint8))
    check_images([str(tmp_path / name) for name in names], "t.csv")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jpg", "does not exist"),
        ("empty.jpg", "is empty"),
        ("text.jpg", "is no image that OpenCV reads"),
        (".", "does not exist"),
    ],
)
def test_file_that_is_no_image_names_its_row(tmp_path, name, message):
    cv2.imwrite(str(tmp_path / "good.jpg"), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is a text, not an image, whatever its name says", encoding="utf-8")
    with pytest.raises(UserError, match=rf"t\.csv: row 3: .*{message}\. Correct image_directory") as raised:
        check_images([str(tmp_path / "good.jpg"), str(tmp_path / name)], "t.csv")
    assert "row 2" not in str(raised.value)


def test_only_the_first_bad_images_are_listed():
    with pytest.raises(UserError, match="3 more rows") as raised:
        check_images([f"missing_{number}.jpg" for number in range(8)], "t.csv")
    assert "missing_4.jpg" in str(raised.value)
    assert "missing_5.jpg" not in str(raised.value)


# Class weights


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5, 5, 5], [1, 1, 1]),
        ([1, 1], [1, 1]),
        ([8, 2], [1, 1 + math.log(2.5)]),
        ([60, 30, 10], [1, 1 + math.log(10 / 9), 1 + math.log(10 / 3)]),
        ([6, 0], [1, 1]),
        ([10**6, 1], [1, 1 + math.log(500000.5)]),
    ],
)
def test_rare_class_weighs_more_and_none_less_than_1(counts, expected):
    weights = get_class_weights(np.repeat(np.arange(len(counts)), counts), len(counts))
    assert weights == pytest.approx(dict(enumerate(expected)))
    assert min(weights.values()) >= 1


def test_balanced_classes_weigh_exactly_1():
    assert get_class_weights(np.tile(np.arange(7), 11), 7) == dict.fromkeys(range(7), 1.0)


def test_multi_label_weights_raise_the_rarer_of_present_and_absent():
    labels = np.zeros((10, 5))
    for position, present in enumerate([2, 5, 8, 0, 10]):
        labels[:present, position] = 1
    more = 1 + math.log(4)
    weights = get_multilabel_class_weights(labels)
    np.testing.assert_allclose(weights, [[1, 1, more, 1, 1], [more, 1, 1, 1, 1]], rtol=1e-6)
    assert weights.dtype == np.float32


def test_multi_label_weights_of_present_labels_are_multiplied():
    labels = np.array([[1], [0], [0], [0]])
    more = 1 + math.log(3)
    np.testing.assert_allclose(get_multilabel_class_weights(labels, 2.5), [[1], [2.5 * more]], rtol=1e-6)
    np.testing.assert_allclose(get_multilabel_class_weights(labels, 2.5, balance=False), [[1], [2.5]])


# Files


def test_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_path(str(path)) as temporary:
        assert temporary.endswith("a.txt")
        assert Path(temporary).is_relative_to(path.parent)
        Path(temporary).write_text("new", encoding="utf-8")
        assert not path.exists()
    assert path.read_text("utf-8") == "new"
    assert os.listdir(path.parent) == ["a.txt"]


def write_half(path, error):
    with atomic_path(str(path)) as temporary:
        Path(temporary).write_text("half", encoding="utf-8")
        raise error


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("x"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left"), UserError),
    ],
)
def test_failure_leaves_the_old_file_and_no_temporary_one(tmp_path, error, shown):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(shown):
        write_half(path, error)
    assert path.read_text("utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_full_disk_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"Cannot write .*a\.txt: No space left\. Free the space") as raised:
        write_half(tmp_path / "a.txt", OSError(28, "No space left"))
    assert "\n" not in str(raised.value)


def test_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        write_text(str(tmp_path / "file" / "a.txt"), "x")


def test_folder_in_place_of_the_file_is_told(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="Cannot write"):
        write_text(str(tmp_path / "a.txt"), "x")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_and_csv_are_written_as_others_read_them(tmp_path):
    import pandas as pd

    write_json(str(tmp_path / "a.json"), {"classes": ["Ärmel"]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"classes": ["Ärmel"]}
    write_csv(str(tmp_path / "a.csv"), pd.DataFrame({"path": ["a, b"], "class": ["Ärmel"]}))
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["path", "class"], ["a, b", "Ärmel"]]


# Seeds and devices


def test_seed_repeats_the_draws():
    draws = []
    for seed in (3, 3, 4):
        assert set_seed(seed) == seed
        draws.append((np.random.rand(), keras.random.uniform((1,)).numpy().item()))
    assert draws[0] == draws[1] != draws[2]


def test_no_seed_draws_a_valid_one():
    seed = set_seed(None)
    assert Configs(random_seed=seed).validate().random_seed == seed


@pytest.fixture
def gpu_calls(monkeypatch):
    """Records what TensorFlow is told, on a machine of two GPUs with 8 and 4 GiB."""
    calls = SimpleNamespace(gpus=["gpu0", "gpu1"], limits={}, visible=None)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: calls.gpus)
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpus, kind: setattr(calls, "visible", (gpus, kind)))
    monkeypatch.setattr(
        tf.config,
        "set_logical_device_configuration",
        lambda gpu, parts: calls.limits.update({gpu: [part.memory_limit for part in parts]}),
    )
    monkeypatch.setattr(devices, "gpu_memory_sizes", lambda number: [8 * 2**30, 4 * 2**30][:number])
    return calls


def test_share_holds_on_every_gpu(gpu_calls):
    set_gpu_usage(0.25)
    assert gpu_calls.limits == {"gpu0": [2048], "gpu1": [1024]}
    assert gpu_calls.visible is None


def test_share_of_0_hides_the_gpus(gpu_calls):
    set_gpu_usage(0)
    assert gpu_calls.visible == ([], "GPU")
    assert gpu_calls.limits == {}


def test_machine_without_gpu_needs_nothing(gpu_calls):
    gpu_calls.gpus = []
    set_gpu_usage(0.95)
    assert gpu_calls.limits == {}


def test_no_gpu_asks_no_driver(monkeypatch):
    monkeypatch.setattr(devices.ctypes, "CDLL", None)
    assert gpu_memory_sizes(0) == []


def test_missing_driver_is_told(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(devices.ctypes, "CDLL", missing)
    with pytest.raises(UserError, match="CUDA driver.*Set gpu_percentage to 0"):
        gpu_memory_sizes(1)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_optimizer_has_its_name_and_rate(name):
    optimizer = get_optimizer(name, 0.0123)
    assert (
        type(optimizer)
        is {
            "Adam": keras.optimizers.Adam,
            "SGD": keras.optimizers.SGD,
            "RMSprop": keras.optimizers.RMSprop,
            "Adagrad": keras.optimizers.Adagrad,
            "Adadelta": keras.optimizers.Adadelta,
            "Adamax": keras.optimizers.Adamax,
            "Nadam": keras.optimizers.Nadam,
            "AdamW": keras.optimizers.AdamW,
            "Lion": keras.optimizers.Lion,
        }[name]
    )
    assert float(optimizer.learning_rate) == pytest.approx(0.0123)


def normalised_model():
    """A convolution by depth, a normalisation and a dense layer; all their weights are 2."""
    inputs = keras.Input((4, 4, 3))
    outputs = keras.layers.BatchNormalization()(keras.layers.DepthwiseConv2D(3)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(outputs)))
    model.set_weights([np.full(weight.shape, 2, np.float32) for weight in model.weights])
    return model


def step_without_gradients(optimizer, model):
    optimizer.apply_gradients([(np.zeros(weight.shape, np.float32), weight) for weight in model.trainable_variables])
    return {"/".join(weight.path.split("/")[-2:]): weight.numpy() for weight in model.trainable_variables}


def assert_kernels_alone_have_changed(weights, factor):
    kernels = {name for name in weights if name.endswith("kernel")}
    assert len(kernels) == 2
    assert len(weights) == 6
    for name, value in weights.items():
        np.testing.assert_allclose(value, 2 * (factor if name in kernels else 1), rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_weight_decay_takes_from_kernels_alone(name):
    model, optimizer = normalised_model(), get_optimizer(name, 0.5, weight_decay=0.2)
    exclude_from_weight_decay(model, optimizer)
    assert_kernels_alone_have_changed(step_without_gradients(optimizer, model), 1 - 0.5 * 0.2)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_without_weight_decay_nothing_is_taken(name):
    model, optimizer = normalised_model(), get_optimizer(name, 0.5)
    for weight in step_without_gradients(optimizer, model).values():
        np.testing.assert_array_equal(weight, 2)
    # What Keras saves of an optimizer it can build again.
    assert type(optimizer).from_config(optimizer.get_config()).weight_decay in (None, 0.0)


def test_weight_decay_is_apart_from_the_gradient():
    weight, optimizer = keras.Variable([[3.0]]), get_optimizer("SGD", 0.5, weight_decay=0.2)
    optimizer.apply_gradients([(np.array([[0.4]], np.float32), weight)])
    assert float(weight[0, 0]) == pytest.approx(3 - 3 * 0.5 * 0.2 - 0.5 * 0.4)


def test_biases_are_excluded_from_an_optimizer_that_is_built_or_scales_the_loss():
    for wraps in (False, True):
        model, optimizer = normalised_model(), get_optimizer("AdamW", 0.5, weight_decay=0.2)
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer) if wraps else optimizer
        optimizer.build(model.trainable_variables)
        exclude_from_weight_decay(model, optimizer)
        assert_kernels_alone_have_changed(step_without_gradients(optimizer, model), 1 - 0.5 * 0.2)


def test_biases_are_excluded_again_after_loading(tmp_path):
    model = normalised_model()
    model.compile(get_optimizer("AdamW", 0.5, weight_decay=0.2))
    exclude_from_weight_decay(model, model.optimizer)
    step_without_gradients(model.optimizer, model)
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = load_model(path, with_optimizer=True)
    assert loaded.optimizer.built
    exclude_from_weight_decay(loaded, loaded.optimizer)
    assert_kernels_alone_have_changed(step_without_gradients(loaded.optimizer, loaded), (1 - 0.5 * 0.2) ** 2)


def test_ema_decay_keeps_the_moving_average_beside_the_weights():
    weight, optimizer = keras.Variable([3.0]), get_optimizer("SGD", 1.0, ema_decay=0.75)
    for gradient in (1.0, 4.0):
        optimizer.apply_gradients([(np.array([gradient], np.float32), weight)])
    np.testing.assert_allclose(weight, [-2.0])
    (average,) = [variable for variable in optimizer.variables if variable.name.endswith("average")]
    # It starts from the weights after the first step, which are 2.
    np.testing.assert_allclose(average, [0.75 * 2 + 0.25 * -2])
    assert not get_optimizer("SGD", 1.0).use_ema


# Model paths and what a model's configs.json says


def test_model_file_is_itself(tmp_path, capsys):
    (tmp_path / "a.h5").touch()
    assert resolve_model_path(str(tmp_path / "a.h5")) == str(tmp_path / "a.h5")
    assert capsys.readouterr().out == ""


def test_folder_means_its_best_model_or_else_the_latest(tmp_path):
    (tmp_path / "latest_model.keras").touch()
    assert resolve_model_path(str(tmp_path)) == str(tmp_path / "latest_model.keras")
    (tmp_path / "best_model.keras").touch()
    assert resolve_model_path(str(tmp_path)) == str(tmp_path / "best_model.keras")
    preferred = ("latest_model.keras", "best_model.keras")
    assert resolve_model_path(str(tmp_path), preferred) == str(tmp_path / "latest_model.keras")


def test_substituted_ending_is_printed(tmp_path, capsys):
    (tmp_path / "best_model.keras").touch()
    asked = str(tmp_path / "best_model.hdf5")
    assert resolve_model_path(asked) == str(tmp_path / "best_model.keras")
    printed = capsys.readouterr().out
    assert asked in printed
    assert str(tmp_path / "best_model.keras") in printed


@pytest.mark.parametrize("name", ["", "missing", "missing.keras", "missing.hdf5", "folder", "notes.txt"])
def test_path_without_a_model_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.keras").touch()
    with pytest.raises(UserError, match="no model"):
        resolve_model_path(name)


STORED = {
    "classes": ["owl", "cat"],
    "image_target_size": [96, 80, 3],
    "multi_label_classification": True,
    "visual_model_name": "VGG16",
    "final_layer_pooling": None,
    "classifier_layer_sizes": [],
    "pop_conv_layers": 2,
    "cnn_downscaling_factor": 1,
    "cnn_downscaling_filters": 32,
}


def test_model_is_described_by_the_configs_beside_it(tmp_path):
    write_configs(tmp_path, **STORED, batch_size=99, train_csv="other.csv", learning_rate=0.5)
    configs = describe_model(Configs(batch_size=4), str(tmp_path / "best_model.keras"))
    expected = STORED | {"image_target_size": (96, 80, 3)}
    assert {name: getattr(configs, name) for name in expected} == expected
    assert (configs.batch_size, configs.train_csv, configs.learning_rate) == (4, "./data/training_set.csv", 0.001)


def test_model_without_configs_leaves_everything(tmp_path):
    assert describe_model(Configs(batch_size=4), str(tmp_path / "a.keras")) == Configs(batch_size=4)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--image_target_size", "64", "64", "3"], "image_target_size"),
        (["--image_target_size", "224", "224", "3"], "image_target_size"),
        (["--classes", "cat", "owl"], "classes"),
        (["--multi_label_classification", "False"], "multi_label_classification"),
        (["--visual_model_name", "DenseNet121"], "visual_model_name"),
        (["--pop_conv_layers", "0"], "pop_conv_layers"),
        (["--final_layer_pooling", "max"], "final_layer_pooling"),
    ],
)
def test_given_option_that_contradicts_the_model_is_refused(tmp_path, flags, name):
    write_configs(tmp_path, **STORED)
    configs = Configs.from_command_line(arguments=flags)
    with pytest.raises(UserError, match=rf"^{name} is .*configs\.json.*Received: "):
        describe_model(configs, str(tmp_path / "best_model.keras"))


def test_given_none_that_contradicts_the_model_is_refused(tmp_path):
    write_configs(tmp_path, final_layer_pooling="avg")
    configs = Configs.from_command_line(arguments=["--final_layer_pooling", "none"])
    with pytest.raises(UserError, match="final_layer_pooling"):
        describe_model(configs, str(tmp_path / "best_model.keras"))


def test_given_options_that_agree_or_leave_the_classes_open_pass(tmp_path):
    write_configs(tmp_path, **STORED)
    flags = ["--image_target_size", "96", "80", "3", "--classes", "none", "--batch_size", "7"]
    configs = describe_model(Configs.from_command_line(arguments=flags), str(tmp_path / "best_model.keras"))
    assert (configs.classes, configs.batch_size) == (["owl", "cat"], 7)


def test_damaged_configs_beside_the_model_are_told(tmp_path):
    (tmp_path / "configs.json").write_text('{"classes": ', encoding="utf-8")
    with pytest.raises(UserError, match=r"configs\.json is not valid JSON"):
        describe_model(Configs(), str(tmp_path / "best_model.keras"))


def test_classes_of_a_model_without_configs_come_from_the_training_table(tmp_path):
    (tmp_path / "best_model.keras").touch()
    train_csv = write_table(tmp_path, "path,class\na,owl\nb,cat\n")
    path, configs = find_trained_model(Configs(load_model_path=str(tmp_path), train_csv=train_csv))
    assert path == str(tmp_path / "best_model.keras")
    assert configs.classes == ["cat", "owl"]


def test_what_is_written_about_a_model_goes_beside_it_unless_another_folder_is_given(tmp_path):
    (tmp_path / "best_model.keras").touch()
    train_csv = write_table(tmp_path, "path,class\na,owl\nb,cat\n")
    _, configs = find_trained_model(Configs(load_model_path=str(tmp_path), train_csv=train_csv))
    assert configs.save_model_path == str(tmp_path)
    given = Configs(load_model_path=str(tmp_path), train_csv=train_csv, save_model_path="elsewhere")
    assert find_trained_model(given)[1].save_model_path == "elsewhere"


# Model files


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".hdf5"])
def test_whole_model_file_is_loaded(model_files, trained_model, images, suffix):
    loaded = load_model(model_files[suffix])
    np.testing.assert_array_equal(predict(loaded, images), predict(trained_model, images))


def test_optimizer_comes_back_only_where_it_is_asked_for(model_files, trained_model):
    assert getattr(load_model(model_files[".keras"]), "optimizer", None) is None
    restored = load_model(model_files[".keras"], with_optimizer=True).optimizer
    for variable, expected in zip(restored.variables, trained_model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), expected.numpy())


def test_compressed_model_predicts_the_same(tmp_path, trained_model, images):
    weights_path, layers_path = custom_save_model(trained_model, str(tmp_path / "new"), "model")
    assert (weights_path, layers_path) == (str(tmp_path / "new" / "model.h5"), str(tmp_path / "new" / "model.json"))
    assert sorted(os.listdir(tmp_path / "new")) == ["model.h5", "model.json"]
    for loaded in (custom_load_model(str(tmp_path / "new"), "model"), load_model(weights_path)):
        np.testing.assert_array_equal(predict(loaded, images), predict(trained_model, images))


def test_compressed_model_holds_the_statistics_but_no_optimizer_state(tmp_path, trained_model):
    weights_path, _ = custom_save_model(trained_model, str(tmp_path), "model")
    with h5py.File(weights_path) as file:
        stored = [group[...] for group in file["weights"].values()]
    kernel, bias, gamma, beta, mean, variance = (3 * 3 * 3 * 4, 4, 4, 4, 4, 4)
    assert sum(array.size for array in stored) == kernel + bias + gamma + beta + mean + variance + 4 * 3 + 3
    restored = custom_load_model(str(tmp_path), "model")
    batch_norm = next(layer for layer in restored.layers if isinstance(layer, keras.layers.BatchNormalization))
    assert not np.allclose(batch_norm.moving_mean.numpy(), 0)


def test_compressed_model_in_the_working_folder_is_loaded(tmp_path, trained_model, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    custom_save_model(trained_model, "", "model")
    np.testing.assert_array_equal(predict(load_model("model.h5"), images), predict(trained_model, images))


def test_more_than_ten_weights_keep_their_order(tmp_path):
    inputs = keras.Input((2,))
    outputs = inputs
    for _ in range(8):
        outputs = keras.layers.Dense(2)(outputs)
    model = keras.Model(inputs, outputs)
    custom_save_model(model, str(tmp_path), "model")
    for restored, expected in zip(
        custom_load_model(str(tmp_path), "model").get_weights(), model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(restored, expected)


@pytest.mark.parametrize("missing", ["model.h5", "model.json"])
def test_half_of_a_compressed_model_is_refused(tmp_path, trained_model, missing):
    custom_save_model(trained_model, str(tmp_path), "model")
    os.remove(tmp_path / missing)
    with pytest.raises(UserError, match=r"model\.h5"):
        custom_load_model(str(tmp_path), "model")
    with pytest.raises(UserError, match=r"model\.h5"):
        load_model(str(tmp_path / "model.h5"))


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "3", '{"class_name": "Nonsense", "config": {}}', "{"])
def test_compressed_model_with_a_foreign_json_is_refused(tmp_path, trained_model, content):
    custom_save_model(trained_model, str(tmp_path), "model")
    (tmp_path / "model.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.json"):
        load_model(str(tmp_path / "model.h5"))


def test_weights_of_another_model_are_refused(tmp_path, trained_model):
    custom_save_model(trained_model, str(tmp_path), "model")
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    custom_save_model(other, str(tmp_path), "other")
    shutil.copy(tmp_path / "other.json", tmp_path / "model.json")
    with pytest.raises(UserError, match="does not belong to"):
        load_model(str(tmp_path / "model.h5"))


def test_weights_without_a_model_are_refused(tmp_path, trained_model):
    trained_model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(UserError, match=r"model\.weights\.h5 holds weights but no model"):
        load_model(str(tmp_path / "model.weights.h5"))


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".hdf5", ".txt", ""])
@pytest.mark.parametrize("content", [None, b"", b"this is no model"])
def test_file_that_is_no_model_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="model") as raised:
        load_model(str(path))
    assert "\n" not in str(raised.value)


def test_foreign_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(UserError, match="is not a model"):
        load_model(str(tmp_path / "model.keras"))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_truncated_model_is_refused(tmp_path, model_files, suffix, kept):
    content = Path(model_files[suffix]).read_bytes()
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match="is not a model"):
        load_model(str(path))


@pytest.mark.parametrize("suffix", [".keras", ".h5", "compressed"])
def test_code_in_a_model_file_is_never_run(tmp_path, suffix):
    model = keras.Sequential([keras.Input((8, 10, 3)), keras.layers.Lambda(lambda x: x * 2), keras.layers.Flatten()])
    path = str(tmp_path / f"model{suffix}")
    if suffix == "compressed":
        path, _ = custom_save_model(model, str(tmp_path), "model")
    else:
        model.save(path)
    with pytest.raises(UserError, match=r"[Ll]ambda"):
        load_model(path)


def test_fitting_model_is_loaded(model_files):
    model = load_fitting_model(model_files[".keras"], CLASSES, (8, 10))
    assert model.output_shape == (None, 3)


@pytest.mark.parametrize(
    ("class_names", "image_size", "message"),
    [
        (["cat", "dog"], (8, 10), "tells 3 classes apart, but the configs name 2: cat, dog"),
        (CLASSES, (10, 8), r"takes inputs of shape \(8, 10, 3\)\. Expected images of image_target_size, \(10, 8, 3\)"),
    ],
)
def test_model_that_does_not_fit_is_refused(model_files, class_names, image_size, message):
    with pytest.raises(UserError, match=message):
        load_fitting_model(model_files[".keras"], class_names, image_size)


@pytest.mark.parametrize("input_shape", [(8, 10, 1), (8,), (8, 10)])
def test_model_of_other_input_than_rgb_is_refused(tmp_path, input_shape):
    layers = [keras.Input(input_shape), keras.layers.Flatten(), keras.layers.Dense(3)]
    keras.Sequential(layers).save(tmp_path / "model.keras")
    with pytest.raises(UserError, match=r"model\.keras takes"):
        load_fitting_model(str(tmp_path / "model.keras"), CLASSES, (8, 10))


def test_model_of_any_image_size_fits(tmp_path):
    layers = [keras.Input((None, None, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)]
    keras.Sequential(layers).save(tmp_path / "model.keras")
    model = load_fitting_model(str(tmp_path / "model.keras"), CLASSES, (8, 10))
    assert model.output_shape == (None, 3)


# One image


@pytest.fixture
def photo():
    return np.random.default_rng(2).integers(0, 256, (32, 40, 3)).astype(np.uint8)


def test_single_label_image_gets_the_most_probable_class(trained_model, photo):
    blocks = photo.reshape(8, 4, 10, 4, 3).mean(axis=(1, 3))
    resized = np.rint(blocks).astype(np.uint8)
    expected = predict(trained_model, resized[None])[0]
    names, probabilities = classify_image(trained_model, photo, CLASSES)
    assert names == [CLASSES[expected.argmax()]]
    assert list(probabilities) == CLASSES
    assert list(probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-3)


def test_image_of_the_model_s_size_is_taken_as_it_is(trained_model, images):
    _, probabilities = classify_image(trained_model, images[0], CLASSES)
    assert list(probabilities.values()) == pytest.approx(predict(trained_model, images[:1])[0].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("threshold", "names"), [(0.5, ["owl", "dog"]), (0.75, ["owl"]), (0.95, []), (0.0, ["owl", "dog", "cat"])]
)
def test_multi_label_image_gets_every_class_from_the_threshold_on(images, threshold, names):
    model = keras.Sequential(
        [
            keras.Input((8, 10, 3)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, "sigmoid", kernel_initializer="zeros"),
        ]
    )
    model.layers[-1].bias.assign([math.log(9), 0.0, -math.log(9)])
    chosen, probabilities = classify_image(model, images[0], ["owl", "dog", "cat"], True, threshold)
    assert chosen == names
    assert probabilities == pytest.approx({"owl": 0.9, "dog": 0.5, "cat": 0.1})


@pytest.mark.parametrize(
    ("threshold_type", "names"), [("exact_match", ["owl"]), ("best_f1", ["owl", "dog", "cat"])], ids=["one", "each"]
)
def test_a_decision_takes_the_place_of_mode_and_threshold(images, threshold_type, names):
    model = keras.Sequential(
        [
            keras.Input((8, 10, 3)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, "sigmoid", kernel_initializer="zeros"),
        ]
    )
    model.layers[-1].bias.assign([math.log(9), 0.0, -math.log(9)])
    # Temperature 2 halves the logits: odds of 9 become odds of 3.
    decision = Decision(["owl", "dog", "cat"], True, 2.0, "validation", 0.7, [0.6, 0.4, 0.2], "validation")
    chosen, probabilities = classify_image(
        model, images[0], ["owl", "dog", "cat"], threshold=0.99, decision=decision, threshold_type=threshold_type
    )
    assert chosen == names
    assert probabilities == pytest.approx({"owl": 0.75, "dog": 0.5, "cat": 0.25})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *[(url, True) for url in ("s3://bucket/a.jpg", "memory://a", "https://host/a?b=c", "git+ssh://host/a")],
        *[(path, False) for path in ("a.jpg", "C:\\a.jpg", "C://a.jpg", "/a:b/c.jpg", "./s3://b/a.jpg", "s3:/a", "")],
    ],
)
def test_a_protocol_of_two_letters_or_more_makes_a_url(path, expected):
    assert is_url(path) is expected


@pytest.mark.parametrize(
    ("directory", "path", "expected"),
    [
        ("", "a.jpg", "a.jpg"),
        ("", "s3://bucket/a.jpg", "s3://bucket/a.jpg"),
        ("photos", "s3://bucket/../a.jpg", "s3://bucket/../a.jpg"),
        ("s3://bucket", "gs://other/a.jpg", "gs://other/a.jpg"),
        ("s3://bucket", "a.jpg", "s3://bucket/a.jpg"),
        ("s3://bucket/photos/", "./cat/a.jpg", "s3://bucket/photos/cat/a.jpg"),
        ("s3://bucket/photos", "../a.jpg", "s3://bucket/a.jpg"),
        ("memory://", "x/a.jpg", "memory://x/a.jpg"),
        ("file:///photos", "a.jpg", "file:///photos/a.jpg"),
        ("photos", "a.jpg", os.path.join("photos", "a.jpg")),
        ("s3://bucket", os.path.abspath("a.jpg"), os.path.abspath("a.jpg")),
    ],
)
def test_a_path_is_joined_to_a_folder_or_a_url(directory, path, expected):
    assert join_path(directory, path) == expected


def test_names_that_do_not_number_the_outputs_are_refused(trained_model, images):
    with pytest.raises(ValueError, match="zip"):
        classify_image(trained_model, images[0], ["cat", "dog"])
