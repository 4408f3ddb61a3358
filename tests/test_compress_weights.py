"""Compressed weights: each precision, and the rejection of those with other answers."""

import json
import os

import keras
import numpy as np
import pandas as pd
import pytest
from exported_runs import CLASSES, build_colour_model

import compress_weights
from compress_weights import CompressConfigs
from finetune.core.options import UserError
from finetune.models import compressed
from finetune.models.compressed import custom_save_model
from finetune.models.formats import WEIGHTS_DTYPES
from finetune.models.model_files import load_model


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
    build_colour_model().save(folder / "best_model.keras")
    return folder


def damage(monkeypatch):
    """Makes the saved weights always answer blue."""
    save = custom_save_model

    def save_blue(model, *arguments):
        blue = keras.models.clone_model(model)
        blue.set_weights([np.zeros((3, 3)), np.array([9, 0, 0])])
        return save(blue, *arguments)

    monkeypatch.setattr(compressed, "custom_save_model", save_blue)


@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES)
def test_weights_with_the_same_answers_are_accepted(run_folder, weights_dtype, capsys):
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


def test_weights_with_other_answers_are_rejected_with_status_1(run_folder, monkeypatch, capsys):
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
    # They lose 66.7 points.
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
    assert f"{words}. Give --test_csv" in capsys.readouterr().out


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
    build_colour_model("sigmoid").save(tmp_path / "best_model.keras")
    stored = {"test_csv": str(multilabel_csv), "image_directory": str(multilabel_csv.parent), "classes": CLASSES}
    stored |= {"multi_label_classification": True, "image_target_size": [32, 32, 3]}
    (tmp_path / "configs.json").write_text(json.dumps(stored))
    report = compress_weights.main(CompressConfigs(model_path=str(tmp_path), weights_dtype="int8"))
    comparison = report["artefacts"][0]["comparison"]
    assert (comparison["measure"], comparison["images"], comparison["accuracy_drop"]) == ("exact match", 24, 0)
