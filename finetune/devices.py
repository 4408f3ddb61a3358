"""Seeds, GPUs, strategies and the precision that layers compute in."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import keras
import tensorflow as tf

from configs import Configs
from finetune.hardware import Gpu, count_cores, describe_hardware, explain_unused_gpu, hides_gpus
from finetune.notices import hiding_notices
from finetune.options import UserError


def set_seed(random_seed: int | None, deterministic: bool = False) -> int:
    """Seeds Python, NumPy and Keras; None draws a seed.

    Args:
        random_seed: below 2**32.
        deterministic: also make TensorFlow's operations give the same bits every time, where they can.

    Returns:
        The seed in use.
    """
    seed = int.from_bytes(os.urandom(4), "little") if random_seed is None else random_seed
    keras.utils.set_random_seed(seed)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    return seed


def set_gpu_usage(gpu_percentage: float) -> None:
    """Limits TensorFlow to a share of every visible GPU's memory; to be called before TensorFlow uses one.

    Args:
        gpu_percentage: in `[0, 1]`; 0 hides all GPUs.

    Raises:
        UserError: it is not.
    """
    Configs.check_values(gpu_percentage=gpu_percentage)
    gpus = tf.config.list_physical_devices("GPU")
    if gpu_percentage == 0:
        tf.config.set_visible_devices([], "GPU")
        return
    if not tf.test.is_built_with_cuda():
        # AMD's and Apple's drivers are not asked for their memory: TensorFlow takes of it what it needs.
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        return
    for gpu, memory in zip(gpus, gpu_memory_sizes(len(gpus)), strict=True):
        limit = tf.config.LogicalDeviceConfiguration(memory_limit=int(memory * gpu_percentage) // 2**20)
        tf.config.set_logical_device_configuration(gpu, [limit])


def build_strategy(name: str) -> tf.distribute.Strategy:
    """Builds the strategy that makes devices train together; to be called before TensorFlow computes anything.

    Args:
        name: `mirrored` for the visible GPUs of this machine, or where it has none for its logical CPUs;
            `multi_worker` for those of every host in TF_CONFIG; `none` for one device.
    """
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "multi_worker":
        # Left alone, TensorFlow takes its own ring over gRPC for GPUs as well.
        kinds = tf.distribute.experimental.CommunicationImplementation
        kind = kinds.NCCL if tf.config.list_physical_devices("GPU") else kinds.AUTO
        options = tf.distribute.experimental.CommunicationOptions(implementation=kind)
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def choose_devices(gpu_percentage: float, distribution_strategy: str = "none") -> None:
    """Prints what is computed on, and why not on a GPU that is there; then limits TensorFlow as `set_gpu_usage` does.

    Args:
        gpu_percentage: in `[0, 1]`; 0 hides all GPUs.
        distribution_strategy: `none` computes on the first of several GPUs.
    """
    # The first look at the GPUs brings notices.
    with hiding_notices():
        found = tf.config.list_physical_devices("GPU")
    gpus = describe_gpus(found) if gpu_percentage else []
    print(describe_hardware(gpus, gpu_percentage, distribution_strategy != "none", count_cores()))
    if gpu_percentage and not gpus and not hides_gpus(os.environ) and (warning := explain_unused_gpu()):
        print(warning)
    # Before what may take long: a GPU that goes unused is to be known at once.
    sys.stdout.flush()
    set_gpu_usage(gpu_percentage)


def describe_gpus(found: list[tf.config.PhysicalDevice]) -> list[Gpu]:
    """Returns what TensorFlow's GPUs are called, and their memory, which a build for AMD or Apple does not tell."""
    sizes = gpu_memory_sizes(len(found)) if tf.test.is_built_with_cuda() else [0] * len(found)
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in found]
    return [Gpu(name, size) for name, size in zip(names, sizes, strict=True)]


def start_devices(gpu_percentage: float, distribution_strategy: str = "none") -> tf.distribute.Strategy:
    """Makes the devices ready, and says which; returns the strategy that they train by."""
    choose_devices(gpu_percentage, distribution_strategy)
    return start_strategy(distribution_strategy)


def start_strategy(name: str) -> tf.distribute.Strategy:
    """Builds a strategy, in the order that TensorFlow wants: after `choose_devices`, and before anything else."""
    strategy = build_strategy(name)
    keep_freed_memory()
    return strategy


def keep_freed_memory() -> None:
    """Lets the C library reuse the memory that TensorFlow frees, where it is glibc.

    The first `tf.data` generator of TensorFlow 2.21 tells glibc to give freed memory back to the system at once, and
    every training step then asks for it anew: on 2 cores an epoch of MobileNet took 7.5 s instead of 2.9 s.
    """
    for _ in tf.data.Dataset.from_generator(lambda: iter([0]), output_signature=tf.TensorSpec((), tf.int32)):
        pass
    trim_threshold, mmap_threshold, largest_mmap_threshold = -1, -3, 2**25
    with contextlib.suppress(OSError, AttributeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(trim_threshold, 2**31 - 1)
        c_library.mallopt(mmap_threshold, largest_mmap_threshold)


def gpu_memory_sizes(number_of_gpus: int) -> list[int]:
    """Asks the CUDA driver for the memory of its GPUs, in its own order, which TensorFlow shares.

    Returns:
        Bytes of each GPU.

    Raises:
        UserError: the driver does not answer.
    """
    if not number_of_gpus:
        return []
    sizes = []
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        status = cuda.cuInit(0)
        for position in range(number_of_gpus):
            device, size = ctypes.c_int(), ctypes.c_size_t()
            status = status or cuda.cuDeviceGet(ctypes.byref(device), position)
            status = status or cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
            sizes.append(size.value)
    except (OSError, AttributeError) as error:
        raise UserError(
            f"Cannot ask the CUDA driver for the GPUs' memory: {error}. Set gpu_percentage to 0."
        ) from error
    if status:
        raise UserError(f"The CUDA driver answered with error {status}. Check nvidia-smi, or set gpu_percentage to 0.")
    return sizes


@contextlib.contextmanager
def precision_policy(mixed: bool) -> Iterator[None]:
    """Makes the layers built inside it compute in 16 bits, where `mixed` says so; weights stay float32."""
    before = keras.config.dtype_policy()
    if mixed:
        keras.config.set_dtype_policy(choose_mixed_policy())
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def choose_mixed_policy() -> str:
    """Returns `mixed_bfloat16` where every visible GPU computes in bfloat16 (or there is none), else `mixed_float16`.

    NVIDIA's GPUs do from compute capability 8.0 (Ampere) on.
    """
    details = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices("GPU"))
    is_new = all(gpu.get("compute_capability", (8, 0)) >= (8, 0) for gpu in details)
    return "mixed_bfloat16" if is_new else "mixed_float16"
