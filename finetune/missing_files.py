"""Why a file that a table names is not there: blanks, backslashes, capitals, endings."""

from __future__ import annotations

import os
from collections.abc import Iterable

from finetune.files import IMAGE_SUFFIXES
from finetune.stores import is_url
from finetune.table_faults import MARKS_AROUND
from finetune.texts import show_text

ENDING_REMEDY = "add the ending, as make_csv_from_folders.py --table_path does"


def explain_missing(files: Iterable[str]) -> dict[str, str]:
    """Finds the files that are meant by names of files that do not exist.

    Each folder is listed once, and only those that should hold such a file.

    Args:
        files: that do not exist.

    Returns:
        What is wrong with a name and what to do, of each for which that can be told.
    """
    folders, found = {}, {}
    for file in files:
        if not is_url(file) and "\0" not in file and (reason := _explain(file, folders)):
            found[file] = f"does not exist, but {reason}"
    return found


def _explain(file: str, folders: dict[str, dict[str, list[str]]]) -> str:
    meant, steps = file, []
    if "\\" in meant and os.sep != "\\":
        meant = meant.replace("\\", "/")
        steps.append("write / for \\")
    plain = (
        "/".join(part.strip(MARKS_AROUND) for part in meant.split("/")) if os.sep == "/" else meant.strip(MARKS_AROUND)
    )
    if plain != meant:
        is_blank = plain == "/".join(part.strip() for part in meant.split("/"))
        meant = plain
        steps.append(f"remove the {'blanks' if is_blank else 'quotation marks'} around it")
    if not steps or not os.path.isfile(meant):
        folder, name = os.path.split(meant)
        if folder not in folders:
            folders[folder] = _list_by_name(folder)
        names = folders[folder].get(name.casefold(), [])
        other = not names and folders[folder].get(os.path.splitext(name)[0].casefold(), [])
        if not names and not (other and name.lower().endswith(IMAGE_SUFFIXES)):
            return ""
        steps.append(_tell_difference(name, names or other))
        meant = os.path.join(folder, (names or other)[0])
    return f"{show_text(os.path.normpath(meant))} does: {', '.join(steps)}"


def _tell_difference(name: str, names: list[str]) -> str:
    """Returns what to do about a name that stands for the first of some files, or for any of them."""
    if len(names) > 1:
        return f"write which of {len(names)} files it is"
    if os.path.splitext(names[0])[0].casefold() == name.casefold():
        return ENDING_REMEDY
    return "its capitals differ" if names[0].casefold() == name.casefold() else "its ending differs"


def _list_by_name(folder: str) -> dict[str, list[str]]:
    """Returns the images in a folder, sorted, by their names in small letters, with and without the ending."""
    found = {}
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        return found
    for name in names:
        if name.lower().endswith(IMAGE_SUFFIXES):
            for key in (name.casefold(), os.path.splitext(name)[0].casefold()):
                found.setdefault(key, []).append(name)
    return found
