"""What a script says it runs on, with files and tools as machines of other kinds have them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from config_files import PROJECT

from configs import Configs
from finetune.core import devices
from finetune.core import devices as hardware
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

H100, A100 = Gpu("NVIDIA H100", 80 * 2**30), Gpu("NVIDIA A100", 40 * 2**30)
BOUND = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def test_seed_repeats_the_draws():
    draws = []
    for seed in (3, 3, 4):
        assert set_seed(seed) == seed
        draws.append((np.random.rand(), keras.random.uniform((1,)).numpy().item()))
    assert draws[0] == draws[1] != draws[2]
    seed = set_seed(None)
    assert Configs(random_seed=seed).validate().random_seed == seed


@pytest.fixture
def gpu_calls(monkeypatch):
    """Records what TensorFlow is told, on a machine of two GPUs with 8 and 4 GiB."""
    calls = SimpleNamespace(gpus=["gpu0", "gpu1"], limits={}, visible=None)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: calls.gpus)
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpus, kind: setattr(calls, "visible", (gpus, kind)))
    monkeypatch.setattr(
        tf.config,
        "set_logical_device_configuration",
        lambda gpu, parts: calls.limits.update({gpu: [part.memory_limit for part in parts]}),
    )
    monkeypatch.setattr(devices, "gpu_memory_sizes", lambda number: [8 * 2**30, 4 * 2**30][:number])
    return calls


@pytest.mark.parametrize(
    ("share", "gpus", "limits", "visible"),
    [
        (0.25, ["gpu0", "gpu1"], {"gpu0": [2048], "gpu1": [1024]}, None),
        (0, ["gpu0", "gpu1"], {}, ([], "GPU")),
        (0.95, [], {}, None),
    ],
)
def test_share_holds_on_every_gpu_and_0_hides_all(gpu_calls, share, gpus, limits, visible):
    gpu_calls.gpus = gpus
    set_gpu_usage(share)
    assert (gpu_calls.limits, gpu_calls.visible) == (limits, visible)


def test_missing_driver_is_told(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(devices.ctypes, "CDLL", missing)
    assert gpu_memory_sizes(0) == []
    with pytest.raises(UserError, match="CUDA driver.*Set gpu_percentage to 0"):
        gpu_memory_sizes(1)


@pytest.mark.parametrize(
    ("capabilities", "policy"),
    [
        ([], "mixed_bfloat16"),
        ([(9, 0)], "mixed_bfloat16"),
        ([(8, 0), (8, 6)], "mixed_bfloat16"),
        ([(7, 5)], "mixed_float16"),
        ([(8, 0), (7, 0)], "mixed_float16"),
    ],
)
def test_mixed_precision_takes_bfloat16_where_every_gpu_has_it(monkeypatch, capabilities, policy):
    monkeypatch.setattr("tensorflow.config.get_visible_devices", lambda kind: capabilities if kind == "GPU" else [])
    monkeypatch.setattr(
        "tensorflow.config.experimental.get_device_details", lambda capability: {"compute_capability": capability}
    )
    assert choose_mixed_policy() == policy


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("gpus", "share", "trains_on_all", "cores", "line"),
    [
        ([], 0.95, True, 2, "Running on 2 CPU cores."),
        ([], 0.95, True, 1, "Running on 1 CPU core."),
        ([], 0.0, True, 1.5, "Running on 1.5 CPU cores."),
        ([H100], 0.95, False, 2, "Running on NVIDIA H100 (76.0 of 80 GiB)."),
        ([H100, H100], 0.5, False, 2, "Running on the first of 2 GPUs, NVIDIA H100 (40.0 of 80 GiB)."),
        ([H100, H100], 0.95, True, 2, "Running on 2 GPUs: 2 x NVIDIA H100 (76.0 of 80 GiB each)."),
        (
            [H100, H100, A100],
            0.5,
            True,
            2,
            "Running on 3 GPUs: 2 x NVIDIA H100 (40.0 of 80 GiB each), 1 x NVIDIA A100 (20.0 of 40 GiB).",
        ),
        ([Gpu("AMD Instinct MI300X", 0)], 0.95, False, 2, "Running on AMD Instinct MI300X."),
    ],
)
def test_line_says_what_is_used(gpus, share, trains_on_all, cores, line):
    assert describe_hardware(gpus, share, trains_on_all, cores) == line


# Cores


def test_cores_are_those_that_the_process_is_bound_to(tmp_path):
    assert count_cores(tmp_path, tmp_path / "none") == BOUND


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to cores")
def test_binding_counts(tmp_path):
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert count_cores(tmp_path, tmp_path / "none") == 1
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize(
    ("files", "own", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, "0::/\n", 0.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", BOUND),
        ({"cpu.max": "99900000 100000\n"}, "0::/\n", BOUND),
        ({"cpu.max": "nonsense"}, "nonsense", BOUND),
        # A group within one that has less: the least holds.
        ({"a/cpu.max": "25000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b\n", 0.25),
        ({"c/cpu.max": "25000 100000"}, "0::/a/b\n", BOUND),
        # Version 1
        ({"cpu/cpu.cfs_quota_us": "75000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/\n", 0.75),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/\n", BOUND),
        ({"cpu/d/cpu.cfs_quota_us": "50000", "cpu/d/cpu.cfs_period_us": "100000"}, "4:cpuset:/\n3:cpu:/d\n", 0.5),
    ],
)
def test_limit_of_a_container_counts(tmp_path, files, own, cores):
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    write(tmp_path / "own", own)
    assert count_cores(tmp_path / "cgroup", tmp_path / "own") == cores


# A GPU that goes unused


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without GPU and without nvidia-smi; `loads` are the libraries that it finds."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    places = SimpleNamespace(nvidia=tmp_path / "nvidia", amd=tmp_path / "kfd", bin=tmp_path / "bin", loads=set())
    monkeypatch.setattr(hardware, "can_load", lambda library: library in places.loads)
    monkeypatch.setattr(hardware, "is_installed", lambda package: False)
    places.explain = lambda platform="linux": explain_unused_gpu(places.nvidia, places.amd, platform)
    return places


VERSION, DRIVER = {"nvidia/version": "NVRM version: 570"}, "libcuda.so.1"
TOOL = "#!/bin/sh\n{}\n"


@pytest.mark.parametrize(
    ("files", "loads", "words", "others"),
    [
        ({}, (), (), ()),
        # The driver is there, and no GPU.
        (VERSION | {"nvidia/gpus/": ""}, (), (), ()),
        (VERSION, (DRIVER,), ("NVIDIA GPU", "pip install -r requirements-gpu.txt"), ("--gpus",)),
        ({"nvidia/gpus/0000:18:00.0/information": "H100"}, (DRIVER,), ("requirements-gpu.txt",), ()),
        (VERSION, (), ("libcuda.so.1 is missing", "--gpus all"), ("requirements-gpu.txt",)),
        (VERSION, (DRIVER, "libcudnn.so.9"), ("nvidia-smi", "--verbose"), ("requirements-gpu.txt",)),
        ({"bin/nvidia-smi": TOOL.format("echo 'GPU 0: NVIDIA H100'")}, (DRIVER,), ("requirements-gpu.txt",), ()),
        ({"bin/nvidia-smi": TOOL.format("echo 'No devices were found'; exit 6")}, (DRIVER,), (), ()),
        ({"bin/nvidia-smi": TOOL.format("exit 0")}, (DRIVER,), (), ()),
        ({"bin/nvidia-smi": TOOL.format("echo 'GPU 0: x'; exit 9")}, (DRIVER,), (), ()),
        ({"bin/nvidia-smi": TOOL.format("exec /bin/sleep 20")}, (DRIVER,), (), ()),
        ({"kfd": ""}, (), ("AMD", "ROCm"), ()),
    ],
)
def test_gpu_that_goes_unused_is_told_with_what_helps(machine, monkeypatch, files, loads, words, others):
    monkeypatch.setattr(hardware, "SECONDS_OF_A_TOOL", 2)
    for name, text in files.items():
        if name.endswith("/"):
            (machine.bin.parent / name).mkdir(parents=True)
        else:
            write(machine.bin.parent / name, text)
            (machine.bin.parent / name).chmod(0o755)
    machine.loads = {*loads}
    told = machine.explain()
    assert bool(told) is bool(words)
    assert len(told.splitlines()) <= 1
    assert all(word in told for word in words)
    assert not any(word in told for word in others)
    assert "WSL2" in machine.explain("win32") or "nvidia/version" not in files or not words


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
def test_variables_that_name_no_gpu_hide_all(environment, hides):
    assert hides_gpus(environment) is hides


def test_packages_are_found_without_an_import():
    assert hardware.is_installed("numpy.linalg")
    assert not hardware.is_installed("no_such_package.part")
    assert hardware.can_load(None)
    assert not hardware.can_load("libnowhere.so.1")


# What the scripts print


@pytest.fixture
def gpus(monkeypatch):
    """What TensorFlow sees, and what it is told; two GPUs of 80 GiB at first."""
    seen = SimpleNamespace(devices=["gpu0", "gpu1"])
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: seen.devices if kind == "GPU" else [])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: {"device_name": "NVIDIA H100"})
    monkeypatch.setattr(devices, "gpu_memory_sizes", lambda number: [80 * 2**30] * number)
    monkeypatch.setattr(devices, "explain_unused_gpu", lambda: "Warning: unused.")
    monkeypatch.setattr(devices, "set_gpu_usage", lambda share: None)
    monkeypatch.setattr(devices, "count_cores", lambda: 2)
    for name in hardware.HIDING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return seen


@pytest.mark.parametrize(
    ("share", "strategy", "found", "variable", "printed"),
    [
        (0.95, "mirrored", 2, None, "Running on 2 GPUs: 2 x NVIDIA H100 (76.0 of 80 GiB each).\n"),
        (0.95, "none", 0, None, "Running on 2 CPU cores.\nWarning: unused.\n"),
        # Not wanted, and hidden.
        (0, "none", 2, None, "Running on 2 CPU cores.\n"),
        (0.95, "none", 0, "-1", "Running on 2 CPU cores.\n"),
    ],
)
def test_what_it_runs_on_is_told(gpus, capsys, monkeypatch, share, strategy, found, variable, printed):
    gpus.devices = gpus.devices[:found]
    if variable:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    devices.choose_devices(share, strategy)
    assert capsys.readouterr().out == printed


def test_build_without_cuda_takes_memory_as_it_needs_it(gpus, capsys, monkeypatch):
    grown = []
    monkeypatch.undo()
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["amd"])
    monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: False)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: {"device_name": "AMD Instinct"})
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, grows: grown.append((gpu, grows)))
    devices.choose_devices(0.5)
    assert capsys.readouterr().out == "Running on AMD Instinct.\n"
    assert grown == [("amd", True)]


BOOLEANS = """
from finetune.core.quiet import silence_libraries
silence_libraries(False)
from finetune.core.devices import start_devices, tf
start_devices(0.0)
tf.function(tf.transpose)(tf.constant([[True, False]]))
"""


@pytest.mark.slow
def test_booleans_bring_no_notice_of_the_cpu():
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    result = subprocess.run([sys.executable, "-c", BOOLEANS], cwd=PROJECT, env=environment, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


def test_requirements_for_a_gpu_have_the_bounds_of_requirements():
    lines = (PROJECT / "requirements.txt").read_text().splitlines()
    (bounds,) = [line.removeprefix("tensorflow") for line in lines if line.startswith("tensorflow>")]
    wanted = [line for line in (PROJECT / "requirements-gpu.txt").read_text().splitlines() if line[0] != "#"]
    assert wanted == ["-r requirements.txt", f"tensorflow[and-cuda]{bounds}"]
