"""label_errors.html, the page on which a user reviews suspected label errors."""

from __future__ import annotations

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
    """Writes the page, atomically; it is self-contained.

    Args:
        path: the HTML file.
        found: what `list_suspects` returned.
        evidence: the images.
        summary: how many labels are expected to be wrong, in sentences.
        csv_path: the table.
        configs: with `classes`; how photos are read, and the options of the command that corrects the table.

    Raises:
        UserError: a photo can no longer be read, or the page cannot be written.
    """
    suspects, positions = found
    neighbours = find_neighbours(evidence.features, positions)
    files, texts, names = evidence.files, evidence.texts, evidence.names
    photos = embed_photos((files[position] for position in positions), PHOTO_SIDE, configs)
    small = embed_photos((files[other] for other in neighbours.flat), NEIGHBOUR_SIDE, configs)
    cards = suspects.to_dict("records")
    for card, position, others in zip(cards, positions, neighbours, strict=True):
        card["photo"] = photos[files[position]]
        card["neighbours"] = [(small[files[other]], texts[other], names[other]) for other in others]
    write_label_page(path, cards, summary, "the most similar ones, with their own labels", csv_path, configs)
