"""The scripts one after another, in both modes: what they write, print, and take from the run's folder."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import pytest

import compress_weights
import draw_activations
import make_csv_from_folders
import plot_training_log
import predict as predicting
import split_train_test
import test as evaluation
import train
from configs import Configs
from finetune.core.options import UserError
from finetune.data.images import read_image
from finetune.models.compressed import custom_load_model
from finetune.models.model_files import load_model
from finetune.predicting.predicting import predict
from finetune.reporting.cam_pictures import name_outputs
from finetune.training.checkpoints import Stopping
from generator import get_generator

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def split_photos(photo_folder):
    folder = photo_folder.parent
    table = folder / "all_data.csv"
    make_csv_from_folders.main(
        make_csv_from_folders.FolderConfigs(folder_path=str(photo_folder), write_path=str(table))
    )
    split_train_test.main(split_train_test.SplitConfigs(csv_path=str(table), test_split_fraction=0.25))
    return folder / "training_set.csv", folder / "testing_set.csv"


def train_small(folder, **options):
    """Trains two epochs; returns configs and results."""
    small = {"visual_model_name": "MobileNet", "pop_conv_layers": 75, "image_target_size": (32, 32, 3)}
    small |= {"use_imagenet_weights": False, "num_epochs": 2, "batch_size": 8, "show_model_summary": False}
    configs = Configs(save_model_path=str(folder / "saved_model"), **small, **options).validate()
    return configs, train.main(configs)


@pytest.fixture(scope="module")
def trained(split_photos, tmp_path_factory):
    """The configs and results of a single-label run that keeps every epoch."""
    tables = {"train_csv": str(split_photos[0]), "test_csv": str(split_photos[1])}
    return train_small(tmp_path_factory.mktemp("run"), save_best_model_only=False, **tables)


@pytest.fixture(scope="module")
def tested(trained):
    """The results and the output of test.py, which gets the tables and the run's folder alone."""
    configs, _ = trained
    tables = {"train_csv": configs.train_csv, "test_csv": configs.test_csv}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = evaluation.main(Configs(load_model_path=configs.save_model_path, **tables).validate())
    return results, printed.getvalue()


@pytest.fixture(scope="module")
def trained_multilabel(multilabel_csv, tmp_path_factory):
    options = {"train_csv": str(multilabel_csv), "test_csv": str(multilabel_csv), "allow_duplicates": True}
    options |= {"image_directory": str(multilabel_csv.parent), "multi_label_classification": True}
    return train_small(tmp_path_factory.mktemp("run"), **options)


# Training


def test_train_writes_every_file(trained):
    configs, results = trained
    folder = Path(configs.save_model_path)
    assert {path.name for path in folder.iterdir()} == {
        *("best_model.keras", "latest_model.keras", "model_epoch_001.keras", "model_epoch_002.keras"),
        *("configs.json", "data.json", "training_log.csv", "logs", ".training_stats.json", ".lock", "MODEL_CARD.md"),
        "trained_images.csv",
    }
    assert {path.name for path in (folder / "logs").iterdir()} == {"train", "validation"}
    stored = json.loads((folder / "configs.json").read_text())
    assert (stored["classes"], stored["visual_model_name"]) == (["blue", "green", "red"], "MobileNet")
    log = pd.read_csv(folder / "training_log.csv")
    assert log["epoch"].tolist() == [1, 2]
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"} <= set(log.columns)
    best = log["val_accuracy"].idxmax()
    assert (results["best"], results["best_epoch"]) == (log["val_accuracy"][best], log["epoch"][best])


def test_logged_validation_metrics_are_those_of_the_saved_model(trained):
    configs, _ = trained
    log = pd.read_csv(Path(configs.save_model_path) / "training_log.csv")
    sequence = get_generator(configs.test_csv, configs.classes, configs, training=False)
    for epoch in (1, 2):
        model = load_model(os.path.join(configs.save_model_path, f"model_epoch_{epoch:03d}.keras"))
        probabilities, y_true = predict(model, sequence), sequence.get_y_true()
        row = log[log["epoch"] == epoch].iloc[0]
        assert row["val_accuracy"] == pytest.approx(np.mean(probabilities.argmax(axis=1) == y_true))
        of_true = probabilities[np.arange(len(y_true)), y_true]
        assert row["val_loss"] == pytest.approx(-np.log(of_true).mean(), rel=1e-4)


def test_a_bad_image_stops_training_before_it_starts(split_photos, small_run, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    table = pd.read_csv(split_photos[0])
    table.loc[3, "path"] = str(tmp_path / "bad.jpg")
    table.to_csv(tmp_path / "training_set.csv", index=False)
    configs = small_run(tmp_path / "training_set.csv", split_photos[1])
    with pytest.raises(UserError, match="row 5: .*bad.jpg"):
        train.main(configs)
    assert os.listdir(configs.save_model_path) == ["data_report.csv"]


@pytest.mark.slow
def test_a_model_without_state_starts_a_new_run(trained, tmp_path, capsys):
    configs, _ = trained
    load_model(os.path.join(configs.save_model_path, "best_model.keras")).save(tmp_path / "bare.keras")
    folders = {"load_model_path": str(tmp_path / "bare.keras"), "save_model_path": str(tmp_path / "second")}
    assert train.main(configs.replace(num_epochs=1, conv_layers_to_train=0, **folders))["epoch"] == 1
    assert "training state" in capsys.readouterr().out
    before, after = (load_model(tmp_path / path) for path in ("bare.keras", "second/latest_model.keras"))
    for name, moves in (("backbone", False), ("classifier", True)):
        pairs = zip(before.get_layer(name).get_weights(), after.get_layer(name).get_weights(), strict=True)
        assert any(not np.array_equal(old, new) for old, new in pairs) is moves


@pytest.mark.slow
def test_the_demo_learns_its_textures(tmp_path, monkeypatch):
    on_epoch_end = Stopping.on_epoch_end

    def stop_when_learnt(stopping, epoch, logs):
        on_epoch_end(stopping, epoch, logs)
        stopping.model.stop_training |= logs["val_accuracy"] >= 0.95

    monkeypatch.setattr(Stopping, "on_epoch_end", stop_when_learnt)
    shutil.copytree(PROJECT / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert train.main(Configs(**Configs.read_json("data/demo.json")).validate())["best"] >= 0.95


# Testing


def test_testing_reports_and_writes_both_sets(trained, tested):
    configs, trained_results = trained
    results, printed = tested
    sets, folder = results["sets"], Path(configs.save_model_path) / "evaluation"
    assert {name: np.sum(metrics["confusion_matrix"]) for name, metrics in sets.items()} == {"training": 27, "test": 9}
    assert np.trace(sets["test"]["confusion_matrix"]) / 9 == pytest.approx(sets["test"]["accuracy"])
    assert sets["test"]["accuracy"] == pytest.approx(trained_results["best"])
    assert results["decision"]["temperature_fitted_on"] is None
    for word in ("precision", "recall", "f1", "support", "confusion matrix", "accuracy", "green"):
        assert word in printed
    assert {path.name for path in folder.iterdir()} == {
        *("metrics.json", "predictions.csv", "report.html", "confusion_matrix.png"),
        *("roc_curves.png", "precision_recall_curves.png", "reliability_diagram.png", "risk_coverage.png"),
    }
    assert json.loads((folder / "metrics.json").read_text()) == results
    predictions, table = pd.read_csv(folder / "predictions.csv"), pd.read_csv(configs.test_csv)
    assert predictions[["path", "true"]].to_numpy().tolist() == table[["path", "class"]].to_numpy().tolist()
    assert (predictions["predicted"] == predictions["true"]).mean() == sets["test"]["accuracy"]
    probabilities = predictions[[f"probability_{name}" for name in results["classes"]]]
    assert (
        probabilities.columns[probabilities.to_numpy().argmax(axis=1)] == "probability_" + predictions["predicted"]
    ).all()
    page = (folder / "report.html").read_text()
    assert all(word in page for word in ("blue", "green", "red", f"{100 * sets['test']['accuracy']:.1f}"))


@pytest.mark.slow
def test_temperature_is_fitted_on_the_validation_set_that_the_run_had(trained, split_photos, tmp_path, capsys):
    configs, _ = trained
    shutil.copytree(configs.save_model_path, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "configs.json").read_text())
    (tmp_path / "run" / "configs.json").write_text(json.dumps(stored | {"validation_csv": str(split_photos[0])}))
    bare = Configs(train_csv=configs.train_csv, test_csv=configs.test_csv, load_model_path=str(tmp_path / "run"))
    assert set(evaluation.main(bare)["sets"]) == {"training", "validation", "test"}
    decision = json.loads((tmp_path / "run" / "decision.json").read_text())
    assert decision["temperature_fitted_on"] == "validation"
    assert f"{decision['temperature']:.3f}" in capsys.readouterr().out


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_has_no_part_in_testing_under_skip_bad_images(trained, tmp_path, capsys):
    configs, _ = trained
    table = pd.read_csv(configs.test_csv)
    damaged = tmp_path / "damaged.png"
    content = cv2.imencode(".png", cv2.imread(table["path"][2]))[1].tobytes()
    # Its header and its end are whole, so only decoding tells.
    damaged.write_bytes(content[:60] + bytes(40) + content[100:])
    with pytest.raises(UserError, match="damaged.png"):
        read_image(str(damaged))
    paths = table["path"].tolist()
    table.loc[2, "path"] = str(damaged)
    table.to_csv(tmp_path / "testing_set.csv", index=False)
    folders = {"load_model_path": configs.save_model_path, "save_model_path": str(tmp_path / "out")}
    skipping = configs.replace(test_csv=str(tmp_path / "testing_set.csv"), skip_bad_images=True, **folders)
    assert evaluation.main(skipping)["sets"]["test"]["images"] == 8
    predictions = pd.read_csv(tmp_path / "out" / "evaluation" / "predictions.csv")
    assert predictions["path"].tolist() == paths[:2] + paths[3:]
    drawn = draw_activations.main(skipping)["paths"]
    assert len(drawn) == 8
    assert {*os.listdir(tmp_path / "out" / "cam_output")} == {*map(os.path.basename, drawn), "index.html"}
    assert capsys.readouterr().out.count(str(damaged)) == 2


@pytest.mark.slow
def test_class_order_does_not_depend_on_the_process(split_photos):
    code = "import sys; from configs import Configs; from finetune.data.tables import *; "
    code += "print(*find_class_names(read_table(sys.argv[1], 'class', False)['class'], False))"
    for hash_seed in ("1", "2", "3"):
        found = subprocess.run(
            [sys.executable, "-c", code, str(split_photos[0])],
            cwd=PROJECT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
        )
        assert found.stdout.split() == ["blue", "green", "red"], found.stderr


# Images in stores


@pytest.mark.slow
def test_images_in_a_store_give_the_run_of_the_files(split_photos, photo_folder, small_run, tmp_path, store):
    for path in photo_folder.rglob("*.jpg"):
        store.put(f"memory://bucket/{path.relative_to(photo_folder).as_posix()}", path.read_bytes())
    found, logs, weights = {}, {}, {}
    for image_cache, place in itertools.product(("none", "disk"), ("files", "store")):
        csv_paths = [tmp_path / f"{place}_{path.name}" for path in split_photos]
        for written, path in zip(csv_paths, split_photos, strict=True):
            table = pd.read_csv(path)
            if place == "store":
                table["path"] = [f"memory://bucket/{'/'.join(Path(file).parts[-2:])}" for file in table["path"]]
            table.to_csv(written, index=False)
        run = tmp_path / f"{place}_{image_cache}"
        options = {"save_model_path": str(run), "image_cache_path": str(tmp_path / "cache"), "image_cache": image_cache}
        options |= {"pop_conv_layers": 75, "final_layer_pooling": "max", "verify_data": "full", "deterministic": True}
        configs = small_run(*csv_paths, **options)
        train.main(configs)
        logs[place, image_cache] = (run / "training_log.csv").read_text()
        weights[place, image_cache] = load_model(str(run / "latest_model.keras")).get_weights()
        if image_cache == "disk":
            continue
        listed = predicting.PredictConfigs(
            load_model_path=str(run), input=str(csv_paths[1]), write_path=str(tmp_path / f"{place}.csv")
        )
        sets = evaluation.main(configs)["sets"]
        # The tables have other names; the digests of their labels and file names are the same.
        assert [metrics.pop("csv") for metrics in sets.values()] == list(map(str, csv_paths))
        pictures = [Path(path).read_bytes() for path in draw_activations.main(configs)["paths"]]
        assert len(pictures) == 9
        found[place] = sets, pictures, predicting.main(listed)["predictions"].drop(columns="path").to_dict()
    assert found["store"] == found["files"]
    for image_cache in ("none", "disk"):
        assert logs["store", image_cache] == logs["files", image_cache]
        pairs = zip(weights["store", image_cache], weights["files", image_cache], strict=True)
        assert all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["photos/a/1.jpg", "photos/b/1.jpg", "photos/a-1.jpg", "photos/c.tif"],
         ["a-1.jpg", "b-1.jpg", "a-1_2.jpg", "c.tif.png"]),
        (["s3://bucket/x/a/1.jpg", "s3://bucket/x/b/1.jpg", "s3://bucket/x/1.tif", "s3://bucket/x/2.jpg?version=3"],
         ["a-1.jpg", "b-1.jpg", "1.tif.png", "2.jpg_version=3.png"]),
        (["s3://one/a.jpg", "gs://one/a.jpg"], ["s3-one-a.jpg", "gs-one-a.jpg"]),
    ],
)  # fmt: skip
def test_two_images_of_one_name_are_both_drawn(paths, names):
    assert name_outputs(paths) == names


# Plots and other files


def test_the_log_is_plotted(trained):
    configs, _ = trained
    path = plot_training_log.main(plot_training_log.PlotConfigs(save_model_path=configs.save_model_path))["path"]
    assert path == os.path.join(configs.save_model_path, "training_log.png")
    assert cv2.imread(path) is not None


@pytest.mark.slow
def test_compressed_model_predicts_the_same_from_a_smaller_file(trained, tested):
    configs, _ = trained
    model_path = os.path.join(configs.save_model_path, "best_model.keras")
    report = compress_weights.main(compress_weights.CompressConfigs(model_path=model_path))
    compressed_path = os.path.join(configs.save_model_path, "best_model_compressed.h5")
    assert os.path.getsize(compressed_path) < os.path.getsize(model_path) / 2.5
    comparison = report["artefacts"][0]["comparison"]
    assert (comparison["images"], comparison["largest_difference"]) == (9, 0)
    images, _ = get_generator(configs.test_csv, configs.classes, configs, training=False)[0]
    original, compressed = load_model(model_path), custom_load_model(configs.save_model_path, "best_model_compressed")
    np.testing.assert_array_equal(original.predict(images), compressed.predict(images))
    sets = evaluation.main(configs.replace(load_model_path=compressed_path))["sets"]
    for name, metrics in tested[0]["sets"].items():
        assert sets[name]["confusion_matrix"] == metrics["confusion_matrix"]


@pytest.mark.slow
def test_saved_model_loads_without_this_project(trained, tmp_path):
    configs, _ = trained
    code = "import sys, keras; print(keras.models.load_model(sys.argv[1]).optimizer.iterations.numpy())"
    model_path = os.path.join(configs.save_model_path, "latest_model.keras")
    found = subprocess.run([sys.executable, "-c", code, model_path], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.split() == ["8"], found.stderr


# Several labels an image


def test_multilabel_run_selects_by_auroc_and_loads_with_a_stock_loss(trained_multilabel):
    configs, results = trained_multilabel
    folder = Path(configs.save_model_path)
    log = pd.read_csv(folder / "training_log.csv")
    assert {"loss", "auroc", "val_loss", "val_auroc"} <= set(log.columns)
    assert results["best"] == log["val_auroc"].max()
    lines = (folder / "best_auroc.log").read_text().splitlines()
    assert lines[:2] == [f"epoch {results['best_epoch']}", f"mean {results['best']:.4f}"]
    assert [line.split()[0] for line in lines[2:]] == ["blue", "green", "red"]
    stats = json.loads((folder / ".training_stats.json").read_text())
    assert (stats["best"], stats["epochs_completed"]) == (results["best"], 2)
    assert keras.models.load_model(folder / "best_model.keras").loss == "binary_crossentropy"


@pytest.mark.slow
def test_multilabel_testing_fits_its_threshold_off_the_test_set(trained_multilabel, capsys):
    configs, results = trained_multilabel
    metrics = evaluation.main(configs)["sets"]
    printed = capsys.readouterr().out
    assert metrics["test"]["mean_auroc"] == pytest.approx(results["best"])
    threshold = float(re.search(r"Threshold (\d\.\d+) .* on the training set", printed).group(1))
    assert metrics["test"]["threshold"] == pytest.approx(threshold)
    for word in ("auroc", "average precision", "hamming loss", "exact match accuracy", "threshold"):
        assert word in printed


@pytest.mark.slow
def test_multilabel_activations_and_plot(trained_multilabel):
    configs, _ = trained_multilabel
    assert len(draw_activations.main(configs)["paths"]) == 24
    picture = plot_training_log.main(plot_training_log.PlotConfigs(save_model_path=configs.save_model_path))["path"]
    assert cv2.imread(picture).shape[1] > 1000
