"""Wrong tables, paths, URLs and folders are refused, or found by the data check, in one line with the names."""

import os
import sys

import pytest
from corpus import TABLE_CASES, check_message, encode, photo
from fsspec import AbstractFileSystem, register_implementation
from fsspec.implementations.memory import MemoryFileSystem

import make_csv_from_folders
from configs import Configs
from finetune.core.options import UserError
from finetune.data.data_check import check_data
from finetune.data.images import read_image
from finetune.data.inspection import inspect_image, inspect_images
from finetune.data.tables import make_image_table, parse_table, resolve_class_names


def url_of(url, data=None, read=False):
    """Returns a case: the data check decodes what a URL names, or the generator reads it.

    `data` is that of `memory://bucket/photo.jpg`, which is otherwise a whole image.
    """

    def run(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryFileSystem, "store", {})
            patch.setitem(sys.modules, "s3fs", None)
            MemoryFileSystem().pipe_file("/bucket/photo.jpg", encode("JPEG") if data is None else data)
            return read_image(url) if read else " ".join(inspect_image(url, decode=True).fault)

    return run


class Forbidding(AbstractFileSystem):
    """A store that refuses access."""

    protocol = "forbidding"

    def info(self, path, **options):
        raise PermissionError("Access Denied")

    def cat_file(self, path, start=None, end=None, **options):
        raise PermissionError("Access Denied")


register_implementation("forbidding", Forbidding, clobber=True)


def table_of(name, data):
    """Returns a case: the data check reads a table whose images are all there, and returns the findings."""

    def run(folder):
        path, multi_label = folder / "table.csv", name.startswith("multi_label")
        path.write_bytes(data)
        table = parse_table(str(path), "class")
        for number, image in enumerate(table["path"].unique()):
            write_image(folder / image.replace("\0", "0"), number)
        table = make_image_table("training", str(path), table, "class", str(folder))
        found = check_data([table], Configs(image_target_size=(1, 1, 3)), multi_label).findings
        # All small tables have such classes.
        found = [one for one in found if one.kind != "class_of_one_image" or one.kind == name]
        if not found:
            resolve_class_names(None, str(path), "class", multi_label)
        return "; ".join(f"{one.kind}, row {one.row}: {one.detail}" for one in found)

    return run


def path_of(text, *names):
    """Returns a case: the data check looks for the file that a table names; the folder has others."""

    def run(folder):
        for number, name in enumerate(names):
            write_image(folder / name, number)
        return inspect_images([f"{folder}/{text}"], False, 10**6, 1)[0].fault[1].replace(f"{folder}{os.sep}", "")

    return run


def folders_of(*names, **options):
    """Returns a case: make_csv_from_folders.py lists a folder of these images, and of folders if a name ends so."""

    def run(folder):
        for number, name in enumerate(names):
            if name.endswith("/"):
                (folder / "photos" / name).mkdir(parents=True)
            else:
                write_image(folder / "photos" / name, number)
        values = {"folder_path": str(folder / "photos"), "write_path": str(folder / "all.csv")} | options
        make_csv_from_folders.main(make_csv_from_folders.FolderConfigs(**values).validate())

    return run


def labels_of(data, *names, **options):
    """Returns a case: make_csv_from_folders.py makes a table of images from a table of labels."""

    def run(folder):
        (folder / "labels.csv").write_bytes(data)
        folders_of(*(names or ("1.jpg", "2.jpg")), table_path=str(folder / "labels.csv"), **options)(folder)

    return run


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(encode("JPEG", photo(seed)))


# Name of a case: how it is made, and the names that the error or the finding must contain, separated by "|".
CASES = {
    "url_missing": (url_of("memory://bucket/none.jpg"), "missing|does not exist"),
    "url_missing_read": (url_of("memory://bucket/none.jpg", read=True), "memory://bucket/none.jpg|does not exist"),
    "url_folder": (url_of("memory://bucket"), "missing"),
    "url_empty": (url_of("memory://bucket/photo.jpg", b""), "empty"),
    "url_truncated": (url_of("memory://bucket/photo.jpg", encode("JPEG")[:-300]), "truncated"),
    "url_device": (url_of("file:///dev/zero"), "missing"),
    "url_unknown_protocol": (url_of("htps://host/photo.jpg"), "unreachable|htps"),
    "url_unknown_protocol_read": (url_of("htps://host/photo.jpg", read=True), "htps://host/photo.jpg"),
    "url_without_package": (url_of("s3://bucket/photo.jpg"), "s3://bucket/photo.jpg|pip install s3fs"),
    "url_forbidden": (url_of("forbidding://bucket/photo.jpg"), "unreachable|Access Denied"),
    "url_forbidden_read": (url_of("forbidding://bucket/photo.jpg", read=True), "forbidding://|Access Denied"),
    "url_no_answer": (url_of("ftp://localhost:1/photo.jpg"), "unreachable|refused"),
    "url_joined": (url_of("reference://photo.jpg::memory://bucket/references.json"), "unreachable|'::'"),
    **{f"table_{name}": (table_of(name, data), names) for name, (data, names) in TABLE_CASES.items()},
    "path_without_ending": (path_of("photos/1", "photos/1.jpg"), "photos/1.jpg|ending|make_csv_from_folders.py"),
    "path_without_ending_of_two": (path_of("photos/1", "photos/1.jpg", "photos/1.png"), "photos/1.jpg|2 files"),
    "path_of_backslashes": (path_of("photos\\cat\\1.jpg", "photos/cat/1.jpg"), "photos/cat/1.jpg|/ for \\"),
    "path_of_backslashes_without_ending": (path_of("photos\\cat\\1", "photos/cat/1.jpg"), "/ for \\|ending"),
    "path_with_blanks": (path_of("photos/1.jpg ", "photos/1.jpg"), "photos/1.jpg|blanks"),
    "path_in_quotes": (path_of("'1.jpg'", "1.jpg"), "1.jpg|quotation marks"),
    "path_of_other_capitals": (path_of("photos/img_1.jpg", "photos/IMG_1.JPG"), "photos/IMG_1.JPG|capitals"),
    "path_of_a_drive": (path_of("photos/C:\\me\\cat\\1.jpg", "photos/cat/1.jpg"), "photos/cat/1.jpg|C:"),
    "path_of_a_drive_without_a_file": (path_of("C:\\me\\2.jpg", "1.jpg"), "C:|Windows|image_directory"),
    "path_with_an_invisible_character": (path_of("1\u200b.jpg", "1.jpg"), "'1\\u200b.jpg'|'1.jpg'"),
    "path_of_mixed_accents": (path_of("phote\u0301/\u00e9.jpg", "phot\u00e9/e\u0301.jpg"), "accents|NFC"),
    "path_of_another_ending": (path_of("photos/1.jpg", "photos/1.png"), "photos/1.png|ending"),
    "path_of_no_file": (path_of("photos/3.jpg", "photos/1.jpg"), "does not exist"),
    "folders_none": (folders_of("1.jpg"), "photos|one folder per class"),
    "folders_without_images": (folders_of("cat/"), "photos|.jpg"),
    "folders_one_level_above": (folders_of("photos/cat/1.jpg", "photos/dog/2.jpg"), "--folder_path photos/photos"),
    "folders_with_separator": (folders_of("cat$dog/1.jpg"), "cat$dog|'$'"),
    "folders_of_sets_and_others": (folders_of("train/cat/1.jpg", "val/cat/2.jpg", "more/cat/3.jpg"), "train, val|more"),
    "folders_of_one_set_twice": (folders_of("train/a/1.jpg", "val/a/2.jpg", "valid/a/3.jpg"), "val|valid|same set"),
    "folders_of_a_set_without_labels": (folders_of("train/cat/1.jpg", "test/2.jpg"), "test|predict.py|--table_path"),
    "folders_of_sets_without_labels": (folders_of("train/1.jpg", "val/2.jpg"), "train, val|--table_path"),
    "folders_of_sets_without_training": (folders_of("val/cat/1.jpg", "test/cat/2.jpg"), "training set|test, val"),
    "folders_of_one_set": (folders_of("train/cat/1.jpg", "train/dog/2.jpg"), "train|--folder_path photos/train"),
    "labels_empty": (labels_of(b""), "labels.csv|empty"),
    "labels_missing": (folders_of("1.jpg", table_path="nowhere.csv"), "nowhere.csv|--table_path"),
    "labels_header_alone": (labels_of(b"id,class\n"), "labels.csv|id, class|0 lines"),
    "labels_no_header": (labels_of(b"1,cat\n2,dog\n"), "labels.csv|no header|id,class"),
    "labels_no_header_of_paths": (labels_of(b"1.jpg,cat\n2.jpg,dog\n"), "labels.csv|1.jpg, cat|1 lines"),
    "labels_latin_1": (labels_of("id,class\n1,Ärmel\n".encode("latin-1")), "labels.csv|line 2|Ärmel|Latin-1"),
    "labels_workbook": (labels_of(b"PK\x03\x04\x14\x00"), "labels.csv|Excel"),
    "labels_more_fields": (labels_of(b"id,class\n1,cat,dog\n"), "labels.csv|line 2|3 fields|2"),
    "labels_column_twice": (labels_of(b"id,cat,cat\n1,0,1\n"), "labels.csv|several columns cat"),
    "labels_of_other_images": (labels_of(b"id,class\n7,cat\n8,dog\n"), "labels.csv|'7'|1.jpg|image_column"),
    "labels_without_image": (labels_of(b"id,class\n1,cat\n8,dog\n"), "labels.csv|row 3 (8)|--skip_bad_images"),
    "labels_of_two_endings": (
        labels_of(b"id,class\n1,cat\n", "a/1.jpg", "a/1.png"),
        "labels.csv, row 2|photos/a/1.png",
    ),
    "labels_of_two_folders": (
        labels_of(b"id,class\n1,cat\n", "a/1.jpg", "b/1.jpg"),
        "labels.csv, row 2|photos/b/1.jpg",
    ),
    "labels_without_labels": (labels_of(b"id\n1\n2\n"), "labels.csv|one column"),
    "labels_of_no_class": (labels_of(b"id,class\n1,\n"), "labels.csv|--folder_path"),
    "labels_of_many_columns": (labels_of(b"id,breed,age\n1,pug,4\n"), "breed, age|--csv_label_column"),
    "labels_of_a_column_that_lacks": (labels_of(b"id,breed\n1,pug\n", csv_label_column="kind"), "'kind'|breed"),
    "labels_of_probabilities": (labels_of(b"id,cat,dog\n1,0.3,0.7\n"), "labels.csv|cat, dog|0 and 1"),
    "labels_of_several_classes": (
        labels_of(b"id,cat,dog\n1,1,0\n2,1,1\n"),
        "row 3|cat, dog|multi_label_classification",
    ),
    "labels_with_separator": (labels_of(b"id,a$b,c\n1,1,0\n"), "labels.csv|a$b|'$'"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_data_end_in_one_line_with_the_names(case, tmp_path):
    run, names = CASES[case]
    try:
        message = run(tmp_path)
    except UserError as error:
        message = str(error)
    check_message(message, names, tmp_path)
