"""Near copies: pairs of photos that show the same shot, and groups of them.

A near copy is the same shot saved again, resized, cropped, turned by a few degrees, mirrored, or taken again at
another exposure, as in a burst or a video. Two photos of the same kind of thing are not near copies.

There are three steps, each on fewer pairs. A matrix product compares coarse descriptors of all pairs, of whole photos
and of parts that a cropped copy may show. Finer descriptors drop most candidates. Last, an affine warp aligns the two
thumbnails (Evangelidis and Psarakis, PAMI 2008), and their pixels are correlated.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from finetune.core.texts import show_progress, show_text
from finetune.data.findings import Finding, Inspection
from finetune.data.stores import hash_file
from finetune.data.tables import ImageTable, split_label

THUMBNAIL_SIDE = 64
# A thumbnail whose grey values have a smaller standard deviation shows nothing to compare.
LEAST_CONTRAST = 2
# Parts of a thumbnail that a cropped copy may show, as top, left and side: whole, middle, four corners.
VIEWS = ((0, 0, 64), (3, 3, 58), (0, 0, 58), (0, 6, 58), (6, 0, 58), (6, 6, 58))


class _Scale(NamedTuple):
    """A descriptor: its side, the blur whose result is subtracted, and the similarity that a candidate needs."""

    side: int
    blur: float
    least: float


COARSE, FINE = _Scale(8, 1.5, 0.75), _Scale(16, 2.0, 0.65)
# Limits for sets whose photos all look alike: candidates per image and view, their mean number after the coarse step,
# candidates per image in the end, and pairs to align (2 to 5 ms each).
ROW_CANDIDATES, MEAN_CANDIDATES, MOST_CANDIDATES, MOST_ALIGNMENTS = 32, 200, 8, 150_000
BLOCK = 256
# The scale at which pixels are correlated. Photos of different things stay below 0.7 (flowers, street scenes, faces),
# hands with the same sign below 0.924; 98 % of altered copies exceed 0.9.
COMPARED = _Scale(48, 3.0, 0.9)
# Below this, a pair counts only if one is a plain crop of the other, up to this skew: most hands with the same sign
# need a rotation or a shear to correlate that well.
SURE_CORRELATION, MOST_SKEW = 0.925, 0.03
# A pair above this joins two groups; below it, half of the pairs between them have to be near copies.
STRONG_CORRELATION = 0.94
# Grey values outside are clipped in one of the exposures; they are ignored if enough others remain.
DARKEST, LIGHTEST, LEAST_UNCLIPPED = 4, 248, 0.3
LEAST_OVERLAP = 0.5
# The largest difference between the alignment and its start in each entry of the matrix (1 is the whole side): a tenth
# more cropped, or 5 degrees. More would align any two brick walls.
MOST_CHANGE = 0.12
ALIGNMENT, ALIGNMENT_BLUR = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 30, 1e-3), 5


class NearPair(NamedTuple):
    """Two near copies: their positions, the earlier one first, and the correlation of their pixels."""

    first: int
    second: int
    correlation: float


class NearSearch(NamedTuple):
    """Pairs of near copies, sorted by position, and the number of candidate pairs that were not compared."""

    pairs: list[NearPair]
    left_out: int = 0


class _Candidates(NamedTuple):
    """Pairs of possible near copies: the view `view` of `viewed` looks like `other`, or like its mirror image."""

    viewed: np.ndarray
    other: np.ndarray
    view: np.ndarray
    mirrored: np.ndarray
    similarity: np.ndarray

    def take(self, rows: np.ndarray) -> _Candidates:
        return _Candidates(*(column[rows] for column in self))


def make_thumbnail(image: np.ndarray) -> bytes | None:
    """Returns the grey thumbnail of an image, uint8 RGB `(height, width, 3)`; None if it has one tone."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    thumbnail = cv2.resize(grey, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
    return thumbnail.tobytes() if thumbnail.std() >= LEAST_CONTRAST else None


def stack_thumbnails(thumbnails: Sequence[bytes]) -> np.ndarray:
    """Returns thumbnails from `make_thumbnail` as uint8 `(images, THUMBNAIL_SIDE, THUMBNAIL_SIDE)`."""
    return np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)


def find_near_pairs(thumbnails: np.ndarray, workers: int = 2, seconds: float | None = None) -> NearSearch:
    """Finds all pairs of near copies that are needed to group the images, the most similar descriptors first.

    Args:
        thumbnails: uint8 `(images, THUMBNAIL_SIDE, THUMBNAIL_SIDE)`, from `stack_thumbnails`.
        workers: threads.
        seconds: time limit; None compares all candidates.
    """
    started = time.monotonic()
    if len(thumbnails) < 2:
        return NearSearch([])
    candidates, left_out = _keep_best(_find_candidates(thumbnails))
    number = len(candidates.viewed)

    def compare(row: int) -> float:
        viewed, other, view, mirrored, _ = (column[row] for column in candidates)
        second = thumbnails[other]
        return correlate(thumbnails[viewed], second[:, ::-1].copy() if mirrored else second, VIEWS[view])

    found, joined, done = [], DisjointSet(range(len(thumbnails))), 0
    pairs = [*zip(candidates.viewed.tolist(), candidates.other.tolist(), strict=True)]
    with (
        show_progress(number, "Comparing images", delay=1) as progress,
        ThreadPoolExecutor(max(workers, 1)) as pool,
    ):
        while done < number and (seconds is None or time.monotonic() - started < seconds):
            rows = range(done, min(done + BLOCK, number))
            # Images that strong pairs have joined need no further comparison.
            rows_left = [row for row in rows if not joined.connected(*pairs[row])]
            for row, correlation in zip(rows_left, pool.map(compare, rows_left), strict=True):
                if correlation >= COMPARED.least:
                    found.append(NearPair(min(pairs[row]), max(pairs[row]), correlation))
                if correlation >= STRONG_CORRELATION:
                    joined.merge(*pairs[row])
            done += len(rows)
            progress.update(len(rows))
    return NearSearch(sorted(found), left_out + number - done)


def group_near_pairs(number: int, pairs: Sequence[NearPair]) -> DisjointSet:
    """Returns groups of `number` images from the pairs of `find_near_pairs`.

    Strong pairs join their groups. A weaker pair joins two groups only if at least half of the pairs between them are
    near copies, so that chains of chance resemblances don't grow into large groups.
    """
    groups = DisjointSet(range(number))
    members: dict[int, list[int]] = {}
    linked = defaultdict(set)
    for pair in pairs:
        linked[pair.first].add(pair.second)
        linked[pair.second].add(pair.first)
    for pair in sorted(pairs, key=lambda pair: (-pair.correlation, pair.first, pair.second)):
        first, second = groups[pair.first], groups[pair.second]
        if first == second:
            continue
        ours, theirs = members.get(first, [first]), members.get(second, [second])
        shared = sum(len(linked[one].intersection(theirs)) for one in ours)
        if pair.correlation >= STRONG_CORRELATION or 2 * shared >= len(ours) * len(theirs):
            groups.merge(first, second)
            members[groups[first]] = ours + theirs
    return groups


def correlate(viewed: np.ndarray, other: np.ndarray, view: tuple[int, int, int]) -> float:
    """Returns the correlation of two thumbnails less their local means, -1 to 1: the best of unaligned and aligned.

    `other` looks like the view `view`, one of `VIEWS`, of `viewed`.
    """
    top, left, side = view
    scale = side / THUMBNAIL_SIDE
    start = np.float32([[scale, 0, left + (scale - 1) / 2], [0, scale, top + (scale - 1) / 2]])
    unaligned = _correlate_warped(viewed, other, start)
    if unaligned >= STRONG_CORRELATION:
        return unaligned
    images = other.astype(np.float32), viewed.astype(np.float32)
    try:
        _, warp = cv2.findTransformECC(*images, start.copy(), cv2.MOTION_AFFINE, ALIGNMENT, None, ALIGNMENT_BLUR)
    except cv2.error:  # The thumbnails are too different for the alignment to converge.
        return unaligned
    change = np.abs(warp - start) / (1, 1, THUMBNAIL_SIDE)
    aligned = _correlate_warped(viewed, other, warp) if change.max() <= MOST_CHANGE else unaligned
    return max(unaligned, aligned) if aligned >= SURE_CORRELATION or _is_plain_crop(warp) else unaligned


def _is_plain_crop(warp: np.ndarray) -> bool:
    scale = (warp[0, 0] + warp[1, 1]) / 2
    return bool(np.abs(warp[:, :2] - scale * np.eye(2)).max() <= MOST_SKEW)


def _correlate_warped(viewed: np.ndarray, other: np.ndarray, warp: np.ndarray) -> float:
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(viewed, warp, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.full(size, 255, np.uint8), warp, size, flags=flags)
    first, second, inside = (_shrink(image, COMPARED.side) for image in (warped, other, inside))
    used = inside > 127
    if used.mean() < LEAST_OVERLAP:
        return 0.0
    clipped = (np.minimum(first, second) < DARKEST) | (np.maximum(first, second) > LIGHTEST)
    unclipped = used & (cv2.dilate(clipped.astype(np.uint8), np.ones((3, 3), np.uint8)) == 0)
    if unclipped.mean() > LEAST_UNCLIPPED:
        used = unclipped
    values = [remove_local_mean(image, COMPARED.blur)[used] for image in (first, second)]
    values = [value - value.mean() for value in values]
    norm = np.sqrt(np.prod([value @ value for value in values]))
    return float(values[0] @ values[1] / norm) if norm else 0.0


def remove_local_mean(image: np.ndarray, blur: float) -> np.ndarray:
    """Returns an image as float32, less its Gaussian blur of that standard deviation, in pixels."""
    image = image.astype(np.float32)
    return image - cv2.GaussianBlur(image, (0, 0), blur)


def _shrink(image: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def _describe(thumbnails: np.ndarray, view: tuple[int, int, int], scale: _Scale, mirrored: bool = False) -> np.ndarray:
    """Returns a descriptor of a view of each thumbnail, float32 `(images, side * side)` of unit length."""
    top, left, side = view
    rows = np.empty((len(thumbnails), scale.side**2), np.float32)
    for row, thumbnail in zip(rows, thumbnails, strict=True):
        part = thumbnail[top : top + side, left : left + side]
        small = _shrink(np.ascontiguousarray(part), scale.side)
        row[:] = remove_local_mean(small[:, ::-1] if mirrored else small, scale.blur).ravel()
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _find_candidates(thumbnails: np.ndarray) -> _Candidates:
    """Returns the pairs with similar descriptors at both scales, for each view and for mirror images."""
    coarse, fine = (_describe(thumbnails, VIEWS[0], scale) for scale in (COARSE, FINE))
    parts = []
    for view, mirrored in [*((view, False) for view in range(len(VIEWS))), (0, True)]:
        descriptors = [_describe(thumbnails, VIEWS[view], scale, mirrored) for scale in (COARSE, FINE)]
        for viewed, other in _find_similar(descriptors[0], coarse, is_symmetric=view == 0):
            similarity = np.einsum("ij,ij->i", descriptors[1][viewed], fine[other])
            kept = similarity >= FINE.least
            count = kept.sum()
            columns = viewed[kept], other[kept], np.full(count, view), np.full(count, mirrored), similarity[kept]
            parts.append(_Candidates(*columns))
    return _Candidates(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _find_similar(views: np.ndarray, whole: np.ndarray, is_symmetric: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields positions of similar pairs, int `(pairs,)` each, of descriptors of unit length, a block at a time.

    With `is_symmetric` each pair comes in one order.
    """
    number = len(views)
    sample = np.random.default_rng(0).choice(number, min(number, BLOCK), replace=False)
    share = min(1, MEAN_CANDIDATES / number)
    least = max(COARSE.least, float(np.quantile(views[sample] @ whole.T, 1 - share)))
    for start in range(0, number, BLOCK):
        similarity = views[start : start + BLOCK] @ whole.T
        rows, columns = np.nonzero(similarity >= least)
        kept = columns > rows + start if is_symmetric else columns != rows + start
        rows, columns = rows[kept], columns[kept]
        order = np.lexsort((columns, -similarity[rows, columns], rows))
        rows, columns = rows[order], columns[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        yield rows[rank < ROW_CANDIDATES] + start, columns[rank < ROW_CANDIDATES]


def _keep_best(candidates: _Candidates) -> tuple[_Candidates, int]:
    """Returns each pair once, in its most similar view, the best first, and how many exceed `MOST_ALIGNMENTS`."""
    first = np.minimum(candidates.viewed, candidates.other)
    second = np.maximum(candidates.viewed, candidates.other)
    order = np.lexsort((candidates.view, -candidates.similarity, second, first))
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
    best = candidates.take(order[is_new])
    best = best.take(np.lexsort((best.other, best.viewed, -best.similarity)))
    counts, kept = defaultdict(int), []
    for row, pair in enumerate(zip(best.viewed.tolist(), best.other.tolist(), strict=True)):
        if min(counts[image] for image in pair) < MOST_CANDIDATES:
            kept.append(row)
            for image in pair:
                counts[image] += 1
    return best.take(np.array(kept[:MOST_ALIGNMENTS], int)), max(len(kept) - MOST_ALIGNMENTS, 0)


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
