"""How good predictions are, computed by scikit-learn; no TensorFlow here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sk

THRESHOLD_STEP = 0.01


def get_evaluation_metrics(y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Evaluates single-label predictions.

    Args:
        y_true: int `(images,)`, positions in `class_names`.
        probabilities: `(images, classes)`; the highest one of a row is the prediction.
        class_names: in the order of the positions.

    Returns:
        `accuracy`; `per_class` precision, recall, f1 and support by class name, 0 where undefined;
        `confusion_matrix`, rows true and columns predicted.
    """
    predicted, positions = probabilities.argmax(axis=1), np.arange(len(class_names))
    return {
        "accuracy": float(sk.accuracy_score(y_true, predicted)),
        "per_class": {
            name: _binary_metrics(y_true == position, predicted == position)
            for position, name in enumerate(class_names)
        },
        "confusion_matrix": sk.confusion_matrix(y_true, predicted, labels=positions).tolist(),
    }


def get_multilabel_evaluation_metrics(
    y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], threshold: float
) -> dict[str, Any]:
    """Evaluates multi-label predictions.

    Args:
        y_true: `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`.
        class_names: in the order of the columns.
        threshold: the lowest probability of a label that holds.

    Returns:
        `mean_auroc`, `mean_average_precision`, `exact_match_accuracy`, `hamming_loss`, `threshold`; `per_class` by
        class name: precision, recall, f1 and support (0 where undefined), `auroc` and `average_precision` (None where
        a class has no positive, or for AUROC no negative, and then left out of the mean).
    """
    truth, predicted = y_true.astype(bool), probabilities >= threshold
    aurocs = get_aurocs(y_true, probabilities)
    precisions = get_average_precisions(y_true, probabilities)
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
        "threshold": float(threshold),
        "per_class": per_class,
    }


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


def format_evaluation(metrics: dict[str, Any]) -> str:
    """Lays out what either evaluation function returned as a text table."""
    per_class = metrics["per_class"]
    columns = list(next(iter(per_class.values())))
    width = max(len("class"), *map(len, per_class))
    lines = [f"{'class':<{width}}" + "".join(f"{column.replace('_', ' '):>19}" for column in columns)]
    for name, row in per_class.items():
        lines.append(f"{name:<{width}}" + "".join(f"{_format(row[column]):>19}" for column in columns))
    if "confusion_matrix" in metrics:
        lines += ["", *_format_confusion_matrix(metrics["confusion_matrix"], list(per_class))]
    lines.append("")
    for name, value in metrics.items():
        if name not in ("per_class", "confusion_matrix"):
            lines.append(f"{name.replace('_', ' ')}: {_format(value)}")
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
