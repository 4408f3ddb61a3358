"""Folders of photos, one a class, as a table of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from configs import Configs
from finetune.data_check import check_tables
from finetune.files import IMAGE_SUFFIXES, lies_around, list_visible, report_closed
from finetune.findings import get_bad_rows
from finetune.headers import reads_heic
from finetune.labels import clean_label, clean_labels
from finetune.options import UserError
from finetune.tables import IMAGE_COLUMN, LABEL_SEPARATOR, make_image_table
from finetune.texts import join_names, show_count


class Photos(NamedTuple):
    """What a folder of class folders holds, each list sorted.

    Attributes:
        images: the paths of each class folder's images, subfolders included, by its name, sorted.
        others: files in class folders that by their ending are no images.
        loose: files beside the class folders.
        closed: links and folders that lead to no file.
    """

    images: dict[str, list[str]]
    others: list[str]
    loose: list[str]
    closed: list[str]


def list_photos(folder_path: str) -> Photos:
    """Lists the images under each visible folder in a folder; linked folders are followed.

    Raises:
        UserError: the folder cannot be read, holds no folder, or a name in it is no text.
    """
    folder_path = os.path.normpath(folder_path)
    try:
        names = sorted(name for name in os.listdir(folder_path) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"Cannot read the folder {folder_path}: {error.strerror}. Check --folder_path.") from error
    paths = [os.path.normpath(os.path.join(folder_path, name)) for name in names]
    folders = [path for path in paths if os.path.isdir(path) and not lies_around(path, folder_path)]
    loose = [path for path in paths if os.path.isfile(path)]
    photos = Photos({}, [], loose, sorted({*paths} - {*folders, *loose}))
    for folder in folders:
        files, closed, _ = list_visible(folder)
        photos.images[os.path.basename(folder)] = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
        photos.others.extend(path for path in files if not path.lower().endswith(IMAGE_SUFFIXES))
        photos.closed.extend(closed)
    if not folders:
        report_left_out(photos)
        raise UserError(f"{folder_path} holds no folders. Expected one folder per class, each with its images.")
    return photos


def refuse_a_level_above(images: dict[str, list[str]], folder_path: str) -> None:
    """Refuses a folder that is no folder of class folders but, as archives often are, one that holds it alone.

    Raises:
        UserError: one folder alone holds images, and all of these lie in folders of its own.
    """
    filled = [name for name, paths in images.items() if paths]
    if len(filled) != 1:
        return
    only = os.path.join(os.path.normpath(folder_path), filled[0])
    below = sorted({os.path.relpath(path, only).partition(os.sep)[0] for path in images[filled[0]]})
    if any(os.path.isfile(os.path.join(only, name)) for name in below):
        print(f"Warning: {only} is the only class. train.py expects at least two to tell apart.")
        return
    raise UserError(
        f"{folder_path}: expected one folder per class. One folder alone, {filled[0]}, holds images, and these lie in "
        f"folders below it: {join_names(below)}. Set --folder_path {only}."
    )


def report_left_out(photos: Photos) -> None:
    """Prints which files were left out, and which links."""
    if photos.others:
        number = show_count(len(photos.others), "file")
        print(f"Left out {number} without an image's ending: {join_names(photos.others)}")
    if photos.loose:
        print(f"Left out {show_count(len(photos.loose), 'file')} in no class folder: {join_names(photos.loose)}")
    report_closed(photos.closed)


def report_unread_heic(paths: Sequence[str]) -> None:
    """Prints how many images are HEIC where the package that reads them is not installed."""
    found = [path for path in paths if path.lower().endswith((".heic", ".heif"))]
    if found and not reads_heic():
        print(
            "HEIC takes a package: pip install pillow-heif. "
            f"Without it {show_count(len(found), 'image')} will count as unreadable."
        )


def tabulate_images(images: dict[str, list[str]], label_column: str, folder_path: str) -> pd.DataFrame:
    """Returns a table of images, a row each: its path and, in `label_column`, its class.

    Raises:
        UserError: there is no image, or the name of a folder cannot be a class name.
    """
    for name in images:
        if LABEL_SEPARATOR in name:
            raise UserError(
                f"The folder name {name} contains '{LABEL_SEPARATOR}', which separates labels. Rename the folder."
            )
        if not clean_label(name):
            raise UserError(f"The folder name {name!a} has no visible character. Rename the folder.")
    rows = [(path, name) for name, paths in images.items() for path in paths]
    if not rows:
        raise UserError(f"The class folders of {folder_path} hold no image ({', '.join(IMAGE_SUFFIXES)}).")
    report_unread_heic([path for path, _ in rows])
    paths, names = zip(*rows, strict=True)
    return pd.DataFrame({IMAGE_COLUMN: paths, label_column: clean_labels(names, folder_path)})


def leave_out_bad_images(
    tables: dict[str, pd.DataFrame], set_names: Sequence[str], configs: Configs, multi_label: bool = False
) -> dict[str, pd.DataFrame]:
    """Checks every image, writes data_report.csv beside the tables, and returns the rows that can be used.

    The report's row numbers count all images, those that are left out as well: images that have two labels and, where
    `skip_bad_images` is set, those that cannot be read.

    Args:
        tables: by the CSV file that each is to be written to.
        set_names: of each; of a single table empty.
        configs: the options of every script.
        multi_label: whether a label may hold several class names.

    Raises:
        UserError: there are errors, or no row of a table is left.
    """
    listed = [
        make_image_table(name, csv_path, table, configs.csv_label_column)
        for name, (csv_path, table) in zip(set_names, tables.items(), strict=True)
    ]
    bad_rows = get_bad_rows(check_tables(listed, configs, multi_label, skip_contradictions=True).findings)
    kept = {path: table.drop(index=[row - 2 for row in bad_rows[path]]) for path, table in tables.items()}
    for path, table in kept.items():
        if table.empty:
            raise UserError(f"None of the {len(tables[path])} images for {path} can be used. Correct them.")
    return kept
