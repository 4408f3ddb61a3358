"""Metrics of a set of images, or of each site, camera or other value of a table's column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from finetune.core.texts import MOST_LISTED, MOST_TELLING, show
from finetune.data.groups import count_groups, pick_groups
from finetune.evaluation.decision import Decision
from finetune.evaluation.intervals import get_intervals
from finetune.evaluation.metrics import get_evaluation_metrics, get_multilabel_evaluation_metrics

# The metrics of each value, by whether an image may have several labels. Of many values, those with the lowest first
# metric are shown.
MEASURES = {False: ("accuracy", "balanced_accuracy"), True: ("exact_match_accuracy", "mean_average_precision")}


def evaluate_by(
    values: pd.Series,
    y_true: np.ndarray,
    raw_probabilities: np.ndarray,
    decision: Decision,
    seed: int,
    groups: np.ndarray | None,
) -> dict[str, Any]:
    """Evaluates the images of each value of a column separately.

    Returns:
        `column`, its name, and `values`. Each has `images`, `groups` if there are fewer, the two metrics in `MEASURES`
        and their `intervals`.
    """
    texts, names, by_value = values.str.strip().to_numpy(), MEASURES[decision.multi_label], {}
    for value in sorted(set(texts)):
        rows = np.flatnonzero(texts == value)
        its_groups, part = pick_groups(groups, rows), (y_true[rows], raw_probabilities[rows])
        counts = {"images": len(rows)}
        if its_groups is not None:
            counts["groups"] = count_groups(its_groups, len(rows))
        metrics = measure(*part, decision)
        intervals = get_intervals(*part, decision, seed, groups=its_groups)
        chosen = {name: metrics[name] for name in names}
        by_value[value] = counts | chosen | {"intervals": {name: intervals[name] for name in names}}
    return {"column": values.name, "values": by_value}


def measure(y_true: np.ndarray, raw: np.ndarray, decision: Decision) -> dict[str, Any]:
    """Returns the metrics of `get_evaluation_metrics` or `get_multilabel_evaluation_metrics` under a decision."""
    if not decision.multi_label:
        return get_evaluation_metrics(y_true, raw, decision.class_names)
    calibrated, threshold = decision.calibrate(raw), decision.exact_match_threshold
    return get_multilabel_evaluation_metrics(y_true, calibrated, decision.class_names, threshold, ranking=raw)


def list_breakdown(breakdown: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the values to show with their metrics: all, or of many those with the lowest first metric."""
    rows = list(breakdown["values"].items())
    if len(rows) <= MOST_LISTED:
        return rows
    return sorted(rows, key=lambda row: row[1][_list_measures(row[1])[0]])[:MOST_TELLING]


def _list_measures(row: dict[str, Any]) -> list[str]:
    return [name for names in MEASURES.values() for name in names if name in row]


def format_breakdown(breakdown: dict[str, Any]) -> str:
    """Formats the result of `evaluate_by` as a text table, one line per value."""
    rows, number = list_breakdown(breakdown), len(breakdown["values"])
    counts = [name for name in ("images", "groups") if any(name in row for _, row in rows)]
    measures = _list_measures(rows[0][1])
    cells = [[breakdown["column"], *counts, *(name.replace("_", " ") for name in measures)]]
    for value, row in rows:
        shown = [_format_measure(row[name], row["intervals"][name]) for name in measures]
        cells.append([show(value) or "(empty)", *(str(row.get(name, row["images"])) for name in counts), *shown])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"test set by {breakdown['column']}, with 95 % intervals"]
    if len(rows) < number:
        lines = [f"The {len(rows)} worst of {number} values of {breakdown['column']}; metrics.json has them all."]
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def _format_measure(value: float | None, interval: list[float] | None) -> str:
    shown = "undefined" if value is None else f"{value:.4f}"
    return shown + (" ({:.4f} to {:.4f})".format(*interval) if interval else " (no interval)")
