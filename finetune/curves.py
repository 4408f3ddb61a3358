"""ROC and precision-recall curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sk

from finetune.metrics import get_aurocs, get_average_precisions, none_if_undefined

LONGEST_CURVE = 500


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
