"""What a run keeps of its data: where they are from anywhere, and which images it was trained on."""

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
# Where a run's images are and what their labels are called: its own configs.json knows.
TABLE_OPTIONS = ("train_csv", "validation_csv", "test_csv")
# How a table is read.
READING_OPTIONS = ("image_directory", "csv_label_column")
DATA_OPTIONS = (*TABLE_OPTIONS, *READING_OPTIONS)
# What may lead elsewhere from another working directory.
PATH_OPTIONS = (*TABLE_OPTIONS, "image_directory", "save_model_path")
SAMPLE_BYTES = 4096
READERS = 8


def locate_data(options: dict[str, Any], folder: str, save_model_path: str) -> dict[str, Any]:
    """Returns a run's options with the paths of its data as they are from here: absolute, unless the run started here.

    Args:
        options: of the run, any of them.
        folder: the run's, absolute.
        save_model_path: as the run has stored it.
    """
    home = find_home(options, folder, save_model_path)
    return options | locate_paths(options, home)


def locate_paths(options: dict[str, Any], home: str) -> dict[str, Any]:
    """Returns the paths among a run's data options that are other ones from here, where its paths start at `home`."""
    if not home or os.path.realpath(home) == os.path.realpath(os.curdir):
        return {}
    return {
        name: os.path.normpath(os.path.join(home, options[name]))
        for name in (*TABLE_OPTIONS, "image_directory")
        # Without an image directory, the paths in the tables are relative to the same folder.
        if name in options and not is_url(options[name]) and (options[name] or name == "image_directory")
    }


def gives_other_tables(configs: Configs, located: dict[str, Any]) -> bool:
    """Returns whether a table is given that is neither a run's own nor in the folder where its images' paths start.

    Args:
        configs: with the tables that are given.
        located: the run's options, as `locate_data` returns them.
    """
    own, home = [located[name] for name in TABLE_OPTIONS if located.get(name)], located.get("image_directory")
    given = [getattr(configs, name) for name in (*TABLE_OPTIONS, "csv_path") if name in configs.given]
    return not all(
        any(os.path.realpath(path) == os.path.realpath(one) for one in own) or (home and lies_around(home, path))
        for path in given
        if path
    )


def find_home(options: dict[str, Any], folder: str, save_model_path: str) -> str:
    """Returns the folder that a run's relative paths start at; empty if that is not known.

    That is the folder that the run has noted. A run that was moved or copied with its data has the same training table
    in a folder around its own, which then counts.

    Args:
        options: as for `locate_data`.
        folder: as for `locate_data`.
        save_model_path: as for `locate_data`.
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
    # Of a project that was copied as a whole both match: the copy goes with its own data.
    same = [home for home in homes if digest and digest_file(os.path.join(home, train_csv)) == digest]
    return same[-1] if same else next(iter(homes), "")


def find_around(folder: str, path: str) -> str:
    """Returns the nearest folder that holds a file at a relative path, of a folder and those around it; empty: none."""
    while not os.path.isfile(os.path.join(folder, path)):
        folder, before = os.path.dirname(folder), folder
        if folder == before:
            return ""
    return folder


def digest_file(path: str) -> str:
    """Returns a digest of a file's bytes in hexadecimal; empty where it cannot be read."""
    digest = hash_file(path)
    return digest.hex() if isinstance(digest, bytes) else ""


def is_fixed(path: str) -> bool:
    """Returns whether a path is the same from every folder: an absolute one or a URL."""
    return is_url(path) or os.path.isabs(path)


def relate_path(path: str, home: str) -> str:
    """Returns a local path as seen from a folder: relative if it leads into it, so that both can be moved."""
    path = os.path.abspath(path)
    return os.path.relpath(path, home) if lies_around(home, path) else path


def disown_paths(configs: Configs, model_path: str) -> Configs:
    """Returns configs whose paths don't count as given where they come from the run's own `configs.json`.

    Read by `--configs`, that file names the folder and the tables that the run had before it was copied or moved.
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
    """Returns what a run has noted: the folder that its paths start at, and its training table's digest; or empty."""
    try:
        with open(os.path.join(folder, DATA_FILE), encoding="utf-8") as file:
            content = json.load(file)
        home, digest = content["working_directory"], content.get("training", {}).get("csv_sha256", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", ""
    return (home, digest) if isinstance(home, str) and isinstance(digest, str) else ("", "")


def sign_file(path: str) -> tuple[int, int] | None:
    """Returns a file's length and a CRC of its first, middle and last 4 KiB; None for URLs, and where it is no file.

    Files that agree in it are the same, but for a few that are not packed: `hash_file` tells those apart.
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
    """Returns `sign_file` of each path, from threads."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(sign_file, paths, chunksize=64))


def write_trained_images(folder: str, sets: dict[str, Sequence[str]]) -> None:
    """Writes which images a run is trained on and selected by, so that they can be told from test images later.

    Args:
        folder: of the run, which receives `trained_images.csv`: the columns `set`, `path`, absolute or a URL, and
            `bytes` and `crc32` of `sign_file`, empty for URLs.
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
    """Finds which image files are among those that a run was trained on or selected by: by path or by content.

    Args:
        folder: of the run.
        files: to look for.
        set_names: the run's sets to look in.

    Returns:
        The run's own path of each file that is found; None where the run has kept no list.

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
            f"{path} is damaged: {error}. Continue the run with train.py, which writes it again, or allow test images "
            "that were trained on with --allow_duplicates True."
        ) from error
    by_signature = {
        signature: trained for trained, signature in zip(paths, signatures, strict=True) if signature[0] is not pd.NA
    }
    known, found = set(paths), {}
    for file, signature in zip(files, sign_files(files), strict=True):
        if locate_image(file) in known:
            found[file] = locate_image(file)
        elif (trained := by_signature.get(signature)) and _has_content_of(file, trained):
            found[file] = trained
    return found


def _has_content_of(file: str, trained: str) -> bool:
    """Compares two files of one signature; where the one trained on is no longer there, the signature decides."""
    return not os.path.isfile(trained) or hash_file(file) == hash_file(trained)


def locate_image(path: str) -> str:
    """Returns an image's URL or absolute path."""
    return path if is_url(path) else os.path.abspath(path)


def refuse_trained_images(
    folder: str, csv_path: str, files: Sequence[str], set_names: Sequence[str], allow_duplicates: bool
) -> int:
    """Refuses to test a model on images that it was trained on or selected by.

    Args:
        folder: of the run.
        csv_path: of the test images.
        files: the test images.
        set_names: the run's sets that they may not be in.
        allow_duplicates: print a warning instead.

    Returns:
        How many there are.

    Raises:
        UserError: there are any, and they are not allowed.
    """
    found = find_trained_images(folder, files, set_names)
    if found is None:
        print(f"The run has no {IMAGES_FILE}: whether it was trained on test images is not known.")
        return 0
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
            f"{what} Its metrics on them would be too good. Name other images by --test_csv, drop the rows, or allow "
            "it by --allow_duplicates True."
        )
    print(f"Warning: {what} The metrics are optimistic.")
    return len(found)
