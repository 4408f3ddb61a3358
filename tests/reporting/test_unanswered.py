"""What the report and the model card say about unanswered photos, from metrics.json to a whole run."""

import dataclasses
import json
import re
import shutil

import keras
import numpy as np
import pandas as pd
import pytest
from evaluations import multi_label, single_label, with_answers
from exported_runs import CLASSES, build_colour_model

import test as evaluation
from configs import Configs
from finetune.evaluation.abstention import Abstention
from finetune.reporting import data_uris, report
from finetune.reporting.unanswered import describe_unanswered, summarize_rule

RULE = Abstention(0.05, [0.8], 0.01, -1.0, [0.0, 1.0, 0.0, 1.0], images=200, unknown=2, unsure=90)


def plain(text):
    return text.replace("\u00a0", " ")


def read_facts(results):
    return {
        fact["title"]: (plain(fact["value"]), plain(fact["note"])) for fact in describe_unanswered(results)["facts"]
    }


def test_a_kept_promise_is_beside_what_was_measured():
    results = with_answers(single_label(), RULE)
    facts = read_facts(results)
    assert facts["Answered"] == ("50.0 %", "8 of 16 test images; 6 unsure; 2 unknown")
    assert facts["Wrong answers"] == ("12.5 %", "1 of 8 answered images; 95 % interval 0.3 % to 52.7 %")
    assert facts["Promised"][0] == "at most 5.0 %"
    assert facts["Promised"][1].endswith("with 95 % assurance; fitted on 200 validation images")
    assert facts["Unknown"] == ("2 of 16", "of the validation images, 1.0 % may be called unknown")
    found = describe_unanswered(results)
    assert found["warnings"] == []
    assert "another camera" in found["not_covered"]
    rows = [[plain(text) for text in row.values()] for row in found["promises"]]
    assert rows == [
        ["1 %", "", "", "", ""],
        ["2 %", "", "", "", ""],
        ["5 %", "50.0 %", "8 of 16", "12.5 %", "0.3 % to 52.7 %"],
        ["10 %", "87.5 %", "14 of 16", "7.1 %", "0.2 % to 33.9 %"],
    ]


def test_without_max_error_nothing_is_promised_and_without_a_measurement_there_is_no_section():
    facts = read_facts(with_answers(single_label(), Abstention()))
    assert [*facts] == ["Answered", "Wrong answers"]
    assert [*read_facts(with_answers(single_label(), None))] == ["Answered", "Wrong answers"]
    # Of an older version.
    assert describe_unanswered(single_label()) is None


def test_a_promise_that_cannot_be_made_has_the_reason():
    results = with_answers(single_label(), dataclasses.replace(RULE, thresholds=[None]), answered=False)
    results["sets"]["test"]["shortage"] = "too few images."
    facts = read_facts(results)
    assert facts["Promised"] == ("nothing", "at most 5.0 % wrong cannot be promised: too few images.")
    assert facts["Answered"][0] == "0.0 %"
    assert facts["Wrong answers"][0] == "none"


def test_labels_that_are_never_given_are_named():
    rule = dataclasses.replace(RULE, thresholds=[None, 0.7, None])
    results = with_answers(multi_label(), rule, promises=False)
    facts = read_facts(results)
    assert "of the photos given a label lack it" in facts["Promised"][1]
    assert facts["Promised"][1].endswith("Never given, because nothing can be promised: cat, owl")
    assert "1 of 8 labels given" in facts["Wrong answers"][1]
    found = describe_unanswered(results)
    assert found["promises"] == []
    assert "Without a validation set" in found["warnings"][-1]
    row = describe_unanswered(with_answers(multi_label(), rule))["promises"][2]
    assert [plain(text) for text in row.values()] == ["5 %", "8", "", "12.5 %", "0.3 % to 52.7 %"]


def test_a_broken_promise_strange_images_and_groups_are_warned_of():
    results = with_answers(single_label(), RULE)
    test = results["sets"]["test"]
    test["answers"] |= {"images": 100, "unknown": 40, "unsure": 45, "error_interval": [0.06, 0.3]}
    test["groups"] = 12
    excess, broken, groups = describe_unanswered(results)["warnings"]
    assert excess.startswith("40 of 100 images are unknown, 40.0% instead of 1.0%")
    assert "does not cover" in excess
    assert "More answers are wrong than promised" in broken
    assert "intervals are too narrow" in groups
    test["answers"]["unknown"] = None
    assert read_facts(results)["Unknown"][0] == "not counted"


def test_the_card_has_a_paragraph_if_a_rule_is_fitted():
    results = with_answers(single_label(), RULE)
    text = plain(summarize_rule(results, results["decision"]))
    for words in ("at most 5.0 % of the answered", "50.0 % of the images are answered", "12.5 % (0.3 % to 52.7 %)"):
        assert words in text
    assert "2 of 16 images are unknown" in text
    assert "another camera" in text
    nothing = with_answers(single_label(), dataclasses.replace(RULE, thresholds=[None]), answered=False)
    text = plain(summarize_rule(nothing, nothing["decision"]))
    assert "5.0 % could not be promised, so no photo is answered" in text
    assert "0.0 % of the images are answered;" in text
    # Not tested with this decision, or no rule.
    assert "On the test set" not in summarize_rule(None, results["decision"])
    for rule in (Abstention(), None):
        results = with_answers(single_label(), rule)
        assert summarize_rule(results, results["decision"]) == ""
    assert summarize_rule(None, None) == ""


# Whole runs


def build_model_with_parts(activation="softmax"):
    """Builds the colour model in the parts that a model of this collection has; its features are the mean colours."""
    pixels, image = keras.Input((32, 32, 3)), keras.Input((32, 32, 3))
    backbone = keras.Model(pixels, keras.layers.AveragePooling2D(8)(pixels), name="backbone")
    dense = keras.layers.Dense(3, name="logits")
    layers = [keras.layers.GlobalAveragePooling2D(name="pooling"), dense]
    head = keras.Sequential([*layers, keras.layers.Activation(activation, name="probabilities")], name="classifier")
    model = keras.Model(image, head(backbone(image)))
    several = activation == "sigmoid"
    dense.set_weights([np.eye(3, dtype=np.float32)[::-1] / 16, np.full(3, -7.0 if several else 0, np.float32)])
    return model


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Leaves the figures out: drawing them takes seconds."""
    empty = {"light": "data:,", "dark": "data:,", "description": "d", "width": 9, "height": 9, "is_wide": False}
    monkeypatch.setattr(data_uris, "_embed_figure", lambda *_: empty)
    monkeypatch.setattr(report, "save_figures", lambda *_: [])


def run_test(photo_folder, tmp_path, model, tables=("train", "validation", "test"), several=False):
    """Tests a model on 18, 9 and 9 photos; returns the results and the folder of the run."""
    folder = tmp_path / "run"
    folder.mkdir()
    model.save(folder / "best_model.keras")
    stored = {"classes": CLASSES, "image_target_size": [32, 32, 3], "multi_label_classification": several}
    rows = [(f"{path.parent.name}/{path.name}", path.parent.name) for path in sorted(photo_folder.rglob("*.jpg"))]
    shutil.copytree(photo_folder, tmp_path / "photos")
    stored |= {"image_directory": str(tmp_path / "photos"), "verify_data": "off", "train_csv": ""}
    for name, part in {"train": rows[::2], "validation": rows[1::4], "test": rows[3::4]}.items():
        if name in tables:
            stored[f"{name}_csv"] = str(tmp_path / f"{name}.csv")
            pd.DataFrame(part, columns=["path", "class"]).to_csv(stored[f"{name}_csv"], index=False)
    (folder / "configs.json").write_text(json.dumps(stored))
    return evaluation.main(Configs(load_model_path=str(folder), unknown_rate=0.2)), folder


def test_a_tested_run_shows_nearest_photos_and_predict_pys_answers(photo_folder, tmp_path):
    results, folder = run_test(photo_folder, tmp_path, build_model_with_parts())
    test, page = results["sets"]["test"], (folder / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert test["answers"]["error"] == 0
    # Nine validation photos are too few.
    assert [row["error"] for row in test["promises"]] == [None] * 4
    for words in ("When the model does not answer", "nothing is answered", "another camera", "Least like the training"):
        assert words in page
    # Nine photos in each of two galleries.
    photos = re.findall(r'alt="Training photo ([^"]*)"', page)
    assert len(photos) == 2 * 9 * 3
    trained = {str(tmp_path / "photos" / name) for name in pd.read_csv(tmp_path / "train.csv")["path"]}
    assert {*photos} <= trained
    table = pd.read_csv(folder / "evaluation" / "predictions.csv", keep_default_na=False)
    assert [*table][:6] == ["path", "true", "predicted", "answer", "reason", "similarity"]
    assert (table["answer"] == "unknown").sum() == test["answers"]["unknown"]
    assert (table["answer"].isin(["unknown"]) | (table["answer"] == table["predicted"])).all()
    # Photos of one colour each, whose features are these.
    assert table["similarity"].between(0.99, 1.001).all()
    assert "are called unknown" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_training_photos_that_are_gone_are_left_out(photo_folder, tmp_path, monkeypatch):
    encode, gone = report.build_finder, []

    def remove_photos(nearest, configs):
        gone.extend(sorted({one.path for row in nearest for one in row})[::2])
        for path in gone:
            (tmp_path / path).unlink()
        return encode(nearest, configs)

    monkeypatch.setattr(report, "build_finder", remove_photos)
    _, folder = run_test(photo_folder, tmp_path, build_model_with_parts())
    page = (folder / "evaluation" / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r'alt="Training photo ([^"]*)"', page)
    assert shown
    assert gone
    assert not {*shown} & {*gone}


@pytest.mark.parametrize(
    ("model", "tables", "several"),
    [
        (build_model_with_parts, ("validation", "test"), False),
        (build_model_with_parts, ("test",), False),
        (build_colour_model, ("train", "validation", "test"), False),
        (lambda: build_model_with_parts("sigmoid"), ("train", "validation", "test"), True),
    ],
    ids=["no training set", "no validation set", "foreign model", "several labels"],
)
def test_runs_without_a_reference_or_a_validation_set_have_the_parts_that_they_can(
    photo_folder, tmp_path, model, tables, several
):
    results, folder = run_test(photo_folder, tmp_path, model(), tables, several)
    page = (folder / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "When the model does not answer" in page
    assert ("Training photo" in page) == ("Least like the training" in page) == several
    assert (
        ("promises" in results["sets"]["test"]) == ("Without a validation set" not in page) == ("validation" in tables)
    )
    table = pd.read_csv(folder / "evaluation" / "predictions.csv")
    assert table["similarity"].notna().all() == several
    assert len(table) == results["sets"]["test"]["answers"]["images"] == 9
    assert (folder / "reference.npz").exists() == several
