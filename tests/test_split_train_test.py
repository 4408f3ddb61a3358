"""Splitting a table: every row once, every class by the same fractions, the same rows for the same seed."""

import collections
import csv
import os

import numpy as np
import pytest

from finetune.core.options import UserError
from split_train_test import SplitConfigs, main

SETS = ("training", "validation", "testing")


def write_table(folder, labels, header=("path", "class"), **columns):
    path = folder / "all.csv"
    rows = zip((f"{number:04d}.jpg" for number in range(len(labels))), labels, *columns.values(), strict=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([(*header, *columns), *rows])
    return path


def split(folder, **options):
    return main(SplitConfigs(csv_path=str(folder / "all.csv"), **options).validate())


def read_sets(folder):
    rows = {}
    for name in SETS:
        path = folder / f"{name}_set.csv"
        if path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                rows[name] = [tuple(row) for row in csv.reader(file)][1:]
    return rows


def count_labels(rows):
    return collections.Counter(name for _, label, *_ in rows for name in label.split("$"))


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
    write_table(tmp_path, [name for name, number in images.items() for _ in range(number)])
    counts = split(tmp_path, random_seed=seed, **fractions)
    expected = {name: dict(zip(images, numbers, strict=True)) for name, numbers in expected.items()}
    assert counts == expected
    # No set is written that is not asked for.
    assert {name: dict(count_labels(rows)) for name, rows in read_sets(tmp_path).items()} == expected


@pytest.mark.parametrize(
    ("validation", "expected"),
    [(0.0, {"testing": [8, 9]}), (0.3, {"validation": [5, 6, 7], "testing": [8, 9]})],
)
def test_without_shuffling_the_last_rows_of_each_class_are_the_test_set(tmp_path, validation, expected):
    write_table(tmp_path, ["a"] * 10)
    for shuffle in (False, True):
        split(tmp_path, shuffle=shuffle, validation_split_fraction=validation)
        numbers = {name: [int(row[0][:4]) for row in rows] for name, rows in read_sets(tmp_path).items()}
        training = sorted(set(range(10)).difference(*expected.values()))
        assert (numbers == {"training": training} | expected) is not shuffle


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("validation_split_fraction", [0.0, 0.15])
def test_no_row_is_lost_or_doubled(tmp_path, multi_label, shuffle, validation_split_fraction):
    labels = ["a", "b", "a$b", "c", "a", "b$c"] * 17 + ["d"]
    write_table(tmp_path, labels)
    split(
        tmp_path,
        multi_label_classification=multi_label,
        shuffle=shuffle,
        validation_split_fraction=validation_split_fraction,
    )
    written = [row for rows in read_sets(tmp_path).values() for row in rows]
    assert sorted(written) == [(f"{number:04d}.jpg", label) for number, label in enumerate(labels)]


def test_same_seed_splits_alike_and_another_differs(tmp_path):
    write_table(tmp_path, ["a", "b"] * 50)
    splits = []
    for seed in (1, 1, 2):
        split(tmp_path, random_seed=seed)
        splits.append(read_sets(tmp_path))
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.2, 0.35])
def test_each_label_of_a_multi_label_table_keeps_its_share(tmp_path, seed, fraction):
    rng = np.random.default_rng(seed)
    names, frequencies = np.array(["a", "b", "c", "d", "e"]), [0.6, 0.4, 0.2, 0.1, 0.05]
    present = rng.random((600, 5)) < frequencies
    present[~present.any(axis=1), 0] = True
    write_table(tmp_path, ["$".join(names[row]) for row in present])
    split(tmp_path, multi_label_classification=True, test_split_fraction=fraction, random_seed=seed)
    testing = count_labels(read_sets(tmp_path)["testing"])
    shares = {name: testing[name] / present[:, position].sum() for position, name in enumerate(names)}
    assert shares == pytest.approx(dict.fromkeys(names, fraction), abs=0.05)


def test_multi_label_counts_count_each_label(tmp_path):
    write_table(tmp_path, ["a$b"] * 10)
    counts = split(tmp_path, multi_label_classification=True)
    assert counts["training"] == {"a": 8, "b": 8}
    assert counts["testing"] == {"a": 2, "b": 2}


def test_single_label_takes_the_separator_as_any_other_character(tmp_path):
    write_table(tmp_path, ["a$b"] * 10)
    assert split(tmp_path)["testing"] == {"a$b": 2}


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
def test_tiny_class_reaches_as_many_sets_as_it_can(tmp_path, images, validation, expected, shuffle):
    write_table(tmp_path, ["big"] * 50 + ["tiny"] * images)
    counts = split(tmp_path, validation_split_fraction=validation, shuffle=shuffle)
    assert {name: counts[name]["tiny"] for name in expected} == expected
    assert sum(by_class["tiny"] for by_class in counts.values()) == images


@pytest.mark.parametrize("multi_label", [False, True])
def test_large_test_fraction_leaves_each_class_something_to_train_on(tmp_path, multi_label):
    write_table(tmp_path, ["a", "b", "b", "c", "c", "c"])
    counts = split(tmp_path, test_split_fraction=0.9, multi_label_classification=multi_label)
    assert counts == {"training": {"a": 1, "b": 1, "c": 1}, "testing": {"a": 0, "b": 1, "c": 2}}


def test_class_that_is_missing_in_a_set_is_told(tmp_path, capsys):
    write_table(tmp_path, ["big"] * 50 + ["tiny"])
    split(tmp_path)
    printed = capsys.readouterr().out
    assert "Warning: tiny has 1 image" in printed
    assert "the testing set has none" in printed
    assert "Warning: big" not in printed


@pytest.mark.parametrize(("test", "validation"), [(0.5, 0.5), (0.7, 0.3), (0.9, 0.1), (0.8, 0.6), (0.33, 0.67)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(tmp_path, test, validation):
    write_table(tmp_path, ["a", "b"] * 20)
    with pytest.raises(UserError, match=r"test_split_fraction and validation_split_fraction.*Lower"):
        split(tmp_path, test_split_fraction=test, validation_split_fraction=validation)
    assert os.listdir(tmp_path) == ["all.csv"]


def test_other_columns_are_kept_as_they_are(tmp_path):
    notes = ["007", "", "NA", "a, b", 'say "x"', "1.50", "Ärmel", "None", "nan", "1e5"]
    write_table(tmp_path, ["a"] * 10, note=notes)
    split(tmp_path, shuffle=False)
    rows = read_sets(tmp_path)
    assert [row[2] for row in rows["training"] + rows["testing"]] == notes


def test_label_column_takes_its_name_from_the_configs(tmp_path):
    write_table(tmp_path, ["a", "b"] * 5, header=("path", "label"))
    split(tmp_path, csv_label_column="label")
    assert (tmp_path / "testing_set.csv").read_text("utf-8").startswith("path,label\n")


def test_missing_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read the CSV file .*all\.csv"):
        split(tmp_path)


@pytest.mark.parametrize("name", ["training_set.csv", "testing_set.csv"])
def test_table_is_never_replaced_by_a_part_of_itself(tmp_path, name):
    path = write_table(tmp_path, ["a", "b"] * 10).rename(tmp_path / name)
    content = path.read_bytes()
    with pytest.raises(UserError, match=name):
        main(SplitConfigs(csv_path=str(path)).validate())
    assert path.read_bytes() == content


def test_of_many_classes_the_smallest_are_printed(tmp_path, capsys):
    labels = [f"c{number:03d}" for number in range(101) for _ in range(5 if number % 5 else 2)]
    write_table(tmp_path, labels)
    split(tmp_path)
    shown = capsys.readouterr().out.split("Wrote")[0].split("The 20 smallest of 101 classes; the tables below ")[1]
    _, _, *lines = shown.splitlines()
    assert [line.split() for line in lines] == [[f"c{number:03d}", "1", "1"] for number in range(0, 100, 5)]
