"""Class folders are verified before their table is written."""

import os

import pytest
from checked_tables import write_photo
from corpus import encode, photo

import make_csv_from_folders
from finetune.options import UserError


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
    assert "Left out 3 links or folders that lead nowhere" in capsys.readouterr().out


def test_one_class_alone_is_a_warning(class_folders, capsys):
    for path in (class_folders / "images" / "dog").iterdir():
        path.unlink()
    assert list_folders(class_folders) == {"cat": 3, "dog": 0}
    assert "cat is the only class. train.py expects at least two" in capsys.readouterr().out
