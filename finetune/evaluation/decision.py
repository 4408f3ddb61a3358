"""From raw probabilities to an answer: temperature and thresholds, and decision.json, which holds them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from finetune.core.arguments import take_flag, take_names, take_path
from finetune.core.files import write_json
from finetune.core.labels import look_the_same
from finetune.core.options import UserError
from finetune.core.texts import join_names
from finetune.core.values import convert
from finetune.evaluation.abstention import Abstention, Outcomes, decide
from finetune.evaluation.calibration import (
    SOFTMAX,
    TEMPERATURE_RANGE,
    find_best_f1_thresholds,
    find_exact_match_threshold,
    fit_temperature,
    get_logits,
    split_rows,
)
from finetune.evaluation.metrics import check_finite
from finetune.models.description import CONFIGS_FILE, read_description
from finetune.models.formats import artefact_stem, is_exported, metadata_path

THRESHOLD_TYPES = ("exact_match", "best_f1")


@dataclasses.dataclass(frozen=True)
class Decision:
    """How a model's raw probabilities become an answer.

    Attributes:
        class_names: in the model's order.
        multi_label: whether an image may have several labels.
        temperature: divides the logits.
        temperature_fitted_on: "validation"; None without a validation set, and the temperature is 1.
        exact_match_threshold: multi-label: one threshold for all classes, with the most exact matches.
        best_f1_thresholds: multi-label: one per class; None uses `exact_match_threshold` for each.
        thresholds_fitted_on: "validation" or "training"; None if they are not fitted.
        model: file name of the model that this was fitted for; empty for any.
        abstention: when the model does not answer; None answers every image.
    """

    class_names: list[str]
    multi_label: bool
    temperature: float = 1.0
    temperature_fitted_on: str | None = None
    exact_match_threshold: float = 0.5
    best_f1_thresholds: list[float] | None = None
    thresholds_fitted_on: str | None = None
    model: str = ""
    abstention: Abstention | None = None

    def calibrate(self, probabilities: np.ndarray) -> np.ndarray:
        """Divides the logits behind probabilities by the temperature.

        Returns:
            float32 `(images, classes)`; the classes of a row keep their order.
        """
        raw = np.asarray(probabilities, np.float32)
        if self.temperature == 1:
            return raw
        calibrated = np.empty_like(raw)
        to_probabilities = special.expit if self.multi_label else SOFTMAX
        for rows in split_rows(*raw.shape):
            calibrated[rows] = to_probabilities(get_logits(raw[rows], self.multi_label) / self.temperature)
        if not self.multi_label:
            highest = raw.argmax(axis=1)
            # Rounding to float32 can make the two highest probabilities of a row equal.
            tied = np.flatnonzero(calibrated.argmax(axis=1) != highest)
            calibrated[tied, highest[tied]] = np.nextafter(calibrated[tied].max(axis=1), np.float32(2))
        return calibrated

    def thresholds(self, threshold_type: str = "exact_match") -> np.ndarray:
        """Returns the lowest calibrated probability at which each label is predicted, float32 `(classes,)`."""
        by_class = self.best_f1_thresholds if threshold_type == "best_f1" else None
        return np.array(by_class or [self.exact_match_threshold] * len(self.class_names), np.float32)

    def choose(self, calibrated: np.ndarray, threshold_type: str = "exact_match") -> np.ndarray:
        """Returns the predicted labels, bool `(images, classes)`; single-label: the first of the most probable ones."""
        if self.multi_label:
            # Both in float32: a float64 threshold of 0.7 is above the float32 probability 0.7.
            return np.asarray(calibrated, np.float32) >= self.thresholds(threshold_type)
        return calibrated.argmax(axis=1)[:, None] == np.arange(len(self.class_names))

    def measure_confidence(self, calibrated: np.ndarray) -> np.ndarray:
        """Returns the probability of each image's answer, `(images,)`; multi-label: that of its least certain label."""
        if not self.multi_label:
            return calibrated.max(axis=1)
        return np.where(self.choose(calibrated), calibrated, 1 - calibrated).min(axis=1)

    @property
    def calls_unknown(self) -> bool:
        """Whether images unlike the training photos are not answered."""
        return self.abstention is not None and self.abstention.unknown_threshold is not None

    def decide(
        self, calibrated: np.ndarray, similarities: np.ndarray | None = None, threshold_type: str = "exact_match"
    ) -> Outcomes:
        """Returns which images are answered, and with which labels; see `abstention.decide`."""
        chosen = self.choose(calibrated, threshold_type)
        return decide(self.abstention, self.multi_label, calibrated, chosen, similarities)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `decision.json`."""
        content = dataclasses.asdict(self)
        classes, by_class = content.pop("class_names"), self.best_f1_thresholds
        if by_class is not None:
            content["best_f1_thresholds"] = dict(zip(classes, by_class, strict=True))
        content["abstention"] = None if self.abstention is None else self.abstention.to_dict()
        return {"classes": classes, **content}


def fit_decision(
    truths: dict[str, np.ndarray],
    raw_probabilities: dict[str, np.ndarray],
    class_names: Sequence[str],
    multi_label: bool,
    threshold_range: Sequence[float],
    model: str,
) -> Decision:
    """Fits the temperature on the validation set, and thresholds there or, without one, on the training set.

    Args:
        truths: the labels by set; `test` is ignored, `validation` may be missing.
        raw_probabilities: by set.
        threshold_range: lowest and highest exact-match threshold to try, on calibrated probabilities.

    Raises:
        UserError: a probability is not finite.
    """
    decision = Decision(list(class_names), multi_label, model=os.path.basename(model))
    fitted_on = next((name for name in ("validation", "training") if name in truths), None)
    if fitted_on == "validation":
        temperature = fit_temperature(truths[fitted_on], raw_probabilities[fitted_on], multi_label)
        decision = dataclasses.replace(decision, temperature=temperature, temperature_fitted_on=fitted_on)
    if not multi_label or fitted_on is None:
        return decision
    check_finite(raw_probabilities[fitted_on])
    y_true, calibrated = truths[fitted_on], decision.calibrate(raw_probabilities[fitted_on])
    threshold, _ = find_exact_match_threshold(y_true, calibrated, threshold_range)
    return dataclasses.replace(
        decision,
        exact_match_threshold=threshold,
        best_f1_thresholds=find_best_f1_thresholds(y_true, calibrated, threshold),
        thresholds_fitted_on=fitted_on,
    )


DECISION_FILE = "decision.json"
LARGEST_DECISION_FILE = 2**22
FITTED_ON = (None, "validation", "training")


def get_decision(
    model_path: str,
    truths: dict[str, np.ndarray],
    predictions: dict[str, np.ndarray],
    class_names: Sequence[str],
    multi_label: bool,
    threshold_range: Sequence[float],
) -> Decision:
    """Fits temperature and thresholds, see `fit_decision`.

    An exported model keeps the stored decision, so that it predicts the same labels as the original. So does a model
    whose decision was fitted on a validation set, if there is none now.
    """
    folder = os.path.dirname(os.path.abspath(model_path))
    if is_exported(model_path):
        return read_decision(folder, class_names, multi_label, model_path)
    if "validation" not in truths:
        place, kept = _find_fitted(folder, class_names, multi_label, model_path)
        if kept:
            print(f"No validation set: keeping the decision in {place}.")
            return dataclasses.replace(kept, model=os.path.basename(model_path))
    return fit_decision(truths, predictions, class_names, multi_label, threshold_range, model_path)


def store_decision(folder: str, decision: Decision, model_path: str) -> None:
    """Writes a decision into a folder, unless the model is exported or one fitted on a validation set would be lost."""
    _, stored = _find_fitted(folder, decision.class_names, decision.multi_label, model_path)
    if not is_exported(model_path) and (decision.temperature_fitted_on or stored is None):
        write_decision(folder, decision)


def find_decision_folder(model_path: str, folder: str) -> str:
    """Returns the folder whose `decision.json` is used: the output folder if it has one, or else the model's."""
    return folder if os.path.isfile(os.path.join(folder, DECISION_FILE)) else os.path.dirname(model_path) or os.curdir


def _find_fitted(
    folder: str, class_names: Sequence[str], multi_label: bool, model_path: str
) -> tuple[str, Decision | None]:
    """Returns the stored decision of this model and its path; None unless it is valid and has a fitted temperature."""
    try:
        place, stored, _ = _find_stored(folder, model_path)
    except UserError:
        return "", None
    fits = (
        stored is not None
        and stored.temperature_fitted_on
        and (stored.class_names, stored.multi_label) == (list(class_names), multi_label)
        and (place == model_path or stored.model == os.path.basename(model_path))
    )
    return (place, stored) if fits else ("", None)


def write_decision(folder: str, decision: Decision) -> str:
    """Writes `decision.json` into a folder and returns its path."""
    path = os.path.join(folder, DECISION_FILE)
    write_json(path, decision.to_dict())
    return path


def read_decision(folder: str, class_names: Sequence[str], multi_label: bool, model_path: str) -> Decision:
    """Reads the decision that `test.py` fitted for a model.

    Args:
        folder: of the run.
        class_names: the model's.
        multi_label: whether an image may have several labels.
        model_path: of the model in use. The compressed and exported forms of `best_model.keras` use its decision.

    Returns:
        The stored decision. Without one, or if it belongs to another model, which is printed, the defaults.

    Raises:
        UserError: the file is invalid, or its classes are not the model's.
    """
    folder, model_path = take_path("folder", folder), take_path("model_path", model_path)
    class_names, multi_label = take_names(class_names), take_flag("multi_label", multi_label)
    place, stored, notice = _find_stored(folder, model_path)
    if notice:
        print(notice)
    if stored is None:
        return Decision(class_names, multi_label)
    if not look_the_same(stored.class_names, class_names) or stored.multi_label != multi_label:
        raise _decision_fault(
            place,
            f"expected the model's classes {join_names(class_names)} and multi_label {multi_label}",
            f"{join_names(stored.class_names)!r} and multi_label {stored.multi_label}",
        )
    return stored


def _find_stored(folder: str, model_path: str) -> tuple[str, Decision | None, str]:
    """Finds a model's decision: the one in `decision.json`, or the model's own, inside it or in its `_metadata.json`.

    In the run's folder `decision.json` takes precedence, because users may edit it. Elsewhere the model's own does. So
    does the fitted one of an exported model, which predicts the same labels everywhere.

    Returns:
        The path of the decision, the decision or None, and a notice to print, or nothing.
    """
    path = os.path.join(folder, DECISION_FILE)
    is_at_home = os.path.isfile(os.path.join(os.path.dirname(os.path.abspath(model_path)), CONFIGS_FILE))
    place, own = _read_own(model_path, is_at_home)
    named = _read_decision_file(path) if os.path.lexists(path) else None
    own_is_fitted = own is not None and bool(own.temperature_fitted_on or own.thresholds_fitted_on)
    if named is None or (own_is_fitted and (is_exported(model_path) or not is_at_home)):
        differs = named is not None and not is_exported(model_path) and named != own
        return place, own, f"{path} is ignored: {place} has its own decision." * differs
    if named.model and artefact_stem(named.model) != artefact_stem(model_path):
        if own_is_fitted:
            return place, own, ""
        name = os.path.basename(model_path)
        return path, None, f"{path} is ignored: it was fitted for {named.model}. Run test.py on {name} to fit its own."
    differs = own_is_fitted and place == model_path and named != own
    return path, named, f"Using the decision in {path}; the one inside {place} differs." * differs


def _read_own(model_path: str, is_at_home: bool) -> tuple[str, Decision | None]:
    """Returns the path of the model's own decision, and the decision or None."""
    content = read_description(model_path)
    if content is not None:
        own = content["decision"]
        return model_path, None if own is None else _check_decision(own, f"{model_path}, decision")
    path = metadata_path(model_path)
    # In the run's folder, the metadata of an earlier export may be older than the Keras model.
    is_its = os.path.lexists(path) and not (is_at_home and model_path.endswith(".keras"))
    return path, _read_decision_file(path, "decision") if is_its else None


def _read_decision_file(path: str, part: str = "") -> Decision:
    """Reads and checks `decision.json`, or one part of another JSON file; raises UserError."""
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
    return _check_decision(stored, path)


def _check_decision(stored: Any, path: str) -> Decision:
    """Returns a JSON object as a decision; raises UserError if it is none."""
    if not isinstance(stored, dict):
        raise _decision_fault(path, "expected a JSON object", repr(stored))
    if unknown := sorted(stored.keys() - _DECISION_FIELDS.keys()):
        raise _decision_fault(path, f"expected no fields but {', '.join(_DECISION_FIELDS)}", repr(unknown[0]))
    # Legacy files have no abstention.
    stored = {"abstention": None} | stored
    if missing := sorted(_DECISION_FIELDS.keys() - stored.keys()):
        raise _decision_fault(path, f"expected the field {missing[0]}", "none")
    values = {}
    for name, (kind, is_allowed, words) in _DECISION_FIELDS.items():
        value = stored[name]
        try:
            if name == "abstention":
                values[name] = Abstention.of(value, 1 + values["multi_label"] * (len(values["classes"]) - 1))
                continue
            if name == "best_f1_thresholds":
                value = _in_order(value, values["classes"])
            values[name] = convert(value, kind, is_text=False)
            if not is_allowed(values[name]):
                raise ValueError(value)
        except ValueError as error:
            raise _decision_fault(path, f"{name}: expected {words}", repr(stored[name])) from error
    return Decision(class_names=values.pop("classes"), **values)


def _in_order(by_class: Any, class_names: Sequence[str]) -> list | None:
    """Returns the values of a JSON object in the order of the classes, or None for null; raises ValueError."""
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
    "temperature_fitted_on": (str | None, (None, "validation").__contains__, "validation or null"),
    "exact_match_threshold": (float, _is_probability, "a number from 0 to 1"),
    "best_f1_thresholds": (
        list[float] | None,
        lambda values: values is None or all(map(_is_probability, values)),
        "a number from 0 to 1 for each of classes, or null",
    ),
    "thresholds_fitted_on": (str | None, FITTED_ON.__contains__, "validation, training or null"),
    "model": (str, lambda name: name.isprintable() and name == os.path.basename(name), "the file name of a model"),
    "abstention": (dict | None, lambda _: True, f"null, or an object with {', '.join(Abstention.names())}"),
}
