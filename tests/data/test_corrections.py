"""corrections.csv: what of it is applied to a copy of the table, and what does not fit and leaves all as it was."""

import pandas as pd
import pytest

import find_label_errors
from find_label_errors import LabelErrorConfigs
from finetune.core.options import UserError
from finetune.data.corrections import name_corrected

TABLE = 'path,class,patient\na.jpg,cat,1\n"b, c.jpg",dog,2\nd.jpg,cat,007\ne.jpg,owl,\n'
HEADER = "row,path,given_label,mark,corrected_label\n"


@pytest.fixture
def csv_path(tmp_path):
    path = tmp_path / "all_data.csv"
    path.write_text(TABLE)
    return path


def apply(csv_path, lines, **options):
    corrections = csv_path.parent / "corrections.csv"
    corrections.write_text(HEADER + lines)
    return find_label_errors.main(
        LabelErrorConfigs(csv_path=str(csv_path), apply=str(corrections), **options).validate()
    )


def refuse(csv_path, lines, words, **options):
    before = [*(path.name for path in csv_path.parent.iterdir()), "corrections.csv"]
    with pytest.raises(UserError, match=words) as error:
        apply(csv_path, lines, **options)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in csv_path.parent.iterdir()) == sorted(before)
    assert csv_path.read_text() == TABLE


def test_what_is_marked_wrong_is_corrected_in_a_copy(csv_path, capsys):
    lines = '3,"b, c.jpg",dog,wrong,owl\n2,a.jpg,cat,right,cat\n5,e.jpg,owl,unsure,owl\n'
    assert apply(csv_path, lines) == {"right": 1, "wrong": 1, "unsure": 1}
    assert csv_path.read_text() == TABLE
    written = (csv_path.parent / "all_data_corrected.csv").read_text()
    assert written == TABLE.replace('"b, c.jpg",dog', '"b, c.jpg",owl')
    assert "Corrected 1 of 4 labels" in capsys.readouterr().out


def test_name_of_the_new_table():
    assert name_corrected("data/all.data.csv") == "data/all.data_corrected.csv"


def test_write_path_wins_but_replaces_nothing_that_is_read(csv_path):
    line = "2,a.jpg,cat,wrong,owl\n"
    apply(csv_path, line, write_path=str(csv_path.parent / "new.csv"))
    assert pd.read_csv(csv_path.parent / "new.csv")["class"].tolist() == ["owl", "dog", "cat", "owl"]
    with pytest.raises(UserError, match="write_path"):
        apply(csv_path, line, write_path=str(csv_path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("9,a.jpg,cat,wrong,owl", "row 9: .* 2 to 5"),
        ("1,a.jpg,cat,wrong,owl", "row 1: "),
        ("x,a.jpg,cat,wrong,owl", "row x: "),
        ("2,other.jpg,cat,wrong,owl", "row 2: .*a.jpg.*other.jpg"),
        ("2,a.jpg,dog,wrong,owl", "row 2: .*cat.*dog"),
        ("2,a.jpg,cat,maybe,owl", "row 2: .*right, wrong, unsure.*'maybe'"),
        ("2,a.jpg,cat,wrong,cow", "row 2: 'cow'"),
        ("2,a.jpg,cat,wrong,", "row 2: ''"),
        ("2,a.jpg,cat,wrong,cat", "row 2: it is marked wrong"),
        ("2,a.jpg,cat,right,cat\n2,a.jpg,cat,wrong,owl", "row 2: it is listed twice"),
        ("2,b,cat,right,cat\n3,b,dog,right,dog\n4,b,cat,right,\n5,b,owl,right,", "row 2: .* row 4: .* and 1 more"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(csv_path, line, words):
    refuse(csv_path, f"4,d.jpg,cat,wrong,dog\n{line}\n" if "4," not in line else f"{line}\n", words)


def test_another_file_than_the_corrections_is_named(csv_path):
    with pytest.raises(UserError, match="has no column 'row'. Its columns: path, class, patient"):
        find_label_errors.main(
            LabelErrorConfigs(csv_path=str(csv_path), apply=str(csv_path), write_path=str(csv_path.parent / "new.csv"))
        )
    assert not (csv_path.parent / "new.csv").exists()


def test_several_labels_are_checked_one_by_one(csv_path):
    csv_path.write_text("path,class\na.jpg,cat$dog\nb.jpg,owl\n")
    assert apply(csv_path, "2,a.jpg,cat$dog,wrong,owl$cat\n", multi_label_classification=True)["wrong"] == 1
    assert pd.read_csv(csv_path.parent / "all_data_corrected.csv")["class"].tolist() == ["owl$cat", "owl"]
    for corrected, words in (
        ("owl$cow", "'cow' is none"),
        ("owl$owl", "names a class twice"),
        ("dog$cat", "same label"),
    ):
        with pytest.raises(UserError, match=words):
            apply(csv_path, f"2,a.jpg,cat$dog,wrong,{corrected}\n", multi_label_classification=True)
