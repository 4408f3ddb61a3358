"""A run continues in the folder that load_model_path names, wherever that was copied or moved to."""

import copy
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
from small_runs import options_of, start, tables  # noqa: F401

from configs import Configs
from finetune.core.options import UserError
from finetune.training.resuming import STATE_PARTS, find_start
from finetune.training.run_folder import CONFIGS_FILE, describe_run, locate_data
from finetune.training.trained_model import configure_table, find_trained_model

TABLES = {"train_csv": "./data/train.csv", "validation_csv": "data/validation.csv", "test_csv": "data/test.csv"}


def write_state(path, options, **changes):
    """Writes a file with a training state and nothing else."""
    state = dict.fromkeys(STATE_PARTS) | {"configs": Configs().to_dict() | options, "given": sorted(options)}
    state |= {"epochs_completed": 1, "steps_completed": 0, "best_epoch": 1} | changes
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_state.json", json.dumps(state))


def write_run(folder, home, **options):
    """Writes the files of a run that was started in `home`."""
    folder.mkdir(parents=True)
    options = TABLES | {"classes": ["a", "b"]} | options
    write_state(folder / "latest_model.keras", options)
    write_state(folder / "best_model.keras", options)
    (folder / "configs.json").write_text(json.dumps(Configs().to_dict() | options))
    digest = hashlib.sha256((home / "data" / "train.csv").read_bytes()).hexdigest()
    note = {"working_directory": str(home), "training": {"csv_sha256": digest}}
    (folder / "data.json").write_text(json.dumps(note))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project with tables and a run; this process is in it."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    for name in ("train", "validation", "test"):
        (home / "data" / f"{name}.csv").write_text(f"path,class\n{name}.jpg,a\n")
    write_run(home / "runs" / "base", home, save_model_path="runs/base")
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def elsewhere(home, tmp_path, monkeypatch):
    """A folder outside the project; this process is in it."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def continue_from(path, **options):
    """Returns the model and the configs that train.py continues with."""
    model, state, configs = find_start(Configs(load_model_path=str(path), num_epochs=9, **options).validate())
    assert state
    return model, configs


@pytest.mark.parametrize(
    "path",
    [
        "runs/copy",
        "runs/copy/",
        "../home/runs/copy/latest_model.keras",
        "{home}/runs/copy/best_model.keras",
        "runs/copy/best_model.h5",
    ],
)
def test_a_copied_run_continues_in_its_own_folder(home, path):
    shutil.copytree("runs/base", "runs/copy")
    model, configs = continue_from(path.format(home=home))
    assert Path(configs.save_model_path).resolve() == home / "runs" / "copy"
    assert Path(model).resolve().parent == home / "runs" / "copy"
    assert (configs.train_csv, configs.image_directory) == ("./data/train.csv", "")
    assert configs.to_stored()["save_model_path"] == "runs/copy"


@pytest.mark.parametrize("place", ["runs/other name", "../archive/2026/base", "base"])
def test_a_moved_or_renamed_run_does_not_restore_its_old_folder(home, place):
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    os.rename("runs/base", place)
    configs = continue_from(place)[1]
    assert (configs.save_model_path, configs.train_csv) == (place, "./data/train.csv")


def test_a_linked_folder_is_the_folder_and_a_linked_or_copied_file_is_not(home, monkeypatch):
    os.symlink("base", "runs/link")
    assert continue_from("runs/link")[1].save_model_path == "runs/link"
    Path("runs/files").mkdir()
    os.symlink("../base/latest_model.keras", "runs/files/latest_model.keras")
    assert continue_from("runs/files")[1].save_model_path == "runs/files"
    Path("alone").mkdir()
    shutil.copy("runs/base/latest_model.keras", "alone/m.keras")
    assert continue_from("alone/m.keras")[1].save_model_path == "alone"
    monkeypatch.chdir("alone")
    assert continue_from("m.keras")[1].save_model_path == "."


def test_a_given_folder_counts_and_must_not_hold_another_run(home):
    shutil.copytree("runs/base", "runs/copy")
    assert continue_from("runs/copy", save_model_path="runs/new")[1].save_model_path == "runs/new"
    assert continue_from("runs/copy", save_model_path="../home/runs/copy")[1].save_model_path == "../home/runs/copy"
    with pytest.raises(UserError, match="runs/base holds the models of another run"):
        continue_from("runs/copy", save_model_path="runs/base")

    shutil.copytree("runs/base", "saved_model")  # the default folder
    assert continue_from("runs/base")[1].save_model_path == "runs/base"


def test_weights_without_a_state_start_a_new_run_that_removes_none(home):
    (home / "runs" / "base" / "best_model_compressed.h5").touch()
    given = {"load_model_path": "runs/base/best_model_compressed.h5", "save_model_path": "runs/base"}
    with pytest.raises(UserError, match="runs/base holds the models of another run"):
        find_start(Configs(**given))
    assert find_start(Configs(**given, overwrite=True))[1] is None


@pytest.mark.parametrize("folder", ["runs/copy", "../home/runs/copy/latest_model.keras"])
def test_the_runs_own_configs_file_names_no_other_folder(home, folder):
    shutil.copytree("runs/base", "runs/copy")
    words = ["--configs", "runs/copy/configs.json", "--load_model_path", folder, "--num_epochs", "9"]
    configs = find_start(Configs.from_command_line(arguments=words))[2]
    assert Path(configs.save_model_path).resolve() == home / "runs" / "copy"
    assert find_trained_model(Configs.from_command_line(arguments=words))[1].save_model_path == configs.save_model_path
    words += ["--save_model_path", "runs/new"]
    assert find_start(Configs.from_command_line(arguments=words))[2].save_model_path == "runs/new"
    # From another file it counts as given.
    words[1] = "runs/base/configs.json"
    with pytest.raises(UserError, match="runs/base holds the models of another run"):
        find_start(Configs.from_command_line(arguments=words[:-2]))


def test_from_elsewhere_a_run_stores_what_was_given_and_may_be_moved_again(home, tmp_path, elsewhere, monkeypatch):
    configs = continue_from("../home/runs/base")[1]
    located = {name: str(home / path) for name, path in TABLES.items()} | {"image_directory": str(home)}
    assert {name: getattr(configs, name) for name in located} == located
    given = TABLES | {"image_directory": "", "save_model_path": "runs/base", "load_model_path": ""}
    stored = configs.to_stored()
    assert {name: stored[name] for name in given} == given
    assert configs.provenance.home == str(home)
    assert "image_directory" not in configs.given
    write_state(home / "runs" / "base" / "latest_model.keras", stored, given=sorted(configs.given))
    describe_run(str(home / "runs" / "base"), stored, {}, ["a"], configs.provenance.home)
    os.rename(home, tmp_path / "moved")
    moved = tmp_path / "moved"
    for folder in (elsewhere, moved, moved / "runs" / "base"):
        monkeypatch.chdir(folder)
        configs = continue_from(os.path.relpath(moved / "runs" / "base"))[1]
        assert Path(configs.train_csv).resolve() == moved / "data" / "train.csv"
        assert Path(configs.image_directory).resolve() == moved
        assert Path(configs.save_model_path).resolve() == moved / "runs" / "base"
        assert configs.to_stored()["train_csv"] == "./data/train.csv"


def test_paths_given_from_elsewhere_are_stored_relative_to_the_runs_home(elsewhere):
    given = {"train_csv": "../home/more/train.csv", "test_csv": "mine.csv", "image_directory": "/photos"}
    stored = continue_from("../home/runs/base", **given, save_model_path="out")[1].to_stored()
    assert (stored["train_csv"], stored["test_csv"]) == ("more/train.csv", str(elsewhere / "mine.csv"))
    assert (stored["image_directory"], stored["validation_csv"]) == ("/photos", "data/validation.csv")
    assert stored["save_model_path"] == str(elsewhere / "out")


def test_tables_given_from_elsewhere_start_there(home, elsewhere):
    shutil.copytree(home / "data", elsewhere / "mine")
    given = {"train_csv": "mine/train.csv", "validation_csv": "mine/validation.csv", "test_csv": "mine/test.csv"}
    configs = continue_from(home / "runs" / "base", **given)[1]
    assert configs.image_directory == ""
    stored = configs.to_stored()
    # They can be moved together.
    assert {name: stored[name] for name in given} == given
    assert stored["image_directory"] == ""
    tested = {"load_model_path": str(home / "runs" / "base"), "test_csv": "mine/test.csv"}
    path, configs = find_trained_model(Configs(**tested))
    # The run's own tables start where the run was started.
    tables = (configs.test_csv, configs.train_csv)
    assert [configure_table(configs, path, table).image_directory for table in tables] == ["", str(home)]
    # So does another table of its project.
    shutil.copy(home / "data" / "test.csv", home / "data" / "more.csv")
    tested |= {"test_csv": str(home / "data" / "more.csv")}
    assert find_trained_model(Configs(**tested))[1].image_directory == str(home)


def test_absolute_paths_that_were_given_stay(home, tmp_path, monkeypatch):
    folder = home / "runs" / "absolute"
    write_run(folder, home, train_csv=str(home / "data" / "train.csv"), save_model_path=str(folder))
    monkeypatch.chdir(tmp_path)
    configs = continue_from(folder)[1]
    assert configs.to_stored()["train_csv"] == str(home / "data" / "train.csv")
    assert (configs.image_directory, configs.to_stored()["image_directory"]) == (str(home), "")


@pytest.mark.parametrize("name", ["runs/base", "old/renamed"])
def test_a_project_that_was_copied_as_a_whole_uses_its_own_data(home, tmp_path, monkeypatch, name):
    second = tmp_path / "copy"
    shutil.copytree(home, second)
    (second / name).parent.mkdir(exist_ok=True)
    os.rename(second / "runs" / "base", second / name)
    monkeypatch.chdir(tmp_path)
    assert continue_from(second / name)[1].train_csv == str(second / "data" / "train.csv")
    # The original table is edited, and is no longer the run's.
    (home / "data" / "train.csv").write_text("path,class\nanother.jpg,a\n")
    for folder in (tmp_path, second):
        monkeypatch.chdir(folder)
        assert Path(continue_from(second / name)[1].train_csv).resolve() == second / "data" / "train.csv"


def test_a_run_among_other_data_keeps_its_own_and_prints_where_they_are(home, tmp_path, monkeypatch, capsys):
    continue_from("runs/base")
    assert str(home) not in capsys.readouterr().out
    other = tmp_path / "other" / "data"
    other.mkdir(parents=True)
    (other / "train.csv").write_text("path,class\nanother.jpg,b\n")
    shutil.copytree(home / "runs" / "base", tmp_path / "other" / "base")
    monkeypatch.chdir(tmp_path)
    assert continue_from("other/base")[1].train_csv == str(home / "data" / "train.csv")
    # The same in a run of an older version, without a digest.
    (tmp_path / "other" / "base" / "data.json").write_text(json.dumps({"working_directory": str(home)}))
    assert locate_data(TABLES, str(tmp_path / "other" / "base"), "runs/base")["test_csv"] == str(home / "data/test.csv")
    # A copied project whose table was changed.
    shutil.copytree(home, tmp_path / "copy")
    (tmp_path / "copy" / "data" / "train.csv").write_text("path,class\nanother.jpg,b\n")
    monkeypatch.chdir(tmp_path / "copy")
    assert continue_from("runs/base")[1].train_csv == str(home / "data" / "train.csv")
    assert f"relative paths start in {home}" in capsys.readouterr().out


def test_configs_can_be_copied_and_pickled_whatever_they_were_read_from(home):
    configs = Configs.from_json("runs/base/configs.json").replace(num_epochs=9)
    for copied in (copy.deepcopy(configs), pickle.loads(pickle.dumps(configs))):
        assert (copied, copied.given, copied.provenance) == (configs, configs.given, configs.provenance)


def test_a_stored_run_cannot_remove_itself_when_it_is_repeated(tmp_path):
    describe_run(str(tmp_path), Configs(overwrite=True).to_stored(), {}, ["a"])
    assert Configs.from_json(str(tmp_path / CONFIGS_FILE)).overwrite is False


@pytest.mark.slow
def test_a_copy_is_trained_and_the_original_stays_as_it_is(tables, tmp_path):
    base, copied, new = tmp_path / "base", tmp_path / "copy", tmp_path / "new"
    start(**options_of(tables, base, num_epochs=2, learning_rate=1e-9))
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    shutil.copytree(base, copied)
    options = options_of(tables, "", num_epochs=3, learning_rate=1e-9)
    del options["save_model_path"]
    start(**options, load_model_path=str(copied / "latest_model.keras"))
    # The best model is from before the copy: a run that continues elsewhere brings it along.
    start(**options, load_model_path=str(base), save_model_path=str(new))
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
    for folder in (copied, new):
        assert len((folder / "training_log.csv").read_text().splitlines()) == 4
        best = json.loads((folder / ".training_stats.json").read_text())["best_epoch"]
        assert best < 3
        assert (folder / "best_model.keras").read_bytes() == (base / "best_model.keras").read_bytes()
    assert json.loads((copied / CONFIGS_FILE).read_text())["save_model_path"] == str(copied)
