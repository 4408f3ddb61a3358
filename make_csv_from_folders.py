"""Writes a CSV file (path,class) from a folder of photos sorted into one folder per class."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from configs import Configs, UserError, define, run_script
from utils import (
    IMAGE_COLUMN,
    IMAGE_SUFFIXES,
    LABEL_SEPARATOR,
    check_data,
    get_bad_rows,
    join_names,
    make_image_table,
    report_findings,
    walk_visible,
    write_csv,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass
class FolderConfigs(Configs):
    """The options of this script, beside those of every script."""

    folder_path: str = define("./data/images", "The folder that holds one folder per class")
    write_path: str = define("./data/all_data.csv", "The CSV file to write")
    verify: bool = define(False, "Decode every image, find what is wrong with it, and list that in data_report.csv")


def main(configs: FolderConfigs) -> dict:
    """Lists the images, writes the table and prints the counts; returns the image count of each class."""
    import pandas as pd

    class_names = list_class_folders(configs.folder_path)
    images, others = list_images(configs.folder_path, class_names)
    counts = {name: len(images[name]) for name in class_names}
    rows = [(path, name) for name in class_names for path in images[name]]
    report_others(others)
    if not rows:
        raise UserError(f"The class folders of {configs.folder_path} hold no image ({', '.join(IMAGE_SUFFIXES)}).")
    table = pd.DataFrame(rows, columns=[IMAGE_COLUMN, configs.csv_label_column])
    if configs.verify:
        table = leave_out_bad_images(table, configs)
        counts |= table[configs.csv_label_column].value_counts().reindex(class_names, fill_value=0).to_dict()
    write_csv(configs.write_path, table)
    for name, count in counts.items():
        print(f"{name}: {count} images" if count else f"{name}: no images, so it is not in the table")
    print(f"Wrote {len(table)} rows to {configs.write_path}")
    return counts


def leave_out_bad_images(table: pd.DataFrame, configs: FolderConfigs) -> pd.DataFrame:
    """Checks every image, writes data_report.csv beside the table, and returns the rows that can be used.

    The report's row numbers count all images, those that are left out as well.

    Raises:
        UserError: there are errors; of images that cannot be read only where `skip_bad_images` is not set.
    """
    findings = check_data(
        [make_image_table("", configs.write_path, table, configs.csv_label_column)],
        multi_label=False,
        mode="full",
        image_size=configs.image_target_size[:2],
        max_pixels=configs.max_image_pixels,
        workers=configs.generator_workers,
    )
    report_findings(findings, os.path.dirname(configs.write_path), configs.skip_bad_images)
    bad_rows = get_bad_rows(findings)[configs.write_path]
    if len(bad_rows) == len(table):
        raise UserError(f"None of the {len(table)} images of {configs.folder_path} can be read.")
    return table.drop(index=[row - 2 for row in bad_rows])


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


def list_images(folder_path: str, class_names: list[str]) -> tuple[dict[str, list[str]], list[str]]:
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


if __name__ == "__main__":
    run_script(main, FolderConfigs)
