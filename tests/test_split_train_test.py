"""Splitting a table: fractions hold in every class, groups and copies stay together, bad images may be left out."""

import collections
import csv
import itertools
import os

import numpy as np
import pandas as pd
import pytest
from checked_tables import write_photo
from corpus import encode, photo
from PIL import Image

from finetune.core.options import UserError
from finetune.data.splitting import SET_FILES, format_class_counts, warn_of_missing_classes
from split_train_test import SplitConfigs, main


def write_table(folder, rows, header=("path", "class")):
    with open(folder / "all.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / "all.csv"


def write_labels(folder, labels):
    return write_table(folder, [(f"{number:04d}.jpg", label) for number, label in enumerate(labels)])


def split(folder, **options):
    """Splits the table; returns the counts and the rows of each set."""
    counts = main(SplitConfigs(csv_path=str(folder / "all.csv"), **options).validate())
    sets = {}
    for name, file_name in SET_FILES.items():
        if (folder / file_name).exists():
            with open(folder / file_name, encoding="utf-8", newline="") as file:
                sets[name] = list(csv.DictReader(file))
    return counts, sets


def count_labels(rows):
    return collections.Counter(name for row in rows for name in row["class"].split("$"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("images", "fractions", "expected"),
    [
        ({"a": 100, "b": 50, "c": 10}, {}, {"training": (80, 40, 8), "testing": (20, 10, 2)}),
        # Rounded to the nearest image.
        ({"a": 13, "b": 14}, {}, {"training": (10, 11), "testing": (3, 3)}),
        (
            {"a": 100, "b": 20},
            {"test_split_fraction": 0.25, "validation_split_fraction": 0.15},
            {"training": (60, 12), "validation": (15, 3), "testing": (25, 5)},
        ),
    ],
)
def test_fractions_hold_in_every_class(tmp_path, images, fractions, expected, seed):
    write_labels(tmp_path, [name for name, number in images.items() for _ in range(number)])
    counts, sets = split(tmp_path, random_seed=seed, **fractions)
    expected = {name: dict(zip(images, numbers, strict=True)) for name, numbers in expected.items()}
    assert counts == expected
    # No other set is written.
    assert {name: dict(count_labels(rows)) for name, rows in sets.items()} == expected


@pytest.mark.parametrize(
    ("validation", "expected"),
    [(0.0, {"testing": [8, 9]}), (0.3, {"validation": [5, 6, 7], "testing": [8, 9]})],
)
def test_without_shuffling_the_last_rows_of_each_class_are_the_test_set(tmp_path, validation, expected):
    write_labels(tmp_path, ["a"] * 10)
    training = sorted(set(range(10)).difference(*expected.values()))
    for shuffle in (False, True):
        _, sets = split(tmp_path, shuffle=shuffle, validation_split_fraction=validation)
        numbers = {name: [int(row["path"][:4]) for row in rows] for name, rows in sets.items()}
        assert (numbers == {"training": training} | expected) is not shuffle


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("validation", [0.0, 0.15])
def test_no_row_is_lost_or_doubled(tmp_path, multi_label, validation):
    labels = ["a", "b", "a$b", "c", "a", "b$c"] * 17 + ["d"]
    write_labels(tmp_path, labels)
    _, sets = split(tmp_path, multi_label_classification=multi_label, validation_split_fraction=validation)
    written = [(row["path"], row["class"]) for rows in sets.values() for row in rows]
    assert sorted(written) == [(f"{number:04d}.jpg", label) for number, label in enumerate(labels)]


@pytest.mark.parametrize("column", ["", "patient"])
def test_the_seed_decides_the_split(tmp_path, column):
    rows = [(f"{number}.jpg", "ab"[number % 2], f"p{number // 3}") for number in range(90)]
    write_table(tmp_path, rows, ("path", "class", "patient"))
    splits = [split(tmp_path, random_seed=seed, group_column=column)[1] for seed in (1, 1, 2)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


@pytest.mark.parametrize("fraction", [0.2, 0.35])
def test_each_label_of_a_multi_label_table_keeps_its_share(tmp_path, fraction):
    names, frequencies = np.array(["a", "b", "c", "d", "e"]), [0.6, 0.4, 0.2, 0.1, 0.05]
    for seed in range(3):
        present = np.random.default_rng(seed).random((600, 5)) < frequencies
        present[~present.any(axis=1), 0] = True
        write_labels(tmp_path, ["$".join(names[row]) for row in present])
        options = {"multi_label_classification": True, "test_split_fraction": fraction, "random_seed": seed}
        testing = count_labels(split(tmp_path, **options)[1]["testing"])
        shares = {name: testing[name] / present[:, position].sum() for position, name in enumerate(names)}
        assert shares == pytest.approx(dict.fromkeys(names, fraction), abs=0.05)


def test_the_separator_counts_in_multi_label_tables_only(tmp_path):
    write_labels(tmp_path, ["a$b"] * 10)
    assert split(tmp_path)[0]["testing"] == {"a$b": 2}
    counts, _ = split(tmp_path, multi_label_classification=True)
    assert counts == {"training": {"a": 8, "b": 8}, "testing": {"a": 2, "b": 2}}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("images", "validation", "expected"),
    [
        (1, 0.0, {"training": 1, "testing": 0}),
        (2, 0.0, {"training": 1, "testing": 1}),
        (3, 0.0, {"training": 2, "testing": 1}),
        (2, 0.2, {"training": 1}),
        (3, 0.2, {"training": 1, "validation": 1, "testing": 1}),
        (4, 0.2, {"training": 2, "validation": 1, "testing": 1}),
    ],
)
def test_tiny_class_reaches_as_many_sets_as_it_can(tmp_path, capsys, images, validation, expected, shuffle):
    write_labels(tmp_path, ["big"] * 50 + ["tiny"] * images)
    counts, _ = split(tmp_path, validation_split_fraction=validation, shuffle=shuffle)
    assert {name: counts[name]["tiny"] for name in expected} == expected
    assert sum(by_class["tiny"] for by_class in counts.values()) == images
    printed = capsys.readouterr().out
    assert "Warning: big" not in printed
    assert ("Warning: tiny has" in printed) == (0 in [by_class["tiny"] for by_class in counts.values()])


@pytest.mark.parametrize("multi_label", [False, True])
def test_large_test_fraction_leaves_each_class_something_to_train_on(tmp_path, multi_label):
    write_labels(tmp_path, ["a", "b", "b", "c", "c", "c"])
    counts, _ = split(tmp_path, test_split_fraction=0.9, multi_label_classification=multi_label)
    assert counts == {"training": {"a": 1, "b": 1, "c": 1}, "testing": {"a": 0, "b": 1, "c": 2}}


@pytest.mark.parametrize(("test", "validation"), [(0.5, 0.5), (0.8, 0.6), (0.33, 0.67)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(tmp_path, test, validation):
    write_labels(tmp_path, ["a", "b"] * 20)
    with pytest.raises(UserError, match=r"test_split_fraction and validation_split_fraction"):
        split(tmp_path, test_split_fraction=test, validation_split_fraction=validation)
    assert os.listdir(tmp_path) == ["all.csv"]


def test_other_columns_and_the_name_of_the_label_column_are_kept(tmp_path):
    notes = ["007", "", "NA", "a, b", 'say "x"', "1.50", "Ärmel", "None", "nan", "1e5"]
    write_table(tmp_path, [(f"{row}.jpg", "a", note) for row, note in enumerate(notes)], ("path", "label", "note"))
    _, sets = split(tmp_path, shuffle=False, csv_label_column="label")
    rows = sets["training"] + sets["testing"]
    assert [*rows[0]] == ["path", "label", "note"]
    assert [row["note"] for row in rows] == notes


@pytest.mark.parametrize("name", ["training_set.csv", "testing_set.csv"])
def test_table_is_never_replaced_by_a_part_of_itself(tmp_path, name):
    path = write_labels(tmp_path, ["a", "b"] * 10).rename(tmp_path / name)
    content = path.read_bytes()
    with pytest.raises(UserError, match=name):
        main(SplitConfigs(csv_path=str(path)).validate())
    assert path.read_bytes() == content


# Groups


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
def test_groups_stay_whole_and_classes_keep_their_shares(tmp_path, multi_label, shuffle, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(120):
        label = "abc"[int(rng.choice(3, p=[0.6, 0.3, 0.1]))]
        for _ in range(int(rng.integers(1, 6))):
            other = "abc"[int(rng.integers(3))]
            name = f"{label}${other}" if multi_label and other != label else label
            rows.append((f"{len(rows)}.jpg", name, f"p{patient}"))
    write_table(tmp_path, rows, ("path", "class", "patient"))
    options = {"multi_label_classification": multi_label, "shuffle": shuffle, "random_seed": seed}
    counts, sets = split(tmp_path, group_column="patient", validation_split_fraction=0.2, **options)
    patients = [{row["patient"] for row in found} for found in sets.values()]
    assert all(not one & other for one, other in itertools.combinations(patients, 2))
    assert sorted(row["path"] for found in sets.values() for row in found) == sorted(row[0] for row in rows)
    for name, share in (("training", 0.6), ("validation", 0.2), ("testing", 0.2)):
        for label in "abc":
            total = sum(by_class[label] for by_class in counts.values())
            assert abs(counts[name][label] - share * total) <= max(0.05 * total, 3), (name, label)


def test_rare_class_of_two_groups_reaches_both_sets(tmp_path):
    rows = [(f"{number}.jpg", "a", f"p{number // 2}") for number in range(100)]
    write_table(tmp_path, [*rows, ("x.jpg", "rare", "q1"), ("y.jpg", "rare", "q2")], ("path", "class", "patient"))
    counts, _ = split(tmp_path, group_column="patient")
    assert (counts["training"]["rare"], counts["testing"]["rare"]) == (1, 1)


def test_groups_that_prevent_the_fraction_are_warned_of(tmp_path, capsys):
    write_table(tmp_path, [(f"{row}.jpg", "a", f"p{row // 5}") for row in range(10)], ("path", "class", "patient"))
    counts, _ = split(tmp_path, group_column="patient")
    assert counts == {"training": {"a": 5}, "testing": {"a": 5}}
    assert "the testing set has 50.0% of the images, not 20.0%" in capsys.readouterr().out


@pytest.mark.parametrize(("column", "message"), [("video", "'video'.*patient"), ("patient", "row 3: .*'patient'")])
def test_unusable_group_column_is_named(tmp_path, column, message):
    write_table(tmp_path, [("a.jpg", "a", "1"), ("b.jpg", "a", " ")], ("path", "class", "patient"))
    with pytest.raises(UserError, match=message):
        split(tmp_path, group_column=column)


def test_column_group_is_kept_together_and_may_have_empty_cells(tmp_path):
    rows = [(f"{number}.jpg", "a", f"g{number // 4}" * (number < 20)) for number in range(60)]
    write_table(tmp_path, rows, ("path", "class", "group"))
    _, sets = split(tmp_path)
    in_sets = [{row["group"] for row in found} - {""} for found in sets.values()]
    assert not in_sets[0] & in_sets[1]
    assert {row["path"]: row["group"] for found in sets.values() for row in found} == {row[0]: row[2] for row in rows}


# Copies


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The rows of 12 photos and a smaller copy of each."""
    folder, rows = tmp_path_factory.mktemp("copies"), []
    for number in range(12):
        path = write_photo(folder / f"{number}.jpg", number, quality=90)
        Image.open(path).resize((120, 90)).save(folder / f"copy_{number}.jpg")
        rows += [(path, "ab"[number % 2]), (str(folder / f"copy_{number}.jpg"), "ab"[number % 2])]
    return rows


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"verify_data": "full"}])
def test_copies_stay_in_one_set_with_their_original(tmp_path, capsys, copies, options):
    write_table(tmp_path, copies)
    _, sets = split(tmp_path, **options)
    for found in sets.values():
        names = [os.path.basename(row["path"]) for row in found]
        assert {name.removeprefix("copy_") for name in names} == {name for name in names if "copy_" not in name}
        groups = {row["path"].replace("copy_", ""): row["group"] for row in found}
        assert all(row["group"] == groups[row["path"].replace("copy_", "")] for row in found)
        assert len(set(groups.values())) == len(groups)
    assert "24 of 24 images, in 12 groups of up to 2" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["off", "headers"])
def test_copies_are_not_looked_for_where_that_is_turned_off(tmp_path, capsys, copies, mode):
    write_table(tmp_path, copies)
    _, sets = split(tmp_path, verify_data=mode)
    assert "group" not in sets["training"][0]
    assert "Copies" not in capsys.readouterr().out


def test_groups_of_a_column_and_of_copies_are_joined_and_named_by_the_column(tmp_path, copies):
    rows = [(path, label, f"p{number // 4}") for number, (path, label) in enumerate(copies)]
    # The copy of photo 0, of patient p0, has patient p5.
    rows[1] = (*rows[1][:2], "p5")
    write_table(tmp_path, rows, ("path", "class", "patient"))
    _, sets = split(tmp_path, group_column="patient")
    groups = {os.path.basename(row["path"]): row["group"] for found in sets.values() for row in found}
    assert {groups[name] for name in ("0.jpg", "copy_0.jpg", "1.jpg", "10.jpg", "11.jpg")} == {"p0"}
    assert {groups[name] for name in ("2.jpg", "copy_3.jpg")} == {"p1"}


def test_labels_in_a_column_group_stay_as_they_are(tmp_path, copies):
    write_table(tmp_path, copies, ("path", "group"))
    counts, sets = split(tmp_path, csv_label_column="group")
    assert {row["path"]: row["group"] for found in sets.values() for row in found} == dict(copies)
    assert sum(counts["training"].values()) + sum(counts["testing"].values()) == 24


# Bad images


def test_images_in_a_store_are_checked_too(tmp_path, store):
    write_table(tmp_path, [(f"./{number}.jpg", "ab"[number % 2]) for number in range(10)])
    for number in range(10):
        store.put(f"memory://bucket/photos/{number}.jpg", encode("JPEG", photo(number // 2 * 2)))
    with pytest.raises(UserError, match=r"duplicate with other label \(5\)"):
        split(tmp_path, verify=True, image_directory="memory://bucket/photos")
    for number in range(9):
        store.put(f"memory://bucket/photos/{number}.jpg", encode("JPEG", photo(number // 4 * 4 + number % 2)))
    store.remove("memory://bucket/photos/9.jpg")
    _, sets = split(tmp_path, verify=True, image_directory="memory://bucket/photos/", skip_bad_images=True)
    numbers = [{int(row["path"].strip("./jpg")) for row in found} for found in sets.values()]
    assert set.union(*numbers) == set(range(9))
    for same in ({0, 2}, {1, 3}, {4, 6}, {5, 7}):
        assert any(same <= found for found in numbers)


@pytest.mark.parametrize(
    ("bad", "message"), [("copy", r"duplicate with other label \(1\)"), ("none", r"missing \(1\)")]
)
def test_bad_images_and_those_of_two_labels_are_left_out_if_they_may(tmp_path, capsys, bad, message):
    rows = [(write_photo(tmp_path / f"{number}.jpg", number), "ab"[number % 2]) for number in range(10)]
    write_photo(tmp_path / "copy.jpg", 4)
    write_table(tmp_path, [*rows, (str(tmp_path / f"{bad}.jpg"), "b")])
    with pytest.raises(UserError, match=f"{message}.*--skip_bad_images True" if bad == "copy" else message):
        split(tmp_path, verify=True)
    assert not (tmp_path / "training_set.csv").exists()
    _, sets = split(tmp_path, verify=True, skip_bad_images=True)
    names = {os.path.basename(row["path"]) for found in sets.values() for row in found}
    assert names == {f"{number}.jpg" for number in range(10) if number != 4 or bad == "none"}
    assert "Left out" in capsys.readouterr().out


# What is printed


def test_of_many_classes_the_smallest_are_shown(tmp_path, capsys):
    write_labels(tmp_path, [f"c{number:03d}" for number in range(101) for _ in range(5 if number % 5 else 2)])
    split(tmp_path)
    _, _, *lines = capsys.readouterr().out.split("Wrote")[0].split("20 smallest of 101 classes")[1].splitlines()
    assert [line.split() for line in lines] == [[f"c{number:03d}", "1", "1"] for number in range(0, 100, 5)]
    counts = {f"c{number:03d}": 1000 - number for number in range(101)} | {"none": 0}
    first, none, *others = format_class_counts(counts).splitlines()
    assert "20 smallest of 102 classes" in first
    assert none.startswith("none: no images")
    assert others == [f"c{number:03d}: {1000 - number} images" for number in range(100, 81, -1)]


def test_many_classes_that_a_set_lacks_take_one_line(capsys):
    names = [f"c{number:02d}" for number in range(30)]
    counts = pd.DataFrame({"training": 1, "validation": 0, "testing": [0] * 3 + [1] * 27}, index=names)
    warn_of_missing_classes(counts)
    validation, testing = capsys.readouterr().out.splitlines()
    assert "validation set has none of 30 small classes: c00, c01, c02, c03, c04 and 25 more" in validation
    assert "testing set has none of 3 small classes: c00, c01, c02" in testing
