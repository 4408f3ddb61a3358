"""Devices: CPU cores, GPUs, seeds, precision and distribution strategies, and why a GPU is not used."""

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.core.arguments import take_share
from finetune.core.options import UserError
from finetune.core.scripts import hiding_stderr

# Every script imports this module before any other that needs TensorFlow.
with hiding_stderr():
    import keras
    import tensorflow as tf

# The control groups of Linux, version 1 or 2, and those of this process.
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# A folder of NVIDIA's driver and the compute device of AMD's driver.
NVIDIA_DRIVER = Path("/proc/driver/nvidia")
AMD_DRIVER = Path("/dev/kfd")
DRIVER_LIBRARY = "libcuda.so.1"
# One of the packages in requirements-gpu.txt, and its library.
CUDA_PACKAGE = "nvidia.cudnn"
CUDA_LIBRARY = "libcudnn.so.9"
# They hide all GPUs if they name none.
HIDING_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
SECONDS_OF_A_TOOL = 10.0


class Gpu(NamedTuple):
    """A GPU that TensorFlow sees: its name, and its memory in bytes or 0 if unknown."""

    name: str
    memory: int


def count_cores() -> float:
    """Returns the number of CPU cores that this process may use, by its affinity and its container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [read_cpu_limit(folder) for folder in list_cgroups()]
    return min([cores, *(limit for limit in limits if limit)])


def list_cgroups() -> set[Path]:
    """Returns the folders of this process's control groups and of their parents, whose limits hold too."""
    folders = {CGROUPS, CGROUPS / "cpu"}
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
            # In version 2 this field is empty.
            _, controllers, name = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                top = CGROUPS / "cpu" if controllers else CGROUPS
                group = top / name.strip("/")
                folders |= {group, *group.parents[: len(group.parts) - len(top.parts)]}
    return folders


def read_cpu_limit(folder: Path) -> float:
    """Returns the number of cores that a control group may use; 0 if it has no limit."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (int((folder / f"cpu.cfs_{part}_us").read_text()) for part in ("quota", "period"))
        return max(quota, 0) / period
    return 0.0


def describe_hardware(gpus: Sequence[Gpu], share: float, trains_on_all: bool, cores: float) -> str:
    """Returns a line such as `Running on NVIDIA H100 (76.0 of 80 GiB).`

    Args:
        gpus: the GPUs that TensorFlow may use.
        share: the share of their memory, in `[0, 1]`.
        trains_on_all: whether all GPUs are used, or only the first one.
        cores: the number of CPU cores, shown without GPUs.
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
    """Returns whether a variable hides all GPUs on purpose: it is set and names none, as with `-1`."""
    values = [environment[name].strip() for name in HIDING_VARIABLES if name in environment]
    # Slurm sets NoDevFiles in jobs that requested no GPU.
    return any(not value or value.startswith("-") or value == "NoDevFiles" for value in values)


def explain_unused_gpu() -> str:
    """Returns why TensorFlow does not use this machine's GPU, and the remedy, in one line; empty without a GPU."""
    if has_nvidia_gpu():
        return f"Warning: this machine has an NVIDIA GPU that TensorFlow does not use: {_explain_nvidia()}"
    if AMD_DRIVER.exists():
        return (
            "Warning: this machine has an AMD GPU that TensorFlow does not use: it needs TensorFlow's ROCm build. "
            "See https://rocm.docs.amd.com to install it."
        )
    return ""


def _explain_nvidia() -> str:
    if sys.platform == "win32":
        return "since version 2.11 it supports no GPUs on Windows. Use WSL2."
    if not can_load(DRIVER_LIBRARY):
        return (
            f"the driver's library {DRIVER_LIBRARY} is missing. Start the container with GPUs "
            "(docker run --gpus all), or install NVIDIA's driver."
        )
    if not is_installed(CUDA_PACKAGE) and not can_load(CUDA_LIBRARY):
        return "CUDA's libraries are missing. Install them: pip install -r requirements-gpu.txt"
    return (
        "CUDA's libraries are installed. Check that nvidia-smi shows the GPU and a driver of version 525 or later. "
        "--verbose True shows TensorFlow's messages."
    )


def has_nvidia_gpu() -> bool:
    """Returns whether the machine has an NVIDIA GPU, according to its driver or nvidia-smi."""
    if (NVIDIA_DRIVER / "gpus").is_dir():
        return any((NVIDIA_DRIVER / "gpus").iterdir())
    if (NVIDIA_DRIVER / "version").exists():
        return True
    tool = shutil.which("nvidia-smi")
    if not tool:
        return False
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, timeout=SECONDS_OF_A_TOOL, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and answer.stdout.startswith(b"GPU ")


def can_load(library: str) -> bool:
    """Returns whether the system can load a library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def is_installed(package: str) -> bool:
    """Returns whether a Python package is installed, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def set_seed(random_seed: int | None, deterministic: bool = False) -> int:
    """Seeds Python, NumPy and Keras; None draws a seed.

    Args:
        random_seed: below 2**32.
        deterministic: also make TensorFlow's operations deterministic.

    Returns:
        The seed in use.
    """
    seed = int.from_bytes(os.urandom(4), "little") if random_seed is None else random_seed
    keras.utils.set_random_seed(seed)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    return seed


def set_gpu_usage(gpu_percentage: float) -> None:
    """Limits TensorFlow to a share of every visible GPU's memory; to be called before TensorFlow uses a GPU.

    Args:
        gpu_percentage: in `[0, 1]`; 0 hides all GPUs.

    Raises:
        UserError: `gpu_percentage` is out of range.
    """
    gpu_percentage = take_share("gpu_percentage", gpu_percentage)
    gpus = tf.config.list_physical_devices("GPU")
    if gpu_percentage == 0:
        tf.config.set_visible_devices([], "GPU")
        return
    if not tf.test.is_built_with_cuda():
        # The memory of AMD's and Apple's GPUs is unknown: TensorFlow takes what it needs.
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        return
    for gpu, memory in zip(gpus, gpu_memory_sizes(len(gpus)), strict=True):
        limit = tf.config.LogicalDeviceConfiguration(memory_limit=int(memory * gpu_percentage) // 2**20)
        tf.config.set_logical_device_configuration(gpu, [limit])


def build_strategy(name: str) -> tf.distribute.Strategy:
    """Builds a distribution strategy; to be called before TensorFlow computes anything.

    Args:
        name: `mirrored` for this machine's visible GPUs, or its logical CPUs if it has none; `multi_worker` for the
            devices of every host in TF_CONFIG; `none` for one device.
    """
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "multi_worker":
        # By default TensorFlow uses its own ring over gRPC for GPUs as well.
        kinds = tf.distribute.experimental.CommunicationImplementation
        kind = kinds.NCCL if tf.config.list_physical_devices("GPU") else kinds.AUTO
        options = tf.distribute.experimental.CommunicationOptions(implementation=kind)
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def choose_devices(gpu_percentage: float, distribution_strategy: str = "none") -> None:
    """Prints which devices are used, and why a GPU is not; then limits TensorFlow as `set_gpu_usage` does.

    Args:
        gpu_percentage: in `[0, 1]`; 0 hides all GPUs.
        distribution_strategy: `none` uses the first of several GPUs.
    """
    # TensorFlow logs when it first lists the GPUs.
    with hiding_stderr():
        found = tf.config.list_physical_devices("GPU")
    gpus = describe_gpus(found) if gpu_percentage else []
    print(describe_hardware(gpus, gpu_percentage, distribution_strategy != "none", count_cores()))
    if gpu_percentage and not gpus and not hides_gpus(os.environ) and (warning := explain_unused_gpu()):
        print(warning)
    # The user should see an unused GPU before any long work.
    sys.stdout.flush()
    set_gpu_usage(gpu_percentage)


def describe_gpus(found: list[tf.config.PhysicalDevice]) -> list[Gpu]:
    """Returns the names of TensorFlow's GPUs and their memory, which is 0 in builds for AMD and Apple."""
    sizes = gpu_memory_sizes(len(found)) if tf.test.is_built_with_cuda() else [0] * len(found)
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in found]
    return [Gpu(name, size) for name, size in zip(names, sizes, strict=True)]


def start_devices(gpu_percentage: float, distribution_strategy: str = "none") -> tf.distribute.Strategy:
    """Sets up and prints the devices as `choose_devices` does; returns their strategy."""
    choose_devices(gpu_percentage, distribution_strategy)
    return start_strategy(distribution_strategy)


def start_strategy(name: str) -> tf.distribute.Strategy:
    """Builds a strategy and finishes the set-up of TensorFlow; to be called right after `choose_devices`."""
    strategy = build_strategy(name)
    keep_freed_memory()
    # On CPUs without AVX-512 the first transposed booleans, as in AUROC, cause a log message.
    with hiding_stderr(), tf.device("CPU"):
        tf.transpose(tf.constant([[True]]))
    return strategy


def keep_freed_memory() -> None:
    """Lets glibc reuse the memory that TensorFlow frees.

    The first `tf.data` generator of TensorFlow 2.21 makes glibc return freed memory to the system at once, and every
    training step allocates it again: on 2 cores an epoch of MobileNet took 7.5 s instead of 2.9 s.
    """
    for _ in tf.data.Dataset.from_generator(lambda: iter([0]), output_signature=tf.TensorSpec((), tf.int32)):
        pass
    trim_threshold, mmap_threshold, largest_mmap_threshold = -1, -3, 2**25
    with contextlib.suppress(OSError, AttributeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(trim_threshold, 2**31 - 1)
        c_library.mallopt(mmap_threshold, largest_mmap_threshold)


def gpu_memory_sizes(number_of_gpus: int) -> list[int]:
    """Returns the memory of each GPU in bytes, from the CUDA driver, whose order is also TensorFlow's.

    Raises:
        UserError: the driver does not answer.
    """
    if not number_of_gpus:
        return []
    sizes = []
    try:
        cuda = ctypes.CDLL(DRIVER_LIBRARY)
        status = cuda.cuInit(0)
        for position in range(number_of_gpus):
            device, size = ctypes.c_int(), ctypes.c_size_t()
            status = status or cuda.cuDeviceGet(ctypes.byref(device), position)
            status = status or cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
            sizes.append(size.value)
    except (OSError, AttributeError) as error:
        raise UserError(
            f"The CUDA driver does not report the GPUs' memory: {error}. Set gpu_percentage to 0."
        ) from error
    if status:
        raise UserError(f"The CUDA driver answered with error {status}. Check nvidia-smi, or set gpu_percentage to 0.")
    return sizes


@contextlib.contextmanager
def precision_policy(mixed: bool) -> Iterator[None]:
    """Makes layers that are built in the `with` block compute in 16 bits if `mixed`; weights stay float32."""
    before = keras.config.dtype_policy()
    if mixed:
        keras.config.set_dtype_policy(choose_mixed_policy())
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def choose_mixed_policy() -> str:
    """Returns `mixed_bfloat16` if all visible GPUs support it, else `mixed_float16`.

    NVIDIA's GPUs support bfloat16 from compute capability 8.0 (Ampere) on.
    """
    details = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices("GPU"))
    is_new = all(gpu.get("compute_capability", (8, 0)) >= (8, 0) for gpu in details)
    return "mixed_bfloat16" if is_new else "mixed_float16"
