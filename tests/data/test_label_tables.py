"""Tables of labels as competitions ship them become tables of images: which image a row means, and which label."""

import csv
import os

import pandas as pd
import pytest
from checked_tables import write_photo

import find_label_errors
import make_csv_from_folders
from find_label_errors import LabelErrorConfigs
from finetune.core.options import UserError
from finetune.data.label_tables import ImageNames, name_corrected


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def convert(folder, content, *images, **options):
    """Makes a table of images of a table of labels; returns its rows, paths as seen from the folder of the images."""
    touch(folder / "photos", *images)
    (folder / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    values = {"folder_path": str(folder / "photos"), "write_path": str(folder / "all.csv")} | options
    configs = make_csv_from_folders.FolderConfigs(table_path=str(folder / "labels.csv"), **values).validate()
    counts = make_csv_from_folders.main(configs)
    with open(folder / "all.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", configs.csv_label_column]
    names = [name for _, label in rows for name in label.split("$")]
    assert counts == {name: names.count(name) for name in names}
    assert [*counts] == sorted(counts)
    return [(os.path.relpath(path, folder / "photos"), label) for path, label in rows]


PAIR = [("1.jpg", "cat"), ("2.png", "dog")]


@pytest.mark.parametrize(
    "content",
    [
        "id,breed\n1,cat\n2,dog\n",
        "path,class\n1.jpg,cat\n2.png,dog\n",
        "class,file\ncat,1.jpg\ndog,2.png\n",
        " id , class \n 1 , cat\n2 ,dog \n",
        "sep=;\nid;class\n1;cat\n2;dog\n",
        "id\tclass\r\n1\tcat\r\n2\tdog\r\n",
        "id|class\n1|cat\n2|dog",
        "id,class\n\n1,cat\n\n2,dog\n\n",
        '"id","class"\n"1","cat"\n"2","dog"\n',
        ",id,class\n0,1,cat\n1,2,dog\n",
        "id,cat,dog\n1,1,0\n2,0,1\n",
        "cat,dog,id\n1.0,0.0,1\n0.0,1.0,2\n",
        "id,cat,dog\n1,True,False\n2,False,True\n",
        "Unnamed: 0,id,cat,dog\n5,1,1,0\n6,2,0,1\n",
        "id,class\nphotos/1,cat\n.\\2.png,dog\n",
        "id,class\nC:\\photos\\1.jpg,cat\n/kaggle/input/photos/2.png,dog\n",
        "id,class,age\n1,cat,7\n2,dog,8\n",
        "\ufeffid,class\n1,cat\n2,dog\n",
        "id,class\n1,cat\n2,dog\n".encode("utf-16"),
        "id,class\n1,cat\n2,dog\n".encode("utf-16-le"),
    ],
)
def test_one_table_in_many_shapes(tmp_path, content):
    assert convert(tmp_path, content, "1.jpg", "2.png") == PAIR


def test_images_are_found_at_any_depth_in_the_order_of_the_table(tmp_path, capsys):
    rows = convert(tmp_path, "id,class\nb,x\na,y\n", "train/far/a.jpg", "test/b.jpg", "test/c.jpg", "notes.txt")
    assert rows == [("test/b.jpg", "x"), ("train/far/a.jpg", "y")]
    assert "Left out 1 images that no row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", ["1.jpg"]),
        ("train/1", ["train/1.jpg"]),
        ("train\\1.jpg", ["train/1.jpg"]),
        ("b/1", ["a/b/1.jpg"]),
        ("a/b/1", ["a/b/1.jpg"]),
        ("photos/1.jpg", ["1.jpg"]),
        ("photos/b/1.jpg", []),
        ("test/1", []),
        ("2", ["train/2.jpg", "train/2.png"]),
        ("2.png", ["train/2.png"]),
        ("3", []),
        ("4", ["a/4.jpg", "c/4.jpg"]),
        ("c/4", ["c/4.jpg"]),
        ("5.v1", ["5.v1.jpg"]),
        ("5", []),
        (" '1.jpg' ", ["1.jpg"]),
        ("", []),
        ("/", []),
        ("..", []),
    ],
)
def test_a_name_means_the_image_that_it_agrees_with_furthest(tmp_path, text, expected):
    photos = tmp_path / "photos"
    touch(photos, "1.jpg", "train/1.jpg", "a/b/1.jpg", "train/2.jpg", "train/2.png", "a/4.jpg", "c/4.jpg", "5.v1.jpg")
    assert [os.path.relpath(path, photos) for path in ImageNames(str(photos)).find(text)] == expected


def test_the_folder_may_be_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "1.jpg", "a/2.jpg")
    names = ImageNames(".")
    assert [names.find(text) for text in ("1", "a/2", "b/2", f"{tmp_path.name}/1")] == [
        ["1.jpg"],
        ["a/2.jpg"],
        [],
        ["1.jpg"],
    ]


def test_the_column_of_the_images_is_the_one_that_names_most(tmp_path):
    content = "fold,id,class\n1,3,1\n1,1,2\n2,2,1\n"
    expected = [("3.jpg", "1"), ("1.jpg", "2"), ("2.jpg", "1")]
    assert convert(tmp_path, content, "1.jpg", "2.jpg", "3.jpg") == expected
    rows = convert(tmp_path, content, image_column="fold")
    assert rows == [("1.jpg", "1"), ("1.jpg", "2"), ("2.jpg", "1")]


def test_of_two_columns_the_one_without_doubt_names_the_images(tmp_path):
    content = "id,file,class\n1,a/1.jpg,x\n1,b/1.jpg,y\n"
    assert convert(tmp_path, content, "a/1.jpg", "b/1.jpg") == [("a/1.jpg", "x"), ("b/1.jpg", "y")]


def test_a_single_column_of_0_and_1_is_the_label(tmp_path):
    assert convert(tmp_path, "id,has_cactus\n1,1\n2,0\n", "1.jpg", "2.jpg") == [("1.jpg", "1"), ("2.jpg", "0")]


def test_several_classes_in_a_row_are_joined_where_they_may_be(tmp_path):
    content = "id,rust,scab,dry\n1,1,0,0\n2,1,1,0\n3,0,1,1\n"
    with pytest.raises(UserError, match=r"row 3: rust, scab .*2 rows.*multi_label_classification"):
        convert(tmp_path, content, "1.jpg", "2.jpg", "3.jpg")
    rows = convert(tmp_path, content, multi_label_classification=True)
    assert rows == [("1.jpg", "rust"), ("2.jpg", "rust$scab"), ("3.jpg", "scab$dry")]


@pytest.mark.parametrize(
    ("first", "mark"), [("rust|scab", "|"), ("rust  scab", " "), ("rust, scab", ", "), ("rust$scab", "$")]
)
def test_labels_may_be_joined_by_another_mark(tmp_path, first, mark):
    content = f'id,labels\n1,"{first}"\n2,dry\n'
    rows = convert(tmp_path, content, "1.jpg", "2.jpg", multi_label_classification=True, label_separator=mark)
    assert rows == [("1.jpg", "rust$scab"), ("2.jpg", "dry")]


def test_a_row_for_each_label_is_joined_where_an_image_may_have_several(tmp_path, capsys):
    content = "id,class\n1,cat\n2,dog\n1,dog\n1,cat\n"
    rows = convert(tmp_path, content, "1.jpg", "2.jpg", multi_label_classification=True)
    assert rows == [("1.jpg", "cat$dog"), ("2.jpg", "dog")]
    assert "Joined the labels of 4 rows by their images: 2." in capsys.readouterr().out


def test_rows_without_a_label_are_left_out_and_counted(tmp_path, capsys):
    assert convert(tmp_path, "id,a,b\n1,1,0\n2,0,0\n3,0,1\n", "1.jpg", "2.jpg", "3.jpg") == [
        ("1.jpg", "a"),
        ("3.jpg", "b"),
    ]
    assert "Left out 1 rows without a label: row 3" in capsys.readouterr().out


def test_rows_without_an_image_are_an_error_or_left_out_and_told(tmp_path, capsys):
    content = "sep=,\nid,class\n1,a\n7,b\n2,b\n"
    with pytest.raises(UserError, match=r"1 of 3 rows .*row 4 \(7\)"):
        convert(tmp_path, content, "1.jpg", "2.jpg")
    assert convert(tmp_path, content, skip_bad_images=True) == [("1.jpg", "a"), ("2.jpg", "b")]
    assert "Left out 1 rows that name no image" in capsys.readouterr().out


def test_a_given_column_of_labels_has_to_be_there_and_names_the_result(tmp_path):
    rows = convert(tmp_path, "id,breed,age\n1,cat,7\n2,dog,8\n", "1.jpg", "2.png", csv_label_column="breed")
    assert rows == PAIR
    with pytest.raises(UserError, match="'kind'.*breed"):
        convert(tmp_path, "id,breed\n1,cat\n", csv_label_column="kind")
    with pytest.raises(UserError, match="image_column: .* has no effect without table_path"):
        make_csv_from_folders.FolderConfigs(image_column="id").validate()


def test_a_table_is_not_replaced_by_what_is_made_of_it(tmp_path):
    content = "id,class\n1,cat\n"
    with pytest.raises(UserError, match=r"labels\.csv"):
        convert(tmp_path, content, "1.jpg", write_path=str(tmp_path / "labels.csv"))
    assert (tmp_path / "labels.csv").read_text() == content


def test_images_are_verified(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(5):
        write_photo(tmp_path / "photos" / f"{number}.jpg", number % 4)
    content = "id,class\n" + "".join(f"{number},{label}\n" for number, label in enumerate("abaab"))
    rows = convert(tmp_path, content, verify=True)
    assert rows == [("1.jpg", "b"), ("2.jpg", "a"), ("3.jpg", "a")]
    assert "Left out 2 rows whose images have two labels" in capsys.readouterr().out
    content = "id,a,b\n0,1,0\n1,0,1\n2,1,1\n4,1,0\n"
    rows = convert(tmp_path, content, verify=True, multi_label_classification=True)
    assert rows == [("0.jpg", "a"), ("1.jpg", "b"), ("2.jpg", "a$b"), ("4.jpg", "a")]


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
