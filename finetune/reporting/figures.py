"""Figures of an evaluation and of a training log, for paper and for light and dark pages."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from finetune.core.files import atomic_path
from finetune.core.options import UserError
from finetune.core.texts import MOST_LISTED, show
from finetune.evaluation.metrics import ConfusionMatrix, list_confusions, read_cells
from finetune.training.learning_rate_finder import find_fall, smooth_losses

# After Wong, Nature Methods 8:441, 2011: distinct for colour-blind readers, legible on white and on near black.
COLOURS = ("#0f7fc4", "#e0701c", "#129e78", "#c765a0", "#b58900", "#4aa8d8", "#8c6bd1", "#7a7f85", "#d1495b", "#5b9a32")
COUNT_COLOUR = (0.06, 0.42, 0.74)
MUTED = "#8b949e"
# Fonts with Chinese, Japanese and Korean on Linux, Windows and macOS.
FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Microsoft YaHei", "Yu Gothic")
FALLBACK_FONTS += ("Malgun Gothic", "PingFang SC", "Hiragino Sans", "Arial Unicode MS")
PRINTED_DPI = 150
LONGEST_NAME = 24
MOST_COLOURED_CURVES = 10
WORST_CURVES = 5
# More than MOST_LISTED curves are drawn as a band between these percentiles.
BAND = (10, 90)
PAIRS_LISTED = 30
# Cells per side of the heat map, so that each has two pixels on the page.
MOST_BLOCKS = 200
LEAST_SHARE = 0.001
# Of the risk-coverage curve: the share of answers from which its height counts, and the lowest top of its axis.
LEAST_COVERAGE = 0.1
LOWEST_TOP = 0.05
NAMES_AT_HEAT_MAP = 12
SHORT_NAME = 18


def draw_confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draws counts `(classes, classes)`, rows true and columns predicted, coloured by their share of the row.

    The figure grows with the number of classes.
    """
    counts = np.asarray(matrix)
    number, labels = len(counts), [label_text(name) for name in class_names]
    cell = float(np.clip(4.2 / number, 0.24, 0.9))
    label_size = 10 if number <= 12 else 8
    label_width = 0.62 * label_size / 72 * max(map(len, labels))
    rotation = 0 if label_width < 0.9 * cell else 40 if number <= 12 else 90
    label_height = 0.2 + label_width * np.sin(np.radians(rotation))
    sides = number * cell + 0.65 + np.array([label_width, label_height])
    figure = Figure(figsize=sides, layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Opacity instead of a colour scale down to white, so that empty cells suit a dark page too.
    colours = np.empty((number, number, 4), np.float32)
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
    """Writes the counts above 0 into cells of `cell` inches, if the digits are legible at that size."""
    points, digits = 72 * cell, len(str(counts.max()))
    size = min(10, 0.85 * points / (0.65 * digits))
    if size < 4:
        return
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.55 else matplotlib.rcParams["text.color"]
        text = axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=size, color=colour)
        # The layout of thousands of texts would take seconds.
        text.set_in_layout(False)


def draw_heat_map(stored: ConfusionMatrix, class_names: Sequence[str], pairs_listed: int = PAIRS_LISTED) -> Figure:
    """Draws a confusion matrix of many classes as a heat map, with a list of the most frequent confusions.

    It takes what `metrics.count_confusions` returned, and draws the map alone with `pairs_listed` 0.
    """
    cells, number = read_cells(stored, class_names), len(class_names)
    # Cells that would be too small to see are merged into blocks that show their maximum, so no confusion is lost.
    side = -(-number // MOST_BLOCKS)
    blocks = np.zeros((-(-number // side),) * 2)
    np.maximum.at(blocks, (cells.rows // side, cells.columns // side), cells.shares)
    pairs = list_confusions(stored, class_names, pairs_listed)
    figure = Figure(figsize=(12, 6.8) if pairs else (5.8, 6.4), layout="constrained")
    axes, *beside = figure.subplots(1, 2 if pairs else 1, squeeze=False, width_ratios=(1, 1) if pairs else None)[0]
    lowest = float(np.clip(blocks[blocks > 0].min(initial=1), LEAST_SHARE, 0.1))
    fading = LinearSegmentedColormap.from_list("counts", [(*COUNT_COLOUR, 0.3), (*COUNT_COLOUR, 1)])
    image = axes.imshow(
        np.ma.masked_equal(blocks, 0),
        cmap=fading,
        norm=LogNorm(lowest, 1, clip=True),
        interpolation="none",
        extent=(-0.5, len(blocks) * side - 0.5, len(blocks) * side - 0.5, -0.5),
    )
    positions = np.unique(np.linspace(0, number - 1, NAMES_AT_HEAT_MAP).astype(int))
    names = [label_text(class_names[position], SHORT_NAME) for position in positions]
    axes.set_xticks(positions, names, rotation=90)
    axes.set_yticks(positions, names)
    axes.tick_params(labelsize=7)
    axes.set(xlabel="Predicted", ylabel="True", xlim=(-0.5, number - 0.5), ylim=(number - 0.5, -0.5))
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.8, aspect=40, format=PercentFormatter(1))
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    highest = f"; each dot is the highest of {side} x {side} cells" if side > 1 else ""
    bar.set_label(f"Share of the true class's images{highest}", fontsize=8)
    for list_axes in beside:
        _write_pairs(list_axes, pairs)
    return figure


def _write_pairs(axes: Axes, pairs: Sequence[dict[str, Any]]) -> None:
    """Lists confusions, one in each row."""
    axes.set_axis_off()
    axes.set_title(f"The {len(pairs)} most frequent confusions", fontsize=10, pad=14)
    rows = [("Images", "Of the class", "True", "Predicted")]
    rows += [
        (str(pair["count"]), f"{pair['share']:.1%}", label_text(pair["true"]), label_text(pair["predicted"]))
        for pair in pairs
    ]
    columns = ((0.12, "right"), (0.32, "right"), (0.37, "left"), (0.7, "left"))
    for place, row in enumerate(rows):
        for (x, side), text in zip(columns, row, strict=True):
            weight = "normal" if place else "bold"
            axes.text(x, 1 - place / PAIRS_LISTED, text, ha=side, va="center", fontsize=8, weight=weight)


def draw_roc_curves(curves: dict[str, dict[str, Any]]) -> Figure:
    """Draws the ROC curves of `metrics.get_curves` with their areas; leaves out classes with an undefined area."""
    figure, axes = _square_figure("False positive rate", "True positive rate")
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1)
    _draw_curves(axes, curves, ("false_positive_rate", "true_positive_rate"), "auroc", "AUROC")
    return figure


def draw_precision_recall_curves(curves: dict[str, dict[str, Any]]) -> Figure:
    """Draws precision over recall with average precisions; leaves out classes without positives."""
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
    """Draws few classes in colours. Of many, the worst and the mean: the others are thin grey lines or a band."""
    known = {name: curve for name, curve in curves.items() if curve[area_key] is not None}
    if not known:
        axes.text(0.5, 0.5, f"{area_name} is undefined for every class", ha="center", color=MUTED)
        return
    many = len(known) > MOST_COLOURED_CURVES
    worst_first = sorted(known, key=lambda name: known[name][area_key])
    coloured = worst_first[:WORST_CURVES] if many else list(known)
    for name in worst_first[WORST_CURVES:] if many and len(known) <= MOST_LISTED else []:
        axes.plot(*(known[name][key] for key in keys), color=MUTED, linewidth=0.6, alpha=0.5)
    lines = {}
    for name, colour in zip(coloured, COLOURS, strict=False):
        (line,) = axes.plot(*(known[name][key] for key in keys), color=colour, linewidth=1.6)
        lines[f"{known[name][area_key]:.3f}  {label_text(name)}"] = line
    if many:
        x, heights = _resample([tuple(np.asarray(curve[key]) for key in keys) for curve in known.values()])
        (line,) = axes.plot(x, heights.mean(axis=0), color=matplotlib.rcParams["text.color"], linewidth=2.4)
        mean = np.mean([curve[area_key] for curve in known.values()])
        lines = {f"{mean:.3f}  mean of {len(known)} classes": line} | lines
    if len(known) > MOST_LISTED:
        band = axes.fill_between(x, *np.percentile(heights, BAND, axis=0), color=MUTED, alpha=0.35, linewidth=0)
        lines[f"the middle {BAND[1] - BAND[0]} % of classes"] = band
    title = f"{area_name}, worst {WORST_CURVES} classes" if many else area_name
    axes.legend(lines.values(), lines.keys(), loc="best", title=title, fontsize=8.5, title_fontsize=8.5)


def _resample(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns 201 positions from 0 to 1, and the values there of curves `(x, y)`, `(curves, 201)`."""
    grid = np.linspace(0, 1, 201)
    ordered = [(x, y) if x[0] <= x[-1] else (x[::-1], y[::-1]) for x, y in curves]
    return grid, np.array([np.interp(grid, x, y) for x, y in ordered])


def draw_reliability(calibration: dict[str, Any]) -> Figure:
    """Draws the share of right predictions over their probability, before and after temperature scaling.

    Source: DeGroot and Fienberg, The Statistician 32, 1983; Guo et al., ICML 2017, section 2 (arXiv:1706.04599).

    Args:
        calibration: `bins` and `bins_uncalibrated`, the non-empty ones with `confidence`, `accuracy` and `count`, and
            the `expected_calibration_error` of both.
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
    upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="Share that is right")
    upper.legend(loc="upper left", fontsize=8.5)
    lower.set(xlabel="Probability", ylabel="Share of\npredictions", ylim=(0, None))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def draw_risk_coverage(test: dict[str, Any], multi_label: bool, max_error: float = 0.0) -> Figure:
    """Draws the share of wrong answers over the share of answers that a model gives, the surest first.

    Source: El-Yaniv and Wiener, JMLR 2010, section 2.

    Args:
        test: the test set's metrics: `risk_coverage` and, with a validation set, `promises`, drawn as points for a
            single label.
        multi_label: whether an answer is a label, instead of an image's class.
        max_error: drawn as a line, unless it is 0.
    """
    what = "labels" if multi_label else "images"
    figure, axes = _square_figure(f"Coverage: share of the {what} answered", "Risk: share of wrong answers")
    coverage, errors = (np.array(test["risk_coverage"][key]) for key in ("coverage", "error"))
    if not coverage.size:
        axes.text(0.5, 0.5, "No label is predicted", ha="center", color=MUTED)
        return figure
    axes.plot(coverage, errors, color=COLOURS[0], linewidth=1.6, label=f"the surest {what} answered")
    # The errors of the first few answers are noise.
    highest = [max_error, *errors[coverage >= min(LEAST_COVERAGE, coverage[-1])]]
    if not multi_label:
        points = [row for row in test.get("promises", []) if row["error"] is not None]
        highest += [row["error"] for row in points]
        label = "answered with a promise (%)" if points else ""
        axes.scatter(*([row[key] for row in points] for key in ("coverage", "error")), color=COLOURS[1], label=label)
        for row in points:
            place = (row["coverage"], row["error"])
            axes.annotate(f"{100 * row['promised']:g}", place, xytext=(0, 6), textcoords="offset points", ha="center")
    if max_error:
        axes.axhline(max_error, color=MUTED, linestyle=":", label=f"promised: at most {max_error:.1%}")
    top = max(1.2 * max(highest), LOWEST_TOP)
    axes.set_ylim(-0.02 * top, top)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper left", fontsize=8.5)
    return figure


@contextlib.contextmanager
def style(options: dict[str, Any]) -> Iterator[None]:
    """Applies matplotlib options, with the installed fonts that have Chinese, Japanese and Korean."""
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": fonts} | options), warnings.catch_warnings():
        # A character that no font has is drawn as a box; the tables of the page show it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def label_text(name: str, longest: int = LONGEST_NAME) -> str:
    """Returns a name for matplotlib: shortened, and with dollar signs that start no formula."""
    text = show(name)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-(longest - longest // 2 - 1) :]}"
    return text.replace("$", r"\$")


def save_figures(folder: str, results: dict[str, Any], curves: dict[str, dict[str, Any]]) -> list[str]:
    """Writes the figures of `figures_of` into a folder as PNG files; returns their paths."""
    paths = []
    for name, draw in figures_of(results, curves).items():
        paths.append(os.path.join(folder, f"{name}.png"))
        with style({}), atomic_path(paths[-1]) as temporary:
            draw().savefig(temporary, dpi=PRINTED_DPI, facecolor="white")
    return paths


def figures_of(
    results: dict[str, Any], curves: dict[str, dict[str, Any]], pairs_listed: int = PAIRS_LISTED
) -> dict[str, Callable[[], Figure]]:
    """Returns the functions that draw the test set's figures, by name; `pairs_listed` as `draw_heat_map` takes it."""
    test, names = results["sets"]["test"], results["classes"]
    figures = {
        "roc_curves": lambda: draw_roc_curves(curves),
        "precision_recall_curves": lambda: draw_precision_recall_curves(curves),
        "reliability_diagram": lambda: draw_reliability(test["calibration"]),
    }
    if "risk_coverage" in test:
        # Older versions of test.py fitted no rule.
        max_error = (results["decision"].get("abstention") or {}).get("max_error", 0.0)
        figures["risk_coverage"] = lambda: draw_risk_coverage(test, results["multi_label"], max_error)
    if "confusion_matrix" in test and len(names) > MOST_LISTED:
        figures["confusion_matrix"] = lambda: draw_heat_map(test["confusion_matrix"], names, pairs_listed)
    elif "confusion_matrix" in test:
        figures["confusion_matrix"] = lambda: draw_confusion_matrix(test["confusion_matrix"], names)
    return figures


LOG_METRICS = {"accuracy": "Accuracy", "auroc": "Mean AUROC", "loss": "Loss"}


def read_log(log_path: str) -> pd.DataFrame:
    """Reads a training log; raises UserError if it is missing or not a training log."""
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
    """Draws each metric of a log in its own panel; by default in a new figure without a window."""
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
        losses: `(steps,)`; only finite ones are drawn.
        suggestion: the rate to mark, or None.
        path: the file.
    """
    is_finite = np.isfinite(losses)
    rates, known = np.asarray(rates)[is_finite], np.asarray(losses)[is_finite]
    with style({}):
        figure = Figure(figsize=(6.2, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xscale="log", xlabel="Learning rate", ylabel="Loss", title="Loss while the learning rate rises")
        axes.plot(rates, known, color=MUTED, linewidth=0.8, alpha=0.7, label="each step")
        if len(known):
            smooth = smooth_losses(known)
            axes.plot(rates, smooth, color=COLOURS[0], linewidth=2, label="smoothed")
            # Once training diverges, the losses grow so large that the rest of the curve would look flat.
            margin = 0.1 * np.ptp(smooth) or 0.1
            axes.set_ylim(min(known.min(), smooth.min()) - margin, smooth.max() + 2 * margin)
        if suggestion is not None:
            axes.axvline(suggestion, color=COLOURS[1], linestyle="--", label=f"suggestion: {suggestion:.2g}")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=PRINTED_DPI, facecolor="white")


def report_learning_rate(folder: str, found: dict[str, Any], draws: bool = True) -> dict[str, Any]:
    """Draws the result of a learning-rate range test into a run's folder, and prints the suggestion.

    Returns `found` unchanged: `suggestion`, `rates` and `losses`. `draws` False leaves the picture to another process.
    """
    path = os.path.join(folder, "learning_rate.png")
    smooth = smooth_losses(np.array(found["losses"])[np.isfinite(found["losses"])])
    highest, lowest = smooth[[*find_fall(smooth)]]
    try:
        if draws:
            draw_learning_rate(found["rates"], found["losses"], found["suggestion"], path)
    finally:
        print(
            f"Suggested learning_rate: {found['suggestion']:.2g}. The smoothed loss falls from {highest:.3g} to "
            f"{lowest:.3g} as the rate rises."
        )
    print(f"The curve is in {path}")
    return found


def select_backend() -> bool:
    """Selects matplotlib's file-only backend if there is no display; returns True if there is one."""
    has_display = sys.platform in ("win32", "darwin") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    if not has_display or matplotlib.get_backend().lower() == "agg":
        matplotlib.use("agg")
        return False
    return True
