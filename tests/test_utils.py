"""The functions that a user's own code imports."""

import utils

PROMISED = {"custom_load_model", "custom_save_model", "classify_image", "load_model", "get_generator", "get_optimizer"}
PROMISED |= {"set_gpu_usage", "get_class_weights", "get_multilabel_class_weights"}
PROMISED |= {"get_evaluation_metrics", "get_multilabel_evaluation_metrics"}


def test_public_names_are_exported_from_their_modules():
    assert set(utils.__all__) >= PROMISED
    assert sorted(utils.__all__) == utils.__all__
    for name in utils.__all__:
        assert getattr(utils, name).__module__.startswith(("finetune.", "generator")), name
