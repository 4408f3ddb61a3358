"""Measures the scripts that read tables, on tables of any length, each in its own process.

python benchmarks/tables.py NAME ROWS    prints seconds and peak memory in MiB
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from finetune.data.tables import encode_labels, find_class_names, read_table

CLASSES = [f"class_{number:02d}" for number in range(100)]


def write_table(path: str, rows: int, multi_label: bool) -> None:
    """Writes a table of `rows` images of 100 classes, with two labels each if `multi_label`."""
    labels = np.array(CLASSES)[np.random.default_rng(0).integers(0, 100, (rows, 2))]
    with open(path, "w", encoding="utf-8") as file:
        file.write("path,class\n")
        for row, (first, second) in enumerate(labels.tolist()):
            file.write(f"{first}/photo_{row:07d}.jpg,{first}{'$' + second if multi_label else ''}\n")


def list_folders(folder: str, rows: int) -> float:
    """Runs make_csv_from_folders on `rows` files in 100 folders."""
    import make_csv_from_folders

    for name in CLASSES:
        os.mkdir(f"{folder}/{name}")
        for row in range(rows // 100):
            # Links to few files: only the listing is measured.
            source = f"{folder}/{name}/photo_{row // 10_000 * 10_000:07d}.jpg"
            target = f"{folder}/{name}/photo_{row:07d}.jpg"
            os.link(source, target) if row % 10_000 else Path(target).touch()
    start = time.perf_counter()
    configs = make_csv_from_folders.FolderConfigs(folder_path=folder, write_path=f"{folder}/all_data.csv")
    make_csv_from_folders.main(configs)
    return time.perf_counter() - start


def split(folder: str, rows: int, multi_label: bool = False) -> float:
    """Runs split_train_test."""
    import split_train_test

    write_table(f"{folder}/all_data.csv", rows, multi_label)
    start = time.perf_counter()
    split_train_test.main(
        # The images do not exist: only the table is measured.
        split_train_test.SplitConfigs(
            csv_path=f"{folder}/all_data.csv", multi_label_classification=multi_label, verify_data="off"
        )
    )
    return time.perf_counter() - start


def parse_and_construct(folder: str, rows: int, multi_label: bool = False) -> float:
    """Reads a table, finds the classes, encodes the labels, and builds the generator and its first order."""
    import generator

    path = f"{folder}/all_data.csv"
    write_table(path, rows, multi_label)
    start = time.perf_counter()
    table = read_table(path, "class", multi_label)
    labels = encode_labels(table["class"], find_class_names(table["class"], multi_label), multi_label, path)
    generator.AugmentedImageSequence(list(table["path"]), labels, (224, 224), 16, shuffle=True)._order()
    return time.perf_counter() - start


TASKS = {
    "make_csv_from_folders": list_folders,
    "split_train_test": split,
    "split_train_test, multi-label": lambda folder, rows: split(folder, rows, multi_label=True),
    "labels and generator": parse_and_construct,
    "labels and generator, multi-label": lambda folder, rows: parse_and_construct(folder, rows, multi_label=True),
}


def main() -> None:
    """Measures one task."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        seconds = TASKS[sys.argv[1]](folder, int(sys.argv[2]))
    print(seconds, largest_memory())


def largest_memory() -> float:
    """Returns this process's peak memory in MiB; `getrusage` would include that of the parent before the fork."""
    line = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) / 1024


if __name__ == "__main__":
    main()
