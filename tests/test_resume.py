"""A run that is stopped anywhere and continued ends with the bits of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

import train
from configs import Configs
from finetune import checkpoints
from finetune.files import remove_stale_files
from finetune.options import UserError
from finetune.run_folder import locked
from finetune.training_state import read_state, save_checkpoint
from generator import AugmentedImageSequence
from model import ModelFactory

PROJECT = Path(__file__).parent.parent
# A backbone cut to its first layers: what is tested is the training around it.
TINY = {"visual_model_name": "MobileNet", "pop_conv_layers": 66, "final_layer_pooling": "max"}


@pytest.fixture(scope="module")
def tables(photo_folder, tmp_path_factory):
    """Training and validation tables of 27 and 9 photos: 7 steps an epoch at a batch size of 4."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [(str(path), path.parent.name) for path in sorted(photo_folder.glob("*/*.jpg"))]
    table = pd.DataFrame(rows, columns=["path", "class"])
    in_validation = table.index % 4 == 3
    table[~in_validation].to_csv(folder / "training_set.csv", index=False)
    table[in_validation].to_csv(folder / "testing_set.csv", index=False)
    return folder / "training_set.csv", folder / "testing_set.csv"


def options_of(tables, save_model_path, **options):
    values = {
        "train_csv": str(tables[0]),
        "test_csv": str(tables[1]),
        "image_target_size": (32, 32, 3),
        "use_imagenet_weights": False,
        "num_epochs": 3,
        "batch_size": 4,
        "show_model_summary": False,
        "generator_workers": 2,
        "deterministic": True,
        "reduce_lr_patience": 1,
        "save_model_path": str(save_model_path),
    }
    return values | TINY | options


def start(**options):
    return train.main(Configs(**options).validate())


def weights_and_optimizer(path):
    model = keras.models.load_model(path)
    return [variable.numpy() for variable in (*model.weights, *model.optimizer.variables)]


def assert_same_run(first, second, model_names=("best_model.keras", "latest_model.keras")):
    first, second = Path(first), Path(second)
    assert (first / "training_log.csv").read_bytes() == (second / "training_log.csv").read_bytes()
    for name in model_names:
        expected, found = (weights_and_optimizer(folder / name) for folder in (first, second))
        assert len(expected) == len(found) > 10
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)
        states = [read_state(str(folder / name)) for folder in (first, second)]
        for key in ("epochs_completed", "steps_completed", "best", "best_epoch", "plateau", "seed_states", "log"):
            assert states[0][key] == states[1][key]


@pytest.fixture(scope="module")
def uninterrupted(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "saved_model"
    start(**options_of(tables, folder))
    return folder


@pytest.fixture
def stop_at(monkeypatch):
    """Sends this process a signal when the generator makes a batch of an epoch."""

    def arrange(epoch, index, number=signal.SIGTERM):
        original = AugmentedImageSequence.__getitem__

        def make_batch(self, position):
            if self.shuffle and (self.epoch, position + self.first_step) == (epoch, index):
                os.kill(os.getpid(), number)
                time.sleep(0.1)
            return original(self, position)

        monkeypatch.setattr(AugmentedImageSequence, "__getitem__", make_batch)

    return arrange


@pytest.mark.slow
def test_two_runs_are_the_same_whatever_the_number_of_workers(tables, uninterrupted, tmp_path):
    start(**options_of(tables, tmp_path / "again", generator_workers=1))
    assert_same_run(uninterrupted, tmp_path / "again")


@pytest.mark.parametrize(
    "model_name", ["", *(pytest.param(f"{name}_model.keras", marks=pytest.mark.slow) for name in ("latest", "best"))]
)
def test_a_run_of_fewer_epochs_continues_to_the_same_model(tables, uninterrupted, tmp_path, model_name):
    options = options_of(tables, tmp_path / "run", num_epochs=2)
    start(**options)
    start(**options | {"num_epochs": 3, "load_model_path": str(tmp_path / "run" / model_name)})
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_after_the_step_and_the_rest_is_the_same(
    tables, uninterrupted, tmp_path, stop_at, capsys, number, status, monkeypatch
):
    options = options_of(tables, tmp_path / "run")
    stop_at(1, 5, number)
    with pytest.raises(SystemExit) as stopped:
        start(**options)
    monkeypatch.undo()
    assert stopped.value.code == status
    printed = capsys.readouterr().out
    assert f"python train.py --configs {tmp_path}/run/configs.json --load_model_path {tmp_path}/run" in printed
    state = read_state(str(tmp_path / "run" / "latest_model.keras"))
    assert state["epochs_completed"] == 1
    assert 0 < state["steps_completed"] < 7
    start(**options | {"load_model_path": str(tmp_path / "run")})
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

    monkeypatch.setattr("finetune.devices.choose_mixed_policy", choose)
    options = options_of(tables, tmp_path / "whole", num_epochs=2, mixed_precision=True)
    start(**options)
    options |= {"save_model_path": str(tmp_path / "run")}
    stop_at(1, 3)
    with pytest.raises(SystemExit):
        start(**options)
    monkeypatch.undo()
    monkeypatch.setattr("finetune.devices.choose_mixed_policy", choose)
    start(**options | {"load_model_path": str(tmp_path / "run")})
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("image_cache", ["memory", "disk"])
def test_a_cache_changes_no_bit(tables, uninterrupted, tmp_path, image_cache):
    start(**options_of(tables, tmp_path / "run", image_cache=image_cache, image_cache_path=str(tmp_path / "cache")))
    assert_same_run(uninterrupted, tmp_path / "run")


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


def test_a_second_process_is_refused(tables, tmp_path):
    with locked(str(tmp_path / "run")), pytest.raises(UserError, match="Another process is training into"):
        start(**options_of(tables, tmp_path / "run"))


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    stale, alive = tmp_path / ".tmp-999999999-a.keras", tmp_path / f".tmp-{os.getppid()}-a.keras"
    for folder in (stale, alive):
        folder.mkdir()
        (folder / "latest_model.keras").write_text("half")
    remove_stale_files(str(tmp_path))
    assert not stale.exists()
    assert alive.exists()


@pytest.mark.parametrize("member", [b"{", b"[]", b'{"epochs_completed": 3}'])
def test_a_damaged_state_is_an_error_not_a_fresh_start(tmp_path, member):
    path = tmp_path / "latest_model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_state.json", member)
    with pytest.raises(UserError, match="latest_model.keras carries a training state that is damaged: .*Use another"):
        read_state(str(path))
    path.write_text("no archive")
    assert read_state(str(path)) is None


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


def test_early_stopping_ends_the_run_and_resuming_it_changes_nothing(tables, tmp_path, capsys):
    options = options_of(tables, tmp_path / "run", num_epochs=12, early_stopping_patience=2, learning_rate=1e-7)
    results = start(**options)
    log = pd.read_csv(tmp_path / "run" / "training_log.csv")
    assert len(log) == results["best_epoch"] + 2 < 12
    assert log["val_accuracy"].idxmax() + 1 == results["best_epoch"]
    capsys.readouterr()
    start(**options | {"load_model_path": str(tmp_path / "run")})
    assert "has completed" in capsys.readouterr().out


def test_checkpoints_between_epochs_carry_their_step(tables, tmp_path, monkeypatch):

    written = []
    original = save_checkpoint

    def save(model, path, state):
        written.append((state["epochs_completed"], state["steps_completed"]))
        original(model, path, state)

    monkeypatch.setattr(checkpoints, "save_checkpoint", save)
    start(**options_of(tables, tmp_path / "run", num_epochs=2, checkpoint_every_steps=3))
    assert written == [(0, 3), (0, 6), (1, 0), (1, 3), (1, 6), (2, 0)]


# Real processes, killed


def command_of(options):
    words = [sys.executable, str(PROJECT / "train.py")]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def run_process(options, **limits):
    return subprocess.run(command_of(options), capture_output=True, text=True, timeout=600, **limits)


def multilabel_options(multilabel_csv):
    return {
        "train_csv": str(multilabel_csv),
        "test_csv": str(multilabel_csv),
        "image_directory": str(multilabel_csv.parent),
        "multi_label_classification": True,
        "allow_duplicates": True,
    }


def kill_when(process, condition, deadline=300):
    """Sends SIGKILL as soon as a condition holds; returns whether it came to that before the process ended."""
    end = time.monotonic() + deadline
    while process.poll() is None and time.monotonic() < end:
        if condition():
            process.kill()
            process.wait()
            return True
        time.sleep(0.0005)
    process.wait()
    return False


@pytest.mark.slow
@pytest.mark.parametrize("save_best_model_only", [True, False])
@pytest.mark.parametrize("mode", ["single-label", "multi-label"])
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(
    tables, multilabel_csv, tmp_path, mode, save_best_model_only
):
    options = options_of(
        tables, tmp_path / "whole", num_epochs=6, checkpoint_every_steps=2, save_best_model_only=save_best_model_only
    )
    if mode == "multi-label":
        options |= multilabel_options(multilabel_csv)
    whole = run_process(options)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed"
    options |= {"save_model_path": str(folder)}
    rng, kills, inside_a_write = np.random.default_rng(len(mode) + save_best_model_only), 0, 0
    for attempt in range(40):
        latest = folder / "latest_model.keras"
        version = latest.stat().st_mtime_ns if latest.exists() else 0
        resume = {"load_model_path": str(folder)} if latest.exists() else {}
        process = subprocess.Popen(command_of(options | resume), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if attempt % 2:
            # A temporary folder of the process means that it is writing a file just now.
            waits = int(rng.integers(1, 4))

            def in_write(pattern=f".tmp-{process.pid}-*", waits=[waits, False]):  # noqa: B006 - remembers between calls
                exists = any(folder.glob(pattern))
                waits[0] -= exists and not waits[1]
                waits[1] = exists
                return exists and waits[0] <= 0

            condition = in_write
        else:
            share = rng.uniform()

            def after_two_checkpoints(latest=latest, versions=[version], times=[], share=share):  # noqa: B006
                if latest.exists() and latest.stat().st_mtime_ns != versions[-1]:
                    versions.append(latest.stat().st_mtime_ns)
                    times.append(time.monotonic())
                if len(times) < 2:
                    return False
                # In the time of this machine: at any moment between this checkpoint and the next.
                time.sleep(share * (times[1] - times[0]))
                return True

            condition = after_two_checkpoints
        if not kill_when(process, condition):
            assert process.returncode == 0
            break
        kills += 1
        inside_a_write += any(folder.glob(f".tmp-{process.pid}-*"))
    assert kills >= 5
    assert inside_a_write >= 1
    assert not list(folder.glob(".tmp-*"))
    names = ["best_model.keras", "latest_model.keras"]
    names += [f"model_epoch_{epoch:03d}.keras" for epoch in range(1, 7)] * (not save_best_model_only)
    assert_same_run(tmp_path / "whole", folder, names)


@pytest.mark.slow
def test_sigterm_to_a_real_process_exits_143_and_the_printed_command_continues(tables, tmp_path):
    whole = options_of(tables, tmp_path / "whole", num_epochs=6)
    assert run_process(whole).returncode == 0
    options = whole | {"save_model_path": str(tmp_path / "run")}
    process = subprocess.Popen(command_of(options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (tmp_path / "run" / "latest_model.keras").exists():
        time.sleep(0.01)
    process.terminate()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 143
    words = printed.strip().splitlines()[-1].split()
    assert words[:2] == ["python", "train.py"]
    continued = subprocess.run([sys.executable, *words[1:]], cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert continued.returncode == 0, continued.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_is_full_leaves_the_last_checkpoint(tables, tmp_path):
    import resource

    whole = options_of(tables, tmp_path / "whole", num_epochs=4)
    assert run_process(whole).returncode == 0
    options = whole | {"save_model_path": str(tmp_path / "run")}
    assert run_process(options | {"num_epochs": 2}).returncode == 0
    latest = tmp_path / "run" / "latest_model.keras"
    before, limit = latest.read_bytes(), latest.stat().st_size - 2000
    options |= {"load_model_path": str(tmp_path / "run")}
    full = run_process(options, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 2, full.stderr
    assert "Error: Cannot write" in full.stderr
    assert latest.read_bytes() == before
    assert zipfile.is_zipfile(latest)
    assert run_process(options).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert json.loads((tmp_path / "run" / ".training_stats.json").read_text())["epochs_completed"] == 4
