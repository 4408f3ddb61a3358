"""decision.json: the temperature and thresholds that test.py fits and predict.py uses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finetune.artefacts import DECISION_FILE, artefact_stem, is_exported, metadata_path
from finetune.decision import TEMPERATURE_RANGE, Decision, fit_decision
from finetune.files import write_json
from finetune.labels import look_the_same
from finetune.options import UserError
from finetune.texts import join_names
from finetune.values import convert

LARGEST_DECISION_FILE = 2**22


def get_decision(
    model_path: str,
    truths: dict[str, np.ndarray],
    predictions: dict[str, np.ndarray],
    class_names: Sequence[str],
    multi_label: bool,
    threshold_range: Sequence[float],
) -> Decision:
    """Fits temperature and thresholds, as `fit_decision` does, and writes them into `decision.json`.

    An exported model keeps those that it ships with, and so gives the labels of the model that it was made of. Where
    there is no validation set now, those that were fitted on one before stay.
    """
    folder = os.path.dirname(os.path.abspath(model_path))
    if is_exported(model_path):
        return read_decision(folder, class_names, multi_label, model_path)
    path = os.path.join(folder, DECISION_FILE)
    if "validation" not in truths and (kept := _find_fitted(path, class_names, multi_label, model_path)):
        print(f"There is no validation set here: {path} stays as it was fitted.")
        return kept
    decision = fit_decision(truths, predictions, class_names, multi_label, threshold_range, model_path)
    write_decision(folder, decision)
    return decision


def _find_fitted(path: str, class_names: Sequence[str], multi_label: bool, model_path: str) -> Decision | None:
    """Returns a model's stored decision if it was fitted on a validation set; None also where the file is damaged."""
    try:
        stored = _read_decision_file(path)
    except UserError:
        return None
    names = (list(class_names), multi_label, os.path.basename(model_path))
    is_its = names == (stored.class_names, stored.multi_label, stored.model)
    return stored if is_its and stored.temperature_fitted_on else None


def write_decision(folder: str, decision: Decision) -> str:
    """Writes `decision.json` into a run's folder and returns its path."""
    path = os.path.join(folder, DECISION_FILE)
    write_json(path, decision.to_dict())
    return path


def read_decision(folder: str, class_names: Sequence[str], multi_label: bool, model_path: str) -> Decision:
    """Reads the decision that `test.py` fitted for a model.

    Args:
        folder: of the run.
        class_names: the model's.
        multi_label: whether the model's labels are independent.
        model_path: of the model in use; what `compress_weights.py` makes of `best_model.keras` counts as that.

    Returns:
        The stored decision. An exported model keeps the one that it brings in its `_metadata.json`, if that was fitted:
        it gives the same labels here as elsewhere. Where there is no stored one, that of the metadata counts for
        compressed weights too. The defaults where there is neither, or where it is another model's, which is printed.

    Raises:
        UserError: the file is not as `write_decision` writes it, or is of other classes.
    """
    path, shipped_path = os.path.join(folder, DECISION_FILE), metadata_path(model_path)
    default = Decision(list(class_names), multi_label)
    stored = _read_decision_file(path) if os.path.lexists(path) else None
    brings_own = is_exported(model_path) or (stored is None and not model_path.endswith(".keras"))
    if brings_own and os.path.lexists(shipped_path):
        shipped = _read_decision_file(shipped_path, "decision")
        if stored is None or shipped.temperature_fitted_on or shipped.thresholds_fitted_on:
            path, stored = shipped_path, shipped
    if stored is None:
        return default
    if stored.model and artefact_stem(stored.model) != artefact_stem(model_path):
        print(
            f"{path} was fitted for {stored.model}: {os.path.basename(model_path)} goes without it. "
            "Run test.py on this model to fit its own."
        )
        return default
    if not look_the_same(stored.class_names, default.class_names) or stored.multi_label != multi_label:
        raise _decision_fault(
            path,
            f"expected the model's classes {join_names(class_names)} and multi_label {multi_label}",
            f"{join_names(stored.class_names)!r} and multi_label {stored.multi_label}",
        )
    return stored


def _read_decision_file(path: str, part: str = "") -> Decision:
    """Reads `decision.json`, or that part of another file, and checks its form; raises UserError."""
    try:
        if os.path.getsize(path) > LARGEST_DECISION_FILE:
            raise _decision_fault(path, f"expected at most {LARGEST_DECISION_FILE} bytes", "a larger file")
        with open(path, encoding="utf-8") as file:
            stored = json.load(file)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check the file.") from error
    except (ValueError, RecursionError) as error:
        raise _decision_fault(path, "expected valid JSON", f"{error}") from error
    if part and isinstance(stored, dict):
        stored = stored.get(part)
    if not isinstance(stored, dict):
        raise _decision_fault(path, "expected a JSON object", repr(stored))
    if unknown := sorted(stored.keys() - _DECISION_FIELDS.keys()):
        raise _decision_fault(path, f"expected no fields but {', '.join(_DECISION_FIELDS)}", repr(unknown[0]))
    if missing := sorted(_DECISION_FIELDS.keys() - stored.keys()):
        raise _decision_fault(path, f"expected a field {missing[0]}", "none")
    values = {}
    for name, (kind, is_allowed, words) in _DECISION_FIELDS.items():
        value = stored[name]
        try:
            if name == "best_f1_thresholds":
                value = _in_order(value, values["classes"])
            values[name] = convert(value, kind, is_text=False)
            if not is_allowed(values[name]):
                raise ValueError(value)
        except ValueError as error:
            raise _decision_fault(path, f"{name}: expected {words}", repr(stored[name])) from error
    return Decision(class_names=values.pop("classes"), **values)


def _in_order(by_class: Any, class_names: Sequence[str]) -> list | None:
    """Returns the values of a JSON object in the order of the classes, None for null; else raises ValueError."""
    if by_class is None:
        return None
    if not isinstance(by_class, dict) or by_class.keys() != set(class_names):
        raise ValueError(by_class)
    return [by_class[name] for name in class_names]


def _decision_fault(path: str, expected: str, received: str) -> UserError:
    shown = received if len(received) <= 200 else f"{received[:200]}..."
    return UserError(f"{path}: {expected}. Received: {shown}. Run test.py again, or delete the file.")


def _is_probability(value: float) -> bool:
    return 0 <= value <= 1


_DECISION_FIELDS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "classes": (list[str], lambda names: 0 < len(set(names)) == len(names), "a list of different class names"),
    "multi_label": (bool, lambda _: True, "true or false"),
    "temperature": (
        float,
        lambda value: TEMPERATURE_RANGE[0] <= value <= TEMPERATURE_RANGE[1],
        "a number from {} to {}".format(*TEMPERATURE_RANGE),
    ),
    "temperature_fitted_on": (str | None, lambda name: name in (None, "validation"), "validation or null"),
    "exact_match_threshold": (float, _is_probability, "a number from 0 to 1"),
    "best_f1_thresholds": (
        list[float] | None,
        lambda values: values is None or all(map(_is_probability, values)),
        "a number from 0 to 1 for each of classes, or null",
    ),
    "thresholds_fitted_on": (
        str | None,
        lambda name: name in (None, "validation", "training"),
        "validation, training or null",
    ),
    "model": (str, lambda name: name.isprintable() and name == os.path.basename(name), "the file name of a model"),
}
