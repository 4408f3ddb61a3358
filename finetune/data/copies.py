"""Images that are in the tables more than once, exactly or nearly."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from finetune.core.texts import show_text
from finetune.data.findings import Finding, Inspection
from finetune.data.near_copies import NearPair, find_near_pairs, group_near_pairs, stack_thumbnails
from finetune.data.stores import hash_file
from finetune.data.tables import ImageTable, split_label


class Place(NamedTuple):
    """A row of a table, by its line number."""

    table: ImageTable
    row: int

    @property
    def path(self) -> str:
        return self.table.paths[self.row - 2]

    @property
    def file(self) -> str:
        return self.table.files[self.row - 2]

    @property
    def label(self) -> str:
        return self.table.labels[self.row - 2]

    def names(self, multi_label: bool) -> frozenset[str]:
        """Returns the class names in its label."""
        return frozenset(split_label(self.label, multi_label))


class Copies(NamedTuple):
    """The images of tables, each with all its rows, and the pairs of near copies among them, by position in `places`.

    There are no pairs if the images were not decoded. `left_out` candidate pairs were not compared for lack of time.
    """

    places: list[list[Place]]
    pairs: list[NearPair]
    left_out: int = 0

    def group(self) -> DisjointSet:
        """Returns groups of images that are near copies, by position in `places`."""
        return group_near_pairs(len(self.places), self.pairs)

    def number_rows(self, table: ImageTable) -> np.ndarray:
        """Returns a group number for each row of a table, int `(rows,)`: equal for exact and near copies."""
        groups = self.group()
        numbers = np.arange(len(table.files)) + len(self.places)
        for position, places in enumerate(self.places):
            for place in places:
                if place.table is table:
                    numbers[place.row - 2] = groups[position]
        return numbers

    def find_shared(self, table: ImageTable, others: ImageTable) -> np.ndarray:
        """Returns bool `(rows,)`: whether each image of `table` has an exact or near copy in `others`."""
        numbers = self.number_rows(table)
        return np.isin(numbers, self.number_rows(others)) & (numbers < len(self.places))


def find_copies(
    tables: Sequence[ImageTable], known: dict[str, Inspection], workers: int = 2, seconds: float | None = None
) -> Copies:
    """Finds images that are in the tables more than once, by path, content or looks.

    Near copies are found among the `known` files with a thumbnail, for so many `seconds` (None: no limit).
    """
    content_of, places = group_by_content(known), defaultdict(list)
    for table in tables:
        for row, file in enumerate(table.files, start=2):
            if content := content_of.get(file):
                places[content].append(Place(table, row))
    seen = [position for position, content in enumerate(places) if known[content].thumbnail is not None]
    if not seen:
        return Copies([*places.values()], [])
    contents = [*places]
    thumbnails = stack_thumbnails([known[contents[position]].thumbnail for position in seen])
    found = find_near_pairs(thumbnails, workers, seconds)
    pairs = [NearPair(seen[first], seen[second], correlation) for first, second, correlation in found.pairs]
    return Copies([*places.values()], pairs, found.left_out)


def list_findings(
    copies: Copies, multi_label: bool, allow_duplicates: bool = False, allow_near: bool = False
) -> list[Finding]:
    """Returns the findings on copies; an image, or a near copy, in two sets is a warning if that is allowed."""
    groups, members = copies.group(), defaultdict(list)
    for position, places in enumerate(copies.places):
        members[groups[position]].append(places[0])
    found = []
    for group in copies.places:
        found += _compare_group(group, multi_label, allow_duplicates, False)
    for group in members.values():
        found += _compare_group(group, multi_label, allow_duplicates or allow_near, True)
    return found


def _compare_group(group: Sequence[Place], multi_label: bool, allow_duplicates: bool, is_near: bool) -> list[Finding]:
    """Compares each row of a group of copies with an earlier one, if possible of another set."""
    found, first = [], group[0]
    for position, place in enumerate(group[1:], start=1):
        other = next((one for one in group[:position] if one.table is not place.table), first)
        found += compare_places(other, place, multi_label, allow_duplicates, is_near)
        if other is not first and first.table is place.table:
            found += compare_places(first, place, multi_label, allow_duplicates, is_near)
    return found


def compare_places(
    first: Place, second: Place, multi_label: bool, allow_duplicates: bool, is_near: bool
) -> list[Finding]:
    """Returns the findings on two rows that have the same image, or nearly the same one."""
    across, near = first.table is not second.table, "near_" * is_near
    kinds = []
    if across:
        kinds.append(f"{near}allowed_duplicate" if allow_duplicates else f"{near}duplicate_across_sets")
    if first.names(multi_label) != second.names(multi_label):
        kinds.append(f"{near}duplicate_with_other_label")
    if not kinds:
        kinds.append("duplicate_path" if first.file == second.file else f"{near}duplicate")
    where = f"{first.table.csv_path}, row {first.row}" if across else f"row {first.row}"
    text = f"{'nearly ' * is_near}the same as {show_text(first.path)} ({where})"
    if kinds[-1].endswith("other_label"):
        text += f", {second.label!r} here and {first.label!r} there"
    place = second.table.set_name, second.table.csv_path, second.row, second.path
    return [Finding(kind, *place, text, first.row, first.table.csv_path) for kind in kinds]


def group_by_content(known: dict[str, Inspection]) -> dict[str, str]:
    """Returns the first file with the same bytes for each sound file; reads those of equal length and end."""
    whole = {file: inspection.signature for file, inspection in known.items() if not inspection.fault}
    counts, first, content_of = Counter(whole.values()), {}, {}
    for file, signature in whole.items():
        content_of[file] = file if counts[signature] == 1 else first.setdefault(hash_file(file), file)
    return content_of
