"""A run's folder: its files, clearing and locking it, and the record of the data that the run was trained on."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from finetune.core.files import check_folder, remove_stale_files, write_fault, write_json
from finetune.core.options import UserError
from finetune.data.tables import count_labels
from finetune.evaluation.decision import DECISION_FILE
from finetune.evaluation.novelty import REFERENCE_FILE
from finetune.models.description import CONFIGS_FILE
from finetune.models.formats import REJECTED, is_exported, list_endings

if TYPE_CHECKING:
    from generator import AugmentedImageSequence


import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import pandas as pd

from configs import Configs
from finetune.core.files import lies_around, write_csv
from finetune.core.texts import join_names
from finetune.data.stores import hash_file, is_url

try:
    import fcntl
except ImportError:
    fcntl = None
    import msvcrt

BEST_MODEL = "best_model.keras"
LATEST_MODEL = "latest_model.keras"
# The weights that an interpolating run has started from.
START_MODEL = "start_model.keras"
LOG_FILE = "training_log.csv"
STATISTICS_FILE = ".training_stats.json"
AUROC_FILE = "best_auroc.log"
CURVES_FOLDER = "logs"
EVALUATION_FOLDER = "evaluation"
METRICS_FILE = f"{EVALUATION_FOLDER}/metrics.json"
MAPS_FOLDER = "cam_output"
COMPRESSION_FILE = "compression_report.json"
CARD_FILE = "MODEL_CARD.md"
LOCK_FILE = ".lock"
MODEL_STEMS = (*(name.removesuffix(".keras") for name in (BEST_MODEL, LATEST_MODEL, START_MODEL)), "model_epoch_*")
DATA_FILE = "data.json"
IMAGES_FILE = "trained_images.csv"
# Patterns of all that a run writes: a new run into the same folder must not mix with it.
MODEL_FILES = tuple(f"{stem}.keras" for stem in MODEL_STEMS)
RUN_FILES = (*MODEL_FILES, "training_log.*", AUROC_FILE, STATISTICS_FILE, CONFIGS_FILE, DATA_FILE, CURVES_FOLDER)
RUN_FILES += (IMAGES_FILE, DECISION_FILE, REFERENCE_FILE, EVALUATION_FOLDER, MAPS_FOLDER, COMPRESSION_FILE, CARD_FILE)


def find_log(path: str) -> str:
    """Returns the path of the training log of a run, given its folder or a model file in it."""
    return os.path.join(os.path.dirname(path) if os.path.isfile(path) else path, LOG_FILE)


def find_beside(model_path: str, name: str) -> str:
    """Returns the path of a file in a run, given the run's folder or a model file in it."""
    return os.path.join(model_path if os.path.isdir(model_path) else os.path.dirname(model_path), name)


def choose_evaluation_folder(folder: str, model_path: str) -> str:
    """Returns the folder for a model's evaluation inside another one; raises UserError if it cannot be written."""
    # An exported model leaves the run's own evaluation as it is.
    name = f"{EVALUATION_FOLDER}_{os.path.basename(model_path)}" if is_exported(model_path) else EVALUATION_FOLDER
    return check_folder(os.path.join(folder, name), "save_model_path")


def list_matches(folder: str, patterns: Iterable[str]) -> list[str]:
    """Returns the paths in a folder that match any of some glob patterns, each once."""
    found = (path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(folder), pattern)))
    return list(dict.fromkeys(found))


def refuse_other_run(folder: str, load_model_path: str) -> None:
    """Raises UserError if a folder holds models of another run than the one to continue."""
    if (held := list_matches(folder, MODEL_FILES)) and not leads_into(load_model_path, folder):
        raise UserError(
            f"{folder} holds the models of another run ({os.path.basename(held[0])}). Continue it with "
            f"--load_model_path {shlex.quote(folder)}, choose another save_model_path, or remove it with "
            "--overwrite True."
        )


def leads_into(model_path: str, folder: str) -> bool:
    """Returns whether a path is a folder itself or a model file in it; False for an empty path."""
    return bool(model_path) and os.path.realpath(find_beside(model_path, "")) == os.path.realpath(folder)


def describe_run(
    folder: str,
    options: dict[str, Any],
    sets: dict[str, tuple[str, AugmentedImageSequence]],
    class_names: Sequence[str],
    home: str = "",
) -> None:
    """Writes a run's configs and the description of its data into its folder.

    Args:
        folder: of the run.
        options: from `Configs.to_stored`.
        sets: the CSV file and the images of each set, by its name.
        class_names: in the model's order.
        home: the folder that relative paths start in; empty for the working directory.
    """
    # Used again with --configs, the options of a run must not remove it.
    write_json(os.path.join(folder, CONFIGS_FILE), options | {"overwrite": False})
    described = {name: describe_set(csv_path, images, class_names) for name, (csv_path, images) in sets.items()}
    write_json(os.path.join(folder, DATA_FILE), described | {"working_directory": home or os.getcwd()})
    # Without a validation table, the test images select the best model.
    names = {"validation": "validation" if options["validation_csv"] else "test"}
    write_trained_images(folder, {names.get(name, name): images.paths for name, (_, images) in sets.items()})


def describe_set(csv_path: str, sequence: AugmentedImageSequence, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns a set's CSV file and its digest, the number of images, also by class, and the set's fingerprint."""
    classes = dict(zip(class_names, count_labels(sequence.labels, len(class_names)).tolist(), strict=True))
    digests = {"csv_sha256": digest_file(csv_path), "sha256": fingerprint(sequence)}
    return {"csv": csv_path, "images": len(sequence.labels), "classes": classes} | digests


def clear_folder(folder: str, overwrites: bool) -> None:
    """Removes the temporary files of killed processes from a run's folder and, to overwrite, the run that it holds.

    A continued run loses its decision, reference and model card: they belong to the model that it will replace.
    """
    remove_stale_files(folder)
    for name in (DECISION_FILE, REFERENCE_FILE, CARD_FILE):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            os.remove(path)
            print(f"Removed {path}: it belongs to the previous model. Run test.py after training.")
    for path in list_matches(folder, (*RUN_FILES, *list_derived_files())) if overwrites else ():
        # A link is removed, not its target.
        is_folder = os.path.isdir(path) and not os.path.islink(path)
        shutil.rmtree(path) if is_folder else os.remove(path)


def list_derived_files() -> list[str]:
    """Returns patterns of the files that compress_weights.py derives from a run's models, and of their evaluations."""
    parts = {*list_endings(), ("_labels", ".txt"), ("_metadata", ".json"), ("_reference", ".npz")}
    names = [
        f"{stem}{ending}{mark}{suffix}" for stem in MODEL_STEMS for ending, suffix in parts for mark in ("", REJECTED)
    ]
    return [*names, *(f"{EVALUATION_FOLDER}_{name}" for name in names)]


def fingerprint(sequence: AugmentedImageSequence) -> str:
    """Returns a digest of a set's labels and file names in order, without folders, which may move between runs."""
    digest = hashlib.sha256(np.ascontiguousarray(sequence.labels).tobytes())
    for path in sequence.paths:
        digest.update(os.path.basename(path).encode() + b"\0")
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: str, is_needed: bool = True) -> Iterator[None]:
    """Locks a folder for this process; the system releases it however the process ends.

    Args:
        folder: to lock.
        is_needed: False if another process of the same run locks it.

    Raises:
        UserError: another process has locked it, or the folder cannot be written.
    """
    if not is_needed:
        yield
        return
    path = os.path.join(folder, LOCK_FILE)
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.islink(path):
            # A copy made of links would lock the original.
            os.remove(path)
        file = open(path, "a")  # noqa: SIM115 - closed below, after the lock's work is done
    except OSError as error:
        raise write_fault(folder, error, "save_model_path") from error
    try:
        lock_file(file)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"Another process is training into {folder}. Wait, or choose another save_model_path."
        ) from error
    finally:
        file.close()


def lock_file(file: TextIO) -> None:
    """Locks an open file for this process; raises BlockingIOError if another one has locked it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError from error


# The options in configs.json that lead to a run's data.
TABLE_OPTIONS = ("train_csv", "validation_csv", "test_csv")
READING_OPTIONS = ("image_directory", "csv_label_column")
DATA_OPTIONS = (*TABLE_OPTIONS, *READING_OPTIONS, "max_error", "unknown_rate")
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
