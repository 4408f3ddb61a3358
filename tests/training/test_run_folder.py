"""Which model a path leads to, how its description is taken, and who may write into a run's folder."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_runs import options_of, tables  # noqa: F401
from tiny_models import write_table

import compress_weights
import draw_activations
import plot_training_log
import predict
import test as evaluation
import train
from configs import Configs
from finetune.core.options import UserError
from finetune.models.description import describe_model
from finetune.training.run_folder import (
    TABLE_OPTIONS,
    describe_run,
    find_trained_images,
    locate_data,
    locked,
    refuse_trained_images,
    sign_file,
    write_trained_images,
)
from finetune.training.trained_model import (
    check_test_images,
    configure_table,
    find_trained_model,
    has_selected,
    resolve_model_path,
)

# The description of a model that no file gives.
NEEDED = {"image_target_size": (96, 80, 3), "resize_mode": "stretch", "multi_label_classification": False}


def write_configs(folder, **options):
    (folder / "configs.json").write_text(json.dumps(options), encoding="utf-8")


def test_a_folder_leads_to_its_best_model_or_else_the_latest(tmp_path, capsys):
    (tmp_path / "latest_model.keras").touch()
    assert resolve_model_path(str(tmp_path)) == str(tmp_path / "latest_model.keras")
    (tmp_path / "best_model.keras").touch()
    assert resolve_model_path(str(tmp_path)) == str(tmp_path / "best_model.keras")
    preferred = ("latest_model.keras", "best_model.keras")
    assert resolve_model_path(str(tmp_path), preferred) == str(tmp_path / "latest_model.keras")
    assert resolve_model_path(str(tmp_path / "best_model.keras")) == str(tmp_path / "best_model.keras")
    assert capsys.readouterr().out == ""
    asked = str(tmp_path / "best_model.hdf5")
    assert resolve_model_path(asked) == str(tmp_path / "best_model.keras")
    printed = capsys.readouterr().out
    assert asked in printed
    assert str(tmp_path / "best_model.keras") in printed


@pytest.mark.parametrize("name", ["", "missing", "missing.keras", "folder", "notes.txt"])
def test_a_path_without_a_model_is_refused(tmp_path, name, monkeypatch):
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


def test_a_model_is_described_by_the_configs_in_its_folder(tmp_path):
    path = str(tmp_path / "best_model.keras")
    assert describe_model(Configs(batch_size=4), path) == Configs(batch_size=4)
    write_configs(tmp_path, **STORED, batch_size=99, train_csv="other.csv", learning_rate=0.5)
    configs = describe_model(Configs(batch_size=4), path)
    expected = STORED | {"image_target_size": (96, 80, 3)}
    assert {name: getattr(configs, name) for name in expected} == expected
    assert (configs.batch_size, configs.train_csv, configs.learning_rate) == (4, "./data/training_set.csv", 0.001)
    flags = ["--image_target_size", "96", "80", "3", "--classes", "none", "--batch_size", "7"]
    configs = describe_model(Configs.from_command_line(arguments=flags), path)
    assert (configs.classes, configs.batch_size) == (["owl", "cat"], 7)
    (tmp_path / "configs.json").write_text('{"classes": ', encoding="utf-8")
    with pytest.raises(UserError, match=r"configs\.json is not valid JSON"):
        describe_model(Configs(), path)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        # The default, but given.
        (["--image_target_size", "224", "224", "3"], "image_target_size"),
        (["--classes", "cat", "owl"], "classes"),
        (["--multi_label_classification", "False"], "multi_label_classification"),
        (["--visual_model_name", "DenseNet121"], "visual_model_name"),
        (["--pop_conv_layers", "0"], "pop_conv_layers"),
        (["--final_layer_pooling", "max"], "final_layer_pooling"),
    ],
)
def test_a_given_option_that_contradicts_the_model_is_refused(tmp_path, flags, name):
    write_configs(tmp_path, **STORED)
    configs = Configs.from_command_line(arguments=flags)
    with pytest.raises(UserError, match=rf"^{name} is .*configs\.json.*Received: "):
        describe_model(configs, str(tmp_path / "best_model.keras"))


def test_a_given_none_that_contradicts_the_model_is_refused(tmp_path):
    write_configs(tmp_path, final_layer_pooling="avg")
    configs = Configs.from_command_line(arguments=["--final_layer_pooling", "none"])
    with pytest.raises(UserError, match="final_layer_pooling"):
        describe_model(configs, str(tmp_path / "best_model.keras"))


def test_long_lists_of_classes_are_shown_from_where_they_differ(tmp_path):
    names = [f"class {number:04d}" for number in range(1100)]
    write_configs(tmp_path, classes=names)
    given = [*names[:1050], "stray", *names[1051:]]
    configs = Configs.from_command_line(arguments=["--classes", *given])
    with pytest.raises(UserError, match=r"\['class 1050', 'class 1051'.*\['stray', 'class 1051'") as error:
        describe_model(configs, str(tmp_path / "best_model.keras"))
    assert len(str(error.value)) < 800
    assert str(error.value).count("item 1051 of 1100") == 2


def test_classes_of_a_model_without_configs_come_from_the_training_table_and_results_go_to_its_folder(tmp_path):
    (tmp_path / "best_model.keras").touch()
    train_csv = write_table(tmp_path, "path,class\na,owl\nb,cat\n")
    path, configs = find_trained_model(Configs(load_model_path=str(tmp_path), train_csv=train_csv).replace(**NEEDED))
    assert path == str(tmp_path / "best_model.keras")
    assert (configs.classes, configs.save_model_path) == (["cat", "owl"], str(tmp_path))
    assert find_trained_model(configs.replace(save_model_path="elsewhere"))[1].save_model_path == "elsewhere"


def test_a_folder_in_use_is_refused(tmp_path):
    with (
        locked(str(tmp_path / "run")),
        pytest.raises(UserError, match="Another process is training into"),
        locked(str(tmp_path / "run")),
    ):
        pass


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


def find(path, **options):
    return find_trained_model(Configs(load_model_path=str(path), **options))[1]


def test_a_model_brings_the_data_of_its_run_from_anywhere_unless_given(project, capsys, monkeypatch):
    configs = find(project / "runs" / "a")
    for name, table in zip(TABLE_OPTIONS, ("training_set", "validation_set", "testing_set"), strict=True):
        assert getattr(configs, name) == str(project / "tables" / f"{table}.csv")
    assert (configs.image_directory, configs.csv_label_column) == (str(project / "photos"), "kind")
    assert configs.save_model_path == str(project / "runs" / "a")
    assert f"test_csv comes from the run: {configs.test_csv}" in capsys.readouterr().out
    configs = find(project / "runs" / "a", test_csv="mine.csv", csv_label_column="label")
    assert (configs.test_csv, configs.csv_label_column) == ("mine.csv", "label")
    assert configs.train_csv == str(project / "tables" / "training_set.csv")
    monkeypatch.chdir(project)
    configs = find("runs/a")
    assert (configs.test_csv, configs.image_directory) == ("./tables/testing_set.csv", "photos")
    assert configs.save_model_path == "runs/a"


def test_a_moved_run_finds_its_tables_whether_they_were_moved_or_not(project, tmp_path):
    shutil.copytree(project / "runs" / "a", tmp_path / "archive")
    assert find(tmp_path / "archive").test_csv == str(project / "tables" / "testing_set.csv")
    moved = project.parent / "moved"
    shutil.move(project, moved)
    assert find(moved / "runs" / "a").test_csv == str(moved / "tables" / "testing_set.csv")
    # Without the data, it is tested on others.
    shutil.rmtree(moved)
    configs = find(tmp_path / "archive", test_csv="mine.csv")
    assert (configs.train_csv, configs.validation_csv, configs.test_csv) == ("", "", "mine.csv")


def test_paths_are_located_from_where_the_run_was_started(project):
    folder = str(project / "runs" / "a")
    options = {"train_csv": "tables/training_set.csv", "image_directory": ""}
    located = {"train_csv": str(project / "tables" / "training_set.csv"), "image_directory": str(project)}
    assert locate_data(options, folder, "runs/a") == located
    options = located | {"image_directory": "s3://bucket/photos", "validation_csv": ""}
    assert locate_data(options, folder, "runs/a") == options


@pytest.mark.parametrize(("option", "name"), [("validation_csv", "validation"), ("train_csv", "training")])
def test_a_missing_table_is_left_out_and_named(project, capsys, option, name):
    (project / "tables" / f"{name}_set.csv").unlink()
    assert getattr(find(project / "runs" / "a"), option) == ""
    assert f"{name}_set.csv, does not exist: going without a {name} set" in capsys.readouterr().out


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
    # A changed file is found by its path.
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


SCRIPTS = {
    "train": (train.main, Configs),
    "test": (evaluation.main, Configs),
    "draw_activations": (draw_activations.main, Configs),
    "plot_training_log": (plot_training_log.main, plot_training_log.PlotConfigs),
    "compress_weights": (compress_weights.main, compress_weights.CompressConfigs),
    "predict": (predict.main, predict.PredictConfigs),
}


@pytest.mark.slow
def test_a_run_with_its_own_tables_is_tested_on_them_from_anywhere(tables, tmp_path, monkeypatch, capsys):
    """The working directory holds another split, whose test images the run has seen."""
    home, elsewhere, clinic = tmp_path / "my photos", tmp_path / "elsewhere", tmp_path / "clinic"
    (home / "tables").mkdir(parents=True)
    (elsewhere / "data").mkdir(parents=True)
    table = pd.concat([pd.read_csv(tables[0]), pd.read_csv(tables[1])])
    table["path"] = [shutil.copy(path, home / f"{row}.jpg").name for row, path in enumerate(table["path"])]
    for position, name in enumerate(("a", "b", "c")):
        table[position::3].to_csv(home / "tables" / f"{name}.csv", index=False)
    shutil.copy(home / "tables" / "a.csv", elsewhere / "data" / "testing_set.csv")
    values = options_of(("tables/a.csv", "tables/c.csv"), "runs/a", validation_csv="tables/b.csv", num_epochs=1)
    (home / "own.json").write_text(json.dumps(values))
    run = home / "runs" / "a"

    def start(folder, script, *words):
        monkeypatch.chdir(folder)
        main, kind = SCRIPTS[script]
        return main(kind.from_command_line(arguments=list(words)))

    start(home, "train", "--configs", "own.json")
    for script in ("test", "draw_activations", "plot_training_log", "compress_weights"):
        start(elsewhere, script, "--load_model_path", str(run))
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())["sets"]["test"]
    assert (metrics["csv"], metrics["images"]) == (str(home / "tables" / "c.csv"), 12)
    assert len(list((run / "cam_output").glob("*.jpg"))) == 12
    assert (run / "training_log.png").is_file()
    report = json.loads((run / "compression_report.json").read_text())
    assert report["test_csv"] == str(home / "tables" / "c.csv")
    with pytest.raises(UserError, match=r"a\.csv: the model was trained on 12 of these 12 images"):
        start(elsewhere, "test", "--load_model_path", str(run), "--test_csv", str(home / "tables" / "a.csv"))
    start(home, "predict", "--load_model_path", "runs/a", "--input", "tables/c.csv")

    # The run's folder alone, without its data, on other photos.
    away = home.rename(tmp_path / "away")
    shutil.copytree(away / "runs" / "a", clinic / "a")
    shutil.copy(away / "tables" / "c.csv", clinic / "mine.csv")
    capsys.readouterr()
    words = ["--load_model_path", "a", "--test_csv", "mine.csv", "--image_directory", str(away)]
    assert list(start(clinic, "test", *words)["sets"]) == ["test"]
    assert "going without a training set" in capsys.readouterr().out
    assert (clinic / "a" / "decision.json").read_text() == (away / "runs" / "a" / "decision.json").read_text()
    away.rename(home)
    start(elsewhere, "train", "--load_model_path", str(run), "--num_epochs", "2")
    assert len((run / "training_log.csv").read_text().splitlines()) == 3
    assert [entry.name for entry in elsewhere.iterdir()] == ["data"]
