"""The backbone of fastai_peer.py, a peer of the recipes: Keras's MobileNet, written in PyTorch."""

import numpy as np
import pytest

from benchmarks import fastai_peer

torch = pytest.importorskip("torch", reason="PyTorch, which the peer fastai needs, is not installed")


def test_weights_change_their_order_for_pytorch():
    kernel = np.arange(3 * 3 * 2 * 4, dtype=np.float32).reshape(3, 3, 2, 4)
    depthwise = np.arange(3 * 3 * 2, dtype=np.float32).reshape(3, 3, 2, 1)
    arrays = {"conv1/kernel": kernel, "conv_dw_1/kernel": depthwise, "images": kernel}
    arrays |= {f"conv1_bn/{name}": np.full(4, i) for i, name in enumerate(("gamma", "beta", "moving_mean"))}
    weights = fastai_peer.convert_weights(arrays)
    assert weights["conv1.weight"].shape == (4, 2, 3, 3)
    # Output 3, input 1, row 2, column 0: 2 * 24 + 0 * 8 + 1 * 4 + 3.
    assert weights["conv1.weight"][3, 1, 2, 0] == 55
    assert weights["conv_dw_1.weight"].shape == (2, 1, 3, 3)
    assert weights["conv_dw_1.weight"][1, 0, 2, 0] == 13
    assert [weights[f"conv1_bn.{name}"][0] for name in ("weight", "bias", "running_mean")] == [0, 1, 2]
    assert len(weights) == 6


def test_the_backbone_is_mobilenet():
    # Keras says 3,228,864, of which each batch normalisation's means and variances, 2 * 10,944, are not trained.
    assert sum(weights.numel() for weights in fastai_peer.build_backbone(64).parameters()) == 3_228_864 - 2 * 10_944


@pytest.mark.parametrize(("image_size", "first"), [(64, 32), (65, 33)])
def test_maps_are_as_large_as_those_of_keras(image_size, first):
    backbone = fastai_peer.build_backbone(image_size)
    images = torch.zeros(2, 3, image_size, image_size)
    with torch.no_grad():
        assert backbone[:2](images).shape == (2, 32, first, first)
        # (33 + 1 - 3) // 2 + 1 is 16 as well, then 8, 4 and 2.
        assert backbone[:-1](images).shape == (2, 1024, 2, 2)


def test_features_are_compared_as_mobilenet_takes_images():
    images = np.full((2, 4, 4, 3), 255, np.float32)
    pool = torch.nn.AdaptiveAvgPool2d(1)
    # White is 1; the largest feature is 2.
    assert fastai_peer.measure_error(pool, images, np.array([[1, 1, 1], [1, 1, 1]], np.float32)) == 0
    assert fastai_peer.measure_error(pool, images, np.array([[1, 1, 2], [1, 1, 1]], np.float32)) == 0.5
