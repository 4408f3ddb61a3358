"""Why a file that a table names is not there: blanks, backslashes, drives, capitals, accents, endings."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable

from finetune.files import IMAGE_SUFFIXES
from finetune.labels import clean_label, show_difference
from finetune.stores import is_url
from finetune.table_faults import MARKS_AROUND
from finetune.texts import show_text

ENDING_REMEDY = "add the ending, as make_csv_from_folders.py --table_path does"
DRIVE = re.compile(r"(?:^|(?<=/))([A-Za-z]:)/")
HOME = re.compile(r"(?:^|(?<=/))~/")


def find_meant(path: str) -> str:
    """Returns the path of the file or folder that a path means which does not exist; empty if there is none."""
    if not path or "\0" in path or is_url(path) or os.path.exists(path):
        return ""
    meant = _respell(path)[0]
    drive = DRIVE.search(meant) if os.sep == "/" else None
    meant = (drive and _leave_out_drive(meant, drive)) or meant
    folder, _ = _Disk().find_folder(os.path.dirname(meant))
    key = _make_key(os.path.basename(meant))
    names = [name for name in _list_sorted(folder) if _make_key(name) == key]
    found = os.path.join(folder, names[0]) if len(names) == 1 else meant
    return found if os.path.exists(found) else ""


class _Disk:
    """What folders hold; each is listed once."""

    def __init__(self) -> None:
        self._images: dict[str, dict[str, list[str]]] = {}
        self._folders: dict[str, tuple[str, list[str]]] = {}

    def find_images(self, folder: str, key: str) -> list[str]:
        """Returns the images in a folder, sorted, whose name has this key, with or without the ending."""
        if folder not in self._images:
            found = self._images[folder] = {}
            for name in _list_sorted(folder):
                if name.lower().endswith(IMAGE_SUFFIXES):
                    for one in (_make_key(name), _make_key(os.path.splitext(name)[0])):
                        found.setdefault(one, []).append(name)
        return self._images[folder].get(key, [])

    def find_folder(self, folder: str) -> tuple[str, list[str]]:
        """Returns the folder that a path means, and how its spelling differs; the path itself if there is none."""
        if folder not in self._folders:
            above, name = os.path.split(folder)
            if os.path.isdir(folder or os.curdir) or not name:
                return folder, []
            meant, steps = self.find_folder(above)
            names = [one for one in _list_sorted(meant) if _make_key(one) == _make_key(name)]
            names = [name] if name in names else names
            path, differs = os.path.join(meant, *names), names != [name]
            if len(names) == 1 and os.path.isdir(path):
                self._folders[folder] = path, steps + ([_tell_difference(name, names)] if differs else [])
            else:
                self._folders[folder] = folder, []
        return self._folders[folder]


def explain_missing(files: Iterable[str]) -> dict[str, str]:
    """Finds the files that are meant by names of files that do not exist.

    Each folder is listed once, and only those that should hold such a file.

    Args:
        files: that do not exist.

    Returns:
        What is wrong with a name and what to do, of each for which that can be told.
    """
    disk, found = _Disk(), {}
    for file in files:
        if not is_url(file) and "\0" not in file and (reason := _explain(file, disk)):
            found[file] = f"does not exist{reason}"
    return found


def _explain(file: str, disk: _Disk) -> str:
    meant, steps = _respell(file)
    drive = DRIVE.search(meant) if os.sep == "/" else None
    if drive and (found := _leave_out_drive(meant, drive)):
        meant = found
        steps.append(f"its path here has no {drive[1]}")
    if not steps or not os.path.isfile(meant):
        folder, differences = disk.find_folder(os.path.dirname(meant))
        name = os.path.basename(meant)
        if not differences or not os.path.isfile(os.path.join(folder, name)):
            names = disk.find_images(folder, _make_key(name))
            other = not names and disk.find_images(folder, _make_key(os.path.splitext(name)[0]))
            if not names and not (other and name.lower().endswith(IMAGE_SUFFIXES)):
                return f": {drive[1]} is a drive of Windows. Write paths below image_directory" if drive else ""
            differences = [*differences, _tell_difference(name, names or other)]
            name = (names or other)[0]
        steps += differences
        meant = os.path.join(folder, name)
    return f", but {show_text(os.path.normpath(meant))} does: {', '.join(dict.fromkeys(steps))}"


def _respell(file: str) -> tuple[str, list[str]]:
    """Returns a path with the separators, the home folder and without the marks that are foreign here, and why."""
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
    if home := HOME.search(meant):
        meant = os.path.expanduser(meant[home.start() :])
        steps.append("write the home folder for ~")
    return meant, steps


def _leave_out_drive(path: str, drive: re.Match[str]) -> str:
    """Returns the file that a path with a drive of Windows means: under WSL's mount, or below here by its end."""
    beginning, parts = path[: drive.start()], path[drive.end() :].split("/")
    mounted = os.path.join("/mnt", drive[1][0].lower(), *parts)
    ends = [os.path.join(*parts[start:]) for start in range(len(parts))]
    tried = [mounted, *(os.path.join(folder, end) for end in ends for folder in dict.fromkeys((beginning, "")))]
    return next((one for one in tried if os.path.isfile(one)), "")


def _tell_difference(name: str, names: list[str]) -> str:
    """Returns what to do about a name that stands for the first of some files, or for any of them."""
    if len(names) > 1:
        return f"write which of {len(names)} files it is"
    if unicodedata.normalize("NFC", names[0]) == unicodedata.normalize("NFC", name):
        return "its accents are encoded otherwise (NFC or NFD)"
    if clean_label(names[0]) == clean_label(name):
        return f"'{show_difference(name)}' and '{show_difference(names[0])}' differ by invisible characters"
    if _make_key(names[0]) == _make_key(name):
        return "its capitals differ"
    return ENDING_REMEDY if _make_key(os.path.splitext(names[0])[0]) == _make_key(name) else "its ending differs"


def _make_key(name: str) -> str:
    """Returns what names have in common that people take for the same."""
    return clean_label(name).casefold()


def _list_sorted(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or os.curdir))
    except OSError:
        return []
