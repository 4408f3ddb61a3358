"""What a file is that is no table; the lines for each kind are in docs/bad_input.md."""

import pandas as pd
import pytest

from finetune.table_faults import find_class_columns, find_encoding, find_kind_fault, find_start_fault


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("path,class\n", "utf-8", ""),
        ("path,class\n", "utf-8-sig", ""),
        ("path,class\n", "utf-16", "utf-16-le"),
        ("path,class\na,Ärmel\n", "utf-16-le", "utf-16-le"),
        ("path,class\n花.jpg,花\n", "utf-16-be", "utf-16-be"),
        ("path,class\n", "utf-32", "utf-32-le"),
        ("path,class\n花.jpg,花\n", "utf-8", ""),
        ("a\0b\0", "utf-8", "utf-16-le"),
        ("path,class\na\0.jpg,cat\n", "utf-8", ""),
        ("", "utf-8", ""),
        ("a", "utf-8", ""),
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
