"""How findings are told, and data_report.csv."""

import csv

import pytest
from checked_tables import (
    EXPECTED,
    check,
    corpus,  # noqa: F401
    table_of,
    write_photo,
)

from finetune.core.options import UserError
from finetune.data.findings import (
    KINDS,
    format_findings,
    get_bad_rows,
    report_findings,
    write_data_report,
)


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


# Images that have two labels


def write_copies(folder, names):
    """Writes photos, of which those with the same first letter are the same; returns their paths by name."""
    return {name: write_photo(folder / f"{name}.jpg", ord(name[0])) for name in names}


def test_every_row_of_an_image_with_two_labels_is_bad(tmp_path):
    paths = write_copies(tmp_path, ["a1", "a2", "a3", "b1", "b2", "c1"])
    labels = {"a1": "cat", "a2": "cat", "a3": "dog", "b1": "dog", "b2": "dog", "c1": "cat"}
    findings = check(table_of([(paths[name], label) for name, label in labels.items()]))
    assert get_bad_rows(findings) == {"training.csv": {2, 3, 4}}


@pytest.mark.parametrize("allow_duplicates", [False, True])
def test_they_are_bad_in_each_set(tmp_path, allow_duplicates):
    paths = write_copies(tmp_path, ["a1", "a2", "a3", "b1", "c1"])
    training = table_of([(paths["a1"], "cat"), (paths["b1"], "dog")])
    test = table_of([(paths["c1"], "dog"), (paths["a2"], "dog"), (paths["a3"], "cat")], "test")
    findings = check(training, test, allow_duplicates=allow_duplicates)
    assert get_bad_rows(findings) == {"training.csv": {2}, "test.csv": {3, 4}}


def test_they_are_errors_with_a_remedy_or_left_out_and_told(tmp_path, capsys):
    paths = write_copies(tmp_path, ["a1", "a2", "b1"])
    training = table_of([(paths["a1"], "cat"), (paths["b1"], "dog")])
    findings = check(training, table_of([(paths["a2"], "dog")], "test"))
    with pytest.raises(UserError, match="two labels.*--skip_bad_images True"):
        report_findings(findings, str(tmp_path), skip_bad_images=False)
    report_findings(findings, str(tmp_path), skip_bad_images=True)
    report_findings(findings, str(tmp_path), skip_bad_images=False, skip_contradictions=True)
    printed = capsys.readouterr().out
    assert printed.count("Left out 2 rows whose images have two labels") == 2
    assert printed.count("'dog' here and 'cat' there") >= 2


def test_a_copy_of_one_label_stays_an_error_beside_them(tmp_path):
    paths = write_copies(tmp_path, ["a1", "a2", "b1", "b2"])
    training = table_of([(paths["a1"], "cat"), (paths["a2"], "dog"), (paths["b1"], "dog")])
    findings = check(training, table_of([(paths["b2"], "dog")], "test"))
    with pytest.raises(UserError, match=r"^The data check found errors: 1,[^$]*duplicate across sets \(1\)"):
        report_findings(findings, str(tmp_path), skip_bad_images=True)
