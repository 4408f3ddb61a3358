"""The folder of a run: which files it has, refusing, clearing and locking it, and describing the run in it."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from finetune.core.files import check_folder, remove_stale_files, write_fault, write_json
from finetune.core.options import UserError
from finetune.data.tables import count_labels
from finetune.evaluation.decision_file import DECISION_FILE
from finetune.models.description import (
    CONFIGS_FILE,
)
from finetune.models.formats import REJECTED, is_exported, list_endings
from finetune.training.run_data import (
    DATA_FILE,
    IMAGES_FILE,
    digest_file,
    write_trained_images,
)

if TYPE_CHECKING:
    from generator import AugmentedImageSequence

try:
    import fcntl
except ImportError:
    fcntl = None
    import msvcrt

BEST_MODEL = "best_model.keras"
LATEST_MODEL = "latest_model.keras"
# What an interpolating run has started from.
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
# What a run writes, as patterns: a new run into the same folder may not mix with it.
MODEL_FILES = tuple(f"{stem}.keras" for stem in MODEL_STEMS)
RUN_FILES = (*MODEL_FILES, "training_log.*", AUROC_FILE, STATISTICS_FILE, CONFIGS_FILE, DATA_FILE, CURVES_FOLDER)
RUN_FILES += (IMAGES_FILE, DECISION_FILE, EVALUATION_FOLDER, MAPS_FOLDER, COMPRESSION_FILE, CARD_FILE)


def find_log(path: str) -> str:
    """Returns where the training log of a run is, named by its folder or by a model file in it."""
    return os.path.join(os.path.dirname(path) if os.path.isfile(path) else path, LOG_FILE)


def name_evaluation(model_path: str) -> str:
    """Returns the name of the folder for a model's evaluation: an exported one leaves that of the run as it is."""
    return f"{EVALUATION_FOLDER}_{os.path.basename(model_path)}" if is_exported(model_path) else EVALUATION_FOLDER


def choose_evaluation_folder(folder: str, model_path: str) -> str:
    """Returns the folder for a model's evaluation inside another one; raises UserError if it cannot be written."""
    return check_folder(os.path.join(folder, name_evaluation(model_path)), "save_model_path")


def refuse_other_run(folder: str, load_model_path: str) -> None:
    """Raises UserError where a folder holds models of a run that is not the one to continue."""
    held = [path for pattern in MODEL_FILES for path in glob.glob(os.path.join(glob.escape(folder), pattern))]
    if held and not leads_into(load_model_path, folder):
        raise UserError(
            f"{folder} holds the models of another run ({os.path.basename(held[0])}). Continue it with "
            f"--load_model_path {shlex.quote(folder)}, choose another save_model_path, or remove it with "
            "--overwrite True."
        )


def find_start_model(model_path: str) -> str:
    """Returns the path of START_MODEL beside a checkpoint, which is a file or a run's folder."""
    folder = model_path if os.path.isdir(model_path) else os.path.dirname(model_path)
    return os.path.join(folder, START_MODEL)


def leads_into(model_path: str, folder: str) -> bool:
    """Tells whether a path is a run's folder, or that of a model in it; an empty path is not."""
    source = model_path if os.path.isdir(model_path) else os.path.dirname(model_path)
    return bool(model_path) and os.path.realpath(source) == os.path.realpath(folder)


def describe_run(
    folder: str,
    options: dict[str, Any],
    sets: dict[str, tuple[str, AugmentedImageSequence]],
    class_names: Sequence[str],
    home: str = "",
) -> None:
    """Writes a run's configs and what its data are into its folder.

    Args:
        folder: of the run.
        options: as `Configs.to_stored` gives them.
        sets: the CSV file and the images of each set, by its name.
        class_names: in the model's order.
        home: the folder that the paths among the options are relative to; empty: the working directory.
    """
    # Repeated by --configs, the options of a run must not remove it.
    write_json(os.path.join(folder, CONFIGS_FILE), options | {"overwrite": False})
    described = {name: describe_set(csv_path, images, class_names) for name, (csv_path, images) in sets.items()}
    write_json(os.path.join(folder, DATA_FILE), described | {"working_directory": home or os.getcwd()})
    # Without a validation table of its own, the run is selected by test images.
    names = {"validation": "validation" if options["validation_csv"] else "test"}
    write_trained_images(folder, {names.get(name, name): images.paths for name, (_, images) in sets.items()})


def describe_set(csv_path: str, sequence: AugmentedImageSequence, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns a set's `csv`, its `csv_sha256`, `images`, images of each of its `classes`, and its `fingerprint`."""
    classes = dict(zip(class_names, count_labels(sequence.labels, len(class_names)).tolist(), strict=True))
    digests = {"csv_sha256": digest_file(csv_path), "sha256": fingerprint(sequence)}
    return {"csv": csv_path, "images": len(sequence.labels), "classes": classes} | digests


def clear_folder(folder: str, overwrites: bool) -> None:
    """Removes what killed processes left in a run's folder and, to overwrite, the run that it holds.

    A run that goes on loses its decision and its model card: they belong to the model that it is about to replace.
    """
    remove_stale_files(folder)
    for name in (DECISION_FILE, CARD_FILE):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            os.remove(path)
            print(f"Removed {path}: it belongs to the model before. Run test.py after training.")
    for pattern in (*RUN_FILES, *list_derived_files()) if overwrites else ():
        for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
            # Of a link the name goes, not what it leads to.
            is_folder = os.path.isdir(path) and not os.path.islink(path)
            shutil.rmtree(path) if is_folder else os.remove(path)


def list_derived_files() -> list[str]:
    """Returns patterns of what compress_weights.py makes of a run's models, and of test.py's evaluations of that."""
    parts = {*list_endings(), ("_labels", ".txt"), ("_metadata", ".json")}
    names = [
        f"{stem}{ending}{mark}{suffix}" for stem in MODEL_STEMS for ending, suffix in parts for mark in ("", REJECTED)
    ]
    return [*names, *(f"{EVALUATION_FOLDER}_{name}" for name in names)]


def fingerprint(sequence: AugmentedImageSequence) -> str:
    """Returns a digest of a set's labels and file names in their order; folders may move between runs."""
    digest = hashlib.sha256(np.ascontiguousarray(sequence.labels).tobytes())
    for path in sequence.paths:
        digest.update(os.path.basename(path).encode() + b"\0")
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: str, is_needed: bool = True) -> Iterator[None]:
    """Holds a folder for this process alone; the system lets go of it however the process ends.

    Where it is not needed, another process of the same run holds it.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    if not is_needed:
        yield
        return
    path = os.path.join(folder, LOCK_FILE)
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.islink(path):
            # A copy that is made of links would lock the original.
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
    """Locks an open file for this process; raises BlockingIOError where another one has."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError from error
