"""A run finds its own data from anywhere, and is not tested on images that it was trained on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_runs import options_of, start, tables  # noqa: F401

from configs import Configs
from finetune.core.options import UserError
from finetune.training.run_data import (
    find_trained_images,
    locate_data,
    refuse_trained_images,
    sign_file,
    write_trained_images,
)
from finetune.training.run_folder import describe_run
from finetune.training.trained_model import check_test_images, configure_table, find_trained_model, has_selected

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with tables, photos and a run that was started in it; this process is elsewhere."""
    home = tmp_path / "home of it"
    for name in ("training_set", "validation_set", "testing_set"):
        path = home / "tables" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("path,kind\n")
    run = home / "runs" / "a"
    run.mkdir(parents=True)
    (run / "best_model.keras").touch()
    names = {"train_csv": "training_set", "validation_csv": "validation_set", "test_csv": "testing_set"}
    options = {option: f"./tables/{name}.csv" for option, name in names.items()} | {"image_directory": "photos"}
    options |= {"csv_label_column": "kind", "classes": ["a", "b"], "save_model_path": "runs/a"}
    (run / "configs.json").write_text(json.dumps(options))
    (run / "data.json").write_text(json.dumps({"working_directory": str(home)}))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return home


def test_a_model_brings_the_data_of_its_run_from_anywhere(project, capsys):
    _, configs = find_trained_model(Configs(load_model_path=str(project / "runs" / "a")))
    assert configs.train_csv == str(project / "tables" / "training_set.csv")
    assert configs.validation_csv == str(project / "tables" / "validation_set.csv")
    assert configs.test_csv == str(project / "tables" / "testing_set.csv")
    assert (configs.image_directory, configs.csv_label_column) == (str(project / "photos"), "kind")
    assert configs.save_model_path == str(project / "runs" / "a")
    assert f"test_csv is that of the run: {configs.test_csv}" in capsys.readouterr().out


def test_what_is_given_wins_over_the_run(project):
    given = Configs(load_model_path=str(project / "runs" / "a"), test_csv="mine.csv", csv_label_column="label")
    _, configs = find_trained_model(given)
    assert (configs.test_csv, configs.csv_label_column) == ("mine.csv", "label")
    assert configs.train_csv == str(project / "tables" / "training_set.csv")


def test_paths_stay_as_they_are_where_the_run_was_started(project, monkeypatch):
    monkeypatch.chdir(project)
    _, configs = find_trained_model(Configs(load_model_path="runs/a"))
    assert (configs.test_csv, configs.image_directory) == ("./tables/testing_set.csv", "photos")
    assert configs.save_model_path == "runs/a"


def test_a_moved_run_finds_its_tables_whether_they_were_moved_or_not(project, tmp_path):
    shutil.copytree(project / "runs" / "a", tmp_path / "archive")
    _, configs = find_trained_model(Configs(load_model_path=str(tmp_path / "archive")))
    assert configs.test_csv == str(project / "tables" / "testing_set.csv")
    moved = project.parent / "moved"
    shutil.move(project, moved)
    _, configs = find_trained_model(Configs(load_model_path=str(moved / "runs" / "a")))
    assert configs.test_csv == str(moved / "tables" / "testing_set.csv")


def test_tables_without_an_image_directory_start_where_the_run_was_started(project):
    options = {"train_csv": "tables/training_set.csv", "image_directory": ""}
    located = locate_data(options, str(project / "runs" / "a"), "runs/a")
    assert located == {
        "train_csv": str(project / "tables" / "training_set.csv"),
        "image_directory": str(project),
    }


def test_urls_and_absolute_paths_are_the_same_from_everywhere(project):
    options = {"train_csv": str(project / "tables" / "training_set.csv"), "image_directory": "s3://bucket/photos"}
    options |= {"validation_csv": ""}
    assert locate_data(options, str(project / "runs" / "a"), "runs/a") == options


@pytest.mark.parametrize(("option", "name"), [("validation_csv", "validation"), ("train_csv", "training")])
def test_a_missing_table_is_left_out_and_named(project, capsys, option, name):
    (project / "tables" / f"{name}_set.csv").unlink()
    _, configs = find_trained_model(Configs(load_model_path=str(project / "runs" / "a")))
    assert getattr(configs, option) == ""
    assert f"{name}_set.csv, does not exist: going without a {name} set" in capsys.readouterr().out


def test_a_run_without_its_data_is_tested_on_others(project, tmp_path):
    shutil.move(project / "runs" / "a", tmp_path / "a")
    shutil.rmtree(project)
    _, configs = find_trained_model(Configs(load_model_path=str(tmp_path / "a"), test_csv="mine.csv"))
    assert (configs.train_csv, configs.validation_csv, configs.test_csv) == ("", "", "mine.csv")


@pytest.mark.parametrize(
    ("given", "readings"),
    [
        # With another table, the run's own are read as the run read them.
        (
            {"test_csv": "mine.csv", "image_directory": "mine", "csv_label_column": "label"},
            [("photos", "kind"), ("photos", "kind"), ("mine", "label")],
        ),
        # The photos were moved.
        ({"image_directory": "moved"}, [("moved", "kind")] * 3),
    ],
)
def test_a_given_image_directory_is_for_the_given_table_or_for_all(project, given, readings):
    path, configs = find_trained_model(Configs(load_model_path=str(project / "runs" / "a"), **given))
    tables = (configs.train_csv, configs.validation_csv, configs.test_csv)
    found = [configure_table(configs, path, table) for table in tables]
    own = {"photos": str(project / "photos")}
    assert [(one.image_directory, one.csv_label_column) for one in found] == [
        (own.get(folder, folder), column) for folder, column in readings
    ]


@pytest.fixture
def trained_on(tmp_path):
    """A run's list of four photos: three of training, one of validation."""
    random, photos = np.random.default_rng(1), []
    for position in range(5):
        path = tmp_path / "photos" / f"{position}.bmp"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (60, 60, 3), np.uint8)).save(path)
        photos.append(str(path))
    run = tmp_path / "run"
    run.mkdir()
    write_trained_images(str(run), {"training": photos[:3], "validation": photos[3:4]})
    return str(run), photos


def test_images_trained_on_are_found_by_path_and_by_content(trained_on, tmp_path):
    run, photos = trained_on
    copy = shutil.copy(photos[1], tmp_path / "other name.bmp")
    both = ("training", "validation")
    assert find_trained_images(run, [photos[0], str(copy), photos[3], photos[4]], both) == {
        photos[0]: photos[0],
        str(copy): photos[1],
        photos[3]: photos[3],
    }
    assert find_trained_images(run, [photos[3], photos[4]], ["training"]) == {}
    Path(photos[1]).unlink()
    assert find_trained_images(run, [str(copy)], both) == {str(copy): photos[1]}


def test_an_image_whose_file_was_changed_since_is_found_by_its_path(trained_on):
    run, photos = trained_on
    Path(photos[2]).write_bytes(Path(photos[4]).read_bytes())
    assert find_trained_images(run, [photos[2]], ["training"]) == {photos[2]: photos[2]}


def test_files_that_differ_between_the_samples_differ(trained_on, tmp_path):
    run, _ = trained_on
    content = bytearray(40_000)
    first, second = tmp_path / "first.bin", tmp_path / "second.bin"
    first.write_bytes(content)
    content[10_000] = 1
    second.write_bytes(content)
    assert sign_file(str(first)) == sign_file(str(second))
    write_trained_images(run, {"training": [str(first)]})
    assert find_trained_images(run, [str(second)], ["training"]) == {}


def test_testing_on_images_trained_on_is_refused_or_warned_of(trained_on, capsys):
    run, photos = trained_on
    with pytest.raises(UserError, match=r"t\.csv: the model was trained on 1 of these 2 images.*allow_duplicates"):
        refuse_trained_images(run, "t.csv", [photos[0], photos[4]], ["training"], False)
    assert refuse_trained_images(run, "t.csv", [photos[0], photos[4]], ["training"], True) == 1
    assert "Warning: t.csv: the model was trained on 1 of these 2 images" in capsys.readouterr().out
    assert refuse_trained_images(run, "t.csv", [photos[4]], ["training"], False) == 0
    (Path(run) / "trained_images.csv").unlink()
    assert refuse_trained_images(run, "t.csv", [photos[0]], ["training"], False) == 0
    assert "trained_images.csv" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "path\na.jpg\n", "set,path,bytes,crc32\ntraining,a.jpg,many,2\n"])
def test_a_damaged_list_is_named(tmp_path, content):
    (tmp_path / "trained_images.csv").write_text(content)
    with pytest.raises(UserError, match=r"trained_images\.csv is damaged"):
        find_trained_images(str(tmp_path), ["a.jpg"], ["training"])


def test_a_table_that_selected_the_model_is_refused_unless_it_is_the_only_test_table(trained_on, tmp_path, capsys):
    run, photos = trained_on
    model = str(Path(run) / "best_model.keras")
    other = tmp_path / "test.csv"
    (Path(run) / "configs.json").write_text(json.dumps({"test_csv": str(other), "validation_csv": "selected.csv"}))
    assert check_test_images(model, "selected.csv", [photos[3]], False) == 0
    assert "selected.csv also selected the best model: its metrics are optimistic" in capsys.readouterr().out
    assert (has_selected(model, "selected.csv"), has_selected(model, str(other))) == (True, False)
    with pytest.raises(UserError, match="selected by them"):
        check_test_images(model, "other.csv", [photos[3]], False)
    other.touch()
    with pytest.raises(UserError, match="selected by them"):
        check_test_images(model, "selected.csv", [photos[3]], False)
    (Path(run) / "configs.json").write_text(json.dumps({"validation_csv": "selected.csv", "allow_duplicates": True}))
    assert check_test_images(model, "other.csv", [photos[3]], False) == 1


def test_without_a_validation_table_test_images_are_listed_as_such(trained_on):
    run, photos = trained_on
    images = SimpleNamespace(labels=np.zeros(1, int), paths=photos[3:4])
    sets = {"training": ("a.csv", images), "validation": ("b.csv", images)}
    describe_run(run, {"validation_csv": "", "test_csv": "b.csv"}, sets, ["cat"])
    assert pd.read_csv(Path(run) / "trained_images.csv")["set"].tolist() == ["training", "test"]


@pytest.mark.slow
def test_a_run_with_tables_of_its_own_is_tested_on_them_from_anywhere(tables, tmp_path):
    """The folder that the scripts are started in holds another split, of which the run has seen the test images."""
    home, elsewhere = tmp_path / "my photos", tmp_path / "elsewhere"
    (home / "tables").mkdir(parents=True)
    (elsewhere / "data").mkdir(parents=True)
    table = pd.concat([pd.read_csv(tables[0]), pd.read_csv(tables[1])])
    table["path"] = [shutil.copy(path, home / f"{row}.jpg").name for row, path in enumerate(table["path"])]
    for position, name in enumerate(("a", "b", "c")):
        table[position::3].to_csv(home / "tables" / f"{name}.csv", index=False)
    shutil.copy(home / "tables" / "a.csv", elsewhere / "data" / "testing_set.csv")
    values = options_of(("tables/a.csv", "tables/c.csv"), "runs/a", validation_csv="tables/b.csv", num_epochs=1)
    (home / "own.json").write_text(json.dumps(values))

    def run(folder, script, *arguments):
        words = [sys.executable, PROJECT / script, *arguments]
        return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)

    assert run(home, "train.py", "--configs", "own.json").returncode == 0
    path = str(home / "runs" / "a")
    for script in ("test.py", "draw_activations.py", "plot_training_log.py", "compress_weights.py"):
        done = run(elsewhere, script, "--load_model_path", path)
        assert done.returncode == 0, done.stderr
    metrics = json.loads((home / "runs" / "a" / "evaluation" / "metrics.json").read_text())
    assert metrics["sets"]["test"]["csv"] == str(home / "tables" / "c.csv")
    assert metrics["sets"]["test"]["images"] == 12
    assert len(list((home / "runs" / "a" / "cam_output").glob("*.jpg"))) == 12
    assert (home / "runs" / "a" / "training_log.png").is_file()
    report = json.loads((home / "runs" / "a" / "compression_report.json").read_text())
    assert report["test_csv"] == str(home / "tables" / "c.csv")
    assert [entry.name for entry in elsewhere.iterdir()] == ["data"]

    refused = run(elsewhere, "test.py", "--load_model_path", path, "--test_csv", str(home / "tables" / "a.csv"))
    assert refused.returncode == 2
    assert "a.csv: the model was trained on 12 of these 12 images" in refused.stderr
    predicted = run(home, "predict.py", "--load_model_path", "runs/a", "--input", "tables/c.csv")
    assert predicted.returncode == 0, predicted.stderr
    check_alone(home, tmp_path / "clinic", run)
    again = run(elsewhere, "train.py", "--load_model_path", path, "--num_epochs", "2")
    assert again.returncode == 0, again.stderr
    assert len((home / "runs" / "a" / "training_log.csv").read_text().splitlines()) == 3
    assert [entry.name for entry in elsewhere.iterdir()] == ["data"]


def check_alone(home, clinic, run):
    """Tests a run where none of its data are: from its folder alone, on a table of other photos."""
    away = home.rename(home.with_name("away"))
    shutil.copytree(away / "runs" / "a", clinic / "a")
    shutil.copy(away / "tables" / "c.csv", clinic / "mine.csv")
    done = run(clinic, "test.py", "--load_model_path", "a", "--test_csv", "mine.csv", "--image_directory", str(away))
    assert done.returncode == 0, done.stderr
    assert "going without a training set" in done.stdout
    assert list(json.loads((clinic / "a" / "evaluation" / "metrics.json").read_text())["sets"]) == ["test"]
    assert (clinic / "a" / "decision.json").read_text() == (away / "runs" / "a" / "decision.json").read_text()
    away.rename(home)
