"""An interrupted prediction resumes, with the same results as without the interruption."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coloured_runs import CLASSES, build_run, run

from finetune.core.options import UserError
from finetune.predicting import kept_answers, predicting
from finetune.predicting.kept_answers import KeptAnswers, identify, list_facts
from predict import PredictConfigs

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(photo_folder, tmp_path):
    """12 photos and 4 files that are none, in an order that mixes them: 4 batches of 4."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        shutil.copy(photo_folder / CLASSES[number % 3] / f"{number:02d}.jpg", folder / f"{number:02d}.jpg")
    for number in (1, 5, 6, 11):
        (folder / f"{number:02d}_text.jpg").write_text("no image")
    return folder


@pytest.fixture
def seen(monkeypatch):
    """The names of the files that are read."""
    names, read = [], predicting.read_image

    def note(path, *arguments, **options):
        names.append(os.path.basename(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(predicting, "read_image", note)
    return names


def predict_in_one_go(run_folder, given, **options):
    path = run_folder / "whole.csv"
    run(run_folder, given, **{"batch_size": 4, **options, "write_path": str(path)})
    return path.read_bytes()


def resume(run_folder, given, **options):
    run(run_folder, given, **{"batch_size": 4, **options})
    assert not (run_folder / ".predictions.csv.partial").exists()
    return (run_folder / "predictions.csv").read_bytes()


WAYS = [
    (False, {"test_time_augmentation": "2", "random_seed": 3}),
    (True, {"top_k": 3, "threshold_type": "best_f1", "test_time_augmentation": "flip"}),
]


@pytest.mark.parametrize(("multi_label", "options"), WAYS)
def test_an_interrupted_prediction_resumes_and_ends_with_the_same_file(
    tmp_path, folder, seen, capsys, monkeypatch, multi_label, options
):
    run_folder, add, number = build_run(tmp_path / "run", multi_label), KeptAnswers.add, []
    expected = predict_in_one_go(run_folder, folder, **options)

    def add_some(self, *arguments):
        add(self, *arguments)
        number.append(1)
        if len(number) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptAnswers, "add", add_some)
        with pytest.raises(KeyboardInterrupt):
            run(run_folder, folder, batch_size=4, **options)
    assert not (run_folder / "predictions.csv").exists()
    assert "12 of 16 images are kept" in capsys.readouterr().err
    seen.clear()
    assert resume(run_folder, folder, **options) == expected
    assert "12 of 16 images already predicted" in capsys.readouterr().out
    assert sorted(seen) == [path.name for path in sorted(folder.iterdir())[12:]]


KILLED = """
import json, os, signal, sys
import predict
from finetune.predicting.kept_answers import KeptAnswers

add, number = KeptAnswers.add, []

def add_some(self, *arguments):
    add(self, *arguments)
    number.append(1)
    if len(number) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

KeptAnswers.add = add_some
predict.main(predict.PredictConfigs(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")
def test_a_killed_prediction_resumes(tmp_path, folder, capsys):
    run_folder = build_run(tmp_path / "run", False)
    options = {"load_model_path": str(run_folder), "write_path": str(run_folder / "predictions.csv")}
    options |= {"input": str(folder), "generator_workers": 2, "batch_size": 4}
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(options)], cwd=PROJECT, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert resume(run_folder, folder) == predict_in_one_go(run_folder, folder)
    assert "8 of 16 images already predicted" in capsys.readouterr().out


# The file alone: the sum of an image's bytes replaces the model's answer


def answer(table, folder, batches=None, facts=(), batch_size=4):
    """Predicts a folder's files, and stops after so many batches.

    Returns:
        The answers, NaN if they are missing, the errors, and the number of missing answers at the start.
    """
    paths = [str(path) for path in sorted(folder.iterdir())]
    kept = KeptAnswers(str(table), paths, batch_size, 1, dict.fromkeys(facts))
    with contextlib.suppress(KeyboardInterrupt), kept:
        missing = kept.missing
        kept.probabilities[missing] = np.nan
        for number, start in enumerate(range(0, len(missing), batch_size)):
            if number == batches:
                raise KeyboardInterrupt
            rows = missing[start : start + batch_size]
            identities = [identify(paths[row]) for row in rows]
            values = [[sum(Path(paths[row]).read_bytes()) if os.path.exists(paths[row]) else 0] for row in rows]
            kept.add(
                rows,
                (np.array(values), np.zeros(len(rows))),
                {int(row): "bad" for row in rows if "text" in paths[row]},
                identities,
            )
    return kept.probabilities.ravel().tolist(), kept.errors, len(missing)


@pytest.fixture
def table(tmp_path):
    return tmp_path / "predictions.csv"


@pytest.fixture
def partial(tmp_path):
    return tmp_path / ".predictions.csv.partial"


def replace_unseen(folder):
    """Replaces a photo by another one of its size and time."""
    path, status = folder / "05.jpg", (folder / "05.jpg").stat()
    (folder.parent / "new").write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(folder.parent / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(folder.parent / "new", path)


CHANGES = {
    "replaced": (replace_unseen, 8),
    "mended": (lambda folder: shutil.copy(folder / "00.jpg", folder / "05_text.jpg"), 8),
    "added at the end": (lambda folder: shutil.copy(folder / "00.jpg", folder / "12.jpg"), 12),
    "added in front": (lambda folder: shutil.copy(folder / "07.jpg", folder / "000.jpg"), 0),
    "removed": (lambda folder: (folder / "05.jpg").unlink(), 4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_images_that_have_changed_are_predicted_again(tmp_path, folder, table, partial, capsys, change):
    answer(table, folder, 3)
    alter, number = CHANGES[change]
    alter(folder)
    capsys.readouterr()
    answers, errors, computed = answer(table, folder)
    assert (answers, errors) == answer(tmp_path / "whole.csv", folder)[:2]
    assert computed == len(answers) - number
    printed = capsys.readouterr().out
    assert f"{number} of {len(answers)} images already predicted" in printed
    assert (f"{12 - number} more have changed" in printed) == (number < 12)
    assert not partial.exists()


def test_files_that_were_missing_are_read_once_they_are_there(folder, table):
    gone = folder.parent / "gone"
    (folder / "05.jpg").rename(gone)
    (folder / "05.jpg").symlink_to(gone.parent / "nowhere")
    answer(table, folder, 3)
    assert answer(table, folder, 0)[2] == 4
    gone.rename(gone.parent / "nowhere")
    assert answer(table, folder)[2] == 8


@pytest.mark.parametrize("options", [{"facts": ["another model"]}, {"batch_size": 3}])
def test_another_model_or_other_options_start_over(folder, table, partial, capsys, options):
    answer(table, folder, 3)
    capsys.readouterr()
    # A script has the size of the batches among the options.
    options = {"facts": ["another size"]} | options
    assert answer(table, folder, **options)[2] == 16
    assert f"Starting over: {partial}" in capsys.readouterr().out


DAMAGES = {
    "cut": (lambda content: content[:-9], 12),
    "line without its end": (lambda content: content[:-1], 12),
    "zeros": (lambda content: content + b"\0" * 50, 8),
    "list": (lambda content: content + b"[]\n", 8),
    "empty": (lambda content: b"", 16),
    "cut header": (lambda content: content[:20], 16),
    "beyond the images": (lambda content: content.replace(b'"batch": 1', b'"batch": 9'), 12),
    "below the images": (lambda content: content.replace(b'"batch": 1', b'"batch": -1'), 12),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_used_up_to_the_damage(folder, tmp_path, table, partial, damage):
    answer(table, folder, 2)
    alter, number = DAMAGES[damage]
    partial.write_bytes(alter(partial.read_bytes()))
    # Lines that are written after the damage can be read.
    assert answer(table, folder, 1)[2] == number
    answers, errors, computed = answer(table, folder)
    assert (answers, errors) == answer(tmp_path / "whole.csv", folder)[:2]
    assert computed == number - 4


def test_error_before_the_first_answer_leaves_nothing(folder, table, partial):
    answer(table, folder, 0)
    assert not partial.exists()


def test_two_predictions_into_one_file_are_refused(folder, table, partial):
    with KeptAnswers(str(table), ["a.jpg"], 4, 1, {}):
        with pytest.raises(UserError, match="Another process .*predictions.csv"):
            answer(table, folder)
        assert partial.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_is_an_error_and_the_kept_answers_stay(folder, table, partial, monkeypatch):
    answer(table, folder, 2)
    content, read = partial.read_bytes(), KeptAnswers._read
    with open("/dev/full", "ab", buffering=0) as full:
        monkeypatch.setattr(KeptAnswers, "_read", lambda self: (read(self), setattr(self, "_file", full)))
        with pytest.raises(UserError, match="Cannot write .*partial: .*no space left"):
            answer(table, folder)
    assert partial.read_bytes() == content


def test_images_in_a_store_go_on_unless_they_change(store):
    store.put("memory://bucket/a", b"1")
    first = identify("memory://bucket/a")
    assert identify("memory://bucket/a") == first
    store.put("memory://bucket/a", b"2")
    assert None not in (first, identify("memory://bucket/a"))
    assert identify("memory://bucket/a") != first
    # Without an identity, an object may have changed.
    assert identify("memory://bucket/b") is None


def test_answer_without_identity_is_not_kept(table):
    with contextlib.suppress(KeyboardInterrupt), KeptAnswers(str(table), ["a", "b"], 1, 1, {}) as kept:
        kept.add(np.array([0]), (np.ones((1, 1)), np.ones(1)), {}, [None])
        kept.add(np.array([1]), (np.ones((1, 1)), np.ones(1)), {}, ["missing"])
        raise KeyboardInterrupt
    with KeptAnswers(str(table), ["a", "b"], 1, 1, {}) as kept:
        assert kept.missing.tolist() == [0]


def test_facts_are_the_model_and_the_options_that_count(tmp_path, monkeypatch):
    model, folder = tmp_path / "model.keras", tmp_path / "saved_model"
    model.write_bytes(b"1")
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"1")
    configs = PredictConfigs(input="a")

    def list_all(**options):
        return [list_facts(configs.replace(**options), str(path)) for path in (model, folder)]

    facts, copies = list_all(), list_all(test_time_augmentation="2")
    assert list_all(generator_workers=9, top_k=3, write_path="b", verbose=True) == facts
    for options in (
        {"test_time_augmentation": "flip"},
        {"batch_size": 3},
        {"classes": ["a", "b"]},
        {"input": "b"},
        {"random_seed": 1},
    ):
        assert list_all(**options)[0] != facts[0]
    (tmp_path / "augmenter.py").write_bytes(b"other augmentations")
    monkeypatch.setattr(kept_answers, "AUGMENTER", str(tmp_path / "augmenter.py"))
    assert list_all() == facts
    assert list_all(test_time_augmentation="2")[0] != copies[0]
    for path, position in ((model, 0), (tmp_path / "model.json", 0), (folder / "saved_model.pb", 1)):
        times = path.stat().st_mtime_ns if path.exists() else 0
        path.write_bytes(b"2")
        os.utime(path, ns=(times, times))
        changed = list_all()
        assert changed[position] != facts[position]
        facts = changed
