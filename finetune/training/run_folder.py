"""The folder of a run: its files, refusing, clearing and locking it, and describing the run in it."""

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
from finetune.evaluation.decision_file import DECISION_FILE
from finetune.models.description import CONFIGS_FILE
from finetune.models.formats import REJECTED, is_exported, list_endings
from finetune.training.run_data import DATA_FILE, IMAGES_FILE, digest_file, write_trained_images

if TYPE_CHECKING:
    from generator import AugmentedImageSequence

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
# Patterns of all that a run writes: a new run into the same folder must not mix with it.
MODEL_FILES = tuple(f"{stem}.keras" for stem in MODEL_STEMS)
RUN_FILES = (*MODEL_FILES, "training_log.*", AUROC_FILE, STATISTICS_FILE, CONFIGS_FILE, DATA_FILE, CURVES_FOLDER)
RUN_FILES += (IMAGES_FILE, DECISION_FILE, EVALUATION_FOLDER, MAPS_FOLDER, COMPRESSION_FILE, CARD_FILE)


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
    """Returns the paths in a folder that match glob patterns."""
    return [path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(folder), pattern))]


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

    A continued run loses its decision and its model card: they belong to the model that it will replace.
    """
    remove_stale_files(folder)
    for name in (DECISION_FILE, CARD_FILE):
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
    parts = {*list_endings(), ("_labels", ".txt"), ("_metadata", ".json")}
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
