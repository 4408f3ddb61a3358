"""The data check: every bad image, table and copy is found with its row, and what is right raises no alarm."""

import csv
import os
import re
import sys

import cv2
import numpy as np
import pytest
import skimage.data
from checked_tables import (
    EXPECTED,
    check,
    corpus,  # noqa: F401  # noqa: F401
    table_of,
    write_photo,
)
from corpus import encode, photo
from PIL import Image

from configs import Configs
from finetune.core.options import UserError
from finetune.data import data_check
from finetune.data.data_check import check_images, check_sets
from finetune.data.findings import (
    IMAGE_FAULTS,
    KINDS,
    format_findings,
    get_bad_rows,
    report_findings,
    write_data_report,
)
from finetune.training.callbacks import BadImages
from finetune.training.workers import Team
from generator import get_generator


def kinds_of(findings):
    return sorted((finding.kind, finding.set_name, finding.row) for finding in findings)


# Images


def test_sizes_below_the_target_and_far_from_the_rest_are_told(tmp_path):
    sides = {**{f"{number}.png": (100, 120) for number in range(10)}, "tiny.png": (20, 24), "long.png": (40, 400)}
    sides["thin.png"] = (90, 100)
    for name, (height, width) in sides.items():
        Image.fromarray(photo(len(name) + height, (height, width))).save(tmp_path / name)
    unusual = {("unusual_size", "tiny.png"), ("unusual_size", "long.png")}
    # Padding leaves a picture as it is that has one side of the target.
    for mode, names in (("stretch", ["tiny", "long", "thin"]), ("crop", ["tiny", "long", "thin"]), ("pad", ["tiny"])):
        table = table_of([(name, "a") for name in sides], folder=tmp_path)
        findings = check(table, image_target_size=(95, 100, 3), resize_mode=mode)
        found = {(finding.kind, finding.path) for finding in findings if finding.kind in ("small", "unusual_size")}
        assert found == {("small", f"{name}.png") for name in names} | unusual


def test_files_that_are_no_images_are_named_with_their_rows_or_left_out(tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "good.jpg"), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "cut.jpg").write_bytes(encode("JPEG", photo(0))[:-300])
    (tmp_path / "text.jpg").write_text("this is a text, not an image", encoding="utf-8")
    (tmp_path / "2.jpg").touch()
    paths = [str(tmp_path / name) for name in ("good.jpg", "missing.jpg", "empty.jpg", "text.jpg", "cut.jpg", "2")]
    with pytest.raises(UserError, match=r"^t\.csv: row 3: .*row 4: .*row 5: .*row 6: .*row 7: .*2\.jpg.*--skip_bad"):
        check_images(paths, "t.csv")
    assert check_images(paths, "t.csv", skip_bad_images=True) == [3, 4, 5, 6, 7]
    assert "t.csv: left out 5 images" in capsys.readouterr().out


def test_only_the_first_bad_images_are_listed():
    with pytest.raises(UserError, match="3 more rows") as raised:
        check_images([f"missing_{number}.jpg" for number in range(8)], "t.csv")
    assert "missing_4.jpg" in str(raised.value)
    assert "missing_5.jpg" not in str(raised.value)


# Images in stores


def test_what_no_store_gives_is_told_with_its_row(store):
    store.put("memory://bucket/a.jpg", encode("JPEG", photo(0)))
    paths = ["memory://bucket/a.jpg", "memory://bucket/b.jpg", "htps://host/c.jpg", "a.jpg::memory://bucket/a.jpg"]
    findings = check(table_of([(path, "a") for path in paths]))
    found = [(finding.kind, finding.row) for finding in findings if finding.kind in IMAGE_FAULTS]
    assert found == [("missing", 3), ("missing", 5), ("unreachable", 4)]
    with pytest.raises(UserError, match="row 3: memory://bucket/b.jpg does not exist; row 4: htps://host/c.jpg is out"):
        check_images(paths, "test.csv")
    assert check_images(paths, "test.csv", skip_bad_images=True) == [3, 4, 5]


@pytest.mark.parametrize("skip_bad_images", [False, True])
def test_a_missing_package_ends_the_check_with_its_name(store, monkeypatch, skip_bad_images):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/\d+.jpg .*pip install s3fs"):
        check_images([f"s3://bucket/{number}.jpg" for number in range(50)], "t.csv", 9, 4, skip_bad_images)


def test_copies_are_found_between_disk_and_store(store, tmp_path):
    path = write_photo(tmp_path / "a.jpg", 1)
    store.put("memory://bucket/b.jpg", (tmp_path / "a.jpg").read_bytes())
    training = table_of([(path, "x"), ("memory://bucket/b.jpg", "x")])
    test = table_of([("memory:///bucket/b.jpg", "x")], "test")
    expected = [("duplicate", "training", 3), ("duplicate_across_sets", "test", 2)]
    assert kinds_of(check(training, test)) == expected


# Copies


def test_copies_are_found_by_path_content_and_set(tmp_path):
    first, second = write_photo(tmp_path / "a.jpg", 1), write_photo(tmp_path / "b.jpg", 2)
    for copy in ("copy.jpg", "again.jpg"):
        (tmp_path / copy).write_bytes((tmp_path / "a.jpg").read_bytes())
    training = table_of([(first, "cat"), (second, "dog"), (str(tmp_path / "copy.jpg"), "cat"), (second, "dog")])
    test = table_of([(str(tmp_path / "again.jpg"), "cat")], "test")
    expected = [("duplicate", "training", 4), ("duplicate_across_sets", "test", 2), ("duplicate_path", "training", 5)]
    assert kinds_of(check(training, test)) == expected
    allowed = kinds_of(check(training, test, allow_duplicates=True))
    assert allowed == [("allowed_duplicate", "test", 2), expected[0], expected[2]]


def test_one_image_under_two_labels_is_an_error(tmp_path):
    path = write_photo(tmp_path / "a.jpg", 1)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    rows = [(path, "cat"), (str(tmp_path / "b.jpg"), "dog"), (path, "dog")]
    found = [finding for finding in check(table_of(rows)) if finding.kind == "duplicate_with_other_label"]
    assert [finding.row for finding in found] == [3, 4]
    assert "'dog' here and 'cat' there" in found[0].detail


def test_order_of_multi_labels_makes_no_other_label(tmp_path):
    path = write_photo(tmp_path / "a.jpg", 1)
    findings = check(table_of([(path, "cat$dog"), (path, "dog$cat")]), multi_label=True)
    assert kinds_of(findings) == [("duplicate_path", "training", 3)]


def test_files_of_one_length_and_end_are_told_apart_by_their_content(tmp_path):
    first, second = np.zeros((200, 200, 3), np.uint8), np.zeros((200, 200, 3), np.uint8)
    first[50:60], second[90:100] = 255, 255
    for name, picture in (("a.bmp", first), ("b.bmp", second)):
        Image.fromarray(picture).save(tmp_path / name)
    assert check(table_of([("a.bmp", "x"), ("b.bmp", "x")], folder=tmp_path)) == []


def test_near_copies_across_sets_are_a_warning_and_in_the_full_check_an_error(tmp_path):
    picture = skimage.data.chelsea()
    for name, quality in (("a.jpg", 90), ("b.jpg", 60), ("c.jpg", 75)):
        Image.fromarray(picture).save(tmp_path / name, quality=quality)
    training = table_of([("a.jpg", "cat"), ("b.jpg", "cat")], folder=tmp_path)
    test = table_of([("c.jpg", "cat")], "test", folder=tmp_path)
    assert check(training, test, mode="headers") == []
    found = kinds_of(check(training, test, mode="full"))
    assert found == [("near_duplicate", "training", 3), ("near_duplicate_across_sets", "test", 2)]
    warned = [("near_allowed_duplicate", "test", 2), ("near_duplicate", "training", 3)]
    assert kinds_of(check(training, test)) == warned
    assert kinds_of(check(training, test, mode="full", allow_duplicates=True)) == warned


def test_a_check_that_would_take_longer_than_a_minute_reads_headers_alone_and_says_so(tmp_path, monkeypatch, capsys):
    for name, quality in (("a.jpg", 90), ("b.jpg", 60)):
        Image.fromarray(skimage.data.chelsea()).save(tmp_path / name, quality=quality)
    table = table_of([("a.jpg", "cat"), ("b.jpg", "cat")], folder=tmp_path)
    monkeypatch.setattr(data_check, "estimate_seconds", lambda *_: 600.0)
    assert check(table) == []
    assert re.search("decoding 2 images would take about 10 min.*--verify_data full", capsys.readouterr().out)
    assert kinds_of(check(table, mode="full")) == [("near_duplicate", "training", 3)]


def test_pictures_of_one_colour_are_no_copies_of_each_other(tmp_path):
    for name, grey in (("a.png", 10), ("b.png", 200)):
        Image.new("RGB", (50, 50), (grey,) * 3).save(tmp_path / name)
    found = check(table_of([("a.png", "x"), ("b.png", "x")], folder=tmp_path), mode="full")
    assert kinds_of(found) == [("nearly_uniform", "training", 2), ("nearly_uniform", "training", 3)]


# Tables


def test_classes_that_training_lacks_are_told_for_each_row(tmp_path):
    rows = [(write_photo(tmp_path / f"{seed}.jpg", seed), label) for seed, label in enumerate("aabbcc")]
    findings = check(table_of(rows[:4]), table_of(rows[4:], "test"))
    assert kinds_of(findings) == [("unknown_class", "test", 2), ("unknown_class", "test", 3)]


# Reports


def write_sets(folder, corrupt=()):
    """Writes a training and a test table of photos, of which some files are no images; returns configs."""
    paths = {}
    for name, seeds in (("training", range(8)), ("test", range(8, 12))):
        rows = [(write_photo(folder / f"{seed}.jpg", seed), "ab"[seed % 2]) for seed in seeds]
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("path", "class"), *rows])
        paths[name] = str(folder / f"{name}.csv")
    for seed in corrupt:
        (folder / f"{seed}.jpg").write_text("no image", encoding="utf-8")
    return Configs(
        train_csv=paths["training"],
        test_csv=paths["test"],
        image_target_size=(40, 40, 3),
        batch_size=3,
        save_model_path=str(folder / "run"),
    )


def check_run(configs):
    return check_sets({"training": configs.train_csv, "validation": configs.test_csv}, configs)


def test_clean_data_writes_no_report(tmp_path, capsys):
    configs = write_sets(tmp_path)
    assert check_run(configs) == {configs.train_csv: set(), configs.test_csv: set()}
    assert not os.path.exists(configs.save_model_path)
    assert capsys.readouterr().out == ""


def test_bad_images_end_the_run_or_are_left_out(tmp_path, capsys):
    configs = write_sets(tmp_path, corrupt=(2, 9))
    with pytest.raises(UserError, match=r"not an image \(2\)") as raised:
        check_run(configs)
    assert "training.csv, row 4" in str(raised.value)
    assert "test.csv, row 3" in str(raised.value)
    configs.skip_bad_images = True
    bad_rows = check_run(configs)
    assert bad_rows == {configs.train_csv: {4}, configs.test_csv: {3}}
    assert "Left out 2 images" in capsys.readouterr().out
    sequence = get_generator(configs.train_csv, ["a", "b"], configs, True, bad_rows[configs.train_csv])
    assert [os.path.basename(path) for path in sequence.paths] == [f"{seed}.jpg" for seed in (0, 1, 3, 4, 5, 6, 7)]
    assert sequence.labels.tolist() == [0, 1, 1, 0, 1, 0, 1]


def test_labels_stay_errors_where_images_are_skipped(tmp_path):
    configs = write_sets(tmp_path)
    configs.skip_bad_images = True
    with open(configs.test_csv, "a", encoding="utf-8") as file:
        file.write(f"{tmp_path / '0.jpg'},a\n")
    with pytest.raises(UserError, match=r"duplicate across sets \(1\)"):
        check_run(configs)
    configs.allow_duplicates = True
    check_run(configs)


def test_images_of_two_labels_are_left_out_of_every_set_where_images_are_skipped(tmp_path, capsys):
    configs = write_sets(tmp_path)
    with open(configs.test_csv, "a", encoding="utf-8") as file:
        file.write(f"{tmp_path / '0.jpg'},b\n")
    with pytest.raises(UserError, match="two labels.*--skip_bad_images True"):
        check_run(configs)
    configs.skip_bad_images = True
    assert check_run(configs) == {configs.train_csv: {2}, configs.test_csv: {6}}
    assert "Left out 2 rows whose images have two labels" in capsys.readouterr().out


def test_off_checks_nothing(tmp_path):
    configs = write_sets(tmp_path, corrupt=(2,))
    configs.verify_data = "off"
    assert check_run(configs) == {configs.train_csv: set(), configs.test_csv: set()}


# Images that go bad during training


def sequences_of(configs):
    bad_rows = check_run(configs)
    return [
        get_generator(path, ["a", "b"], configs, path == configs.train_csv, bad_rows[path])
        for path in (configs.train_csv, configs.test_csv)
    ]


def all_batches(sequence):
    return [np.concatenate(parts) for parts in zip(*(sequence[index] for index in range(len(sequence))), strict=True)]


def test_image_that_goes_bad_ends_the_epoch_with_its_path(tmp_path):
    training, _ = sequences_of(write_sets(tmp_path))
    (tmp_path / "3.jpg").unlink()
    with pytest.raises(UserError, match=r"3\.jpg"):
        all_batches(training)


def test_next_image_of_the_order_takes_the_place_of_one_that_goes_bad(tmp_path, capsys):
    configs = write_sets(tmp_path).replace(skip_bad_images=True)
    training, validation = sequences_of(configs)
    training.augmenter = None
    order, (images, labels) = training._order().tolist(), all_batches(training)
    (tmp_path / "3.jpg").unlink()
    (tmp_path / "5.jpg").write_bytes(b"\xff\xd8\xff overwritten")
    expected = [
        next(order[(position + step) % 8] for step in range(8) if order[(position + step) % 8] not in (3, 5))
        for position in range(8)
    ]
    for _ in range(2):
        replaced, of_replaced = all_batches(training)
        rows = [order.index(row) for row in expected]
        np.testing.assert_array_equal(replaced, images[rows])
        np.testing.assert_array_equal(of_replaced, labels[rows])
    sequences = {configs.train_csv: training, configs.test_csv: validation}
    callback = BadImages(sequences, configs.save_model_path, Team())
    callback.on_epoch_end(0)
    callback.on_epoch_end(1)
    assert capsys.readouterr().out.count("Left out 2 images that could not be read") == 1
    with open(os.path.join(configs.save_model_path, "data_report.csv"), encoding="utf-8", newline="") as file:
        assert [os.path.basename(row["path"]) for row in csv.DictReader(file)] == ["3.jpg", "5.jpg"]


def test_row_of_a_bad_validation_image_is_left_out(tmp_path):
    _, validation = sequences_of(write_sets(tmp_path).replace(skip_bad_images=True))
    images, labels = all_batches(validation)
    (tmp_path / "9.jpg").unlink()
    kept, of_kept = all_batches(validation)
    np.testing.assert_array_equal(kept, images[[0, 2, 3]])
    np.testing.assert_array_equal(of_kept, labels[[0, 2, 3]])
    np.testing.assert_array_equal(validation.get_y_true(), labels[[0, 2, 3]])


@pytest.mark.parametrize("position", [0, 1])
def test_nothing_readable_is_an_error_all_the_same(tmp_path, position):
    sequence = sequences_of(write_sets(tmp_path).replace(skip_bad_images=True))[position]
    for seed in range(12):
        (tmp_path / f"{seed}.jpg").unlink()
    with pytest.raises(UserError, match="None of the .* images can be read"):
        all_batches(sequence)


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
