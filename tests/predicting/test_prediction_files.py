"""Lists of images, and the table of answers."""

import glob
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from finetune.core.files import write_csv
from finetune.core.options import UserError
from finetune.evaluation.decision import Decision
from finetune.predicting.prediction_files import (
    explain_errors,
    find_top_classes,
    list_inputs,
    make_table,
    match_pattern,
)


def test_hidden_and_other_files_of_a_folder_are_left_out(photo_folder, tmp_path, capsys):
    photo = (photo_folder / "red" / "00.jpg").read_bytes()
    for name in ("b.JPG", "a/z.png", ".hidden.jpg", ".cache/c.jpg", "notes.txt"):
        path = tmp_path / "mixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo)
    names, _ = list_inputs(str(tmp_path / "mixed"))
    assert names == [str(tmp_path / "mixed" / name) for name in ("a/z.png", "b.JPG")]
    assert "Left out 1 file without" in capsys.readouterr().out


@pytest.mark.parametrize(("pattern", "number"), [("*/00.jpg", 3), ("**/0?.jpg", 30), ("red/*", 12), ("**", 36)])
def test_pattern_gives_sorted_files(photo_folder, pattern, number):
    names, paths = list_inputs(str(photo_folder / pattern))
    assert names == paths == sorted(names)
    assert len(names) == number


@pytest.mark.parametrize("pattern", ["**/*.jpg", "p*/**/?.jpg", "photos/**", "**/b/**/*.jpg", "./**/b/*", "**/.h.jpg"])
def test_pattern_names_what_glob_does(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    for name in ("1.jpg", "photos/2.jpg", "photos/b/3.jpg", "photos/b/c/4.jpg", "photos/.h.jpg", "photos/.d/5.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    expected = {path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    assert expected
    assert {path for path in match_pattern(pattern) if os.path.isfile(path)} == expected


@pytest.mark.parametrize("given", ["photos", "photos/**/*.jpg", "photos/**"])
def test_linked_folders_are_read_without_end_and_broken_links_get_a_row(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a/1.jpg", "far/2.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    links = {"far": "../far", "self": ".", "a/up": "..", "../far/back": "../photos", "gone.jpg": "none", "old": "none"}
    for name, target in links.items():
        Path("photos", name).symlink_to(target)
    found = list_inputs(given)[0]
    assert found == ["photos/a/1.jpg", "photos/far/2.jpg"] + ["photos/gone.jpg"] * (given == "photos")
    assert ("unreadable folders (1)" in capsys.readouterr().out) == (given == "photos")


def test_errors_name_the_file_that_is_meant(tmp_path):
    (tmp_path / "1.jpg").write_text("no image")
    paths = [str(tmp_path / name) for name in ("1", "1.jpg", "2.jpg")]
    explained = explain_errors(dict.fromkeys((0, 1, 2), "Not read."), paths)
    assert explained[0].startswith("Not read. ")
    assert paths[1] in explained[0]
    assert (explained[1], explained[2]) == ("Not read.", "Not read.")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "input: expected an image"),
        ("missing.jpg", "input: .*missing.jpg"),
        ("missing.csv", "input: .*missing.csv"),
        ("*.tiff", "input: .*tiff"),
        ("empty", "input: .*empty"),
        ("other.csv", "has no column 'path'"),
        ("header.csv", "has no rows"),
        ("blank.csv", "row 2: the column 'path' is empty"),
    ],
)
def test_input_that_lists_nothing_is_a_users_mistake(tmp_path, given, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("file\na.jpg\n")
    (tmp_path / "header.csv").write_text("path\n")
    (tmp_path / "blank.csv").write_text("path,note\n,x\n")
    with pytest.raises(UserError, match=message):
        list_inputs(given and str(tmp_path / given))


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are bytes")
def test_file_name_that_is_no_text_is_named(photo_folder, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(path)).write_bytes((photo_folder / "red" / "00.jpg").read_bytes())
    for given in (str(tmp_path), str(tmp_path / "*"), os.fsdecode(path)):
        with pytest.raises(UserError, match="is not UTF-8"):
            list_inputs(given)


def test_awkward_names_come_back_from_the_csv(tmp_path):
    class_names = ["path", 'a "quoted", one', "=1+1", "error", "1"]
    raw = np.eye(5, dtype=np.float32)[[1, 2, 0]] * 0.6 + 0.08
    table = make_table(["@x,y.jpg", "-z.jpg", "b"], raw, {2: "broken"}, Decision(class_names, False), top_k=1)
    assert table.columns.is_unique
    write_csv(str(tmp_path / "table.csv"), table)
    back = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    assert back["path"].tolist() == ["@x,y.jpg", "-z.jpg", "b"]
    assert back["predicted"].tolist() == back["top_1"].tolist() == ['a "quoted", one', "=1+1", ""]
    assert back["probability_=1+1"].tolist() == ["0.08", "0.68", ""]
    assert back["error"].tolist() == ["", "", "broken"]
    # The caller's array is left as it was.
    assert np.isfinite(raw).all()


def test_top_classes_of_many_rows_are_those_of_a_full_sort():
    rng = np.random.default_rng(0)
    probabilities = rng.random((20_001, 4)).astype(np.float32)
    found = find_top_classes(probabilities, 2)
    for row, chosen in zip(itertools.islice(probabilities.tolist(), 0, None, 997), found[::997], strict=True):
        assert chosen.tolist() == sorted(range(4), key=lambda position: -row[position])[:2]
    assert found.shape == (20_001, 2)
