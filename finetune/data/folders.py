"""Tables from folders: one folder per class, and one folder of these per set."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from configs import Configs
from finetune.core.files import IMAGE_SUFFIXES, lies_around, list_visible, report_closed, write_csv
from finetune.core.labels import LABEL_SEPARATOR, clean_label, clean_labels
from finetune.core.options import UserError
from finetune.core.texts import join_names, show_count
from finetune.data.data_check import check_tables
from finetune.data.findings import get_bad_rows
from finetune.data.headers import reads_heic
from finetune.data.splitting import SET_FILES, format_counts, tabulate_counts, warn_of_stale_sets
from finetune.data.tables import IMAGE_COLUMN, make_image_table

SET_WORDS = {"train": "training", "training": "training", "test": "testing", "testing": "testing"}
SET_WORDS |= dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "validation")
SET_OPTIONS = {"training": "train_csv", "validation": "validation_csv", "testing": "test_csv"}
EXPECTED = "Expected train and val, test or both, with class folders inside, and no other folder"


class Photos(NamedTuple):
    """The contents of a folder of class folders, sorted.

    Attributes:
        images: paths of each class folder's images, subfolders included, by the folder's name.
        others: files in class folders without the ending of an image.
        loose: files outside the class folders.
        closed: links and folders that lead to no file.
    """

    images: dict[str, list[str]]
    others: list[str]
    loose: list[str]
    closed: list[str]


def list_photos(folder_path: str) -> Photos:
    """Lists the images under each visible folder in a folder; linked folders are followed.

    Raises:
        UserError: the folder cannot be read, contains no folder, or a name in it is no text.
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
        raise UserError(f"{folder_path} contains no folders. Expected one folder per class, each with its images.")
    return photos


def refuse_a_level_above(images: dict[str, list[str]], folder_path: str) -> None:
    """Raises UserError for a folder that only contains the folder of class folders, as archives often do."""
    filled = [name for name, paths in images.items() if paths]
    if len(filled) != 1:
        return
    only = os.path.join(os.path.normpath(folder_path), filled[0])
    below = sorted({os.path.relpath(path, only).partition(os.sep)[0] for path in images[filled[0]]})
    if any(os.path.isfile(os.path.join(only, name)) for name in below):
        print(f"Warning: {only} is the only class. train.py expects at least two to tell apart.")
        return
    raise UserError(
        f"{folder_path}: expected one folder per class. Only {filled[0]} contains images, in the folders "
        f"{join_names(below)}. Set --folder_path {only}."
    )


def report_left_out(photos: Photos) -> None:
    """Prints which files and links were left out."""
    if photos.others:
        number = show_count(len(photos.others), "file")
        print(f"Left out {number} without the ending of an image: {join_names(photos.others)}")
    if photos.loose:
        print(f"Left out {show_count(len(photos.loose), 'file')} outside the class folders: {join_names(photos.loose)}")
    report_closed(photos.closed)


def report_unread_heic(paths: Sequence[str]) -> None:
    """Prints how many images are HEIC if the package that reads them is not installed."""
    found = [path for path in paths if path.lower().endswith((".heic", ".heif"))]
    if found and not reads_heic():
        print(
            f"{show_count(len(found), 'HEIC image')} cannot be read without another package: pip install pillow-heif."
        )


def tabulate_images(images: dict[str, list[str]], label_column: str, folder_path: str) -> pd.DataFrame:
    """Returns a table with the path of each image and, in `label_column`, its class; UserError if there is none."""
    for name in images:
        if LABEL_SEPARATOR in name:
            raise UserError(
                f"The folder name {name} contains '{LABEL_SEPARATOR}', which separates labels. Rename the folder."
            )
        if not clean_label(name):
            raise UserError(f"The folder name {name!a} has no visible character. Rename the folder.")
    rows = [(path, name) for name, paths in images.items() for path in paths]
    if not rows:
        raise UserError(f"The class folders of {folder_path} contain no image ({', '.join(IMAGE_SUFFIXES)}).")
    report_unread_heic([path for path, _ in rows])
    paths, names = zip(*rows, strict=True)
    return pd.DataFrame({IMAGE_COLUMN: paths, label_column: clean_labels(names, folder_path)})


def leave_out_bad_images(
    tables: dict[str, pd.DataFrame], set_names: Sequence[str], configs: Configs, multi_label: bool = False
) -> dict[str, pd.DataFrame]:
    """Checks every image, writes data_report.csv next to the tables, and returns these without the bad rows.

    These are images with two labels and, with `skip_bad_images`, those that cannot be read. Other errors are raised.
    The report's row numbers count all images.

    Args:
        tables: by the CSV file to write each to.
        set_names: of the tables; empty for a single one.
        configs: the options of every script.
        multi_label: whether a label may hold several class names.
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


def find_set_name(folder: str) -> str:
    """Returns the key of `SET_FILES` that a folder's name means, such as `Val` or `train2017`; else an empty text."""
    words = re.sub(r"[\W\d_]", "", folder.casefold())
    return SET_WORDS.get(re.sub(r"(?<=.)(set|data|images|split)$", "", words), "")


def find_set_folders(photos: Photos, folder_path: str) -> dict[str, str]:
    """Returns the folder of each set by its name, training first; empty if the folders are classes.

    Raises:
        UserError: some folders are sets, but one is missing, doubled, or has no class folders.
    """
    filled = [name for name, paths in photos.images.items() if paths]
    named = [name for name in filled if find_set_name(name)]
    own = {name: os.path.normpath(os.path.join(folder_path, name)) for name in named}
    nested = [name for name in named if any(os.path.dirname(path) != own[name] for path in photos.images[name])]
    found = {find_set_name(name): name for name in named}
    others = [name for name in filled if name not in named]
    # A single folder with such a name is a class, such as photos of trains.
    if (others and len(found) < 2) or not (nested or len(found) > 1) or (others and not nested):
        return {}
    if others:
        fault = f"{join_names(named)} have names of sets, but {join_names(others)} contain images too"
        remedy = "Move the others elsewhere, or rename the folders that are classes"
    elif len(found) < len(named):
        fault, remedy = f"{join_names(named)}: two of them mean the same set", "Join or rename them"
    elif flat := [name for name in named if name not in nested]:
        fault = f"{join_names(flat)} contain images without class folders, hence without labels"
        remedy = (
            "Move them elsewhere (predict.py --input reads such a folder), give a table of labels by --table_path, or "
            "rename them if they are classes"
        )
    elif "training" not in found or len(found) == 1:
        fault = f"there is no {'training set' if 'training' not in found else 'other set'}, only {join_names(named)}"
        remedy = f"Set --folder_path {shlex.quote(os.path.join(folder_path, named[0]))}, and split its table"
    else:
        return {name: _find_inmost(os.path.join(folder_path, found[name])) for name in SET_FILES if name in found}
    raise UserError(f"{folder_path}: {fault}. {EXPECTED}. {remedy}.")


def _find_inmost(folder: str) -> str:
    """Returns a set's folder, or the only folder in it if both mean the same set, as in train/train."""
    photos = list_photos(folder)
    filled = [name for name, paths in photos.images.items() if paths]
    if len(filled) == 1 and find_set_name(filled[0]) == find_set_name(os.path.basename(folder)):
        return _find_inmost(os.path.join(folder, filled[0]))
    return folder


def write_sets(folders: dict[str, str], beside: Photos, configs: Configs, write_path: str, verify: bool) -> dict:
    """Writes the table of each set; prints the counts and the next command.

    Args:
        folders: from `find_set_folders`.
        beside: the contents of the folder around them; its files are left out.
        configs: the options of every script.
        write_path: the tables go into its folder.
        verify: whether to decode every image.

    Returns:
        The image count of each class in each set.
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
    print(f"Kept the split into {', '.join(os.path.join(folder, '') for folder in folders.values())}.")
    class_names = sorted({clean_label(name) for photos in found.values() for name in photos.images})
    labels = dict(zip(folders, (table[label_column] for table in tables.values()), strict=True))
    counts = tabulate_counts(labels, class_names, multi_label=False)
    print(format_counts(counts))
    warn_of_gaps(counts)
    for path, table in tables.items():
        print(f"Wrote {show_count(len(table), 'row')} to {path}")
    warn_of_stale_sets(tables)
    print(describe_next_step(paths, label_column))
    return counts.to_dict()


def warn_of_gaps(counts: pd.DataFrame) -> None:
    """Prints which classes have no image in a set, or in none, by a table with a row per class and a column per set."""
    empty = counts.sum(axis=1) == 0
    if empty.any():
        print(f"No images, so in no table: {join_names([*counts.index[empty]])}")
    unknown = ~empty & (counts["training"] == 0)
    if unknown.any():
        print(
            f"Warning: other sets have images of {join_names([*counts.index[unknown]])}, training has none: train.py "
            "cannot use them. Move or drop them."
        )
    for set_name in counts.columns.drop("training"):
        if names := [*counts.index[~empty & ~unknown & (counts[set_name] == 0)]]:
            print(f"Warning: the {set_name} set has no image of {join_names(names)}.")


def describe_next_step(paths: dict[str, str], label_column: str) -> str:
    """Returns the command that trains on the tables of sets, with the options that are not their defaults."""
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
            "There is no test set. test.py needs one: set --test_csv to a table of other images, or to "
            f"{shlex.quote(paths['validation'])}, whose metrics are optimistic, since it selects the best model."
        )
    return "\n".join(lines)
