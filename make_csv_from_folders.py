"""Writes a CSV file (path,class) from a folder with one subfolder per class, or from a table of labels.

If the folder contains train/, val/ and test/ with class folders, it keeps this split and writes one CSV file for each.
"""

from __future__ import annotations

import dataclasses
import os

from configs import Configs
from finetune.core.options import define
from finetune.core.scripts import run_script, script


def separator_fault(separator: str) -> str:
    """Returns what is wrong with a value of `label_separator`; empty if nothing is."""
    return "" if separator else "expected a separator, such as '|'. Received: ''"


@dataclasses.dataclass
class FolderConfigs(Configs):
    """The options of this script in addition to the shared ones."""

    folder_path: str = define("./data/images", "Folder with one subfolder per class, or with the images of table_path")
    write_path: str = define("./data/all_data.csv", "CSV file to write")
    verify: bool = define(False, "Decode every image and list faults in data_report.csv")
    table_path: str = define("", "Table that labels the images in folder_path; empty takes the subfolders as classes")
    image_column: str = define(
        "", "Column of table_path with the image names; empty finds it", needs=("table_path", "table_path")
    )
    label_separator: str = define(
        "$",
        "Separator between the labels of an image in table_path",
        check=separator_fault,
        needs=("multi_label_classification", "multi_label_classification True"),
    )


@script
def main(configs: FolderConfigs) -> dict:
    """Writes the table; prints and returns the number of images per class, for each set if there are several."""
    # Imported here, so that --help does not wait for pandas.
    from finetune.core.files import check_folder, write_csv
    from finetune.core.labels import clean_label
    from finetune.core.texts import show_count
    from finetune.data import folders
    from finetune.data.label_tables import TableForm, convert_label_table
    from finetune.data.splitting import format_class_counts, refuse_own_input
    from finetune.data.tables import count_classes

    label_column, write_path = configs.csv_label_column, configs.write_path
    check_folder(os.path.dirname(write_path) or os.curdir, "write_path")
    class_names, multi_label = [], bool(configs.table_path) and configs.multi_label_classification
    if configs.table_path:
        refuse_own_input(configs.table_path, {"": write_path})
        form = TableForm(
            label_column,
            "csv_label_column" in configs.given,
            configs.image_column,
            multi_label,
            configs.label_separator,
        )
        table = convert_label_table(configs.table_path, configs.folder_path, form, configs.skip_bad_images)
    else:
        photos = folders.list_photos(configs.folder_path)
        if sets := folders.find_set_folders(photos, configs.folder_path):
            return folders.write_sets(sets, photos, configs, write_path, configs.verify)
        folders.refuse_a_level_above(photos.images, configs.folder_path)
        folders.report_left_out(photos)
        class_names = [clean_label(name) for name in photos.images]
        table = folders.tabulate_images(photos.images, label_column, configs.folder_path)
    if configs.verify:
        table = folders.leave_out_bad_images({write_path: table}, [""], configs, multi_label)[write_path]
    counts = count_classes(table[label_column], multi_label, class_names)
    try:
        write_csv(write_path, table)
    finally:
        print(format_class_counts(counts))
    print(f"Wrote {show_count(len(table), 'row')} to {write_path}")
    return counts


if __name__ == "__main__":
    run_script(main)
