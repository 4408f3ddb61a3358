"""Labels that look the same are read as one, and one line says so."""

import os
import unicodedata

import numpy as np
import pandas as pd
import pytest
from checked_tables import write_photo
from tiny_models import write_table

import make_csv_from_folders
from configs import Configs
from finetune.core.files import write_json
from finetune.core.labels import clean_label
from finetune.core.options import UserError
from finetune.data.data_check import check_data
from finetune.data.label_tables import apply_corrections
from finetune.data.splitting import read_rows
from finetune.data.tables import encode_labels, find_class_names, make_image_table, read_table, resolve_class_names
from finetune.evaluation.decision import Decision, read_decision, write_decision
from finetune.models.description import describe_model

ZERO_WIDTH = "ant\u200b"
NFC, NFD = "caf\u00e9", "cafe\u0301"
TAGS = {"multi_label_classification": True, "label_separator": " "}


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        (ZERO_WIDTH, "ant"),
        ("\ufeffa\u00adnt", "ant"),
        ("\u200eant\u202c\u2060\u200d\ufe0f", "ant"),
        (NFD, NFC),
        ("e\u200b\u0301", "\u00e9"),
        ("\u1100\u1161", "\uac00"),
        ("Auf\u200clage", "Auflage"),
        # Reh never joins the next letter.
        ("\u06a9\u0627\u0631\u200c\u062e\u0627\u0646\u0647", "\u06a9\u0627\u0631\u062e\u0627\u0646\u0647"),
        ("\U0001f41d\ufe0f", "\U0001f41d"),
        ("\u2764\ufe0f", "\u2764"),
        ("\u200b\u2060", ""),
    ],
)
def test_spellings_that_look_the_same_become_one(written, plain):
    assert clean_label(written) == plain == clean_label(plain)


@pytest.mark.parametrize(
    "label",
    [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian: yeh would join khah.
        "\u0915\u094d\u200d\u0937",  # Devanagari: a half form in place of a ligature.
        "\u0915\u094d\u200c\u0937",
        "\u0dc1\u0dca\u200d\u0dbb\u0dd3",  # Sinhala
        "\u09b0\u200d\u09cd\u09af",  # Bengali
        "\U0001f469\U0001f3fd\u200d\U0001f52c",  # A scientist, of four code points.
        "\U0001f3f3\u200d\U0001f308",
        "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # The flag of Scotland.
        "\u845b\U000e0100",  # Another form of a Han character.
        " ant\t",
        "蚂蚁 🐝",
    ],
)
def test_characters_that_a_script_or_an_emoji_needs_are_kept(label):
    assert clean_label(label) == label


def test_a_table_merges_labels_and_says_so_once(tmp_path, capsys):
    path = write_table(tmp_path, f"path,class\na.jpg,ant\nb.jpg,{ZERO_WIDTH}\nc.jpg,{ZERO_WIDTH}\nd.jpg,{NFD}\n")
    for _ in range(2):
        assert read_table(path, "class")["class"].tolist() == ["ant", "ant", "ant", NFC]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    for words in (path, r"'ant\u200b' (2 images) as 'ant'", r"'cafe\u0301' (1 image) as 'café'"):
        assert words in lines[0]


def test_several_labels_are_merged_each_by_itself(tmp_path, capsys):
    path = write_table(tmp_path, f"path,class\na.jpg,{ZERO_WIDTH}$bee\nb.jpg,ant$bee\nc.jpg,bee\n")
    assert find_class_names(read_table(path, "class", True)["class"], True) == ["ant", "bee"]
    assert r"'ant\u200b' (1 image) as 'ant'" in capsys.readouterr().out


def test_an_invisible_label_is_empty_and_paths_keep_their_spelling(tmp_path):
    with pytest.raises(UserError, match="row 3: the column 'class' is empty"):
        read_table(write_table(tmp_path, "path,class\na.jpg,ant\nb.jpg,\u200b\n"), "class")
    path = write_table(tmp_path, f"path,class\n{NFD}.jpg,ant\na\u200b.jpg,bee\n")
    for column in ("class", "path"):
        assert read_table(path, column)["path"].tolist() == [f"{NFD}.jpg", "a\u200b.jpg"]


def test_given_and_stored_classes_are_compared_as_labels_are(tmp_path):
    path = write_table(tmp_path, f"path,class\na.jpg,ant\nb.jpg,{NFC}\n")
    assert resolve_class_names([NFD, ZERO_WIDTH], path, "class", False) == [NFC, "ant"]
    with pytest.raises(UserError, match="classes: .*look like 'ant'"):
        resolve_class_names(["ant", ZERO_WIDTH, NFC], path, "class", False)
    # A run of an older version has the names as its table spelt them.
    assert encode_labels([NFC, "ant"], [ZERO_WIDTH, NFD], False, path).tolist() == [1, 0]
    with pytest.raises(UserError, match=r"'ant', 'ant\\u200b'.*look the same"):
        encode_labels(["ant"], ["ant", ZERO_WIDTH], False, path)


def test_a_run_of_an_older_version_accepts_either_spelling(tmp_path):
    write_json(str(tmp_path / "configs.json"), Configs(classes=["ant", NFD]).validate().to_dict())
    given = Configs(classes=["ant", NFC]).validate()
    given.given = frozenset({"classes"})
    assert describe_model(given, str(tmp_path / "best_model.keras")).classes == ["ant", NFD]
    write_decision(str(tmp_path), Decision(["ant", NFD], False, temperature=2.0, temperature_fitted_on="validation"))
    assert read_decision(str(tmp_path), ["ant", NFC], False, "best_model.keras").temperature == 2.0


def test_the_test_set_may_spell_a_class_differently(tmp_path):
    tables = []
    for name, label in (("training", NFC), ("test", NFD)):
        (tmp_path / name).mkdir()
        path = write_table(tmp_path / name, f"path,class\na.jpg,ant\nb.jpg,{label}\n")
        tables.append(make_image_table(name, path, read_table(path, "class"), "class", str(tmp_path)))
    assert "unknown_class" not in {finding.kind for finding in check_data(tables, Configs(), False).findings}


def make_csv(tmp_path, photos=(), **options):
    """Writes photos into a folder, and makes a table of them; returns the counts."""
    for seed, name in enumerate(photos):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        write_photo(tmp_path / "images" / name, seed)
    values = {"folder_path": str(tmp_path / "images"), "write_path": str(tmp_path / "all.csv")} | options
    return make_csv_from_folders.main(make_csv_from_folders.FolderConfigs(**values))


def test_class_folders_that_look_the_same_are_one_class(tmp_path, capsys):
    photos = [f"{name}/{seed}.jpg" for seed, name in enumerate(["ant", ZERO_WIDTH, NFC, NFD])]
    assert make_csv(tmp_path, photos) == {"ant": 2, NFC: 2}
    assert sum("as 'ant'" in line for line in capsys.readouterr().out.splitlines()) == 1
    assert all(os.path.isfile(path) for path in pd.read_csv(tmp_path / "all.csv")["path"])
    (tmp_path / "images" / "\u200b").mkdir()
    with pytest.raises(UserError, match=r"folder name '\\u200b'"):
        make_csv(tmp_path)


def test_set_folders_count_a_class_once(tmp_path):
    photos = ["train/ant/0.jpg", "train/bee/1.jpg", f"test/{ZERO_WIDTH}/2.jpg", "test/bee/3.jpg"]
    assert make_csv(tmp_path, photos) == {"training": {"ant": 1, "bee": 1}, "testing": {"ant": 1, "bee": 1}}


@pytest.mark.parametrize(
    ("content", "options", "counts"),
    [
        (f"id,class\n0,ant\n1,{ZERO_WIDTH}\n2,bee\n", {}, {"ant": 2, "bee": 1}),
        (f"id,ant,{ZERO_WIDTH},bee\n0,1,0,0\n1,0,1,0\n2,0,0,1\n", {}, {"ant": 2, "bee": 1}),
        (
            f"id,ant,{ZERO_WIDTH},bee\n0,1,1,0\n1,0,1,1\n2,0,0,1\n",
            {"multi_label_classification": True},
            {"ant": 2, "bee": 2},
        ),
        (f"id,tags\n0,ant {ZERO_WIDTH}\n1,bee\n2,{ZERO_WIDTH} bee\n", TAGS, {"ant": 2, "bee": 2}),
    ],
)
def test_tables_of_labels_merge_values_and_columns(tmp_path, capsys, content, options, counts):
    options = options | {"table_path": write_table(tmp_path, content)}
    assert make_csv(tmp_path, ["0.jpg", "1.jpg", "2.jpg"], **options) == counts
    assert r"'ant\u200b' (" in capsys.readouterr().out


def test_ids_name_files_with_other_encodings_of_accents(tmp_path):
    table_path = write_table(tmp_path, f"id,class\n{NFC},ant\nb,bee\n")
    make_csv(tmp_path, [f"{NFD}.jpg", "b.jpg"], table_path=table_path)
    assert all(map(os.path.isfile, pd.read_csv(tmp_path / "all.csv")["path"]))


def test_corrections_of_an_older_page_fit(tmp_path):
    path = write_table(tmp_path, f"path,class\na.jpg,{ZERO_WIDTH}\nb.jpg,bee\nc.jpg,{NFC}\n")
    (tmp_path / "corrections.csv").write_text(
        f"row,path,given_label,mark,corrected_label\n2,a.jpg,{ZERO_WIDTH},wrong,{NFD}\n", "utf-8"
    )
    apply_corrections(path, str(tmp_path / "corrections.csv"), str(tmp_path / "new.csv"), "class", False)
    assert pd.read_csv(tmp_path / "new.csv")["class"].tolist() == [NFC, "bee", NFC]


def test_spellings_of_a_group_are_one_group(tmp_path):
    path = write_table(tmp_path, f"path,class,site\na.jpg,ant,{NFC}\nb.jpg,ant,x\nc.jpg,bee,{NFD}\n")
    _, groups = read_rows(path, "site", "off", Configs().validate(), print)
    assert groups[0] == groups[2] != groups[1]


@pytest.mark.parametrize("header", ["path\u200b,class", f"path,{NFD}"])
def test_a_column_that_looks_like_the_missing_one_is_named(tmp_path, header):
    label_column = NFC if NFD in header else "class"
    wanted = "path" if "\u200b" in header else NFC
    with pytest.raises(UserError, match=f"accents encoded otherwise: write {wanted}"):
        read_table(write_table(tmp_path, f"{header}\na.jpg,ant\n"), label_column)


def test_cleaning_is_idempotent():
    rng = np.random.default_rng(0)
    characters = list("a é\u0301\u200c\u200d\u200b\ufe0f\ufe00\u2764\U0001f469\U0001f3fd\u0645\u06cc\u0631")
    characters += "\u0915\u094d\u845b\U000e0100\U000e0067\u1820\u180b\uac00\u1100$"
    for _ in range(1000):
        text = clean_label("".join(rng.choice(characters, 6)))
        assert clean_label(text) == text == unicodedata.normalize("NFC", text)
