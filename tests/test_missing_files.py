"""Which file is meant by the name of one that does not exist; what is said of each kind is in docs/bad_input.md."""

import os

import pytest

from finetune.data_check import check_images
from finetune.missing_files import explain_missing
from finetune.options import UserError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_each_folder_is_listed_once_and_only_where_a_file_is_missing(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{folder}/{number}.jpg" for folder in "ab" for number in range(50)))
    listed, list_folder = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [listed.append(path), list_folder(path)][1])
    files = [str(tmp_path / folder / str(number)) for folder in "ab" for number in range(50)]
    assert len(explain_missing(files)) == 100
    assert sorted(listed) == [str(tmp_path / folder) for folder in "ab"]


@pytest.mark.parametrize("file", ["none.jpg", "nowhere/1", "1.jpg/2", "a\0b", "s3://bucket/1", "", "notes"])
def test_nothing_is_said_where_no_image_is_like_it(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "1.jpg", "notes.txt")
    assert explain_missing([file]) == {}


def test_scripts_that_take_a_table_name_the_file_that_is_meant(tmp_path):
    touch(tmp_path, "1.jpg")
    with pytest.raises(UserError, match=r"row 2: .*1 does not exist, but .*1\.jpg does: add the ending, as make_csv"):
        check_images([str(tmp_path / "1")], "t.csv")
    assert check_images([str(tmp_path / "1")], "t.csv", skip_bad_images=True) == [2]
