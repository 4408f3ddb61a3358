"""Images embedded in a page as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from finetune.reporting.figures import LOG_METRICS, MUTED, draw_log, figures_of, style

INK_OPTIONS = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
INKS = {"light": "#24292f", "dark": "#e6edf3"}
EMBEDDED_DPI = 144
CSS_DPI = 96
WIDEST_IN_COLUMN = 560
LARGEST_SVG = 250_000
PHOTO_SIDE = 320
# Of the training photos beside a photo.
THUMBNAIL_SIDE = 96
JPEG_QUALITY = 85


def embed_figures(results: dict[str, Any], curves: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the test set's figures by name, as `_embed_figure` returns them."""
    words = {
        "confusion_matrix": f"Confusion matrix of {len(results['classes'])} classes, rows true and columns predicted",
        "roc_curves": "ROC curves: true positive rate over false positive rate",
        "precision_recall_curves": "Precision over recall",
        "reliability_diagram": "Reliability diagram: share of right predictions over their probability",
        "risk_coverage": "Risk-coverage curve: share of wrong answers over the share of answers given",
    }
    # The page lists the pairs in a table.
    drawn = figures_of(results, curves, pairs_listed=0)
    return {name: _embed_figure(draw, words[name]) for name, draw in drawn.items()}


def embed_log(log: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Returns a figure for each metric of a log, so that a narrow screen can stack them."""
    names = [] if log is None else [name for name in LOG_METRICS if name in log]
    return [
        _embed_figure(
            lambda name=name: draw_log(log.filter(["epoch", name, f"val_{name}"])),
            f"{LOG_METRICS[name]} over the epochs",
        )
        for name in names
    ]


def _embed_figure(draw: Callable[[], Figure], description: str) -> dict[str, Any]:
    """Draws a figure for each theme.

    Returns:
        `light` and `dark`, data URIs; `description`; `width` and `height` in CSS pixels; `is_wide`, whether a column
        is too narrow for it.
    """
    embedded: dict[str, Any] = {"description": description}
    options = {
        "legend.framealpha": 0,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": MUTED,
        "grid.color": MUTED,
    }
    for theme, ink in INKS.items():
        # The salt makes the ids inside an SVG, and so the page, reproducible.
        with style(options | dict.fromkeys(INK_OPTIONS, ink) | {"svg.hashsalt": theme}):
            figure = draw()
            embedded[theme] = _encode_figure(figure)
    width, height = figure.get_size_inches()
    width, height = round(width * CSS_DPI), round(height * CSS_DPI)
    return embedded | {"width": width, "height": height, "is_wide": width > WIDEST_IN_COLUMN}


def _encode_figure(figure: Figure) -> str:
    """Returns a figure as the data URI of an SVG image, or of a PNG if the SVG is large and the PNG smaller."""
    drawing = io.BytesIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    if drawing.tell() <= LARGEST_SVG:
        return _data_uri("svg+xml", drawing.getvalue())
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=EMBEDDED_DPI)
    smaller = min(("svg+xml", drawing), ("png", picture), key=lambda pair: pair[1].tell())
    return _data_uri(smaller[0], smaller[1].getvalue())


def encode_photo(photo: np.ndarray, longest_side: int = PHOTO_SIDE, quality: int = JPEG_QUALITY) -> str:
    """Returns a uint8 RGB image, shrunk to at most `longest_side` pixels, as the data URI of a JPEG."""
    scale = longest_side / max(photo.shape[:2])
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in photo.shape[1::-1])
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(photo, cv2.COLOR_RGB2BGR)
    return _data_uri("jpeg", cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
