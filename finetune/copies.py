"""Images that are in the tables more than once, exactly or nearly."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from finetune.findings import Finding
from finetune.groups import Groups
from finetune.inspection import Inspection
from finetune.stores import hash_file
from finetune.tables import ImageTable, split_label
from finetune.texts import show_text

# Bits that may differ between copies of one photo, of 64 of the difference hash and of 256 of the DCT's. On photos of
# flowers and of street scenes they found 97 % of copies cropped by 4 % a side, and no pair that is none.
NEAR_DISTANCES = 14, 84


class _Place(NamedTuple):
    table: ImageTable
    row: int

    @property
    def path(self) -> str:
        return self.table.paths[self.row - 2]

    def label(self, multi_label: bool) -> frozenset[str]:
        return frozenset(split_label(self.table.labels[self.row - 2], multi_label))


def find_copies(
    tables: Sequence[ImageTable], known: dict[str, Inspection], multi_label: bool, allow_duplicates: bool
) -> list[Finding]:
    """Finds images that are in the tables more than once, by path, content or looks.

    Args:
        tables: of the sets.
        known: the inspected files.
        multi_label: whether a label may hold several class names.
        allow_duplicates: an image in two sets is a warning.
    """
    content_of = group_by_content(known)
    first_place, repeated = {}, defaultdict(list)
    for table in tables:
        for row, file in enumerate(table.files, start=2):
            content = content_of.get(file)
            if content in first_place:
                repeated[content].append(_Place(table, row))
            elif content is not None:
                first_place[content] = table, row
    found = []
    for content, others in repeated.items():
        group = [_Place(*first_place[content]), *others]
        for position, place in enumerate(others, start=1):
            other = next((one for one in group[:position] if one.table is not place.table), group[0])
            found += compare_places(other, place, multi_label, allow_duplicates, None)
            if other is not group[0] and group[0].table is place.table:
                found += compare_places(group[0], place, multi_label, allow_duplicates, None)
    hashes = {content: known[content].near_hash for content in first_place if known[content].near_hash is not None}
    places = [_Place(*first_place[content]) for content in hashes]
    values = np.frombuffer(b"".join(hashes.values()), np.uint64).reshape(-1, 5)
    for first, second, distance in join_near(values, [place.table.set_name for place in places]):
        found += compare_places(places[first], places[second], multi_label, allow_duplicates, distance)
    return found


def compare_places(
    first: _Place, second: _Place, multi_label: bool, allow_duplicates: bool, distance: int | None
) -> list[Finding]:
    """Says what it means that two rows have the same image, or by `distance` bits of 256 nearly the same one."""
    across, near = first.table is not second.table, "near_" * (distance is not None)
    same_file = first.table.files[first.row - 2] == second.table.files[second.row - 2]
    kinds = []
    if across:
        kinds.append(f"{near}allowed_duplicate" if allow_duplicates else f"{near}duplicate_across_sets")
    if first.label(multi_label) != second.label(multi_label):
        kinds.append(f"{near}duplicate_with_other_label")
    if not kinds:
        kinds.append("duplicate_path" if same_file else f"{near}duplicate")
    where = f"{first.table.csv_path}, row {first.row}" if across else f"row {first.row}"
    text = f"{'nearly ' * bool(near)}the same as {show_text(first.path)} ({where})"
    if kinds[-1].endswith("other_label"):
        labels = [place.table.labels[place.row - 2] for place in (second, first)]
        text += f", {labels[0]!r} here and {labels[1]!r} there"
    place = second.table.set_name, second.table.csv_path, second.row, second.path
    return [Finding(kind, *place, text, first.row, first.table.csv_path) for kind in kinds]


def group_by_content(known: dict[str, Inspection]) -> dict[str, str]:
    """Returns for each sound file the first one with the same bytes; those that agree in length and end are read."""
    whole = {file: inspection.signature for file, inspection in known.items() if not inspection.fault}
    counts, first, content_of = Counter(whole.values()), {}, {}
    for file, signature in whole.items():
        content_of[file] = file if counts[signature] == 1 else first.setdefault(hash_file(file), file)
    return content_of


def join_near(hashes: np.ndarray, set_names: Sequence[str]) -> list[tuple[int, int, int]]:
    """Finds pairs of near hashes: those that join all which belong together, and each pair of two sets.

    The first 64 bits of every one are compared with those of every other, in blocks: 100,000 take seconds, and
    little memory.

    Args:
        hashes: uint64 `(images, 5)`, of `hash_picture`.
        set_names: of each.

    Returns:
        Positions of the earlier and the later image, and the bits of 256 that differ; at most two pairs an image.
    """
    joined, flagged, pairs = Groups(len(hashes)), set(), []
    first_words, block = np.ascontiguousarray(hashes[:, 0]), 256
    for start in range(0, len(hashes), block):
        near = np.bitwise_count(first_words[start : start + block, None] ^ first_words[start:]) <= NEAR_DISTANCES[0]
        firsts, seconds = np.nonzero(near) + np.array([[start]] * 2)
        firsts, seconds = firsts[seconds > firsts], seconds[seconds > firsts]
        distances = np.bitwise_count(hashes[firsts, 1:] ^ hashes[seconds, 1:]).sum(axis=1, dtype=int)
        for position in np.argsort(distances, kind="stable")[: (distances <= NEAR_DISTANCES[1]).sum()]:
            first, second = int(firsts[position]), int(seconds[position])
            across = set_names[first] != set_names[second]
            if joined.join(first, second) or (across and second not in flagged):
                pairs.append((first, second, int(distances[position])))
                flagged.update([second] * across)
    return pairs
