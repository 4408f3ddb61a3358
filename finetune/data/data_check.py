"""The data check: finds everything in tables and their images that makes training fail or go wrong."""

from __future__ import annotations

import os
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from configs import MAX_IMAGE_PIXELS, Configs
from finetune.core.options import UserError
from finetune.core.texts import LONGEST_LIST, join_names, show_count, show_duration
from finetune.data.findings import KINDS, Finding, Inspection, describe_fault, get_bad_rows, report_findings
from finetune.data.inspection import estimate_seconds, inspect_images, resolve_pixel_range_of_files
from finetune.data.near_copies import Copies, find_copies, list_findings
from finetune.data.tables import ImageTable, find_class_names, make_image_table, parse_table, split_label

SIZE_FACTOR, SHAPE_FACTOR, FEWEST_SIZES = 4, 3, 10
# Seconds that the quick check may take to decode images, and at least has to compare them.
QUICK_SECONDS, LEAST_SECONDS = 60, 10
# Shows copies with different labels. Arguments: the folder to write to, the copies, multi_label, the options.
ShowCopies = Callable[[str, Copies, bool, Configs], None]


class Reading(NamedTuple):
    """How images are read: the limit of pixels, threads, and which values are black and white."""

    max_pixels: int
    workers: int
    pixel_range: Sequence[float]

    @classmethod
    def of(cls, configs: Configs) -> Reading:
        """Returns the values of the options."""
        return cls(configs.max_image_pixels, configs.generator_workers, configs.pixel_range)


class DataCheck(NamedTuple):
    """The findings on tables and their images, in the order of `KINDS`, and the copies among the images."""

    findings: list[Finding]
    copies: Copies


def list_sets(configs: Configs) -> dict[str, str]:
    """Returns the CSV files of a run's sets by name.

    The test set is one of them if it is the validation set, or if the user chose both tables or neither: an old
    data/testing_set.csv may have other images.
    """
    sets = {"training": configs.train_csv, "validation": configs.validation_csv or configs.test_csv}
    is_chosen = "test_csv" in configs.given or "train_csv" not in configs.given
    if configs.validation_csv and is_chosen and os.path.isfile(configs.test_csv):
        sets["test"] = configs.test_csv
    return sets


def check_sets(
    csv_paths: dict[str, str], configs: Configs, writes_report: bool = True, show_copies: ShowCopies | None = None
) -> dict[str, set[int]]:
    """Checks the tables of a run and their images, prints the findings and writes data_report.csv.

    Args:
        csv_paths: by the set's name: training, validation and, if it is another table, test.
        configs: the options.
        writes_report: False if another process writes the same report.
        show_copies: is called with the copies before an error is raised.

    Returns:
        The line numbers to leave out of each CSV file.

    Raises:
        UserError: a table is not usable, or there are errors.
    """
    if configs.verify_data == "off":
        return {path: set() for path in csv_paths.values()}
    label_column, mode = configs.csv_label_column, configs.verify_data
    if mode == "quick" and configs.distribution_strategy == "multi_worker":
        # The processes of several hosts must agree on the findings, which a time limit does not ensure.
        mode = "headers"
        print("Near copies are not looked for on several hosts. --verify_data full does it.") if writes_report else None
    tables = [
        make_image_table(name, path, parse_table(path, label_column), label_column, configs.image_directory)
        for name, path in csv_paths.items()
        if name != "test" or os.path.realpath(path) != os.path.realpath(csv_paths["validation"])
    ]
    check = check_data(tables, configs, configs.multi_label_classification, mode)
    findings = check.findings
    if writes_report and show_copies:
        show_copies(configs.save_model_path, check.copies, configs.multi_label_classification, configs)
    report_findings(findings, configs.save_model_path, configs.skip_bad_images, writes_report)
    bad = get_bad_rows(findings)
    return {path: bad.get(path, set()) for path in csv_paths.values()}


def check_tables(
    tables: Sequence[ImageTable],
    configs: Configs,
    multi_label: bool,
    skip_contradictions: bool = False,
    show_copies: ShowCopies | None = None,
    folder: str = "",
) -> DataCheck:
    """Checks tables and every image in them, prints the findings and writes data_report.csv.

    Args:
        tables: of the sets, the training set first, or one without a set's name.
        configs: the options.
        multi_label: whether a label may hold several class names.
        skip_contradictions: leave out images that have two labels; otherwise they are errors.
        show_copies: is called with the copies before an error is raised.
        folder: receives data_report.csv; empty: the folder of the first table.
    """
    files = [file for table in tables for file in table.files]
    configs = resolve_pixel_range_of_files(configs, {tables[0].csv_path: files})
    check = check_data(tables, configs, multi_label, "full")
    folder = folder or os.path.dirname(tables[0].csv_path)
    if show_copies:
        show_copies(folder, check.copies, multi_label, configs)
    report_findings(check.findings, folder, configs.skip_bad_images, skip_contradictions=skip_contradictions)
    return check


def check_data(tables: Sequence[ImageTable], configs: Configs, multi_label: bool, mode: str = "quick") -> DataCheck:
    """Returns everything in tables, the training set first, and their images that makes training fail or go wrong.

    The mode `headers` reads headers, and whole files only if two may be equal. `full` decodes every image and finds
    near copies. `quick` does so for about a minute, and near copies in two sets are warnings.
    """
    findings = [finding for table in tables for finding in check_labels(table, multi_label)]
    findings += find_unknown_classes(tables, multi_label)
    known, copies = look_for_copies(tables, mode, Reading.of(configs))
    unusual = find_unusual_sizes(known, configs.image_target_size[:2], configs.resize_mode)
    for table in tables:
        for row, (path, file) in enumerate(zip(table.paths, table.files, strict=True), start=2):
            if file and (known[file].fault or known[file].remarks or file in unusual):
                found = [known[file].fault] if known[file].fault else [*known[file].remarks, *unusual.get(file, [])]
                findings += [Finding(kind, table.set_name, table.csv_path, row, path, text) for kind, text in found]
    findings += list_findings(copies, multi_label, configs.allow_duplicates, allow_near=mode == "quick")
    order = {kind: position for position, kind in enumerate(KINDS)}
    return DataCheck(sorted(findings, key=lambda finding: order[finding.kind]), copies)


def look_for_copies(
    tables: Sequence[ImageTable], mode: str, reading: Reading, needs_headers: bool = True
) -> tuple[dict[str, Inspection], Copies]:
    """Inspects the images of tables by a mode of `check_data`, and finds copies among them.

    If the mode `quick` has no time to decode them, it says so, and reads headers only if `needs_headers` is set.
    """
    files = list(dict.fromkeys(file for table in tables for file in table.files if file))
    started, decode = time.monotonic(), mode == "full"
    if mode == "quick":
        estimate = estimate_seconds(files, *reading)
        decode = estimate <= QUICK_SECONDS
        if not decode:
            print(
                f"Near copies and damage were not looked for: decoding {len(files):,} images would take about "
                f"{show_duration(estimate)}. --verify_data full does it."
            )
        if not decode and not needs_headers:
            return {}, Copies([], [])
    known = dict(zip(files, inspect_images(files, decode, *reading), strict=True))
    left = max(QUICK_SECONDS - (time.monotonic() - started), LEAST_SECONDS) if mode == "quick" else None
    copies = find_copies(tables, known, reading.workers, left)
    if copies.left_out:
        more = " --verify_data full compares more." if mode == "quick" else ""
        print(
            f"Near copies: the {copies.left_out:,} least similar candidate pairs were not compared: "
            f"too many for {'a minute' if mode == 'quick' else 'one check'}.{more}"
        )
    return known, copies


def check_labels(table: ImageTable, multi_label: bool) -> list[Finding]:
    """Finds empty, doubled and suspicious labels in one table."""
    rows_of = defaultdict(list)
    for row, label in enumerate(table.labels, start=2):
        rows_of[label].append(row)
    found, names, first_row = [], Counter(), {}

    def add(kind: str, rows: Iterable[int], detail: str) -> None:
        for row in rows:
            found.append(Finding(kind, table.set_name, table.csv_path, row, table.paths[row - 2], detail))

    add("empty_path", (row for row, file in enumerate(table.files, start=2) if not file), "the path is empty")
    for label, rows in rows_of.items():
        parts = split_label(label, multi_label)
        for name in set(parts):
            names[name] += len(rows)
            first_row[name] = min(rows[0], first_row.get(name, rows[0]))
        if not label.strip():
            add("empty_label", rows, "the label is empty")
        elif not all(part.strip() for part in parts):
            add("empty_label_part", rows, f"the label {label!r}")
        if len(set(parts)) < len(parts):
            add("doubled_label", rows, f"the label {label!r}")
    named = {name: count for name, count in names.items() if name.strip()}
    for name, kind, detail in compare_names(named):
        for label, rows in rows_of.items():
            if name in split_label(label, multi_label):
                add(kind, rows, detail)
    if table.set_name in ("", "training"):
        for name in sorted(name for name, count in named.items() if count == 1):
            add("class_of_one_image", [first_row[name]], f"the class {name!r}")
    return found


def compare_names(counts: dict[str, int]) -> list[tuple[str, str, str]]:
    """Returns class names that are variants of others or have white space around them, each with a kind and a detail.

    `counts` has the number of images of each class name.
    """
    found, variants = [], defaultdict(list)
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        plain = " ".join(name.split())
        if plain != name and plain in counts:
            found.append((name, "white_space_variant", f"{name!r} and {plain!r}"))
        elif name != name.strip():
            found.append((name, "white_space", f"the label {name!r}"))
        if plain == name or plain not in counts:
            variants[unicodedata.normalize("NFKC", plain).casefold()].append(name)
    for common, *others in variants.values():
        for name in others:
            text = f"{name!r} ({counts[name]} images) and {common!r} ({counts[common]})"
            found.append((name, "case_variant", text))
    return found


def find_unknown_classes(tables: Sequence[ImageTable], multi_label: bool) -> list[Finding]:
    """Finds rows of other sets whose classes have no image in the training set."""
    training = next((table for table in tables if table.set_name == "training"), None)
    if training is None:
        return []
    known, found = set(find_class_names(training.labels, multi_label)), []
    for table in tables:
        unknown = {label: sorted(set(split_label(label, multi_label)) - known) for label in set(table.labels)}
        for row, label in enumerate(table.labels, start=2):
            if unknown[label] and label.strip():
                names = join_names([repr(name) for name in unknown[label]])
                text = f"the label {names} is not one of the {len(known)} classes of the training set"
                path = table.paths[row - 2]
                found.append(Finding("unknown_class", table.set_name, table.csv_path, row, path, text))
    return found


def find_unusual_sizes(
    known: dict[str, Inspection], image_size: Sequence[int], resize_mode: str
) -> dict[str, list[tuple[str, str]]]:
    """Returns kinds and details, by file, of images that will be enlarged or are far from the median size or shape.

    Far is a mean side 4 times as long or short, or a ratio of the sides 3 times as large or small. Padding enlarges
    only images that are smaller than `image_size`, `(height, width)`, in both directions.
    """
    files = [file for file, inspection in known.items() if min(inspection.sides)]
    if not files:
        return {}
    sides = np.array([known[file].sides for file in files], float)
    logs = np.stack([np.log(sides).mean(axis=1), np.log(sides[:, 0] / sides[:, 1])], axis=1)
    distance = np.abs(logs - np.median(logs, axis=0))
    far = (distance > np.log([SIZE_FACTOR, SHAPE_FACTOR])).any(axis=1) & (len(files) >= FEWEST_SIZES)
    is_less = sides < [image_size[1], image_size[0]]
    small = is_less.all(axis=1) if resize_mode == "pad" else is_less.any(axis=1)
    typical = np.median(sides, axis=0)
    found = defaultdict(list)
    for kind, rows, compared in (
        ("small", small, f"the target is {image_size[1]}x{image_size[0]}"),
        ("unusual_size", far, f"the median is {typical[0]:.0f}x{typical[1]:.0f}"),
    ):
        for row in np.flatnonzero(rows):
            found[files[row]].append((kind, f"{sides[row, 0]:.0f}x{sides[row, 1]:.0f}, {compared}"))
    return found


def check_images(
    paths: Sequence[str],
    csv_path: str,
    max_pixels: int = MAX_IMAGE_PIXELS,
    workers: int = 4,
    skip_bad_images: bool = False,
    rows: Sequence[int] | None = None,
) -> list[int]:
    """Checks that every path is a file that begins and ends as an image does, without decoding it.

    Args:
        paths: image files or URLs.
        csv_path: the table that lists them.
        max_pixels: the largest number of pixels allowed.
        workers: threads.
        skip_bad_images: print the faults instead of raising an error.
        rows: the line number of each path in the table; None if every line is in `paths`.

    Returns:
        The line numbers of the bad images, if `skip_bad_images` is set.

    Raises:
        UserError: files are missing, empty or no images; it names the first few with their rows.
    """
    inspections = inspect_images(paths, False, max_pixels, workers)
    listed = zip(range(2, len(paths) + 2) if rows is None else rows, paths, inspections, strict=True)
    faults = {row: describe_fault(path, one.fault[1]) for row, path, one in listed if one.fault}
    if not faults:
        return []
    shown = [f"row {row}: {detail}" for row, detail in list(faults.items())[:LONGEST_LIST]]
    more = f" (and {len(faults) - LONGEST_LIST} more rows)" if len(faults) > LONGEST_LIST else ""
    if skip_bad_images:
        print(f"{csv_path}: left out {show_count(len(faults), 'image')}: {'; '.join(shown)}{more}.")
        return list(faults)
    remedy = "Correct image_directory, the paths or the files, or leave the rows out with --skip_bad_images True."
    raise UserError(f"{csv_path}: {'; '.join(shown)}{more}. {remedy}")
