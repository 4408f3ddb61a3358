"""Reads the training log and draws its curves."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finetune.core.files import atomic_path
from finetune.core.options import UserError
from finetune.reporting.figures import COLOURS, MUTED, PRINTED_DPI, style
from finetune.training.learning_rate_finder import find_fall, smooth_losses

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
