"""Seeds, GPUs and precision."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from configs import Configs
from finetune import devices
from finetune.devices import choose_mixed_policy, gpu_memory_sizes, set_gpu_usage, set_seed
from finetune.options import UserError


def test_seed_repeats_the_draws():
    draws = []
    for seed in (3, 3, 4):
        assert set_seed(seed) == seed
        draws.append((np.random.rand(), keras.random.uniform((1,)).numpy().item()))
    assert draws[0] == draws[1] != draws[2]


def test_no_seed_draws_a_valid_one():
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


def test_share_holds_on_every_gpu(gpu_calls):
    set_gpu_usage(0.25)
    assert gpu_calls.limits == {"gpu0": [2048], "gpu1": [1024]}
    assert gpu_calls.visible is None


def test_share_of_0_hides_the_gpus(gpu_calls):
    set_gpu_usage(0)
    assert gpu_calls.visible == ([], "GPU")
    assert gpu_calls.limits == {}


def test_machine_without_gpu_needs_nothing(gpu_calls):
    gpu_calls.gpus = []
    set_gpu_usage(0.95)
    assert gpu_calls.limits == {}


def test_no_gpu_asks_no_driver(monkeypatch):
    monkeypatch.setattr(devices.ctypes, "CDLL", None)
    assert gpu_memory_sizes(0) == []


def test_missing_driver_is_told(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(devices.ctypes, "CDLL", missing)
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
