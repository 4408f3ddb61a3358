"""A file of a model's answers that grows during a prediction, so that an interrupted prediction can resume.

Its first line is a digest of the model and the options. Each further line holds a batch: its position, a digest of its
images, the model's own probabilities, the similarities to training photos, and the errors. A batch is used again if its
images are the same unchanged files. The model therefore sees the same batches with and without an interruption, and the
results are equal to the last bit. A line that is incomplete because the process was killed is ignored.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from configs import Configs
from finetune.core.files import list_files, write_fault
from finetune.core.options import UserError
from finetune.core.texts import show_count
from finetune.data.stores import is_url
from finetune.loading.caches import digest_image
from finetune.models.description import hash_model
from finetune.training.run_folder import lock_file

# Increase it when images are decoded or resized differently.
VERSION = 2
# Options that change no probability. The last two are applied to all answers at the end.
HARMLESS = ("generator_workers", "generator_queue_length", "verbose", "write_path", "sort_into", "sort_links")
HARMLESS += ("max_error", "unknown_rate", "top_k", "threshold_type")
AUGMENTER = str(Path(__file__).resolve().parents[2] / "augmenter.py")
# Files or stored objects that are checked in parallel.
CHECKS = 16


class KeptAnswers:
    """Probabilities and errors of images, a context manager. The file is removed at the end, unless an error occurs.

    Args:
        write_path: the table to write; the file is a hidden one next to it.
        facts: what the probabilities depend on except the images, from `list_facts`.

    Attributes:
        probabilities: float32 `(images, classes)`, filled for the answered images.
        similarities: to training photos, float32 `(images,)`; NaN without a reference.
        errors: by row, why an image could not be read.
    """

    def __init__(
        self, write_path: str, paths: Sequence[str], batch_size: int, classes: int, facts: dict[str, Any]
    ) -> None:
        folder, name = os.path.split(os.path.abspath(write_path))
        self.path = os.path.join(folder, f".{name}.partial")
        self.paths = paths
        self.probabilities = np.empty((len(paths), classes), np.float32)
        self.similarities = np.full(len(paths), np.nan, np.float32)
        self.errors: dict[int, str] = {}
        self._write_path = write_path
        self._batch_size = batch_size
        self._header = _to_line({"facts": _digest(facts)})
        self._is_answered = np.zeros(len(paths), bool)

    @property
    def missing(self) -> np.ndarray:
        """The rows without an answer, int `(images,)`, in whole batches."""
        return np.flatnonzero(~self._is_answered)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            try:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                self._file = stack.enter_context(open(self.path, "a+b"))
                lock_file(self._file)
                self._read()
            except BlockingIOError as error:
                raise UserError(
                    f"Another process predicts into {self._write_path}. Wait, or choose another write_path."
                ) from error
            except OSError as error:
                raise write_fault(self.path, error, "write_path") from error
            # The file stays open until `__exit__`.
            stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        if error is None or not self._is_answered.any():
            os.remove(self.path)
            return
        number = f"{self._is_answered.sum()} of {show_count(len(self.paths), 'image')}"
        print(f"The answers for {number} are kept. To resume, run the same command again.", file=sys.stderr)

    def add(
        self,
        rows: np.ndarray,
        answers: tuple[np.ndarray, np.ndarray],
        errors: dict[int, str],
        identities: Sequence[Any],
    ) -> None:
        """Adds and writes the answers for a batch of the missing rows.

        Args:
            answers: probabilities and similarities.
            errors: by row, why an image could not be read.
            identities: of its images, from `identify`, before they were read.

        Raises:
            UserError: the file cannot be written.
        """
        self._take(rows, answers, errors)
        if None in identities:
            return
        record = {
            "batch": int(rows[0]) // self._batch_size,
            "images": self._digest_images(rows, identities),
            "probabilities": _encode(self.probabilities[rows]),
            "similarities": _encode(self.similarities[rows]),
            "errors": errors,
        }
        try:
            self._file.write(_to_line(record))
            # The system has it now, even if this process is killed.
            self._file.flush()
        except OSError as error:
            raise write_fault(self.path, error, "write_path") from error

    def _take(self, rows: np.ndarray, answers: tuple[np.ndarray, np.ndarray], errors: dict[int, str]) -> None:
        self.probabilities[rows], self.similarities[rows] = answers
        self.errors.update(errors)
        self._is_answered[rows] = True

    def _digest_images(self, rows: np.ndarray, identities: Sequence[Any]) -> str:
        return _digest([[self.paths[row], identity] for row, identity in zip(rows, identities, strict=True)])

    def _read(self) -> None:
        """Reads the answers that are still valid, cuts the file after its last valid line, and prints how many."""
        self._file.seek(0)
        first = self._file.readline()
        if first != self._header:
            if first:
                print(f"Starting over: {self.path} has answers of another model or with other options.")
            self._file.truncate(0)
            self._file.write(self._header)
            return
        end, known = len(first), np.zeros(len(self.paths), bool)
        with ThreadPoolExecutor(CHECKS) as pool:
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                try:
                    rows = self._use(json.loads(line), pool)
                except (ValueError, KeyError, TypeError):
                    break
                known[rows] = True
                end += len(line)
        self._file.truncate(end)
        if known.any():
            changed = (known & ~self._is_answered).sum()
            note = f" {changed} more have changed and are predicted again." if changed else ""
            number = f"{self._is_answered.sum()} of {show_count(len(self.paths), 'image')}"
            print(f"Resuming: {number} already predicted.{note}")

    def _use(self, record: dict[str, Any], pool: ThreadPoolExecutor) -> np.ndarray:
        """Uses a batch from the file if its images are unchanged; returns its rows."""
        start = record["batch"] * self._batch_size
        rows = np.arange(start, min(start + self._batch_size, len(self.paths)))
        found, similarities = (_decode(record[name]) for name in ("probabilities", "similarities"))
        errors = {int(row): error for row, error in record["errors"].items()}
        if record["images"] == self._digest_images(rows, [*pool.map(identify, [self.paths[row] for row in rows])]):
            self._take(rows, (found.reshape(len(rows), -1), similarities), errors)
        return rows


def _encode(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def _to_line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _digest(content: Any) -> str:
    """Returns 32 hexadecimal digits of what JSON can hold."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def identify(path: str) -> Any:
    """Returns a JSON value that changes with the bytes of an image; None if a store does not provide one."""
    if is_url(path):
        return digest_image(path).hex() or None
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return "missing"
    # The last one changes even if the new file has the same size and modification time.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def list_facts(configs: Configs, model_path: str) -> dict[str, Any]:
    """Lists what the probabilities depend on except the images: options, model files, libraries and devices.

    Args:
        configs: the options, with those that describe the model.
        model_path: the model's file or folder.
    """
    options = {name: value for name, value in configs.to_dict().items() if name not in HARMLESS}
    # The layers of compressed weights are in a separate file.
    files = [*list_files(model_path), f"{os.path.splitext(model_path)[0]}.json"]
    files += [AUGMENTER] * (options["test_time_augmentation"] not in ("none", "flip"))
    devices = [device.device_type for device in tf.config.get_visible_devices()]
    return {
        "version": VERSION,
        "libraries": [tf.__version__, keras.__version__],
        "devices": devices,
        "options": options,
        "files": [str(hash_model(path)) for path in files],
    }
