"""The page on which a person looks at doubtful labels of a table and marks them, saved as corrections.csv."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from configs import Configs
from finetune.corrections import COLUMNS
from finetune.embedding import encode_photo
from finetune.files import write_text
from finetune.images import build_reader
from finetune.labels import LABEL_SEPARATOR
from finetune.summaries import render_page

PHOTO_SIDE = 160
NEIGHBOUR_SIDE = 80
# Of the JPEGs: a page of 2,000 photos has 30 MiB.
QUALITY = 75


def write_label_page(
    path: str, cards: Sequence[dict[str, Any]], summary: str, neighbours: str, csv_path: str, configs: Configs
) -> None:
    """Writes the page, atomically; it loads nothing else.

    Args:
        path: the HTML file.
        cards: what is shown of each photo: `rank`, `row`, `path`, `given_label`, `likely_label`, `confidence`, `photo`
            (a data URI), and `neighbours` (data URI, label and path of each).
        summary: what was found, in sentences.
        neighbours: what the small photos are.
        csv_path: the table.
        configs: with `classes`, and what the command line that corrects the table repeats.

    Raises:
        UserError: the page cannot be written.
    """
    page = render_page(
        "label_errors",
        ["report", "label_errors"],
        table=csv_path,
        cards=cards,
        summary=summary,
        neighbours=neighbours,
        multi_label=configs.multi_label_classification,
        # As they are in the table, for the page's own script: what people read may have escapes in it.
        data={
            "columns": list(COLUMNS),
            "classes": list(configs.classes),
            "separator": LABEL_SEPARATOR if configs.multi_label_classification else "",
            "suspects": [[card[key] for key in ("row", "path", "given_label", "likely_label")] for card in cards],
        },
        command=_apply_command(csv_path, configs),
    )
    write_text(path, page)


def embed_photos(files: dict[int, str], longest_side: int, configs: Configs) -> dict[int, str]:
    """Returns small photos as data URIs by the same keys, read by threads.

    Raises:
        UserError: a photo can no longer be read.
    """
    read = build_reader(configs)

    def embed(key: int) -> str:
        photo = read(files[key], (longest_side, longest_side))
        return encode_photo(photo, longest_side, QUALITY)

    with ThreadPoolExecutor(max(configs.generator_workers, 1)) as pool:
        return dict(zip(files, pool.map(embed, files), strict=True))


def _apply_command(csv_path: str, configs: Configs) -> str:
    """Returns the command line that applies the corrections which the page saves."""
    words = ["python", "find_label_errors.py", "--csv_path", csv_path]
    if configs.csv_label_column != Configs.defaults()["csv_label_column"]:
        words += ["--csv_label_column", configs.csv_label_column]
    if configs.multi_label_classification:
        words += ["--multi_label_classification", "True"]
    return shlex.join([*words, "--apply", "corrections.csv"])
