"""How good predictions are, and how a model's probabilities become answers; no TensorFlow here."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import optimize, sparse, special
from sklearn import metrics as sk

from configs import UserError, convert
from utils import artefact_stem, is_exported, join_names, metadata_path, write_json

THRESHOLD_STEP = 0.01
TOP_K = 5
MANY_CLASSES = 11
CALIBRATION_BINS = 15
RESAMPLES = 1000
LONGEST_CURVE = 500
TEMPERATURE_RANGE = (0.05, 20.0)
# Below float32's least positive number, so that 0 stays the lowest of a row and its logarithm finite.
LEAST_PROBABILITY = 1e-46
# Half of float32's step below 1: where a sigmoid that rounds to 1 begins.
LEAST_DISTANCE_FROM_ONE = 2.0**-25
DECISION_FILE = "decision.json"
LARGEST_DECISION_FILE = 2**22
# Numbers in one block of work: a few arrays of it fit into a processor's cache.
BLOCK = 2**20
# Of a learning-rate range test: a step's weight against that of the one beside it, the steps that tell how it started,
# those that it needs, and what its smoothed loss must fall by: a multiple of the noise of a step, which noise alone
# reaches in 1 of 20 tests of 100 steps, and a share of the loss.
SMOOTHING = 0.8
FIRST_STEPS = 5
LEAST_STEPS = 10
LEAST_FALL = 2.0
LEAST_SHARE = 0.01


# Decisions


@dataclasses.dataclass(frozen=True)
class Decision:
    """How a model's raw probabilities become an answer.

    Attributes:
        class_names: in the model's order.
        multi_label: whether several labels may hold.
        temperature: divides the logits.
        temperature_fitted_on: "validation"; None where there was no validation set, and the temperature is 1.
        exact_match_threshold: multi-label: the one threshold that gives the most exact matches.
        best_f1_thresholds: multi-label: one a class; None stands for `exact_match_threshold` in each.
        thresholds_fitted_on: "validation" or "training"; None where they are not fitted.
        model: file name of the model that all this was fitted for; empty for any.
    """

    class_names: list[str]
    multi_label: bool
    temperature: float = 1.0
    temperature_fitted_on: str | None = None
    exact_match_threshold: float = 0.5
    best_f1_thresholds: list[float] | None = None
    thresholds_fitted_on: str | None = None
    model: str = ""

    def calibrate(self, probabilities: np.ndarray) -> np.ndarray:
        """Divides the logits behind probabilities by the temperature.

        Args:
            probabilities: raw, `(images, classes)`.

        Returns:
            float32 `(images, classes)`; no row's classes change their order, nor its highest class.
        """
        raw = np.asarray(probabilities, np.float32)
        if self.temperature == 1:
            return raw
        calibrated = np.empty_like(raw)
        to_probabilities = special.expit if self.multi_label else _softmax
        for rows in _row_blocks(*raw.shape):
            calibrated[rows] = to_probabilities(_logits(raw[rows], self.multi_label) / self.temperature)
        if not self.multi_label:
            highest = raw.argmax(axis=1)
            # Rounding to float32 may bring the two highest classes of a row together.
            tied = np.flatnonzero(calibrated.argmax(axis=1) != highest)
            calibrated[tied, highest[tied]] = np.nextafter(calibrated[tied].max(axis=1), np.float32(2))
        return calibrated

    def thresholds(self, threshold_type: str = "exact_match") -> np.ndarray:
        """Returns the lowest calibrated probability of each label that holds, float32 `(classes,)`.

        Args:
            threshold_type: `exact_match` or `best_f1`.
        """
        same_for_all = [self.exact_match_threshold] * len(self.class_names)
        by_type = {"exact_match": same_for_all, "best_f1": self.best_f1_thresholds or same_for_all}
        return np.array(by_type[threshold_type], np.float32)

    def choose(self, calibrated: np.ndarray, threshold_type: str = "exact_match") -> np.ndarray:
        """Chooses the labels that hold.

        Args:
            calibrated: what `calibrate` returned, `(images, classes)`.
            threshold_type: multi-label: `exact_match` or `best_f1`.

        Returns:
            bool `(images, classes)`; where one label holds, one True a row, the first of the highest.
        """
        if self.multi_label:
            # In float32 both: a float64 threshold of 0.7 is above the float32 probability 0.7.
            return np.asarray(calibrated, np.float32) >= self.thresholds(threshold_type)
        return calibrated.argmax(axis=1)[:, None] == np.arange(len(self.class_names))

    def to_dict(self) -> dict[str, Any]:
        """Returns what `decision.json` holds."""
        content = dataclasses.asdict(self)
        classes, by_class = content.pop("class_names"), self.best_f1_thresholds
        if by_class is not None:
            content["best_f1_thresholds"] = dict(zip(classes, by_class, strict=True))
        return {"classes": classes, **content}


def _logits(probabilities: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns the logits behind probabilities, float64 of the same shape; of a softmax, up to a constant a row."""
    clipped = np.clip(probabilities, LEAST_PROBABILITY, 1, dtype=np.float64)
    logits = np.log(clipped)
    return logits - np.log(np.maximum(1 - clipped, LEAST_DISTANCE_FROM_ONE)) if multi_label else logits


def _softmax(logits: np.ndarray) -> np.ndarray:
    return special.softmax(logits, axis=1)


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yields slices that cover the rows, each of about `BLOCK` numbers."""
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


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
        truths: by `training`, `validation` (may be absent) and `test`, which is never looked at: int `(images,)`,
            positions in `class_names`; multi-label: `(images, classes)` of zeros and ones.
        raw_probabilities: `(images, classes)` by the same names.
        class_names: in the model's order.
        multi_label: whether thresholds are wanted.
        threshold_range: lowest and highest threshold to try for exact matches, on calibrated probabilities.
        model: the model's file.

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


def fit_temperature(y_true: np.ndarray, probabilities: np.ndarray, multi_label: bool) -> float:
    """Finds the temperature under which a set's labels are most likely.

    Source: Guo et al., ICML 2017, section 4.2 (arXiv:1706.04599); multi-label: the same for each label's sigmoid.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        probabilities: raw, `(images, classes)`; 0 and 1 count as what float32 rounds to them.
        multi_label: which of the two.

    Returns:
        In `TEMPERATURE_RANGE`. 1 where no answer is wrong: the likelihood then grows without end towards
        temperature 0, for the set cannot tell how sure is too sure.

    Raises:
        UserError: a probability is not finite.
    """
    check_finite(probabilities)
    truth = np.asarray(y_true, bool) if multi_label else np.asarray(y_true)
    if multi_label:
        wrong = np.where(truth, probabilities < 0.5, probabilities > 0.5)
    else:
        wrong = probabilities > np.take_along_axis(probabilities, truth[:, None], axis=1)
    if not wrong.any():
        return 1.0
    slope = functools.partial(_likelihood_slope, truth, probabilities, multi_label)
    lowest, highest = np.log(TEMPERATURE_RANGE)
    if slope(lowest) <= 0:
        return TEMPERATURE_RANGE[0]
    if slope(highest) >= 0:
        return TEMPERATURE_RANGE[1]
    return float(np.exp(optimize.brentq(slope, lowest, highest, xtol=1e-9)))


def _likelihood_slope(truth: np.ndarray, probabilities: np.ndarray, multi_label: bool, log_temperature: float) -> float:
    """Returns the negative log-likelihood's derivative by `1 / temperature`, which rises with that."""
    total = 0.0
    for rows in _row_blocks(*probabilities.shape):
        logits = _logits(probabilities[rows], multi_label)
        scaled = logits * np.exp(-log_temperature)
        if multi_label:
            total += (logits * (special.expit(scaled) - truth[rows])).sum()
        else:
            at_truth = np.take_along_axis(logits, truth[rows, None], axis=1)
            total += (logits * _softmax(scaled)).sum() - at_truth.sum()
    return float(total)


def find_exact_match_threshold(
    y_true: np.ndarray, probabilities: np.ndarray, threshold_range: Sequence[float]
) -> tuple[float, float]:
    """Finds the threshold at which most images have exactly their labels predicted.

    Args:
        y_true: `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`.
        threshold_range: lowest and highest threshold to try, in steps of 0.01.

    Returns:
        The threshold (the middle of the best ones where several do equally well) and its exact-match accuracy.
    """
    lowest, highest = threshold_range
    # Python numbers: NumPy's own would compare in another precision than the evaluation does.
    candidates = np.round(np.arange(lowest, highest + THRESHOLD_STEP / 2, THRESHOLD_STEP), 4).tolist()
    truth = y_true.astype(bool)
    accuracies = np.array([((probabilities >= threshold) == truth).all(axis=1).mean() for threshold in candidates])
    best = np.flatnonzero(accuracies == accuracies.max())
    return candidates[best[len(best) // 2]], float(accuracies.max())


def find_best_f1_thresholds(y_true: np.ndarray, probabilities: np.ndarray, fallback: float) -> list[float]:
    """Finds the threshold of each class that gives it the highest F1.

    Args:
        y_true: `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`, compared as float32.
        fallback: threshold of a class that no image has: none is better than another.

    Returns:
        For each class a float32 number in `[0, 1]` as a Python float, halfway between the lowest probability that
        it lets hold and the highest that it does not; the middle one where several do equally well.
    """
    return [
        _find_best_f1_threshold(truth, scores) if truth.any() else float(fallback)
        for truth, scores in zip(y_true.astype(bool).T, np.asarray(probabilities, np.float32).T, strict=True)
    ]


def _find_best_f1_threshold(truth: np.ndarray, scores: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    descending = np.append(scores[order], np.float32(0))
    counts = np.append(1 + np.flatnonzero(np.diff(descending[:-1])), len(scores))
    f1 = 2 * np.cumsum(truth[order])[counts - 1] / (counts + truth.sum())
    best = np.flatnonzero(f1 == f1.max())
    count = counts[best[len(best) // 2]]
    lowest_chosen, highest_left = descending[count - 1], descending[count]
    middle = np.float32((float(lowest_chosen) + float(highest_left)) / 2)
    return float(middle if middle > highest_left else lowest_chosen)


def check_finite(probabilities: np.ndarray) -> None:
    """Raises UserError where a model answered with something that is not a number."""
    if wrong := int((~np.isfinite(probabilities)).any(axis=1).sum()):
        raise UserError(
            f"The model's probabilities of {wrong} of {len(probabilities)} images are not finite: its training has "
            "diverged. Train again with a lower learning_rate."
        )


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
    if stored.class_names != default.class_names or stored.multi_label != multi_label:
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


# Evaluation


def evaluate_set(
    y_true: np.ndarray,
    raw_probabilities: np.ndarray,
    decision: Decision,
    bootstrap: bool = False,
    seed: int = 0,
    threshold_range: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Evaluates one set of images under a decision.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        raw_probabilities: of the model, `(images, classes)`.
        decision: as fitted; the set's own labels have no part in it.
        bootstrap: add `intervals`, as `get_intervals` returns them.
        seed: of the bootstrap.
        threshold_range: multi-label, for the test set: add `optimistic`, the best exact-match threshold in this
            range by the set's own labels.

    Returns:
        `images`, the figures of `get_evaluation_metrics` or `get_multilabel_evaluation_metrics` and `calibration`;
        multi-label: `best_f1_threshold` and `f1_at_best_f1_threshold` of each class as well. JSON can hold it.

    Raises:
        UserError: a probability is not finite.
    """
    check_finite(raw_probabilities)
    raw_probabilities = np.asarray(raw_probabilities, np.float32)
    calibrated = decision.calibrate(raw_probabilities)
    figures: dict[str, Any] = {"images": len(y_true)}
    if decision.multi_label:
        threshold = decision.exact_match_threshold
        figures |= get_multilabel_evaluation_metrics(
            y_true, calibrated, decision.class_names, threshold, ranking=raw_probabilities
        )
        _add_best_f1(figures["per_class"], y_true, calibrated, decision)
        if threshold_range is not None:
            best, accuracy = find_exact_match_threshold(y_true, calibrated, threshold_range)
            note = "chosen on the test set itself: optimistic"
            figures["optimistic"] = {"threshold": best, "exact_match_accuracy": accuracy, "note": note}
    else:
        figures |= get_evaluation_metrics(y_true, raw_probabilities, decision.class_names)
    figures["calibration"] = _evaluate_calibration(y_true, raw_probabilities, calibrated, decision.multi_label)
    if bootstrap:
        figures["intervals"] = get_intervals(y_true, raw_probabilities, decision, seed)
    return figures


def _add_best_f1(per_class: dict[str, dict], y_true: np.ndarray, calibrated: np.ndarray, decision: Decision) -> None:
    truth, chosen = y_true.astype(bool), decision.choose(calibrated, "best_f1")
    for position, threshold in enumerate(decision.thresholds("best_f1").tolist()):
        row = per_class[decision.class_names[position]]
        row["best_f1_threshold"] = threshold
        row["f1_at_best_f1_threshold"] = _binary_metrics(truth[:, position], chosen[:, position])["f1"]


def get_evaluation_metrics(y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Evaluates single-label predictions.

    Args:
        y_true: int `(images,)`, positions in `class_names`.
        probabilities: `(images, classes)`; the highest one of a row is the prediction.
        class_names: in the order of the positions.

    Returns:
        `accuracy`; `balanced_accuracy`, the mean recall of the classes that have images; `macro_f1`, the mean of
        the classes that are true or predicted somewhere; `top_5_accuracy` where there are more than 10 classes;
        `per_class` precision, recall, f1 and support by class name, 0 where undefined; `confusion_matrix`, rows
        true and columns predicted.
    """
    predicted, positions = probabilities.argmax(axis=1), np.arange(len(class_names))
    per_class = {
        name: _binary_metrics(y_true == position, predicted == position) for position, name in enumerate(class_names)
    }
    figures = {
        "accuracy": float(sk.accuracy_score(y_true, predicted)),
        "balanced_accuracy": float(np.mean([row["recall"] for row in per_class.values() if row["support"]])),
        "macro_f1": _macro_f1(y_true, predicted, positions),
    }
    if len(class_names) >= MANY_CLASSES:
        figures[f"top_{TOP_K}_accuracy"] = float(is_in_top_k(y_true, probabilities).mean())
    matrix = sk.confusion_matrix(y_true, predicted, labels=positions).tolist()
    return {**figures, "per_class": per_class, "confusion_matrix": matrix}


def is_in_top_k(y_true: np.ndarray, probabilities: np.ndarray, k: int = TOP_K) -> np.ndarray:
    """Tells for each image whether its class is among the `k` highest; of equal ones the first counts as higher.

    Args:
        y_true: int `(images,)`, class positions.
        probabilities: `(images, classes)`.
        k: how many may be named.

    Returns:
        bool `(images,)`.
    """
    at_truth = np.take_along_axis(probabilities, y_true[:, None], axis=1)
    equal_before = (probabilities == at_truth) & (np.arange(probabilities.shape[1]) < y_true[:, None])
    return ((probabilities > at_truth) | equal_before).sum(axis=1) < k


def get_multilabel_evaluation_metrics(
    y_true: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    threshold: float,
    ranking: np.ndarray | None = None,
) -> dict[str, Any]:
    """Evaluates multi-label predictions.

    Args:
        y_true: `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`.
        class_names: in the order of the columns.
        threshold: the lowest probability of a label that holds.
        ranking: scores for AUROC and average precision, where a temperature has made some probabilities equal;
            `probabilities` by default.

    Returns:
        `mean_auroc`, `mean_average_precision`, `exact_match_accuracy`, `hamming_loss`, `macro_f1` (of the classes
        that are true or predicted somewhere), `threshold`; `per_class` by class name: precision, recall, f1 and
        support (0 where undefined), `auroc` and `average_precision` (None where a class has no positive, or for
        AUROC no negative, and then left out of the mean).
    """
    truth, predicted = y_true.astype(bool), probabilities >= threshold
    scores = probabilities if ranking is None else ranking
    aurocs = get_aurocs(y_true, scores)
    precisions = get_average_precisions(y_true, scores)
    per_class = {}
    for position, name in enumerate(class_names):
        per_class[name] = _binary_metrics(truth[:, position], predicted[:, position])
        per_class[name]["auroc"] = none_if_undefined(aurocs[position])
        per_class[name]["average_precision"] = none_if_undefined(precisions[position])
    return {
        "mean_auroc": none_if_undefined(mean_of_defined(aurocs)),
        "mean_average_precision": none_if_undefined(mean_of_defined(precisions)),
        "exact_match_accuracy": float((truth == predicted).all(axis=1).mean()),
        "hamming_loss": float((truth != predicted).mean()),
        "macro_f1": _macro_f1(truth, predicted, np.arange(len(class_names))),
        "threshold": float(threshold),
        "per_class": per_class,
    }


def _macro_f1(truth: np.ndarray, predicted: np.ndarray, positions: np.ndarray) -> float | None:
    """Returns the mean F1 of the classes that are true or predicted somewhere; None where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = sk.f1_score(truth, predicted, labels=positions, average="macro", zero_division=np.nan)
    return none_if_undefined(mean)


def _binary_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Returns precision, recall, f1 and support of one class from boolean `(images,)`; 0 where undefined."""
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        truth, predicted, average="binary", pos_label=True, zero_division=0
    )
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(truth.sum())}


def get_aurocs(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns the area under the ROC curve of each class, NaN where it is undefined; `(classes,)`.

    It is where all images or none have the class, and where a score is not finite.
    """
    return np.array(
        [
            sk.roc_auc_score(truth, scores) if 0 < truth.sum() < len(truth) and np.isfinite(scores).all() else np.nan
            for truth, scores in zip(y_true.T, probabilities.T, strict=True)
        ]
    )


def get_average_precisions(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns the average precision of each class, NaN where no image has it; `(classes,)`."""
    return np.array(
        [
            sk.average_precision_score(truth, scores) if truth.any() else np.nan
            for truth, scores in zip(y_true.T, probabilities.T, strict=True)
        ]
    )


def mean_of_defined(values: np.ndarray) -> float:
    """Returns the mean of the values that are not NaN; NaN where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(values))


def none_if_undefined(value: float) -> float | None:
    """Returns the value for JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)


# Calibration


def get_calibration(confidences: np.ndarray, outcomes: np.ndarray) -> tuple[float, list[dict[str, Any]]]:
    """Compares how sure answers are with how often they are right.

    Source: Guo et al., ICML 2017, eqs. 2-3 and 5 (arXiv:1706.04599).

    Args:
        confidences: `(answers,)`, in `[0, 1]`, compared as float32.
        outcomes: bool `(answers,)`, whether each answer is right.

    Returns:
        The expected calibration error, and of each of 15 equally wide bins `(low, high]` that is not empty the mean
        `confidence`, the share that is right (`accuracy`) and the `count`.
    """
    confidences = np.asarray(confidences, np.float32)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1].astype(np.float32)
    positions = np.searchsorted(edges, confidences, side="left")
    counts, confident, right = (
        np.bincount(positions, weights, CALIBRATION_BINS) for weights in (None, confidences, outcomes)
    )
    error = float(np.abs(right - confident).sum() / len(confidences))
    bins = [
        {"confidence": float(confident[place] / count), "accuracy": float(right[place] / count), "count": int(count)}
        for place, count in enumerate(counts)
        if count
    ]
    return error, bins


def _evaluate_calibration(
    y_true: np.ndarray, raw: np.ndarray, calibrated: np.ndarray, multi_label: bool
) -> dict[str, Any]:
    """Compares the top class with being right, or multi-label every probability with the label's presence."""
    results = {}
    for suffix, probabilities in (("", calibrated), ("_uncalibrated", raw)):
        if multi_label:
            confidences, outcomes = probabilities.ravel(), y_true.astype(bool).ravel()
        else:
            confidences, outcomes = probabilities.max(axis=1), probabilities.argmax(axis=1) == y_true
        error, bins = get_calibration(confidences, outcomes)
        results |= {f"expected_calibration_error{suffix}": error, f"bins{suffix}": bins}
    return results


# Intervals


def get_intervals(
    y_true: np.ndarray, raw_probabilities: np.ndarray, decision: Decision, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Estimates how far the headline figures would vary with other images: 95 % bootstrap percentile intervals.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3. Whole images are drawn with
    replacement. As in the figures themselves, a class that is undefined in a resample has no part in its means.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        raw_probabilities: of the model, `(images, classes)`.
        decision: what the answers follow from.
        seed: of the resamples.
        resamples: how many.

    Returns:
        `[low, high]` by the name of each headline figure, None where it is undefined throughout; multi-label:
        `per_class` holds those of `precision`, `recall` and `f1` by class name.
    """
    measures = [_prepare_counts(y_true, raw_probabilities, decision)]
    if decision.multi_label:
        measures.append(_prepare_ranking(y_true.astype(bool), raw_probabilities))
    parts = [
        {name: values for measure in measures for name, values in measure(weights).items()}
        for weights in _draw_resamples(len(y_true), resamples, np.random.default_rng(seed))
    ]
    samples = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    intervals: dict[str, Any] = {name: _interval(values) for name, values in samples.items() if values.ndim == 1}
    if decision.multi_label:
        intervals["per_class"] = {
            name: {key: _interval(samples[key][:, position]) for key in ("precision", "recall", "f1")}
            for position, name in enumerate(decision.class_names)
        }
    return intervals


def _interval(values: np.ndarray) -> list[float] | None:
    defined = values[~np.isnan(values)]
    return np.percentile(defined, [2.5, 97.5]).tolist() if len(defined) else None


def _draw_resamples(images: int, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields how often each image is drawn, float32 `(some resamples, images)`, a block at a time."""
    step = max(1, BLOCK // images)
    for start in range(0, resamples, step):
        shape = min(step, resamples - start), images
        drawn = rng.integers(images, size=shape) + images * np.arange(shape[0])[:, None]
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(shape).astype(np.float32)


Measure = Callable[[np.ndarray], dict[str, np.ndarray]]


def _prepare_counts(y_true: np.ndarray, raw: np.ndarray, decision: Decision) -> Measure:
    """Prepares the figures that follow from counts of right and wrong labels.

    Returns:
        A function from weights `(resamples, images)` to figures `(resamples,)`, and `precision`, `recall` and `f1`
        `(resamples, classes)`, NaN where undefined.
    """
    predicted = decision.choose(decision.calibrate(raw))
    truth = y_true.astype(bool) if decision.multi_label else y_true[:, None] == np.arange(predicted.shape[1])
    per_image = {"accuracy": (truth == predicted).all(axis=1)}
    if decision.multi_label:
        per_image = {"exact_match_accuracy": per_image["accuracy"]}
    elif predicted.shape[1] >= MANY_CLASSES:
        per_image[f"top_{TOP_K}_accuracy"] = is_in_top_k(y_true, raw)
    indicators = [sparse.csc_array(chosen.astype(np.float32)).T for chosen in (truth, predicted, truth & predicted)]

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        images = weights.sum(axis=1)
        figures = {name: _divide(weights @ values.astype(np.float32), images) for name, values in per_image.items()}
        support, chosen, right = ((indicator @ weights.T).T for indicator in indicators)
        by_class = {
            "precision": _divide(right, chosen),
            "recall": _divide(right, support),
            "f1": _divide(2 * right, support + chosen),
        }
        if decision.multi_label:
            figures["hamming_loss"] = _divide((support + chosen - 2 * right).sum(axis=1), images * truth.shape[1])
        else:
            figures["balanced_accuracy"] = _row_means(by_class["recall"])
        return {**figures, "macro_f1": _row_means(by_class["f1"]), **by_class}

    return measure


def _prepare_ranking(truth: np.ndarray, scores: np.ndarray) -> Measure:
    """Prepares the mean AUROC and average precision, as `_prepare_counts` does.

    Args:
        truth: bool `(images, classes)`.
        scores: `(images, classes)`.
    """
    rankings = [_Ranking.of(*column) for column in zip(truth.T, scores.T, strict=True)]

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        aurocs, precisions = np.stack([ranking.measure(weights) for ranking in rankings], axis=-1)
        return {"mean_auroc": _row_means(aurocs), "mean_average_precision": _row_means(precisions)}

    return measure


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """One class's images from the highest score to the lowest, in groups of one score that hold a positive.

    Attributes:
        order: int32 `(images,)`, all images by descending score.
        positives: int32, the positive images in that order.
        starts: of each group, the images that rank higher.
        ends: of each group, the images that rank higher or within it.
        positive_ends: of each group, the positive ones of these.
    """

    order: np.ndarray
    positives: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    positive_ends: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, scores: np.ndarray) -> _Ranking:
        """Ranks bool `(images,)` by scores `(images,)`."""
        order = np.argsort(-scores, kind="stable").astype(np.int32)
        descending = -scores[order]
        at_positives = descending[truth[order]]
        groups, counts = np.unique(at_positives, return_counts=True)
        starts, ends = (np.searchsorted(descending, groups, side=side) for side in ("left", "right"))
        return cls(order, order[truth[order]], starts, ends, np.cumsum(counts))

    def measure(self, weights: np.ndarray) -> np.ndarray:
        """Returns AUROC and average precision `(2, resamples)`, NaN where undefined, of weights."""
        drawn, right = _cumulate(weights, self.order), _cumulate(weights, self.positives)
        images, positives = drawn[:, -1].astype(np.float64), right[:, -1].astype(np.float64)
        right, chosen = np.take(right, self.positive_ends, axis=1), np.take(drawn, self.ends, axis=1)
        gains = np.diff(right, prepend=0)
        # Pairs of a positive and an image that ranks higher, those of one score by half: half of the positives' own.
        above = (gains * (chosen + np.take(drawn, self.starts, axis=1))).sum(axis=1) / 2
        negatives_above = above - positives**2 / 2
        precisions = (gains * right / np.maximum(chosen, 1)).sum(axis=1)
        aurocs = 1 - _divide(negatives_above, positives * (images - positives))
        return np.stack([aurocs, _divide(precisions, positives)])


def _cumulate(weights: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns the running sums of weights in an order, from 0 on; float32 `(resamples, len(order) + 1)`."""
    sums = np.zeros((len(weights), len(order) + 1), np.float32)
    np.cumsum(np.take(weights, order, axis=1), axis=1, out=sums[:, 1:])
    return sums


def _divide(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Returns the quotients, NaN where the denominator is 0."""
    quotients = np.full(np.shape(numerators), np.nan)
    return np.divide(numerators, denominators, out=quotients, where=denominators > 0, dtype=np.float64)


def _row_means(values: np.ndarray) -> np.ndarray:
    """Returns the mean of each row's values that are not NaN; NaN where there is none."""
    defined = ~np.isnan(values)
    return _divide(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1))


# Curves


def get_curves(y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Computes each class's ROC and precision-recall curve against all others.

    Args:
        y_true: int `(images,)`, class positions; or `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`.
        class_names: in the order of the columns.

    Returns:
        By class name: `false_positive_rate` and `true_positive_rate`, `precision` and `recall` (lists of at most
        500 points in the curve's order; empty where undefined), `auroc` and `average_precision` of the whole curves
        (None where undefined).
    """
    truth = np.asarray(y_true)
    if truth.ndim == 1:
        truth = truth[:, None] == np.arange(len(class_names))
    truth = truth.astype(bool)
    aurocs, precisions = get_aurocs(truth, probabilities), get_average_precisions(truth, probabilities)
    curves = {}
    for position, name in enumerate(class_names):
        labels, scores = truth[:, position], probabilities[:, position]
        false_positive_rate = true_positive_rate = precision = recall = []
        if not np.isnan(aurocs[position]):
            false_positive_rate, true_positive_rate = _thin(*sk.roc_curve(labels, scores)[:2])
        if labels.any():
            precision, recall = _thin(*sk.precision_recall_curve(labels, scores)[:2])
        curves[name] = {
            "false_positive_rate": false_positive_rate,
            "true_positive_rate": true_positive_rate,
            "precision": precision,
            "recall": recall,
            "auroc": none_if_undefined(aurocs[position]),
            "average_precision": none_if_undefined(precisions[position]),
        }
    return curves


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """Keeps at most `LONGEST_CURVE` points, both ends among them, at even distances along the curve."""
    if len(x) > LONGEST_CURVE:
        lengths = np.concatenate([[0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        kept = np.unique(np.searchsorted(lengths, np.linspace(0, lengths[-1], LONGEST_CURVE)))
        x, y = x[kept], y[kept]
    return x.tolist(), y.tolist()


# Text


def format_evaluation(metrics: dict[str, Any]) -> str:
    """Lays out what `evaluate_set` or either evaluation function returned as a text table."""
    per_class, intervals = metrics["per_class"], metrics.get("intervals", {})
    columns = list(next(iter(per_class.values())))
    width = max(len("class"), *map(len, per_class))
    widths = {column: max(len(column), 9) + 2 for column in columns}
    lines = [f"{'class':<{width}}" + "".join(f"{column.replace('_', ' '):>{widths[column]}}" for column in columns)]
    for name, row in per_class.items():
        lines.append(f"{name:<{width}}" + "".join(f"{_format(row[column]):>{widths[column]}}" for column in columns))
    if "confusion_matrix" in metrics:
        lines += ["", *_format_confusion_matrix(metrics["confusion_matrix"], list(per_class))]
    lines.append("")
    for name, value in metrics.items():
        if isinstance(value, float | None):
            lines.append(f"{name.replace('_', ' ')}: {_format(value)}{_format_interval(intervals.get(name))}")
    if "calibration" in metrics:
        after, before = (
            metrics["calibration"][f"expected_calibration_error{suffix}"] for suffix in ("", "_uncalibrated")
        )
        without = f" ({_format(before)} without the temperature)" * (before != after)
        lines.append(f"expected calibration error: {_format(after)}{without}")
    if "optimistic" in metrics:
        best = metrics["optimistic"]
        accuracy, threshold = _format(best["exact_match_accuracy"]), _format(best["threshold"])
        lines.append(f"best exact match accuracy: {accuracy} at threshold {threshold} ({best['note']})")
    return "\n".join(lines)


def _format_confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> list[str]:
    head = "true, predicted ->"
    rows = [f"{position} {name}" for position, name in enumerate(class_names)]
    width = max(len(head), *map(len, rows))
    cell = 1 + max(4, *(len(str(max(row))) for row in matrix))
    return [
        "confusion matrix",
        f"{head:<{width}}" + "".join(f"{position:>{cell}}" for position in range(len(class_names))),
        *(
            f"{name:<{width}}" + "".join(f"{count:>{cell}}" for count in row)
            for name, row in zip(rows, matrix, strict=True)
        ),
    ]


def _format(value: float | int | None) -> str:
    if value is None:
        return "undefined"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _format_interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else " (95 % interval {:.4f} to {:.4f})".format(*interval)


# Learning-rate range test


def smooth_losses(losses: np.ndarray) -> np.ndarray:
    """Smooths the losses of a learning-rate range test.

    The mean of two exponential averages, one from each end, both corrected for their start: one alone would lag.
    Losses above twice that of the start count as that: training has diverged there, and how far tells nothing.

    Args:
        losses: finite, `(steps,)`.

    Returns:
        float64 `(steps,)`.
    """
    capped = np.minimum(losses, 2 * np.median(losses[:FIRST_STEPS]))
    return (_average_exponentially(capped) + _average_exponentially(capped[::-1])[::-1]) / 2


def _average_exponentially(values: np.ndarray) -> np.ndarray:
    powers = SMOOTHING ** np.arange(len(values))
    return np.convolve(values, powers)[: len(values)] / np.cumsum(powers)


def suggest_learning_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Suggests a learning rate from the losses of steps under rising ones.

    It is the last rate at which half of the way lies ahead that the smoothed loss falls, from its highest value to its
    lowest one after that: where an S-shaped curve falls the most steeply, and far from where training diverges.

    Source of the test: Smith, WACV 2017, section 3.3 (arXiv:1506.01186).

    Args:
        rates: `(steps,)`, rising.
        losses: of the steps' batches, `(steps,)`; those that are not finite are left out.

    Raises:
        UserError: fewer than 10 losses are finite, or the loss does not fall by more than noise.
    """
    is_finite = np.isfinite(losses)
    rates, known = np.asarray(rates)[is_finite], np.asarray(losses, np.float64)[is_finite]
    if len(known) < LEAST_STEPS:
        raise UserError(
            f"The learning-rate test needs {LEAST_STEPS} steps with a finite loss. Received: {len(known)} of "
            f"{len(losses)} steps. Check the images and the weights that training starts from."
        )
    smooth = smooth_losses(known)
    lowest = int(smooth.argmin())
    highest = int(smooth[: lowest + 1].argmax())
    fall = smooth[highest] - smooth[lowest]
    # The steps' own differences: their distance from the smoothed curve would count its bends as noise.
    noise = np.std(np.diff(known[: max(lowest + 1, LEAST_STEPS)])) / np.sqrt(2)
    least = max(LEAST_FALL * noise, LEAST_SHARE * smooth[highest])
    if fall <= least:
        raise UserError(
            f"No learning rate from {rates[0]:.2g} to {rates[-1]:.2g} made the loss fall clearly: expected a fall of "
            f"more than {least:.2g}, {LEAST_FALL:g} times the noise of a step and {LEAST_SHARE:.0%} of the loss. "
            f"Received: {fall:.2g}. Raise batch_size against the noise, or check the labels."
        )
    halfway = smooth[lowest] + fall / 2
    return float(rates[np.flatnonzero(smooth[: lowest + 1] >= halfway)[-1]])
