"""What a user's own code imports is there, and is what its module has."""

import utils

PROMISED = {"custom_load_model", "custom_save_model", "classify_image", "load_model", "get_generator", "get_optimizer"}
PROMISED |= {"set_gpu_usage", "get_class_weights", "get_multilabel_class_weights"}
PROMISED |= {"get_evaluation_metrics", "get_multilabel_evaluation_metrics"}


def test_every_name_that_is_promised_is_exported():
    assert set(utils.__all__) >= PROMISED
    assert sorted(utils.__all__) == utils.__all__


def test_every_name_comes_from_a_room():
    for name in utils.__all__:
        assert getattr(utils, name).__module__.startswith(("finetune.", "generator")), name
