"""report.html, the page that shows an evaluation."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from configs import Configs
from finetune.core.files import write_csv, write_json, write_text
from finetune.core.options import UserError
from finetune.core.texts import MOST_LISTED
from finetune.evaluation.breakdown import list_breakdown
from finetune.evaluation.evaluation import Answers, list_predictions, print_results
from finetune.evaluation.metrics import get_curves, list_confusions
from finetune.reporting.data_uris import embed_figures, embed_log
from finetune.reporting.figures import PAIRS_LISTED, save_figures
from finetune.reporting.gallery import build_gallery
from finetune.reporting.log_figures import read_log
from finetune.reporting.summaries import (
    list_class_columns,
    list_class_intervals,
    list_headlines,
    list_options,
    list_warnings,
    render_page,
    show_value,
)
from finetune.training.run_folder import LOG_FILE

CONFUSIONS_LISTED = 8
FILES = {
    "metrics.json": "all metrics with their intervals, to read by a program",
    "predictions.csv": "labels, prediction and probabilities of each test image",
    "confusion_matrix.png": "the confusion matrix",
    "roc_curves.png": "the ROC curves",
    "precision_recall_curves.png": "the precision-recall curves",
    "reliability_diagram.png": "the reliability diagram",
    "report.html": "this page",
    "decision.json": "in the model's folder: the temperature and the thresholds, which predict.py applies",
}
# The options that the results of test.py depend on, except those that it reads from the model's configs.json.
REPRODUCING = ("train_csv", "validation_csv", "test_csv", "image_directory", "csv_label_column")
REPRODUCING += ("multilabel_threshold_range", "report_by", "random_seed", "cam_method", "cam_classes", "cam_top_k")
REPRODUCING += ("cam_alpha", "cam_colormap", "cam_backbone_layer")


def write_report(
    path: str,
    results: dict[str, Any],
    curves: dict[str, dict[str, Any]],
    gallery: dict[str, list[dict[str, Any]]],
    training_log: pd.DataFrame | None,
    configs: dict[str, Any],
) -> None:
    """Writes the page that shows an evaluation, atomically.

    Args:
        path: the HTML file, which is self-contained.
        results: the content of metrics.json.
        curves: of the test set, as `metrics.get_curves` returns them.
        gallery: `mistakes` and `least_confident`, lists of images: `path`; `true` and `predicted`, class names;
            `missed`, the true ones that were not predicted; `is_right`; `probability` of the predicted class
            (multi-label: of the least certain label); `loss` in nats; the data URIs `photo` and `heatmap`, the photo
            with its Grad-CAM heatmap, or None.
        training_log: as `read_log` returns it, or None.
        configs: every option of the run by name.
    """
    test, model = results["sets"]["test"], results["model"]
    confusions, missing = [], ("confusion_matrix.png",)
    if "confusion_matrix" in test:
        most = CONFUSIONS_LISTED if len(results["classes"]) <= MOST_LISTED else PAIRS_LISTED
        confusions, missing = list_confusions(test["confusion_matrix"], results["classes"], most), ()
    page = render_page(
        "report",
        ["report"],
        results=results,
        test=test,
        headlines=list_headlines(results),
        warnings=list_warnings(results, configs),
        columns=list_class_columns(results),
        class_intervals=list_class_intervals(results),
        confusions=confusions,
        figures=embed_figures(results, curves),
        training_curves=embed_log(training_log),
        galleries=gallery,
        breakdown=list_breakdown(test["by"]) if test.get("by") else [],
        options=list_options(configs),
        files={name: words for name, words in FILES.items() if name not in missing},
        command=_build_command("test.py", model, configs, REPRODUCING),
        label_command=_build_command(
            *("find_label_errors.py", model, configs | {"csv_path": configs["test_csv"]}),
            ("csv_path", "image_directory", "csv_label_column"),
            ("--write_path", os.path.join(os.path.dirname(path), "label_errors.csv")),
        ),
    )
    write_text(path, page)


def _build_command(
    script: str, model_path: str, configs: dict[str, Any], names: Sequence[str], more: Sequence[str] = ()
) -> str:
    """Returns the command that runs a script on the model, with those of the named options that are not defaults."""
    words, defaults = ["python", script, "--load_model_path", model_path], Configs.defaults()
    for name in names:
        value = configs.get(name)
        if name in configs and show_value(value) != show_value(defaults.get(name)):
            values = value if isinstance(value, list | tuple) else ["none" if value is None else value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join([*words, *more])


def write_evaluation(
    folder: str,
    answers: Answers,
    results: dict[str, Any],
    explain: Callable[[Sequence[str]], list[tuple[np.ndarray, np.ndarray | None]]],
    options: dict[str, Any],
) -> None:
    """Writes metrics.json, predictions.csv, the plots and report.html of the test set; prints the results in any case.

    Args:
        folder: to write into, in the folder of the run.
        answers: of the model.
        results: the content of metrics.json.
        explain: returns for each path the photo, and the photo with its heatmap.
        options: of the run, which the report lists.
    """
    path = os.path.join(folder, "report.html")
    try:
        write_json(os.path.join(folder, "metrics.json"), results)
        write_csv(os.path.join(folder, "predictions.csv"), list_predictions(answers))
        curves = get_curves(answers.y_true, answers.probabilities, answers.decision.class_names)
        save_figures(folder, results, curves)
        gallery = build_gallery(explain, answers)
        write_report(path, results, curves, gallery, read_training_log(os.path.dirname(results["model"])), options)
    finally:
        print_results(results)
    print(f"\nThe report is {path}")


def read_training_log(folder: str) -> pd.DataFrame | None:
    """Returns the run's training log, or None; prints why a log cannot be read."""
    path = os.path.join(folder, LOG_FILE)
    try:
        return read_log(path) if os.path.isfile(path) else None
    except UserError as error:
        print(f"The report has no training curves: {error}")
        return None
