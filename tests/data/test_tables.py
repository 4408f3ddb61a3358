"""Tables, labels, weights, files, devices and model files: right values by hand, and one clear line for a mistake."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checked_tables import check, write_photo
from corpus import BAD_TABLES
from tiny_models import CLASSES, write_table

from finetune.core.options import UserError
from finetune.data.tables import (
    encode_labels,
    find_class_names,
    make_image_table,
    parse_table,
    read_table,
    resolve_class_names,
)

PROJECT = Path(__file__).resolve().parents[2]


# Tables


def test_table_is_read_as_texts_with_its_other_columns(tmp_path):
    path = write_table(tmp_path, "path,class,note\n001,NA,x\n002,None,\n003,1.50,nan\n")
    assert read_table(path, "class").to_dict("list") == {
        "path": ["001", "002", "003"],
        "class": ["NA", "None", "1.50"],
        "note": ["x", "", "nan"],
    }


def test_byte_order_mark_is_accepted(tmp_path):
    table = read_table(write_table(tmp_path, "path,class\na.jpg,Ärmel\n", "utf-8-sig"), "class")
    assert table.to_dict("list") == {"path": ["a.jpg"], "class": ["Ärmel"]}


def test_windows_line_ends_and_quotes_are_read(tmp_path):
    table = read_table(write_table(tmp_path, 'path,class\r\n"a, b.jpg","say ""x"""\r\n'), "class")
    assert table.to_dict("list") == {"path": ["a, b.jpg"], "class": ['say "x"']}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty. Expected the columns path and label"),
        ("\n\n", "is empty"),
        ("\n ", "begins with a blank line"),
        ("path,label\n", "has no rows"),
        ("path,class\na.jpg,cat\n", r"has no column 'label'\. Its columns: path, class\. Set csv_label_column"),
        ("file,label\na.jpg,cat\n", r"has no column 'path'\. Its columns: file, label\."),
        ("path;label\na.jpg;cat\n", r"has no column 'path'\. Its columns: path;label\."),
        ('"pa\nth;class"\na.jpg;cat\n', "has no column 'path'.*separated by semicolons"),
        ("path,label\na.jpg,cat\nb.jpg,\n", "row 3: the column 'label' is empty"),
        ("path,label\na.jpg,cat\nb.jpg,  \n", "row 3: the column 'label' is empty"),
        ("path,label\na.jpg,cat\nb.jpg\n", "row 3: the column 'label' is empty"),
        ("path,label\n,cat\n", "row 2: the column 'path' is empty"),
        ("path,label\na.jpg,cat\nb.jpg,cat,dog\n", "is not a UTF-8 CSV file"),
        ("path,label\na.jpg,cat,dog\nb.jpg,dog,cat\n", "has rows with more fields"),
        ('path,label\na.jpg,"cat\n', "is not a UTF-8 CSV file"),
        ("path,label\na.jpg,Ärmel\n".encode("latin-1"), "is not a UTF-8 CSV file"),
        ("path,label\na.jpg,cat\n".encode("utf-16"), "is not a UTF-8 CSV file"),
        (b"\x89PNG\r\n\x1a\n\xff\x00", "is not a UTF-8 CSV file"),
    ],
)
def test_unusable_table_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"(?s)table\.csv,? ?{message}"):
        read_table(write_table(tmp_path, content), "label")


def test_blank_line_between_rows_is_named_and_those_at_the_end_are_harmless(tmp_path):
    with pytest.raises(UserError, match="row 3: the column 'path' is empty"):
        read_table(write_table(tmp_path, "path,class\na.jpg,cat\n\nb.jpg,dog\n"), "class")
    table = read_table(write_table(tmp_path, "path,class\na.jpg,cat\nb.jpg,dog\n\n\n"), "class")
    assert table["path"].tolist() == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_table_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(UserError, match="Cannot read the CSV file .*Check the path"):
        read_table(str(tmp_path / name), "class")


def test_missing_table_names_the_script_that_writes_it_and_where_its_path_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remedy = "Check the path, or run split_train_test.py first. Relative paths begin in "
    with pytest.raises(UserError) as raised:
        read_table("./data/training_set.csv", "class")
    assert str(raised.value).endswith(f"{remedy}{os.getcwd()}.")


# Class names and labels


def test_class_names_are_sorted():
    assert find_class_names(["owl", "cat", "owl", "Dog"], False) == ["Dog", "cat", "owl"]


def test_multi_label_class_names_are_split():
    assert find_class_names(["owl$cat", "dog", "cat"], True) == ["cat", "dog", "owl"]
    assert find_class_names(["owl$cat", "dog"], False) == ["dog", "owl$cat"]


def test_class_names_do_not_depend_on_the_hash_seed():
    code = (
        "from finetune.data.tables import find_class_names\n"
        "print(find_class_names([f'{n % 29}${n % 13}' for n in range(300)], True))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=PROJECT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{sorted(map(str, range(29)))}\n"}


def test_given_classes_keep_their_order(tmp_path):
    path = write_table(tmp_path, "path,class\na,cat\nb,dog\n")
    assert resolve_class_names(["dog", "cat"], path, "class", False) == ["dog", "cat"]
    assert resolve_class_names(None, path, "class", False) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cat"], "it lacks dog"),
        (["cat", "dog", "owl"], "has no image of owl"),
        (["cat", "owl"], "it lacks dog; .*has no image of owl"),
        ([], "it lacks cat, dog"),
    ],
)
def test_classes_that_are_not_those_of_the_table_are_refused(tmp_path, given, message):
    path = write_table(tmp_path, "path,class\na,cat\nb,dog\n")
    with pytest.raises(UserError, match=rf"classes does not match .*table\.csv.*{message}"):
        resolve_class_names(given, path, "class", False)


def test_one_class_is_refused_unless_multi_label(tmp_path):
    path = write_table(tmp_path, "path,class\na,cat\nb,cat\n")
    with pytest.raises(UserError, match="holds one class, cat"):
        resolve_class_names(None, path, "class", False)
    assert resolve_class_names(None, path, "class", True) == ["cat"]


def test_single_labels_become_positions():
    encoded = encode_labels(["owl", "cat", "owl"], CLASSES, False, "t.csv")
    assert encoded.tolist() == [2, 0, 2]
    assert encoded.dtype == np.int32


def test_positions_follow_the_given_order():
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
    with pytest.raises(UserError, match=rf"t\.csv, row {row}: the label '{name}'.*cat, dog, owl"):
        encode_labels(labels, CLASSES, multi_label, "t.csv")


@pytest.mark.parametrize("label", ["cat$", "$cat", "cat$$dog"])
def test_separator_without_a_name_beside_it_makes_no_class(tmp_path, label):
    path = write_table(tmp_path, f"path,class\na,dog\nb,{label}\n")
    with pytest.raises(UserError):
        resolve_class_names(None, path, "class", True)


# One image


@pytest.mark.parametrize(
    ("name", "multi_label", "expected"),
    [
        ("empty_paths", False, [("empty_path", 2), ("empty_path", 3)]),
        ("empty_labels", False, [("empty_label", 2), ("empty_label", 3)]),
        ("multi_label_empty_parts", True, [("empty_label_part", 2), ("empty_label_part", 3), ("empty_label_part", 4)]),
        ("multi_label_doubled", True, [("doubled_label", 2)]),
        ("white_space", False, [("white_space_variant", 3), ("white_space_variant", 4)]),
        ("case_variants", False, [("case_variant", 2)]),
        ("duplicate_paths", False, [("duplicate_path", 3), ("duplicate_with_other_label", 5)]),
        ("class_of_one_image", False, [("class_of_one_image", 4)]),
    ],
)
def test_faults_of_a_table_are_all_told_with_their_rows(tmp_path, name, multi_label, expected):
    (tmp_path / "table.csv").write_bytes(BAD_TABLES[name])
    for seed, letter in enumerate("abcd"):
        write_photo(tmp_path / f"{letter}.jpg", seed)
    read = parse_table(str(tmp_path / "table.csv"), "class")
    findings = check(make_image_table("training", "t", read, "class", str(tmp_path)), multi_label=multi_label)
    found = [(finding.kind, finding.row) for finding in findings]
    kinds = {kind for kind, _ in expected}
    assert sorted(pair for pair in found if pair[0] in kinds) == expected
    assert {kind for kind, _ in found} <= kinds | {"class_of_one_image"}


def test_read_table_tells_every_empty_cell_at_once(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"path,class\n,cat\nb.jpg,\nc.jpg,\nd.jpg,dog\n")
    with pytest.raises(UserError) as raised:
        read_table(str(path), "class")
    lines = str(raised.value).splitlines()
    assert [line.split("table.csv, ")[1].split(":")[0] for line in lines] == ["row 2", "rows 3, 4"]


def test_an_empty_path_of_a_table_is_told():
    with pytest.raises(UserError, match="Expected a CSV file of images. Received an empty path"):
        read_table("", "class")
