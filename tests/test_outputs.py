"""Scripts write where the user says, and check that they can before any work."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import pandas as pd
import pytest
from exported_runs import run_folder  # noqa: F401
from small_runs import options_of, start, tables  # noqa: F401

import compress_weights
import draw_activations
import make_csv_from_folders
import plot_training_log
import predict
import split_train_test
import test as evaluation
import train
from configs import Configs
from finetune.core.files import check_folder, write_fault
from finetune.core.options import UserError
from finetune.evaluation.decision import Decision, find_decision_folder, read_decision, store_decision, write_decision
from finetune.reporting import report
from finetune.training import training
from finetune.training.resuming import read_state
from finetune.training.run import Phase
from finetune.training.workers import Team

PROJECT = Path(__file__).parent.parent
FAULTS = {
    errno.ENOSPC: "no space left",
    errno.EROFS: "read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENOTDIR: "is a file",
}


def run_test(**options):
    return evaluation.main(Configs(**options))


def list_tree(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(Path(folder).rglob("*"))}


def test_the_reason_of_a_fault_is_named():
    for number, reason in FAULTS.items():
        message = str(write_fault("out/a", OSError(number, os.strerror(number)), "save_model_path"))
        assert [other for other in FAULTS.values() if other in message] == [reason] * [*FAULTS.values()].count(reason)
        assert "out/a" in message
        assert "another save_model_path" in message
    hdf5 = OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')")
    assert FAULTS[errno.ENOSPC] in str(write_fault("a", hdf5))


def test_a_folder_is_checked_without_being_made(tmp_path):
    check_folder(str(tmp_path / "new" / "deep"), "save_model_path")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match="is a file, not a folder.*another write_folder"):
            check_folder(str(tmp_path / name), "write_folder")


ON_REAL_DISKS = """
import os, subprocess, sys
from finetune.core.files import check_folder, write_text
from finetune.core.options import UserError
full, fixed = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", full], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", fixed], check=True)
with open(f"{full}/filler", "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
for folder in (full, fixed, f"{fixed}/below"):
    for work in (lambda: check_folder(folder, "path"), lambda: write_text(f"{folder}/a.txt", "x" * 9999)):
        try:
            work()
        except UserError as error:
            print(error)
"""


def test_a_full_and_a_read_only_disk_are_noticed(tmp_path):
    for name in ("full", "fixed"):
        (tmp_path / name).mkdir()
    alone = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace")
    words = [*alone, sys.executable, "-c", ON_REAL_DISKS, str(tmp_path / "full"), str(tmp_path / "fixed")]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    assert all(FAULTS[errno.ENOSPC] in line for line in lines[:2])
    assert all(FAULTS[errno.EROFS] in line for line in lines[2:])


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (make_csv_from_folders.main, make_csv_from_folders.FolderConfigs(write_path="file/all.csv")),
        (split_train_test.main, split_train_test.SplitConfigs(write_folder="file")),
        (predict.main, predict.PredictConfigs(load_model_path="run", input="photo.jpg", write_path="file/a.csv")),
        (plot_training_log.main, plot_training_log.PlotConfigs(load_model_path="run", write_path="file/a.png")),
        (draw_activations.main, Configs(load_model_path="run", save_model_path="file")),
        (compress_weights.main, compress_weights.CompressConfigs(model_path="run", save_model_path="file")),
        (train.main, Configs(save_model_path="file/run")),
        (evaluation.main, Configs(load_model_path="run", save_model_path="file")),
    ],
    ids=["make_csv", "split", "predict", "plot", "draw", "compress", "train", "test"],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, script, options):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("photo.jpg").touch()
    Path("run").mkdir()
    Path("run/best_model.keras").write_text("not even a model")
    Path("run/configs.json").write_text(json.dumps({"classes": ["a", "b"], "test_csv": "none.csv"}))
    Path("run/training_log.csv").write_text("epoch,loss,val_loss\n1,0.7,0.6\n")
    with pytest.raises(UserError, match="Cannot write file.*is a file, not a folder. Choose another"):
        script(options)


def test_a_split_goes_to_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [(f"{number}.jpg", "ab"[number % 2]) for number in range(20)]
    pd.DataFrame(rows, columns=["path", "class"]).to_csv("all.csv", index=False)
    split_train_test.main(split_train_test.SplitConfigs(csv_path="all.csv", write_folder="out/new"))
    assert sorted(os.listdir("out/new")) == ["testing_set.csv", "training_set.csv"]
    assert sorted(os.listdir()) == ["all.csv", "out"]
    with pytest.raises(UserError, match="images that cannot be read|found errors"):
        split_train_test.main(split_train_test.SplitConfigs(csv_path="all.csv", write_folder="out/more", verify=True))
    assert os.listdir("out/more") == ["data_report.csv"]


def test_a_plot_goes_to_another_place_in_its_own_format(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    (tmp_path / "training_log.csv").write_text("epoch,loss,val_loss\n1,0.7,0.6\n2,0.5,0.4\n")
    path = str(tmp_path / "out" / "curves.svg")
    options = {"train_log_path": str(tmp_path / "training_log.csv"), "write_path": path}
    assert plot_training_log.main(plot_training_log.PlotConfigs(**options).validate()) == {"path": path}
    assert "<svg" in Path(path).read_text()
    assert sorted(os.listdir(tmp_path)) == ["out", "training_log.csv"]
    with pytest.raises(UserError, match=r"write_path: expected a name that ends in \.png"):
        plot_training_log.PlotConfigs(write_path="curves.docx").validate()


@pytest.mark.slow
def test_a_test_that_writes_elsewhere_leaves_the_run_alone(run_folder, tmp_path, capsys):
    stored = json.loads((run_folder / "configs.json").read_text())
    (run_folder / "configs.json").write_text(json.dumps(stored | {"validation_csv": stored["train_csv"]}))
    (run_folder / "training_log.csv").write_text("epoch,loss,val_loss\n1,0.7,0.6\n2,0.5,0.4\n")
    before, out = list_tree(run_folder), tmp_path / "out"
    run_test(load_model_path=str(run_folder), save_model_path=str(out))
    assert list_tree(run_folder) == before
    assert {"decision.json", "evaluation"} <= set(os.listdir(out))
    assert "loss" in (out / "evaluation" / "report.html").read_text()
    decision = json.loads((out / "decision.json").read_text())
    (out / "decision.json").write_text(json.dumps(decision | {"temperature": 2.0}))
    photos = str(tmp_path / "test.csv")
    options = {"load_model_path": str(run_folder), "input": photos, "write_path": str(tmp_path / "answers.csv")}
    capsys.readouterr()
    predict.main(predict.PredictConfigs(**options, save_model_path=str(out)))
    assert "calibrated with temperature 2.00" in capsys.readouterr().out
    predict.main(predict.PredictConfigs(**options))
    assert "the model's own" in capsys.readouterr().out


def test_results_are_printed_even_if_they_cannot_be_written(run_folder, tmp_path, capsys, monkeypatch):
    def fail(path, content):
        raise write_fault(path, OSError(errno.ENOSPC, ""))

    monkeypatch.setattr(report, "write_json", fail)
    with pytest.raises(UserError, match="no space left"):
        run_test(load_model_path=str(run_folder), save_model_path=str(tmp_path / "out"))
    assert "accuracy: 1.0000" in capsys.readouterr().out


def test_a_fitted_decision_is_not_replaced_by_an_unfitted_one(tmp_path):
    model = str(tmp_path / "best_model.keras")
    fitted = Decision(["a", "b"], False, 2.0, "validation", model="best_model.keras")
    store_decision(str(tmp_path), fitted, model)
    store_decision(str(tmp_path), Decision(["a", "b"], False, model="best_model.keras"), model)
    assert read_decision(str(tmp_path), ["a", "b"], False, model).temperature == 2
    store_decision(str(tmp_path / "new"), fitted, str(tmp_path / "model.tflite"))
    assert not (tmp_path / "new").exists()
    assert find_decision_folder(model, str(tmp_path / "new")) == str(tmp_path)
    write_decision(str(tmp_path / "new"), fitted)
    assert find_decision_folder(model, str(tmp_path / "new")) == str(tmp_path / "new")


@pytest.mark.slow
def test_compressed_weights_go_to_another_folder(run_folder, tmp_path):
    before, out = list_tree(run_folder), tmp_path / "out"
    options = {"model_path": str(run_folder), "save_model_path": str(out)}
    compress_weights.main(compress_weights.CompressConfigs(**options))
    assert list_tree(run_folder) == before
    expected = {"best_model_compressed.h5", "best_model_compressed.json", "best_model_labels.txt"}
    assert set(os.listdir(out)) == expected | {"best_model_metadata.json", "compression_report.json"}


@pytest.mark.parametrize(
    ("options", "files", "learning"),
    [
        # The best, the latest and the one in progress; weights and two moments of each.
        ({}, 3, 3),
        ({"optimizer_type": "SGD"}, 3, 1),
        ({"ema_decay": 0.9}, 3, 4),
        ({"model_selection": "interpolate", "head_initialization": "linear_probe"}, 4, 3),
        ({"save_best_model_only": False, "num_epochs": 7}, 8, 3),
    ],
    ids=str,
)
def test_room_for_the_checkpoints_is_checked(tmp_path, monkeypatch, options, files, learning):
    layers = [keras.layers.Dense(1000), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((500,)), *layers])
    needed = files * 4 * learning * (501 * 1000 + 1001 * 3)
    configs = Configs(save_model_path=str(tmp_path / "run"), **options)
    run = SimpleNamespace(configs=configs, model=model, state=None, team=Team())
    for free in (needed, needed - 1):
        usage = shutil._ntuple_diskusage(10**12, 0, free)
        monkeypatch.setattr(training.shutil, "disk_usage", lambda path, usage=usage: usage)
        if free == needed:
            training.check_room(run, Phase(0, 1, 1e-3, False))
            continue
        with pytest.raises(UserError, match=f"need .*up to {files} files.*another save_model_path"):
            training.check_room(run, Phase(0, 1, 1e-3, False))
        # A continued run replaces its files.
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "best_model.keras").write_bytes(bytes(2))
        os.link(tmp_path / "run" / "best_model.keras", tmp_path / "run" / "latest_model.keras")
        training.check_room(run, Phase(0, 1, 1e-3, False))


@pytest.mark.slow
def test_the_metrics_of_an_epoch_that_cannot_be_kept_are_printed(tables, tmp_path, capsys, monkeypatch):
    def fail(path, content):
        raise write_fault(path, OSError(errno.EROFS, ""))

    monkeypatch.setattr("finetune.training.run.write_csv", fail)
    with pytest.raises(UserError, match=r"training_log\.csv: the file system is read-only"):
        start(**options_of(tables, tmp_path / "run", num_epochs=1))
    log = read_state(str(tmp_path / "run" / "latest_model.keras"))["log"]
    assert f"Epoch 1: accuracy {log[0]['accuracy']:.4f}, loss {log[0]['loss']:.4f}" in capsys.readouterr().out
