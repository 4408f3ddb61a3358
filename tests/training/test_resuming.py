"""A run that is stopped anywhere and continued ends with the bits of one that was not."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_runs import (
    assert_same_run,
    options_of,
    start,
    stop_at,  # noqa: F401
    tables,  # noqa: F401
    uninterrupted,  # noqa: F401
)

import train
from configs import Configs
from finetune.core.options import UserError
from finetune.training.training_state import read_state
from model import ModelFactory

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_runs_are_the_same_whatever_the_number_of_workers(tables, uninterrupted, tmp_path):
    start(**options_of(tables, tmp_path / "again", generator_workers=1))
    assert_same_run(uninterrupted, tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["", "latest_model.keras", "best_model.keras"])
def test_a_run_of_fewer_epochs_continues_to_the_same_model(tables, uninterrupted, tmp_path, model_name):
    options = options_of(tables, tmp_path / "run", num_epochs=2)
    start(**options)
    start(**options | {"num_epochs": 3, "load_model_path": str(tmp_path / "run" / model_name)})
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.slow
def test_the_plateau_goes_on_after_a_stop_within_an_epoch(tables, tmp_path, stop_at, monkeypatch):
    # A frozen backbone and tiny steps: the loss changes by less than what counts as better.
    still = {"conv_layers_to_train": 0, "optimizer_type": "SGD", "learning_rate": 1e-6, "minimum_learning_rate": 1e-9}
    options = options_of(tables, tmp_path / "whole", num_epochs=5, reduce_lr_patience=2, **still)
    start(**options)
    rates = pd.read_csv(tmp_path / "whole" / "training_log.csv")["learning_rate"]
    np.testing.assert_allclose(rates, [1e-6, 1e-6, 1e-6, 1e-7, 1e-7], rtol=1e-5)
    options |= {"save_model_path": str(tmp_path / "run")}
    stop_at(2, 3)
    with pytest.raises(SystemExit):
        start(**options)
    monkeypatch.undo()
    start(**options | {"load_model_path": str(tmp_path / "run")})
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision_goes_on_exactly(tables, tmp_path, stop_at, monkeypatch, kind):
    def choose():
        return f"mixed_{kind}"

    monkeypatch.setattr("finetune.core.devices.choose_mixed_policy", choose)
    options = options_of(tables, tmp_path / "whole", num_epochs=2, mixed_precision=True)
    start(**options)
    options |= {"save_model_path": str(tmp_path / "run")}
    stop_at(1, 3)
    with pytest.raises(SystemExit):
        start(**options)
    monkeypatch.undo()
    monkeypatch.setattr("finetune.core.devices.choose_mixed_policy", choose)
    start(**options | {"load_model_path": str(tmp_path / "run")})
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_cache_changes_no_bit_in_memory_on_the_disk_or_when_it_is_known_already(tables, tmp_path):
    # Without one the picture itself is warped, not what it was resized to: these are other pixels.
    folder = str(tmp_path / "cache")
    for name, kind in (("memory", "memory"), ("disk", "disk"), ("again", "disk")):
        start(**options_of(tables, tmp_path / name, image_cache=kind, image_cache_path=folder))
        assert_same_run(tmp_path / "memory", tmp_path / name)


def test_a_finished_run_says_so_and_changes_nothing(tables, uninterrupted, capsys):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    start(**options_of(tables, uninterrupted, load_model_path=str(uninterrupted)))
    assert "has completed its 3 epochs" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("batch_size", 8), ("random_seed", 5), ("visual_model_name", "VGG16"), ("optimizer_type", "SGD")),
        *(("image_target_size", (64, 64, 3)), ("conv_layers_to_train", 0), ("classifier_layer_sizes", [])),
    ],
)
def test_an_option_that_would_change_the_run_is_refused(tables, uninterrupted, option, value):
    options = options_of(tables, uninterrupted, load_model_path=str(uninterrupted), num_epochs=9)
    with pytest.raises(UserError, match=f"{option} was .*now "):
        start(**options | {option: value})


def test_other_images_are_refused(tables, uninterrupted, tmp_path):
    table = pd.read_csv(tables[0])
    table.iloc[::-1].to_csv(tmp_path / "training_set.csv", index=False)
    options = options_of(tables, uninterrupted, load_model_path=str(uninterrupted), num_epochs=9)
    with pytest.raises(UserError, match="images or labels of train_csv are not those that the run began with"):
        start(**options | {"train_csv": str(tmp_path / "training_set.csv")})


@pytest.mark.slow
def test_what_is_safe_to_change_is_said(tables, tmp_path, capsys):
    options = options_of(tables, tmp_path / "run", num_epochs=1)
    start(**options)
    start(**options | {"load_model_path": str(tmp_path / "run"), "num_epochs": 2, "learning_rate": 1e-4})
    printed = capsys.readouterr().out
    assert "num_epochs changes from 1 to 2." in printed
    assert "learning_rate changes from 0.001 to 0.0001." in printed
    log = pd.read_csv(tmp_path / "run" / "training_log.csv")
    assert log["learning_rate"].tolist() == pytest.approx([1e-3, 1e-4])


@pytest.mark.slow
def test_options_of_the_first_command_line_hold_on(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=1)
    start(**options)
    kept = {name: options[name] for name in ("train_csv", "test_csv", "save_model_path", "use_imagenet_weights")}
    with_defaults = Configs(**kept, load_model_path=str(tmp_path / "run"))
    assert train.main(with_defaults)["epochs_completed"] == 1


@pytest.mark.slow
def test_another_runs_models_are_not_overwritten_unless_asked(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=1, save_best_model_only=False)
    start(**options)
    before = (tmp_path / "run" / "latest_model.keras").read_bytes()
    with pytest.raises(UserError, match="holds the models of another run"):
        start(**options)
    assert (tmp_path / "run" / "latest_model.keras").read_bytes() == before
    start(**options | {"overwrite": True, "save_best_model_only": True, "random_seed": 3})
    assert not (tmp_path / "run" / "model_epoch_001.keras").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tables, tmp_path, monkeypatch):
    original = ModelFactory.get_model

    def get_model(self, configs):
        model = original(self, configs)
        model.get_layer("classifier").layers[-2].kernel.assign_add([[np.nan] * 3] * 128)
        return model

    monkeypatch.setattr(ModelFactory, "get_model", get_model)
    with pytest.raises(UserError, match="The loss is nan in epoch 1, step 1"):
        start(**options_of(tables, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*.keras"))


@pytest.mark.slow
def test_early_stopping_ends_the_run_and_resuming_it_changes_nothing(tables, tmp_path, capsys):
    options = options_of(tables, tmp_path / "run", num_epochs=12, early_stopping_patience=2, learning_rate=1e-7)
    results = start(**options)
    log = pd.read_csv(tmp_path / "run" / "training_log.csv")
    assert len(log) == results["best_epoch"] + 2 < 12
    assert log["val_accuracy"].idxmax() + 1 == results["best_epoch"]
    capsys.readouterr()
    start(**options | {"load_model_path": str(tmp_path / "run")})
    assert "has completed" in capsys.readouterr().out


def spoil(path):
    """Damages the middle of a JPEG; its header and its end stay whole."""
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + data[middle + len(data) // 4 :])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"learning_rate_schedule": "cosine"}, {"ema_decay": 0.9}], ids=str)
def test_an_unreadable_validation_image_costs_nothing_of_the_epoch(tables, tmp_path, options):
    validation = pd.read_csv(tables[1])
    lost = tmp_path / "lost.jpg"
    shutil.copy(validation["path"][4], lost)
    spoil(lost)
    validation.loc[4, "path"] = str(lost)
    validation.to_csv(tmp_path / "validation.csv", index=False)
    sets = tables[0], tmp_path / "validation.csv"
    start(**options_of(sets, tmp_path / "whole", num_epochs=2, skip_bad_images=True, **options))
    folder = tmp_path / "a run"
    # Reading headers alone does not find the damage before training.
    with pytest.raises(UserError) as caught:
        start(**options_of(sets, folder, num_epochs=2, verify_data="headers", **options))
    assert re.search(r"lost\.jpg: it is damaged.*--verify_data full.*--skip_bad_images True", str(caught.value))
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command == [
        *("python", "train.py", "--configs", f"{folder}/configs.json", "--load_model_path", str(folder)),
        *("--skip_bad_images", "True"),
    ]
    state = read_state(str(folder / "latest_model.keras"))
    assert (state["epochs_completed"], state["steps_completed"]) == (0, 7)
    done = subprocess.run([sys.executable, *command[1:]], cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # A best model with averaged weights carries no state.
    assert_same_run(
        tmp_path / "whole", folder, ["latest_model.keras", *["best_model.keras"] * ("ema_decay" not in options)]
    )
