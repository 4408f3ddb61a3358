"""Tables and labels: what is read, the order of classes, the encoding of labels, and what is refused."""

import os
import re

import numpy as np
import pytest
from tiny_models import CLASSES, write_table

from finetune.core.options import UserError
from finetune.data.tables import (
    encode_labels,
    find_class_names,
    read_table,
    resolve_class_names,
)

# Tables


@pytest.mark.parametrize(
    ("content", "encoding", "expected"),
    [
        (
            "path,class,note\n001,NA,x\n002,None,\n003,1.50,nan\n",
            "utf-8",
            {"path": ["001", "002", "003"], "class": ["NA", "None", "1.50"], "note": ["x", "", "nan"]},
        ),
        ("path,class\na.jpg,Ärmel\n", "utf-8-sig", {"path": ["a.jpg"], "class": ["Ärmel"]}),
        ('path,class\r\n"a, b.jpg","say ""x"""\r\n', "utf-8", {"path": ["a, b.jpg"], "class": ['say "x"']}),
        ("path,class\na.jpg,cat\n\n\n", "utf-8", {"path": ["a.jpg"], "class": ["cat"]}),
    ],
    ids=["other columns", "byte order mark", "Windows line ends and quotes", "blank lines at the end"],
)
def test_a_table_is_read_as_texts(tmp_path, content, encoding, expected):
    assert read_table(write_table(tmp_path, content, encoding), "class").to_dict("list") == expected


@pytest.mark.parametrize(
    ("content", "multi_label", "rows"),
    [
        ("path,class\na.jpg,cat\n\nb.jpg,dog\n", False, ["row 3", "row 3"]),
        ("path,class\n,cat\nb.jpg,\nc.jpg,  \nd.jpg,dog\n", False, ["row 2", "rows 3, 4"]),
        ("path,class\na,cat$\nb,$cat\nc,cat$$dog\nd,dog\n", True, ["row 2", "row 3", "row 4"]),
    ],
)
def test_every_row_with_an_empty_cell_or_class_name_is_named(tmp_path, content, multi_label, rows):
    with pytest.raises(UserError) as raised:
        read_table(write_table(tmp_path, content), "class", multi_label)
    lines = str(raised.value).splitlines()
    assert [line.split("table.csv, ")[1].split(":")[0] for line in lines] == rows


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_table_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        read_table(str(tmp_path / name), "class")


def test_a_missing_table_names_the_script_that_writes_it_and_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"training_set\.csv.*split_train_test\.py") as raised:
        read_table("./data/training_set.csv", "class")
    assert os.getcwd() in str(raised.value)
    with pytest.raises(UserError, match="train_csv"):
        read_table("", "class")


# Class names and labels


def test_class_names_are_sorted_and_those_of_multi_labels_split():
    assert find_class_names(["owl", "cat", "owl", "Dog"], False) == ["Dog", "cat", "owl"]
    assert find_class_names(["owl$cat", "dog", "cat"], True) == ["cat", "dog", "owl"]
    assert find_class_names(["owl$cat", "dog"], False) == ["dog", "owl$cat"]


def test_given_classes_keep_their_order(tmp_path):
    path = write_table(tmp_path, "path,class\na,cat\nb,dog\n")
    assert resolve_class_names(["dog", "cat"], path, "class", False) == ["dog", "cat"]
    assert resolve_class_names(None, path, "class", False) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cat"], "dog"),
        (["cat", "dog", "owl"], "owl"),
        (["cat", "owl"], "dog.*owl"),
        ([], "cat, dog"),
    ],
)
def test_classes_that_are_not_those_of_the_table_are_refused(tmp_path, given, message):
    path = write_table(tmp_path, "path,class\na,cat\nb,dog\n")
    with pytest.raises(UserError, match=rf"classes.*table\.csv.*{message}"):
        resolve_class_names(given, path, "class", False)


def test_one_class_is_refused_unless_multi_label(tmp_path):
    path = write_table(tmp_path, "path,class\na,cat\nb,cat\n")
    with pytest.raises(UserError, match=r"table\.csv.*one class, cat"):
        resolve_class_names(None, path, "class", False)
    assert resolve_class_names(None, path, "class", True) == ["cat"]


def test_single_labels_become_positions_in_the_given_order():
    encoded = encode_labels(["owl", "cat", "owl"], CLASSES, False, "t.csv")
    assert encoded.tolist() == [2, 0, 2]
    assert encoded.dtype == np.int32
    assert encode_labels(["owl", "cat"], ["owl", "dog", "cat"], False, "t.csv").tolist() == [0, 2]


def test_multi_labels_become_zeros_and_ones():
    encoded = encode_labels(["owl$cat", "dog", "cat$cat"], CLASSES, True, "t.csv")
    assert encoded.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert encoded.dtype == np.uint8


@pytest.mark.parametrize(
    ("labels", "multi_label", "row", "name"),
    [
        (["cat", "dog", "emu", "emu"], False, 4, "emu"),
        (["cat", "dog$emu"], True, 3, "emu"),
        (["cat$dog"], False, 2, r"cat\$dog"),
    ],
)
def test_unknown_label_names_its_row(labels, multi_label, row, name):
    with pytest.raises(UserError, match=rf"t\.csv, row {row}:.*'{name}'.*cat, dog, owl"):
        encode_labels(labels, CLASSES, multi_label, "t.csv")


# One image


def test_read_table_tells_every_empty_cell_at_once(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"path,class\n,cat\nb.jpg,\nc.jpg,\nd.jpg,dog\n")
    with pytest.raises(UserError) as raised:
        read_table(str(path), "class")
    lines = str(raised.value).splitlines()
    assert [line.split("table.csv, ")[1].split(":")[0] for line in lines] == ["row 2", "rows 3, 4"]
