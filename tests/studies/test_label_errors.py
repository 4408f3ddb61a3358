"""find_label_errors.py: labels that were changed are found, single and several, by the probe and by a run's model."""

import json
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
from finetune.training.run_data import write_trained_images
from generator import AugmentedImageSequence
from model import ModelFactory

PROJECT = Path(__file__).resolve().parents[2]
CLASSES = ["blue", "green", "red"]
SMALL = {
    "visual_model_name": "MobileNet",
    "pop_conv_layers": 66,
    "use_imagenet_weights": False,
    "image_target_size": (32, 32, 3),
    "batch_size": 8,
    "generator_workers": 2,
}
# Of the table below: line number, label in it, label of the photo.
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


def test_suspects_are_ranked_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]])
    suspects, qualities, likely = rank_suspects(np.array([0, 0, 0, 2]), probabilities, multi_label=False)
    np.testing.assert_allclose(qualities, [0.7, 0.1, 0.05, 0.4])
    assert suspects.tolist() == [2, 1]
    assert likely.tolist() == [0, 1, 1, 2]


def test_suspects_of_several_labels():
    probabilities = np.array([[0.9, 0.2], [0.9, 0.9], [0.1, 0.4], [0.4, 0.1], [0.8, 0.7]])
    labels = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [1, 1]], np.uint8)
    suspects, qualities, likely = rank_suspects(labels, probabilities, multi_label=True)
    # The second lacks a label. The third has a doubtful one, but not none: the more probable one comes in its place.
    # The fourth would have none, and keeps the more probable one, its own.
    assert likely.tolist() == [[1, 0], [1, 1], [0, 1], [1, 0], [1, 1]]
    assert sorted(suspects.tolist()) == [1, 2]
    # The worst label of the second image counts four times the other one.
    np.testing.assert_allclose(qualities[1], 0.8 * 0.1 + 0.2 * 0.9)


def test_of_several_labels_only_the_doubtful_ones_change():
    # The class of the middle is present or not with certainty, but for the first image, which lacks it.
    probabilities = np.array([[0.45, 0.95, 0.9]] + [[0.6, 0.95, 0.9]] * 5 + [[0.6, 0.05, 0.9]] * 5)
    labels = (probabilities > 0.5).astype(np.uint8)
    labels[0] = [1, 0, 1]
    assert find_likely(labels, probabilities, True)[0].tolist() == [1, 1, 1]


def test_errors_are_counted_by_hand():
    # Mean probability of their own label: 0.9 * 3 / 4 + 0.05 / 4 = 0.6875 and 0.9.
    probabilities = np.array([[0.9, 0.1]] * 3 + [[0.05, 0.95]] + [[0.1, 0.9]] * 4)
    labels = np.array([0] * 4 + [1] * 4)
    assert count_errors(labels, probabilities, multi_label=False) == 1
    one_hot = np.eye(2, dtype=np.uint8)[labels]
    assert count_errors(one_hot, probabilities, multi_label=True) == 1


def test_interval_holds_what_was_changed_and_is_the_same_again():
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=300)
    probabilities = np.eye(3)[truth] * 0.85 + 0.05
    labels = np.where(np.arange(300) < 15, (truth + 1) % 3, truth)
    estimate = estimate_errors(labels, probabilities, False, seed=0)
    assert estimate.number == 15
    assert 5 < estimate.low < 15 < estimate.high < 26
    assert estimate == estimate_errors(labels, probabilities, False, seed=0)
    assert estimate_errors(truth, probabilities, False, seed=0) == (0, 0, 3)
    assert "about 15 are expected to be wrong (95 % interval" in summarize(estimate, 300, 15)


@pytest.mark.parametrize("counts", [(80, 3), (80, 1), (150, 3, 1), (1, 1), (3,)])
def test_the_interval_allows_for_classes_of_a_few_images(counts, monkeypatch):
    # A class of 3 of 83 images is in no resample of exp(-3) = 5 of 100, one of 1 image in 37 of 100.
    monkeypatch.setattr("finetune.studies.label_scores.RESAMPLINGS", 30)
    labels = np.repeat(np.arange(len(counts)), counts)
    probabilities = np.full((len(labels), max(len(counts), 2)), 0.1)
    probabilities[np.arange(len(labels)), labels] = 0.9
    estimate = estimate_errors(labels, probabilities, False, seed=0)
    assert estimate == (0, 0, 3 if len(labels) > 2 else 2)
    one_hot = np.eye(probabilities.shape[1], dtype=np.uint8)[labels]
    assert estimate_errors(one_hot, probabilities, True, seed=0) == estimate


def test_a_class_of_a_few_images_is_said_to_be_hardly_judged(capsys):
    labels = np.repeat([0, 1, 2, 3], [20, 4, 5, 1])
    features = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32) + labels[:, None]
    answer_out_of_fold(features, labels, False, ["a", "b", "c", "d"], 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "Not judged, as no other image has the label: d",
        "Hardly judged, as fewer than 5 images have the label: b (4)",
    ]


def test_a_table_of_one_label_alone_is_refused(tmp_path):
    (tmp_path / "one.csv").write_text("path,class\na.jpg,a\nb.jpg,a\n", "utf-8")
    with pytest.raises(UserError, match=r"one\.csv: every image has the only label, a\."):
        run(tmp_path / "one.csv", multi_label_classification=True)


def test_table_whose_images_all_have_every_label_is_refused(table, tmp_path):
    path = tmp_path / "all.csv"
    pd.read_csv(table).assign(**{"class": "red$blue"}).to_csv(path, index=False)
    with pytest.raises(UserError, match=r"all\.csv: every image has the same labels, blue\$red\."):
        run(path, multi_label_classification=True)


def test_labels_that_all_images_have_are_scored_as_others():
    labels, probabilities = np.array([[1, 1], [1, 1], [1, 0]]), np.array([[0.9, 0.2], [0.6, 0.7], [0.5, 0.5]])
    scores = score_labels(labels, probabilities, True)
    np.testing.assert_allclose(score_labels(labels[:2], probabilities[:2], True), scores[:2])
    np.testing.assert_allclose(score_labels(labels[:1], probabilities[:1], True), scores[:1])


def test_in_a_table_of_one_class_other_answers_are_counted():
    probabilities = np.array([[0.9, 0.1]] * 8 + [[0.2, 0.8]] * 2)
    assert count_errors(np.zeros(10, int), probabilities, multi_label=False) == 2


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


def test_the_only_image_of_a_class_is_not_judged(capsys):
    rng = np.random.default_rng(0)
    labels = np.array([0] * 20 + [1] * 20 + [2])
    features = (rng.normal(size=(41, 8)) + np.eye(8)[labels] * 4).astype(np.float32)
    probabilities = answer_out_of_fold(features, labels, False, CLASSES, 0)
    assert probabilities[40].tolist() == [0, 0, 1]
    assert "no other image has the label: red" in capsys.readouterr().out


def test_a_wrong_label_shows_though_its_copies_have_it_too():
    """Ten copies of one photo, all with the wrong label: by photo each is vouched for by the others."""
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
    assert "no other group of images has the label: red" in capsys.readouterr().out


def test_the_interval_of_errors_in_groups_is_that_of_a_cluster_bootstrap():
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=80).repeat(5)
    groups = np.arange(80).repeat(5)
    probabilities = np.eye(3)[truth] * 0.85 + 0.05
    # Six groups are wrong throughout.
    labels = np.where(groups % 13 == 0, (truth + 1) % 3, truth)
    estimate = estimate_errors(labels, probabilities, False, 0, groups)
    assert estimate.number == (groups % 13 == 0).sum() == 35
    wrong = np.arange(80) % 13 == 0
    counts = [5 * wrong[rng.integers(80, size=80)].sum() for _ in range(2000)]
    assert (estimate.low, estimate.high) == pytest.approx(np.percentile(counts, [2.5, 97.5]), abs=5)
    # None in 80 groups of five: up to three groups.
    assert estimate_errors(truth, probabilities, False, 0, groups) == (0, 0, 15)
    assert summarize(estimate, 400, 15, groups).startswith("Of 400 labels in 80 groups, about 35 are")


def test_what_is_not_to_be_learnt_from_is_not():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    features = (rng.normal(size=(60, 8)) + np.eye(8)[labels] * 6).astype(np.float32)
    known = cross_validate([features], labels, 3, 0)
    unlearnt = cross_validate([features], labels, 3, 0, unlearnt=np.arange(40, 60))
    assert known[40:, 2].min() > 0.5
    # No image of the class is left: whatever the features, it has the weight of its smoothed frequency.
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
    assert "no proof" in capsys.readouterr().out
    assert (table.parent / "found" / "suspects.html").read_text().count("<article") == len(written)
    # Again: the features are known.
    assert run(table)["written"].equals(written)
    assert len(run(table, max_suspects=1)["written"]) == 1


@pytest.mark.slow
def test_changed_sets_of_labels_come_first(multilabel_csv, tmp_path):
    frame = pd.read_csv(multilabel_csv)
    assert frame.loc[0, "class"] == "blue"
    frame.loc[0, "class"] = "green$red"
    frame.to_csv(tmp_path / "all_data.csv", index=False)
    folder = str(multilabel_csv.parent)
    results = run(tmp_path / "all_data.csv", image_directory=folder, multi_label_classification=True)
    first = results["written"].iloc[0]
    assert (first["row"], first["path"], first["given_label"]) == (2, "00.jpg", "green$red")
    assert "blue" in first["likely_label"]


@pytest.mark.slow
def test_unreadable_photos_are_left_out_and_told(table, tmp_path, capsys):
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


@pytest.mark.slow
def test_photos_are_read_by_urls(table, store):
    frame = pd.read_csv(table)
    for number, path in enumerate(frame["path"]):
        store.put(f"memory://photos/{number}.jpg", Path(path).read_bytes())
    frame["path"] = [f"memory://photos/{number}.jpg" for number in range(len(frame))]
    frame.to_csv(table, index=False)
    assert set(run(table)["written"]["row"][:2]) == {*CHANGED}


@pytest.fixture
def run_folder(table, photo_folder):
    """A run whose model tells the colours apart, and which was trained on the first eight photos of each."""
    folder = table.parent / "run"
    options = SMALL | {"classes": CLASSES, "final_layer_pooling": "avg", "classifier_layer_sizes": []}
    configs = Configs(**options)
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


def test_a_run_judges_what_it_was_not_trained_on(table, run_folder, capsys):
    results = run(table, load_model_path=str(run_folder))
    printed = capsys.readouterr().out
    assert "Left out 24 of 36 images, which the model was trained on" in printed
    # Line 5 is the fourth photo of its class, line 20 the seventh: both learnt. Change one of the others.
    assert not {*results["written"]["row"]} & {*CHANGED}
    frame = pd.read_csv(table)
    frame.loc[35, "class"] = "green"
    frame.to_csv(table, index=False)
    first = run(table, load_model_path=str(run_folder))["written"].iloc[0]
    assert (first["row"], first["given_label"], first["likely_label"]) == (37, "green", "red")


def test_a_run_tells_which_pictures_its_pixel_range_does_not_fit(table, run_folder, capsys):
    values = np.linspace(0, 1000, 32 * 32, dtype=np.float32).reshape(32, 32)
    files = [str(table.parent / f"{number}.tif") for number in range(4)]
    for file in files:
        tifffile.imwrite(file, values)
    pd.DataFrame({"path": files, "class": ["blue", "red"] * 2}).to_csv(table, index=False)
    path = run_folder / "configs.json"
    write_json(str(path), json.loads(path.read_text()) | {"pixel_range": [0, 1]})
    run(table, load_model_path=str(run_folder))
    assert f"{table}: 4 of 4" in (told := capsys.readouterr().out)
    assert files[0] in told


def test_a_run_that_has_learnt_all_images_judges_none(table, run_folder, photo_folder):
    write_trained_images(str(run_folder), {"training": [str(path) for path in photo_folder.glob("*/*.jpg")]})
    with pytest.raises(UserError, match="was trained on all 36 images"):
        run(table, load_model_path=str(run_folder))


def test_a_run_brings_the_name_of_its_label_column(table, run_folder, capsys):
    options = Configs(**SMALL, classes=CLASSES, csv_label_column="colour").to_dict()
    write_json(str(run_folder / "configs.json"), options)
    pd.read_csv(table).rename(columns={"class": "colour"}).to_csv(table, index=False)
    run(table, load_model_path=str(run_folder))
    assert "csv_label_column comes from the run: colour" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_without_its_list_is_told(table, run_folder, capsys):
    (run_folder / "trained_images.csv").unlink()
    run(table, load_model_path=str(run_folder))
    assert "whose labels it believes, is not known" in capsys.readouterr().out


def test_bad_table_is_one_line_before_tensorflow(tmp_path):
    (tmp_path / "all.csv").write_text("path,label\na.jpg,cat\n")
    command = [sys.executable, "find_label_errors.py", "--csv_path", str(tmp_path / "all.csv")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_output_does_not_replace_the_table(table):
    with pytest.raises(UserError, match="is the input itself"):
        run(table, write_path=str(table))
