"""The first, third and every other backbone of configs.py, each built, explained, saved and loaded."""

from backbone_checks import (  # noqa: F401 - these are the tests
    built,
    test_backbone_gives_a_heatmap,
    test_backbone_survives_saving,
    test_backbone_takes_an_image,
    test_last_conv_layer_is_the_backbones_last,
)

from configs import BACKBONE_NAMES


def pytest_generate_tests(metafunc):
    metafunc.parametrize("built", BACKBONE_NAMES[::2], indirect=True, scope="module")
