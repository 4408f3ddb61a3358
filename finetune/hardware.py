"""What a script computes on: how many cores, which GPUs, and why a GPU that is there goes unused."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
NVIDIA_DRIVER = Path("/proc/driver/nvidia")
AMD_DRIVER = Path("/dev/kfd")
DRIVER_LIBRARY = "libcuda.so.1"
# One of the packages that requirements-gpu.txt installs, and what it holds.
CUDA_PACKAGE = "nvidia.cudnn"
CUDA_LIBRARY = "libcudnn.so.9"
# Hide GPUs where they name none.
HIDING_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
SECONDS_OF_A_TOOL = 10.0


class Gpu(NamedTuple):
    """A GPU that TensorFlow sees: what it is called, and the bytes of its memory, 0 where nothing tells."""

    name: str
    memory: int


def count_cores(cgroups: Path = CGROUPS, own_cgroups: Path = OWN_CGROUPS) -> float:
    """Returns how many cores this process may use: those that it is bound to, or fewer where its container has fewer.

    Args:
        cgroups: where Linux shows the limits of groups of processes, of version 1 or 2.
        own_cgroups: the file that names the groups of this process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [read_cpu_limit(folder) for folder in list_cgroups(cgroups, own_cgroups)]
    return min([cores, *(limit for limit in limits if limit)])


def list_cgroups(cgroups: Path, own_cgroups: Path) -> list[Path]:
    """Returns the folders whose limits hold for this process: its own groups', and those of all around them."""
    folders = {cgroups: None, cgroups / "cpu": None}
    with contextlib.suppress(OSError, ValueError):
        for line in own_cgroups.read_text(encoding="utf-8").splitlines():
            # Version 2 names no controllers.
            _, controllers, name = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                top = cgroups / "cpu" if controllers else cgroups
                group = top / name.strip("/")
                folders |= dict.fromkeys((group, *group.parents[: len(group.parts) - len(top.parts)]))
    return list(folders)


def read_cpu_limit(folder: Path) -> float:
    """Returns how many cores a group of processes may use at a time; 0 where nothing limits it."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (int((folder / f"cpu.cfs_{part}_us").read_text()) for part in ("quota", "period"))
        return max(quota, 0) / period
    return 0.0


def describe_hardware(gpus: Sequence[Gpu], share: float, trains_on_all: bool, cores: float) -> str:
    """Returns the line that says what a script runs on: `Running on NVIDIA H100 (76.0 of 80 GiB).`

    Args:
        gpus: those that TensorFlow may use.
        share: of each one's memory, in `[0, 1]`.
        trains_on_all: all work together; otherwise only the first one does.
        cores: for where there is no GPU.
    """
    if not gpus:
        number = math.floor(cores * 10) / 10
        return f"Running on {number:g} CPU core{'s' * (number != 1)}."
    if len(gpus) == 1 or not trains_on_all:
        first = f"the first of {len(gpus)} GPUs, " if len(gpus) > 1 else ""
        return f"Running on {first}{gpus[0].name}{_describe_memory(gpus[0], share)}."
    parts = [
        f"{number} x {gpu.name}{_describe_memory(gpu, share, ' each' * (number > 1))}"
        for gpu, number in Counter(gpus).items()
    ]
    return f"Running on {len(gpus)} GPUs: {', '.join(parts)}."


def _describe_memory(gpu: Gpu, share: float, each: str = "") -> str:
    size = gpu.memory / 2**30
    return f" ({size * share:.1f} of {size:.0f} GiB{each})" if gpu.memory else ""


def hides_gpus(environment: Mapping[str, str]) -> bool:
    """Tells whether a variable hides all GPUs on purpose: it is set and names none, as `-1` does."""
    values = [environment[name].strip() for name in HIDING_VARIABLES if name in environment]
    # Slurm writes the second into jobs that have asked for no GPU.
    return any(not value or value.startswith("-") or value == "NoDevFiles" for value in values)


def explain_unused_gpu(
    nvidia_driver: Path = NVIDIA_DRIVER, amd_driver: Path = AMD_DRIVER, platform: str = sys.platform
) -> str:
    """Returns why TensorFlow, which sees no GPU, does not use the one that this machine has, and what helps.

    Args:
        nvidia_driver: the folder in which NVIDIA's driver for Linux shows itself.
        amd_driver: the device by which AMD's driver is asked to compute.
        platform: as `sys.platform`.

    Returns:
        One line; empty where there is no GPU.
    """
    if has_nvidia_gpu(nvidia_driver):
        return f"Warning: this machine has an NVIDIA GPU that TensorFlow does not use: {_explain_nvidia(platform)}"
    if amd_driver.exists():
        return (
            "Warning: this machine has an AMD GPU that TensorFlow does not use: it needs TensorFlow's ROCm build. "
            "How to install that: https://rocm.docs.amd.com, under TensorFlow"
        )
    return ""


def _explain_nvidia(platform: str) -> str:
    if platform == "win32":
        return "on Windows it has not been able to since version 2.11. Run this in WSL2."
    if not can_load(DRIVER_LIBRARY):
        return (
            f"the driver's library {DRIVER_LIBRARY} is missing. Start a container with its GPUs "
            "(docker run --gpus all), or install NVIDIA's driver."
        )
    if not is_installed(CUDA_PACKAGE) and not can_load(CUDA_LIBRARY):
        return "CUDA's libraries are missing. Install them: pip install -r requirements-gpu.txt"
    return "CUDA's libraries are there. See whether nvidia-smi shows the GPU, and a driver of version 525 or later."


def has_nvidia_gpu(driver: Path) -> bool:
    """Tells whether a machine has a GPU of NVIDIA: its driver lists one, or nvidia-smi does."""
    if (driver / "gpus").is_dir():
        return any((driver / "gpus").iterdir())
    return (driver / "version").exists() or asks_nvidia_smi()


def asks_nvidia_smi() -> bool:
    """Tells whether nvidia-smi is on the PATH and lists a GPU: the tool may be there without one."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return False
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, timeout=SECONDS_OF_A_TOOL, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and answer.stdout.startswith(b"GPU ")


def can_load(library: str) -> bool:
    """Tells whether the system finds a library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def is_installed(package: str) -> bool:
    """Tells whether a package of Python is there, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
