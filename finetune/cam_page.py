"""cam_output/index.html, the page that finds one's way among the pictures of heatmaps beside it."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.decision import Decision
from finetune.files import write_text
from finetune.summaries import render_page

INDEX_FILE = "index.html"


def write_page(
    folder: str,
    pictures: Sequence[str],
    images: Sequence[str],
    y_true: np.ndarray,
    probabilities: np.ndarray,
    decision: Decision,
    title: str,
    summary: str,
) -> str:
    """Writes the page of a folder's pictures, atomically; it loads nothing but them.

    Args:
        folder: where the pictures are.
        pictures: their paths.
        images: paths of the images that they are of.
        y_true: the images' labels, `(images,)` or multi-label `(images, classes)`.
        probabilities: calibrated, `(images, classes)`.
        decision: chooses the predicted labels.
        title: what heads the page.
        summary: whether to believe the pictures, in sentences.

    Returns:
        The page's path.

    Raises:
        UserError: the page cannot be written.
    """
    cards = _make_cards(pictures, images, y_true, probabilities, decision)
    path = os.path.join(folder, INDEX_FILE)
    page = render_page(
        "activations",
        ["report", "activations"],
        title=title,
        summary=summary,
        cards=cards,
        names=decision.class_names,
        multi_label=decision.multi_label,
        # The classes that any picture has; -1 stands for no label.
        choices={
            key: sorted({position for card in cards for position in card[key] or [-1]}) for key in ("true", "predicted")
        },
    )
    write_text(path, page)
    return path


def _make_cards(
    pictures: Sequence[str], images: Sequence[str], y_true: np.ndarray, probabilities: np.ndarray, decision: Decision
) -> list[dict[str, Any]]:
    """Returns what the page shows of each picture; `true` and `predicted` are positions of classes."""
    chosen = decision.choose(probabilities)
    truth = y_true.astype(bool) if y_true.ndim == 2 else np.arange(chosen.shape[1]) == y_true[:, None]
    return [
        {
            "picture": urllib.parse.quote(os.path.basename(picture)),
            "path": image,
            "true": true.nonzero()[0].tolist(),
            "predicted": predicted.nonzero()[0].tolist(),
            "is_right": bool((true == predicted).all()),
            "confidence": confidence,
        }
        for picture, image, true, predicted, confidence in zip(
            pictures, images, truth, chosen, decision.measure_confidence(probabilities).tolist(), strict=True
        )
    ]
