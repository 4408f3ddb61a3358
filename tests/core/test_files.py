"""Files are written atomically, and folders are listed with their links."""

import csv
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from finetune.core.files import atomic_path, list_visible, remove_stale_files, write_csv, write_json, write_text
from finetune.core.options import UserError


def test_file_is_replaced_once_it_is_complete(tmp_path):
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


def test_a_path_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("file/a.txt", "folder"):
        with pytest.raises(UserError, match=f"Cannot write .*{name}"):
            write_text(str(tmp_path / name), "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_json_and_csv_are_standard(tmp_path):
    write_json(str(tmp_path / "a.json"), {"classes": ["Ärmel"]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"classes": ["Ärmel"]}
    write_csv(str(tmp_path / "a.csv"), pd.DataFrame({"path": ["a, b"], "class": ["Ärmel"]}))
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["path", "class"], ["a, b", "Ärmel"]]


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    stale, alive = tmp_path / ".tmp-999999999-a.keras", tmp_path / f".tmp-{os.getppid()}-a.keras"
    for folder in (stale, alive):
        folder.mkdir()
        (folder / "latest_model.keras").write_text("half")
    remove_stale_files(str(tmp_path))
    assert not stale.exists()
    assert alive.exists()


# Listing folders


def make_tree(folder, files=(), links=()):
    """Makes empty files, and links as (path, target)."""
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    for path, target in links:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(target)


def list_below(folder, name):
    return [[os.path.relpath(path, folder) for path in paths] for paths in list_visible(str(folder / name))[:2]]


def test_linked_files_and_folders_are_listed_and_hidden_ones_are_not(tmp_path):
    make_tree(
        tmp_path,
        ["cat/1.jpg", "cat/.hidden/2.jpg", "cat/.3.jpg", "far/4.jpg", "far/deep/5.jpg", "far/.6.jpg", "one.jpg"],
        [("cat/far", "../far"), ("cat/one.jpg", "../one.jpg"), ("cat/.secret", "../far")],
    )
    expected = ["cat/1.jpg", "cat/far/4.jpg", "cat/far/deep/5.jpg", "cat/one.jpg"]
    assert list_below(tmp_path, "cat") == [expected, []]


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_link_to_a_parent_folder_is_not_followed(tmp_path, target):
    make_tree(tmp_path, ["all/cat/1.jpg", "all/cat/sub/2.jpg", "all/dog/3.jpg"], [("all/cat/sub/up", f"../{target}")])
    files, closed = list_below(tmp_path, "all/cat")
    assert files == ["all/cat/1.jpg", "all/cat/sub/2.jpg"]
    # A folder that is in the list already is not reported.
    assert closed == ([] if target == "." else ["all/cat/sub/up"])


def test_folders_that_link_to_each_other_are_entered_once(tmp_path):
    make_tree(tmp_path, ["cat/1.jpg", "dog/2.jpg"], [("cat/dog", "../dog"), ("dog/cat", "../cat")])
    assert list_below(tmp_path, "cat") == [["cat/1.jpg", "cat/dog/2.jpg"], []]


def test_folder_is_listed_under_its_own_name_rather_than_a_link(tmp_path):
    make_tree(tmp_path, ["cat/b/1.jpg"], [("cat/a", "b"), ("cat/c", "b")])
    assert list_below(tmp_path, "cat") == [["cat/b/1.jpg"], []]


def test_broken_links_are_reported(tmp_path):
    make_tree(tmp_path, ["cat/1.jpg"], [("cat/gone.jpg", "none.jpg"), ("cat/a", "b"), ("cat/b", "a")])
    assert list_below(tmp_path, "cat") == [["cat/1.jpg"], ["cat/a", "cat/b", "cat/gone.jpg"]]


def test_many_links_between_folders_end_soon(tmp_path):
    names = [f"{number:02d}" for number in range(12)]
    links = [(f"all/{one}/to_{other}", f"../{other}") for one in names for other in names if one != other]
    make_tree(tmp_path, [f"all/{name}/{name}.jpg" for name in names], links)
    files, closed, _ = list_visible(str(tmp_path / "all" / "00"))
    assert sorted(os.path.basename(path) for path in files) == [f"{name}.jpg" for name in names]
    assert closed == []
