"""The page to review labels: suspected label errors, and copies of a photo with different labels."""

from __future__ import annotations

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from configs import Configs
from finetune.core.files import write_text
from finetune.core.labels import LABEL_SEPARATOR
from finetune.core.texts import show_count
from finetune.data.images import build_reader
from finetune.data.label_tables import COLUMNS
from finetune.data.near_copies import Copies, Place
from finetune.data.tables import ImageTable, find_class_names
from finetune.reporting.data_uris import encode_photo
from finetune.reporting.summaries import render_page

PHOTO_SIDE = 160
NEIGHBOUR_SIDE = 80
# JPEG quality at which a page of 2,000 photos has 30 MiB.
QUALITY = 75
PAGE_FILE = "data_report.html"
MOST_NEIGHBOURS, MOST_CARDS = 3, 1000


def write_label_page(
    path: str, cards: Sequence[dict[str, Any]], summary: str, neighbours: str, csv_path: str, configs: Configs
) -> None:
    """Writes the page, atomically; it is self-contained.

    Args:
        path: the HTML file.
        cards: for each photo `rank`, `row`, `path`, `given_label`, `likely_label`, `confidence`, `photo` (a data URI),
            and `neighbours` (data URI, label and path of each).
        summary: what was found, in sentences.
        neighbours: what the small photos are.
        csv_path: the table.
        configs: with `classes`, and the options of the command that corrects the table.

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
        # Unescaped, as in the table, for the page's script.
        data={
            "columns": list(COLUMNS),
            "classes": list(configs.classes),
            "separator": LABEL_SEPARATOR if configs.multi_label_classification else "",
            "suspects": [[card[key] for key in ("row", "path", "given_label", "likely_label")] for card in cards],
        },
        command=_apply_command(csv_path, configs),
    )
    write_text(path, page)


def embed_photos(files: Iterable[str], longest_side: int, configs: Configs) -> dict[str, str]:
    """Returns small photos as data URIs by their paths; threads read them."""
    files, read = list(dict.fromkeys(files)), build_reader(configs)

    def embed(file: str) -> str:
        return encode_photo(read(file, (longest_side, longest_side)), longest_side, QUALITY)

    with ThreadPoolExecutor(max(configs.generator_workers, 1)) as pool:
        return dict(zip(files, pool.map(embed, files), strict=True))


def _apply_command(csv_path: str, configs: Configs) -> str:
    """Returns the command that applies the corrections saved from the page."""
    words = ["python", "find_label_errors.py", "--csv_path", csv_path]
    if configs.csv_label_column != Configs.defaults()["csv_label_column"]:
        words += ["--csv_label_column", configs.csv_label_column]
    if configs.multi_label_classification:
        words += ["--multi_label_classification", "True"]
    return shlex.join([*words, "--apply", "corrections.csv"])


def write_contradictions(folder: str, copies: Copies, multi_label: bool, configs: Configs) -> None:
    """Writes the page and prints its path if copies of a photo have different labels; else removes an old page.

    The page shows photos of the first table that has any, so that its corrections can be applied to that table.
    """
    path = os.path.join(folder, PAGE_FILE)
    numbers, members = copies.group(), defaultdict(list)
    for position, places in enumerate(copies.places):
        members[numbers[position]] += places
    groups = [group for group in members.values() if len({place.names(multi_label) for place in group}) > 1]
    if not groups:
        if os.path.isfile(path):
            os.remove(path)
        return
    table = groups[0][0].table
    labels = [place.label for group in groups for place in group]
    configs = configs.replace(
        classes=configs.classes or find_class_names(labels, multi_label), multi_label_classification=multi_label
    )
    summary = (
        f"{show_count(len(groups), 'photo')} with copies under different labels. Each has at least one wrong label, "
        "unless the copies only look the same."
    )
    os.makedirs(folder or ".", exist_ok=True)
    cards = _make_cards(_find_doubtful(groups, table), configs)
    write_label_page(path, cards, summary, "copies of it, with their own labels", table.csv_path, configs)
    print(f"{show_count(len(groups), 'photo')} with copies under different labels: {path} shows them side by side.")


def _find_doubtful(
    groups: Sequence[Sequence[Place]], table: ImageTable
) -> list[tuple[Place, Sequence[Place], str, float]]:
    """Returns the rows of a table for which another label is at least as frequent among the copies.

    Returns the row, its group, the most frequent other label and that label's share of the group; the largest share
    first.
    """
    found = []
    for group in groups:
        counts = Counter(place.label for place in group)
        for place in group:
            likely, count = next(
                ((label, count) for label, count in counts.most_common() if label != place.label), ("", 0)
            )
            if place.table is table and count >= counts[place.label]:
                found.append((place, group, likely, count / len(group)))
    return sorted(found, key=lambda one: -one[3])[:MOST_CARDS]


def _make_cards(
    doubtful: Sequence[tuple[Place, Sequence[Place], str, float]], configs: Configs
) -> list[dict[str, Any]]:
    """Returns the cards of the rows, as `write_label_page` takes them."""
    neighbours = []
    for place, group, *_ in doubtful:
        # Copies with another label come first.
        others = sorted(group, key=lambda other: other.label == place.label)
        neighbours.append([other for other in others if other is not place][:MOST_NEIGHBOURS])
    photos = embed_photos((place.file for place, *_ in doubtful), PHOTO_SIDE, configs)
    small = embed_photos((other.file for others in neighbours for other in others), NEIGHBOUR_SIDE, configs)
    return [
        {
            "rank": rank,
            "row": place.row,
            "path": place.path,
            "given_label": place.label,
            "likely_label": likely,
            "confidence": share,
            "photo": photos[place.file],
            "neighbours": [(small[other.file], other.label, other.path) for other in others],
        }
        for rank, ((place, _, likely, share), others) in enumerate(zip(doubtful, neighbours, strict=True), start=1)
    ]
