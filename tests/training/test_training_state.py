"""The state that a model file carries."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
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
from finetune.core.options import UserError
from finetune.core.scripts import run_script
from finetune.models.optimizers import find_averages
from finetune.training.training_state import read_state

PROJECT = Path(__file__).resolve().parents[2]
# Processes that begin where TensorFlow is loaded, which takes most of a short run's time.
LOADED = multiprocessing.get_context("forkserver")
LOADED.set_forkserver_preload(["finetune.training.training"])


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


@pytest.mark.parametrize("member", [b"{", b"[]", b'{"epochs_completed": 3}'])
def test_a_damaged_state_is_an_error_not_a_fresh_start(tmp_path, member):
    path = tmp_path / "latest_model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_state.json", member)
    with pytest.raises(UserError, match="latest_model.keras has a damaged training state"):
        read_state(str(path))
    path.write_text("no archive")
    assert read_state(str(path)) is None


def command_of(options):
    words = [sys.executable, str(PROJECT / "train.py")]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def run_train(words):
    """Does what `python train.py` does, without a word: the main function of a process."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.argv = words
    run_script(train.main)


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
    while process.is_alive() and time.monotonic() < end:
        if condition():
            process.kill()
            process.join()
            return True
        time.sleep(0.0005)
    process.join()
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
        process = LOADED.Process(target=run_train, args=(command_of(options | resume)[1:],))
        process.start()
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
            assert process.exitcode == 0
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


@pytest.mark.slow
def test_the_best_model_holds_the_averages_and_starts_no_resume(tables, tmp_path, capsys):
    options = options_of(tables, tmp_path / "run", num_epochs=1, ema_decay=0.9)
    start(**options)
    latest = keras.models.load_model(tmp_path / "run" / "latest_model.keras")
    best = keras.models.load_model(tmp_path / "run" / "best_model.keras")
    averages = find_averages(latest.optimizer, latest.trainable_variables)
    for average, kept in zip(averages, best.trainable_variables, strict=True):
        np.testing.assert_array_equal(average.numpy(), kept.numpy())
    assert read_state(str(tmp_path / "run" / "best_model.keras")) is None
