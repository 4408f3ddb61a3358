"""Class names, image size and so on come from a model's files or from the user, never from a default."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from exported_runs import CLASSES, build_colour_model

import predict
from configs import Configs
from finetune.core.options import UserError
from finetune.data.stores import hash_file
from finetune.evaluation.decision import Decision, get_decision, read_decision, write_decision
from finetune.models.description import (
    add_description,
    embed_decision,
    find_description,
    hash_model,
    read_description,
)
from finetune.training.resuming import STATE_PARTS, read_state, save_checkpoint
from finetune.training.run_folder import locked
from finetune.training.trained_model import find_trained_model, keep_decision, name_model
from predict import PredictConfigs

OPTIONS = {"classes": CLASSES, "image_target_size": [32, 32, 3], "eval_image_size": [], "resize_mode": "crop"}
OPTIONS |= {"multi_label_classification": False}
NEEDED = ["--image_target_size", "32", "32", "3", "--resize_mode", "crop", "--multi_label_classification", "False"]
FITTED = Decision(CLASSES, False, 2.0, "validation", model="best_model.keras")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with a description and one without, to copy."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(
        build_colour_model(), str(folder / "described.keras"), None, OPTIONS | {"train_csv": "no part of it"}
    )
    build_colour_model().save(folder / "bare.keras")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder whose `data/training_set.csv` has three other classes than the model."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "training_set.csv").write_text("path,class\na,brick\nb,grass\nc,gravel\n")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model_path(project, saved):
    """A model with a description."""
    return shutil.copy(saved / "described.keras", str(project / "model" / "best_model.keras"))


@pytest.fixture
def bare(project, saved):
    """A model without a description."""
    return shutil.copy(saved / "bare.keras", str(project / "model" / "best_model.keras"))


def add_member(path, name, content):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)


def read_flags(*flags):
    return PredictConfigs.from_command_line(arguments=[*flags])


def test_a_keras_file_has_a_description_and_loads_without_this_project(model_path):
    assert read_description(model_path) == {"options": OPTIONS, "decision": None}
    images = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype(np.float32)
    before = build_colour_model()(images)
    assert embed_decision(model_path, FITTED.to_dict())
    loaded = keras.models.load_model(model_path, safe_mode=True)
    np.testing.assert_array_equal(loaded(images), before)


def test_a_decision_goes_into_the_file_and_leaves_the_rest(model_path):
    state = {"configs": {}, "given": []}
    add_member(model_path, "training_state.json", json.dumps(state))
    digest, of_all = hash_model(model_path), hash_file(model_path)
    with zipfile.ZipFile(model_path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != "description.json"}
    for temperature in (2.0, 3.0):
        decision = Decision(CLASSES, False, temperature, "validation").to_dict()
        embed_decision(model_path, decision)
        assert read_description(model_path) == {"options": OPTIONS, "decision": decision}
    with zipfile.ZipFile(model_path) as archive:
        assert len(archive.namelist()) == len(set(archive.namelist())) == len(members) + 1
        assert {name: archive.read(name) for name in members} == members
    assert hash_model(model_path) == digest
    assert hash_file(model_path) != of_all
    written = os.stat(model_path)
    embed_decision(model_path, decision)
    assert os.stat(model_path).st_ino == written.st_ino


def test_other_files_are_left_as_they_are(bare):
    before = Path(bare).read_bytes()
    assert not embed_decision(bare, FITTED.to_dict())
    keep_decision(bare, FITTED.to_dict(), os.path.dirname(bare))
    assert Path(bare).read_bytes() == before
    assert hash_model(bare) == hash_file(bare)
    assert os.listdir(os.path.dirname(bare)) == ["best_model.keras"]


def test_a_locked_model_keeps_its_decision(model_path, capsys):
    with locked(os.path.dirname(model_path)):
        keep_decision(model_path, FITTED.to_dict(), os.path.dirname(model_path))
    assert read_description(model_path)["decision"] is None
    assert "lacks its new decision, which is in decision.json: Another process" in capsys.readouterr().out
    keep_decision(model_path, FITTED.to_dict(), os.path.dirname(model_path))
    assert read_description(model_path)["decision"] == FITTED.to_dict()


def test_a_model_copied_elsewhere_answers_as_in_its_run(model_path, photo_folder, project, capsys):
    embed_decision(model_path, FITTED.to_dict())
    copy = shutil.copy(model_path, str(project / "data" / "mine.keras"))
    flags = ["--load_model_path", copy, "--input", str(photo_folder / "red"), "--write_path", "answers.csv"]
    answers = predict.main(read_flags(*flags))["predictions"]
    assert set(answers["predicted"]) == {"red"}
    assert list(answers.filter(like="probability_").columns) == [f"probability_{name}" for name in CLASSES]
    printed = capsys.readouterr().out
    assert f"Model: {copy} (class names from its own metadata)" in printed
    assert "calibrated with temperature 2.00" in printed


def test_the_state_of_legacy_checkpoints_names_the_classes(bare):
    add_member(bare, "training_state.json", json.dumps({"configs": OPTIONS | {"of_old_times": 1}}))
    described = find_description(bare)
    assert described.options == OPTIONS | {"image_target_size": (32, 32, 3), "backbone_preprocessing": []}
    assert set(described.sources.values()) == {"own metadata"}
    with pytest.raises(UserError, match="damaged"):
        read_state(bare)


def test_options_in_older_files_are_read_by_their_former_names(bare):
    former = {name: value for name, value in OPTIONS.items() if name != "eval_image_size"} | {"test_image_size": [8, 9]}
    state = {name: [] for name in STATE_PARTS} | {"configs": former, "given": ["test_image_size"]}
    with zipfile.ZipFile(bare, "a") as archive:
        archive.writestr("training_state.json", json.dumps(state))
    Path(bare).with_name("configs.json").write_text(json.dumps(former))
    assert find_description(bare).options["eval_image_size"] == [8, 9]
    state = read_state(bare)
    assert (state["configs"], state["given"]) == (OPTIONS | {"eval_image_size": [8, 9]}, ["eval_image_size"])


@pytest.mark.parametrize("wrong", [{"given": None}, {"given": [[]]}, {"configs": None}])
def test_a_state_whose_options_are_none_is_damaged(bare, wrong):
    state = {name: [] for name in STATE_PARTS} | {"configs": {}} | wrong
    add_member(bare, "training_state.json", json.dumps(state))
    with pytest.raises(UserError, match="damaged"):
        read_state(bare)


@pytest.mark.parametrize("state", ["{", "null", "[" * 10_000, '{"configs": 1}', '{"configs": {"classes": 1}}'])
def test_a_damaged_state_describes_nothing(bare, state):
    add_member(bare, "training_state.json", state)
    assert find_description(bare).options == {}
    with pytest.raises(UserError, match="damaged") as caught:
        read_state(bare)
    assert bare in str(caught.value)


def test_a_bug_in_reading_a_state_is_not_hidden(bare, monkeypatch):
    add_member(bare, "training_state.json", json.dumps({"configs": OPTIONS}))
    monkeypatch.setattr("finetune.models.description.select_described", lambda _: {}["bug"])
    with pytest.raises(KeyError):
        find_description(bare)


def test_without_a_description_nothing_is_guessed(bare):
    flags = ["--load_model_path", bare]
    with pytest.raises(UserError, match="classes, image_target_size, resize_mode, multi_label") as caught:
        find_trained_model(read_flags(*flags))
    for words in (bare, "--classes", "--train_csv", "--resize_mode stretch|crop|pad", "best_model_metadata.json"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=" its classes.* --classes"):
        find_trained_model(read_flags(*flags, *NEEDED))


@pytest.mark.parametrize("missing", ["image_target_size", "resize_mode", "multi_label_classification"])
def test_one_option_that_is_missing_is_named_alone(bare, missing):
    start = NEEDED.index(f"--{missing}")
    end = next((place for place in range(start + 1, len(NEEDED)) if NEEDED[place].startswith("--")), len(NEEDED))
    flags = NEEDED[:start] + NEEDED[end:]
    with pytest.raises(UserError, match=f" its {missing}. Give --{missing}"):
        find_trained_model(read_flags("--load_model_path", bare, "--classes", *CLASSES, *flags))


@pytest.mark.parametrize(
    ("name", "content", "flags", "classes", "source"),
    [
        ("best_model_labels.txt", "Blau\nGrün\nRot\n", NEEDED, ["Blau", "Grün", "Rot"], "its best_model_labels.txt"),
        ("configs.json", json.dumps(OPTIONS), [], CLASSES, "its configs.json"),
        ("table.csv", "path,class\na,one\nb,two\n", [*NEEDED, "--train_csv", "model/table.csv"], ["one", "two"], None),
        ("table.csv", "", [*NEEDED, "--classes", "z", "x"], ["z", "x"], "--classes"),
    ],
)
def test_class_names_have_a_source(bare, name, content, flags, classes, source):
    Path(bare).with_name(name).write_text(content, encoding="utf-8")
    path, configs = find_trained_model(read_flags("--load_model_path", bare, *flags))
    assert configs.classes == classes
    line = name_model(configs, path)
    assert f"(class names from {source or '--train_csv model/table.csv'})" in line
    assert ("must contain its preprocessing" in line) == (name != "configs.json")
    if source and source.startswith("its"):
        with pytest.raises(UserError, match=rf"classes is .*{classes[0]}.*{name}"):
            find_trained_model(read_flags("--load_model_path", bare, *flags, "--classes", "a", "b", "c"))


@pytest.mark.parametrize("name", ["classes", "resize_mode"])
def test_a_model_in_the_folder_of_another_run_is_refused(model_path, name):
    other = {"classes": ["brick", "grass", "gravel"], "resize_mode": "pad"}[name]
    Path(model_path).with_name("configs.json").write_text(json.dumps(OPTIONS | {name: other}))
    with pytest.raises(UserError, match=rf"configs.json .*{name} is"):
        find_trained_model(Configs(load_model_path=model_path))


def test_a_labels_file_of_another_model_is_refused(bare):
    labels = Path(bare).with_name("best_model_labels.txt")
    Path(bare).with_name("configs.json").write_text(json.dumps(OPTIONS | {"classes": ["bl\nue", "green", "red"]}))
    labels.write_text("bl ue\ngreen\nred\n")
    assert find_description(bare).options["classes"] == ["bl\nue", "green", "red"]
    labels.write_text("brick\ngrass\ngravel\n")
    with pytest.raises(UserError, match=r"best_model_labels.txt .*configs.json"):
        find_description(bare)


@pytest.mark.parametrize("content", [b"", b"a\n\nb\n", b"a\nb\na\n", b"\xff\xfe\xfa"])
def test_a_damaged_labels_file_is_refused(bare, content):
    Path(bare).with_name("best_model_labels.txt").write_bytes(content)
    with pytest.raises(UserError, match="best_model_labels.txt") as caught:
        find_description(bare)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "null", "[]", '{"options": []}', '{"options": {}}'])
def test_a_damaged_description_is_refused(bare, content):
    add_member(bare, "description.json", content)
    with pytest.raises(UserError, match=r"best_model.keras .*description.json"):
        find_description(bare)


@pytest.mark.parametrize(("name", "value"), [("classes", ["a", "a"]), ("image_target_size", [0, 32, 3])])
def test_a_description_with_impossible_values_is_refused(bare, name, value):
    add_description(bare, OPTIONS | {name: value})
    with pytest.raises(UserError, match=rf"best_model.keras: {name}: expected"):
        find_description(bare)


def test_outside_its_run_a_models_own_decision_is_used(model_path, capsys):
    folder = os.path.dirname(model_path)
    embed_decision(model_path, FITTED.to_dict())
    assert read_decision(folder, CLASSES, False, model_path) == FITTED
    assert capsys.readouterr().out == ""
    edited = Decision(CLASSES, False, 3.0, "validation", model="best_model.keras")
    write_decision(folder, edited)
    assert read_decision(folder, CLASSES, False, model_path) == FITTED
    assert "decision.json is ignored" in capsys.readouterr().out
    # In the run what test.py has written may be edited.
    Path(folder, "configs.json").write_text(json.dumps(OPTIONS))
    assert read_decision(folder, CLASSES, False, model_path) == edited
    assert "the one inside" in capsys.readouterr().out
    write_decision(folder, Decision(CLASSES, False, 3.0, "validation", model="latest_model.keras"))
    assert read_decision(folder, CLASSES, False, model_path) == FITTED


def test_without_a_validation_set_a_models_own_decision_stays(model_path, project):
    embed_decision(model_path, FITTED.to_dict())
    copy = str(project / "data" / "mine.keras")
    shutil.copy(model_path, copy)
    truths, answers = {"test": np.arange(3)}, {"test": np.eye(3)}
    kept = get_decision(copy, truths, answers, CLASSES, False, (0.1, 0.9))
    assert (kept.temperature, kept.temperature_fitted_on, kept.model) == (2.0, "validation", "mine.keras")


def test_default_tables_are_not_taken_for_the_models(model_path, capsys):
    configs = find_trained_model(Configs(load_model_path=model_path))[1]
    assert configs.train_csv == ""
    assert "it is not given: going without a training set" in capsys.readouterr().out
    given = read_flags("--load_model_path", model_path, "--train_csv", "./data/training_set.csv")
    assert find_trained_model(given)[1].train_csv == "./data/training_set.csv"
