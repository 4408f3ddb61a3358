"""The kinds of findings of the data check, and their report: data_report.csv."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from scipy.cluster.hierarchy import DisjointSet

from finetune.core.files import write_csv
from finetune.core.options import UserError
from finetune.core.texts import LONGEST_LIST, show_count, show_text


class BadImage(Exception):
    """An image cannot be used: a key of `KINDS`, and what is wrong."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class Inspection(NamedTuple):
    """Facts of an image file: fault, remarks, `(width, height)`, its length with a checksum of its end, thumbnail."""

    fault: tuple[str, str] | None
    remarks: list[tuple[str, str]]
    sides: tuple[int, int] = (0, 0)
    signature: tuple[int, int] = (0, 0)
    thumbnail: bytes | None = None


class Finding(NamedTuple):
    """One finding of the data check; the fields are the columns of data_report.csv.

    `row` is a line number of the CSV file, whose header is line 1; None means the whole file. If the image is a copy,
    `copy_of` and `copy_in` are the line and the CSV file of the other one.
    """

    kind: str
    set_name: str
    csv_path: str
    row: int | None
    path: str
    detail: str
    copy_of: int | None = None
    copy_in: str = ""


class Kind(NamedTuple):
    """The severity of a finding, `error`, `warning` or `note`, and its meaning with a remedy."""

    severity: str
    meaning: str


SPLIT_AGAIN = "Split again with split_train_test.py, drop one, or allow it with --allow_duplicates True."
KINDS = {
    "missing": Kind("error", "The file does not exist. Correct image_directory or the paths, or drop the rows."),
    "unreachable": Kind("error", "The store does not return it. Check address, network and permissions, or drop it."),
    "empty": Kind("error", "The file is empty. Copy it again, or drop the row."),
    "truncated": Kind("error", "The end of the file is missing. Copy it again, or drop the row."),
    "unreadable": Kind("error", "The image cannot be decoded. Replace it, or drop the row."),
    "unsupported": Kind("error", "This kind of image is not read. Save it as JPEG or PNG, or drop the row."),
    "needs_package": Kind("error", "Reading it needs another package. Install it, or save the image as JPEG."),
    "not_an_image": Kind("error", "The file is no image. Replace it, or drop the row."),
    "too_many_pixels": Kind("error", "Decoding it would fill the memory. Shrink it, or raise max_image_pixels."),
    "empty_path": Kind("error", "The row names no image. Fill it in, or drop the row."),
    "empty_label": Kind("error", "The image has no label. Fill it in, or drop the row."),
    "empty_label_part": Kind("error", "A class name next to a '$' is empty. Correct the label."),
    "unknown_class": Kind("error", "The training set has no image of the class. Correct the label, or drop the row."),
    "white_space_variant": Kind("error", "Two class names differ only by white space. Remove it from the label."),
    "duplicate_with_other_label": Kind(
        "error", "The same image has two labels. Keep the right row, or leave out all with --skip_bad_images True."
    ),
    "duplicate_across_sets": Kind("error", f"The same image is in two sets. {SPLIT_AGAIN}"),
    "near_duplicate_across_sets": Kind("error", f"Nearly the same image is in two sets. {SPLIT_AGAIN}"),
    "allowed_duplicate": Kind("warning", "The same image is in two sets: results will be optimistic."),
    "near_allowed_duplicate": Kind(
        "warning",
        "Nearly the same image is in two sets, so results will be optimistic. Split again with split_train_test.py.",
    ),
    "near_duplicate_with_other_label": Kind("warning", "Nearly the same image has two labels. See data_report.html."),
    "white_space": Kind("warning", "A class name begins or ends with white space, which counts as part of the name."),
    "case_variant": Kind("warning", "Class names differ only by case or width; they are different classes."),
    "doubled_label": Kind("warning", "A label names a class twice; it counts once."),
    "duplicate_path": Kind("warning", "The table names the same file twice; it counts twice."),
    "duplicate": Kind("warning", "The same image is twice in a set; it counts twice."),
    "near_duplicate": Kind("warning", "Nearly the same image is twice in a set."),
    "class_of_one_image": Kind("warning", "A class has one image, which is hardly enough to learn it."),
    "wrong_extension": Kind("warning", "The file's ending does not fit its content, by which it is read."),
    "nearly_uniform": Kind("warning", "The image has nearly one tone. Do its values use fewer bits than the file has?"),
    "odd_values": Kind("warning", "Infinite values and values outside pixel_range are clipped. Is that intended?"),
    "small": Kind("warning", "The image is smaller than image_target_size and will be enlarged."),
    "unusual_size": Kind("warning", "The image's size or shape differs much from the rest."),
    "rotated": Kind("note", "turned upright by EXIF or XMP"),
    "animated": Kind("note", "animated or with several pages, of which the first is used"),
    "deep": Kind("note", "16 bits, reduced to 8"),
    "cmyk": Kind("note", "CMYK, converted to RGB"),
    "palette": Kind("note", "palette, converted to RGB"),
    "alpha": Kind("note", "transparent, over white"),
}
IMAGE_FAULTS = ("missing", "unreachable", "empty", "truncated", "unreadable", "unsupported", "needs_package")
IMAGE_FAULTS += ("not_an_image", "too_many_pixels")
OTHER_LABEL = "duplicate_with_other_label"
EXACT_COPIES = (OTHER_LABEL, "duplicate_across_sets", "allowed_duplicate", "duplicate_path", "duplicate")
REPORT_FILE = "data_report.csv"


def get_bad_rows(findings: Sequence[Finding]) -> dict[str, set[int]]:
    """Returns the line numbers of images that cannot be read or have two labels, by CSV file."""
    rows = defaultdict(set)
    for finding in findings:
        if finding.kind in IMAGE_FAULTS:
            rows[finding.csv_path].add(finding.row)
    for csv_path, row in find_contradictions(findings):
        rows[csv_path].add(row)
    return rows


def find_contradictions(findings: Sequence[Finding]) -> list[tuple[str, int]]:
    """Returns the CSV file and the line of every row whose image has another label in another row."""
    wrong = [one for one in findings if one.kind == OTHER_LABEL]
    if not wrong:
        return []
    pairs = [((one.csv_path, one.row), (one.copy_in, one.copy_of)) for one in findings if one.kind in EXACT_COPIES]
    groups = DisjointSet({place for pair in pairs for place in pair})
    for pair in pairs:
        groups.merge(*pair)
    found = {groups[one.csv_path, one.row] for one in wrong}
    return sorted(place for place in groups if groups[place] in found)


def describe_fault(path: str, detail: str) -> str:
    """Joins a path and a fault: `a.jpg does not exist`, `a.jpg: its end is missing`."""
    colon = ":" if detail.startswith(("it ", "its ")) else ""
    return f"{show_text(path)}{colon} {show_text(detail)}"


def format_findings(findings: Sequence[Finding], heading: str = "") -> str:
    """Returns findings as text: one paragraph per kind with the first few findings, and one line for all notes.

    A `heading` replaces the severity in each paragraph.
    """
    groups = defaultdict(list)
    for finding in findings:
        groups[finding.kind].append(finding)
    lines, notes = [], []
    for name, kind in KINDS.items():
        if not groups[name]:
            continue
        if kind.severity == "note":
            notes.append(f"{len(groups[name])} {kind.meaning}")
            continue
        lines.append(f"{heading or kind.severity}, {name.replace('_', ' ')} ({len(groups[name])}): {kind.meaning}")
        for finding in groups[name][:LONGEST_LIST]:
            row = f", row {finding.row}" if finding.row else ""
            lines.append(f"  {finding.csv_path}{row}: {describe_fault(finding.path, finding.detail)}")
        lines += [f"  and {len(groups[name]) - LONGEST_LIST} more rows"] * (len(groups[name]) > LONGEST_LIST)
    lines += [f"Notes on sound images: {'; '.join(notes)}."] * bool(notes)
    return "\n".join(lines)


def write_data_report(folder: str, findings: Sequence[Finding], is_more: bool = False) -> str:
    """Writes findings to data_report.csv in a folder, or appends them with `is_more`; returns its path."""
    path = os.path.join(folder, REPORT_FILE)
    rows = [(KINDS[finding.kind].severity, *finding) for finding in findings]
    table = pd.DataFrame(rows, columns=["severity", *Finding._fields]).astype({"row": "Int64", "copy_of": "Int64"})
    if is_more and os.path.isfile(path):
        table = pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False), table.astype(str).replace("<NA>", "")])
    write_csv(path, table)
    return path


def report_findings(
    findings: Sequence[Finding],
    folder: str,
    skip_bad_images: bool,
    writes_report: bool = True,
    skip_contradictions: bool = False,
) -> None:
    """Prints the findings of the data check and writes them to data_report.csv; a clean check writes no file.

    Args:
        findings: from `check_data`.
        folder: receives the report.
        skip_bad_images: images that cannot be read or have two labels are left out; otherwise they are errors.
        writes_report: False if another process writes the same report.
        skip_contradictions: images that have two labels are left out in any case.
    """
    unreadable = [finding for finding in findings if finding.kind in IMAGE_FAULTS and skip_bad_images]
    contradictions = {*find_contradictions(findings)} if skip_bad_images or skip_contradictions else set()
    # A row that is left out is in no set.
    kinds = OTHER_LABEL, "duplicate_across_sets"
    resolved = [one for one in findings if one.kind in kinds and (one.csv_path, one.row) in contradictions]
    left_out = {*unreadable, *resolved}
    skipped = [finding for finding in findings if finding in left_out]
    errors = [one for one in findings if KINDS[one.kind].severity == "error" and one not in left_out]
    if not findings and not os.path.exists(os.path.join(folder, REPORT_FILE)):
        return
    path = write_data_report(folder, findings) if writes_report else os.path.join(folder, REPORT_FILE)
    others = [one for one in findings if KINDS[one.kind].severity != "error"]
    for text in (format_findings(skipped, heading="left out"), format_findings(others)):
        print(text) if text else None
    if unreadable:
        print(f"Left out {show_count(len(unreadable), 'image')} that cannot be read; {path} lists them.")
    if contradictions:
        print(f"Left out {len(contradictions)} rows whose images have two labels; {path} lists them.")
    if errors:
        counts = Counter(KINDS[finding.kind].severity for finding in findings)
        remedy = " --skip_bad_images True leaves out images that cannot be read."
        remedy *= any(finding.kind in IMAGE_FAULTS[1:] for finding in errors)
        raise UserError(
            f"The data check found errors: {counts['error'] - len(skipped)}, warnings: {counts['warning']}. "
            f"{path} lists them all.{remedy}\n{format_findings(errors)}"
        )
    if any(KINDS[finding.kind].severity == "warning" for finding in findings):
        print(f"{path} lists everything that the data check found.")
