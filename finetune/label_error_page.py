"""label_errors.html, the page that shows photos whose labels are probably wrong, and notes what they really are."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd

from configs import Configs
from finetune.corrections import COLUMNS
from finetune.embedding import encode_photo
from finetune.files import write_text
from finetune.images import build_reader
from finetune.label_errors import Evidence, find_neighbours
from finetune.summaries import render_page
from finetune.tables import IMAGE_COLUMN, LABEL_SEPARATOR

PHOTO_SIDE = 160
NEIGHBOUR_SIDE = 80
# Of the JPEGs: a page of 2,000 suspects has 30 MiB.
QUALITY = 75


def write_page(
    path: str,
    suspects: pd.DataFrame,
    positions: np.ndarray,
    evidence: Evidence,
    summary: str,
    csv_path: str,
    configs: Configs,
) -> None:
    """Writes the page of suspects, atomically; it loads nothing else.

    Args:
        path: the HTML file.
        suspects: as `list_suspects` gives them.
        positions: of them among the images.
        evidence: the images.
        summary: how many labels are expected to be wrong, in sentences.
        csv_path: the table.
        configs: with `classes`, what photos may have, and what the command line that corrects the table repeats.

    Raises:
        UserError: a photo can no longer be read, or the page not be written.
    """
    page = render_page(
        "label_errors",
        ["report", "label_errors"],
        table=csv_path,
        cards=_make_cards(suspects, positions, evidence, configs),
        summary=summary,
        multi_label=configs.multi_label_classification,
        # As they are in the table, for the page's own script: what people read may have escapes in it.
        data={
            "columns": list(COLUMNS),
            "classes": list(configs.classes),
            "separator": LABEL_SEPARATOR if configs.multi_label_classification else "",
            "suspects": suspects[["row", IMAGE_COLUMN, "given_label", "likely_label"]].to_numpy().tolist(),
        },
        command=_apply_command(csv_path, configs),
    )
    write_text(path, page)


def _make_cards(
    suspects: pd.DataFrame, positions: np.ndarray, evidence: Evidence, configs: Configs
) -> list[dict[str, Any]]:
    """Returns what the page shows of each suspect: its columns, `photo`, and of `neighbours` photo, label and path."""
    neighbours = find_neighbours(evidence.features, positions)
    photos = _embed_photos(positions, evidence.files, PHOTO_SIDE, configs)
    small = _embed_photos(np.unique(neighbours), evidence.files, NEIGHBOUR_SIDE, configs)
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


def _embed_photos(positions: np.ndarray, files: Sequence[str], longest_side: int, configs: Configs) -> dict[int, str]:
    """Returns small photos as data URIs by their positions, read by threads."""

    read = build_reader(configs)

    def embed(position: int) -> str:
        photo = read(files[position], (longest_side, longest_side))
        return encode_photo(photo, longest_side, QUALITY)

    with ThreadPoolExecutor(max(configs.generator_workers, 1)) as pool:
        return dict(zip(positions.tolist(), pool.map(embed, positions.tolist()), strict=True))


def _apply_command(csv_path: str, configs: Configs) -> str:
    """Returns the command line that applies the corrections which the page saves."""
    words = ["python", "find_label_errors.py", "--csv_path", csv_path]
    if configs.csv_label_column != Configs.defaults()["csv_label_column"]:
        words += ["--csv_label_column", configs.csv_label_column]
    if configs.multi_label_classification:
        words += ["--multi_label_classification", "True"]
    return shlex.join([*words, "--apply", "corrections.csv"])
