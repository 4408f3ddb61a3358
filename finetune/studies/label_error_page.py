"""label_errors.html, the page that shows photos whose labels are probably wrong, and notes what they really are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from configs import Configs
from finetune.reporting.label_page import NEIGHBOUR_SIDE, PHOTO_SIDE, embed_photos, write_label_page
from finetune.studies.label_errors import Evidence, find_neighbours


def write_page(
    path: str,
    found: tuple[pd.DataFrame, np.ndarray],
    evidence: Evidence,
    summary: str,
    csv_path: str,
    configs: Configs,
) -> None:
    """Writes the page of suspects, atomically; it loads nothing else.

    Args:
        path: the HTML file.
        found: the suspects and their positions among the images, as `list_suspects` gives them.
        evidence: the images.
        summary: how many labels are expected to be wrong, in sentences.
        csv_path: the table.
        configs: with `classes`, what photos may have, and what the command line that corrects the table repeats.

    Raises:
        UserError: a photo can no longer be read, or the page not be written.
    """
    cards = _make_cards(*found, evidence, configs)
    write_label_page(path, cards, summary, "those most like it, with their own labels", csv_path, configs)


def _make_cards(
    suspects: pd.DataFrame, positions: np.ndarray, evidence: Evidence, configs: Configs
) -> list[dict[str, Any]]:
    """Returns what the page shows of each suspect: its columns, `photo`, and of `neighbours` photo, label and path."""
    neighbours = find_neighbours(evidence.features, positions)
    photos = _embed(positions, evidence, PHOTO_SIDE, configs)
    small = _embed(np.unique(neighbours), evidence, NEIGHBOUR_SIDE, configs)
    return [
        suspect
        | {
            "photo": photos[position],
            "neighbours": [(small[other], evidence.texts[other], evidence.names[other]) for other in others],
        }
        for suspect, position, others in zip(
            suspects.to_dict("records"), positions.tolist(), neighbours.tolist(), strict=True
        )
    ]


def _embed(positions: np.ndarray, evidence: Evidence, longest_side: int, configs: Configs) -> dict[int, str]:
    return embed_photos({one: evidence.files[one] for one in positions.tolist()}, longest_side, configs)
