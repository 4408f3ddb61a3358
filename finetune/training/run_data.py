"""The data of a run: finding its tables from anywhere, and the list of the images that it was trained on."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd

from configs import Configs
from finetune.core.files import lies_around, write_csv
from finetune.core.options import UserError
from finetune.core.texts import join_names
from finetune.data.stores import hash_file, is_url
from finetune.models.description import CONFIGS_FILE

DATA_FILE = "data.json"
IMAGES_FILE = "trained_images.csv"
# The options in configs.json that lead to a run's data.
TABLE_OPTIONS = ("train_csv", "validation_csv", "test_csv")
READING_OPTIONS = ("image_directory", "csv_label_column")
DATA_OPTIONS = (*TABLE_OPTIONS, *READING_OPTIONS)
PATH_OPTIONS = (*TABLE_OPTIONS, "image_directory", "save_model_path")
SAMPLE_BYTES = 4096
READERS = 8


def locate_data(options: dict[str, Any], folder: str, save_model_path: str) -> dict[str, Any]:
    """Returns a run's options with the paths of its data valid from here: absolute, unless the run started here.

    Args:
        options: of the run, any of them.
        folder: the run's, absolute.
        save_model_path: as the run has stored it.
    """
    return options | locate_paths(options, find_home(options, folder, save_model_path))


def locate_paths(options: dict[str, Any], home: str) -> dict[str, Any]:
    """Returns the absolute paths of a run's data whose relative paths start in `home`; empty if that is here."""
    if not home or os.path.realpath(home) == os.path.realpath(os.curdir):
        return {}
    return {
        name: os.path.normpath(os.path.join(home, options[name]))
        for name in (*TABLE_OPTIONS, "image_directory")
        # Without an image directory, the paths in the tables start in `home` too.
        if name in options and not is_url(options[name]) and (options[name] or name == "image_directory")
    }


def gives_other_tables(configs: Configs, located: dict[str, Any]) -> bool:
    """Returns whether a given table is neither a run's own nor in the folder in which its images' paths start.

    `located` has the run's options from `locate_data`.
    """
    own, home = [located[name] for name in TABLE_OPTIONS if located.get(name)], located.get("image_directory")
    given = [getattr(configs, name) for name in (*TABLE_OPTIONS, "csv_path") if name in configs.given]
    return not all(
        any(os.path.realpath(path) == os.path.realpath(one) for one in own) or (home and lies_around(home, path))
        for path in given
        if path
    )


def find_home(options: dict[str, Any], folder: str, save_model_path: str) -> str:
    """Returns the folder that a run's relative paths start in; empty if unknown. The arguments: see `locate_data`.

    It is the folder that the run has noted, or if the run was moved or copied with its data, the folder around the run
    that has the same training table.
    """
    train_csv, (noted, digest) = options.get("train_csv", ""), read_note(folder)
    if os.path.isabs(train_csv):
        inside = os.sep + os.path.normpath(save_model_path)
        around = folder.removesuffix(inside) if folder.endswith(inside) else ""
        homes = [home for home in (noted, around) if os.path.isdir(home) and os.path.isfile(train_csv)]
        return next(iter(homes), "")
    homes = [noted] if noted and os.path.isfile(os.path.join(noted, train_csv)) else []
    if around := find_around(folder, train_csv) or find_around(os.path.realpath(folder), train_csv):
        homes.append(around)
    if noted and not digest:
        digest = digest_file(os.path.join(noted, train_csv))
    # If a whole project was copied, both match: the copy uses its own data.
    same = [home for home in homes if digest and digest_file(os.path.join(home, train_csv)) == digest]
    return same[-1] if same else next(iter(homes), "")


def find_around(folder: str, path: str) -> str:
    """Returns the nearest of a folder and its parents that has a file at a relative path; empty if none has."""
    while not os.path.isfile(os.path.join(folder, path)):
        folder, before = os.path.dirname(folder), folder
        if folder == before:
            return ""
    return folder


def digest_file(path: str) -> str:
    """Returns a digest of a file's bytes in hexadecimal; empty if it cannot be read."""
    digest = hash_file(path)
    return digest.hex() if isinstance(digest, bytes) else ""


def is_fixed(path: str) -> bool:
    """Returns whether a path is a URL or absolute."""
    return is_url(path) or os.path.isabs(path)


def relate_path(path: str, home: str) -> str:
    """Returns a local path, relative to a folder if it leads into it, so that both can be moved, else absolute."""
    path = os.path.abspath(path)
    return os.path.relpath(path, home) if lies_around(home, path) else path


def disown_paths(configs: Configs, model_path: str) -> Configs:
    """Returns configs whose paths don't count as given if they come from the run's own `configs.json`.

    Used with `--configs`, that file names the run's folder and tables before it was copied or moved.
    """
    file, in_file = configs.provenance.file, configs.provenance.in_file
    own = os.path.join(os.path.dirname(model_path), CONFIGS_FILE)
    if not (file and os.path.isfile(own) and os.path.samefile(file, own)):
        return configs
    given = configs.given - (in_file & set(PATH_OPTIONS))
    configs = configs.replace()
    configs.given = given
    return configs


def read_note(folder: str) -> tuple[str, str]:
    """Returns the folder that a run's paths start in and its training table's digest, as noted by the run, or empty."""
    try:
        with open(os.path.join(folder, DATA_FILE), encoding="utf-8") as file:
            content = json.load(file)
        home, digest = content["working_directory"], content.get("training", {}).get("csv_sha256", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", ""
    return (home, digest) if isinstance(home, str) and isinstance(digest, str) else ("", "")


def sign_file(path: str) -> tuple[int, int] | None:
    """Returns a file's length and a CRC of its first, middle and last 4 KiB; None for URLs and without a file.

    Of uncompressed files a few may agree in it and still differ: compare `hash_file`.
    """
    if is_url(path) or not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            size, checksum = os.fstat(file.fileno()).st_size, 0
            for position in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
                file.seek(position)
                checksum = zlib.crc32(file.read(SAMPLE_BYTES), checksum)
    except OSError:
        return None
    return size, checksum


def sign_files(paths: Sequence[str]) -> list[tuple[int, int] | None]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(sign_file, paths, chunksize=64))


def write_trained_images(folder: str, sets: dict[str, Sequence[str]]) -> None:
    """Writes which images a run is trained on and selected by, to recognise them among test images later.

    Args:
        folder: of the run. Its `trained_images.csv` has the columns `set`, `path` (absolute or a URL), `bytes` and
            `crc32` (of `sign_file`; empty for URLs).
        sets: image files by the set's name.
    """
    rows = [
        (name, locate_image(path), *(signature or (None, None)))
        for name, paths in sets.items()
        for path, signature in zip(paths, sign_files(paths), strict=True)
    ]
    table = pd.DataFrame(rows, columns=["set", "path", "bytes", "crc32"]).astype({"bytes": "Int64", "crc32": "Int64"})
    write_csv(os.path.join(folder, IMAGES_FILE), table)


def find_trained_images(folder: str, files: Sequence[str], set_names: Sequence[str]) -> dict[str, str] | None:
    """Finds the files of a run's sets, by path or by content; returns the run's own path of each file found.

    Without a list of the run's images, it returns None.

    Raises:
        UserError: the list is damaged.
    """
    path = os.path.join(folder, IMAGES_FILE)
    if not os.path.isfile(path):
        return None
    try:
        table = pd.read_csv(path, dtype={"bytes": "Int64", "crc32": "Int64"}, keep_default_na=False, na_values=[""])
        table = table[table["set"].isin(set_names)]
        paths, signatures = table["path"].tolist(), list(zip(table["bytes"], table["crc32"], strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged: {error}. Continue the run with train.py, which rewrites it, or skip this check with "
            "--allow_duplicates True."
        ) from error
    by_signature = {
        signature: trained for trained, signature in zip(paths, signatures, strict=True) if signature[0] is not pd.NA
    }
    known, found = set(paths), {}
    for file, signature in zip(files, sign_files(files), strict=True):
        if locate_image(file) in known:
            found[file] = locate_image(file)
        # If the run's own file is gone, the signature decides.
        elif (trained := by_signature.get(signature)) and (
            not os.path.isfile(trained) or hash_file(file) == hash_file(trained)
        ):
            found[file] = trained
    return found


def locate_image(path: str) -> str:
    """Returns an image's URL or absolute path."""
    return path if is_url(path) else os.path.abspath(path)


def refuse_trained_images(
    folder: str, csv_path: str, files: Sequence[str], set_names: Sequence[str], allow_duplicates: bool
) -> int:
    """Refuses to test a model on images that it was trained on or selected by; returns how many there are.

    Args:
        folder: of the run.
        csv_path: of the test images.
        files: the test images.
        set_names: the run's sets that must not contain test images.
        allow_duplicates: print a warning instead.

    Raises:
        UserError: there are such images, and they are not allowed.
    """
    found = find_trained_images(folder, files, set_names)
    if found is None:
        print(f"The run has no {IMAGES_FILE}: it may have been trained on test images.")
    if not found:
        return 0
    names = [
        file if locate_image(file) == trained else f"{file} (the same as {trained})" for file, trained in found.items()
    ]
    what = (
        f"{csv_path}: the model was trained on {len(found)} of these {len(files)} images, or selected by them: "
        f"{join_names(names)}."
    )
    if not allow_duplicates:
        raise UserError(
            f"{what} Its metrics on them would be too good. Give other images with --test_csv, remove the rows, or "
            "allow them with --allow_duplicates True."
        )
    print(f"Warning: {what} The metrics are optimistic.")
    return len(found)
