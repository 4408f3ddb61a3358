"""Writes a CSV file (path,class) from a folder of photos sorted into one folder per class."""

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
    """Lists the images, writes the table and prints the counts; returns the image count of each class."""
    # Imported here, so that --help does not wait for pandas.
    from finetune.class_folders import (
        leave_out_bad_images,
        list_class_folders,
        list_images,
        report_others,
        tabulate_images,
    )
    from finetune.files import write_csv

    class_names = list_class_folders(configs.folder_path)
    images, others = list_images(configs.folder_path, class_names)
    counts = {name: len(images[name]) for name in class_names}
    report_others(others)
    table = tabulate_images(images, configs.csv_label_column, configs.folder_path)
    if configs.verify:
        table = leave_out_bad_images(table, configs.folder_path, configs.write_path, configs)
        counts |= table[configs.csv_label_column].value_counts().reindex(class_names, fill_value=0).to_dict()
    write_csv(configs.write_path, table)
    for name, count in counts.items():
        print(f"{name}: {count} images" if count else f"{name}: no images, so it is not in the table")
    print(f"Wrote {len(table)} rows to {configs.write_path}")
    return counts


if __name__ == "__main__":
    run_script(main)
