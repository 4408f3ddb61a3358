"""find_label_errors.py finds changed labels, single and multi-label, by the probe and by a run's model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

import find_label_errors
from configs import Configs
from find_label_errors import LabelErrorConfigs
from finetune.core.files import write_json
from finetune.core.options import UserError
from finetune.studies.label_errors import answer_out_of_fold, find_neighbours, summarize
from finetune.studies.label_scores import count_errors, estimate_errors, find_likely, rank_suspects, score_labels
from finetune.training.probe import compute_features, cross_validate, initialize_head
from finetune.training.run_folder import write_trained_images
from generator import AugmentedImageSequence
from model import ModelFactory

PROJECT = Path(__file__).resolve().parents[2]
CLASSES = ["blue", "green", "red"]
SMALL = {
    "visual_model_name": "MobileNet",
    "pop_conv_layers": 75,
    "use_imagenet_weights": False,
    "image_target_size": (32, 32, 3),
    "batch_size": 8,
    "generator_workers": 2,
}
# In the table below, by line number: the wrong label and the right one.
CHANGED = {5: ("red", "blue"), 20: ("blue", "green")}


@pytest.fixture
def table(photo_folder, tmp_path):
    """A table of the 36 photos, two of them with the label of another class."""
    rows = [(str(path), path.parent.name) for path in sorted(photo_folder.glob("*/*.jpg"))]
    frame = pd.DataFrame(rows, columns=["path", "class"])
    for line, (given, truth) in CHANGED.items():
        assert frame.loc[line - 2, "class"] == truth
        frame.loc[line - 2, "class"] = given
    path = tmp_path / "all_data.csv"
    frame.to_csv(path, index=False)
    return path


def run(table, **options):
    values = {
        "csv_path": str(table),
        "write_path": str(table.parent / "found" / "suspects.csv"),
        "image_cache_path": str(table.parent / "cache"),
    }
    results = find_label_errors.main(LabelErrorConfigs(**(SMALL | values | options)).validate())
    results["written"] = pd.read_csv(table.parent / "found" / "suspects.csv")
    return results


# Judging


def test_suspected_errors_are_ranked_and_counted_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]])
    suspects, qualities, likely = rank_suspects(np.array([0, 0, 0, 2]), probabilities, multi_label=False)
    np.testing.assert_allclose(qualities, [0.7, 0.1, 0.05, 0.4])
    assert suspects.tolist() == [2, 1]
    assert likely.tolist() == [0, 1, 1, 2]
    # The mean probabilities of the given labels are 0.9 * 3 / 4 + 0.05 / 4 = 0.6875, and 0.9.
    probabilities = np.array([[0.9, 0.1]] * 3 + [[0.05, 0.95]] + [[0.1, 0.9]] * 4)
    labels = np.array([0] * 4 + [1] * 4)
    assert count_errors(labels, probabilities, multi_label=False) == 1
    assert count_errors(np.eye(2, dtype=np.uint8)[labels], probabilities, multi_label=True) == 1
    # cleanlab needs two classes: here a label is wrong if another class is more probable.
    assert count_errors(np.zeros(8, int), probabilities, multi_label=False) == 5


def test_suspected_errors_among_several_labels():
    probabilities = np.array([[0.9, 0.2], [0.9, 0.9], [0.1, 0.4], [0.4, 0.1], [0.8, 0.7]])
    labels = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [1, 1]], np.uint8)
    suspects, qualities, likely = rank_suspects(labels, probabilities, multi_label=True)
    # The second image lacks a label. The third must keep a label, and gets the more probable one. So does the fourth,
    # whose more probable label is its own.
    assert likely.tolist() == [[1, 0], [1, 1], [0, 1], [1, 0], [1, 1]]
    assert sorted(suspects.tolist()) == [1, 2]
    # The worst label counts four times as much as the other one.
    np.testing.assert_allclose(qualities[1], 0.8 * 0.1 + 0.2 * 0.9)
    # Only the second class of the first image is doubtful.
    probabilities = np.array([[0.45, 0.95, 0.9]] + [[0.6, 0.95, 0.9]] * 5 + [[0.6, 0.05, 0.9]] * 5)
    labels = (probabilities > 0.5).astype(np.uint8)
    labels[0] = [1, 0, 1]
    assert find_likely(labels, probabilities, True)[0].tolist() == [1, 1, 1]
    # A label that all images have changes no score.
    labels, probabilities = np.array([[1, 1], [1, 1], [1, 0]]), np.array([[0.9, 0.2], [0.6, 0.7], [0.5, 0.5]])
    scores = score_labels(labels, probabilities, True)
    np.testing.assert_allclose(score_labels(labels[:2], probabilities[:2], True), scores[:2])


def test_interval_contains_the_number_of_changed_labels_and_is_reproducible(monkeypatch):
    monkeypatch.setattr("finetune.studies.label_scores.RESAMPLINGS", 100)
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=300)
    probabilities = np.eye(3)[truth] * 0.85 + 0.05
    labels = np.where(np.arange(300) < 15, (truth + 1) % 3, truth)
    estimate = estimate_errors(labels, probabilities, False, seed=0)
    assert estimate.number == 15
    assert 5 < estimate.low < 15 < estimate.high < 26
    assert estimate == estimate_errors(labels, probabilities, False, seed=0)
    assert estimate_errors(truth, probabilities, False, seed=0) == (0, 0, 3)
    assert f"about 15 are expected to be wrong (95 % interval {estimate.low}" in summarize(estimate, 300, 15)


@pytest.mark.parametrize("counts", [(80, 3), (150, 3, 1), (1, 1), (3,)])
def test_the_interval_allows_for_classes_of_a_few_images(counts, monkeypatch):
    # A class of 3 of 83 images is missing in exp(-3) = 5 % of the bootstrap samples, one of 1 image in 37 %.
    monkeypatch.setattr("finetune.studies.label_scores.RESAMPLINGS", 30)
    labels = np.repeat(np.arange(len(counts)), counts)
    probabilities = np.full((len(labels), max(len(counts), 2)), 0.1)
    probabilities[np.arange(len(labels)), labels] = 0.9
    estimate = estimate_errors(labels, probabilities, False, seed=0)
    assert estimate == (0, 0, 3 if len(labels) > 2 else 2)
    one_hot = np.eye(probabilities.shape[1], dtype=np.uint8)[labels]
    assert estimate_errors(one_hot, probabilities, True, seed=0) == estimate


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("blue", r"every image has the only label, blue\."),
        ("red$blue", r"every image has the same labels, blue\$red\."),
    ],
)
def test_a_table_with_the_same_labels_everywhere_is_refused(labels, message, table, tmp_path):
    pd.read_csv(table).assign(**{"class": labels}).to_csv(tmp_path / "same.csv", index=False)
    with pytest.raises(UserError, match=rf"same\.csv: {message}"):
        run(tmp_path / "same.csv", multi_label_classification=True)


def test_neighbours_are_those_of_the_whole_matrix():
    features = np.random.default_rng(0).normal(3, 1, size=(200, 16)).astype(np.float32)
    centred = features - features.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    likeness = centred @ centred.T
    np.fill_diagonal(likeness, -2)
    positions = np.arange(0, 200, 2)
    found = find_neighbours(features, positions)
    assert (found == np.argsort(-likeness[positions], axis=1)[:, :3]).mean() > 0.99
    assert find_neighbours(features[:3], np.array([1])).shape == (1, 2)
    assert find_neighbours(features, np.array([], int)).shape == (0, 3)


def test_a_class_of_one_image_is_not_judged_and_one_of_a_few_hardly(capsys):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3], [20, 4, 5, 1])
    features = (rng.normal(size=(30, 8)) + np.eye(8)[labels] * 4).astype(np.float32)
    probabilities = answer_out_of_fold(features, labels, False, ["a", "b", "c", "d"], 0)
    assert probabilities[29].tolist() == [0, 0, 0, 1]
    first, second = capsys.readouterr().out.splitlines()
    assert re.search("^Not judged.* image .*: d$", first)
    assert re.search(r"^Hardly judged.* 5 images .*: b \(4\)$", second)


def test_a_wrong_label_is_found_although_copies_of_the_photo_share_it():
    """Ten copies of a photo have the wrong label: without groups they confirm each other."""
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], [30, 31])
    photos = rng.normal(size=(61, 60)) + 5 * np.eye(60)[truth]
    labels = np.concatenate([truth[:60], np.zeros(10, int)])
    groups = np.concatenate([np.arange(60), np.full(10, 60)])
    features = (photos[groups] + rng.normal(0, 0.01, (70, 60))).astype(np.float32)
    by_photo = answer_out_of_fold(features, labels, False, CLASSES[:2], 0)
    by_group = answer_out_of_fold(features, labels, False, CLASSES[:2], 0, groups)
    assert by_photo[60:, 0].min() > 0.9
    assert by_group[60:, 0].max() < 0.3


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_only_group_of_a_class_is_not_judged(multi_label, capsys):
    rng = np.random.default_rng(0)
    labels = np.array([0] * 20 + [1] * 20 + [2] * 5)
    groups = np.array([*range(20)] * 2 + [40] * 5)
    groups = np.unique(groups, return_inverse=True)[1]
    features = (rng.normal(size=(45, 8)) + np.eye(8)[labels] * 4).astype(np.float32)
    given = np.eye(3, dtype=np.uint8)[labels] if multi_label else labels
    probabilities = answer_out_of_fold(features, given, multi_label, CLASSES, 0, groups)
    assert (probabilities[40:, 2] == 1).all()
    assert not multi_label or (probabilities[40:, 0] < 1).all()
    assert re.search("Not judged.* group .*: red", capsys.readouterr().out)


def test_the_interval_of_errors_in_groups_is_that_of_a_cluster_bootstrap(monkeypatch):
    monkeypatch.setattr("finetune.studies.label_scores.RESAMPLINGS", 100)
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=80).repeat(5)
    groups = np.arange(80).repeat(5)
    probabilities = np.eye(3)[truth] * 0.85 + 0.05
    # Seven groups have only wrong labels.
    labels = np.where(groups % 13 == 0, (truth + 1) % 3, truth)
    estimate = estimate_errors(labels, probabilities, False, 0, groups)
    assert estimate.number == (groups % 13 == 0).sum() == 35
    wrong = np.arange(80) % 13 == 0
    counts = [5 * wrong[rng.integers(80, size=80)].sum() for _ in range(2000)]
    assert (estimate.low, estimate.high) == pytest.approx(np.percentile(counts, [2.5, 97.5]), abs=5)
    # None in 80 groups of five: up to three groups may be wrong.
    assert estimate_errors(truth, probabilities, False, 0, groups) == (0, 0, 15)
    assert summarize(estimate, 400, 15, groups).startswith("Of 400 labels in 80 groups, about 35 are")


def test_labels_that_look_wrong_are_not_learnt_from():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    features = (rng.normal(size=(60, 8)) + np.eye(8)[labels] * 6).astype(np.float32)
    assert cross_validate([features], labels, 3, 0)[40:, 2].min() > 0.5
    # Without an image of the class, all features give its smoothed frequency.
    unlearnt = cross_validate([features], labels, 3, 0, unlearnt=np.arange(40, 60))
    assert unlearnt[:, 2].max() < 0.3
    np.testing.assert_allclose(unlearnt.sum(axis=1), 1)


# The script


@pytest.mark.slow
def test_changed_labels_come_first(table, capsys):
    results = run(table)
    written = results["written"]
    assert list(written.columns) == ["row", "path", "given_label", "likely_label", "confidence", "rank"]
    first = written[:2].sort_values("row")
    assert first["row"].tolist() == list(CHANGED)
    assert list(zip(first["given_label"], first["likely_label"], strict=True)) == list(CHANGED.values())
    assert first["path"].tolist() == pd.read_csv(table)["path"][[3, 18]].tolist()
    assert written["rank"].tolist() == list(range(1, len(written) + 1))
    assert written["confidence"].is_monotonic_decreasing
    assert results["estimate"].low <= 2 <= results["estimate"].high
    assert "estimate" in capsys.readouterr().out
    assert (table.parent / "found" / "suspects.html").read_text().count("<article") == len(written)
    # The second time the features are stored.
    assert run(table, max_suspects=1)["written"].equals(written[:1])


@pytest.mark.slow
def test_changed_sets_of_labels_come_first_of_photos_in_a_store(multilabel_csv, tmp_path, store):
    frame = pd.read_csv(multilabel_csv)
    for path in frame["path"]:
        store.put(f"memory://photos/{path}", (multilabel_csv.parent / path).read_bytes())
    assert frame.loc[0, "class"] == "blue"
    frame.loc[0, "class"] = "green$red"
    frame.to_csv(tmp_path / "all_data.csv", index=False)
    results = run(tmp_path / "all_data.csv", image_directory="memory://photos", multi_label_classification=True)
    first = results["written"].iloc[0]
    assert (first["row"], first["path"], first["given_label"]) == (2, "00.jpg", "green$red")
    assert "blue" in first["likely_label"]


@pytest.mark.slow
def test_unreadable_photos_are_left_out_and_named(table, tmp_path, capsys):
    frame = pd.read_csv(table)
    (tmp_path / "cut.jpg").write_bytes(Path(frame.loc[0, "path"]).read_bytes()[:-200] + b"\xff\xd9")
    frame.loc[0, "path"], frame.loc[1, "path"] = str(tmp_path / "cut.jpg"), str(tmp_path / "none.jpg")
    frame.to_csv(table, index=False)
    with pytest.raises(UserError, match="none.jpg"):
        run(table)
    results = run(table, skip_bad_images=True)
    assert set(results["written"]["row"][:2]) == {*CHANGED}
    printed = capsys.readouterr().out
    assert "left out 1 image: row 3" in printed
    assert f"Left out 1 image that could not be read: {tmp_path / 'cut.jpg'}" in printed


@pytest.fixture(scope="module")
def trained_run(photo_folder, tmp_path_factory):
    """A run whose model recognises the colours, and which was trained on the first eight photos of each."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    configs = Configs(**SMALL | {"classes": CLASSES, "final_layer_pooling": "avg", "classifier_layer_sizes": []})
    model = ModelFactory().get_model(configs)
    folder.mkdir()
    files = sorted(photo_folder.glob("*/*.jpg"))
    labels = np.array([CLASSES.index(path.parent.name) for path in files], np.int32)
    sequence = AugmentedImageSequence([str(path) for path in files], labels, (32, 32), batch_size=8)
    initialize_head(model, [compute_features(model, sequence)[0]], labels, seed=0)
    model.save(folder / "best_model.keras")
    write_json(str(folder / "configs.json"), configs.to_dict())
    write_trained_images(str(folder), {"training": [str(path) for path in files if int(path.stem) < 8]})
    return folder


@pytest.fixture
def run_folder(table, trained_run):
    return shutil.copytree(trained_run, table.parent / "run")


def test_a_run_judges_only_images_that_it_was_not_trained_on(table, run_folder, capsys):
    # Lines 5 and 20 are the fourth and the seventh photo of their classes, so in the training set. Line 37 is not.
    frame = pd.read_csv(table)
    frame.loc[35, "class"] = "green"
    frame.rename(columns={"class": "colour"}).to_csv(table, index=False)
    options = Configs(**SMALL, classes=CLASSES, csv_label_column="colour").to_dict()
    write_json(str(run_folder / "configs.json"), options)
    written = run(table, load_model_path=str(run_folder))["written"]
    printed = capsys.readouterr().out
    assert "24 of 36 images" in printed
    # The run's option.
    assert "csv_label_column" in printed
    first = written.iloc[0]
    assert (first["row"], first["given_label"], first["likely_label"]) == (37, "green", "red")
    assert not {*written["row"]} & {*CHANGED}


def test_images_that_do_not_fit_the_pixel_range_of_a_run_are_named(table, run_folder, capsys):
    values = np.linspace(0, 1000, 32 * 32, dtype=np.float32).reshape(32, 32)
    files = [str(table.parent / f"{number}.tif") for number in range(4)]
    for file in files:
        tifffile.imwrite(file, values)
    pd.DataFrame({"path": files, "class": ["blue", "red"] * 2}).to_csv(table, index=False)
    path = run_folder / "configs.json"
    write_json(str(path), json.loads(path.read_text()) | {"pixel_range": [0, 1]})
    (run_folder / "trained_images.csv").unlink()
    run(table, load_model_path=str(run_folder))
    printed = capsys.readouterr().out
    assert f"{table}: 4 of 4" in printed
    assert files[0] in printed
    # Which images the model was trained on is not known.
    assert "Warning: the run has no trained_images.csv" in printed


def test_a_run_that_was_trained_on_all_images_judges_none(table, run_folder, photo_folder):
    write_trained_images(str(run_folder), {"training": [str(path) for path in photo_folder.glob("*/*.jpg")]})
    with pytest.raises(UserError, match="trained on all 36 images"):
        run(table, load_model_path=str(run_folder))


@pytest.mark.slow
def test_an_error_in_the_table_does_not_wait_for_tensorflow(tmp_path):
    (tmp_path / "all.csv").write_text("path,label\na.jpg,cat\n")
    code = "import sys, find_label_errors as script\n"
    code += f"configs = script.LabelErrorConfigs(csv_path={str(tmp_path / 'all.csv')!r})\n"
    code += "from finetune.core.options import UserError\n"
    code += "try: script.main(configs)\nexcept UserError: sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_output_does_not_replace_the_table(table):
    with pytest.raises(UserError, match="write_path"):
        run(table, write_path=str(table))
