"""From folders of photos to a table: which files it contains, in which order, and how others are reported."""

import csv
import os

import pytest

from finetune.core.options import UserError
from make_csv_from_folders import FolderConfigs, main


@pytest.fixture
def folder(tmp_path):
    """A folder of two class folders with empty files, as nothing reads them."""
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


def test_images_are_known_by_their_suffix_in_any_case(folder):
    names = ["a.JPG", "a.Jpeg", "a.TIFF", "a.b.png", "a.bmp", "a.gif", "a.webp"]
    for name in names:
        touch(folder / "bird" / name)
    main(make_configs(folder))
    assert read_rows(folder)[: len(names)] == [(f"bird/{name}", "bird") for name in names]


def test_other_files_are_left_out(folder, capsys):
    hidden = ("cat/.hidden.jpg", "cat/._z.jpg", ".thumbnails/a.jpg", "cat/.old/z.jpg")
    for path in (*hidden, "cat/notes.txt", "cat/jpg", "loose.jpg"):
        touch(folder / path)
    (folder / "bird").mkdir()
    assert main(make_configs(folder)) == {"bird": 0, "cat": 1, "dog": 2}
    assert [path for path, _ in read_rows(folder)] == ["cat/z.jpg", "dog/a.png", "dog/b.jpg"]
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("notes.txt", "bird: no images"))


def test_names_with_commas_quotes_and_accents_survive(folder):
    touch(folder / 'big, "old" Ärmel' / "a, b.jpg")
    main(make_configs(folder))
    assert ('big, "old" Ärmel/a, b.jpg', 'big, "old" Ärmel') in read_rows(folder)


def test_label_column_and_path_of_the_table_are_options(folder):
    path = folder.parent / "new" / "all.csv"
    main(make_configs(folder, csv_label_column="label", write_path=str(path)))
    assert path.read_text("utf-8").startswith("path,label\n")


@pytest.mark.parametrize("name", ["nowhere", "a.jpg"])
def test_missing_folder_is_named(tmp_path, name):
    touch(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=f"Cannot read the folder .*{name}"):
        main(make_configs(tmp_path / name))


def test_file_name_that_is_not_text_is_refused(folder):
    open(os.path.join(os.fsencode(folder), b"cat", b"\xff.jpg"), "wb").close()
    with pytest.raises(UserError):
        main(make_configs(folder))
    assert sorted(os.listdir(folder.parent)) == ["images"]


def test_old_table_stays_after_an_error(folder):
    (folder.parent / "all.csv").write_text("old", encoding="utf-8")
    touch(folder / "cat$dog" / "a.jpg")
    with pytest.raises(UserError, match=r"cat\$dog contains '\$'"):
        main(make_configs(folder))
    assert (folder.parent / "all.csv").read_text("utf-8") == "old"
