"""Files are written whole or not at all."""

import csv
import json
import os
from pathlib import Path

import pytest

from finetune.files import atomic_path, remove_stale_files, write_csv, write_json, write_text
from finetune.options import UserError


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


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    stale, alive = tmp_path / ".tmp-999999999-a.keras", tmp_path / f".tmp-{os.getppid()}-a.keras"
    for folder in (stale, alive):
        folder.mkdir()
        (folder / "latest_model.keras").write_text("half")
    remove_stale_files(str(tmp_path))
    assert not stale.exists()
    assert alive.exists()
