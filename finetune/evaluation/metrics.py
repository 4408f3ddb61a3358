"""Metrics, confusion matrices and curves, from labels and probabilities."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn import metrics as sk

from finetune.core.arguments import check_rows, take_labels, take_names, take_share, take_table
from finetune.core.options import UserError
from finetune.core.texts import MOST_LISTED

# Rows true and columns predicted; or counts by the name of the true and then of the predicted class.
ConfusionMatrix = list[list[int]] | dict[str, dict[str, int]]
TOP_K = 5
MANY_CLASSES = 11
CALIBRATION_BINS = 15
LONGEST_CURVE = 500


class Cells(NamedTuple):
    """The cells of a confusion matrix that are above 0, row by row.

    Rows and columns are positions of true and predicted classes, shares are of the true class, in `(0, 1]`.
    """

    rows: np.ndarray
    columns: np.ndarray
    counts: np.ndarray
    shares: np.ndarray


def count_confusions(y_true: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> ConfusionMatrix:
    """Returns the confusion matrix.

    Returns:
        Lists of counts, rows true and columns predicted, for up to `MOST_LISTED` classes. For more, the counts above 0
        by the names of the true and the predicted class: `{"cat": {"cat": 9, "dog": 1}}`.
    """
    number = len(class_names)
    pairs, counts = np.unique(y_true.astype(np.int64) * number + predicted, return_counts=True)
    if number <= MOST_LISTED:
        matrix = np.zeros(number * number, np.int64)
        matrix[pairs] = counts
        return matrix.reshape(number, number).tolist()
    stored: dict[str, dict[str, int]] = {}
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        stored.setdefault(class_names[pair // number], {})[class_names[pair % number]] = count
    return stored


def read_cells(stored: ConfusionMatrix, class_names: Sequence[str]) -> Cells:
    """Returns the cells above 0 of a confusion matrix, in either form of `count_confusions`."""
    if isinstance(stored, dict):
        positions = {name: position for position, name in enumerate(class_names)}
        found = sorted(
            (positions[true], positions[predicted], count)
            for true, row in stored.items()
            for predicted, count in row.items()
        )
        rows, columns, counts = np.array(found, int).reshape(-1, 3).T
    else:
        matrix = np.array(stored, int)
        rows, columns = np.nonzero(matrix)
        counts = matrix[rows, columns]
    totals = np.bincount(rows, counts, len(class_names))
    return Cells(rows, columns, counts, counts / totals[rows])


def list_confusions(stored: ConfusionMatrix, class_names: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Lists the most frequent confusions of two classes, the most frequent first.

    Returns:
        `true` and `predicted`, names; `count` of images, and their `share` of the true class.
    """
    cells = read_cells(stored, class_names)
    wrong = np.flatnonzero(cells.rows != cells.columns)
    order = wrong[np.argsort(-cells.counts[wrong], kind="stable")][:most]
    return [
        {
            "true": class_names[cells.rows[cell]],
            "predicted": class_names[cells.columns[cell]],
            "count": int(cells.counts[cell]),
            "share": float(cells.shares[cell]),
        }
        for cell in order
    ]


def to_indicators(y_true: np.ndarray, classes: int) -> np.ndarray:
    """Returns labels of either form as bool `(images, classes)`."""
    return y_true.astype(bool) if y_true.ndim == 2 else y_true[:, None] == np.arange(classes)


def check_finite(probabilities: np.ndarray) -> None:
    """Raises UserError if a probability is not finite."""
    if wrong := int((~np.isfinite(probabilities)).any(axis=1).sum()):
        raise UserError(
            f"The model's probabilities of {wrong} of {len(probabilities)} images are not finite: its training has "
            "diverged. Train again with a lower learning_rate."
        )


def get_evaluation_metrics(y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Evaluates single-label predictions.

    Args:
        y_true: int `(images,)`, positions in `class_names`.
        probabilities: `(images, classes)`; the highest one of a row is the prediction.
        class_names: in the order of the positions.

    Returns:
        `accuracy`; `balanced_accuracy`, the mean recall of the classes that have images; `macro_f1`, the mean over
        the classes that are true or predicted somewhere; `top_5_accuracy` for more than 10 classes; `per_class`
        precision, recall, f1 and support by class name, 0 if undefined; `confusion_matrix`, see `count_confusions`.

    Raises:
        UserError: the arguments are not as described, or differ in the number of images or classes.
    """
    class_names = take_names(class_names)
    probabilities = take_table("probabilities", probabilities, len(class_names))
    y_true = take_labels("y_true", y_true, len(class_names), len(probabilities))
    predicted, positions = probabilities.argmax(axis=1), np.arange(len(class_names))
    right, chosen, support = (
        np.bincount(labels, minlength=len(class_names)) for labels in (y_true[y_true == predicted], predicted, y_true)
    )
    per_class = dict(zip(class_names, class_metrics(right, chosen, support), strict=True))
    metrics = {
        "accuracy": float(sk.accuracy_score(y_true, predicted)),
        "balanced_accuracy": float(np.mean([row["recall"] for row in per_class.values() if row["support"]])),
        "macro_f1": _macro_f1(y_true, predicted, positions),
    }
    if len(class_names) >= MANY_CLASSES:
        metrics[f"top_{TOP_K}_accuracy"] = float(is_in_top_k(y_true, probabilities).mean())
    matrix = count_confusions(y_true, predicted, class_names)
    return {**metrics, "per_class": per_class, "confusion_matrix": matrix}


def is_in_top_k(y_true: np.ndarray, probabilities: np.ndarray, k: int = TOP_K) -> np.ndarray:
    """Returns whether each image's class is among its `k` most probable ones; of equal ones the first ranks higher."""
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
        threshold: the lowest probability of a predicted label.
        ranking: scores for AUROC and average precision, because a temperature can make probabilities equal;
            `probabilities` by default.

    Returns:
        `mean_auroc`, `mean_average_precision`, `exact_match_accuracy`, `hamming_loss`, `macro_f1` (over the classes
        that are true or predicted somewhere), `threshold`; `per_class` by class name: precision, recall, f1 and
        support (0 if undefined), `auroc` and `average_precision` (None and left out of the mean if a class has no
        positive image, or for AUROC no negative one).

    Raises:
        UserError: the arguments are not as described, or differ in the number of images or classes.
    """
    class_names, threshold = take_names(class_names), take_share("threshold", threshold)
    probabilities = take_table("probabilities", probabilities, len(class_names))
    y_true = take_table("y_true", y_true, len(class_names), is_binary=True)
    check_rows("y_true", y_true, probabilities)
    scores = probabilities if ranking is None else ranking
    check_rows("ranking", scores, probabilities)
    truth, predicted = y_true.astype(bool), probabilities >= threshold
    aurocs, precisions = get_aurocs(y_true, scores), get_average_precisions(y_true, scores)
    counts = ((truth & predicted).sum(axis=0), predicted.sum(axis=0), truth.sum(axis=0))
    per_class = dict(zip(class_names, class_metrics(*counts), strict=True))
    for position, name in enumerate(class_names):
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
    """Returns the mean F1 of the classes that are true or predicted somewhere; None if there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = sk.f1_score(truth, predicted, labels=positions, average="macro", zero_division=np.nan)
    return none_if_undefined(mean)


def class_metrics(right: np.ndarray, chosen: np.ndarray, support: np.ndarray) -> list[dict[str, Any]]:
    """Returns precision, recall, f1 and support of each class, 0 if undefined.

    They come from the numbers of true positives, of images predicted to be of the class, and of images of the class.
    """
    # If a denominator is 0, so is its numerator.
    quotients = [right / np.maximum(chosen, 1), right / np.maximum(support, 1)]
    columns = [*quotients, 2 * right / np.maximum(support + chosen, 1), support]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [dict(zip(("precision", "recall", "f1", "support"), row, strict=True)) for row in rows]


def get_aurocs(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns the area under the ROC curve of each class, `(classes,)`.

    It is NaN if all images or none have the class, or if a score is not finite.

    Source: Hanley and McNeil, Radiology 143:29, 1982: the rank sum of the positives; equal scores share their ranks.
    """
    return _measure_columns(_auroc, y_true, probabilities)


def get_average_precisions(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns the average precision of each class, `(classes,)`; NaN if no image has it or a score is not finite."""
    return _measure_columns(_average_precision, y_true, probabilities)


def _measure_columns(
    measure: Callable[[np.ndarray, np.ndarray], float], y_true: np.ndarray, probabilities: np.ndarray
) -> np.ndarray:
    """Computes a metric of each class from the sorted scores of its positives and of all images; NaN if undefined."""
    columns = zip(y_true.T, probabilities.T, strict=True)
    pairs = ((np.sort(scores[truth.astype(bool)]), np.sort(scores)) for truth, scores in columns)
    return np.array(
        [measure(*pair) if len(pair[0]) and np.isfinite(pair[1]).all() else np.nan for pair in pairs], np.float64
    )


def _auroc(positives: np.ndarray, scores: np.ndarray) -> float:
    number, others = len(positives), len(scores) - len(positives)
    below, up_to = (np.searchsorted(scores, positives, side) for side in ("left", "right"))
    doubled = int((below + up_to).sum()) - number**2
    return doubled / (2 * number * others) if others else np.nan


def _average_precision(positives: np.ndarray, scores: np.ndarray) -> float:
    right, chosen = (len(values) - np.searchsorted(values, positives) for values in (positives, scores))
    return float((right / chosen).mean())


def mean_of_defined(values: np.ndarray) -> float:
    """Returns the mean of the values that are not NaN; NaN if there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(values))


def none_if_undefined(value: float) -> float | None:
    """Returns the value for JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)


def get_calibration(confidences: np.ndarray, outcomes: np.ndarray) -> tuple[float, list[dict[str, Any]]]:
    """Computes the expected calibration error, and the bins of a reliability diagram.

    Source: Guo et al., ICML 2017, eqs. 2-3 and 5 (arXiv:1706.04599).

    Args:
        confidences: `(answers,)`, in `[0, 1]`, compared as float32.
        outcomes: bool `(answers,)`, whether each answer is right.

    Returns:
        The error, and for each of 15 equally wide bins `(low, high]` that is not empty the mean `confidence`, the share
        that is right (`accuracy`) and the `count`.
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


def get_curves(y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Computes each class's ROC and precision-recall curve against all others.

    Returns:
        By class name: `false_positive_rate` and `true_positive_rate`, `precision` and `recall` (lists of at most
        500 points in the curve's order; empty if undefined), `auroc` and `average_precision` of the whole curves
        (None if undefined).
    """
    truth = to_indicators(np.asarray(y_true), len(class_names))
    aurocs, precisions = get_aurocs(truth, probabilities), get_average_precisions(truth, probabilities)
    curves = {}
    for position, name in enumerate(class_names):
        labels, scores = truth[:, position], probabilities[:, position]
        roc = precision_recall = ([], [])
        if not np.isnan(aurocs[position]):
            roc = thin_curve(*sk.roc_curve(labels, scores)[:2])
        if labels.any():
            precision_recall = thin_curve(*sk.precision_recall_curve(labels, scores)[:2])
        curves[name] = {
            **dict(zip(("false_positive_rate", "true_positive_rate"), roc, strict=True)),
            **dict(zip(("precision", "recall"), precision_recall, strict=True)),
            "auroc": none_if_undefined(aurocs[position]),
            "average_precision": none_if_undefined(precisions[position]),
        }
    return curves


def thin_curve(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """Keeps at most `LONGEST_CURVE` points at even distances along the curve, with both ends."""
    if len(x) > LONGEST_CURVE:
        lengths = np.concatenate([[0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        kept = np.unique(np.searchsorted(lengths, np.linspace(0, lengths[-1], LONGEST_CURVE)))
        x, y = x[kept], y[kept]
    return x.tolist(), y.tolist()
