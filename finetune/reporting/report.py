"""report.html, the page that shows an evaluation, and its gallery of mistakes."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pandas as pd

from configs import Configs
from finetune.core.files import write_csv, write_json, write_text
from finetune.core.options import UserError
from finetune.core.texts import MOST_LISTED
from finetune.core.values import get_input_size
from finetune.data.images import build_reader, fit_image, resize_image
from finetune.evaluation.evaluation import Answers, list_breakdown, list_predictions, name_labels, print_results
from finetune.evaluation.gradcam import GradCam
from finetune.evaluation.metrics import get_curves, list_confusions
from finetune.evaluation.rule import Nearest
from finetune.models.exported import ExportedModel
from finetune.predicting.answers import AnswerTable, insert_answers, name_answers
from finetune.reporting.cam_pictures import overlay_heatmap
from finetune.reporting.data_uris import PHOTO_SIDE, THUMBNAIL_SIDE, embed_figures, embed_log, encode_photo
from finetune.reporting.figures import PAIRS_LISTED, read_log, save_figures
from finetune.reporting.summaries import (
    list_class_columns,
    list_class_intervals,
    list_headlines,
    list_options,
    list_warnings,
    render_page,
    show_value,
)
from finetune.reporting.unanswered import describe_unanswered
from finetune.training.run_folder import LOG_FILE

CONFUSIONS_LISTED = 8
FILES = {
    "metrics.json": "all metrics with their intervals, to read by a program",
    "predictions.csv": "labels, prediction, answer, similarity and probabilities of each test image",
    "confusion_matrix.png": "the confusion matrix",
    "roc_curves.png": "the ROC curves",
    "precision_recall_curves.png": "the precision-recall curves",
    "reliability_diagram.png": "the reliability diagram",
    "risk_coverage.png": "the share of wrong answers over the share of answered images",
    "report.html": "this page",
    "decision.json": "in the model's folder: temperature, thresholds and when not to answer, which predict.py applies",
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
        gallery: `mistakes`, `least_confident` and, with a reference, `least_similar`, lists of images: `path`; `true`
            and `predicted`, class names; `missed`, the true ones that were not predicted; `is_right`; `answer`, class
            names or why there is none; `probability` of the predicted class (multi-label: of the least certain label);
            `similarity` or None; `loss` in nats; the data URIs `photo` and `heatmap`, the photo with its Grad-CAM
            heatmap, or None; `nearest`, the most similar training photos, each with `path`, `label`, `similarity` and
            the data URI `photo`.
        training_log: as `read_log` returns it, or None.
        configs: every option of the run by name.
    """
    test, model, drawn = results["sets"]["test"], results["model"], embed_figures(results, curves)
    page = render_page(
        "report",
        ["report"],
        results=results,
        test=test,
        headlines=list_headlines(results),
        warnings=list_warnings(results, configs),
        columns=list_class_columns(results),
        class_intervals=list_class_intervals(results),
        confusions=_list_confusions(results),
        figures=drawn,
        unanswered=describe_unanswered(results),
        training_curves=embed_log(training_log),
        galleries=gallery,
        breakdown=list_breakdown(test["by"]) if test.get("by") else [],
        options=list_options(configs),
        files={name: FILES[name] for name in FILES if not name.endswith(".png") or name[: -len(".png")] in drawn},
        command=_build_command("test.py", model, configs, REPRODUCING),
        label_command=_build_command(
            *("find_label_errors.py", model, configs | {"csv_path": configs["test_csv"]}),
            ("csv_path", "image_directory", "csv_label_column"),
            ("--write_path", os.path.join(os.path.dirname(path), "label_errors.csv")),
        ),
    )
    write_text(path, page)


def _list_confusions(results: dict[str, Any]) -> list[Any]:
    """Returns the most frequent confusions of the test set; none with several labels."""
    if "confusion_matrix" not in results["sets"]["test"]:
        return []
    most = CONFUSIONS_LISTED if len(results["classes"]) <= MOST_LISTED else PAIRS_LISTED
    return list_confusions(results["sets"]["test"]["confusion_matrix"], results["classes"], most)


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
    show_nearest: Callable[[int], list[dict[str, Any]]] | None = None,
) -> None:
    """Writes metrics.json, predictions.csv, the plots and report.html of the test set; prints the results in any case.

    Args:
        folder: to write into, in the folder of the run.
        answers: of the model.
        results: the content of metrics.json.
        explain: returns for each path the photo, and the photo with its heatmap.
        options: of the run, which the report lists.
        show_nearest: returns the most similar training photos of a test image by its position, as `build_finder` does.
    """
    path = os.path.join(folder, "report.html")
    try:
        write_json(os.path.join(folder, "metrics.json"), results)
        table = insert_answers(list_predictions(answers), _name_answers(answers), after="predicted")
        write_csv(os.path.join(folder, "predictions.csv"), table)
        curves = get_curves(answers.y_true, answers.probabilities, answers.decision.class_names)
        save_figures(folder, results, curves)
        gallery = build_gallery(explain, answers, show_nearest)
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


def _name_answers(answers: Answers) -> AnswerTable:
    """Returns what predict.py would answer."""
    similarities = answers.similarities
    if similarities is None:
        similarities = np.full(len(answers.images), np.nan, np.float32)
    return name_answers(answers.decision, answers.probabilities, similarities)


GALLERIES = ("mistakes", "least_confident")
# Galleries whose photos are shown with the most similar training photos.
COMPARED = ("least_confident", "least_similar")
GALLERY_IMAGES = 12
LEAST_PROBABILITY = 1e-7


def choose_gallery(
    y_true: np.ndarray, probabilities: np.ndarray, chosen: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the images to show.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`.
        chosen: bool `(images, classes)`, the predicted classes.
        number: the most images of either kind.

    Returns:
        Rows of the wrong predictions with the highest loss, the worst first; multi-label, a prediction with any wrong
        label counts. And rows of the least probable predictions, right or wrong, the least probable first.
    """
    truth = y_true.astype(bool) if y_true.ndim == 2 else np.arange(chosen.shape[1]) == y_true[:, None]
    wrong = np.flatnonzero((truth != chosen).any(axis=1))
    losses = get_image_losses(y_true, probabilities)
    # The loss if the prediction were true: high if the model is not sure.
    doubts = get_image_losses(chosen if y_true.ndim == 2 else chosen.argmax(axis=1), probabilities)
    return wrong[np.argsort(-losses[wrong], kind="stable")][:number], np.argsort(-doubts, kind="stable")[:number]


def get_image_losses(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns the cross-entropy of each image in nats, multi-label the mean of its binary ones, float64.

    Probabilities are clipped to at least 1e-7, multi-label to at most 1 - 1e-7 too.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if y_true.ndim == 1:
        return -np.log(np.maximum(probabilities[np.arange(len(y_true)), y_true], LEAST_PROBABILITY))
    clipped = np.clip(probabilities, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return -np.log(np.where(y_true.astype(bool), clipped, 1 - clipped)).mean(axis=1)


def build_gallery(
    draw: Callable[[Sequence[str]], list[tuple[np.ndarray, np.ndarray | None]]],
    answers: Answers,
    show_nearest: Callable[[int], list[dict[str, Any]]] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Returns the galleries of a report, as `write_report` takes them.

    Args:
        draw: returns for each path the photo, and the photo with its heatmap or None.
        answers: of the model.
        show_nearest: as `build_finder` returns it.
    """
    chosen = answers.decision.choose(answers.probabilities)
    picked = choose_gallery(answers.y_true, answers.probabilities, chosen, GALLERY_IMAGES)
    rows = dict(zip(GALLERIES, picked, strict=True))
    if answers.similarities is not None:
        rows["least_similar"] = np.argsort(answers.similarities, kind="stable")[:GALLERY_IMAGES]
    shown = np.unique(np.concatenate(list(rows.values()))).tolist()
    pictures = draw([answers.images[row] for row in shown])
    items = dict(zip(shown, _make_items(answers, chosen, shown, pictures), strict=True))
    found = {name: [items[row] for row in gallery.tolist()] for name, gallery in rows.items()}
    if "least_similar" in found:
        # Without heatmaps, since the page has room for the training photos or for these.
        found["least_similar"] = [item | {"heatmap": None} for item in found["least_similar"]]
    for name in found.keys() & COMPARED if show_nearest else ():
        pairs = zip(rows[name].tolist(), found[name], strict=True)
        found[name] = [item | {"nearest": show_nearest(row)} for row, item in pairs]
    return found


def _make_items(
    answers: Answers, chosen: np.ndarray, rows: Sequence[int], pictures: Sequence[tuple[np.ndarray, np.ndarray | None]]
) -> list[dict[str, Any]]:
    """Returns what a gallery shows of these rows; `pictures` are photos with and without heatmap."""
    paths, y_true, probabilities, decision, similarities = answers
    true, predicted = name_labels(y_true, decision.class_names), name_labels(chosen, decision.class_names)
    confidences, losses = decision.measure_confidence(probabilities).tolist(), get_image_losses(y_true, probabilities)
    named = _name_answers(answers).names
    return [
        {
            "path": paths[row],
            "true": true[row],
            "predicted": predicted[row],
            "missed": [label for label in true[row] if label not in predicted[row]],
            "is_right": set(true[row]) == set(predicted[row]),
            "answer": named[row],
            "probability": confidences[row],
            "similarity": None if similarities is None else float(similarities[row]),
            "loss": float(losses[row]),
            "photo": encode_photo(photo),
            "heatmap": None if heatmap is None else encode_photo(heatmap),
            "nearest": [],
        }
        for row, (photo, heatmap) in zip(rows, pictures, strict=True)
    ]


def build_finder(nearest: list[list[Nearest]] | None, configs: Configs) -> Callable[[int], list[dict[str, Any]]] | None:
    """Returns a function from the position of a test image to its most similar training photos; None without any.

    A photo that cannot be read any more is left out.

    Args:
        nearest: from `rule.list_nearest`.
        configs: to read the training photos with.
    """
    if nearest is None:
        return None
    read = build_reader(configs)

    @functools.cache
    def draw(path: str) -> str:
        try:
            return encode_photo(read(path, (THUMBNAIL_SIDE, THUMBNAIL_SIDE)), THUMBNAIL_SIDE)
        except UserError:
            return ""

    def show_nearest(row: int) -> list[dict[str, Any]]:
        return [one._asdict() | {"photo": photo} for one in nearest[row] if (photo := draw(one.path))]

    return show_nearest


def build_grad_cam(model: keras.Model | ExportedModel, cam_method: str, layer_name: str) -> GradCam | None:
    """Builds Grad-CAM for a model. Returns None and prints why if the model does not support it.

    Raises:
        UserError: a layer is named, and the model lacks it.
    """
    if isinstance(model, ExportedModel):
        print("The report's photos have no heatmaps: Grad-CAM needs the Keras model that this file was exported from.")
        return None
    try:
        return GradCam(model, cam_method, layer_name)
    except UserError as error:
        if layer_name:
            raise
        print(f"The report's photos have no heatmaps: {error}")
        return None


def build_explainer(
    model: keras.Model | ExportedModel, configs: Configs
) -> Callable[[Sequence[str]], list[tuple[np.ndarray, np.ndarray | None]]]:
    """Returns `draw_pictures` with the model and the configs filled in: a function of paths."""
    shape = {"image_size": get_input_size(configs), "resize_mode": configs.resize_mode}
    overlay = functools.partial(overlay_heatmap, opacity=configs.cam_alpha, colormap=configs.cam_colormap, **shape)
    grad_cam = build_grad_cam(model, configs.cam_method, configs.cam_backbone_layer)
    return functools.partial(draw_pictures, grad_cam, *shape.values(), build_reader(configs), overlay)


def draw_pictures(
    grad_cam: GradCam | None,
    image_size: Sequence[int],
    resize_mode: str,
    read: Callable[..., np.ndarray],
    overlay: Callable[[np.ndarray, np.ndarray], np.ndarray],
    paths: Sequence[str],
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Reads photos and draws on each the heatmap of its most probable class.

    Args:
        grad_cam: of the model, or None.
        image_size: `(height, width)` of the model's input.
        resize_mode: how photos are resized to it.
        read: reads a photo, as `read_image` does.
        overlay: colours a photo by a heatmap.
        paths: of the photos.

    Returns:
        For each photo uint8 RGB, its longer side at most `PHOTO_SIDE`, and the same with its heatmap, or None.
    """
    pictures = []
    for path in paths:
        image = read(path)
        scale = min(1, PHOTO_SIDE / max(image.shape[:2]))
        photo = resize_image(image, [max(1, round(side * scale)) for side in image.shape[:2]])
        heatmap = None
        if grad_cam is not None:
            heatmaps, _ = grad_cam(fit_image(read(path, image_size), image_size, resize_mode)[None])
            heatmap = overlay(photo, heatmaps[0])
        pictures.append((photo, heatmap))
    return pictures
