"""From folders of photos to a table: which files are in it, in which order, and what is said of the others."""

import csv
import os

import pytest

from finetune.core.options import UserError
from make_csv_from_folders import FolderConfigs, main


@pytest.fixture
def folder(tmp_path):
    """A folder of two class folders; the files are empty, since nothing reads them."""
    for path in ("dog/b.jpg", "dog/a.png", "cat/z.jpg"):
        touch(tmp_path / "images" / path)
    return tmp_path / "images"


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def make_configs(folder, **options):
    values = {"folder_path": str(folder), "write_path": str(folder.parent / "all.csv")}
    return FolderConfigs(**(values | options)).validate()


def read_rows(folder):
    with open(folder.parent / "all.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "class"]
    return [(os.path.relpath(path, folder), label) for path, label in rows]


def test_rows_are_sorted_by_class_and_path_and_counted(folder, capsys):
    touch(folder / "cat" / "2023" / "may" / "a.jpg")
    assert main(make_configs(folder)) == {"cat": 2, "dog": 2}
    rows = [("cat/2023/may/a.jpg", "cat"), ("cat/z.jpg", "cat"), ("dog/a.png", "dog"), ("dog/b.jpg", "dog")]
    assert read_rows(folder) == rows
    assert all((folder / path).is_file() for path, _ in rows)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("cat: 2 images", "dog: 2 images", "4 rows"))


def test_paths_begin_in_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    main(make_configs(folder, folder_path="."))
    assert "\ncat/z.jpg,cat\n" in (folder.parent / "all.csv").read_text("utf-8")


@pytest.mark.parametrize("name", ["a.JPG", "a.Jpeg", "a.TIFF", "a.bmp", "a.webp", "a.gif", "a.b.png"])
def test_endings_of_images_are_known_in_any_case(folder, name):
    touch(folder / "bird" / name)
    main(make_configs(folder))
    assert (f"bird/{name}", "bird") in read_rows(folder)


@pytest.mark.parametrize("hidden", ["cat/.hidden.jpg", "cat/._z.jpg", ".thumbnails/a.jpg", "cat/.old/z.jpg"])
def test_hidden_files_and_folders_are_left_out(folder, hidden):
    touch(folder / hidden)
    assert main(make_configs(folder)) == {"cat": 1, "dog": 2}


def test_files_that_are_no_images_are_left_out_and_named(folder, capsys):
    touch(folder / "cat" / "notes.txt")
    touch(folder / "cat" / "jpg")
    assert main(make_configs(folder)) == {"cat": 1, "dog": 2}
    printed = capsys.readouterr().out
    assert "Left out 2 files" in printed
    assert "notes.txt" in printed


def test_loose_image_beside_the_class_folders_is_not_in_the_table(folder):
    touch(folder / "loose.jpg")
    main(make_configs(folder))
    assert "loose.jpg" not in dict(read_rows(folder))


def test_empty_class_folder_is_told(folder, capsys):
    (folder / "bird").mkdir()
    assert main(make_configs(folder)) == {"bird": 0, "cat": 1, "dog": 2}
    assert "bird: no images" in capsys.readouterr().out


def test_names_with_commas_quotes_and_accents_survive(folder):
    touch(folder / 'big, "old" Ärmel' / "a, b.jpg")
    main(make_configs(folder))
    assert ('big, "old" Ärmel/a, b.jpg', 'big, "old" Ärmel') in read_rows(folder)


def test_label_column_takes_its_name_from_the_configs(folder):
    main(make_configs(folder, csv_label_column="label"))
    assert (folder.parent / "all.csv").read_text("utf-8").startswith("path,label\n")


def test_folder_of_the_table_is_made(folder):
    main(make_configs(folder, write_path=str(folder.parent / "new" / "all.csv")))
    assert (folder.parent / "new" / "all.csv").is_file()


@pytest.mark.parametrize("name", ["nowhere", "a.jpg"])
def test_what_is_no_folder_is_named(tmp_path, name):
    touch(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=f"Cannot read the folder .*{name}"):
        main(make_configs(tmp_path / name))


def test_file_name_that_is_no_text_is_refused(folder):
    open(os.path.join(os.fsencode(folder), b"cat", b"\xff.jpg"), "wb").close()
    with pytest.raises(UserError):
        main(make_configs(folder))
    assert sorted(os.listdir(folder.parent)) == ["images"]


def test_old_table_stays_where_nothing_can_be_read(folder):
    (folder.parent / "all.csv").write_text("old", encoding="utf-8")
    touch(folder / "cat$dog" / "a.jpg")
    with pytest.raises(UserError, match=r"cat\$dog contains '\$'"):
        main(make_configs(folder))
    assert (folder.parent / "all.csv").read_text("utf-8") == "old"
