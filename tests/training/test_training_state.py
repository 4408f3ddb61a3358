"""The training state in a model file: runs that are stopped, killed or out of space end with the same bits."""

import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from loaded_processes import LoadedProcess
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
from finetune.models.compiling import find_averages
from finetune.training.resuming import read_state

try:
    import resource
except ImportError:
    resource = None

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_after_the_step_and_the_rest_is_the_same(
    tables, uninterrupted, tmp_path, stop_at, capsys, number, status
):
    options = options_of(tables, tmp_path / "run")
    assert stop_at(1, 5, number, **options) == status
    printed = capsys.readouterr().out
    assert f"python train.py --configs {tmp_path}/run/configs.json --load_model_path {tmp_path}/run" in printed
    state = read_state(str(tmp_path / "run" / "latest_model.keras"))
    assert state["epochs_completed"] == 1
    assert 0 < state["steps_completed"] < 9
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


def list_words(options):
    words = [str(PROJECT / "train.py")]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def run_train(options, most_bytes=None):
    """Does what `python train.py` does, with a limit on the size of files."""
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    sys.argv = list_words(options)
    run_script(train.main)


def run_process(path, options, *limits):
    process = LoadedProcess(path, run_train, options, *limits)
    return *process.communicate(), process.returncode


def count_writes(number):
    """Returns a condition that holds while the process writes a file for that time or a later one."""
    seen = [0, False]

    def is_in_write(folder, pid):
        # The process has a temporary folder while it writes.
        is_writing = any(folder.glob(f".tmp-{pid}-*"))
        seen[0] += is_writing and not seen[1]
        seen[1] = is_writing
        return is_writing and seen[0] >= number

    return is_in_write


def wait_after_checkpoint(share):
    """Returns a condition that holds at a share of the time between the second and the third checkpoint."""
    times, versions = [], set()

    def is_between(folder, pid):
        latest = folder / "latest_model.keras"
        version = latest.stat().st_mtime_ns if latest.exists() else None
        if not versions or version not in versions:
            versions.add(version)
            times.append(time.monotonic())
        if len(times) < 3:
            return False
        time.sleep(share * (times[2] - times[1]))
        return True

    return is_between


def kill_when(process, condition, folder, deadline=300):
    """Sends SIGKILL as soon as a condition holds; returns whether the process was killed before its end."""
    end = time.monotonic() + deadline
    while process.poll() is None and time.monotonic() < end:
        if condition(folder, process.pid):
            process.kill()
            process.communicate()
            return True
        time.sleep(0.0005)
    process.communicate()
    return False


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single-label", "multi-label"])
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tables, multilabel_csv, tmp_path, mode):
    """Single-label runs keep every epoch's model, multi-label runs only the best one."""
    is_multi = mode == "multi-label"
    options = options_of(tables, tmp_path / "whole", checkpoint_every_steps=2, save_best_model_only=is_multi)
    if is_multi:
        options |= {"train_csv": str(multilabel_csv), "test_csv": str(multilabel_csv), "allow_duplicates": True}
        options |= {"image_directory": str(multilabel_csv.parent), "multi_label_classification": True}
    _, errors, status = run_process(tmp_path / "whole", options)
    assert status == 0, errors
    folder = tmp_path / "killed"
    options |= {"save_model_path": str(folder)}
    rng, kills, kills_in_a_write = np.random.default_rng(is_multi), 0, 0
    for attempt in range(40):
        resume = {"load_model_path": str(folder)} if (folder / "latest_model.keras").exists() else {}
        process = LoadedProcess(tmp_path / f"attempt_{attempt}", run_train, options | resume)
        condition = count_writes(rng.integers(1, 4)) if attempt % 2 else wait_after_checkpoint(rng.uniform())
        if not kill_when(process, condition, folder):
            assert process.returncode == 0
            break
        kills += 1
        kills_in_a_write += any(folder.glob(f".tmp-{process.pid}-*"))
    assert kills >= 3
    assert kills_in_a_write >= 1
    assert not list(folder.glob(".tmp-*"))
    names = [f"model_epoch_{epoch:03d}.keras" for epoch in range(1, 4)] * (not is_multi)
    assert_same_run(tmp_path / "whole", folder, ["best_model.keras", "latest_model.keras", *names])


@pytest.mark.slow
def test_sigterm_to_a_real_process_exits_143_and_the_printed_command_continues(tables, uninterrupted, tmp_path):
    options = options_of(tables, tmp_path / "run")
    command = [sys.executable, *list_words(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (tmp_path / "run" / "latest_model.keras").exists():
        time.sleep(0.01)
    process.terminate()
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 143
    words = printed.strip().splitlines()[-1].split()
    assert words[:2] == ["python", "train.py"]
    continued = subprocess.run([sys.executable, *words[1:]], cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert continued.returncode == 0, continued.stderr
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_last_checkpoint(tables, uninterrupted, tmp_path):
    options = options_of(tables, tmp_path / "run")
    start(**options | {"num_epochs": 1})
    latest = tmp_path / "run" / "latest_model.keras"
    before = latest.read_bytes()
    options |= {"load_model_path": str(tmp_path / "run")}
    _, errors, status = run_process(tmp_path / "full", options, len(before) - 2000)
    assert status == 2, errors
    assert "Error: Cannot write" in errors
    assert latest.read_bytes() == before
    assert zipfile.is_zipfile(latest)
    start(**options)
    assert_same_run(uninterrupted, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert json.loads((tmp_path / "run" / ".training_stats.json").read_text())["epochs_completed"] == 3


@pytest.mark.slow
def test_the_best_model_has_averaged_weights_and_no_state(tables, tmp_path):
    start(**options_of(tables, tmp_path / "run", num_epochs=1, ema_decay=0.9))
    latest = keras.models.load_model(tmp_path / "run" / "latest_model.keras")
    best = keras.models.load_model(tmp_path / "run" / "best_model.keras")
    averages = find_averages(latest.optimizer, latest.trainable_variables)
    for average, kept in zip(averages, best.trainable_variables, strict=True):
        np.testing.assert_array_equal(average.numpy(), kept.numpy())
    assert read_state(str(tmp_path / "run" / "best_model.keras")) is None
