"""Which file a wrong path means, and which encoding, header and columns a file has."""

import os

import pandas as pd
import pytest

from finetune.core.options import UserError
from finetune.core.values import convert
from finetune.data.stores import explain_missing, join_path
from finetune.data.tables import find_class_columns, find_encoding, find_kind_fault, find_start_fault, parse_table


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


def test_accents_that_are_encoded_otherwise_lead_to_the_file_but_for_the_exact_one(tmp_path):
    for written, asked in (("cafe\u0301.jpg", "caf\u00e9.jpg"), ("u\u0308/1.jpg", "\u00fc/1.jpg")):
        touch(tmp_path, written)
        for name in (written, asked):
            assert join_path(str(tmp_path), name) == str(tmp_path / written)
    touch(tmp_path, "caf\u00e9.jpg")
    assert join_path(str(tmp_path), "caf\u00e9.jpg") == str(tmp_path / "caf\u00e9.jpg")


def test_a_path_in_the_home_folder_leads_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "photos/1.jpg")
    assert join_path("images", "~/photos/1.jpg") == str(tmp_path / "photos/1.jpg")
    assert convert("~/photos", str, is_text=True) == convert("~/photos", str, is_text=False) == str(tmp_path / "photos")


@pytest.mark.parametrize(
    ("file", "meant", "reason"),
    [
        ("D:/work/images/cat/1.jpg", "images/cat/1.jpg", "its path here has no D:"),
        ("Images/Cat/1.jpg", "images/cat/1.jpg", "its capitals differ"),
        ("images/cat\u200b/1.jpg", "images/cat/1.jpg", r"'cat\u200b' and 'cat' differ by invisible characters"),
        ("images/~\\photos\\2.jpg", "home/photos/2.jpg", "write the home folder for ~"),
    ],
)
def test_the_file_is_found_by_another_spelling(tmp_path, monkeypatch, file, meant, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    touch(tmp_path, "images/cat/1.jpg", "home/photos/2.jpg")
    explained = explain_missing([file])[file].replace(r"\\", "\\")
    assert f"{meant} does: " in explained
    assert reason in explained


def test_a_table_is_found_by_another_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "data/all.csv")
    for path in ("data\\all.csv", "C:\\me\\data\\all.csv", "Data/all.csv", "data/all\u200b.csv"):
        with pytest.raises(UserError, match=r"There is data/all\.csv"):
            parse_table(path, "class")


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("path,class\n", "utf-8", ""),
        ("path,class\n", "utf-16", "utf-16-le"),
        ("path,class\na,Ärmel\n", "utf-16-le", "utf-16-le"),
        ("path,class\n花.jpg,花\n", "utf-16-be", "utf-16-be"),
        ("a\0b\0", "utf-8", "utf-16-le"),
        ("path,class\na\0.jpg,cat\n", "utf-8", ""),
        ("", "utf-8", ""),
    ],
)
def test_wide_encodings_are_known_by_their_mark_or_zeros(text, encoding, expected):
    assert find_encoding(text.encode(encoding)) == expected


@pytest.mark.parametrize(
    "start", [b"path,class\n", b"PKU,class\n", b"<a>.jpg,class\n", b"", b"separate,class\n", b"sep=\n"]
)
def test_what_may_be_a_table_is_taken_for_one(start):
    assert find_kind_fault(start) == ""
    assert find_start_fault(start, ("path", "class")) == ""


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": "xy", "a": "01", "b": "10"}, ["a", "b"]),
        ({"id": "01", "a": "01", "b": "10"}, []),
        ({"id": "xy", "a": "01"}, []),
        ({"id": "xy", "a": "01", "b": "12"}, []),
        ({"Unnamed: 0": "56", "id": "xy", "a": "01", "b": "00"}, ["a", "b"]),
    ],
)
def test_columns_of_classes_are_two_or_more_beside_one_other(columns, expected):
    assert find_class_columns(pd.DataFrame({name: list(values) for name, values in columns.items()})) == expected
