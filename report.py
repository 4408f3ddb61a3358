"""Figures of an evaluation, and the page that holds them all: report.html opens offline, in one file."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import shlex
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
from utils import atomic_path, write_text

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
    from metrics import smooth_losses

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
    page = _compile_template().render(
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


def _compile_template() -> jinja2.Template:
    """Returns the page's template, which escapes all that is put into it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_show_text, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"fixed": _format_fixed, "percent": _format_percent}
    return environment.from_string(TEMPLATE)


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
        found.append(
            "There was no validation set, so the test set chose the epoch of the best model: its figures are "
            "optimistic. Train with validation_csv for honest ones."
        )
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
    per_class = results["sets"]["test"].get("intervals", {}).get("per_class", {})
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
