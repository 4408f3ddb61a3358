"""How findings are told, and data_report.csv."""

import csv

from checked_tables import (
    EXPECTED,
    check,
    corpus,  # noqa: F401
    table_of,
)
from corpus import UNREADABLE

from finetune.findings import IMAGE_FAULTS, KINDS, format_findings, write_data_report


def test_what_cannot_be_read_is_an_error_and_what_can_is_none(corpus):
    findings = check(table_of([(str(path), name) for name, path in corpus.items()]), mode="full")
    errors = {finding.path for finding in findings if finding.kind in IMAGE_FAULTS}
    assert errors == {str(corpus[name]) for name in UNREADABLE}


def test_report_lists_all_and_the_summary_the_first_few(tmp_path):
    findings = check(table_of([(f"missing_{number}.jpg", "a") for number in range(9)]))
    text = format_findings(findings)
    assert "error, missing (9)" in text
    assert "training.csv, row 6: missing_4.jpg" in text
    assert "missing_5" not in text
    assert "and 4 more rows" in text
    with open(write_data_report(str(tmp_path), findings), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [str(number) for number in range(2, 11)]
    assert {row["severity"] for row in rows} == {"error"}


def test_notes_alone_take_one_line(corpus):
    names = [name for name, kinds in EXPECTED.items() if KINDS[kinds[0]].severity == "note"]
    findings = check(table_of([(str(corpus[name]), "a") for name in names]))
    text = format_findings([one for one in findings if KINDS[one.kind].severity == "note"])
    assert len(text.splitlines()) == 1
    assert "4 turned upright by EXIF or XMP" in text


def test_control_characters_do_not_reach_the_terminal():
    text = format_findings(check(table_of([("\x1b[2Ja\nb.jpg", "a"), ("b.jpg", "a")])))
    assert "\x1b" not in text
    assert all(line.startswith(("error", "  ")) for line in text.splitlines())
