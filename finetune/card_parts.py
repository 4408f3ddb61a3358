"""What the model card reads of a run's folder, each part checked for its form."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from finetune.artefacts import DECISION_FILE
from finetune.run_data import DATA_FILE
from finetune.run_folder import COMPRESSION_FILE, METRICS_FILE, STATISTICS_FILE
from finetune.summaries import HEADLINES


def read_part(folder: str, name: str) -> dict[str, Any] | None:
    """Returns the content of one of the files of `CARD_FORMS`; None where there is none or, printed, a damaged one."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if fits(content, CARD_FORMS[name]):
            return content
        fault = "its content is not as this version writes it"
    except (OSError, ValueError, RecursionError) as error:
        fault = str(error)
    print(f"The model card goes without {path}: {fault}. Write it again, or delete it.")
    return None


def fits(value: Any, form: Any) -> bool:
    """Tells whether the content of a JSON file has a form.

    Args:
        value: the content.
        form: a type, where float means any finite number; None; a tuple of forms of which any will do; a list with
            the form of each item, or of all; an object's members by name, one that is missing counting as None, where
            `str` stands for all others and for at least one.
    """
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, list) and isinstance(value, list):
        forms = form * len(value) if len(form) == 1 else form
        return len(value) == len(forms) and all(map(fits, value, forms))
    if isinstance(form, dict) and isinstance(value, dict):
        forms = dict.fromkeys(value, form[str]) | form if str in form else form
        return (bool(value) or str not in form) and all(
            fits(value.get(name), one) for name, one in forms.items() if name is not str
        )
    if form is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return value is None if form is None else type(value) is form


_NUMBER = (float, None)
_INTERVAL = ([_NUMBER, _NUMBER], None)
_CALIBRATION = {"expected_calibration_error": float, "expected_calibration_error_uncalibrated": float}
_FIGURES = dict.fromkeys(HEADLINES, _NUMBER) | {
    "images": int,
    "groups": (int, None),
    "images_of_known_groups": (int, None),
    "csv": (str, None),
}
_FIGURES |= {"sha256": (str, None), "calibration": _CALIBRATION}
_FIGURES |= {"per_class": {str: {str: _NUMBER, "f1": float, "support": int}}}
_INTERVALS = {str: _INTERVAL, "per_class": ({str: {str: _INTERVAL}}, None)}
_INTERVALS |= dict.fromkeys(("accuracy", "exact_match_accuracy"), ([float, float], None))
_DECISION = {"temperature": float, "temperature_fitted_on": (str, None), "thresholds_fitted_on": (str, None)}
_DECISION |= {"exact_match_threshold": float, "best_f1_thresholds": ({str: float}, None)}
_DATA = {"csv": str, "images": int, "classes": {str: int}, "sha256": str}
_PAIR = {"before": float, "after": float}
_COMPARISON = {"images": int, "largest_difference": float, "changed_predictions": int, "accuracy": _PAIR}
_COMPARISON |= {"images_per_second": _PAIR}
_ARTEFACT = {"kind": str, "precision": str, "path": str, "files": {str: int}, "rejected": bool}
CARD_FORMS: dict[str, dict[str, Any]] = {
    DATA_FILE: {"training": _DATA, "validation": _DATA},
    STATISTICS_FILE: {
        "epochs_completed": int,
        "monitor": str,
        "best": _NUMBER,
        "best_epoch": (int, None),
        "kept_share": _NUMBER,
        "has_refitted_head": (bool, None),
    },
    DECISION_FILE: _DECISION,
    METRICS_FILE: {
        "model": str,
        "multi_label": bool,
        "decision": _DECISION,
        "sets": {str: _FIGURES, "test": _FIGURES | {"intervals": _INTERVALS}},
    },
    COMPRESSION_FILE: {
        "model": str,
        "model_bytes": int,
        "model_sha256": str,
        "tolerance": float,
        "artefacts": [_ARTEFACT | {"comparison": (_COMPARISON, None)}],
    },
}
