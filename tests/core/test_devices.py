"""Devices: what scripts print about them, with the files and tools of other machines."""

import os
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from config_files import PROJECT

from finetune.core import devices
from finetune.core.devices import (
    Gpu,
    choose_mixed_policy,
    count_cores,
    describe_hardware,
    explain_unused_gpu,
    gpu_memory_sizes,
    hides_gpus,
    set_gpu_usage,
    set_seed,
)
from finetune.core.options import UserError

GIB = 2**30
H100, A100 = Gpu("NVIDIA H100", 80 * GIB), Gpu("NVIDIA A100", 40 * GIB)
BOUND = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def test_seed_repeats_the_draws():
    draws = []
    for seed in (3, 3, 4):
        assert set_seed(seed) == seed
        draws.append((np.random.rand(), keras.random.uniform((1,)).numpy().item()))
    assert draws[0] == draws[1] != draws[2]
    assert 0 <= set_seed(None) < 2**32


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of 8 and 4 GiB as TensorFlow sees them, and what it is told."""
    seen = SimpleNamespace(names=["gpu0", "gpu1"], limits={}, visible=None)
    details = {"gpu0": {"device_name": "NVIDIA H100"}, "gpu1": {"device_name": "NVIDIA A100"}}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: seen.names if kind == "GPU" else [])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpus, kind: setattr(seen, "visible", (gpus, kind)))
    monkeypatch.setattr(
        tf.config,
        "set_logical_device_configuration",
        lambda gpu, parts: seen.limits.update({gpu: [part.memory_limit for part in parts]}),
    )
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details.get)
    monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: True)
    monkeypatch.setattr(devices, "gpu_memory_sizes", lambda number: [8 * GIB, 4 * GIB][:number])
    monkeypatch.setattr(devices, "explain_unused_gpu", lambda: "Warning: unused.")
    monkeypatch.setattr(devices, "count_cores", lambda: 2)
    for name in devices.HIDING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return seen


BOTH = "Running on 2 GPUs: 1 x NVIDIA H100 (2.0 of 8 GiB), 1 x NVIDIA A100 (1.0 of 4 GiB).\n"


@pytest.mark.parametrize(
    ("share", "strategy", "found", "variable", "printed", "limits", "visible"),
    [
        (0.25, "mirrored", 2, None, BOTH, {"gpu0": [2048], "gpu1": [1024]}, None),
        (0.95, "none", 0, None, "Running on 2 CPU cores.\nWarning: unused.\n", {}, None),
        # GPUs that are not wanted, or are hidden, cause no warning.
        (0, "none", 2, None, "Running on 2 CPU cores.\n", {}, ([], "GPU")),
        (0.95, "none", 0, "-1", "Running on 2 CPU cores.\n", {}, None),
    ],
)
def test_devices_are_limited_and_printed(
    gpus, capsys, monkeypatch, share, strategy, found, variable, printed, limits, visible
):
    gpus.names = gpus.names[:found]
    if variable:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    devices.choose_devices(share, strategy)
    assert capsys.readouterr().out == printed
    assert (gpus.limits, gpus.visible) == (limits, visible)


def test_a_build_without_cuda_takes_memory_as_it_needs_it(gpus, capsys, monkeypatch):
    grown = []
    gpus.names = ["gpu0"]
    monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: False)
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, grows: grown.append((gpu, grows)))
    set_gpu_usage(0.5)
    devices.choose_devices(0.5)
    assert capsys.readouterr().out == "Running on NVIDIA H100.\n"
    assert grown == [("gpu0", True)] * 2
    assert gpus.limits == {}


def test_missing_driver_is_an_error(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(devices.ctypes, "CDLL", missing)
    assert gpu_memory_sizes(0) == []
    with pytest.raises(UserError, match="CUDA driver.*Set gpu_percentage to 0"):
        gpu_memory_sizes(1)


@pytest.mark.parametrize(
    ("capabilities", "policy"),
    [([], "mixed_bfloat16"), ([(8, 0), (9, 0)], "mixed_bfloat16"), ([(8, 0), (7, 5)], "mixed_float16")],
)
def test_mixed_precision_takes_bfloat16_if_every_gpu_supports_it(monkeypatch, capabilities, policy):
    monkeypatch.setattr("tensorflow.config.get_visible_devices", lambda kind: capabilities if kind == "GPU" else [])
    monkeypatch.setattr(
        "tensorflow.config.experimental.get_device_details", lambda capability: {"compute_capability": capability}
    )
    assert choose_mixed_policy() == policy


@pytest.mark.parametrize(
    ("gpus", "share", "trains_on_all", "cores", "line"),
    [
        ([], 0.95, True, 1, "1 CPU core."),
        ([], 0.0, True, 1.5, "1.5 CPU cores."),
        ([H100], 0.95, False, 2, "NVIDIA H100 (76.0 of 80 GiB)."),
        ([H100, H100], 0.5, False, 2, "the first of 2 GPUs, NVIDIA H100 (40.0 of 80 GiB)."),
        (
            [H100, H100, A100],
            0.5,
            True,
            2,
            "3 GPUs: 2 x NVIDIA H100 (40.0 of 80 GiB each), 1 x NVIDIA A100 (20.0 of 40 GiB).",
        ),
        ([Gpu("AMD Instinct MI300X", 0)], 0.95, False, 2, "AMD Instinct MI300X."),
    ],
)
def test_line_of_the_hardware(gpus, share, trains_on_all, cores, line):
    assert describe_hardware(gpus, share, trains_on_all, cores) == f"Running on {line}"


# Cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no CPU affinity")
def test_cores_follow_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert count_cores() == 1
    finally:
        os.sched_setaffinity(0, cores)
    assert count_cores() == BOUND


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("files", "own", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, "0::/\n", 0.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", BOUND),
        ({"cpu.max": "99900000 100000\n"}, "0::/\n", BOUND),
        ({"cpu.max": "nonsense"}, "nonsense", BOUND),
        # The lowest limit of a group and its parents holds.
        ({"a/cpu.max": "25000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b\n", 0.25),
        ({"c/cpu.max": "25000 100000"}, "0::/a/b\n", BOUND),
        # Version 1
        ({"cpu/cpu.cfs_quota_us": "75000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/\n", 0.75),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/\n", BOUND),
        ({"cpu/d/cpu.cfs_quota_us": "50000", "cpu/d/cpu.cfs_period_us": "100000"}, "4:cpuset:/\n3:cpu:/d\n", 0.5),
    ],
)
def test_cores_follow_the_limit_of_a_container(tmp_path, monkeypatch, files, own, cores):
    monkeypatch.setattr(devices, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(devices, "OWN_CGROUPS", tmp_path / "own")
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    write(tmp_path / "own", own)
    assert count_cores() == cores


# Unused GPUs

VERSION, DRIVER, LIBRARY = {"nvidia/version": "NVRM version: 570"}, "libcuda.so.1", "libcudnn.so.9"
INSTALL = "pip install -r requirements-gpu.txt"


@pytest.mark.parametrize(
    ("files", "loads", "words"),
    [
        ({}, (), ()),
        # A driver without a GPU.
        (VERSION | {"nvidia/gpus/": ""}, (), ()),
        (VERSION, (DRIVER,), ("NVIDIA GPU", INSTALL)),
        ({"nvidia/gpus/0000:18:00.0/information": "H100"}, (DRIVER,), (INSTALL,)),
        (VERSION, (), ("libcuda.so.1 is missing", "--gpus all")),
        (VERSION, (DRIVER, LIBRARY), ("nvidia-smi", "--verbose")),
        ({"bin/nvidia-smi": "echo 'GPU 0: NVIDIA H100'"}, (DRIVER,), (INSTALL,)),
        ({"bin/nvidia-smi": "echo 'No devices were found'; exit 6"}, (DRIVER,), ()),
        ({"bin/nvidia-smi": "echo 'GPU 0: x'; exit 9"}, (DRIVER,), ()),
        ({"bin/nvidia-smi": "exec /bin/sleep 20"}, (DRIVER,), ()),
        ({"kfd": ""}, (), ("AMD", "ROCm")),
    ],
)
def test_unused_gpu_is_explained(tmp_path, monkeypatch, files, loads, words):
    monkeypatch.setattr(devices, "SECONDS_OF_A_TOOL", 1)
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "nvidia")
    monkeypatch.setattr(devices, "AMD_DRIVER", tmp_path / "kfd")
    monkeypatch.setattr(devices, "can_load", lambda library: library in loads)
    monkeypatch.setattr(devices, "is_installed", lambda package: False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name, text in files.items():
        if name.endswith("/"):
            (tmp_path / name).mkdir(parents=True)
        else:
            write(tmp_path / name, f"#!/bin/sh\n{text}\n")
    shown = explain_unused_gpu()
    assert bool(shown) is bool(words)
    assert len(shown.splitlines()) <= 1
    assert all(word in shown for word in words)
    assert not any(word in shown for word in {INSTALL, "--gpus all", "--verbose"} - {*words})
    if words and files == VERSION:
        monkeypatch.setattr(devices.sys, "platform", "win32")
        assert "WSL2" in explain_unused_gpu()


@pytest.mark.parametrize(
    ("environment", "hides"),
    [
        ({}, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, True),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, False),
        ({"HIP_VISIBLE_DEVICES": ""}, True),
    ],
)
def test_variables_without_a_gpu_hide_all(environment, hides):
    assert hides_gpus(environment) is hides


def test_packages_and_libraries_are_found():
    assert devices.is_installed("numpy.linalg")
    assert not devices.is_installed("no_such_package.part")
    assert devices.can_load(None)
    assert not devices.can_load("libnowhere.so.1")


BOOLEANS = """
from finetune.core.scripts import silence_libraries
silence_libraries(False)
from finetune.core.devices import start_devices, tf
start_devices(0.0)
tf.function(tf.transpose)(tf.constant([[True, False]]))
"""


@pytest.mark.slow
def test_transposed_booleans_log_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    result = subprocess.run([sys.executable, "-c", BOOLEANS], cwd=PROJECT, env=environment, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


def test_requirements_for_a_gpu_have_the_bounds_of_requirements():
    lines = (PROJECT / "requirements.txt").read_text().splitlines()
    (bounds,) = [line.removeprefix("tensorflow") for line in lines if line.startswith("tensorflow>")]
    wanted = [line for line in (PROJECT / "requirements-gpu.txt").read_text().splitlines() if line[0] != "#"]
    assert wanted == ["-r requirements.txt", f"tensorflow[and-cuda]{bounds}"]
