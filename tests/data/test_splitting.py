"""A table is divided into sets: groups and copies stay together, and bad images are left out where they may."""

import csv
import io
import itertools
import os

import numpy as np
import pandas as pd
import pytest
from checked_tables import write_photo
from corpus import encode, photo
from PIL import Image

import split_train_test
from finetune.core.options import UserError
from finetune.data.splitting import SET_FILES, format_class_counts, warn_of_missing_classes


def split(folder, rows, header=("path", "class", "patient"), **options):
    with open(folder / "all.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    counts = split_train_test.main(
        split_train_test.SplitConfigs(csv_path=str(folder / "all.csv"), **options).validate()
    )
    sets = {}
    for name, file_name in SET_FILES.items():
        if (folder / file_name).exists():
            sets[name] = list(csv.DictReader(io.StringIO((folder / file_name).read_text("utf-8"))))
    return counts, sets


@pytest.mark.parametrize("seed", range(3))
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
    options = {"multi_label_classification": multi_label, "shuffle": shuffle, "random_seed": seed}
    counts, sets = split(tmp_path, rows, group_column="patient", validation_split_fraction=0.2, **options)
    patients = {name: {row["patient"] for row in found} for name, found in sets.items()}
    assert all(not one & other for one, other in itertools.combinations(patients.values(), 2))
    assert sorted(row["path"] for found in sets.values() for row in found) == sorted(row[0] for row in rows)
    for name, share in (("training", 0.6), ("validation", 0.2), ("testing", 0.2)):
        for label in "abc":
            total = sum(by_class[label] for by_class in counts.values())
            assert abs(counts[name][label] - share * total) <= max(0.05 * total, 3), (name, label)


def test_same_seed_gives_the_same_groups(tmp_path):
    rows = [(f"{number}.jpg", "ab"[number % 2], f"p{number // 3}") for number in range(90)]
    splits = [split(tmp_path, rows, group_column="patient", random_seed=seed)[1] for seed in (1, 1, 2)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_rare_class_of_two_groups_reaches_both_sets(tmp_path):
    rows = [(f"{number}.jpg", "a", f"p{number // 2}") for number in range(100)]
    rows += [("x.jpg", "rare", "q1"), ("y.jpg", "rare", "q2")]
    counts, _ = split(tmp_path, rows, group_column="patient")
    assert (counts["training"]["rare"], counts["testing"]["rare"]) == (1, 1)


def test_groups_that_prevent_the_fraction_are_told(tmp_path, capsys):
    rows = [(f"{number}.jpg", "a", f"p{number // 5}") for number in range(10)]
    counts, _ = split(tmp_path, rows, group_column="patient")
    assert counts == {"training": {"a": 5}, "testing": {"a": 5}}
    assert "the testing set has 50.0% of the images, not 20.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "rows", "message"),
    [
        ("video", [("a.jpg", "a", "1")], "has no column 'video'.*patient"),
        ("patient", [("a.jpg", "a", "1"), ("b.jpg", "a", " ")], "row 3: the column 'patient' is empty"),
    ],
)
def test_unusable_group_column_is_named(tmp_path, column, rows, message):
    with pytest.raises(UserError, match=message):
        split(tmp_path, rows, group_column=column)


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"verify_data": "full"}])
def test_copies_stay_in_one_set_with_their_original(tmp_path, capsys, options):
    rows = write_copies(tmp_path)
    _, sets = split(tmp_path, rows, ("path", "class"), **options)
    for found in sets.values():
        names = [os.path.basename(row["path"]) for row in found]
        assert {name.removeprefix("copy_") for name in names} == {name for name in names if "copy_" not in name}
        groups = {row["path"].replace("copy_", ""): row["group"] for row in found}
        assert all(row["group"] == groups[row["path"].replace("copy_", "")] for row in found)
        assert len(set(groups.values())) == len(groups)
    assert "24 of 24 images, in 12 groups of up to 2" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["off", "headers"])
def test_copies_are_not_looked_for_where_that_is_turned_off(tmp_path, capsys, mode):
    _, sets = split(tmp_path, write_copies(tmp_path), ("path", "class"), verify_data=mode)
    assert "group" not in sets["training"][0]
    assert "Copies" not in capsys.readouterr().out


def write_copies(folder):
    """Writes 12 photos, and a smaller copy of each; returns their rows."""
    rows = []
    for number in range(12):
        path = write_photo(folder / f"{number}.jpg", number, quality=90)
        Image.open(path).resize((120, 90)).save(folder / f"copy_{number}.jpg")
        rows += [(path, "ab"[number % 2]), (str(folder / f"copy_{number}.jpg"), "ab"[number % 2])]
    return rows


def test_groups_of_a_column_and_of_copies_are_joined_and_named_by_the_column(tmp_path):
    rows = [(path, label, f"p{number // 4}") for number, (path, label) in enumerate(write_copies(tmp_path))]
    # The copy of photo 0, of patient p0, is said to be of patient p5.
    rows[1] = (*rows[1][:2], "p5")
    _, sets = split(tmp_path, rows, group_column="patient")
    groups = {os.path.basename(row["path"]): row["group"] for found in sets.values() for row in found}
    assert {groups[name] for name in ("0.jpg", "copy_0.jpg", "1.jpg", "10.jpg", "11.jpg")} == {"p0"}
    assert {groups[name] for name in ("2.jpg", "copy_3.jpg")} == {"p1"}


def test_labels_in_a_column_group_stay_as_they_are(tmp_path):
    rows = write_copies(tmp_path)
    counts, sets = split(tmp_path, rows, ("path", "group"), csv_label_column="group")
    assert {row["path"]: row["group"] for found in sets.values() for row in found} == dict(rows)
    assert sum(counts["training"].values()) + sum(counts["testing"].values()) == 24


def test_column_group_of_the_table_is_kept_together_and_may_have_empty_cells(tmp_path):
    rows = [(f"{number}.jpg", "a", f"g{number // 4}" * (number < 20)) for number in range(60)]
    _, sets = split(tmp_path, rows, ("path", "class", "group"))
    in_sets = [{row["group"] for row in found} - {""} for found in sets.values()]
    assert not in_sets[0] & in_sets[1]
    assert {row["path"]: row["group"] for found in sets.values() for row in found} == {row[0]: row[2] for row in rows}


def test_splitting_verifies_what_is_in_a_store(tmp_path, store):
    rows = [(f"./{number}.jpg", "ab"[number % 2]) for number in range(10)]
    for number in range(10):
        store.put(f"memory://bucket/photos/{number}.jpg", encode("JPEG", photo(number // 2 * 2)))
    with pytest.raises(UserError, match=r"duplicate with other label \(5\)"):
        split(tmp_path, rows, ("path", "class"), verify=True, image_directory="memory://bucket/photos")
    for number in range(9):
        store.put(f"memory://bucket/photos/{number}.jpg", encode("JPEG", photo(number // 4 * 4 + number % 2)))
    store.remove("memory://bucket/photos/9.jpg")
    options = {"verify": True, "image_directory": "memory://bucket/photos/", "skip_bad_images": True}
    _, sets = split(tmp_path, rows, ("path", "class"), **options)
    numbers = [{int(row["path"].strip("./jpg")) for row in found} for found in sets.values()]
    assert set.union(*numbers) == set(range(9))
    for copies in ({0, 2}, {1, 3}, {4, 6}, {5, 7}):
        assert any(copies <= found for found in numbers)


def test_splitting_leaves_out_images_of_two_labels_where_it_may(tmp_path, capsys):
    rows = [(write_photo(tmp_path / f"{number}.jpg", number), "ab"[number % 2]) for number in range(10)]
    rows.append((write_photo(tmp_path / "copy.jpg", 4), "b"))
    with pytest.raises(UserError, match=r"duplicate with other label \(1\).*--skip_bad_images True"):
        split(tmp_path, rows, ("path", "class"), verify=True)
    _, sets = split(tmp_path, rows, ("path", "class"), verify=True, skip_bad_images=True)
    names = {os.path.basename(row["path"]) for found in sets.values() for row in found}
    assert names == {f"{number}.jpg" for number in range(10) if number != 4}
    assert "Left out 2 rows whose images have two labels" in capsys.readouterr().out


def test_splitting_leaves_out_bad_images_where_it_may(tmp_path):
    rows = [(write_photo(tmp_path / f"{number}.jpg", number), "ab"[number % 2]) for number in range(10)]
    rows.append((str(tmp_path / "missing.jpg"), "a"))
    with pytest.raises(UserError, match=r"missing \(1\)"):
        split(tmp_path, rows, ("path", "class"), verify=True)
    assert not (tmp_path / "training_set.csv").exists()
    _, sets = split(tmp_path, rows, ("path", "class"), verify=True, skip_bad_images=True)
    assert sum(map(len, sets.values())) == 10


def test_of_many_classes_the_smallest_are_shown(capsys):
    counts = {f"c{number:03d}": 1000 - number for number in range(101)} | {"none": 0}
    lines = format_class_counts(counts).splitlines()
    assert lines[0].startswith("The 20 smallest of 102 classes")
    assert lines[1] == "none: no images, so it is not in the table"
    assert lines[2:] == [f"c{number:03d}: {1000 - number} images" for number in range(100, 81, -1)]
    few = {"owl": 3, "cat": 0}
    assert format_class_counts(few) == "owl: 3 images\ncat: no images, so it is not in the table"


def test_many_classes_that_a_set_lacks_take_one_line(capsys):
    names = [f"c{number:02d}" for number in range(30)]
    counts = pd.DataFrame({"training": 1, "validation": 0, "testing": [0] * 3 + [1] * 27}, index=names)
    warn_of_missing_classes(counts)
    assert capsys.readouterr().out.splitlines() == [
        "Warning: the validation set has none of 30 small classes: c00, c01, c02, c03, c04 and 25 more.",
        "Warning: the testing set has none of 3 small classes: c00, c01, c02.",
    ]
    warn_of_missing_classes(counts[:1])
    assert capsys.readouterr().out.splitlines() == [
        "Warning: c00 has 1 image, so the validation set has none of it.",
        "Warning: c00 has 1 image, so the testing set has none of it.",
    ]
