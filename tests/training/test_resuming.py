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

from configs import Configs
from finetune.core.options import UserError
from finetune.training.resuming import check_same_data, configs_to_continue, read_state, report_end
from finetune.training.run_folder import fingerprint
from generator import AugmentedImageSequence
from model import ModelFactory

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_runs_are_the_same_whatever_the_number_of_workers(tables, uninterrupted, tmp_path):
    start(**options_of(tables, tmp_path / "again", generator_workers=1))
    assert_same_run(uninterrupted, tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["", "best_model.keras"])
def test_a_run_of_fewer_epochs_continues_to_the_same_model(tables, uninterrupted, tmp_path, model_name):
    options = options_of(tables, tmp_path / "run", num_epochs=2)
    start(**options)
    start(**options | {"num_epochs": 3, "load_model_path": str(tmp_path / "run" / model_name)})
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.slow
def test_the_plateau_continues_after_a_stop_within_an_epoch(tables, tmp_path, stop_at):
    # A frozen backbone and tiny steps: the loss changes by less than an improvement.
    still = {"conv_layers_to_train": 0, "optimizer_type": "SGD", "learning_rate": 1e-6, "minimum_learning_rate": 1e-9}
    options = options_of(tables, tmp_path / "whole", num_epochs=5, reduce_lr_patience=2, **still)
    start(**options)
    rates = pd.read_csv(tmp_path / "whole" / "training_log.csv")["learning_rate"]
    np.testing.assert_allclose(rates, [1e-6, 1e-6, 1e-6, 1e-7, 1e-7], rtol=1e-5)
    options |= {"save_model_path": str(tmp_path / "run")}
    stop_at(2, 3, **options)
    start(**options | {"load_model_path": str(tmp_path / "run")})
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision_continues_exactly(tables, tmp_path, stop_at, monkeypatch, kind):
    monkeypatch.setattr("finetune.core.devices.choose_mixed_policy", lambda: f"mixed_{kind}")
    options = options_of(tables, tmp_path / "whole", num_epochs=2, mixed_precision=True)
    start(**options)
    options |= {"save_model_path": str(tmp_path / "run")}
    stop_at(1, 3, **options)
    start(**options | {"load_model_path": str(tmp_path / "run")})
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_cache_changes_no_bit_in_memory_on_the_disk_or_when_it_is_known_already(tables, tmp_path):
    # Without a cache the original image is augmented, not the resized one: these are other pixels.
    folder = str(tmp_path / "cache")
    for name, kind in (("memory", "memory"), ("disk", "disk"), ("again", "disk")):
        start(**options_of(tables, tmp_path / name, image_cache=kind, image_cache_path=folder, num_epochs=1))
        assert_same_run(tmp_path / "memory", tmp_path / name)


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(tables, uninterrupted, capsys):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    start(**options_of(tables, uninterrupted, load_model_path=str(uninterrupted)))
    assert "has completed its 3 epochs" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


@pytest.mark.slow
def test_a_run_killed_before_its_last_epoch_was_logged_gets_its_logs_and_card(tables, uninterrupted, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(uninterrupted, folder)
    kept = {name: (folder / name).read_bytes() for name in ("training_log.csv", ".training_stats.json")}
    whole = kept["training_log.csv"].splitlines(keepends=True)
    (folder / "training_log.csv").write_bytes(b"".join(whole[:-1]))
    (folder / ".training_stats.json").unlink()
    (folder / "MODEL_CARD.md").unlink(missing_ok=True)
    start(**options_of(tables, folder, load_model_path=str(folder)))
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert (folder / "MODEL_CARD.md").is_file()


def make_state(**options):
    return {"configs": Configs(**options).to_dict(), "given": sorted(options), "epochs_completed": 1}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("batch_size", 8), ("random_seed", 5), ("visual_model_name", "VGG16"), ("optimizer_type", "SGD")),
        *(("image_target_size", (64, 64, 3)), ("conv_layers_to_train", 0), ("classifier_layer_sizes", [])),
    ],
)
def test_an_option_that_would_change_the_run_is_refused(tmp_path, option, value):
    path = str(tmp_path / "run" / "latest_model.keras")
    with pytest.raises(UserError, match=f"{option} was .*now .*run/configs.json"):
        configs_to_continue(Configs(**{option: value}), make_state(random_seed=1, batch_size=4), path)


def test_options_of_the_first_command_line_persist_and_safe_changes_are_printed(tmp_path, capsys):
    state, path = make_state(batch_size=4, num_epochs=1, reduce_lr_patience=7), str(tmp_path / "latest_model.keras")
    configs = configs_to_continue(Configs(num_epochs=2, learning_rate=1e-4), state, path)
    found = (configs.batch_size, configs.reduce_lr_patience, configs.num_epochs, configs.learning_rate)
    assert found == (4, 7, 2, 1e-4)
    printed = capsys.readouterr().out
    assert "num_epochs changes from 1 to 2." in printed
    assert "learning_rate changes from 0.001 to 0.0001." in printed


def test_other_images_are_refused():
    def images(*names):
        return AugmentedImageSequence(list(names), np.zeros(2, int), (8, 8), 2)

    state = {"data": {name: fingerprint(images("a.jpg", "b.jpg")) for name in ("train_csv", "validation_csv")}}
    state |= {"steps_completed": 0}
    check_same_data(state, images("a.jpg", "b.jpg"), images("elsewhere/a.jpg", "b.jpg"))
    for option, sets in (("train_csv", ("ba", "ab")), ("validation_csv", ("ab", "ba"))):
        with pytest.raises(UserError, match=f"labels of {option}"):
            check_same_data(state, *(images(*(f"{letter}.jpg" for letter in names)) for names in sets))


@pytest.mark.slow
def test_safe_changes_reach_the_continued_run_and_another_run_is_not_overwritten_unless_asked(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=1, save_best_model_only=False)
    start(**options)
    before = (tmp_path / "run" / "latest_model.keras").read_bytes()
    with pytest.raises(UserError, match="holds the models of another run"):
        start(**options)
    assert (tmp_path / "run" / "latest_model.keras").read_bytes() == before
    start(**options | {"load_model_path": str(tmp_path / "run"), "num_epochs": 2, "learning_rate": 1e-4})
    log = pd.read_csv(tmp_path / "run" / "training_log.csv")
    assert log["learning_rate"].tolist() == pytest.approx([1e-3, 1e-4])
    start(**options | {"overwrite": True, "save_best_model_only": True, "random_seed": 3})
    assert not (tmp_path / "run" / "model_epoch_001.keras").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tables, tmp_path, monkeypatch):
    original = ModelFactory.get_model

    def get_model(self, configs):
        model = original(self, configs)
        kernel = model.get_layer("classifier").layers[-2].kernel
        kernel.assign(kernel * np.nan)
        return model

    monkeypatch.setattr(ModelFactory, "get_model", get_model)
    with pytest.raises(UserError, match="The loss is nan in epoch 1, step 1"):
        start(**options_of(tables, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*.keras"))


@pytest.mark.slow
def test_early_stopping_ends_the_run(tables, tmp_path):
    options = options_of(tables, tmp_path / "run", num_epochs=12, early_stopping_patience=2, learning_rate=1e-7)
    results = start(**options)
    log = pd.read_csv(tmp_path / "run" / "training_log.csv")
    assert len(log) == results["best_epoch"] + 2 < 12
    assert log["val_accuracy"].idxmax() + 1 == results["best_epoch"]


@pytest.mark.parametrize(("epochs", "steps", "ends"), [(6, 0, True), (5, 0, False), (6, 3, False), (12, 0, True)])
def test_a_run_has_ended_after_its_epochs_or_its_patience(capsys, epochs, steps, ends):
    state = {"epochs_completed": epochs, "steps_completed": steps, "best_epoch": 4, "best": 0.5}
    found = report_end(state, Configs(num_epochs=12, early_stopping_patience=2))
    assert found == ({"epochs_completed": epochs, "best": 0.5} if ends else {})
    assert ("has completed" in capsys.readouterr().out) == ends


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
    assert re.search(r"lost\.jpg.*--verify_data full.*--skip_bad_images True", str(caught.value))
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command == [
        *("python", "train.py", "--configs", f"{folder}/configs.json", "--load_model_path", str(folder)),
        *("--skip_bad_images", "True"),
    ]
    state = read_state(str(folder / "latest_model.keras"))
    assert (state["epochs_completed"], state["steps_completed"]) == (0, 9)
    if "ema_decay" in options:
        start(**options_of(sets, folder, num_epochs=2, skip_bad_images=True, load_model_path=str(folder), **options))
    else:
        done = subprocess.run([sys.executable, *command[1:]], cwd=PROJECT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", folder)
