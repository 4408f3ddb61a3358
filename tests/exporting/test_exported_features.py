"""Exports with features: two outputs, the reference beside them, and the same answers in every runtime."""

import dataclasses
import json
import os
import re
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
from exported_runs import ARTEFACTS, CLASSES, EXPORTS, build_colour_model, export, predict_photos
from PIL import Image

import test as evaluation
from compress_weights import CompressConfigs
from configs import Configs
from finetune.core.options import UserError
from finetune.evaluation.abstention import Abstention, Evidence, Wishes, fit_abstention
from finetune.evaluation.decision import Decision
from finetune.evaluation.novelty import NEIGHBOURS, Reference, to_unit_length
from finetune.exporting.exports import write_metadata
from finetune.exporting.parity import Results, compare_answers
from finetune.models.exported import find_outputs
from finetune.models.formats import FORMATS, reference_path, show_answering
from finetune.models.model_files import build_inference_model, build_with_features
from finetune.predicting.answers import name_answers
from finetune.predicting.predicting import load_exported_model
from finetune.training.run_folder import list_derived_files

COLOURS = np.array([[40, 60, 200], [50, 180, 60], [210, 50, 40]])
METADATA, REFERENCE = "best_model_metadata.json", "best_model_reference.npz"


def build_model():
    """Builds a model of a backbone and a head that tells three colours apart, with 12 features."""
    rng = np.random.default_rng(0)
    image, inner = keras.Input((32, 32, 3), name="image"), keras.Input((32, 32, 3))
    convolution = keras.layers.Conv2D(12, 1, activation="relu")
    backbone = keras.Model(inner, convolution(inner), name="backbone")
    pooling, logits = keras.layers.GlobalAveragePooling2D(name="pooling"), keras.layers.Dense(3, name="logits")
    softmax = keras.layers.Activation("softmax", name="probabilities", dtype="float32")
    head = keras.Sequential([pooling, logits, softmax], name="classifier")
    model = keras.Model(image, head(backbone(keras.layers.Rescaling(1 / 255, name="preprocessing")(image))))
    convolution.set_weights([np.hstack([np.eye(3), rng.normal(0, 1, (3, 9))])[None, None], np.zeros(12)])
    logits.set_weights([np.vstack([6 * np.eye(3)[::-1], np.zeros((9, 3))]), np.zeros(3)])
    return model


def write_photos(folder, colours):
    """Writes a photo of noise around each colour, of the model's size."""
    folder.mkdir()
    for number, colour in enumerate(colours):
        pixels = np.random.default_rng(number).normal(colour, 20, (32, 32, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tested run with every export, not to be changed: `folder`, `photos` to predict, and their `answers`."""
    root, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    folder, classes = root / "run", np.arange(72) % 3
    folder.mkdir()
    write_photos(root / "known", COLOURS[classes] + rng.normal(0, 25, (72, 3)))
    table = pd.DataFrame({"path": [f"{row:03d}.png" for row in range(72)], "class": np.array(CLASSES)[classes]})
    # A wrong label, so that a temperature is fitted.
    table.loc[24, "class"] = "red"
    stored = {"image_directory": str(root / "known"), "classes": CLASSES, "image_target_size": [32, 32, 3]}
    for number, name in enumerate(("train_csv", "validation_csv", "test_csv")):
        stored[name] = str(root / f"{name}.csv")
        table[24 * number : 24 * number + 24].to_csv(stored[name], index=False)
    (folder / "configs.json").write_text(json.dumps(stored))
    build_model().save(folder / "best_model.keras")
    results = evaluation.main(Configs(load_model_path=str(folder), max_error=0.3, unknown_rate=0.05))
    decision = json.loads((folder / "decision.json").read_text())
    decision["abstention"] |= {"thresholds": [0.85], "max_error": 0.3}
    (folder / "decision.json").write_text(json.dumps(decision))
    report = export(folder, *EXPORTS, export_features=True, tolerance=100)
    write_photos(root / "new", [*COLOURS, *(COLOURS + rng.normal(0, 25, (9, 3, 3))).reshape(-1, 3), [255] * 3, [0] * 3])
    answers = predict_photos(folder / "best_model.keras", root / "new", root)
    return SimpleNamespace(folder=folder, photos=root / "new", answers=answers, report=report, results=results)


@pytest.fixture
def copied(run, tmp_path):
    """The same run's folder, to be changed."""
    return shutil.copytree(run.folder, tmp_path / "run")


def take_away(run, folder, name):
    """Copies an artefact with the files beside it to another folder; returns its path there."""
    folder.mkdir(exist_ok=True)
    for kept in (name, METADATA, REFERENCE):
        source, target = run.folder / kept, folder / kept
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    return folder / name


def random_images(number):
    return np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3)).astype(np.uint8)


# The files


@pytest.mark.parametrize(
    ("kind", "precision", "views"),
    [
        *((kind, "float32", views) for kind in EXPORTS for views in ("none", "flip")),
        *(("tflite", precision, "none") for precision in ("dynamic", "int8")),
    ],
)
def test_each_format_gives_features_beside_probabilities(kind, precision, views, tmp_path):
    whole = build_with_features(build_inference_model(build_model(), views))
    path, images = str(tmp_path / f"model{''.join(FORMATS[kind].endings[precision])}"), random_images(4)
    FORMATS[kind].runtime().write(whole, path, precision, lambda: list(random_images(20)))
    model, expected = load_exported_model(path), whole(images)
    bound = 1e-5 if precision == "float32" else 0.03
    assert model.gives_features
    assert model.output_shape == (None, 3)
    for found in (model(images), model.run_with_features(images)[0]):
        np.testing.assert_allclose(found, expected["probabilities"], atol=bound)
    np.testing.assert_allclose(model.run_with_features(images)[1], expected["features"], atol=bound)


def test_mixed_precision_becomes_float32_with_features_too(tmp_path):
    model = build_model()
    weights = model.get_weights()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = build_model()
        mixed.set_weights(weights)
    finally:
        keras.config.set_dtype_policy("float32")
    FORMATS["saved_model"].runtime().write(build_with_features(mixed), str(tmp_path / "model"), "float32", list)
    found = load_exported_model(str(tmp_path / "model")).run_with_features(random_images(2))
    expected = build_with_features(model)(random_images(2))
    for one, name in zip(found, ("probabilities", "features"), strict=True):
        np.testing.assert_allclose(one, expected[name], atol=1e-6)


def test_outputs_of_other_names_are_no_features():
    assert find_outputs({"anything": 1}) == (1, None)
    assert find_outputs({"features": 2, "probabilities": 1}) == (1, 2)
    for names in (["a", "b"], ["probabilities", "features", "more"], []):
        with pytest.raises(ValueError, match="outputs"):
            find_outputs(dict.fromkeys(names, 1))


def test_the_reference_lies_beside_the_files_and_belongs_to_the_run(run):
    own, copy = (Reference.read(str(run.folder / name)) for name in ("reference.npz", REFERENCE))
    np.testing.assert_array_equal(own.features, copy.features)
    assert own[1:] == copy[1:]
    metadata = json.loads((run.folder / METADATA).read_text())
    assert metadata["reference"] == own.digest()
    assert metadata["decision"] == json.loads((run.folder / "decision.json").read_text())
    # A new run into the folder clears it away.
    assert REFERENCE in list_derived_files()


# The answers


@pytest.mark.parametrize("name", ARTEFACTS)
def test_predict_answers_as_the_original_does_in_the_run_and_elsewhere(name, run, tmp_path):
    assert {*run.answers["answer"]} == {*CLASSES, "unsure", "unknown"}
    for path in (run.folder / name, take_away(run, tmp_path / "away", name)):
        found = predict_photos(path, run.photos, tmp_path)
        assert found["answer"].tolist() == run.answers["answer"].tolist()
        np.testing.assert_allclose(found["similarity"], run.answers["similarity"], atol=1e-4)


@pytest.mark.slow
def test_test_answers_as_the_original_does_without_the_training_photos(run, tmp_path):
    path, stored = (
        take_away(run, tmp_path / "away", "best_model.onnx"),
        json.loads((run.folder / "configs.json").read_text()),
    )
    tables = {name: stored[name] for name in ("test_csv", "image_directory")}
    found, expected = (
        results["sets"]["test"]["answers"]
        for results in (evaluation.main(Configs(load_model_path=str(path), **tables)), run.results)
    )
    assert found["unknown"] == expected["unknown"] > 0


def test_the_report_counts_the_answers_that_change(run, copied, capsys):
    for artefact in run.report["artefacts"]:
        assert artefact["features"] == (artefact["kind"] != "weights")
        assert artefact["comparison"]["changed_answers"] == 0
        assert artefact["comparison"]["largest_similarity_difference"] < 1e-3
    decision = json.loads((copied / "decision.json").read_text())
    # Every photo is unknown: a file without features gives another answer to each.
    decision["abstention"]["unknown_threshold"] = 1e6
    (copied / "decision.json").write_text(json.dumps(decision))
    plain = export(copied, "onnx")["artefacts"][1]
    assert not plain["features"]
    assert plain["comparison"]["unknown"] == {"before": 24, "after": 0}
    assert plain["comparison"]["changed_answers"] == 24
    printed = capsys.readouterr().out
    assert "0 of 24 images" in printed
    assert "24 of 24 images, 100.0%" in printed
    assert "calls none of 24 unknown images so" in printed


def test_answers_are_compared_by_label_unsure_and_unknown():
    rule = Abstention(0.1, [0.75], 0.01, 0.0, [0.0, 1.0, 1.0, 1.0], 100)
    decision = Decision(["cat", "dog"], False, abstention=rule)
    before = np.array([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.8, 0.2]], np.float32)
    after = np.array([[0.2, 0.8], [0.7, 0.3], [0.6, 0.4], [0.8, 0.2]], np.float32)
    # The last one becomes unknown.
    similarities = np.ones(4), np.array([1, 1, 1, -9.0])
    y_true, results = np.array([0, 1, 1, 1]), [Results(before, similarities[0]), Results(after, similarities[1])]
    assert compare_answers(y_true, *results, decision) == {
        "changed_answers": 3,
        "unknown": {"before": 0, "after": 1},
        "answered": {"before": 3, "after": 1},
        "wrong": {"before": 2, "after": 1},
        "largest_similarity_difference": 10.0,
    }
    found = compare_answers(y_true, Results(before, similarities[1]), Results(before), decision)
    assert (found["changed_answers"], found["unknown"]) == (1, {"before": 1, "after": 0})
    assert "largest_similarity_difference" not in found


# The code on the model card


@pytest.mark.parametrize("kind", EXPORTS)
def test_the_code_on_the_card_answers_as_predict_does(kind, run, monkeypatch):
    monkeypatch.chdir(run.folder)
    card = (run.folder / "MODEL_CARD.md").read_text()
    picture, *blocks = re.findall(r"```python\n(.*?)```", card.partition("## How to load it")[2], re.DOTALL)
    (loading,) = (block for block in blocks if f"best_model{''.join(FORMATS[kind].endings['float32'])}" in block)
    answers = []
    for path in sorted(run.photos.iterdir()):
        names = {}
        for code in (picture.replace("photo.jpg", str(path)), loading, blocks[-1]):
            exec(code, names)
        (answer,) = names["answer"]
        answers.append(answer)
    assert answers == run.answers["answer"].tolist()
    assert "finetune" not in picture + loading + blocks[-1]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("case", ["rule", "temperature", "nothing promised", "no rule"])
def test_the_code_on_the_card_applies_every_kind_of_decision(multi_label, case, tmp_path, monkeypatch):
    rng, class_names = np.random.default_rng(0), ["unknown", "cat", "dog"]
    logits = rng.normal(0, 2, (200, 3))
    odds = np.exp(logits)
    raw = (odds / (1 + odds) if multi_label else odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
    raw[0], features = np.float32([1, 0, 0]), rng.normal(0.3, 1, (200, 8)).astype(np.float32)
    reference = Reference(to_unit_length(rng.normal(0.3, 1, (30, 8))), ["photo"] * 30, ["cat"] * 30, "digest")
    similarities = reference.find_neighbours(to_unit_length(features)).similarities.mean(axis=1)
    decision = Decision(class_names, multi_label, temperature=1.0 if case == "rule" else 1.7)
    calibrated, y_true = decision.calibrate(raw), rng.integers(0, 2, (200, 3)) if multi_label else raw.argmax(axis=1)
    evidence = Evidence(y_true, calibrated, decision.choose(calibrated), similarities)
    rule = fit_abstention(evidence, Wishes(0.1, 0.2))
    lowest = [[0.8, 0.6, None], [0.7]] if case != "nothing promised" else [[None] * 3, [None]]
    # Off the photo at which it was found: rounding must not decide.
    changed = {"thresholds": lowest[not multi_label], "unknown_threshold": rule.unknown_threshold + 1e-4}
    rule = None if case == "no rule" else dataclasses.replace(rule, **changed)
    decision = dataclasses.replace(decision, abstention=rule)
    write_metadata(str(tmp_path / "m.keras"), CompressConfigs(classes=class_names), decision, True, reference)
    reference.write_file(reference_path(str(tmp_path / "m.onnx")))
    monkeypatch.chdir(tmp_path)
    names = {"probabilities": raw[:1], "features": features[:1]}
    exec(show_answering("m.onnx", ("unsure", "(unknown)"), NEIGHBOURS), names)
    found = [names["find_answer"](raw[row : row + 1], features[row : row + 1]) for row in range(200)]
    assert found == name_answers(decision, decision.calibrate(raw), similarities).names
    told = {name for answer in found for name in answer}
    assert ("(unknown)" in told) == (case != "no rule")
    assert ("unsure" in told) == (case != "no rule")


# Files without features, and references that are missing or another's


def test_a_file_without_features_says_that_none_is_unknown(copied, run, tmp_path, capsys):
    export(copied, "onnx", test_csv="")
    model = load_exported_model(str(copied / "best_model.onnx"))
    assert not model.gives_features
    assert model.run_with_features(random_images(1))[1] is None
    capsys.readouterr()
    found = predict_photos(copied / "best_model.onnx", run.photos, tmp_path)
    assert "unknown" not in {*found["answer"]}
    assert found["similarity"].isna().all()
    assert "gives no features, so no photo is called unknown. Export it again" in capsys.readouterr().out
    # The others still belong to their reference.
    found = predict_photos(copied / "best_model.tflite", run.photos, tmp_path)
    assert found["answer"].tolist() == run.answers["answer"].tolist()


def test_a_missing_or_foreign_reference_is_told_and_a_damaged_one_refused(run, tmp_path, capsys):
    path = take_away(run, tmp_path / "away", "best_model.onnx")
    reference = Reference.read(str(run.folder / REFERENCE))
    few = Reference(reference.features[:5], reference.paths[:5], reference.labels[:5], reference.model)
    changes = {
        "There is no ": lambda: os.remove(path.parent / REFERENCE),
        "is of another model": lambda: few.write_file(str(path.parent / REFERENCE)),
    }
    for words, change in changes.items():
        change()
        capsys.readouterr()
        found = predict_photos(path, run.photos, tmp_path)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "so no photo is called unknown" in line)
        assert words in line
        assert str(path.parent / REFERENCE) in line
        assert "unknown" not in {*found["answer"]}
    (path.parent / REFERENCE).write_bytes(b"PK")
    with pytest.raises(UserError, match=f"{REFERENCE} is damaged"):
        predict_photos(path, run.photos, tmp_path)


def test_a_reference_of_other_features_is_an_error():
    reference = Reference(np.ones((2, 8), np.float16), ["a", "b"], ["cat", "cat"], "")
    with pytest.raises(UserError, match="8 features a photo, but the model gives 7"):
        reference.find_neighbours(np.ones((3, 7), np.float16))


def test_features_need_a_reference_and_a_model_of_this_project(copied):
    before = sorted(os.listdir(copied))
    os.rename(copied / "reference.npz", copied / "away.npz")
    os.remove(copied / REFERENCE)
    with pytest.raises(UserError, match=r"export_features: expected the reference\.npz of .*Run test\.py"):
        export(copied, "onnx", export_features=True)
    build_colour_model().save(copied / "best_model.keras")
    with pytest.raises(UserError, match="backbone"):
        export(copied, "onnx", export_features=True)
    assert len(os.listdir(copied)) == len(before) - 1


def test_features_need_a_format_that_can_hold_them(monkeypatch):
    monkeypatch.setitem(FORMATS, "arrays", FORMATS["onnx"]._replace(loading_features=""))
    for formats, received in (([], "no --export"), (["onnx", "arrays"], "arrays, which cannot hold features")):
        with pytest.raises(UserError, match=f"^export_features: expected .*tflite, onnx, saved_model. .*{received}"):
            CompressConfigs(export=formats, export_features=True).validate()
    CompressConfigs(export=["arrays"]).validate()
