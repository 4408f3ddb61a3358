"""predict.py: its inputs, its output, and its probabilities by hand."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from coloured_runs import CLASSES, SIZE, WEIGHTS, build_run, run
from exported_runs import write_decision
from imgaug import augmenters as iaa

from finetune.core.options import UserError
from finetune.data.images import read_image
from finetune.evaluation.decision import read_decision
from finetune.loading.augmentation import FusedAugmenter
from finetune.models.model_files import load_model
from finetune.predicting import predicting
from finetune.predicting.predicting import classify_image
from predict import PredictConfigs

PROJECT = Path(__file__).parent.parent


@pytest.fixture
def single_run(tmp_path):
    return build_run(tmp_path / "single_label", multi_label=False)


@pytest.fixture
def multilabel_run(tmp_path):
    return build_run(tmp_path / "multi_label", multi_label=True)


@pytest.fixture
def bad_folder(photo_folder, tmp_path):
    """Six files, of which the first and the fifth are images."""
    folder, photo = tmp_path / "bad", (photo_folder / "red" / "00.jpg").read_bytes()
    folder.mkdir()
    (folder / "a.jpg").write_bytes(photo)
    (folder / "b_truncated.jpg").write_bytes(photo[: len(photo) // 2])
    (folder / "c_text.jpg").write_text("no image")
    (folder / "d_empty.jpg").write_bytes(b"")
    PIL.Image.open(photo_folder / "blue" / "00.jpg").save(folder / "e_png.jpg", format="PNG")
    (folder / "f_header.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def by_class(table):
    return table[[f"probability_{name}" for name in CLASSES]].to_numpy(float)


def logits_of(path, mirrored=False):
    """Works the logits out from Pillow's pixels; areas are averaged, which keeps a half's mean."""
    pixels = np.asarray(PIL.Image.open(path).convert("RGB"), float)
    half = pixels.shape[1] // 2
    return (pixels[:, half:] if mirrored else pixels[:, :half]).mean(axis=(0, 1)) @ WEIGHTS


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


# What it reads


def test_folder_is_read_below_and_sorted(single_run, photo_folder):
    results = run(single_run, photo_folder)
    table = results["written"]
    expected = [str(photo_folder / name / f"{number:02d}.jpg") for name in CLASSES for number in range(12)]
    assert table["path"].tolist() == expected
    assert results["failed"] == 0
    columns = "path predicted probability answer reason similarity"
    columns += " probability_blue probability_green probability_red error"
    assert list(table.columns) == columns.split()
    assert table["predicted"].tolist() == [name for name in CLASSES for _ in range(12)]
    worked_out = np.array([softmax(logits_of(path)) for path in expected])
    np.testing.assert_allclose(by_class(table), worked_out, atol=0.005)
    np.testing.assert_allclose(table["probability"].to_numpy(float), worked_out.max(axis=1), atol=0.005)
    assert set(table["error"]) == {""}
    assert set(table["similarity"]) == {""}
    both = (found.drop(columns="similarity") for found in (results["predictions"], table))
    pd.testing.assert_frame_equal(*both, check_dtype=False)


def test_one_file_counts_whatever_its_ending(single_run, photo_folder):
    photo = single_run.parent / "photo[1]"
    photo.write_bytes((photo_folder / "green" / "01.jpg").read_bytes())
    table = run(single_run, photo)["written"]
    assert table[["path", "predicted"]].values.tolist() == [[str(photo), "green"]]


def test_list_keeps_its_order_names_and_repetitions(single_run, photo_folder):
    listed = ["red/03.jpg", "blue/00.jpg", "red/03.jpg"]
    table = pd.DataFrame({"note": ["x", "y", "z"], "path": listed})
    table.to_csv(single_run.parent / "list.csv", index=False)
    written = run(single_run, single_run.parent / "list.csv", image_directory=str(photo_folder))["written"]
    assert written["path"].tolist() == listed
    assert written["predicted"].tolist() == ["red", "blue", "red"]
    assert "note" not in written.columns
    # Other inputs ignore the folder.
    written = run(single_run, photo_folder / "red" / "00.jpg", image_directory="elsewhere")["written"]
    assert written["predicted"].tolist() == ["red"]


@pytest.mark.parametrize("image_directory", ["", "memory://bucket/photos", "elsewhere"])
def test_images_in_a_store_are_predicted_as_the_files_are(single_run, photo_folder, store, image_directory):
    names = ["red/03.jpg", "blue/00.jpg", "green/01.jpg", "red/99.jpg"]
    for name in names[:3]:
        store.put(f"memory://bucket/photos/{name}", (photo_folder / name).read_bytes())
    listed = names if image_directory.startswith("memory") else [f"memory://bucket/photos/{name}" for name in names]
    pd.DataFrame({"path": listed}).to_csv(single_run.parent / "list.csv", index=False)
    written = run(single_run, single_run.parent / "list.csv", image_directory=image_directory)["written"]
    assert written["path"].tolist() == listed
    assert written["predicted"].tolist() == ["red", "blue", "green", ""]
    assert "memory://bucket/photos/red/99.jpg" in written["error"][3]
    written_one = run(single_run, "memory://bucket/photos/green/01.jpg")["written"]
    assert written_one["predicted"].tolist() == ["green"]
    with pytest.raises(UserError, match="memory://bucket/b"):
        run(single_run, "memory://bucket/b")
    pd.DataFrame({"path": names[:3]}).to_csv(single_run.parent / "list.csv", index=False)
    of_files = run(single_run, single_run.parent / "list.csv", image_directory=str(photo_folder))["written"]
    np.testing.assert_array_equal(by_class(written[:3]), by_class(of_files))


# What cannot be read


def test_bad_files_do_not_stop_the_rest(single_run, bad_folder, capsys):
    results = run(single_run, bad_folder, batch_size=4, top_k=1)
    table = results["written"]
    assert results["failed"] == 4
    assert table["predicted"].tolist() == ["red", "", "", "", "blue", ""]
    assert table["top_1"].tolist() == ["red", "", "", "", "blue", ""]
    good, bad = table.iloc[[0, 4]], table.iloc[[1, 2, 3, 5]]
    assert set(good["error"]) == {""}
    numbers = ["probability", "top_1_probability", *(f"probability_{name}" for name in CLASSES)]
    assert (bad[numbers] == "").all(axis=None)
    for path, error in zip(bad["path"], bad["error"], strict=True):
        assert error.startswith(f"Cannot decode the image {path}")
    worked_out = [softmax(logits_of(path)) for path in good["path"]]
    np.testing.assert_allclose(by_class(good), worked_out, atol=0.005)
    printed = capsys.readouterr().out
    assert "Predicted 2 of 6 images" in printed
    assert "4 of 6 images could not be read" in printed


def test_missing_file_of_a_list_is_reported_in_one_line(single_run, photo_folder):
    listed = [str(photo_folder / "red" / "00.jpg"), "no\nsuch, file.jpg"]
    pd.DataFrame({"path": listed}).to_csv(single_run.parent / "list.csv", index=False)
    table = run(single_run, single_run.parent / "list.csv")["written"]
    assert table["path"].tolist() == listed
    assert table["error"][1].startswith("Cannot read the image no such, file.jpg: ")


def test_no_readable_image_is_an_error_that_the_output_explains(single_run, bad_folder):
    with pytest.raises(UserError, match="None of the 2 images .*predictions.csv .*Cannot decode the image"):
        run(single_run, bad_folder / "[bc]_*.jpg")
    written = pd.read_csv(single_run / "predictions.csv")
    assert written["error"].notna().tolist() == [True, True]


# Decisions


def test_multilabel_without_decision_has_threshold_one_half(multilabel_run, multilabel_csv, capsys):
    table = run(multilabel_run, multilabel_csv, image_directory=str(multilabel_csv.parent))["written"]
    worked_out = np.array([sigmoid(logits_of(multilabel_csv.parent / path)) for path in table["path"]])
    np.testing.assert_allclose(by_class(table), worked_out, atol=0.005)
    for predicted, row in zip(table["predicted"], worked_out, strict=True):
        assert predicted == "$".join(name for name, value in zip(CLASSES, row, strict=True) if value >= 0.5)
    assert "not fitted" in capsys.readouterr().out


def test_thresholds_and_temperature_of_the_run_decide(multilabel_run, photo_folder, capsys):
    photo = photo_folder / "red" / "00.jpg"
    # About 0.25, 0.43 and 0.71.
    blue, green, red = sigmoid(logits_of(photo) / 2)
    assert blue < green - 0.1 < red - 0.2
    write_decision(
        multilabel_run,
        multi_label=True,
        temperature=2.0,
        temperature_fitted_on="validation",
        exact_match_threshold=float(round((blue + green) / 2, 2)),
        best_f1_thresholds={"blue": float(blue - 0.02), "green": float(green + 0.02), "red": float(red + 0.02)},
        thresholds_fitted_on="validation",
    )
    exact = run(multilabel_run, photo)["written"].iloc[0]
    assert exact["predicted"] == "green$red"
    assert float(exact["probability"]) == pytest.approx(green, abs=0.005)
    assert float(exact["probability_red"]) == pytest.approx(red, abs=0.005)
    assert "exact_match, fitted on the validation set" in capsys.readouterr().out
    best_f1 = run(multilabel_run, photo, threshold_type="best_f1")["written"].iloc[0]
    assert best_f1["predicted"] == "blue"
    assert float(best_f1["probability"]) == pytest.approx(blue, abs=0.005)
    assert "(best_f1, fitted on the validation set)" in capsys.readouterr().out


def test_image_without_any_label_has_an_empty_prediction(multilabel_run, photo_folder):
    write_decision(multilabel_run, multi_label=True, exact_match_threshold=0.99, thresholds_fitted_on="training")
    results = run(multilabel_run, photo_folder / "green" / "00.jpg")
    row = results["written"].iloc[0]
    assert (row["predicted"], row["probability"], row["error"]) == ("", "", "")
    assert float(row["probability_green"]) > 0.5
    assert results["failed"] == 0


def test_temperature_changes_probabilities_and_no_answer(single_run, photo_folder, capsys):
    before = run(single_run, photo_folder / "red")["written"]
    write_decision(single_run, temperature=4.0, temperature_fitted_on="validation")
    after = run(single_run, photo_folder / "red")["written"]
    assert "temperature 4.00, fitted on the validation set" in capsys.readouterr().out
    assert before["predicted"].tolist() == after["predicted"].tolist()
    worked_out = [softmax(logits_of(path) / 4) for path in after["path"]]
    np.testing.assert_allclose(by_class(after), worked_out, atol=0.005)


def test_top_k_lists_the_most_probable_classes(single_run, photo_folder):
    photo = photo_folder / "red" / "00.jpg"
    row = run(single_run, photo, top_k=2)["written"].iloc[0]
    first, second = np.sort(softmax(logits_of(photo)))[:-3:-1]
    assert (row["top_1"], row["top_2"]) == ("red", "green")
    assert [row["top_1_probability"], row["top_2_probability"]] == pytest.approx([first, second], abs=0.005)
    assert "top_3" not in row


# Test-time augmentation, batches and workers


def test_flip_averages_an_image_with_its_mirror_image_before_the_temperature(single_run, multilabel_csv):
    # Left and right halves differ in colour, and the model looks at the left one.
    for temperature in (1, 3):
        write_decision(single_run, temperature=float(temperature), temperature_fitted_on="validation")
        table = run(
            single_run, multilabel_csv, image_directory=str(multilabel_csv.parent), test_time_augmentation="flip"
        )["written"]
        paths = [multilabel_csv.parent / path for path in table["path"]]
        both = [np.array([softmax(logits_of(path, mirrored)) for path in paths]) for mirrored in (False, True)]
        assert np.abs(both[0] - both[1]).max() > 0.5
        expected = np.mean(both, axis=0) ** (1 / temperature)
        np.testing.assert_allclose(by_class(table), expected / expected.sum(axis=1, keepdims=True), atol=0.005)


def test_copies_are_averaged_with_the_image_itself(single_run, multilabel_csv, monkeypatch):
    monkeypatch.setattr(predicting, "build_augmenter", lambda: FusedAugmenter([iaa.Fliplr(1.0)]))
    photo = multilabel_csv.parent / "03.jpg"
    row = run(single_run, photo, test_time_augmentation="3")["written"]
    expected = (softmax(logits_of(photo)) + 3 * softmax(logits_of(photo, mirrored=True))) / 4
    np.testing.assert_allclose(by_class(row)[0], expected, atol=0.005)


def test_copies_follow_from_the_seed_and_the_image_alone(single_run, photo_folder):
    def probabilities(given, **options):
        return by_class(run(single_run, given, test_time_augmentation="4", **options)["written"])

    first = probabilities(photo_folder / "red", batch_size=5)
    np.testing.assert_array_equal(probabilities(photo_folder / "red", batch_size=5, generator_workers=1), first)
    np.testing.assert_allclose(probabilities(photo_folder / "red", batch_size=1), first, atol=1e-6)
    np.testing.assert_allclose(probabilities(photo_folder / "red" / "07.jpg"), first[7:8], atol=1e-6)
    assert np.abs(probabilities(photo_folder / "red", random_seed=1) - first).max() > 1e-4
    assert np.abs(by_class(run(single_run, photo_folder / "red")["written"]) - first).max() > 1e-3


def test_batch_size_and_workers_do_not_matter(single_run, photo_folder):
    tables = [
        run(single_run, photo_folder, test_time_augmentation="flip", batch_size=batch_size, generator_workers=workers)[
            "written"
        ]
        for batch_size, workers in ((7, 1), (7, 3), (64, 2))
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2], rtol=1e-5, atol=1e-6)


# One image of the user's own code


def write_large_photo(path):
    """Writes a JPEG four times as large as the model's images, which is decoded at a reduced scale."""
    pixels = np.random.default_rng(3).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    cv2.imwrite(str(path), cv2.resize(pixels, (6 * SIZE, 5 * SIZE), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize("threshold_type", ["exact_match", "best_f1"])
def test_one_image_gets_the_same_answer_from_classify_image(multilabel_run, single_run, tmp_path, threshold_type):
    write_large_photo(tmp_path / "photo.jpg")
    image = read_image(str(tmp_path / "photo.jpg"), (SIZE, SIZE))
    assert image.shape == (5 * SIZE // 4, 6 * SIZE // 4, 3)
    by_name = {"blue": 0.2, "green": 0.9, "red": 0.1}
    for folder, multi_label in ((multilabel_run, True), (single_run, False)):
        thresholds = {"best_f1_thresholds": by_name, "thresholds_fitted_on": "training"} if multi_label else {}
        write_decision(
            folder, multi_label=multi_label, temperature=1.7, temperature_fitted_on="validation", **thresholds
        )
        row = run(folder, tmp_path / "photo.jpg", threshold_type=threshold_type)["written"]
        decision = read_decision(str(folder), CLASSES, multi_label, str(folder / "best_model.keras"))
        model = load_model(str(folder / "best_model.keras"))
        names, probabilities = classify_image(model, image, CLASSES, decision=decision, threshold_type=threshold_type)
        assert "$".join(names) == row["predicted"][0]
        np.testing.assert_allclose(by_class(row)[0], list(probabilities.values()), atol=1e-6)


# Options and the command line


@pytest.mark.parametrize("value", ["", "0", "101", "-1", "2.0", "mirror", "none5"])
def test_other_words_for_test_time_augmentation_are_refused(value):
    with pytest.raises(UserError, match=f"test_time_augmentation: .*'{value}'"):
        PredictConfigs(test_time_augmentation=value).validate()


def test_more_top_classes_than_there_are_are_refused(single_run, photo_folder):
    with pytest.raises(UserError, match="top_k: .* 3.* 4"):
        run(single_run, photo_folder, top_k=4)


def test_output_replaces_no_input(single_run, photo_folder, tmp_path):
    (tmp_path / "list.csv").write_text(f"path\n{photo_folder / 'red' / '00.jpg'}\n")
    for write_path, message in (
        (tmp_path / "list.csv", "write_path: .*list.csv"),
        (tmp_path / "photo.jpg", "write_path: "),
        (tmp_path, "write_path: "),
        (tmp_path / "list.csv" / "out.csv", "list.csv.*write_path"),
    ):
        with pytest.raises(UserError, match=message):
            run(single_run, tmp_path / "list.csv", write_path=str(write_path))
    assert (tmp_path / "list.csv").read_text().startswith("path\n")


def test_a_diverged_model_is_an_error(single_run, photo_folder):
    model = load_model(str(single_run / "best_model.keras"))
    model.set_weights([np.full((3, 3), np.nan, np.float32)])
    model.save(single_run / "best_model.keras")
    with pytest.raises(UserError, match="not finite"):
        run(single_run, photo_folder / "red")


@pytest.mark.slow
def test_command_line_writes_what_it_can_and_ends_with_0(single_run, bad_folder):
    output = single_run / "out" / "predictions.csv"
    (bad_folder / "notes.txt").write_text("")
    options = {"load_model_path": single_run, "input": bad_folder, "write_path": output, "gpu_percentage": 0}
    given = [
        part
        for name, value in (options | {"test_time_augmentation": "flip", "top_k": 3}).items()
        for part in (f"--{name}", str(value))
    ]
    command = [sys.executable, str(PROJECT / "predict.py"), *given]
    found = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    first, second, *_ = found.stdout.splitlines()
    assert first.startswith("Running on ")
    assert second.startswith("Left out 1 file ")
    assert "4 of 6 images could not be read" in found.stdout
    assert pd.read_csv(output, keep_default_na=False)["predicted"].tolist() == ["red", "", "", "", "blue", ""]


def test_users_mistake_ends_with_2_before_tensorflow_loads(tmp_path):
    code = "import runpy, sys\ntry: runpy.run_path('predict.py', run_name='__main__')\n"
    code += "finally: print('tensorflow' in sys.modules)"
    command = [sys.executable, "-c", code, "--input", str(tmp_path / "none.jpg")]
    found = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (2, "False\n")
    assert len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith("Error: ")
