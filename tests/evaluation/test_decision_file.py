"""Writing, reading and checking decision.json."""

import json

import numpy as np
import pytest
from random_answers import NAMES

from finetune.core.options import UserError
from finetune.evaluation.decision import Decision
from finetune.evaluation.decision_file import get_decision, read_decision, write_decision

DECISIONS = [
    Decision(NAMES, False, 1.25, "validation", model="best_model.keras"),
    Decision(
        NAMES, True, 0.7, "validation", 0.31, [0.1, float(np.float32(0.7)), 1.0], "validation", "best_model.keras"
    ),
    Decision(NAMES, True, thresholds_fitted_on="training", model="best_model.keras"),
]


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("model", ["best_model.keras", "best_model_compressed.h5", "best_model_compressed.json"])
def test_a_decision_survives_its_file(tmp_path, decision, model):
    assert write_decision(str(tmp_path), decision) == str(tmp_path / "decision.json")
    assert read_decision(str(tmp_path), NAMES, decision.multi_label, str(tmp_path / model)) == decision


def test_the_file_names_the_threshold_of_each_class(tmp_path):
    write_decision(str(tmp_path), DECISIONS[1])
    assert json.loads((tmp_path / "decision.json").read_text()) == {
        "classes": ["ant", "bee", "cow"],
        "multi_label": True,
        "temperature": 0.7,
        "temperature_fitted_on": "validation",
        "exact_match_threshold": 0.31,
        "best_f1_thresholds": {"ant": 0.1, "bee": float(np.float32(0.7)), "cow": 1.0},
        "thresholds_fitted_on": "validation",
        "model": "best_model.keras",
    }


def test_without_a_file_or_with_another_models_the_defaults_hold(tmp_path, capsys):
    assert read_decision(str(tmp_path), NAMES, True, "best_model.keras") == Decision(NAMES, True)
    assert capsys.readouterr().out == ""
    write_decision(str(tmp_path), DECISIONS[1])
    assert read_decision(str(tmp_path), NAMES, True, "latest_model.keras") == Decision(NAMES, True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert "fitted for best_model.keras" in printed[0]


def test_what_was_fitted_on_a_validation_set_stays_where_there_is_none(tmp_path, capsys):
    model, fitted = str(tmp_path / "best_model.keras"), DECISIONS[1]
    write_decision(str(tmp_path), fitted)
    truth, probabilities = {"test": np.eye(3)}, {"test": np.full((3, 3), 0.4)}
    found = get_decision(model, truth, probabilities, NAMES, True, (0.1, 0.9))
    assert found == fitted == read_decision(str(tmp_path), NAMES, True, model)
    assert "keeping the decision" in capsys.readouterr().out
    other = str(tmp_path / "latest_model.keras")
    assert get_decision(other, truth, probabilities, NAMES, True, (0.1, 0.9)).temperature == 1
    write_decision(str(tmp_path), DECISIONS[2])
    assert get_decision(model, truth, probabilities, NAMES, True, (0.1, 0.9)).thresholds_fitted_on is None


def test_a_file_that_was_edited_by_hand_may_use_whole_numbers_and_another_order(tmp_path):
    content = DECISIONS[1].to_dict() | {"temperature": 2, "best_f1_thresholds": {"cow": 1, "ant": 0, "bee": 0.5}}
    (tmp_path / "decision.json").write_text(json.dumps(content))
    decision = read_decision(str(tmp_path), NAMES, True, "best_model.keras")
    assert (decision.temperature, decision.best_f1_thresholds) == (2.0, [0, 0.5, 1])


THRESHOLDS = {"ant": 0.1, "bee": 0.2, "cow": 0.3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in ("1", True, 0, 1000, float("inf"), None)],
        *[("exact_match_threshold", value) for value in (1.01, -0.01, [0.5])],
        *[("best_f1_thresholds", value) for value in ([0.1, 0.2, 0.3], {"ant": 0.1, "bee": 0.2})],
        *[("best_f1_thresholds", THRESHOLDS | one) for one in ({"dog": 0.4}, {"cow": "0.3"}, {"cow": 2})],
        *[("temperature_fitted_on", "test"), ("thresholds_fitted_on", "test"), ("multi_label", False)],
        *[("classes", value) for value in ("ant", [], ["ant", "ant", "bee"], ["ant", 2, "cow"])],
        *[("model", value) for value in (None, "two\nlines.keras")],
        ("colour\n", "red"),
    ],
)
def test_a_wrong_field_is_one_line_that_names_it(tmp_path, field, value):
    content = DECISIONS[1].to_dict() | {field: value}
    (tmp_path / "decision.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=field.strip()) as caught:
        read_decision(str(tmp_path), NAMES, True, "best_model.keras")
    assert "\n" not in str(caught.value)
    assert "Received" in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("text", ["null", "\ud800", "{}", '{"classes": ' + "9" * 5000 + "}", " " * (2**22 + 1)])
def test_a_file_that_is_no_object_of_all_fields_is_one_line(tmp_path, text):
    (tmp_path / "decision.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="decision.json: expected") as caught:
        read_decision(str(tmp_path), NAMES, True, "best_model.keras")
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_a_users_mistake(tmp_path):
    (tmp_path / "decision.json").mkdir()
    with pytest.raises(UserError, match="Cannot read"):
        read_decision(str(tmp_path), NAMES, False, "best_model.keras")


@pytest.mark.parametrize("names", [["ant", "bee"], ["ant", "cow", "bee"], ["ant", "bee", "dog"]])
def test_a_decision_of_other_classes_is_an_error(tmp_path, names):
    write_decision(str(tmp_path), DECISIONS[1])
    with pytest.raises(UserError, match=f"{', '.join(names)} .*ant, bee, cow"):
        read_decision(str(tmp_path), names, True, "best_model.keras")
