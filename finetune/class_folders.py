"""Folders of photos, one a class, as a table of images."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pandas as pd

from configs import Configs
from finetune.data_check import check_table
from finetune.files import IMAGE_SUFFIXES, walk_visible
from finetune.findings import get_bad_rows
from finetune.options import UserError
from finetune.tables import IMAGE_COLUMN, LABEL_SEPARATOR
from finetune.texts import join_names


def list_class_folders(folder_path: str) -> list[str]:
    """Returns the names of the folders in a folder, sorted; hidden ones are left out.

    Raises:
        UserError: there are none, or a name cannot be a class name.
    """
    try:
        with os.scandir(folder_path) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"Cannot read the folder {folder_path}: {error.strerror}. Check --folder_path.") from error
    if not names:
        raise UserError(f"{folder_path} holds no folders. Expected one folder per class, each with its images.")
    for name in names:
        if LABEL_SEPARATOR in name:
            raise UserError(
                f"The folder name {name} contains '{LABEL_SEPARATOR}', which separates labels. Rename the folder."
            )
    return names


def list_images(folder_path: str, class_names: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Lists the files under each class folder, subfolders included, sorted.

    Returns:
        The image paths of each class, and the files that by their ending are no images.
    """
    images, others = {}, []
    for name in class_names:
        paths = sorted(walk_visible(os.path.normpath(os.path.join(folder_path, name))))
        images[name] = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
        others += [path for path in paths if not path.lower().endswith(IMAGE_SUFFIXES)]
    return images, others


def report_others(others: list[str]) -> None:
    """Prints which files were left out."""
    if others:
        print(f"Left out {len(others)} files that are no images: {join_names(others)}")


def tabulate_images(images: dict[str, list[str]], label_column: str, folder_path: str) -> pd.DataFrame:
    """Returns a table of images, a row each: its path and, in `label_column`, its class.

    Raises:
        UserError: there is no image.
    """
    rows = [(path, name) for name, paths in images.items() for path in paths]
    if not rows:
        raise UserError(f"The class folders of {folder_path} hold no image ({', '.join(IMAGE_SUFFIXES)}).")
    return pd.DataFrame(rows, columns=[IMAGE_COLUMN, label_column])


def leave_out_bad_images(table: pd.DataFrame, folder_path: str, csv_path: str, configs: Configs) -> pd.DataFrame:
    """Checks every image, writes data_report.csv beside the table, and returns the rows that can be used.

    The report's row numbers count all images, those that are left out as well.

    Raises:
        UserError: there are errors; of images that cannot be read only where `skip_bad_images` is not set.
    """
    bad_rows = get_bad_rows(check_table(table, csv_path, configs))[csv_path]
    if len(bad_rows) == len(table):
        raise UserError(f"None of the {len(table)} images of {folder_path} can be read.")
    return table.drop(index=[row - 2 for row in bad_rows])
