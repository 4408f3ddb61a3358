"""Folders of photos that are divided into sets already, train/cat/1.jpg, as a table for each set."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable

import numpy as np
import pandas as pd

from configs import Configs
from finetune.class_folders import Photos, leave_out_bad_images, list_photos, report_left_out, tabulate_images
from finetune.files import write_csv
from finetune.labels import clean_label
from finetune.options import UserError
from finetune.splitting import SET_FILES, count_classes, format_counts, warn_of_stale_sets
from finetune.texts import join_names, show_count

SET_WORDS = {"train": "training", "training": "training", "test": "testing", "testing": "testing"}
SET_WORDS |= dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "validation")
SET_OPTIONS = {"training": "train_csv", "validation": "validation_csv", "testing": "test_csv"}
EXPECTED = "Expected train, val and test, or two of them with train, with class folders inside, and no other folder"


def find_set_name(folder: str) -> str:
    """Returns the set that a folder's name means, a key of `SET_FILES`: `Val`, `test_set`, `train2017`; or nothing."""
    words = re.sub(r"[\W\d_]", "", folder.casefold())
    return SET_WORDS.get(re.sub(r"(?<=.)(set|data|images|split)$", "", words), "")


def find_set_folders(photos: Photos, folder_path: str) -> dict[str, str]:
    """Tells which folders are sets, with class folders inside, and not classes.

    Args:
        photos: what `folder_path` holds.
        folder_path: the folder.

    Returns:
        The path of each set's folder, training first; empty where the folders are classes.

    Raises:
        UserError: some are sets, but not as they have to be.
    """
    filled = [name for name, paths in photos.images.items() if paths]
    named = [name for name in filled if find_set_name(name)]
    nested = [name for name in named if any(_has_class(path, folder_path, name) for path in photos.images[name])]
    found = {find_set_name(name): name for name in named}
    others = [name for name in filled if name not in named]
    # One folder of such a name beside others is a class: photos of trains.
    if (others and len(found) < 2) or not (nested or len(found) > 1) or (others and not nested):
        return {}
    if others:
        fault = f"{join_names(named)} are named as sets, but {join_names(others)} beside them hold images too"
        remedy = "Move the others elsewhere, or rename what are classes"
    elif len(found) < len(named):
        fault, remedy = f"{join_names(named)}: two of them mean the same set", "Join or rename them"
    elif flat := [name for name in named if name not in nested]:
        fault = f"{join_names(flat)} hold images without class folders, so that these have no labels"
        remedy = (
            "Move them elsewhere (predict.py --input reads such a folder), or name a table of labels by --table_path"
        )
        remedy += "; rename them where they are classes"
    elif "training" not in found or len(found) == 1:
        fault = f"there is no {'training set' if 'training' not in found else 'other set'} beside {join_names(named)}"
        remedy = (
            f"Give one set as --folder_path {shlex.quote(os.path.join(folder_path, named[0]))}, and split its table"
        )
    else:
        return {name: _find_inmost(os.path.join(folder_path, found[name])) for name in SET_FILES if name in found}
    raise UserError(f"{folder_path}: {fault}. {EXPECTED}. {remedy}.")


def _has_class(path: str, folder_path: str, name: str) -> bool:
    """Tells whether an image lies in a folder below that of its set."""
    return os.path.dirname(path) != os.path.normpath(os.path.join(folder_path, name))


def _find_inmost(folder: str) -> str:
    """Returns the folder of a set, or the only one in it where that has the same name: archives pack train/train."""
    photos = list_photos(folder)
    filled = [name for name, paths in photos.images.items() if paths]
    if len(filled) == 1 and find_set_name(filled[0]) == find_set_name(os.path.basename(folder)):
        return _find_inmost(os.path.join(folder, filled[0]))
    return folder


def write_sets(folders: dict[str, str], beside: Photos, configs: Configs, write_path: str, verify: bool) -> dict:
    """Writes the table of each set, and prints the counts and what to type next.

    Args:
        folders: of `find_set_folders`.
        beside: what lies beside the folders of the sets, which is left out.
        configs: the options of every script.
        write_path: receives the tables beside it.
        verify: whether to decode every image.

    Returns:
        The image count of each class in each set.

    Raises:
        UserError: there is an error in the images, or a name cannot be a class name.
    """
    found = {name: list_photos(folder) for name, folder in folders.items()}
    lists = zip(*[photos[1:] for photos in found.values()], strict=True)
    others, loose, closed = (sorted(path for paths in part for path in paths) for part in lists)
    report_left_out(Photos({}, others, sorted(beside.loose + loose), sorted({*beside.closed, *closed})))
    if empty := [name for name, images in beside.images.items() if not images]:
        print(f"Left out {len(empty)} folders without images: {join_names(empty)}")
    label_column = configs.csv_label_column
    paths = {name: os.path.join(os.path.dirname(write_path), SET_FILES[name]) for name in folders}
    tables = {
        paths[name]: tabulate_images(photos.images, label_column, folders[name]) for name, photos in found.items()
    }
    if verify:
        tables = leave_out_bad_images(tables, list(folders), configs)
    for path, table in tables.items():
        write_csv(path, table)
    print(f"Kept the split into {', '.join(map(_quote_folder, folders.values()))}: nothing is left to split.")
    counts = _count(tables, list(folders), _name_classes(found.values()))
    print(format_counts(counts))
    warn_of_gaps(counts)
    for path, table in tables.items():
        print(f"Wrote {show_count(len(table), 'row')} to {path}")
    warn_of_stale_sets(tables)
    print(describe_next_step(paths, label_column))
    return counts.to_dict()


def _name_classes(found: Iterable[Photos]) -> list[str]:
    """Returns the class names of the folders in all sets, sorted, those of empty ones included."""
    return sorted({clean_label(name) for photos in found for name in photos.images})


def warn_of_gaps(counts: pd.DataFrame) -> None:
    """Prints which classes have no image in a set, or in none, a line each kind.

    Args:
        counts: a row a class and a column a set.
    """
    empty = counts.sum(axis=1) == 0
    if empty.any():
        print(f"No images, so in no table: {join_names([*counts.index[empty]])}")
    unknown = ~empty & (counts["training"] == 0)
    if unknown.any():
        print(
            f"Warning: training has no image of {join_names([*counts.index[unknown]])}, other sets have: train.py "
            "cannot use those. Move or drop them."
        )
    for set_name in counts.columns.drop("training"):
        if names := [*counts.index[~empty & ~unknown & (counts[set_name] == 0)]]:
            print(f"Warning: the {set_name} set has no image of {join_names(names)}.")


def _quote_folder(folder: str) -> str:
    return os.path.join(folder, "")


def _count(tables: dict[str, pd.DataFrame], set_names: list[str], class_names: list[str]) -> pd.DataFrame:
    """Returns a table of image counts, a row a class and a column a set."""
    labels = pd.concat([table.iloc[:, 1] for table in tables.values()], ignore_index=True)
    ends = np.cumsum([len(table) for table in tables.values()])
    rows = np.split(np.arange(len(labels)), ends[:-1])
    return count_classes(labels, dict(zip(set_names, rows, strict=True)), class_names, multi_label=False)


def describe_next_step(paths: dict[str, str], label_column: str) -> str:
    """Returns the command that trains on tables of sets, with the options that are not their defaults, and what lacks.

    Args:
        paths: of the tables, by the set's name.
        label_column: the column with the labels.
    """
    defaults, words = Configs.defaults(), []
    for name, path in paths.items():
        default = defaults[SET_OPTIONS[name]]
        if not default or os.path.normpath(path) != os.path.normpath(default):
            words += [f"--{SET_OPTIONS[name]}", shlex.quote(path)]
    if label_column != defaults["csv_label_column"]:
        words += ["--csv_label_column", shlex.quote(label_column)]
    lines = [f"Next: {' '.join(['python train.py', *words])}"]
    if "testing" not in paths:
        lines.append(
            "There is no test set. train.py needs none; test.py does: give it --test_csv with a table of other images, "
            f"or {shlex.quote(paths['validation'])}, whose figures are optimistic, since it selects the best model."
        )
    return "\n".join(lines)
