"""Evaluation of each set, by group and by the values of a column, and without near copies of training images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from configs import Configs
from finetune.core.options import UserError
from finetune.core.texts import MOST_LISTED, MOST_TELLING, join_names, show
from finetune.data.data_check import Reading, look_for_copies
from finetune.data.groups import (
    count_groups,
    count_groups_of_classes,
    describe_group_count,
    describe_leak,
    describe_shared,
    find_shared,
    pick_groups,
)
from finetune.data.tables import LABEL_SEPARATOR, ImageTable, warn_of_missing_classes
from finetune.evaluation.calibration import find_exact_match_threshold
from finetune.evaluation.decision import Decision
from finetune.evaluation.intervals import get_intervals
from finetune.evaluation.metrics import (
    check_finite,
    class_metrics,
    get_calibration,
    get_evaluation_metrics,
    get_multilabel_evaluation_metrics,
)
from generator import AugmentedImageSequence

# The sets that a set must be independent of: the model was trained on or selected by them.
SETS_BEFORE = {"validation": ("training",), "test": ("training", "validation")}
# Of the column `report_by`: each takes about 20 ms.
MOST_VALUES = 1000


def check_report_by(table: pd.DataFrame, column: str, csv_path: str) -> None:
    """Raises UserError if a table lacks the column, or it has too many different values to be a site or a camera."""
    if column and column not in table.columns:
        raise UserError(
            f"{csv_path} has no column '{column}'. Its columns: {join_names(table.columns, MOST_TELLING)}. "
            "Set report_by to one of them."
        )
    if column and (number := table[column].str.strip().nunique()) > MOST_VALUES:
        raise UserError(
            f"{csv_path}: report_by expects a column with at most {MOST_VALUES} different values. "
            f"Received: {number} in the column '{column}'. Set it to a column such as the site or the camera."
        )


def evaluate_set(
    y_true: np.ndarray,
    raw_probabilities: np.ndarray,
    decision: Decision,
    seed: int | None = None,
    threshold_range: Sequence[float] | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """Evaluates one set of images under a decision.

    Args:
        decision: fitted on another set.
        seed: of the bootstrap; adds `intervals`, see `get_intervals`.
        threshold_range: multi-label: adds `optimistic`, the best exact-match threshold in this range by the set's own
            labels.
        groups: adds `groups`, the number of groups, for each class too.

    Returns:
        `images`, the metrics of `get_evaluation_metrics` or `get_multilabel_evaluation_metrics` and `calibration`;
        multi-label: also `best_f1_threshold` and `f1_at_best_f1_threshold` of each class. All fits into JSON.

    Raises:
        UserError: a probability is not finite.
    """
    check_finite(raw_probabilities)
    raw_probabilities = np.asarray(raw_probabilities, np.float32)
    calibrated = decision.calibrate(raw_probabilities)
    metrics: dict[str, Any] = {"images": len(y_true)} | measure(y_true, raw_probabilities, decision)
    if decision.multi_label:
        _add_best_f1(metrics["per_class"], y_true, calibrated, decision)
        if threshold_range is not None:
            best, accuracy = find_exact_match_threshold(y_true, calibrated, threshold_range)
            note = "chosen on the test set itself: optimistic"
            metrics["optimistic"] = {"threshold": best, "exact_match_accuracy": accuracy, "note": note}
    metrics["calibration"] = _evaluate_calibration(y_true, raw_probabilities, calibrated, decision.multi_label)
    if groups is not None:
        _add_groups(metrics, y_true, groups)
    if seed is not None:
        metrics["intervals"] = get_intervals(y_true, raw_probabilities, decision, seed, groups=groups)
    return metrics


def _add_groups(metrics: dict[str, Any], y_true: np.ndarray, groups: np.ndarray) -> None:
    """Adds the number of groups, in all and of each class, after the numbers of images."""
    metrics["groups"] = count_groups(groups, len(groups))
    numbers = count_groups_of_classes(y_true, groups, len(metrics["per_class"]))
    for row, number in zip(metrics["per_class"].values(), numbers.tolist(), strict=True):
        after = {key: row.pop(key) for key in [*row][[*row].index("support") + 1 :]}
        row |= {"groups": number, **after}


def _add_best_f1(per_class: dict[str, dict], y_true: np.ndarray, calibrated: np.ndarray, decision: Decision) -> None:
    truth, chosen = y_true.astype(bool), decision.choose(calibrated, "best_f1")
    rows = class_metrics((truth & chosen).sum(axis=0), chosen.sum(axis=0), truth.sum(axis=0))
    for name, threshold, row in zip(decision.class_names, decision.thresholds("best_f1").tolist(), rows, strict=True):
        per_class[name] |= {"best_f1_threshold": threshold, "f1_at_best_f1_threshold": row["f1"]}


def _evaluate_calibration(
    y_true: np.ndarray, raw: np.ndarray, calibrated: np.ndarray, multi_label: bool
) -> dict[str, Any]:
    """Returns the calibration of the highest probability of each image; multi-label: of every probability."""
    results = {}
    for suffix, probabilities in (("", calibrated), ("_uncalibrated", raw)):
        if multi_label:
            confidences, outcomes = probabilities.ravel(), y_true.astype(bool).ravel()
        else:
            confidences, outcomes = probabilities.max(axis=1), probabilities.argmax(axis=1) == y_true
        error, bins = get_calibration(confidences, outcomes)
        results |= {f"expected_calibration_error{suffix}": error, f"bins{suffix}": bins}
    return results


def format_evaluation(metrics: dict[str, Any]) -> str:
    """Formats a set's metrics as a text table.

    If there are more than `MOST_LISTED` classes, it shows the worst ones and no confusion matrix.
    """
    per_class, intervals = metrics["per_class"], metrics.get("intervals", {})
    columns, lines, number = list(next(iter(per_class.values()))), [], len(per_class)
    if number > MOST_LISTED:
        per_class = find_worst(per_class)
        lines = [f"The {len(per_class)} worst of {number} classes by F1; metrics.json has them all."]
    width = max(map(len, ["class", *per_class]))
    widths = {column: max(len(column), 9) + 2 for column in columns}
    lines.append(f"{'class':<{width}}" + "".join(f"{column.replace('_', ' '):>{widths[column]}}" for column in columns))
    for name, row in per_class.items():
        lines.append(f"{name:<{width}}" + "".join(f"{_format(row[column]):>{widths[column]}}" for column in columns))
    if "confusion_matrix" in metrics and number <= MOST_LISTED:
        lines += ["", *_format_confusion_matrix(metrics["confusion_matrix"], list(per_class))]
    lines.append("")
    for name, value in metrics.items():
        if isinstance(value, float | None):
            interval = intervals.get(name)
            shown = " (95 % interval {:.4f} to {:.4f})".format(*interval) if interval else ""
            lines.append(f"{name.replace('_', ' ')}: {_format(value)}{shown}")
    if "calibration" in metrics:
        after, before = _get_calibration_errors(metrics)
        without = f" ({_format(before)} without the temperature)" * (before != after)
        lines.append(f"expected calibration error: {_format(after)}{without}")
    if "optimistic" in metrics:
        best = metrics["optimistic"]
        accuracy, threshold = _format(best["exact_match_accuracy"]), _format(best["threshold"])
        lines.append(f"best exact match accuracy: {accuracy} at threshold {threshold} ({best['note']})")
    return "\n".join(lines)


def find_worst(per_class: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the classes with the lowest F1, the worst first, of equal ones the largest; none without images."""
    known = [name for name, row in per_class.items() if row["support"]]
    worst = sorted(known, key=lambda name: (per_class[name]["f1"], -per_class[name]["support"], name))
    return {name: per_class[name] for name in worst[:MOST_TELLING]}


def _format_confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> list[str]:
    heads = ["true, predicted ->", *(f"{position} {name}" for position, name in enumerate(class_names))]
    width, cell = max(map(len, heads)), 1 + max(4, *(len(str(max(row))) for row in matrix))
    lines = [
        f"{head:<{width}}" + "".join(f"{count:>{cell}}" for count in row)
        for head, row in zip(heads, [range(len(class_names)), *matrix], strict=True)
    ]
    return ["confusion matrix", *lines]


def _format(value: float | int | None) -> str:
    if value is None:
        return "undefined"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _get_calibration_errors(metrics: dict[str, Any]) -> tuple[float, float]:
    """Returns the expected calibration error of a set with and without the temperature."""
    found = metrics["calibration"]
    return found["expected_calibration_error"], found["expected_calibration_error_uncalibrated"]


def evaluate_sets(
    sequences: dict[str, AugmentedImageSequence],
    predictions: dict[str, np.ndarray],
    decision: Decision,
    threshold_range: Sequence[float],
    seed: int,
    report_by: str,
) -> dict[str, dict[str, Any]]:
    """Evaluates each set; the test set with intervals and, multi-label, its own best threshold.

    Args:
        sequences: by set, after prediction.
        predictions: raw probabilities by set.
        decision: fitted without the test set.
        threshold_range: lowest and highest threshold to try on the test set.
        report_by: a column of the test table: adds `by` to the test set, see `evaluate_by`. Empty: none.
    """
    sets = {}
    for name, sequence in sequences.items():
        facts = sequence.get_y_true(), predictions[name], decision
        groups = sequence.get_read_groups()
        extras = {"seed": seed, "threshold_range": threshold_range} if name == "test" else {}
        sets[name] = evaluate_set(*facts, groups=groups, **extras)
        earlier = [sequences[other].group_names for other in SETS_BEFORE.get(name, ()) if other in sequences]
        shared = np.setdiff1d(find_shared(sequence.group_names, earlier), [*sequence.bad_images])
        sets[name] |= {"images_of_known_groups": len(shared)} if shared.size else {}
        if report_by and name == "test":
            sets[name]["by"] = evaluate_by(sequence.get_read_table()[report_by], *facts, seed, groups)
    return sets


class Answers(NamedTuple):
    """A model's answers for images; the probabilities are calibrated, and the decision chooses the labels.

    The similarities to the training photos, `(images,)`, are None without a reference.
    """

    images: Sequence[str]
    y_true: np.ndarray
    probabilities: np.ndarray
    decision: Decision
    similarities: np.ndarray | None = None


def list_predictions(answers: Answers) -> pd.DataFrame:
    """Returns one row per image: path, true and predicted labels, and the probability of each class."""
    paths, y_true, probabilities, decision, _ = answers
    labels = {"true": y_true, "predicted": decision.choose(probabilities)}
    names = {column: name_labels(values, decision.class_names) for column, values in labels.items()}
    table = pd.DataFrame({"path": paths} | {key: [*map(LABEL_SEPARATOR.join, rows)] for key, rows in names.items()})
    columns = {f"probability_{name}": probabilities[:, row] for row, name in enumerate(decision.class_names)}
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def name_labels(labels: np.ndarray, class_names: Sequence[str]) -> list[list[str]]:
    """Returns the class names of labels, positions `(images,)` or zeros and ones `(images, classes)`."""
    if labels.ndim == 1:
        return [[class_names[position]] for position in labels]
    return [[class_names[position] for position in row.nonzero()[0]] for row in labels]


def describe_temperature(decision: dict[str, Any], sets: dict[str, dict[str, Any]]) -> str:
    """Returns a sentence on the temperature and how it changes the calibration error."""
    fitted_on, changes = decision["temperature_fitted_on"], []
    for name in sets:
        if name in (fitted_on, "test"):
            after, before = _get_calibration_errors(sets[name])
            changes.append(f"{_format(before)} to {_format(after)} on the {name} set")
    return (
        f"Temperature {decision['temperature']:.3f}, fitted on the {fitted_on} set: it changes the expected "
        f"calibration error from {' and from '.join(changes)}."
    )


def print_results(results: dict[str, Any]) -> None:
    """Prints the decision and the metrics of each set."""
    decision = results["decision"]
    if decision["temperature_fitted_on"]:
        print(describe_temperature(decision, results["sets"]))
    else:
        print("No validation set, so no temperature was fitted: the probabilities are the model's own.")
    fitted_on, threshold = decision["thresholds_fitted_on"], decision["exact_match_threshold"]
    if results["multi_label"] and fitted_on in results["sets"]:
        accuracy = results["sets"][fitted_on]["exact_match_accuracy"]
        print(f"Threshold {threshold:.2f} gives the best exact-match accuracy on the {fitted_on} set, {accuracy:.4f}.")
    elif results["multi_label"]:
        print(f"Threshold {threshold:.2f}, fitted on {f'the {fitted_on} set' if fitted_on else 'no set'}.")
    for name, metrics in results["sets"].items():
        images = f"{metrics['images']} images{describe_group_count(metrics.get('groups'))}"
        print(f"\n{name} set: {images} of {metrics['csv']}\n{format_evaluation(metrics)}")
        if sentence := describe_leak(metrics):
            print(sentence)
        counts = {label: row["support"] for label, row in metrics["per_class"].items()}
        warn_of_missing_classes([*counts.values()], [*counts], name)
        if shared := describe_shared(name, metrics):
            print(f"Warning: {shared}")
        if "by" in metrics:
            print(f"\n{format_breakdown(metrics['by'])}")


def evaluate_leak(
    sequences: dict[str, AugmentedImageSequence],
    predictions: dict[str, np.ndarray],
    decision: Decision,
    configs: Configs,
) -> dict[str, Any]:
    """Evaluates the test set without the images that have a near copy in the training set.

    Args:
        sequences: by set, after prediction; the training set may be missing.
        predictions: raw probabilities by set.
        configs: `verify_data`, how to search for copies, and the seed of the bootstrap.

    Returns:
        `near_copies_in_training` with `images`, the number of test images that have a near copy, and `without`, the
        metrics and `intervals` of the others, None if no image or every image has one. Empty without a search.
    """
    test = sequences["test"]
    if "training" not in sequences:
        return {}
    leaked = find_leaked(sequences["training"].paths, test.get_read_paths(), configs)
    if leaked is None:
        return {}
    found: dict[str, Any] = {"images": int(leaked.sum()), "without": None}
    if leaked.any() and not leaked.all():
        rest, seed = ~leaked, configs.random_seed or 0
        groups = pick_groups(test.get_read_groups(), rest)
        metrics = evaluate_set(test.get_y_true()[rest], predictions["test"][rest], decision, seed=seed, groups=groups)
        scalars = {name: value for name, value in metrics.items() if isinstance(value, float | int)}
        intervals = {name: value for name, value in metrics["intervals"].items() if name in scalars}
        found["without"] = scalars | {"intervals": intervals}
    return {"near_copies_in_training": found}


def find_leaked(training: Sequence[str], tested: Sequence[str], configs: Configs) -> np.ndarray | None:
    """Returns which test images have an exact or near copy among the training images, bool `(tested,)`.

    It is None if `verify_data` skips near copies, or if the search would take too long, which is printed.
    """
    if configs.verify_data not in ("quick", "full"):
        return None
    tables = [
        ImageTable(name, name, [*files], [*files], [""] * len(files))
        for name, files in (("training", training), ("test", tested))
    ]
    known, copies = look_for_copies(tables, configs.verify_data, Reading.of(configs))
    if all(one.thumbnail is None for one in known.values()):
        return None
    return copies.find_shared(tables[1], tables[0])


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
