"""Figures of an evaluation, the page that holds them all, and the model card: report.html and MODEL_CARD.md."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import ntpath
import os
import re
import shlex
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from configs import Configs, UserError
from utils import MODEL_SUFFIXES, atomic_path, hash_file, write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LOG_METRICS = {"accuracy": "Accuracy", "auroc": "Mean AUROC", "loss": "Loss"}
# Wong, Nature Methods 8:441, 2011: distinct for the colour-blind, and legible on white and on near black.
COLOURS = ("#0f7fc4", "#e0701c", "#129e78", "#c765a0", "#b58900", "#4aa8d8", "#8c6bd1", "#7a7f85", "#d1495b", "#5b9a32")
COUNT_COLOUR = (0.06, 0.42, 0.74)
MUTED = "#8b949e"
# With Chinese, Japanese and Korean, on Linux, Windows and macOS.
FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Microsoft YaHei", "Yu Gothic")
FALLBACK_FONTS += ("Malgun Gothic", "PingFang SC", "Hiragino Sans", "Arial Unicode MS")
INK_OPTIONS = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
INKS = {"light": "#24292f", "dark": "#e6edf3"}
PRINTED_DPI = 150
EMBEDDED_DPI = 144
CSS_DPI = 96
WIDEST_IN_COLUMN = 560
LARGEST_SVG = 250_000
LONGEST_NAME = 24
MOST_COLOURED_CURVES = 10
WORST_CURVES = 5
PHOTO_SIZE = 320
JPEG_QUALITY = 85
CONFUSIONS_LISTED = 8
FEW_IMAGES = 10
LEAST_PROBABILITY = 1e-7
BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

# Name in metrics.json: title, whether it is a share shown in per cent, meaning.
HEADLINES = {
    "accuracy": ("Accuracy", True, "Images whose most probable class is right"),
    "balanced_accuracy": ("Balanced accuracy", True, "Mean of the classes' recall: rare classes count as much"),
    "mean_auroc": ("Mean AUROC", False, "Chance that an image with a label scores above one without"),
    "mean_average_precision": ("Mean average precision", False, "Area under precision over recall"),
    "exact_match_accuracy": ("Exact match", True, "Images with all their labels right and no other"),
    "hamming_loss": ("Hamming loss", False, "Share of wrong answers over all images and labels; lower is better"),
    "macro_f1": ("Macro F1", False, "Mean of the classes' F1"),
    "top_5_accuracy": ("Top-5 accuracy", True, "Images whose class is among the five most probable"),
}
CALIBRATION_HEADLINE = (
    "Calibration error",
    False,
    "Distance of probabilities from how often they hold; lower is better",
)
CLASS_COLUMNS = {
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "support": "Images",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "best_f1_threshold": "Best-F1 threshold",
    "f1_at_best_f1_threshold": "F1 at it",
}
CHOSEN_ON_TEST_SET = (
    "There was no validation set, so the test set chose the epoch of the best model: its figures are optimistic. "
    "Train with validation_csv for honest ones."
)
FILES = {
    "metrics.json": "every figure of this page, with intervals, for programs",
    "predictions.csv": "each test image's labels, prediction and probabilities",
    "confusion_matrix.png": "the confusion matrix",
    "roc_curves.png": "the ROC curves",
    "precision_recall_curves.png": "the precision-recall curves",
    "reliability_diagram.png": "the reliability diagram",
    "report.html": "this page",
    "decision.json": "beside the model: temperature and thresholds, which predict.py uses",
}
# The options that test.py's figures depend on, beside those that the model's own configs.json knows.
REPRODUCING = ("train_csv", "validation_csv", "test_csv", "image_directory", "csv_label_column")
REPRODUCING += ("multilabel_threshold_range", "random_seed", "cam_method", "cam_classes", "cam_top_k")
REPRODUCING += ("cam_alpha", "cam_colormap")

CARD_FILE = "MODEL_CARD.md"
# Figures that Hugging Face's metadata knows: name in metrics.json, and there.
METRIC_TYPES = {"accuracy": "accuracy", "exact_match_accuracy": "accuracy", "macro_f1": "f1", "mean_auroc": "roc_auc"}
PATH_ENDINGS = ("_csv", "_directory", "_path")
# The card warns from there on: points between an interval's ends, and images of the largest class to the smallest.
WIDE_INTERVAL = 5
IMBALANCE = 3
# By heading: options that are always told, and those that are where they differ from their default.
RECIPE: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "Optimizer": (("optimizer_type", "learning_rate"), ("fine_tune_learning_rate", "weight_decay", "ema_decay")),
    "Batches": (("batch_size",), ("gradient_accumulation_steps", "distribution_strategy", "scale_learning_rate")),
    "Schedule": (("learning_rate_schedule",), ("warmup_epochs", "early_stopping_patience")),
    "Loss": (("loss", "use_class_balancing"), ("positive_weights_multiply", "label_smoothing")),
    "Augmentation": (("augmentation_strength",), ("mixup_alpha", "cutmix_alpha")),
    "Seed": (("random_seed", "deterministic"), ()),
}
# By kind of file: which runtime loads it, and how.
LOADING = {
    "keras": (
        "Keras",
        "import keras\n\nmodel = keras.models.load_model({path})\nprobabilities = model.predict(image[None])",
    ),
    "weights": (
        "Keras and this project on the path",
        'from utils import custom_load_model\n\nmodel = custom_load_model(".", {stem})\n'
        "probabilities = model.predict(image[None])",
    ),
    "tflite": (
        "ai_edge_litert, one image at a time",
        "from ai_edge_litert.interpreter import Interpreter\n\n"
        "model = Interpreter({path}).get_signature_runner()\n"
        'probabilities = model(image=image[None].astype("float32"))["output_0"]',
    ),
    "onnx": (
        "onnxruntime",
        "import onnxruntime\n\nsession = onnxruntime.InferenceSession({path})\n"
        'probabilities = session.run(None, {{"image": image[None].astype("float32")}})[0]',
    ),
    "saved_model": (
        "TensorFlow",
        "import tensorflow as tf\n\nmodel = tf.saved_model.load({path})\n"
        "probabilities = model.serve(tf.constant(image[None], tf.float32)).numpy()",
    ),
}


# Training log


def read_log(log_path: str) -> pd.DataFrame:
    """Reads a training log.

    Raises:
        UserError: it is missing or is no training log.
    """
    import pandas as pd

    try:
        log = pd.read_csv(log_path)
    except OSError as error:
        raise UserError(f"Cannot read the training log {log_path}: {error.strerror}. Train first.") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{log_path} is not a training log: {str(error).strip()}") from error
    plotted = [name for name in log if name == "epoch" or name.removeprefix("val_") in LOG_METRICS]
    is_numeric = all(pd.api.types.is_numeric_dtype(log[name]) for name in plotted)
    if not {"epoch", "loss"} <= set(plotted) or log.empty or not is_numeric:
        raise UserError(
            f"{log_path} is not a training log. Expected columns of numbers, epoch and loss among them, and a row. "
            f"Received: {', '.join(log.columns)}; {len(log)} rows."
        )
    return log


def draw_log(log: pd.DataFrame, figure: Figure | None = None) -> Figure:
    """Draws each metric of a log in a panel of its own.

    Args:
        log: as `read_log` gives it.
        figure: an empty one to draw in, such as a window's; by default a new one without a window.
    """
    metrics = [name for name in LOG_METRICS if name in log]
    figure = figure or Figure()
    figure.set_layout_engine("constrained")
    figure.set_size_inches(5.5 * len(metrics), 4)
    for name, panel in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True):
        panel.plot(log["epoch"], log[name], marker=".", label="training", color=COLOURS[0])
        if f"val_{name}" in log:
            panel.plot(log["epoch"], log[f"val_{name}"], marker=".", label="validation", color=COLOURS[1])
        panel.set(xlabel="Epoch", ylabel=LOG_METRICS[name], title=LOG_METRICS[name])
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


def draw_learning_rate(rates: Sequence[float], losses: Sequence[float], suggestion: float | None, path: str) -> None:
    """Draws the losses of a learning-rate range test as a PNG file.

    Args:
        rates: `(steps,)`, rising.
        losses: `(steps,)`; those that are not finite are left out.
        suggestion: the rate to mark; None marks none.
        path: the file.
    """
    # Imported here, so that plot_training_log.py does not wait for scikit-learn.
    from finetune.metrics import smooth_losses

    is_finite = np.isfinite(losses)
    rates, known = np.asarray(rates)[is_finite], np.asarray(losses)[is_finite]
    with _style({}):
        figure = Figure(figsize=(6.2, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xscale="log", xlabel="Learning rate", ylabel="Loss", title="Loss while the learning rate rises")
        axes.plot(rates, known, color=MUTED, linewidth=0.8, alpha=0.7, label="each step")
        if len(known):
            smooth = smooth_losses(known)
            axes.plot(rates, smooth, color=COLOURS[0], linewidth=2, label="smoothed")
            # Where training diverges, losses grow so far that the rest of the curve would be a flat line.
            margin = 0.1 * np.ptp(smooth) or 0.1
            axes.set_ylim(min(known.min(), smooth.min()) - margin, smooth.max() + 2 * margin)
        if suggestion is not None:
            axes.axvline(suggestion, color=COLOURS[1], linestyle="--", label=f"suggestion: {suggestion:.2g}")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=PRINTED_DPI, facecolor="white")


# Figures of an evaluation


def draw_confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draws counts, coloured by their share of the row; the figure grows with the classes.

    Args:
        matrix: int `(classes, classes)`, rows true and columns predicted.
        class_names: in the order of the rows.
    """
    counts = np.asarray(matrix)
    number, labels = len(counts), [_label(name) for name in class_names]
    cell = float(np.clip(4.2 / number, 0.24, 0.9))
    label_size = 10 if number <= 12 else 8
    label_width = 0.62 * label_size / 72 * max(map(len, labels))
    rotation = 0 if label_width < 0.9 * cell else 40 if number <= 12 else 90
    label_height = 0.2 + label_width * np.sin(np.radians(rotation))
    sides = number * cell + 0.65 + np.array([label_width, label_height])
    figure = Figure(figsize=sides, layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Opacity, not a colour scale that ends in white: the empty cells then suit a dark page as well.
    colours = np.empty((number, number, 4))
    colours[..., :3], colours[..., 3] = COUNT_COLOUR, shares
    axes.imshow(colours, aspect="equal")
    anchor = {"rotation_mode": "anchor", "ha": "right"} if rotation == 40 else {}
    axes.set_xticks(range(number), labels, rotation=rotation, **anchor)
    axes.set_yticks(range(number), labels)
    axes.tick_params(labelsize=label_size, length=0)
    for draw_lines in (axes.hlines, axes.vlines):
        draw_lines(np.arange(1, number) - 0.5, -0.5, number - 0.5, color=MUTED, linewidth=0.4, alpha=0.5)
    axes.set(xlabel="Predicted", ylabel="True")
    _write_counts(axes, counts, shares, cell)
    return figure


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray, cell: float) -> None:
    """Writes the counts above 0 into cells of `cell` inches, where the digits fit legibly."""
    points, digits = 72 * cell, len(str(counts.max()))
    size = min(10, 0.85 * points / (0.65 * digits))
    if size < 4:
        return
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.55 else matplotlib.rcParams["text.color"]
        text = axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=size, color=colour)
        # Thousands of texts would make the layout take seconds.
        text.set_in_layout(False)


def draw_roc_curves(curves: dict[str, dict[str, Any]]) -> Figure:
    """Draws the true over the false positive rate of each class, with its area.

    Args:
        curves: by class name, as `metrics.get_curves` gives them; a class without an area is left out.
    """
    figure, axes = _square_figure("False positive rate", "True positive rate")
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1)
    _draw_curves(axes, curves, ("false_positive_rate", "true_positive_rate"), "auroc", "AUROC")
    return figure


def draw_precision_recall_curves(curves: dict[str, dict[str, Any]]) -> Figure:
    """Draws precision over recall of each class, with its average precision.

    Args:
        curves: by class name, as `metrics.get_curves` gives them; a class without positives is left out.
    """
    figure, axes = _square_figure("Recall", "Precision")
    _draw_curves(axes, curves, ("recall", "precision"), "average_precision", "Average precision")
    return figure


def _square_figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _draw_curves(
    axes: Axes, curves: dict[str, dict[str, Any]], keys: tuple[str, str], area_key: str, area_name: str
) -> None:
    """Draws a few classes in colours; of many only the worst ones and the mean, and the others in thin grey."""
    known = {name: curve for name, curve in curves.items() if curve[area_key] is not None}
    if not known:
        axes.text(0.5, 0.5, f"{area_name} is undefined for every class", ha="center", color=MUTED)
        return
    many = len(known) > MOST_COLOURED_CURVES
    worst_first = sorted(known, key=lambda name: known[name][area_key])
    coloured = worst_first[:WORST_CURVES] if many else list(known)
    for name in worst_first[WORST_CURVES:] if many else []:
        axes.plot(*(known[name][key] for key in keys), color=MUTED, linewidth=0.6, alpha=0.5)
    lines = {}
    for name, colour in zip(coloured, COLOURS, strict=False):
        (line,) = axes.plot(*(known[name][key] for key in keys), color=colour, linewidth=1.6)
        lines[f"{known[name][area_key]:.3f}  {_label(name)}"] = line
    if many:
        x, y = _mean_curve([tuple(np.asarray(curve[key]) for key in keys) for curve in known.values()])
        (line,) = axes.plot(x, y, color=matplotlib.rcParams["text.color"], linewidth=2.4)
        mean = np.mean([curve[area_key] for curve in known.values()])
        lines = {f"{mean:.3f}  mean of {len(known)} classes": line} | lines
    title = f"{area_name}, worst {WORST_CURVES} classes" if many else area_name
    axes.legend(lines.values(), lines.keys(), loc="best", title=title, fontsize=8.5, title_fontsize=8.5)


def _mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean of curves `(x, y)`, each interpolated at 201 positions from 0 to 1."""
    grid = np.linspace(0, 1, 201)
    ordered = [(x, y) if x[0] <= x[-1] else (x[::-1], y[::-1]) for x, y in curves]
    return grid, np.mean([np.interp(grid, x, y) for x, y in ordered], axis=0)


def draw_reliability(calibration: dict[str, Any]) -> Figure:
    """Draws how often predictions hold against their probability, before and after the temperature.

    Source: DeGroot and Fienberg, The Statistician 32, 1983; Guo et al., ICML 2017, section 2 (arXiv:1706.04599).

    Args:
        calibration: `bins` and `bins_uncalibrated`, non-empty ones with `confidence`, `accuracy` and `count`, and the
            `expected_calibration_error` of both.
    """
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1, label="perfect calibration")
    series = {"before the temperature": ("_uncalibrated", COLOURS[1]), "after the temperature": ("", COLOURS[0])}
    if calibration["bins"] == calibration["bins_uncalibrated"]:
        series = {"this model": ("", COLOURS[0])}
    for position, (words, (suffix, colour)) in enumerate(series.items()):
        bins = calibration[f"bins{suffix}"]
        confidences, accuracies, counts = (
            np.array([one[key] for one in bins]) for key in ("confidence", "accuracy", "count")
        )
        label = f"{words}: error {calibration[f'expected_calibration_error{suffix}']:.3f}"
        upper.plot(confidences, accuracies, marker="o", markersize=4, color=colour, label=label)
        width = 0.028 if len(series) > 1 else 0.05
        offset = (position - (len(series) - 1) / 2) * width
        lower.bar(confidences + offset, counts / max(counts.sum(), 1), width=width, color=colour)
    upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="Share that holds")
    upper.legend(loc="upper left", fontsize=8.5)
    lower.set(xlabel="Probability", ylabel="Share of\npredictions", ylim=(0, None))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


@contextlib.contextmanager
def _style(options: dict[str, Any]) -> Iterator[None]:
    """Applies matplotlib's options for a while, with an installed font for every script that it can."""
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": fonts} | options), warnings.catch_warnings():
        # A box stands for a character that no font has; the tables of the page show it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _label(name: str, longest: int = LONGEST_NAME) -> str:
    """Returns a name as matplotlib may draw it: not too long, and a dollar sign is no formula."""
    text = show(name)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-(longest - longest // 2 - 1) :]}"
    return text.replace("$", r"\$")


def save_figures(folder: str, results: dict[str, Any], curves: dict[str, dict[str, Any]]) -> list[str]:
    """Writes the test set's figures as PNG files.

    Args:
        folder: receives `confusion_matrix.png` (one label an image), `roc_curves.png`,
            `precision_recall_curves.png` and `reliability_diagram.png`.
        results: the content of metrics.json.
        curves: of the test set, as `metrics.get_curves` gives them.

    Returns:
        The files' paths.
    """
    paths = []
    for name, draw in _figures_of(results, curves).items():
        paths.append(os.path.join(folder, f"{name}.png"))
        with _style({}), atomic_path(paths[-1]) as temporary:
            draw().savefig(temporary, dpi=PRINTED_DPI, facecolor="white")
    return paths


def _figures_of(results: dict[str, Any], curves: dict[str, dict[str, Any]]) -> dict[str, Callable[[], Figure]]:
    """Returns what draws each figure of the test set, by name."""
    test = results["sets"]["test"]
    figures = {
        "roc_curves": lambda: draw_roc_curves(curves),
        "precision_recall_curves": lambda: draw_precision_recall_curves(curves),
        "reliability_diagram": lambda: draw_reliability(test["calibration"]),
    }
    if "confusion_matrix" in test:
        figures["confusion_matrix"] = lambda: draw_confusion_matrix(test["confusion_matrix"], results["classes"])
    return figures


# Gallery


def choose_gallery(
    y_true: np.ndarray, probabilities: np.ndarray, chosen: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the images that are worth a look.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`.
        chosen: bool `(images, classes)`, the classes that are predicted.
        number: the most images of either kind.

    Returns:
        Rows of the wrongly predicted images with the highest loss, the worst first; multi-label: with any label
        wrong. And rows of the images, right or wrong, whose prediction is least probable, the least first.
    """
    truth = y_true.astype(bool) if y_true.ndim == 2 else np.arange(chosen.shape[1]) == y_true[:, None]
    wrong = np.flatnonzero((truth != chosen).any(axis=1))
    losses = get_losses(y_true, probabilities)
    # The loss that the prediction itself would have if it were the truth: high where the model half believes it.
    doubts = get_losses(chosen if y_true.ndim == 2 else chosen.argmax(axis=1), probabilities)
    return wrong[np.argsort(-losses[wrong], kind="stable")][:number], np.argsort(-doubts, kind="stable")[:number]


def get_losses(y_true: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns the cross-entropy of each image, multi-label the mean of its binary ones; nats, float64 `(images,)`.

    Args:
        y_true: int `(images,)`, class positions; multi-label: `(images, classes)` of zeros and ones.
        probabilities: `(images, classes)`; taken as at least 1e-7 from 0, multi-label from 1 as well.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if y_true.ndim == 1:
        return -np.log(np.maximum(probabilities[np.arange(len(y_true)), y_true], LEAST_PROBABILITY))
    clipped = np.clip(probabilities, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return -np.log(np.where(y_true.astype(bool), clipped, 1 - clipped)).mean(axis=1)


# Page


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
        path: the HTML file; it loads nothing else.
        results: the content of metrics.json.
        curves: of the test set, as `metrics.get_curves` gives them.
        gallery: `mistakes` and `least_confident`, lists of images: `path`; `true` and `predicted`, class names;
            `probability` of the predicted class (multi-label: of the answer to the least certain label); `loss` in
            nats; `photo`, uint8 RGB `(height, width, 3)`; `heatmap`, the same with Grad-CAM over it, or None.
        training_log: as `read_log` gives it, or None.
        configs: every option of the run by name.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = _compile_template(TEMPLATE, autoescape=True, finalize=_show_text).render(
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        script_hash=f"sha256-{digest}",
        results=results,
        test=results["sets"]["test"],
        headlines=_list_headlines(results),
        warnings=list_warnings(results, configs),
        columns=_list_class_columns(results),
        class_intervals=_list_class_intervals(results),
        confusions=_list_confusions(results),
        figures=_embed_figures(results, curves),
        training_curves=_embed_log(training_log),
        galleries=_embed_gallery(gallery),
        options=_list_options(configs),
        files={name: words for name, words in FILES.items() if _is_written(name, results)},
        command=_test_command(results["model"], configs),
    )
    write_text(path, page)


def _compile_template(source: str, **options: Any) -> jinja2.Template:
    """Returns a template; the options tell how it escapes what is put into it."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)
    environment.filters |= {
        "fixed": _format_fixed,
        "percent": _format_percent,
        "yaml": _quote_yaml,
        "base_name": _base_name,
    }
    return environment.from_string(source)


def show(text: str) -> str:
    """Returns a text with the characters that cannot be seen, or that reorder others, written as their escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs") or character in BIDI_CONTROLS
        else character
        for character in text
    )


def _show_text(value: Any) -> Any:
    return show(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _format_fixed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _format_percent(value: float | None) -> str:
    # A space that does not break.
    return "undefined" if value is None else f"{100 * value:.1f}\u00a0%"


def list_warnings(results: dict[str, Any], configs: dict[str, Any]) -> list[str]:
    """Lists the reasons to doubt the figures, in sentences.

    Args:
        results: the content of metrics.json.
        configs: every option of the run by name.
    """
    test, decision = results["sets"]["test"], results["decision"]
    found = []
    if not configs.get("validation_csv"):
        found.append(CHOSEN_ON_TEST_SET)
    if decision["temperature_fitted_on"] is None:
        found.append("No temperature was fitted for want of a validation set: probabilities are the model's own.")
    if results["multi_label"] and decision["thresholds_fitted_on"] == "training":
        found.append("The thresholds were fitted on the training set, where the model is surer than on new images.")
    elif results["multi_label"] and decision["thresholds_fitted_on"] is None:
        found.append("No thresholds were fitted.")
    supports = {name: row["support"] for name, row in test["per_class"].items()}
    faults = {
        "No test image has the label of these classes, so that nothing is known of them": [
            name for name, support in supports.items() if not support
        ],
        f"Fewer than {FEW_IMAGES} test images have the label of these classes, so that their figures are rough": [
            name for name, support in supports.items() if 0 < support < FEW_IMAGES
        ],
        "AUROC is undefined for these classes and left out of the mean": [
            name for name, row in test["per_class"].items() if "auroc" in row and row["auroc"] is None
        ],
    }
    return found + [f"{fault}: {', '.join(names)}." for fault, names in faults.items() if names]


def _list_headlines(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists the headline figures: title, meaning, value by set, and the test set's interval where it has one."""
    sets = results["sets"]
    intervals = sets["test"].get("intervals", {})
    rows = [
        (*HEADLINES[name], {key: figures.get(name) for key, figures in sets.items()}, intervals.get(name))
        for name in HEADLINES
        if name in sets["test"]
    ]
    errors = {key: figures["calibration"]["expected_calibration_error"] for key, figures in sets.items()}
    rows.append((*CALIBRATION_HEADLINE, errors, intervals.get("expected_calibration_error")))
    return [
        {
            "title": title,
            "meaning": meaning,
            "format": _format_percent if is_share else _format_fixed,
            "values": values,
            "interval": interval if interval and None not in interval else None,
        }
        for title, is_share, meaning, values, interval in rows
    ]


def _list_class_columns(results: dict[str, Any]) -> dict[str, str]:
    """Returns the titles of the columns that the per-class table has, by name."""
    row = next(iter(results["sets"]["test"]["per_class"].values()))
    return {name: title for name, title in CLASS_COLUMNS.items() if name in row}


def _list_class_intervals(results: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Returns the intervals of each class that has any, by class and column; those that are undefined are left out."""
    per_class = results["sets"]["test"].get("intervals", {}).get("per_class") or {}
    return {
        name: {column: interval for column, interval in row.items() if interval and None not in interval}
        for name, row in per_class.items()
    }


def _list_confusions(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists the most frequent confusions: `true`, `predicted`, `count` and `share` of the true class."""
    matrix = np.array(results["sets"]["test"].get("confusion_matrix", np.zeros((0, 0))))
    totals = matrix.sum(axis=1)
    pairs = [(int(row), int(column)) for row, column in np.argwhere(matrix) if row != column]
    pairs.sort(key=lambda pair: -matrix[pair])
    names = results["classes"]
    return [
        {
            "true": names[row],
            "predicted": names[column],
            "count": int(matrix[row, column]),
            "share": matrix[row, column] / totals[row],
        }
        for row, column in pairs[:CONFUSIONS_LISTED]
    ]


def _list_options(configs: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Lists the options in two groups, `changed` from the default and `default`: name, value, default, description."""
    options, defaults = Configs.options(), Configs.defaults()
    groups = {"changed": [], "default": []}
    for name, value in configs.items():
        known = name in defaults
        is_default = known and _show_value(value) == _show_value(defaults[name])
        groups["default" if is_default else "changed"].append(
            {
                "name": name,
                "value": _show_value(value),
                "default": _show_value(defaults[name]) if known else "",
                "description": options[name].metadata["description"] if known else "",
            }
        )
    return groups


def _show_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_show_value, value))
    return {None: "none", "": "empty"}.get(value) or str(value)


def _test_command(model_path: str, configs: dict[str, Any]) -> str:
    """Returns the command line that makes this evaluation again."""
    words, defaults = ["python", "test.py", "--load_model_path", model_path], Configs.defaults()
    for name in REPRODUCING:
        value = configs.get(name)
        if name in configs and _show_value(value) != _show_value(defaults.get(name)):
            values = value if isinstance(value, list | tuple) else ["none" if value is None else value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def _is_written(name: str, results: dict[str, Any]) -> bool:
    return name != "confusion_matrix.png" or "confusion_matrix" in results["sets"]["test"]


# Pictures inside the page


def _embed_figures(results: dict[str, Any], curves: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    words = {
        "confusion_matrix": f"Confusion matrix of {len(results['classes'])} classes, rows true and columns predicted",
        "roc_curves": "ROC curves: true positive rate over false positive rate",
        "precision_recall_curves": "Precision over recall",
        "reliability_diagram": "Reliability diagram: how often predictions hold over their probability",
    }
    return {name: _embed_figure(draw, words[name]) for name, draw in _figures_of(results, curves).items()}


def _embed_log(log: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Returns a picture of each metric of a log, so that a narrow screen shows them one below the other."""
    if log is None:
        return []
    panels = {name: log.filter(["epoch", name, f"val_{name}"]) for name in LOG_METRICS if name in log}
    return [
        _embed_figure(lambda panel=panel: draw_log(panel), f"{LOG_METRICS[name]} over the epochs")
        for name, panel in panels.items()
    ]


def _embed_figure(draw: Callable[[], Figure], description: str) -> dict[str, Any]:
    """Draws a figure for each theme.

    Returns:
        `light` and `dark`, data URIs; `description`; `width` and `height` in CSS pixels; `is_wide`, where it would
        become illegible in a column.
    """
    embedded: dict[str, Any] = {"description": description}
    style = {
        "legend.framealpha": 0,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": MUTED,
        "grid.color": MUTED,
    }
    for theme, ink in INKS.items():
        # The salt makes the names inside an SVG, and so the page, the same every time.
        with _style(style | dict.fromkeys(INK_OPTIONS, ink) | {"svg.hashsalt": theme}):
            figure = draw()
            embedded[theme] = _encode_figure(figure)
    width, height = figure.get_size_inches()
    width, height = round(width * CSS_DPI), round(height * CSS_DPI)
    return embedded | {"width": width, "height": height, "is_wide": width > WIDEST_IN_COLUMN}


def _encode_figure(figure: Figure) -> str:
    """Returns a figure as the data URI of an SVG image, or of a PNG where that is smaller than a large SVG."""
    drawing = io.BytesIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    if drawing.tell() <= LARGEST_SVG:
        return _data_uri("svg+xml", drawing.getvalue())
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=EMBEDDED_DPI)
    smaller = min(("svg+xml", drawing), ("png", picture), key=lambda pair: pair[1].tell())
    return _data_uri(smaller[0], smaller[1].getvalue())


def _embed_gallery(gallery: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Replaces the pictures of the items by data URIs, and tells which of their labels are right."""
    return {
        name: [
            item
            | {
                "photo": _encode_photo(item["photo"]),
                "heatmap": None if item["heatmap"] is None else _encode_photo(item["heatmap"]),
                "missed": [label for label in item["true"] if label not in item["predicted"]],
                "is_right": set(item["true"]) == set(item["predicted"]),
            }
            for item in items
        ]
        for name, items in gallery.items()
    }


def _encode_photo(photo: np.ndarray) -> str:
    """Returns a uint8 RGB image, shrunk to at most 320 pixels a side, as the data URI of a JPEG."""
    scale = PHOTO_SIZE / max(photo.shape[:2])
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in photo.shape[1::-1])
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(photo, cv2.COLOR_RGB2BGR)
    return _data_uri("jpeg", cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# Model card


def write_model_card(folder: str) -> str:
    """Writes MODEL_CARD.md, in Hugging Face's format, from what a run has written into its folder; atomically.

    A file that is damaged, which is printed, or that belongs to an earlier model has no part in it.

    Source: Mitchell et al., FAT* 2019 (arXiv:1810.03993).

    Args:
        folder: has `configs.json` and, as far as the run has come, training_log.csv and the files of `_CARD_FORMS`.

    Returns:
        The card's path; empty where there is no `configs.json`, and then no card is written.

    Raises:
        UserError: `configs.json` is damaged, or the card cannot be written.
    """
    configs_path, path = os.path.join(folder, "configs.json"), os.path.join(folder, CARD_FILE)
    if not os.path.isfile(configs_path):
        return ""
    stored = Configs.read_json(configs_path)
    configs = Configs.defaults() | stored
    data, stats, decision, results, compression = (_read_part(folder, name) for name in _CARD_FORMS)
    # test.py writes both; train.py removes the decision of a model that it is about to replace.
    results = results if results and results["decision"] == decision else None
    tested = results["sets"]["test"] if results else {}
    if data and tested.get("sha256") == data["validation"]["sha256"]:
        # Named or not, it was the test set, which is what the warnings look for.
        configs["validation_csv"] = ""
    artefacts = _list_artefacts(folder, compression) if compression else []
    card = _compile_template(CARD, finalize=_escape_markdown, keep_trailing_newline=True).render(
        configs=configs,
        class_names=configs["classes"] or [],
        measured=_list_measured(results),
        results=results,
        chosen_on_test_set=CHOSEN_ON_TEST_SET,
        headlines=_list_headlines(results) if results else [],
        columns=_list_class_columns(results) if results else {},
        class_intervals=_list_class_intervals(results) if results else {},
        decision=decision,
        data=data,
        counts=_count_images(data, results),
        recipe=_list_recipe(configs) | _list_progress(folder, configs, stats),
        goes_on=_goes_on(configs),
        options=[option for option in _list_options(stored)["changed"] if option["name"] != "classes"],
        path_endings=PATH_ENDINGS,
        compression=compression,
        artefacts=artefacts,
        loading=_list_loading(folder, results, artefacts),
        limits=_list_limits(configs, data, results),
    )
    write_text(path, card)
    return path


def _read_part(folder: str, name: str) -> dict[str, Any] | None:
    """Returns the content of one of the files of `_CARD_FORMS`; None where there is none or, printed, a damaged one."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if _fits(content, _CARD_FORMS[name]):
            return content
        fault = "its content is not as this version writes it"
    except (OSError, ValueError, RecursionError) as error:
        fault = str(error)
    print(f"The model card goes without {path}: {fault}. Write it again, or delete it.")
    return None


def _fits(value: Any, form: Any) -> bool:
    """Tells whether the content of a JSON file has a form.

    Args:
        value: the content.
        form: a type, where float means any finite number; None; a tuple of forms of which any will do; a list with
            the form of each item, or of all; an object's members by name, one that is missing counting as None, where
            `str` stands for all others and for at least one.
    """
    if isinstance(form, tuple):
        return any(_fits(value, one) for one in form)
    if isinstance(form, list) and isinstance(value, list):
        forms = form * len(value) if len(form) == 1 else form
        return len(value) == len(forms) and all(map(_fits, value, forms))
    if isinstance(form, dict) and isinstance(value, dict):
        forms = dict.fromkeys(value, form[str]) | form if str in form else form
        return (bool(value) or str not in form) and all(
            _fits(value.get(name), one) for name, one in forms.items() if name is not str
        )
    if form is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return value is None if form is None else type(value) is form


_NUMBER = (float, None)
_INTERVAL = ([_NUMBER, _NUMBER], None)
_CALIBRATION = {"expected_calibration_error": float, "expected_calibration_error_uncalibrated": float}
_FIGURES = dict.fromkeys(HEADLINES, _NUMBER) | {"images": int, "csv": (str, None)}
_FIGURES |= {"sha256": (str, None), "calibration": _CALIBRATION}
_FIGURES |= {"per_class": {str: {str: _NUMBER, "support": int}}}
_INTERVALS = {str: _INTERVAL, "per_class": ({str: {str: _INTERVAL}}, None)}
_INTERVALS |= dict.fromkeys(("accuracy", "exact_match_accuracy"), ([float, float], None))
_DECISION = {"temperature": float, "temperature_fitted_on": (str, None), "thresholds_fitted_on": (str, None)}
_DECISION |= {"exact_match_threshold": float, "best_f1_thresholds": ({str: float}, None)}
_DATA = {"csv": str, "images": int, "classes": {str: int}, "sha256": str}
_PAIR = {"before": float, "after": float}
_COMPARISON = {"images": int, "largest_difference": float, "changed_predictions": int, "accuracy": _PAIR}
_COMPARISON |= {"images_per_second": _PAIR}
_ARTEFACT = {"kind": str, "precision": str, "path": str, "files": {str: int}, "rejected": bool}
_CARD_FORMS: dict[str, dict[str, Any]] = {
    "data.json": {str: _DATA, "training": _DATA, "validation": _DATA},
    ".training_stats.json": {"epochs_completed": int, "monitor": str, "best": _NUMBER, "best_epoch": (int, None)},
    "decision.json": _DECISION,
    "evaluation/metrics.json": {
        "model": str,
        "multi_label": bool,
        "decision": _DECISION,
        "sets": {str: _FIGURES, "test": _FIGURES | {"intervals": _INTERVALS}},
    },
    "compression_report.json": {
        "model": str,
        "model_bytes": int,
        "model_sha256": str,
        "tolerance": float,
        "artefacts": [_ARTEFACT | {"comparison": (_COMPARISON, None)}],
    },
}


def _base_name(path: str) -> str:
    """Returns the last part of a path of any system: the card shall not tell about its author's computer."""
    return ntpath.basename(path.rstrip("/\\"))


def _escape_markdown(value: Any) -> Any:
    """Returns a text such that Markdown, a table of it too, shows it as it is; leaves Markup and all else alone."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    # An underscore between letters has no meaning, and is easier to read as it is.
    return re.sub(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", show(value))


def _quote_yaml(text: str) -> Markup:
    # YAML has Python's escapes.
    return Markup('"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"')


def _list_measured(results: dict[str, Any] | None) -> list[dict[str, str]]:
    """Lists the test figures that Hugging Face's metadata knows: `type`, `title` and `value`."""
    test = results["sets"]["test"] if results else {}
    found = {name: test[name] for name in METRIC_TYPES if test.get(name) is not None}
    # With a fixed number of digits: YAML takes 1e-05 for a text.
    return [
        {"type": METRIC_TYPES[name], "title": HEADLINES[name][0], "value": f"{value:.6f}"}
        for name, value in found.items()
    ]


def _count_images(data: dict[str, Any] | None, results: dict[str, Any] | None) -> dict[str, dict[str, int]]:
    """Returns the images of each class, by set and class."""
    counts = {name: part["classes"] for name, part in (data or {}).items()}
    if results:
        counts["test"] = {name: row["support"] for name, row in results["sets"]["test"]["per_class"].items()}
    return counts


def _list_recipe(configs: dict[str, Any]) -> dict[str, str]:
    """Returns what train.py was told, in words by heading; of `RECIPE` what is not switched off."""
    weights = "ImageNet" if configs["use_imagenet_weights"] else "random"
    start = f"{configs['visual_model_name']} with {weights} weights"
    if configs["load_model_path"] and not _goes_on(configs):
        start = f"the model {_base_name(configs['load_model_path'])}"
    elif configs["head_initialization"] == "linear_probe":
        start += ", its classifier from a logistic regression on the training images"
    layers, head_epochs = configs["conv_layers_to_train"], configs["head_epochs"]
    parts = {-1: "the whole network", 0: "the classifier; the backbone is frozen"}
    trained = parts.get(layers, f"the classifier and the backbone from its last {layers} convolutions on")
    rows = {"Start": start, "Trained": f"the classifier for {head_epochs} epochs, then " * bool(head_epochs) + trained}
    defaults = Configs.defaults()
    for heading, (always, changed) in RECIPE.items():
        names = [*always, *(name for name in changed if configs[name] != defaults[name])]
        values = {name.replace("_", " "): configs[name] for name in names}
        rows[heading] = "; ".join(
            value if isinstance(value, str) else f"{name} {_show_value(value)}" for name, value in values.items()
        )
    return rows


def _goes_on(configs: dict[str, Any]) -> bool:
    """Tells whether the last start of a run went on from a checkpoint of its own."""
    path = configs["load_model_path"]
    source = os.path.dirname(path) if path.endswith(MODEL_SUFFIXES) else path
    return bool(path) and os.path.abspath(source) == os.path.abspath(configs["save_model_path"])


def _list_progress(folder: str, configs: dict[str, Any], stats: dict[str, Any] | None) -> dict[str, str]:
    """Returns how far training has come, in words by heading; nothing where it does not say."""
    if stats is None:
        return {}
    rows, epoch = {"Epochs": f"{stats['epochs_completed']} of {configs['num_epochs']}"}, stats["best_epoch"]
    if stats["best"] is None or epoch is None:
        return rows
    rows["Best epoch"] = f"{epoch}{'' if epoch else ', the start'}: {stats['monitor']} {stats['best']:.4f}"
    path = os.path.join(folder, "training_log.csv")
    try:
        log = read_log(path) if os.path.isfile(path) else None
    except UserError as error:
        print(f"The model card has no figures of the best epoch: {error}")
        return rows
    for row in [] if log is None else log[log["epoch"] == epoch].to_dict("records"):
        figures = {name: value for name, value in row.items() if name.removeprefix("val_") in LOG_METRICS}
        rows["Its figures"] = "; ".join(f"{name} {value:.4f}" for name, value in figures.items())
    return rows


def _list_artefacts(folder: str, compression: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what was made of the model, with `name` and `bytes`; nothing where the folder has another model now."""
    model = os.path.join(folder, _base_name(compression["model"]))
    if os.path.isfile(model):
        digest = hash_file(model)
        if not isinstance(digest, bytes) or digest.hex() != compression["model_sha256"]:
            return []
    return [
        artefact | {"name": _base_name(artefact["path"]), "bytes": sum(artefact["files"].values())}
        for artefact in compression["artefacts"]
    ]


def _list_loading(
    folder: str, results: dict[str, Any] | None, artefacts: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns how to load each kind of file that is there and not rejected: `names`, `runtime` and `code`."""
    models = [_base_name(results["model"])] if results else []
    models += ["best_model.keras", "latest_model.keras"]
    files = {"keras": [name for name in models if os.path.isfile(os.path.join(folder, name))][:1]}
    for artefact in artefacts:
        if not artefact["rejected"] and os.path.exists(os.path.join(folder, artefact["name"])):
            files.setdefault(artefact["kind"], []).append(artefact["name"])
    rows = []
    for kind, names in files.items():
        if names and kind in LOADING:
            runtime, code = LOADING[kind]
            path, stem = json.dumps(names[0]), json.dumps(os.path.splitext(names[0])[0])
            rows.append({"names": names, "runtime": runtime, "code": Markup(code.format(path=path, stem=stem))})
    return rows


def _list_limits(configs: dict[str, Any], data: dict[str, Any] | None, results: dict[str, Any] | None) -> list[str]:
    """Lists what the figures do not tell and what the model cannot do, in sentences."""
    found = list_warnings(results, configs) if results else ["Nothing has been measured on a test set yet."]
    test, several = results["sets"]["test"] if results else {}, configs["multi_label_classification"]
    measure = "exact_match_accuracy" if several else "accuracy"
    low, high = test.get("intervals", {}).get(measure) or (0, 0)
    if 100 * (high - low) >= WIDE_INTERVAL:
        title = HEADLINES[measure][0]
        found.append(f"{title} has an interval of {100 * (high - low):.1f} points, for want of more test images.")
    if test.get(measure) == 1:
        # Hanley and Lippman-Hand, JAMA 249:1743, 1983: none in n leaves up to 3/n, at 95 % confidence.
        share = min(100, 300 / test["images"])
        found.append(f"No answer was wrong on {test['images']} test images: on others up to {share:.1f} % may be.")
    counts = data["training"]["classes"] if data else {"": 1}
    least, most = (choose(counts, key=counts.__getitem__) for choose in (min, max))
    if counts[most] >= IMBALANCE * counts[least]:
        found.append(f"Classes are imbalanced: {counts[most]} training images of {most}, {counts[least]} of {least}.")
    answers = "none, one or several" if several else "one"
    return [
        *found,
        f"Whatever an image shows, the answer is {answers} of the classes named above.",
        "Nothing was measured on photos of another origin: other cameras, places, times or people.",
        "Licence and intended use are for the author to add; the metadata at the top has no licence.",
    ]


# Firefox holds SVG images to the page's rule on styles, so inline ones are allowed; scripts are bound to a hash.
TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src '{{ script_hash }}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Evaluation of {{ results.model }}</title>
<style>{{ style }}</style>
</head>
<body>
{% set set_names = ["test", "validation", "training"] | select("in", results.sets) | list %}
{% macro picture(figure, caption="") %}
<figure{% if figure.is_wide %} class="wide"{% endif %}>
{% if figure.is_wide %}
<label><input type="checkbox"> Full size</label>
{% endif %}
<div class="scroll">
<picture>
<source media="screen and (prefers-color-scheme: dark)" srcset="{{ figure.dark }}">
<img src="{{ figure.light }}" alt="{{ figure.description }}" width="{{ figure.width }}" height="{{ figure.height }}">
</picture>
</div>
{% if caption %}
<figcaption>{{ caption }}</figcaption>
{% endif %}
</figure>
{% endmacro %}
{% macro gallery(items) %}
{% if items %}
<div class="gallery">
{% for item in items %}
<article class="card {{ 'right' if item.is_right else 'wrong' }}">
<div class="pair">
<img src="{{ item.photo }}" alt="Photo {{ item.path }}">
{% if item.heatmap %}
<img src="{{ item.heatmap }}" alt="Grad-CAM over {{ item.path }}">
{% endif %}
</div>
<dl>
<div><dt>Predicted</dt><dd>{{ item.predicted | join(", ") or "no label" }}
<span class="verdict">{{ "✓ right" if item.is_right else "✗ wrong" }}</span></dd></div>
<div><dt>True</dt><dd>{{ item.true | join(", ") or "no label" }}</dd></div>
{% if results.multi_label and item.missed %}
<div><dt>Missed</dt><dd>{{ item.missed | join(", ") }}</dd></div>
{% endif %}
<div><dt>{{ "Least certain" if results.multi_label else "Probability" }}</dt><dd>{{ item.probability | percent }}\
</dd></div>
<div><dt>Loss</dt><dd>{{ item.loss | fixed }}</dd></div>
</dl>
<p class="path">{{ item.path }}</p>
</article>
{% endfor %}
</div>
{% else %}
<p>None.</p>
{% endif %}
{% endmacro %}
{% macro option_table(options, caption, with_default) %}
<div class="scroll" tabindex="0" role="group" aria-label="{{ caption }}">
<table class="options">
<caption>{{ caption }}</caption>
<thead><tr><th scope="col">Option</th><th scope="col">Value</th>
{% if with_default %}<th scope="col">Default</th>{% endif %}</tr></thead>
<tbody>
{% for option in options %}
<tr><th scope="row"><code>{{ option.name }}</code><small>{{ option.description }}</small></th>
<td>{{ option.value }}</td>
{% if with_default %}<td>{{ option.default }}</td>{% endif %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
<header>
<p class="kicker">Evaluation</p>
<h1>{{ results.model }}</h1>
<p>{{ results.classes | length }} classes, {{ "several labels" if results.multi_label else "one label" }} an image.
{% for name in set_names %}
{{ "{:,}".format(results.sets[name].images) }} {{ name }}{{ " images." if loop.last else "," }}
{% endfor %}
</p>
<nav aria-label="Sections">
<a href="#figures">Figures</a>
<a href="#decision">Decision</a>
<a href="#classes">Classes</a>
{% if "confusion_matrix" in figures %}<a href="#confusion">Confusion</a>{% endif %}
<a href="#curves">Curves</a>
<a href="#calibration">Calibration</a>
{% if training_curves %}<a href="#training">Training</a>{% endif %}
<a href="#mistakes">Mistakes</a>
<a href="#doubts">Least confident</a>
<a href="#options">Options</a>
<a href="#files">Files</a>
</nav>
</header>
<main>
<section id="figures">
<h2>How good is it?</h2>
{% if warnings %}
<div class="warnings" role="note" aria-label="Read the figures with care">
<strong>Read the figures with care</strong>
<ul>
{% for warning in warnings %}
<li>{{ warning }}</li>
{% endfor %}
</ul>
</div>
{% endif %}
<p>On the test set, with the interval that holds the figure for 95 % of samples of as many images
(bootstrap).</p>
<ul class="tiles">
{% for row in headlines if row.interval %}
<li><span class="title">{{ row.title }}</span><span class="value">{{ row.format(row["values"].test) }}</span>
<span class="interval">{{ row.format(row.interval[0]) }} to {{ row.format(row.interval[1]) }}</span>
<svg viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">
<rect class="track" y="2" width="100" height="2"/>
<rect class="range" x="{{ 100 * row.interval[0] }}" y="1" \
width="{{ 100 * (row.interval[1] - row.interval[0]) }}" height="4"/>
<rect class="point" x="{{ 100 * row["values"].test - 0.5 }}" width="1" height="6"/></svg></li>
{% endfor %}
</ul>
<div class="scroll" tabindex="0" role="group" aria-label="Figures of every set">
<table>
<caption>Every set: a training figure far above the test figure is overfitting</caption>
<thead><tr><th scope="col">Figure</th>{% for name in set_names %}<th scope="col" class="number">\
{{ name | capitalize }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in headlines %}
<tr><th scope="row">{{ row.title }}<small>{{ row.meaning }}</small></th>
{% for name in set_names %}<td class="number">{{ row.format(row["values"][name]) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
<section id="decision">
<h2>How probabilities become an answer</h2>
{% set decision = results.decision %}
<dl class="facts">
<div><dt>Temperature</dt><dd>{{ decision.temperature | fixed }}
<small>{% if decision.temperature_fitted_on %}fitted on the {{ decision.temperature_fitted_on }} set; divides the logits
{% else %}not fitted: there is no validation set{% endif %}</small></dd></div>
{% if results.multi_label %}
<div><dt>Threshold</dt><dd>{{ decision.exact_match_threshold | fixed }}
<small>{% if decision.thresholds_fitted_on %}best exact match on the {{ decision.thresholds_fitted_on }} set{% else %}
not fitted{% endif %}; {{ test.exact_match_accuracy | percent }} on the test set</small></dd></div>
{% if "optimistic" in test %}
<div class="optimistic"><dt>Optimistic threshold</dt><dd>{{ test.optimistic.threshold | fixed }}
<small>{{ test.optimistic.exact_match_accuracy | percent }} exact match: {{ test.optimistic.note }}; not to be shipped\
</small></dd></div>
{% endif %}
<div><dt>Thresholds per class</dt><dd>{{ "best F1" if decision.best_f1_thresholds else "none" }}
<small>{% if decision.best_f1_thresholds %}in the table below; fitted on the {{ decision.thresholds_fitted_on }} set
{% else %}the threshold above holds for every class{% endif %}</small></dd></div>
{% else %}
<div><dt>Answer</dt><dd>Highest probability<small>the temperature changes no answer</small></dd></div>
{% endif %}
</dl>
</section>
<section id="classes">
<h2>Where is it good, where not?</h2>
<div class="scroll{{ " tall" if results.classes | length > 25 }}" tabindex="0" role="group" \
aria-label="Figures of each class">
<table class="sortable">
<caption>Each class on the test set; a click on a heading sorts\
{% if class_intervals %}. Small: 95 % interval{% endif %}</caption>
<thead><tr><th scope="col" aria-sort="none"><button type="button">Class</button></th>
{% for title in columns.values() %}
<th scope="col" class="number" aria-sort="none"><button type="button">{{ title }}</button></th>
{% endfor %}
</tr></thead>
<tbody>
{% for name, row in test.per_class.items() %}
<tr><th scope="row">{{ name }}</th>
{% for column in columns %}
{% set interval = class_intervals.get(name, {}).get(column) %}
<td class="number" data-value="{{ "" if row[column] is none else row[column] }}">\
{{ row[column] if column == "support" else row[column] | fixed }}\
{% if interval %}<small>{{ interval[0] | fixed }} to {{ interval[1] | fixed }}</small>\
{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% if "confusion_matrix" in figures %}
<section id="confusion">
<h2>What does it mistake for what?</h2>
<div class="columns">
{{ picture(figures.confusion_matrix, "Images of the test set. The stronger its blue, the larger a cell's share of its \
row.") }}
{% if confusions %}
<div class="scroll" tabindex="0" role="group" aria-label="Most frequent confusions">
<table>
<caption>Most frequent confusions</caption>
<thead><tr><th scope="col">True</th><th scope="col">Predicted</th><th scope="col" class="number">Images</th>
<th scope="col" class="number">Of the class</th></tr></thead>
<tbody>
{% for row in confusions %}
<tr><td>{{ row.true }}</td><td>{{ row.predicted }}</td><td class="number">{{ row.count }}</td>
<td class="number">{{ row.share | percent }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
</div>
</section>
{% endif %}
<section id="curves">
<h2>What does another threshold cost?</h2>
<div class="columns">
{{ picture(figures.roc_curves, "ROC curves of the test set, each class against the others.") }}
{{ picture(figures.precision_recall_curves, "Precision over recall of the test set: look here for rare classes.") }}
</div>
</section>
<section id="calibration">
<h2>Can its probabilities be believed?</h2>
<div class="columns">
{{ picture(figures.reliability_diagram, "On the dotted line, of the predictions made with 70 %, 70 % hold. Below it \
the model is too sure.") }}
<div>
<p>Expected calibration error: <strong>{{ test.calibration.expected_calibration_error | fixed }}</strong>
{% if results.decision.temperature_fitted_on %}
with the temperature, {{ test.calibration.expected_calibration_error_uncalibrated | fixed }} without.
{% endif %}
</p>
<p>It is the mean distance from the dotted line in 15 bins, weighted by their predictions\
{% if results.multi_label %}; every label of every image is one{% else %}; each image&rsquo;s most probable class is
one{% endif %}. All probabilities on this page, in <code>predictions.csv</code> and of <code>predict.py</code> are
with the temperature.</p>
</div>
</div>
</section>
{% if training_curves %}
<section id="training">
<h2>How did training go?</h2>
<div class="columns">
{% for figure in training_curves %}
{{ picture(figure) }}
{% endfor %}
</div>
</section>
{% endif %}
<section id="mistakes">
<h2>Worst mistakes</h2>
<p>Wrongly predicted test images with the highest loss: look for wrong labels too. Beside each photo, its Grad-CAM.</p>
{{ gallery(galleries.mistakes) }}
</section>
<section id="doubts">
<h2>Least confident</h2>
<p>Test images whose prediction is least probable, right or wrong: more of their kind are worth labelling.</p>
{{ gallery(galleries.least_confident) }}
</section>
<section id="options">
<h2>Options of the run</h2>
{% if options.changed %}
{{ option_table(options.changed, "Options that differ from their default", true) }}
{% endif %}
<details>
<summary>The other {{ options.default | length }} options</summary>
{{ option_table(options.default, "Options at their default", false) }}
</details>
</section>
<section id="files">
<h2>Files, and how to make them again</h2>
<dl class="files">
{% for name, words in files.items() %}
<div><dt><code>{{ name }}</code></dt><dd>{{ words }}</dd></div>
{% endfor %}
</dl>
<pre tabindex="0" aria-label="Command"><code>{{ command }}</code></pre>
</section>
</main>
<script>{{ script }}</script>
</body>
</html>
"""

CARD = """\
---
library_name: keras
pipeline_tag: image-classification
tags:
- keras
- tensorflow
- {{ configs.visual_model_name | yaml }}
{% if measured %}
metrics:
{% for row in measured %}
- {{ row.type }}
{% endfor %}
model-index:
- name: {{ (configs.visual_model_name ~ " image classifier") | yaml }}
  results:
  - task:
      type: image-classification
    dataset:
      type: csv
      name: Test set of the run
      split: test
    metrics:
{% for row in measured %}
    - type: {{ row.type }}
      name: {{ row.title }}
      value: {{ row["value"] }}
{% endfor %}
{% endif %}
---

{% set height, width, _ = configs.image_target_size %}
{% set several, number = configs.multi_label_classification, class_names | length %}
# {{ configs.visual_model_name }} image classifier of {{ number }} classes

- Classes, {{ "of which an image has any number" if several else "of which an image has one" }}: \
{{ class_names | join(", ") }}.
- Model: {{ configs.visual_model_name }} with a classifier of its own, in Keras on TensorFlow.
- Input: RGB, shape `(images, {{ height }}, {{ width }}, 3)`, pixels from 0 to 255; the backbone's preprocessing is \
inside.
- Output: probabilities, shape `(images, {{ number }})`, in the order of the classes above, \
{{ "each on its own" if several else "which sum to 1" }}.

## Results

{% if results %}
{% set test = results.sets.test %}
{% set others = ["validation", "training"] | select("in", results.sets) | list %}
{{ results.model | base_name }} on {{ test.images }} test images, by `test.py`; see also [Limits](#limits).

{% if not configs.validation_csv %}
**{{ chosen_on_test_set }}**

{% endif %}
| Figure | Test | 95 % interval |{% for name in others %} {{ name | capitalize }} |{% endfor %} Meaning |
|---|--:|--:|{% for _ in others %}--:|{% endfor %}---|
{% for row in headlines %}
| {{ row.title }} | {{ row.format(row["values"].test) }} |\
{% if row.interval %} {{ row.format(row.interval[0]) }} to {{ row.format(row.interval[1]) }}{% endif %} |\
{% for name in others %} {{ row.format(row["values"][name]) }} |{% endfor %} {{ row.meaning }} |
{% endfor %}

The interval holds the figure for 95 % of test sets of as many images of the same origin (bootstrap percentiles).

| Class on the test set |{% for title in columns.values() %} {{ title }} |{% endfor %}

|---|{% for _ in columns %}--:|{% endfor %}

{% for name, row in test.per_class.items() %}
| {{ name }} |{% for column in columns %}{% set interval = class_intervals.get(name, {}).get(column) %} \
{{ row[column] if column == "support" else row.get(column) | fixed }}\
{% if interval %} ({{ interval[0] | fixed }} to {{ interval[1] | fixed }}){% endif %} |{% endfor %}

{% endfor %}
{% else %}
Not tested yet: run `python test.py --load_model_path` with this folder's path.
{% endif %}

## Decision

{% if decision %}
- Temperature, which divides the logits: {{ decision.temperature | fixed }}, \
{% if decision.temperature_fitted_on %}fitted on the {{ decision.temperature_fitted_on }} set\
{% else %}not fitted, for there was no validation set{% endif %}.\
{% if results %}{% set calibration = results.sets.test.calibration %}
 The test set's calibration error is {{ calibration.expected_calibration_error | fixed }} with it, \
{{ calibration.expected_calibration_error_uncalibrated | fixed }} without.\
{% endif %}

{% if several %}
- Threshold of every class: {{ decision.exact_match_threshold | fixed }}, \
{% if decision.thresholds_fitted_on %}for the most exact matches on the {{ decision.thresholds_fitted_on }} set\
{% else %}not fitted{% endif %}.
{% if decision.best_f1_thresholds %}
- Thresholds for the best F1 of each class: {% for name, threshold in decision.best_f1_thresholds.items() %}\
{{ name }} {{ threshold | fixed }}{{ "." if loop.last else ", " }}{% endfor %}

{% endif %}
{% else %}
- The answer is the most probable class; the temperature does not change it.
{% endif %}
- All this is in `decision.json`, and `predict.py` applies it; the model itself does not.
{% else %}
Not fitted yet: run `python test.py --load_model_path` with this folder's path.
{% endif %}

## Data

{% if data %}
| Set | Table | Images | SHA-256 of labels and file names |
|---|---|--:|---|
{% for name, set in data.items() %}
| {{ name | capitalize }} | {{ set.csv | base_name }} | {{ set.images }} | {{ set.sha256 }} |
{% endfor %}
{% if results and results.sets.test.get("sha256") %}
| Test | {{ (results.sets.test.get("csv") or "") | base_name }} | {{ results.sets.test.images }} | \
{{ results.sets.test.sha256 }} |
{% endif %}

The SHA-256 covers the labels and the file names without folders, in the table's order, and not the pixels.
{% else %}
Not recorded: `train.py` writes `data.json` whenever it starts a run or goes on with it.
{% endif %}

{% if counts %}
| Class{{ ", of which an image may have several" if several }} |\
{% for name in counts %} {{ name | capitalize }} |{% endfor %}

|---|{% for _ in counts %}--:|{% endfor %}

{% for name in class_names %}
| {{ name }} |{% for images in counts.values() %} {{ images.get(name, 0) }} |{% endfor %}

{% endfor %}

{% endif %}
## Recipe

| Part | Options |
|---|---|
{% for heading, words in recipe.items() %}
| {{ heading }} | {{ words }} |
{% endfor %}

In the project's folder, with the path of this `configs.json` and the images at hand, this repeats the run\
{{ "" if configs.deterministic else ", but for rounding" }}:

```bash
python train.py --configs configs.json --save_model_path repeated_run{{ ' --load_model_path ""' if goes_on }}
```

Options that differ from their default, paths without their folders; all are in `configs.json`:

| Option | Value | Default |
|---|---|---|
{% for option in options %}
| {{ option.name }} | {{ option["value"] | base_name if option.name.endswith(path_endings) else option["value"] }} | \
{{ option.default }} |
{% endfor %}

## Files, sizes and speeds

{% if artefacts %}
| File | Holds | MB | {{ "Exact match" if several else "Accuracy" }} | Largest difference | Changed predictions | \
Images/s | Verdict |
|---|---|--:|--:|--:|--:|--:|---|
| {{ compression.model | base_name }} | the trained model | {{ "%.2f" | format(compression.model_bytes / 1e6) }} \
| | | | | |
{% for row in artefacts %}
| {{ row.name }} | {{ row.kind }}, {{ row.precision }} | {{ "%.2f" | format(row.bytes / 1e6) }} |\
{% if row.comparison %}
 {{ row.comparison.accuracy.before | percent }} → {{ row.comparison.accuracy.after | percent }} |\
 {{ "%.2g" | format(row.comparison.largest_difference) }} |\
 {{ row.comparison.changed_predictions }} of {{ row.comparison.images }} |\
 {{ "%.1f" | format(row.comparison.images_per_second.before) }} →\
 {{ "%.1f" | format(row.comparison.images_per_second.after) }} | {{ "rejected" if row.rejected else "accepted" }} |
{% else %}
 | | | | not compared |
{% endif %}
{% endfor %}

Each from the trained model to the file, on the same test images; differences are of probabilities, speeds of the \
computer that compressed. Accuracy may fall by {{ "%g" | format(compression.tolerance) }} (points), else a file is \
rejected: it is not to be used.
{% else %}
Not compressed yet: run `python compress_weights.py --model_path` with this folder's path.
{% endif %}

## How to load it

{% if loading %}
The probabilities come in the order of `classes` in `configs.json`, without the decision above. This way of resizing \
is not that of `predict.py`, and gives slightly different ones.

```python
import numpy as np
from PIL import Image

image = np.asarray(Image.open("photo.jpg").convert("RGB").resize(({{ width }}, {{ height }})))
```
{% for row in loading %}

{{ row.names | join(", ") }}, with {{ row.runtime }}:

```python
{{ row.code }}
```
{% endfor %}
{% else %}
There is no model in this folder.
{% endif %}

## Limits

{% for sentence in limits %}
- {{ sentence }}
{% endfor %}

The project's scripts write this file again: keep your own words in a copy. Hugging Face shows it where it is named \
`README.md`.
"""

STYLE = """
:root { color-scheme: light dark; --page: #f4f6f8; --card: #fff; --ink: #1b2128; --muted: #57606a; --line: #d8dee4;
  --accent: #0a5fb0; --range: #8fbfe8; --good: #1a7037; --bad: #b3261e; --note: #fff8e1; --note-line: #c98a00; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #0f1318; --card: #171c23; --ink: #e6edf3; --muted: #9da7b3; --line: #303842; --accent: #6cb2f5;
    --range: #2f6ca3; --good: #6fce8b; --bad: #ff9089; --note: #2b2410; --note-line: #d9a520; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
h1 { margin: 0 0 4px; font-size: clamp(1.2rem, 5vw, 1.6rem); line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 1.25rem; line-height: 1.3; }
p { margin: 0 0 12px; max-width: 46rem; }
a { color: var(--accent); }
code, pre { font: 0.9em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
small { display: block; color: var(--muted); font-size: 0.8rem; font-weight: 400; line-height: 1.35; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.kicker { margin: 0; color: var(--muted); }
header p { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 16px 0 20px; }
nav a { padding: 4px 0; text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { margin: 0 0 20px; padding: 24px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; scroll-margin-top: 12px; }
.warnings { margin: 0 0 16px; padding: 12px 16px; background: var(--note); border-left: 4px solid var(--note-line);
  border-radius: 6px; overflow-wrap: anywhere; }
.warnings ul { margin: 4px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 0 0 20px;
  padding: 0; list-style: none; }
.tiles li { padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; }
.tiles span { display: block; }
.tiles .title, .tiles .interval { color: var(--muted); font-size: 0.875rem; }
.tiles .value { font-size: 1.75rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles svg { display: block; width: 100%; height: 8px; margin-top: 8px; }
.track { fill: var(--line); }
.range { fill: var(--range); }
.point { fill: var(--ink); }
.scroll { max-width: 100%; overflow-x: auto; }
.tall { max-height: 80vh; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; z-index: 2; background: var(--card); border-bottom: 1px solid var(--line); }
table { width: 100%; border-collapse: separate; border-spacing: 0; font-size: 0.925rem; }
caption { padding: 0 0 8px; color: var(--muted); font-size: 0.875rem; text-align: left; }
th, td { padding: 7px 10px; border-top: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
td:not(.number) { min-width: 7rem; }
thead th { border-top: 0; color: var(--muted); font-weight: 600; vertical-align: bottom; overflow-wrap: normal; }
tbody th { min-width: 8.5rem; font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sortable thead th { padding: 0; }
.sortable thead .number { white-space: normal; }
.sortable tbody tr:hover > * { background: var(--page); }
th button { width: 100%; padding: 7px 10px; border: 0; background: none; color: inherit; font: inherit;
  text-align: inherit; cursor: pointer; }
th button:focus-visible { outline-offset: -2px; }
th button:hover { color: var(--accent); }
th button::after { content: "\\a0↕"; opacity: 0.5; }
th[aria-sort=ascending] button::after { content: "\\a0↑"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\a0↓"; opacity: 1; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 24px;
  align-items: start; }
.columns > * { min-width: 0; }
figure { margin: 0; }
figcaption { color: var(--muted); font-size: 0.875rem; }
img { display: block; max-width: 100%; height: auto; }
.wide { grid-column: 1 / -1; }
.wide label { display: inline-block; padding: 4px 0; color: var(--muted); font-size: 0.875rem; }
label:has(:checked) + .scroll img { max-width: none; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 16px; margin: 0; }
.facts dt { color: var(--muted); font-size: 0.875rem; }
.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.optimistic dd { color: var(--muted); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 16px; }
.card { overflow: hidden; border: 1px solid var(--line); border-radius: 8px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
.pair img { width: 100%; height: 100%; aspect-ratio: 1; object-fit: contain; background: var(--page); }
.pair img:only-child { grid-column: 1 / -1; aspect-ratio: 2; }
.card dl { margin: 10px 12px 4px; font-size: 0.9rem; }
.card dl div, .files div { display: grid; grid-template-columns: 6.5rem 1fr; gap: 8px; }
.card dt { color: var(--muted); }
.card dd, .files dd { margin: 0; overflow-wrap: anywhere; }
.verdict { margin-left: 4px; font-size: 0.85em; white-space: nowrap; }
.wrong .verdict { color: var(--bad); }
.right .verdict { color: var(--good); }
.path { margin: 0 12px 10px; color: var(--muted); font-size: 0.8rem; overflow-wrap: anywhere; }
.options tbody th { min-width: 11rem; }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--accent); }
.files { margin: 0 0 16px; }
.files div { grid-template-columns: 15rem 1fr; padding: 3px 0; }
pre { margin: 0; padding: 12px; overflow-x: auto; background: var(--page); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media (max-width: 600px) {
  header, main { padding-left: 12px; padding-right: 12px; }
  header { padding-top: 20px; }
  section { padding: 16px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles .value { font-size: 1.4rem; }
  .files div { grid-template-columns: 1fr; gap: 0; }
  table { font-size: 0.875rem; }
  caption { width: calc(100vw - 58px); }
  th, td, th button { padding: 6px; }
  tbody th { min-width: 7rem; }
  td:not(.number) { min-width: 5.5rem; }
  .sortable tbody th, .sortable thead th:first-child { position: sticky; left: 0; background: var(--card); }
  .sortable thead th:first-child { z-index: 3; } }
@media print {
  body, section { background: none; }
  section { padding: 0 0 12px; border: 0; }
  nav, label, th button::after { display: none; }
  h2, tr, figure, .card, .tiles li { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { max-height: none; overflow: visible; }
  label:has(:checked) + .scroll img { max-width: 100%; } }
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  const body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const compare = (first, second) => {
      const cells = [first.cells[column], second.cells[column]];
      if (column === 0) return direction * cells[0].textContent.localeCompare(cells[1].textContent);
      const [left, right] = cells.map(cell => cell.dataset.value);
      // What is undefined comes last either way.
      if (left === "" || right === "") return (left === "") - (right === "");
      return direction * (Number(left) - Number(right));
    };
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    body.append(...Array.from(body.rows).sort(compare));
  }));
}
"""
