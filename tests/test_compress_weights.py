"""Compressed weights: what each precision may cost, and a gate that lets nothing ship that answers otherwise."""

import json
import os

import h5py
import keras
import numpy as np
import pandas as pd
import pytest

import compress_weights
from compress_weights import CompressConfigs
from configs import Configs
from finetune import exports
from finetune.artefacts import WEIGHTS_DTYPES
from finetune.compressed import custom_load_model, custom_save_model
from finetune.decision import Decision
from finetune.model_files import load_model
from finetune.options import UserError
from finetune.parity import compare
from model import ModelFactory

CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def wide_model():
    """A model with each kind of weight, a depthwise kernel whose channels differ by powers of ten among them."""
    rng = np.random.default_rng(0)
    layers = keras.layers
    normalization = layers.Normalization()
    normalization.adapt(rng.normal(100, 30, (4, 8, 8, 3)).astype(np.float32))
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            normalization,
            keras.Sequential([layers.Conv2D(80, 3, name="conv"), layers.BatchNormalization(name="norm")]),
            layers.DepthwiseConv2D(5, padding="same", depth_multiplier=2, name="depthwise"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax", name="dense"),
        ]
    )
    model.set_weights(
        [rng.normal(size=w.shape).astype(w.dtype) if "kernel" in w.path else w.numpy() for w in model.weights]
    )
    scale = np.logspace(-6, 3, 160, dtype=np.float32).reshape(80, 2)
    model.get_layer("depthwise").kernel.assign(rng.uniform(-1, 1, (5, 5, 80, 2)) * scale)
    kernel = model.layers[1].get_layer("conv").kernel
    kernel.assign(kernel.numpy() * (np.arange(80) != 7))
    return model


def round_trip(model, folder, weights_dtype):
    path, _ = custom_save_model(model, str(folder), "model", weights_dtype)
    return path, custom_load_model(str(folder), "model")


# Precisions


def test_float32_is_exact(wide_model, tmp_path):
    _, restored = round_trip(wide_model, tmp_path, "float32")
    for found, expected in zip(restored.get_weights(), wide_model.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_float16_rounds_to_eleven_bits(wide_model, tmp_path):
    _, restored = round_trip(wide_model, tmp_path, "float16")
    for found, expected in zip(restored.get_weights(), wide_model.get_weights(), strict=True):
        # Half a unit in the last of 11 bits; below 2^-14 the step no longer shrinks.
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=2**-25)
    assert {weight.dtype for weight in restored.weights} == {"float32", "int64"}


def test_int8_rounds_each_output_channel_by_its_own_scale(wide_model, tmp_path):
    _, restored = round_trip(wide_model, tmp_path, "int8")
    found, expected = (model.layers[1].get_layer("conv").kernel.numpy() for model in (restored, wide_model))
    for channel in range(80):
        step = np.abs(expected[..., channel]).max() / 127
        assert np.abs(found[..., channel] - expected[..., channel]).max() <= step * 0.5001
    assert not found[..., 7].any()
    found, expected = (model.get_layer("depthwise").kernel.numpy() for model in (restored, wide_model))
    for channel in range(80):
        for copy in range(2):
            step = np.abs(expected[..., channel, copy]).max() / 127
            assert 0 < np.abs(found[..., channel, copy] - expected[..., channel, copy]).max() <= step * 0.5001


def test_int8_holds_kernels_in_bytes_and_the_rest_in_halves(wide_model, tmp_path):
    path, _ = round_trip(wide_model, tmp_path, "int8")
    with h5py.File(path) as file:
        types = {array.attrs["path"].split("/", 1)[-1]: array.dtype.name for array in file["weights"].values()}
        scales = [array.shape for array in file["scales"].values()]
    kernels = [name for name, kind in types.items() if kind == "int8"]
    assert len(kernels) == len(scales) == 3
    assert all(name.endswith("kernel") for name in kernels)
    assert sorted(scales) == sorted([(1, 1, 1, 80), (1, 1, 80, 2), (1, 3)])
    assert set(types.values()) == {"int8", "float16", "float32", "int64"}


@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES)
def test_a_weight_that_float16_cannot_hold_stays_exact(weights_dtype, tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 100)), keras.layers.BatchNormalization()])
    variance = np.linspace(1, 1e6, 100, dtype=np.float32)
    model.layers[0].moving_variance.assign(variance)
    _, restored = round_trip(model, tmp_path, weights_dtype)
    np.testing.assert_array_equal(restored.layers[0].moving_variance.numpy(), variance)


@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES)
def test_restored_model_predicts_nearly_the_same_and_trains_on(wide_model, weights_dtype, tmp_path):
    _, restored = round_trip(wide_model, tmp_path, weights_dtype)
    images = np.random.default_rng(1).normal(100, 30, (4, 8, 8, 3)).astype(np.float32)
    pooled = [keras.Model(m.inputs, m.layers[-2].output)(images).numpy() for m in (wide_model, restored)]
    bound = {"float32": 0, "float16": 1e-2, "int8": 5e-2}[weights_dtype]
    assert np.abs(pooled[1] - pooled[0]).max() <= bound * np.abs(pooled[0]).max()
    restored.compile("sgd", "sparse_categorical_crossentropy")
    restored.fit(images, np.array([0, 1, 2, 0]), verbose=0)


def test_the_optimizer_of_a_compiled_model_is_left_behind(wide_model, tmp_path):
    compiled = keras.models.clone_model(wide_model)
    compiled.compile("adam", "sparse_categorical_crossentropy")
    compiled.train_on_batch(np.zeros((1, 8, 8, 3)), np.array([0]))
    for weights_dtype in WEIGHTS_DTYPES:
        _, restored = round_trip(compiled, tmp_path, weights_dtype)
        assert getattr(restored, "optimizer", None) is None
        assert len(restored.variables) == len(wide_model.variables)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNet", "DenseNet121", "VGG16"])
def test_sizes_against_the_checkpoint_with_adam(name, tmp_path):
    configs = Configs(
        visual_model_name=name, image_target_size=(64, 64, 3), use_imagenet_weights=False, classes=list("abcde")
    )
    model = ModelFactory().get_model(configs)
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    model.fit(images, np.array([0, 1, 2, 3]), verbose=0)
    model.save(tmp_path / "checkpoint.keras")
    size = os.path.getsize(tmp_path / "checkpoint.keras")
    for weights_dtype, share in (("float32", 3), ("float16", 6), ("int8", 11)):
        path, _ = custom_save_model(model, str(tmp_path), "model", weights_dtype)
        assert os.path.getsize(path) * share <= size


# The comparison


def test_comparison_of_single_labels():
    before = np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [1, 0]], np.float32)
    after = np.array([[0.25, 0.75], [0.5, 0.5], [0.25, 0.75], [0.75, 0.25]], np.float32)
    found = compare(np.array([0, 0, 1, 1]), before, after, Decision(["cat", "dog"], False))
    assert found == {
        "images": 4,
        "largest_difference": 0.5,
        "mean_difference": 0.1875,
        "changed_predictions": 1,
        "measure": "accuracy",
        "accuracy": {"before": 0.75, "after": 0.5},
        "accuracy_drop": 25.0,
    }


def test_comparison_of_several_labels_counts_exact_matches_by_the_runs_threshold():
    decision = Decision(["cat", "dog"], True, exact_match_threshold=0.75)
    before = np.array([[0.5, 0.875], [0.875, 0.125]], np.float32)
    after = np.array([[0.875, 0.875], [0.875, 0.5]], np.float32)
    found = compare(np.array([[1, 1], [1, 0]]), before, after, decision)
    assert found["measure"] == "exact match"
    assert found["accuracy"] == {"before": 0.5, "after": 1.0}
    assert (found["changed_predictions"], found["accuracy_drop"]) == (1, -50.0)


def test_one_image_of_a_hundred_is_exactly_one_point():
    before = np.tile(np.array([1, 0], np.float32), (100, 1))
    after = before.copy()
    after[0] = [0, 1]
    found = compare(np.zeros(100, int), before, after, Decision(["cat", "dog"], False))
    assert found["accuracy_drop"] == 1


# The script


def save_colour_model(folder):
    """Saves a model that tells the three colours of the photos apart: the mean of each channel is a logit."""
    pooling, dense = keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, activation="softmax")
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 64), pooling, dense])
    dense.set_weights([np.eye(3, dtype=np.float32)[::-1], np.zeros(3, np.float32)])
    model.save(os.path.join(folder, "best_model.keras"))


@pytest.fixture
def run_folder(photo_folder, tmp_path):
    """A run's folder with a model that is always right, and configs.json that names a table of 36 photos."""
    rows = [(f"{path.parent.name}/{path.name}", path.parent.name) for path in sorted(photo_folder.rglob("*.jpg"))]
    pd.DataFrame(rows, columns=["path", "colour"]).to_csv(tmp_path / "test.csv", index=False)
    stored = {"test_csv": str(tmp_path / "test.csv"), "image_directory": str(photo_folder), "classes": CLASSES}
    stored |= {"csv_label_column": "colour", "image_target_size": [32, 32, 3]}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "configs.json").write_text(json.dumps(stored))
    save_colour_model(folder)
    return folder


def damage(monkeypatch):
    """Makes what is saved answer blue throughout."""
    save = custom_save_model

    def save_blue(model, *arguments):
        blue = keras.models.clone_model(model)
        blue.set_weights([np.zeros((3, 3)), np.array([9, 0, 0])])
        return save(blue, *arguments)

    monkeypatch.setattr(exports, "custom_save_model", save_blue)


@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES)
def test_what_answers_the_same_is_accepted(run_folder, weights_dtype, capsys):
    report = compress_weights.compress(CompressConfigs(model_path=str(run_folder), weights_dtype=weights_dtype))
    assert report == json.loads((run_folder / "compression_report.json").read_text())
    (artefact,) = report["artefacts"]
    comparison = artefact["comparison"]
    assert (report["images"], comparison["accuracy"]) == (36, {"before": 1.0, "after": 1.0})
    assert min(comparison["images_per_second"].values()) > 0
    assert artefact["path"] == str(run_folder / "best_model_compressed.h5")
    assert artefact["files"] == {
        str(path): path.stat().st_size for path in sorted(run_folder.glob("best_model_compressed.*"))
    }
    assert {path.name for path in run_folder.iterdir()} == {
        *("best_model.keras", "configs.json", "compression_report.json"),
        *("best_model_compressed.h5", "best_model_compressed.json"),
        *("best_model_labels.txt", "best_model_metadata.json", "MODEL_CARD.md"),
    }
    printed = capsys.readouterr().out
    assert f"weights {weights_dtype}" in printed
    assert "0 of 36" in printed
    assert "Accepted" in printed


def test_what_costs_too_much_is_kept_as_rejected_and_ends_in_status_1(run_folder, monkeypatch, capsys):
    damage(monkeypatch)
    (run_folder / "best_model_compressed.h5").write_text("an earlier one")
    with pytest.raises(SystemExit) as raised:
        compress_weights.compress(CompressConfigs(model_path=str(run_folder), tolerance=66))
    assert raised.value.code == 1
    assert "Rejected" in capsys.readouterr().out
    (artefact,) = json.loads((run_folder / "compression_report.json").read_text())["artefacts"]
    assert artefact["rejected"]
    assert artefact["comparison"]["accuracy"]["after"] == pytest.approx(1 / 3)
    assert artefact["comparison"]["changed_predictions"] == 24
    assert artefact["path"] == str(run_folder / "best_model_compressed.rejected.h5")
    assert load_model(artefact["path"]).count_params() == 12
    assert (run_folder / "best_model_compressed.h5").read_text() == "an earlier one"


def test_tolerance_lets_pass_what_it_says(run_folder, monkeypatch):
    damage(monkeypatch)
    report = compress_weights.compress(CompressConfigs(model_path=str(run_folder), tolerance=67))
    assert not report["artefacts"][0]["rejected"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("none on the disk", "test.csv does not exist"),
        ("no configs.json", "configs.json names the test set of this model"),
        ("empty", "test_csv is empty"),
    ],
)
def test_without_a_test_set_the_comparison_is_left_out(run_folder, case, words, capsys):
    options = {"test_csv": ""} if case == "empty" else {}
    if case == "none on the disk":
        os.remove(run_folder.parent / "test.csv")
    if case == "no configs.json":
        os.remove(run_folder / "configs.json")
    report = compress_weights.compress(CompressConfigs(model_path=str(run_folder), **options))
    assert (report["test_csv"], report["artefacts"][0]["comparison"]) == (None, None)
    assert report["artefacts"][0]["path"] == str(run_folder / "best_model_compressed.h5")
    assert f"{words}. Give --test_csv to compare" in capsys.readouterr().out


def test_a_test_set_that_is_given_must_be_there(run_folder):
    with pytest.raises(UserError, match="Cannot read the CSV file"):
        compress_weights.main(CompressConfigs(model_path=str(run_folder), test_csv="nowhere.csv"))
    assert sorted(os.listdir(run_folder)) == ["best_model.keras", "configs.json"]


def test_a_given_test_set_comes_before_the_runs(run_folder, tmp_path):
    table = pd.read_csv(tmp_path / "test.csv").groupby("colour").head(1)
    table.to_csv(tmp_path / "few.csv", index=False)
    os.remove(tmp_path / "test.csv")
    report = compress_weights.main(CompressConfigs(model_path=str(run_folder), test_csv=str(tmp_path / "few.csv")))
    assert (report["test_csv"], report["images"]) == (str(tmp_path / "few.csv"), 3)


def test_several_labels_are_compared_by_exact_match(multilabel_csv, tmp_path):
    save_colour_model(tmp_path)
    model = load_model(str(tmp_path / "best_model.keras"))
    model.layers[-1].activation = keras.activations.sigmoid
    keras.models.clone_model(model).save(tmp_path / "best_model.keras")
    stored = {"test_csv": str(multilabel_csv), "image_directory": str(multilabel_csv.parent), "classes": CLASSES}
    stored |= {"multi_label_classification": True, "image_target_size": [32, 32, 3]}
    (tmp_path / "configs.json").write_text(json.dumps(stored))
    report = compress_weights.main(CompressConfigs(model_path=str(tmp_path), weights_dtype="int8"))
    comparison = report["artefacts"][0]["comparison"]
    assert (comparison["measure"], comparison["images"], comparison["accuracy_drop"]) == ("exact match", 24, 0)


def test_unknown_precision_is_told():
    with pytest.raises(UserError, match=r"weights_dtype: expected one of float32, float16, int8\. Received: 'int4'"):
        CompressConfigs.from_command_line(arguments=["--weights_dtype", "int4"])
