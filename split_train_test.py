"""Splits a CSV file of images into training_set.csv and testing_set.csv, with every class in both."""

from __future__ import annotations

import dataclasses
import os

from configs import Configs
from finetune.core.options import UserError, define
from finetune.core.scripts import run_script, script


@dataclasses.dataclass
class SplitConfigs(Configs):
    """The options of this script, in addition to those of every script."""

    csv_path: str = define("./data/all_data.csv", "CSV file to split")
    write_folder: str = define("", "Folder for the tables; empty puts them next to csv_path")
    test_split_fraction: float = define(0.2, "Share of each class for the test set", above=0, below=1)
    validation_split_fraction: float = define(
        0.0, "Share of each class for validation_set.csv; 0 writes none", at_least=0, below=1
    )
    group_column: str = define(
        "", "Column, such as patient or video, whose equal values stay in one set; empty uses a column named group"
    )
    verify: bool = define(
        False, "Check every image and find all copies without a time limit, and list faults in data_report.csv"
    )
    shuffle: bool = define(True, "Draw the images at random; False takes the last ones of each class")


@script
def main(configs: SplitConfigs) -> dict:
    """Splits, writes and prints the counts; returns the image count of each class in each set."""
    # Imported here, so that --help does not wait for pandas.
    import numpy as np

    from finetune.core.files import check_folder, write_csv
    from finetune.core.texts import show_count
    from finetune.data import splitting
    from finetune.data.tables import find_class_names
    from finetune.reporting.label_page import write_contradictions

    csv_path, multi_label = configs.csv_path, configs.multi_label_classification
    fractions = {"testing": configs.test_split_fraction, "validation": configs.validation_split_fraction}
    fractions["training"] = 1 - sum(fractions.values())
    if fractions["training"] <= 0:
        raise UserError("test_split_fraction and validation_split_fraction leave nothing to train on. Lower them.")
    folder = configs.write_folder or os.path.dirname(csv_path)
    written = {name: os.path.join(folder, file) for name, file in splitting.SET_FILES.items() if fractions[name]}
    splitting.refuse_own_input(csv_path, written)
    check_folder(folder or os.curdir, "write_folder")
    mode = "full" if configs.verify else configs.verify_data
    table, groups = splitting.read_rows(csv_path, configs.group_column, mode, configs, write_contradictions, folder)
    labels = table[configs.csv_label_column]
    rng = np.random.default_rng(configs.random_seed) if configs.shuffle else None
    if groups is None:
        sets = splitting.split_rows(labels.to_numpy(object), fractions, multi_label, rng)
    else:
        sets = splitting.split_groups(labels.to_numpy(object), groups, fractions, multi_label, rng)
        splitting.warn_of_other_fractions(sets, fractions)
    of_sets = {name: labels.iloc[rows] for name, rows in sets.items()}
    counts = splitting.tabulate_counts(of_sets, find_class_names(labels, multi_label), multi_label)
    empty = [name for name, rows in sets.items() if not len(rows)]
    for name, path in written.items() if not empty else ():
        write_csv(path, table.iloc[sets[name]])
    print(splitting.format_counts(counts))
    splitting.warn_of_missing_classes(counts)
    if empty:
        raise UserError(f"{csv_path} has too few images: the {empty[0]} set would be empty. Add images.")
    for name, path in written.items():
        print(f"Wrote {show_count(len(sets[name]), 'row')} to {path}")
    splitting.warn_of_stale_sets(written.values())
    return counts.to_dict()


if __name__ == "__main__":
    run_script(main)
