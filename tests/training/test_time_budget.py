"""The number of epochs that fit into a time, and which model is kept in the end."""

import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from small_runs import (
    assert_same_run,
    options_of,
    start,
    stop_at,  # noqa: F401
    tables,  # noqa: F401
)

from configs import Configs
from finetune.core.files import remove_stale_files
from finetune.core.options import UserError
from finetune.core.texts import show_duration, show_moment
from finetune.core.values import duration_fault, parse_duration
from finetune.training.resuming import configs_to_continue, save_checkpoint
from finetune.training.run import count_epochs
from finetune.training.time_budget import TimeEstimate, count_views, resolve_epochs, time_saving


def test_durations_are_read_and_shown():
    texts = ["90", "90s", "1.5m", "2h", " 10 m", "0", "-3", "ten", "1d", "1e9"]
    assert [parse_duration(text) for text in texts] == [90, 90, 90, 7200, 600, 0, 0, 0, 0, 0]
    assert [bool(duration_fault(text)) for text in ("", "10m", "0", "soon")] == [False, False, True, True]
    assert [show_duration(seconds) for seconds in (44.6, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 5 min"]


def test_the_end_has_its_day_where_that_is_another_one():
    before = time.strftime("%H:%M")
    assert show_moment(0) in (before, time.strftime("%H:%M"))
    later = time.time() + 3 * 86400
    shown = show_moment(3 * 86400)
    assert shown in (time.strftime("%a %d %b %H:%M", time.localtime(later + second)) for second in (0, 1))


@pytest.mark.slow
def test_a_run_with_a_time_budget_equals_one_of_so_many_epochs(tables, tmp_path, capsys, monkeypatch):
    # Checkpoints as slow as on a network drive: the budget holds few epochs, on a fast machine and on a slow one.
    monkeypatch.setattr("finetune.training.time_budget.time_saving", lambda model, folder: 40)
    options = {"learning_rate_schedule": "one_cycle", "random_crop_area": [0.6, 1.0], "augmentation_strength": "photo"}
    found = start(**options_of(tables, tmp_path / "budget", time_budget="240s", **options))
    printed = capsys.readouterr().out
    epochs = int(re.search(r"time_budget 240s: (\d+) epochs of about", printed)[1])
    assert re.search(rf"About .* an epoch, .* to go for {epochs} epochs, until ", printed)
    assert found["epoch"] == epochs > 1
    start(**options_of(tables, tmp_path / "epochs", **(options | {"num_epochs": epochs})))
    assert_same_run(tmp_path / "budget", tmp_path / "epochs")


def test_few_images_have_more_epochs_for_min_steps():
    # 19 batches: 228 steps in 12 epochs, 304 in 16.
    assert count_epochs(12, 300, 19) == 16
    assert count_epochs(12, 304, 19) == 16
    assert count_epochs(12, 305, 19) == 17
    assert (count_epochs(12, 300, 38), count_epochs(12, 0, 1)) == (12, 12)


def test_epochs_that_suffice_for_the_steps_do_not_count_as_given():
    images = SimpleNamespace(training=SimpleNamespace(steps=7))
    # 100 epochs, as configs.py has them, hold 700 steps.
    runs = [SimpleNamespace(configs=Configs(min_steps=steps), state=None, images=images) for steps in (700, 701)]
    for run in runs:
        resolve_epochs(run, 0)
    assert [run.configs.num_epochs for run in runs] == [100, 101]
    assert [run.configs.given for run in runs] == [{"min_steps"}, {"min_steps", "num_epochs"}]


@pytest.mark.slow
def test_a_run_of_min_steps_continues_with_its_own_command(tables, tmp_path, capsys, stop_at):
    # 9 steps an epoch: 3 epochs hold 20.
    options = {"learning_rate_schedule": "one_cycle", "min_steps": 20, "num_epochs": 1}
    options = options_of(tables, tmp_path / "steps", **options)
    assert stop_at(1, 3, **options) == 143
    assert "3 epochs of 9 steps, for min_steps 20 (1 with --min_steps 0)." in capsys.readouterr().out
    assert start(**options, load_model_path=str(tmp_path / "steps"))["epoch"] == 3
    assert "num_epochs 1 becomes 3" in capsys.readouterr().out
    start(**options_of(tables, tmp_path / "epochs", learning_rate_schedule="one_cycle", num_epochs=3))
    assert_same_run(tmp_path / "steps", tmp_path / "epochs")


@pytest.mark.parametrize(
    ("before", "now", "epochs"),
    [
        ({"num_epochs": 7, "time_budget": "60s"}, {"num_epochs": 12}, 7),
        ({"num_epochs": 7, "time_budget": "60s"}, {"num_epochs": 12, "time_budget": "60s"}, 7),
        ({"num_epochs": 7, "time_budget": "60s"}, {"num_epochs": 12, "time_budget": ""}, 12),
        ({"num_epochs": 16, "min_steps": 300}, {"num_epochs": 12, "min_steps": 300}, 16),
        ({"num_epochs": 16, "min_steps": 300}, {"num_epochs": 20}, 20),
        ({"num_epochs": 16, "min_steps": 300}, {}, 16),
        # Before, there were fewer devices.
        ({"num_epochs": 8, "min_steps": 300}, {"num_epochs": 6}, 8),
        ({"num_epochs": 8, "min_steps": 300}, {"num_epochs": 12}, 12),
        ({"num_epochs": 30, "min_steps": 300}, {"num_epochs": 20}, 20),
        ({"num_epochs": 7}, {"num_epochs": 12}, 12),
    ],
)
def test_a_continued_run_keeps_its_epochs_by_time_or_steps(before, now, epochs, tmp_path):
    state = {"configs": Configs(**before).to_dict(), "given": sorted(before), "steps": 19}
    configs = Configs()
    for name, value in now.items():
        setattr(configs, name, value)
    assert configs_to_continue(configs, state, str(tmp_path / "latest_model.keras")).num_epochs == epochs


@pytest.mark.parametrize("before", ["", "60s"])
def test_a_continued_run_refuses_another_time_budget(before, tmp_path):
    state = {"configs": Configs(num_epochs=7, time_budget=before).to_dict(), "given": [], "steps": 19}
    configs = Configs(time_budget="10m")
    with pytest.raises(UserError, match=f"time_budget: expected '{before}'.*7 epochs.*'10m'"):
        configs_to_continue(configs, state, str(tmp_path / "latest_model.keras"))


def test_timing_a_checkpoint_leaves_nothing_and_may_be_killed(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    assert time_saving(model, str(tmp_path / "run")) > 0
    assert not list((tmp_path / "run").iterdir())

    def be_killed(model, path, state, *more):
        # A process of that number runs no more.
        folder = Path(path).parent
        shutil.copytree(folder, folder.with_name(folder.name.replace(f"-{os.getpid()}-", "-99999999-")))
        return save_checkpoint(model, path, state, *more)

    monkeypatch.setattr("finetune.training.time_budget.save_checkpoint", be_killed)
    time_saving(model, str(tmp_path / "run"))
    assert [entry.name[:14] for entry in (tmp_path / "run").iterdir()] == [".tmp-99999999-"]
    remove_stale_files(str(tmp_path / "run"))
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_a_budget_shorter_than_an_epoch_is_reported(tables, tmp_path, capsys, monkeypatch):
    # An epoch takes two checkpoints, 20 s; the budget leaves 18 s.
    monkeypatch.setattr("finetune.training.time_budget.time_saving", lambda model, folder: 10)
    assert start(**options_of(tables, tmp_path / "run", time_budget="20s"))["epoch"] == 1
    assert "1 epochs of about" in (printed := capsys.readouterr().out)
    assert "which is more than the budget holds" in printed


@pytest.mark.slow
def test_the_last_epoch_of_a_random_head_is_kept_whatever_validation_says(tables, tmp_path):
    found = start(**options_of(tables, tmp_path / "run", model_selection="last_epoch", num_epochs=2))
    assert found["best_epoch"] == 2
    best, latest = (
        keras.models.load_model(tmp_path / "run" / f"{name}_model.keras").get_weights() for name in ("best", "latest")
    )
    for one, other in zip(best, latest, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("early_stopping_patience", {"model_selection": "last_epoch", "early_stopping_patience": 3}),
        ("random_crop_area", {"random_crop_area": [0.5, 1.0], "image_cache": "memory"}),
        ("fine_tune_learning_rate", {"fine_tune_learning_rate": 1e-4}),
        ("label_smoothing", {"label_smoothing": 1.0}),
        ("learning_rate_schedule", {"learning_rate_schedule": "step"}),
        ("gradient_accumulation_steps", {"gradient_accumulation_steps": 0}),
    ],
)
def test_invalid_options_and_combinations_are_refused(name, options):
    with pytest.raises(UserError, match=f"{name}: "):
        Configs(**options).validate()


def test_views_count_by_their_size_and_number():
    training, validation = SimpleNamespace(steps=100), SimpleNamespace(steps=10)
    # A validation batch takes 0.4 of the time of a training step.
    assert count_views(Configs(), training, validation, refits=False) == (pytest.approx(4), 0)
    configs = Configs(test_time_augmentation="flip", model_selection="interpolate", head_initialization="linear_probe")
    # The start and two averages are validated.
    assert count_views(configs, training, validation, refits=False) == (pytest.approx(8), pytest.approx(24))
    # The averages and the last epoch get refitted heads, from the training images and their mirror images.
    assert count_views(configs, training, validation, refits=True) == (pytest.approx(8), pytest.approx(32 + 3 * 80))
    configs = configs.replace(augmentation_strength="none")
    assert count_views(configs, training, validation, refits=True) == (pytest.approx(8), pytest.approx(32 + 3 * 40))


@pytest.mark.parametrize("last", [106.0, 109.0], ids=["even", "a graph for the last batch"])
def test_the_estimate_counts_all_that_is_left(last, capsys, monkeypatch):
    class Sequence:
        steps, first_step = 20, 0

    moments = iter([90.0, 100.0, 102.0, 104.0, last])
    monkeypatch.setattr("finetune.training.time_budget.time.monotonic", lambda: next(moments))
    estimate = TimeEstimate(5, Sequence(), 8.0, 24.0)
    estimate.on_epoch_begin(0)
    for batch in range(4):
        estimate.on_train_batch_end(batch)
    # Steps of 2 s are left: 96 of training, 5 validations of 8 each, and 24 to choose the model.
    assert "About 56 s an epoch, 5 min 20 s to go for 5 epochs, until " in capsys.readouterr().out


def test_the_time_between_two_epochs_is_not_part_of_a_step(monkeypatch):
    # Epochs of one step of 2 s, but for the first one's 10, and 5 s of validation after each.
    moments = iter([0.0, 10.0, 15.0, 17.0, 22.0, 24.0, 29.0, 31.0])
    monkeypatch.setattr("finetune.training.time_budget.time.monotonic", lambda: next(moments))
    estimate = TimeEstimate(10, SimpleNamespace(steps=1, first_step=0), 2.0, 0.0)
    for epoch in range(4):
        estimate.on_epoch_begin(epoch)
        estimate.on_train_batch_end(0)
    assert estimate.seconds == 2
