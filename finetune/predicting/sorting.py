"""Photos sorted into a folder per answer, for `sort_into` of predict.py."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence

from finetune.core.files import atomic_path, check_folder
from finetune.core.options import UserError
from finetune.core.texts import show_count, show_progress
from finetune.data.stores import is_url, read_url

# For multi-label photos without a label.
NO_LABEL = "no label"
# Characters that a system or a shell takes for something else in the name of a folder.
SPECIAL = re.compile(r'[\\/:*?"<>|\x00-\x1f]')


def check_sort_into(folder: str, given: str) -> None:
    """Raises UserError if photos cannot be sorted into a folder; called before any work.

    Args:
        folder: to be made; an empty one may exist.
        given: the option `input`.
    """
    if os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"sort_into: expected a new or an empty folder. Received: {folder}, which holds files.")
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"sort_into: expected a folder. Received: {folder}, which is a file.")
    inside = os.path.join(os.path.realpath(given), "")
    if os.path.isdir(given) and os.path.join(os.path.realpath(folder), "").startswith(inside):
        raise UserError(f"sort_into: {folder} is in the input folder {given}. Choose a folder outside.")
    check_folder(os.path.dirname(os.path.abspath(folder)), "sort_into")


def sort_photos(folder: str, paths: Sequence[str], answers: Sequence[Sequence[str]], links: bool) -> int:
    """Copies or links photos into a folder per answer; the folder is complete or does not exist.

    Args:
        folder: as `check_sort_into` accepts it.
        paths: of the photos, or URLs.
        answers: of each photo, any number of them: a photo of two labels is in two folders.
        links: symbolic links instead of copies; photos with a URL are always copied.

    Returns:
        The number of sorted photos.

    Raises:
        UserError: a file cannot be read or written.
    """
    names, folders = name_copies(paths), name_folders(sorted({name for names in answers for name in names}))
    with atomic_path(folder) as temporary, show_progress(len(paths), "Sorting", delay=1) as progress:
        os.makedirs(temporary)
        for path, name, chosen in zip(paths, names, answers, strict=True):
            for answer in chosen:
                _place(path, os.path.join(temporary, folders[answer], name), links)
            progress.update(1)
    number = sum(bool(chosen) for chosen in answers)
    print(f"Sorted {show_count(number, 'photo')} into {folder}")
    return number


def _place(path: str, place: str, links: bool) -> None:
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if is_url(path):
            with open(place, "wb") as file:
                file.write(read_url(path))
        elif links:
            os.symlink(os.path.abspath(path), place)
        else:
            shutil.copyfile(path, place)
    except OSError as error:
        reason = f"{error.strerror}. Check it and the space on the disk, or choose another folder."
        raise UserError(f"sort_into: cannot copy {path}: {reason}") from error


def name_copies(paths: Sequence[str]) -> list[str]:
    """Returns a different relative path for each photo: its own below the folder that all have in common."""
    plain = [os.path.basename(path.split("?")[0]) if is_url(path) else os.path.abspath(path) for path in paths]
    parents = [os.path.dirname(path) for path in plain if os.path.isabs(path)]
    try:
        root = os.path.commonpath(parents) if parents else ""
    except ValueError:
        # On two drives.
        root = ""
    taken, names = set(), []
    for path in plain:
        name = os.path.relpath(path, root) if root and os.path.isabs(path) else os.path.basename(path)
        stem, suffix = os.path.splitext(name or "photo")
        number = 1
        while name in taken or not name:
            number += 1
            name = f"{stem} {number}{suffix}"
        taken.add(name)
        names.append(name)
    return names


def name_folders(answers: Sequence[str]) -> dict[str, str]:
    """Returns a different folder name for each answer, with which no system has difficulties."""
    folders: dict[str, str] = {}
    for answer in answers:
        plain = SPECIAL.sub("_", answer).strip(" .") or "_"
        name, number = plain, 1
        while name.casefold() in {taken.casefold() for taken in folders.values()}:
            number += 1
            name = f"{plain} {number}"
        folders[answer] = name
    return folders
