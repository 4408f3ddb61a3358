"""Folders that are divided into sets keep that split: which ones are sets, what is written, and what is said."""

import csv
import os
import shlex

import pytest
from checked_tables import write_photo
from corpus import encode, photo

import make_csv_from_folders
import train
from configs import Configs
from finetune.core.options import UserError
from finetune.data.folders import find_set_name

SETS = ("training", "validation", "testing")


@pytest.fixture
def class_folders(tmp_path):
    for seed, name in enumerate(["cat", "cat", "cat", "dog", "dog", "dog"]):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        write_photo(tmp_path / "images" / name / f"{seed}.jpg", seed)
    (tmp_path / "images" / "dog" / "torn.jpg").write_bytes(encode("JPEG", photo(9))[:-300])
    return tmp_path


def list_folders(folder, **options):
    values = {"folder_path": str(folder / "images"), "write_path": str(folder / "all.csv")} | options
    return make_csv_from_folders.main(make_csv_from_folders.FolderConfigs(**values).validate())


def test_folders_are_verified_before_the_table_is_written(class_folders):
    assert list_folders(class_folders) == {"cat": 3, "dog": 4}
    os.remove(class_folders / "all.csv")
    with pytest.raises(UserError, match=r"(?s)truncated \(1\).*torn\.jpg"):
        list_folders(class_folders, verify=True)
    assert sorted(os.listdir(class_folders)) == ["data_report.csv", "images"]
    assert list_folders(class_folders, verify=True, skip_bad_images=True) == {"cat": 3, "dog": 3}
    assert "torn.jpg" not in (class_folders / "all.csv").read_text("utf-8")


def test_one_image_in_two_class_folders_is_left_out_of_both(class_folders, capsys):
    (class_folders / "images" / "dog" / "torn.jpg").unlink()
    (class_folders / "images" / "dog" / "same.jpg").write_bytes((class_folders / "images/cat/0.jpg").read_bytes())
    assert list_folders(class_folders, verify=True) == {"cat": 2, "dog": 3}
    table = (class_folders / "all.csv").read_text("utf-8")
    assert [name for name in ("cat/0.jpg", "cat/1.jpg", "dog/same.jpg") if name in table] == ["cat/1.jpg"]
    printed = capsys.readouterr().out
    assert "Left out 2 rows whose images have two labels" in printed
    assert "same.jpg the same as" in printed


def test_linked_class_folders_count_and_loops_do_not(class_folders, capsys):
    images = class_folders / "images"
    (class_folders / "far").mkdir()
    write_photo(class_folders / "far" / "9.jpg", 9)
    for name, target in (("owl", "../far"), ("loop", "."), ("up", ".."), ("gone", "nowhere"), ("dog/far", "../../far")):
        (images / name).symlink_to(target)
    assert list_folders(class_folders) == {"cat": 3, "dog": 5, "owl": 1}
    assert "unreadable folders (3)" in capsys.readouterr().out


def test_one_class_alone_is_a_warning(class_folders, capsys):
    for path in (class_folders / "images" / "dog").iterdir():
        path.unlink()
    assert list_folders(class_folders) == {"cat": 3, "dog": 0}
    assert "cat is the only class. train.py expects at least two" in capsys.readouterr().out


def touch(folder, *paths):
    for path in paths:
        (folder / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / path).touch()


def make_tables(folder, **options):
    values = {"folder_path": str(folder / "photos"), "write_path": str(folder / "out" / "all.csv")} | options
    return make_csv_from_folders.main(make_csv_from_folders.FolderConfigs(**values).validate())


def read_tables(folder):
    """Returns the rows of each table beside `write_path`, paths as seen from the folder of the photos."""
    tables = {}
    for file in sorted(os.listdir(folder / "out")):
        with open(folder / "out" / file, encoding="utf-8", newline="") as opened:
            header, *rows = csv.reader(opened)
        assert header == ["path", "class"]
        tables[file] = [(os.path.relpath(path, folder / "photos"), label) for path, label in rows]
    return tables


def test_names_of_sets_are_known_in_any_case_and_with_suffixes():
    names = {
        "training": ["train", "Training", "train_set", "training-set", "train2017", "TRAIN DATA"],
        "validation": ["val", "valid", "Validation", "dev"],
        "testing": ["test", "testing", "testset"],
        "": ["train station", "trains", "valley", "set", "data", "2017"],
    }
    for expected, folders in names.items():
        assert [find_set_name(folder) for folder in folders] == [expected] * len(folders)


def test_each_set_gets_its_table(tmp_path, capsys):
    touch(tmp_path, "Train/cat/1.jpg", "Train/cat/old/2.jpg", "Train/dog/3.png", "valid/cat/4.jpg", "test/dog/5.jpg")
    counts = make_tables(tmp_path)
    assert read_tables(tmp_path) == {
        "training_set.csv": [("Train/cat/1.jpg", "cat"), ("Train/cat/old/2.jpg", "cat"), ("Train/dog/3.png", "dog")],
        "validation_set.csv": [("valid/cat/4.jpg", "cat")],
        "testing_set.csv": [("test/dog/5.jpg", "dog")],
    }
    assert counts == {
        "training": {"cat": 2, "dog": 1},
        "validation": {"cat": 1, "dog": 0},
        "testing": {"cat": 0, "dog": 1},
    }
    printed = capsys.readouterr().out
    assert "Kept the split" in printed
    assert "Warning: the validation set has no image of dog." in printed


def test_the_command_that_follows_trains_on_those_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "test/b/4.jpg")
    for write_path, column, expected in (
        ("data/all.csv", "class", []),
        ("my tables/all.csv", "kind", ["train_csv", "test_csv", "csv_label_column"]),
    ):
        make_tables(tmp_path, folder_path="photos", write_path=write_path, csv_label_column=column)
        (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: python train.py")]
        configs = Configs.from_command_line(train.__doc__, shlex.split(command)[3:])
        assert configs.given == {"validation_csv", *expected}
        paths = configs.train_csv, configs.validation_csv, configs.test_csv
        files = [f"{os.path.dirname(write_path)}/{name}_set.csv" for name in SETS]
        assert [os.path.normpath(path) for path in paths] == files
        assert all(map(os.path.isfile, paths))
        assert configs.csv_label_column == column


def test_without_a_test_set_it_says_so_and_an_earlier_table_is_warned_of(tmp_path, capsys):
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "testing_set.csv").write_text("path,class\n")
    make_tables(tmp_path)
    printed = capsys.readouterr().out
    assert "There is no test set" in printed
    assert "testing_set.csv is from an earlier split" in printed
    assert "validation_set.csv is from an earlier split" not in printed


def test_packed_folders_empty_ones_and_loose_files_do_no_harm(tmp_path, capsys):
    touch(tmp_path, "train/train/a/1.jpg", "train/train/b/2.jpg", "test/test/a/3.jpg", "__MACOSX/._1.jpg", "read.txt")
    (tmp_path / "photos" / "val").symlink_to("nowhere")
    (tmp_path / "photos" / "test" / "test" / "b").symlink_to("../../train/train/b")
    make_tables(tmp_path)
    assert {file: len(rows) for file, rows in read_tables(tmp_path).items()} == {
        "testing_set.csv": 2,
        "training_set.csv": 2,
    }
    printed = capsys.readouterr().out
    assert "unreadable folders (1)" in printed
    assert "read.txt" in printed
    assert "__MACOSX" in printed


@pytest.mark.parametrize(
    "paths",
    [
        ("train/1.jpg", "bus/2.jpg"),
        ("train/steam/1.jpg", "bus/2.jpg"),
        ("train/1.jpg", "test tube/2.jpg", "valley/3.jpg"),
        ("train/1.jpg", "test/2.jpg", "bus/3.jpg"),
    ],
)
def test_classes_that_are_called_as_sets_stay_classes(tmp_path, paths):
    touch(tmp_path, *paths)
    assert make_tables(tmp_path) == {path.split("/")[0]: 1 for path in paths}
    assert os.listdir(tmp_path / "out") == ["all.csv"]


def test_classes_that_training_lacks_are_told(tmp_path, capsys):
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "test/a/3.jpg", "test/b/4.jpg", "test/owl/5.jpg")
    make_tables(tmp_path)
    assert "Warning: other sets have images of owl" in capsys.readouterr().out


def test_copies_across_sets_are_found_in_one_check(tmp_path, capsys):
    for number, path in enumerate(["train/a/1", "train/b/2", "val/a/3", "val/b/4", "test/a/5", "test/b/6"]):
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        write_photo(tmp_path / "photos" / f"{path}.jpg", number)
    copy = tmp_path / "photos/val/b/copy.jpg"
    copy.write_bytes((tmp_path / "photos/train/a/1.jpg").read_bytes())
    counts = make_tables(tmp_path, verify=True)
    assert {name: counts[name]["a"] for name in SETS} == {"training": 0, "validation": 1, "testing": 1}
    assert "Left out 2 rows whose images have two labels" in capsys.readouterr().out
    with open(tmp_path / "out" / "data_report.csv", encoding="utf-8", newline="") as file:
        kinds = {row["kind"]: row for row in csv.DictReader(file)}
    row = kinds["duplicate_with_other_label"]
    assert (os.path.basename(row["csv_path"]), row["row"]) == ("validation_set.csv", "4")
    assert (os.path.basename(row["copy_in"]), row["copy_of"]) == ("training_set.csv", "2")
    copy.rename(tmp_path / "photos/val/a/copy.jpg")
    with pytest.raises(UserError, match=r"duplicate across sets \(1\)"):
        make_tables(tmp_path, verify=True)
    assert make_tables(tmp_path, verify=True, allow_duplicates=True)["validation"] == {"a": 2, "b": 1}
