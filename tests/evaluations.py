"""Results as test.py returns them, written by hand."""

import pandas as pd

NAMES = ["cat", "dog", "owl"]
LOG = pd.DataFrame({"epoch": [1, 2], "accuracy": [0.5, 0.7], "loss": [1.1, 0.9], "val_accuracy": [0.4, 0.6]})
BINS = [{"confidence": 0.6, "accuracy": 0.5, "count": 4}, {"confidence": 0.9, "accuracy": 1.0, "count": 12}]
RAW_BINS = [{"confidence": 0.97, "accuracy": 0.875, "count": 16}]
CALIBRATION = {
    "expected_calibration_error": 0.1,
    "expected_calibration_error_uncalibrated": 0.095,
    "bins": BINS,
    "bins_uncalibrated": RAW_BINS,
}
CURVE = {
    "false_positive_rate": [0.0, 0.0, 1.0],
    "true_positive_rate": [0.0, 0.5, 1.0],
    "precision": [0.5, 1.0, 1.0],
    "recall": [1.0, 0.5, 0.0],
    "auroc": 0.75,
    "average_precision": 0.75,
}
DECISION = {
    "temperature": 1.5,
    "temperature_fitted_on": "validation",
    "exact_match_threshold": 0.5,
    "best_f1_thresholds": None,
    "thresholds_fitted_on": None,
    "model": "best_model.keras",
}


def single_label(names=NAMES):
    """Returns results of 16 images of one label each, 14 of them right."""
    rows = [(0.9, 0.75, 0.82, 12), (0.5, 1.0, 2 / 3, 1), (0.1, 0.3, 0.15, 3)]
    columns = ("precision", "recall", "f1", "support")
    metrics = {
        "images": 16,
        "accuracy": 0.875,
        "balanced_accuracy": 0.683,
        "macro_f1": 0.545,
        "per_class": {name: dict(zip(columns, row, strict=True)) for name, row in zip(names, rows, strict=True)},
        "confusion_matrix": [[9, 1, 2], [0, 1, 0], [0, 0, 3]],
        "calibration": CALIBRATION,
    }
    intervals = {"accuracy": [0.75, 1.0], "balanced_accuracy": [0.5, 0.8], "macro_f1": [0.4, 0.7]}
    return {
        "model": "saved_model/best_model.keras",
        "classes": list(names),
        "multi_label": False,
        "decision": DECISION | {"classes": list(names), "multi_label": False},
        "sets": {
            "training": metrics | {"images": 1234, "accuracy": 0.999},
            "validation": metrics | {"accuracy": 0.901},
            "test": metrics | {"intervals": intervals},
        },
    }


def multi_label(names=NAMES):
    """Returns results of a multi-label model without a validation set; the last class has no image."""
    row = {"precision": 0.8, "recall": 0.6, "f1": 0.686, "support": 20, "auroc": 0.91, "average_precision": 0.72}
    row |= {"best_f1_threshold": 0.37, "f1_at_best_f1_threshold": 0.7}
    empty = row | {"support": 0, "auroc": None, "average_precision": None}
    metrics = {
        "images": 40,
        "mean_auroc": 0.91,
        "mean_average_precision": 0.72,
        "exact_match_accuracy": 0.55,
        "hamming_loss": 0.125,
        "macro_f1": 0.46,
        "threshold": 0.41,
        "per_class": {names[0]: row, names[1]: row | {"support": 9, "auroc": 0.7}, names[2]: empty},
        "calibration": CALIBRATION | {"bins_uncalibrated": BINS},
    }
    intervals = {"mean_auroc": [0.8, 0.95], "hamming_loss": [0.1, 0.15], "macro_f1": [None, None]}
    intervals["per_class"] = {names[0]: {"precision": [0.7, 0.9], "recall": [0.5, 0.7], "f1": [0.6, 0.75]}}
    optimistic = {"threshold": 0.53, "exact_match_accuracy": 0.6, "note": "chosen on the test set itself: optimistic"}
    decision = DECISION | {"temperature": 1.0, "temperature_fitted_on": None, "exact_match_threshold": 0.41}
    decision |= {"thresholds_fitted_on": "training", "best_f1_thresholds": dict.fromkeys(names, 0.37)}
    return {
        "model": "saved_model/best_model.keras",
        "classes": list(names),
        "multi_label": True,
        "decision": decision | {"classes": list(names), "multi_label": True},
        "sets": {"training": metrics, "test": metrics | {"intervals": intervals, "optimistic": optimistic}},
    }


def make_curves(names=NAMES):
    return dict.fromkeys(names, CURVE)


def measured(promised, answered, wrong, interval):
    """Returns what a promise gives of 16 test images."""
    row = {"promised": promised, "images": 16, "unknown": 0, "unsure": 16 - answered, "coverage": answered / 16}
    error = wrong / answered if answered else None
    return row | {"answered": answered, "wrong": wrong, "error": error, "error_interval": interval}


def with_answers(results, rule, answered=True, promises=True):
    """Adds to results what a rule does on 16 test images: 8 answered, 1 of them wrong, or none."""
    test = results["sets"]["test"]
    row = measured(0, *((8, 1, [0.003160, 0.526510]) if answered else (0, 0, None)))
    row |= {"unknown": 2, "unsure": row["unsure"] - 2}
    test["answers"] = {name: value for name, value in row.items() if name != "promised"}
    test["risk_coverage"] = {"coverage": [0.125, 0.5, 1.0], "error": [0.5, 0.125, 0.125]}
    if promises:
        nothing = [measured(promised, 0, 0, None) for promised in (0.01, 0.02)]
        some = measured(0.05, 8, 1, [0.003160, 0.526510]), measured(0.1, 14, 1, [0.001807, 0.338681])
        test["promises"] = [*nothing, *some]
    results["decision"] = results["decision"] | {"abstention": None if rule is None else rule.to_dict()}
    return results
