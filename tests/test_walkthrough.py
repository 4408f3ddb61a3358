"""The scripts one after another, as the README runs them, in both modes."""

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
from finetune.data.images import read_image, resize_image
from finetune.models.compressed import custom_load_model
from finetune.models.model_files import load_model
from finetune.predicting.predicting import predict
from finetune.reporting.cam_pictures import name_outputs
from generator import get_generator

PROJECT = Path(__file__).parent.parent


def run_script(name, *arguments, cwd=PROJECT, **environment):
    return subprocess.run(
        [sys.executable, str(PROJECT / name), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


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
    small = {"visual_model_name": "MobileNet", "pop_conv_layers": 66, "image_target_size": (32, 32, 3)}
    small |= {"use_imagenet_weights": False, "num_epochs": 2, "batch_size": 8, "show_model_summary": False}
    configs = Configs(save_model_path=str(folder / "saved_model"), **small, **options).validate()
    return configs, train.main(configs)


@pytest.fixture(scope="module")
def trained(split_photos, tmp_path_factory):
    """The configs and results of a single-label run that keeps every epoch."""
    tables = {"train_csv": str(split_photos[0]), "test_csv": str(split_photos[1])}
    return train_small(tmp_path_factory.mktemp("run"), save_best_model_only=False, **tables)


@pytest.fixture(scope="module")
def trained_multilabel(multilabel_csv, tmp_path_factory):
    options = {"train_csv": str(multilabel_csv), "test_csv": str(multilabel_csv), "allow_duplicates": True}
    options |= {"image_directory": str(multilabel_csv.parent), "multi_label_classification": True}
    return train_small(tmp_path_factory.mktemp("run"), **options)


def test_train_writes_every_file(trained):
    configs, _ = trained
    folder = Path(configs.save_model_path)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("best_model.keras", "latest_model.keras", "model_epoch_001.keras", "model_epoch_002.keras"),
        *("configs.json", "data.json", "training_log.csv", "logs", ".training_stats.json", ".lock", "MODEL_CARD.md"),
        "trained_images.csv",
    }
    assert {path.name for path in (folder / "logs").iterdir()} == {"train", "validation"}
    stored = json.loads((folder / "configs.json").read_text())
    assert stored["classes"] == ["blue", "green", "red"]
    assert stored["visual_model_name"] == "MobileNet"


def test_training_log_has_one_row_an_epoch_and_the_best_model_is_the_best_row(trained):
    configs, results = trained
    log = pd.read_csv(Path(configs.save_model_path) / "training_log.csv")
    assert log["epoch"].tolist() == [1, 2]
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"} <= set(log.columns)
    assert results["best"] == log["val_accuracy"].max()
    assert results["best_epoch"] == log["epoch"][log["val_accuracy"].idxmax()]


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


def test_testing_reports_both_sets(trained, capsys):
    configs, _ = trained
    results = evaluation.main(configs.replace(load_model_path=configs.save_model_path))["sets"]
    printed = capsys.readouterr().out
    assert set(results) == {"training", "test"}
    assert np.sum(results["training"]["confusion_matrix"]) == 27
    assert np.sum(results["test"]["confusion_matrix"]) == 9
    assert np.trace(results["test"]["confusion_matrix"]) / 9 == pytest.approx(results["test"]["accuracy"])
    for word in ("precision", "recall", "f1", "support", "confusion matrix", "accuracy", "green"):
        assert word in printed


def test_testing_takes_the_models_own_description(trained):
    configs, results = trained
    bare = Configs(
        train_csv=configs.train_csv, test_csv=configs.test_csv, load_model_path=configs.save_model_path
    ).validate()
    assert evaluation.main(bare)["sets"]["test"]["accuracy"] == pytest.approx(results["best"])


def test_evaluation_files_hold_what_was_printed_and_predicted(trained):
    configs, _ = trained
    results = evaluation.main(configs)
    folder = Path(configs.save_model_path) / "evaluation"
    assert {path.name for path in folder.iterdir()} == {
        *("metrics.json", "predictions.csv", "report.html", "confusion_matrix.png"),
        *("roc_curves.png", "precision_recall_curves.png", "reliability_diagram.png"),
    }
    assert json.loads((folder / "metrics.json").read_text()) == results
    predictions, table = pd.read_csv(folder / "predictions.csv"), pd.read_csv(configs.test_csv)
    assert predictions["path"].tolist() == table["path"].tolist()
    assert predictions["true"].tolist() == table["class"].tolist()
    assert (predictions["predicted"] == predictions["true"]).mean() == results["sets"]["test"]["accuracy"]
    probabilities = predictions[[f"probability_{name}" for name in configs.classes or results["classes"]]]
    assert (
        probabilities.columns[probabilities.to_numpy().argmax(axis=1)] == "probability_" + predictions["predicted"]
    ).all()
    page = (folder / "report.html").read_text()
    assert all(word in page for word in ("blue", "green", "red", f"{100 * results['sets']['test']['accuracy']:.1f}"))


@pytest.mark.slow
def test_temperature_is_fitted_on_the_validation_set_that_the_run_had(trained, split_photos, tmp_path, capsys):
    configs, _ = trained
    shutil.copytree(configs.save_model_path, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "configs.json").read_text())
    (tmp_path / "run" / "configs.json").write_text(json.dumps(stored | {"validation_csv": str(split_photos[0])}))
    without = evaluation.main(configs)
    bare = Configs(train_csv=configs.train_csv, test_csv=configs.test_csv, load_model_path=str(tmp_path / "run"))
    results = evaluation.main(bare)
    assert set(results["sets"]) == {"training", "validation", "test"}
    decision = json.loads((tmp_path / "run" / "decision.json").read_text())
    assert decision["temperature_fitted_on"] == "validation"
    assert without["decision"]["temperature_fitted_on"] is None
    assert f"Temperature {decision['temperature']:.3f}" in capsys.readouterr().out


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
    skipping = configs.replace(
        test_csv=str(tmp_path / "testing_set.csv"),
        load_model_path=configs.save_model_path,
        save_model_path=str(tmp_path / "out"),
        skip_bad_images=True,
    )
    assert evaluation.main(skipping)["sets"]["test"]["images"] == 8
    predictions = pd.read_csv(tmp_path / "out" / "evaluation" / "predictions.csv")
    assert predictions["path"].tolist() == paths[:2] + paths[3:]
    drawn = draw_activations.main(skipping)["paths"]
    assert len(drawn) == 8
    assert {*os.listdir(tmp_path / "out" / "cam_output")} == {*map(os.path.basename, drawn), "index.html"}
    assert not any("damaged" in path for path in drawn)
    assert capsys.readouterr().out.count(f"Left out 1 image that could not be read: {damaged}") == 2


def test_two_images_of_one_name_are_both_drawn():
    names = name_outputs(["photos/a/1.jpg", "photos/b/1.jpg", "photos/a-1.jpg", "photos/c.tif"])
    assert names == ["a-1.jpg", "b-1.jpg", "a-1_2.jpg", "c.tif.png"]


def test_pictures_of_urls_are_named_by_what_follows_their_common_folder():
    urls = ["s3://bucket/x/a/1.jpg", "s3://bucket/x/b/1.jpg", "s3://bucket/x/1.tif", "s3://bucket/x/2.jpg?version=3"]
    expected = ["a-1.jpg", "b-1.jpg", "1.tif.png", "2.jpg_version=3.png"]
    assert name_outputs(urls) == expected
    assert name_outputs(["s3://one/a.jpg", "gs://one/a.jpg"]) == ["s3-one-a.jpg", "gs-one-a.jpg"]


@pytest.mark.slow
@pytest.mark.parametrize("image_cache", ["none", "disk"])
def test_images_in_a_store_give_the_run_of_the_files(
    split_photos, photo_folder, small_run, tmp_path, store, image_cache
):
    for path in photo_folder.rglob("*.jpg"):
        store.put(f"memory://bucket/{path.relative_to(photo_folder).as_posix()}", path.read_bytes())
    found = {}
    for place in ("files", "store"):
        csv_paths = [tmp_path / f"{place}_{path.name}" for path in split_photos]
        for written, path in zip(csv_paths, split_photos, strict=True):
            table = pd.read_csv(path)
            if place == "store":
                table["path"] = [f"memory://bucket/{'/'.join(Path(file).parts[-2:])}" for file in table["path"]]
            table.to_csv(written, index=False)
        options = {"save_model_path": str(tmp_path / place), "image_cache_path": str(tmp_path / "cache")}
        options |= {"pop_conv_layers": 66, "final_layer_pooling": "max", "verify_data": "full"}
        configs = small_run(*csv_paths, deterministic=True, image_cache=image_cache, **options)
        train.main(configs)
        listed = predicting.PredictConfigs(
            load_model_path=str(tmp_path / place), input=str(csv_paths[1]), write_path=str(tmp_path / f"{place}.csv")
        )
        sets = evaluation.main(configs)["sets"]
        # The tables have other names; the digests of their labels and file names are the same.
        assert [metrics.pop("csv") for metrics in sets.values()] == list(map(str, csv_paths))
        found[place] = {
            "log": (tmp_path / place / "training_log.csv").read_text(),
            "weights": load_model(str(tmp_path / place / "latest_model.keras")).get_weights(),
            "sets": sets,
            "pictures": [Path(path).read_bytes() for path in draw_activations.main(configs)["paths"]],
            "predictions": predicting.main(listed)["predictions"].drop(columns="path"),
        }
    for name in ("log", "sets", "pictures"):
        assert found["store"][name] == found["files"][name], name
    for of_store, of_files in zip(found["store"]["weights"], found["files"]["weights"], strict=True):
        np.testing.assert_array_equal(of_store, of_files)
    pd.testing.assert_frame_equal(found["store"]["predictions"], found["files"]["predictions"])
    assert len(found["store"]["pictures"]) == 9


def test_the_log_is_plotted(trained):
    configs, _ = trained
    path = plot_training_log.main(plot_training_log.PlotConfigs(save_model_path=configs.save_model_path))["path"]
    assert path == os.path.join(configs.save_model_path, "training_log.png")
    assert cv2.imread(path) is not None


@pytest.mark.slow
def test_compressed_model_predicts_the_same_from_a_smaller_file(trained):
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
    results = [evaluation.main(configs.replace(load_model_path=path)) for path in (model_path, compressed_path)]
    assert results[0]["sets"] == results[1]["sets"]


@pytest.mark.slow
def test_saved_model_loads_without_this_project(trained, tmp_path):
    configs, _ = trained
    code = "import sys, keras; print(keras.models.load_model(sys.argv[1]).optimizer.iterations.numpy())"
    model_path = os.path.join(configs.save_model_path, "latest_model.keras")
    found = subprocess.run(
        [sys.executable, "-c", code, model_path], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert found.stdout.split() == ["8"], found.stderr


@pytest.mark.slow
def test_a_model_without_state_starts_a_new_run(trained, tmp_path, capsys):
    configs, _ = trained
    load_model(os.path.join(configs.save_model_path, "best_model.keras")).save(tmp_path / "bare.keras")
    restarted = configs.replace(
        load_model_path=str(tmp_path / "bare.keras"),
        save_model_path=str(tmp_path / "second"),
        num_epochs=1,
        conv_layers_to_train=0,
    )
    assert train.main(restarted)["epoch"] == 1
    assert "has no training state" in capsys.readouterr().out
    before, after = (load_model(tmp_path / path) for path in ("bare.keras", "second/latest_model.keras"))
    for name, moves in (("backbone", False), ("classifier", True)):
        pairs = zip(before.get_layer(name).get_weights(), after.get_layer(name).get_weights(), strict=True)
        assert any(not np.array_equal(old, new) for old, new in pairs) is moves


def test_a_bad_image_stops_training_before_it_starts(split_photos, small_run, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    table = pd.read_csv(split_photos[0])
    table.loc[3, "path"] = str(tmp_path / "bad.jpg")
    table.to_csv(tmp_path / "training_set.csv", index=False)
    configs = small_run(tmp_path / "training_set.csv", split_photos[1])
    with pytest.raises(UserError, match="row 5: .*bad.jpg is no image"):
        train.main(configs)
    assert os.listdir(configs.save_model_path) == ["data_report.csv"]


def test_multilabel_run_selects_by_auroc(trained_multilabel):
    configs, results = trained_multilabel
    folder = Path(configs.save_model_path)
    log = pd.read_csv(folder / "training_log.csv")
    assert {"loss", "auroc", "val_loss", "val_auroc"} <= set(log.columns)
    assert results["best"] == log["val_auroc"].max()
    lines = (folder / "best_auroc.log").read_text().splitlines()
    assert lines[0] == f"epoch {results['best_epoch']}"
    assert lines[1] == f"mean {results['best']:.4f}"
    assert [line.split()[0] for line in lines[2:]] == ["blue", "green", "red"]
    stats = json.loads((folder / ".training_stats.json").read_text())
    assert stats["best"] == results["best"]
    assert stats["epochs_completed"] == 2


def test_multilabel_testing_fits_its_threshold_off_the_test_set(trained_multilabel, capsys):
    configs, results = trained_multilabel
    metrics = evaluation.main(configs)["sets"]
    printed = capsys.readouterr().out
    assert metrics["test"]["mean_auroc"] == pytest.approx(results["best"])
    threshold = float(re.search(r"Threshold (\d\.\d+) .* on the training set", printed).group(1))
    assert metrics["test"]["threshold"] == pytest.approx(threshold)
    for word in ("auroc", "average precision", "hamming loss", "exact match accuracy", "threshold"):
        assert word in printed


def test_multilabel_activations_and_plot(trained_multilabel):
    configs, _ = trained_multilabel
    assert len(draw_activations.main(configs)["paths"]) == 24
    picture = plot_training_log.main(plot_training_log.PlotConfigs(save_model_path=configs.save_model_path))["path"]
    assert cv2.imread(picture).shape[1] > 1000


def test_multilabel_model_loads_with_a_stock_loss(trained_multilabel):
    configs, _ = trained_multilabel
    model = keras.models.load_model(os.path.join(configs.save_model_path, "best_model.keras"))
    assert model.loss == "binary_crossentropy"


@pytest.mark.slow
def test_processes_agree_on_the_class_order(trained):
    configs, results = trained
    for hash_seed in ("1", "2", "3"):
        found = run_script(
            "test.py",
            *("--train_csv", configs.train_csv, "--test_csv", configs.test_csv),
            *("--load_model_path", configs.save_model_path),
            PYTHONHASHSEED=hash_seed,
        )
        accuracies = re.findall(r"^accuracy: (\S+)", found.stdout, re.M)
        assert float(accuracies[1]) == pytest.approx(results["best"], abs=1e-4), found.stderr


@pytest.mark.slow
def test_the_readmes_python_examples_run(trained, split_photos, tmp_path, monkeypatch):
    configs, _ = trained
    shutil.copytree(configs.save_model_path, tmp_path / "saved_model")
    shutil.copy(pd.read_csv(split_photos[1])["path"][0], tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    compress_weights.main(compress_weights.CompressConfigs(export=["tflite", "onnx", "saved_model"]))
    pages = [(PROJECT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/export.md")]
    first, compressed, *exported = (block for page in pages for block in re.findall(r"```python\n(.*?)```", page, re.S))
    names = {}
    exec(first, names)
    assert isinstance(names["model"], keras.Model)
    assert names["names"][0] in names["probabilities"].keys() == {"blue", "green", "red"}
    image = resize_image(read_image("photo.jpg", (32, 32)), (32, 32)).astype(np.float32)
    expected = names["model"].predict(image[None], verbose=0)
    names = {}
    exec(compressed, names)
    np.testing.assert_array_equal(names["model"].predict(image[None], verbose=0), expected)
    assert len(exported) == 3
    for example in exported:
        names = {"image": image}
        exec(example, names)
        np.testing.assert_allclose(names["probabilities"], expected, atol=1e-5)


@pytest.mark.slow
def test_every_script_command_of_the_readme_runs_in_order(tmp_path):
    for path in [*PROJECT.glob("*.py"), PROJECT / "data", PROJECT / "finetune"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    # Training is cut short, and nothing is downloaded; the rest is as the README has it.
    small = (
        "--visual_model_name MobileNet --use_imagenet_weights False --pop_conv_layers 66 --image_target_size 32 32 3"
    )
    blocks = re.findall(r"```bash\n(.*?)```", (PROJECT / "README.md").read_text(), re.S)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("python ")]
    assert len(commands) >= 10
    for command in commands:
        words = command.split()[1:]
        if words[0] == "train.py":
            epochs = 2 if "--load_model_path" in words else 1
            words += [*small.split(), "--num_epochs", str(epochs), "--min_steps", "0", "--overwrite", "True"]
        if words[0] in ("compare_backbones.py", "find_label_errors.py"):
            words += small.split()
        if words[0] == "compress_weights.py":
            # One epoch leaves answers that a rounding changes.
            words += ["--tolerance", "100"]
        if words[0] == "compare_backbones.py":
            words += ["--backbones", "MobileNet", "--max_images", "20"]
        found = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert found.returncode == 0, f"{command}\n{found.stderr}"
    assert (tmp_path / "saved_model" / "best_auroc.log").exists()


@pytest.mark.slow
def test_the_demo_learns_its_textures(tmp_path):
    shutil.copytree(PROJECT / "data", tmp_path / "data")
    trained = run_script("train.py", "--configs", "data/demo.json", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    tested = run_script("test.py", cwd=tmp_path)
    accuracy = float(re.findall(r"^accuracy: (\S+)", tested.stdout, re.M)[1])
    assert accuracy >= 0.95, tested.stdout
