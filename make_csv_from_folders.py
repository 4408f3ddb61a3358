"""Writes a CSV file (path,class) from a folder of photos sorted into one folder per class, or from a table of labels.

Where the folder holds train/, val/ and test/ with class folders inside, it keeps that split and writes a CSV file each.
"""

from __future__ import annotations

import dataclasses

from configs import Configs
from finetune.options import define, run_script


@dataclasses.dataclass
class FolderConfigs(Configs):
    """The options of this script, beside those of every script."""

    folder_path: str = define("./data/images", "The folder that holds one folder per class")
    write_path: str = define("./data/all_data.csv", "The CSV file to write")
    verify: bool = define(False, "Decode every image, find what is wrong with it, and list that in data_report.csv")


def main(configs: FolderConfigs) -> dict:
    """Lists the images, writes the table and prints the counts.

    Returns:
        The image count of each class; of a split that is kept, of each class in each set.
    """
    # Imported here, so that --help does not wait for pandas.
    from finetune.class_folders import leave_out_bad_images, list_photos, report_left_out, tabulate_images
    from finetune.files import write_csv
    from finetune.set_folders import find_set_folders, write_sets

    photos = list_photos(configs.folder_path)
    if folders := find_set_folders(photos, configs.folder_path):
        return write_sets(folders, photos, configs, configs.write_path, configs.verify)
    report_left_out(photos)
    table = tabulate_images(photos.images, configs.csv_label_column, configs.folder_path)
    if configs.verify:
        table = leave_out_bad_images({configs.write_path: table}, [""], configs)[configs.write_path]
    write_csv(configs.write_path, table)
    counts = table[configs.csv_label_column].value_counts().reindex(list(photos.images), fill_value=0).to_dict()
    for name, count in counts.items():
        print(f"{name}: {count} images" if count else f"{name}: no images, so it is not in the table")
    print(f"Wrote {len(table)} rows to {configs.write_path}")
    return counts


if __name__ == "__main__":
    run_script(main)
