"""Tables from folders: one folder per class, and one folder of these per set."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from configs import Configs
from finetune.core.files import IMAGE_SUFFIXES, lies_around, list_visible, report_closed, write_csv
from finetune.core.labels import clean_label, clean_labels
from finetune.core.options import UserError
from finetune.core.texts import join_names, show_count
from finetune.data.data_check import check_tables
from finetune.data.findings import get_bad_rows
from finetune.data.headers import reads_heic
from finetune.data.splitting import SET_FILES, count_classes, format_counts, warn_of_stale_sets
from finetune.data.tables import IMAGE_COLUMN, LABEL_SEPARATOR, make_image_table

SET_WORDS = {"train": "training", "training": "training", "test": "testing", "testing": "testing"}
SET_WORDS |= dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "validation")
SET_OPTIONS = {"training": "train_csv", "validation": "validation_csv", "testing": "test_csv"}
EXPECTED = "Expected train, val and test, or two of them with train, with class folders inside, and no other folder"


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
            f"or {shlex.quote(paths['validation'])}, whose metrics are optimistic, since it selects the best model."
        )
    return "\n".join(lines)
