"""The second, fourth and every other backbone of configs.py, each built, explained, saved and loaded."""

from backbone_checks import *  # noqa: F403 - these are the tests

from finetune.models.backbones import BACKBONES


def pytest_generate_tests(metafunc):
    metafunc.parametrize("built", [*BACKBONES][1::2], indirect=True, scope="module")
